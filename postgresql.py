"""PostgreSQL: the guarantees of the SQLite file, for more than one machine."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import psycopg
from sqlalchemy import Engine, NullPool, Table, create_engine, event
from sqlalchemy.exc import IntegrityError

# One writer at a time, as on SQLite. Event ids are handed out at insert, not at commit: without the lock, a reader of
# the log skips an event that commits late. Taken at the start of a transaction, before any row lock, so that the two
# can't deadlock.
WRITE_LOCK, MIGRATION_LOCK = 0x626F6F6B, 0x626F6F6C
OPTIONS = (
    "-c timezone=UTC"
    " -c lock_timeout=1s"  # of a writer, which tries again
    " -c idle_in_transaction_session_timeout=60s"  # a hanging process must not hold the lock for ever
)
MAX_READ_TIME = 5  # seconds; a job's or a writer's statement may take longer
KEEPALIVES: dict[str, Any] = {"keepalives_idle": 15, "keepalives_interval": 5, "keepalives_count": 3}


class Postgresql:
    kind = "postgresql"
    threads = 5  # beside a writer and two jobs: the smallest plans allow 20 connections, for two processes
    begin_read = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"  # one snapshot for all statements
    begin_write = f"BEGIN; SELECT pg_advisory_xact_lock({WRITE_LOCK})"
    driver_error = psycopg.Error
    loop_driver, ticks = None, 0  # reads run in threads

    def __init__(self, url: str, to_json: Callable[[object], str]) -> None:
        def engine(options: str, **pool: Any) -> Engine:
            connect_args = {"options": options, "connect_timeout": 10, **KEEPALIVES}
            # AUTOCOMMIT: `database` begins and ends transactions.
            own = {"isolation_level": "AUTOCOMMIT", "skip_autocommit_rollback": True, "json_serializer": to_json}
            return create_engine(url, connect_args=connect_args, **own, **pool)

        self.engine = engine(f"{OPTIONS} -c statement_timeout={MAX_READ_TIME}s", pool_size=self.threads, max_overflow=4)
        # A change is not tried again where its connection turns out to be broken.
        self.writer = engine(OPTIONS, pool_size=3, max_overflow=0, pool_timeout=10, pool_pre_ping=True)
        self.dialect = self.engine.dialect

    def close(self) -> None:
        self.writer.dispose()
        self.engine.dispose()

    @staticmethod
    def insert_many(driver: Any, table: Table, names: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """By COPY, in a quarter of the time of multi-row INSERTs and an eighth of executemany's: triggers run once a
        statement."""
        with driver.cursor() as cursor, cursor.copy(f'COPY "{table.name}" ({", ".join(names)}) FROM STDIN') as copy:
            for row in rows:
                copy.write_row(row)

    @staticmethod
    def violation(error: IntegrityError) -> tuple[str, str]:
        assert isinstance(error.orig, psycopg.Error)
        diagnostics, table = error.orig.diag, error.orig.diag.table_name
        name = diagnostics.constraint_name or ""
        if isinstance(error.orig, psycopg.errors.UniqueViolation):
            return "unique", name.removeprefix(f"uq_{table}_")
        if isinstance(error.orig, psycopg.errors.CheckViolation):
            return "check", name.removeprefix(f"ck_{table}_")
        if isinstance(error.orig, psycopg.errors.NotNullViolation):
            return "check", diagnostics.column_name or ""
        return "reference", ""

    @staticmethod
    def is_full(error: object) -> bool:
        return isinstance(error, psycopg.errors.DiskFull)

    @staticmethod
    def is_busy(error: Exception) -> bool:
        """Whether another writer has the lock."""
        return isinstance(getattr(error, "orig", None), psycopg.errors.LockNotAvailable)


def migration_engine(url: str) -> Engine:
    """Its transactions begin with the lock that other processes wait for."""
    engine = create_engine(url, poolclass=NullPool, connect_args={"connect_timeout": 10})
    lock = f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})"
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql(lock))
    return engine
