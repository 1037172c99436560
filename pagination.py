"""Lists: rows rendered as JSON by the database, pages by cursor or offset, and batches for exports.

A cursor holds the sort keys of the last row of its page, so that the next page is entered through an index: its cost
does not grow with depth, and rows inserted or deleted meanwhile neither repeat nor hide others (keyset pagination).
"""

import base64
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Generic, Literal, NamedTuple
from urllib.parse import quote

import sqlalchemy as sa
from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from pydantic import AfterValidator, BaseModel, Field, NaiveDatetime, TypeAdapter
from sqlalchemy import ColumnElement, Connection, and_, bindparam
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement
from sqlmodel import Session, UTCDateTime, col

import database
from database import CompiledQuery, T
from models import MAX_ID, Cents, Event, InvalidField, Setting
from schemas import BlankIsNull, RequestModel, pattern

Key = str | int | float
MAX_CURSOR = 20_000  # characters: two keys of any script
EXPORT_BATCH = 1000  # rows in memory at once

CSV_FILE = {"content": {"text/csv": {"schema": {"type": "string"}}}}

# --- rows as JSON -------------------------------------------------------------------------------------------------


class JsonObject(FunctionElement[str]):
    """Columns of a table as the text of a JSON object, as their response model would render them. `others` are fields
    that are not columns.

    Dates that become objects only to become text again take longer than the rest of a page.
    """

    inherit_cache = False
    type = sa.Text()

    def __init__(self, table: Any, model: Any, **others: Any) -> None:
        columns = {name: getattr(table, name, None) for name in model.model_fields} | others
        self.names = [*columns]
        super().__init__(*columns.values())


def _pairs(element: JsonObject, value: Callable[[Any], str]) -> str:
    return ", ".join(f"'{name}', {value(column)}" for name, column in zip(element.names, element.clauses, strict=True))


@compiles(JsonObject, "sqlite")
def _json_object(element: JsonObject, compiler: Any, **options: Any) -> str:
    def value(column: Any) -> str:
        text = str(compiler.process(column, **options))
        if isinstance(column.type, UTCDateTime):
            return f"replace(replace({text}, ' ', 'T'), '.000000', '') || 'Z'"
        if isinstance(column.type, Cents):
            return f"{text} / 100.0"
        if isinstance(column.type, sa.Boolean):
            return f"json(CASE {text} WHEN 1 THEN 'true' WHEN 0 THEN 'false' END)"
        if isinstance(column.type, sa.JSON):
            return f"json({text})"
        if isinstance(column.type, sa.Float):  # the shortest digits that round-trip
            short, whole = (f"printf('%!.{digits}g', {text})" for digits in (15, 17))
            exact = f"CASE WHEN CAST({short} AS REAL) = {text} THEN {short} ELSE {whole} END"
            return f"CASE WHEN {text} IS NOT NULL THEN json({exact}) END"
        return text

    return f"json_object({_pairs(element, value)})"


@compiles(JsonObject, "postgresql")
def _json_build_object(element: JsonObject, compiler: Any, *, is_nested: bool = False, **options: Any) -> str:
    def value(column: Any) -> str:
        text = str(compiler.process(column, **options, is_nested=True))
        if isinstance(column.type, UTCDateTime):
            moment = f"to_char({text} AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')"
            return f"replace({moment}, '.000000Z', 'Z')"
        return f"({text} / 100.0)::float8" if isinstance(column.type, Cents) else text

    return f"json_build_object({_pairs(element, value)})" + ("" if is_nested else "::text")


class TimestampKey(sa.TypeDecorator[str]):
    """A timestamp that is bound as text, as SQLite stores it and cursors carry it."""

    impl = UTCDateTime
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Any) -> Any:
        return None if value is None else datetime.fromisoformat(value).replace(tzinfo=UTC)


def json_response(text: str, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON as the database rendered it. Tests hold it against the response model that the route declares."""
    return Response(text, status, headers, media_type="application/json")


# --- the position in the event log --------------------------------------------------------------------------------


LOG_FLOOR = sa.select(sa.cast(Setting.value, sa.BigInteger)).where(col(Setting.key) == "event_floor").scalar_subquery()
LAST_EVENT_ID = CompiledQuery(
    sa.select(sa.func.coalesce(sa.select(sa.func.max(col(Event.id))).scalar_subquery(), LOG_FLOOR))
)


def last_event_id(connection: Connection) -> int:
    """The id of the last committed event."""
    return int(LAST_EVENT_ID.first(connection)[0])


# --- pages --------------------------------------------------------------------------------------------------------

CURSOR_PATTERN = pattern(r"^[A-Za-z0-9_-]*$", "is not a cursor of this service")
Cursor = Annotated[str, Field(max_length=MAX_CURSOR, pattern=CURSOR_PATTERN)]


class Page(BaseModel, Generic[T]):
    items: list[T]
    total: int = Field(description="The number of all items, exact.")
    next: str | None = Field(description="The `cursor` of the next page; null on the last page.")


class PageQuery(RequestModel):
    limit: Annotated[int, Field(ge=1, le=100)] = 20
    offset: Annotated[int | None, Field(ge=0, le=MAX_ID, description="Items to skip.")] = None
    skip: Annotated[int | None, Field(ge=0, le=MAX_ID, description="Another name of `offset`.")] = None
    cursor: Annotated[Cursor | None, BlankIsNull] = Field(default=None, description="`next` of the page before.")

    @property
    def start(self) -> int:
        return (self.skip or 0) if self.offset is None else self.offset

    def keys(self, order: "Order") -> list[Key] | None:
        """The sort keys that the cursor holds."""
        if not self.cursor:
            return None
        if self.start:
            raise InvalidField("cursor", "can't be combined with offset or skip", "query")
        return order.decode(self.cursor)


class JsonPage(NamedTuple):
    """A page whose items are JSON text."""

    items: list[str]
    total: int
    next: str | None
    event_cursor: int  # id of the last event that the page includes
    suggestions: list[str] | None = None


# What a database can compare with a column: PostgreSQL refuses numbers that the column can't hold.
IN_RANGE = Field(strict=True, ge=-MAX_ID, le=MAX_ID)
KEY_TYPES = (
    (sa.Integer, Annotated[int, IN_RANGE]),
    (sa.Float, Annotated[int, IN_RANGE] | Annotated[float, IN_RANGE]),
    (TimestampKey, Annotated[NaiveDatetime, AfterValidator(lambda moment: moment.isoformat(" ", "microseconds"))]),
    (object, Annotated[str, Field(pattern=r"^[^\x00]*$")]),
)


@dataclass(frozen=True, eq=False)
class Order:
    """A total order: expressions that are never null, the id last. Cursors carry its `name`."""

    name: str
    columns: tuple[Any, ...]

    @property
    def reverse(self) -> bool:
        return self.name.startswith("-")

    @functools.cached_property
    def cursors(self) -> TypeAdapter[Any]:
        keys = [next(key for kind, key in KEY_TYPES if isinstance(column.type, kind)) for column in self.columns]
        return TypeAdapter(tuple[(Literal[self.name], *keys)])  # type: ignore[name-defined,valid-type]  # made at run time

    def order_by(self) -> list[ColumnElement[Any]]:
        return [column.desc() if self.reverse else column.asc() for column in self.columns]

    def after(self, keys: Sequence[Any]) -> list[tuple[ColumnElement[bool], list[ColumnElement[Any]]]]:
        """The rows after these keys, as (condition, order) of statements to run one after the other: the rows that
        share all keys but the last, then those that share all but the last two, and so on.

        However many rows share a key (all books without a rating do), each enters its index at the right place.
        """
        (first, *rest), (key, *other_keys) = self.columns, keys
        beyond = first < key if self.reverse else first > key
        if not rest:
            return [(beyond, self.order_by())]
        sharing = Order(self.name, tuple(rest)).after(other_keys)
        return [*((and_(first == key, condition), by) for condition, by in sharing), (beyond, self.order_by())]

    def encode(self, keys: Sequence[Key]) -> str:
        return base64.urlsafe_b64encode(database.to_json([self.name, *keys]).encode()).decode().rstrip("=")

    def decode(self, cursor: str) -> list[Key]:
        try:
            _, *keys = self.cursors.validate_json(base64.urlsafe_b64decode(cursor.encode() + b"=="))
        except ValueError:
            raise InvalidField("cursor", "is not a cursor of this list in this order", "query") from None
        return list(keys)


Filters = Mapping[str, Any]


class Listing:
    """A SELECT whose first column is the item as JSON, as pages, as single rows and in batches.

    `filters` are conditions by name, each bound to a value of its own name; `orders` are tuples of columns, the id
    last. A condition may be a function, for one that depends on the database. `filters` of a call: the conditions to
    apply and their values; keys that name no condition are only bound. `counts` are cheaper counts than `count(*)`
    for some sets of conditions; `indexed` are sets and orders that an index already gives: nothing is to be sorted.
    """

    def __init__(
        self,
        select: Any,
        *,
        filters: Mapping[str, Any],
        orders: Mapping[str, tuple[Any, ...]],
        counts: Mapping[tuple[str, ...], Any] | None = None,
        indexed: Collection[tuple[tuple[str, ...], str]] = (),
    ) -> None:
        self.select, self.filters, self.counts, self.indexed = select, filters, counts or {}, indexed
        self.orders = {name: Order(name, columns) for name, columns in orders.items()}
        self.row_id = next(iter(self.orders.values())).columns[-1]
        self._compiled = functools.lru_cache(1000)(self._compile)
        self._count = functools.lru_cache(1000)(self._compile_count)

    def names(self, filters: Filters) -> tuple[str, ...]:
        return tuple(name for name in self.filters if name in filters)

    def conditions(self, names: tuple[str, ...]) -> list[ColumnElement[bool]]:
        return [f() if callable(f) else f for f in (self.filters[name] for name in names)]

    def _compile(self, names: tuple[str, ...], order: Order | None, by_cursor: bool) -> list[CompiledQuery]:
        """The statements whose rows, one after the other, are the page; without an order, the first row."""
        filtered = self.select.where(*self.conditions(names))
        if order is None:
            return [CompiledQuery(filtered.limit(1))]
        if by_cursor:
            keys: list[Any] = [bindparam(f"key{n}", type_=column.type) for n, column in enumerate(order.columns)]
            pages = [filtered.where(condition).order_by(*by) for condition, by in order.after(keys)]
        else:
            pages = [filtered.order_by(*order.order_by()).offset(bindparam("start", type_=sa.Integer))]
        pages = [page.limit(bindparam("limit", type_=sa.Integer)) for page in pages]
        # Sort ids, not JSON: rendering rows that the page skips takes far longer. PostgreSQL also renders those that
        # an offset skips.
        sorts = names and (names, order.name.lstrip("-")) not in self.indexed
        if sorts or (not by_cursor and database.is_postgresql()):
            ids = [page.with_only_columns(self.row_id, maintain_column_froms=True) for page in pages]
            pages = [self.select.where(self.row_id.in_(page)).order_by(*order.order_by()) for page in ids]
        return [CompiledQuery(page.add_columns(*order.columns)) for page in pages]

    def _compile_count(self, names: tuple[str, ...]) -> CompiledQuery:
        if (count := self.counts.get(names)) is not None:
            return CompiledQuery(count() if callable(count) else count)
        return CompiledQuery(sa.select(sa.func.count()).select_from(self.row_id.table).where(*self.conditions(names)))

    def total(self, connection: Connection, filters: Filters) -> int:
        return int(self._count(self.names(filters)).first(connection, filters)[0])

    def page(self, connection: Connection, filters: Filters, order: str, query: PageQuery, total: int = 0) -> JsonPage:
        """A page; `total` where it is counted already."""
        by, total = self.orders[order], total or self.total(connection, filters)
        rows, last = self._rows(connection, filters, by, query.keys(by), query.start, query.limit)
        following = None if last is None else by.encode(last)
        return JsonPage([row[0] for row in rows], total, following, last_event_id(connection))

    def _rows(
        self, connection: Connection, filters: Filters, order: Order, keys: Sequence[Key] | None, start: int, limit: int
    ) -> tuple[list[Any], Sequence[Key] | None]:
        """The rows, and the keys of the last one if more rows follow."""
        values = {**filters, "start": start} | {f"key{n}": key for n, key in enumerate(keys or ())}
        rows: list[Any] = []
        for statement in self._compiled(self.names(filters), order, keys is not None):
            rows += statement.all(connection, {**values, "limit": limit + 1 - len(rows)})
            if len(rows) > limit:
                return rows[:limit], [
                    key.replace(tzinfo=None).isoformat(" ", "microseconds") if isinstance(key, datetime) else key
                    for key in rows[limit - 1][-len(order.columns) :]
                ]
        return rows, None

    def first(self, connection: Connection | Session, filters: Filters) -> str | None:
        """The first item that matches; None without one."""
        row = self._compiled(self.names(filters), None, False)[0].first(connection, filters)
        return None if row is None else str(row[0])

    def batches(self, filters: Filters, order: str) -> Iterator[list[str]]:
        """All items, for a StreamingResponse: it blocks, in a thread."""
        return ([row[0] for row in rows] for rows in self.row_batches(filters, order))

    def row_batches(self, filters: Filters, order: str, batch: int | None = None) -> Iterator[list[Any]]:
        """All rows, with the columns of the order behind their own. Each batch is a read of its own: a slow client
        holds neither a connection nor the write-ahead log. `batch`: its rows, `EXPORT_BATCH` by default."""
        keys: Sequence[Key] | None = None
        while True:
            rows, keys = database.read_sync(self._rows, filters, self.orders[order], keys, 0, batch or EXPORT_BATCH)
            yield rows
            if keys is None:
                return


def page_response(request: Request, page: JsonPage) -> Response:
    """The page, with its `Link` (RFC 8288) and `X-Event-Cursor`."""
    headers = {"X-Event-Cursor": str(page.event_cursor)}
    if page.next is not None:
        url, _, query = str(request.url).partition("?")
        query = quote(query, safe="%&=+-._~!$'()*,;:@/?")  # as it came, but for what a header can't hold
        pairs = [pair for pair in query.split("&") if pair and not pair.startswith(("offset=", "skip=", "cursor="))]
        headers["Link"] = f'<{url}?{"&".join([*pairs, f"cursor={page.next}"])}>; rel="next"'
    following = "null" if page.next is None else f'"{page.next}"'
    more = "" if page.suggestions is None else f',"suggestions":{database.to_json(page.suggestions)}'
    return json_response(
        f'{{"items":[{",".join(page.items)}],"total":{page.total},"next":{following}{more}}}', headers=headers
    )


def file_response(pieces: Iterator[str], name: str) -> StreamingResponse:
    media_type = "text/csv" if name.endswith(".csv") else "application/x-ndjson"
    return StreamingResponse(pieces, 200, {"Content-Disposition": f'attachment; filename="{name}"'}, media_type)
