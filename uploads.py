"""Uploads: taking a file, how it goes, what was refused, and cancelling."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import sqlalchemy as sa
from fastapi import BackgroundTasks, Depends, Form, HTTPException, Path, Query, Request, Response, UploadFile
from fastapi.responses import StreamingResponse
from pydantic import BeforeValidator, Field, TypeAdapter
from sqlalchemy import ColumnElement, Connection
from sqlmodel import Session, col

import database
from api import PAGE, Router, errors
from csv_files import REASON, printable, to_csv
from imports import CHUNK, CHUNKS, end, run_upload
from models import OnDuplicate, Principal, Upload, UploadError, UploadStatus
from pagination import Order, Page, PageQuery, named, page_answer, read_page
from schemas import Id, RequestModel, UploadErrorPublic, UploadPublic, invalid_body
from security import Contributor, CurrentUser, reject_repeated_fields
from settings import settings

router = Router(tags=["In and out"])

UploadId = Annotated[Id, Path(description="The upload's `id`.")]
UPLOADS, UPLOAD_PAGE = Order("-id", (col(Upload.id),)), TypeAdapter(Page[UploadPublic])
ERRORS, ERROR_PAGE = Order("id", (col(UploadError.id),)), TypeAdapter(Page[UploadErrorPublic])
SELECT_UPLOADS = sa.select(*[col(getattr(Upload, name)) for name in UploadPublic.model_fields])
SELECT_ERRORS = sa.select(*[col(getattr(UploadError, name)) for name in UploadErrorPublic.model_fields])


UPLOAD_MAX = (settings.max_upload_mb << 20) + 64 * 1024  # bytes of a request with a file
TAKEN = errors(sends={202: "Location"})


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


@router.post("/books/upload", status_code=202, max_body_size=UPLOAD_MAX, responses=errors(403) | TAKEN)
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
    return await _take(form, user, tasks, response, shelve=form.shelve, enrich=form.enrich)


@router.post(
    "/my-library/import",
    status_code=202,
    max_body_size=UPLOAD_MAX,
    tags=["My library"],
    responses=TAKEN,
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
    return await _take(form, user, tasks, response, shelve=True, enrich=False)


async def _take(
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
    end(session, upload, UploadStatus.cancelled)
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
