"""`/my-library`, its statistics, and the reviews of a book: the same shelf entries as everybody sees them."""

from typing import Annotated, Any, Literal

import sqlalchemy as sa
from fastapi import HTTPException, Query, Request, Response
from pydantic import BaseModel, Field, TypeAdapter
from sqlalchemy import ColumnElement, Connection
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, col

import database
import events
from api import FOLLOWED_PAGE, PAGE, Router, errors
from books import FIND_BOOK, PUBLIC_COLUMNS, BookId, as_book, book_to_change, no_such_book
from database import CompiledQuery
from models import Book, Principal, ShelfEntry, ShelfStatus, SortableTimestamp, User
from pagination import (
    JsonObject,
    JsonPage,
    Listing,
    Order,
    Page,
    PageQuery,
    json_answer,
    last_event_id,
    named,
    page_answer,
    read_page,
)
from schemas import BookPublic, EntryCreate, EntryPublic, EntryUpdate, GenreCount, Id, ReviewPublic, Username
from security import CurrentUser, Staff

router = Router(prefix="/my-library", tags=["My library"])

ENTRY_COLUMNS: dict[str, Any] = {name: getattr(ShelfEntry, name) for name in EntryPublic.model_fields if name != "book"}
SELECT_ENTRIES = sa.select(*ENTRY_COLUMNS.values(), *PUBLIC_COLUMNS.values()).join_from(
    ShelfEntry, Book, col(ShelfEntry.book_id) == col(Book.id)
)
SORTED_BY: dict[str, tuple[Any, ...]] = {
    "added": (),  # ids are given out in the order of time
    "updated": (SortableTimestamp(ShelfEntry.updated_at),),
    "title": (col(Book.title_key),),
    "author": (col(Book.author_key),),
    "rating": (sa.func.coalesce(col(ShelfEntry.rating), 0),),
}
ORDERS = {
    name: Order(name, (*columns, col(ShelfEntry.id))) for key, columns in SORTED_BY.items() for name in (key, f"-{key}")
}
CONDITIONS: dict[str, ColumnElement[bool]] = {
    "mine": col(ShelfEntry.user_id) == sa.bindparam("user_id"),
    "status": col(ShelfEntry.status) == sa.bindparam("status"),
    "book_id": col(ShelfEntry.book_id) == sa.bindparam("book_id"),
}
ENTRIES = Listing(
    sa.select(JsonObject({**ENTRY_COLUMNS, "book": JsonObject(PUBLIC_COLUMNS)})).join_from(
        ShelfEntry, Book, col(ShelfEntry.book_id) == col(Book.id)
    ),
    CONDITIONS.__getitem__,
)
COUNT_ENTRIES: dict[tuple[str, ...], CompiledQuery] = {
    asked: CompiledQuery(sa.select(sa.func.count()).select_from(ShelfEntry).where(*map(CONDITIONS.__getitem__, asked)))
    for asked in (("mine",), ("mine", "status"), ("mine", "book_id"), ("mine", "status", "book_id"))
}
Sort = Literal["added", "updated", "title", "author", "rating", "-added", "-updated", "-title", "-author", "-rating"]


class ShelfQuery(PageQuery):
    status: ShelfStatus | None = None
    book_id: Id | None = None
    sort: Sort = Field(default="-added")


def as_entry(row: Any) -> dict[str, Any]:
    return named(ENTRY_COLUMNS)(row) | {"book": as_book(row[len(ENTRY_COLUMNS) :])}


@router.short("GET", "", response_model=Page[EntryPublic], responses=FOLLOWED_PAGE)
async def list_entries(query: Annotated[ShelfQuery, Query()], user: CurrentUser, request: Request) -> Response:
    """My shelf, the newest first. `X-Event-Cursor` is the id of the last change that the page contains."""
    # Newest or oldest first is the order of an index; anything else may have to sort all of a shelf.
    how = database.read_in_thread if query.start or query.sort not in ("added", "-added") else database.read
    page, cursor = await how(_find_entries, user.id, query)
    return json_answer(page, request, cursor)


def _find_entries(connection: Connection, user_id: int, query: ShelfQuery) -> tuple[JsonPage, int]:
    filters = {"status": query.status, "book_id": query.book_id}
    asked = ("mine", *(name for name, value in filters.items() if value is not None))
    values = {"user_id": user_id, **filters}
    total = COUNT_ENTRIES[asked].first(connection, values)[0]
    return ENTRIES.page(connection, asked, values, ORDERS[query.sort], query, total), last_event_id(connection)


@router.get("/{book_id:id}")
async def read_entry(book_id: BookId, user: CurrentUser) -> EntryPublic:
    """A book on my shelf."""
    row = await database.read(_find_entry, user.id, book_id)
    if row is None:
        raise not_on_shelf()
    return EntryPublic.model_validate(as_entry(row))


def _find_entry(connection: Connection, user_id: int, book_id: int) -> Any:
    mine = SELECT_ENTRIES.where(col(ShelfEntry.user_id) == user_id, col(ShelfEntry.book_id) == book_id)
    return connection.execute(mine).first()


def not_on_shelf() -> HTTPException:
    return HTTPException(404, "This book is not on your shelf.")


@router.post("/{book_id:id}", status_code=201, responses=errors(409, sends={201: "Location"}))
async def shelve_book(
    book_id: BookId, user: CurrentUser, response: Response, new: EntryCreate | None = None
) -> EntryPublic:
    """Put a book on my shelf. 409 where it is there already."""
    response.headers["Location"] = f"/my-library/{book_id}"
    return await database.write(_shelve, book_id, user, new or EntryCreate())


def _shelve(session: Session, book_id: int, user: Principal, new: EntryCreate) -> EntryPublic:
    book = session.get(Book, book_id, with_for_update=True)
    if book is None:
        raise no_such_book()
    entry = ShelfEntry(user_id=user.id, book_id=book_id, status=ShelfStatus.wishlist)
    entry.revise(new.model_dump())
    session.add(entry)
    try:
        session.flush()
    except IntegrityError as error:
        if database.violation(error).kind == "unique":  # `book_id`, which is no field of what was sent
            raise HTTPException(409, "This book is on your shelf already.") from None
        raise
    return _record_entry(session, entry, book, user, "shelf.created", was_review=False)


@router.patch("/{book_id:id}")
async def update_entry(book_id: BookId, change: EntryUpdate, user: CurrentUser) -> EntryPublic:
    """Move, rate, review or tag a book on my shelf (RFC 7396: null clears).

    A rating or a review needs the status `completed` or `abandoned`; everybody can read both, with my user name and
    `finished_at`, among the reviews of the book. Moving to `completed` sets `finished_at`, unless
    you give it.
    """
    return await database.write(_update_entry, book_id, user, change)


def _update_entry(session: Session, book_id: int, user: Principal, change: EntryUpdate) -> EntryPublic:
    entry, book = _lock_entry(session, book_id, user)
    return revise_entry(session, entry, book, user, change)


def revise_entry(
    session: Session, entry: ShelfEntry, book: Book, user: Principal | User, change: EntryUpdate
) -> EntryPublic:
    had_rating, was_review, said = entry.rating, entry.is_review, (entry.rating, entry.review)
    entry.revise(change.model_dump(exclude_unset=True))
    count_rating(book, had_rating, entry.rating)
    changed = said != (entry.rating, entry.review)
    return _record_entry(session, entry, book, user, "shelf.updated", was_review=was_review, changed=changed)


@router.delete("/{book_id:id}", status_code=204)
async def remove_entry(book_id: BookId, user: CurrentUser) -> None:
    """Take a book off my shelf, with what I said of it."""
    await database.write(_remove_entry, book_id, user)


def _remove_entry(session: Session, book_id: int, user: Principal) -> None:
    entry, book = _lock_entry(session, book_id, user)
    session.delete(entry)
    count_rating(book, entry.rating, None)
    events.record(session, "shelf.deleted", {"book_id": book_id, "title": book.title}, owner=user.id)
    if entry.is_review:
        record_review(session, "review.deleted", book, entry, user.username)


def is_review() -> ColumnElement[bool]:
    """Whether a shelf entry says something of its book."""
    return sa.or_(col(ShelfEntry.rating).is_not(None), col(ShelfEntry.review).is_not(None))


def withdraw_reviews(session: Session, user: User) -> None:
    """Take what somebody said out of the figures of the books, and tell of it: their shelf is about to go."""
    said = (
        sa.select(ShelfEntry, Book).join_from(ShelfEntry, Book).where(col(ShelfEntry.user_id) == user.id, is_review())
    )
    for entry, book in session.execute(said.with_for_update()):
        count_rating(book, entry.rating, None)
        record_review(session, "review.deleted", book, entry, user.username)


def _lock_entry(session: Session, book_id: int, user: Principal) -> tuple[ShelfEntry, Book]:
    """My entry and its book, whose rating figures may change with it, both locked until the transaction ends."""
    book = session.get(Book, book_id, with_for_update=True)
    mine = sa.select(ShelfEntry).where(col(ShelfEntry.user_id) == user.id, col(ShelfEntry.book_id) == book_id)
    entry = session.scalars(mine.with_for_update()).first()
    if book is None or entry is None:
        raise not_on_shelf()
    return entry, book


def count_rating(book: Book, old: int | None, new: int | None) -> None:
    if old != new:
        book.rating_count += (new is not None) - (old is not None)
        book.rating_sum += (new or 0) - (old or 0)
        book.touch()


def _record_entry(
    session: Session,
    entry: ShelfEntry,
    book: Book,
    user: Principal | User,
    event_type: str,
    *,
    was_review: bool,
    changed: bool = False,
) -> EntryPublic:
    """Write the entry, with the events that tell its owner of the entry and everybody of the review."""
    session.flush()
    shown = EntryPublic(**entry.model_dump(include=set(ENTRY_COLUMNS)), book=BookPublic.model_validate(book))
    told = {"title": book.title, **shown.model_dump(mode="json", exclude={"book", "review"})}
    events.record(session, event_type, told, owner=user.id)
    if entry.is_review and (changed or not was_review):
        record_review(session, "review.updated" if was_review else "review.created", book, entry, user.username)
    elif was_review and not entry.is_review:
        record_review(session, "review.deleted", book, entry, user.username)
    return shown


def record_review(session: Session, event_type: str, book: Book, entry: ShelfEntry, username: str) -> None:
    # Not the text, which can be long: it is at /books/{id}/reviews.
    told = {"book_id": book.id, "title": book.title, "username": username, "rating": entry.rating}
    figures = {"book_rating": book.rating, "book_rating_count": book.rating_count}
    events.record(session, event_type, told | figures)


# --- figures ------------------------------------------------------------------------------------------------------

TOP_COUNT = 10  # genres and authors


class YearCount(BaseModel):
    year: int
    books: int
    pages: int = Field(description="Of the books whose number of pages is known.")


class AuthorCount(BaseModel):
    author: str
    count: int


class ShelfStats(BaseModel):
    total: int
    by_status: dict[ShelfStatus, int]
    by_year: list[YearCount] = Field(description="What I completed, by the year (UTC) of `finished_at`, newest first.")
    average_rating: float | None
    rating_count: int
    top_genres: list[GenreCount] = Field(description="Of what I completed, the ten most frequent.")
    top_authors: list[AuthorCount] = Field(description="Of what I completed, the ten most frequent.")


@router.get("/stats")
async def read_stats(user: CurrentUser) -> ShelfStats:
    """My library in figures: by status, what I read each year, how I rate, what I read most."""
    return await database.read_in_thread(_count_entries, user.id)


def _count_entries(connection: Connection, user_id: int) -> ShelfStats:
    mine = col(ShelfEntry.user_id) == user_id
    read = sa.and_(mine, col(ShelfEntry.status) == ShelfStatus.completed)
    by_status = sa.select(col(ShelfEntry.status), sa.func.count()).where(mine).group_by(col(ShelfEntry.status))
    counts = dict.fromkeys(ShelfStatus, 0) | {
        ShelfStatus(status): count for status, count in connection.execute(by_status)
    }
    rating = col(ShelfEntry.rating)
    rated, stars = connection.execute(sa.select(sa.func.count(rating), sa.func.sum(rating)).where(mine)).one()
    genre = sa.func.lower(col(Book.genre))
    return ShelfStats(
        total=sum(counts.values()),
        by_status=counts,
        by_year=_by_year(connection, read),
        average_rating=None if stars is None else stars / rated,
        rating_count=rated,
        top_genres=[GenreCount(genre=name, count=n) for name, n in _top(connection, read, genre, col(Book.genre))],
        top_authors=[
            AuthorCount(author=name, count=n)
            for name, n in _top(connection, read, col(Book.author_key), col(Book.author))
        ],
    )


def _by_year(connection: Connection, read: ColumnElement[bool]) -> list[YearCount]:
    year = sa.extract("year", col(ShelfEntry.finished_at))
    pages = sa.func.coalesce(sa.func.sum(col(Book.pages)), 0)
    rows = connection.execute(
        sa.select(year, sa.func.count(), pages)
        .join_from(ShelfEntry, Book, col(ShelfEntry.book_id) == col(Book.id))
        .where(read, col(ShelfEntry.finished_at).is_not(None))
        .group_by(year)
        .order_by(year.desc())
    )
    return [YearCount(year=int(number), books=books, pages=pages) for number, books, pages in rows]


def _top(connection: Connection, read: ColumnElement[bool], key: Any, shown: Any) -> list[Any]:
    """The most frequent, whatever the case they are written in, with one of its spellings."""
    count = sa.func.count()
    return list(
        connection.execute(
            sa.select(sa.func.min(shown), count)
            .join_from(ShelfEntry, Book, col(ShelfEntry.book_id) == col(Book.id))
            .where(read, key.is_not(None))
            .group_by(key)
            .order_by(count.desc(), key)
            .limit(TOP_COUNT)
        )
    )


reviews_router = Router(prefix="/books", tags=["Catalogue"])

REVIEWS = Order("-id", (col(ShelfEntry.id),))
REVIEW = {"username": col(User.username)} | {
    name: getattr(ShelfEntry, name) for name in ReviewPublic.model_fields if name != "username"
}
SELECT_REVIEWS = sa.select(*REVIEW.values()).join_from(ShelfEntry, User).where(is_review())
REVIEW_PAGE = TypeAdapter(Page[ReviewPublic])


@reviews_router.get("/{book_id:id}/reviews", response_model=Page[ReviewPublic], responses=PAGE)
async def list_reviews(book_id: BookId, query: Annotated[PageQuery, Query()], request: Request) -> Response:
    """What readers say of a book, the newest entry first. They are written at `/my-library/{book_id}`."""
    return page_answer(await database.read_in_thread(_find_reviews, book_id, query), REVIEW_PAGE, request)


def _find_reviews(connection: Connection, book_id: int, query: PageQuery) -> dict[str, Any]:
    if FIND_BOOK.first(connection, {"book_id": book_id}) is None:
        raise no_such_book()
    of_book = SELECT_REVIEWS.where(col(ShelfEntry.book_id) == book_id)
    return read_page(connection, of_book, REVIEWS, query, named(REVIEW))


@reviews_router.delete("/{book_id:id}/reviews/{username}", status_code=204, responses=errors(403))
async def remove_review(book_id: BookId, username: Username, user: Staff) -> None:
    """Take away what somebody says of a book, text and rating. The book stays on their shelf."""
    await database.write(_remove_review, book_id, username)


def _remove_review(session: Session, book_id: int, username: str) -> None:
    book = book_to_change(session, book_id)
    theirs = sa.select(ShelfEntry, User).join_from(ShelfEntry, User, col(ShelfEntry.user_id) == col(User.id))
    theirs = theirs.where(col(ShelfEntry.book_id) == book_id, sa.func.lower(col(User.username)) == username.lower())
    found = session.execute(theirs.where(is_review()).with_for_update(of=ShelfEntry)).first()
    if found is None:
        raise HTTPException(404, "No such review.")
    entry, owner = found
    revise_entry(session, entry, book, owner, EntryUpdate(rating=None, review=None))
