"""The words of the catalogue: what is asked for, how each database looks it up, and what matches best.

SQLite has an FTS5 index (`book_fts`), PostgreSQL a column of words (`book.words`, a tsvector under GIN); the migrations
make both. A word is a run of letters and digits without case and accents, and is looked up as a beginning.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import ColumnElement, Connection
from sqlalchemy.dialects.postgresql import TSQUERY
from sqlmodel import Session, col
from stdnum import isbn as isbn_numbers

import database
from database import CompiledQuery, connection_of
from models import Book, normalize, sort_key

FTS = sa.table("book_fts")
BOOKS_BY_WORDS = sa.join(Book, FTS, sa.text("book.id = book_fts.rowid"))


@functools.lru_cache(1000)
def words(text: str | None) -> tuple[str, ...]:
    """What there is to search for: the words, or the ISBN that they spell, in the form it is kept in."""
    if text is None:
        return ()
    if isbn_numbers.is_valid(text):  # with spaces in it, maybe
        return (_as_kept(text),)
    return tuple(_as_kept(word) for word in text.replace('"', " ").split() if any(map(str.isalnum, word)))


def _as_kept(word: str) -> str:
    if isbn_numbers.is_valid(word):
        return str(isbn_numbers.to_isbn13(isbn_numbers.compact(word)))
    begun = re.fullmatch(r"97[89](-\d+)+-?", word)
    return word.replace("-", "") if begun else word


@dataclass(frozen=True)
class SearchTerms:
    """All that must be found: the words of `search` anywhere, the others in their columns.

    None asks for nothing, and a text without a word, like `???`, for what no book has.
    """

    search: str | None = None
    author: str | None = None
    publisher: str | None = None

    def __bool__(self) -> bool:
        return (self.search, self.author, self.publisher) != (None, None, None)

    @property
    def ranked(self) -> bool:
        return bool(words(self.search))

    def expression(self) -> str:
        """What is bound to `words` in the conditions below, in the language of the database."""
        return _tsquery(self) if database.is_postgresql() else _fts5(self)


def has_words() -> ColumnElement[bool]:
    """For lists that are not in the order of the best match."""
    if database.is_postgresql():
        return WORDS.bool_op("@@")(sa.cast(sa.bindparam("words", type_=sa.Text), TSQUERY))
    return col(Book.id).in_(sa.text("SELECT rowid FROM book_fts WHERE book_fts MATCH :words"))


def count_matches(conditions: Sequence[ColumnElement[bool]]) -> sa.Select[Any]:
    if database.is_postgresql():
        return sa.select(sa.func.count()).select_from(Book).where(has_words(), *conditions)
    if conditions:
        # Not joined: SQLite might go through the books of a genre and search the index for each of them.
        return sa.select(sa.func.count()).select_from(Book).where(has_words(), *conditions)
    return sa.select(sa.func.count()).select_from(FTS).where(sa.text("book_fts MATCH :words"))


def best_first(  # noqa: PLR0917  # they are what a walk consists of
    connection: Connection,
    asked: SearchTerms,
    conditions: Sequence[ColumnElement[bool]],
    values: Mapping[str, Any],
    after: tuple[int, int],
    limit: int,
) -> list[tuple[int, int]]:
    """Best match first: the exact title, then titles that begin so, then all words in the title, then the rest.

    Each of these tiers is in the order of ids, so that a walk by cursor stays true while books come and go, which a
    score from word statistics would not; and each is read from the index only as far as the page needs it. Books are
    given as their tier and id; `after` is the last one before.
    """
    tiers = _tiers_of_postgresql(asked) if database.is_postgresql() else _tiers_of_sqlite(asked, bool(conditions))
    tier, last_id = after
    found: list[tuple[int, int]] = []
    for number in range(max(tier, 0), len(tiers)):
        matching, book_id = tiers[number]
        last = last_id if number == tier else 0
        page = matching.where(book_id > last, *conditions).order_by(book_id).limit(limit - len(found))
        found += [(number, one) for one in connection.execute(page, values).scalars()]
        if len(found) == limit:
            break
    return found


FEW = 200  # matches, up to which it is quicker to look at each
MATCHES = CompiledQuery(sa.select(sa.literal_column("rowid")).select_from(FTS).where(sa.text("book_fts MATCH :words")))
AMONG = sa.text("SELECT value FROM json_each(:ids)")
SAME_TITLE = CompiledQuery(
    sa.select(col(Book.id)).where(col(Book.title_key) == sa.bindparam("title"), col(Book.id).in_(AMONG))
)


def few_best_first(connection: Connection, asked: SearchTerms) -> list[tuple[int, int]]:
    """The same on SQLite for all of a few matches."""
    in_title, begins = _title_expressions(asked)
    found = dict.fromkeys(_ids(connection, _fts5(asked)), 3)
    # What matches in a narrower way is among what matches at all.
    if found and (titles := _ids(connection, in_title)):
        found |= dict.fromkeys(titles, 2)
        found |= dict.fromkeys(_ids(connection, begins), 1)
    if found:
        same = SAME_TITLE.all(connection, {"title": sort_key(asked.search or ""), "ids": str([*found])})
        found |= {book_id: 0 for (book_id,) in same}
    return sorted((tier, book_id) for book_id, tier in found.items())


def _ids(connection: Connection, expression: str) -> list[int]:
    return [book_id for (book_id,) in MATCHES.all(connection, {"words": expression})]


def index_books(session: Session, first: int, last: int) -> None:
    """Make new books, those with ids from `first` to `last`, searchable. Changes and deletions are the triggers'."""
    if database.is_postgresql():
        return  # where the column is generated
    INDEX.all(connection_of(session), {"first": first, "last": last})


INDEX = CompiledQuery(
    sa.text(
        "INSERT INTO book_fts (rowid, title, author, isbn, publisher)"
        " SELECT id, title, author, isbn, publisher FROM book WHERE id BETWEEN :first AND :last"
    )
)


Tiers = Sequence[tuple[sa.Select[Any], Any]]  # what a tier selects, and the id by which it is read

# --- SQLite -------------------------------------------------------------------------------------------------------


def _fts5(asked: SearchTerms) -> str:
    """The FTS5 expression for all words asked for."""
    parts = [] if asked.search is None else [_all_words(words(asked.search))]
    for column, text in (("author", asked.author), ("publisher", asked.publisher)):
        if text is not None:
            parts.append(f"{{{column}}} : ({_all_words(words(text), prefixes=False)})")
    return " AND ".join(f"({part})" for part in parts)


def _all_words(found: Sequence[str], *, prefixes: bool = True) -> str:
    """Within quotes nothing is syntax; the star makes a word a prefix; `""` matches nothing."""
    return " AND ".join(f'"{word}"{"*" * prefixes}' for word in found) or '""'


def _matches(expression: str) -> ColumnElement[bool]:
    return sa.text("book_fts MATCH :match").bindparams(match=expression)  # type: ignore[return-value]  # text that is a condition


def _title_expressions(asked: SearchTerms) -> tuple[str, str]:
    """What matches with all words in the title, and with a title that begins with them."""
    found = words(asked.search)
    # Without more to ask, a title that has the words has all that is asked for; each part takes its time.
    more = f"({_fts5(asked)}) AND " if asked.author or asked.publisher else ""
    return f"{more}{{title}} : ({_all_words(found)})", f'{more}{{title}} : ^"{" ".join(found)}"*'


def _tiers_of_sqlite(asked: SearchTerms, filtered: bool) -> Tiers:
    match, (in_title, begins) = _fts5(asked), _title_expressions(asked)
    exact = col(Book.title_key) == sort_key(asked.search or "")
    row_id = sa.literal_column("book_fts.rowid", sa.Integer)
    book_id = col(Book.id)
    by_words = sa.select(row_id).select_from(FTS)

    def matching(expression: str) -> tuple[sa.Select[Any], Any]:
        if filtered:  # not joined, see above
            return sa.select(book_id).where(book_id.in_(by_words.where(_matches(expression))), ~exact), book_id
        return sa.select(row_id).select_from(BOOKS_BY_WORDS).where(_matches(expression), ~exact), row_id

    return (
        # By the index of titles, which few rows share, and not by the words, which half of all rows may.
        (sa.select(book_id).where(exact, book_id.in_(by_words.where(_matches(match)))), book_id),
        matching(begins),
        matching(f"({in_title}) NOT ({begins})"),
        matching(f"({match}) NOT ({in_title})"),
    )


# --- PostgreSQL ---------------------------------------------------------------------------------------------------

WORDS: ColumnElement[Any] = sa.literal_column("book.words")
TITLE_WORDS: ColumnElement[str] = sa.literal_column("book.title_words", sa.Text)
# The words of these columns stand in `words` once more, with a mark.
MARKS = {"title": "t:", "author": "a:", "publisher": "p:"}
NO_BOOK = "'no such word'"  # what no book has
WORD_MAX = 2000  # bytes; PostgreSQL refuses to look for a word of 2,048


def _tokens(found: Sequence[str]) -> list[str]:
    return [token for word in found for token in re.findall(r"[^\W_]+", normalize(word))]


def _terms(found: Sequence[str], mark: str = "", *, prefixes: bool = True) -> list[str]:
    # Letters, digits and our own marks only: nothing in it is syntax within the quotes.
    tokens = _tokens(found)
    if any(len(token.encode()) > WORD_MAX for token in tokens):
        return [NO_BOOK]
    return [f"'{mark}{token}'{':*' * prefixes}" for token in tokens]


def _tsquery(asked: SearchTerms) -> str:
    terms = [] if asked.search is None else _terms(words(asked.search)) or [NO_BOOK]
    for column, text in (("author", asked.author), ("publisher", asked.publisher)):
        if text is not None:
            terms += _terms(words(text), MARKS[column], prefixes=False) or [NO_BOOK]
    return " & ".join(terms)


def _has(query: str) -> ColumnElement[bool]:
    return WORDS.bool_op("@@")(sa.cast(sa.literal(query, sa.Text), TSQUERY))


def _tiers_of_postgresql(asked: SearchTerms) -> Tiers:
    found = words(asked.search)
    has_all, in_title = _has(_tsquery(asked)), _has(" & ".join(_terms(found, MARKS["title"]) or [NO_BOOK]))
    begins = TITLE_WORDS.startswith(" ".join(_tokens(found)))
    exact = col(Book.title_key) == sort_key(asked.search or "")
    return tuple(
        (sa.select(col(Book.id)).where(has_all, *more), col(Book.id))
        for more in ((exact,), (~exact, begins), (~exact, ~begins, in_title), (~exact, ~begins, ~in_title))
    )
