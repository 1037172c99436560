"""The hot paths: statements that are compiled once, and rows that the database itself makes JSON of.

SQLAlchemy's cache of compiled statements still takes longer to look into than SQLite takes to find a book, and dates
that become objects only to become text again take longer than the rest of a page.
"""

import functools
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection
from sqlalchemy.dialects.sqlite import dialect as sqlite_dialect
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement
from sqlmodel import Session

import database
from models import Cents, UtcDateTime


class Prepared:
    """A SELECT whose values are all bound by name. Its columns come as they are stored: numbers and texts."""

    def __init__(self, select: Any) -> None:
        self.select = select

    @functools.cached_property
    def _compiled(self) -> tuple[str, dict[str, Any]]:
        compiled = self.select.compile(dialect=sqlite_dialect(paramstyle="named"))
        return str(compiled), {name: value for name, value in compiled.params.items() if value is not None}

    def all(self, connection: Connection, values: Mapping[str, Any] | None = None) -> Sequence[Any]:
        if database.is_postgresql():
            return connection.execute(self.select, values).all()
        sql, constants = self._compiled
        rows: list[Any] = _run(connection, sql, {**constants, **(values or {})}).fetchall()
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
        dialect: Any = sqlite_dialect(paramstyle="named", json_serializer=database.to_json)
        kinds = {name: self.table.c[name].type.dialect_impl(dialect).bind_processor(dialect) for name in names}
        sql = str(sa.insert(self.table).compile(dialect=dialect, column_keys=names))
        return sql, [(name, process) for name, process in kinds.items() if process is not None]

    def __call__(self, session: Session, row: Mapping[str, Any]) -> int:
        """The new row's id. What has a default of its own in Python only must be given."""
        if database.is_postgresql():
            return int(session.execute(sa.insert(self.table).returning(self.table.c.id), row).scalar_one())
        sql, processed = self._compiled(tuple(row))
        stored = {name: process(row[name]) for name, process in processed}
        return int(_run(connection_of(session), sql, {**row, **stored}).lastrowid)


def connection_of(session: Session) -> Connection:
    """That of a transaction that has not ended. SQLAlchemy takes as long to find it as SQLite to insert a row."""
    kept: Connection | None = session.info.get("connection")
    return session.connection() if kept is None else kept


def _run(connection: Connection, sql: str, values: Mapping[str, Any]) -> Any:
    driver: Any = connection.connection.dbapi_connection
    try:
        return driver.execute(sql, values)
    except sqlite3.IntegrityError as error:
        raise IntegrityError(sql, values, error) from error
    except sqlite3.Error as error:
        raise OperationalError(sql, values, error) from error


class AsJson(FunctionElement[str]):
    """These columns as the text of a JSON object, as their shape would show them."""

    inherit_cache = False
    type = sa.Text()

    def __init__(self, columns: Mapping[str, Any]) -> None:
        self.names = [*columns]
        super().__init__(*columns.values())


def _pairs(element: AsJson, value: Callable[[Any], str]) -> str:
    return ", ".join(f"'{name}', {value(column)}" for name, column in zip(element.names, element.clauses, strict=True))


@compiles(AsJson, "sqlite")
def _json_object(element: AsJson, compiler: Any, **options: Any) -> str:
    def value(column: Any) -> str:
        if isinstance(column, AsJson):
            return _json_object(column, compiler, **options)
        text = str(compiler.process(getattr(column, "element", column), **options))
        if isinstance(column.type, UtcDateTime):
            return f"replace(replace({text}, ' ', 'T'), '.000000', '') || 'Z'"
        if isinstance(column.type, Cents):
            return f"{text} / 100.0"
        if isinstance(column.type, sa.JSON):
            return f"json({text})"
        if isinstance(column.type, sa.Float):  # in as few digits as tell it from all other numbers
            short, whole = (f"printf('%!.{digits}g', {text})" for digits in (15, 17))
            exact = f"CASE WHEN CAST({short} AS REAL) = {text} THEN {short} ELSE {whole} END"
            return f"CASE WHEN {text} IS NOT NULL THEN json({exact}) END"
        return text

    return f"json_object({_pairs(element, value)})"


@compiles(AsJson, "postgresql")
def _json_build_object(element: AsJson, compiler: Any, **options: Any) -> str:
    def built(element: AsJson) -> str:
        return f"json_build_object({_pairs(element, value)})"

    def value(column: Any) -> str:
        if isinstance(column, AsJson):
            return built(column)
        text = str(compiler.process(getattr(column, "element", column), **options))
        if isinstance(column.type, UtcDateTime):
            moment = f"to_char({text} AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')"
            return f"replace({moment}, '.000000Z', 'Z')"
        return f"({text} / 100.0)::float8" if isinstance(column.type, Cents) else text

    return f"{built(element)}::text"
