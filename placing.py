"""Where the rows of a file go: which book of the catalogue each is, and its place on the owner's shelf."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlmodel import Session, SQLModel, col

import database
import events
import library
import models
from books import revise_book
from csv_files import ImportRow, RowIssue, ShelfData
from models import Book, DomainError, OnDuplicate, Principal, ShelfEntry, Upload
from schemas import BookBase, BookUpdate, EntryUpdate
from search import index_books
from settings import settings

BOOKS = SQLModel.metadata.tables["book"]

# What makes two books one: the ISBN, or without it title and author. In a file that we wrote ourselves the latter are
# exact, and come with a number: two books that differ in nothing are two.
Key = str | tuple[str, ...]


@dataclass
class Memory:
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


class Batch:
    """Some rows of an upload, on their way in. What happens to each stands in `outcomes`."""

    def __init__(self, session: Session, upload: Upload, owner: Principal, memory: Memory) -> None:
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
        books = [Book.row(row.book) for row in new.values() if row.book is not None]
        database.insert_many(self.session, BOOKS, books, Book.untouched(self.owner.id))
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
