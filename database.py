"""The database: engine, transactions, compiled statements, migrations and constraint violations."""

import asyncio
import functools
import json
import logging
import re
import signal
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import repeat
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import anyio.to_thread
import sqlalchemy as sa
from sqlalchemy import Connection, Table, create_engine, event, insert
from sqlalchemy.dialects.sqlite import dialect as sqlite_dialect
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlmodel import Session, SQLModel

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


class _Database:
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


_open: _Database | None = None


def backend() -> "Sqlite | Postgresql":
    return _opened().backend


def is_postgresql() -> bool:
    return backend().kind == "postgresql"


def _opened() -> _Database:
    if _open is None:
        raise RuntimeError("the database is not open")
    return _open


def open_database(url: str) -> None:
    """Open `url` for this process and bring its tables up to date. To be called on the event loop."""
    global _open
    migrate(url)
    _open = _Database(url)


def close_database() -> None:
    global _open
    backend().close()
    _open = None


async def read(query: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
    """A short read (by key, a page by an index), as one snapshot. On SQLite it runs inline."""
    where = backend()
    if not isinstance(where, Sqlite):
        return await read_in_thread(query, *args, **kwargs)
    with where.inline() as connection:
        return query(connection, *args, **kwargs)


async def read_in_thread(query: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
    """A read that may take long (search, counts, facets), as one snapshot, in a thread."""
    return await anyio.to_thread.run_sync(
        functools.partial(read_sync, query, *args, **kwargs), limiter=_opened().readers
    )


async def write(change: Callable[Concatenate[Session, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
    """One write transaction: commits when `change` returns, rolls back when it raises. In a thread."""
    return await anyio.to_thread.run_sync(
        functools.partial(write_sync, change, *args, **kwargs), limiter=_opened().writers
    )


async def run_job(job: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
    """A long job in a thread, with transactions of its own. Of many, few run at once."""
    await anyio.to_thread.run_sync(functools.partial(job, *args, **kwargs), limiter=_opened().jobs)


def server_is_stopping() -> bool:
    """Whether uvicorn was told to stop. Its lifespan says so only after the jobs are done, which is too late."""
    return bool(getattr(getattr(signal.getsignal(signal.SIGTERM), "__self__", None), "should_exit", False))


async def write_inline(change: Callable[Concatenate[Session, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`write` for a change of a row or two. On SQLite it runs inline, unless somebody else writes for long."""
    where = backend()
    if isinstance(where, Sqlite):
        async with where.writer_queue:  # in the order of their coming
            for turn in range(INLINE_TRIES):
                with where.inline_transaction() as session:
                    if session is not None:
                        return change(session, *args, **kwargs)
                await anyio.sleep(0 if turn % 10 else 0.001)
    return await write(change, *args, **kwargs)


async def checkpoint_wal() -> None:
    """What changes that ran inline have left to do; to be called several times a second."""
    where = backend()
    if isinstance(where, Sqlite) and where.unchecked >= CHECKPOINT_AFTER:
        await anyio.to_thread.run_sync(where.checkpoint, limiter=_opened().writers)


def read_sync(query: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`scan` for those who are in a thread already."""
    with backend().reader.connect() as connection, connection.begin():
        return query(connection, *args, **kwargs)


def write_sync(change: Callable[Concatenate[Session, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
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
    migration = sqlite_migration if url.startswith("sqlite") else _postgresql().postgresql_migration
    with migration(url) as connection:
        if _revision(connection) == max(path.stem[:4] for path in (MIGRATIONS / "versions").glob("0*.py")):
            return
        from alembic import command  # noqa: PLC0415  # a start that finds nothing to migrate does without it

        command.upgrade(_alembic(connection), "head")
        if connection.dialect.name == "sqlite":
            check_references(connection)


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


if sys.platform != "win32":
    import fcntl

log = logging.getLogger("books.sqlite")

BUSY_TIMEOUT = 10  # seconds that a writer waits for the others of this process, and for those of another
PRAGMAS = {
    "journal_mode": "WAL",  # readers never wait for the writer, nor it for them
    "synchronous": "NORMAL",  # with WAL a power cut may cost the last commits, never the file
    "foreign_keys": "ON",  # off by default in SQLite; cascades and references rely on it
    "busy_timeout": f"{BUSY_TIMEOUT}000",  # ms that a writer waits for another process's transaction
    "cache_size": "-2000",  # KiB a connection, of which there may be a dozen; the system keeps the file's pages, too
    "temp_store": "MEMORY",  # sorts of a page's worth of rows need no file
    "recursive_triggers": "ON",  # so that REPLACE, too, would tell the search index of the row it removes
}
WRITERS_CACHE = "-16000"  # KiB
POLL_INTERVAL = 0.1  # how often other processes' commits are looked for: 3 µs each time


class Sqlite:
    kind = "sqlite"
    # How many threads may be inside the database at once. It is also the pool's size, so that no thread ever waits
    # for a connection, and a burst of slow searches leaves threads for everybody else.
    threads = 8

    def __init__(self, url: str, to_json: Callable[[object], str]) -> None:
        self.engine = create_engine(url, pool_size=self.threads, max_overflow=4, json_serializer=to_json)
        event.listen(self.engine, "connect", on_connect)
        event.listen(self.engine, "begin", on_begin)
        self.reader = self.engine
        # There is one writer at a time, in a thread or inline, with a cache that holds what a batch of an import
        # changes. A transaction takes the write lock at its start: a deferred one that reads first and writes later
        # either fails at once ("database is locked") or, with SQLAlchemy's defaults, loses updates.
        self.writer_engine = create_engine(url, pool_size=2, max_overflow=0, json_serializer=to_json)
        event.listen(self.writer_engine, "connect", on_connect)
        event.listen(self.writer_engine, "connect", lambda c, _record: c.execute(f"PRAGMA cache_size={WRITERS_CACHE}"))
        event.listen(self.writer_engine, "begin", on_begin)
        self.writer = self.writer_engine.execution_options(immediate=True)
        # The event loop's own connection for short reads; AUTOCOMMIT because `inline` brackets it itself, at a
        # twentieth of the price of SQLAlchemy's begin and rollback.
        self.loop_engine = create_engine(url, isolation_level="AUTOCOMMIT", skip_autocommit_rollback=True)
        event.listen(self.loop_engine, "connect", on_connect)
        self.kept = self.loop_engine.connect()
        # And one for short writes. Bringing the log into the file, which waits for the disk, it leaves to `checkpoint`.
        self.kept_writer = self.writer.connect()
        driver: Any = self.kept_writer.connection.dbapi_connection
        driver.execute("PRAGMA wal_autocheckpoint=0")
        driver.execute("PRAGMA busy_timeout=0")  # it must not keep the event loop waiting for whoever else has the file
        self.kept_driver = driver
        self.unchecked = 0  # transactions since the last checkpoint
        self.writer_queue = asyncio.Lock()
        self.write_lock = WriteLock(f"{self.engine.url.database}-lock")

    def close(self) -> None:
        self.write_lock.close()
        self.kept.close()
        self.kept_writer.close()
        self.loop_engine.dispose()
        self.writer_engine.dispose()
        self.engine.dispose()

    @contextmanager
    def inline(self) -> Iterator[Connection]:
        """The kept connection, for a read on the event loop with no `await` in it."""
        cursor = self.kept.connection.dbapi_connection
        assert cursor is not None
        cursor.execute("BEGIN")
        try:
            yield self.kept
        finally:
            if cursor.in_transaction:  # after an I/O error SQLite has ended it by itself
                cursor.execute("ROLLBACK")

    @contextmanager
    def inline_transaction(self) -> Iterator[Session | None]:
        """For a change on the event loop with no `await` in it; None where it would have to wait for another writer."""
        with self.write_lock.if_free() as free:
            if not free:
                yield None
                return
            try:
                with Session(self.kept_writer, expire_on_commit=False) as session:
                    connection = _begun(session)
                    if connection is None:
                        yield None
                        return
                    self.unchecked += 1
                    session.info["connection"] = connection
                    yield session
                    session.commit()  # without which it is rolled back
            finally:
                # After a commit that failed, a session leaves a connection that was given to it as it is.
                self.kept_writer.rollback()
                self.kept_driver.rollback()

    def checkpoint(self) -> None:
        """Bring what was written inline into the file, so that the log begins anew; where it grows large, every read
        takes longer. Most of it while others write, the rest while nobody does."""
        self.unchecked = 0
        with self.loop_engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA wal_checkpoint(PASSIVE)")
            with self.write_lock:
                connection.exec_driver_sql("PRAGMA wal_checkpoint(PASSIVE)")

    @staticmethod
    def insert_many(session: Session, table: Table, rows: Sequence[Mapping[str, Any]], same: Mapping[str, Any]) -> None:
        # By the driver's own executemany, with SQLAlchemy's types: its own insert takes twice as long.
        dialect = session.get_bind().dialect
        statement = insert(table).compile(dialect=dialect, column_keys=[*rows[0], *same])
        names = statement.positiontup or []
        prepare = [table.c[name].type.dialect_impl(dialect).bind_processor(dialect) for name in names]
        columns: list[Iterable[Any]] = []
        for name, f in zip(names, prepare, strict=True):
            if name in same:
                columns.append(repeat(f(same[name]) if f else same[name]))
            else:
                cells = map(itemgetter(name), rows)
                columns.append(map(f, cells) if f else cells)
        session.connection().exec_driver_sql(str(statement), list(zip(*columns, strict=False)))

    async def listen(self, notify: Callable[[], None]) -> None:
        """Nudge whenever another connection, of this process or another, has committed."""
        with self.loop_engine.connect() as connection:
            driver = connection.connection.dbapi_connection  # by SQLAlchemy it takes twenty times as long
            assert driver is not None
            seen = None
            while True:
                try:
                    version = driver.execute("PRAGMA data_version").fetchone()
                except sqlite3.Error as error:  # it may be better in a while
                    log.error("can't look for changes: %s", error)
                else:
                    if version != seen:
                        seen = version
                        notify()
                await asyncio.sleep(POLL_INTERVAL)

    @staticmethod
    def notify_listeners(session: Session) -> None:
        """Others look for themselves."""

    @staticmethod
    def violation(error: IntegrityError) -> tuple[str, str]:
        """UNIQUE failures name columns or the index, CHECK failures the constraint, references nothing."""
        text = str(error.orig)
        if match := re.search(r"UNIQUE constraint failed: (?:index 'uq_[a-z]+_(\w+)'|.*\.(\w+)$)", text):
            return "unique", match[1] or match[2]
        if match := re.search(r"CHECK constraint failed: ck_(\w+)$", text):
            table = next(name for name in SQLModel.metadata.tables if match[1].startswith(f"{name}_"))
            return "check", match[1].removeprefix(f"{table}_")
        if match := re.search(r"NOT NULL constraint failed: \w+\.(\w+)$", text):
            return "check", match[1]
        return "reference", ""

    @staticmethod
    def is_full(error: object) -> bool:
        # The write-ahead log's index is mapped memory: where there is no room for it to grow, it is an I/O error.
        name = getattr(error, "sqlite_errorname", "")
        return name == "SQLITE_FULL" or name in ("SQLITE_IOERR_SHMSIZE", "SQLITE_IOERR_WRITE")


def _begun(session: Session) -> Connection | None:
    """The connection of its transaction; None where a stranger (Litestream, a shell) is writing."""
    try:
        return session.connection()
    except OperationalError as error:
        if getattr(error.orig, "sqlite_errorname", "").startswith("SQLITE_BUSY"):
            return None
        raise


class WriteLock:
    """Held around each write transaction, by one thread of all processes at a time.

    SQLite would let writers wait, too, but by sleeping and trying again: beside an import a writer of another process
    waited for seconds, and now and then in vain. A lock file's waiters are woken in turn.
    """

    def __init__(self, path: str) -> None:
        self.threads = threading.Lock()
        self.file = open(path, "a")  # noqa: SIM115  # kept open for as long as the database is

    def __enter__(self) -> None:
        if not self.threads.acquire(timeout=BUSY_TIMEOUT):
            raise OperationalError("BEGIN IMMEDIATE", None, sqlite3.OperationalError("database is locked"))
        self._flock(0)

    def __exit__(self, *_error: object) -> None:
        if sys.platform != "win32":
            fcntl.flock(self.file, fcntl.LOCK_UN)
        self.threads.release()

    @contextmanager
    def if_free(self) -> Iterator[bool]:
        """Whether nobody holds it; if so, it is held from now on."""
        if not self.threads.acquire(blocking=False):
            yield False
            return
        try:
            self._flock(fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            self.__exit__()

    def _flock(self, how: int) -> None:
        try:
            if sys.platform != "win32":  # which has no flock: there SQLite's own waiting must do
                fcntl.flock(self.file, fcntl.LOCK_EX | how)
        except BaseException:
            self.threads.release()
            raise

    def close(self) -> None:
        self.file.close()


def on_connect(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # sqlite3's own implicit BEGIN would come late and deferred
    for name, value in PRAGMAS.items():
        connection.execute(f"PRAGMA {name}={value}")


def on_begin(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("immediate") else "BEGIN")


@contextmanager
def sqlite_migration(url: str) -> Iterator[Connection]:
    """A transaction that keeps other processes waiting, for the migrations."""
    engine = create_engine(url)
    event.listen(engine, "connect", on_connect)
    # A table that is rebuilt is dropped for a moment, which would delete the rows that refer to it.
    event.listen(engine, "connect", lambda connection, _record: connection.execute("PRAGMA foreign_keys=OFF"))
    event.listen(engine, "begin", on_begin)
    try:
        with engine.connect().execution_options(immediate=True) as connection, connection.begin():
            yield connection
    finally:
        engine.dispose()


def check_references(connection: Connection) -> None:
    broken = connection.exec_driver_sql("PRAGMA foreign_key_check").first()
    if broken is not None:
        raise RuntimeError(f"after the migrations a row refers to nothing: {tuple(broken)}")


def copy_sqlite(source: str, target: Path) -> None:
    """A copy of the file as of one moment, while others write; in one file, without a write-ahead log."""
    with sqlite3.connect(source) as live, sqlite3.connect(target) as copy:
        live.backup(copy)
        copy.execute("PRAGMA journal_mode=DELETE")
    live.close()
    copy.close()


class CompiledQuery:
    """A SELECT whose values are all bound by name. Its columns come as they are stored: numbers and texts."""

    def __init__(self, select: Any) -> None:
        self.select = select

    @functools.cached_property
    def _compiled(self) -> tuple[str, dict[str, Any]]:
        compiled = self.select.compile(dialect=sqlite_dialect(paramstyle="named"))
        return str(compiled), {name: value for name, value in compiled.params.items() if value is not None}

    def all(self, connection: Connection, values: Mapping[str, Any] | None = None) -> Sequence[Any]:
        if is_postgresql():
            return connection.execute(self.select, values).all()
        sql, constants = self._compiled
        rows: list[Any] = _execute(connection, sql, {**constants, **(values or {})}).fetchall()
        return rows

    def first(self, connection: Connection, values: Mapping[str, Any] | None = None) -> Any:
        found = self.all(connection, values)
        return found[0] if found else None


class Insert:
    """Puts one row into this table, past the unit of work, which takes ten times as long as SQLite."""

    def __init__(self, table: Any) -> None:
        self.table = table.__table__
        self._compiled = functools.lru_cache(100)(self._compile)

    def _compile(self, names: tuple[str, ...]) -> tuple[str, list[tuple[str, Callable[[Any], Any]]]]:
        dialect: Any = sqlite_dialect(paramstyle="named", json_serializer=to_json)
        kinds = {name: self.table.c[name].type.dialect_impl(dialect).bind_processor(dialect) for name in names}
        sql = str(sa.insert(self.table).compile(dialect=dialect, column_keys=names))
        return sql, [(name, process) for name, process in kinds.items() if process is not None]

    def __call__(self, session: Session, row: Mapping[str, Any]) -> int:
        """The new row's id. What has a default of its own in Python only must be given."""
        if is_postgresql():
            return int(session.execute(sa.insert(self.table).returning(self.table.c.id), row).scalar_one())
        sql, processed = self._compiled(tuple(row))
        stored = {name: process(row[name]) for name, process in processed}
        return int(_execute(connection_of(session), sql, {**row, **stored}).lastrowid)


def connection_of(session: Session) -> Connection:
    """That of a transaction that has not ended. SQLAlchemy takes as long to find it as SQLite to insert a row."""
    kept: Connection | None = session.info.get("connection")
    return session.connection() if kept is None else kept


def _execute(connection: Connection, sql: str, values: Mapping[str, Any]) -> Any:
    driver: Any = connection.connection.dbapi_connection
    try:
        return driver.execute(sql, values)
    except sqlite3.IntegrityError as error:
        raise IntegrityError(sql, values, error) from error
    except sqlite3.Error as error:
        raise OperationalError(sql, values, error) from error
