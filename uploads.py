"""Files in: `/books/upload`, `/my-library/import`, the import job and its refused rows.

A stored file is imported by a background task; a recurring job of `main` does so for files that a stopped process left.
The job commits each batch together with its progress: killed in between, it is resumed from there.
"""

import io
import json
import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from itertools import islice
from typing import Annotated, Any, Literal

import anyio.to_thread
import sqlalchemy as sa
from fastapi import BackgroundTasks, Form, HTTPException, Path, Query, Request, Response, UploadFile
from fastapi.routing import APIRoute
from pydantic import BeforeValidator, Field, WithJsonSchema
from sqlalchemy import Connection
from sqlalchemy.orm import aliased
from sqlmodel import Session, col
from starlette.formparsers import MultiPartParser

import csv_files
import database
import events
import external
import models
import security
from api import PAGE, Conflict, Router, errors, or_404, readonly, transactional_in_thread, user_checks
from csv_files import SHELF_FORMATS, ImportRow, UnreadableFile, as_csv, printable, strip_invalid
from imports import CHUNK, BatchImporter, CsvUpload, DuplicateTracker, ImportJob, JobCancelled, has_job, lock_upload
from models import InvalidField, OnDuplicate, Principal, Upload, UploadChunk, UploadError, UploadStatus, User
from pagination import CSV_FILE, JsonObject, Listing, Page, PageQuery, file_response, json_response, page_response
from schemas import Id, RequestModel, UploadErrorPublic, UploadPublic
from security import Contributor, CurrentUser
from settings import settings

router = Router(tags=["In and out"])

UploadId = Annotated[Id, Path(description="The upload's `id`.")]
UPLOADS = Listing(
    sa.select(JsonObject(Upload, UploadPublic)),
    filters={"id": col(Upload.id) == sa.bindparam("id"), "user_id": col(Upload.user_id) == sa.bindparam("user_id")},
    orders={"-id": (col(Upload.id),)},
)
CELLS = sa.cast(UploadError.cells, sa.Text)
ERRORS = Listing(
    sa.select(JsonObject(UploadError, UploadErrorPublic)),
    filters={name: getattr(UploadError, name) == sa.bindparam(name) for name in ("upload_id", "severity")}
    | {"refused": CELLS != "null"},  # as JSON stores None: not a row's first reason
    orders={"id": (col(UploadError.id),)},
)
REFUSED = Listing(
    sa.select(CELLS, col(UploadError.field), col(UploadError.message)),
    filters=ERRORS.filters,
    orders={"id": (col(UploadError.id),)},
)

# --- taking a file ------------------------------------------------------------------------------------------------

MAX_UPLOAD = (settings.max_upload_mb << 20) + 64 * 1024  # bytes of a request with a file
MAX_UNFINISHED = 5  # uploads of a user
ACCEPTED: Any = {"status_code": 202, "max_body_size": MAX_UPLOAD}
RESPONSES = errors(409, 415, 429, sends={202: "Location"})


def _is_file(part: object) -> object:
    if isinstance(part, str):
        raise ValueError("must be a file, with a name; by curl: -F file=@books.csv")
    return part


class ShelfForm(RequestModel):
    file: Annotated[UploadFile, BeforeValidator(_is_file), WithJsonSchema({"type": "string", "format": "binary"})]
    on_duplicate: OnDuplicate = Field(
        default=OnDuplicate.skip,
        description="Skip what is here already, or change it to the values in the file, where it has any.",
    )
    dry_run: bool = Field(default=False, description="Only count and explain; nothing is written.")


class UploadForm(ShelfForm):
    shelve: bool = Field(default=False, description="Put the books of another service's export on my shelf.")
    enrich: bool = Field(
        default=False,
        description="Look rows with an ISBN up in Open Library, and fill in what they lack; `isbn` alone will do then.",
    )


class NoQuery(RequestModel):
    """The options are form fields: in the query they are refused, not ignored."""


class StoredFile(io.BytesIO):
    """A file that is stored as it arrives: as by a job, so that none begins before it is whole, and in many
    transactions, since in one 100 MB hold the writer for 0.3 s. Starlette writes to it in a thread."""

    def __init__(self, user: Principal, filename: str) -> None:
        super().__init__()
        self.user, self.filename, self.size, self.chunks = user, filename, 0, 0
        self.data = bytearray()
        self.job: ImportJob | None = None

    def write(self, data: Any) -> int:
        self.size += len(data)
        if self.size > settings.max_upload_mb << 20:
            raise HTTPException(413, f"Files have at most {settings.max_upload_mb} MiB.")
        self.job = self.job or database.write_sync(insert_upload, self.user, self.filename)
        self.data += data
        while len(self.data) >= CHUNK:
            database.write_sync(insert_chunk, self.job, self.chunks, bytes(self.data[:CHUNK]))
            del self.data[:CHUNK]
            self.chunks += 1
        self.job.renew_lease()
        return len(data)


class UploadParser(MultiPartParser):
    """Starlette's parser, with the file stored instead of spooled."""

    def __init__(self, request: Request, user: Principal) -> None:
        super().__init__(request.headers, request.stream(), **security.FORM_LIMITS)
        self.user = user
        self.file: StoredFile | None = None

    def on_headers_finished(self) -> None:
        super().on_headers_finished()
        name, file = self._current_part.field_name, self._current_part.file
        if file is not None:
            if name != "file" or self.file is not None:
                raise InvalidField(name, "is given more than once" if name == "file" else "is not a known field")
            file.file.close()
            file.file = self.file = StoredFile(self.user, file.filename or "")


class UploadRoute(APIRoute):
    """Checks the user before the form is read; FastAPI does so after."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        (checks,) = (user_checks(each) for each in self.dependant.dependencies)

        async def handle_upload(request: Request) -> Response:
            user: Any = await security.get_principal(await security.bearer(request))
            for check in checks:
                user = await check(user)
            parser = UploadParser(request, user)
            try:
                await security.read_form(request, parser)
                return await handle(request)
            except Exception as error:
                if parser.file is not None and parser.file.job is not None:
                    await anyio.to_thread.run_sync(database.write_sync, delete_upload, parser.file.job)
                if isinstance(error, JobCancelled):
                    raise Conflict("upload_ended", f"The upload has ended: {error}.") from None
                raise

        return handle_upload


uploading = Router(route_class=UploadRoute)


@uploading.post("/books/upload", tags=["In and out"], responses=errors(403) | RESPONSES, **ACCEPTED)
async def upload_books(
    form: Annotated[UploadForm, Form(media_type="multipart/form-data")],
    _query: Annotated[NoQuery, Query()],
    user: Contributor,
    tasks: BackgroundTasks,
    response: Response,
) -> UploadPublic:
    """Import a CSV file of books: its first row names the columns, among them `title` and `author`.

    The file is stored and the answer is 202: read the progress at `Location`, or follow `upload.progress` events.
    Delimiter, quotes and encoding are detected. A book is here already if its ISBN is, or without one, its title and
    author. 429 while five of my uploads are not finished.
    """
    return await store_upload(form, user, tasks, response)


@uploading.post("/my-library/import", tags=["My library"], responses=RESPONSES, **ACCEPTED)
async def import_library(
    form: Annotated[ShelfForm, Form(media_type="multipart/form-data")],
    _query: Annotated[NoQuery, Query()],
    user: CurrentUser,
    tasks: BackgroundTasks,
    response: Response,
) -> UploadPublic:
    """Import my shelf from an export of Goodreads, StoryGraph, LibraryThing, BookWyrm or `/my-library/export`.

    The answer is 202, as that of `/books/upload`. Books that are not in the catalogue are added to it. Ratings and
    reviews become public, each with my user name and `finished_at`; the rest of my shelf stays private.
    """
    return await store_upload(form, user, tasks, response)


router.routes.extend(uploading.routes)


async def store_upload(form: ShelfForm, user: Principal, tasks: BackgroundTasks, response: Response) -> UploadPublic:
    if not form.file.size:
        raise InvalidField("file", "is empty")
    upload = await anyio.to_thread.run_sync(database.write_sync, complete_upload, user, form)
    tasks.add_task(import_waiting, upload.enrich)
    response.headers["Location"] = f"/books/upload/{upload.id}"
    return upload


PUBLIC_HINT = (
    "Ratings and reviews become public, each with your user name and the day of finishing."
    " Everything else on your shelf stays private."
)


@security.authorized
def insert_upload(session: Session, user: Principal, filename: str) -> ImportJob:
    of_user = sa.select(sa.func.count()).where(col(Upload.user_id) == user.id)
    if session.execute(of_user.where(col(Upload.status).in_(UNFINISHED))).scalar_one() >= MAX_UNFINISHED:
        detail = f"You have {MAX_UNFINISHED} uploads that are not finished: wait until one is, or cancel it."
        raise HTTPException(429, detail, {"Retry-After": "10"})
    upload = Upload(user_id=user.id, filename=printable(filename, 255) or "upload.csv", size=0)
    session.add(upload)
    session.flush()
    return lease(upload)


def insert_chunk(session: Session, job: ImportJob, number: int, data: bytes) -> None:
    lock_upload(session, job)
    session.execute(sa.insert(UploadChunk), [{"upload_id": job.upload_id, "number": number, "data": data}])


@security.authorized
def complete_upload(session: Session, user: Principal, form: ShelfForm) -> UploadPublic:
    file: Any = form.file.file  # a StoredFile
    insert_chunk(session, file.job, file.chunks, bytes(file.data))
    upload = lock_upload(session, file.job)
    for name, value in {"shelve": True, **form.model_dump(exclude={"file"}), "size": file.size}.items():
        setattr(upload, name, value)  # a ShelfForm does not have `shelve`
    upload.hint = PUBLIC_HINT if upload.shelve else None
    return release(session, file.job)


def delete_upload(session: Session, job: ImportJob) -> None:
    """One that was not stored whole, unless it was cancelled."""
    session.execute(sa.delete(Upload).where(col(Upload.id) == job.upload_id, col(Upload.worker) == job.worker))


def visible_to(user: Principal) -> dict[str, Any]:
    return {} if user.is_staff else {"user_id": user.id}


@router.get("/books/upload", response_model=Page[UploadPublic], responses=PAGE)
async def list_uploads(query: Annotated[PageQuery, Query()], user: CurrentUser, request: Request) -> Response:
    """List my uploads, newest first; for staff, everybody's."""
    return page_response(request, await database.read(UPLOADS.page, visible_to(user), "-id", query))


@router.get("/books/upload/{upload_id:id}", response_model=UploadPublic, responses=errors(404))
@readonly
def read_upload(connection: Connection, upload_id: UploadId, user: CurrentUser) -> Response:
    """Read the status, progress and counts of an upload."""
    return json_response(find_upload(connection, upload_id, user))


def find_upload(connection: Connection | Session, upload_id: int, user: Principal) -> str:
    return or_404(UPLOADS.first(connection, visible_to(user) | {"id": upload_id}), "No such upload.")


@router.delete("/books/upload/{upload_id:id}", deprecated=True, responses=errors(404, 409))
@router.post("/books/upload/{upload_id:id}/cancel", name="cancel_unfinished_upload", responses=errors(404, 409))
@transactional_in_thread
def cancel_upload(session: Session, upload_id: UploadId, user: CurrentUser) -> UploadPublic:
    """Cancel a queued or running upload. What is counted as inserted or updated stays. 409 if it has ended."""
    find_upload(session, upload_id, user)
    upload = session.get_one(Upload, upload_id)
    if upload.status not in UNFINISHED:
        raise Conflict("upload_ended", f"This upload is {upload.status} already.")
    finish(session, upload, UploadStatus.cancelled)
    return UploadPublic.model_validate(upload)


# --- the job ------------------------------------------------------------------------------------------------------

log = logging.getLogger("books.uploads")

BATCH = 1000  # rows to a transaction: other writers wait some 40 ms
SHELF_BATCH = 100  # the same onto a shelf or with updates, which take up to ten times as long
ENRICH_BATCH = external.MAX_ISBNS  # the same with look-ups: each request is committed with its answer
MAX_ATTEMPTS = 3  # that end with their process before they store a batch
UNFINISHED = (UploadStatus.queued, UploadStatus.processing)
MAX_ERRORS = 10_000  # refused rows that are stored of one upload, and as many with warnings; the counts stay exact
MAX_CELL = 100_000  # characters stored of a refused row's cell: a field takes 20,000, which are more as HTML
PROGRESS_INTERVAL = 0.34  # seconds between two events of one upload: with the last, at most four in a second
INTERRUPTIONS = (sa.exc.OperationalError, sa.exc.TimeoutError)  # the second: of the pool of connections
SHELF_HINT = (
    "This is somebody's shelf: only its books go into the catalogue. Send it to /my-library/import to put them on your"
    " shelf, with your ratings, reviews, tags and dates."
)
ENCODING_HINT = (
    "This is not in UTF-8, and is read as Windows-1252. If letters are wrong, save it as UTF-8, and upload it again."
)


async def import_waiting(enrich: bool) -> None:
    """Import the stored files that no job has: new ones, and those of processes that were stopped or killed. Look-ups
    (`enrich`), which may wait for hours, have a place of their own."""
    if await database.read(next_upload, enrich) is not None:
        await database.run_job("lookups" if enrich else "imports", import_all, enrich)


def import_all(enrich: bool) -> None:
    """Import stored files until none is left. What was done before is not done again."""
    while (job := database.write_sync(_claim, enrich)) is not None:
        try:
            if not _import_upload(job):
                return
        except JobCancelled as reason:
            log.info("upload %s stopped: %s", job.upload_id, reason)
        except INTERRUPTIONS as error:  # a full disk, a lost connection
            log.error("upload %s interrupted: %s", job.upload_id, error)
            with suppress(JobCancelled, *INTERRUPTIONS):  # then it is resumed when its lease has run out
                database.write_sync(release, job)
            return


def _import_upload(job: ImportJob) -> bool:
    """False if the server stops first."""
    try:
        file = CsvUpload(job)
        database.write_sync(_describe, job, file)
        tracker, rows = DuplicateTracker(file.columns.ours), file.rows()
        for row in islice(rows, job.done):  # those that it did before it was interrupted
            if row.book is not None:
                tracker.key(row)
        while batch := file.next_batch(rows, job.batch):
            is_ready = external.look_up_isbns(batch, job.renew_lease)
            if is_ready:
                database.write_sync(_store_batch, job, tracker, batch, file.file.position)
            if not is_ready or database.server_is_stopping():
                database.write_sync(release, job)
                return False
        database.write_sync(_finish_job, job, None)
    except UnreadableFile as error:
        database.write_sync(_finish_job, job, str(error))
    except (JobCancelled, *INTERRUPTIONS):
        raise
    except Exception:
        # Whatever happens, the job has to end in a state that its owner can see.
        log.exception("upload %s failed", job.upload_id)
        database.write_sync(_finish_job, job, "Something went wrong here; it is in the server's log.")
    return True


def next_upload(connection: Connection | Session, enrich: bool) -> int | None:
    """The next to run: of a user who has none at work, and of several, of the one whose turn was longest ago."""
    other: Any = aliased(Upload)
    of_user = (other.user_id == Upload.user_id, other.enrich == Upload.enrich, other.started_at.is_not(None))
    last_turn = sa.select(sa.func.max(other.started_at)).where(*of_user).scalar_subquery()
    waiting = sa.and_(col(Upload.status).in_(UNFINISHED), ~has_job(Upload), col(Upload.enrich) == enrich)
    query = sa.select(col(Upload.id)).where(waiting, ~sa.exists().where(*of_user, has_job(other)))
    return connection.execute(query.order_by(last_turn.nulls_first(), col(Upload.id)).limit(1)).scalar()


def _claim(session: Session, enrich: bool) -> ImportJob | None:
    """Take the next upload, as the only job."""
    while (upload_id := next_upload(session, enrich)) is not None:
        upload = session.get_one(Upload, upload_id)
        upload.failed_attempts += upload.status == UploadStatus.processing  # its job did not release it
        if not upload.size:  # which is stored with the last chunk
            upload.error = "The file was not stored whole: upload it again."
        elif upload.failed_attempts == MAX_ATTEMPTS:
            upload.error = f"{MAX_ATTEMPTS} processes ended while they imported this file: it is not tried again."
        else:
            if upload.dry_run:  # its DuplicateTracker is lost: begin again
                for name in ("rows", "inserted", "updated", "skipped", "failed", "warnings", "progress"):
                    setattr(upload, name, 0)
                session.execute(sa.delete(UploadError).where(col(UploadError.upload_id) == upload_id))
            upload.started_at = upload.started_at or models.utcnow()
            return lease(upload)
        finish(session, upload, UploadStatus.failed)
    return None


def lease(upload: Upload) -> ImportJob:
    upload.status, upload.worker = UploadStatus.processing, secrets.token_hex(8)
    slow = upload.shelve or upload.on_duplicate == OnDuplicate.update
    batch = ENRICH_BATCH if upload.enrich else min(BATCH, SHELF_BATCH) if slow else BATCH
    job = ImportJob(upload.id, upload.worker, upload.rows, upload.enrich, upload.shelve, batch)
    job.extend_lease(upload)
    return job


def _describe(session: Session, job: ImportJob, file: CsvUpload) -> None:
    upload, columns = lock_upload(session, job), file.columns
    upload.format, upload.encoding, upload.delimiter = columns.format, file.encoding, file.dialect.delimiter
    upload.header = [strip_invalid(cell[:MAX_CELL]) for cell in columns.header]
    upload.ignored_columns = columns.ignored
    about_shelf = PUBLIC_HINT if upload.shelve else SHELF_HINT if columns.format in SHELF_FORMATS else ""
    about_encoding = ENCODING_HINT if file.encoding == "windows-1252" else ""
    upload.hint = " ".join(filter(None, (about_encoding, about_shelf))) or None


def _store_batch(
    session: Session, job: ImportJob, tracker: DuplicateTracker, rows: Sequence[ImportRow], position: int
) -> None:
    upload = lock_upload(session, job)
    user = session.get_one(User, upload.user_id)
    owner = Principal(user.id, user.username, user.role, 0)
    if not user.is_active or not (upload.shelve or settings.readers_can_add or owner.is_staff):
        upload.error = "Its owner may not add books any more."
        finish(session, upload, UploadStatus.failed)  # the job notices it at its next transaction
        return
    importer = BatchImporter(session, upload, owner, tracker)
    savepoint = session.begin_nested() if upload.dry_run else None
    importer.import_rows(rows)
    if savepoint is not None:
        savepoint.rollback()
    _store_issues(session, upload, rows)
    upload.rows += len(rows)
    for name, count in Counter(row.outcome for row in rows).items():
        setattr(upload, name, getattr(upload, name) + count)
    upload.warnings += sum(row.book is not None and bool(row.issues) for row in rows)
    upload.progress = min(position / upload.size, 1)
    if not upload.dry_run:  # which begins again each time
        upload.failed_attempts = 0
    if time.monotonic() - job.progress_at >= PROGRESS_INTERVAL:
        job.progress_at = time.monotonic()
        _record_progress(session, upload)


def _store_issues(session: Session, upload: Upload, rows: Sequence[ImportRow]) -> None:
    """Call it before the rows are counted."""
    counts = Counter(error=upload.failed, warning=upload.warnings)
    for row in filter(lambda row: row.issues, rows):
        kind = "error" if row.book is None else "warning"
        counts[kind] += 1
        cells = [strip_invalid(cell[:MAX_CELL]) for cell in row.cells] if row.book is None else None
        for issue in row.issues if counts[kind] <= MAX_ERRORS else ():
            issue_data = issue._asdict() | {"value": printable(issue.value)}
            session.add(UploadError(upload_id=upload.id, row=row.number, severity=kind, cells=cells, **issue_data))


def release(session: Session, job: ImportJob) -> UploadPublic:
    upload = lock_upload(session, job)
    upload.status, upload.lease_until, upload.worker = UploadStatus.queued, None, None
    return UploadPublic.model_validate(upload)


def _finish_job(session: Session, job: ImportJob, error: str | None) -> None:
    upload = lock_upload(session, job)
    upload.error, upload.progress = error, upload.progress if error else 1
    finish(session, upload, UploadStatus.failed if error else UploadStatus.completed)


def finish(session: Session, upload: Upload, status: UploadStatus) -> None:
    upload.status, upload.finished_at, upload.lease_until, upload.worker = status, models.utcnow(), None, None
    session.execute(sa.delete(UploadChunk).where(col(UploadChunk.upload_id) == upload.id))
    _record_progress(session, upload)


def _record_progress(session: Session, upload: Upload) -> None:
    public = UploadPublic.model_validate(upload)
    data = public.model_dump(mode="json", exclude={"ignored_columns", "created_at", "started_at", "finished_at"})
    events.record(session, "upload.progress", data, owner=upload.user_id)


# --- refused rows -------------------------------------------------------------------------------------------------


class ErrorsQuery(PageQuery):
    severity: Literal["error", "warning"] | None = Field(default=None, description="Only these.")
    format: Literal["json", "csv"] = Field(
        default="json", description="`csv`: the refused rows as they came, each with its reason, to fix and upload."
    )


@router.get(
    "/books/upload/{upload_id:id}/errors",
    response_model=Page[UploadErrorPublic],
    responses=errors(404) | {200: CSV_FILE},
)
@readonly
def list_upload_errors(
    connection: Connection,
    upload_id: UploadId,
    query: Annotated[ErrorsQuery, Query()],
    user: CurrentUser,
    request: Request,
) -> Response:
    """List why rows were refused, and which values others went in without."""
    find_upload(connection, upload_id, user)
    if query.format == "json":
        filters = {"upload_id": upload_id, **query.model_dump(include={"severity"}, exclude_none=True)}
        return page_response(request, ERRORS.page(connection, filters, "id", query))
    header = connection.execute(sa.select(col(Upload.header)).where(col(Upload.id) == upload_id)).scalar_one() or []
    batches = REFUSED.row_batches({"upload_id": upload_id, "refused": True}, "id", batch=10)  # of up to 2 MB each
    return file_response(as_csv([*header, csv_files.REASON], batches, refused_cells), f"upload-{upload_id}-refused.csv")


def refused_cells(row: Sequence[Any]) -> list[str]:
    cells, field, message, _ = row
    return [*json.loads(cells), " ".join(filter(None, (field, message)))]
