"""The one door to the database: transactions, and what runs inline or in a thread.

On SQLite a thread hop costs more than a point read, so short reads run on the event loop's own thread, over one
kept connection, with no `await` while it is in use. Everything else, and all on PostgreSQL, goes to threads.
"""

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import anyio.to_thread
from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, Table
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session

import postgresql
import sqlite
from postgresql import Postgresql
from sqlite import Sqlite

T = TypeVar("T")
P = ParamSpec("P")


def to_json(value: object) -> str:
    """JSON as it is stored and streamed: compact, in UTF-8."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


class _Open:
    """What exists only between `open_database` and `close_database`."""

    def __init__(self, url: str) -> None:
        self.backend = Sqlite(url, to_json) if url.startswith("sqlite") else Postgresql(url, to_json)
        self.limiter = anyio.CapacityLimiter(self.backend.threads)


_open: _Open | None = None


def backend() -> Sqlite | Postgresql:
    return _database().backend


def is_postgresql() -> bool:
    return isinstance(backend(), Postgresql)


def _database() -> _Open:
    if _open is None:
        raise RuntimeError("the database is not open")
    return _open


def open_database(url: str) -> None:
    """Open `url` for this process and bring its tables up to date. To be called on the event loop."""
    global _open
    migrate(url)
    _open = _Open(url)


def close_database() -> None:
    global _open
    backend().close()
    _open = None


async def read(query: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
    """A short read (by key, a page by an index), as one snapshot. On SQLite it runs inline."""
    where = backend()
    if isinstance(where, Postgresql):
        return await scan(query, *args, **kwargs)
    with where.inline() as connection:
        return query(connection, *args, **kwargs)


async def scan(query: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
    """A read that may take long (search, counts, facets), as one snapshot, in a thread."""
    return await anyio.to_thread.run_sync(
        functools.partial(snapshot, query, *args, **kwargs), limiter=_database().limiter
    )


async def write(change: Callable[Concatenate[Session, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
    """One write transaction: commits when `change` returns, rolls back when it raises. In a thread."""
    return await anyio.to_thread.run_sync(
        functools.partial(transact, change, *args, **kwargs), limiter=_database().limiter
    )


async def put(change: Callable[Concatenate[Session, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`write` for a change of a row or two. On SQLite it runs inline, unless somebody else is writing just now."""
    where = backend()
    if isinstance(where, Sqlite):
        with where.inline_transaction() as session:
            if session is not None:
                return change(session, *args, **kwargs)
    return await write(change, *args, **kwargs)


async def tidy() -> None:
    """What changes that ran inline have left to do; to be called every second or so."""
    where = backend()
    if isinstance(where, Sqlite) and where.unchecked:
        await anyio.to_thread.run_sync(where.checkpoint, limiter=_database().limiter)


def snapshot(query: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`scan` for those who are in a thread already."""
    with backend().reader.connect() as connection, connection.begin():
        return query(connection, *args, **kwargs)


def transact(change: Callable[Concatenate[Session, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`write` for those who are in a thread already."""
    with transaction() as session:
        return change(session, *args, **kwargs)


@contextmanager
def transaction() -> Iterator[Session]:
    """One writer at a time: what one reads stays as it is until its commit, and ids are committed in their order."""
    where = backend()
    lock = where.write_lock if isinstance(where, Sqlite) else nullcontext()
    with lock, Session(where.writer, expire_on_commit=False) as session, session.begin():
        yield session


def insert_many(
    session: Session, table: Table, rows: Sequence[Mapping[str, Any]], same: Mapping[str, Any] | None = None
) -> None:
    """Insert rows that have the same columns, and in the columns of `same` the same values. Their ids are in order,
    without gaps, and the last that there are."""
    backend().insert_many(session, table, rows, same or {})


def migrate(url: str) -> None:
    """Run the migrations that are missing. Processes that start at once wait for the first of them."""
    migrating = sqlite.migrating if url.startswith("sqlite") else postgresql.migrating
    with migrating(url) as connection:
        command.upgrade(_alembic(connection), "head")


def _alembic(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).resolve().parent / "migrations"))
    config.attributes["connection"] = connection
    return config


class Violation(NamedTuple):
    """A constraint that a write ran into: `unique`, `check` or `reference`. `field` is the column it is about, where
    the database says so."""

    kind: str
    field: str


def violation(error: IntegrityError) -> Violation:
    return Violation(*backend().violation(error))


def is_full(error: Exception) -> bool:
    """Whether this is for want of room on the disk."""
    return backend().is_full(getattr(error, "orig", None) or error)
