"""What brings books in: CSV files, read by a job that survives its process.

The request stores the file as it came. The job reads it back, row by row, and commits batch by batch together with how
far it got: killed in between, it goes on from there. A row is refused with its reason or goes in; none is dropped.
"""

import functools
import io
import logging
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
import models
import settings
from csv_files import (
    MEANINGLESS,
    BrokenRecord,
    ColumnMapping,
    Dialect,
    ImportRow,
    RowParser,
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
from external import Enricher
from models import Principal, Upload, UploadChunk, UploadError, UploadStatus, User
from placing import Batch, Memory
from schemas import UploadPublic

log = logging.getLogger("books.imports")

CHUNK = 256 * 1024  # bytes of a stored piece
BATCH = 1000  # rows to a transaction: some 40 ms in which other writers wait
ERRORS_MAX = 10_000  # reasons that are kept of one upload, and as many warnings; the counts stay exact
# Characters of a refused row's cell that are kept. A field takes 20,000, which are more as HTML.
CELL_MAX = 100_000
LEASE = timedelta(seconds=15)  # a job that has not shown for so long that it is alive has died
TELL_SECONDS = 0.34  # between two events of one upload's progress: with the last, at most four in a second

ENRICH_BATCH = external.MAX_ISBNS  # rows to a transaction, so that each question is committed with its answer

CHUNKS = SQLModel.metadata.tables["upload_chunk"]


@dataclass
class Job:
    upload_id: int
    worker: str  # what stands in the upload for as long as it is this job's
    done: int  # rows
    enrich: bool = False
    told_at: float = 0
    kept_at: datetime | None = None

    def keep(self) -> None:
        """Now and then while it reads, tell the other workers that it is alive."""
        if self.kept_at is None or models.utcnow() - self.kept_at > LEASE / 5:
            database.write_sync(_keep, self)
            self.kept_at = models.utcnow()


# --- the file -----------------------------------------------------------------------------------------------------


class StoredFile(io.RawIOBase):
    """The stored pieces, read one after the other."""

    def __init__(self, job: Job) -> None:
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


class Table:
    """A stored file as rows, after a look at what kind of file it is."""

    def __init__(self, job: Job) -> None:
        self.job, self.enrich = job, job.enrich
        self.encoding = detect_encoding(io.BufferedReader(StoredFile(job), CHUNK))
        self.dialect = detect_dialect(self._text()[1], known_columns)
        self.columns = self._read_header()

    def _text(self) -> tuple[StoredFile, TextIO]:
        file = StoredFile(self.job)
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


class Stopped(Exception):
    """The upload was cancelled, is gone with its owner, or another job has taken over."""


def run_upload(upload_id: int) -> None:
    """Bring a stored file in. Of several workers that try, one does it; what was done before is not done again."""
    job = database.write_sync(_claim, upload_id)
    if job is None:
        return
    try:
        _run(job)
    except Stopped as why:
        log.info("upload %s stopped: %s", upload_id, why)
    except INTERRUPTIONS as error:  # a full disk, a lost connection: when its lease runs out, it is taken up again
        log.error("upload %s interrupted: %s", upload_id, error)


def _run(job: Job) -> None:
    try:
        table = Table(job)
        database.write_sync(_describe, job, table)
        memory, rows = Memory(table.columns.ours), table.rows(job.done)
        if memory.ours:
            for row, _ in islice(table.rows(0), job.done):  # what this job did before it was stopped
                memory.see(row)
        enricher = Enricher(lambda: database.write_sync(_keep, job)) if job.enrich else None
        while batch := list(islice(rows, ENRICH_BATCH if enricher else BATCH)):
            if enricher and not enricher.fill_in([row for row, _ in batch]):
                database.write_sync(_release, job)
                return
            database.write_sync(_store_batch, job, memory, [row for row, _ in batch], batch[-1][1])
            if settings.server_is_stopping():
                database.write_sync(_release, job)
                return
        database.write_sync(_finish, job, None)
    except UnreadableFile as error:
        database.write_sync(_finish, job, str(error))
    except (Stopped, *INTERRUPTIONS):
        raise
    except Exception:
        # The last line of defence of a job that nobody waits for: it must end in a state that its owner can see.
        log.exception("upload %s failed", job.upload_id)
        database.write_sync(_finish, job, "Something went wrong here; it is in the server's log.")


def _claim(session: Session, upload_id: int) -> Job | None:
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
        return Job(upload_id, worker, 0, claimed.enrich)
    return Job(upload_id, worker, int(claimed.rows), claimed.enrich)


def claimable() -> ColumnElement[bool]:
    abandoned = sa.and_(col(Upload.status) == UploadStatus.processing, col(Upload.lease_until) < models.utcnow())
    return sa.or_(col(Upload.status) == UploadStatus.queued, abandoned)


def abandoned_uploads(connection: Connection) -> Sequence[int]:
    """Uploads that no process is working on: left by one that was stopped or killed."""
    return connection.execute(sa.select(col(Upload.id)).where(claimable()).order_by(col(Upload.id))).scalars().all()


def _mine(session: Session, job: Job) -> Upload:
    """The upload, if it is still this job's; then for another while."""
    upload = session.get(Upload, job.upload_id, with_for_update=True)
    if upload is None:
        raise Stopped("it is gone with its owner")
    if upload.worker != job.worker:
        raise Stopped(f"it is {upload.status}, not by this job")
    upload.lease_until = models.utcnow() + LEASE
    return upload


def _keep(session: Session, job: Job) -> None:
    """Tell the other workers that it is alive while it waits."""
    _mine(session, job)


def _describe(session: Session, job: Job, table: Table) -> None:
    upload, columns = _mine(session, job), table.columns
    if upload.shelve and not columns.format.has_shelf:
        raise UnreadableFile(f"This is not an export of Goodreads or StoryGraph. {describe_header(columns.header)}")
    upload.format, upload.encoding, upload.delimiter = columns.format, table.encoding, table.dialect.delimiter
    upload.header = [strip_invalid(cell[:CELL_MAX]) for cell in columns.header]
    upload.ignored_columns = columns.ignored


def _store_batch(session: Session, job: Job, memory: Memory, rows: Sequence[ImportRow], position: int) -> None:
    upload = _mine(session, job)
    owner = session.get_one(User, upload.user_id)
    batch = Batch(session, upload, Principal(owner.id, owner.username, owner.role, 0), memory)
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
    _store_problems(session, upload.id, rows)
    if time.monotonic() - job.told_at >= TELL_SECONDS:
        job.told_at = time.monotonic()
        _tell_progress(session, upload)


def _store_problems(session: Session, upload_id: int, rows: Sequence[ImportRow]) -> None:
    problems = [
        UploadError(
            upload_id=upload_id,
            row=row.number,
            severity="error" if row.book is None else "warning",
            field=problem.field,
            value=printable(problem.value),
            message=problem.message,
            # Once for each row, to be given back.
            cells=[strip_invalid(cell[:CELL_MAX]) for cell in row.cells] if row.book is None and first else None,
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
            if counts[problem.severity] <= ERRORS_MAX:
                session.add(problem)


def _release(session: Session, job: Job) -> None:
    upload = _mine(session, job)
    upload.status, upload.lease_until, upload.worker = UploadStatus.queued, None, None


def _finish(session: Session, job: Job, error: str | None) -> None:
    upload = _mine(session, job)
    upload.progress = upload.progress if error else 1
    upload.error = error
    end(session, upload, UploadStatus.failed if error else UploadStatus.completed)


def end(session: Session, upload: Upload, status: UploadStatus) -> None:
    upload.status, upload.finished_at, upload.lease_until, upload.worker = status, models.utcnow(), None, None
    session.execute(sa.delete(UploadChunk).where(col(UploadChunk.upload_id) == upload.id))
    _tell_progress(session, upload)


def _tell_progress(session: Session, upload: Upload) -> None:
    shown = UploadPublic.model_validate(upload)
    told = shown.model_dump(mode="json", exclude={"ignored_columns", "created_at", "started_at", "finished_at"})
    events.record(session, "upload.progress", told, owner=upload.user_id)
