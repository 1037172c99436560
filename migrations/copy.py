"""Copies all data of an SQLite file to an empty PostgreSQL database, with all ids.

    DATABASE_URL=postgresql://user:password@host/name python -m migrations.copy /var/lib/books/books.db

Stop the service before. The file must be of this version; the tables of the target are created. All is copied in one
transaction, or nothing.
"""

import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import sqlalchemy as sa
from sqlalchemy import Connection
from sqlmodel import SQLModel

import database
import models  # noqa: F401  # the tables
from postgresql import WRITE_LOCK, Postgresql, migration_engine
from settings import settings

BATCH = 1000  # rows
BLOBS = 10  # rows with a piece of a file


class Refused(Exception):
    """Why nothing was copied."""


def as_stored(table: sa.Table) -> sa.Table:
    """The table with JSON as text: its null and SQL's are one value in Python."""
    columns = (sa.Column(c.name, sa.Text() if isinstance(c.type, sa.JSON) else c.type) for c in table.columns)
    return sa.Table(table.name, sa.MetaData(), *columns)


TABLES = [as_stored(table) for table in SQLModel.metadata.sorted_tables]


@contextmanager
def opened(file: Path) -> Iterator[Connection]:
    """A transaction on the file that keeps others from writing."""
    if not file.is_file():
        raise Refused(f"{file} does not exist")
    engine = sa.create_engine(f"sqlite:///{file}")
    database.configure(engine, {"busy_timeout": "0"})
    sa.event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    try:
        with engine.connect() as connection:
            yield connection
    except sa.exc.DatabaseError as error:
        if isinstance(error.orig, sqlite3.Error):
            raise Refused(f"{file} can't be read ({error.orig}): is the service stopped?") from None
        raise
    finally:
        engine.dispose()


def require_same_version(source: Connection, target: Connection, file: Path) -> None:
    revision: sa.Select[Any] = sa.select(sa.column("version_num")).select_from(sa.table("alembic_version"))
    if not sa.inspect(source).has_table("alembic_version"):
        raise Refused(f"{file} is no database of this service")
    found, needed = source.scalar(revision), target.scalar(revision)
    if found != needed:
        raise Refused(f"{file} has revision {found}, not {needed}: start this version of the service on it once")


def count_rows(connection: Connection) -> dict[str, int]:
    return {table.name: connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0 for table in TABLES}


def require_empty(target: Connection) -> None:
    """Settings do not count: the migrations have written some."""
    filled = [name for name, rows in count_rows(target).items() if rows and name != "setting"]
    if filled:
        raise Refused(f"the target is not empty; it has rows in: {', '.join(filled)}")


def copy_table(source: Connection, target: Connection, table: sa.Table) -> int:
    copied, has_blobs = 0, any(isinstance(column.type, sa.LargeBinary) for column in table.columns)
    types: list[Any] = [column.type.dialect_impl(target.dialect) for column in table.columns]
    processors = [type_.bind_processor(target.dialect) or (lambda value: value) for type_ in types]
    names = [column.name for column in table.columns]
    for batch in source.execute(sa.select(table)).partitions(BLOBS if has_blobs else BATCH):
        rows = [[process(value) for process, value in zip(processors, row, strict=True)] for row in batch]
        Postgresql.insert_many(target.connection.dbapi_connection, table, names, rows)
        copied += len(rows)
    return copied


def copy_sequences(source: Connection, target: Connection) -> None:
    """Ids of deleted rows are not used again, either."""
    for name, last in source.execute(sa.text("SELECT name, seq FROM sqlite_sequence WHERE seq > 0")).all():
        sequence = sa.func.pg_get_serial_sequence(f'"{name}"', "id")
        target.execute(sa.select(sa.func.setval(sequence, last)))


def copy(file: Path, url: str) -> None:
    started = time.monotonic()
    database.migrate(url)
    with opened(file) as source, migration_engine(url).begin() as target:
        target.execute(sa.select(sa.func.pg_advisory_xact_lock(WRITE_LOCK)))
        require_same_version(source, target, file)
        require_empty(target)
        target.execute(sa.text("DELETE FROM setting"))
        expected = count_rows(source)
        for table in TABLES:
            # What triggers maintain is copied, too.
            target.execute(sa.text(f'ALTER TABLE "{table.name}" DISABLE TRIGGER USER'))
            rows = copy_table(source, target, table)
            target.execute(sa.text(f'ALTER TABLE "{table.name}" ENABLE TRIGGER USER'))
            print(f"{table.name:20}{rows:>12,}", flush=True)
        target.execute(sa.text("INSERT INTO word SELECT DISTINCT plain_words(words) FROM book"))  # of no model
        copy_sequences(source, target)
        if (found := count_rows(target)) != expected:
            raise Refused(f"the counts differ: {expected} in the file, {found} in the target")
    with closing(Postgresql(url, database.to_json)) as backend, backend.engine.connect() as connection:
        connection.execute(sa.text("ANALYZE"))
    seconds = time.monotonic() - started
    print(f"{sum(expected.values()):,} rows in {seconds:.1f} s. The target has the same count of rows in every table.")


def main(arguments: list[str], url: str = settings.database_url) -> Any:
    if len(arguments) != 1 or not url.startswith("postgresql"):
        return "usage: DATABASE_URL=postgresql://user:password@host/name python -m migrations.copy books.db"
    try:
        return copy(Path(arguments[0]), url)
    except (Refused, psycopg.Error, sa.exc.DBAPIError) as error:
        return f"Nothing was copied: {getattr(error, 'orig', error)}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
