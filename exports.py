"""What goes out: the catalogue as CSV or NDJSON, and my shelf as Goodreads has it. Both come back in unchanged."""

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

import sqlalchemy as sa
from fastapi import Query
from fastapi.responses import StreamingResponse
from pydantic import Field
from sqlalchemy import Connection
from sqlmodel import col

import database
import models
from api import Router
from books import ONE_BOOK, ORDERS, PUBLIC_COLUMNS, BookFilter, as_book, condition
from csv_files import BOOK_COLUMNS, OUR_COLUMNS, SHELVES, to_csv, to_html
from library import SELECT_ENTRIES, as_entry
from models import Book, ShelfEntry
from pagination import Order
from security import CurrentUser, Viewer, unauthorized

router = Router(tags=["In and out"])

BATCH = 1000  # rows that are in memory at once


class ExportQuery(BookFilter):
    format: Literal["csv", "ndjson"] = Field(default="csv", description="NDJSON: a book to a line, as `/books` has it.")


FILES = {
    "description": "The file, streamed.",
    "content": {kind: {"schema": {"type": "string"}} for kind in ("text/csv", "application/x-ndjson")},
}


@router.get("/books/export", response_class=StreamingResponse, responses={200: FILES})
async def export_books(query: Annotated[ExportQuery, Query()], viewer: Viewer) -> StreamingResponse:
    """The catalogue as a file, filtered like `/books`.

    The CSV goes back in through `/books/upload`. A text that a spreadsheet would run as a formula has an apostrophe
    before it, which is taken away on the way in.
    """
    if query.added_by and viewer is None:
        raise unauthorized()
    columns = [getattr(Book, name) for name in BOOK_COLUMNS] if query.format == "csv" else [*PUBLIC_COLUMNS.values()]
    found = sa.select(*columns).where(*map(condition, query.asked())).params(query.values(viewer))
    batches = _batches(found, ORDERS[query.sort or "id"])
    name = {"Content-Disposition": f'attachment; filename="books.{query.format}"'}
    if query.format == "csv":
        return StreamingResponse(
            _csv(BOOK_COLUMNS, batches, lambda row: row[: len(BOOK_COLUMNS)]), 200, name, "text/csv"
        )
    return StreamingResponse(_ndjson(batches), 200, name, "application/x-ndjson")


@router.get(
    "/my-library/export",
    response_class=StreamingResponse,
    responses={200: {"description": "The file, streamed.", "content": {"text/csv": {"schema": {"type": "string"}}}}},
    tags=["My library"],
)
async def export_library(user: CurrentUser) -> StreamingResponse:
    """My shelf in the columns of Goodreads, and some of our own. It comes back in through `/my-library/import`."""
    mine = SELECT_ENTRIES.where(col(ShelfEntry.user_id) == user.id)
    name = {"Content-Disposition": 'attachment; filename="my-library.csv"'}
    rows = _csv(SHELF_COLUMNS, _batches(mine, Order("id", (col(ShelfEntry.id),))), _shelf_cells)
    return StreamingResponse(rows, 200, name, "text/csv")


def _batches(select: sa.Select[Any], order: Order) -> Iterator[Sequence[Any]]:
    """Each is a read of its own: a slow client holds neither a connection nor the write-ahead log."""
    page = select.add_columns(*order.columns).limit(BATCH)
    ahead = [page.order_by(*order.by())]
    while ahead:
        rows = database.read_sync(_fetch, ahead.pop(0))
        if rows:
            yield rows
        if len(rows) == BATCH:
            ahead = [page.where(step).order_by(*by) for step, by in order.steps(rows[-1][-len(order.columns) :])]


def _fetch(connection: Connection, page: sa.Select[Any]) -> Sequence[Any]:
    return connection.execute(page).all()


def _csv(
    header: Sequence[str], batches: Iterator[Sequence[Any]], cells: Callable[[Any], Sequence[object]]
) -> Iterator[str]:
    yield to_csv([header])
    for rows in batches:
        yield to_csv(map(cells, rows))


def _ndjson(batches: Iterator[Sequence[Any]]) -> Iterator[bytes]:
    for rows in batches:
        books = (ONE_BOOK.validate_python(as_book(row)) for row in rows)
        yield b"".join(ONE_BOOK.dump_json(book) + b"\n" for book in books)


# --- Goodreads' columns -------------------------------------------------------------------------------------------

SHELF_COLUMNS = (
    "Book Id,Title,Author,Author l-f,Additional Authors,ISBN,ISBN13,My Rating,Average Rating,Publisher,Binding,"
    "Number of Pages,Year Published,Original Publication Year,Date Read,Date Added,Bookshelves,"
    "Bookshelves with positions,Exclusive Shelf,My Review,Spoiler,Private Notes,Read Count,Owned Copies"
).split(",") + OUR_COLUMNS
EXCLUSIVE = {status: name for name, status in reversed(SHELVES.items())}


def _shelf_cells(row: Any) -> list[object]:
    entry = as_entry(row)
    book, shelf = entry["book"], EXCLUSIVE[entry["status"]]
    first, _, others = book["author"].partition(", ")
    if not others or (first, others) != (first.strip(), others.strip()):
        first, others = book["author"], ""
    # Goodreads names the exclusive shelf among the others, which is why it is taken out of them on the way in.
    tags = ([shelf] if shelf in entry["tags"] else []) + entry["tags"]
    dates = {n: entry[n] and entry[n].date().isoformat().replace("-", "/") for n in ("finished_at", "added_at")}
    moments = [entry[name] and models.isoformat(entry[name]) for name in ("added_at", "started_at", "finished_at")]
    return [
        *(book["id"], book["title"], first, "", others, "", book["isbn"], entry["rating"] or 0),
        *(book["rating"] and round(book["rating"], 2), book["publisher"], "", book["pages"]),
        *("", book["publication_year"], dates["finished_at"], dates["added_at"]),
        *(", ".join(tags), "", shelf, to_html(entry["review"] or ""), "", "", int(shelf == "read"), 0),
        *(book[name] for name in ("genre", "description", "language", "price", "cover_url", "published_date")),
        *moments,
    ]
