"""Request and response models, and the validated field types that they are made of."""

import re
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Annotated, Any, Literal, Self, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainSerializer,
    StrictBool,
    StringConstraints,
    ValidationInfo,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema
from stdnum import isbn as isbn_numbers

import models
from models import MAX_COPIES, MAX_ID, MIN_YEAR, LoanStatus, OnDuplicate, Role, ShelfStatus, UploadStatus

Printed = TypeVar("Printed", int, date)


INVALID_CHARACTERS = re.compile("[\x00\ud800-\udfff]")


def _check_characters(text: str) -> str:
    if INVALID_CHARACTERS.search(text):
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


CSV_CONTEXT = {"cells": True}  # the context of validating what a file says, where all is text


def _no_bool(value: object) -> object:
    if isinstance(value, bool):  # pydantic alone would take true for 1
        raise ValueError("must be a number")
    return value


def _number(value: object, info: ValidationInfo) -> object:
    if isinstance(value, str) and info.context is not CSV_CONTEXT:  # and "12" for 12
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


def _check_year(value: Printed) -> Printed:
    """Up to the year after next: publishers announce books that long before they print them."""
    year = value.year if isinstance(value, date) else value
    if not MIN_YEAR <= year <= models.utcnow().year + 2:
        raise ValueError(f"must be between {MIN_YEAR} and {models.utcnow().year + 2}")
    return value


PATTERN_MESSAGES: dict[str, str] = {}  # what a pattern asks for


def pattern(pattern: str, asks: str) -> str:
    """The pattern; a text that does not match it is refused with these words, not with the pattern itself."""
    PATTERN_MESSAGES[pattern] = asks
    return pattern


def describe_error(error: Any) -> str:
    """One of pydantic's errors, as clients are told it."""
    pattern = error.get("ctx", {}).get("pattern")
    return PATTERN_MESSAGES.get(pattern) or str(error["msg"]).removeprefix("Value error, ")


def length(most: int, least: int = 1) -> StringConstraints:
    return StringConstraints(min_length=least, max_length=most)


# Python's idea of white space, not pydantic's, so that a shape, a CSV cell and a sort key agree on what is blank.
Stripped = BeforeValidator(lambda value: value.strip() if isinstance(value, str) else value)
Storable = AfterValidator(_check_characters)


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
        blank = [{"type": "string", "pattern": r"^\s*$"}] if handler.mode == "validation" else []
        return {**described, "anyOf": [*described.get("anyOf", ()), *blank]}


Title = Annotated[str, length(500), Stripped, Storable, NotBlank]
Author = Annotated[str, length(1000), Stripped, Storable, NotBlank]
Language = Annotated[str, length(35), Stripped, Storable, NotBlank]
Word = Annotated[str, length(100), Stripped, Storable, NotBlank]
Name = Annotated[str, length(300), Stripped, Storable, NotBlank]
Tag = Annotated[str, length(50), Stripped, Storable, AfterValidator(_no_comma)]
LongText = Annotated[str, length(20_000), Stripped, Storable, NotBlank]
URL_PATTERN = pattern(
    r"^[Hh][Tt][Tt][Pp][Ss]?://[^\s<>\"\\^`{|}]+$", "must be an address that begins with http:// or https://"
)
Url = Annotated[str, length(2000), StringConstraints(pattern=URL_PATTERN), Stripped, Storable]
Isbn = Annotated[str, length(32), Stripped, AfterValidator(_to_isbn13)]
Price = Annotated[
    Decimal,
    BeforeValidator(_no_bool),
    Field(ge=0, max_digits=9, decimal_places=2, allow_inf_nan=False),
    AfterValidator(abs),  # of -0.0
    PlainSerializer(float, return_type=float, when_used="json"),
]
Number = BeforeValidator(_number)
Year = Annotated[int, Number, Field(ge=MIN_YEAR, le=9999), AfterValidator(_check_year)]
PublishedDate = Annotated[date, BeforeValidator(_iso), AfterValidator(_check_year)]
Timestamp = Annotated[datetime, BeforeValidator(_iso), AfterValidator(_to_utc)]
Id = Annotated[int, Field(ge=1, le=MAX_ID)]
BodyId = Annotated[int, Number, Field(ge=1, le=MAX_ID)]


class RequestModel(BaseModel):
    """What clients send: a field that is not named here is refused."""

    model_config = ConfigDict(extra="forbid")


class Problem(BaseModel):
    """An error, as RFC 9457 describes it."""

    type: str = Field(default="about:blank", examples=["about:blank"])
    title: str = Field(examples=["Not Found"])
    status: int = Field(examples=[404])
    detail: str = Field(examples=["No such book."])
    errors: list["FieldError"] | None = Field(default=None, description="Which fields, with 409 and 422.")


class FieldError(BaseModel):
    loc: list[str | int]
    msg: str
    type: str


def _no_encoded_word(email: str) -> str:
    # Mail headers would decode it (RFC 2047): one mailbox would have endlessly many addresses.
    if "=?" in email:
        raise ValueError("must not contain =?")
    return email


USERNAME_PATTERN = pattern(
    r"^[A-Za-z0-9][A-Za-z0-9._-]*$", "must be of the letters A to Z, digits, '.', '_' and '-', a letter or digit first"
)
Username = Annotated[
    str, StringConstraints(strip_whitespace=True, min_length=2, max_length=50, pattern=USERNAME_PATTERN)
]
# The rule of HTML's <input type=email> (HTML Living Standard, "valid e-mail address"), with a dot in the domain.
# Whether mail arrives there, only mail can tell.
EmailAddress = Annotated[
    str,
    StringConstraints(
        strip_whitespace=True,
        to_lower=True,
        max_length=254,
        pattern=pattern(
            r"^[a-zA-Z0-9.!#$%&'*+/=?^_`{|}~-]+@[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
            r"(?:\.[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?)+$",
            "must be an e-mail address, like ada@example.com",
        ),
    ),
    AfterValidator(_no_encoded_word),
]
Password = Annotated[str, StringConstraints(min_length=8, max_length=128), Storable]


class UserCreate(RequestModel):
    username: Username = Field(examples=["ada"])
    email: EmailAddress = Field(examples=["ada@example.com"])
    password: Password = Field(examples=["a long way to Arrakis"])
    full_name: Annotated[Word | None, BlankIsNull] = None


class AccountCreate(UserCreate):
    role: Role = Role.reader


class UserUpdate(RequestModel):
    """A field that is left out stays; `full_name: null` clears it."""

    email: EmailAddress = Field(default="", examples=["rita@example.com"])
    full_name: Annotated[Word | None, BlankIsNull] = Field(default=None, examples=["Rita R. Reader"])
    current_password: Annotated[str, Field(max_length=1000), Storable] | None = Field(
        default=None, description="Needed with a new `email`.", examples=["a long way to Arrakis"]
    )


class AccountUpdate(RequestModel):
    """A field that is left out stays; `full_name: null` clears it."""

    email: EmailAddress = Field(default="", examples=["rita@example.com"])
    full_name: Annotated[Word | None, BlankIsNull] = Field(default=None, examples=["Rita R. Reader"])
    role: Role = Role.reader
    is_active: StrictBool = Field(default=True, examples=[True])


class UserPublic(BaseModel):
    model_config = {"from_attributes": True}

    id: int
    username: str
    email: str
    full_name: str | None
    role: Role
    is_active: bool
    email_verified_at: datetime | None
    pending_email: str | None = Field(description="A new address that waits to be confirmed.")
    created_at: datetime


class SessionPublic(BaseModel):
    id: int
    user_agent: str | None
    created_at: datetime
    last_used_at: datetime
    expires_at: datetime
    current: bool = Field(description="Whether it is the one that asks.")


class UploadPublic(BaseModel):
    model_config = {"from_attributes": True}

    id: int
    filename: str
    status: UploadStatus
    rows: int = Field(description="Each is in exactly one of inserted, updated, skipped and failed.")
    inserted: int
    updated: int
    skipped: int
    failed: int
    warnings: int = Field(description="Rows that went in without one bad value.")
    progress: float = Field(description="From 0 to 1, by the bytes of the file.")
    ignored_columns: list[str] = Field(description="Columns that the catalogue does not know.")
    shelve: bool = Field(description="Whether the books go on your shelf, too.")
    on_duplicate: OnDuplicate
    dry_run: bool = Field(description="Whether it only counts and explains.")
    enrich: bool = Field(description="Whether Open Library fills in what the file does not say.")
    format: str | None = Field(description="What was found: `books`, `books-api`, `goodreads` or `storygraph`.")
    encoding: str | None = Field(description="What was found.", examples=["utf-8"])
    delimiter: str | None = Field(description="What was found.", examples=[","])
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    error: str | None = Field(description="Why the upload as a whole failed.")


class UploadErrorPublic(BaseModel):
    model_config = {"from_attributes": True}

    row: int = Field(description="As a spreadsheet counts: the header is row 1.")
    severity: Literal["error", "warning"]
    field: str | None
    value: str | None
    message: str


class EventPublic(BaseModel):
    model_config = {"from_attributes": True}

    id: int
    at: datetime
    type: str
    data: dict[str, Any]


# --- books --------------------------------------------------------------------------------------------------------


class BookBase(BaseModel):
    """What people can say of a book."""

    title: Title = Field(examples=["Pride and Prejudice"])
    author: Author = Field(description="One or several, separated by `, `.", examples=["Jane Austen"])
    isbn: Annotated[Isbn | None, BlankIsNull] = Field(
        default=None,
        description="ISBN-10 or 13; kept and shown as 13 digits.",
        examples=["978-0-14-143951-8"],
    )
    genre: Annotated[Word | None, BlankIsNull] = Field(default=None, examples=["Romance"])
    description: Annotated[LongText | None, BlankIsNull] = None
    publisher: Annotated[Name | None, BlankIsNull] = None
    language: Annotated[Language | None, BlankIsNull] = Field(default=None, examples=["en"])
    pages: Annotated[int, Number, Field(ge=1, le=100_000)] | None = None
    price: Price | None = Field(default=None, examples=[7.99])
    cover_url: Annotated[Url | None, BlankIsNull] = None
    published_date: PublishedDate | None = Field(default=None, examples=["1813-01-28"])
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
    rating: float | None = Field(description="The average of its ratings, 1 to 5, or null.")
    rating_count: int
    added_by: int | None
    version: int
    created_at: datetime
    updated_at: datetime


class GenreCount(BaseModel):
    genre: str
    count: int


def _not_zero(number: int) -> int:
    if number == 0:
        raise ValueError("must not be 0")
    return number


class StockChange(RequestModel):
    quantity: Annotated[int, Number, Field(ge=-MAX_COPIES, le=MAX_COPIES), AfterValidator(_not_zero)] = Field(
        description="How many copies come; negative: how many go.", examples=[3]
    )


class StockPublic(BaseModel):
    copies: int
    available: int
    on_loan: int


class EntryCreate(RequestModel):
    status: ShelfStatus = ShelfStatus.wishlist


class EntryUpdate(RequestModel):
    """RFC 7396: a field that is left out stays as it is, null clears it."""

    status: ShelfStatus = ShelfStatus.wishlist
    rating: Annotated[int, Number, Field(ge=1, le=5)] | None = None
    review: Annotated[LongText | None, BlankIsNull] = None
    tags: Annotated[list[Tag], Field(max_length=50)] | None = []  # pydantic copies it
    started_at: Timestamp | None = None
    finished_at: Timestamp | None = None


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


class LoanCreate(RequestModel):
    book_id: BodyId
    quantity: Annotated[int, Number, Field(ge=1, le=MAX_COPIES)] = 1
    due_at: Timestamp | None = Field(
        default=None, description="`LOAN_DAYS` from now where it is left out; at most twice that."
    )
    user_id: BodyId | None = Field(default=None, description="Who borrows, where that is not me; for staff.")


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
    status: LoanStatus = Field(description="Exactly one of these; `overdue` is open and past `due_at`.")


def invalid_body(field: str, message: str) -> RequestValidationError:
    return RequestValidationError([{"loc": ("body", field), "msg": message, "type": "value_error"}])
