"""The one door to the database: engine, pragmas, transactions, and what runs inline or in a thread.

On SQLite a thread hop costs more than a point read, so short reads run on the event loop's own thread, over one
kept connection, with no `await` while it is in use. Everything else goes to threads.
"""

import functools
import json
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import repeat
from operator import itemgetter
from pathlib import Path
from typing import Any, Concatenate, Literal, NamedTuple, ParamSpec, TypeVar

import anyio.to_thread
from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, Table, create_engine, event, insert
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, SQLModel

if sys.platform != "win32":
    import fcntl

T = TypeVar("T")
P = ParamSpec("P")

# How many threads may be inside the database at once. It is also the pool's size, so that no thread ever waits
# for a connection, and a burst of slow searches leaves threads for everybody else.
THREADS = 16

PRAGMAS = {
    "journal_mode": "WAL",  # readers never wait for the writer, nor it for them
    "synchronous": "NORMAL",  # with WAL a power cut may cost the last commits, never the file
    "foreign_keys": "ON",  # off by default in SQLite; cascades and references rely on it
    "busy_timeout": "10000",  # ms that a writer waits for another process's transaction
    "cache_size": "-8000",  # KiB a connection: enough for the inner pages of every index of a large catalogue
    "temp_store": "MEMORY",  # sorts of a page's worth of rows need no file
    "recursive_triggers": "ON",  # so that REPLACE, too, would tell the search index of the row it removes
}


class _Open:
    """What exists only between `open_database` and `close_database`."""

    def __init__(self, url: str) -> None:
        self.engine = create_engine(url, pool_size=THREADS, max_overflow=4, json_serializer=to_json)
        event.listen(self.engine, "connect", _on_connect)
        event.listen(self.engine, "begin", _on_begin)
        # The same pool; its transactions take the write lock at their start. A deferred one that reads first and
        # writes later either fails at once ("database is locked") or, with SQLAlchemy's defaults, loses updates.
        self.writer = self.engine.execution_options(immediate=True)
        # The event loop's own connection for short reads; AUTOCOMMIT because `read` brackets it itself, at a
        # twentieth of the price of SQLAlchemy's begin and rollback.
        self.loop_engine = create_engine(url, isolation_level="AUTOCOMMIT", skip_autocommit_rollback=True)
        event.listen(self.loop_engine, "connect", _on_connect)
        self.kept = self.loop_engine.connect()
        self.limiter = anyio.CapacityLimiter(THREADS)
        self.write_lock = WriteLock(f"{self.engine.url.database}-lock")

    def close(self) -> None:
        self.write_lock.close()
        self.kept.close()
        self.loop_engine.dispose()
        self.engine.dispose()


class WriteLock:
    """Held around each write transaction, by one thread of all processes at a time.

    SQLite would let writers wait, too, but by sleeping and trying again: beside an import a writer of another process
    waited for seconds, and now and then in vain. A lock file's waiters are woken in turn.
    """

    def __init__(self, path: str) -> None:
        self.threads = threading.Lock()
        self.file = open(path, "a")  # noqa: SIM115  # kept open for as long as the database is

    def __enter__(self) -> None:
        self.threads.acquire()
        try:
            if sys.platform != "win32":  # which has no flock: there SQLite's own waiting must do
                fcntl.flock(self.file, fcntl.LOCK_EX)
        except BaseException:
            self.threads.release()
            raise

    def __exit__(self, *_error: object) -> None:
        if sys.platform != "win32":
            fcntl.flock(self.file, fcntl.LOCK_UN)
        self.threads.release()

    def close(self) -> None:
        self.file.close()


def to_json(value: object) -> str:
    """JSON as it is stored and streamed: compact, in UTF-8."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


_open: _Open | None = None


def _on_connect(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # sqlite3's own implicit BEGIN would come late and deferred
    for name, value in PRAGMAS.items():
        connection.execute(f"PRAGMA {name}={value}")


def _on_begin(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("immediate") else "BEGIN")


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
    _database().close()
    _open = None


async def read(query: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
    """A short read (by key, a page by an index), as one snapshot. On SQLite it runs inline."""
    kept = _database().kept
    cursor = kept.connection.dbapi_connection
    assert cursor is not None
    cursor.execute("BEGIN")
    try:
        return query(kept, *args, **kwargs)
    finally:
        cursor.execute("ROLLBACK")


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


def snapshot(query: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`scan` for those who are in a thread already."""
    with _database().engine.connect() as connection:
        return query(connection, *args, **kwargs)


def transact(change: Callable[Concatenate[Session, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`write` for those who are in a thread already."""
    with transaction() as session:
        return change(session, *args, **kwargs)


def insert_many(
    session: Session, table: Table, rows: Sequence[Mapping[str, Any]], same: Mapping[str, Any] | None = None
) -> None:
    """Insert rows that have the same columns, and in the columns of `same` the same values.

    By the driver's own executemany, with SQLAlchemy's types: its own insert takes twice as long.
    """
    dialect, constant = session.get_bind().dialect, same or {}
    statement = insert(table).compile(dialect=dialect, column_keys=[*rows[0], *constant])
    names = statement.positiontup or []
    prepare = [table.c[name].type.dialect_impl(dialect).bind_processor(dialect) for name in names]
    fixed = [
        f(constant[name]) if f and name in constant else constant.get(name)
        for name, f in zip(names, prepare, strict=True)
    ]
    columns: list[Iterable[Any]] = []
    for name, value, f in zip(names, fixed, prepare, strict=True):
        cells = repeat(value) if name in constant else map(itemgetter(name), rows)
        columns.append(map(f, cells) if f and name not in constant else cells)
    session.connection().exec_driver_sql(str(statement), list(zip(*columns, strict=False)))


@contextmanager
def transaction() -> Iterator[Session]:
    database = _database()
    with database.write_lock, Session(database.writer, expire_on_commit=False) as session, session.begin():
        yield session


def watch_connection() -> Connection:
    """A connection of the caller's own, outside every transaction, for `PRAGMA data_version`. The caller closes it."""
    return _database().loop_engine.connect()


def migrate(url: str) -> None:
    """Run the migrations that are missing. Processes that start at once wait for the first of them."""
    engine = create_engine(url)
    event.listen(engine, "connect", _on_connect)
    # A table that is rebuilt is dropped for a moment, which would delete the rows that refer to it.
    event.listen(engine, "connect", lambda connection, _record: connection.execute("PRAGMA foreign_keys=OFF"))
    event.listen(engine, "begin", _on_begin)
    try:
        with engine.connect().execution_options(immediate=True) as connection, connection.begin():
            command.upgrade(_alembic(connection), "head")
            broken = connection.exec_driver_sql("PRAGMA foreign_key_check").first()
            if broken is not None:
                raise RuntimeError(f"after the migrations a row refers to nothing: {tuple(broken)}")
    finally:
        engine.dispose()


def _alembic(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).resolve().parent / "migrations"))
    config.attributes["connection"] = connection
    return config


class Violation(NamedTuple):
    """A constraint that a write ran into. `field` is the column it is about, where the database says so."""

    kind: Literal["unique", "check", "reference"]
    field: str


def violation(error: IntegrityError) -> Violation:
    """SQLite's UNIQUE failures name columns or the index, CHECK failures the constraint, references nothing."""
    text = str(error.orig)
    if match := re.search(r"UNIQUE constraint failed: (?:index 'uq_[a-z]+_(\w+)'|.*\.(\w+)$)", text):
        return Violation("unique", match[1] or match[2])
    if match := re.search(r"CHECK constraint failed: ck_(\w+)$", text):
        table = next(name for name in SQLModel.metadata.tables if match[1].startswith(f"{name}_"))
        return Violation("check", match[1].removeprefix(f"{table}_"))
    if match := re.search(r"NOT NULL constraint failed: \w+\.(\w+)$", text):
        return Violation("check", match[1])
    return Violation("reference", "")
