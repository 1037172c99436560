"""Hot reads: statements that are compiled once, and whose rows the database itself makes JSON of.

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
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

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
        bound = {**constants, **(values or {})}
        driver: Any = connection.connection.dbapi_connection
        try:
            return list(driver.execute(sql, bound))
        except sqlite3.Error as error:
            raise OperationalError(sql, bound, error) from error

    def first(self, connection: Connection, values: Mapping[str, Any] | None = None) -> Any:
        found = self.all(connection, values)
        return found[0] if found else None


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
