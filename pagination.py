"""Lists: rows rendered as JSON by the database, pages by cursor or offset, and batches for exports."""

import base64
import binascii
import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Generic, NamedTuple, TypeVar
from urllib.parse import quote

import sqlalchemy as sa
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field, TypeAdapter
from sqlalchemy import ColumnElement, Connection, Float, Integer, Select, and_, bindparam, func, or_
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement
from sqlmodel import col

import database
from database import CompiledQuery
from models import MAX_ID, Cents, Event, Setting, UtcDateTime
from schemas import BlankIsNull, RequestModel, pattern

T = TypeVar("T")
Key = str | int | float
MAX_CURSOR = 20_000  # characters: two keys, of whatever letters
BASE64 = pattern(r"^[A-Za-z0-9_-]*$", "is not one that this service gave")
Cursor = Annotated[str, Field(max_length=MAX_CURSOR, pattern=BASE64)]


class Page(BaseModel, Generic[T]):
    items: list[T]
    total: int = Field(description="How many there are in all, exact.")
    next: str | None = Field(description="Give it as `cursor` to read on; null on the last page.")


class PageQuery(RequestModel):
    limit: Annotated[int, Field(ge=1, le=100)] = 20
    offset: Annotated[int | None, Field(ge=0, le=MAX_ID, description="How many to jump over.")] = None
    skip: Annotated[int | None, Field(ge=0, le=MAX_ID, description="Another name of `offset`.")] = None
    cursor: Annotated[Cursor | None, BlankIsNull] = Field(default=None, description="What `next` gave.")

    @property
    def start(self) -> int:
        return self.offset or self.skip or 0

    def keys(self, order: "Order") -> list[Key] | None:
        """Where the cursor stands in this order, if there is one."""
        if not self.cursor:
            return None
        if self.start:
            raise invalid_query("cursor", "and offset exclude each other")
        return order.decode(self.cursor)


@dataclass(frozen=True, eq=False)
class Order:
    """A total order: expressions that are never null, the id last. `name` keeps cursors of other orders out."""

    name: str
    columns: tuple[Any, ...]

    @property
    def reverse(self) -> bool:
        return self.name.startswith("-")

    @functools.cached_property
    def kinds(self) -> list[Any]:
        """What a key of each column is."""
        types = [column.type for column in self.columns]
        return [int if isinstance(t, Integer) else int | float if isinstance(t, Float) else str for t in types]

    def by(self) -> list[ColumnElement[Any]]:
        return [column.desc() if self.reverse else column.asc() for column in self.columns]

    def after(self, keys: Sequence[Key]) -> ColumnElement[bool]:
        """What comes after the row with these keys, put so that an index on the leading columns is entered there."""
        (*leading, last), (*leading_keys, last_key) = self.columns, keys
        condition: ColumnElement[bool] = last < last_key if self.reverse else last > last_key
        for column, key in zip(reversed(leading), reversed(leading_keys), strict=True):
            reached = column <= key if self.reverse else column >= key
            passed = column < key if self.reverse else column > key
            condition = and_(reached, or_(passed, condition))
        return condition

    def steps(self, keys: Sequence[Key]) -> list[tuple[ColumnElement[bool], list[ColumnElement[Any]]]]:
        """The same in parts that follow each other, each with the order of its own: the rows that share all keys but
        the last, then those that share all but the last two, and so on.

        However many share them (all books that nobody has rated do), an index is entered right where to go on.
        """
        (leading, *rest), (key, *rest_of_keys) = self.columns, keys
        beyond = leading < key if self.reverse else leading > key
        if not rest:
            return [(beyond, self.by())]
        sharing = Order(self.name, tuple(rest)).steps(rest_of_keys)
        return [*((and_(leading == key, condition), order) for condition, order in sharing), (beyond, self.by())]

    def decode(self, cursor: str) -> list[Key]:
        try:
            name, *keys = json.loads(base64.urlsafe_b64decode(cursor.encode() + b"=="))
        except (ValueError, TypeError, binascii.Error, RecursionError):
            raise invalid_query("cursor", "is not one that this service gave") from None
        if name != self.name:
            raise invalid_query("cursor", "belongs to a list in another order")
        if len(keys) != len(self.columns) or not all(map(_fits, keys, self.kinds)):
            raise invalid_query("cursor", "is not one that this service gave")
        return list(keys)


def encode(name: str, keys: Sequence[Key]) -> str:
    return base64.urlsafe_b64encode(database.to_json([name, *keys]).encode()).decode().rstrip("=")


def _fits(key: object, kind: Any) -> bool:
    """Whether a database can compare this key with a column of this kind."""
    if kind is str:
        # JSON can carry half a surrogate pair, which no database takes.
        return isinstance(key, str) and "\x00" not in key and key.encode(errors="ignore").decode() == key
    # PostgreSQL refuses to compare a column with a number that it can't hold.
    return isinstance(key, kind) and not isinstance(key, bool) and abs(key) <= MAX_ID


def invalid_query(name: str, message: str) -> RequestValidationError:
    return RequestValidationError([{"loc": ("query", name), "msg": message, "type": "value_error"}])


def read_page(
    connection: Connection,
    select: Select[Any],
    order: Order,
    query: PageQuery,
    shown: Callable[[Any], dict[str, Any]],
    *,
    total: int | None = None,
) -> dict[str, Any]:
    """The page of `select` that `query` asks for, as a `Page`'s fields. `shown` makes an item of a row.

    Without a `total` that is known, it is counted.
    """
    keys = query.keys(order)
    page = select.where(order.after(keys)) if keys is not None else select.offset(query.start)
    page = page.add_columns(*order.columns).order_by(*order.by()).limit(query.limit + 1)
    rows = connection.execute(page).all()
    following = None
    if len(rows) > query.limit:
        rows = rows[: query.limit]
        following = encode(order.name, rows[-1][-len(order.columns) :])
    if total is None:
        total = connection.execute(select.with_only_columns(func.count(), maintain_column_froms=True)).scalar_one()
    return {"items": [shown(row) for row in rows], "total": total, "next": following}


class JsonPage(NamedTuple):
    """A page whose items are JSON already."""

    items: list[str]
    total: int
    next: str | None


class Listing:
    """Pages of a SELECT whose first column is the item as JSON, each statement compiled once.

    `conditions` makes a condition of its name; their values are bound by name.
    """

    def __init__(self, select: Any, conditions: Callable[[str], ColumnElement[bool]]) -> None:
        self.select, self.condition = select, conditions
        self._page = functools.lru_cache(1000)(self._prepare)

    def _prepare(self, asked: tuple[str, ...], order: Order, by_cursor: bool) -> list[CompiledQuery]:
        """The statements whose rows, one after the other's, are the page."""
        *_, row_id = order.columns
        page = self.select.where(*map(self.condition, asked))
        if by_cursor:
            keys: list[Any] = [bindparam(f"key{n}", type_=column.type) for n, column in enumerate(order.columns)]
            pages = [page.where(step).order_by(*by) for step, by in order.steps(keys)]
        else:
            pages = [page.order_by(*order.by()).offset(bindparam("start", type_=Integer))]
        pages = [page.limit(bindparam("most", type_=Integer)) for page in pages]
        if asked:  # what must be sorted is sorted as ids: to make JSON of each row that is passed over takes far longer
            chosen = [page.with_only_columns(row_id, maintain_column_froms=True) for page in pages]
            pages = [self.select.where(row_id.in_(ids)).order_by(*order.by()) for ids in chosen]
        return [CompiledQuery(page.add_columns(*order.columns)) for page in pages]

    def page(  # noqa: PLR0917  # what one page is made of
        self,
        connection: Connection,
        asked: tuple[str, ...],
        values: Mapping[str, Any],
        order: Order,
        query: PageQuery,
        total: int,
    ) -> JsonPage:
        """What meets the conditions that are asked for, as far as `query` wants it."""
        keys, wanted = query.keys(order), query.limit + 1
        bound = {**values, "start": query.start} | {f"key{n}": key for n, key in enumerate(keys or ())}
        rows: list[Any] = []
        for statement in self._page(asked, order, keys is not None):
            rows += statement.all(connection, {**bound, "most": wanted - len(rows)})
            if len(rows) == wanted:
                break
        following = None
        if len(rows) == wanted:
            rows = rows[: query.limit]
            following = encode(order.name, rows[-1][-len(order.columns) :])
        return JsonPage([row[0] for row in rows], total, following)


def named(columns: Iterable[str]) -> Callable[[Any], dict[str, Any]]:
    """Makes an item of a row whose first columns are these."""
    names = tuple(columns)
    return lambda row: dict(zip(names, row, strict=False))


def page_answer(
    page: dict[str, Any], adapter: TypeAdapter[Any], request: Request, event_cursor: int | None = None
) -> Response:
    """The page, validated and serialised in one pass."""
    return _answer(adapter.dump_json(adapter.validate_python(page)), page["next"], request, event_cursor)


def json_answer(page: JsonPage, request: Request, event_cursor: int) -> Response:
    """The page as the database gave it. That it has the shape that the route declares, tests ensure."""
    following = "null" if page.next is None else f'"{page.next}"'
    body = f'{{"items":[{",".join(page.items)}],"total":{page.total},"next":{following}}}'
    return _answer(body.encode(), page.next, request, event_cursor)


def _answer(body: bytes, following: str | None, request: Request, event_cursor: int | None) -> Response:
    """With its `Link` (RFC 8288) and the event id it is true for."""
    headers = {}
    if following is not None:
        url, _, asked = str(request.url).partition("?")
        asked = quote(asked, safe="%&=+-._~!$'()*,;:@/?")  # as it came, but for what a header can't hold
        query = [pair for pair in asked.split("&") if pair and not pair.startswith(("offset=", "skip=", "cursor="))]
        headers["Link"] = f'<{url}?{"&".join([*query, f"cursor={following}"])}>; rel="next"'
    if event_cursor is not None:
        headers["X-Event-Cursor"] = str(event_cursor)
    return Response(body, headers=headers, media_type="application/json")


class JsonObject(FunctionElement[str]):
    """These columns as the text of a JSON object, as their shape would show them."""

    inherit_cache = False
    type = sa.Text()

    def __init__(self, columns: Mapping[str, Any]) -> None:
        self.names = [*columns]
        super().__init__(*columns.values())


def _pairs(element: JsonObject, value: Callable[[Any], str]) -> str:
    return ", ".join(f"'{name}', {value(column)}" for name, column in zip(element.names, element.clauses, strict=True))


@compiles(JsonObject, "sqlite")
def _json_object(element: JsonObject, compiler: Any, **options: Any) -> str:
    def value(column: Any) -> str:
        if isinstance(column, JsonObject):
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


@compiles(JsonObject, "postgresql")
def _json_build_object(element: JsonObject, compiler: Any, **options: Any) -> str:
    def built(element: JsonObject) -> str:
        return f"json_build_object({_pairs(element, value)})"

    def value(column: Any) -> str:
        if isinstance(column, JsonObject):
            return built(column)
        text = str(compiler.process(getattr(column, "element", column), **options))
        if isinstance(column.type, UtcDateTime):
            moment = f"to_char({text} AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')"
            return f"replace({moment}, '.000000Z', 'Z')"
        return f"({text} / 100.0)::float8" if isinstance(column.type, Cents) else text

    return f"{built(element)}::text"


# --- the position in the event log --------------------------------------------------------------------------------


def pruned_up_to_query() -> sa.ScalarSelect[int]:
    value = sa.cast(Setting.value, sa.BigInteger)
    return sa.select(value).where(col(Setting.key) == "event_floor").scalar_subquery()


LAST_EVENT_ID = CompiledQuery(
    sa.select(sa.func.coalesce(sa.select(sa.func.max(col(Event.id))).scalar_subquery(), pruned_up_to_query()))
)


def last_event_id(connection: Connection) -> int:
    """The id of the last committed event."""
    return int(LAST_EVENT_ID.first(connection)[0])
