"""The database: engine, transactions, compiled statements, migrations and constraint violations."""

import asyncio
import functools
import inspect
import json
import logging
import re
import signal
import sqlite3
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import anyio.to_thread
import sqlalchemy as sa
from sqlalchemy import Connection, create_engine, event
from sqlalchemy.dialects.sqlite import dialect as sqlite_dialect
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlmodel import Session, SQLModel

if TYPE_CHECKING:
    from alembic.config import Config

    from postgresql import Postgresql

INLINE_TRIES = 200  # some 25 ms; a batch of an import by another process takes longer
CHECKPOINT_AFTER = 50  # transactions, of some 80 KB each in the write-ahead log
WRITERS, JOBS = 2, 2  # threads; one transaction writes at a time
T = TypeVar("T")
P = ParamSpec("P")
Values = Mapping[str, Any]


def to_json(value: object) -> str:
    """JSON as it is stored and streamed: compact, in UTF-8."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


class _Database:
    """The engine and thread limits of this process, between `open_database` and `close_database`."""

    def __init__(self, url: str) -> None:
        self.backend: Sqlite | Postgresql
        self.backend = Sqlite(url) if url.startswith("sqlite") else _postgresql().Postgresql(url, to_json)
        self.readers = anyio.CapacityLimiter(self.backend.threads)
        # Threads of their own: blocked writers must not block readers.
        self.writers = anyio.CapacityLimiter(WRITERS)
        self.jobs = anyio.CapacityLimiter(JOBS)


def _postgresql() -> Any:
    import postgresql  # noqa: PLC0415  # its driver takes 10 MB and 0.1 s, which few need

    return postgresql


_open: _Database | None = None


def _opened() -> _Database:
    if _open is None:
        raise RuntimeError("the database is not open")
    return _open


def backend() -> "Sqlite | Postgresql":
    return _opened().backend


def is_postgresql() -> bool:
    return backend().kind == "postgresql"


def open_database(url: str) -> None:
    """Open `url` for this process and run missing migrations. Call it on the event loop."""
    global _open
    migrate(url)
    _open = _Database(url)


def close_database() -> None:
    global _open
    backend().close()
    _open = None


# --- reads and writes ---------------------------------------------------------------------------------------------

Read = Callable[Concatenate[Connection, P], T]
Write = Callable[Concatenate[Session, P], T]


async def read(query: Read[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """A short read (by key, a page by an index), as one snapshot. On SQLite it runs on the event loop."""
    sqlite = backend()
    if not isinstance(sqlite, Sqlite):
        return await read_in_thread(query, *args, **kwargs)
    with sqlite.inline() as connection:
        return query(connection, *args, **kwargs)


async def read_in_thread(query: Read[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """A read that may take long (search, counts, sorting), as one snapshot."""
    return await anyio.to_thread.run_sync(
        functools.partial(read_sync, query, *args, **kwargs), limiter=_opened().readers
    )


def read_sync(query: Read[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """`read` for code that runs in a thread."""
    with backend().reader.connect() as connection, connection.begin():
        return query(connection, *args, **kwargs)


async def write(change: Write[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """One write transaction, in a thread: commits when `change` returns, rolls back when it raises."""
    return await anyio.to_thread.run_sync(
        functools.partial(write_sync, change, *args, **kwargs), limiter=_opened().writers
    )


async def write_inline(change: Write[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """`write` for a change of a row or two. On SQLite it runs on the event loop, unless another writer takes long."""
    sqlite = backend()
    if isinstance(sqlite, Sqlite):
        async with sqlite.writer_queue:
            for attempt in range(INLINE_TRIES):
                with sqlite.inline_transaction() as session:
                    if session is not None:
                        return change(session, *args, **kwargs)
                await anyio.sleep(0 if attempt % 10 else 0.001)
    return await write(change, *args, **kwargs)


def write_sync(change: Write[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """`write` for code that runs in a thread.

    One transaction writes at a time, on both databases: what it reads stays as it is until its commit, no row needs a
    lock of its own, and ids are committed in their order.
    """
    database = backend()
    lock = database.write_lock if isinstance(database, Sqlite) else nullcontext()
    with lock, Session(database.writer, expire_on_commit=False) as session, session.begin():
        return change(session, *args, **kwargs)


def readonly(handler: Read[P, T]) -> Callable[P, Awaitable[T]]:
    """Run a route handler as one `read`. FastAPI does not see its first parameter, the connection."""
    return _without_first_parameter(handler, read)


def transactional(handler: Write[P, T]) -> Callable[P, Awaitable[T]]:
    """Run a route handler as one `write`. FastAPI does not see its first parameter, the session."""
    return _without_first_parameter(handler, write)


def _without_first_parameter(handler: Any, run: Any) -> Callable[..., Awaitable[Any]]:
    async def route(*args: Any, **kwargs: Any) -> Any:
        return await run(handler, *args, **kwargs)

    _, *parameters = inspect.signature(handler, eval_str=True).parameters.values()
    route.__signature__ = inspect.signature(handler, eval_str=True).replace(parameters=parameters)  # type: ignore[attr-defined]  # PEP 362
    for name in ("__name__", "__qualname__", "__doc__", "__module__"):
        setattr(route, name, getattr(handler, name))
    return route


async def run_job(job: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
    """A long job in a thread, with transactions of its own. At most `JOBS` run at once."""
    await anyio.to_thread.run_sync(functools.partial(job, *args, **kwargs), limiter=_opened().jobs)


def server_is_stopping() -> bool:
    """Whether uvicorn was told to stop. Lifespan shutdown comes only after the jobs have ended, which is too late."""
    return bool(getattr(getattr(signal.getsignal(signal.SIGTERM), "__self__", None), "should_exit", False))


async def checkpoint_wal() -> None:
    """Move what `write_inline` has committed from the write-ahead log into the file. Call it every second."""
    sqlite = backend()
    if isinstance(sqlite, Sqlite) and sqlite.uncheckpointed >= CHECKPOINT_AFTER:
        await anyio.to_thread.run_sync(sqlite.checkpoint, limiter=_opened().writers)


# --- migrations and constraint violations -------------------------------------------------------------------------

MIGRATIONS = Path(__file__).resolve().parent / "migrations"


def migrate(url: str) -> None:
    """Run missing migrations. Of several processes that start at once, the first runs them."""
    migration = sqlite_migration if url.startswith("sqlite") else _postgresql().postgresql_migration
    with migration(url) as connection:
        if _revision(connection) == max(path.stem[:4] for path in (MIGRATIONS / "versions").glob("0*.py")):
            return
        from alembic import command  # noqa: PLC0415  # not loaded where nothing is to be migrated

        command.upgrade(_alembic(connection), "head")
        if connection.dialect.name == "sqlite" and (
            broken := connection.exec_driver_sql("PRAGMA foreign_key_check").first()
        ):
            raise RuntimeError(f"a row without its referenced row after the migrations: {tuple(broken)}")


def _revision(connection: Connection) -> str | None:
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()


def _alembic(connection: Connection) -> "Config":
    from alembic.config import Config  # noqa: PLC0415  # as above

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["connection"] = connection
    return config


class Violation(NamedTuple):
    """A violated constraint: `unique`, `check` or `reference`, and its column where the database names it."""

    kind: str
    field: str


def violation(error: IntegrityError) -> Violation:
    return Violation(*backend().violation(error))


def is_full(error: Exception) -> bool:
    """Whether the disk is full."""
    return backend().is_full(getattr(error, "orig", None) or error)


# --- SQLite -------------------------------------------------------------------------------------------------------

if sys.platform != "win32":
    import fcntl

log = logging.getLogger("books.sqlite")

BUSY_TIMEOUT = 10  # seconds that a writer waits for other threads, and for other processes
PRAGMAS = {
    "journal_mode": "WAL",  # readers and the writer do not block each other
    "synchronous": "NORMAL",  # with WAL, a power cut may cost the last commits, but never corrupts the file
    "foreign_keys": "ON",  # off by default in SQLite
    "busy_timeout": f"{BUSY_TIMEOUT}000",  # ms
    "cache_size": "-2000",  # KiB a connection, of up to a dozen; the system caches the file's pages, too
    "temp_store": "MEMORY",  # sorting a page of rows needs no file
    "recursive_triggers": "ON",  # REPLACE must update the search index, too
}
WRITER_CACHE = "-16000"  # KiB; holds what a batch of an import changes
POLL_INTERVAL = 0.1  # seconds; a check for commits of other processes takes 3 µs


class Sqlite:
    kind = "sqlite"
    # Also the size of the pool, so that no thread waits for a connection. A burst of slow searches leaves the other
    # threads of the process free.
    threads = 8

    def __init__(self, url: str) -> None:
        self.engine = create_engine(url, pool_size=self.threads, max_overflow=4, json_serializer=to_json)
        event.listen(self.engine, "connect", on_connect)
        event.listen(self.engine, "begin", on_begin)
        self.reader = self.engine
        # BEGIN IMMEDIATE: a deferred transaction that reads first and writes later fails at once ("database is locked")
        # or, with SQLAlchemy's defaults, loses updates.
        self.writer_engine = create_engine(url, pool_size=2, max_overflow=0, json_serializer=to_json)
        event.listen(self.writer_engine, "connect", on_connect)
        event.listen(self.writer_engine, "connect", lambda c, _record: c.execute(f"PRAGMA cache_size={WRITER_CACHE}"))
        event.listen(self.writer_engine, "begin", on_begin)
        self.writer = self.writer_engine.execution_options(immediate=True)
        # The event loop's connection for reads; AUTOCOMMIT because `inline` begins and ends transactions by itself, at
        # a twentieth of the cost of SQLAlchemy's begin and rollback.
        self.loop_engine = create_engine(url, isolation_level="AUTOCOMMIT", skip_autocommit_rollback=True)
        event.listen(self.loop_engine, "connect", on_connect)
        self.loop_reader = self.loop_engine.connect()
        # And one for writes. It leaves checkpoints, which wait for the disk, to `checkpoint_wal`.
        self.loop_writer = self.writer.connect()
        driver: Any = self.loop_writer.connection.dbapi_connection
        driver.execute("PRAGMA wal_autocheckpoint=0")
        driver.execute("PRAGMA busy_timeout=0")  # never wait for another process on the event loop
        self.loop_driver = driver
        self.uncheckpointed = 0  # transactions since the last checkpoint
        self.writer_queue = asyncio.Lock()
        self.write_lock = WriteLock(f"{self.engine.url.database}-lock")

    def close(self) -> None:
        self.write_lock.close()
        self.loop_reader.close()
        self.loop_writer.close()
        self.loop_engine.dispose()
        self.writer_engine.dispose()
        self.engine.dispose()

    @contextmanager
    def inline(self) -> Iterator[Connection]:
        """A connection for a read on the event loop, with no `await` in it."""
        cursor = self.loop_reader.connection.dbapi_connection
        assert cursor is not None
        cursor.execute("BEGIN")
        try:
            yield self.loop_reader
        finally:
            if cursor.in_transaction:  # after an I/O error SQLite ends it by itself
                cursor.execute("ROLLBACK")

    @contextmanager
    def inline_transaction(self) -> Iterator[Session | None]:
        """A session for a write on the event loop, with no `await` in it; None while another writer has the lock."""
        with self.write_lock.if_free() as free:
            if not free:
                yield None
                return
            try:
                with Session(self.loop_writer, expire_on_commit=False) as session:
                    connection = _begun(session)
                    if connection is None:
                        yield None
                        return
                    self.uncheckpointed += 1
                    session.info["connection"] = connection
                    yield session
                    session.commit()
            finally:
                # After a commit that failed, a session leaves an external connection in its transaction.
                self.loop_writer.rollback()
                self.loop_driver.rollback()

    def checkpoint(self) -> None:
        """Move the write-ahead log into the file, since a large one slows every read: most of it beside other writers,
        the rest with the write lock."""
        self.uncheckpointed = 0
        with self.loop_engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA wal_checkpoint(PASSIVE)")
            with self.write_lock:
                connection.exec_driver_sql("PRAGMA wal_checkpoint(PASSIVE)")

    async def listen(self, notify: Callable[[], None]) -> None:
        """Call `notify` whenever another connection, of this process or another, has committed."""
        with self.loop_engine.connect() as connection:
            driver = connection.connection.dbapi_connection  # through SQLAlchemy it takes twenty times as long
            assert driver is not None
            previous = None
            while True:
                try:
                    version = driver.execute("PRAGMA data_version").fetchone()
                except sqlite3.Error as error:  # maybe temporary
                    log.error("can't read data_version: %s", error)
                else:
                    if version != previous:
                        previous = version
                        notify()
                await asyncio.sleep(POLL_INTERVAL)

    @staticmethod
    def notify_listeners(session: Session) -> None:
        """Other processes poll `data_version`."""

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
        # The index of the write-ahead log is mapped memory: without room to grow, it is an I/O error.
        name = getattr(error, "sqlite_errorname", "")
        return name == "SQLITE_FULL" or name in ("SQLITE_IOERR_SHMSIZE", "SQLITE_IOERR_WRITE")


def _begun(session: Session) -> Connection | None:
    """Begin the transaction; None while a program without our lock (Litestream, a shell) writes."""
    try:
        return session.connection()
    except OperationalError as error:
        if getattr(error.orig, "sqlite_errorname", "").startswith("SQLITE_BUSY"):
            return None
        raise


class WriteLock:
    """Held around each write transaction, by one thread of all processes.

    SQLite's busy handler sleeps and retries: beside an import, a writer of another process waited for seconds, and
    sometimes in vain. flock wakes waiters in turn.
    """

    def __init__(self, path: str) -> None:
        self.threads = threading.Lock()
        self.file = open(path, "a")  # noqa: SIM115  # closed in `close`

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
        """Acquire it without waiting; False if it is held."""
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
            if sys.platform != "win32":  # without flock, SQLite's busy handler remains
                fcntl.flock(self.file, fcntl.LOCK_EX | how)
        except BaseException:
            self.threads.release()
            raise

    def close(self) -> None:
        self.file.close()


def on_connect(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # sqlite3's implicit BEGIN is late and deferred
    for name, value in PRAGMAS.items():
        connection.execute(f"PRAGMA {name}={value}")


def on_begin(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("immediate") else "BEGIN")


@contextmanager
def sqlite_migration(url: str) -> Iterator[Connection]:
    """A transaction for the migrations, which other processes wait for."""
    engine = create_engine(url)
    event.listen(engine, "connect", on_connect)
    # Rebuilding a table drops it, which would cascade to the rows that refer to it.
    event.listen(engine, "connect", lambda connection, _record: connection.execute("PRAGMA foreign_keys=OFF"))
    event.listen(engine, "begin", on_begin)
    try:
        with engine.connect().execution_options(immediate=True) as connection, connection.begin():
            yield connection
    finally:
        engine.dispose()


# --- compiled statements ------------------------------------------------------------------------------------------


class CompiledQuery:
    """A statement compiled once, whose values are bound by name. Columns come as stored: numbers and text.

    SQLAlchemy's cache of compiled statements takes longer to look into than SQLite takes to find a row, and its unit of
    work ten times as long as SQLite takes to insert one. An INSERT needs a value for every column but `id`.
    """

    def __init__(self, statement: Any) -> None:
        self.statement = statement

    @functools.cached_property
    def _compiled(self) -> tuple[str, dict[str, Any], list[tuple[str, Callable[[Any], Any]]]]:
        """The SQL, the values that are constants, and how the others are converted."""
        dialect: Any = sqlite_dialect(paramstyle="named", json_serializer=to_json)
        names = None
        if isinstance(self.statement, sa.Insert):
            names = [column.name for column in self.statement.table.columns if column.name != "id"]
        compiled = self.statement.compile(dialect=dialect, column_keys=names)
        binds = compiled.binds.items()
        converters = ((name, bind.type.dialect_impl(dialect).bind_processor(dialect)) for name, bind in binds)
        processors = [(name, process) for name, process in converters if process]
        constants = {name: bind.value for name, bind in binds if not bind.required}
        constants |= {name: process(constants[name]) for name, process in processors if name in constants}
        return str(compiled), constants, processors

    def _bind(self, values: Values) -> dict[str, Any]:
        _, constants, processors = self._compiled
        processed = {name: process(values[name]) for name, process in processors if name in values}
        return {**constants, **values, **processed}

    def all(self, connection: Connection | Session, values: Values = MappingProxyType({})) -> Sequence[Any]:
        if is_postgresql():
            result = _core(connection).execute(self.statement, dict(values))
            return result.all() if result.returns_rows else []
        rows: list[Any] = _execute(_driver(connection).execute, self._compiled[0], self._bind(values)).fetchall()
        return rows

    def first(self, connection: Connection | Session, values: Values = MappingProxyType({})) -> Any:
        rows = self.all(connection, values)
        return rows[0] if rows else None

    def execute_many(
        self, connection: Connection | Session, rows: Sequence[Values], common: Values = MappingProxyType({})
    ) -> None:
        """For an INSERT without RETURNING; `common` are values of all rows. Ids are in their order, without gaps."""
        database = backend()
        if not isinstance(database, Sqlite):
            database.copy_rows(_core(connection), self.statement.table, [{**row, **common} for row in rows])
            return
        # By position, with common values converted once: a dict for each row took a tenth of the time of an import.
        compiled: Any = self.statement.compile(dialect=sqlite_dialect(), column_keys=[*rows[0], *common])
        processors, columns = {name: p for name, p in self._compiled[2] if name not in common}, []
        bound = {name: [value] * len(rows) for name, value in self._bind(common).items()}
        for name in compiled.positiontup:
            cells = bound.get(name) or [row[name] for row in rows]
            columns.append(map(processors[name], cells) if name in processors else cells)
        _execute(_driver(connection).executemany, str(compiled), zip(*columns, strict=True))


def _driver(connection: Connection | Session) -> Any:
    return _core(connection).connection.dbapi_connection


def _core(connection: Connection | Session) -> Connection:
    if isinstance(connection, Session):
        # SQLAlchemy takes as long to find a session's connection as SQLite to insert a row.
        return connection.info.get("connection") or connection.connection()
    return connection


def _execute(run: Callable[[str, Any], Any], sql: str, values: Any) -> Any:
    try:
        return run(sql, values)
    except sqlite3.IntegrityError as error:
        raise IntegrityError(sql, None, error) from error
    except sqlite3.Error as error:
        raise OperationalError(sql, None, error) from error
