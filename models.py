"""Books, shelves, loans: next to each table the shapes that go in and out; grouped by noun.

Values enter through a shape (`BookCreate`, …): table classes do not validate. What must always hold is a constraint
of the table. What a noun can do to itself is a verb on its class; its module records the event, in
the same transaction.
"""

from datetime import date, datetime, timedelta
from enum import StrEnum
from typing import Annotated, Any, Self

import sqlalchemy as sa
from pydantic import AfterValidator, BaseModel, computed_field, model_validator
from pydantic import Field as Limit
from sqlmodel import Field, SQLModel

# Both fill the metadata: who imports this module has every table, those that its foreign keys refer to among them.
import people  # noqa: F401
import records  # noqa: F401
import values
from values import (
    Author,
    BlankIsNull,
    BodyId,
    Cents,
    DomainError,
    Isbn,
    Language,
    LongText,
    Moment,
    Name,
    Number,
    Price,
    PublishedDate,
    Shape,
    SortKey,
    Tag,
    Title,
    Url,
    Word,
    Year,
    key_column,
    key_of,
    moment_column,
    stamp_column,
    table_options,
)

COPIES_MAX = 1_000_000  # of one book
RENEWALS_MAX = 2
UNKNOWN_YEAR = -32768  # sorts before every year
# How books sort by rating: the mean after ten imagined votes of 3, so that one 5 does not beat a thousand 4s and 5s
# (a Bayesian average). Books that nobody has rated come last.
SCORE = "CASE WHEN rating_count = 0 THEN 0.0 ELSE (rating_sum + 30.0) / (rating_count + 10) END"


# --- books --------------------------------------------------------------------------------------------------------


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
        moment = values.now()
        figures = {"copies": 0, "available": 0, "rating_count": 0, "rating_sum": 0, "version": 1}
        return figures | {"added_by": added_by, "created_at": moment, "updated_at": moment}

    def describe(self, new: BookBase) -> None:
        for name, value in self.row(new).items():
            setattr(self, name, value)

    def touch(self) -> None:
        """Every change of what is shown of a book goes with a new version: the ETag is made from it."""
        self.version += 1
        self.updated_at = values.now()


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


class EntryCreate(Shape):
    status: ShelfStatus = ShelfStatus.wishlist


class EntryUpdate(Shape):
    """RFC 7396: a field that is left out stays as it is, null clears it."""

    status: ShelfStatus = ShelfStatus.wishlist
    rating: Annotated[int, Number, Limit(ge=1, le=5)] | None = None
    review: Annotated[LongText | None, BlankIsNull] = None
    tags: Annotated[list[Tag], Limit(max_length=50)] | None = []  # noqa: RUF012  # pydantic copies it
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
            named["finished_at"] = values.now()
        for name, value in named.items():
            setattr(self, name, value)
        if self.is_review and self.status not in (ShelfStatus.completed, ShelfStatus.abandoned):
            field = "rating" if self.rating is not None else "review"
            raise DomainError(field, f"needs the status completed or abandoned; this book is on {self.status}")
        self.updated_at = values.now()


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
    return LoanStatus.overdue if due_at < values.now() else LoanStatus.active


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
