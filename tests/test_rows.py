"""Lists: what the database renders is what the response models say, and every list is read along an index."""

import json
import random
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, date, datetime
from decimal import Decimal
from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from pydantic import BaseModel, TypeAdapter
from sqlmodel import Session, col

import database
import pagination
from auth import SESSIONS
from books import BOOKS, BOOKS_BY_ID, FIND_BOOK, BookQuery, find_books
from database import CompiledQuery
from library import ENTRIES, REVIEWS
from loans import LOANS
from main import app
from models import (
    Book,
    Event,
    Loan,
    LoanStatus,
    LoginSession,
    ShelfEntry,
    Upload,
    UploadError,
    UploadStatus,
    User,
    sort_key,
)
from pagination import Listing, Page, PageQuery
from schemas import (
    BookPublic,
    EntryPublic,
    EventPublic,
    LoanPublic,
    ReviewPublic,
    SessionPublic,
    UploadErrorPublic,
    UploadPublic,
    UserPublic,
)
from search import _tiers, index_books
from tests.fixtures import Person
from uploads import ERRORS, UPLOADS
from users import PARTS, USERS, UploadProblem

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


def as_declared(model: Any, data: Any) -> Any:
    """The data as its response model renders it."""
    adapter: TypeAdapter[BaseModel] = TypeAdapter(model)
    return adapter.dump_python(adapter.validate_python(data), mode="json", exclude_unset=True)


def exact(value: Any) -> Any:
    """The same, except that true and 1 are not equal."""
    if isinstance(value, dict):
        return {name: exact(part) for name, part in value.items()}
    if isinstance(value, list):
        return [exact(part) for part in value]
    return f"<{value}>" if isinstance(value, bool) else value


@pytest.mark.parametrize("price", [None, 0, 0.01, 7, 7.99, 1234567.89, 9999999.99])
@pytest.mark.parametrize("ratings", [(), (4,), (4.75,), (5, 4, 4), (3, 2, 2.25, 1, 5, 5)], ids=str)
def test_books_and_shelves_match_their_response_models(
    client: TestClient, admin: Person, price: float | None, ratings: tuple[float, ...]
) -> None:
    book_id = admin.add_book(**FULL, price=price)["id"]
    made = admin.get(f"/books/{book_id}").json()

    def rate(session: Any) -> None:
        figures = {"count": len(ratings), "sum": sum(ratings), "id": book_id}
        session.execute(sa.text("UPDATE book SET rating_count = :count, rating_sum = :sum WHERE id = :id"), figures)

    database.write_sync(rate)
    expected = {**made, "rating": sum(ratings) / len(ratings) if ratings else None, "rating_count": len(ratings)}
    book = client.get(f"/books/{book_id}").json()
    assert book == expected == as_declared(BookPublic, book)
    for query in ("", "?search=quotes", "?genre=science+fiction", "?sort=-rating", "?offset=0&limit=1"):
        page = client.get(f"/books{query}").json()
        assert page["items"] == [expected]
        assert page == as_declared(Page[BookPublic], page)
    admin.post(f"/my-library/{book_id}")
    change = {"status": "completed", "rating": 5, "review": "Good.", "tags": ["a b", "c"], "finished_at": "2026-01-01"}
    entry = admin.patch(f"/my-library/{book_id}", json=change).json()
    shelf = admin.get("/my-library").json()
    assert shelf["items"] == [entry]
    assert shelf == as_declared(Page[EntryPublic], shelf)


NOON, PRECISE = datetime(2026, 1, 2, 12, tzinfo=UTC), datetime(2026, 1, 2, 12, 0, 0, 120_300, tzinfo=UTC)
FIRST_DAY, LAST_DAY = datetime(1, 1, 1, tzinfo=UTC), datetime(9998, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)
TEXT = FULL["title"]


def add_rows(session: Session) -> None:
    """Rows of user 2 whose values differ in how they may be rendered: null, whole, with fractions, not ASCII."""
    stock = {"copies": 1, "available": 1, "added_by": 2}
    full = {"title": TEXT, "title_key": sort_key(str(TEXT)), "author": "A, B", "author_key": "a, b", "genre": TEXT}
    full |= {"isbn": "9780141439518", "price": Decimal("7.10"), "published_date": date(1, 1, 1), "created_at": PRECISE}
    full |= {"publication_year": -5000, "pages": 3, "language": "sv", "rating_count": 3, "rating_sum": 10, "version": 7}
    empty = {"title": "t", "title_key": "t", "author": "a", "author_key": "a", "created_at": NOON, "updated_at": NOON}
    of_user = {"user_id": 2}
    shelf = of_user | {"status": "completed", "added_at": NOON}
    loan = of_user | {"book_id": 1, "borrowed_at": FIRST_DAY}
    upload = of_user | {"filename": str(TEXT), "size": 3, "created_at": NOON}
    kinds: list[tuple[Any, list[dict[str, Any]]]] = [
        (User, [{"username": "rita", "email": "rita@example.com", "password_hash": "x", "full_name": TEXT}]),
        (User, [{"username": "oskar", "email": "o@example.com", "password_hash": "x", "is_active": False}]),
        (
            Book,
            [
                full | stock,
                empty | stock,
                empty | {"added_by": 2, "price": Decimal(7), "rating_count": 2, "rating_sum": 8.75},
            ],
        ),
        (
            ShelfEntry,
            [shelf | {"book_id": 1, "rating": 5, "review": TEXT, "tags": ["é", '"', "a b"], "finished_at": PRECISE}],
        ),
        (ShelfEntry, [shelf | {"book_id": 2, "finished_at": FIRST_DAY, "started_at": LAST_DAY, "review": "x"}]),
        (ShelfEntry, [of_user | {"book_id": 3, "status": "wishlist", "rating": 4.75, "added_at": PRECISE}]),
        (Loan, [loan | {"due_at": LAST_DAY, "quantity": 2, "renewals": 1}, loan | {"due_at": PRECISE}]),
        (Loan, [loan | {"due_at": NOON, "returned_at": PRECISE}]),
        (LoginSession, [of_user | {"refresh_hash": "x", "created_at": NOON}]),
        (LoginSession, [of_user | {"refresh_hash": "y", "user_agent": TEXT, "expires_at": LAST_DAY}]),
        (Upload, [upload | {"progress": n / 3, "ignored_columns": [TEXT] * n, "dry_run": n == 1} for n in range(4)]),
        (
            Upload,
            [upload | {"status": UploadStatus.failed, "error": TEXT, "encoding": "utf-8", "finished_at": PRECISE}],
        ),
        (UploadError, [{"upload_id": 1, "row": 2, "severity": "error", "message": TEXT, "cells": ["a"]}]),
        (
            UploadError,
            [{"upload_id": 1, "row": 3, "severity": "warning", "field": "isbn", "value": "", "message": "x"}],
        ),
        (
            Event,
            [of_user | {"type": "a.b", "at": PRECISE, "private": True, "data": {"a": TEXT, "b": [1, 1.5, None, True]}}],
        ),
        (Event, [of_user | {"type": "a.b", "at": NOON, "data": {}}]),
        (Event, [{"type": "review.created", "at": NOON, "user_id": 2, "data": {"username": "rita", "rating": 5}}]),
    ]
    for table, rows in kinds:
        session.add_all([table(**row) for row in rows])
        session.flush()


def models_of(session: Session, model: type[BaseModel], table: Any, *conditions: Any) -> list[BaseModel]:
    rows = session.scalars(sa.select(table).where(*conditions).order_by(table.id))
    return [model.model_validate(row, from_attributes=True) for row in rows]


def entries(session: Session) -> list[BaseModel]:
    rows = session.execute(sa.select(ShelfEntry, Book).join_from(ShelfEntry, Book).order_by(col(ShelfEntry.id)))
    return [EntryPublic(**entry.model_dump(), book=BookPublic.model_validate(book)) for entry, book in rows]


def reviews(session: Session) -> list[BaseModel]:
    rows = session.scalars(sa.select(ShelfEntry).where(col(ShelfEntry.book_id) == 1))
    return [ReviewPublic(**entry.model_dump(), username="rita") for entry in rows]


def all_loans(session: Session) -> list[BaseModel]:
    rows = session.execute(sa.select(Loan, Book).join_from(Loan, Book).order_by(col(Loan.id)))
    return [
        LoanPublic(**loan.model_dump() | {"title": book.title}, username="rita", status=status_of(loan))
        for loan, book in rows
    ]


def status_of(loan: Loan) -> LoanStatus:
    if loan.returned_at is not None:
        return LoanStatus.returned
    return LoanStatus.overdue if loan.due_at < datetime.now(UTC) else LoanStatus.active


def sessions(session: Session) -> list[BaseModel]:
    rows = session.scalars(sa.select(LoginSession).order_by(col(LoginSession.id)))
    return [SessionPublic(**login.model_dump(), current=login.id == 2) for login in rows]


VALUES_OF_RITA = {"user_id": 2, "session_id": 2, "username": "rita", "now": NOON.replace(year=2027)}
# Of each list: the filters of a call, the route that answers with it, and what the ORM and pydantic make of its rows.
LISTS: dict[str, tuple[Listing, dict[str, Any], str, Any]] = {
    "books": (BOOKS, {}, "/books", lambda session: models_of(session, BookPublic, Book)),
    "entries": (ENTRIES, {"user_id": 2}, "/my-library", entries),
    "reviews": (REVIEWS, {"book_id": 1}, "/books/{book_id:id}/reviews", reviews),
    "loans": (LOANS, {"now": VALUES_OF_RITA["now"]}, "/loans", all_loans),
    "sessions": (SESSIONS, {"user_id": 2, "session_id": 2}, "/auth/sessions", sessions),
    "uploads": (UPLOADS, {}, "/books/upload", lambda session: models_of(session, UploadPublic, Upload)),
    "errors": (
        ERRORS,
        {"upload_id": 1},
        "/books/upload/{upload_id:id}/errors",
        lambda session: models_of(session, UploadErrorPublic, UploadError),
    ),
    "users": (USERS, {}, "/users", lambda session: models_of(session, UserPublic, User)),
}
EXPORTED: dict[str, Any] = {
    "sessions": sessions,
    "shelf": entries,
    "loans": all_loans,
    "books_added": lambda session: models_of(session, BookPublic, Book),
    "uploads": lambda session: models_of(session, UploadPublic, Upload),
    "upload_errors": lambda session: models_of(session, UploadProblem, UploadError),
    "events": lambda session: models_of(session, EventPublic, Event, col(Event.user_id) == 2),
}


def response_model(path: str) -> Any:
    routes = (route for route in app.routes if isinstance(route, APIRoute))
    return next(route.response_model for route in routes if route.path == path and "GET" in (route.methods or ()))


def rendered(expected: Any, session: Session) -> list[Any]:
    return [model.model_dump(mode="json") for model in expected(session)]


@pytest.mark.parametrize("name", LISTS)
def test_every_list_is_what_its_response_model_says(client: TestClient, name: str) -> None:
    listing, filters, path, expected = LISTS[name]
    database.write_sync(add_rows)
    models = database.write_sync(partial(rendered, expected))
    ascending = next(order for order in ("id", "added", "-id") if order in listing.orders)
    backwards = ascending.startswith("-")
    page = database.read_sync(listing.page, filters, ascending, PageQuery(limit=100))
    items = [json.loads(item) for item in page.items][:: -1 if backwards else 1]
    assert exact(items) == exact(models)
    assert page.total == len(items) > 0
    body = {"items": items, "total": page.total, "next": None}
    assert exact(as_declared(response_model(path), body)) == exact(body)
    assert json.loads(database.read_sync(listing.first, filters) or "") in items


def test_every_part_of_the_account_export_is_what_its_response_model_says(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.write_sync(add_rows)
    export: dict[str, Any] = {}
    for batch in (1, 1000):
        monkeypatch.setattr(pagination, "EXPORT_BATCH", batch)
        for name, (listing, order) in PARTS.items():
            filters = VALUES_OF_RITA | {"added_by": 2}
            texts = [item for items in listing.batches(filters, order) for item in items]
            assert export.setdefault(name, list(map(json.loads, texts))) == list(map(json.loads, texts))
    for name, items in export.items():
        assert items
        assert exact(items) == exact(database.write_sync(partial(rendered, EXPORTED[name])))
    now = NOON.isoformat().replace("+00:00", "Z")
    user = database.write_sync(lambda session: models_of(session, UserPublic, User)[1].model_dump(mode="json"))
    body = {"exported_at": now, "account": user, **export}
    assert exact(as_declared(response_model("/users/me/export"), body)) == exact(body)


# --- counts by genre and language -----------------------------------------------------------------------------


def facets(connection: sa.Connection) -> tuple[set[Any], set[Any]]:
    stored = connection.execute(sa.text("SELECT kind, key, count FROM facet")).all()
    counted: set[Any] = set()
    for kind in ("genre", "language"):
        rows = connection.execute(
            sa.text(f"SELECT '{kind}', {kind}_key, count(*) FROM book WHERE {kind}_key IS NOT NULL GROUP BY 2")
        )
        counted |= {tuple(row) for row in rows}
    return {tuple(row) for row in stored}, counted


def test_genres_and_languages_are_counted_as_they_change(client: TestClient, admin: Person) -> None:
    """By single requests, by an import and by statements for many rows."""
    chance = random.Random(5)
    kinds: list[dict[str, Any]] = [
        {"genre": genre, "language": language}
        for genre in ("Novel", "novel", "Poetry", None)
        for language in ("en", None)
    ]
    ids: list[int] = []
    for number in range(40):
        what = chance.choice(["add", "add", "patch", "put", "delete"])
        if what == "add" or not ids:
            ids.append(admin.add_book(title=f"{number}", **chance.choice(kinds))["id"])
        elif what == "delete":
            admin.delete(f"/books/{ids.pop(chance.randrange(len(ids)))}")
        else:
            body = chance.choice(kinds) | ({"title": "T", "author": "A"} if what == "put" else {})
            assert admin.request(what.upper(), f"/books/{chance.choice(ids)}", json=body).status_code == 200
        stored, counted = database.read_sync(facets)
        assert stored == counted
    rows = "".join(f"Book {n},Somebody,{chance.choice(['Novel', 'NOVEL', 'Poetry', ''])},de\n" for n in range(300))
    assert admin.upload(f"title,author,genre,language\n{rows}")["status"] == "completed"
    stored, counted = database.read_sync(facets)
    assert stored == counted
    for genre in client.get("/books/genres").json():
        assert client.get("/books", params={"genre": genre["genre"].upper()}).json()["total"] == genre["count"]
    assert client.get("/books", params={"genre": "none such"}).json()["total"] == 0
    assert client.get("/books", params={"language": "DE"}).json()["total"] == 300

    def clear(session: Session) -> None:
        session.execute(sa.text("UPDATE book SET genre_key = 'essay', language_key = NULL WHERE id % 2 = 0"))
        session.execute(sa.text("DELETE FROM book WHERE id % 3 = 0"))

    database.write_sync(clear)
    stored, counted = database.read_sync(facets)
    assert stored == counted


@pytest.mark.sqlite
def test_a_change_of_a_genre_reads_no_other_genres(admin: Person) -> None:
    book = admin.add_book(genre="Novel", language="en")["id"]
    more = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 20000)"
    statements = (f"UPDATE book SET genre_key = 'essay' WHERE id = {book}", f"DELETE FROM book WHERE id = {book}")

    def change(session: Session) -> list[int]:
        session.execute(sa.text(f"INSERT INTO facet {more} SELECT 'genre', 'g' || i, 1 FROM n"))
        ticks = []
        driver = database._driver(session)
        for statement in statements:
            ticks.append(0)
            driver.set_progress_handler(lambda: ticks.append(ticks.pop() + 1), 100)
            session.execute(sa.text(statement))
            driver.set_progress_handler(None, 0)
        return ticks

    assert max(database.write_sync(change)) < 20  # hundreds of steps


# --- how much is read ---------------------------------------------------------------------------------------------

FILTERS = ((), ("genre",), ("language",), ("available",), ("added_by",), ("genre", "language"))
MORE_FILTERS = (*FILTERS, ("year_from", "year_to"), ("words",), ("genre", "words"))
VALUES = {"genre": "genre 1", "language": "en", "added_by": 1, "words": '"shared"*', "user_id": 1, "status": "reading"}
VALUES |= {"year_from": 1900, "year_to": 1999, "start": 0, "limit": 21, "title": "shared", "ids": "[1, 2]"}
VALUES |= {"book_id": 7, "last": 0, "begins": '^"shared"*', "in_title": '"shared"*', "elsewhere": '"shared"*'}
# The keys of a book in the middle of the list.
MIDDLE = {"title": ("shared", "a"), "author": ("a",), "year": (1950,), "rating": (0.0,)}


def pages_of(
    names: tuple[str, ...], orders: Iterable[str]
) -> Iterator[tuple[str, list[CompiledQuery], dict[str, Any]]]:
    """The statements of these pages of the catalogue, by name, and the values to bind."""
    for order in orders:
        for by_cursor in (False, True):
            keys = [*MIDDLE.get(order.strip("-"), ()), 500] if by_cursor else []
            bound = {f"key{n}": key for n, key in enumerate(keys)}
            statements = BOOKS._compiled(names, BOOKS.orders[order], by_cursor)
            yield f"{names} by {order}, cursor: {by_cursor}", statements, bound


def plan(connection: sa.Connection, statement: CompiledQuery, bound: dict[str, Any]) -> list[str]:
    driver: Any = connection.connection.dbapi_connection
    values = statement._bind({**VALUES, **bound})
    return [row[3] for row in driver.execute(f"EXPLAIN QUERY PLAN {statement._compiled[0]}", values)]


@pytest.mark.sqlite
def test_every_list_is_read_by_an_index(client: TestClient) -> None:
    """No scan of all books, except along an index or the ids, which LIMIT ends; and by id, the default, no sorting of
    more than the page."""

    def check(connection: sa.Connection) -> None:
        pages = [(names, page) for names in MORE_FILTERS for page in pages_of(names, BOOKS.orders)]
        shelf = [(f"shelf by {name}", ENTRIES._compiled(("user_id",), o, False)) for name, o in ENTRIES.orders.items()]
        pages += [((), (name, statements, {})) for name, statements in shelf]
        keys = {"key0": "2026-11-26 08:00:00.000000", "key1": 5}
        for order in ("added", "-added"):
            by_cursor = ENTRIES._compiled(("user_id",), ENTRIES.orders[order], True)
            pages.append(((), (f"shelf by {order}, cursor", by_cursor, keys)))
        for names, (name, statements, bound) in pages:
            steps = [step for statement in statements for step in plan(connection, statement, bound)]
            by_id = name.split(" by ")[1].startswith(("id", "-id", "created", "-created", "added", "-added"))
            assert "SCAN book" not in steps or (by_id and not names), (name, steps)
            sorted_rows = sum("TEMP B-TREE FOR ORDER BY" in step for step in steps)
            if by_id and "year_from" not in names:  # whose index has another order
                assert not sorted_rows, (name, steps)
        singles = [FIND_BOOK, BOOKS_BY_ID[database.backend().kind], *(BOOKS._count(names) for names in MORE_FILTERS)]
        singles += [ENTRIES._count(names) for names in (("user_id",), ("user_id", "status"), ("user_id", "book_id"))]
        singles += ENTRIES._compiled(("user_id", "book_id"), None, False)
        for names in FILTERS:
            singles += _tiers(names, BOOKS.conditions)
        for statement in singles:
            assert "SCAN book" not in plan(connection, statement, {}), statement._compiled

    database.read_sync(check)


def steps_of(read: Callable[[sa.Connection], object]) -> int:
    """How many steps SQLite takes, in hundreds."""

    def run(connection: sa.Connection) -> int:
        driver: Any = connection.connection.dbapi_connection
        steps = 0

        def count() -> int:
            nonlocal steps
            steps += 1
            return 0

        driver.set_progress_handler(count, 100)
        try:
            read(connection)
        finally:
            driver.set_progress_handler(None, 0)
        return steps

    return database.read_sync(run)


def cost_of(statements: list[CompiledQuery], bound: dict[str, Any]) -> int:
    """The steps of a page."""

    def read(connection: sa.Connection) -> None:
        rows = 0
        for statement in statements:
            rows += len(statement.all(connection, {**VALUES, **bound, "limit": 21 - rows}))
            if rows == 21:
                break

    return steps_of(read)


def fill(session: Session, first: int, last: int) -> None:
    same = {**dict.fromkeys(Book.__table__.columns.keys()), **Book.initial(1)}  # type: ignore[attr-defined]  # of SQLModel
    same |= {"title": "Shared", "title_key": "shared", "author": "A", "author_key": "a", "language": "en"}
    same |= {"copies": 1, "available": 1}
    rows = [
        same | {"genre": f"Genre {number % 5}", "publication_year": 1900 + number % 100}
        for number in range(first, last)
    ]
    database.insert_many(session, Book, rows)


@pytest.mark.sqlite
def test_a_page_costs_the_same_in_a_catalogue_ten_times_as_large(client: TestClient) -> None:
    """Even where all books have the same title, author and rating, and wherever the page begins."""
    database.write_sync(fill, 0, 1000)
    pages = [*pages_of((), BOOKS.orders)]
    for names in (("genre",), ("language",), ("available",), ("added_by",)):
        pages += pages_of(names, ["id", "-id"])
    before = [cost_of(statements, bound) for _, statements, bound in pages]
    database.write_sync(fill, 1000, 10_000)
    for (name, statements, bound), cost in zip(pages, before, strict=True):
        assert cost_of(statements, bound) <= 2 * cost + 5, name


@pytest.mark.sqlite
@pytest.mark.parametrize("order", ["title", "-author", "year", "-rating"])
def test_a_sorted_page_of_a_common_word_looks_up_few_books(client: TestClient, order: str) -> None:
    database.write_sync(fill, 0, 5000)
    database.write_sync(index_books, [1, 5000])
    query = BookQuery.model_validate({"search": "shared", "sort": order})
    found = database.read_sync(find_books, query.filters(None), query)
    every = database.read_sync(BOOKS.page, query.filters(None), order, query)
    assert (found.items, found.total, found.next) == (every.items, 5000, every.next)
    of_page = steps_of(lambda connection: find_books(connection, query.filters(None), query))
    of_every_match = steps_of(lambda connection: BOOKS.page(connection, query.filters(None), order, query))
    assert of_page < of_every_match / 2


@pytest.mark.sqlite
def test_a_sorted_page_of_a_rare_word_does_not_go_through_all_books(client: TestClient, reader: Person) -> None:
    database.write_sync(fill, 0, 5000)
    reader.add_book(title="Quixote")
    query = BookQuery.model_validate({"search": "quixote", "sort": "-title"})
    assert steps_of(lambda connection: find_books(connection, query.filters(None), query)) < 20
