"""The words of the catalogue: what is asked for, how each database looks it up, and what matches best.

SQLite has an FTS5 index (`book_fts`), PostgreSQL a column of words (`book.words`, a tsvector under GIN); the migrations
make both. A word is a run of letters and digits without case and accents, and is looked up as a beginning.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import ColumnElement, Connection
from sqlalchemy.dialects.postgresql import TSQUERY
from sqlmodel import Session, col
from stdnum import isbn as isbn_numbers

import database
from models import Book, fold, key_of

FTS = sa.table("book_fts")
BOOKS_BY_WORDS = sa.join(Book, FTS, sa.text("book.id = book_fts.rowid"))


def words(text: str | None) -> list[str]:
    """What there is to search for: the words, or the ISBN that they spell, in the form it is kept in."""
    if text is None:
        return []
    if isbn_numbers.is_valid(text):
        return [isbn_numbers.to_isbn13(isbn_numbers.compact(text))]
    return [word for word in text.replace('"', " ").split() if any(map(str.isalnum, word))]


@dataclass(frozen=True)
class Words:
    """All that must be found: the words of `search` anywhere, the others in their columns. None asks for nothing."""

    search: str | None = None
    author: str | None = None
    publisher: str | None = None

    def __bool__(self) -> bool:
        return bool(words(self.search)) or self.author is not None or self.publisher is not None

    @property
    def ranked(self) -> bool:
        return bool(words(self.search))

    def condition(self) -> list[ColumnElement[bool]]:
        """For lists that are not in the order of the best match."""
        if not self:
            return []
        if database.is_postgresql():
            return [_has(_tsquery(self))]
        rows = sa.text("SELECT rowid FROM book_fts WHERE book_fts MATCH :match").bindparams(match=_fts5(self))
        return [col(Book.id).in_(rows)]


def count_matches(connection: Connection, asked: Words, conditions: Sequence[ColumnElement[bool]]) -> int:
    if database.is_postgresql():
        counted = sa.select(sa.func.count()).select_from(Book).where(*asked.condition(), *conditions)
    else:
        source = BOOKS_BY_WORDS if conditions else FTS
        counted = sa.select(sa.func.count()).select_from(source).where(_matches(_fts5(asked)), *conditions)
    return int(connection.execute(counted).scalar_one())


def best_first(  # noqa: PLR0917  # what one question is made of
    connection: Connection,
    select: sa.Select[Any],
    asked: Words,
    conditions: Sequence[ColumnElement[bool]],
    after: tuple[int, int],
    limit: int,
) -> list[tuple[int, Any]]:
    """Best match first: the exact title, then titles that begin so, then all words in the title, then the rest.

    Each of these tiers is in the order of ids, so that a walk by cursor stays true while books come and go, which a
    score from word statistics would not; and each is read from the index only as far as the page needs it. `after` is
    the tier and id of the last row before; rows come with their tier.
    """
    tiers = _tiers_of_postgresql(select, asked) if database.is_postgresql() else _tiers_of_sqlite(select, asked)
    tier, last_id = after
    rows: list[tuple[int, Any]] = []
    for number in range(max(tier, 0), len(tiers)):
        matching, book_id = tiers[number]
        last = last_id if number == tier else 0
        page = matching.where(book_id > last, *conditions).order_by(book_id).limit(limit - len(rows))
        rows += [(number, row) for row in connection.execute(page)]
        if len(rows) == limit:
            break
    return rows


def index_books(session: Session, first: int, last: int) -> None:
    """Make new books, those with ids from `first` to `last`, searchable. Changes and deletions are the triggers'."""
    if database.is_postgresql():
        return  # where the column is generated
    session.execute(
        sa.text(
            "INSERT INTO book_fts (rowid, title, author, isbn, publisher)"
            " SELECT id, title, author, isbn, publisher FROM book WHERE id BETWEEN :first AND :last"
        ),
        {"first": first, "last": last},
    )


Tiers = Sequence[tuple[sa.Select[Any], Any]]  # what a tier selects, and the id by which it is read

# --- SQLite -------------------------------------------------------------------------------------------------------


def _fts5(asked: Words) -> str:
    """The FTS5 expression for all words asked for."""
    parts = [_all_words(words(asked.search))] if asked.ranked else []
    for column, text in (("author", asked.author), ("publisher", asked.publisher)):
        if text is not None:
            parts.append(f"{{{column}}} : ({_all_words(words(text), prefixes=False)})")
    return " AND ".join(f"({part})" for part in parts)


def _all_words(found: list[str], *, prefixes: bool = True) -> str:
    """Within quotes nothing is syntax; the star makes a word a prefix; `""` matches nothing."""
    return " AND ".join(f'"{word}"{"*" * prefixes}' for word in found) or '""'


def _matches(expression: str) -> ColumnElement[bool]:
    return sa.text("book_fts MATCH :match").bindparams(match=expression)  # type: ignore[return-value]  # text that is a condition


def _tiers_of_sqlite(select: sa.Select[Any], asked: Words) -> Tiers:
    found, match = words(asked.search), _fts5(asked)
    in_title = f"{{title}} : ({_all_words(found)})"
    begins = f'{{title}} : ^"{" ".join(found)}"*'
    exact = col(Book.title_key) == key_of(asked.search or "")
    row_id = sa.literal_column("book_fts.rowid", sa.Integer)
    by_words = sa.exists().where(sa.text("book_fts.rowid = book.id"), _matches(match)).select_from(FTS)
    return (
        # By the index of titles, which few rows share, and not by the words, which half of all rows may.
        (select.where(exact, by_words), col(Book.id)),
        *(
            (select.select_from(BOOKS_BY_WORDS).where(_matches(expression), ~exact), row_id)
            for expression in (
                f"({match}) AND ({begins})",
                f"({match}) AND (({in_title}) NOT ({begins}))",
                f"({match}) NOT ({in_title})",
            )
        ),
    )


# --- PostgreSQL ---------------------------------------------------------------------------------------------------

WORDS: ColumnElement[Any] = sa.literal_column("book.words")
TITLE_WORDS: ColumnElement[str] = sa.literal_column("book.title_words", sa.Text)
# The words of these columns stand in `words` once more, with a mark.
MARKS = {"title": "t:", "author": "a:", "publisher": "p:"}


def _tokens(found: Sequence[str]) -> list[str]:
    return [token for word in found for token in re.findall(r"[^\W_]+", fold(word))]


def _terms(found: Sequence[str], mark: str = "", *, prefixes: bool = True) -> list[str]:
    # Letters, digits and our own marks only: nothing in it is syntax within the quotes.
    return [f"'{mark}{token}'{':*' * prefixes}" for token in _tokens(found)]


def _tsquery(asked: Words) -> str:
    terms = _terms(words(asked.search))
    for column, text in (("author", asked.author), ("publisher", asked.publisher)):
        if text is not None:
            terms += _terms(words(text), MARKS[column], prefixes=False) or ["'no such word'"]
    return " & ".join(terms) or "'no such word'"


def _has(query: str) -> ColumnElement[bool]:
    return WORDS.bool_op("@@")(sa.cast(sa.literal(query, sa.Text), TSQUERY))


def _tiers_of_postgresql(select: sa.Select[Any], asked: Words) -> Tiers:
    found = words(asked.search)
    has_all, in_title = _has(_tsquery(asked)), _has(" & ".join(_terms(found, MARKS["title"])) or "'no such word'")
    begins = TITLE_WORDS.startswith(" ".join(_tokens(found)))
    exact = col(Book.title_key) == key_of(asked.search or "")
    return tuple(
        (select.where(has_all, *more), col(Book.id))
        for more in ((exact,), (~exact, begins), (~exact, ~begins, in_title), (~exact, ~begins, ~in_title))
    )
