"""What the tables and shapes of every noun are made of: the clock, kinds of value, columns."""

import hashlib
import re
import unicodedata
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Annotated, Any, TypeVar

import sqlalchemy as sa
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainSerializer,
    StringConstraints,
    ValidationInfo,
)
from pydantic import Field as Limit
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema
from sqlalchemy.engine import Dialect
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.visitors import InternalTraversal
from sqlmodel import Field, SQLModel
from starlette.convertors import IntegerConvertor, register_url_convertor
from stdnum import isbn as isbn_numbers

Printed = TypeVar("Printed", int, date)

# Names decide how a violation is reported: `uq_user_email` and `ck_book_pages` are answered as faults of the
# fields `email` and `pages`.
SQLModel.metadata.naming_convention = {
    "pk": "pk_%(table_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s",
    "uq": "uq_%(table_name)s_%(column_0_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "ix": "ix_%(table_name)s_%(column_0_name)s",
}
ID_MAX = 2**31 - 1  # what an INTEGER holds everywhere
FIRST_YEAR = -5000


def now() -> datetime:
    """The present, in UTC. Tests replace it: every expiry and time stamp asks here."""
    return datetime.now(UTC)


def iso(moment: datetime) -> str:
    """As all answers have it: ISO 8601, with `Z`."""
    return moment.isoformat().replace("+00:00", "Z")


# --- kinds of value -----------------------------------------------------------------------------------------------


class UtcDateTime(sa.TypeDecorator[datetime]):
    """A moment, kept as UTC. SQLite has no time zones: what comes back gets its UTC mark again."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.replace(tzinfo=UTC)


class AsText(sa.ColumnElement[str]):
    """A moment as text that sorts as it does: what a cursor can hold."""

    inherit_cache = True
    _traverse_internals = [("moment", InternalTraversal.dp_clauseelement)]  # noqa: RUF012  # as SQLAlchemy has it
    type = sa.String()

    def __init__(self, moment: Any) -> None:
        self.moment = sa.type_coerce(moment, sa.String)


@compiles(AsText)
def _as_it_is_stored(element: AsText, compiler: Any, **options: Any) -> str:
    return str(compiler.process(element.moment, **options))


@compiles(AsText, "postgresql")
def _in_utc(element: AsText, compiler: Any, **options: Any) -> str:
    moment = compiler.process(element.moment, **options)
    return f"to_char({moment} AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US')"


SortKey = sa.String().with_variant(sa.String(collation="C"), "postgresql")
KEY_MAX = 1200  # bytes; of a longer text the rest counts as a hash, so that no two are taken for one


def fold(text: str) -> str:
    """A text as it is compared: no case, no accents, single spaces."""
    if not text.isascii():
        text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return " ".join(text.casefold().split())


def key_of(text: str) -> str:
    """By which titles and authors sort and are looked up."""
    key = fold(text)
    if len(key) <= KEY_MAX // 4 or len(whole := key.encode()) <= KEY_MAX:
        return key
    # PostgreSQL indexes no more than 2,704 bytes, of title and author together; a cursor holds both, too.
    return whole[: KEY_MAX - 33].decode(errors="ignore") + " " + hashlib.blake2b(whole, digest_size=16).hexdigest()


class Cents(sa.TypeDecorator[Decimal]):
    """A price, kept as a whole number of hundredths: exact in every database, SQLite's floats included."""

    impl = sa.Integer
    cache_ok = True

    def process_bind_param(self, value: Decimal | None, dialect: Dialect) -> int | None:
        return None if value is None else int(value * 100)

    def process_result_value(self, value: int | None, dialect: Dialect) -> Decimal | None:
        return None if value is None else Decimal(value) / 100


UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


def _storable(text: str) -> str:
    if UNSTORABLE.search(text):
        raise ValueError("must not contain NUL characters or halves of surrogate pairs")
    return text


def _blank_is_null(value: object) -> object:
    return None if isinstance(value, str) and not value.strip() else value


def _no_comma(text: str) -> str:
    if "," in text:
        raise ValueError("must not contain a comma: in files, tags are separated by them")
    return text


def is_isbn13(text: str) -> bool:
    """Whether it is one as we keep them. Imports ask for every row, and the library takes ten times as long."""
    if len(text) != 13 or not (text.isascii() and text.isdecimal() and text.startswith(("978", "979"))):
        return False
    return (sum(map(int, text[::2])) + 3 * sum(map(int, text[1::2]))) % 10 == 0


def _to_isbn13(text: str) -> str:
    """13 digits, from an ISBN-10 or ISBN-13 with or without hyphens and spaces (ISO 2108)."""
    if is_isbn13(text):
        return text
    try:
        return str(isbn_numbers.validate(text, convert=True))
    except isbn_numbers.ValidationError as error:
        raise ValueError(f"is not an ISBN: {str(error).lower().rstrip('.')}") from None


def _iso(value: object) -> object:
    # pydantic alone would take a number for seconds since 1970.
    if isinstance(value, date) or (isinstance(value, str) and re.match(r"\d{4}-\d\d-\d\d", value)):
        return value
    raise ValueError("must be like 2008-08-11 (ISO 8601)")


OF_CELLS = {"cells": True}  # the context of validating what a file says, where all is text


def _no_bool(value: object) -> object:
    if isinstance(value, bool):  # pydantic alone would take true for 1
        raise ValueError("must be a number")
    return value


def _number(value: object, info: ValidationInfo) -> object:
    if isinstance(value, str) and info.context is not OF_CELLS:  # and "12" for 12
        raise ValueError("must be a number")
    return _no_bool(value)


def _to_utc(moment: datetime) -> datetime:
    """Before the year 9999: what SQLite rounds up beyond its last millisecond has no year."""
    try:
        in_utc = moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except OverflowError:
        raise ValueError("is out of range") from None
    if in_utc.year >= 9999:
        raise ValueError("is out of range")
    return in_utc


def _in_print(value: Printed) -> Printed:
    """Up to the year after next: publishers announce books that long before they print them."""
    year = value.year if isinstance(value, date) else value
    if not FIRST_YEAR <= year <= now().year + 2:
        raise ValueError(f"must be between {FIRST_YEAR} and {now().year + 2}")
    return value


IN_WORDS: dict[str, str] = {}  # what a pattern asks for


def in_words(pattern: str, asks: str) -> str:
    """The pattern; a text that does not match it is refused with these words, not with the pattern itself."""
    IN_WORDS[pattern] = asks
    return pattern


def why(error: Any) -> str:
    """One of pydantic's errors, as clients are told it."""
    pattern = error.get("ctx", {}).get("pattern")
    return IN_WORDS.get(pattern) or str(error["msg"]).removeprefix("Value error, ")


def bounded(most: int, least: int = 1) -> StringConstraints:
    return StringConstraints(min_length=least, max_length=most)


# Python's idea of white space, not pydantic's, so that a shape, a CSV cell and a sort key agree on what is blank.
Stripped = BeforeValidator(lambda value: value.strip() if isinstance(value, str) else value)
Storable = AfterValidator(_storable)


class NotBlank:
    """Tells clients what follows from stripping a text and wanting something of it."""

    @staticmethod
    def __get_pydantic_json_schema__(schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {**handler(schema), "pattern": r"\S"}


class BlankIsNull:
    """Takes a blank text, as forms send it, for null; and tells clients that it may be sent."""

    @staticmethod
    def __get_pydantic_core_schema__(source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(_blank_is_null, handler(source))

    @staticmethod
    def __get_pydantic_json_schema__(schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        described = handler(schema)
        return {**described, "anyOf": [*described.get("anyOf", ()), {"type": "string", "pattern": r"^\s*$"}]}


Title = Annotated[str, bounded(500), Stripped, Storable, NotBlank]
Author = Annotated[str, bounded(1000), Stripped, Storable, NotBlank]
Language = Annotated[str, bounded(35), Stripped, Storable, NotBlank]
Word = Annotated[str, bounded(100), Stripped, Storable, NotBlank]
Name = Annotated[str, bounded(300), Stripped, Storable, NotBlank]
Tag = Annotated[str, bounded(50), Stripped, Storable, AfterValidator(_no_comma)]
LongText = Annotated[str, bounded(20_000), Stripped, Storable, NotBlank]
HTTP_ADDRESS = in_words(
    r"^[Hh][Tt][Tt][Pp][Ss]?://[^\s<>\"\\^`{|}]+$", "must be an address that begins with http:// or https://"
)
Url = Annotated[str, bounded(2000), StringConstraints(pattern=HTTP_ADDRESS), Stripped, Storable]
Isbn = Annotated[str, bounded(32), Stripped, AfterValidator(_to_isbn13)]
Price = Annotated[
    Decimal,
    BeforeValidator(_no_bool),
    Limit(ge=0, max_digits=9, decimal_places=2, allow_inf_nan=False),
    AfterValidator(abs),  # of -0.0
    PlainSerializer(float, return_type=float, when_used="json"),
]
Number = BeforeValidator(_number)
Year = Annotated[int, Number, Limit(ge=FIRST_YEAR, le=9999), AfterValidator(_in_print)]
PublishedDate = Annotated[date, BeforeValidator(_iso), AfterValidator(_in_print)]
Moment = Annotated[datetime, BeforeValidator(_iso), AfterValidator(_to_utc)]
Id = Annotated[int, Limit(ge=1, le=ID_MAX)]
BodyId = Annotated[int, Number, Limit(ge=1, le=ID_MAX)]


class Shape(BaseModel):
    """What clients send: a field that is not named here is refused."""

    model_config = ConfigDict(extra="forbid")


class Problem(BaseModel):
    """An error, as RFC 9457 describes it."""

    type: str = Limit(default="about:blank", examples=["about:blank"])
    title: str = Limit(examples=["Not Found"])
    status: int = Limit(examples=[404])
    detail: str = Limit(examples=["No such book."])
    errors: list["FieldError"] | None = Limit(default=None, description="Which fields, with 409 and 422.")


class FieldError(BaseModel):
    loc: list[str | int]
    msg: str
    type: str


class DomainError(Exception):
    """A rule of the domain that a request breaks: 422, naming the field."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field} {message}")
        self.field, self.message = field, message


def key_column() -> Any:
    return Field(default=None, primary_key=True)


def moment_column() -> Any:
    return Field(default=None, sa_type=UtcDateTime, nullable=True)


def stamp_column() -> Any:
    return Field(
        default_factory=lambda: now(),  # noqa: PLW0108  # looked up at each call, so that tests can replace it
        sa_type=UtcDateTime,
        nullable=False,
    )


def table_options(*constraints: sa.schema.SchemaItem) -> Any:
    # AUTOINCREMENT: an id is never given out twice, so that a token, an event or a bookmark of something deleted
    # can't come to mean something else.
    return (*constraints, {"sqlite_autoincrement": True})


class IdConvertor(IntegerConvertor):
    """`{book_id:id}` in a path: a number that an id can be, so that `/books/upload` is never taken for a book."""

    regex = r"[0-9]{1,10}(?!\n)"  # Starlette ends its pattern with $, which also matches before a last line break


register_url_convertor("id", IdConvertor())
