"""The SQLite file: one writer at a time, readers that never wait, and short reads without a thread hop."""

import asyncio
import logging
import re
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import repeat
from operator import itemgetter
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Table, create_engine, event, insert
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlmodel import Session, SQLModel

if sys.platform != "win32":
    import fcntl

log = logging.getLogger("books.sqlite")

PATIENCE = 10  # seconds that a writer waits for the others of this process, and for those of another
PRAGMAS = {
    "journal_mode": "WAL",  # readers never wait for the writer, nor it for them
    "synchronous": "NORMAL",  # with WAL a power cut may cost the last commits, never the file
    "foreign_keys": "ON",  # off by default in SQLite; cascades and references rely on it
    "busy_timeout": f"{PATIENCE}000",  # ms that a writer waits for another process's transaction
    "cache_size": "-2000",  # KiB a connection, of which there may be a dozen; the system keeps the file's pages, too
    "temp_store": "MEMORY",  # sorts of a page's worth of rows need no file
    "recursive_triggers": "ON",  # so that REPLACE, too, would tell the search index of the row it removes
}
WRITERS_CACHE = "-16000"  # KiB
POLL_SECONDS = 0.1  # how often other processes' commits are looked for: 3 µs each time


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
        self.turns = asyncio.Lock()
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

    async def watch(self, nudge: Callable[[], None]) -> None:
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
                        nudge()
                await asyncio.sleep(POLL_SECONDS)

    @staticmethod
    def announce(session: Session) -> None:
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
        if not self.threads.acquire(timeout=PATIENCE):
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
def migrating(url: str) -> Iterator[Connection]:
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


def copy_to(source: str, target: Path) -> None:
    """A copy of the file as of one moment, while others write; in one file, without a write-ahead log."""
    with sqlite3.connect(source) as live, sqlite3.connect(target) as copy:
        live.backup(copy)
        copy.execute("PRAGMA journal_mode=DELETE")
    live.close()
    copy.close()
