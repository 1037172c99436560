"""My library: shelves, ratings, reviews and statistics."""

import base64
import json
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient

from models import normalize
from tests.fixtures import Clock, Person, Server, sign_up


def iso(clock: Clock) -> str:
    return clock.now.isoformat().replace("+00:00", "Z")


def test_a_book_can_be_shelved_once(client: TestClient, clock: Clock, reader: Person) -> None:
    book = reader.add_book()
    answer = reader.post(f"/my-library/{book['id']}", json={"status": "reading"})
    assert (answer.status_code, answer.headers["Location"]) == (201, f"/my-library/{book['id']}")
    assert (
        answer.json()
        == reader.get(answer.headers["Location"]).json()
        == {
            "book_id": book["id"],
            "status": "reading",
            "rating": None,
            "review": None,
            "page": None,
            "tags": [],
            "started_at": None,
            "finished_at": None,
            "added_at": iso(clock),
            "updated_at": iso(clock),
            "book": book,
        }
    )
    again = reader.post(f"/my-library/{book['id']}")
    assert (again.status_code, again.json()["detail"]) == (409, "This book is on your shelf already.")
    assert "errors" not in again.json(), "book_id is no field of the body"
    assert reader.post("/my-library/999").status_code == 404
    assert client.post(f"/my-library/{book['id']}").status_code == 401


@pytest.mark.slow
def test_of_concurrent_requests_one_shelves_the_book(server: Server) -> None:
    reader = sign_up(server.client, "rita")
    book = reader.add_book()
    with ThreadPoolExecutor(20) as pool:
        answers = pool.map(lambda _: reader.post(f"/my-library/{book['id']}").status_code, range(20))
        assert sorted(answers) == [201] + [409] * 19


READ = {"status": "completed", "rating": 4, "review": "Sandy.", "tags": ["sand"], "finished_at": "2025-01-01"}
SAME_ENTRY: dict[str, dict[str, Any]] = {
    "nothing": {},
    "the same": READ,
    "the same status": {"status": "completed"},
    "the rating as a float": {"rating": 4.0},
    "a tag twice": {"tags": ["sand", "sand"]},
    "the moment elsewhere": {"finished_at": "2025-01-01T01:00:00+01:00"},
    "what is null": {"started_at": None},
}


@pytest.mark.parametrize("change", SAME_ENTRY.values(), ids=SAME_ENTRY)
def test_a_change_that_changes_nothing_makes_no_event(clock: Clock, reader: Person, change: dict[str, Any]) -> None:
    path = f"/my-library/{reader.add_book()['id']}"
    reader.post(path)
    before = reader.patch(path, json=READ).json()
    cursor = reader.get("/my-library").headers["X-Event-Cursor"]
    clock.advance(minutes=1)
    answer = reader.patch(path, json=change)
    assert (answer.status_code, answer.json()) == (200, before)
    assert reader.get(path).json() == before
    assert reader.get("/my-library").headers["X-Event-Cursor"] == cursor


def test_shelves_are_private(reader: Person, other_reader: Person, librarian: Person) -> None:
    shelf = f"/my-library/{reader.add_book()['id']}"
    reader.post(shelf)
    for person in (other_reader, librarian):
        assert person.get("/my-library").json()["items"] == []
        for method in ("GET", "PATCH", "DELETE"):
            assert person.request(method, shelf, json={} if method == "PATCH" else None).status_code == 404
    assert reader.get(shelf).status_code == 200


CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "status": ({"status": "abandoned"}, {"status": "abandoned", "finished_at": None}),
    "completed now": ({"status": "completed"}, {"finished_at": "now"}),
    "completed on a day": (
        {"status": "completed", "finished_at": "2020-01-02"},
        {"finished_at": "2020-01-02T00:00:00Z"},
    ),
    "completed, day unknown": ({"status": "completed", "finished_at": None}, {"finished_at": None}),
    "time with offset": ({"started_at": "2020-01-02T03:00:00+02:00"}, {"started_at": "2020-01-02T01:00:00Z"}),
    "rating and review": (
        {"status": "completed", "rating": 5, "review": " Good. "},
        {"rating": 5, "review": "Good."},
    ),
    "rating on the wishlist": ({"rating": 5}, {"status": "wishlist", "rating": 5}),
    "review while reading": ({"status": "reading", "review": "So far."}, {"status": "reading", "review": "So far."}),
    "smallest rating": ({"rating": 0.25}, {"rating": 0.25}),
    "rating in quarters": ({"rating": 4.75}, {"rating": 4.75}),
    "blank review": ({"status": "completed", "review": "  "}, {"review": None}),
    "repeated tags": ({"tags": ["sf", " desert ", "sf"]}, {"tags": ["sf", "desert"]}),
    "null tags": ({"tags": None}, {"tags": []}),
    "page": ({"page": 120}, {"page": 120, "status": "wishlist"}),
    "first page": ({"page": 0}, {"page": 0}),
    "null page": ({"page": None}, {"page": None}),
    "no fields": ({}, {"status": "wishlist"}),
}


@pytest.mark.parametrize(("change", "expected"), CHANGES.values(), ids=CHANGES)
def test_a_change_sets_the_fields_of_an_entry(
    clock: Clock, reader: Person, change: dict[str, Any], expected: dict[str, Any]
) -> None:
    shelf = f"/my-library/{reader.add_book()['id']}"
    reader.post(shelf)
    clock.advance(minutes=1)
    answer = reader.patch(shelf, json=change)
    assert answer.status_code == 200, answer.text
    assert answer.json().items() >= {k: iso(clock) if v == "now" else v for k, v in expected.items()}.items()
    assert reader.get(shelf).json() == answer.json()


INVALID: dict[str, tuple[dict[str, Any], str]] = {
    "rating 0": ({"status": "completed", "rating": 0}, "rating"),
    "rating 6": ({"status": "completed", "rating": 6}, "rating"),
    "rating 3.3": ({"rating": 3.3}, "rating"),
    "rating 0.2": ({"rating": 0.2}, "rating"),
    "rating as text": ({"rating": "4"}, "rating"),
    "unknown status": ({"status": "lost"}, "status"),
    "null status": ({"status": None}, "status"),
    "blank tag": ({"tags": [" "]}, "tags"),
    "long tag": ({"tags": ["x" * 51]}, "tags"),
    "too many tags": ({"tags": [str(n) for n in range(51)]}, "tags"),
    "NUL in review": ({"status": "completed", "review": "a\0"}, "review"),
    "long review": ({"status": "completed", "review": "x" * 20_001}, "review"),
    "word as time": ({"started_at": "yesterday"}, "started_at"),
    "number as time": ({"started_at": 1218412800}, "started_at"),
    "year 9999": ({"finished_at": "9999-12-31T23:59:59.999999Z"}, "finished_at"),
    "before the year 1 in UTC": ({"started_at": "0001-01-01T00:00:00+14:00"}, "started_at"),
    "negative page": ({"page": -1}, "page"),
    "page above the maximum": ({"page": 100_001}, "page"),
    "page as text": ({"page": "12"}, "page"),
    "half a page": ({"page": 12.5}, "page"),
    "true as page": ({"page": True}, "page"),
    "unknown field": ({"user_id": 1}, "user_id"),
}


@pytest.mark.parametrize(("change", "field"), INVALID.values(), ids=INVALID)
def test_an_invalid_change_is_422_and_changes_nothing(reader: Person, change: dict[str, Any], field: str) -> None:
    shelf = f"/my-library/{reader.add_book()['id']}"
    before = reader.post(shelf).json()
    answer = reader.patch(shelf, json=change)
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["loc"][:2] == ["body", field]
    assert reader.get(shelf).json() == before


def test_a_rated_book_keeps_its_rating_on_any_shelf(reader: Person) -> None:
    shelf = f"/my-library/{reader.add_book()['id']}"
    reader.post(shelf)
    reader.patch(shelf, json={"rating": 3, "review": "Hm."})
    for status in ("reading", "completed", "abandoned", "wishlist"):
        entry = reader.patch(shelf, json={"status": status}).json()
        assert (entry["status"], entry["rating"], entry["review"]) == (status, 3, "Hm.")


@pytest.mark.parametrize(("rating", "shown"), [(4, "4"), (4.0, "4"), (4.25, "4.25"), (4.5, "4.5")])
def test_whole_stars_are_whole_numbers(client: TestClient, reader: Person, rating: float, shown: str) -> None:
    shelf = f"/my-library/{reader.add_book()['id']}"
    reader.post(shelf)
    start = client.get("/events").json()["next"]
    answers = [reader.patch(shelf, json={"rating": rating}), reader.patch(shelf, json={"tags": ["sf"]})]
    answers += [reader.get(shelf), reader.get("/my-library"), client.get("/books/1/reviews")]
    answers += [client.get("/events", params={"after": start}), reader.get("/events?types=shelf.*")]
    for answer in answers:
        assert f'"rating":{shown},' in answer.text.replace(" ", ""), answer.text


def test_a_known_day_of_finishing_stays(clock: Clock, reader: Person) -> None:
    shelf = f"/my-library/{reader.add_book()['id']}"
    reader.post(shelf)
    reader.patch(shelf, json={"finished_at": "2020-01-02"})
    assert reader.patch(shelf, json={"status": "completed"}).json()["finished_at"] == "2020-01-02T00:00:00Z"
    assert reader.patch(shelf, json={"finished_at": None}).json()["finished_at"] is None
    assert reader.patch(shelf, json={"rating": 4, "status": "completed"}).json()["finished_at"] is None


def test_the_shelf_is_sorted_by_the_time_of_adding_not_by_the_order_of_an_import(reader: Person) -> None:
    days = ["2019/05/01", "2021/01/01", "2018/02/03", "2021/01/01", "2020/12/24"]
    rows = "".join(f"Book {n},A,0,to-read,{day}\n" for n, day in enumerate(days))
    reader.upload(f"Title,Author,My Rating,Exclusive Shelf,Date Added\n{rows}", path="/my-library/import")
    for sort in ("added", "-added"):
        walked: list[tuple[str, str]] = []
        query: dict[str, Any] = {"sort": sort, "limit": 2}
        while query.get("cursor", "") is not None:
            page = reader.get("/my-library", params=query).json()
            walked += [(entry["added_at"], entry["book"]["title"]) for entry in page["items"]]
            query["cursor"] = page["next"]
        expected = sorted((f"{day.replace('/', '-')}T00:00:00Z", f"Book {n}") for n, day in enumerate(days))
        assert walked == expected[:: -1 if sort == "-added" else 1]
    assert reader.get("/my-library", params={"cursor": cursor_of("-added", 3)}).status_code == 422


@pytest.mark.parametrize("key", ["", "2021-13-01 00:00:00.000000", "2021-01-01T00:00:00Z", 7, None], ids=repr)
def test_an_invalid_time_in_a_cursor_is_422(reader: Person, key: object) -> None:
    assert reader.get("/my-library", params={"cursor": cursor_of("-added", key, 3)}).status_code == 422


def cursor_of(*keys: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(keys).encode()).decode().rstrip("=")


def test_the_shelf_can_be_filtered_and_sorted(clock: Clock, reader: Person) -> None:
    for title, status, rating in (("beta", "completed", 3), ("Alpha", "reading", None), ("gamma", "completed", 5)):
        shelf = f"/my-library/{reader.add_book(title=title)['id']}"
        reader.post(shelf, json={"status": status})
        clock.advance(minutes=1)
        if rating:
            reader.patch(shelf, json={"rating": rating})

    def titles(**query: str) -> list[str]:
        page = reader.get("/my-library", params=query).json()
        walked, cursor = [], None
        while True:
            step = reader.get("/my-library", params={**query, "limit": 1, **({"cursor": cursor} if cursor else {})})
            walked += [entry["book"]["title"] for entry in step.json()["items"]]
            if (cursor := step.json()["next"]) is None:
                break
        assert walked == [entry["book"]["title"] for entry in page["items"]]
        assert page["total"] == len(walked)
        return walked

    assert titles() == ["gamma", "Alpha", "beta"]
    assert titles(status="completed") == ["gamma", "beta"]
    assert titles(sort="title") == ["Alpha", "beta", "gamma"]
    assert titles(sort="-rating") == ["gamma", "beta", "Alpha"]
    assert titles(sort="-updated") == ["gamma", "Alpha", "beta"]
    assert titles(sort="added") == ["beta", "Alpha", "gamma"]
    assert titles(book_id="2") == titles(book_id="2", status="reading") == ["Alpha"]
    assert titles(book_id="2", status="completed") == titles(book_id="99") == []
    assert reader.get("/my-library?status=lost").status_code == 422
    assert reader.get("/my-library?book_id=two").status_code == 422


def test_entries_with_a_rating_or_a_text_are_reviews(client: TestClient, reader: Person, other_reader: Person) -> None:
    book = reader.add_book()
    for person, change in ((reader, {"rating": 4}), (other_reader, {"review": "Hm."})):
        person.post(f"/my-library/{book['id']}", json={"status": "completed"})
        assert client.get(f"/books/{book['id']}/reviews").json()["total"] == (person is other_reader)
        person.patch(f"/my-library/{book['id']}", json=change)
    page = client.get(f"/books/{book['id']}/reviews").json()
    assert [(r["username"], r["rating"], r["review"]) for r in page["items"]] == [
        ("Oskar", None, "Hm."),
        ("Rita", 4, None),
    ]
    assert page["items"][0].keys() == {"username", "rating", "review", "finished_at", "updated_at"}
    first = client.get(f"/books/{book['id']}/reviews?limit=1").json()
    second = client.get(f"/books/{book['id']}/reviews", params={"limit": 1, "cursor": first["next"]}).json()
    assert first["items"] + second["items"] == page["items"]
    assert client.get("/books/999/reviews").status_code == 404


def test_rating_and_rating_count_follow_any_sequence_of_changes(
    client: TestClient, reader: Person, other_reader: Person
) -> None:
    chance = random.Random(7)
    book = reader.add_book()["id"]
    ratings: dict[str, float | None] = {}
    for _ in range(120):
        person = chance.choice([reader, other_reader])
        shelf, name = f"/my-library/{book}", person.username
        match chance.choice(["shelve", "rate", "rate", "clear", "remove"]):
            case "shelve":
                if person.post(shelf, json={"status": "completed"}).status_code == 201:
                    ratings[name] = None
            case "rate":
                stars = chance.randint(1, 20) / 4
                if person.patch(shelf, json={"rating": stars}).status_code == 200:
                    ratings[name] = stars
            case "clear":
                if person.patch(shelf, json={"rating": None}).status_code == 200:
                    ratings[name] = None
            case "remove":
                assert (person.delete(shelf).status_code == 204) == (name in ratings)
                ratings.pop(name, None)
        given = [stars for stars in ratings.values() if stars]
        shown = client.get(f"/books/{book}").json()
        assert shown["rating_count"] == len(given)
        assert shown["rating"] == (sum(given) / len(given) if given else None)


@pytest.mark.slow
def test_concurrent_ratings_all_count(server: Server) -> None:
    book = sign_up(server.client, "rita").add_book()["id"]
    people = [sign_up(server.client, f"reader{number}") for number in range(10)]

    def rate(person: Person) -> None:
        person.post(f"/my-library/{book}", json={"status": "completed"})
        for stars in (1, 2, 4):
            assert person.patch(f"/my-library/{book}", json={"rating": stars}).status_code == 200

    with ThreadPoolExecutor(10) as pool:
        list(pool.map(rate, people))
    shown = server.client.get(f"/books/{book}").json()
    assert (shown["rating"], shown["rating_count"]) == (4.0, 10)


def test_events_of_a_review(client: TestClient, reader: Person) -> None:
    shelf = f"/my-library/{reader.add_book()['id']}"
    start = client.get("/events").json()["next"]
    reader.post(shelf, json={"status": "completed"})
    for change in ({"rating": 3}, {"review": "Fine."}, {"tags": ["x"]}, {"rating": None, "review": None}):
        reader.patch(shelf, json=change)
    reader.patch(shelf, json={"rating": 1})
    reader.delete(shelf)
    public = client.get("/events", params={"after": start}).json()["items"]
    assert [(event["type"], event["data"]["rating"], event["data"]["book_rating_count"]) for event in public] == [
        ("review.created", 3, 1),
        ("review.updated", 3, 1),
        ("review.deleted", None, 0),
        ("review.created", 1, 1),
        ("review.deleted", 1, 0),
    ]
    private = [event["type"] for event in reader.get("/events", params={"after": start}).json()["items"]]
    assert [kind for kind in private if kind.startswith("shelf")] == ["shelf.created"] + ["shelf.updated"] * 5 + [
        "shelf.deleted"
    ]


# --- statistics ------------------------------------------------------------------------------------------------------


def shelve(reader: Person, book: dict[str, Any], **entry: Any) -> None:
    shelf = f"/my-library/{reader.add_book(**book)['id']}"
    assert reader.post(shelf).status_code == 201
    assert reader.patch(shelf, json=entry).status_code == 200


def test_statistics_of_an_empty_shelf(reader: Person) -> None:
    assert reader.get("/my-library/stats").json() == {
        "total": 0,
        "by_status": {"wishlist": 0, "reading": 0, "completed": 0, "abandoned": 0},
        "by_year": [],
        "undated": 0,
        "average_rating": None,
        "rating_count": 0,
        "top_genres": [],
        "top_tags": [],
        "top_authors": [],
    }


def test_statistics_count_by_status_year_genre_and_author(reader: Person, other_reader: Person) -> None:
    austen, done = {"author": "Jane Austen", "genre": "Romance"}, {"status": "completed"}
    shelve(reader, {**austen, "title": "Emma", "pages": 474}, **done, finished_at="2024-12-31T23:59:59Z", rating=5)
    shelve(
        reader,
        {**austen, "title": "Persuasion", "pages": 249},
        **done,
        finished_at="2025-01-01",
        rating=4,
        tags=["sea", "bath"],
    )
    # In the new year in Berlin, but not in UTC; without `pages`; with another spelling of the author.
    moment = "2025-01-01T00:30:00+01:00"
    shelve(reader, {"author": "JANE  AUSTEN", "genre": "romance"}, **done, finished_at=moment, tags=["Sea"])
    shelve(reader, {"author": "Émile Zola, Jane Austen", "genre": "Novel", "pages": 500}, **done, finished_at=None)
    shelve(reader, {"author": "Frank Herbert", "pages": 900}, status="abandoned", rating=1, finished_at="2025-05-05")
    shelve(reader, {"author": "Frank Herbert", "genre": "Science fiction"}, status="reading", tags=["sea", "bath"])
    shelve(other_reader, {"pages": 10**4}, **done, finished_at="2025-01-01", rating=1)
    stats = reader.get("/my-library/stats").json()
    for row in (*stats["top_genres"], *stats["top_tags"], *stats["top_authors"]):  # any of several spellings
        row.update({name: normalize(text) for name, text in row.items() if name != "count"})
    assert stats == {
        "total": 6,
        "by_status": {"wishlist": 0, "reading": 1, "completed": 4, "abandoned": 1},
        "by_year": [{"year": 2025, "books": 1, "pages": 249}, {"year": 2024, "books": 2, "pages": 474}],
        "undated": 1,
        "average_rating": pytest.approx(10 / 3),
        "rating_count": 3,
        "top_genres": [{"genre": "romance", "count": 3}, {"genre": "novel", "count": 1}],
        "top_tags": [{"tag": "sea", "count": 2}, {"tag": "bath", "count": 1}],
        "top_authors": [{"author": "jane austen", "count": 4}, {"author": "emile zola", "count": 1}],
    }


def test_statistics_have_ten_top_genres_and_authors(reader: Person) -> None:
    for number in range(12):
        shelve(reader, {"author": f"Author {number:02}", "genre": f"Genre {number:02}"}, status="completed")
    shelve(reader, {"author": "Author 11", "genre": "Genre 11"}, status="completed")
    stats = reader.get("/my-library/stats").json()
    ranking = [11, *range(9)]
    assert [row["author"] for row in stats["top_authors"]] == [f"Author {number:02}" for number in ranking]
    assert [row["genre"] for row in stats["top_genres"]] == [f"Genre {number:02}" for number in ranking]


# --- finding entries ------------------------------------------------------------------------------------------------

SHELF = [  # title, author, tags, finished_at
    ("Dune", "Frank Herbert", ["sf", 'x"sf'], "2024-01-01"),
    ("Crime and Punishment", "Fyodor Dostoevsky", ["SF", "[sf"], None),
    ("Les Misérables", "Victor Hugo", ["été"], "2023-05-05"),
    ("Идиот", "Фёдор Достоевский", [], "2024-01-01"),
    ("Dune Messiah", "Frank Herbert", ["back\\slash", "sf fun"], None),
]
SEARCHED: dict[str, tuple[dict[str, str], list[int]]] = {
    "a word of a title": ({"search": "dune"}, [0, 4]),
    "a beginning": ({"search": "mes"}, [4]),
    "title and author": ({"search": "HERBERT dune"}, [0, 4]),
    "without accents": ({"search": "miserables"}, [2]),
    "Cyrillic": ({"search": "ФЕДОР идиот"}, [3]),
    "not the publisher": ({"search": "ace"}, []),
    "not the ISBN": ({"search": "9780441172719"}, []),
    "no word": ({"search": "???"}, []),
    "blank": ({"search": " ", "tag": ""}, [0, 1, 2, 3, 4]),
    "operators": ({"search": 'dune" OR crime*'}, []),
    "somebody else's book": ({"search": "emma"}, []),
    "with a status": ({"search": "dune", "status": "reading"}, []),
    "a tag": ({"tag": "sf"}, [0]),
    "another case": ({"tag": "SF"}, [1]),
    "a quotation mark": ({"tag": 'x"sf'}, [0]),
    "a bracket": ({"tag": "[sf"}, [1]),
    "a backslash": ({"tag": "back\\slash"}, [4]),
    "accents": ({"tag": "été"}, [2]),
    "a part": ({"tag": "fun"}, []),
    "the end of another": ({"tag": "slash"}, []),
    "both": ({"tag": "sf", "search": "messiah"}, []),
}


@pytest.fixture
def shelf(reader: Person, other_reader: Person) -> list[int]:
    books = []
    for number, (title, author, tags, finished_at) in enumerate(SHELF):
        isbn = "9780441172719" if number == 0 else None
        book = reader.add_book(title=title, author=author, publisher="Ace", isbn=isbn)
        reader.post(f"/my-library/{book['id']}")
        entry = {"status": "completed", "tags": tags, "finished_at": finished_at}
        assert reader.patch(f"/my-library/{book['id']}", json=entry).status_code == 200
        other_reader.post(f"/my-library/{book['id']}")
        books.append(book["id"])
    other_reader.post(f"/my-library/{reader.add_book(title='Emma')['id']}")
    return books


def test_my_shelf_is_searched_and_filtered_by_tag(reader: Person, shelf: list[int]) -> None:
    found = {}
    for name, (query, _) in SEARCHED.items():
        page = reader.get("/my-library", params={**query, "sort": "added"}).json()
        assert page["total"] == len(page["items"])
        found[name] = [shelf.index(entry["book_id"]) for entry in page["items"]]
    assert found == {name: expected for name, (_, expected) in SEARCHED.items()}


@pytest.mark.parametrize(("sort", "order"), [("finished", [2, 0, 3, 1, 4]), ("-finished", [3, 0, 2, 4, 1])])
def test_unknown_days_come_last_in_both_directions(
    reader: Person, shelf: list[int], sort: str, order: list[int]
) -> None:
    found, cursor = list[int](), ""
    while cursor is not None:
        page = reader.get("/my-library", params={"sort": sort, "limit": 1, "cursor": cursor}).json()
        assert page["total"] == len(SHELF)
        found += [shelf.index(entry["book_id"]) for entry in page["items"]]
        cursor = page["next"]
    assert found == order


WRONG_QUERIES = ["search=" + "+".join("abcdefghijklmnopq"), "tag=a,b", f"tag={'x' * 51}", "tag=%00", "sort=best"]


@pytest.mark.parametrize("query", WRONG_QUERIES, ids=["seventeen words", "a comma", "too long", "NUL", "no order"])
def test_wrong_queries_of_a_shelf_are_422(reader: Person, query: str) -> None:
    assert reader.get(f"/my-library?{query}").status_code == 422
