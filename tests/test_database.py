"""The file underneath: writers wait for each other, migrations make what the models say, failures are told apart."""

import hmac
import multiprocessing
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anyio
import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from fastapi.testclient import TestClient
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, SQLModel

import database
from database import Violation
from main import app
from models import Setting
from settings import Settings, check_database_url, settings
from tests.fixtures import PASSWORD_HASH, ROOT, Person, Server, url_of, wait_for

PROCESSES, THREADS, STEPS = 2, 4, 60


def count_up(url: str) -> None:
    """In a process of its own: read, add one, write; many times, in many threads."""

    def step(session: Session) -> None:
        counter = session.get_one(Setting, "counter")
        counter.value = str(int(counter.value) + 1)

    def work() -> None:
        for _ in range(STEPS):
            database.write_sync(step)

    async def run() -> None:
        database.open_database(url)
        threads = [threading.Thread(target=work) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        database.close_database()

    anyio.run(run)


@pytest.mark.slow
def test_no_update_is_lost_between_threads_and_processes(tmp_path: Path) -> None:
    url = Settings(database_url=url_of(tmp_path / "books.db")).database_url
    database.migrate(url)
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("INSERT INTO setting VALUES ('counter', '0')")
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=count_up, args=(url,)) for _ in range(PROCESSES)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    with engine.connect() as connection:
        counter = connection.exec_driver_sql("SELECT value FROM setting WHERE key = 'counter'").scalar_one()
    engine.dispose()
    assert counter == str(PROCESSES * THREADS * STEPS)


def schema_of(file: Path) -> dict[str, object]:
    """Columns, constraints and indexes of every table, whatever order they were written in."""
    engine = sa.create_engine(f"sqlite:///{file}")
    with engine.connect() as connection:
        inspector = sa.inspect(connection)
        tables = [name for name in inspector.get_table_names() if name in SQLModel.metadata.tables]
        schema: dict[str, object] = {
            name: {
                "columns": sorted(
                    tuple(row)[1:] for row in connection.exec_driver_sql(f'PRAGMA table_xinfo("{name}")')
                ),
                "checks": sorted((check["name"], check["sqltext"]) for check in inspector.get_check_constraints(name)),
                "references": sorted(
                    tuple(r)[2:] for r in connection.exec_driver_sql(f'PRAGMA foreign_key_list("{name}")')
                ),
                "unique": uniques_of(connection, name),
            }
            for name in tables
        }
        indexes = connection.exec_driver_sql(
            "SELECT name, lower(sql) FROM sqlite_master WHERE type = 'index' AND sql <> ''"
        )
        schema["indexes"] = {row[0]: row[1] for row in indexes}
        schema["autoincrement"] = sorted(
            connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE sql LIKE '%AUTOINCREMENT%'").scalars()
        )
    engine.dispose()
    return schema


def uniques_of(connection: sa.Connection, table: str) -> list[list[str]]:
    indexes = connection.exec_driver_sql(f'PRAGMA index_list("{table}")').all()
    return sorted(
        [row.name for row in connection.exec_driver_sql(f'PRAGMA index_info("{index.name}")')]
        for index in indexes
        if index.origin == "u"
    )


@pytest.mark.postgresql
def test_the_migrations_make_what_the_models_say_and_an_index_of_words(client: TestClient) -> None:
    def differences(connection: sa.Connection) -> set[tuple[str, str]]:
        context = MigrationContext.configure(connection)
        found = compare_metadata(context, SQLModel.metadata)
        named = {(kind, thing.name) for kind, *rest in found for thing in rest[-1:]}
        return {one for one in named if one[1] != "ix_book_score"}  # whose expression PostgreSQL spells its own way

    # Two columns and their indexes that only the search knows of.
    assert database.read_sync(differences) == {
        ("remove_column", "words"),
        ("remove_column", "title_words"),
        ("remove_index", "ix_book_words"),
        ("remove_index", "ix_book_title_words"),
    }


@pytest.mark.sqlite
def test_the_migrations_make_what_the_models_say(tmp_path: Path) -> None:
    migrated, modelled = tmp_path / "migrated.db", tmp_path / "modelled.db"
    database.migrate(f"sqlite:///{migrated}")
    engine = sa.create_engine(f"sqlite:///{modelled}")
    SQLModel.metadata.create_all(engine)
    engine.dispose()
    assert schema_of(migrated) == schema_of(modelled)


@pytest.mark.sqlite
def test_a_database_in_use_is_brought_up_to_date_with_all_that_it_holds(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'old.db'}"
    engine = sa.create_engine(url)
    with engine.connect() as connection, connection.begin():
        command.upgrade(database._alembic(connection), "0001")
        for statement in (
            "INSERT INTO user (id, username, email, password_hash, role, is_active, created_at)"
            " VALUES (7, 'rita', 'rita@example.com', '', 'reader', 1, '2026-01-01 00:00:00')",
            "INSERT INTO login_session (user_id, refresh_hash, created_at, last_used_at, expires_at)"
            " VALUES (7, 'x', '2026-01-01 00:00:00', '2026-01-01 00:00:00', '2027-01-01 00:00:00')",
        ):
            connection.exec_driver_sql(statement)
    database.migrate(url)
    with engine.connect() as connection:
        kept = connection.exec_driver_sql("SELECT user_id, refresh_hash, previous_hash FROM login_session").all()
    engine.dispose()
    assert kept == [(7, "x", None)]


def test_there_is_one_line_of_migrations() -> None:
    texts = [path.read_text() for path in (ROOT / "migrations" / "versions").glob("*.py")]
    downs = [next(line for line in text.splitlines() if line.startswith("down_revision")) for text in texts]
    assert len(set(downs)) == len(downs)


@pytest.mark.slow
def test_several_processes_start_at_once_on_an_empty_file(serve: Callable[..., Server], tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        servers = list(pool.map(lambda _: serve(SECRET_KEY=""), range(4)))
    admins = [Person(server.client, "admin", "admin") for server in servers]
    book = admins[0].add_book(title="One catalogue")
    for server, admin in zip(servers, admins, strict=True):
        assert server.client.get(f"/books/{book['id']}").json() == book
        assert admin.get("/users/me").json()["id"] == 1


@pytest.mark.slow
def test_workers_of_one_server_share_the_file(serve: Callable[..., Server]) -> None:
    server = serve("--workers", "2")
    admin = Person(server.client, "admin", "admin")
    wait_for(lambda: server.log.read_text().count("Application startup complete") == 2 or None)
    for number in range(20):
        admin.add_book(title=str(number))
    assert server.client.get("/books").json()["total"] == 20
    assert server.log.read_text().count("Development mode") == 2, "every worker warns"
    server.restart()
    wait_for(lambda: server.log.read_text().count("Application startup complete") == 4 or None)
    assert server.log.read_text().count("Development mode") == 4


@pytest.mark.sqlite
def test_the_pragmas_are_in_force(client: TestClient) -> None:
    def pragmas(connection: sa.Connection) -> dict[str, object]:
        return {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in database.PRAGMAS}

    expected = {"journal_mode": "wal", "synchronous": 1, "foreign_keys": 1, "busy_timeout": 10000}
    found = database.read_sync(pragmas)
    assert found.items() >= expected.items()
    assert client.portal is not None
    assert client.portal.call(database.read, pragmas) == found


VIOLATIONS = {
    "a taken name": (
        'INSERT INTO "user" (username, email, password_hash, role, is_active, created_at)'
        " VALUES ('ADMIN', 'x', 'x', 'admin', TRUE, '2020-01-01')",
        Violation("unique", "username"),
    ),
    "a taken address": (
        'INSERT INTO "user" (username, email, password_hash, role, is_active, created_at)'
        " VALUES ('x', 'admin@example.com', 'x', 'admin', TRUE, '2020-01-01')",
        Violation("unique", "email"),
    ),
    "an unknown role": ("UPDATE \"user\" SET role = 'god'", Violation("check", "role")),
    "no name": ('UPDATE "user" SET username = NULL', Violation("check", "username")),
    "an entry of nobody": (
        "INSERT INTO shelf_entry (user_id, book_id, status, tags, added_at, updated_at)"
        " VALUES (99, 99, 'reading', '[]', '2020-01-01', '2020-01-01')",
        Violation("reference", ""),
    ),
    "more than all copies": (
        "INSERT INTO book (title, author, title_key, author_key, copies, available, rating_count,"
        " rating_sum, version, created_at, updated_at)"
        " VALUES ('a', 'b', 'a', 'b', 1, 2, 0, 0, 1, '2020-01-01', '2020-01-01')",
        Violation("check", "available"),
    ),
}


@pytest.mark.parametrize(("statement", "expected"), VIOLATIONS.values(), ids=VIOLATIONS)
def test_violations_name_their_field(client: TestClient, statement: str, expected: Violation) -> None:
    with pytest.raises(IntegrityError) as failure:
        database.write_sync(lambda session: session.execute(sa.text(statement)))
    assert database.violation(failure.value) == expected


@pytest.mark.sqlite
@pytest.mark.parametrize("way", [database.write_inline, database.write], ids=["inline", "in a thread"])
def test_a_change_that_fails_at_its_commit_is_over(client: TestClient, reader: Person, way: Any) -> None:
    """As it does where the disk is full, or as here where a reference is looked at last."""

    def entry_of_nobody(session: Session) -> None:
        session.execute(sa.text("PRAGMA defer_foreign_keys=ON"))
        session.execute(sa.text(VIOLATIONS["an entry of nobody"][0]))

    assert client.portal is not None
    for _ in range(2):
        with pytest.raises(IntegrityError, match="FOREIGN KEY"):
            client.portal.call(way, entry_of_nobody)
    assert reader.add_book(title="Dune")["id"] == 1
    with sqlite3.connect(database.backend().engine.url.database, timeout=0) as stranger:  # type: ignore[arg-type]  # SQLite's is a path
        stranger.execute("BEGIN IMMEDIATE")  # nobody is writing any more
    stranger.close()


def test_a_read_sees_one_moment(client: TestClient, admin: Person) -> None:
    """Between its statements another connection commits; the read does not see half of it."""

    def count_twice(connection: sa.Connection) -> tuple[int, int]:
        first = connection.exec_driver_sql("SELECT count(*) FROM book").scalar_one()
        with ThreadPoolExecutor(1) as other:
            other.submit(database.write_sync, add_one).result()
        return first, connection.exec_driver_sql("SELECT count(*) FROM book").scalar_one()

    def add_one(session: Session) -> None:
        import books
        from schemas import BookCreate

        books.add_book(session, BookCreate(title="A", author="B"), 1)

    assert client.portal is not None
    assert database.read_sync(count_twice) == (0, 0)
    assert client.portal.call(database.read, count_twice) == (1, 1)


def test_a_database_of_revision_0006_loses_only_undo_links_and_unused_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "database_url", check_database_url(url_of(tmp_path / "old.db")))
    codes = {"link": "rita@example.com", "undo": "old@example.com", "link of revision 0001": None}
    rows = {
        '"user"': [
            {
                **{"id": number, "username": name, "email": f"{name}@example.com", "password_hash": PASSWORD_HASH},
                **{"role": role, "is_active": True, "full_name": None, "created_at": "2026-01-01 00:00:00"},
            }
            for number, (name, role) in enumerate({"admin": "admin", "rita": "reader", "oskar": "reader"}.items(), 1)
        ],
        "login_session": [
            {
                **{"id": 9, "user_id": 2, "refresh_hash": "x", "previous_hash": "y", "user_agent": "a phone"},
                **dict.fromkeys(("created_at", "last_used_at"), "2026-01-01 00:00:00"),
                "expires_at": "2999-01-01 00:00:00",
            }
        ],
        "one_time_code": [
            {
                **{"user_id": 2, "purpose": "verify_email", "email": email, "attempts": 0},
                "code_hash": hmac.digest(b"key", f"verify_email:{token}".encode(), "sha256").hex(),
                **{"created_at": "2026-01-01 00:00:00", "expires_at": "2999-01-01 00:00:00"},
            }
            for token, email in codes.items()
        ],
        "setting": [{"key": key, "value": "key"} for key in ("secret_key", "open_hash", "last_start")],
    }
    engine = sa.create_engine(settings.database_url)
    with engine.begin() as connection:
        command.upgrade(database._alembic(connection), "0006")
        for table, values in rows.items():
            names = [*values[0]]
            columns, parameters = ", ".join(names), ", ".join(f":{name}" for name in names)
            connection.execute(sa.text(f"INSERT INTO {table} ({columns}) VALUES ({parameters})"), values)
        before = {table: _contents(connection, table) for table in rows}
    database.migrate(settings.database_url)
    with engine.connect() as connection:
        after = {table: _contents(connection, table) for table in rows}
    engine.dispose()
    for user in before['"user"']:
        user["pending_email"] = None
    before["one_time_code"] = [code for code in before["one_time_code"] if code["email"] != "old@example.com"]
    before["one_time_code"][1]["email"] = "rita@example.com"
    before["setting"] = [setting for setting in before["setting"] if setting["key"] not in ("open_hash", "last_start")]
    assert after == before
    with TestClient(app) as client:
        rita = Person(client, "rita")
        assert client.post("/auth/verify-email/undo").status_code == 404
        assert rita.get("/users/me").json()["email_verified_at"] is None
        assert client.post("/auth/verify-email/link of revision 0001").json()["email"] == "rita@example.com"
        assert rita.get("/users/me").json()["email"] == "rita@example.com"


def _contents(connection: sa.Connection, table: str) -> list[dict[str, Any]]:
    first = "key" if table == "setting" else "id"
    return [dict(row) for row in connection.execute(sa.text(f"SELECT * FROM {table} ORDER BY {first}")).mappings()]
