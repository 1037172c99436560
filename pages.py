"""A page of a list: by cursor to walk it, by offset to jump in it.

A cursor holds the sort keys of the last row that was shown, so the next page starts at its place in the index: the
cost does not grow with depth, and rows that come or go meanwhile neither repeat nor hide others.
"""

import base64
import binascii
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field, TypeAdapter
from sqlalchemy import ColumnElement, Connection, Float, Integer, Select, and_, func, or_

from models import ID_MAX, BlankIsNull, Shape

T = TypeVar("T")
Key = str | int | float
CURSOR_MAX = 20_000  # characters: two keys, of whatever letters
Cursor = Annotated[str, Field(max_length=CURSOR_MAX, pattern=r"^[A-Za-z0-9_-]*$")]


class Page(BaseModel, Generic[T]):
    items: list[T]
    total: int = Field(description="How many there are in all, exact.")
    next: str | None = Field(description="Give it as `cursor` to read on; null on the last page.")


class PageQuery(Shape):
    limit: Annotated[int, Field(ge=1, le=100)] = 20
    offset: Annotated[int | None, Field(ge=0, le=ID_MAX, description="How many to jump over.")] = None
    skip: Annotated[int | None, Field(ge=0, le=ID_MAX, description="Another name of `offset`.")] = None
    cursor: Annotated[Cursor | None, BlankIsNull] = Field(default=None, description="What `next` gave.")

    @property
    def start(self) -> int:
        return self.offset or self.skip or 0


@dataclass(frozen=True)
class Order:
    """A total order: expressions that are never null, the id last. `name` keeps cursors of other orders out."""

    name: str
    columns: tuple[Any, ...]

    @property
    def reverse(self) -> bool:
        return self.name.startswith("-")

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

    def decode(self, cursor: str) -> list[Key]:
        try:
            name, *keys = json.loads(base64.urlsafe_b64decode(cursor.encode() + b"=="))
        except (ValueError, TypeError, binascii.Error, RecursionError):
            raise bad_query("cursor", "is not one that this service gave") from None
        if name != self.name:
            raise bad_query("cursor", "belongs to a list in another order")
        if len(keys) != len(self.columns) or not all(map(_fits, keys, self.columns)):
            raise bad_query("cursor", "is not one that this service gave")
        return list(keys)


def encode(name: str, keys: Sequence[Key]) -> str:
    return (
        base64.urlsafe_b64encode(json.dumps([name, *keys], separators=(",", ":"), ensure_ascii=False).encode())
        .decode()
        .rstrip("=")
    )


def _fits(key: object, column: ColumnElement[Any]) -> bool:
    """Whether a database can compare this key with this column."""
    if isinstance(column.type, Integer | Float):
        right_kind = int if isinstance(column.type, Integer) else int | float
        return isinstance(key, right_kind) and not isinstance(key, bool) and abs(key) < 2**63
    # JSON can carry half a surrogate pair, which no database takes.
    return isinstance(key, str) and "\x00" not in key and key.encode(errors="ignore").decode() == key


def bad_query(name: str, message: str) -> RequestValidationError:
    return RequestValidationError([{"loc": ("query", name), "msg": f"{name} {message}", "type": "value_error"}])


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
    if query.cursor and query.start:
        raise bad_query("cursor", "and offset exclude each other")
    page = select.where(order.after(order.decode(query.cursor))) if query.cursor else select.offset(query.start)
    page = page.add_columns(*order.columns).order_by(*order.by()).limit(query.limit + 1)
    rows = connection.execute(page).all()
    following = None
    if len(rows) > query.limit:
        rows = rows[: query.limit]
        following = encode(order.name, rows[-1][-len(order.columns) :])
    if total is None:
        total = connection.execute(select.with_only_columns(func.count(), maintain_column_froms=True)).scalar_one()
    return {"items": [shown(row) for row in rows], "total": total, "next": following}


def named(columns: Iterable[str]) -> Callable[[Any], dict[str, Any]]:
    """Makes an item of a row whose first columns are these."""
    names = tuple(columns)
    return lambda row: dict(zip(names, row, strict=False))


def page_answer(
    page: dict[str, Any], adapter: TypeAdapter[Any], request: Request, event_cursor: int | None = None
) -> Response:
    """The page, validated and serialised in one pass, with its `Link` (RFC 8288) and the event id it is true for."""
    answer = Response(adapter.dump_json(adapter.validate_python(page)), media_type="application/json")
    if page["next"] is not None:
        url = request.url.remove_query_params(["offset", "skip"]).include_query_params(cursor=page["next"])
        answer.headers["Link"] = f'<{url}>; rel="next"'
    if event_cursor is not None:
        answer.headers["X-Event-Cursor"] = str(event_cursor)
    return answer
