"""The one door to the database: transactions, and what runs inline or in a thread.

On SQLite a thread hop costs more than a point read, so short reads run on the event loop's own thread, over one
kept connection, with no `await` while it is in use; likewise changes of a row or two, where nobody else is writing.
Everything else, and all on PostgreSQL, goes to threads.
"""

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import anyio.to_thread
import sqlalchemy as sa
from sqlalchemy import Connection, Table
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session

import sqlite
from sqlite import Sqlite

if TYPE_CHECKING:
    from alembic.config import Config

    from postgresql import Postgresql

# Some 25 ms. A short change of another process is done in one; but an import writes for longer.
INLINE_TRIES = 200
CHECKPOINT_AFTER = 50  # changes, of some 80 KB each in the write-ahead log
WRITERS, JOBS = 2, 2  # threads; one transaction writes at a time
T = TypeVar("T")
P = ParamSpec("P")


def to_json(value: object) -> str:
    """JSON as it is stored and streamed: compact, in UTF-8."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


class _Open:
    """What exists only between `open_database` and `close_database`."""

    def __init__(self, url: str) -> None:
        self.backend: Sqlite | Postgresql
        if url.startswith("sqlite"):
            self.backend = Sqlite(url, to_json)
        else:
            self.backend = _postgresql().Postgresql(url, to_json)
        self.readers = anyio.CapacityLimiter(self.backend.threads)
        # Of their own: who waits to write must keep nobody from reading.
        self.writers = anyio.CapacityLimiter(WRITERS)
        self.jobs = anyio.CapacityLimiter(JOBS)


def _postgresql() -> Any:
    import postgresql  # noqa: PLC0415  # its driver takes 10 MB and a tenth of a second, which few need

    return postgresql


_open: _Open | None = None


def backend() -> "Sqlite | Postgresql":
    return _database().backend


def is_postgresql() -> bool:
    return backend().kind == "postgresql"


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
    if not isinstance(where, Sqlite):
        return await scan(query, *args, **kwargs)
    with where.inline() as connection:
        return query(connection, *args, **kwargs)


async def scan(query: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
    """A read that may take long (search, counts, facets), as one snapshot, in a thread."""
    return await anyio.to_thread.run_sync(
        functools.partial(snapshot, query, *args, **kwargs), limiter=_database().readers
    )


async def write(change: Callable[Concatenate[Session, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
    """One write transaction: commits when `change` returns, rolls back when it raises. In a thread."""
    return await anyio.to_thread.run_sync(
        functools.partial(transact, change, *args, **kwargs), limiter=_database().writers
    )


async def run_job(job: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
    """A long job in a thread, with transactions of its own. Of many, few run at once."""
    await anyio.to_thread.run_sync(functools.partial(job, *args, **kwargs), limiter=_database().jobs)


async def put(change: Callable[Concatenate[Session, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`write` for a change of a row or two. On SQLite it runs inline, unless somebody else writes for long."""
    where = backend()
    if isinstance(where, Sqlite):
        async with where.turns:  # in the order of their coming
            for turn in range(INLINE_TRIES):
                with where.inline_transaction() as session:
                    if session is not None:
                        return change(session, *args, **kwargs)
                await anyio.sleep(0 if turn % 10 else 0.001)
    return await write(change, *args, **kwargs)


async def tidy() -> None:
    """What changes that ran inline have left to do; to be called several times a second."""
    where = backend()
    if isinstance(where, Sqlite) and where.unchecked >= CHECKPOINT_AFTER:
        await anyio.to_thread.run_sync(where.checkpoint, limiter=_database().writers)


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


MIGRATIONS = Path(__file__).resolve().parent / "migrations"


def migrate(url: str) -> None:
    """Run the migrations that are missing. Processes that start at once wait for the first of them."""
    migrating = sqlite.migrating if url.startswith("sqlite") else _postgresql().migrating
    with migrating(url) as connection:
        if _revision(connection) == max(path.stem[:4] for path in (MIGRATIONS / "versions").glob("0*.py")):
            return
        from alembic import command  # noqa: PLC0415  # a start that finds nothing to migrate does without it

        command.upgrade(_alembic(connection), "head")
        if connection.dialect.name == "sqlite":
            sqlite.check_references(connection)


def _revision(connection: Connection) -> str | None:
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()


def _alembic(connection: Connection) -> "Config":
    from alembic.config import Config  # noqa: PLC0415  # needed where `command` is

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
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
