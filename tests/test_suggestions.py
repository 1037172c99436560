"""What `GET /books` suggests where a search finds nothing, and the filters by title, ISBN and who added a book."""

import itertools
from typing import Any
from unittest.mock import Mock

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient
from rapidfuzz import process
from sqlmodel import Session

import books
import database
import search
from tests.fixtures import ROOT, Person, Server, sign_up

# ruff: noqa: RUF001  # letters that look like others are what this is about
BOOKS = [
    ("Harry Potter and the Philosopher's Stone", "J. K. Rowling"),
    ("The Hobbit", "J. R. R. Tolkien"),
    ("Crime and Punishment", "Fyodor Dostoevsky"),
    ("Pride and Prejudice", "Jane Austen"),
    ("Идиот", "Фёдор Достоевский"),
    ("Ο Καπετάν Μιχάλης", "Νίκος Καζαντζάκης"),
    ("Hary", "Somebody"),
    ("Nineteen Eighty-Four", "George Orwell"),
]
SUGGESTIONS = {
    "a letter too few, in a word that another book has": ("hary potter", ["harry potter"]),
    "two letters exchanged": ("tolkein", ["tolkien"]),
    "another transcription": ("Dostoyevsky", ["dostoevsky"]),
    "a third one": ("dostoevskij", ["dostoevsky"]),
    "a letter missing": ("austn", ["austen"]),
    "two words misspelled": ("pirde and prejudise", ["pride and prejudice"]),
    "only one of two words": ("the HOBITT", ["the hobbit"]),
    "another second letter": ("arwin orwell", []),
    "another first letter": ("urwell", []),
    "a vowel exchanged": ("dastoevsky", ["dostoevsky"]),
    "punctuation": ("eihgty-four!", ["eighty four"]),
    "Cyrillic, with its marks": ("достаевский", ["достоевский"]),
    "Greek, with its accents": ("καζατζάκης", ["καζαντζάκης"]),
    "nothing near": ("xyzzy", []),
    "a word beside that no book has": ("harry potter xyzzy", []),
    "books that do not go together": ("tolkein austn", []),
    "an ISBN": ("9780441172719", []),
    "a number": ("1985", []),
    "no word": ("???", []),
    "too short": ("zz", []),
    "a long word": ("x" * 300, []),
    "three unknown words": ("tolkein austn dostoyevsky", []),
    "sixteen words": (" ".join(f"tolkein{n}" for n in range(16)), []),
}


def suggestions(client: Any, **query: Any) -> Any:
    answer = client.get("/books", params=query)
    assert answer.status_code == 200, answer.text
    assert ("suggestions" in answer.json()) == (answer.json()["total"] == 0)
    return answer.json().get("suggestions")


@pytest.fixture
def catalogue(client: TestClient, reader: Person) -> TestClient:
    for title, author in BOOKS:
        reader.add_book(title=title, author=author)
    return client


def test_a_search_that_finds_nothing_suggests_the_nearest_words(catalogue: TestClient) -> None:
    found = {name: suggestions(catalogue, search=text) for name, (text, _) in SUGGESTIONS.items()}
    assert found == {name: expected for name, (_, expected) in SUGGESTIONS.items()}
    for query in itertools.chain(*found.values()):
        assert suggestions(catalogue, search=query) is None, query


def test_suggestions_are_for_the_search_within_the_other_filters(catalogue: TestClient) -> None:
    cases: list[tuple[dict[str, Any], Any]] = [
        ({"search": "tolkein"}, ["tolkien"]),
        ({"search": "tolkein", "sort": "title"}, ["tolkien"]),
        ({"search": "tolkein", "title": "hobbit"}, ["tolkien"]),
        ({"search": "tolkein", "author": "austen"}, []),
        ({"search": "tolkein", "year_from": 1990}, []),
        ({"search": "tolkien", "year_from": 1990}, []),
        ({"search": "tolkien"}, None),
    ]
    assert [suggestions(catalogue, **query) for query, _ in cases] == [expected for _, expected in cases]
    assert "suggestions" not in catalogue.get("/books?author=tolkein").json()


OLD = {"tolkein", "ann", "again", "bea"}


def test_suggestions_follow_the_books(client: TestClient, admin: Person) -> None:
    """Words that no book has any more are not suggested. PostgreSQL keeps them."""
    book = admin.add_book(title="Tolkein", author="Ann")
    assert suggestions(client, search="tolkin") == ["tolkein"]
    admin.patch(f"/books/{book['id']}", json={"title": "Tolkien"})
    assert suggestions(client, search="tolkein") == ["tolkien"]
    other = admin.add_book(title="Tolkien again", author="Bea")
    assert admin.delete(f"/books/{book['id']}").status_code == 204
    assert suggestions(client, search="tolkein") == ["tolkien"]
    assert admin.delete(f"/books/{other['id']}").status_code == 204
    assert suggestions(client, search="tolkein") == []
    assert admin.upload("title,author\nTolkien imported,Cleo\n")["inserted"] == 1
    assert suggestions(client, search="tolkein") == ["tolkien"]
    terms = database.read_sync(lambda connection: set(connection.scalars(sa.select(search.TERM))))
    assert terms - (OLD if database.is_postgresql() else set()) == {"tolkien", "imported", "cleo"}


def test_at_most_five_suggestions_the_nearest_first(client: TestClient, admin: Person) -> None:
    words = "hardback harmless harmonic harbour harbours harbored harbor harbouring"
    admin.upload(f"title,author\n{''.join(f'{word},X{chr(10)}' for word in words.split())}")
    found = suggestions(client, search="harbuor")
    assert len(found) == 5
    assert found[0] == "harbour"


@pytest.mark.slow
def test_suggestions_of_a_real_server(server: Server) -> None:
    rita = sign_up(server.client, "Rita")
    rita.upload((ROOT / "static" / "sample_books.csv").read_bytes())
    assert suggestions(server.client, search="Dostoyevsky") == ["dostoevsky"]
    assert suggestions(server.client, search="wuthring hieghts") == ["wuthering heights"]
    document = server.client.get("/openapi.json").json()
    page = document["paths"]["/books"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]["$ref"]
    fields = document["components"]["schemas"][page.split("/")[-1]]
    assert page.endswith("/Page_BookPublic_")
    assert fields["properties"]["suggestions"]["type"] == "array"
    assert "suggestions" not in fields["required"]


FILL = """INSERT INTO book (title, author, title_key, author_key, copies, available, rating_count, rating_sum, version,
  created_at, updated_at)
SELECT title, 'A', title, 'a', 0, 0, 0, 0, 1, '2026-01-01', '2026-01-01' FROM (
  WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100000)
  SELECT 'the ' || substr('ttttttttabcdefghijkl', 1 + i % 20, 1) || substr('aeiou', 1 + i / 20 % 5, 1)
    || substr('bcdfgklmnprst', 1 + i / 100 % 13, 1) || substr('aeiou', 1 + i / 1300 % 5, 1)
    || substr('bcdfgklmnprst', 1 + i / 6500 % 13, 1) || (i % 7) AS title FROM n) AS made"""

# How many words are compared with those of the query. More than 20,000 begin with `t`.
COMPARED = {
    "the tukzb": [5915],
    "tsssssss": [0, search.MAX_SCANNED],
    "qoqoqoqo tatatata": [0, 0, 5915],
    "the tukob nothing": [0, 0, 5915],
}


@pytest.mark.slow
@pytest.mark.sqlite
@pytest.mark.parametrize(("text", "words"), COMPARED.items())
def test_the_cost_of_suggestions_among_a_hundred_thousand_books_is_bounded(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, text: str, words: list[int]
) -> None:
    def fill(session: Session) -> None:
        session.execute(sa.text(FILL))
        session.execute(sa.text("INSERT INTO book_fts (book_fts) VALUES ('rebuild')"))

    def count_steps(connection: sa.Connection) -> int:
        """Of SQLite's virtual machine."""
        ticks, driver = itertools.count(), connection.connection.dbapi_connection
        driver.set_progress_handler(lambda: next(ticks) < 0, 1000)  # type: ignore[union-attr]  # there is one
        query = books.BookQuery(search=text)
        assert books.find_books(connection, query.filters(None), query).total == 0
        return 1000 * next(ticks)

    extract = Mock(wraps=process.extract)
    monkeypatch.setattr(process, "extract", extract)
    database.write_sync(fill)
    assert database.read_sync(count_steps) <= 400_000  # some 20 ms
    assert sorted(len(call.args[1]) for call in extract.call_args_list) == words


# --- filters ------------------------------------------------------------------------------------------------------


def test_filters_by_isbn_title_and_who_added_it(client: TestClient, reader: Person, other_reader: Person) -> None:
    dune = reader.add_book(title="Dune", author="Frank Herbert", isbn="9780441172719")
    messiah = other_reader.add_book(title="Dune Messiah", author="Frank Herbert")
    guide = other_reader.add_book(title="A Reader's Guide", author="Dune Messiah")
    cases = {
        "isbn=978-0-441-17271-9": [dune],
        "isbn=0441172717": [dune],
        "isbn=0 441 17271 7": [dune],
        "isbn=9780306406157": [],
        "isbn=": [dune, messiah, guide],
        "title=dune": [dune, messiah],
        "title=MESSIAH DUNE": [messiah],
        "title=dun": [],
        "title=dune&author=herbert": [dune, messiah],
        "title=dune&search=messiah": [messiah],
        "search=dune": [dune, messiah, guide],
        "title=???": [],
        f"added_by={dune['added_by']}": [dune],
        f"added_by={guide['added_by']}&title=guide": [guide],
        "added_by=0": [],
        "added_by=9999999999": [],
    }
    for query, expected in cases.items():
        answer = client.get(f"/books?{query}").json()
        assert ([book["id"] for book in answer["items"]], answer["total"]) == (
            [book["id"] for book in expected],
            len(expected),
        ), query
        lines = client.get(f"/books/export?format=ndjson&{query}").text.splitlines()
        assert len(lines) == len(expected), query
    assert [book["id"] for book in reader.get("/books?added_by=me").json()["items"]] == [dune["id"]]


WRONG = {
    "no ISBN": ("isbn=123", "isbn"),
    "a wrong check digit": ("isbn=9780441172710", "isbn"),
    "another word": ("added_by=you", "added_by"),
    "a negative id": ("added_by=-1", "added_by"),
    "a huge id": ("added_by=99999999999", "added_by"),
    "other digits": ("added_by=٣", "added_by"),
    "NUL": ("title=%00", "title"),
    "twice": ("search=a&search=b", "search"),
    "twice the same": ("sort=id&sort=id", "sort"),
    "twice, blank": ("genre=&genre=", "genre"),
    "twice, encoded": ("genre=a&g%65nre=b", "genre"),
    "an unknown one, twice": ("colour=a&colour=b", "colour"),
}


@pytest.mark.parametrize(("query", "field"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("path", ["/books", "/books/export"])
def test_wrong_filters_are_422(client: TestClient, path: str, query: str, field: str) -> None:
    answer = client.get(f"{path}?{query}")
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["loc"] == ["query", field]


REPEATED = [
    *("/my-library?status=reading&status=reading", "/my-library/1?x=1&x=2", "/books/genres?search=a&search=b"),
    *("/loans?limit=1&limit=1", "/users/me?x=&x=", "/events?after=1&after=2", "/books/1/reviews?limit=1&limit=2"),
    *("/books/upload?limit=1&limit=1", "/stream?since=1&since=2"),
]


@pytest.mark.parametrize("path", REPEATED)
def test_no_path_takes_a_parameter_twice(reader: Person, path: str) -> None:
    answer = reader.get(path)
    assert answer.status_code == 422
    name = path.rpartition("&")[2].partition("=")[0]
    assert answer.json()["errors"] == [{"loc": ["query", name], "msg": "is given twice", "type": "value_error"}]


def test_a_repeated_word_costs_as_much_as_one(catalogue: TestClient) -> None:
    """80 times a word with two choices would be 2^80 queries."""
    answer = catalogue.get("/books", params={"search": " ".join(["worlb"] * 80)}).json()
    assert answer["suggestions"] == catalogue.get("/books", params={"search": "worlb"}).json()["suggestions"]
