"""Files in and out: `/books/upload`, `/my-library/import`, their refused rows, and the exports."""

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

import sqlalchemy as sa
from fastapi import BackgroundTasks, Depends, Form, HTTPException, Path, Query, Request, Response, UploadFile
from fastapi.responses import StreamingResponse
from pydantic import BeforeValidator, Field, TypeAdapter
from sqlalchemy import ColumnElement, Connection
from sqlmodel import Session, col

import database
import models
from api import PAGE, Router, errors
from books import ONE_BOOK, ORDERS, PUBLIC_COLUMNS, BookFilter, as_book, condition
from csv_files import BOOK_COLUMNS, OUR_COLUMNS, REASON, SHELVES, printable, to_csv, to_html
from imports import CHUNK, CHUNKS, finish, run_upload
from library import SELECT_ENTRIES, as_entry
from models import Book, OnDuplicate, Principal, ShelfEntry, Upload, UploadError, UploadStatus
from pagination import Order, Page, PageQuery, named, page_answer, read_page
from schemas import Id, RequestModel, UploadErrorPublic, UploadPublic, invalid_body
from security import Contributor, CurrentUser, Viewer, reject_repeated_fields, unauthorized
from settings import settings

router = Router(tags=["In and out"])

UploadId = Annotated[Id, Path(description="The upload's `id`.")]
UPLOADS, UPLOAD_PAGE = Order("-id", (col(Upload.id),)), TypeAdapter(Page[UploadPublic])
ERRORS, ERROR_PAGE = Order("id", (col(UploadError.id),)), TypeAdapter(Page[UploadErrorPublic])
SELECT_UPLOADS = sa.select(*[col(getattr(Upload, name)) for name in UploadPublic.model_fields])
SELECT_ERRORS = sa.select(*[col(getattr(UploadError, name)) for name in UploadErrorPublic.model_fields])


MAX_UPLOAD = (settings.max_upload_mb << 20) + 64 * 1024  # bytes of a request with a file
ACCEPTED = errors(sends={202: "Location"})


def _is_file(part: object) -> object:
    if isinstance(part, str):
        raise ValueError("must be a file, with a name; by curl: -F file=@books.csv")
    return part


class ShelfForm(RequestModel):
    file: Annotated[UploadFile, BeforeValidator(_is_file)]
    on_duplicate: OnDuplicate = Field(
        default=OnDuplicate.skip,
        description="What is here already is skipped, or changed to what the file says, where it says anything.",
    )
    dry_run: bool = Field(default=False, description="Only count and explain; nothing is written.")


class UploadForm(ShelfForm):
    shelve: bool = Field(default=False, description="Put the books of a Goodreads or StoryGraph export on my shelf.")
    enrich: bool = Field(
        default=False,
        description="Look rows with an ISBN up in Open Library, and fill in what they lack; `isbn` alone will do then.",
    )


class NoQuery(RequestModel):
    """What is asked of an upload is in its form: the same in the query would be passed over, `dry_run` with it."""


OneOfEach = Annotated[None, Depends(reject_repeated_fields)]


@router.post("/books/upload", status_code=202, max_body_size=MAX_UPLOAD, responses=errors(403) | ACCEPTED)
async def upload_books(
    form: Annotated[UploadForm, Form(media_type="multipart/form-data")],
    _query: Annotated[NoQuery, Query()],
    user: Contributor,
    _parts: OneOfEach,
    tasks: BackgroundTasks,
    response: Response,
) -> UploadPublic:
    """Bring in a CSV file of books: its first row names the columns, of which it needs `title` and `author`.

    The file is stored and the answer is 202: read how it goes at `Location`, or follow `upload.progress` events.
    Delimiter, quotes and encoding are found by looking. A book is here already if its ISBN is, or without one, its
    title and author.
    """
    return await _accept(form, user, tasks, response, shelve=form.shelve, enrich=form.enrich)


@router.post(
    "/my-library/import",
    status_code=202,
    max_body_size=MAX_UPLOAD,
    tags=["My library"],
    responses=ACCEPTED,
)
async def import_library(
    form: Annotated[ShelfForm, Form(media_type="multipart/form-data")],
    _query: Annotated[NoQuery, Query()],
    user: CurrentUser,
    _parts: OneOfEach,
    tasks: BackgroundTasks,
    response: Response,
) -> UploadPublic:
    """Bring in my shelf, as Goodreads, StoryGraph or `/my-library/export` have written it.

    The answer is 202, as that of `/books/upload`. Books that the catalogue has not are added to it.
    """
    return await _accept(form, user, tasks, response, shelve=True, enrich=False)


async def _accept(
    form: ShelfForm, user: Principal, tasks: BackgroundTasks, response: Response, *, shelve: bool, enrich: bool
) -> UploadPublic:
    if not form.file.size:
        raise invalid_body("file", "is empty")
    if form.file.size > settings.max_upload_mb << 20:
        raise HTTPException(413, f"The largest file that is taken has {settings.max_upload_mb} MiB.")
    upload = await database.write(_store_file, form, user.id, shelve=shelve, enrich=enrich)
    tasks.add_task(database.run_job, run_upload, upload.id)
    response.headers["Location"] = f"/books/upload/{upload.id}"
    return upload


def _store_file(session: Session, form: ShelfForm, user_id: int, *, shelve: bool, enrich: bool) -> UploadPublic:
    file = form.file.file
    assert form.file.size is not None
    upload = Upload(
        user_id=user_id,
        filename=printable(form.file.filename or "", 255) or "upload.csv",
        size=form.file.size,
        shelve=shelve,
        on_duplicate=form.on_duplicate,
        dry_run=form.dry_run,
        enrich=enrich,
    )
    session.add(upload)
    session.flush()
    for number, piece in enumerate(iter(lambda: file.read(CHUNK), b"")):
        chunk = {"upload_id": upload.id, "number": number, "data": piece}
        session.execute(sa.insert(CHUNKS), [chunk])
    return UploadPublic.model_validate(upload)


@router.get("/books/upload", response_model=Page[UploadPublic], responses=PAGE)
async def list_uploads(query: Annotated[PageQuery, Query()], user: CurrentUser, request: Request) -> Response:
    """My uploads, the newest first; for staff, everybody's."""
    return page_answer(await database.read(_find_uploads, user, query), UPLOAD_PAGE, request)


def _find_uploads(connection: Connection, user: Principal, query: PageQuery) -> dict[str, Any]:
    visible = SELECT_UPLOADS.where(_visible(user))
    return read_page(connection, visible, UPLOADS, query, named(UploadPublic.model_fields))


def _visible(user: Principal) -> ColumnElement[bool]:
    return sa.true() if user.is_staff else col(Upload.user_id) == user.id


@router.get("/books/upload/{upload_id:id}")
async def read_upload(upload_id: UploadId, user: CurrentUser) -> UploadPublic:
    """How an upload goes."""
    return await database.read(_find_upload, upload_id, user)


def no_such_upload() -> HTTPException:
    return HTTPException(404, "No such upload.")


def _find_upload(connection: Connection, upload_id: int, user: Principal) -> UploadPublic:
    row = connection.execute(SELECT_UPLOADS.where(col(Upload.id) == upload_id, _visible(user))).first()
    if row is None:
        raise no_such_upload()
    return UploadPublic.model_validate(row)


@router.delete("/books/upload/{upload_id:id}", responses=errors(409))
async def cancel_upload(upload_id: UploadId, user: CurrentUser) -> UploadPublic:
    """Cancel an upload that waits or runs. What is counted as inserted or updated stays. 409 where it has ended."""
    return await database.write(_cancel, upload_id, user)


def _cancel(session: Session, upload_id: int, user: Principal) -> UploadPublic:
    upload = session.scalars(
        sa.select(Upload).where(col(Upload.id) == upload_id, _visible(user)).with_for_update()
    ).first()
    if upload is None:
        raise no_such_upload()
    if upload.status not in (UploadStatus.queued, UploadStatus.processing):
        raise HTTPException(409, f"This upload is {upload.status} already.")
    finish(session, upload, UploadStatus.cancelled)
    return UploadPublic.model_validate(upload)


class ErrorsQuery(PageQuery):
    format: Literal["json", "csv"] = Field(
        default="json", description="`csv`: all refused rows as they came, each with its reason, to mend and upload."
    )


CSV_FILE = {"content": {"text/csv": {"schema": {"type": "string"}}}}


@router.get("/books/upload/{upload_id:id}/errors", response_model=Page[UploadErrorPublic], responses={200: CSV_FILE})
async def list_upload_errors(
    upload_id: UploadId, query: Annotated[ErrorsQuery, Query()], user: CurrentUser, request: Request
) -> Response:
    """Why rows were refused, and what others had to go in without."""
    if query.format == "csv":
        header = await database.read(_find_header, upload_id, user)
        name = {"Content-Disposition": f'attachment; filename="upload-{upload_id}-refused.csv"'}
        return StreamingResponse(_refused_rows(upload_id, header), media_type="text/csv", headers=name)
    return page_answer(await database.read(_find_upload_errors, upload_id, user, query), ERROR_PAGE, request)


def _find_upload_errors(connection: Connection, upload_id: int, user: Principal, query: PageQuery) -> dict[str, Any]:
    _find_upload(connection, upload_id, user)
    of_upload = SELECT_ERRORS.where(col(UploadError.upload_id) == upload_id)
    return read_page(connection, of_upload, ERRORS, query, named(UploadErrorPublic.model_fields))


def _find_header(connection: Connection, upload_id: int, user: Principal) -> list[str]:
    _find_upload(connection, upload_id, user)
    return connection.execute(sa.select(col(Upload.header)).where(col(Upload.id) == upload_id)).scalar_one() or []


def _refused_rows(upload_id: int, header: list[str]) -> Iterator[str]:
    yield to_csv([[*header, REASON]])
    last = 0
    while refused := database.read_sync(_next_refused, upload_id, last):
        rows: dict[int, list[str]] = {}
        reasons: dict[int, list[str]] = {}
        for error in refused:
            rows.setdefault(error.row, error.cells)
            reasons.setdefault(error.row, []).append(" ".join(filter(None, (error.field, error.message))))
        yield to_csv([*cells, "; ".join(reasons[number])] for number, cells in rows.items())
        last = refused[-1].row


def _next_refused(connection: Connection, upload_id: int, last: int) -> Sequence[Any]:
    """The reasons of some rows after row `last`, all of each row."""
    of_upload = sa.and_(col(UploadError.upload_id) == upload_id, col(UploadError.severity) == "error")
    rows = sa.select(col(UploadError.row)).where(of_upload, col(UploadError.row) > last).distinct()
    some = rows.order_by(col(UploadError.row)).limit(200)
    return connection.execute(
        sa.select(UploadError)
        .where(of_upload, col(UploadError.row).in_(some.scalar_subquery()))
        .order_by(col(UploadError.id))
    ).all()


EXPORT_BATCH = 1000  # rows that are in memory at once


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
    page = select.add_columns(*order.columns).limit(EXPORT_BATCH)
    ahead = [page.order_by(*order.by())]
    while ahead:
        rows = database.read_sync(_fetch, ahead.pop(0))
        if rows:
            yield rows
        if len(rows) == EXPORT_BATCH:
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
