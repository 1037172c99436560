"""The tables: columns, constraints and indexes, and rules about single rows."""

import functools
import math
import re
import unicodedata
from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Dialect
from sqlmodel import Field, Session, SQLModel

# A violated constraint is reported by its name: `uq_user_email` and `ck_book_pages` are errors of the fields `email`
# and `pages`.
SQLModel.metadata.naming_convention = {
    "pk": "pk_%(table_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s",
    "uq": "uq_%(table_name)s_%(column_0_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "ix": "ix_%(table_name)s_%(column_0_name)s",
}
MAX_ID = 2**31 - 1  # of an INTEGER on every database


def utcnow() -> datetime:
    """The current time. Call it as `models.utcnow()`, so that tests can replace it."""
    return datetime.now(UTC)


class InvalidField(Exception):
    """A value that breaks a rule: 422, with the field's name."""

    def __init__(self, field: str, message: str, source: str = "body") -> None:
        super().__init__(f"{field}: {message}")
        self.field, self.message, self.source = field, message, source


# --- column types -------------------------------------------------------------------------------------------------


class Cents(sa.TypeDecorator[Decimal]):
    """A price, stored as an integer: SQLite has no exact decimals."""

    impl = sa.Integer
    cache_ok = True

    def process_bind_param(self, value: Decimal | None, dialect: Dialect) -> int | None:
        return None if value is None else int(value * 100)

    def process_result_value(self, value: int | None, dialect: Dialect) -> Decimal | None:
        return None if value is None else Decimal(value) / 100


def to_quarters(stars: float) -> float:
    """The nearest quarter of a star; whole stars as an integer, which JSON shows as 4 and not as 4.0."""
    quarters = round(float(stars) * 4)
    return quarters / 4 if quarters % 4 else quarters // 4


class Stars(sa.TypeDecorator[float]):
    """Ratings in quarters, and sums of them. NUMERIC: SQLite stores 4.0 as the integer 4, PostgreSQL exact decimals."""

    impl = sa.Numeric(asdecimal=False)
    cache_ok = True

    def process_result_value(self, value: float | None, dialect: Dialect) -> float | None:
        return None if value is None else to_quarters(value)


BigId = sa.BigInteger().with_variant(sa.Integer, "sqlite")
# By code points on every database: PostgreSQL's default order depends on the locale of its server.
SortKey = sa.String().with_variant(sa.String(collation="C"), "postgresql")
MAX_SORT_KEY = 300  # characters: PostgreSQL indexes 2,704 bytes, of title and author together; a cursor holds both, too
MAX_KEY_WORD = 400  # characters: PostgreSQL's tsvector holds words of 2,046 bytes


@functools.lru_cache(10_000)
def _without_mark(c: str) -> str:
    """Nothing for accents, points, tone marks, and what is invisible within a word. Vowel signs are letters."""
    is_invisible = unicodedata.category(c) in ("Cf", "Me") and c != "\N{ZERO WIDTH SPACE}"
    is_invisible |= "VARIATION SELECTOR" in unicodedata.name(c, "")
    return "" if unicodedata.combining(c) or is_invisible else c


@functools.lru_cache(10_000)
def _in_word(c: str) -> str:
    return c if c.isalnum() or unicodedata.category(c).startswith("M") else " "


def normalize(text: str) -> str:
    """Without case, accents and marks, with single spaces. Both databases store and compare only what this makes."""
    if not text.isascii():  # `upper`: \u0131 and \u0345 have capitals whose case folding is not their own
        text = "".join(map(_without_mark, unicodedata.normalize("NFKD", text).upper()))
    return " ".join(text.casefold().split())


def word_key(text: str) -> str:
    """The normalized words of a text: what is indexed, and looked up, by words."""
    key = normalize(text)
    if not key.replace(" ", "").isalnum():
        key = " ".join("".join(map(_in_word, key)).split())
    return key if len(key) <= MAX_KEY_WORD else re.sub(rf"(\S{{{MAX_KEY_WORD}}})(?=\S)", r"\1 ", key)


def sort_key(text: str) -> str:
    """The beginning of a title's or author's words, by which they are sorted and compared."""
    return word_key(text)[:MAX_SORT_KEY]


TITLE_ORDER, AUTHOR_ORDER = (f"substr({name}, 1, {MAX_SORT_KEY})" for name in ("title_key", "author_key"))


@functools.lru_cache(1000)
def facet_key(text: str | None) -> str | None:
    """The key by which genres and languages are compared and counted."""
    return None if text is None else normalize(text)[:MAX_SORT_KEY]


def primary_key_column() -> Any:
    return Field(default=None, primary_key=True)


def now_column() -> Any:
    # A lambda, so that tests can replace `utcnow`.
    return Field(default_factory=lambda: utcnow())  # noqa: PLW0108


def flag_column() -> Any:
    return Field(default=False, sa_column_kwargs={"server_default": sa.false()})


def table_options(*constraints: sa.schema.SchemaItem) -> Any:
    # AUTOINCREMENT: ids of deleted rows are not used again, so that no token or bookmark leads to another row.
    return (*constraints, {"sqlite_autoincrement": True})


Role = StrEnum("Role", ["reader", "librarian", "admin"])
CodePurpose = StrEnum("CodePurpose", ["verify_email", "reset_password"])
UploadStatus = StrEnum("UploadStatus", ["queued", "processing", "completed", "failed", "cancelled"])
OnDuplicate = StrEnum("OnDuplicate", ["skip", "update"])
ShelfStatus = StrEnum("ShelfStatus", ["wishlist", "reading", "completed", "abandoned"])
LoanStatus = StrEnum("LoanStatus", ["active", "overdue", "returned"])


# --- users --------------------------------------------------------------------------------------------------------


class User(SQLModel, table=True):
    __table_args__ = table_options(
        sa.CheckConstraint("role IN ('reader', 'librarian', 'admin')", name="role"),
        sa.Index("uq_user_username", sa.text("lower(username)"), unique=True),
    )

    id: int = primary_key_column()
    username: str = Field(max_length=50)
    email: str = Field(max_length=254, unique=True)  # in lower case
    password_hash: str = Field(max_length=255)
    full_name: str | None = Field(default=None, max_length=100)
    role: str = Field(default=Role.reader, max_length=20)
    is_active: bool = True
    email_verified_at: datetime | None = None
    pending_email: str | None = Field(default=None, max_length=254, index=True)  # until it is confirmed
    created_at: datetime = now_column()


class Principal(NamedTuple):
    """The owner of a valid access token, and its session."""

    id: int
    username: str
    role: str
    session_id: int
    expires_at: float = math.inf  # of the access token, in seconds since 1970

    @property
    def is_staff(self) -> bool:
        return self.role in (Role.librarian, Role.admin)


class LoginSession(SQLModel, table=True):
    """From a login to its logout. Access tokens name it, and are valid only while it is."""

    __tablename__ = "login_session"
    __table_args__ = table_options()

    id: int = primary_key_column()
    user_id: int = Field(foreign_key="user.id", ondelete="CASCADE", index=True)
    refresh_hash: str = Field(max_length=64)  # SHA-256 of the id of the one valid refresh token
    previous_hash: str | None = Field(default=None, max_length=64)  # of the one before, for clients that retry
    user_agent: str | None = Field(default=None, max_length=200)
    created_at: datetime = now_column()
    last_used_at: datetime = now_column()
    expires_at: datetime = now_column()
    revoked_at: datetime | None = None


class OneTimeCode(SQLModel, table=True):
    """A mailed code or link, as a hash."""

    __tablename__ = "one_time_code"
    __table_args__ = table_options(
        sa.CheckConstraint("purpose IN ('verify_email', 'reset_password')", name="purpose"),
        sa.CheckConstraint("attempts >= 0", name="attempts"),
    )

    id: int = primary_key_column()
    user_id: int = Field(foreign_key="user.id", ondelete="CASCADE", index=True)
    purpose: str = Field(max_length=20)
    email: str | None = Field(default=None, max_length=254)  # the address that it was mailed to
    code_hash: str = Field(max_length=64, index=True)
    attempts: int = 0
    expires_at: datetime = now_column()
    created_at: datetime = now_column()


ANSWER_LIFETIME = timedelta(days=1)


class StoredAnswer(SQLModel, table=True):
    """The answer to a request that was sent with an `Idempotency-Key`: a retry gets it again."""

    __tablename__ = "stored_answer"

    user_id: int = Field(foreign_key="user.id", ondelete="CASCADE", primary_key=True)
    key: str = Field(max_length=255, primary_key=True)
    request_hash: str = Field(max_length=64)
    status: int
    headers: dict[str, str] = Field(sa_type=sa.JSON, nullable=False)
    body: str
    created_at: datetime = Field(index=True)


# --- uploads ------------------------------------------------------------------------------------------------------


class Upload(SQLModel, table=True):
    __table_args__ = table_options(
        sa.CheckConstraint("status IN ('queued', 'processing', 'completed', 'failed', 'cancelled')", name="status"),
        sa.CheckConstraint("rows = inserted + updated + skipped + failed", name="rows"),
        sa.CheckConstraint("progress BETWEEN 0 AND 1", name="progress"),
    )

    id: int = primary_key_column()
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
    hint: str | None = None
    shelve: bool = flag_column()
    on_duplicate: str = Field(
        default=OnDuplicate.skip, max_length=10, sa_column_kwargs={"server_default": OnDuplicate.skip}
    )
    dry_run: bool = flag_column()
    enrich: bool = flag_column()
    format: str | None = Field(default=None, max_length=20)
    encoding: str | None = Field(default=None, max_length=20)
    delimiter: str | None = Field(default=None, max_length=1)
    header: list[str] | None = Field(default=None, sa_type=sa.JSON)
    created_at: datetime = now_column()
    started_at: datetime | None = None
    finished_at: datetime | None = None
    worker: str | None = Field(default=None, max_length=20)  # the job that has the lease
    lease_until: datetime | None = None  # the job renews it; expired, another one takes over
    failed_attempts: int = Field(default=0, sa_column_kwargs={"server_default": "0"})  # since the last stored batch


class UploadChunk(SQLModel, table=True):
    """A piece of the uploaded file, which must survive a crash."""

    __tablename__ = "upload_chunk"

    upload_id: int = Field(foreign_key="upload.id", ondelete="CASCADE", primary_key=True)
    number: int = Field(primary_key=True)
    data: bytes


class UploadError(SQLModel, table=True):
    __tablename__ = "upload_error"
    __table_args__ = table_options(sa.CheckConstraint("severity IN ('error', 'warning')", name="severity"))

    id: int = primary_key_column()
    upload_id: int = Field(foreign_key="upload.id", ondelete="CASCADE", index=True)
    row: int
    severity: str = Field(max_length=10)
    field: str | None = Field(default=None, max_length=100)
    value: str | None = None
    message: str
    cells: list[str] | None = Field(default=None, sa_type=sa.JSON)  # of a refused row, for the file of refused rows


# --- events, settings ---------------------------------------------------------------------------------------------


class Event(SQLModel, table=True):
    """A committed change. Ids only grow; at each start they go on at the time in milliseconds, if that is larger."""

    __table_args__ = table_options()

    id: int = Field(default=None, primary_key=True, sa_type=BigId)
    at: datetime = now_column()
    type: str = Field(max_length=50)
    private: bool = False
    user_id: int | None = Field(default=None, foreign_key="user.id", ondelete="CASCADE", index=True)
    data: dict[str, Any] = Field(sa_type=sa.JSON, nullable=False)


class Setting(SQLModel, table=True):
    """State of the service: `book_count`, `event_floor` (the last id that is not in the log any more), `…_due` (when a
    recurring job is, or the probe of /health), and in development mode `secret_key`."""

    key: str = Field(primary_key=True, max_length=50)
    value: str


MAX_ROWS = 1000  # of a batch that is deleted in one transaction: other writers wait some 10 ms, on PostgreSQL 30


def is_of_batch(table: Any, condition: sa.ColumnElement[bool]) -> sa.ColumnElement[bool]:
    """Whether a row is one of the first `MAX_ROWS` that the condition holds for."""
    key = sa.inspect(table).primary_key
    return sa.tuple_(*key).in_(sa.select(*key).where(condition).limit(MAX_ROWS))


def claim_job(session: Session, name: str, interval: timedelta, longest: timedelta | None = None) -> bool:
    """Whether a recurring job is due. If so, it is due again after `interval`, for all processes.

    It is also due if it would wait for more than `longest`, by default `interval`: the clock has gone back.
    """
    due, now = session.get(Setting, f"{name}_due"), utcnow()
    if due is not None and now < datetime.fromisoformat(due.value) <= now + (longest or interval):
        return False
    schedule_job(session, name, interval)
    return True


def schedule_job(session: Session, name: str, delay: timedelta) -> None:
    session.merge(Setting(key=f"{name}_due", value=(utcnow() + delay).isoformat()))


# --- books --------------------------------------------------------------------------------------------------------

MIN_YEAR = -5000
MAX_PAGES = 100_000
UNKNOWN_YEAR = -32768  # sorts before every year, and so last in descending order; in ascending order its negation does
# The order by rating: the mean of all ratings and ten more of 3, so that one 5 does not beat a thousand 4s and 5s (a
# Bayesian average). Books without ratings come last.
SCORE = "CASE WHEN rating_count = 0 THEN 0.0 ELSE (rating_sum + 30.0) / (rating_count + 10) END"
HAS_AVAILABLE = sa.text("available > 0")


class Book(SQLModel, table=True):
    __table_args__ = table_options(
        sa.CheckConstraint("length(title) > 0", name="title"),
        sa.CheckConstraint("length(author) > 0", name="author"),
        sa.CheckConstraint("length(isbn) = 13", name="isbn"),
        sa.CheckConstraint("pages > 0", name="pages"),
        sa.CheckConstraint("price >= 0", name="price"),
        sa.CheckConstraint(f"publication_year BETWEEN {MIN_YEAR} AND 9999", name="publication_year"),
        sa.CheckConstraint("copies >= 0", name="copies"),
        sa.CheckConstraint("available BETWEEN 0 AND copies", name="available"),
        sa.CheckConstraint("rating_sum BETWEEN 0.25 * rating_count AND 5 * rating_count", name="rating"),
        # For sorting by title, detecting duplicates and finding exact titles.
        sa.Index("ix_book_title_key", sa.text(TITLE_ORDER), sa.text(AUTHOR_ORDER)),
        sa.Index("ix_book_author_key", sa.text(AUTHOR_ORDER)),
        sa.Index("ix_book_year", sa.text(f"coalesce(publication_year, {UNKNOWN_YEAR})")),
        sa.Index("ix_book_year_ascending", sa.text(f"coalesce(publication_year, {-UNKNOWN_YEAR})")),
        sa.Index("ix_book_score", sa.text(SCORE)),
        sa.Index("ix_book_genre", "genre_key"),  # on PostgreSQL with the id
        sa.Index("ix_book_language", "language_key"),
        sa.Index("ix_book_available", "id", "available", sqlite_where=HAS_AVAILABLE, postgresql_where=HAS_AVAILABLE),
    )

    id: int = primary_key_column()
    title: str
    author: str
    isbn: str | None = Field(default=None, unique=True)
    genre: str | None = None
    description: str | None = None
    publisher: str | None = None
    language: str | None = None
    pages: int | None = None
    price: Decimal | None = Field(default=None, sa_type=Cents)
    cover_url: str | None = None
    published_date: date | None = None
    publication_year: int | None = None
    title_key: str = Field(sa_type=SortKey, nullable=False)
    author_key: str = Field(sa_type=SortKey, nullable=False)
    publisher_key: str | None = None
    genre_key: str | None = Field(default=None, sa_type=SortKey)
    language_key: str | None = Field(default=None, sa_type=SortKey)
    copies: int = 0
    available: int = 0
    had_copies: bool = flag_column()  # ever
    rating_count: int = 0
    rating_sum: float = Field(default=0, sa_type=Stars, nullable=False)
    added_by: int | None = Field(default=None, foreign_key="user.id", ondelete="SET NULL", index=True)
    version: int = 1
    created_at: datetime = now_column()
    updated_at: datetime = now_column()

    @property
    def rating(self) -> float | None:
        return self.rating_sum / self.rating_count if self.rating_count else None

    @staticmethod
    def described(new: Any) -> dict[str, Any]:
        """The columns that `new`, a BookBase, sets."""
        return {
            **vars(new),
            "title_key": word_key(new.title),
            "author_key": word_key(new.author),
            "publisher_key": new.publisher and word_key(new.publisher),
            "genre_key": facet_key(new.genre),
            "language_key": facet_key(new.language),
        }

    @staticmethod
    def initial(added_by: int | None) -> dict[str, Any]:
        """The other columns of a new book."""
        now = utcnow()
        counts = {"copies": 0, "available": 0, "had_copies": False, "rating_count": 0, "rating_sum": 0, "version": 1}
        return counts | {"added_by": added_by, "created_at": now, "updated_at": now}

    def touch(self) -> None:
        """For every change of a public column: the ETag is made from the version."""
        self.version += 1
        self.updated_at = utcnow()


class Facet(SQLModel, table=True):
    """How many books have a genre or language, however it is spelled. Maintained by triggers."""

    __table_args__ = (
        sa.Index("ix_facet_count", "kind", sa.text("count DESC"), "key"),
        {"sqlite_with_rowid": False},
    )

    kind: str = Field(primary_key=True, max_length=20)
    key: str = Field(primary_key=True, sa_type=SortKey)
    count: int


class Cover(SQLModel, table=True):
    """A picture from another host; empty: it has none. `position` counts the bytes of all that were ever stored."""

    position: int = Field(primary_key=True, sa_type=BigId)
    isbn: str = Field(max_length=13, unique=True)
    data: bytes
    fetched_at: datetime = now_column()


# --- shelves ------------------------------------------------------------------------------------------------------


class ShelfEntry(SQLModel, table=True):
    """A book on a user's shelf. With a rating or a review it is also a review of the book."""

    __tablename__ = "shelf_entry"
    __table_args__ = table_options(
        sa.CheckConstraint("status IN ('wishlist', 'reading', 'completed', 'abandoned')", name="status"),
        sa.CheckConstraint("rating BETWEEN 0.25 AND 5 AND rating * 4 = round(rating * 4)", name="rating"),
        sa.CheckConstraint(f"page BETWEEN 0 AND {MAX_PAGES}", name="page"),
        sa.UniqueConstraint("user_id", "book_id", name="uq_shelf_entry_book_id"),
        sa.Index("ix_shelf_entry_added_at", "user_id", "added_at", "id"),
    )

    id: int = primary_key_column()
    user_id: int = Field(foreign_key="user.id", ondelete="CASCADE")
    book_id: int = Field(foreign_key="book.id", ondelete="CASCADE", index=True)
    status: str = Field(max_length=20)
    rating: float | None = Field(default=None, sa_type=Stars)
    review: str | None = None
    page: int | None = None  # how far one has read
    tags: list[str] = Field(default_factory=list, sa_type=sa.JSON, nullable=False)
    started_at: datetime | None = None
    finished_at: datetime | None = None
    added_at: datetime = now_column()
    updated_at: datetime = now_column()

    @property
    def is_review(self) -> bool:
        return self.rating is not None or self.review is not None

    def revise(self, change: Mapping[str, Any]) -> bool:
        """Set the fields that `change` names; whether one of them differs."""
        fields = dict(change)
        if "tags" in fields:
            fields["tags"] = list(dict.fromkeys(fields["tags"] or ()))
        if fields.get("status") == ShelfStatus.completed != self.status:
            fields.setdefault("finished_at", self.finished_at or utcnow())
        differing = {name: value for name, value in fields.items() if getattr(self, name) != value}
        if differing:
            self.sqlmodel_update(differing | {"updated_at": utcnow()})
        return bool(differing)


# --- loans --------------------------------------------------------------------------------------------------------

MAX_COPIES = 1_000_000  # of one book
MAX_RENEWALS = 2


class Loan(SQLModel, table=True):
    """Copies of a book that a user has borrowed, and returns together. It outlives the book, whose title it keeps."""

    __table_args__ = table_options(
        sa.CheckConstraint("quantity > 0", name="quantity"),
        sa.CheckConstraint("book_id IS NOT NULL OR title IS NOT NULL", name="title"),
        sa.CheckConstraint("due_at > borrowed_at", name="due_at"),
        sa.CheckConstraint(f"renewals BETWEEN 0 AND {MAX_RENEWALS}", name="renewals"),
    )

    id: int = primary_key_column()
    user_id: int = Field(foreign_key="user.id", ondelete="CASCADE", index=True)
    book_id: int | None = Field(foreign_key="book.id", ondelete="SET NULL", index=True)
    title: str | None = None  # of a deleted book
    quantity: int = 1
    borrowed_at: datetime = now_column()
    due_at: datetime = now_column()
    returned_at: datetime | None = None
    renewals: int = 0
