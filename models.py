"""Every table and, next to it, the shapes that go in and out; grouped by noun.

Values enter through a shape (`BookCreate`, …): table classes do not validate. What must always hold is a constraint
of the table. What a noun can do is a verb on its class, which changes the row and records the event together.
"""

import hashlib
import math
import re
import unicodedata
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeVar

import sqlalchemy as sa
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainSerializer,
    StrictBool,
    StringConstraints,
    ValidationInfo,
    computed_field,
    model_validator,
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
COPIES_MAX = 1_000_000  # of one book
RENEWALS_MAX = 2
FIRST_YEAR = -5000
UNKNOWN_YEAR = -32768  # sorts before every year
# How books sort by rating: the mean after ten imagined votes of 3, so that one 5 does not beat a thousand 4s and 5s
# (a Bayesian average). Books that nobody has rated come last.
SCORE = "CASE WHEN rating_count = 0 THEN 0.0 ELSE (rating_sum + 30.0) / (rating_count + 10) END"


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
    try:
        return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except OverflowError:
        raise ValueError("is out of range") from None


def _in_print(value: Printed) -> Printed:
    """Up to the year after next: publishers announce books that long before they print them."""
    year = value.year if isinstance(value, date) else value
    if not FIRST_YEAR <= year <= now().year + 2:
        raise ValueError(f"must be between {FIRST_YEAR} and {now().year + 2}")
    return value


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


Title = Annotated[str, Stripped, bounded(500), Storable, NotBlank]
Author = Annotated[str, Stripped, bounded(1000), Storable, NotBlank]
Language = Annotated[str, Stripped, bounded(35), Storable, NotBlank]
Word = Annotated[str, Stripped, bounded(100), Storable, NotBlank]
Name = Annotated[str, Stripped, bounded(300), Storable, NotBlank]
LongText = Annotated[str, Stripped, bounded(20_000), Storable, NotBlank]
URL = StringConstraints(min_length=1, max_length=2000, pattern=r"^https?://[^\s<>\"\\^`{|}]+$")
Url = Annotated[str, URL, Stripped, Storable]
Isbn = Annotated[str, Stripped, bounded(32), AfterValidator(_to_isbn13)]
Price = Annotated[
    Decimal,
    BeforeValidator(_no_bool),
    Limit(ge=0, max_digits=9, decimal_places=2, allow_inf_nan=False),
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

    regex = "[0-9]{1,10}"


register_url_convertor("id", IdConvertor())


# --- users --------------------------------------------------------------------------------------------------------


class Role(StrEnum):
    reader = "reader"
    librarian = "librarian"
    admin = "admin"


def _no_encoded_word(email: str) -> str:
    # Mail headers would decode it (RFC 2047): one mailbox would have endlessly many addresses.
    if "=?" in email:
        raise ValueError("must not contain =?")
    return email


Username = Annotated[
    str, StringConstraints(strip_whitespace=True, min_length=2, max_length=50, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
]
# The rule of HTML's <input type=email> (HTML Living Standard, "valid e-mail address"), with a dot in the domain.
# Whether mail arrives there, only mail can tell.
Email = Annotated[
    str,
    StringConstraints(
        strip_whitespace=True,
        to_lower=True,
        max_length=254,
        pattern=r"^[a-zA-Z0-9.!#$%&'*+/=?^_`{|}~-]+@[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
        r"(?:\.[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?)+$",
    ),
    AfterValidator(_no_encoded_word),
]
Password = Annotated[str, StringConstraints(min_length=8, max_length=128), Storable]


class UserCreate(Shape):
    username: Username = Limit(examples=["ada"])
    email: Email = Limit(examples=["ada@example.com"])
    password: Password = Limit(examples=["a long way to Arrakis"])
    full_name: Annotated[Word | None, BlankIsNull] = None


class AccountCreate(UserCreate):
    role: Role = Role.reader


class UserUpdate(Shape):
    """A field that is left out stays; `full_name: null` clears it."""

    email: Email = ""
    full_name: Annotated[Word | None, BlankIsNull] = None


class AccountUpdate(UserUpdate):
    role: Role = Role.reader
    is_active: StrictBool = True


class UserPublic(BaseModel):
    model_config = {"from_attributes": True}

    id: int
    username: str
    email: str
    full_name: str | None
    role: Role
    is_active: bool
    email_verified_at: datetime | None
    created_at: datetime


class User(SQLModel, table=True):
    __tablename__ = "user"
    __table_args__ = table_options(
        sa.CheckConstraint("role IN ('reader', 'librarian', 'admin')", name="role"),
        sa.Index("uq_user_username", sa.text("lower(username)"), unique=True),
    )

    id: int = key_column()
    username: str = Field(max_length=50)
    email: str = Field(max_length=254, unique=True)  # in lower case, see Email
    password_hash: str = Field(max_length=255)
    full_name: str | None = Field(default=None, max_length=100)
    role: str = Field(default=Role.reader, max_length=20)
    is_active: bool = True
    email_verified_at: datetime | None = moment_column()
    created_at: datetime = stamp_column()


class Principal(NamedTuple):
    """Who is asking: the owner of a good access token, and the login that it belongs to."""

    id: int
    username: str
    role: str
    session_id: int
    expires_at: float = math.inf  # of the access token, in seconds since 1970

    @property
    def is_staff(self) -> bool:
        return self.role in (Role.librarian, Role.admin)


class LoginSession(SQLModel, table=True):
    """One login, from its password to its logout. Access tokens name it and live only as long as it does."""

    __tablename__ = "login_session"
    __table_args__ = table_options()

    id: int = key_column()
    user_id: int = Field(foreign_key="user.id", ondelete="CASCADE", index=True)
    refresh_hash: str = Field(max_length=64)  # SHA-256 of the id of the one refresh token that is good now
    previous_hash: str | None = Field(default=None, max_length=64)  # of the one before, for clients that try again
    user_agent: str | None = Field(default=None, max_length=200)
    created_at: datetime = stamp_column()
    last_used_at: datetime = stamp_column()
    expires_at: datetime = stamp_column()
    revoked_at: datetime | None = moment_column()


class SessionPublic(BaseModel):
    id: int
    user_agent: str | None
    created_at: datetime
    last_used_at: datetime
    expires_at: datetime
    current: bool = Limit(description="Whether it is the one that asks.")


class CodePurpose(StrEnum):
    verify_email = "verify_email"
    reset_password = "reset_password"


class OneTimeCode(SQLModel, table=True):
    """A code or link that was mailed, as a hash."""

    __tablename__ = "one_time_code"
    __table_args__ = table_options(
        sa.CheckConstraint("purpose IN ('verify_email', 'reset_password')", name="purpose"),
        sa.CheckConstraint("attempts >= 0", name="attempts"),
    )

    id: int = key_column()
    user_id: int = Field(foreign_key="user.id", ondelete="CASCADE", index=True)
    purpose: str = Field(max_length=20)
    email: str | None = Field(default=None, max_length=254)  # that it was mailed to
    code_hash: str = Field(max_length=64, index=True)
    attempts: int = 0
    expires_at: datetime = stamp_column()
    created_at: datetime = stamp_column()


class Setting(SQLModel, table=True):
    """What a database knows of itself: `book_count`, `event_floor` (ids up to it are not in the
    log, or no longer), `harvest_due` (when the daily job is), and in development mode `secret_key`, `open_hash` (of the
    password `admin`) and `last_start` (which was told of)."""

    __tablename__ = "setting"

    key: str = Field(primary_key=True, max_length=50)
    value: str


# --- books --------------------------------------------------------------------------------------------------------


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


class BookBase(SQLModel):
    """What people can say of a book."""

    title: Title = Field(schema_extra={"examples": ["Pride and Prejudice"]})
    author: Author = Field(description="One or several, separated by `, `.", schema_extra={"examples": ["Jane Austen"]})
    isbn: Annotated[Isbn | None, BlankIsNull] = Field(
        default=None,
        description="ISBN-10 or 13; kept and shown as 13 digits.",
        schema_extra={"examples": ["978-0-14-143951-8"]},
    )
    genre: Annotated[Word | None, BlankIsNull] = Field(default=None, schema_extra={"examples": ["Romance"]})
    description: Annotated[LongText | None, BlankIsNull] = None
    publisher: Annotated[Name | None, BlankIsNull] = None
    language: Annotated[Language | None, BlankIsNull] = Field(default=None, schema_extra={"examples": ["en"]})
    pages: Annotated[int, Number, Limit(ge=1, le=100_000)] | None = None
    price: Price | None = Field(default=None, sa_type=Cents, schema_extra={"examples": [7.99]})
    cover_url: Annotated[Url | None, BlankIsNull] = None
    published_date: PublishedDate | None = Field(default=None, schema_extra={"examples": ["1813-01-28"]})
    publication_year: Year | None = Field(
        default=None, description="Taken from `published_date` where it is left out; negative before the common era."
    )


class BookCreate(BookBase):
    model_config = {"extra": "forbid"}

    @model_validator(mode="after")
    def _a_date_fills_the_year(self) -> Self:
        if self.published_date is not None and self.publication_year is None:
            self.publication_year = self.published_date.year
        return self


class BookUpdate(BookBase):
    """RFC 7396: a field that is left out stays as it is, null clears it."""

    model_config = {"extra": "forbid"}

    title: Title = ""
    author: Author = ""


class Book(BookBase, table=True):
    __tablename__ = "book"
    __table_args__ = table_options(
        sa.CheckConstraint("length(title) > 0", name="title"),
        sa.CheckConstraint("length(author) > 0", name="author"),
        sa.CheckConstraint("length(isbn) = 13", name="isbn"),
        sa.CheckConstraint("pages > 0", name="pages"),
        sa.CheckConstraint("price >= 0", name="price"),
        sa.CheckConstraint("publication_year BETWEEN -5000 AND 9999", name="publication_year"),
        sa.CheckConstraint("copies >= 0", name="copies"),
        sa.CheckConstraint("available BETWEEN 0 AND copies", name="available"),
        sa.CheckConstraint("rating_sum BETWEEN rating_count AND 5 * rating_count", name="rating"),
        # Sorting by title, telling duplicates, and finding an exact title are all this one index.
        sa.Index("ix_book_title_key", "title_key", "author_key"),
        sa.Index("ix_book_author_key", "author_key"),
        sa.Index("ix_book_year", sa.text(f"coalesce(publication_year, {UNKNOWN_YEAR})")),
        sa.Index("ix_book_score", sa.text(SCORE)),
        sa.Index("ix_book_genre", sa.text("lower(genre)")),
        sa.Index("ix_book_language", sa.text("lower(language)")),
        sa.Index(
            "ix_book_available",
            "id",
            "available",
            sqlite_where=sa.text("available > 0"),
            postgresql_where=sa.text("available > 0"),
        ),
    )

    id: int = key_column()
    isbn: str | None = Field(default=None, unique=True)
    # In the order of code points everywhere: PostgreSQL's own depends on the language of the machine.
    title_key: str = Field(sa_type=SortKey, nullable=False)
    author_key: str = Field(sa_type=SortKey, nullable=False)
    copies: int = 0
    available: int = 0
    rating_count: int = 0
    rating_sum: int = 0
    added_by: int | None = Field(default=None, foreign_key="user.id", ondelete="SET NULL", index=True)
    version: int = 1
    created_at: datetime = stamp_column()
    updated_at: datetime = stamp_column()

    @property
    def rating(self) -> float | None:
        return self.rating_sum / self.rating_count if self.rating_count else None

    @staticmethod
    def row(new: BookBase) -> dict[str, Any]:
        """The columns that follow from what `new` says."""
        return {**vars(new), "title_key": key_of(new.title), "author_key": key_of(new.author)}

    @staticmethod
    def untouched(added_by: int) -> dict[str, Any]:
        """The other columns of a new book."""
        moment = now()
        figures = {"copies": 0, "available": 0, "rating_count": 0, "rating_sum": 0, "version": 1}
        return figures | {"added_by": added_by, "created_at": moment, "updated_at": moment}

    def describe(self, new: BookBase) -> None:
        for name, value in self.row(new).items():
            setattr(self, name, value)

    def touch(self) -> None:
        """Every change of what is shown of a book goes with a new version: the ETag is made from it."""
        self.version += 1
        self.updated_at = now()


class BookPublic(BaseModel):
    model_config = {"from_attributes": True}

    id: int
    title: str
    author: str
    isbn: str | None
    genre: str | None
    description: str | None
    publisher: str | None
    language: str | None
    pages: int | None
    price: Price | None
    cover_url: str | None
    published_date: date | None
    publication_year: int | None
    copies: int
    available: int
    rating: float | None = Limit(description="The average of its ratings, 1 to 5, or null.")
    rating_count: int
    added_by: int | None
    version: int
    created_at: datetime
    updated_at: datetime


class Facet(SQLModel, table=True):
    """How many books have this genre or language, spelled like this. Triggers keep it, so that nobody has to count."""

    __tablename__ = "facet"
    __table_args__ = (sa.Index("ix_facet_name", "kind", sa.text("lower(name)")),)

    kind: str = Field(primary_key=True, max_length=20)
    name: str = Field(primary_key=True)
    count: int


class GenreCount(BaseModel):
    genre: str
    count: int


def _not_zero(number: int) -> int:
    if number == 0:
        raise ValueError("must not be 0")
    return number


class StockChange(Shape):
    quantity: Annotated[int, Number, Limit(ge=-COPIES_MAX, le=COPIES_MAX), AfterValidator(_not_zero)] = Limit(
        description="How many copies come; negative: how many go.", examples=[3]
    )


class StockPublic(BaseModel):
    copies: int
    available: int
    on_loan: int


# --- shelves ------------------------------------------------------------------------------------------------------


class ShelfStatus(StrEnum):
    wishlist = "wishlist"
    reading = "reading"
    completed = "completed"
    abandoned = "abandoned"


def _no_comma(text: str) -> str:
    if "," in text:
        raise ValueError("must not contain a comma: in files, tags are separated by them")
    return text


Tag = Annotated[str, Stripped, bounded(50), Storable, AfterValidator(_no_comma)]


class EntryCreate(Shape):
    status: ShelfStatus = ShelfStatus.wishlist


class EntryUpdate(Shape):
    """RFC 7396: a field that is left out stays as it is, null clears it."""

    status: ShelfStatus = ShelfStatus.wishlist
    rating: Annotated[int, Number, Limit(ge=1, le=5)] | None = None
    review: Annotated[LongText | None, BlankIsNull] = None
    tags: Annotated[list[Tag], Limit(max_length=50)] | None = []
    started_at: Moment | None = None
    finished_at: Moment | None = None


class ShelfEntry(SQLModel, table=True):
    """A book on somebody's shelf. With a rating or a review it is also a review of the book."""

    __tablename__ = "shelf_entry"
    __table_args__ = table_options(
        sa.CheckConstraint("status IN ('wishlist', 'reading', 'completed', 'abandoned')", name="status"),
        sa.CheckConstraint("rating BETWEEN 1 AND 5", name="rating"),
        sa.CheckConstraint(
            "(rating IS NULL AND review IS NULL) OR status IN ('completed', 'abandoned')", name="review"
        ),
        sa.UniqueConstraint("user_id", "book_id", name="uq_shelf_entry_book_id"),
        sa.Index("ix_shelf_entry_user_id", "user_id", "id"),
    )

    id: int = key_column()
    user_id: int = Field(foreign_key="user.id", ondelete="CASCADE")
    book_id: int = Field(foreign_key="book.id", ondelete="CASCADE", index=True)
    status: str = Field(max_length=20)
    rating: int | None = None
    review: str | None = None
    tags: list[str] = Field(default_factory=list, sa_type=sa.JSON, nullable=False)
    started_at: datetime | None = moment_column()
    finished_at: datetime | None = moment_column()
    added_at: datetime = stamp_column()
    updated_at: datetime = stamp_column()

    @property
    def is_review(self) -> bool:
        return self.rating is not None or self.review is not None

    def revise(self, change: EntryUpdate) -> None:
        """Apply the fields that `change` names. Raises DomainError where a rule of the shelf is broken."""
        named = change.model_dump(exclude_unset=True)
        if "tags" in named:
            named["tags"] = list(dict.fromkeys(named["tags"] or ()))
        finishes = named.get("status") == ShelfStatus.completed != self.status
        if finishes and "finished_at" not in named:
            named["finished_at"] = now()
        for name, value in named.items():
            setattr(self, name, value)
        if self.is_review and self.status not in (ShelfStatus.completed, ShelfStatus.abandoned):
            field = "rating" if self.rating is not None else "review"
            raise DomainError(field, f"needs the status completed or abandoned; this book is on {self.status}")
        self.updated_at = now()


class EntryPublic(BaseModel):
    model_config = {"from_attributes": True}

    book_id: int
    status: ShelfStatus
    rating: int | None
    review: str | None
    tags: list[str]
    started_at: datetime | None
    finished_at: datetime | None
    added_at: datetime
    updated_at: datetime
    book: BookPublic


class ReviewPublic(BaseModel):
    username: str
    rating: int | None
    review: str | None
    finished_at: datetime | None
    updated_at: datetime


class YearCount(BaseModel):
    year: int
    books: int
    pages: int = Limit(description="Of the books whose number of pages is known.")


class AuthorCount(BaseModel):
    author: str
    count: int


class ShelfStats(BaseModel):
    total: int
    by_status: dict[ShelfStatus, int]
    by_year: list[YearCount] = Limit(description="What I completed, by the year (UTC) of `finished_at`, newest first.")
    average_rating: float | None
    rating_count: int
    top_genres: list[GenreCount] = Limit(description="Of what I completed, the ten most frequent.")
    top_authors: list[AuthorCount] = Limit(description="Of what I completed, the ten most frequent.")


# --- loans --------------------------------------------------------------------------------------------------------


class LoanStatus(StrEnum):
    """A loan is exactly one of these."""

    active = "active"
    overdue = "overdue"
    returned = "returned"


class LoanCreate(Shape):
    book_id: BodyId
    quantity: Annotated[int, Number, Limit(ge=1, le=COPIES_MAX)] = 1
    due_at: Moment | None = Limit(
        default=None, description="`LOAN_DAYS` from now where it is left out; at most twice that."
    )
    user_id: BodyId | None = Limit(default=None, description="Who borrows, where that is not me; for staff.")


class Loan(SQLModel, table=True):
    """Copies of a book that somebody has taken home. Open until they are all back, at once."""

    __tablename__ = "loan"
    __table_args__ = table_options(
        sa.CheckConstraint("quantity > 0", name="quantity"),
        sa.CheckConstraint("due_at > borrowed_at", name="due_at"),
        sa.CheckConstraint(f"renewals BETWEEN 0 AND {RENEWALS_MAX}", name="renewals"),
    )

    id: int = key_column()
    user_id: int = Field(foreign_key="user.id", ondelete="CASCADE", index=True)
    book_id: int = Field(foreign_key="book.id", ondelete="CASCADE", index=True)
    quantity: int = 1
    borrowed_at: datetime = stamp_column()
    due_at: datetime = stamp_column()
    returned_at: datetime | None = moment_column()
    renewals: int = 0

    @property
    def status(self) -> LoanStatus:
        return status_of(self.due_at, self.returned_at)

    def renew(self, days: int) -> None:
        """From the day it was due, not from today: who renews early loses nothing."""
        self.due_at += timedelta(days=days)
        self.renewals += 1


def status_of(due_at: datetime, returned_at: datetime | None) -> LoanStatus:
    if returned_at is not None:
        return LoanStatus.returned
    return LoanStatus.overdue if due_at < now() else LoanStatus.active


class LoanPublic(BaseModel):
    id: int
    user_id: int
    username: str
    book_id: int
    title: str
    quantity: int
    borrowed_at: datetime
    due_at: datetime
    returned_at: datetime | None
    renewals: int

    @computed_field(description="Exactly one of these; `overdue` is open and past `due_at`.")  # type: ignore[prop-decorator]  # mypy takes none
    @property
    def status(self) -> LoanStatus:
        return status_of(self.due_at, self.returned_at)


# --- uploads ------------------------------------------------------------------------------------------------------


class UploadStatus(StrEnum):
    queued = "queued"
    processing = "processing"
    completed = "completed"
    failed = "failed"
    cancelled = "cancelled"


class OnDuplicate(StrEnum):
    skip = "skip"
    update = "update"


class Upload(SQLModel, table=True):
    __tablename__ = "upload"
    __table_args__ = table_options(
        sa.CheckConstraint("status IN ('queued', 'processing', 'completed', 'failed', 'cancelled')", name="status"),
        sa.CheckConstraint("rows = inserted + updated + skipped + failed", name="rows"),
        sa.CheckConstraint("progress BETWEEN 0 AND 1", name="progress"),
    )

    id: int = key_column()
    user_id: int = Field(foreign_key="user.id", ondelete="CASCADE", index=True)
    filename: str = Field(max_length=255)
    size: int
    status: str = Field(default=UploadStatus.queued, max_length=20, index=True)
    rows: int = 0
    inserted: int = 0
    updated: int = 0
    skipped: int = 0
    failed: int = 0
    warnings: int = 0
    progress: float = 0
    ignored_columns: list[str] = Field(default_factory=list, sa_type=sa.JSON, nullable=False)
    error: str | None = None
    shelve: bool = Field(default=False, sa_column_kwargs={"server_default": sa.false()})
    on_duplicate: str = Field(
        default=OnDuplicate.skip, max_length=10, sa_column_kwargs={"server_default": OnDuplicate.skip}
    )
    dry_run: bool = Field(default=False, sa_column_kwargs={"server_default": sa.false()})
    enrich: bool = Field(default=False, sa_column_kwargs={"server_default": sa.false()})
    format: str | None = Field(default=None, max_length=20)
    encoding: str | None = Field(default=None, max_length=20)
    delimiter: str | None = Field(default=None, max_length=1)
    header: list[str] | None = Field(default=None, sa_type=sa.JSON)
    created_at: datetime = stamp_column()
    started_at: datetime | None = moment_column()
    finished_at: datetime | None = moment_column()
    worker: str | None = Field(default=None, max_length=20)  # the job that is at it
    lease_until: datetime | None = moment_column()  # while a worker is at it; an old one means that it died


class UploadChunk(SQLModel, table=True):
    """A piece of the file as it came, so that it outlives the request and the process."""

    __tablename__ = "upload_chunk"

    upload_id: int = Field(foreign_key="upload.id", ondelete="CASCADE", primary_key=True)
    number: int = Field(primary_key=True)
    data: bytes


class UploadError(SQLModel, table=True):
    __tablename__ = "upload_error"
    __table_args__ = table_options(sa.CheckConstraint("severity IN ('error', 'warning')", name="severity"))

    id: int = key_column()
    upload_id: int = Field(foreign_key="upload.id", ondelete="CASCADE", index=True)
    row: int
    severity: str = Field(max_length=10)
    field: str | None = Field(default=None, max_length=100)
    value: str | None = None
    message: str
    cells: list[str] | None = Field(default=None, sa_type=sa.JSON)  # of a refused row, to be given back


class UploadPublic(BaseModel):
    model_config = {"from_attributes": True}

    id: int
    filename: str
    status: UploadStatus
    rows: int = Limit(description="Each is in exactly one of inserted, updated, skipped and failed.")
    inserted: int
    updated: int
    skipped: int
    failed: int
    warnings: int = Limit(description="Rows that went in without one bad value.")
    progress: float = Limit(description="From 0 to 1, by the bytes of the file.")
    ignored_columns: list[str] = Limit(description="Columns that the catalogue does not know.")
    shelve: bool = Limit(description="Whether the books go on your shelf, too.")
    on_duplicate: OnDuplicate
    dry_run: bool = Limit(description="Whether it only counts and explains.")
    enrich: bool = Limit(description="Whether Open Library fills in what the file does not say.")
    format: str | None = Limit(description="What was found: `books`, `books-api`, `goodreads` or `storygraph`.")
    encoding: str | None = Limit(description="What was found.", examples=["utf-8"])
    delimiter: str | None = Limit(description="What was found.", examples=[","])
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    error: str | None = Limit(description="Why the upload as a whole failed.")


class UploadErrorPublic(BaseModel):
    model_config = {"from_attributes": True}

    row: int = Limit(description="As a spreadsheet counts: the header is row 1.")
    severity: Literal["error", "warning"]
    field: str | None
    value: str | None
    message: str


# --- events -------------------------------------------------------------------------------------------------------


class Event(SQLModel, table=True):
    """One committed change. The ids of one database only ever grow; the first is the time of its making in ms."""

    __tablename__ = "event"
    __table_args__ = table_options()

    id: int = Field(
        default=None,
        primary_key=True,
        sa_type=sa.BigInteger().with_variant(sa.Integer, "sqlite"),
    )
    at: datetime = stamp_column()
    type: str = Field(max_length=50)
    private: bool = False
    user_id: int | None = Field(default=None, foreign_key="user.id", ondelete="CASCADE", index=True)
    data: dict[str, Any] = Field(sa_type=sa.JSON, nullable=False)


class EventPublic(BaseModel):
    model_config = {"from_attributes": True}

    id: int
    at: datetime
    type: str
    data: dict[str, Any]
