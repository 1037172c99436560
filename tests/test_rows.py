"""Hot reads: what the database renders is what the shapes say, and every list of the catalogue goes by an index."""

import random
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient
from pydantic import BaseModel, TypeAdapter
from sqlmodel import Session

import database
from books import BOOKS, FIND_BOOK, ORDERS, counting
from database import CompiledQuery
from library import COUNT_ENTRIES, ENTRIES
from library import ORDERS as SHELF_ORDERS
from models import Book
from pagination import Page
from schemas import BookPublic, EntryPublic
from search import SAME_TITLE
from tests.fixtures import Person

FULL = {
    "title": 'Quotes "and" \\ \x01 tabs\t, \U0001f4d6 and \u2028',
    "author": "Karin Boye",
    "isbn": "9780141439518",
    "genre": "Science fiction",
    "description": "One line\nand another",
    "publisher": "Bonnier",
    "language": "sv",
    "pages": 200,
    "published_date": "1940-01-01",
}


def as_declared(shape: Any, answer: Any) -> Any:
    """What the route's declared model makes of an answer: the same, or it is not true."""
    adapter: TypeAdapter[BaseModel] = TypeAdapter(shape)
    return adapter.dump_python(adapter.validate_python(answer), mode="json")


@pytest.mark.parametrize("price", [None, 0, 0.01, 7, 7.99, 1234567.89, 9999999.99])
@pytest.mark.parametrize("ratings", [(), (4,), (5, 4, 4), (3, 2, 2, 1, 5, 5)], ids=str)
def test_books_and_shelves_are_what_their_shapes_say(
    client: TestClient, admin: Person, price: float | None, ratings: tuple[int, ...]
) -> None:
    made = admin.add_book(**FULL, price=price)

    def rate(session: Any) -> None:
        figures = {"count": len(ratings), "sum": sum(ratings), "id": made["id"]}
        session.execute(sa.text("UPDATE book SET rating_count = :count, rating_sum = :sum WHERE id = :id"), figures)

    database.write_sync(rate)
    expected = {**made, "rating": sum(ratings) / len(ratings) if ratings else None, "rating_count": len(ratings)}
    book = client.get(f"/books/{made['id']}").json()
    assert book == expected == as_declared(BookPublic, book)
    for query in ("", "?search=quotes", "?genre=science+fiction", "?sort=-rating", "?offset=0&limit=1"):
        page = client.get(f"/books{query}").json()
        assert page["items"] == [expected]
        assert page == as_declared(Page[BookPublic], page)
    admin.post(f"/my-library/{made['id']}")
    change = {"status": "completed", "rating": 5, "review": "Good.", "tags": ["a b", "c"], "finished_at": "2026-01-01"}
    entry = admin.patch(f"/my-library/{made['id']}", json=change).json()
    shelf = admin.get("/my-library").json()
    assert shelf["items"] == [entry]
    assert shelf == as_declared(Page[EntryPublic], shelf)


# --- what is counted as it changes ------------------------------------------------------------------------------


def counted(connection: sa.Connection) -> tuple[set[Any], set[Any]]:
    kept = connection.execute(sa.text("SELECT kind, name, count FROM facet")).all()
    found: set[Any] = set()
    for kind in ("genre", "language"):
        rows = connection.execute(
            sa.text(f"SELECT '{kind}', {kind}, count(*) FROM book WHERE {kind} IS NOT NULL GROUP BY {kind}")
        )
        found |= {tuple(row) for row in rows}
    return {tuple(row) for row in kept}, found


def test_genres_and_languages_are_counted_as_they_change(client: TestClient, admin: Person) -> None:
    """However books come, change and go: by themselves, many in one file, or as one statement."""
    chance = random.Random(5)
    told: list[dict[str, Any]] = [
        {"genre": genre, "language": language}
        for genre in ("Novel", "novel", "Poetry", None)
        for language in ("en", None)
    ]
    ids: list[int] = []
    for number in range(40):
        what = chance.choice(["add", "add", "patch", "put", "delete"])
        if what == "add" or not ids:
            ids.append(admin.add_book(title=f"{number}", **chance.choice(told))["id"])
        elif what == "delete":
            admin.delete(f"/books/{ids.pop(chance.randrange(len(ids)))}")
        else:
            body = chance.choice(told) | ({"title": "T", "author": "A"} if what == "put" else {})
            assert admin.request(what.upper(), f"/books/{chance.choice(ids)}", json=body).status_code == 200
        kept, found = database.read_sync(counted)
        assert kept == found
    rows = "".join(f"Book {n},Somebody,{chance.choice(['Novel', 'NOVEL', 'Poetry', ''])},de\n" for n in range(300))
    assert admin.upload(f"title,author,genre,language\n{rows}")["status"] == "completed"
    kept, found = database.read_sync(counted)
    assert kept == found
    for genre in client.get("/books/genres").json():
        assert client.get("/books", params={"genre": genre["genre"].upper()}).json()["total"] == genre["count"]
    assert client.get("/books", params={"genre": "none such"}).json()["total"] == 0
    assert client.get("/books", params={"language": "DE"}).json()["total"] == 300

    def clear(session: Session) -> None:
        session.execute(sa.text("UPDATE book SET genre = 'Essay', language = NULL WHERE id % 2 = 0"))
        session.execute(sa.text("DELETE FROM book WHERE id % 3 = 0"))

    database.write_sync(clear)
    kept, found = database.read_sync(counted)
    assert kept == found


# --- how much is read ---------------------------------------------------------------------------------------------

FILTERS = ((), ("genre",), ("language",), ("available",), ("added_by",), ("genre", "language"), ("year",), ("words",))
VALUES = {"genre": "genre 1", "language": "en", "added_by": 1, "words": '"shared"*', "user_id": 1, "status": "reading"}
VALUES |= {"year_from": 1900, "year_to": 1999, "start": 0, "most": 21, "title": "shared", "ids": "[1, 2]", "book_id": 7}
# The keys of a book in the middle of the list.
MIDDLE = {"title": ("shared", "a"), "author": ("a",), "year": (1950,), "rating": (0.0,)}


def pages_of(
    asked: tuple[str, ...], orders: Iterable[str]
) -> Iterator[tuple[str, list[CompiledQuery], dict[str, Any]]]:
    """The statements of these pages of the catalogue, by name, with what is bound."""
    for name in orders:
        for by_cursor in (False, True):
            keys = [*MIDDLE.get(name.strip("-"), ()), 500] if by_cursor else []
            bound = {f"key{n}": key for n, key in enumerate(keys)}
            yield f"{asked} by {name}, cursor: {by_cursor}", BOOKS._prepare(asked, ORDERS[name], by_cursor), bound


def plan(connection: sa.Connection, statement: CompiledQuery, bound: dict[str, Any]) -> list[str]:
    driver: Any = connection.connection.dbapi_connection
    sql, constants = statement._compiled
    return [row[3] for row in driver.execute(f"EXPLAIN QUERY PLAN {sql}", {**constants, **VALUES, **bound})]


@pytest.mark.sqlite
def test_every_list_is_read_by_an_index(client: TestClient) -> None:
    """No scan of all books, but along an index or the ids themselves, which LIMIT ends; and in the order of ids, as
    lists are by default, nothing is sorted."""

    def check(connection: sa.Connection) -> None:
        pages = [(asked, page) for asked in FILTERS for page in pages_of(asked, ORDERS)]
        pages += [((), (f"shelf by {n}", ENTRIES._prepare(("mine",), o, False), {})) for n, o in SHELF_ORDERS.items()]
        for asked, (name, prepared, bound) in pages:
            steps = [step for statement in prepared for step in plan(connection, statement, bound)]
            in_order = name.split(" by ")[1].startswith(("id", "-id", "created", "-created", "added", "-added"))
            assert "SCAN book" not in steps or (in_order and not asked), (name, steps)
            if in_order and "year" not in asked:  # whose index has another order
                assert not [step for step in steps if "TEMP B-TREE FOR ORDER BY" in step], (name, steps)
        singles = [FIND_BOOK, SAME_TITLE, *COUNT_ENTRIES.values(), *map(counting, FILTERS)]
        singles += ENTRIES._prepare(("mine", "book_id"), SHELF_ORDERS["-added"], False)
        for statement in singles:
            assert "SCAN book" not in plan(connection, statement, {}), statement._compiled

    database.read_sync(check)


def cost_of(statements: list[CompiledQuery], bound: dict[str, Any]) -> int:
    """How many steps SQLite takes for a page, in hundreds."""

    def run(connection: sa.Connection) -> int:
        driver: Any = connection.connection.dbapi_connection
        taken, rows = 0, 0

        def count() -> int:
            nonlocal taken
            taken += 1
            return 0

        driver.set_progress_handler(count, 100)
        try:
            for statement in statements:
                rows += len(statement.all(connection, {**VALUES, **bound, "most": 21 - rows}))
                if rows == 21:
                    break
        finally:
            driver.set_progress_handler(None, 0)
        return taken

    return database.read_sync(run)


def fill(session: Session, first: int, last: int) -> None:
    same = Book.untouched(1) | {"copies": 1, "available": 1, "language": "en"}
    rows = [
        {"title": "Shared", "title_key": "shared", "author": "A", "author_key": "a", "genre": f"Genre {number % 5}"}
        | {"publication_year": 1900 + number % 100}
        for number in range(first, last)
    ]
    database.insert_many(session, Book.metadata.tables["book"], rows, same)


@pytest.mark.sqlite
def test_a_page_costs_the_same_in_a_catalogue_ten_times_as_large(client: TestClient) -> None:
    """Even where all books have the same title, author and rating, and wherever the page begins."""
    database.write_sync(fill, 0, 1000)
    pages = [*pages_of((), ORDERS)]
    for asked in (("genre",), ("language",), ("available",), ("added_by",)):
        pages += pages_of(asked, ["id", "-id"])
    before = [cost_of(prepared, bound) for _, prepared, bound in pages]
    database.write_sync(fill, 1000, 10_000)
    for (name, prepared, bound), cost in zip(pages, before, strict=True):
        assert cost_of(prepared, bound) <= 2 * cost + 5, name
