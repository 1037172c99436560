"""Running it: backup and restore, work that recurs, the log, the state of health."""

import errno
import json
import os
import re
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient
from sqlalchemy.exc import DatabaseError, OperationalError, ProgrammingError
from sqlalchemy.exc import TimeoutError as NoConnection
from sqlmodel import Session, select

import database
import events
import main
import models
import uploads
from main import app
from models import LoginSession
from settings import settings
from tests.fixtures import (
    ROOT,
    Clock,
    Person,
    Postgres,
    Server,
    free_port,
    recurring_work,
    sign_up,
    wait_for,
)

# --- backup and restore -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.sqlite
def test_a_backup_is_consistent_while_writes_go_on(server: Server, tmp_path: Path) -> None:
    admin = Person(server.client, "admin", "admin")
    rita = sign_up(server.client, "rita")
    for number in range(50):
        rita.add_book(title=f"Before {number}")
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            rita.add_book(title="Meanwhile")

    with ThreadPoolExecutor(3) as pool:
        writers = [pool.submit(write) for _ in range(2)]
        try:
            backups = [admin.get("/admin/backup") for _ in range(5)]
        finally:
            stop.set()
        assert [writer.exception() for writer in writers] == [None, None]
    for number, backup in enumerate(backups):
        assert backup.status_code == 200
        assert re.search(r'filename="books-\d{8}-\d{6}\.db"', backup.headers["Content-Disposition"])
        copy = tmp_path / f"copy{number}.db"
        copy.write_bytes(backup.content)
        with closing(sqlite3.connect(copy)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            books = connection.execute("SELECT count(*) FROM book").fetchone()[0]
            assert books >= 50
            assert connection.execute("SELECT value FROM setting WHERE key = 'book_count'").fetchone() == (str(books),)
            created = connection.execute("SELECT count(*) FROM event WHERE type = 'book.created'").fetchone()[0]
            assert created == books
    assert list(tmp_path.glob("books-backup-*")) == []


@pytest.mark.slow
@pytest.mark.sqlite
def test_the_documented_commands_restore_a_backup(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve()
    admin = Person(server.client, "admin", "admin")
    admin.add_book(title="Kept")
    section = (ROOT / "docs" / "deploying.md").read_text().split("\n## Backup and restore\n")[1].split("\n## ")[0]
    back_up, restore = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    shell = f"TOKEN={admin.tokens['access_token']}\n" + back_up.replace(
        "http://localhost:8000", str(server.client.base_url).rstrip("/")
    )
    subprocess.run(["bash", "-euo", "pipefail", "-c", shell], cwd=tmp_path, check=True)
    admin.add_book(title="Lost again")
    server.stop(signal.SIGKILL)  # as after a crash: the write-ahead log lies beside the file
    subprocess.run(["bash", "-euo", "pipefail", "-c", restore], cwd=tmp_path, check=True)
    server.start()
    assert [book["title"] for book in server.client.get("/books").json()["items"]] == ["Kept"]
    assert Person(server.client, "admin", "admin").add_book(title="On we go")["title"] == "On we go"


@pytest.mark.postgresql
def test_a_backup_of_postgresql_is_409_that_names_pg_dump(admin: Person) -> None:
    answer = admin.get("/admin/backup")
    assert answer.status_code == 409
    assert "pg_dump" in answer.json()["detail"]


# --- health -------------------------------------------------------------------------------------------------------


@pytest.mark.sqlite
@pytest.mark.slow
def test_health_fails_where_the_database_can_not_be_written(serve: Callable[..., Server]) -> None:
    server = serve()
    with closing(sqlite3.connect(server.file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")  # somebody who does not let go of the file
        answer = wait_for(lambda: last if (last := server.client.get("/health")).status_code == 503 else None)
        assert (answer.status_code, answer.json()["detail"]) == (503, "The database can't be written.")
        assert answer.headers["Retry-After"] == "5"
        assert server.client.get("/books").status_code == 200, "reading goes on"
        other.execute("ROLLBACK")
    assert server.client.get("/health").status_code == 200


@pytest.mark.sqlite
def test_health_writes_at_most_every_five_seconds(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    backend: Any = database.backend()
    monkeypatch.setattr(database, "BUSY_TIMEOUT", 0.1)
    assert client.get("/health").status_code == 200
    with closing(sqlite3.connect(backend.engine.url.database, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        main.probes.expire(time.monotonic() + 4)
        assert client.get("/health").status_code == 200
        main.probes.expire(time.monotonic() + 5)
        assert [client.get("/health").status_code for _ in range(2)] == [503, 503]
        other.execute("ROLLBACK")
    assert client.get("/health").status_code == 200


@pytest.mark.slow
@pytest.mark.sqlite
def test_blocked_writers_do_not_block_readers(
    client: TestClient, reader: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader.add_book(title="Dune", genre="Novel")
    backend: Any = database.backend()
    with ThreadPoolExecutor(12) as pool:
        with closing(sqlite3.connect(backend.engine.url.database, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            monkeypatch.setattr(database, "BUSY_TIMEOUT", 3)
            waiting = [pool.submit(reader.patch, "/books/1", json={"pages": number}) for number in range(1, 13)]
            time.sleep(0.5)
            began = time.monotonic()
            assert client.get("/books/genres").json() == [{"genre": "Novel", "count": 1}]
            assert client.get("/books?search=dune").json()["total"] == 1
            assert time.monotonic() - began < 2
            main.probes.clear()
            assert client.get("/health").status_code == 503
            first = wait_for(lambda: next((one.result() for one in waiting if one.done()), None))
            assert (first.status_code, first.json()["detail"]) == (
                503,
                "The database is busy, or does not answer. Try again.",
            )
        assert {one.result().status_code for one in waiting} <= {200, 503}
    assert reader.patch("/books/1", json={"pages": 13}).status_code == 200
    assert wait_for(lambda: client.get("/health").status_code == 200 or None)


@pytest.mark.sqlite
def test_an_io_error_is_503_and_temporary(client: TestClient, admin: Person) -> None:
    """SQLite ends the transaction by itself then."""
    admin.add_book(title="Dune")

    def fail(connection: sa.Connection) -> None:
        connection.connection.dbapi_connection.execute("ROLLBACK")  # type: ignore[union-attr]  # there is one
        raise OperationalError("SELECT", None, sqlite3.OperationalError("disk I/O error"))

    assert client.portal is not None
    with pytest.raises(OperationalError, match="disk I/O error"):
        client.portal.call(database.read, fail)
    assert client.get("/books/1").json()["title"] == "Dune"


FULL = OSError(errno.ENOSPC, "No space left on device")
UNAVAILABLE: dict[str, tuple[str, Exception, str, int]] = {
    "no connection is free": ("database.read", NoConnection("QueuePool limit"), "/books", 503),
    "a damaged page": (
        "database.read",
        DatabaseError("", None, sqlite3.DatabaseError("malformed")),
        "/books",
        503,
    ),
    "a statement that is wrong": (
        "database.read",
        ProgrammingError("", None, Exception("syntax")),
        "/books",
        500,
    ),
    "no room for a backup": ("main.open_copy", FULL, "/admin/backup", 507),
}


@pytest.mark.parametrize("case", UNAVAILABLE.values(), ids=UNAVAILABLE)
@pytest.mark.sqlite
def test_errors_of_the_database_have_their_status(
    client: TestClient, admin: Person, monkeypatch: pytest.MonkeyPatch, case: tuple[str, Exception, str, int]
) -> None:
    where, error, path, status = case

    def fail(*_: object) -> None:
        raise error

    told = TestClient(app, raise_server_exceptions=False)
    told.portal = client.portal  # the service has one event loop, which short reads rely on
    admin.client = told
    monkeypatch.setattr(where, fail)
    answer = admin.get(path)
    assert (answer.status_code, answer.headers["Content-Type"]) == (status, "application/problem+json")


# --- a start without a database -------------------------------------------------------------------------------------


@contextmanager
def database_away(server: Server) -> Iterator[None]:
    """PostgreSQL is stopped, or somebody else holds the SQLite file."""
    if Postgres.current is not None:
        Postgres.current.stop()
        try:
            yield
        finally:
            Postgres.current.start()
    else:
        with closing(sqlite3.connect(server.file, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            yield


@pytest.mark.slow
def test_a_worker_that_is_replaced_waits_for_the_database(serve: Callable[..., Server]) -> None:
    server = serve("--workers", "2")

    def workers() -> list[int]:
        return [int(pid) for pid in re.findall(r"Started server process \[(\d+)\]", server.log.read_text())]

    wait_for(lambda: server.log.read_text().count("Application startup complete") == 2 or None)
    with database_away(server):
        os.kill(workers()[0], signal.SIGKILL)
        wait_for(lambda: "waiting for the database: " in server.log.read_text() or None, 60)
        time.sleep(3)
        assert server.process.poll() is None
    wait_for(lambda: server.log.read_text().count("Application startup complete") == 3 or None, 60)
    assert server.client.get("/health").status_code == 200
    assert server.process.poll() is None
    assert len(workers()) == 3, "no other was lost"


@pytest.mark.slow
@pytest.mark.parametrize("stopping", [False, True], ids=["after its time", "when it is told to stop"])
def test_a_start_fails_without_its_database(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, stopping: bool
) -> None:
    monkeypatch.setattr(settings, "database_url", f"postgresql+psycopg://127.0.0.1:{free_port()}/books")
    monkeypatch.setattr(main, "START_TIMEOUT", 60 if stopping else 0.5)
    is_stopping = iter([False, stopping])
    monkeypatch.setattr(database, "server_is_stopping", lambda: next(is_stopping))
    with pytest.raises(OperationalError, match="onnection"), TestClient(app):
        pass
    assert caplog.text.count("waiting for the database: ") == 1


# --- work that recurs ---------------------------------------------------------------------------------------------


def test_a_recurring_job_is_claimed_by_one_process(client: TestClient, clock: Clock) -> None:
    def ask(_number: int) -> bool:
        return database.write_sync(models.claim_job, "work", timedelta(hours=1))

    for _ in range(2):
        with ThreadPoolExecutor(10) as pool:
            assert sorted(pool.map(ask, range(10))) == [False] * 9 + [True]
        clock.advance(minutes=59)
        assert ask(0) is False
        clock.advance(minutes=1)


def test_recurring_jobs_go_on_when_the_clock_goes_back(client: TestClient, clock: Clock) -> None:
    def claim(longest: timedelta | None = None) -> bool:
        return database.write_sync(models.claim_job, "work", timedelta(minutes=50), longest)

    assert claim()
    clock.advance(hours=-1)
    assert not claim(timedelta(days=1)), "it may be further ahead than its interval"
    assert claim()
    assert not claim()


def test_recurring_jobs_run_at_the_start(
    client: TestClient, reader: Person, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old events and logins go, and an upload that a process has left is taken up."""
    for number in range(30):
        reader.add_book(title=f"Book {number}")
    exported = reader.get("/books/export").content
    monkeypatch.setattr(uploads, "BATCH", 20)
    stopping = iter([True])
    monkeypatch.setattr(database, "server_is_stopping", lambda: next(stopping, False))
    where = reader.post("/books/upload", files={"file": ("books.csv", exported)}).headers["Location"]
    wait_for(lambda: reader.get(where).json()["rows"] == 20 or None)
    monkeypatch.setattr(settings, "event_retention", 5)
    clock.advance(days=15)

    def old_logins(session: Session) -> int:
        return len(session.exec(select(LoginSession).where(LoginSession.user_id == 2)).all())

    def seen_to() -> bool:
        left = client.get("/events", params={"limit": 100}).json()["items"]
        upload = admin.get(where).json()
        return len(left) < 20 and (database.write_sync(old_logins), upload["status"]) == (0, "completed")

    admin = Person(client, "admin", "admin")
    assert not seen_to()
    with recurring_work(client):
        wait_for(lambda: seen_to() or None)


def test_a_failed_recurring_job_is_tried_again(client: TestClient) -> None:
    asked: list[int] = []

    async def fail() -> None:
        asked.append(len(asked))
        raise ZeroDivisionError("whatever it is")

    async def for_a_while() -> None:
        with anyio.move_on_after(0.2):
            await main.run_every(0.01, fail)

    assert client.portal is not None
    client.portal.call(for_a_while)
    assert len(asked) > 1


def test_two_upload_jobs_run_at_once(client: TestClient) -> None:
    running, most = [], []

    def job() -> None:
        running.append(1)
        most.append(len(running))
        time.sleep(0.02)
        running.pop()

    async def all_at_once() -> None:
        async with anyio.create_task_group() as tasks:
            for _ in range(10):
                tasks.start_soon(database.run_job, "imports", job)

    assert client.portal is not None
    client.portal.call(all_at_once)
    assert (len(most), max(most)) == (10, database.THREADS["imports"])


def test_the_event_log_is_pruned(client: TestClient, reader: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(session: Session) -> None:
        for number in range(50):
            events.record(session, "book.updated", {"number": number})

    def oldest() -> int:
        return int(client.get("/events", params={"limit": 1}).json()["items"][0]["id"])

    database.write_sync(fill)
    before, cursor = oldest(), int(client.get("/books").headers["X-Event-Cursor"])
    assert database.write_sync(events.prune) is False, "there is room"
    monkeypatch.setattr(settings, "event_retention", 20)
    monkeypatch.setattr(events, "PRUNE_BATCH", 12)
    steps = 0
    while database.write_sync(events.prune):
        steps += 1
    assert steps >= 2
    left = client.get("/events", params={"limit": 100}).json()["items"]
    assert [event["data"]["number"] for event in left] == list(range(30, 50))
    assert client.get("/books").headers["X-Event-Cursor"] == str(cursor)
    with client.stream("GET", "/stream", params={"since": before, "limit": 1, "seconds": 0.2}) as stream:
        frames = "".join(stream.iter_text())
    reset = json.loads(re.findall(r"event: reset\s+data: (.*)", frames)[0])
    assert reset == {"reason": "expired", "oldest": oldest(), "head": cursor}


# --- the log ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_workers_share_the_log_file(serve: Callable[..., Server], tmp_path: Path) -> None:
    file = tmp_path / "log" / "books.log"
    file.parent.mkdir()
    server = serve("--workers", "2", LOG_FILE=str(file))
    wait_for(lambda: server.log.read_text().count("Application startup complete") == 2 or None)
    for _ in range(20):
        server.client.get("/books")
    wait_for(lambda: file.read_text().count("GET /books 200") == 20 or None)


def test_app_json_and_procfile_fit_heroku() -> None:
    app = json.loads((ROOT / "app.json").read_text())
    known = {name.upper() for name in type(settings).model_fields}
    assert set(app["env"]) <= known
    for name in ("SECRET_KEY", "ADMIN_PASSWORD"):
        assert app["env"][name]["generator"] == "secret"
    assert app["addons"][0]["plan"].startswith("heroku-postgresql:")
    assert app["formation"]["web"]["quantity"] == 1
    procfile = (ROOT / "Procfile").read_text()
    keep_alive = int(re.findall(r"--timeout-keep-alive (\d+)", procfile)[0])
    graceful = int(re.findall(r"--timeout-graceful-shutdown (\d+)", procfile)[0])
    assert keep_alive > 90, "Heroku's router reuses idle connections for 90 s"
    assert graceful < 30, "Heroku sends SIGKILL 30 s after SIGTERM"
    health_check = int(re.findall(r"--timeout-worker-healthcheck (\d+)", procfile)[0])
    assert health_check <= 15, "a dead worker stays unnoticed for as long"


def flags(command: str) -> dict[str, str]:
    return dict(re.findall(r"--([a-z-]+) (\S+)", command))


def test_the_documented_unit_and_proxies_fit_the_procfile() -> None:
    deploying = (ROOT / "docs" / "deploying.md").read_text()
    unit, nginx, caddy = (
        re.findall(rf"```{kind}\n(.*?)```", deploying, re.DOTALL)[-1] for kind in ("ini", "nginx", "caddy")
    )
    started = flags(re.findall("^ExecStart=(.*)$", unit, re.MULTILINE)[0])
    local = {"host": "127.0.0.1", "port": "8000", "forwarded-allow-ips": "127.0.0.1"}
    assert started == flags((ROOT / "Procfile").read_text()) | local
    assert int(re.findall(r"TimeoutStopSec=(\d+)", unit)[0]) > int(started["timeout-graceful-shutdown"])
    for proxy in (nginx, caddy):
        assert "127.0.0.1:8000" in proxy
    assert int(re.findall(r"proxy_read_timeout (\d+)s", nginx)[0]) > 2 * events.HEARTBEAT_INTERVAL
    assert int(re.findall(r"client_max_body_size (\d+)m", nginx)[0]) << 20 > uploads.MAX_UPLOAD
    assert int(re.findall(r"keepalive (\d+)s", caddy)[0]) < int(started["timeout-keep-alive"])
    number, size = re.findall(r"large_client_header_buffers (\d+) (\d+)k;", nginx)[0]
    assert int(number) * int(size) <= 128, "KiB of headers, for which uvicorn has no bound"
    assert int(re.findall(r"max_header_size (\d+)kb", caddy)[0]) <= 64
