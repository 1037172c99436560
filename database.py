"""The database: engine, transactions, compiled statements, migrations and constraint violations."""

import asyncio
import functools
import json
import re
import signal
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import anyio.to_thread
import sqlalchemy as sa
from sqlalchemy import Connection, create_engine, event
from sqlalchemy.dialects.sqlite import dialect as sqlite_dialect
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlmodel import Session, SQLModel

if TYPE_CHECKING:
    from alembic.config import Config

    from postgresql import Postgresql

MAX_GROUP_TIME = 0.01  # seconds in which changes join a transaction; one of 32 new books takes 4 ms
RETRY_INTERVAL = 0.001  # seconds between tries to begin a transaction while another process has the lock
CHECKPOINT_AFTER = 50  # transactions, of some 80 KB each in the write-ahead log
THREADS = {"imports": 2, "lookups": 1, "commits": 1}  # of each kind, and as many connections that write
# A read on the event loop may take STEPS * MAX_TICKS steps of SQLite's virtual machine, some 1 ms. SQLite calls the
# progress handler after each STEPS of a prepared statement, counted over all its executions.
STEPS, MAX_TICKS = 1000, 30
MAX_READ_TIME = 5  # seconds, in a thread
INTERRUPTED = "interrupted"  # SQLite's message then
T = TypeVar("T")
P = ParamSpec("P")
Values = Mapping[str, Any]


# Compact JSON in UTF-8, as it is stored and streamed, and in cursors (PostgreSQL's sort keys are decimals).
to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=float).encode

Change = tuple[Callable[..., Any], Any, Any]  # and its arguments


class _Queued(NamedTuple):
    change: Change
    done: "asyncio.Future[Any]"
    deadline: float  # for the begin of its transaction


class _Database:
    """The engines, thread limits and queued changes of this process, between `open_database` and `close_database`."""

    def __init__(self, url: str) -> None:
        is_sqlite = url.startswith("sqlite")
        self.backend: Sqlite | Postgresql = Sqlite(url) if is_sqlite else _postgresql().Postgresql(url, to_json)
        self.readers = anyio.CapacityLimiter(self.backend.threads)
        self.threads = {kind: anyio.CapacityLimiter(threads) for kind, threads in THREADS.items()}
        self.changes: deque[_Queued] = deque()
        self.committer: asyncio.Task[None] | None = None
        self.after_commit: Callable[[], object] = lambda: None

    async def commit_changes(self) -> None:
        """Commit the queued changes in groups, until none is left."""
        while self.changes:
            group: list[_Queued] = []
            try:
                if isinstance(self.backend, Sqlite):
                    outcomes = _commit(self.backend.loop_writer, self._take(group))
                    self.backend.uncheckpointed += 1
                else:
                    outcomes = await run_job("commits", _commit_with, self.backend.writer, self._take(group))
            except Exception as error:  # whatever it is, each of the group is to be answered
                if not group:  # the transaction could not begin
                    is_busy, now = self.backend.is_busy(error), time.monotonic()
                    while self.changes and (self.changes[0].deadline <= now or not is_busy):
                        group.append(self.changes.popleft())
                    await asyncio.sleep(RETRY_INTERVAL)
                outcomes = [error] * len(group)
            for (_, done, _), outcome in zip(group, outcomes, strict=True):
                if not done.done():
                    if isinstance(outcome, Exception):
                        done.set_exception(outcome)
                    else:
                        done.set_result(outcome)
            await asyncio.sleep(0)

    def _take(self, group: list[_Queued]) -> Iterator[Change]:
        """Move queued changes into `group`, for as long as others can wait."""
        deadline = time.monotonic() + MAX_GROUP_TIME
        while self.changes and time.monotonic() < deadline:
            queued = self.changes.popleft()
            if not queued.done.cancelled():
                group.append(queued)
                yield queued.change


def _postgresql() -> Any:
    import postgresql  # noqa: PLC0415  # its driver takes 10 MB and 0.1 s, which few need

    return postgresql


class _Open:
    database: _Database


def backend() -> "Sqlite | Postgresql":
    return _Open.database.backend


def is_postgresql() -> bool:
    return backend().kind == "postgresql"


def open_database(url: str) -> None:
    """Open `url` for this process and run missing migrations. Call it on the event loop."""
    migrate(url)
    _Open.database = _Database(url)


def call_after_commit(function: Callable[[], object]) -> None:
    """Call it after each commit of this process, in the thread of the commit."""
    _Open.database.after_commit = function


async def close_database() -> None:
    _Open.database.changes.clear()  # of jobs that are cancelled
    if _Open.database.committer is not None:
        await _Open.database.committer
    backend().close()
    del _Open.database


# --- reads and writes ---------------------------------------------------------------------------------------------

Read = Callable[Concatenate[Connection, P], T]
Write = Callable[Concatenate[Session, P], T]


async def read(query: Read[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """A read, as one snapshot. It may be run twice."""
    database = _Open.database
    if isinstance(database.backend, Sqlite):
        database.backend.ticks = 0
        try:
            return _query(database.backend.loop_reader, query, *args, **kwargs)
        except OperationalError as error:
            if str(error.orig) != INTERRUPTED:
                raise
    in_thread = functools.partial(read_sync, query, *args, **kwargs)
    return await anyio.to_thread.run_sync(in_thread, limiter=database.readers)


def read_sync(query: Read[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """`read` for code that runs in a thread."""
    engine = backend().engine
    try:
        with engine.connect() as connection:
            return _query(connection, query, *args, **kwargs)
    except OperationalError as error:
        if getattr(error.orig, "sqlstate", "57014") == "57014":  # on SQLite, or after too long
            raise
    engine.dispose()  # after a restart of the server, all connections of the pool are broken
    with engine.connect() as connection:
        return _query(connection, query, *args, **kwargs)


def require_thread(connection: Connection | Session) -> None:
    """For a read that may spend its time in single steps, which no budget interrupts."""
    if _driver(connection) is backend().loop_driver:
        raise OperationalError("", None, sqlite3.OperationalError(INTERRUPTED))


def _query(connection: Connection, query: Read[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    if isinstance(getattr(query, "__self__", None), CompiledQuery):  # one statement is one snapshot
        return query(connection, *args, **kwargs)
    with _transaction(connection, backend().begin_read):
        return query(connection, *args, **kwargs)


async def write(change: Write[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """A short change: it is committed when this returns, and undone if `change` raises. It blocks the event loop."""
    database = _Open.database
    done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
    database.changes.append(_Queued((change, args, kwargs), done, time.monotonic() + BUSY_TIMEOUT))
    if database.committer is None or database.committer.done():
        database.committer = asyncio.create_task(database.commit_changes())
    return await done


def write_sync(change: Write[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """`write` for code that runs in a thread, in a transaction of its own."""
    changes, deadline = [(change, args, kwargs)], time.monotonic() + BUSY_TIMEOUT
    while True:
        try:
            result: T = _commit_with(backend().writer, changes, alone=True)[0]
            return result
        except OperationalError as error:
            if not backend().is_busy(error) or time.monotonic() > deadline:
                raise
            time.sleep(RETRY_INTERVAL)


def _commit(connection: Connection, changes: Iterable[Change], *, alone: bool = False) -> list[Any]:
    """Run the changes in one transaction; their results, or the errors of those that raised and were undone. One that
    is alone needs no savepoint, which would double the time of an import."""
    outcomes: list[Any] = []
    execute = _driver(connection).execute
    # The driver's transaction is committed; the session only flushes, and its rollback only discards its objects.
    with _transaction(connection, backend().begin_write), Session(connection) as session:
        session.info.update(connection=connection, deferred={})
        previous: Any = None
        for function, args, kwargs in changes:
            if function is not previous:  # which may need what was deferred, as the update of a new book its index
                _run_deferred(session)
            previous = function
            if not alone:
                _call(execute, "SAVEPOINT change")
            try:
                outcome = function(session, *args, **kwargs)
                session.flush()
            except Exception as error:  # of this change, which is answered with it
                if alone:
                    raise
                outcome = RuntimeError(repr(error)) if isinstance(error, StopIteration) else error  # no future takes it
                session.rollback()
                try:
                    _call(execute, "ROLLBACK TO change")
                except DBAPIError as lost:  # a full disk, or a lost connection, has ended the transaction
                    raise (error if isinstance(error, OperationalError) else lost) from None
            if not alone:
                _call(execute, "RELEASE change")
            session.expunge_all()
            outcomes.append(outcome)
        _run_deferred(session)
    _Open.database.after_commit()
    return outcomes


def _commit_with(engine: sa.Engine, changes: Iterable[Change], *, alone: bool = False) -> list[Any]:
    with engine.connect() as connection:
        return _commit(connection, changes, alone=alone)


def defer(session: Session, function: Callable[[Session, list[Any]], object], value: object) -> None:
    """Call `function(session, values)` once before the commit, or before a change of another kind, with the values
    deferred so far. Some of them may belong to changes that were rolled back."""
    session.info["deferred"].setdefault(function, []).append(value)


def _run_deferred(session: Session) -> None:
    for function, values in session.info["deferred"].items():
        function(session, values)
    session.info["deferred"].clear()


@contextmanager
def _transaction(connection: Connection, begin: str) -> Iterator[None]:
    """A transaction by the driver: SQLAlchemy's takes twenty times as long as SQLite's."""
    driver = _driver(connection)
    try:
        _call(driver.execute, begin)
        yield
        _call(driver.execute, "COMMIT")
    except BaseException:
        with suppress(backend().driver_error):
            driver.rollback()
        raise


async def run_job(kind: str, job: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """A long job in a thread, with transactions of its own. Of each kind, at most `THREADS` run at once."""
    return await anyio.to_thread.run_sync(functools.partial(job, *args, **kwargs), limiter=_Open.database.threads[kind])


def server_is_stopping() -> bool:
    """Whether uvicorn was told to stop. Lifespan shutdown comes only after the jobs have ended, which is too late."""
    return bool(getattr(getattr(signal.getsignal(signal.SIGTERM), "__self__", None), "should_exit", False))


async def checkpoint_wal() -> None:
    """Move what `write` has committed from the write-ahead log into the file. Call it every second."""
    sqlite = backend()
    if isinstance(sqlite, Sqlite) and sqlite.uncheckpointed >= CHECKPOINT_AFTER:
        await anyio.to_thread.run_sync(sqlite.checkpoint)


# --- migrations and constraint violations -------------------------------------------------------------------------

MIGRATIONS = Path(__file__).resolve().parent / "migrations"


def migrate(url: str) -> None:
    """Run missing migrations. Of several processes that start at once, the first runs them."""
    engine = migration_engine(url) if url.startswith("sqlite") else _postgresql().migration_engine(url)
    with engine.begin() as connection:
        revision = None
        if sa.inspect(connection).has_table("alembic_version"):
            revision = connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()
        if revision == max(path.stem[:4] for path in (MIGRATIONS / "versions").glob("0*.py")):
            return
        from alembic import command  # noqa: PLC0415  # not loaded where nothing is to be migrated

        command.upgrade(_alembic(connection), "head")


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
    return backend().is_full(getattr(error, "orig", None) or error)


# --- SQLite -------------------------------------------------------------------------------------------------------

BUSY_TIMEOUT = 10  # seconds that a writer waits for others
PRAGMAS = {
    "journal_mode": "WAL",  # readers and the writer do not block each other
    "synchronous": "NORMAL",  # with WAL, a power cut may cost the last commits, but never corrupts the file
    "foreign_keys": "ON",  # off by default in SQLite
    "busy_timeout": f"{BUSY_TIMEOUT}000",  # ms
    "cache_size": "-2000",  # KiB a connection, of up to a dozen; the system caches the file's pages, too
    "mmap_size": f"{32 << 20}",  # bytes at the beginning of the file that are read without a system call for each page
    "temp_store": "MEMORY",  # sorting a page of rows needs no file
    "recursive_triggers": "ON",  # REPLACE must update the search index, too
    "secure_delete": "FAST",  # Debian's SQLite overwrites what is deleted: 0.6 s for an imported file of 100 MB
}
WRITER_PRAGMAS = {
    "cache_size": "-16000",  # KiB; holds what a batch of an import changes
    "busy_timeout": "0",  # `write` and `write_sync` try again: SQLite does so ever more rarely
}


class Sqlite:
    kind = "sqlite"
    threads = 2  # for reads beyond their budget; with more, they keep the event loop from the processor
    begin_read = "BEGIN"
    # A deferred transaction that reads first and writes later fails at once ("database is locked").
    begin_write = "BEGIN IMMEDIATE"
    driver_error: type[Exception] = sqlite3.Error
    dialect: Any = sqlite_dialect(paramstyle="named", json_serializer=to_json)

    def __init__(self, url: str) -> None:
        # AUTOCOMMIT: `_transaction` begins and ends transactions.
        options = {"isolation_level": "AUTOCOMMIT", "skip_autocommit_rollback": True, "json_serializer": to_json}
        self.engine = create_engine(url, pool_size=8, max_overflow=4, **options)
        writers = sum(THREADS.values())
        self.writer = create_engine(url, pool_size=writers, max_overflow=0, pool_timeout=BUSY_TIMEOUT, **options)
        configure(self.engine, PRAGMAS)
        configure(self.writer, PRAGMAS | WRITER_PRAGMAS)
        self.loop_reader, self.loop_writer = self.engine.connect(), self.writer.connect()
        self.loop_driver = _driver(self.loop_reader)
        self.ticks = self.uncheckpointed = 0  # uncheckpointed: transactions since the last checkpoint
        self.loop_driver.set_progress_handler(self._exceeds_budget, STEPS)
        _driver(self.loop_writer).execute("PRAGMA wal_autocheckpoint=0")  # left to `checkpoint_wal`: the disk is slow

        @event.listens_for(self.engine, "checkout")
        def limit_time(driver: Any, *_: object) -> None:
            deadline = time.monotonic() + MAX_READ_TIME
            # Rarely: each call waits for the GIL.
            driver.set_progress_handler(lambda: time.monotonic() > deadline, 100 * STEPS)

    def close(self) -> None:
        self.loop_reader.close()
        self.loop_writer.close()
        self.writer.dispose()
        self.engine.dispose()

    def _exceeds_budget(self) -> bool:
        self.ticks = (self.ticks + 1) % (MAX_TICKS + 1)  # 0 for the ROLLBACK
        return not self.ticks

    def checkpoint(self) -> None:
        """Shorten the write-ahead log, which slows every read: most of it beside writers, the rest without them."""
        self.uncheckpointed = 0
        with self.engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA wal_checkpoint(PASSIVE)")
            write_sync(lambda _session: connection.exec_driver_sql("PRAGMA wal_checkpoint(PASSIVE)"))

    @staticmethod
    def insert_many(driver: Any, table: sa.Table, names: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        driver.executemany(str(table.insert().compile(dialect=sqlite_dialect(), column_keys=names)), rows)

    @staticmethod
    def is_busy(error: Exception) -> bool:
        """Whether another writer has the lock."""
        return getattr(getattr(error, "orig", None), "sqlite_errorname", "").startswith("SQLITE_BUSY")

    @staticmethod
    def violation(error: IntegrityError) -> tuple[str, str]:
        """UNIQUE failures name columns or the index, CHECK failures the constraint, references nothing."""
        text = str(error.orig)
        if match := re.search(r"UNIQUE constraint failed: (?:index 'uq_[a-z]+_(\w+)'|.*\.(\w+)$)", text):
            return "unique", match[1] or match[2]
        if match := re.search(r"CHECK constraint failed: ck_(\w+)$", text):
            table = next((name for name in SQLModel.metadata.tables if match[1].startswith(f"{name}_")), "")
            return "check", match[1].removeprefix(f"{table}_")
        if match := re.search(r"NOT NULL constraint failed: \w+\.(\w+)$", text):
            return "check", match[1]
        return "reference", ""

    @staticmethod
    def is_full(error: object) -> bool:
        # The index of the write-ahead log is mapped memory: without room to grow, it is an I/O error.
        return getattr(error, "sqlite_errorname", "") in ("SQLITE_FULL", "SQLITE_IOERR_SHMSIZE", "SQLITE_IOERR_WRITE")


def configure(engine: sa.Engine, pragmas: Mapping[str, str]) -> None:
    @event.listens_for(engine, "connect")
    def on_connect(connection: Any, _record: object) -> None:
        connection.isolation_level = None  # sqlite3's implicit BEGIN is late and deferred
        # SQLite's own folds only ASCII.
        connection.create_function("lower", 1, lambda text: text and text.lower(), deterministic=True)
        for name, value in pragmas.items():
            connection.execute(f"PRAGMA {name}={value}")


def migration_engine(url: str) -> sa.Engine:
    """Its transactions begin with the lock that other processes wait for."""
    engine = create_engine(url, poolclass=sa.NullPool)
    # Rebuilding a table drops it, which would cascade to the rows that refer to it.
    configure(engine, PRAGMAS | {"foreign_keys": "OFF"})
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    return engine


# --- compiled statements ------------------------------------------------------------------------------------------


class CompiledQuery:
    """A statement compiled once, whose values are bound by name. Columns come as stored: numbers and text.

    SQLAlchemy's cache of compiled statements takes longer to look into than SQLite takes to find a row, and its unit of
    work ten times as long as SQLite takes to insert one. An INSERT needs a value for every column but `id`.
    """

    def __init__(self, statement: Any) -> None:
        self.statement = statement
        self.too_long: dict[str, int] = {}  # values that exceeded a read's budget, and the least `start` among them

    @functools.cached_property
    def _compiled(self) -> tuple[str, dict[str, Any], list[tuple[str, Callable[[Any], Any]]]]:
        """The SQL, the values that are constants, and how the others are converted."""
        dialect = backend().dialect
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

    def all(self, connection: Connection | Session, values: Values = MappingProxyType({})) -> list[Any]:
        driver, bound, ticks = _driver(connection), self._bind(values), backend().ticks
        if self.too_long and bound.get("start", 0) >= self.too_long.get(str({**bound, "start": 0}), float("inf")):
            require_thread(connection)
        try:
            return _call(_fetch_all, driver, self._compiled[0], bound)
        except OperationalError as error:
            if str(error.orig) == INTERRUPTED and ticks <= MAX_TICKS // 2:  # most of the budget was this statement's
                if len(self.too_long) >= 1000:
                    self.too_long.clear()
                self.too_long[str({**bound, "start": 0})] = bound.get("start", 0)  # of an offset
            raise

    def first(self, connection: Connection | Session, values: Values = MappingProxyType({})) -> Any:
        return next(iter(self.all(connection, values)), None)


def insert_many(
    connection: Connection | Session, model: Any, rows: Sequence[Values], common: Values = MappingProxyType({})
) -> None:
    """Insert rows with the same columns; `common` are values of all of them. Ids are in their order, without gaps."""
    table, dialect, columns = model.__table__, backend().dialect, []
    names = [column.name for column in table.columns if column.name in rows[0] or column.name in common]
    for name in names:  # a dict for each row took a tenth of the time of an import
        cells = [common[name]] if name in common else [row[name] for row in rows]
        process = table.c[name].type.dialect_impl(dialect).bind_processor(dialect)
        cells = [*map(process, cells)] if process else cells
        columns.append(cells * len(rows) if name in common else cells)
    _call(backend().insert_many, _driver(connection), table, names, zip(*columns, strict=True))


def _fetch_all(driver: Any, sql: str, values: Values) -> list[Any]:
    cursor = driver.execute(sql, values)
    return cursor.fetchall() if cursor.description else []


def _driver(connection: Connection | Session) -> Any:
    core = connection.info["connection"] if isinstance(connection, Session) else connection
    return core.connection.dbapi_connection


def _call(function: Callable[..., T], *args: Any) -> T:
    """Call the driver. Its errors become SQLAlchemy's."""
    try:
        return function(*args)
    except backend().driver_error as error:
        raise DBAPIError.instance(function.__name__, None, error, Exception) from error
