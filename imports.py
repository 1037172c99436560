"""Imports: the rows of a stored file into the catalogue and onto a shelf, by a job that survives its process.

The request stores the file. The job reads it in batches and commits each together with how far it got: killed in
between, it goes on from there. Each row goes in, or is refused with a reason.
"""

import functools
import io
import logging
import secrets
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import chain, islice, repeat
from typing import Any, TextIO

import sqlalchemy as sa
from sqlalchemy import ColumnElement, Connection
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as NoConnection
from sqlmodel import Session, SQLModel, col

import database
import events
import external
import library
import models
from books import revise_book
from csv_files import (
    MEANINGLESS,
    BrokenRecord,
    ColumnMapping,
    Dialect,
    ImportRow,
    RowIssue,
    RowParser,
    ShelfData,
    UnreadableFile,
    describe_header,
    detect_dialect,
    detect_encoding,
    known_columns,
    printable,
    read_header,
    records,
    strip_invalid,
    which_comes_first,
)
from database import CompiledQuery
from external import Enricher
from models import (
    Book,
    DomainError,
    OnDuplicate,
    Principal,
    ShelfEntry,
    Upload,
    UploadChunk,
    UploadError,
    UploadStatus,
    User,
)
from schemas import BookBase, BookUpdate, EntryUpdate, UploadPublic
from search import index_books
from settings import settings

INSERT_BOOKS = CompiledQuery(sa.insert(Book))

# What makes two books one: the ISBN, or without it title and author. In a file that we wrote ourselves the latter are
# exact, and come with a number: two books that differ in nothing are two.
Key = str | tuple[str, ...]


@dataclass
class DuplicateTracker:
    """What a job remembers from batch to batch."""

    ours: bool  # whether the file is an export of this service
    times: Counter[int] = field(default_factory=Counter)  # how often a title and author has come, by hash
    imagined: set[int] = field(default_factory=set)  # hashes of what a dry run would have put in

    def see(self, row: ImportRow) -> None:
        if row.book is not None:
            self.key_of(row.book)

    def key_of(self, book: BookBase) -> Key:
        if book.isbn:
            return book.isbn
        if not self.ours:
            return _title_and_author(book.title, book.author)
        exact = hash((book.title, book.author))
        self.times[exact] += 1
        return (book.title, book.author, str(self.times[exact]))


def _title_and_author(title: str, author: str) -> tuple[str, str]:
    return " ".join(title.casefold().split()), " ".join(author.casefold().split())


class BatchImporter:
    """Some rows of an upload, on their way in. What happens to each stands in `outcomes`."""

    def __init__(self, session: Session, upload: Upload, owner: Principal, memory: DuplicateTracker) -> None:
        self.session, self.upload, self.owner, self.memory = session, upload, owner, memory
        self.updating = upload.on_duplicate == OnDuplicate.update
        self.ids: dict[Key, int] = {}
        self.twins: set[Key] = set()  # titles and authors that several books have, none of them an ISBN
        self.outcomes: Counter[str] = Counter()

    def place(self, rows: Sequence[ImportRow]) -> None:
        good = [(row, self.memory.key_of(row.book)) for row in rows if row.book is not None]
        self._find([(key, row.book) for row, key in good if row.book is not None])
        new: dict[Key, ImportRow] = {}
        for row, key in good:
            if key not in self.ids and key not in new and not self._is_imagined(key):
                if settings.readers_can_add or self.owner.is_staff:
                    new[key] = row
                else:
                    row.refuse(None, "", "is not in the catalogue, and here only librarians and admins add books")
        self._insert(new)
        good = [(row, key) for row, key in good if row.book is not None]
        inserted = {id(row) for row in new.values()}
        shelved, moved = self._shelve(good) if self.upload.shelve else (set(), set())
        # What the shelf has refused changes no book either.
        changing = [(row, key) for row, key in good if row.book is not None and id(row) not in inserted]
        updated = self._update_books(changing) | moved
        inserted |= shelved
        for row in rows:
            kinds = ("failed", row.book is None), ("inserted", id(row) in inserted), ("updated", id(row) in updated)
            self.outcomes[next((name for name, it_is in kinds if it_is), "skipped")] += 1
        if self.upload.dry_run:
            self.memory.imagined.update(hash(key) for key in new)
            if self.upload.shelve:
                self.memory.imagined.update(hash(("shelf", key)) for _, key in good)

    def _is_imagined(self, key: object) -> bool:
        return self.upload.dry_run and hash(key) in self.memory.imagined

    # --- the catalogue ---

    def _find(self, wanted: Sequence[tuple[Key, BookBase]]) -> None:
        """The ids of those that are in the catalogue."""
        isbns = {key for key, _ in wanted if isinstance(key, str)}
        if isbns:
            known = sa.select(col(Book.isbn), col(Book.id)).where(col(Book.isbn).in_(isbns))
            self.ids.update((isbn, book_id) for isbn, book_id in self.session.execute(known) if isbn)
        # The key in the database ignores accents too, which make a difference here: it only finds the candidates.
        titles = {models.sort_key(book.title) for key, book in wanted if not isinstance(key, str)}
        if titles:
            columns = (col(Book.id), col(Book.title), col(Book.author), col(Book.isbn))
            candidates = sa.select(*columns).where(col(Book.title_key).in_(titles)).order_by(col(Book.id))
            self.ids.update(self._keys_of(self.session.execute(candidates)))

    def _keys_of(self, candidates: Iterable[Any]) -> dict[Key, int]:
        found: dict[Key, int] = {}
        if self.memory.ours:
            times: Counter[tuple[str, str]] = Counter()
            for book_id, title, author, isbn in candidates:
                if isbn is None:
                    times[title, author] += 1
                    found[title, author, str(times[title, author])] = book_id
            self.twins |= {key for key in found if times[key[0], key[1]] > 1}
            return found
        # Of several, the oldest without an ISBN: that is the one which an earlier import of the same row has made.
        for book_id, title, author, _isbn in sorted(candidates, key=lambda row: row.isbn is not None):
            found.setdefault(_title_and_author(title, author), book_id)
        return found

    def _insert(self, new: dict[Key, ImportRow]) -> None:
        """Insert and index many books at once. The transaction has the write lock: their ids have no gaps."""
        if not new:
            return
        books = [Book.described(row.book) for row in new.values() if row.book is not None]
        INSERT_BOOKS.execute_many(self.session, [book | Book.initial(self.owner.id) for book in books])
        last = int(self.session.execute(sa.select(sa.func.max(col(Book.id)))).scalar_one())
        first = last - len(new) + 1
        index_books(self.session, first, last)
        self.ids.update(zip(new, range(first, last + 1), strict=True))
        told = {"upload_id": self.upload.id, "count": len(new), "first_id": first, "last_id": last}
        events.record(self.session, "books.imported", told)

    def _update_books(self, rows: Sequence[tuple[ImportRow, Key]]) -> set[int]:
        """Change what the file says otherwise, where the owner may. Those rows."""
        if not self.updating:
            return set()
        books = self._books({self.ids[key] for _, key in rows if key in self.ids})
        return {id(row) for row, key in rows if key in self.ids and self._update(row, key, books[self.ids[key]])}

    def _books(self, ids: set[int]) -> dict[int, Book]:
        found = sa.select(Book).where(col(Book.id).in_(ids)).with_for_update()
        return {book.id: book for book in self.session.scalars(found)}

    def _update(self, row: ImportRow, key: Key, book: Book) -> bool:
        # Where the title is the key, it says nothing new.
        names = row.told - ({"isbn"} if isinstance(key, str) else {"title", "author"})
        said = {name: getattr(row.book, name) for name in names}
        # What was looked up only fills gaps, here too.
        said |= {name: getattr(row.book, name) for name in row.filled if getattr(book, name) is None}
        if all(getattr(book, name) == value for name, value in said.items()):
            return False
        if key in self.twins:
            why = "there are several books of this title and author: which of them is meant, the file does not tell"
            row.problems.append(RowIssue(None, "", why))
            return False
        if not (self.owner.is_staff or book.added_by == self.owner.id):
            if not self.upload.shelve:
                why = "this book was added by somebody else: only they, librarians and admins change it"
                row.problems.append(RowIssue(None, "", why))
            return False
        revise_book(self.session, book, BookUpdate.model_validate(said))
        return True

    # --- the shelf ---

    def _shelve(self, rows: Sequence[tuple[ImportRow, Key]]) -> tuple[set[int], set[int]]:
        """Put the books on the owner's shelf; the rows that did, and those that changed what was there."""
        ids = {self.ids[key] for _, key in rows if key in self.ids}
        mine = sa.select(ShelfEntry).where(col(ShelfEntry.user_id) == self.owner.id, col(ShelfEntry.book_id).in_(ids))
        entries = {entry.book_id: entry for entry in self.session.scalars(mine.with_for_update())}
        books = self._books(ids)
        shelved, moved = set(), set()
        for row, key in rows:
            if row.entry is None or key not in self.ids or self._is_imagined(("shelf", key)):
                continue
            book = books[self.ids[key]]
            if book.id not in entries:
                entries[book.id] = self._add_entry(row.entry, book)
                shelved.add(id(row))
            elif self.updating and self._update_entry(row, entries[book.id], book):
                moved.add(id(row))
        if shelved or moved:
            told = {"upload_id": self.upload.id, "count": len(shelved) + len(moved)}
            events.record(self.session, "shelf.imported", told, owner=self.owner.id)
        return shelved, moved

    def _add_entry(self, told: ShelfData, book: Book) -> ShelfEntry:
        entry = ShelfEntry(user_id=self.owner.id, book_id=book.id, **told._asdict() | {"added_at": models.utcnow()})
        entry.added_at = told.added_at or entry.added_at
        self.session.add(entry)
        library.count_rating(book, None, entry.rating)
        if entry.is_review:
            library.record_review(self.session, "review.created", book, entry, self.owner.username)
        return entry

    def _update_entry(self, row: ImportRow, entry: ShelfEntry, book: Book) -> bool:
        assert row.entry is not None
        told = {name: value for name, value in row.entry._asdict().items() if value not in (None, [])}
        told = {name: value for name, value in told.items() if getattr(entry, name) != value}
        if not told:
            return False
        before = {name: getattr(entry, name) for name in (*ShelfData._fields, "updated_at")}
        if added_at := told.pop("added_at", None):
            entry.added_at = added_at
        had_rating, was_review, said = entry.rating, entry.is_review, (entry.rating, entry.review)
        try:
            # With `finished_at`, so that none is made up.
            entry.revise(
                EntryUpdate.model_validate({"finished_at": entry.finished_at, **told}).model_dump(exclude_unset=True)
            )
        except DomainError as error:
            for name, value in before.items():  # what an earlier row has changed stays
                setattr(entry, name, value)
            row.refuse(error.field, "", error.message)
            return False
        library.count_rating(book, had_rating, entry.rating)
        if said != (entry.rating, entry.review):
            what = "review.updated" if was_review else "review.created"
            library.record_review(self.session, what, book, entry, self.owner.username)
        return True


log = logging.getLogger("books.imports")

CHUNK = 256 * 1024  # bytes of a stored piece
BATCH = 1000  # rows to a transaction: some 40 ms in which other writers wait
MAX_ERRORS = 10_000  # reasons that are kept of one upload, and as many warnings; the counts stay exact
# Characters of a refused row's cell that are kept. A field takes 20,000, which are more as HTML.
MAX_CELL = 100_000
LEASE = timedelta(seconds=15)  # a job that has not shown for so long that it is alive has died
PROGRESS_INTERVAL = 0.34  # between two events of one upload's progress: with the last, at most four in a second

ENRICH_BATCH = external.MAX_ISBNS  # rows to a transaction, so that each question is committed with its answer

CHUNKS = SQLModel.metadata.tables["upload_chunk"]


@dataclass
class ImportJob:
    upload_id: int
    worker: str  # what stands in the upload for as long as it is this job's
    done: int  # rows
    enrich: bool = False
    told_at: float = 0
    kept_at: datetime | None = None

    def keep(self) -> None:
        """Now and then while it reads, tell the other workers that it is alive."""
        if self.kept_at is None or models.utcnow() - self.kept_at > LEASE / 5:
            database.write_sync(renew_lease, self)
            self.kept_at = models.utcnow()


# --- the file -----------------------------------------------------------------------------------------------------


class ChunkReader(io.RawIOBase):
    """The stored pieces, read one after the other."""

    def __init__(self, job: ImportJob) -> None:
        self.job, self.number, self.piece, self.position = job, 0, b"", 0

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        if not self.piece:
            self.job.keep()  # a long file takes longer than its lease
            self.piece = database.read_sync(_find_chunk, self.job.upload_id, self.number) or b""
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


class CsvUpload:
    """A stored file as rows, after a look at what kind of file it is."""

    def __init__(self, job: ImportJob) -> None:
        self.job, self.enrich = job, job.enrich
        self.encoding = detect_encoding(io.BufferedReader(ChunkReader(job), CHUNK))
        self.dialect = detect_dialect(self._text()[1], known_columns)
        self.columns = self._read_header()

    def _text(self) -> tuple[ChunkReader, TextIO]:
        file = ChunkReader(self.job)
        buffered = io.BufferedReader(file, CHUNK)
        return file, io.TextIOWrapper(buffered, encoding=self.encoding, errors=MEANINGLESS, newline="")

    def _read_header(self) -> ColumnMapping:
        for _, record in self._records(self._text()[1]):
            if isinstance(record, BrokenRecord):
                raise UnreadableFile(f"The first row can't be read: {record.why}.")
            if any("\x00" in cell for cell in record):
                raise UnreadableFile("This is not a text file.")
            columns = read_header(record, enrich=self.enrich)
            if columns.ours:  # and not a dialect that some text in it looks like
                self.dialect = Dialect()
            return columns
        raise UnreadableFile("The file is empty: it has no header.")

    def _records(self, text: TextIO) -> Iterator[tuple[int, list[str] | BrokenRecord]]:
        """Numbered as a spreadsheet does. Blank lines are none, and no more is Excel's `sep=;`."""
        for number, record in enumerate(records(text, self.dialect), start=1):
            if record and not (number == 1 and len(record) <= 2 and record[0] == "sep="):
                yield number, record

    def rows(self, skip: int) -> Iterator[tuple[ImportRow, int]]:
        """The rows after the first `skip`, each with how many bytes have been read."""
        file, text = self._text()
        reader = RowParser(self.columns, lambda: self.day_first, enrich=self.enrich)
        for number, record in islice(self._records(text), 1 + skip, None):
            if isinstance(record, BrokenRecord):
                yield ImportRow(number, [record.line]).refuse(None, record.line, record.why), file.position
            else:
                yield reader.row(number, record), file.position

    @functools.cached_property
    def day_first(self) -> bool | None:
        """Whether 03/04/2008 is in April, if any date of the file tells. Read only where a row asks."""
        cells = [
            i
            for name in ("published_date", "added_at", "started_at", "finished_at")
            for i in self.columns.fields.get(name, ())
        ]
        day = month = False
        for _, record in self._records(self._text()[1]):
            if not isinstance(record, BrokenRecord) and len(record) == len(self.columns.header):
                told = which_comes_first([record[i] for i in cells])
                day, month = day or told[0], month or told[1]
                if day and month:
                    return None
        return day if day or month else None


# --- the job ------------------------------------------------------------------------------------------------------


INTERRUPTIONS = (OperationalError, NoConnection)


class JobCancelled(Exception):
    """The upload was cancelled, is gone with its owner, or another job has taken over."""


def run_upload(upload_id: int) -> None:
    """Bring a stored file in. Of several workers that try, one does it; what was done before is not done again."""
    job = database.write_sync(_claim, upload_id)
    if job is None:
        return
    try:
        _run(job)
    except JobCancelled as why:
        log.info("upload %s stopped: %s", upload_id, why)
    except INTERRUPTIONS as error:  # a full disk, a lost connection: when its lease runs out, it is taken up again
        log.error("upload %s interrupted: %s", upload_id, error)


def _run(job: ImportJob) -> None:
    try:
        table = CsvUpload(job)
        database.write_sync(_describe, job, table)
        memory, rows = DuplicateTracker(table.columns.ours), table.rows(job.done)
        if memory.ours:
            for row, _ in islice(table.rows(0), job.done):  # what this job did before it was stopped
                memory.see(row)
        enricher = Enricher(lambda: database.write_sync(renew_lease, job)) if job.enrich else None
        while batch := list(islice(rows, ENRICH_BATCH if enricher else BATCH)):
            if enricher and not enricher.look_up_isbns([row for row, _ in batch]):
                database.write_sync(_release, job)
                return
            database.write_sync(_store_batch, job, memory, [row for row, _ in batch], batch[-1][1])
            if database.server_is_stopping():
                database.write_sync(_release, job)
                return
        database.write_sync(_finish_job, job, None)
    except UnreadableFile as error:
        database.write_sync(_finish_job, job, str(error))
    except (JobCancelled, *INTERRUPTIONS):
        raise
    except Exception:
        # The last line of defence of a job that nobody waits for: it must end in a state that its owner can see.
        log.exception("upload %s failed", job.upload_id)
        database.write_sync(_finish_job, job, "Something went wrong here; it is in the server's log.")


def _claim(session: Session, upload_id: int) -> ImportJob | None:
    """Take the upload if it is free; None if somebody is at it."""
    now, worker = models.utcnow(), secrets.token_hex(8)
    claimed = session.execute(
        sa.update(Upload)
        .where(col(Upload.id) == upload_id, claimable())
        .values(
            status=UploadStatus.processing,
            started_at=sa.func.coalesce(col(Upload.started_at), now),
            worker=worker,
            lease_until=now + LEASE,
        )
        .returning(col(Upload.rows), col(Upload.dry_run), col(Upload.enrich))
    ).first()
    if claimed is None:
        return None
    if claimed.dry_run and claimed.rows:  # what it has imagined is lost: begin again
        nothing = dict.fromkeys(("rows", "inserted", "updated", "skipped", "failed", "warnings", "progress"), 0)
        session.execute(sa.update(Upload).where(col(Upload.id) == upload_id).values(nothing))
        session.execute(sa.delete(UploadError).where(col(UploadError.upload_id) == upload_id))
        return ImportJob(upload_id, worker, 0, claimed.enrich)
    return ImportJob(upload_id, worker, int(claimed.rows), claimed.enrich)


def claimable() -> ColumnElement[bool]:
    abandoned = sa.and_(col(Upload.status) == UploadStatus.processing, col(Upload.lease_until) < models.utcnow())
    return sa.or_(col(Upload.status) == UploadStatus.queued, abandoned)


def abandoned_uploads(connection: Connection) -> Sequence[int]:
    """Uploads that no process is working on: left by one that was stopped or killed."""
    return connection.execute(sa.select(col(Upload.id)).where(claimable()).order_by(col(Upload.id))).scalars().all()


def lock_upload(session: Session, job: ImportJob) -> Upload:
    """The upload, if it is still this job's; then for another while."""
    upload = session.get(Upload, job.upload_id, with_for_update=True)
    if upload is None:
        raise JobCancelled("it is gone with its owner")
    if upload.worker != job.worker:
        raise JobCancelled(f"it is {upload.status}, not by this job")
    upload.lease_until = models.utcnow() + LEASE
    return upload


def renew_lease(session: Session, job: ImportJob) -> None:
    """Tell the other workers that it is alive while it waits."""
    lock_upload(session, job)


def _describe(session: Session, job: ImportJob, table: CsvUpload) -> None:
    upload, columns = lock_upload(session, job), table.columns
    if upload.shelve and not columns.format.has_shelf:
        raise UnreadableFile(f"This is not an export of Goodreads or StoryGraph. {describe_header(columns.header)}")
    upload.format, upload.encoding, upload.delimiter = columns.format, table.encoding, table.dialect.delimiter
    upload.header = [strip_invalid(cell[:MAX_CELL]) for cell in columns.header]
    upload.ignored_columns = columns.ignored


def _store_batch(
    session: Session, job: ImportJob, memory: DuplicateTracker, rows: Sequence[ImportRow], position: int
) -> None:
    upload = lock_upload(session, job)
    owner = session.get_one(User, upload.user_id)
    batch = BatchImporter(session, upload, Principal(owner.id, owner.username, owner.role, 0), memory)
    if upload.dry_run:  # all of it, but for keeping it
        with session.begin_nested() as imagined:
            batch.place(rows)
            imagined.rollback()
    else:
        batch.place(rows)
    upload.rows += len(rows)
    for name, count in batch.outcomes.items():
        setattr(upload, name, getattr(upload, name) + count)
    upload.warnings += sum(row.book is not None and bool(row.problems) for row in rows)
    upload.progress = min(position / upload.size, 1)
    _store_issues(session, upload.id, rows)
    if time.monotonic() - job.told_at >= PROGRESS_INTERVAL:
        job.told_at = time.monotonic()
        _record_progress(session, upload)


def _store_issues(session: Session, upload_id: int, rows: Sequence[ImportRow]) -> None:
    problems = [
        UploadError(
            upload_id=upload_id,
            row=row.number,
            severity="error" if row.book is None else "warning",
            field=problem.field,
            value=printable(problem.value),
            message=problem.message,
            # Once for each row, to be given back.
            cells=[strip_invalid(cell[:MAX_CELL]) for cell in row.cells] if row.book is None and first else None,
        )
        for row in rows
        for first, problem in zip(chain([True], repeat(False)), row.problems, strict=False)
    ]
    if problems:
        severity = col(UploadError.severity)
        kept = sa.select(severity, sa.func.count()).where(col(UploadError.upload_id) == upload_id).group_by(severity)
        counts = Counter(dict(session.execute(kept).all()))
        for problem in problems:
            counts[problem.severity] += 1
            if counts[problem.severity] <= MAX_ERRORS:
                session.add(problem)


def _release(session: Session, job: ImportJob) -> None:
    upload = lock_upload(session, job)
    upload.status, upload.lease_until, upload.worker = UploadStatus.queued, None, None


def _finish_job(session: Session, job: ImportJob, error: str | None) -> None:
    upload = lock_upload(session, job)
    upload.progress = upload.progress if error else 1
    upload.error = error
    finish(session, upload, UploadStatus.failed if error else UploadStatus.completed)


def finish(session: Session, upload: Upload, status: UploadStatus) -> None:
    upload.status, upload.finished_at, upload.lease_until, upload.worker = status, models.utcnow(), None, None
    session.execute(sa.delete(UploadChunk).where(col(UploadChunk.upload_id) == upload.id))
    _record_progress(session, upload)


def _record_progress(session: Session, upload: Upload) -> None:
    shown = UploadPublic.model_validate(upload)
    told = shown.model_dump(mode="json", exclude={"ignored_columns", "created_at", "started_at", "finished_at"})
    events.record(session, "upload.progress", told, owner=upload.user_id)
