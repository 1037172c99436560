"""What the columns of a CSV file say: of books, and in the exports of Goodreads and StoryGraph, of somebody's shelf.

A row tells its book and its place on a shelf, or why it is refused, and what it had to go in without.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError, create_model

from cells import BadValue, decimal_point, from_html, mend_isbn, printable, read_date, reason, unescape
from csvfiles import UnreadableFile, unguard
from models import ShelfStatus
from schemas import CSV_CONTEXT, BookBase, EntryUpdate, Timestamp, is_isbn13

# --- columns ------------------------------------------------------------------------------------------------------

BOOK_COLUMNS = [*BookBase.model_fields]  # those of our own export of the catalogue, in their order
# What Goodreads' columns have no place for; a file that has all of these is our own export of a shelf.
OUR_COLUMNS = ["Genre", "Description", "Language", "Price", "Cover URL", "Published Date"]
OUR_COLUMNS += ["Added At", "Started At", "Finished At"]
REASON = "reason"  # what we add to refused rows when we give them back
# Without case, spaces, `_` and `-`; in the order in which they are believed where a file has several.
ALIASES = {
    "title": ("title", "booktitle", "name"),
    "author": ("author", "authors", "bookauthor"),
    "isbn": ("isbn13", "isbn", "isbn10", "isbn/uid"),
    "genre": ("genre",),
    "description": ("description", "summary"),
    "publisher": ("publisher", "bookpublisher"),
    "language": ("language", "languagecode"),
    "pages": ("pages", "numpages", "numberofpages"),
    "price": ("price",),
    "cover_url": ("coverurl", "imageurl"),
    "published_date": ("publicationdate", "publisheddate", "publishdate"),
    "publication_year": ("publicationyear", "originalpublicationyear", "year", "yearofpublication", "yearpublished"),
}
GOODREADS = {
    "additional": ("additionalauthors",),
    "status": ("exclusiveshelf",),
    "rating": ("myrating",),
    "review": ("myreview",),
    "tags": ("bookshelves",),
    "added_at": ("addedat", "dateadded"),
    "started_at": ("startedat",),
    "finished_at": ("finishedat", "dateread"),
}
STORYGRAPH = {
    "status": ("readstatus",),
    "rating": ("starrating",),
    "review": ("review",),
    "tags": ("tags",),
    "added_at": ("dateadded",),
    "dates_read": ("datesread",),
    "finished_at": ("lastdateread",),
}
SHELVES = {
    "read": ShelfStatus.completed,
    "currently-reading": ShelfStatus.reading,
    "to-read": ShelfStatus.wishlist,
    "did-not-finish": ShelfStatus.abandoned,
    "dnf": ShelfStatus.abandoned,
    "abandoned": ShelfStatus.abandoned,
}


class Format(StrEnum):
    books = "books"
    own = "books-api"  # our own export of the catalogue: taken as it stands
    goodreads = "goodreads"
    storygraph = "storygraph"

    @property
    def has_shelf(self) -> bool:
        return self in (Format.goodreads, Format.storygraph)


COLUMNS_MAX = 500  # those of Goodreads, StoryGraph and ours are thirty; each name is kept, and shown with the upload


class Columns(NamedTuple):
    """Which cells of a row tell which field, and what the others are called."""

    format: Format
    header: list[str]
    fields: dict[str, list[int]]
    ignored: list[str]
    ours: bool  # an export of this service, taken as it stands
    guarded: bool  # whether apostrophes stand before what a spreadsheet would take for a formula


def _keys(cells: Sequence[str]) -> list[str]:
    return [re.sub(r"[\s_-]", "", cell).casefold() for cell in cells]


def known_columns(cells: Sequence[str]) -> int:
    """How many of these name something that is known."""
    known = {alias for aliases in (ALIASES, GOODREADS, STORYGRAPH) for names in aliases.values() for alias in names}
    return sum(key in known for key in _keys(cells))


def read_header(cells: Sequence[str], *, enrich: bool = False) -> Columns:
    """Which column is which. To enrich them, rows need no more than an ISBN."""
    if len(cells) > COLUMNS_MAX:
        raise UnreadableFile(f"The first row has {len(cells):,} columns; at most {COLUMNS_MAX} are read. {seen(cells)}")
    given_back = cells[-1:] == [REASON]
    keys = _keys(cells)
    if list(cells[:-1] if given_back else cells) == BOOK_COLUMNS:
        kind, aliases = Format.own, ALIASES
    elif {"exclusiveshelf", "myrating"} <= set(keys):
        kind, aliases = Format.goodreads, ALIASES | GOODREADS
    elif {"readstatus", "starrating"} <= set(keys):
        kind, aliases = Format.storygraph, ALIASES | STORYGRAPH
    else:
        kind, aliases = Format.books, ALIASES
    fields = {
        name: found
        for name, others in aliases.items()
        if (found := [i for alias in others for i, key in enumerate(keys) if key == alias])
    }
    missing = [name for name in ("title", "author") if name not in fields]
    if missing and not (enrich and "isbn" in fields):
        raise UnreadableFile(f"The first row names no column for {' and '.join(missing)}. {seen(cells)}")
    known = {i for found in fields.values() for i in found}
    ignored = [printable(c, 100) for i, c in enumerate(cells) if i not in known]
    ours = kind == Format.own or (kind == Format.goodreads and set(_keys(OUR_COLUMNS)) <= set(keys))
    return Columns(kind, list(cells), fields, ignored, ours, given_back or ours)


def seen(cells: Sequence[str]) -> str:
    return f"It has: {', '.join(repr(printable(cell, 40)) for cell in cells[:20])}."


# What may be looked up by ISBN where a row does not say it.
LOOKED_UP = {"title", "author", "genre", "publisher", "pages", "cover_url", "publication_year"}

# --- rows ---------------------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    field: str | None
    value: str
    message: str


class Entry(NamedTuple):
    """A place on a shelf, as the file tells it: what it does not tell is None, and is not made up."""

    status: ShelfStatus
    rating: int | None
    review: str | None
    tags: list[str]
    started_at: datetime | None
    finished_at: datetime | None
    added_at: datetime | None


@dataclass
class Row:
    number: int  # as a spreadsheet counts: the header is row 1
    cells: Sequence[str]
    book: Any = None  # a FileBook, which has the fields of a BookBase
    told: set[str] = field(default_factory=set)  # the fields of the book that the row has
    values: dict[str, Any] = field(default_factory=dict)  # what it says of them
    wanted: str | None = None  # the ISBN to look up before it is decided whether the row is good
    filled: set[str] = field(default_factory=set)  # the fields that were looked up
    entry: Entry | None = None
    problems: list[Problem] = field(default_factory=list)

    def refuse(self, field_name: str | None, value: str, message: str) -> "Row":
        self.book, self.wanted, self.problems = None, None, [Problem(field_name, value, message)]
        return self


# The fields and rules of a new book, without SQLModel's own constructor, which takes longer than all of them.
FILE_BOOK: dict[str, Any] = {name: (info.annotation, info) for name, info in BookBase.model_fields.items()}
FileBook: Any = create_model("FileBook", **FILE_BOOK)
MOMENT: TypeAdapter[datetime] = TypeAdapter(Timestamp)


class Reader:
    """Makes rows of cells. `day_first` tells, for a date like 03/04/2008, what the other rows of the file say."""

    def __init__(self, columns: Columns, day_first: Callable[[], bool | None], *, enrich: bool = False) -> None:
        self.columns, self.day_first, self.enrich = columns, day_first, enrich
        self.width = len(columns.header)
        book_fields = [(name, columns.fields[name]) for name in ALIASES if name in columns.fields]
        self.fields = [(name, found[0]) for name, found in book_fields]
        self.as_html = columns.fields.get("review", [])
        self.others = [(name, found[1:]) for name, found in book_fields if len(found) > 1]

    def row(self, number: int, cells: Sequence[str]) -> Row:
        row = Row(number, cells)
        if len(cells) != self.width:
            return row.refuse(None, ",".join(cells), f"has {len(cells)} cells where the header has {self.width}")
        if cells == self.columns.header:
            return row.refuse(None, ",".join(cells), "is the header again")
        cells = self._clean(cells)
        given = {name: cells[i] for name, i in self.fields if cells[i]}
        for name, others in self.others:
            if name not in given and (value := _first(cells, others)):
                given[name] = value
        values: dict[str, Any] = dict(given)
        if "isbn" in values:
            self._mend_isbn(row, cells, values)
            if self.enrich and "isbn" not in values and not {"title", "author"} <= values.keys():
                return row.refuse("isbn", given["isbn"], "is not an ISBN, nor can it be mended, and the row needs one")
        if "additional" in self.columns.fields and (more := _first(cells, self.columns.fields["additional"])):
            values["author"] = f"{values.get('author', '')}, {more}"
        try:
            row.values, row.told = values, self._read_numbers_and_dates(values)
            if self.enrich and "isbn" in values and not values.keys() >= LOOKED_UP:
                # Its faults are told at once; what is only missing may be found.
                FileBook.model_validate({"title": "?", "author": "?", **values}, context=CSV_CONTEXT)
                row.wanted = values["isbn"]
            else:
                row.book = FileBook.model_validate({"title": "", "author": "", **values}, context=CSV_CONTEXT)
        except ValidationError as error:
            row.problems = [
                Problem(name, given.get(name, ""), reason(e, given.get(name, "")))
                for e in error.errors(include_url=False)
                for name in (str(e["loc"][0]),)
            ]
            return row
        except BadValue as error:
            return row.refuse(error.field, error.value, error.message)
        if self.columns.format.has_shelf:
            self._read_entry(row, cells)
        return row

    def _clean(self, cells: Sequence[str]) -> list[str]:
        values = [cell.strip() for cell in cells]
        if self.columns.guarded:
            values = [unguard(value) for value in values]
        if not self.columns.ours and ("&" in (line := "".join(values)) or '="' in line):
            values = [value if i in self.as_html else self._plain(value) for i, value in enumerate(values)]
        return values

    def _plain(self, value: str) -> str:
        if value.startswith('="') and value.endswith('"'):  # Excel's text
            value = value[2:-1].strip()
        if "&" in value:
            value = re.sub(r"&(?:#\d+|#x[0-9a-fA-F]+|\w+);", lambda found: unescape(found[0]), value).strip()
        return value

    def _mend_isbn(self, row: Row, cells: Sequence[str], values: dict[str, Any]) -> None:
        if is_isbn13(values["isbn"]):
            return
        isbns = [cells[i] for i in self.columns.fields["isbn"] if cells[i]]
        values.pop("isbn")
        if isbn := next(filter(None, map(mend_isbn, isbns)), None):
            values["isbn"] = isbn
        elif self.columns.format != Format.storygraph:  # whose column holds ids of its own, too
            message = "is not an ISBN, nor can it be mended; the book is in without it"
            row.problems.append(Problem("isbn", isbns[0], message))

    def _read_numbers_and_dates(self, values: dict[str, Any]) -> set[str]:
        """Read them in place; the fields that the row tells, which a year that is only the date's is not."""
        for name in ("publication_year", "pages"):
            if name in values:
                if re.fullmatch(r"\d{1,3}([.,]\d{3})+", values[name]):
                    raise BadValue(name, values[name], "may have a decimal sign or one between thousands")
                values[name] = re.sub(r"[.,]0+$", "", values[name])  # a number that a spreadsheet took for a float
        if "price" in values:
            values["price"] = decimal_point("price", values["price"])
        if published := values.pop("published_date", None):
            day, year = read_date("published_date", published, self.day_first)
            if day is not None:
                values["published_date"] = day
                told = set(values)
                values.setdefault("publication_year", day.year)
                return told
            values.setdefault("publication_year", year)
        return set(values)

    # --- the shelf ---

    def _read_entry(self, row: Row, cells: Sequence[str]) -> None:
        told = {
            name: _first(cells, found)
            for name, found in self.columns.fields.items()
            if name not in ALIASES and name != "additional"
        }
        try:
            row.entry = self._entry(row, told)
        except BadValue as error:
            row.refuse(error.field, error.value, error.message)

    def _entry(self, row: Row, told: dict[str, str]) -> Entry:
        shelf = told.get("status", "").lower()
        status = SHELVES.get(shelf, ShelfStatus.wishlist)
        tags = [tag for part in told.get("tags", "").split(",") if (tag := part.strip())]
        if told.get("status") in tags:
            tags.remove(told["status"])  # Goodreads names the exclusive shelf among the others
        if shelf and shelf not in SHELVES:
            tags.insert(0, told["status"])
        rating = self._rating(row, told.get("rating", ""))
        review = from_html(told.get("review", "")) or None
        if status not in (ShelfStatus.completed, ShelfStatus.abandoned):
            for name, value in (("rating", rating), ("review", review)):
                if value is not None:
                    message = f"needs a book that was read; this one is on {shelf or 'no shelf'}, and is in without it"
                    row.problems.append(Problem(name, str(value), message))
            rating = review = None
        started, finished = told.get("started_at", ""), told.get("finished_at", "")
        if dates := re.findall(r"([\d/.-]{8,10})-([\d/.-]{8,10})", told.get("dates_read", "").replace(" ", "")):
            started, finished = dates[-1][0], finished or dates[-1][1]
        moments = {
            name: self._moment(name, value)
            for name, value in (("started_at", started), ("finished_at", finished), ("added_at", told.get("added_at")))
        }
        try:
            checked = EntryUpdate.model_validate({"review": review, "tags": list(dict.fromkeys(tags))})
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = str(first["loc"][0])
            raise BadValue(name, told.get(name, ""), reason(first, "x")) from None
        return Entry(status, rating, checked.review, checked.tags or [], **moments)

    def _rating(self, row: Row, text: str) -> int | None:
        if not text:
            return None
        try:
            stars = float(text.replace(",", "."))
        except ValueError:
            stars = math.nan
        if not 0 <= stars <= 5:
            raise BadValue("rating", text, "must be a number from 0, for none, to 5")
        if stars == 0:
            return None
        rounded = max(1, math.floor(stars + 0.5))
        if rounded != stars:
            row.problems.append(Problem("rating", text, f"is not a whole star: rounded to {rounded}"))
        return rounded

    def _moment(self, name: str, text: str | None) -> datetime | None:
        if not text:
            return None
        told = text
        if not re.match(r"\d{4}-\d\d-\d\d[T ]", text):
            day, _ = read_date(name, text, self.day_first)
            if day is None:
                raise BadValue(name, text, "is not a full date")
            told = day.isoformat()
        try:
            return MOMENT.validate_python(told)
        except ValidationError as error:
            raise BadValue(name, text, reason(error.errors(include_url=False)[0], text)) from None


def _first(cells: Sequence[str], found: Sequence[int]) -> str:
    return next((cells[i] for i in found if cells[i]), "")
