"""The tables: columns, constraints and indexes, and the rules that a row of one table can apply to itself.

What must always hold is a constraint of the table. Request and response models are in `schemas.py`.
"""

import hashlib
import math
import unicodedata
from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Dialect
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.visitors import InternalTraversal
from sqlmodel import Field, Session, SQLModel

# Names decide how a violation is reported: `uq_user_email` and `ck_book_pages` are answered as faults of the
# fields `email` and `pages`.
SQLModel.metadata.naming_convention = {
    "pk": "pk_%(table_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s",
    "uq": "uq_%(table_name)s_%(column_0_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "ix": "ix_%(table_name)s_%(column_0_name)s",
}
MAX_ID = 2**31 - 1  # what an INTEGER holds everywhere
MIN_YEAR = -5000


def utcnow() -> datetime:
    """The present, in UTC. Tests replace it: every expiry and time stamp asks here."""
    return datetime.now(UTC)


def isoformat(moment: datetime) -> str:
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


class SortableTimestamp(sa.ColumnElement[str]):
    """A moment as text that sorts as it does: what a cursor can hold."""

    inherit_cache = True
    _traverse_internals = [("moment", InternalTraversal.dp_clauseelement)]  # noqa: RUF012  # as SQLAlchemy has it
    type = sa.String()

    def __init__(self, moment: Any) -> None:
        self.moment = sa.type_coerce(moment, sa.String)


@compiles(SortableTimestamp)
def _compile_stored(element: SortableTimestamp, compiler: Any, **options: Any) -> str:
    return str(compiler.process(element.moment, **options))


@compiles(SortableTimestamp, "postgresql")
def _compile_postgresql(element: SortableTimestamp, compiler: Any, **options: Any) -> str:
    moment = compiler.process(element.moment, **options)
    return f"to_char({moment} AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US')"


SortKey = sa.String().with_variant(sa.String(collation="C"), "postgresql")
MAX_SORT_KEY = 1200  # bytes; of a longer text the rest counts as a hash, so that no two are taken for one


def normalize(text: str) -> str:
    """A text as it is compared: no case, no accents, single spaces."""
    if not text.isascii():
        text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return " ".join(text.casefold().split())


def sort_key(text: str) -> str:
    """By which titles and authors sort and are looked up."""
    key = normalize(text)
    if len(key) <= MAX_SORT_KEY // 4 or len(whole := key.encode()) <= MAX_SORT_KEY:
        return key
    # PostgreSQL indexes no more than 2,704 bytes, of title and author together; a cursor holds both, too.
    return whole[: MAX_SORT_KEY - 33].decode(errors="ignore") + " " + hashlib.blake2b(whole, digest_size=16).hexdigest()


class Cents(sa.TypeDecorator[Decimal]):
    """A price, kept as a whole number of hundredths: exact in every database, SQLite's floats included."""

    impl = sa.Integer
    cache_ok = True

    def process_bind_param(self, value: Decimal | None, dialect: Dialect) -> int | None:
        return None if value is None else int(value * 100)

    def process_result_value(self, value: int | None, dialect: Dialect) -> Decimal | None:
        return None if value is None else Decimal(value) / 100


class DomainError(Exception):
    """A rule of the domain that a request breaks: 422, naming the field."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field} {message}")
        self.field, self.message = field, message


def primary_key_column() -> Any:
    return Field(default=None, primary_key=True)


def timestamp_column() -> Any:
    return Field(default=None, sa_type=UtcDateTime, nullable=True)


def now_column() -> Any:
    return Field(
        default_factory=lambda: utcnow(),  # noqa: PLW0108  # looked up at each call, so that tests can replace it
        sa_type=UtcDateTime,
        nullable=False,
    )


def table_options(*constraints: sa.schema.SchemaItem) -> Any:
    # AUTOINCREMENT: an id is never given out twice, so that a token, an event or a bookmark of something deleted
    # can't come to mean something else.
    return (*constraints, {"sqlite_autoincrement": True})


class Role(StrEnum):
    reader = "reader"
    librarian = "librarian"
    admin = "admin"


class User(SQLModel, table=True):
    __tablename__ = "user"
    __table_args__ = table_options(
        sa.CheckConstraint("role IN ('reader', 'librarian', 'admin')", name="role"),
        sa.Index("uq_user_username", sa.text("lower(username)"), unique=True),
    )

    id: int = primary_key_column()
    username: str = Field(max_length=50)
    email: str = Field(max_length=254, unique=True)  # in lower case, see Email
    password_hash: str = Field(max_length=255)
    full_name: str | None = Field(default=None, max_length=100)
    role: str = Field(default=Role.reader, max_length=20)
    is_active: bool = True
    email_verified_at: datetime | None = timestamp_column()
    pending_email: str | None = Field(default=None, max_length=254, index=True)  # until its owner confirms it
    created_at: datetime = now_column()


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

    id: int = primary_key_column()
    user_id: int = Field(foreign_key="user.id", ondelete="CASCADE", index=True)
    refresh_hash: str = Field(max_length=64)  # SHA-256 of the id of the one refresh token that is good now
    previous_hash: str | None = Field(default=None, max_length=64)  # of the one before, for clients that try again
    user_agent: str | None = Field(default=None, max_length=200)
    created_at: datetime = now_column()
    last_used_at: datetime = now_column()
    expires_at: datetime = now_column()
    revoked_at: datetime | None = timestamp_column()


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

    id: int = primary_key_column()
    user_id: int = Field(foreign_key="user.id", ondelete="CASCADE", index=True)
    purpose: str = Field(max_length=20)
    email: str | None = Field(default=None, max_length=254)  # that it was mailed to
    code_hash: str = Field(max_length=64, index=True)
    attempts: int = 0
    expires_at: datetime = now_column()
    created_at: datetime = now_column()


# --- settings -----------------------------------------------------------------------------------------------------


class Setting(SQLModel, table=True):
    """What a database knows of itself: `book_count`, `event_floor` (ids up to it are not in the log, or no longer),
    `…_due` (when a recurring job is), `probed` (by /health), and in development mode `secret_key`."""

    __tablename__ = "setting"

    key: str = Field(primary_key=True, max_length=50)
    value: str


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
    created_at: datetime = now_column()
    started_at: datetime | None = timestamp_column()
    finished_at: datetime | None = timestamp_column()
    worker: str | None = Field(default=None, max_length=20)  # the job that is at it
    lease_until: datetime | None = timestamp_column()  # while a worker is at it; an old one means that it died


class UploadChunk(SQLModel, table=True):
    """A piece of the file as it came, so that it outlives the request and the process."""

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
    cells: list[str] | None = Field(default=None, sa_type=sa.JSON)  # of a refused row, to be given back


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
    at: datetime = now_column()
    type: str = Field(max_length=50)
    private: bool = False
    user_id: int | None = Field(default=None, foreign_key="user.id", ondelete="CASCADE", index=True)
    data: dict[str, Any] = Field(sa_type=sa.JSON, nullable=False)


# Both fill the metadata: who imports this module has every table, those that its foreign keys refer to among them.

MAX_COPIES = 1_000_000  # of one book
MAX_RENEWALS = 2
UNKNOWN_YEAR = -32768  # sorts before every year
# How books sort by rating: the mean after ten imagined votes of 3, so that one 5 does not beat a thousand 4s and 5s
# (a Bayesian average). Books that nobody has rated come last.
SCORE = "CASE WHEN rating_count = 0 THEN 0.0 ELSE (rating_sum + 30.0) / (rating_count + 10) END"


class Book(SQLModel, table=True):
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
    # In the order of code points everywhere: PostgreSQL's own depends on the language of the machine.
    title_key: str = Field(sa_type=SortKey, nullable=False)
    author_key: str = Field(sa_type=SortKey, nullable=False)
    copies: int = 0
    available: int = 0
    rating_count: int = 0
    rating_sum: int = 0
    added_by: int | None = Field(default=None, foreign_key="user.id", ondelete="SET NULL", index=True)
    version: int = 1
    created_at: datetime = now_column()
    updated_at: datetime = now_column()

    @property
    def rating(self) -> float | None:
        return self.rating_sum / self.rating_count if self.rating_count else None

    @staticmethod
    def described(new: Any) -> dict[str, Any]:
        """The columns that follow from what `new` says."""
        return {**vars(new), "title_key": sort_key(new.title), "author_key": sort_key(new.author)}

    @staticmethod
    def initial(added_by: int) -> dict[str, Any]:
        """The other columns of a new book."""
        moment = utcnow()
        figures = {"copies": 0, "available": 0, "rating_count": 0, "rating_sum": 0, "version": 1}
        return figures | {"added_by": added_by, "created_at": moment, "updated_at": moment}

    def describe(self, new: Any) -> None:
        for name, value in self.described(new).items():
            setattr(self, name, value)

    def touch(self) -> None:
        """Every change of what is shown of a book goes with a new version: the ETag is made from it."""
        self.version += 1
        self.updated_at = utcnow()


class Facet(SQLModel, table=True):
    """How many books have this genre or language, spelled like this. Triggers keep it, so that nobody has to count."""

    __tablename__ = "facet"
    __table_args__ = (sa.Index("ix_facet_name", "kind", sa.text("lower(name)")),)

    kind: str = Field(primary_key=True, max_length=20)
    name: str = Field(primary_key=True)
    count: int


# --- shelves ------------------------------------------------------------------------------------------------------


class ShelfStatus(StrEnum):
    wishlist = "wishlist"
    reading = "reading"
    completed = "completed"
    abandoned = "abandoned"


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

    id: int = primary_key_column()
    user_id: int = Field(foreign_key="user.id", ondelete="CASCADE")
    book_id: int = Field(foreign_key="book.id", ondelete="CASCADE", index=True)
    status: str = Field(max_length=20)
    rating: int | None = None
    review: str | None = None
    tags: list[str] = Field(default_factory=list, sa_type=sa.JSON, nullable=False)
    started_at: datetime | None = timestamp_column()
    finished_at: datetime | None = timestamp_column()
    added_at: datetime = now_column()
    updated_at: datetime = now_column()

    @property
    def is_review(self) -> bool:
        return self.rating is not None or self.review is not None

    def revise(self, change: Mapping[str, Any]) -> None:
        """Apply the fields that `change` names. Raises DomainError where a rule of the shelf is broken."""
        named = dict(change)
        if "tags" in named:
            named["tags"] = list(dict.fromkeys(named["tags"] or ()))
        finishes = named.get("status") == ShelfStatus.completed != self.status
        if finishes and "finished_at" not in named:
            named["finished_at"] = utcnow()
        for name, value in named.items():
            setattr(self, name, value)
        if self.is_review and self.status not in (ShelfStatus.completed, ShelfStatus.abandoned):
            field = "rating" if self.rating is not None else "review"
            raise DomainError(field, f"needs the status completed or abandoned; this book is on {self.status}")
        self.updated_at = utcnow()


# --- loans --------------------------------------------------------------------------------------------------------


class LoanStatus(StrEnum):
    """A loan is exactly one of these."""

    active = "active"
    overdue = "overdue"
    returned = "returned"


class Loan(SQLModel, table=True):
    """Copies of a book that somebody has taken home. Open until they are all back, at once."""

    __tablename__ = "loan"
    __table_args__ = table_options(
        sa.CheckConstraint("quantity > 0", name="quantity"),
        sa.CheckConstraint("due_at > borrowed_at", name="due_at"),
        sa.CheckConstraint(f"renewals BETWEEN 0 AND {MAX_RENEWALS}", name="renewals"),
    )

    id: int = primary_key_column()
    user_id: int = Field(foreign_key="user.id", ondelete="CASCADE", index=True)
    book_id: int = Field(foreign_key="book.id", ondelete="CASCADE", index=True)
    quantity: int = 1
    borrowed_at: datetime = now_column()
    due_at: datetime = now_column()
    returned_at: datetime | None = timestamp_column()
    renewals: int = 0

    @property
    def status(self) -> LoanStatus:
        if self.returned_at is not None:
            return LoanStatus.returned
        return LoanStatus.overdue if self.due_at < utcnow() else LoanStatus.active

    def renew(self, days: int) -> None:
        """From the day it was due, not from today: who renews early loses nothing."""
        self.due_at += timedelta(days=days)
        self.renewals += 1


def claim_job(session: Session, name: str, interval: timedelta) -> bool:
    """Whether a recurring job is due. If so, it is due again after `interval`, for all processes."""
    due = session.get(Setting, f"{name}_due")
    if due is not None and datetime.fromisoformat(due.value) > utcnow():
        return False
    schedule_job(session, name, interval)
    return True


def schedule_job(session: Session, name: str, delay: timedelta) -> None:
    session.merge(Setting(key=f"{name}_due", value=(utcnow() + delay).isoformat()))
