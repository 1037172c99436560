"""The catalogue: values, changes, search, filters and pages."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2 as httpx
import pytest
from fastapi.testclient import TestClient
from sqlmodel import Session

import database
from models import Book
from schemas import BookPublic
from tests.fixtures import DUNE, Clock, Person, Server, sign_up

# --- values -------------------------------------------------------------------------------------------------------

FULL = {
    "title": "Émile, ou De l'éducation",
    "author": "Jean-Jacques Rousseau",
    "isbn": "0-14-044563-3",
    "genre": "Philosophy",
    "description": "Five books.\nOn one pupil. 📚",
    "publisher": "Penguin",
    "language": "fr",
    "pages": 512,
    "price": 12.5,
    "cover_url": "https://example.com/emile.jpg?size=2",
    "published_date": "1991-06-27",
    "publication_year": 1762,
}

VALID: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "all fields": (FULL, {"isbn": "9780140445633"}),
    "required fields": ({"title": "A", "author": "B"}, {"isbn": None, "price": None, "publication_year": None}),
    "surrounding spaces": ({"title": "  A ", "author": "\tB\n"}, {"title": "A", "author": "B"}),
    "blank is null": ({"title": "A", "author": "B", "genre": " ", "isbn": ""}, {"genre": None, "isbn": None}),
    "ISBN-10 with X": ({"title": "A", "author": "B", "isbn": "080442957x"}, {"isbn": "9780804429573"}),
    "date sets the year": (
        {"title": "A", "author": "B", "published_date": "2008-08-11"},
        {"publication_year": 2008},
    ),
    "negative year": ({"title": "A", "author": "B", "publication_year": -720}, {"publication_year": -720}),
    "year 0": ({"title": "A", "author": "B", "publication_year": 0}, {"publication_year": 0}),
    "price as text": ({"title": "A", "author": "B", "price": "0.10"}, {"price": 0.1}),
    "maximal price": ({"title": "A", "author": "B", "price": 9999999.99}, {"price": 9999999.99}),
    "URL scheme in capitals": (
        {"title": "A", "author": "B", "cover_url": "HTTPS://example.com/a.jpg"},
        {"cover_url": "HTTPS://example.com/a.jpg"},
    ),
    "price 0": ({"title": "A", "author": "B", "price": 0}, {"price": 0.0}),
    "Japanese": ({"title": "源氏物語", "author": "紫式部"}, {"title": "源氏物語"}),
}


@pytest.mark.parametrize(("fields", "expected"), VALID.values(), ids=VALID)
def test_every_route_returns_the_book_as_stored(
    client: TestClient, reader: Person, fields: dict[str, Any], expected: dict[str, Any]
) -> None:
    book = reader.add_book(**fields)
    assert book.items() >= expected.items()
    assert book.keys() == BookPublic.model_fields.keys()
    assert client.get(f"/books/{book['id']}").json() == book
    assert client.get("/books").json()["items"] == [book]
    assert reader.post(f"/my-library/{book['id']}").json()["book"] == book
    assert reader.get("/my-library").json()["items"][0]["book"] == book


def test_a_price_of_minus_zero_is_zero(reader: Person) -> None:
    assert '"price":0.0,' in reader.post("/books", json={"title": "A", "author": "B", "price": -0.0}).text


INVALID: dict[str, tuple[dict[str, Any], str]] = {
    "null title": ({"title": None}, "title"),
    "blank title": ({"title": " \n"}, "title"),
    "long title": ({"title": "x" * 501}, "title"),
    "NUL": ({"title": "a\0b"}, "title"),
    "lone surrogate": ({"title": "\ud800"}, "title"),
    "number as title": ({"title": 1984}, "title"),
    "blank author": ({"author": ""}, "author"),
    "wrong check digit": ({"isbn": "978-0-441-17271-8"}, "isbn"),
    "long ISBN": ({"isbn": "9" * 400}, "isbn"),
    "negative price": ({"price": -0.01}, "price"),
    "three decimals": ({"price": 1.005}, "price"),
    "huge price": ({"price": 1e300}, "price"),
    "price NaN": ({"price": "nan"}, "price"),
    "infinite price": ({"price": "Infinity"}, "price"),
    "zero pages": ({"pages": 0}, "pages"),
    "negative pages": ({"pages": -5}, "pages"),
    "pages out of range": ({"pages": 10**30}, "pages"),
    "year 30000": ({"publication_year": 30000}, "publication_year"),
    "year -5001": ({"publication_year": -5001}, "publication_year"),
    "impossible date": ({"published_date": "2023-02-30"}, "published_date"),
    "timestamp as date": ({"published_date": 1218412800}, "published_date"),
    "date in the year 9999": ({"published_date": "9999-12-31"}, "published_date"),
    "javascript URL": ({"cover_url": "javascript:alert(1)"}, "cover_url"),
    "unknown field": ({"colour": "red"}, "colour"),
    "computed field": ({"rating": 5}, "rating"),
    "id": ({"id": 7}, "id"),
}


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH"])
@pytest.mark.parametrize(("fields", "field"), INVALID.values(), ids=INVALID)
def test_invalid_values_are_422_with_their_field(
    client: TestClient, librarian: Person, method: str, fields: dict[str, Any], field: str
) -> None:
    book = librarian.add_book()
    body = fields if method == "PATCH" else {"title": "A", "author": "B", **fields}
    path = "/books" if method == "POST" else f"/books/{book['id']}"
    answer = librarian.request(method, path, content=ascii_json(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["loc"] == ["body", field]
    assert client.get("/books").json()["items"] == [book]


def ascii_json(body: object) -> bytes:
    import json

    return json.dumps(body).encode("ascii")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="half an object"),
        pytest.param(b"[]", id="list"),
        pytest.param(b"\xff\xfe", id="invalid UTF-8"),
        pytest.param(b"[" * 100_000, id="too deep"),
        pytest.param(b'{"title": "A", "author": "B", "price": NaN}', id="NaN"),
        pytest.param(b'{"title": "A", "author": "B", "price": 1e999}', id="1e999"),
    ],
)
def test_bodies_that_are_not_a_json_object_are_refused(reader: Person, content: bytes) -> None:
    answer = reader.post("/books", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422)
    assert answer.headers["Content-Type"] == "application/problem+json"


FORM, FILES, JSON = "application/x-www-form-urlencoded", "multipart/form-data", "application/json"
GOOD = b'{"title": "A", "author": "B"}'
BODY_ERRORS: dict[str, tuple[str, str | None, bytes, str]] = {
    "missing comma": (
        "/books",
        JSON,
        b'{"title": "A" "author": "B"}',
        "The body is not JSON: Expecting ',' delimiter, at character 14.",
    ),
    "invalid UTF-8": ("/books", JSON, b'{"title": "Bront\xeb", "author": "B"}', "The body is not UTF-8."),
    "too deep": ("/books", JSON, b"[" * 100_000, "The body is nested too deep."),
    "too many digits": ("/books", JSON, b"[%s]" % (b"1" * 5000), "The body has a number with too many digits."),
    "form media type": ("/books", FORM, GOOD, f"This path takes {JSON}; the Content-Type says {FORM}."),
    "no media type": ("/books", None, GOOD, f"This path takes {JSON}; the Content-Type says nothing."),
    "no body": ("/books", None, b"", "body: Field required"),
    "blank title": ("/books", JSON, b'{"title": " "}', "title: String should have at least 1 character"),
    "JSON instead of a file": ("/books/upload", JSON, GOOD, f"This path takes {FILES}; the Content-Type says {JSON}."),
    "file name instead of a file": (
        "/books/upload",
        FORM,
        b"file=a.csv",
        "file: must be a file, with a name; by curl: -F file=@books.csv",
    ),
}


@pytest.mark.parametrize(("path", "media_type", "content", "detail"), BODY_ERRORS.values(), ids=BODY_ERRORS)
def test_body_errors_name_the_reason(
    reader: Person, path: str, media_type: str | None, content: bytes, detail: str
) -> None:
    answer = reader.post(path, content=content, headers={} if media_type is None else {"Content-Type": media_type})
    assert answer.status_code in ((415,) if "Content-Type" in detail else (400, 422))
    assert answer.json()["detail"] == detail


def test_an_isbn_is_unique(reader: Person, other_reader: Person) -> None:
    reader.add_book(**DUNE)
    answer = other_reader.post("/books", json={"title": "Same", "author": "Number", "isbn": "0-441-17271-7"})
    assert answer.status_code == 409
    assert answer.json()["errors"][0]["loc"] == ["body", "isbn"]


@pytest.mark.slow
def test_an_isbn_is_unique_among_concurrent_requests(server: Server) -> None:
    reader = sign_up(server.client, "rita")
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: reader.post("/books", json=DUNE).status_code, range(20)))
    assert sorted(answers) == [201] + [409] * 19
    assert server.client.get("/books").json()["total"] == 1


# --- changing -----------------------------------------------------------------------------------------------------


def test_put_replaces_and_patch_merges(reader: Person) -> None:
    book = reader.add_book(**FULL)
    path = f"/books/{book['id']}"
    patched = reader.patch(path, json={"pages": 600, "genre": None}).json()
    unchanged = {"pages", "genre", "version", "updated_at"}
    assert {k: v for k, v in patched.items() if k not in unchanged} == {
        k: v for k, v in book.items() if k not in unchanged
    }
    assert (patched["pages"], patched["genre"], patched["version"]) == (600, None, 2)
    replaced = reader.put(path, json={"title": "Emile", "author": "Rousseau"}).json()
    assert (replaced["title"], replaced["isbn"], replaced["pages"], replaced["version"]) == ("Emile", None, None, 3)


def test_a_new_date_changes_the_year_only_if_the_old_date_set_it(reader: Person) -> None:
    path = f"/books/{reader.add_book(published_date='2008-08-11')['id']}"
    assert reader.patch(path, json={"published_date": "2010-01-01"}).json()["publication_year"] == 2010
    assert reader.patch(path, json={"publication_year": 1813}).json()["publication_year"] == 1813
    assert reader.patch(path, json={"published_date": "2012-01-01"}).json()["publication_year"] == 1813


def test_etags_give_304_and_412(client: TestClient, reader: Person) -> None:
    book = reader.add_book(**DUNE)
    path = f"/books/{book['id']}"
    etag = client.get(path).headers["ETag"]
    assert etag == '"1"'
    for known in (etag, f'"7", W/{etag}', "*"):
        unchanged = client.get(path, headers={"If-None-Match": known})
        assert (unchanged.status_code, unchanged.content, unchanged.headers["ETag"]) == (304, b"", etag)
    changed = reader.patch(path, json={"pages": 412}, headers={"If-Match": etag})
    assert (changed.status_code, changed.headers["ETag"]) == (200, '"2"')
    for method in ("PUT", "PATCH", "DELETE"):
        stale = reader.request(method, path, json=None if method == "DELETE" else DUNE, headers={"If-Match": etag})
        assert stale.status_code == 412
    assert client.get(path, headers={"If-None-Match": etag}).json()["pages"] == 412
    assert reader.delete(path, headers={"If-Match": '"2"'}).status_code == 204


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE"])
@pytest.mark.parametrize(
    ("header", "status"),
    [
        pytest.param('W/"1"', 412, id="weak"),
        pytest.param('W/"1", "7"', 412, id="weak, and another"),
        pytest.param('"7", "1"', 200, id="strong, and another"),
        pytest.param('W/"1","1"', 200, id="weak and strong"),
        pytest.param(" * ", 200, id="any"),
        pytest.param("1", 412, id="without quotes"),
        pytest.param("", 412, id="empty"),
    ],
)
def test_if_match_compares_strongly(reader: Person, method: str, header: str, status: int) -> None:
    path = f"/books/{reader.add_book()['id']}"
    body = None if method == "DELETE" else {"title": "A", "author": "B"}
    answer = reader.request(method, path, json=body, headers={"If-Match": header})
    assert answer.status_code == (204 if (method, status) == ("DELETE", 200) else status)


FULL_DUNE = {
    **DUNE,
    "price": 9.5,
    "pages": 535,
    "published_date": "1965-08-01",
    "language": "en",
    "description": "Sand.",
}
SAME_BOOK: dict[str, tuple[str, dict[str, Any]]] = {
    "PATCH with nothing": ("PATCH", {}),
    "PATCH with the same": ("PATCH", {"title": "Dune", "pages": 535, "publisher": None}),
    "PATCH, spelled otherwise": (
        "PATCH",
        {"title": "  Dune ", "isbn": "0-441-17271-7", "price": "9.50", "publisher": ""},
    ),
    "PATCH with the year of the date": ("PATCH", {"publication_year": 1965}),
    "PUT": ("PUT", FULL_DUNE),
    "PUT with the year": ("PUT", {**FULL_DUNE, "publication_year": 1965}),
}


@pytest.mark.parametrize(("method", "body"), SAME_BOOK.values(), ids=SAME_BOOK)
def test_a_change_that_changes_nothing_makes_no_version_and_no_event(
    client: TestClient, clock: Clock, reader: Person, method: str, body: dict[str, Any]
) -> None:
    book = reader.add_book(**FULL_DUNE)
    path = f"/books/{book['id']}"
    before, cursor = client.get(path), client.get("/books").headers["X-Event-Cursor"]
    clock.advance(minutes=1)
    answer = reader.request(method, path, json=body, headers={"If-Match": before.headers["ETag"]})
    assert (answer.status_code, answer.json(), answer.headers["ETag"]) == (200, before.json(), before.headers["ETag"])
    assert client.get(path).json() == before.json()
    assert client.get("/books").headers["X-Event-Cursor"] == cursor
    assert reader.request(method, path, json=body, headers={"If-Match": '"7"'}).status_code == 412


def test_a_rating_changes_the_etag(client: TestClient, reader: Person) -> None:
    path = f"/books/{reader.add_book()['id']}"
    etag = client.get(path).headers["ETag"]
    reader.post(path.replace("books", "my-library"), json={"status": "completed"})
    reader.patch(path.replace("books", "my-library"), json={"rating": 5})
    assert client.get(path, headers={"If-None-Match": etag}).json()["rating"] == 5.0


@pytest.mark.slow
def test_of_concurrent_changes_with_one_etag_one_succeeds(server: Server) -> None:
    reader = sign_up(server.client, "rita")
    path = f"/books/{reader.add_book()['id']}"

    def change(pages: int) -> int:
        return reader.patch(path, json={"pages": pages}, headers={"If-Match": '"1"'}).status_code

    with ThreadPoolExecutor(30) as pool:
        assert sorted(pool.map(change, range(1, 31))) == [200] + [412] * 29
    assert server.client.get(path).json()["version"] == 2


def test_owner_and_staff_change_a_book_and_staff_delete_it(
    client: TestClient, reader: Person, other_reader: Person, librarian: Person, admin: Person
) -> None:
    path = f"/books/{reader.add_book()['id']}"
    for person, expected in ((None, 401), (other_reader, 403), (reader, 200), (librarian, 200), (admin, 200)):
        for method in ("PUT", "PATCH"):
            body = {"title": "A", "author": "B"}
            answer = (person or client).request(method, path, json=body)
            assert answer.status_code == expected
    assert client.delete(path).status_code == 401
    assert other_reader.delete(path).status_code == 403
    assert librarian.delete(path).status_code == 204
    assert client.get(path).status_code == 404
    assert admin.delete(path).status_code == 404


def test_a_book_on_other_shelves_is_deleted_by_staff_only(
    client: TestClient, reader: Person, other_reader: Person, librarian: Person
) -> None:
    book = reader.add_book()
    path, shelf = f"/books/{book['id']}", f"/my-library/{book['id']}"
    reader.post(shelf)
    other_reader.post(shelf)
    assert reader.delete(path).status_code == 409
    assert client.get(path).status_code == 200
    assert librarian.delete(path).status_code == 204
    assert other_reader.get("/my-library").json()["total"] == 0
    assert client.get("/books").json()["total"] == 0


def test_a_book_on_my_own_shelf_only_can_be_deleted(reader: Person) -> None:
    book = reader.add_book()
    reader.post(f"/my-library/{book['id']}")
    assert reader.delete(f"/books/{book['id']}").status_code == 204
    assert reader.get("/my-library").json()["items"] == []


def test_ids_of_deleted_books_are_not_used_again(reader: Person) -> None:
    first = reader.add_book()["id"]
    reader.delete(f"/books/{first}")
    assert reader.add_book()["id"] > first


# --- searching ----------------------------------------------------------------------------------------------------

SHELF = [
    {"title": "Dune Messiah", "author": "Frank Herbert", "publisher": "Putnam"},
    {"title": "The Road to Dune", "author": "Brian Herbert"},
    {"title": "Dune", "author": "Frank Herbert", "isbn": "9780441172719"},
    {"title": "Kon-Tiki", "author": "Thor Heyerdahl", "publisher": "Dune & Sons"},
    {"title": "Café Müller", "author": "Łukasz O'Brien"},
    {"title": "C++ Primer", "author": "Stanley Lippman"},
    {"title": "源氏物語", "author": "紫式部"},
]

FOUND: dict[str, tuple[str, list[str]]] = {
    "best match first": ("dune", ["Dune", "Dune Messiah", "The Road to Dune", "Kon-Tiki"]),
    "all words": ("herbert dune", ["Dune Messiah", "The Road to Dune", "Dune"]),
    "prefixes": ("fra her du", ["Dune Messiah", "Dune"]),
    "a publisher": ("putnam", ["Dune Messiah"]),
    "an ISBN": ("9780441172719", ["Dune"]),
    "an ISBN with hyphens": ("978-0-441-17271-9", ["Dune"]),
    "an ISBN-10": ("0441172717", ["Dune"]),
    "prefix of an ISBN": ("978044117", ["Dune"]),
    "prefix of an ISBN with hyphens": ("978-0-441", ["Dune"]),
    "an ISBN-10 beside a word": ("her 0441172717", ["Dune"]),
    "an ISBN with hyphens beside a word": ("978-0-441-17271-9 her", ["Dune"]),
    "capitals": ("MESSIAH", ["Dune Messiah"]),
    "without accents": ("cafe muller", ["Café Müller"]),
    "with accents": ("düné messiah", ["Dune Messiah"]),
    "an apostrophe": ("o'brien", ["Café Müller"]),
    "a hyphen": ("kon-tiki", ["Kon-Tiki"]),
    "another script": ("源氏", ["源氏物語"]),
    "no match": ("zebra", []),
    "middle of a word": ("une", []),
}


@pytest.fixture
def shelf(reader: Person) -> Person:
    for book in SHELF:
        reader.add_book(**book)
    return reader


def found(client: httpx.Client, **query: Any) -> list[str]:
    answer = client.get("/books", params=query)
    assert answer.status_code == 200, answer.text
    titles = [book["title"] for book in answer.json()["items"]]
    assert answer.json()["total"] == len(titles)
    return titles


def test_search_finds_the_best_match_first(client: TestClient, shelf: Person) -> None:
    got = {name: found(client, search=words) for name, (words, _) in FOUND.items()}
    assert got == {name: titles for name, (_, titles) in FOUND.items()}


@pytest.mark.parametrize(
    "words",
    [
        '"',
        '""',
        "dune AND",
        "NOT dune",
        "dune OR",
        "NEAR(dune)",
        "title:dune",
        "{title}: dune",
        "^dune",
        "*",
        "dune*",
        "(dune",
        "dune)",
        "-dune",
        "'; DROP TABLE book; --",
        "\\",
        "dune\\",
        "+",
        "—",
        "\N{ZERO WIDTH SPACE}",
        "%",
        "_",
        "\U0001e900",
        "😀",
        "a" * 300,
        " ".join("abcdefghijklmnop"),
        "\u0301",
        "dune\u0301",
        "\N{ARABIC LIGATURE ALLAH ISOLATED FORM}" * 300,  # a word of 1,200 letters
    ],
)
def test_search_never_is_a_syntax_error(client: TestClient, shelf: Person, words: str) -> None:
    for query in ({"search": words}, {"author": words}, {"publisher": words}, {"search": words, "sort": "title"}):
        answer = client.get("/books", params=query)
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("text", ["???", '"', "\N{ZERO WIDTH SPACE}", "—"], ids=ascii)
def test_a_text_without_a_word_finds_nothing(client: TestClient, shelf: Person, text: str) -> None:
    for name in ("search", "author", "publisher"):
        assert found(client, **{name: text}) == found(client, **{name: text}, sort="title", genre="novel") == []
    assert found(client, search=text, author="herbert") == []


def test_search_follows_changes_and_deletions(client: TestClient, shelf: Person) -> None:
    dune = client.get("/books", params={"search": "9780441172719"}).json()["items"][0]
    shelf.patch(f"/books/{dune['id']}", json={"title": "Arrakis"})
    assert found(client, search="arrakis") == ["Arrakis"]
    assert found(client, search="dune frank") == ["Dune Messiah"]
    shelf.delete(f"/books/{dune['id']}")
    assert found(client, search="arrakis") == []


# --- filtering, sorting, paging -----------------------------------------------------------------------------------

CATALOGUE: list[dict[str, Any]] = [
    {"title": "beta", "author": "Émile Zola", "genre": "Novel", "language": "fr", "publication_year": 1885},
    {"title": "Alpha", "author": "Anna Sewell", "genre": "novel", "language": "en", "publication_year": 1877},
    {"title": "Ánima", "author": "Homer", "genre": "Epic", "publisher": "Old Press", "publication_year": -720},
    {"title": "gamma", "author": "Zoë Heller", "genre": "Thriller", "publisher": "New Press"},
]

FILTERED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "genre in capitals": ({"genre": "NOVEL"}, ["beta", "Alpha"]),
    "word of the author": ({"author": "zola"}, ["beta"]),
    "part of a word": ({"author": "zol"}, []),
    "words of the author": ({"author": "Heller, Zoë"}, ["gamma"]),
    "a publisher": ({"publisher": "press"}, ["Ánima", "gamma"]),
    "a language": ({"language": "FR"}, ["beta"]),
    "from a year": ({"year_from": 1880}, ["beta"]),
    "to a year": ({"year_to": 0}, ["Ánima"]),
    "between years": ({"year_from": -1000, "year_to": 1880}, ["Alpha", "Ánima"]),
    "available": ({"available": "true"}, []),
    "several filters": (
        {"search": "be", "genre": "novel", "author": "emile", "language": "fr", "year_to": 1885},
        ["beta"],
    ),
    "blank filters": ({"genre": "", "search": ""}, ["beta", "Alpha", "Ánima", "gamma"]),
    "by title": ({"sort": "title"}, ["Alpha", "Ánima", "beta", "gamma"]),
    "by title, reversed": ({"sort": "-title"}, ["gamma", "beta", "Ánima", "Alpha"]),
    "by author": ({"sort": "author"}, ["Alpha", "beta", "Ánima", "gamma"]),
    "by year": ({"sort": "-year"}, ["beta", "Alpha", "Ánima", "gamma"]),
    "newest": ({"sort": "-created"}, ["gamma", "Ánima", "Alpha", "beta"]),
    "filtered and sorted": ({"genre": "novel", "sort": "year"}, ["Alpha", "beta"]),
    "searched and sorted": ({"search": "press", "sort": "-title"}, ["gamma", "Ánima"]),
}


@pytest.mark.parametrize(("query", "titles"), FILTERED.values(), ids=FILTERED)
def test_lists_can_be_filtered_and_sorted(
    client: TestClient, reader: Person, query: dict[str, Any], titles: list[str]
) -> None:
    for book in CATALOGUE:
        reader.add_book(**book)
    assert found(client, **query) == titles


def test_added_by_me_needs_a_token(client: TestClient, reader: Person, other_reader: Person) -> None:
    reader.add_book(title="Mine")
    other_reader.add_book(title="Not mine")
    assert client.get("/books?added_by=me").status_code == 401
    assert [book["title"] for book in reader.get("/books?added_by=me").json()["items"]] == ["Mine"]


@pytest.mark.slow
def test_a_single_rating_of_5_ranks_below_many_high_ratings(client: TestClient, reader: Person) -> None:
    for title in ("unrated", "one five", "many", "one two"):
        reader.add_book(title=title)
    for book, ratings in ((2, [5]), (3, [5, 5, 4, 5, 5, 4]), (4, [2])):
        for number, rating in enumerate(ratings):
            person = sign_up(client, f"reader-{book}-{number}")
            person.post(f"/my-library/{book}", json={"status": "completed"})
            person.patch(f"/my-library/{book}", json={"rating": rating})
    assert found(client, sort="-rating") == ["many", "one five", "one two", "unrated"]


def test_a_single_rating_of_5_ranks_below_a_thousand_of_4_8(client: TestClient, reader: Person) -> None:
    for title in ("one five", "a thousand", "ten fives", "a thousand threes"):
        reader.add_book(title=title)
    figures = {1: (1, 5), 2: (1000, 4800), 3: (10, 50), 4: (1000, 3000)}

    def rate(session: Session) -> None:
        for book, (count, total) in figures.items():
            rated = session.get_one(Book, book)
            rated.rating_count, rated.rating_sum = count, total

    database.write_sync(rate)
    assert found(client, sort="-rating") == ["a thousand", "ten fives", "one five", "a thousand threes"]
    assert found(client, sort="rating") == ["a thousand threes", "one five", "ten fives", "a thousand"]


def walk(client: httpx.Client, **query: Any) -> Iterator[dict[str, Any]]:
    """All pages, by their Link headers."""
    answer = client.get("/books", params=query)
    while True:
        assert answer.status_code == 200, answer.text
        yield answer.json()
        if answer.json()["next"] is None:
            assert "Link" not in answer.headers
            return
        answer = client.get(answer.links["next"]["url"])


@pytest.mark.parametrize(
    "query",
    [{"sort": f"{sign}{key}"} for key in ("id", "title", "author", "year", "rating", "created") for sign in ("", "-")]
    + [{"search": "bo"}, {"search": "bo", "sort": "-title"}, {"genre": "novel"}, {"search": "book", "genre": "novel"}],
    ids=str,
)
def test_cursors_return_each_book_once_while_others_are_added_and_deleted(
    client: TestClient, reader: Person, query: dict[str, Any]
) -> None:
    for number in range(17):
        reader.add_book(
            title=("Book" if number % 3 else "A book") + f" {number % 4}",
            author=f"Author {number % 2}",
            genre="Novel",
            publication_year=None if number % 5 == 0 else 1900 + number % 3,
        )
    whole = [book["id"] for book in client.get("/books", params={**query, "limit": 100}).json()["items"]]
    assert len(whole) == 17
    seen = []
    for number, page in enumerate(walk(client, **query, limit=4)):
        seen += [book["id"] for book in page["items"]]
        if number == 1:
            reader.delete(f"/books/{seen[0]}")  # a row before the cursor goes
            reader.add_book(title="Book 1", author="Author 0", genre="Novel", publication_year=1900)
    assert len(seen) == len(set(seen))
    assert [book for book in seen if book <= 17] == whole


def test_offset_and_skip(client: TestClient, shelf: Person) -> None:
    whole = found(client, limit=100)
    for name in ("offset", "skip"):
        page = client.get("/books", params={name: 2, "limit": 3}).json()
        assert [book["title"] for book in page["items"]] == whole[2:5]
        assert page["total"] == len(whole)
        assert client.get("/books", params={name: 100}).json()["items"] == []
    first = client.get("/books", params={"offset": 0, "skip": 2, "limit": 3}).json()
    assert [book["title"] for book in first["items"]] == whole[:3], "offset counts"
    best = found(client, search="dune")
    page = client.get("/books", params={"search": "dune", "offset": 1, "limit": 2}).json()
    assert [book["title"] for book in page["items"]] == best[1:3]
    rest = client.get("/books", params={"search": "dune", "cursor": page["next"]}).json()
    assert [book["title"] for book in rest["items"]] == best[3:]


def test_invalid_cursors_are_422(client: TestClient, shelf: Person) -> None:
    import base64
    import json

    def packed(*keys: object) -> str:
        return base64.urlsafe_b64encode(json.dumps(keys).encode()).decode()

    good = client.get("/books?limit=1").json()["next"]
    bad = ["x", "é", "[]", packed(), packed("id"), packed("id", "1"), packed("id", 1, 2), packed("id", 2**31)]
    bad += [packed("id", True), packed("id", None), packed("title", 1), packed("best", 0), packed("best", -1, "x")]
    bad += [packed("id", 1.5), packed("nothing", 1), packed(["id"], 1), packed("id", [1])]
    for query in [{"cursor": cursor} for cursor in bad] + [
        {"cursor": good, "sort": "title"},
        {"cursor": good, "offset": 3},
        {"cursor": packed("best", 0, 2**31), "search": "dune"},
        {"cursor": packed("year", 2**40, 1), "sort": "year"},
        {"cursor": packed("title", "a\0", "b", 1), "sort": "title"},
        {"cursor": packed("title", "\ud800", "b", 1), "sort": "title"},
    ]:
        answer = client.get("/books", params=query)
        assert answer.status_code == 422, query
        assert answer.json()["errors"][0]["loc"] == ["query", "cursor"]
        assert answer.json()["detail"] == f"cursor: {answer.json()['errors'][0]['msg']}"
    assert client.get("/books", params={"search": "dune", "cursor": packed("best", 99, 1)}).json()["items"] == []


def test_the_total_follows_additions_deletions_and_imports(client: TestClient, reader: Person) -> None:
    for _ in range(3):
        reader.add_book()
    reader.delete("/books/2")
    reader.upload("title,author\nOne,A\nTwo,A\n")
    assert client.get("/books", params={"limit": 1}).json()["total"] == 4


def test_x_event_cursor_is_the_last_event_of_the_page(client: TestClient, reader: Person) -> None:
    reader.add_book()
    cursor = client.get("/books").headers["X-Event-Cursor"]
    reader.add_book(title="Later")
    later = client.get("/events", params={"after": cursor}).json()["items"]
    assert [(event["type"], event["data"]["title"]) for event in later] == [("book.created", "Later")]
    assert int(reader.get("/my-library").headers["X-Event-Cursor"]) == later[0]["id"]


def test_created_at_and_updated_at_are_utc(client: TestClient, clock: Clock, reader: Person) -> None:
    book = reader.add_book()
    assert book["created_at"] == clock.now.isoformat().replace("+00:00", "Z")
    clock.advance(minutes=5)
    changed = reader.patch(f"/books/{book['id']}", json={"pages": 3}).json()
    assert (changed["created_at"], changed["updated_at"]) == (
        book["created_at"],
        clock.now.isoformat().replace("+00:00", "Z"),
    )


# --- many at once -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_64_concurrent_readers_of_every_route(server: Server) -> None:
    reader = sign_up(server.client, "rita")
    for number in range(30):
        reader.add_book(title=f"Book {number}")
        reader.post(f"/my-library/{number + 1}")
    headers = {"Authorization": f"Bearer {reader.tokens['access_token']}"}
    paths = ["/books", "/books/1", "/books?search=book", "/books?genre=x", "/books/genres", "/books/1/reviews"]
    paths += ["/my-library", "/my-library/1", "/users/me", "/events", "/books/upload", "/health"]

    async def all_at_once() -> list[int]:
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(
            base_url=server.client.base_url, headers=headers, limits=limits, timeout=20
        ) as many:
            return [answer.status_code for answer in await asyncio.gather(*[many.get(path) for path in paths * 64])]

    assert set(asyncio.run(asyncio.wait_for(all_at_once(), 60))) == {200}


LETTERS = "".join(map(chr, range(0x4E00, 0x4E00 + 1000)))  # 3,000 bytes, which no database can make much shorter
LONG = {
    "long": (LETTERS[:500], LETTERS),
    "long, with another end": (LETTERS[:500], LETTERS[:-1]),
    "characters that normalize to eighteen": ("\ufdfa" * 500, "\ufdfa" * 1000),
    "control characters": ("\x01" * 500, "\x02" * 1000),
}


@pytest.mark.parametrize("sort", ["title", "author", "-title", "-author"])
def test_the_longest_titles_and_authors_can_be_paged(client: TestClient, reader: Person, sort: str) -> None:
    books = [reader.add_book(title=title, author=author)["id"] for title, author in LONG.values()]
    seen, cursor = [], ""
    while cursor is not None:
        page = client.get(f"/books?sort={sort}&limit=1&cursor={cursor}").json()
        seen += [book["id"] for book in page["items"]]
        cursor = page["next"]
    assert sorted(seen) == books


def test_unknown_years_are_last_in_both_directions(reader: Person) -> None:
    years = [1996, None, -2000, 2020, None, 1813]
    for year in years:
        reader.add_book(title=str(year), publication_year=year)
    known = sorted(year for year in years if year is not None)
    for sort, expected in (("year", [*known, None, None]), ("-year", [*known[::-1], None, None])):
        walked: list[int | None] = []
        query: dict[str, Any] = {"sort": sort, "limit": 2}
        while query.get("cursor", "") is not None:
            page = reader.get("/books", params=query).json()
            walked += [book["publication_year"] for book in page["items"]]
            query["cursor"] = page["next"]
        assert walked == expected
        assert [b["publication_year"] for b in reader.get("/books", params={"sort": sort}).json()["items"]] == expected
