"""The catalogue: finding, adding, changing and removing books."""

import functools
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import sqlalchemy as sa
from fastapi import Header, HTTPException, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import Field, TypeAdapter, ValidationError
from sqlalchemy import ColumnElement, Connection
from sqlmodel import Session, col

import database
import events
import models
from api import FOLLOWED_PAGE, Router, errors
from database import CompiledQuery, Insert
from models import MIN_YEAR, SCORE, UNKNOWN_YEAR, Book, Facet, Principal, Setting, ShelfEntry
from pagination import JsonObject, JsonPage, Listing, Order, Page, PageQuery, encode, json_answer, last_event_id, named
from schemas import BlankIsNull, BookBase, BookCreate, BookPublic, BookUpdate, GenreCount, Id, Name, RequestModel, Title
from search import AMONG, FEW, SearchTerms, best_first, count_matches, few_best_first, has_words, index_books
from security import Contributor, CurrentUser, Viewer, unauthorized

router = Router(prefix="/books", tags=["Catalogue"])

BookId = Annotated[Id, Path(description="The book's `id`.")]

# What is read for a BookPublic: its columns, and the average that it shows.
PUBLIC_COLUMNS: dict[str, Any] = {name: getattr(Book, name) for name in BookPublic.model_fields if name != "rating"}
PUBLIC_COLUMNS["rating"] = (
    sa.cast(col(Book.rating_sum), sa.Float) / sa.func.nullif(col(Book.rating_count), sa.text("0"))
).label("rating")
SELECT_BOOKS = sa.select(*PUBLIC_COLUMNS.values())
ONE_BOOK = TypeAdapter(BookPublic)
as_book = named(PUBLIC_COLUMNS)
# The same as text, for what is read most.
SELECT_JSON: Any = sa.select(JsonObject(PUBLIC_COLUMNS), col(Book.id))
SOME_BOOKS = CompiledQuery(SELECT_JSON.where(col(Book.id).in_(AMONG)))


def some_books(connection: Connection, ids: list[int]) -> Sequence[tuple[str, int]]:
    if database.is_postgresql():
        return connection.execute(SELECT_JSON.where(col(Book.id).in_(ids))).all()
    return SOME_BOOKS.all(connection, {"ids": str(ids)})


INSERT_BOOK = Insert(Book)
FIND_BOOK = CompiledQuery(
    sa.select(JsonObject(PUBLIC_COLUMNS), col(Book.version)).where(col(Book.id) == sa.bindparam("book_id"))
)

YEAR: ColumnElement[int] = sa.literal_column(f"coalesce(publication_year, {UNKNOWN_YEAR})", sa.Integer)
SORTED_BY: dict[str, tuple[Any, ...]] = {
    "id": (),
    "title": (col(Book.title_key), col(Book.author_key)),
    "author": (col(Book.author_key),),
    "year": (YEAR,),
    "rating": (sa.literal_column(SCORE, sa.Float),),
    "created": (),  # ids are given out in the order of time
}
ORDERS = {
    name: Order(name, (*columns, col(Book.id))) for key, columns in SORTED_BY.items() for name in (key, f"-{key}")
}
BEST = Order("best", (sa.literal(0), col(Book.id)))  # the tier, and the id


def no_such_book() -> HTTPException:
    return HTTPException(404, "No such book.")


# --- finding ------------------------------------------------------------------------------------------------------


Sort = Literal[
    "id", "title", "author", "year", "rating", "created", "-id", "-title", "-author", "-year", "-rating", "-created"
]


class BookFilter(RequestModel):
    search: Annotated[
        Title | None,
        BlankIsNull,
        Field(description="Every word, as a beginning, in title, author, ISBN or publisher."),
    ] = None
    genre: Annotated[Name | None, BlankIsNull] = None
    author: Annotated[Name | None, BlankIsNull, Field(description="These words, in the author's name.")] = None
    publisher: Annotated[Name | None, BlankIsNull, Field(description="These words, in the publisher's name.")] = None
    language: Annotated[Name | None, BlankIsNull] = None
    year_from: Annotated[int | None, Field(ge=MIN_YEAR, le=9999)] = None
    year_to: Annotated[int | None, Field(ge=MIN_YEAR, le=9999)] = None
    available: bool = Field(default=False, description="`true`: only books with a copy to lend.")
    added_by: Literal["me"] | None = Field(default=None, description="Only those that I added.")
    sort: Sort | None = Field(default=None, description="Best match first where `search` is given, else by `id`.")

    def asked(self) -> tuple[str, ...]:
        """The names of the conditions that a book must meet."""
        given = {
            "genre": self.genre,
            "language": self.language,
            "year": self.year_from is not None or self.year_to is not None,
            "available": self.available,
            "added_by": self.added_by,
            "words": self.words,
        }
        return tuple(name for name, value in given.items() if value)

    def values(self, viewer: Principal | None) -> dict[str, Any]:
        """What they compare with."""
        return {
            "genre": self.genre,
            "language": self.language,
            "year_from": MIN_YEAR if self.year_from is None else self.year_from,
            "year_to": 9999 if self.year_to is None else self.year_to,
            "added_by": viewer and viewer.id,
            "words": self.words.expression() if self.words else None,
        }

    @functools.cached_property
    def words(self) -> SearchTerms:
        """What is looked up in the search index."""
        return SearchTerms(self.search, self.author, self.publisher)


CONDITIONS: dict[str, Callable[[], ColumnElement[bool]]] = {
    "genre": lambda: sa.func.lower(col(Book.genre)) == sa.func.lower(sa.bindparam("genre", type_=sa.String)),
    "language": lambda: sa.func.lower(col(Book.language)) == sa.func.lower(sa.bindparam("language", type_=sa.String)),
    "year": lambda: YEAR.between(sa.bindparam("year_from"), sa.bindparam("year_to")),
    "available": lambda: col(Book.available) > 0,
    "added_by": lambda: col(Book.added_by) == sa.bindparam("added_by"),
    "words": has_words,
}


COUNTED = (("genre",), ("language",))  # of which it is known how many there are


def condition(name: str) -> ColumnElement[bool]:
    return CONDITIONS[name]()


BOOKS = Listing(SELECT_JSON, condition)


class BookQuery(BookFilter, PageQuery):
    pass


@router.short("GET", "", response_model=Page[BookPublic], responses=FOLLOWED_PAGE)
async def list_books(query: Annotated[BookQuery, Query()], viewer: Viewer, request: Request) -> Response:
    """A page of the catalogue, filtered, searched and sorted.

    `X-Event-Cursor` is the id of the last change that the page contains: follow `/stream?since=` from there.
    """
    if query.added_by and viewer is None:
        raise unauthorized()
    asked = query.asked()
    # A walk through all or one genre is short; what must count, match or sort may take long.
    short = asked == () or (asked in COUNTED and query.sort in (None, "id"))
    how = database.read_in_thread if query.start or not short else database.read
    page, cursor = await how(find_books, query, asked, query.values(viewer))
    return json_answer(page, request, cursor)


def find_books(
    connection: Connection, query: BookQuery, asked: tuple[str, ...], values: dict[str, Any]
) -> tuple[JsonPage, int]:
    """The page, and the event id it is up to date with."""
    if query.words.ranked and query.sort is None:
        page = best_matches(connection, query, asked, values)
    else:
        total = int(counting(asked).first(connection, values)[0])
        page = BOOKS.page(connection, asked, values, ORDERS[query.sort or "id"], query, total)
    return page, last_event_id(connection)


@functools.lru_cache(1000)
def counting(asked: tuple[str, ...]) -> CompiledQuery:
    if not asked:
        return CompiledQuery(sa.select(col(Setting.value)).where(col(Setting.key) == "book_count"))
    if asked in COUNTED:
        of_kind = (col(Facet.kind) == asked[0], sa.func.lower(col(Facet.name)) == sa.func.lower(sa.bindparam(asked[0])))
        return CompiledQuery(sa.select(sa.func.coalesce(sa.func.sum(col(Facet.count)), 0)).where(*of_kind))
    if "words" in asked:
        return CompiledQuery(count_matches([condition(name) for name in asked if name != "words"]))
    return CompiledQuery(sa.select(sa.func.count()).select_from(Book).where(*map(condition, asked)))


def best_matches(connection: Connection, query: BookQuery, asked: tuple[str, ...], values: dict[str, Any]) -> JsonPage:
    keys = query.keys(BEST) or (0, 0)
    after, wanted = (int(keys[0]), int(keys[1])), query.start + query.limit + 1
    total = int(counting(asked).first(connection, values)[0])
    if asked == ("words",) and total <= FEW and not database.is_postgresql():
        places = [place for place in few_best_first(connection, query.words) if place > after][:wanted]
    else:
        conditions = [condition(name) for name in asked if name != "words"]
        places = best_first(connection, query.words, conditions, values, after, wanted)
    shown = places[query.start : query.start + query.limit]
    texts = {book_id: text for text, book_id in some_books(connection, [book_id for _, book_id in shown])}
    following = encode(BEST.name, shown[-1]) if shown and len(places) == wanted else None
    return JsonPage([texts[book_id] for _, book_id in shown], total, following)


@router.get("/genres")
async def list_genres() -> list[GenreCount]:
    """The genres and how many books each has, the largest first."""
    return await database.read_in_thread(_count_genres)


def _count_genres(connection: Connection) -> list[GenreCount]:
    key, count = sa.func.lower(col(Facet.name)), sa.func.sum(col(Facet.count))
    genres = sa.select(sa.func.min(col(Facet.name)), count).where(col(Facet.kind) == "genre")
    rows = connection.execute(genres.group_by(key).order_by(count.desc(), key))
    return [GenreCount(genre=genre, count=count) for genre, count in rows]


# --- one book -----------------------------------------------------------------------------------------------------


def etag_of(version: int) -> str:
    return f'"{version}"'


def names_etag(header: str, etag: str) -> bool:
    """Whether an If-Match or If-None-Match header names this version (RFC 9110, 13.1)."""
    return header.strip() == "*" or etag in (tag.strip().removeprefix("W/") for tag in header.split(","))


CHANGE_RESPONSES = errors(403, 409, 412, sends={200: "ETag"})
NOT_MODIFIED: dict[int | str, Any] = {304: {"description": "It is still the version that you have."}}


IfMatch = Annotated[str | None, Header(description="The `ETag` that the change is based on; 412 when it is stale.")]
IfNoneMatch = Annotated[str | None, Header(description="The `ETag` that you have; 304 when it is still true.")]


@router.short("GET", "/{book_id:id}", response_model=BookPublic, responses=NOT_MODIFIED | errors(sends={200: "ETag"}))
async def read_book(book_id: BookId, if_none_match: IfNoneMatch = None) -> Response:
    """One book. Its `ETag` names its version."""
    row = await database.read(FIND_BOOK.first, {"book_id": book_id})
    if row is None:
        raise no_such_book()
    body, version = row
    headers = {"ETag": etag_of(version)}
    if if_none_match is not None and names_etag(if_none_match, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    return Response(body, media_type="application/json", headers=headers)


CREATE_RESPONSES = errors(403, 409, sends={201: "Location ETag"})


@router.short("POST", "", status_code=201, response_model=BookPublic, responses=CREATE_RESPONSES)
async def create_book(new: BookCreate, user: Contributor) -> Response:
    """Add a book. An ISBN that is here already is refused with 409."""
    book = await database.write_inline(add_book, new, user.id)
    headers = {"Location": f"/books/{book.id}", "ETag": etag_of(book.version)}
    return Response(ONE_BOOK.dump_json(book), 201, headers, media_type="application/json")


def add_book(session: Session, new: BookBase, user_id: int) -> BookPublic:
    book = Book.row(new) | Book.untouched(user_id)
    book["id"] = INSERT_BOOK(session, book)
    index_books(session, book["id"], book["id"])
    return _record_book(session, "book.created", {**book, "rating": None})


def _record_book(session: Session, event_type: str, book: Book | dict[str, Any]) -> BookPublic:
    shown = BookPublic.model_validate(book)
    # A description can be long, and the log keeps many events.
    events.record(session, event_type, shown.model_dump(mode="json", exclude={"description"}))
    return shown


def disown_books(session: Session, user_id: int) -> None:
    """Their account is about to go. The books stay, and what they show of who added them changes."""
    theirs = sa.update(Book).where(col(Book.added_by) == user_id)
    change = {"added_by": None, "version": col(Book.version) + 1, "updated_at": models.utcnow()}
    ids = session.scalars(theirs.values(change).returning(col(Book.id))).all()
    told = JsonObject({name: column for name, column in PUBLIC_COLUMNS.items() if name != "description"})
    for some in (ids[start : start + 1000] for start in range(0, len(ids), 1000)):
        rows = sa.select(told).where(col(Book.id).in_(some)).order_by(col(Book.id))
        events.record_each(session, "book.updated", rows)


@router.put("/{book_id:id}", responses=CHANGE_RESPONSES)
async def replace_book(
    book_id: BookId, new: BookCreate, user: CurrentUser, response: Response, if_match: IfMatch = None
) -> BookPublic:
    """Replace all that is said of a book: what is left out is cleared. For who added it, and staff."""
    book = await database.write(_change_book, book_id, user, if_match, new)
    response.headers["ETag"] = etag_of(book.version)
    return book


@router.patch("/{book_id:id}", responses=CHANGE_RESPONSES)
async def update_book(
    book_id: BookId, change: BookUpdate, user: CurrentUser, response: Response, if_match: IfMatch = None
) -> BookPublic:
    """Change some of what is said of a book (RFC 7396: null clears). For who added it, and staff."""
    book = await database.write(_change_book, book_id, user, if_match, change)
    response.headers["ETag"] = etag_of(book.version)
    return book


def _change_book(
    session: Session, book_id: int, user: Principal, if_match: str | None, change: BookCreate | BookUpdate
) -> BookPublic:
    book = book_to_change(session, book_id, if_match)
    if not user.is_staff and book.added_by != user.id:
        raise HTTPException(403, "Only who added a book, librarians and admins change it.")
    return revise_book(session, book, change)


def revise_book(session: Session, book: Book, change: BookCreate | BookUpdate) -> BookPublic:
    book.describe(change if isinstance(change, BookCreate) else _merged(book, change))
    book.touch()
    session.flush()
    return _record_book(session, "book.updated", book)


def _merged(book: Book, change: BookUpdate) -> BookCreate:
    """The book as it would be, validated as a whole."""
    merged = book.model_dump(include=set(BookBase.model_fields)) | change.model_dump(exclude_unset=True)
    year_was_the_dates = book.published_date is not None and book.publication_year == book.published_date.year
    if change.published_date is not None and "publication_year" not in change.model_fields_set and year_was_the_dates:
        merged["publication_year"] = None  # the new date fills it anew
    try:
        return BookCreate.model_validate(merged)
    except ValidationError as error:
        found = error.errors(include_input=False, include_url=False)
        raise RequestValidationError([{**e, "loc": ("body", *e["loc"])} for e in found]) from None


def book_to_change(session: Session, book_id: int, if_match: str | None = None) -> Book:
    """The book, locked until the transaction ends, if it is still the version that the client has seen."""
    book = session.get(Book, book_id, with_for_update=True)
    if book is None:
        raise no_such_book()
    if if_match is not None and not names_etag(if_match, etag_of(book.version)):
        raise HTTPException(412, f"The book has changed: its ETag is now {etag_of(book.version)}.")
    return book


@router.delete("/{book_id:id}", status_code=204, responses=errors(403, 409, 412))
async def delete_book(book_id: BookId, user: CurrentUser, if_match: IfMatch = None) -> None:
    """Delete a book with its reviews and shelf entries.

    Staff may always; who added it, while nobody else has it on a shelf. While copies are on loan, nobody may: 409.
    """
    await database.write(_delete_book, book_id, user, if_match)


def _delete_book(session: Session, book_id: int, user: Principal, if_match: str | None) -> None:
    book = book_to_change(session, book_id, if_match)
    if not user.is_staff:
        if book.added_by != user.id:
            raise HTTPException(403, "Only who added a book, librarians and admins delete it.")
        others = sa.select(col(ShelfEntry.id)).where(
            col(ShelfEntry.book_id) == book_id, col(ShelfEntry.user_id) != user.id
        )
        if session.execute(others.limit(1)).first() is not None:
            raise HTTPException(409, "Somebody else has this book on a shelf: only librarians and admins delete it.")
    if book.available < book.copies:
        raise HTTPException(409, f"{book.copies - book.available} of its copies are on loan: have them returned first.")
    session.delete(book)
    events.record(session, "book.deleted", {"id": book.id, "title": book.title, "author": book.author})
