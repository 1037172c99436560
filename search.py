"""Full-text search: the words of a query, how each database looks them up, which books match best, and which words
are nearest to those that no book has.

SQLite has an FTS5 index (`book_fts`), PostgreSQL a column of words (`book.words`, a tsvector under GIN); the migrations
make both, of the keys that `Book.described` writes. A word is a run of letters and digits without case and marks, and
matches as a prefix.
"""

import functools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from string import punctuation
from typing import Any, NamedTuple

import sqlalchemy as sa
from pydantic import AfterValidator
from rapidfuzz import process
from rapidfuzz.distance.OSA import normalized_similarity
from sqlalchemy import ColumnElement, Connection
from sqlalchemy.dialects.postgresql import TSQUERY
from sqlmodel import Session, col
from stdnum import isbn as isbn_numbers

import database
from database import CompiledQuery
from models import AUTHOR_ORDER, MAX_SORT_KEY, TITLE_ORDER, Book, sort_key, word_key

FTS = sa.table("book_fts")
ROWID = sa.literal_column("book_fts.rowid", sa.Integer)
# `book_fts` has columns of these names, too.
TITLE: ColumnElement[str] = sa.literal_column(TITLE_ORDER.replace("title", "book.title"), sa.String)
AUTHOR: ColumnElement[str] = sa.literal_column(AUTHOR_ORDER.replace("author", "book.author"), sa.String)
MAX_WORDS = 16


@functools.lru_cache(1000)
def words(text: str | None) -> tuple[str, ...]:
    """The words of a query, or the ISBN that it spells, as it is stored; with a star where they are prefixes, as
    `brien*` of `o'brien` is."""
    if text is None:
        return ()
    parts = [text] if isbn_numbers.is_valid(text) else text.split()  # an ISBN may contain spaces
    keys = [key for part in parts if (key := word_key(_stored_form(part)))]
    return tuple(" ".join(f"{key}*" for key in keys).split())


def whole(text: str | None) -> list[str]:
    return [word.rstrip("*") for word in words(text)]


def _stored_form(word: str) -> str:
    if isbn_numbers.is_valid(word):
        return str(isbn_numbers.to_isbn13(isbn_numbers.compact(word)))
    return word.replace("-", "") if re.fullmatch(r"97[89](-\d+)+-?", word) else word


def _check_words(text: str) -> str:
    if len({*words(text)}) > MAX_WORDS:
        raise ValueError(f"must have at most {MAX_WORDS} words")
    return text


FEW_WORDS = AfterValidator(_check_words)


class SearchTerms(NamedTuple):
    """The words of `search` match in any column, the others in their own.

    None does not restrict; a text without a word, like `???`, matches nothing.
    """

    search: str | None = None
    title: str | None = None
    author: str | None = None
    publisher: str | None = None

    @property
    def in_columns(self) -> list[tuple[str, str]]:
        """The columns that have words of their own."""
        return [(name, text) for name, text in self._asdict().items() if name != "search" and text is not None]

    @property
    def is_ranked(self) -> bool:
        return bool(words(self.search))

    @property
    def are_costly(self) -> bool:
        """Whether FTS5 may read long lists of rows, in a single step of SQLite's virtual machine."""
        found = [word for text in self for word in words(text)]
        return len(found) > 4 or any(len(word) < 4 for word in found)  # with the star

    def values(self) -> dict[str, Any]:
        """What is bound in `matches` and in the statements of `best_first`."""
        values = _postgresql_values(self) if database.is_postgresql() else _fts5_values(self)
        return {**values, "title": sort_key(self.search or "")}


def matches(words: str = "words", book_id: Any = Book.id) -> ColumnElement[bool]:
    """The condition that a book matches the words, which are bound by this name."""
    if database.is_postgresql():
        return WORDS.bool_op("@@")(_tsquery("words"))
    return book_id.in_(matching_ids(words))  # type: ignore[no-any-return]


def matching_ids(words: str = "words") -> sa.Select[Any]:
    """For conditions of other tables."""
    if database.is_postgresql():
        return sa.select(col(Book.id)).where(matches()).correlate(None)
    return sa.select(ROWID).select_from(FTS).where(_match(words))


def in_title_or_author(text: str) -> str:
    """What is bound as `words` for those of a title and its author only."""
    found = words(text)
    if not database.is_postgresql():
        return f"{{title_key author_key}} : ({_all_words(found)})"
    pairs = zip(_terms(found, MARKS["title"]), _terms(found, MARKS["author"]), strict=True)
    return " & ".join(f"({title} | {author})" for title, author in pairs)


def count_matches() -> sa.Select[Any]:
    return sa.select(sa.func.count()).select_from(matching_ids().subquery())


@functools.lru_cache(1000)
def _tiers(filters: tuple[str, ...], conditions: Callable[[tuple[str, ...]], Any]) -> list[CompiledQuery]:
    tiers = _postgresql_tiers() if database.is_postgresql() else _fts5_tiers(bool(filters))
    last, limit = sa.bindparam("last", type_=sa.Integer), sa.bindparam("limit", type_=sa.Integer)
    return [
        CompiledQuery(select.where(row_id > last, *conditions(filters)).order_by(row_id).limit(limit))
        for select, row_id in tiers
    ]


def best_first(
    connection: Connection,
    filters: tuple[str, ...],
    conditions: Callable[[tuple[str, ...]], Any],
    values: Mapping[str, Any],
    after: tuple[int, int],
    limit: int,
) -> list[tuple[int, int]]:
    """The tiers and ids of books, best match first: the exact title, then titles that begin with the words, then all
    words in the title, then the rest; `after` is the tier and id of the last book before.

    Within a tier books come by id, so that cursors stay valid while books are added and deleted, which a score from
    word statistics would not allow; and each tier is read from its index only as far as the page needs.
    """
    tier, last = after
    found: dict[int, int] = {}  # the tier of each id
    # Without a cursor, all better matches are in `found`: a NOT in FTS5 takes as long as another search.
    without_not = values.get("without_not", {}) if after == (0, 0) else {}
    for number, statement in enumerate(_tiers(filters, conditions)):
        if number >= tier and len(found) < limit:
            bound = {**values, **without_not, "last": last if number == tier else 0, "limit": limit}
            rows = [book_id for (book_id,) in statement.all(connection, bound) if book_id not in found]
            found |= dict.fromkeys(rows[: limit - len(found)], number)
    return [(number, book_id) for book_id, number in found.items()]


# --- did you mean -------------------------------------------------------------------------------------------------

TERM: Any = sa.table("word", sa.column("term", sa.String)).c.term  # all words of the index
_at_least = sa.select(TERM).where(sa.bindparam("word") <= TERM).order_by(TERM)
FIRST_TERM = CompiledQuery(_at_least.limit(1))
MAX_VARIED = 2  # words of a query
MAX_SCANNED = 20_000  # of the words with the same beginning
MIN_SIMILARITY = 0.59  # 1 - edits / letters: finds 89 % of codespell's misspellings of words in goodbooks-10k
MAX_NEAREST, MAX_TRIED, MAX_SUGGESTIONS = 5, 10, 5  # words, and queries

_scanned = _at_least.where(sa.bindparam("last") >= TERM).limit(MAX_SCANNED).subquery().c.term
_space: Any = sa.literal_column("' '")
TERMS = CompiledQuery(sa.select(sa.func.aggregate_strings(_scanned, _space)))  # a thread waits for the GIL at each row


def suggest(connection: Connection, text: str, find: Callable[[str], str | None]) -> list[str]:
    """Queries that find something, with the nearest words of the index instead of those that it does not have.

    `find` gives the first book that a query finds, as JSON. Its spelling is shown: `word_key` has no marks.
    """
    # The first word of the index that is not before each, in the order of the alphabet.
    following = {word: FIRST_TERM.first(connection, {"word": word}) for word in whole(text)}
    long_enough = {word for word in following if 3 <= len(word) <= 40 and not word[0].isdigit()}
    # Where all are known, one may be another's misspelling.
    to_vary = {word for word in long_enough if following[word] != (word,)} or long_enough
    if len(to_vary) > MAX_VARIED:
        return []
    choices = []
    for word, first in following.items():
        begins_a_word = first is not None and first[0].startswith(word)
        itself = [(word, 1.0)] if begins_a_word or word not in to_vary else []
        choices.append(itself + (_nearest_words(connection, word) if word in to_vary else []))
    queries = sorted(product(*choices), key=lambda query: -math.prod(similarity for _, similarity in query))
    suggestions = list[str]()
    for query in queries[:MAX_TRIED]:
        terms = " ".join(word for word, _ in query)
        if len(suggestions) < MAX_SUGGESTIONS and (book := find(terms)) is not None:
            names = " ".join(map(json.loads(book).get, ("title", "author"))).lower().split()
            spelling = {word_key(name): name.strip(punctuation) for name in names}
            suggestions.append(" ".join(spelling.get(term, term) for term in terms.split()))
    return suggestions


def _nearest_words(connection: Connection, word: str) -> list[tuple[str, float]]:
    """Other words of the index that begin with the same two letters or, where none of them is near, with the same
    letter, as most misspelled words do."""
    for length in (2, 1):
        beginning = word[:length]
        (terms,) = TERMS.first(connection, {"word": beginning, "last": f"{beginning}\U0010ffff"})
        others = [term for term in (terms or "").split() if term != word]
        others.sort(key=lambda term: abs(len(term) - len(word)))  # the first of equally near ones counts
        nearest = process.extract(
            word, others, scorer=normalized_similarity, score_cutoff=MIN_SIMILARITY, limit=MAX_NEAREST
        )
        if nearest:
            return [(other, similarity) for other, similarity, _ in nearest]
    return []


INDEX_BOOKS = CompiledQuery(
    sa.text(
        "INSERT INTO book_fts (rowid, title_key, author_key, isbn, publisher_key)"
        " SELECT id, title_key, author_key, isbn, publisher_key FROM book WHERE id BETWEEN :first AND :last"
    )
)


def index_books(session: Session, ids: Sequence[int]) -> None:
    """Index new books, which have all ids between the first and the last. Triggers index updates and deletions."""
    if not database.is_postgresql():  # where the column is generated
        INDEX_BOOKS.all(session, {"first": ids[0], "last": ids[-1]})


# --- SQLite -------------------------------------------------------------------------------------------------------


def _match(parameter: str) -> Any:
    return sa.text(f"book_fts MATCH :{parameter}")


def _all_words(found: Sequence[str]) -> str:
    """Normalized words need no quotes: operators are in capitals. `""` matches nothing."""
    return " AND ".join(dict.fromkeys(found)) or '""'


def _fts5_values(terms: SearchTerms) -> dict[str, Any]:
    more = [f"{{{column}_key}} : ({_all_words(whole(text))})" for column, text in terms.in_columns]
    found = words(terms.search)
    search = [] if terms.search is None else [_all_words(found)]
    everything = " AND ".join(f"({part})" for part in [*search, *more])
    # Without more terms, a title that has the words has all terms; each part takes its time.
    rest = f"({everything}) AND " if more else ""
    in_title = f"{rest}{{title_key}} : ({_all_words(found)})"
    begins = f'{rest}{{title_key}} : ^"{" ".join(whole(terms.search))}"*'
    return {
        "words": everything,
        "begins": begins,
        "in_title": f"({in_title}) NOT ({begins})",
        "elsewhere": f"({everything}) NOT ({in_title})",
        "without_not": {"in_title": in_title, "elsewhere": everything},
    }


def _fts5_tiers(filtered: bool) -> list[tuple[Any, Any]]:
    book_id, by_words = col(Book.id), sa.select(ROWID).select_from(FTS)
    exact = sa.bindparam("title", type_=sa.String) == TITLE
    joined = sa.select(ROWID).select_from(sa.join(Book, FTS, book_id == ROWID))

    def tier(parameter: str) -> tuple[Any, Any]:
        if filtered:  # joined, SQLite might go through the books of a genre and search the index for each
            return sa.select(book_id).where(book_id.in_(by_words.where(_match(parameter))), ~exact), book_id
        return joined.where(_match(parameter), ~exact), ROWID

    return [
        # By the index of titles, which few rows share, not by the words, which half of all rows may share.
        (sa.select(book_id).where(exact, book_id.in_(by_words.where(_match("words")))), book_id),
        tier("begins"),
        tier("in_title"),
        tier("elsewhere"),
    ]


# --- PostgreSQL ---------------------------------------------------------------------------------------------------

WORDS: ColumnElement[Any] = sa.literal_column("book.words")
# `words` also has the words of these columns behind these marks, with which no word begins.
MARKS = {"title": ":t", "author": ":a", "publisher": ":p"}
NO_BOOK = "'no such word'"  # matches nothing


def _tsquery(parameter: str) -> Any:
    return sa.cast(sa.bindparam(parameter, type_=sa.Text), TSQUERY)


def _terms(found: Sequence[str], mark: str = "") -> list[str]:
    # Letters, digits and our own marks only: nothing in it is syntax within the quotes.
    return [f"'{mark}{word}'".replace("*'", "':*") for word in dict.fromkeys(found)] or [NO_BOOK]


def _postgresql_values(terms: SearchTerms) -> dict[str, str]:
    found = words(terms.search)
    everything = [] if terms.search is None else _terms(found)
    for column, text in terms.in_columns:
        everything += _terms(whole(text), MARKS[column])
    begins = " ".join(whole(terms.search))[:MAX_SORT_KEY] + "%"
    return {"words": " & ".join(everything), "begins": begins, "in_title": " & ".join(_terms(found, MARKS["title"]))}


def _postgresql_tiers() -> list[tuple[Any, Any]]:
    in_title = WORDS.bool_op("@@")(_tsquery("in_title"))
    begins = TITLE.like(sa.bindparam("begins", type_=sa.Text))
    exact = sa.bindparam("title", type_=sa.String) == TITLE
    tiers = ((exact,), (~exact, begins), (~exact, ~begins, in_title), (~exact, ~begins, ~in_title))
    return [(sa.select(col(Book.id)).where(matches(), *tier), col(Book.id)) for tier in tiers]
