"""`/my-library`, its statistics, its export, and the reviews of a book: shelf entries as everybody sees them."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

import sqlalchemy as sa
from fastapi import Path, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field
from sqlalchemy import ColumnElement, Connection
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, col

import csv_files
import database
import events
import pagination
import schemas
from api import PAGE, Conflict, FastRoute, Router, errors, or_404, readonly, transactional
from books import BOOK_JSON, FIND_BOOK, NO_BOOK, BookId, SearchText
from csv_files import as_csv, price_cell
from models import Book, Principal, ShelfEntry, ShelfStatus, User, normalize
from pagination import JsonObject, JsonPage, Listing, Page, PageQuery, TimestampKey, json_response, page_response
from schemas import BookPublic, EntryCreate, EntryPublic, EntryUpdate, GenreCount, Id, ReviewPublic, Username
from search import AUTHOR, TITLE, SearchTerms, in_title_or_author, matching_ids
from security import CurrentUser, Staff

router = Router(tags=["My library"])
fast = Router(tags=["My library"], route_class=FastRoute)
reviews_router = Router(tags=["Catalogue"])

NOT_ON_SHELF = "This book is not on your shelf."
OF_BOOK = col(ShelfEntry.book_id) == col(Book.id)


def _finished_or(day: str) -> Any:
    unknown = sa.literal(f"{day} 00:00:00.000000", TimestampKey)
    return sa.type_coerce(sa.func.coalesce(col(ShelfEntry.finished_at), unknown), TimestampKey)


def _has_tag() -> ColumnElement[bool]:
    """By the text of the JSON, `["sf","fun"]`: no tag has a comma, and a quotation mark has a backslash before it."""
    position = sa.func.strpos if database.is_postgresql() else sa.func.instr
    tags, tag = sa.cast(col(ShelfEntry.tags), sa.Text), sa.bindparam("tag", type_=sa.Text)
    return sa.or_(position(tags, "[" + tag) > 0, position(tags, "," + tag) > 0)


SORT_COLUMNS: dict[str, tuple[Any, ...]] = {
    "added": (sa.type_coerce(ShelfEntry.added_at, TimestampKey),),
    "finished": (_finished_or("9999-12-31"),),  # those of unknown day come last
    "updated": (sa.type_coerce(ShelfEntry.updated_at, TimestampKey),),
    "title": (TITLE,),
    "author": (AUTHOR,),
    "rating": (sa.func.coalesce(col(ShelfEntry.rating), 0, type_=sa.Float),),
}
Ascending = Literal["added", "finished", "updated", "title", "author", "rating"]
Sort = Literal[Ascending, "-added", "-finished", "-updated", "-title", "-author", "-rating"]
ENTRIES = Listing(
    sa.select(JsonObject(ShelfEntry, EntryPublic, book=BOOK_JSON)).join_from(ShelfEntry, Book, OF_BOOK),
    filters={
        "user_id": col(ShelfEntry.user_id) == sa.bindparam("user_id"),
        "status": col(ShelfEntry.status) == sa.bindparam("status"),
        "book_id": col(ShelfEntry.book_id) == sa.bindparam("book_id"),
        "tag": _has_tag,
        "words": lambda: col(ShelfEntry.book_id).in_(matching_ids()),
    },
    orders={s + name: (*columns, col(ShelfEntry.id)) for name, columns in SORT_COLUMNS.items() for s in ("", "-")}
    | {"-finished": (_finished_or("0001-01-01"), col(ShelfEntry.id))},
    indexed=[(("user_id",), "added")],
)

# --- my shelf -----------------------------------------------------------------------------------------------------


class ShelfQuery(PageQuery):
    status: ShelfStatus | None = None
    book_id: Id | None = None
    search: SearchText = Field(
        default=None, description="Every word, as a prefix, in title or author; at most 16 words."
    )
    tag: Annotated[schemas.Tag | None, schemas.BlankIsNull] = Field(default=None, description="Exactly this tag.")
    sort: Sort = Field(default="-added", description="Unknown days of `finished` come last.")


@fast.get("/my-library", response_model=Page[EntryPublic], responses=PAGE)
async def list_entries(query: Annotated[ShelfQuery, Query()], user: CurrentUser, request: Request) -> Response:
    """List my shelf, newest first. `X-Event-Cursor` is the id of the last event that the page includes."""
    filters: dict[str, Any] = {"user_id": user.id, "status": query.status, "book_id": query.book_id}
    filters = {name: value for name, value in filters.items() if value is not None}
    if query.tag is not None:
        filters["tag"] = database.to_json(query.tag)
    if query.search is not None:
        filters["words"] = in_title_or_author(query.search)
    return page_response(request, await database.read(find_entries, filters, query))


def find_entries(connection: Connection, filters: dict[str, Any], query: ShelfQuery) -> JsonPage:
    if SearchTerms(query.search).are_costly:
        database.require_thread(connection)
    return ENTRIES.page(connection, filters, query.sort, query)


@router.get("/my-library/{book_id:id}", response_model=EntryPublic, responses=errors(404))
@readonly
def read_entry(connection: Connection, book_id: BookId, user: CurrentUser) -> Response:
    """Read a book on my shelf."""
    return json_response(or_404(ENTRIES.first(connection, {"user_id": user.id, "book_id": book_id}), NOT_ON_SHELF))


@router.post("/my-library/{book_id:id}", status_code=201, responses=errors(404, 409, sends={201: "Location"}))
@transactional
def shelve_book(
    session: Session, book_id: BookId, user: CurrentUser, response: Response, new: EntryCreate | None = None
) -> EntryPublic:
    """Put a book on my shelf. 409 if it is there already."""
    book = or_404(session.get(Book, book_id), NO_BOOK)
    entry = ShelfEntry(user_id=user.id, book_id=book_id, status=ShelfStatus.wishlist)
    entry.revise((new or EntryCreate()).model_dump())
    session.add(entry)
    try:
        session.flush()
    except IntegrityError as error:
        if database.violation(error).kind == "unique":  # of `book_id`, which is no field of the body
            raise Conflict("already_shelved", "This book is on your shelf already.") from None
        raise
    response.headers["Location"] = f"/my-library/{book_id}"
    return record_entry(session, "shelf.created", entry, book, user)


@router.patch("/my-library/{book_id:id}", responses=errors(404))
@transactional
def update_entry(session: Session, book_id: BookId, change: EntryUpdate, user: CurrentUser) -> EntryPublic:
    """Move, rate, review or tag a book on my shelf (RFC 7396: null clears).

    A rating or a review may stand on any shelf; both are public among the reviews of the book, with my user name and
    `finished_at`. Moving to `completed` sets `finished_at`, unless it is known or you give it: null is an unknown day.
    """
    entry, book = get_entry(session, book_id, user)
    return revise_entry(session, entry, book, user, change)


def revise_entry(
    session: Session, entry: ShelfEntry, book: Book, user: Principal | User, change: EntryUpdate
) -> EntryPublic:
    before, was_review = (entry.rating, entry.review), entry.is_review
    if not entry.revise(change.model_dump(exclude_unset=True)):
        return show_entry(entry, book)
    count_rating(book, before[0], entry.rating)
    public = record_entry(session, "shelf.updated", entry, book, user)
    if before != (entry.rating, entry.review):
        verb = "created" if not was_review else "updated" if entry.is_review else "deleted"
        record_review(session, f"review.{verb}", book, entry, user.username)
    return public


@router.delete("/my-library/{book_id:id}", status_code=204, responses=errors(404))
@transactional
def remove_entry(session: Session, book_id: BookId, user: CurrentUser) -> None:
    """Take a book off my shelf, with my rating and review."""
    entry, book = get_entry(session, book_id, user)
    session.delete(entry)
    count_rating(book, entry.rating, None)
    events.record(session, "shelf.deleted", {"book_id": book_id, "title": book.title}, owner=user.id)
    if entry.is_review:
        record_review(session, "review.deleted", book, entry, user.username)


def get_entry(session: Session, book_id: int, user: Principal) -> tuple[ShelfEntry, Book]:
    mine = sa.select(ShelfEntry, Book).join_from(ShelfEntry, Book, OF_BOOK)
    mine = mine.where(col(ShelfEntry.user_id) == user.id, col(Book.id) == book_id)
    entry, book = or_404(session.execute(mine).first(), NOT_ON_SHELF)
    return entry, book


def record_entry(
    session: Session, event_type: str, entry: ShelfEntry, book: Book, user: Principal | User
) -> EntryPublic:
    public = show_entry(entry, book)
    data = {"title": book.title, **public.model_dump(mode="json", exclude={"book", "review"})}
    events.record(session, event_type, data, owner=user.id)
    return public


def show_entry(entry: ShelfEntry, book: Book) -> EntryPublic:
    return EntryPublic(**entry.model_dump(), book=BookPublic.model_validate(book))


def count_rating(book: Book, old: float | None, new: float | None) -> None:
    if old != new:
        book.rating_count += (new is not None) - (old is not None)
        book.rating_sum += (new or 0) - (old or 0)
        book.touch()


def record_review(session: Session, event_type: str, book: Book, entry: ShelfEntry, username: str) -> None:
    # Without the text, which can be long: it is at /books/{id}/reviews.
    data = {"book_id": book.id, "title": book.title, "username": username, "rating": entry.rating}
    figures = {"book_rating": book.rating, "book_rating_count": book.rating_count}
    events.record(session, event_type, data | figures, owner=entry.user_id, private=False)


# --- reviews of a book --------------------------------------------------------------------------------------------

IS_REVIEW = sa.or_(col(ShelfEntry.rating).is_not(None), col(ShelfEntry.review).is_not(None))
REVIEWS = Listing(
    sa.select(JsonObject(ShelfEntry, ReviewPublic, username=col(User.username))).join_from(ShelfEntry, User),
    filters={"book_id": sa.and_(col(ShelfEntry.book_id) == sa.bindparam("book_id"), IS_REVIEW)},
    orders={"-id": (col(ShelfEntry.id),)},
)


@reviews_router.get("/books/{book_id:id}/reviews", response_model=Page[ReviewPublic], responses=errors(404) | PAGE)
@readonly
def list_reviews(
    connection: Connection, book_id: BookId, query: Annotated[PageQuery, Query()], request: Request
) -> Response:
    """List the ratings and reviews of a book, newest entry first. They are written at `/my-library/{book_id}`."""
    or_404(FIND_BOOK.first(connection, {"book_id": book_id}), NO_BOOK)
    return page_response(request, REVIEWS.page(connection, {"book_id": book_id}, "-id", query))


Reviewer = Annotated[Username, Path(examples=["rita"])]


@reviews_router.delete("/books/{book_id:id}/reviews/{username}", status_code=204, responses=errors(403, 404))
@transactional
def remove_review(session: Session, book_id: BookId, username: Reviewer, user: Staff) -> None:
    """Remove somebody's rating and review of a book. The book stays on their shelf."""
    book = or_404(session.get(Book, book_id), NO_BOOK)
    reviews = sa.select(ShelfEntry, User).join_from(ShelfEntry, User, col(ShelfEntry.user_id) == col(User.id))
    of_user = (col(ShelfEntry.book_id) == book_id, sa.func.lower(col(User.username)) == username.lower())
    entry, owner = or_404(session.execute(reviews.where(*of_user, IS_REVIEW)).first(), "No such review.")
    revise_entry(session, entry, book, owner, EntryUpdate(rating=None, review=None))


def delete_entries(session: Session, user_id: int, limit: int) -> int:
    """Delete up to `limit` entries of a user, and take their ratings out of the books' totals; how many."""
    entries = sa.select(ShelfEntry, Book).join_from(ShelfEntry, Book, OF_BOOK).order_by(col(ShelfEntry.book_id))
    rows = session.execute(entries.where(col(ShelfEntry.user_id) == user_id).limit(limit)).all()
    for entry, book in rows:
        session.delete(entry)
        count_rating(book, entry.rating, None)
    if reviewed := [book.id for entry, book in rows if entry.is_review]:
        data = {"count": len(reviewed), "first_book_id": reviewed[0], "last_book_id": reviewed[-1]}
        events.record(session, "reviews.deleted", data)
    return len(rows)


# --- statistics ---------------------------------------------------------------------------------------------------

TOP_COUNT = 10  # genres, tags and authors


class YearCount(BaseModel):
    year: int
    books: int
    pages: int = Field(description="Of the books whose number of pages is known.")


class TagCount(BaseModel):
    tag: str
    count: int


class AuthorCount(BaseModel):
    author: str
    count: int


class ShelfStats(BaseModel):
    total: int
    by_status: dict[ShelfStatus, int]
    by_year: list[YearCount] = Field(description="Completed books by the year (UTC) of `finished_at`, newest first.")
    undated: int = Field(description="Completed books whose day of finishing is not known.")
    average_rating: float | None
    rating_count: int
    top_genres: list[GenreCount] = Field(description="Of completed books, the ten most frequent.")
    top_tags: list[TagCount] = Field(description="Of completed books, the ten most frequent.")
    top_authors: list[AuthorCount] = Field(description="Of completed books, the ten most frequent; co-authors each.")


@router.get("/my-library/stats")
@readonly
def read_stats(connection: Connection, user: CurrentUser) -> ShelfStats:
    """Read my shelf in figures: by status and year, ratings, most frequent genres, tags and authors."""
    columns: list[Any] = [getattr(ShelfEntry, name) for name in ("status", "rating", "finished_at", "tags")]
    columns += [Book.pages, Book.genre, Book.author]
    mine = sa.select(*columns).join_from(ShelfEntry, Book, OF_BOOK).where(col(ShelfEntry.user_id) == user.id)
    entries = connection.execute(mine).all()
    counts = Counter(entry.status for entry in entries)
    ratings = [entry.rating for entry in entries if entry.rating is not None]
    completed = [entry for entry in entries if entry.status == ShelfStatus.completed]
    books, pages = Counter[int](), Counter[int]()
    for entry in completed:
        if entry.finished_at is not None:
            books[entry.finished_at.year] += 1
            pages[entry.finished_at.year] += entry.pages or 0
    genres = most_frequent(entry.genre for entry in completed if entry.genre)
    tags = most_frequent(tag for entry in completed for tag in entry.tags)
    authors = most_frequent(author for entry in completed for author in entry.author.split(", "))
    return ShelfStats(
        total=len(entries),
        by_status={status: counts[status] for status in ShelfStatus},
        by_year=[YearCount(year=year, books=books[year], pages=pages[year]) for year in sorted(books, reverse=True)],
        undated=len(completed) - books.total(),
        average_rating=sum(ratings) / len(ratings) if ratings else None,
        rating_count=len(ratings),
        top_genres=[GenreCount(genre=name, count=count) for name, count in genres],
        top_tags=[TagCount(tag=name, count=count) for name, count in tags],
        top_authors=[AuthorCount(author=name, count=count) for name, count in authors],
    )


def most_frequent(names: Iterable[str]) -> list[tuple[str, int]]:
    """The most frequent names, each in one of its spellings."""
    spellings, counts = dict[str, str](), Counter[str]()
    for name in names:
        if key := normalize(name):
            spellings.setdefault(key, name)
            counts[key] += 1
    top = sorted(counts, key=lambda key: (-counts[key], key))[:TOP_COUNT]
    return [(spellings[key], counts[key]) for key in top]


# --- export -------------------------------------------------------------------------------------------------------


@router.get(
    "/my-library/export",
    response_class=StreamingResponse,
    responses={200: {"description": "The file, streamed.", **pagination.CSV_FILE}},
)
async def export_library(user: CurrentUser) -> StreamingResponse:
    """Download my shelf in Goodreads' columns, and some of our own. It comes back in through `/my-library/import`."""
    batches = ENTRIES.row_batches({"user_id": user.id}, "added")
    return pagination.file_response(
        as_csv(csv_files.GOODREADS_COLUMNS + csv_files.OUR_COLUMNS, batches, shelf_cells), "my-library.csv"
    )


# Goodreads' column `Exclusive Shelf`. Of several names for a status, the first is written.
EXCLUSIVE_SHELVES = {status: name for name, status in reversed(csv_files.SHELVES.items())}


def shelf_cells(row: Sequence[Any]) -> list[object]:
    entry = json.loads(row[0])
    book, shelf = entry["book"], EXCLUSIVE_SHELVES[entry["status"]]
    first, _, others = book["author"].partition(", ")
    if not others or (first, others) != (first.strip(), others.strip()):
        first, others = book["author"], ""
    # Goodreads lists the exclusive shelf among the others, from which an import removes it.
    tags = ([shelf] if shelf in entry["tags"] else []) + entry["tags"]
    dates = {name: entry[name] and entry[name][:10].replace("-", "/") for name in ("finished_at", "added_at")}
    return [
        *(book["id"], book["title"], first, "", others, "", book["isbn"], entry["rating"] or 0),
        *(book["rating"] and round(float(book["rating"]), 2), book["publisher"], "", book["pages"]),
        *("", book["publication_year"], dates["finished_at"], dates["added_at"]),
        *(", ".join(tags), "", shelf, csv_files.to_html(entry["review"] or ""), "", "", int(shelf == "read"), 0),
        *(book["genre"], book["description"], book["language"], price_cell(book["price"] and book["price"] * 100)),
        *(book["cover_url"], book["published_date"]),
        *(entry[name] for name in ("added_at", "started_at", "finished_at", "page")),
    ]
