"""`/books`: the catalogue, its filters, genres and export."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import sqlalchemy as sa
from fastapi import Body, Header, HTTPException, Path, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import Field, ValidationError, create_model
from sqlalchemy import ColumnElement, Connection
from sqlmodel import Session, col

import database
import events
import models
import pagination
import schemas
from api import (
    PAGE,
    Conflict,
    FastRoute,
    Router,
    errors,
    idempotent,
    invalid_body,
    or_404,
    readonly,
    transactional,
    transactional_in_thread,
)
from csv_files import BOOK_COLUMNS, as_csv, price_cell
from database import CompiledQuery
from models import MAX_ID, MIN_YEAR, SCORE, UNKNOWN_YEAR, Book, Facet, Loan, Principal, Setting, ShelfEntry, facet_key
from pagination import JsonObject, JsonPage, Listing, Order, Page, PageQuery, json_response, page_response
from schemas import BlankIsNull, BookBase, BookCreate, BookPublic, BookUpdate, GenreCount, Id, Name, RequestModel, Title
from search import AUTHOR, FEW_WORDS, TITLE, SearchTerms, best_first, count_matches, index_books, matches, suggest
from security import Contributor, CurrentUser, Viewer, unauthorized

router = Router(prefix="/books", tags=["Catalogue"])
fast = Router(prefix="/books", tags=["Catalogue"], route_class=FastRoute)
exports = Router(prefix="/books", tags=["In and out"])

BookId = Annotated[Id, Path(description="The book's `id`.")]
NO_BOOK = "No such book."
IfMatch = Annotated[str | None, Header(description="The `ETag` that the change is based on; 412 if stale or weak.")]
IfNoneMatch = Annotated[str | None, Header(description="The `ETag` that you have; 304 when it is still true.")]
Sort = Literal[
    "id", "title", "author", "year", "rating", "created", "-id", "-title", "-author", "-year", "-rating", "-created"
]

RATING = sa.cast(col(Book.rating_sum), sa.Float) / sa.func.nullif(col(Book.rating_count), sa.text("0"))
BOOK_JSON = JsonObject(Book, BookPublic, rating=RATING)
SELECT_BOOKS: Any = sa.select(BOOK_JSON)
FIND_BOOK = CompiledQuery(SELECT_BOOKS.add_columns(col(Book.version)).where(col(Book.id) == sa.bindparam("book_id")))
INSERT_BOOK = CompiledQuery(sa.insert(Book).returning(col(Book.id)))

YEAR: ColumnElement[int] = sa.literal_column(f"coalesce(publication_year, {UNKNOWN_YEAR})", sa.Integer)
YEAR_ASCENDING: ColumnElement[int] = sa.literal_column(f"coalesce(publication_year, {-UNKNOWN_YEAR})", sa.Integer)
SORT_COLUMNS: dict[str, tuple[Any, ...]] = {
    "id": (),
    "title": (TITLE, AUTHOR),
    "author": (AUTHOR,),
    "year": (YEAR,),
    "rating": (sa.literal_column(SCORE, sa.Float),),
    "created": (),  # ids are given out in the order of time
}
BEST_MATCH = Order("best", (sa.literal(0), col(Book.id)))  # the tier, and the id


def _facet_count(kind: str) -> sa.Select[Any]:
    # A sum, which has a row where nothing is counted, too.
    counted = sa.select(sa.func.coalesce(sa.func.sum(col(Facet.count)), 0)).where(col(Facet.kind) == kind)
    return counted.where(col(Facet.key) == sa.bindparam(kind))


COUNTED: dict[tuple[str, ...], Any] = {  # maintained by triggers
    (): sa.select(col(Setting.value)).where(col(Setting.key) == "book_count"),
    ("genre",): _facet_count("genre"),
    ("language",): _facet_count("language"),
}
BOOKS = Listing(
    SELECT_BOOKS,
    filters={
        "genre": col(Book.genre_key) == sa.bindparam("genre"),
        "language": col(Book.language_key) == sa.bindparam("language"),
        "year_from": sa.bindparam("year_from", type_=sa.Integer) <= YEAR,
        "year_to": YEAR.between(sa.literal_column(str(MIN_YEAR)), sa.bindparam("year_to", type_=sa.Integer)),
        "available": col(Book.available) > 0,
        "added_by": col(Book.added_by) == sa.bindparam("added_by"),
        "isbn": col(Book.isbn) == sa.bindparam("isbn"),
        "words": matches,
        # The unary plus (https://sqlite.org/optoverview.html) has SQLite walk through the index of the order until the
        # page is full. Looking up a third of 100,000 books and sorting them took 28 instead of 6.5 ms.
        "common_words": lambda: matches("common_words", sa.literal_column("+book.id")),
    },
    orders={s + name: (*columns, col(Book.id)) for name, columns in SORT_COLUMNS.items() for s in ("", "-")}
    | {"year": (YEAR_ASCENDING, col(Book.id))},
    counts={**COUNTED, ("words",): count_matches},
)


# --- finding ------------------------------------------------------------------------------------------------------


SearchText = Annotated[Annotated[Title, FEW_WORDS] | None, BlankIsNull]
SearchName = Annotated[Annotated[Name, FEW_WORDS] | None, BlankIsNull]


class BookFilter(RequestModel):
    search: SearchText = Field(
        default=None, description="Every word, as a prefix, in title, author, ISBN or publisher; at most 16 words."
    )
    isbn: Annotated[schemas.Isbn | None, BlankIsNull] = Field(default=None, description="ISBN-10 or 13.")
    genre: Annotated[Name | None, BlankIsNull] = None
    title: SearchText = Field(default=None, description="These words, in the title; at most 16.")
    author: SearchName = Field(default=None, description="These words, in the author's name; at most 16.")
    publisher: SearchName = Field(default=None, description="These words, in the publisher's name; at most 16.")
    language: Annotated[Name | None, BlankIsNull] = None
    year_from: Annotated[int | None, Field(ge=MIN_YEAR, le=9999)] = None
    year_to: Annotated[int | None, Field(ge=MIN_YEAR, le=9999)] = None
    available: bool = Field(default=False, description="`true`: only books with a copy to lend.")
    added_by: schemas.AddedBy | None = Field(default=None, description="Only those that I (`me`) or this user added.")
    sort: Sort | None = Field(default=None, description="Best match first where `search` is given, else by `id`.")

    @property
    def terms(self) -> SearchTerms:
        return SearchTerms(self.search, self.title, self.author, self.publisher)

    def filters(self, viewer: Principal | None) -> dict[str, Any]:
        """For `BOOKS`. 401 where `added_by=me` comes without a token."""
        filters: dict[str, Any] = {"genre": facet_key(self.genre), "language": facet_key(self.language)}
        filters |= {"isbn": self.isbn, "year_from": self.year_from, "year_to": self.year_to}
        filters = {name: value for name, value in filters.items() if value is not None}
        if self.available:
            filters["available"] = True
        if self.added_by == "me":
            if viewer is None:
                raise unauthorized()
            filters["added_by"] = viewer.id
        elif self.added_by:
            filters["added_by"] = min(int(self.added_by), MAX_ID)
        return filters | self.terms.values() if any(self.terms) else filters


class BookQuery(BookFilter, PageQuery):
    pass


SUGGESTIONS = "Only where `search` finds nothing: up to five queries that do in its place, the nearest first."
BookPage: Any = create_model(
    "Page[BookPublic]", __base__=Page[BookPublic], suggestions=(list[str], Field(default=None, description=SUGGESTIONS))
)


@fast.get("", response_model=BookPage, responses=PAGE)
async def list_books(query: Annotated[BookQuery, Query()], viewer: Viewer, request: Request) -> Response:
    """Find books: filter, search and sort the catalogue.

    `X-Event-Cursor` is the id of the last event that the page includes: follow `/stream?since=` from there. Where
    nothing matches `search`, `suggestions` has queries of the nearest words that find something with the same filters.
    """
    return page_response(request, await database.read(find_books, query.filters(viewer), query))


def find_books(connection: Connection, filters: dict[str, Any], query: BookQuery) -> JsonPage:
    if query.terms.are_costly:
        database.require_thread(connection)
    total = BOOKS.total(connection, filters)
    if query.terms.is_ranked and query.sort is None:
        page = best_matches(connection, filters, query, total)
    else:
        if "words" in filters and not database.is_postgresql() and 10 * total > BOOKS.total(connection, {}):
            filters = {"common_words" if name == "words" else name: value for name, value in filters.items()}
        page = BOOKS.page(connection, filters, query.sort or "id", query, total)
    if query.search is None or total:
        return page
    database.require_thread(connection)

    def find(text: str) -> str | None:
        instead = filters | query.terms._replace(search=text).values()
        return next(iter(BOOKS.page(connection, instead, "id", PageQuery(limit=1)).items), None)

    return page._replace(suggestions=suggest(connection, query.search, find))


def best_matches(connection: Connection, filters: dict[str, Any], query: BookQuery, total: int) -> JsonPage:
    tier, last = query.keys(BEST_MATCH) or (0, 0)
    limit = query.start + query.limit + 1
    others = tuple(name for name in BOOKS.names(filters) if name != "words")
    # With all matches found, the tiers that are left need not be searched.
    found = best_first(connection, others, BOOKS.conditions, filters, (int(tier), int(last)), min(limit, total))
    rows = found[query.start : query.start + query.limit]
    ids = {"ids": str([book_id for _, book_id in rows])}
    texts = {book_id: text for text, book_id in BOOKS_BY_ID[database.backend().kind].all(connection, ids)}
    following = BEST_MATCH.encode(rows[-1]) if rows and len(found) == limit else None
    return JsonPage([texts[book_id] for _, book_id in rows], total, following, pagination.last_event_id(connection))


IDS = {
    "sqlite": "SELECT value FROM json_each(:ids)",
    "postgresql": "SELECT CAST(value AS integer) FROM json_array_elements_text(CAST(:ids AS json))",
}
BOOKS_BY_ID = {
    kind: CompiledQuery(SELECT_BOOKS.add_columns(col(Book.id)).where(col(Book.id).in_(sa.text(ids))))
    for kind, ids in IDS.items()
}


MAX_GENRES = 200
MAX_PREFIXED = 2000  # of those that begin with a text, the first by name; one letter may begin 300,000


class GenreQuery(RequestModel):
    search: Annotated[Name | None, BlankIsNull] = Field(default=None, description="How the genre begins.")


@router.get("/genres")
@readonly
def list_genres(connection: Connection, query: Annotated[GenreQuery, Query()]) -> list[GenreCount]:
    """List the 200 largest genres and how many books each has. `search` finds others by their beginning.

    Each is spelled as in its oldest book.
    """
    key = col(Facet.key)
    genres = sa.select(key, col(Facet.count)).where(col(Facet.kind) == "genre")
    if first := facet_key(query.search):
        genres = genres.where(key >= first, key <= f"{first}\U0010ffff").order_by(key).limit(MAX_PREFIXED)
    found = genres.subquery()
    largest = sa.select(found).order_by(found.c.count.desc(), found.c.key).limit(MAX_GENRES).subquery()
    of_genre = sa.select(col(Book.genre)).where(col(Book.genre_key) == largest.c.key).order_by(col(Book.id))
    columns = (of_genre.limit(1).scalar_subquery(), largest.c.count)
    rows = connection.execute(sa.select(*columns).order_by(largest.c.count.desc(), largest.c.key))
    return [GenreCount(genre=genre, count=count) for genre, count in rows]


# --- one book -----------------------------------------------------------------------------------------------------


def etag_of(version: int) -> str:
    return f'"{version}"'


def etag_matches(header: str, *etags: str) -> bool:
    """Whether an If-Match or If-None-Match header names one of these. Only the latter may name a weak one (RFC 9110,
    13.1), which proxies make of a strong one when they compress an answer."""
    return header.strip() == "*" or any(tag.strip() in etags for tag in header.split(","))


def conditional_response(
    content: str | bytes, media_type: str, headers: dict[str, str], if_none_match: str | None
) -> Response:
    """304 where the client has it, by the `ETag` among the headers."""
    if if_none_match is not None and etag_matches(if_none_match, headers["ETag"], f"W/{headers['ETag']}"):
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=media_type)


NOT_MODIFIED: dict[int | str, Any] = {304: {"description": "It is still the version that you have."}}
CHANGE_RESPONSES = errors(403, 404, 409, 412, sends={200: "ETag"})


@fast.get("/{book_id:id}", response_model=BookPublic, responses=NOT_MODIFIED | errors(404, sends={200: "ETag"}))
async def read_book(book_id: BookId, if_none_match: IfNoneMatch = None) -> Response:
    """Read a book. Its `ETag` names its version."""
    body, version = or_404(await database.read(FIND_BOOK.first, {"book_id": book_id}), NO_BOOK)
    return conditional_response(body, "application/json", {"ETag": etag_of(version)}, if_none_match)


@fast.post("", status_code=201, response_model=BookPublic, responses=errors(403, 409, sends={201: "Location ETag"}))
@transactional
@idempotent
def create_book(session: Session, new: BookCreate, user: Contributor) -> Response:
    """Add a book. An ISBN that is here already is refused with 409."""
    book = add_book(session, new, user)
    headers = {"Location": f"/books/{book.id}", "ETag": etag_of(book.version)}
    return json_response(book.model_dump_json(), 201, headers)


def add_book(session: Session, new: BookBase, user: Principal | None) -> BookPublic:
    book = Book.described(new) | Book.initial(user and user.id)
    book["id"] = INSERT_BOOK.first(session, book)[0]
    database.defer(session, index_books, book["id"])  # half the time of a new book, however many there are
    return record_book(session, "book.created", {**book, "rating": None})


def record_book(session: Session, event_type: str, book: Book | dict[str, Any]) -> BookPublic:
    public = BookPublic.model_validate(book)
    # A description can be long, and the log holds many events.
    events.record(session, event_type, public.model_dump(mode="json", exclude={"description"}))
    return public


EMMA = {"title": "Emma", "author": "Jane Austen", "isbn": "978-0-14-143958-7", "pages": 474, "publication_year": 1815}
Replacement = Annotated[BookCreate, Body(openapi_examples={"Emma": {"value": EMMA}})]  # not what the docs add


@router.put("/{book_id:id}", responses=CHANGE_RESPONSES)
@transactional
def replace_book(
    session: Session, book_id: BookId, new: Replacement, user: CurrentUser, response: Response, if_match: IfMatch = None
) -> BookPublic:
    """Replace a book: fields that are left out are cleared. For who added it, and staff."""
    book = revise_book(session, get_own_book(session, book_id, user, if_match, "change"), new)
    response.headers["ETag"] = etag_of(book.version)
    return book


@router.patch("/{book_id:id}", responses=CHANGE_RESPONSES)
@transactional
def update_book(
    session: Session, book_id: BookId, new: BookUpdate, user: CurrentUser, response: Response, if_match: IfMatch = None
) -> BookPublic:
    """Change a book (RFC 7396: null clears). For who added it, and staff."""
    book = revise_book(session, get_own_book(session, book_id, user, if_match, "change"), new)
    response.headers["ETag"] = etag_of(book.version)
    return book


def get_own_book(session: Session, book_id: int, user: Principal, if_match: str | None, verb: str) -> Book:
    """The book, if the user may change it and it is still the version that the client has."""
    book = or_404(session.get(Book, book_id), NO_BOOK)
    if if_match is not None and not etag_matches(if_match, etag_of(book.version)):
        raise HTTPException(412, f"If-Match does not name the book's ETag, which is {etag_of(book.version)}.")
    if not user.is_staff and book.added_by != user.id:
        raise HTTPException(403, f"Only who added a book, librarians and admins {verb} it.")
    return book


def revise_book(session: Session, book: Book, change: BookCreate | BookUpdate) -> BookPublic:
    book.sqlmodel_update(Book.described(change if isinstance(change, BookCreate) else merge(book, change)))
    if not session.is_modified(book):
        return BookPublic.model_validate(book)
    book.touch()
    return record_book(session, "book.updated", book)


def merge(book: Book, change: BookUpdate) -> BookCreate:
    """The book as it would be, validated as a whole."""
    merged = book.model_dump(include=set(BookBase.model_fields)) | change.model_dump(exclude_unset=True)
    date_set_the_year = book.published_date is not None and book.publication_year == book.published_date.year
    if change.published_date is not None and "publication_year" not in change.model_fields_set and date_set_the_year:
        merged["publication_year"] = None  # set by the new date
    try:
        return BookCreate.model_validate(merged)
    except ValidationError as error:
        raise invalid_body(error) from None


@router.delete("/{book_id:id}", status_code=204, responses=errors(403, 404, 409, 412))
@transactional_in_thread
def delete_book(session: Session, book_id: BookId, user: CurrentUser, if_match: IfMatch = None) -> None:
    """Delete a book with its reviews and shelf entries. Its returned loans stay, with its title.

    For staff; for who added it, while nobody else has it on a shelf and if it never had copies: else 409. 409 for all
    while copies are on loan.
    """
    book = get_own_book(session, book_id, user, if_match, "delete")
    if not user.is_staff:
        by_others = sa.exists().where(col(ShelfEntry.book_id) == book_id, col(ShelfEntry.user_id) != user.id)
        if session.scalar(sa.select(by_others)):
            raise Conflict(
                "shelved_by_others", "Somebody else has this book on a shelf: only librarians and admins delete it."
            )
        if book.had_copies:
            raise Conflict("has_copies", "This book has or had copies to lend: only librarians and admins delete it.")
    if book.available < book.copies:
        raise Conflict(
            "on_loan", f"{book.copies - book.available} of its copies are on loan: have them returned first."
        )
    session.execute(sa.update(Loan).where(col(Loan.book_id) == book_id).values(title=book.title))
    session.delete(book)
    events.record(session, "book.deleted", {"id": book.id, "title": book.title, "author": book.author})


def disown_books(session: Session, user_id: int, limit: int) -> int:
    """Set `added_by` of books to null, before the account is deleted; of how many."""
    ids = session.scalars(sa.select(col(Book.id)).where(col(Book.added_by) == user_id).limit(limit)).all()
    change = {"added_by": None, "version": col(Book.version) + 1, "updated_at": models.utcnow()}
    session.connection().execute(sa.update(Book).where(col(Book.id).in_(ids)).values(change))
    if ids:
        events.record(session, "books.updated", {"count": len(ids), "first_id": min(ids), "last_id": max(ids)})
    return len(ids)


# --- export -------------------------------------------------------------------------------------------------------

PRICE = BOOK_COLUMNS.index("price")
# Plain columns: to render JSON and parse it again takes twice as long as all the rest.
BOOK_ROWS = Listing(
    sa.select(*(sa.type_coerce(Book.price, sa.Integer) if n == "price" else getattr(Book, n) for n in BOOK_COLUMNS)),
    filters=BOOKS.filters,
    orders={name: order.columns for name, order in BOOKS.orders.items()},
)


class ExportQuery(BookFilter):
    format: Literal["csv", "ndjson"] = Field(default="csv", description="NDJSON: a book a line, as `/books` has it.")


FILES = {
    "description": "The file, streamed.",
    "content": {kind: {"schema": {"type": "string"}} for kind in ("text/csv", "application/x-ndjson")},
}


@exports.get("/export", response_class=StreamingResponse, responses={200: FILES})
async def export_books(query: Annotated[ExportQuery, Query()], viewer: Viewer) -> StreamingResponse:
    """Download the catalogue as a file, filtered like `/books`.

    The CSV goes back in through `/books/upload`. Where a spreadsheet would begin a formula, an apostrophe is inserted,
    which an import removes.
    """
    filters, order = query.filters(viewer), query.sort or "id"
    if query.format == "csv":
        rows = BOOK_ROWS.row_batches(filters, order)
        return pagination.file_response(as_csv(BOOK_COLUMNS, rows, book_cells), "books.csv")
    lines = ("".join(f"{book}\n" for book in batch) for batch in BOOKS.batches(filters, order))
    return pagination.file_response(lines, "books.ndjson")


def book_cells(row: Sequence[Any]) -> Sequence[object]:
    return [*row[:PRICE], price_cell(row[PRICE]), *row[PRICE + 1 : len(BOOK_COLUMNS)]]
