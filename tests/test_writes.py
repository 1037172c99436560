"""`database.write`: changes that are made at the same time share a transaction. Needs hypothesis."""

import asyncio
import contextlib
import os
import signal
import sqlite3
import threading
from collections.abc import Callable, Coroutine
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlmodel import Session

import books
import database
from models import Book, Setting
from schemas import BookCreate
from tests.fixtures import Person, Server, wait_for

NUMBERS = count(1)


class Refused(Exception):
    pass


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes that are made together share a transaction, however slow the machine is."""
    monkeypatch.setattr(database, "MAX_GROUP_TIME", 60)


def add(session: Session, title: str, fail: bool = False) -> int:
    book = books.add_book(session, BookCreate(title=title, author="A"), None)
    if fail:
        raise Refused(title)
    return book.id


def rename(session: Session, title: str, fail: bool = False) -> int:
    """The newest book, by the ORM, which writes at `flush`."""
    book = session.scalars(sa.select(Book).order_by(sa.desc("id")).limit(1)).one()
    books.revise_book(session, book, BookCreate(title=title, author="B"))
    if fail:
        session.add(Setting(key="book_count", value="0"))  # violates the primary key, in the flush
    return book.id


def delete(session: Session, _title: str, fail: bool = False) -> int:
    book = session.scalars(sa.select(Book).order_by(sa.desc("id")).limit(1)).one()
    session.delete(book)
    session.flush()
    if fail:
        raise Refused
    return book.id


def together(client: TestClient, *calls: Callable[[], Coroutine[Any, Any, Any]]) -> list[Any]:
    """The results of the calls, which begin in the same turn of the service's event loop, or their errors."""

    async def gather() -> list[Any]:
        return await asyncio.gather(*(call() for call in calls), return_exceptions=True)

    assert client.portal is not None
    return client.portal.call(gather)


def query(statement: str) -> list[Any]:
    return database.read_sync(lambda connection: list(connection.exec_driver_sql(statement)))


def expected_titles(before: dict[int, str], changes: list[tuple[Any, bool]], outcomes: list[Any], run: int) -> Any:
    titles = dict(before)
    for number, ((change, _), outcome) in enumerate(zip(changes, outcomes, strict=True)):
        if isinstance(outcome, int):
            if change is delete:
                del titles[outcome]
            else:
                titles[outcome] = f"w{run}x{number}"
    return titles


@hypothesis_settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(changes=st.lists(st.tuples(st.sampled_from([add, add, add, rename, delete]), st.booleans()), max_size=12))
def test_each_change_of_a_group_succeeds_or_fails_for_itself(
    client: TestClient, changes: list[tuple[Any, bool]]
) -> None:
    run = next(NUMBERS)
    database.write_sync(add, f"w{run}first")
    before = dict(query("SELECT id, title FROM book"))
    last_event = query("SELECT max(id) FROM event")[0][0]

    def call(number: int, change: Any, fail: bool) -> Callable[[], Coroutine[Any, Any, Any]]:
        return lambda: database.write(change, f"w{run}x{number}", fail=fail)

    outcomes = together(client, *(call(number, *change) for number, change in enumerate(changes)))
    for (_, fail), outcome in zip(changes, outcomes, strict=True):
        assert isinstance(outcome, Refused | IntegrityError if fail else int), outcome
    titles = expected_titles(before, changes, outcomes, run)
    assert dict(query("SELECT id, title FROM book")) == titles
    # An event for each, in their order.
    succeeded = [(change, outcome) for (change, _), outcome in zip(changes, outcomes, strict=True)]
    types = [
        "book.created" if c is add else "book.updated" for c, o in succeeded if isinstance(o, int) and c is not delete
    ]
    assert [row[0] for row in query(f"SELECT type FROM event WHERE id > {last_event} ORDER BY id")] == types
    for book_id, title in titles.items():  # the search index has what the table has
        found = client.get("/books", params={"search": title}).json()["items"]
        assert [item["id"] for item in found if item["title"] == title] == [book_id]
    if not database.is_postgresql():
        database.write_sync(
            lambda s: s.execute(sa.text("INSERT INTO book_fts(book_fts, rank) VALUES('integrity-check', 1)"))
        )


@pytest.mark.sqlite
def test_a_commit_that_fails_fails_all_changes_of_its_group(client: TestClient) -> None:
    def break_reference(session: Session) -> None:
        session.execute(sa.text("PRAGMA defer_foreign_keys=ON"))
        session.execute(sa.text("UPDATE event SET user_id = 99 WHERE id = (SELECT max(id) FROM event)"))

    outcomes = together(
        client,
        lambda: database.write(add, "Dune"),
        lambda: database.write(break_reference),
        lambda: database.write(add, "Emma"),
    )
    assert [type(outcome) for outcome in outcomes] == [IntegrityError] * 3
    assert client.get("/books").json()["total"] == 0
    assert client.get("/events?types=book.*").json()["items"] == []
    assert together(client, lambda: database.write(add, "Persuasion")) == [1]


@pytest.mark.sqlite
def test_a_full_disk_fails_a_group_and_loses_nothing_acknowledged(client: TestClient) -> None:
    backend: Any = database.backend()
    driver = database._driver(backend.loop_writer)
    pages = driver.execute("PRAGMA page_count").fetchone()[0]
    driver.execute(f"PRAGMA max_page_count={pages + 10}")
    calls = [lambda n=n: database.write(add, f"{n} {'long ' * 90}") for n in range(200)]
    outcomes = together(client, *calls)
    failed = [outcome for outcome in outcomes if not isinstance(outcome, int)]
    assert failed
    assert all(isinstance(error, OperationalError) and database.is_full(error) for error in failed)
    assert client.get("/books").json()["total"] == len(outcomes) - len(failed)
    driver.execute("PRAGMA max_page_count=1073741823")
    assert isinstance(together(client, lambda: database.write(add, "Emma"))[0], int)
    assert client.get("/books?search=emma").json()["total"] == 1


def test_a_change_whose_client_is_gone_is_not_made(client: TestClient) -> None:
    async def cancel_one() -> list[Any]:
        tasks = [asyncio.create_task(database.write(add, title)) for title in ("Dune", "Emma", "Persuasion")]
        await asyncio.sleep(0)  # they are queued
        tasks[1].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    assert client.portal is not None
    results = client.portal.call(cancel_one)
    assert isinstance(results[1], asyncio.CancelledError)
    assert [book["title"] for book in client.get("/books").json()["items"]] == ["Dune", "Persuasion"]


@pytest.mark.sqlite
def test_a_read_beyond_its_budget_runs_in_a_thread(client: TestClient, admin: Person) -> None:
    threads = []
    slow = database.CompiledQuery(
        sa.text("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :most) SELECT max(i) FROM n")
    )

    def count_to(connection: sa.Connection, most: int) -> int:
        threads.append(threading.current_thread())
        return int(slow.first(connection, {"most": most})[0])

    assert client.portal is not None
    loop_thread = client.portal.call(threading.current_thread)
    for most, on_the_loop in ((10, [True]), (100_000, [True, False]), (100_000, [True, False]), (20, [True])):
        assert client.portal.call(database.read, count_to, most) == most
        assert [thread is loop_thread for thread in threads] == on_the_loop
        threads.clear()
    assert slow.too_long == {"{'most': 100000, 'start': 0}": 0}
    for _ in range(1500):  # SQLite counts the steps of a cached statement over all its executions
        assert client.portal.call(database.read, count_to, 10) == 10
    assert len(threads) == 1500
    assert admin.add_book(title="Dune")["id"] == 1


@pytest.mark.sqlite
def test_a_page_deeper_than_one_beyond_its_budget_runs_in_a_thread_at_once(client: TestClient) -> None:
    numbers = "WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n LIMIT 1 OFFSET :start"
    page = database.CompiledQuery(sa.text(numbers))
    assert client.portal is not None
    for start, least in ((10, []), (100_000, [100_000]), (150_000, [100_000]), (90_000, [90_000]), (10, [90_000])):
        assert client.portal.call(database.read, page.first, {"start": start}) == (start,)
        assert [*page.too_long.values()] == least


READS = (
    *("/books", "/books?search=w1", "/books?search=w1&genre=G1", "/books?sort=-title&genre=G1", "/books?offset=250"),
    *("/books?author=b&available=true", "/books?search=w1&limit=5&offset=20", "/books/genres", "/books/7/reviews"),
    *("/my-library?sort=title", "/my-library/stats", "/users", "/loans", "/events?limit=100", "/books/upload"),
)


@pytest.mark.sqlite
@pytest.mark.parametrize("path", READS)
def test_a_route_answers_the_same_on_the_event_loop_and_beyond_its_budget(
    client: TestClient, admin: Person, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    rows = "".join(f"w1 w{number},A B,G{number % 3}\n" for number in range(300))
    admin.upload(f"title,author,genre\n{rows}")
    admin.post("/my-library/7")
    monkeypatch.setattr(database, "MAX_TICKS", 10**9)
    expected = admin.get(path)
    assert expected.status_code == 200
    monkeypatch.setattr(database, "MAX_TICKS", 0)
    for _ in range(3):
        assert admin.get(path).content == expected.content


@pytest.mark.slow
@pytest.mark.sqlite
def test_a_killed_service_has_all_that_it_acknowledged_and_no_event_without_its_book(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    server = serve(file=tmp_path / "books.db")
    admin = Person(server.client, "admin", "admin")
    acknowledged: list[int] = []
    for _ in range(3):

        def add_books(admin: Person = admin) -> None:
            with contextlib.suppress(Exception):  # the service is killed
                while True:
                    answer = admin.post("/books", json={"title": "Dune", "author": "Frank Herbert"})
                    if answer.status_code == 201:
                        acknowledged.append(answer.json()["id"])

        threads = [threading.Thread(target=add_books) for _ in range(12)]
        before = len(acknowledged)
        for thread in threads:
            thread.start()
        wait_for(lambda before=before: len(acknowledged) > before + 200 or None)  # type: ignore[misc]  # no type for mypy
        os.kill(server.process.pid, signal.SIGKILL)
        for thread in threads:
            thread.join()
        server = serve(file=tmp_path / "books.db")
        admin = Person(server.client, "admin", "admin")
    server.stop()
    with contextlib.closing(sqlite3.connect(tmp_path / "books.db")) as connection:
        stored = {row[0] for row in connection.execute("SELECT id FROM book")}
        logged = [row[0] for row in connection.execute("SELECT data ->> 'id' FROM event WHERE type = 'book.created'")]
        connection.execute("INSERT INTO book_fts(book_fts, rank) VALUES('integrity-check', 1)")
        (indexed,) = connection.execute("SELECT count(*) FROM book_fts WHERE book_fts MATCH 'dune'").fetchone()
    assert set(acknowledged) <= stored
    assert sorted(logged) == sorted(stored)
    assert indexed == len(stored)


def test_a_lost_transaction_does_not_answer_others_with_one_change_s_error(client: TestClient) -> None:
    def lose(session: Session) -> None:
        database._driver(session).execute("ROLLBACK")  # as a full disk or a broken connection does
        raise Refused

    outcomes = together(client, lambda: database.write(add, "Dune"), lambda: database.write(lose))
    assert [isinstance(outcome, DBAPIError) for outcome in outcomes] == [True, True]
    assert client.get("/books").json()["total"] == 0
    assert isinstance(together(client, lambda: database.write(add, "Emma"))[0], int)


def test_a_change_that_raises_stop_iteration_answers_its_group(client: TestClient) -> None:
    def stop(_session: Session) -> None:
        raise StopIteration

    stopped, added = together(client, lambda: database.write(stop), lambda: database.write(add, "Dune"))
    assert isinstance(stopped, RuntimeError)
    assert added == 1


@pytest.mark.sqlite
def test_a_statement_that_ends_the_budget_of_another_is_not_remembered(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = database.CompiledQuery(
        sa.text("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :most) SELECT max(i) FROM n")
    )
    quick = database.CompiledQuery(slow.statement)

    threads = []

    def run_both(connection: sa.Connection) -> None:
        threads.append(threading.current_thread())
        slow.first(connection, {"most": 1200})
        quick.first(connection, {"most": 900})

    assert client.portal is not None
    for _ in range(3):
        client.portal.call(database.read, run_both)
    assert len(set(threads)) > 1, "together they exceed the budget"
    assert (len(slow.too_long), len(quick.too_long)) == (0, 0)
