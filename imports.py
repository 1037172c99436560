"""Imports: the cells of a file as rows, and rows into the catalogue and onto a shelf, in batches.

Only rows without title or author, or with cells that can't be told apart, are refused. Any other value that can't be
read is left out, and a text that is too long is cut, with a warning. `uploads.py` has the job that calls all this.
"""

import functools
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from itertools import islice
from typing import Any, TextIO, TypeVar

import sqlalchemy as sa
from pydantic import BaseModel, ValidationError
from sqlalchemy import ColumnElement, Connection
from sqlmodel import Session, col

import csv_files
import database
import events
import library
import models
from books import revise_book
from csv_files import SHELF_FORMATS, BrokenRecord, ColumnMapping, ImportRow, InvalidCell, UnreadableFile, printable
from models import Book, Principal, ShelfEntry, ShelfStatus, Upload, UploadChunk, UploadStatus
from schemas import CSV_CONTEXT, INVALID_CHARACTERS, BookCreate, BookUpdate, is_isbn13
from search import TITLE, index_books
from settings import settings

T = TypeVar("T")
Model = TypeVar("Model", bound=BaseModel)
CHUNK = 256 * 1024  # bytes of a stored chunk
MAX_BATCH_SIZE = 4 << 20  # bytes of the file whose rows are in memory at once
LEASE = timedelta(seconds=15)  # a job that has not renewed it for so long has died


# --- cells to rows --------------------------------------------------------------------------------------------------

MAX_TAGS, MAX_TAG = 50, 50
# What other values of a column are not.
KINDS = {
    "cover_url": "an address that begins with http:// or https://",
    "pages": "a number of pages",
    "page": "a number of a page",
    "price": "a price",
    "published_date": "a date of publication",
    "publication_year": "a year of publication",
    **dict.fromkeys(("started_at", "finished_at", "added_at"), "a date"),
}
PERIOD = re.compile(r"(\d[\d/.-]{6,8}\d)-(\d[\d/.-]{6,8}\d)?")  # of reading, in StoryGraph's list of them


class RowParser:
    """Makes rows of cells. `day_first` says for dates like 03/04/2008 what the other rows of the file show."""

    def __init__(self, columns: ColumnMapping, day_first: Callable[[], bool | None], *, enrich: bool = False) -> None:
        self.columns, self.day_first, self.enrich = columns, day_first, enrich
        self.width = len(columns.header)
        self.names = {name: printable(columns.header[i].strip(), 100) for name, (i, *_) in columns.fields.items()}
        # Of several columns of a field the first one counts, so it comes last.
        self.cells = [(name, i) for name, found in columns.fields.items() for i in reversed(found)]
        self.html_cells = columns.fields.get("review", [])

    def parse(self, number: int, cells: Sequence[str]) -> ImportRow:
        row = ImportRow(number, cells)
        if len(cells) != self.width:
            return row.refuse(None, ",".join(cells), f"has {len(cells)} cells where the header has {self.width}")
        if cells == self.columns.header:
            return row.refuse(None, ",".join(cells), "is the header again")
        cells = self._clean(row, cells)
        texts = {name: cells[i] for name, i in self.cells if cells[i]}
        row.values = {name: text for name, text in texts.items() if name in csv_files.ALIASES}
        if "isbn" in texts and not is_isbn13(texts["isbn"]):
            self._read_isbn(row, cells)
        if row.outcome != "failed":
            self._read_book(row, texts)
        if row.outcome != "failed" and self.columns.format in SHELF_FORMATS:
            self._read_entry(row, texts)
        return row

    def _clean(self, row: ImportRow, cells: Sequence[str]) -> list[str]:
        values = [cell.strip() for cell in cells]
        if self.columns.escaped:
            values = [csv_files.unescape_formula(value) for value in values]
        line = "".join(values)
        if not self.columns.ours and ("&" in line or '="' in line):
            unescape, html_cells = csv_files.unescape_cell, self.html_cells
            values = [value if i in html_cells else unescape(value) for i, value in enumerate(values)]
        if "\x00" in line or (not line.isascii() and INVALID_CHARACTERS.search(line)):
            for name, i in self.cells:
                values[i], count = INVALID_CHARACTERS.subn("\N{REPLACEMENT CHARACTER}", values[i])
                if count:
                    self._warn(row, name, values[i], "has bytes that are no text, which were replaced")
        return values

    def _warn(self, row: ImportRow, name: str, value: str, message: str) -> None:
        row.warn(self.names.get(name) or self.names.get("dates_read", name), value, message)

    def _read(self, row: ImportRow, name: str, text: str, read: Callable[..., T], *args: Any) -> T | None:
        try:
            return read(text, *args)
        except InvalidCell as error:
            self._warn(row, name, text, f"{printable(text, 50)} {error}; left out")
            return None

    def _cut(self, row: ImportRow, name: str, text: str, most: int) -> str:
        """At the end of a word."""
        if len(text) <= most:
            return text
        head = text[:most]
        if not (text[most].isspace() or head[-1].isspace()):
            head = head.rsplit(None, 1)[0]
        head = head.rstrip(" ,") or head
        self._warn(row, name, text[len(head) :].strip(" ,"), f"has more than {most:,} characters: this was cut off")
        return head

    def _validate(self, row: ImportRow, model: type[Model], values: dict[str, Any], texts: dict[str, str]) -> Model:
        """The model of the values, which lose what is invalid."""
        while True:
            try:
                return model.model_validate(values, context=CSV_CONTEXT)
            except ValidationError as error:
                errors = error.errors(include_url=False)
            for name, most in [(str(e["loc"][0]), e.get("ctx", {}).get("max_length", 0)) for e in errors]:
                if name in KINDS:
                    value = texts.get(name) or str(values[name])
                    self._warn(row, name, value, f"{printable(value, 50)} is not {KINDS[name]}; left out")
                    del values[name]
                else:
                    values[name] = self._cut(row, name, values[name], most)

    def _read_isbn(self, row: ImportRow, cells: Sequence[str]) -> None:
        """Repair the ISBN, or do without."""
        found = [cells[i] for i in self.columns.fields["isbn"] if cells[i]]
        del row.values["isbn"]
        if isbn := next(filter(None, map(csv_files.repair_isbn, found)), None):
            row.values["isbn"] = isbn
        elif self.enrich and not {"title", "author"} <= row.values.keys():
            row.refuse(self.names["isbn"], found[0], "is not an ISBN, and can't be repaired; this row needs one")
        elif self.columns.format != "storygraph":  # whose column has ids of its own, too
            row.has_bad_isbn = True
            self._warn(row, "isbn", found[0], f"{printable(found[0], 50)} is not an ISBN; left out")

    def _read_book(self, row: ImportRow, texts: dict[str, str]) -> None:
        values = row.values
        if "additional" in texts or self.columns.format == "librarything":
            authors = [texts[name] for name in ("author", "additional") if name in texts]
            if self.columns.format == "librarything":  # `Cortázar, Julio`, with `|` between others
                authors = [re.sub("^([^,]+), ([^,]+)$", r"\2 \1", name) for name in "|".join(authors).split("|")]
            values |= {"author": ", ".join(authors)} if any(authors) else {}
        for name, read in csv_files.READERS.items():
            if name in values and not values[name].isdecimal():
                values[name] = self._read(row, name, values[name], read)
                if values[name] is None:
                    del values[name]
        if published := values.pop("published_date", None):
            found = self._read(row, "published_date", published, csv_files.read_date, self.day_first)
            day, year = found or (None, None)
            values |= {"published_date": day} if day else {"publication_year": year, **values} if year else {}
        known = {*values, "publication_year"} if "published_date" in values else {*values}
        needs_lookup = self.enrich and "isbn" in values and not known >= csv_files.LOOKED_UP
        missing = [name for name in ("title", "author") if name not in values]
        if missing and not needs_lookup:
            name, *others = (self.names.get(name, name) for name in missing)
            row.refuse(name, "", ", as is ".join(["is missing", *others]))
            return
        values |= dict.fromkeys(missing, "?")  # it may be found, but what is wrong is left out now
        book = self._validate(row, BookCreate, values, texts)
        for name in missing:
            del values[name]
        row.book, row.lookup_isbn = (None, values["isbn"]) if needs_lookup else (book, None)

    def _read_entry(self, row: ImportRow, texts: dict[str, str]) -> None:
        shelves, names = (
            [name for part in texts.get(field, "").split(",") if (name := part.strip())] for field in ("status", "tags")
        )
        statuses = {shelf: csv_files.shelf_status(shelf) for shelf in shelves}
        tags, exclusive = [shelf for shelf, status in statuses.items() if not status], {*statuses}
        for name in names:
            if name in exclusive:
                exclusive.remove(name)  # Goodreads has it among the others, once
            else:
                tags.append(name)
        tags = list(dict.fromkeys(self._cut(row, "tags", tag, MAX_TAG) for tag in tags))
        if len(tags) > MAX_TAGS:
            self._warn(row, "tags", ", ".join(tags[MAX_TAGS:]), f"more than {MAX_TAGS} tags: these were left out")
        rating = self._read(row, "rating", texts["rating"], csv_files.read_rating) if "rating" in texts else None
        if rating and rating != float(texts["rating"].replace(",", ".")):
            self._warn(row, "rating", texts["rating"], f"{texts['rating']} is no quarter of a star: {rating} instead")
        started, finished = texts.get("started_at"), texts.get("finished_at")
        if periods := PERIOD.findall(texts.get("dates_read", "").replace(" ", "")):
            start, end = max(periods, key=lambda period: period[1] or "9")  # of days like 2023/03/01; or it goes on
            if end in ("", finished or end):
                started, finished = start, finished or end
        moments = {"started_at": started, "finished_at": finished, "added_at": texts.get("added_at")}
        values: dict[str, Any] = {}
        for name, text in moments.items():
            if text and (moment := self._read(row, name, text, self._read_moment)):
                values[name] = moment
        status = next(filter(None, statuses.values()), None)
        if status is None and (not shelves or self.columns.format == "librarything"):  # whose collections are one's own
            has_read = "finished_at" in values or (shelves and rating)
            status = ShelfStatus.completed if has_read else ShelfStatus.reading if "started_at" in values else None
        review = "\n\n".join(filter(None, (texts.get("review_title"), csv_files.from_html(texts.get("review", "")))))
        values |= {"rating": rating, "review": review or None, "tags": tags[:MAX_TAGS], "page": texts.get("page")}
        values["status"] = status
        row.entry = self._validate(row, csv_files.ShelfData, values, texts)

    def _read_moment(self, text: str) -> str | date:
        text = text.strip("[]")  # LibraryThing has them
        if re.match(r"\d{4}-\d\d-\d\d[T ]", text):
            return text
        day, _ = csv_files.read_date(text, self.day_first, short=True)
        if day is None:
            raise InvalidCell("is not a full date")
        return day


# --- rows to books and shelf entries --------------------------------------------------------------------------------

Key = str | tuple[str, ...]
EXPERIENCE = {"rating", "review", "started_at", "finished_at"}
AMBIGUOUS = "several books have this title and author; the file does not show which one is meant"


@dataclass
class DuplicateTracker:
    """Which rows are the same book; lives as long as the job."""

    ours: bool  # whether the file is an export of this service
    counts: Counter[int] = field(default_factory=Counter)  # of title and author, by hash
    dry_run: set[int] = field(default_factory=set)  # hashes of what a dry run would have added
    shelved: set[int] = field(default_factory=set)  # ids of books; in a dry run, which adds none, hashes of their keys

    def key(self, row: ImportRow) -> Key:
        """The ISBN, or without one title and author. In our own exports these are exact, and numbered: there, two
        equal books are two. Where a spreadsheet has spoiled the ISBN, they are as in other files."""
        book = row.book
        if book.isbn:
            return str(book.isbn)
        if not self.ours or row.has_bad_isbn:
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
            row.key = self.tracker.key(row)
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
        if self.updating:
            self._update_books([row for row in good if new.get(row.key) is not row])
        if self.upload.dry_run:
            self.tracker.dry_run.update(map(hash, new))

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
        candidates = sa.select(*columns).where(TITLE.in_(titles)).order_by(*order)
        for book_id, title, author, isbn in self.session.execute(candidates):
            self.ids.setdefault(_title_and_author(title, author), book_id)
            if self.tracker.ours and isbn is None:
                counts[title, author] += 1
                self.ids[title, author, str(counts[title, author])] = book_id
        self.ambiguous = {key for key, count in counts.items() if count > 1}

    def _insert_books(self, new: dict[Key, ImportRow]) -> None:
        """Insert and index many books at once. The transaction has the write lock: their ids have no gaps."""
        if not new:
            return
        books = [Book.described(row.book) for row in new.values()]
        database.insert_many(self.session, Book, books, Book.initial(self.owner.id))
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
            row.warn(None, "", AMBIGUOUS)
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
        entries, count, reviews = {entry.book_id: entry for entry in found}, 0, 0
        for row in rows:
            book = books.get(row.key)
            mark = hash(row.key) if book is None or self.upload.dry_run else book.id
            entry = entries.get(book.id) if book is not None else None
            is_new, is_repeated = entry is None, mark in self.tracker.shelved
            if is_repeated and not self.updating and row.entry.model_dump(include=EXPERIENCE, exclude_none=True):
                row.warn(None, ",".join(row.cells), "is about the same book as an earlier row, and was left out")
            if book is None or (is_repeated and (is_new or not self.updating)):
                continue
            self.tracker.shelved.add(mark)
            data = {name: new for name, new in row.entry if new not in (None, []) and getattr(entry, name, None) != new}
            if not (is_new or (self.updating and data)):
                continue
            if not is_new and row.key[:2] in self.ambiguous:
                row.warn(None, "", AMBIGUOUS)
                continue
            if entry is None:
                entry = ShelfEntry(user_id=self.owner.id, book_id=book.id, status=ShelfStatus.wishlist)
                entries[book.id] = entry
                self.session.add(entry)
            before, row.outcome = (entry.rating, entry.review), "inserted" if is_new else "updated"
            entry.revise({"finished_at": entry.finished_at, **data})  # without finished_at, it might become now
            library.count_rating(book, before[0], entry.rating)
            reviews += before != (entry.rating, entry.review)
            count += 1
        data = {"upload_id": self.upload.id}
        if count:
            events.record(self.session, "shelf.imported", data | {"count": count}, owner=self.owner.id)
        if reviews:
            events.record(self.session, "reviews.imported", data | {"count": reviews})


# --- the file -----------------------------------------------------------------------------------------------------


class JobCancelled(Exception):
    """The upload was cancelled, was deleted with its owner, or another job has taken over."""


@dataclass
class ImportJob:
    upload_id: int
    worker: str  # as long as the upload names it, the upload is this job's
    done: int  # rows
    enrich: bool
    shelve: bool
    batch: int  # rows to a transaction
    renewed_at: datetime = field(init=False)
    progress_at: float = 0

    def extend_lease(self, upload: Upload) -> None:
        self.renewed_at = models.utcnow()
        # An upload that is not started is still arriving, maybe slowly.
        upload.lease_until = self.renewed_at + (LEASE if upload.started_at else 4 * LEASE)

    def renew_lease(self) -> None:
        """Now and then, while the job reads or waits for others."""
        if abs(models.utcnow() - self.renewed_at) > LEASE / 5:
            database.write_sync(lock_upload, self)


def lock_upload(session: Session, job: ImportJob) -> Upload:
    """The upload, if it is still this job's, with the lease renewed."""
    upload = session.get(Upload, job.upload_id)
    if upload is None:
        raise JobCancelled("it was deleted with its owner")
    if upload.worker != job.worker:
        raise JobCancelled(f"it is {upload.status}, not by this job")
    job.extend_lease(upload)
    return upload


def has_job(upload: Any) -> ColumnElement[bool]:
    """Whether its lease runs. One that ends too far ahead was given before the clock was set back."""
    now = models.utcnow()
    return sa.and_(upload.status == UploadStatus.processing, upload.lease_until.between(now, now + 8 * LEASE))


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
        if self.columns.ours:  # and not the quotes that some text in it looks like
            self.dialect = csv_files.Dialect(self.dialect.delimiter)

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

    def next_batch(self, rows: Iterator[ImportRow], most: int) -> list[ImportRow]:
        batch, end = list[ImportRow](), self.file.position + MAX_BATCH_SIZE
        for row in islice(rows, most):
            batch.append(row)
            if self.file.position > end:
                break
        return batch

    @functools.cached_property
    def day_first(self) -> bool | None:
        """Whether 03/04/2008 is in April, if other dates of the file show it. Read only where a row needs it."""
        names = ("published_date", "added_at", "started_at", "finished_at")
        columns, width = [i for name in names for i in self.columns.fields.get(name, ())], len(self.columns.header)
        rows = (row for _, row in self._records(ChunkReader(self.job)) if isinstance(row, list) and len(row) == width)
        orders = {csv_files.day_comes_first(row[i].strip()) for row in rows for i in columns} - {None}
        return orders.pop() if len(orders) == 1 else None
