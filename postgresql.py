"""PostgreSQL: the same promises as the SQLite file gives, for more than one machine."""

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import anyio
import psycopg
from sqlalchemy import Connection, Table, create_engine, event, make_url
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session

log = logging.getLogger("books.postgresql")

# One writer at a time, as on SQLite. Ids of events are handed out when a row is inserted, not when it is committed: a
# reader of the log would pass over one that is committed late. Held from the start of a transaction, so that nobody
# has locked rows already for which others wait while they hold this.
WRITE_LOCK, MIGRATION_LOCK = 0x626F6F6B, 0x626F6F6C
CHANNEL = "books_events"
OPTIONS = (
    "-c timezone=UTC"
    " -c lock_timeout=10s"  # how long a writer waits for others
    " -c idle_in_transaction_session_timeout=60s"  # a process that hangs must not keep them waiting for ever
)
KEEPALIVES: dict[str, Any] = {"keepalives_idle": 15, "keepalives_interval": 5, "keepalives_count": 3}


class Postgresql:
    kind = "postgresql"
    threads = 5  # beside two that write and two of jobs: the smallest plans allow 20 connections, for two processes

    def __init__(self, url: str, to_json: Callable[[object], str]) -> None:
        self.url = url
        self.engine = create_engine(
            url,
            pool_size=self.threads,
            max_overflow=4,
            pool_pre_ping=True,  # a server that was restarted is no error to whoever asks next
            json_serializer=to_json,
            connect_args={"options": OPTIONS, "connect_timeout": 10, **KEEPALIVES},
        )
        # One moment for all statements of a read.
        self.reader = self.engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        self.writer = self.engine.execution_options(writes=True)
        event.listen(self.engine, "begin", take_write_lock)

    def close(self) -> None:
        self.engine.dispose()

    @staticmethod
    def insert_many(session: Session, table: Table, rows: Sequence[Mapping[str, Any]], same: Mapping[str, Any]) -> None:
        dialect = session.get_bind().dialect
        names = [*rows[0], *same]
        prepare = [table.c[name].type.dialect_impl(dialect).bind_processor(dialect) or _unchanged for name in names]
        connection: Any = session.connection().connection.dbapi_connection
        cursor = connection.cursor()
        columns = ", ".join(f'"{name}"' for name in names)
        with cursor, cursor.copy(f'COPY "{table.name}" ({columns}) FROM STDIN') as copy:
            for row in rows:
                copy.write_row([f(row[n] if n in row else same[n]) for n, f in zip(names, prepare, strict=True)])

    async def listen(self, notify: Callable[[], None]) -> None:
        """Nudge whenever somebody has committed an event; also after each new connection, for what went unheard."""
        address = make_url(self.url).set(drivername="postgresql").render_as_string(hide_password=False)
        while True:
            try:
                with anyio.CancelScope(shield=True):  # cut off in the middle, it would never be closed
                    listener = await psycopg.AsyncConnection.connect(
                        address, autocommit=True, connect_timeout=10, **KEEPALIVES
                    )
                try:
                    await listener.execute(f"LISTEN {CHANNEL}")
                    notify()
                    async for _ in listener.notifies():
                        notify()
                finally:  # its own `async with` rolls back first, which can't be done when this is cancelled
                    await listener.close()
            except psycopg.Error as error:
                log.error("lost the connection that listens for changes: %s", error)
            await asyncio.sleep(0.5)

    @staticmethod
    def notify_listeners(session: Session) -> None:
        """Tell the listeners, when this transaction is committed."""
        session.connection().exec_driver_sql(f"NOTIFY {CHANNEL}")

    @staticmethod
    def violation(error: IntegrityError) -> tuple[str, str]:
        assert isinstance(error.orig, psycopg.Error)
        told, table = error.orig.diag, error.orig.diag.table_name
        name = told.constraint_name or ""
        if isinstance(error.orig, psycopg.errors.UniqueViolation):
            return "unique", name.removeprefix(f"uq_{table}_")
        if isinstance(error.orig, psycopg.errors.CheckViolation):
            return "check", name.removeprefix(f"ck_{table}_")
        if isinstance(error.orig, psycopg.errors.NotNullViolation):
            return "check", told.column_name or ""
        return "reference", ""

    @staticmethod
    def is_full(error: object) -> bool:
        return isinstance(error, psycopg.errors.DiskFull)


def _unchanged(value: object) -> object:
    return value


def take_write_lock(connection: Connection) -> None:
    if connection.get_execution_options().get("writes"):
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({WRITE_LOCK})")


@contextmanager
def postgresql_migration(url: str) -> Iterator[Connection]:
    """A transaction that keeps other processes waiting, for the migrations."""
    engine = create_engine(url, connect_args={"connect_timeout": 10})
    try:
        with engine.begin() as connection:
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})")
            yield connection
    finally:
        engine.dispose()
