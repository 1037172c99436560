"""The database: transactions, migrations, constraint violations, and routes that are one transaction."""

import contextlib
import hmac
import inspect
import multiprocessing
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from decimal import Decimal
from pathlib import Path as FilePath
from typing import Annotated, Any

import anyio
import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from fastapi import BackgroundTasks, FastAPI, HTTPException, Path, Response
from fastapi.testclient import TestClient
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, SQLModel, col

import database
from api import HANDLERS, readonly, transactional
from database import Violation
from main import app
from models import Book, Setting
from schemas import RequestModel, Word
from settings import Settings, check_database_url, settings
from tests.fixtures import PASSWORD_HASH, ROOT, Person, Server, copy_of, url_of, wait_for

PROCESSES, THREADS, STEPS = 2, 4, 60


def count_up(url: str) -> None:
    """Read, add one and write, many times, in many threads of a process."""

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
        await database.close_database()

    anyio.run(run)


@pytest.mark.slow
def test_no_update_is_lost_between_threads_and_processes(tmp_path: FilePath) -> None:
    url = Settings(DATABASE_URL=url_of(tmp_path / "books.db")).database_url
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


def schema_of(file: FilePath) -> dict[str, object]:
    """Columns, constraints and indexes of every table, sorted."""
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
def test_migrations_match_the_models_and_add_search_columns(client: TestClient) -> None:
    def differences(connection: sa.Connection) -> set[tuple[str, str]]:
        context = MigrationContext.configure(connection)
        found = compare_metadata(context, SQLModel.metadata)
        named = {(kind, thing.name) for kind, *rest in found for thing in rest[-1:]}
        # PostgreSQL rewrites the expression of the first; the second has the id there.
        return {one for one in named if one[1] not in ("ix_book_score", "ix_book_genre")}

    # For search, which is not in the models.
    assert database.read_sync(differences) == {
        ("remove_column", "words"),
        ("remove_index", "ix_book_words"),
        ("remove_table", "word"),
    }


@pytest.mark.sqlite
def test_migrations_match_the_models(tmp_path: FilePath) -> None:
    migrated, modelled = tmp_path / "migrated.db", tmp_path / "modelled.db"
    database.migrate(f"sqlite:///{migrated}")
    engine = sa.create_engine(f"sqlite:///{modelled}")
    SQLModel.metadata.create_all(engine)
    engine.dispose()
    assert schema_of(migrated) == schema_of(modelled)


@pytest.mark.sqlite
def test_migrations_keep_existing_rows(tmp_path: FilePath) -> None:
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
        sessions = connection.exec_driver_sql("SELECT user_id, refresh_hash, previous_hash FROM login_session").all()
    engine.dispose()
    assert sessions == [(7, "x", None)]


def test_migrations_have_one_head() -> None:
    texts = [path.read_text() for path in (ROOT / "migrations" / "versions").glob("*.py")]
    downs = [next(line for line in text.splitlines() if line.startswith("down_revision")) for text in texts]
    assert len(set(downs)) == len(downs)


@pytest.mark.slow
def test_several_processes_can_start_at_once_on_an_empty_file(serve: Callable[..., Server], tmp_path: FilePath) -> None:
    with ThreadPoolExecutor(4) as pool:
        servers = list(pool.map(lambda _: serve(SECRET_KEY=""), range(4)))
    admins = [Person(server.client, "admin", "admin") for server in servers]
    book = admins[0].add_book(title="One catalogue")
    for server, admin in zip(servers, admins, strict=True):
        assert server.client.get(f"/books/{book['id']}").json() == book
        assert admin.get("/users/me").json()["id"] == 1


@pytest.mark.slow
def test_workers_share_the_file(serve: Callable[..., Server]) -> None:
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
@pytest.mark.usefixtures("as_in_production")
def test_pragmas_are_set(client: TestClient) -> None:
    def pragmas(connection: sa.Connection) -> dict[str, object]:
        return {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in database.PRAGMAS}

    expected = {"journal_mode": "wal", "synchronous": 1, "foreign_keys": 1, "busy_timeout": 10000}
    found = database.read_sync(pragmas)
    assert found.items() >= expected.items()
    assert client.portal is not None
    assert client.portal.call(database.read, pragmas) == found


VIOLATIONS = {
    "a taken username": (
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
    "null": ('UPDATE "user" SET username = NULL', Violation("check", "username")),
    "a missing reference": (
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
@pytest.mark.parametrize("write", [database.write, database.write_sync], ids=["on the event loop", "in a thread"])
def test_a_write_that_fails_at_its_commit_releases_the_lock(client: TestClient, reader: Person, write: Any) -> None:
    """As on a full disk, or here with a deferred constraint."""

    def break_reference(session: Session) -> None:
        session.execute(sa.text("PRAGMA defer_foreign_keys=ON"))
        session.execute(sa.text(VIOLATIONS["a missing reference"][0]))

    assert client.portal is not None
    for _ in range(2):
        with pytest.raises(IntegrityError, match="FOREIGN KEY"):
            client.portal.call(write, break_reference)
    assert reader.add_book(title="Dune")["id"] == 1
    with sqlite3.connect(database.backend().engine.url.database, timeout=0) as other:  # type: ignore[arg-type]  # SQLite's is a path
        other.execute("BEGIN IMMEDIATE")  # fails while another transaction is open
    other.close()


def test_a_read_is_one_snapshot(client: TestClient, admin: Person) -> None:
    """A commit of another connection between its statements is not visible."""

    def count_twice(connection: sa.Connection) -> tuple[int, int]:
        first = connection.exec_driver_sql("SELECT count(*) FROM book").scalar_one()
        with ThreadPoolExecutor(1) as other:
            other.submit(database.write_sync, add_one).result()
        return first, connection.exec_driver_sql("SELECT count(*) FROM book").scalar_one()

    def add_one(session: Session) -> None:
        import books
        from schemas import BookCreate

        books.add_book(session, BookCreate(title="A", author="B"), None)

    assert client.portal is not None
    assert database.read_sync(count_twice) == (0, 0)
    assert client.portal.call(database.read, count_twice) == (1, 1)


def test_a_database_of_revision_0006_loses_only_undo_links_and_unused_settings(
    tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch
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


def test_events_of_reviews_from_before_revision_0009_belong_to_their_author(tmp_path: FilePath) -> None:
    url = check_database_url(url_of(tmp_path / "old.db"))
    engine = sa.create_engine(url)
    users = [
        {"id": number, "username": name, "email": f"{name}@example.com", "password_hash": "", "role": "reader"}
        for number, name in enumerate(("Rita", "Oskar"), 1)
    ]
    events = [
        ("review.created", '{"book_id": 1, "username": "Rita", "rating": 5}'),
        ("review.deleted", '{"book_id": 1, "username": null, "rating": 5}'),
        ("review.updated", '{"book_id": 2, "username": "Oskar", "rating": 5}'),
        ("book.updated", '{"id": 1, "title": "Rita"}'),
    ]
    with engine.begin() as connection:
        command.upgrade(database._alembic(connection), "0007")
        connection.execute(
            sa.text(
                'INSERT INTO "user" (id, username, email, password_hash, role, is_active, created_at)'
                " VALUES (:id, :username, :email, :password_hash, :role, TRUE, '2026-01-01 00:00:00')"
            ),
            users,
        )
        connection.execute(
            sa.text(
                "INSERT INTO event (at, type, private, data)"
                " VALUES ('2026-01-01 00:00:00', :type, FALSE, CAST(:data AS JSON))"
                if engine.dialect.name == "postgresql"
                else "INSERT INTO event (at, type, private, data) VALUES ('2026-01-01 00:00:00', :type, FALSE, :data)"
            ),
            [{"type": kind, "data": data} for kind, data in events],
        )
    database.migrate(url)
    with engine.connect() as connection:
        owners = connection.exec_driver_sql("SELECT user_id, private FROM event ORDER BY id").all()
    engine.dispose()
    assert owners == [(1, False), (None, False), (2, False), (None, False)]


def test_migration_to_quarters_keeps_every_rating_and_review(
    tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "database_url", check_database_url(url_of(tmp_path / "old.db")))
    moment = "2026-01-01 00:00:00"
    user = {"id": 2, "username": "rita", "email": "rita@example.com", "password_hash": PASSWORD_HASH}
    book = {"title": "Dune", "author": "A", "title_key": "dune", "author_key": "a", "copies": 1, "available": 1}
    book |= {"genre": "Novel", "version": 3, "created_at": moment, "updated_at": moment}
    entry = {"user_id": 2, "status": "completed", "tags": "[]", "added_at": moment, "updated_at": moment}
    rows: dict[str, list[dict[str, Any]]] = {
        '"user"': [user | {"role": "reader", "is_active": True, "created_at": moment}],
        "book": [
            book | {"id": 5, "rating_count": 0, "rating_sum": 0},
            book | {"id": 1, "rating_count": 3, "rating_sum": 13},
            book | {"id": 2, "rating_count": 1, "rating_sum": 1},
            book | {"id": 7, "rating_count": 1, "rating_sum": 2},
        ],
        "shelf_entry": [
            entry | {"id": 1, "book_id": 1, "rating": 4, "review": "Sandy."},
            entry | {"id": 4, "book_id": 2, "rating": 1, "review": None},
            entry | {"id": 7, "book_id": 5, "rating": None, "review": "'quoted' -- rating INTEGER"},
            entry | {"id": 9, "book_id": 7, "rating": 2, "review": None},
        ],
    }
    engine = sa.create_engine(settings.database_url)
    with engine.begin() as connection:
        command.upgrade(database._alembic(connection), "0007")
        for table, values in rows.items():
            names = [*values[0]]
            columns, parameters = ", ".join(names), ", ".join(f":{name}" for name in names)
            connection.execute(sa.text(f"INSERT INTO {table} ({columns}) VALUES ({parameters})"), values)
        if engine.dialect.name == "sqlite":
            connection.exec_driver_sql(
                "INSERT INTO book_fts (rowid, title, author, isbn, publisher)"
                " SELECT id, title, author, isbn, publisher FROM book"
            )
        else:
            for table in ("book", "shelf_entry", '"user"'):
                connection.exec_driver_sql(f"SELECT setval(pg_get_serial_sequence('{table}', 'id'), 9)")
        connection.exec_driver_sql("DELETE FROM shelf_entry WHERE id = 9")
        connection.exec_driver_sql("DELETE FROM book WHERE id = 7")
        before = {table: _contents(connection, table) for table in rows}
        triggers = _triggers(connection)
    with engine.begin() as connection:
        command.upgrade(database._alembic(connection), "0008")
    with engine.connect() as connection:
        assert {table: _contents(connection, table) for table in rows} == before
        assert _triggers(connection) == triggers
        if engine.dialect.name == "sqlite":
            assert connection.exec_driver_sql("PRAGMA integrity_check").scalar_one() == "ok"
            assert connection.exec_driver_sql("PRAGMA foreign_key_check").all() == []
    engine.dispose()
    database.migrate(settings.database_url)
    with TestClient(app) as client:
        rita = Person(client, "rita")
        assert [book["rating"] for book in client.get("/books").json()["items"]] == [13 / 3, 1.0, None]
        assert rita.get("/my-library/stats").json()["average_rating"] == 2.5
        assert rita.patch("/my-library/1", json={"rating": 4.25, "status": "reading"}).status_code == 200
        assert rita.get("/books/1").json()["rating"] == 13.25 / 3
        assert client.get("/books?search=dune").json()["total"] == 3
        assert rita.patch("/books/1", json={"title": "Emma"}).status_code == 403
        assert rita.add_book(title="Emma", genre="Novel")["id"] > 7, "the id of a deleted book is not used again"
        assert client.get("/books/genres").json() == [{"genre": "Novel", "count": 4}]
        assert client.get("/books").json()["total"] == 4


def _triggers(connection: sa.Connection) -> list[Any]:
    of_sqlite = "SELECT name, sql FROM sqlite_master WHERE type = 'trigger' ORDER BY 1"
    of_postgresql = "SELECT tgname, tgrelid FROM pg_trigger WHERE NOT tgisinternal ORDER BY 1"
    statement = of_sqlite if connection.dialect.name == "sqlite" else of_postgresql
    return [tuple(row) for row in connection.exec_driver_sql(statement)]


def _contents(connection: sa.Connection, table: str) -> list[dict[str, Any]]:
    first = "key" if table == "setting" else "id"
    return [dict(row) for row in connection.execute(sa.text(f"SELECT * FROM {table} ORDER BY {first}")).mappings()]


def test_insert_many_inserts_rows_in_order(client: TestClient) -> None:
    columns = [name for name in Book.model_fields if name != "id"]
    same = {**dict.fromkeys(columns), **Book.initial(1), "author": "a", "author_key": "a"}
    typed = {"price": Decimal("7.10"), "published_date": date(1940, 1, 1), "description": "tab\t, \\N and\nline"}
    rows = [{**same, "title": f"{n}", "title_key": f"{n}", **(typed if n == 1 else {})} for n in range(3)]

    def insert(session: Session) -> list[Book]:
        database.insert_many(session, Book, rows)
        return list(session.scalars(sa.select(Book).order_by(col(Book.id))))

    books = database.write_sync(insert)
    assert [book.id for book in books] == [1, 2, 3]
    assert [book.model_dump(exclude={"id"}) for book in books] == rows


# --- routes that are one transaction ------------------------------------------------------------------------------

stored_keys: list[str] = []


class SettingBody(RequestModel):
    value: Word


@transactional
def put_setting(
    session: Session,
    key: Annotated[str, Path(max_length=50)],
    body: SettingBody,
    response: Response,
    tasks: BackgroundTasks,
    fail: bool = False,
) -> SettingBody:
    """Store a setting."""
    session.merge(Setting(key=key, value=body.value))
    session.flush()
    response.headers["Location"] = f"/settings/{key}"
    tasks.add_task(stored_keys.append, key)
    if fail:
        raise HTTPException(409, "Refused.")
    if body.value == "bug":
        raise ZeroDivisionError
    return body


@readonly
def read_setting(connection: sa.Connection, key: str) -> SettingBody:
    """Read a setting."""
    value = connection.execute(sa.select(col(Setting.value)).where(col(Setting.key) == key)).scalar()
    if value is None:
        raise HTTPException(404, "No such setting.")
    return SettingBody(value=value)


@pytest.fixture
def small_app(first_start: FilePath, tmp_path: FilePath) -> Iterator[TestClient]:
    url = Settings(DATABASE_URL=copy_of(first_start, tmp_path / "small.db")).database_url

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        database.open_database(url)
        yield
        await database.close_database()

    app = FastAPI(lifespan=lifespan, exception_handlers=HANDLERS)
    app.put("/settings/{key}", status_code=201)(put_setting)
    app.get("/settings/{key}")(read_setting)
    stored_keys.clear()
    with TestClient(app) as client:
        yield client


def test_fastapi_does_not_see_the_session_of_a_transactional_route(small_app: TestClient) -> None:
    assert [*inspect.signature(put_setting).parameters] == ["key", "body", "response", "tasks", "fail"]
    assert [*inspect.signature(read_setting).parameters] == ["key"]
    assert (put_setting.__name__, put_setting.__doc__) == ("put_setting", "Store a setting.")
    operation = small_app.get("/openapi.json").json()["paths"]["/settings/{key}"]["put"]
    assert [parameter["name"] for parameter in operation["parameters"]] == ["key", "fail"]
    assert operation["description"] == "Store a setting."
    schemas = [operation[part]["content"]["application/json"]["schema"] for part in ("requestBody",)]
    schemas.append(operation["responses"]["201"]["content"]["application/json"]["schema"])
    assert schemas == [{"$ref": "#/components/schemas/SettingBody"}] * 2


def test_a_transactional_route_commits_and_then_runs_its_background_tasks(small_app: TestClient) -> None:
    response = small_app.put("/settings/color", json={"value": " red "})
    assert (response.status_code, response.json()) == (201, {"value": "red"})
    assert response.headers["Location"] == "/settings/color"
    assert stored_keys == ["color"]
    assert small_app.get("/settings/color").json() == {"value": "red"}


@pytest.mark.parametrize(
    ("path", "body", "loc"),
    [
        pytest.param("/settings/color", {"value": 1}, ["body", "value"], id="body"),
        pytest.param("/settings/color", {"value": "red", "x": 1}, ["body", "x"], id="unknown field"),
        pytest.param(f"/settings/{'x' * 51}", {"value": "red"}, ["path", "key"], id="path"),
        pytest.param("/settings/color?fail=maybe", {"value": "red"}, ["query", "fail"], id="query"),
    ],
)
def test_a_transactional_route_validates_its_parameters(
    small_app: TestClient, path: str, body: dict[str, Any], loc: list[str]
) -> None:
    response = small_app.put(path, json=body)
    assert (response.status_code, response.json()["errors"][0]["loc"]) == (422, loc)
    assert small_app.get("/settings/color").status_code == 404


def test_an_http_exception_rolls_a_transactional_route_back(small_app: TestClient) -> None:
    response = small_app.put("/settings/color?fail=true", json={"value": "red"})
    assert (response.status_code, response.json()["detail"]) == (409, "Refused.")
    assert small_app.get("/settings/color").status_code == 404
    assert stored_keys == []


def test_an_unexpected_exception_rolls_a_transactional_route_back(small_app: TestClient) -> None:
    small_app.put("/settings/color", json={"value": "red"})
    with pytest.raises(ZeroDivisionError):
        small_app.put("/settings/color", json={"value": "bug"})
    assert small_app.get("/settings/color").json() == {"value": "red"}
    assert small_app.put("/settings/color", json={"value": "blue"}).status_code == 201
    assert stored_keys == ["color", "color"]


def test_a_readonly_route_can_not_find_what_is_not_there(small_app: TestClient) -> None:
    response = small_app.get("/settings/none")
    assert (response.status_code, response.json()["detail"]) == (404, "No such setting.")
