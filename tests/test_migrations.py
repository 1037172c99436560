"""A database that an earlier version filled, on its way through the migrations."""

import base64
import json
from contextlib import nullcontext
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from fastapi.testclient import TestClient

import database
from main import app
from settings import check_database_url, settings
from tests.fixtures import DATA, Clock, Person, recurring_work, url_of, wait_for

# The rows that the code of revision 0010 left on SQLite: accounts, one of them deleted with books; books, shelves,
# reviews; loans, open and returned; uploads, one of them unfinished; and what that code answered to `QUESTIONS`.
FILLED = json.loads((DATA / "revision_0010.json").read_text("utf-8"))
QUESTIONS = {
    None: [
        *("/books?limit=100", "/books?limit=100&sort=-title", "/books?search=emile", "/books?search=dune", "/books/1"),
        *("/books?genre=novel", "/books?available=true", "/books/genres", "/books/1/reviews", "/books/export"),
        *("/books/export?format=ndjson", "/books/1/stock", "/books/4/stock", "/events?limit=30&after=FLOOR"),
    ],
    "admin": ["/users", "/loans", "/events?limit=30&after=FLOOR"],
    "Rita": [
        *("/users/me", "/my-library", "/my-library/1", "/my-library/stats", "/my-library/export", "/loans"),
        *("/users/me/export", "/books?added_by=me", "/events?limit=15&after=FLOOR&types=loan.*,shelf.*,upload.*"),
        *("/books/upload", "/books/upload/1", "/books/upload/1/errors", "/books/upload/1/errors?format=csv"),
    ],
    "Oskar": ["/my-library", "/loans", "/loans/4"],
    "Lydia": ["/books/upload", "/loans?status=returned"],
}
CHANGING = ("sessions", "exported_at", "events")  # by the questions themselves


def restore(url: str) -> None:
    """The rows, in a database of revision 0010."""
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        command.upgrade(database._alembic(connection), "0010")
        is_sqlite = connection.dialect.name == "sqlite"
        for name, rows in FILLED["rows"].items():
            found = {column["name"]: column["type"] for column in sa.inspect(connection).get_columns(name)}
            null = sa.JSON(none_as_null=True)
            columns = ((key, null if isinstance(kind, sa.JSON) else kind) for key, kind in found.items())
            table = sa.table(name, *(sa.column(key, kind) for key, kind in columns))
            connection.execute(sa.delete(table))  # a setting that a migration or a trigger has written
            connection.execute(sa.insert(table), [typed(table, row) for row in rows])
        if is_sqlite:
            words = "title, author, isbn, publisher"
            connection.exec_driver_sql(f"INSERT INTO book_fts (rowid, {words}) SELECT id, {words} FROM book")
        for name, last in FILLED["sequences"].items():
            connection.exec_driver_sql(
                f"UPDATE sqlite_sequence SET seq = {last} WHERE name = '{name}'"
                if is_sqlite
                else f"SELECT setval(pg_get_serial_sequence('\"{name}\"', 'id'), {last})"
            )
    engine.dispose()


def typed(table: sa.TableClause, row: dict[str, Any]) -> dict[str, Any]:
    """The values as stored by SQLite, as the table's types take them."""

    def convert(column: sa.ColumnClause[Any], value: Any) -> Any:
        if value is None:
            return None
        if isinstance(column.type, sa.DateTime):
            return datetime.fromisoformat(value).replace(tzinfo=UTC)
        if isinstance(column.type, sa.Date):
            return date.fromisoformat(value)
        if isinstance(column.type, sa.Boolean):
            return bool(value)
        if isinstance(column.type, sa.JSON):
            return json.loads(value)
        return base64.b64decode(value["base64"]) if isinstance(value, dict) else value

    return {name: convert(table.c[name], value) for name, value in row.items()}


def ask(client: TestClient) -> dict[str, Any]:
    floor = min(event["id"] for event in FILLED["rows"]["event"]) - 1
    answers: dict[str, Any] = {}
    for username, paths in QUESTIONS.items():
        asker: Any = Person(client, username) if username else client
        for path in paths:
            answer = asker.get(path.replace("FLOOR", str(floor)))
            assert answer.status_code == 200, answer.text
            is_json = answer.headers["Content-Type"] == "application/json"
            lines = answer.text.splitlines()
            body: Any = answer.json() if is_json else [json.loads(x) if x.startswith("{") else x for x in lines]
            if path == "/users/me/export":
                body = {name: part for name, part in body.items() if name not in CHANGING}
            answers[f"{username} {path}"] = body
    return answers


def differences(before: Any, after: Any, path: str = "") -> list[str]:
    """What is not as before. New fields and columns are no difference."""
    if isinstance(before, dict) and isinstance(after, dict):
        return [line for key in before for line in differences(before[key], after.get(key), f"{path}.{key}")]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        return [line for number, (old, new) in pairs for line in differences(old, new, f"{path}[{number}]")]
    is_longer = isinstance(after, str) and after.startswith(f"{before},")  # a line of CSV
    return [] if before == after or is_longer else [f"{path}: {before!r} != {after!r}"]


@pytest.fixture
def migrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock) -> TestClient:
    """A client of the restored database, soon after it was left."""
    monkeypatch.setattr(settings, "database_url", check_database_url(url_of(tmp_path / "old.db")))
    monkeypatch.setattr(settings, "rate_limits", False)
    last = max(event["at"] for event in FILLED["rows"]["event"])
    clock.now = datetime.fromisoformat(last).replace(tzinfo=UTC) + timedelta(minutes=1)
    restore(settings.database_url)
    return TestClient(app)


@pytest.mark.slow
def test_a_filled_database_of_revision_0010_answers_as_before(
    migrated: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("main.recurring_jobs", nullcontext)
    with migrated as client:
        assert differences(FILLED["answers"], ask(client)) == []
        upload = f"/books/upload/{FILLED['waiting']}"
        lydia, rita = Person(client, "Lydia"), Person(client, "Rita")
        assert lydia.get(upload).json()["status"] == "processing"
        with recurring_work(client):
            wait_for(lambda: lydia.get(upload).json()["finished_at"])
        finished = lydia.get(upload).json()
        assert (finished["status"], finished["inserted"], finished["skipped"]) == ("completed", 1, 1)
        had_copies = sa.text("SELECT id FROM book WHERE had_copies ORDER BY id")
        assert database.read_sync(lambda connection: connection.scalars(had_copies).all()) == [1, 2, 3, 4]
        assert rita.delete("/books/2").status_code == 409
        before = rita.get("/loans").json()
        assert lydia.delete("/books/2").status_code == lydia.delete("/books/4").status_code == 204
        assert differences(before, rita.get("/loans").json()) == [".items[0].book_id: 2 != None"]
        loan = rita.post("/loans", json={"book_id": 1}).json()["id"]
        assert loan == FILLED["sequences"]["loan"] + 1 == 7, "the id of a deleted loan is not used again"
