"""`python -m migrations.copy`: the data of an SQLite file, copied to PostgreSQL."""

import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing, nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
from fastapi.testclient import TestClient

import database
from main import app
from migrations import copy
from settings import check_database_url, settings
from tests.fixtures import ROOT, Clock, Person, Postgres
from tests.test_migrations import FILLED, ask, differences, restore


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock) -> Path:
    """An SQLite file with rows in every table that matters, of the present revision."""
    monkeypatch.setattr("main.recurring_jobs", nullcontext)
    monkeypatch.setattr(settings, "rate_limits", False)
    last = max(event["at"] for event in FILLED["rows"]["event"])
    clock.now = datetime.fromisoformat(last).replace(tzinfo=UTC) + timedelta(minutes=1)
    name = tmp_path / "old.db"
    restore(f"sqlite:///{name}")
    database.migrate(f"sqlite:///{name}")
    return name


@pytest.fixture
def target(tmp_path: Path) -> str:
    assert Postgres.current is not None
    return check_database_url(Postgres.current.database(tmp_path / "new.db"))


def rows_of_user(url: str) -> int:
    with psycopg.connect(url.replace("+psycopg", "")) as connection:
        if connection.execute("SELECT to_regclass('\"user\"')").fetchone() == (None,):
            return 0
        row = connection.execute('SELECT count(*) FROM "user"').fetchone()
        assert row is not None
        return int(row[0])


@pytest.mark.postgresql
def test_the_copy_answers_as_the_file_did(
    file: Path, target: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert copy.main([str(file)], target) is None
    printed = capsys.readouterr().out
    for name in ("book", "user", "loan"):
        with closing(sqlite3.connect(file)) as connection:
            (count,) = connection.execute(f'SELECT count(*) FROM "{name}"').fetchone()
        assert f"{name:20}{count:>12,}" in printed
    assert "same count of rows in every table" in printed

    monkeypatch.setattr(settings, "database_url", target)
    with TestClient(app) as client:
        assert differences(FILLED["answers"], ask(client)) == []
        admin = Person(client, "admin")
        total = client.get("/books").json()["total"]
        assert admin.add_book(genre="Novel")["id"] == FILLED["sequences"]["book"] + 1
        assert client.get("/books").json()["total"] == total + 1, "triggers work again"
        loan = admin.post("/loans", json={"book_id": 1}).json()["id"]
        assert loan == FILLED["sequences"]["loan"] + 1, "the id of a deleted loan is not used again"


@pytest.mark.postgresql
def test_all_columns_are_copied_as_stored(file: Path, target: str) -> None:
    assert copy.main([str(file)], target) is None
    with closing(sqlite3.connect(file)) as source, psycopg.connect(target.replace("+psycopg", "")) as connection:
        for table in copy.TABLES:
            for column in table.columns:
                missing = f'SELECT count(*) FROM "{table.name}" WHERE {column.name} IS NULL'
                assert source.execute(missing).fetchone() == connection.execute(missing).fetchone(), column
        shelved = "SELECT id, CAST(rating * 4 AS integer), CAST(tags AS text), review FROM shelf_entry ORDER BY id"
        assert source.execute(shelved).fetchall() == connection.execute(shelved).fetchall()
        chunks = "SELECT upload_id, number, data FROM upload_chunk ORDER BY 1, 2"
        assert source.execute(chunks).fetchall() == connection.execute(chunks).fetchall()
        words = "SELECT count(*) > 10, count(term) FROM word"
        assert source.execute(words).fetchall() == [(1, connection.execute(words).fetchall()[0][1])]
        (tables,) = zip(*source.execute("SELECT name FROM sqlite_master WHERE type = 'table'"), strict=True)
    others = {name for name in tables if not name.startswith(("sqlite_", "book_fts"))}
    assert others == {table.name for table in copy.TABLES} | {"alembic_version", "word"}


def lose(file: Path, _target: str) -> None:
    file.unlink()


def replace(file: Path, _target: str) -> None:
    file.unlink()
    sqlite3.connect(file).close()


def make_text(file: Path, _target: str) -> None:
    file.write_text("no database at all " * 100)


def make_old(file: Path, _target: str) -> None:
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '0012'")


REFUSALS = {
    "target with rows": (
        lambda file, target: copy.main([str(file)], target),
        "not empty; it has rows in: facet, user, book",
    ),
    "no file": (lose, "does not exist"),
    "empty file": (replace, "is no database of this service"),
    "another file": (make_text, "can't be read"),
    "older revision": (make_old, "has revision 0012, not "),
}


@pytest.mark.postgresql
@pytest.mark.parametrize(("prepare", "reason"), REFUSALS.values(), ids=REFUSALS)
def test_refusals_copy_nothing(prepare: Callable[[Path, str], object], reason: str, file: Path, target: str) -> None:
    prepare(file, target)
    rows = rows_of_user(target)
    refusal = str(copy.main([str(file)], target))
    assert refusal.startswith("Nothing was copied: ")
    assert reason in refusal
    assert rows_of_user(target) == rows


@pytest.mark.postgresql
def test_a_file_in_use_is_refused(file: Path, target: str) -> None:
    with closing(sqlite3.connect(file, isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        assert "is the service stopped?" in str(copy.main([str(file)], target))


@pytest.mark.postgresql
def test_a_failure_undoes_the_copy(file: Path, target: str) -> None:
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("PRAGMA ignore_check_constraints=ON")
        connection.execute("UPDATE loan SET quantity = 0 WHERE id = (SELECT max(id) FROM loan)")
    assert "ck_loan_quantity" in str(copy.main([str(file)], target))
    assert rows_of_user(target) == 0


@pytest.mark.slow
@pytest.mark.sqlite
def test_the_command_explains_itself_without_a_target() -> None:
    command = [sys.executable, "-m", "migrations.copy", "books.db"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("usage: DATABASE_URL=postgresql://")
