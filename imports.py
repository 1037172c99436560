"""What brings books in: CSV files, read by a job that survives its process.

The request stores the file as it came. The job reads it back, row by row, and commits batch by batch together with how
far it got: killed in between, it goes on from there. A row is refused with its reason or goes in; none is dropped.
"""

import csv
import io
import logging
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import islice
from typing import Annotated, Any, BinaryIO, NamedTuple, TextIO

import sqlalchemy as sa
from fastapi import APIRouter, BackgroundTasks, Form, HTTPException, Path, Query, Request, Response, UploadFile
from pydantic import TypeAdapter, ValidationError
from sqlalchemy import ColumnElement, Connection
from sqlalchemy.exc import NoResultFound
from sqlmodel import Session, SQLModel, col
from stdnum import isbn as isbn_numbers

import database
import events
import models
from auth import Contributor, CurrentUser
from books import index_books
from models import (
    Book,
    BookCreate,
    Id,
    Principal,
    Shape,
    Upload,
    UploadChunk,
    UploadError,
    UploadErrorPublic,
    UploadPublic,
    UploadStatus,
)
from pages import Order, Page, PageQuery, named, page_answer, read_page
from settings import settings

log = logging.getLogger("books.imports")
router = APIRouter(prefix="/books/upload", tags=["In and out"])

CHUNK = 256 * 1024  # bytes of a stored piece
BATCH = 500  # rows to a transaction: some 20 ms in which other writers wait
RECORD_MAX = 2_000_000  # characters; a row that is longer has lost its way, mostly by a quote that never closes
ERRORS_MAX = 10_000  # reasons that are kept of one upload; the counts stay exact
LEASE = timedelta(seconds=15)  # a job that has not committed a batch for so long has died
csv.field_size_limit(RECORD_MAX)

# Tables, not classes: for many rows the plain INSERT is much faster than the unit of work.
BOOKS, CHUNKS = SQLModel.metadata.tables["book"], SQLModel.metadata.tables["upload_chunk"]

# --- columns ------------------------------------------------------------------------------------------------------

# Without case, spaces, `_` and `-`; in the order in which they are believed where a file has several.
ALIASES = {
    "title": ("title", "booktitle", "name"),
    "author": ("author", "authors", "bookauthor"),
    "isbn": ("isbn13", "isbn", "isbn10"),
    "genre": ("genre",),
    "description": ("description", "summary"),
    "publisher": ("publisher", "bookpublisher"),
    "language": ("language", "languagecode"),
    "pages": ("pages", "numpages", "numberofpages"),
    "price": ("price",),
    "cover_url": ("coverurl", "imageurl"),
    "published_date": ("publicationdate", "publisheddate", "publishdate"),
    "publication_year": (
        "publicationyear",
        "year",
        "originalpublicationyear",
        "yearofpublication",
        "yearpublished",
    ),
}


class Columns(NamedTuple):
    """Which cells of a row tell which field, and what the others are called."""

    fields: dict[str, list[int]]
    ignored: list[str]
    width: int


class UnreadableFile(Exception):
    """No row of this file can be read. The message is for who sent it."""


def read_header(cells: Sequence[str]) -> Columns:
    keys = [re.sub(r"[\s_-]", "", cell).casefold() for cell in cells]
    fields = {
        name: found
        for name, aliases in ALIASES.items()
        if (found := [i for alias in aliases for i, key in enumerate(keys) if key == alias])
    }
    missing = [name for name in ("title", "author") if name not in fields]
    if missing:
        seen = ", ".join(repr(printable(cell, 40)) for cell in cells[:20])
        raise UnreadableFile(f"The first row names no column for {' and '.join(missing)}. It has: {seen}.")
    known = {i for found in fields.values() for i in found}
    return Columns(fields, [printable(c, 100) for i, c in enumerate(cells) if i not in known], len(cells))


# --- rows ---------------------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    field: str | None
    value: str
    message: str


@dataclass
class Row:
    """One row of the file: a book, or why it is refused; and what it had to go in without."""

    number: int  # as a spreadsheet counts: the header is row 1
    book: BookCreate | None = None
    problems: list[Problem] = field(default_factory=list)


def read_row(number: int, cells: Sequence[str], columns: Columns) -> Row:
    if len(cells) != columns.width:
        message = f"has {len(cells)} cells where the header has {columns.width}"
        return Row(number, problems=[Problem(None, ",".join(cells), message)])
    given = {
        name: next((value for i in found if (value := cells[i].strip())), "") for name, found in columns.fields.items()
    }
    row, values = Row(number), {name: value for name, value in given.items() if value}
    values.pop("isbn", None)
    isbns = [value for i in columns.fields.get("isbn", ()) if (value := cells[i].strip())]
    if isbn := next(filter(None, map(mend_isbn, isbns)), None):
        values["isbn"] = isbn
    elif isbns:
        row.problems.append(
            Problem("isbn", isbns[0], "is not an ISBN, nor can it be mended; the book is in without it")
        )
    for name in ("publication_year", "pages"):
        if name in values:
            values[name] = re.sub(r"\.0+$", "", values[name])  # a number that a spreadsheet took for a float
    if re.fullmatch(r"-?\d{1,4}", values.get("published_date", "")):
        values.setdefault("publication_year", values.pop("published_date"))
    try:
        row.book = BookCreate.model_validate({"title": "", "author": "", **values})
    except ValidationError as error:
        row.problems = [
            Problem(name, given.get(name, ""), reason(e["msg"], given.get(name, "")))
            for e in error.errors(include_url=False, include_context=False)
            for name in (str(e["loc"][0]),)
        ]
    return row


def reason(message: str, value: str) -> str:
    if any("\udc80" <= c <= "\udcff" for c in value):
        return "is not UTF-8 text"
    return "is missing" if not value else message.removeprefix("Value error, ")


def mend_isbn(text: str) -> str | None:
    """The ISBN as 13 digits: also one that lost its leading zeros to a spreadsheet, if its check digit then fits."""
    if re.fullmatch(r"[\d.]+e\+?\d+", text, re.IGNORECASE):  # 9.78043902348e+12 has lost its last digits
        return None
    compact = re.sub(r"[\s-]|\.0$", "", text)
    if re.fullmatch(r"\d{6,8}[\dXx]", compact):
        compact = compact.zfill(10)
    try:
        return str(isbn_numbers.validate(compact, convert=True))
    except isbn_numbers.ValidationError:
        return None


def printable(text: str, most: int = 200) -> str:
    """`text` as it can be stored and shown: bytes that are not UTF-8 and control characters replaced."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text[:most])


# --- the file -----------------------------------------------------------------------------------------------------


class StoredFile(io.RawIOBase):
    """The stored pieces, read one after the other."""

    def __init__(self, upload_id: int) -> None:
        self.upload_id, self.number, self.piece, self.position = upload_id, 0, b"", 0

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        if not self.piece:
            self.piece = database.snapshot(_find_chunk, self.upload_id, self.number) or b""
            self.number += 1
        size = min(len(target), len(self.piece))
        target[:size], self.piece = self.piece[:size], self.piece[size:]
        self.position += size
        return size


def _find_chunk(connection: Connection, upload_id: int, number: int) -> bytes | None:
    chunk = sa.select(col(UploadChunk.data)).where(
        col(UploadChunk.upload_id) == upload_id, col(UploadChunk.number) == number
    )
    return connection.execute(chunk).scalar()


class BrokenRecord(Exception):
    """A row that never ends, or not within reason."""


class Lines:
    """The lines of a file for csv.reader, which asks for more than one to a record only inside of quotes."""

    def __init__(self, text: TextIO) -> None:
        self.text = text
        self.record: list[str] = []  # the lines of the record that is being read
        self.again: deque[str] = deque()  # lines to read once more

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self.again.popleft() if self.again else self.text.readline(RECORD_MAX)
        if not line:
            if self.record:
                raise BrokenRecord("a quote opens in this row and never closes")
            raise StopIteration
        self.record.append(line)
        if len(line) == RECORD_MAX or sum(map(len, self.record)) > RECORD_MAX:
            while len(line) == RECORD_MAX:  # the rest of a line without end
                line = self.text.readline(RECORD_MAX)
            raise BrokenRecord(f"is longer than {RECORD_MAX:,} characters, or a quote in it never closes")
        return line

    def give_back(self) -> str:
        """Only the first line of this record is at fault: let the others be read on their own."""
        first, *others = self.record
        self.again.extendleft(reversed(others))
        return first


def records(text: TextIO) -> Iterator[list[str] | Problem]:
    """The records of a CSV file. One that can't be read costs its first line, not those after it."""
    lines = Lines(text)
    reader = csv.reader(lines)
    width = 0
    while True:
        lines.record = []
        try:
            cells = next(reader)
        except StopIteration:
            return
        except (BrokenRecord, csv.Error) as error:
            yield Problem(None, lines.give_back(), str(error))
            continue
        if cells and not width:
            width = len(cells)
        if len(cells) != width and len(lines.record) > 1:
            yield Problem(None, lines.give_back(), "a quote in this row does not close where it should")
        else:
            yield cells


def read_rows(file: StoredFile) -> Iterator[Columns | Row]:
    """First the columns, then the rows; blank lines are none."""
    text = io.TextIOWrapper(io.BufferedReader(file, CHUNK), encoding="utf-8-sig", errors="surrogateescape", newline="")
    columns = None
    for number, record in enumerate(records(text), start=1):
        if isinstance(record, Problem):
            if columns is None:
                raise UnreadableFile(f"The first row can't be read: {record.message}.")
            yield Row(number, problems=[record])
        elif columns is None:
            if any("\x00" in cell for cell in record):
                raise UnreadableFile("This is not a text file in UTF-8.")
            if record:
                columns = read_header(record)
                yield columns
        elif record:
            yield read_row(number, record, columns)
    if columns is None:
        raise UnreadableFile("The file is empty: it has no header.")


# --- the job ------------------------------------------------------------------------------------------------------


def run_upload(upload_id: int) -> None:
    """Bring a stored file in. Of several workers that try, one does it; what was done before is not done again."""
    done = database.transact(_claim, upload_id)
    if done is None:
        return
    file = StoredFile(upload_id)
    try:
        rows = read_rows(file)
        columns = next(rows)
        assert isinstance(columns, Columns)
        database.transact(_describe, upload_id, columns)
        for _ in range(done):
            next(rows)
        while batch := [row for row in islice(rows, BATCH) if isinstance(row, Row)]:
            database.transact(_store_batch, upload_id, batch, file.position)
            if events.server_is_stopping():
                database.transact(_release, upload_id)
                return
        database.transact(_finish, upload_id, None)
    except UnreadableFile as error:
        database.transact(_finish, upload_id, str(error))
    except NoResultFound:
        log.info("upload %s is gone with its owner", upload_id)
    except Exception:
        # The last line of defence of a job that nobody waits for: it must end in a state that its owner can see.
        log.exception("upload %s failed", upload_id)
        database.transact(_finish, upload_id, "Something went wrong here; it is in the server's log.")


def _claim(session: Session, upload_id: int) -> int | None:
    """Take the upload if it is free: how many of its rows are done already; None if somebody is at it."""
    now = models.now()
    claimed = session.execute(
        sa.update(Upload)
        .where(col(Upload.id) == upload_id, claimable())
        .values(
            status=UploadStatus.processing,
            started_at=sa.func.coalesce(col(Upload.started_at), now),
            lease_until=now + LEASE,
        )
        .returning(col(Upload.rows))
    ).first()
    return None if claimed is None else int(claimed.rows)


def claimable() -> ColumnElement[bool]:
    abandoned = sa.and_(col(Upload.status) == UploadStatus.processing, col(Upload.lease_until) < models.now())
    return sa.or_(col(Upload.status) == UploadStatus.queued, abandoned)


def abandoned_uploads(connection: Connection) -> Sequence[int]:
    """Uploads that no process is working on: left by one that was stopped or killed."""
    return connection.execute(sa.select(col(Upload.id)).where(claimable()).order_by(col(Upload.id))).scalars().all()


def _describe(session: Session, upload_id: int, columns: Columns) -> None:
    session.get_one(Upload, upload_id).ignored_columns = columns.ignored


def _store_batch(session: Session, upload_id: int, batch: Sequence[Row], position: int) -> None:
    upload = session.get_one(Upload, upload_id)
    new = _without_duplicates(session, [row.book for row in batch if row.book is not None])
    if new:
        first, last = _insert(session, new, upload.user_id)
        told = {"upload_id": upload.id, "count": len(new), "first_id": first, "last_id": last}
        events.record(session, "books.imported", told)
    refused = sum(row.book is None for row in batch)
    upload.rows += len(batch)
    upload.inserted += len(new)
    upload.failed += refused
    upload.skipped += len(batch) - len(new) - refused
    upload.warnings += sum(row.book is not None and bool(row.problems) for row in batch)
    upload.progress = min(position / upload.size, 1)
    upload.lease_until = models.now() + LEASE
    _store_problems(session, upload_id, batch)
    _tell_progress(session, upload)


def _without_duplicates(session: Session, found: Sequence[BookCreate]) -> list[BookCreate]:
    """Those that are not in the catalogue, nor earlier in the list: by ISBN, without one by title and author."""
    isbns = {book.isbn for book in found if book.isbn}
    titles = {models.fold(book.title) for book in found if not book.isbn}
    known_isbns = set(session.scalars(sa.select(col(Book.isbn)).where(col(Book.isbn).in_(isbns))))
    # The key ignores accents too, which make a difference here: it only finds the candidates.
    candidates = sa.select(col(Book.title), col(Book.author)).where(col(Book.title_key).in_(titles))
    known_titles = {_title_and_author(*row) for row in session.execute(candidates)}
    new = []
    for book in found:
        key = _title_and_author(book.title, book.author)
        if book.isbn in known_isbns if book.isbn else key in known_titles:
            continue
        known_isbns.add(book.isbn)
        known_titles.add(key)
        new.append(book)
    return new


def _title_and_author(title: str, author: str) -> tuple[str, str]:
    return " ".join(title.casefold().split()), " ".join(author.casefold().split())


def _insert(session: Session, new: Sequence[BookCreate], user_id: int) -> tuple[int, int]:
    """Insert and index many books at once; their first and last id. The transaction has the write lock: no gaps."""
    now = models.now()
    figures = {"copies": 0, "available": 0, "rating_count": 0, "rating_sum": 0, "version": 1}
    kept = figures | {"added_by": user_id, "created_at": now, "updated_at": now}
    session.execute(sa.insert(BOOKS), [Book.row(book) | kept for book in new])
    last = session.execute(sa.select(sa.func.max(col(Book.id)))).scalar_one()
    first = last - len(new) + 1
    index_books(session, first, last)
    return first, last


def _store_problems(session: Session, upload_id: int, batch: Sequence[Row]) -> None:
    count = sa.select(sa.func.count()).select_from(UploadError).where(col(UploadError.upload_id) == upload_id)
    problems = [
        UploadError(
            upload_id=upload_id,
            row=row.number,
            severity="error" if row.book is None else "warning",
            field=problem.field,
            value=printable(problem.value),
            message=problem.message,
        )
        for row in batch
        for problem in row.problems
    ]
    if problems:
        session.add_all(problems[: max(0, ERRORS_MAX - session.execute(count).scalar_one())])


def _release(session: Session, upload_id: int) -> None:
    session.get_one(Upload, upload_id).status = UploadStatus.queued


def _finish(session: Session, upload_id: int, error: str | None) -> None:
    upload = session.get_one(Upload, upload_id)
    upload.status = UploadStatus.failed if error else UploadStatus.completed
    upload.error, upload.finished_at, upload.lease_until = error, models.now(), None
    upload.progress = upload.progress if error else 1
    session.execute(sa.delete(UploadChunk).where(col(UploadChunk.upload_id) == upload_id))
    _tell_progress(session, upload)


def _tell_progress(session: Session, upload: Upload) -> None:
    shown = UploadPublic.model_validate(upload)
    told = shown.model_dump(mode="json", exclude={"ignored_columns", "created_at", "started_at", "finished_at"})
    events.record(session, "upload.progress", told, owner=upload.user_id)


# --- routes -------------------------------------------------------------------------------------------------------

UploadId = Annotated[Id, Path(description="The upload's `id`.")]
UPLOADS, UPLOAD_PAGE = Order("-id", (col(Upload.id),)), TypeAdapter(Page[UploadPublic])
ERRORS, ERROR_PAGE = Order("id", (col(UploadError.id),)), TypeAdapter(Page[UploadErrorPublic])
SELECT_UPLOADS = sa.select(*[col(getattr(Upload, name)) for name in UploadPublic.model_fields])
SELECT_ERRORS = sa.select(*[col(getattr(UploadError, name)) for name in UploadErrorPublic.model_fields])


class UploadForm(Shape):
    file: UploadFile


@router.post("", status_code=202, max_body_size=(settings.max_upload_mb << 20) + 64 * 1024)
async def upload_books(
    form: Annotated[UploadForm, Form(media_type="multipart/form-data")],
    user: Contributor,
    tasks: BackgroundTasks,
    response: Response,
) -> UploadPublic:
    """Bring in a CSV file of books: its first row names the columns, of which it needs `title` and `author`.

    The file is stored and the answer is 202: read how it goes at `Location`, or follow `upload.progress` events.
    Books that are here already, by ISBN or else by title and author, are skipped.
    """
    if not form.file.size:
        raise HTTPException(422, "The file is empty.")
    if form.file.size > settings.max_upload_mb << 20:
        raise HTTPException(413, f"The largest file that is taken has {settings.max_upload_mb} MiB.")
    upload = await database.write(_store_file, form.file.file, form.file.filename or "", form.file.size, user.id)
    tasks.add_task(run_upload, upload.id)
    response.headers["Location"] = f"/books/upload/{upload.id}"
    return upload


def _store_file(session: Session, file: BinaryIO, filename: str, size: int, user_id: int) -> UploadPublic:
    upload = Upload(user_id=user_id, filename=printable(filename, 255) or "upload.csv", size=size)
    session.add(upload)
    session.flush()
    for number, piece in enumerate(iter(lambda: file.read(CHUNK), b"")):
        chunk = {"upload_id": upload.id, "number": number, "data": piece}
        session.execute(sa.insert(CHUNKS), [chunk])
    return UploadPublic.model_validate(upload)


@router.get("", response_model=Page[UploadPublic])
async def list_uploads(query: Annotated[PageQuery, Query()], user: CurrentUser, request: Request) -> Response:
    """My uploads, the newest first; for staff, everybody's."""
    return page_answer(await database.read(_find_uploads, user, query), UPLOAD_PAGE, request)


def _find_uploads(connection: Connection, user: Principal, query: PageQuery) -> dict[str, Any]:
    visible = SELECT_UPLOADS.where(_visible(user))
    return read_page(connection, visible, UPLOADS, query, named(UploadPublic.model_fields))


def _visible(user: Principal) -> ColumnElement[bool]:
    return sa.true() if user.is_staff else col(Upload.user_id) == user.id


@router.get("/{upload_id:id}")
async def read_upload(upload_id: UploadId, user: CurrentUser) -> UploadPublic:
    """How an upload goes."""
    return await database.read(_find_upload, upload_id, user)


def _find_upload(connection: Connection, upload_id: int, user: Principal) -> UploadPublic:
    row = connection.execute(SELECT_UPLOADS.where(col(Upload.id) == upload_id, _visible(user))).first()
    if row is None:
        raise HTTPException(404, "No such upload.")
    return UploadPublic.model_validate(row)


@router.get("/{upload_id:id}/errors", response_model=Page[UploadErrorPublic])
async def list_upload_errors(
    upload_id: UploadId, query: Annotated[PageQuery, Query()], user: CurrentUser, request: Request
) -> Response:
    """Why rows were refused, and what others had to go in without."""
    return page_answer(await database.read(_find_upload_errors, upload_id, user, query), ERROR_PAGE, request)


def _find_upload_errors(connection: Connection, upload_id: int, user: Principal, query: PageQuery) -> dict[str, Any]:
    _find_upload(connection, upload_id, user)
    of_upload = SELECT_ERRORS.where(col(UploadError.upload_id) == upload_id)
    return read_page(connection, of_upload, ERRORS, query, named(UploadErrorPublic.model_fields))
