"""Request and response models, and the validated types of their fields."""

import functools
import re
from collections.abc import Callable
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, StringConstraints, ValidationInfo
from pydantic_core import CoreSchema, core_schema
from stdnum import isbn as isbn_numbers

import models
from models import MAX_COPIES, MAX_ID, MAX_PAGES, MIN_YEAR, LoanStatus, OnDuplicate, Role, ShelfStatus, UploadStatus

# --- validators ---------------------------------------------------------------------------------------------------

INVALID_CHARACTERS = re.compile("[\x00\ud800-\udfff]")
CSV_CONTEXT = {"cells": True}  # the validation context of CSV cells, which are all text


def _refuse(is_invalid: Callable[[Any], object], message: str, **refused: Any) -> pydantic.GetPydanticSchema:
    """Refuse values with this message. In the document they are `not` what the keywords say."""

    def check(value: Any) -> Any:
        if is_invalid(value):
            raise ValueError(message)
        return value

    return pydantic.GetPydanticSchema(
        lambda source, handler: core_schema.no_info_after_validator_function(check, handler(source)),
        lambda schema, handler: {"not": refused} | handler(schema),
    )


def _blank_is_null(value: object) -> object:
    return None if isinstance(value, str) and not value.strip() else value


@functools.lru_cache(100)  # an import asks twice for each row
def is_isbn13(text: str) -> bool:
    """Whether it is an ISBN as it is stored. stdnum takes ten times as long, which counts in an import."""
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


def _check_iso(value: object) -> object:
    # pydantic alone would take a number for seconds since 1970.
    if isinstance(value, date) or (isinstance(value, str) and re.match(r"\d{4}-\d\d-\d\d", value)):
        return value
    raise ValueError("must be like 2008-08-11 (ISO 8601)")


def _no_bool(value: object) -> object:
    if isinstance(value, bool):  # pydantic alone would take true for 1
        raise ValueError("must be a number")
    return value


def _check_number(value: object, info: ValidationInfo) -> object:
    if isinstance(value, str) and info.context is not CSV_CONTEXT:  # and "12" for 12
        raise ValueError("must be a number")
    return _no_bool(value)


def _to_utc(moment: datetime) -> datetime:
    """In UTC. SQLite rounds the last millisecond of 9999 up to a year that it can't hold; Python has no year 0."""
    if not 1 < moment.year < 9999:
        raise ValueError("is out of range")
    return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)


def _check_year(value: Any) -> Any:
    """At most two years ahead: publishers announce books that long before they print them."""
    year, latest = value.year if isinstance(value, date) else value, models.utcnow().year + 2
    if not MIN_YEAR <= year <= latest:
        raise ValueError(f"must be between {MIN_YEAR} and {latest}")
    return value


# --- field types --------------------------------------------------------------------------------------------------

PATTERN_MESSAGES: dict[str, str] = {}  # by pattern


def pattern(pattern: str, message: str) -> str:
    """The pattern. A text that does not match it is refused with this message, which is more than pydantic's."""
    PATTERN_MESSAGES[pattern] = message
    return pattern


def describe_error(error: Any) -> str:
    """The message of one of pydantic's errors."""
    pattern = error.get("ctx", {}).get("pattern")
    return PATTERN_MESSAGES.get(pattern) or str(error["msg"]).removeprefix("Value error, ")


def length(most: int, least: int = 1) -> StringConstraints:
    return StringConstraints(min_length=least, max_length=most)


class BlankIsNull:
    """Accepts a blank text, as forms send it, as null."""

    @staticmethod
    def __get_pydantic_core_schema__(source: Any, handler: pydantic.GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(_blank_is_null, handler(source))

    @staticmethod
    def __get_pydantic_json_schema__(schema: CoreSchema, handler: pydantic.GetJsonSchemaHandler) -> dict[str, Any]:
        described = handler(schema)
        text = described["anyOf"][0]
        text.pop("minLength", None)
        if (pattern := text.pop("pattern", NOT_BLANK)) != NOT_BLANK:
            text["pattern"] = rf"^[{SPACE}]*$|{pattern}"
        return described


# By Python's definition of white space, not pydantic's, so that models, CSV cells and sort keys agree on what is blank.
Stripped = BeforeValidator(lambda value: value.strip() if isinstance(value, str) else value)
INVALID_TEXT = "must not contain NUL characters or halves of surrogate pairs"
Storable = _refuse(INVALID_CHARACTERS.search, INVALID_TEXT, pattern=r"\x00")
SPACE = r"\s\x1c-\x1f\x85"  # what Python strips, in every dialect: ECMA's and pydantic's `\s` lack some of it
NOT_BLANK = f"[^{SPACE}]"
NotBlank = Field(json_schema_extra={"pattern": NOT_BLANK})  # documents that a stripped text must not be empty
Title = Annotated[str, length(500), Stripped, Storable, NotBlank]
Author = Annotated[str, length(1000), Stripped, Storable, NotBlank]
Language = Annotated[str, length(35), Stripped, Storable, NotBlank]
Word = Annotated[str, length(100), Stripped, Storable, NotBlank]
Name = Annotated[str, length(300), Stripped, Storable, NotBlank]
NoComma = _refuse(lambda t: "," in t, "must not contain a comma, which separates tags in files", pattern=r"[,\x00]")
Tag = Annotated[str, length(50), Stripped, NoComma, Storable, NotBlank]
LongText = Annotated[str, length(20_000), Stripped, Storable, NotBlank]
URL_PATTERN = pattern(
    rf'^[Hh][Tt][Tt][Pp][Ss]?://[^{SPACE}<>"\\^`{{|}}]+$', "must be an address that begins with http:// or https://"
)
Url = Annotated[str, length(2000), StringConstraints(pattern=URL_PATTERN), Stripped, Storable]
Isbn = Annotated[str, length(32), Stripped, AfterValidator(_to_isbn13)]
Price = Annotated[
    Decimal,
    Field(ge=0, max_digits=9, decimal_places=2, allow_inf_nan=False),
    AfterValidator(abs),  # of -0.0
    BeforeValidator(_no_bool),  # before `Field`, the digits would be checked in Python (pydantic #11576)
    pydantic.PlainSerializer(float, return_type=float, when_used="json"),
    pydantic.WithJsonSchema({"type": "number", "minimum": 0, "maximum": 9_999_999.99, "multipleOf": 0.01}),
]
# The last annotation: before `Field`, its bounds would be `ge` and `le` in the document (pydantic #11576).
Number = BeforeValidator(_check_number)
NotZero = _refuse(lambda number: number == 0, "must not be 0", const=0)
Year = Annotated[int, Field(ge=MIN_YEAR, le=9999), AfterValidator(_check_year), Number]
PublishedDate = Annotated[date, BeforeValidator(_check_iso), AfterValidator(_check_year)]
Timestamp = Annotated[datetime, BeforeValidator(_check_iso), AfterValidator(_to_utc)]
Rating = Annotated[float, Field(ge=0.25, le=5, multiple_of=0.25), AfterValidator(models.to_quarters), Number]
Id = Annotated[int, Field(ge=1, le=MAX_ID)]
BodyId = Annotated[int, Field(ge=1, le=MAX_ID), Number]
AddedBy = Annotated[str, Field(pattern=pattern("^(me|[0-9]{1,10})$", "must be `me` or the id of a user"))]
USERNAME_PATTERN = pattern(
    r"^[A-Za-z0-9][A-Za-z0-9._-]*$", "must be of the letters A to Z, digits, '.', '_' and '-', a letter or digit first"
)
Username = Annotated[
    str, StringConstraints(strip_whitespace=True, min_length=2, max_length=50, pattern=USERNAME_PATTERN)
]
EmailAddress = Annotated[
    str,
    StringConstraints(
        strip_whitespace=True,
        to_lower=True,
        max_length=254,
        # As <input type=email> (HTML Living Standard, "valid e-mail address"), with a dot in the domain.
        pattern=pattern(
            r"^[a-zA-Z0-9.!#$%&'*+/=?^_`{|}~-]+@[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
            r"(?:\.[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?)+$",
            "must be an e-mail address, like ada@example.com",
        ),
    ),
    # Mail headers would decode it (RFC 2047): one mailbox would have endlessly many addresses.
    _refuse(lambda email: "=?" in email, "must not contain =?", pattern=r"=\?"),
]
Password = Annotated[str, StringConstraints(min_length=8, max_length=128), Storable]


class RequestModel(BaseModel, extra="forbid"):
    """Unknown fields are refused."""


def example(**values: Any) -> dict[str, Any]:
    """For `json_schema_extra`: one example of the whole model."""
    return {"examples": [values]}


# Types of response fields, with an example.
Moment = Annotated[datetime, Field(examples=["2026-03-08T18:00:00Z"])]
Count = Annotated[int, Field(examples=[2])]
STARS = {"type": "number", "description": "In quarters; whole stars are whole numbers.", "examples": [5]}
Stars = Annotated[int | float, pydantic.WithJsonSchema(STARS)]
PublicId = Annotated[int, Field(examples=[1])]


class Problem(BaseModel):
    """An error, as RFC 9457 describes it."""

    type: str = Field(default="about:blank", examples=["about:blank"])
    title: str = Field(examples=["Not Found"])
    status: int = Field(examples=[404])
    detail: str = Field(examples=["No such book."])
    code: str = Field(description="What happened, in a stable word.", examples=["not_found"])
    request_id: str = Field(description="As in `X-Request-ID` and the access log.", examples=["9f86d081884c7d65"])
    errors: list["FieldError"] | None = Field(default=None, description="Which fields, with 409 and 422.")


class FieldError(BaseModel):
    loc: list[str | int] = Field(examples=[["body", "title"]])
    msg: str = Field(examples=["Field required"])
    type: str = Field(examples=["missing"])


# --- users --------------------------------------------------------------------------------------------------------


class UserCreate(RequestModel):
    username: Username = Field(examples=["rita"])
    email: EmailAddress = Field(examples=["rita@example.com"])
    password: Password = Field(examples=["a long way to Arrakis"])
    full_name: Annotated[Word | None, BlankIsNull] = Field(default=None, examples=["Rita Reader"])


LYDIA = {"username": "lydia", "email": "lydia@example.com", "password": "a desk in the hall", "role": "librarian"}


class AccountCreate(UserCreate, json_schema_extra=example(**LYDIA)):
    role: Role = Field(default=Role.reader, examples=["librarian"])


class UserUpdate(RequestModel, json_schema_extra=example(full_name="Rita R. Reader")):
    """Fields that are left out stay as they are; `full_name: null` clears it."""

    email: EmailAddress = ""
    full_name: Annotated[Word | None, BlankIsNull] = None
    current_password: Annotated[str, Field(max_length=1000), Storable] | None = Field(
        default=None, description="Needed with a new `email`."
    )


class AccountUpdate(RequestModel, json_schema_extra=example(role="librarian")):
    """Fields that are left out stay as they are; `full_name: null` clears it."""

    email: EmailAddress = ""
    full_name: Annotated[Word | None, BlankIsNull] = None
    role: Role = Role.reader
    is_active: pydantic.StrictBool = True


class UserPublic(BaseModel, from_attributes=True):
    id: PublicId
    username: str = Field(examples=["rita"])
    email: str = Field(examples=["rita@example.com"])
    full_name: str | None = Field(examples=["Rita Reader"])
    role: Role
    is_active: bool = Field(examples=[True])
    email_verified_at: Moment | None
    pending_email: str | None = Field(description="A new address that waits to be confirmed.", examples=[None])
    created_at: Moment


class SessionPublic(BaseModel):
    id: PublicId
    user_agent: str | None = Field(examples=["Mozilla/5.0 (X11; Linux x86_64)"])
    created_at: Moment
    last_used_at: Moment
    expires_at: Moment
    current: bool = Field(description="Whether this request belongs to it.", examples=[True])


# --- uploads and events -------------------------------------------------------------------------------------------


class UploadPublic(BaseModel, from_attributes=True):
    id: PublicId
    filename: str = Field(examples=["books.csv"])
    status: UploadStatus
    rows: int = Field(description="Each is in exactly one of inserted, updated, skipped and failed.", examples=[8])
    inserted: Count
    updated: Count
    skipped: Count
    failed: Count
    warnings: int = Field(description="Rows that went in without some value, or with a text cut.", examples=[1])
    progress: float = Field(description="From 0 to 1, by the bytes of the file.", examples=[1.0])
    ignored_columns: list[str] = Field(description="Columns that the catalogue does not have.", examples=[["shelf"]])
    shelve: bool = Field(description="Whether the books go on your shelf, too.", examples=[False])
    on_duplicate: OnDuplicate
    dry_run: bool = Field(description="Whether it only counts and explains.", examples=[False])
    enrich: bool = Field(description="Whether Open Library fills in what the file lacks.", examples=[False])
    format: str | None = Field(
        description="`books`, `books-api`, or the service that it comes from.", examples=["books"]
    )
    encoding: str | None = Field(description="Detected.", examples=["utf-8"])
    delimiter: str | None = Field(description="Detected.", examples=[","])
    created_at: Moment
    started_at: Moment | None
    finished_at: Moment | None
    error: str | None = Field(description="Why the upload as a whole failed.", examples=[None])
    hint: str | None = Field(description="What its owner should know: what becomes public.", examples=[None])


class UploadErrorPublic(BaseModel, from_attributes=True):
    row: int = Field(description="As a spreadsheet counts: the header is row 1.", examples=[7])
    severity: Literal["error", "warning"]
    field: str | None = Field(examples=["isbn"])
    value: str | None = Field(examples=["978-0-441-17271-8"])
    message: str = Field(examples=["is not an ISBN: the number's checksum or check digit is invalid"])


class EventPublic(BaseModel, from_attributes=True):
    id: int = Field(examples=[1795254571301])
    at: Moment
    type: str = Field(examples=["book.deleted"])
    data: dict[str, Any] = Field(
        description="By `type`, as in `EventData`.", examples=[{"id": 1, "title": "Dune", "author": "Frank Herbert"}]
    )


# --- books --------------------------------------------------------------------------------------------------------


class BookBase(BaseModel):
    """What describes a book."""

    title: Title = Field(examples=["Dune"])
    author: Author = Field(description="One or several, separated by `, `.", examples=["Frank Herbert"])
    isbn: Annotated[Isbn | None, BlankIsNull] = Field(
        default=None, description="ISBN-10 or 13; stored as 13 digits.", examples=["978-0-441-17271-9"]
    )
    genre: Annotated[Word | None, BlankIsNull] = Field(default=None, examples=["Science fiction"])
    description: Annotated[LongText | None, BlankIsNull] = Field(default=None, examples=["Spice and sandworms."])
    publisher: Annotated[Name | None, BlankIsNull] = Field(default=None, examples=["Ace"])
    language: Annotated[Language | None, BlankIsNull] = Field(default=None, examples=["en"])
    pages: Annotated[int, Field(ge=1, le=MAX_PAGES), Number] | None = Field(default=None, examples=[535])
    price: Price | None = Field(default=None, examples=[9.99])
    cover_url: Annotated[Url | None, BlankIsNull] = Field(default=None, examples=["https://example.com/dune.jpg"])
    published_date: PublishedDate | None = Field(default=None, examples=["1965-08-01"])
    publication_year: Year | None = Field(
        default=None, description="By default of `published_date`; negative before the common era.", examples=[1965]
    )


class BookCreate(BookBase, extra="forbid"):
    @pydantic.model_validator(mode="after")
    def _a_date_sets_the_year(self) -> Self:
        if self.published_date is not None and self.publication_year is None:
            self.publication_year = self.published_date.year
        return self


class BookUpdate(BookBase, extra="forbid", json_schema_extra=example(price=8.5, publisher=None)):
    """RFC 7396: fields that are left out stay as they are, null clears them."""

    title: Title = ""
    author: Author = ""


class BookPublic(BaseModel, from_attributes=True):
    id: PublicId
    title: str = Field(examples=["Dune"])
    author: str = Field(examples=["Frank Herbert"])
    isbn: str | None = Field(examples=["9780441172719"])
    genre: str | None = Field(examples=["Science fiction"])
    description: str | None = Field(examples=["Spice and sandworms."])
    publisher: str | None = Field(examples=["Ace"])
    language: str | None = Field(examples=["en"])
    pages: int | None = Field(examples=[535])
    price: Price | None = Field(examples=[9.99])
    cover_url: str | None = Field(examples=["https://example.com/dune.jpg"])
    published_date: date | None = Field(examples=["1965-08-01"])
    publication_year: int | None = Field(examples=[1965])
    copies: int = Field(examples=[3])
    available: Count
    rating: float | None = Field(description="The average of its ratings, 0.25 to 5, or null.", examples=[4.5])
    rating_count: Count
    added_by: int | None = Field(examples=[2])
    version: int = Field(examples=[7])
    created_at: Moment
    updated_at: Moment


class GenreCount(BaseModel):
    genre: str = Field(examples=["Science fiction"])
    count: Count


class StockChange(RequestModel):
    quantity: Annotated[int, Field(ge=-MAX_COPIES, le=MAX_COPIES), NotZero, Number] = Field(
        description="How many copies to add; negative: to remove.", examples=[3]
    )


class StockUpdate(RequestModel):
    copies: Annotated[int, Field(ge=0, le=MAX_COPIES), Number] = Field(examples=[3])


class StockPublic(BaseModel):
    copies: int = Field(examples=[3])
    available: Count
    on_loan: int = Field(examples=[1])


# --- shelves and loans --------------------------------------------------------------------------------------------


class EntryCreate(RequestModel):
    status: ShelfStatus = Field(default=ShelfStatus.wishlist, examples=["reading"])


class EntryUpdate(RequestModel, json_schema_extra=example(status="completed", rating=5, tags=["desert"])):
    """RFC 7396: fields that are left out stay as they are, null clears them."""

    status: ShelfStatus = ShelfStatus.wishlist
    rating: Rating | None = Field(default=None, description="In quarters of a star.")
    review: Annotated[LongText | None, BlankIsNull] = None
    page: Annotated[int, Field(ge=0, le=MAX_PAGES), Number] | None = Field(
        default=None, description="How far I have read."
    )
    tags: Annotated[list[Tag], Field(max_length=50)] | None = []  # pydantic copies it
    started_at: Timestamp | None = None
    finished_at: Timestamp | None = None


class EntryPublic(BaseModel, from_attributes=True):
    book_id: PublicId
    status: ShelfStatus
    rating: Stars | None
    review: str | None = Field(examples=["Sandy."])
    page: int | None = Field(description="How far its reader has read.", examples=[120])
    tags: list[str] = Field(examples=[["desert"]])
    started_at: Moment | None
    finished_at: Moment | None
    added_at: Moment
    updated_at: Moment
    book: BookPublic


class ReviewPublic(BaseModel):
    username: str = Field(examples=["rita"])
    rating: Stars | None
    review: str | None = Field(examples=["Sandy."])
    finished_at: Moment | None
    updated_at: Moment


class LoanCreate(RequestModel, json_schema_extra=example(book_id=1)):
    book_id: BodyId
    quantity: Annotated[int, Field(ge=1, le=MAX_COPIES), Number] = 1
    due_at: Timestamp | None = Field(default=None, description="`LOAN_DAYS` from now by default; at most twice that.")
    user_id: BodyId | None = Field(default=None, description="The borrower, if that is not me; for staff.")


class LoanPublic(BaseModel):
    id: PublicId
    user_id: PublicId
    username: str = Field(examples=["rita"])
    book_id: int | None = Field(examples=[1], description="null: the book was deleted; `title` is its last one.")
    title: str = Field(examples=["Dune"])
    quantity: int = Field(examples=[1])
    borrowed_at: Moment
    due_at: datetime = Field(examples=["2026-03-29T18:00:00Z"])
    returned_at: datetime | None = Field(examples=[None])
    renewals: int = Field(examples=[0])
    status: LoanStatus = Field(description="`overdue`: open and past `due_at`.")
