"""Hot reads: what the database renders is what the shapes say, and every list of the catalogue goes by an index."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient
from pydantic import BaseModel, TypeAdapter

import database
from books import BOOKS, FIND_BOOK, ORDERS, counting
from conftest import Person
from library import COUNT_ENTRIES, ENTRIES
from library import ORDERS as SHELF_ORDERS
from models import BookPublic, EntryPublic
from pages import Page
from rows import Prepared
from search import MATCHES, SAME_TITLE

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

    database.transact(rate)
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


def plan(connection: sa.Connection, prepared: Prepared) -> list[str]:
    sql, constants = prepared._compiled
    values = {name: constants.get(name, 1) for name in re.findall(r":(\w+)", sql)}
    driver: Any = connection.connection.dbapi_connection
    return [row[3] for row in driver.execute(f"EXPLAIN QUERY PLAN {sql}", values)]


def statements() -> Iterator[tuple[str, Prepared]]:
    """All that the listed queries run, by name."""
    for name, order in ORDERS.items():
        for by_cursor in (False, True):
            yield f"sort={name}, by cursor: {by_cursor}", BOOKS._prepare((), order, by_cursor)
    for asked in ("genre", "added_by", "words"):
        for by_cursor in (False, True):
            yield f"{asked}, by cursor: {by_cursor}", BOOKS._prepare((asked,), ORDERS["id"], by_cursor)
        yield f"how many of this {asked}", counting((asked,))
    yield "how many", counting(())
    yield "matches", MATCHES
    yield "the same title", SAME_TITLE
    yield "one", FIND_BOOK
    yield "my shelf", ENTRIES._prepare(("mine",), SHELF_ORDERS["-added"], False)
    yield "how many on my shelf", COUNT_ENTRIES[("mine",)]


@pytest.mark.sqlite
def test_every_list_is_read_by_an_index(client: TestClient) -> None:
    """No scan of all books, but along an index or the ids themselves, which LIMIT ends; and nothing is sorted."""

    def check(connection: sa.Connection) -> None:
        for name, prepared in statements():
            steps = plan(connection, prepared)
            along_the_ids = name.startswith(("sort=id", "sort=-id", "sort=created", "sort=-created"))
            scans = [s for s in steps if s == "SCAN book"]
            assert not scans or along_the_ids, (name, steps)
            assert not [s for s in steps if "TEMP B-TREE FOR ORDER" in s and name != "my shelf"], (name, steps)

    database.snapshot(check)
