"""Imports: the rows of a stored file into the catalogue and onto a shelf, by a job that survives its process.

`uploads.py` stores the file and starts `run_upload` as a background task; `main.resume_uploads` starts it for uploads
that a stopped process left. The job imports the file in batches and commits each together with its progress: killed in
between, it is resumed from there. Each row is imported, or refused with a reason.
"""

import functools
import io
import logging
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import islice
from typing import Any, TextIO

import sqlalchemy as sa
from sqlalchemy import ColumnElement, Connection
from sqlmodel import Session, col

import csv_files
import database
import events
import external
import library
import models
from books import revise_book
from csv_files import BrokenRecord, ImportRow, RowParser, ShelfData, UnreadableFile, printable, strip_invalid
from database import CompiledQuery
from models import Book, InvalidField, Principal, ShelfEntry, Upload, UploadChunk, UploadError, UploadStatus, User
from schemas import BookBase, BookUpdate, UploadPublic
from search import index_books
from settings import settings

log = logging.getLogger("books.imports")

CHUNK = 256 * 1024  # bytes of a stored chunk
BATCH = 1000  # rows to a transaction: other writers wait some 40 ms
ENRICH_BATCH = external.MAX_ISBNS  # the same with look-ups: each request is committed with its answer
MAX_ERRORS = 10_000  # errors that are stored of one upload, and as many warnings; the counts stay exact
MAX_CELL = 100_000  # characters stored of a refused row's cell: a field takes 20,000, which are more as HTML
LEASE = timedelta(seconds=15)  # a job that has not renewed it for so long has died
PROGRESS_INTERVAL = 0.34  # seconds between two events of one upload: with the last, at most four in a second

INSERT_BOOKS = CompiledQuery(sa.insert(Book))
INTERRUPTIONS = (sa.exc.OperationalError, sa.exc.TimeoutError)  # the second: of the pool of connections

# --- rows ---------------------------------------------------------------------------------------------------------

Key = str | tuple[str, ...]


@dataclass
class DuplicateTracker:
    """Which rows are the same book; lives as long as the job."""

    ours: bool  # whether the file is an export of this service
    counts: Counter[int] = field(default_factory=Counter)  # of title and author, by hash
    dry_run: set[int] = field(default_factory=set)  # hashes of what a dry run would have added

    def key(self, book: BookBase) -> Key:
        """The ISBN, or without one title and author. In our own exports these are exact, and numbered: there, two
        equal books are two."""
        if book.isbn:
            return book.isbn
        if not self.ours:
            return _title_and_author(book.title, book.author)
        exact = hash((book.title, book.author))
        self.counts[exact] += 1
        return (book.title, book.author, str(self.counts[exact]))


def _title_and_author(title: str, author: str) -> tuple[str, str]:
    return " ".join(title.casefold().split()), " ".join(author.casefold().split())


class BatchImporter:
    """Imports some rows of an upload. What happened to each is its `outcome`."""

    def __init__(self, session: Session, upload: Upload, owner: Principal, tracker: DuplicateTracker) -> None:
        self.session, self.upload, self.owner, self.tracker = session, upload, owner, tracker
        self.updating = upload.on_duplicate == models.OnDuplicate.update
        self.ids: dict[Key, int] = {}
        self.ambiguous: set[Key] = set()  # titles and authors that several books without an ISBN have

    def import_rows(self, rows: Sequence[ImportRow]) -> None:
        good = [row for row in rows if row.book is not None]
        for row in good:
            row.key = self.tracker.key(row.book)
        self._find_books(good)
        new: dict[Key, ImportRow] = {}
        for row in good:
            if row.key not in self.ids and row.key not in new and hash(row.key) not in self.tracker.dry_run:
                if settings.readers_can_add or self.owner.is_staff:
                    new[row.key] = row
                else:
                    row.refuse(None, "", "is not in the catalogue, and here only librarians and admins add books")
        self._insert_books(new)
        good = [row for row in good if row.book is not None]
        if self.upload.shelve:
            self._shelve(good)
        if self.updating:  # what the shelf has refused changes no book either
            self._update_books([row for row in good if row.book is not None and new.get(row.key) is not row])
        if self.upload.dry_run:
            self.tracker.dry_run.update(map(hash, new))
            if self.upload.shelve:
                self.tracker.dry_run.update(hash(("shelf", row.key)) for row in good)

    # --- the catalogue ---

    def _find_books(self, rows: Sequence[ImportRow]) -> None:
        """The ids of those that are in the catalogue."""
        if isbns := {row.key for row in rows if isinstance(row.key, str)}:
            found = sa.select(col(Book.isbn), col(Book.id)).where(col(Book.isbn).in_(isbns))
            self.ids.update((isbn, book_id) for isbn, book_id in self.session.execute(found) if isbn)
        titles = {models.sort_key(row.book.title) for row in rows if not isinstance(row.key, str)}
        if not titles:
            return
        # `title_key` ignores accents, which make a difference here: it only finds the candidates. Of several, the
        # oldest without an ISBN counts: that is the one which an earlier import of the same row has made.
        columns = (col(Book.id), col(Book.title), col(Book.author), col(Book.isbn))
        order = (col(Book.isbn).is_not(None), col(Book.id))
        counts: Counter[Key] = Counter()
        candidates = sa.select(*columns).where(col(Book.title_key).in_(titles)).order_by(*order)
        for book_id, title, author, isbn in self.session.execute(candidates):
            if not self.tracker.ours:
                self.ids.setdefault(_title_and_author(title, author), book_id)
            elif isbn is None:
                counts[title, author] += 1
                self.ids[title, author, str(counts[title, author])] = book_id
        self.ambiguous = {key for key, count in counts.items() if count > 1}

    def _insert_books(self, new: dict[Key, ImportRow]) -> None:
        """Insert and index many books at once. The transaction has the write lock: their ids have no gaps."""
        if not new:
            return
        books = [Book.described(row.book) for row in new.values()]
        INSERT_BOOKS.execute_many(self.session, books, Book.initial(self.owner.id))
        last = int(self.session.execute(sa.select(sa.func.max(col(Book.id)))).scalar_one())
        first = last - len(new) + 1
        index_books(self.session, [first, last])
        for book_id, (key, row) in enumerate(new.items(), start=first):
            self.ids[key], row.outcome = book_id, "inserted"
        data = {"upload_id": self.upload.id, "count": len(new), "first_id": first, "last_id": last}
        events.record(self.session, "books.imported", data)

    def _books(self, rows: Sequence[ImportRow]) -> dict[Key, Book]:
        ids = {row.key: self.ids[row.key] for row in rows if row.key in self.ids}
        books = self.session.scalars(sa.select(Book).where(col(Book.id).in_(set(ids.values()))))
        by_id = {book.id: book for book in books}
        return {key: by_id[book_id] for key, book_id in ids.items()}

    def _update_books(self, rows: Sequence[ImportRow]) -> None:
        books = self._books(rows)
        for row in rows:
            book = books.get(row.key)
            if book is not None and self._update_book(row, book) and row.outcome == "skipped":
                row.outcome = "updated"

    def _update_book(self, row: ImportRow, book: Book) -> bool:
        """Change what differs in the file, if the owner of the upload may."""
        # The fields of the key are those of the book already.
        names = row.values.keys() - ({"isbn"} if isinstance(row.key, str) else {"title", "author"})
        names -= {name for name in row.looked_up if getattr(book, name) is not None}  # which only fill gaps
        data = {name: getattr(row.book, name) for name in names}
        if all(getattr(book, name) == value for name, value in data.items()):
            return False
        if row.key[:2] in self.ambiguous:
            row.warn(None, "", "several books have this title and author; the file does not show which one is meant")
        elif self.owner.is_staff or book.added_by == self.owner.id:
            revise_book(self.session, book, BookUpdate.model_validate(data))
            return True
        elif not self.upload.shelve:
            row.warn(None, "", "this book was added by somebody else; only they, librarians and admins change it")
        return False

    # --- the shelf ---

    def _shelve(self, rows: Sequence[ImportRow]) -> None:
        books = self._books(rows)
        entries_of_owner = sa.select(ShelfEntry).where(col(ShelfEntry.user_id) == self.owner.id)
        book_ids = {book.id for book in books.values()}
        found = self.session.scalars(entries_of_owner.where(col(ShelfEntry.book_id).in_(book_ids)))
        entries, count = {entry.book_id: entry for entry in found}, 0
        for row in rows:
            book = books.get(row.key)
            if row.entry is None or book is None or hash(("shelf", row.key)) in self.tracker.dry_run:
                continue
            if book.id not in entries:
                entries[book.id], row.outcome = self._add_entry(row.entry, book), "inserted"
            elif self.updating and self._update_entry(row, row.entry, entries[book.id], book):
                row.outcome = "updated"
            else:
                continue
            count += 1
        if count:
            data = {"upload_id": self.upload.id, "count": count}
            events.record(self.session, "shelf.imported", data, owner=self.owner.id)

    def _add_entry(self, data: ShelfData, book: Book) -> ShelfEntry:
        values = dict(data) | {"added_at": data.added_at or models.utcnow()}
        entry = ShelfEntry(user_id=self.owner.id, book_id=book.id, **values)
        self.session.add(entry)
        library.count_rating(book, None, entry.rating)
        if entry.is_review:
            library.record_review(self.session, "review.created", book, entry, self.owner.username)
        return entry

    def _update_entry(self, row: ImportRow, new: ShelfData, entry: ShelfEntry, book: Book) -> bool:
        data = {name: value for name, value in new if value not in (None, []) and getattr(entry, name) != value}
        if not data:
            return False
        before = {name: getattr(entry, name) for name in (*ShelfData.model_fields, "updated_at")}
        event_type = "review.updated" if entry.is_review else "review.created"
        try:
            entry.revise({"finished_at": entry.finished_at, **data})  # without finished_at, it might become now
        except InvalidField as error:
            for name, value in before.items():  # what an earlier row has changed stays
                setattr(entry, name, value)
            row.refuse(error.field, "", error.message)
            return False
        library.count_rating(book, before["rating"], entry.rating)
        if (before["rating"], before["review"]) != (entry.rating, entry.review):
            library.record_review(self.session, event_type, book, entry, self.owner.username)
        return True


# --- the file -----------------------------------------------------------------------------------------------------


@dataclass
class ImportJob:
    upload_id: int
    worker: str  # as long as the upload names it, the upload is this job's
    done: int  # rows
    enrich: bool
    shelve: bool
    renewed_at: datetime
    progress_at: float = 0

    def renew_lease(self) -> None:
        """Now and then, while the job reads or waits for others."""
        if models.utcnow() - self.renewed_at > LEASE / 5:
            database.write_sync(lock_upload, self)


class ChunkReader(io.RawIOBase):
    """The stored chunks as one file."""

    def __init__(self, job: ImportJob) -> None:
        self.job, self.number, self.chunk, self.position = job, 0, b"", 0

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        if not self.chunk:
            self.job.renew_lease()  # a long file takes longer than its lease
            self.chunk = database.read_sync(_find_chunk, self.job.upload_id, self.number) or b""
            self.number += 1
        size = min(len(target), len(self.chunk))
        target[:size], self.chunk = self.chunk[:size], self.chunk[size:]
        self.position += size
        return size


def _find_chunk(connection: Connection, upload_id: int, number: int) -> bytes | None:
    of_upload = sa.select(col(UploadChunk.data)).where(col(UploadChunk.upload_id) == upload_id)
    return connection.execute(of_upload.where(col(UploadChunk.number) == number)).scalar()


class CsvUpload:
    """A stored file as rows, after its encoding, dialect and columns were detected."""

    def __init__(self, job: ImportJob) -> None:
        self.job = job
        self.encoding = csv_files.detect_encoding(io.BufferedReader(ChunkReader(job), CHUNK))
        self.dialect = csv_files.detect_dialect(self._open(ChunkReader(job)))
        self.file = ChunkReader(job)  # for the rows
        _, header = next(self._records(ChunkReader(job)), (0, None))
        if header is None:
            raise UnreadableFile("The file is empty: it has no header.")
        if isinstance(header, BrokenRecord):
            raise UnreadableFile(f"The first row can't be read: {header.reason}.")
        if any("\x00" in cell for cell in header):
            raise UnreadableFile("This is not a text file.")
        self.columns = csv_files.read_header(header, enrich=job.enrich, shelve=job.shelve)
        if self.columns.ours:  # and not a dialect that some text in it looks like
            self.dialect = csv_files.Dialect()

    def _open(self, file: ChunkReader) -> TextIO:
        buffered = io.BufferedReader(file, CHUNK)
        return io.TextIOWrapper(buffered, encoding=self.encoding, errors=csv_files.UNDECODABLE, newline="")

    def _records(self, file: ChunkReader) -> Iterator[tuple[int, list[str] | BrokenRecord]]:
        """With their numbers, as a spreadsheet counts. Blank lines and Excel's `sep=;` are left out."""
        for number, record in enumerate(csv_files.records(self._open(file), self.dialect), start=1):
            if record and not (number == 1 and len(record) <= 2 and record[0] == "sep="):
                yield number, record

    def rows(self) -> Iterator[ImportRow]:
        parser = RowParser(self.columns, lambda: self.day_first, enrich=self.job.enrich)
        for number, record in islice(self._records(self.file), 1, None):
            if isinstance(record, BrokenRecord):
                yield ImportRow(number, [record.line]).refuse(None, record.line, record.reason)
            else:
                yield parser.parse(number, record)

    @functools.cached_property
    def day_first(self) -> bool | None:
        """Whether 03/04/2008 is in April, if other dates of the file show it. Read only where a row needs it."""
        names = ("published_date", "added_at", "started_at", "finished_at")
        columns, width = [i for name in names for i in self.columns.fields.get(name, ())], len(self.columns.header)
        rows = (row for _, row in self._records(ChunkReader(self.job)) if isinstance(row, list) and len(row) == width)
        orders = {csv_files.day_comes_first(row[i].strip()) for row in rows for i in columns} - {None}
        return orders.pop() if len(orders) == 1 else None


# --- the job ------------------------------------------------------------------------------------------------------


class JobCancelled(Exception):
    """The upload was cancelled, was deleted with its owner, or another job has taken over."""


def run_upload(upload_id: int) -> None:
    """Import a stored file. Of several workers that try, one does; what was done before is not done again."""
    job = database.write_sync(_claim, upload_id)
    if job is None:
        return
    try:
        _run_job(job)
    except JobCancelled as reason:
        log.info("upload %s stopped: %s", upload_id, reason)
    except INTERRUPTIONS as error:  # a full disk, a lost connection: it is resumed when its lease has run out
        log.error("upload %s interrupted: %s", upload_id, error)


def _run_job(job: ImportJob) -> None:
    try:
        file = CsvUpload(job)
        database.write_sync(_describe, job, file)
        tracker, rows = DuplicateTracker(file.columns.ours), file.rows()
        for row in islice(rows, job.done):  # those that it did before it was interrupted
            if row.book is not None:
                tracker.key(row.book)
        enricher = external.Enricher(job.renew_lease) if job.enrich else None
        while batch := list(islice(rows, ENRICH_BATCH if enricher else BATCH)):
            is_ready = enricher is None or enricher.look_up_isbns(batch)
            if is_ready:
                database.write_sync(_store_batch, job, tracker, batch, file.file.position)
            if not is_ready or database.server_is_stopping():
                database.write_sync(release, job)
                return
        database.write_sync(_finish_job, job, None)
    except UnreadableFile as error:
        database.write_sync(_finish_job, job, str(error))
    except (JobCancelled, *INTERRUPTIONS):
        raise
    except Exception:
        # Whatever happens, the job has to end in a state that its owner can see.
        log.exception("upload %s failed", job.upload_id)
        database.write_sync(_finish_job, job, "Something went wrong here; it is in the server's log.")


def _claim(session: Session, upload_id: int) -> ImportJob | None:
    """Take the upload; None where another job has it."""
    upload = session.scalars(sa.select(Upload).where(col(Upload.id) == upload_id, claimable())).first()
    if upload is None:
        return None
    chunk_sizes = sa.select(sa.func.sum(sa.func.length(col(UploadChunk.data))))
    if session.scalar(chunk_sizes.where(col(UploadChunk.upload_id) == upload_id)) != upload.size:
        upload.error = "The service stopped before the whole file was stored: upload it again."
        finish(session, upload, UploadStatus.failed)
        return None
    if upload.dry_run:  # its DuplicateTracker is lost: begin again
        for name in ("rows", "inserted", "updated", "skipped", "failed", "warnings", "progress"):
            setattr(upload, name, 0)
        session.execute(sa.delete(UploadError).where(col(UploadError.upload_id) == upload_id))
    upload.started_at = upload.started_at or models.utcnow()
    return lease(upload)


def lease(upload: Upload) -> ImportJob:
    now = models.utcnow()
    upload.status, upload.worker, upload.lease_until = UploadStatus.processing, secrets.token_hex(8), now + LEASE
    return ImportJob(upload.id, upload.worker, upload.rows, upload.enrich, upload.shelve, now)


def claimable() -> ColumnElement[bool]:
    abandoned = sa.and_(col(Upload.status) == UploadStatus.processing, col(Upload.lease_until) < models.utcnow())
    return sa.or_(col(Upload.status) == UploadStatus.queued, abandoned)


def abandoned_uploads(connection: Connection) -> Sequence[int]:
    """Uploads that no job has: left by a process that was stopped or killed."""
    return connection.execute(sa.select(col(Upload.id)).where(claimable()).order_by(col(Upload.id))).scalars().all()


def lock_upload(session: Session, job: ImportJob) -> Upload:
    """The upload, if it is still this job's, with the lease renewed."""
    upload = session.get(Upload, job.upload_id)
    if upload is None:
        raise JobCancelled("it was deleted with its owner")
    if upload.worker != job.worker:
        raise JobCancelled(f"it is {upload.status}, not by this job")
    job.renewed_at = models.utcnow()
    upload.lease_until = job.renewed_at + LEASE
    return upload


def _describe(session: Session, job: ImportJob, file: CsvUpload) -> None:
    upload, columns = lock_upload(session, job), file.columns
    upload.format, upload.encoding, upload.delimiter = columns.format, file.encoding, file.dialect.delimiter
    upload.header = [strip_invalid(cell[:MAX_CELL]) for cell in columns.header]
    upload.ignored_columns = columns.ignored


def _store_batch(
    session: Session, job: ImportJob, tracker: DuplicateTracker, rows: Sequence[ImportRow], position: int
) -> None:
    upload = lock_upload(session, job)
    owner = session.get_one(User, upload.user_id)
    importer = BatchImporter(session, upload, Principal(owner.id, owner.username, owner.role, 0), tracker)
    savepoint = session.begin_nested() if upload.dry_run else None
    importer.import_rows(rows)
    if savepoint is not None:
        savepoint.rollback()
    upload.rows += len(rows)
    for name, count in Counter(row.outcome for row in rows).items():
        setattr(upload, name, getattr(upload, name) + count)
    upload.warnings += sum(row.book is not None and bool(row.issues) for row in rows)
    upload.progress = min(position / upload.size, 1)
    _store_issues(session, upload.id, rows)
    if time.monotonic() - job.progress_at >= PROGRESS_INTERVAL:
        job.progress_at = time.monotonic()
        _record_progress(session, upload)


def _store_issues(session: Session, upload_id: int, rows: Sequence[ImportRow]) -> None:
    rows = [row for row in rows if row.issues]
    if not rows:
        return
    severity = col(UploadError.severity)
    stored = sa.select(severity, sa.func.count()).where(col(UploadError.upload_id) == upload_id).group_by(severity)
    counts = Counter(dict(session.execute(stored).all()))
    for row in rows:
        kind = "error" if row.book is None else "warning"
        # Once for each refused row, which can be downloaded.
        cells = [strip_invalid(cell[:MAX_CELL]) for cell in row.cells] if row.book is None else None
        for issue in row.issues:
            counts[kind] += 1
            if counts[kind] <= MAX_ERRORS:
                issue_data = issue._asdict() | {"value": printable(issue.value)}
                session.add(UploadError(upload_id=upload_id, row=row.number, severity=kind, cells=cells, **issue_data))
            cells = None


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
