"""CSV files: encoding, dialect, records, cells, and the columns of each known format."""

import codecs
import contextlib
import csv
import html
import io
import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from enum import StrEnum
from itertools import islice
from typing import Any, BinaryIO, NamedTuple, TextIO

from charset_normalizer import from_bytes
from pydantic import TypeAdapter, ValidationError, create_model
from stdnum import isbn as isbn_numbers

import schemas
from models import ShelfStatus
from schemas import CSV_CONTEXT, BookBase, EntryUpdate, Timestamp, is_isbn13

MAX_RECORD = 2_000_000  # characters; a record that is longer has lost its way, mostly by a quote that never closes
# What reading lines once more may cost, in characters, with twenty for each line: some seconds. What is read for the
# first time gives ten times its length back. Else a file where each row opens a quote would be read as often as it has
# rows.
MAX_REREAD = 20_000_000
SAMPLE = 256 * 1024  # bytes of a file that are looked at
DELIMITERS = ",;\t|"
BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
CANDIDATES = ["utf_8", "utf_16_le", "utf_16_be", "cp1252", "latin_1"]
NAMES = {"cp1252": "windows-1252", "latin_1": "iso-8859-1", "utf_16_le": "utf-16-le", "utf_16_be": "utf-16-be"}
CONTROLS = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x81\x8d\x8f\x90\x9d]")  # in Windows-1252
UTF8_SEQUENCE = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")
# Python's csv gives up at 128 KB otherwise.
csv.field_size_limit(MAX_RECORD)


# Bytes without a meaning in the encoding become half a surrogate pair, which no text has, and no database takes: so the
# row that has them is refused, and not the file.
MEANINGLESS = "meaningless"
codecs.register_error(MEANINGLESS, lambda error: ("\udcff", error.end))  # type: ignore[attr-defined]  # decoding errors have it


class UnreadableFile(Exception):
    """No row of this file can be read. The message is for who sent it."""


class BrokenRecord(NamedTuple):
    """What stands in place of a record that can't be read: its first line, and why."""

    line: str
    why: str


class Dialect(NamedTuple):
    delimiter: str = ","
    quote: str = '"'
    backslashes: bool = False  # whether `\"` is a quote within quotes, as MySQL writes it, and not only `""`


# --- what kind of file it is --------------------------------------------------------------------------------------


def detect_encoding(file: BinaryIO) -> str:
    """By the byte order mark, by whether all of it can be UTF-8, or else by how its text would look."""
    head = file.read(SAMPLE)
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            return encoding
    strange = _strange_lines(head, file)
    if not strange and 5 * head.count(0) < len(head):  # of UTF-16 without its mark, every other byte would be zero
        return "utf-8"
    well_formed = UTF8_SEQUENCE.findall(strange)
    if len(well_formed) > sum(byte > 0x7F for byte in UTF8_SEQUENCE.sub(b"", strange)):
        return "utf-8"  # but for some rows, which will be refused
    sample = head[:4096] + strange
    found = from_bytes(sample, cp_isolation=CANDIDATES).best()
    if found is None and not CONTROLS.search(sample):  # a few words, full of accents
        return NAMES["cp1252"]
    if found is None or found.encoding not in NAMES:
        raise UnreadableFile("This is not a text file, or in none of UTF-8, UTF-16, Windows-1252 and Latin-1.")
    return NAMES[found.encoding]


def _strange_lines(head: bytes, file: BinaryIO) -> bytes:
    """Nothing where the whole file is UTF-8; else some of the lines that are not ASCII."""
    utf8 = codecs.getincrementaldecoder("utf-8")()
    strange, is_utf8, piece = b"", True, head
    while piece and (is_utf8 or len(strange) < SAMPLE):
        if len(strange) < SAMPLE and not piece.isascii():
            strange += b"".join(line for line in piece.splitlines(keepends=True) if not line.isascii())
        try:
            utf8.decode(piece)
        except UnicodeDecodeError:
            is_utf8 = False
        piece = file.read(SAMPLE)
    try:
        utf8.decode(b"", final=True)
    except UnicodeDecodeError:
        is_utf8 = False
    return b"" if is_utf8 else strange[:SAMPLE]


def detect_dialect(text: TextIO, known: Callable[[Sequence[str]], int]) -> Dialect:
    """The delimiter and quotes by which the first row has the most columns that are `known`, the most of the rows
    after it are as wide, and the first row has the most columns."""
    head = text.read(SAMPLE)
    if told := re.match(r"sep=([^\x00\r\n])\r?\n", head):  # as Excel writes it
        delimiters, head = told[1], head[told.end() :]
    else:
        delimiters = DELIMITERS

    quotes = '"' if '"' in head else "\"'"  # an apostrophe is one only where nothing else is

    def columns(dialect: Dialect) -> tuple[int, int, int]:
        rows = (row for row in records(io.StringIO(head, newline=""), dialect) if row)
        cells, as_wide = next(rows, []), 0
        if isinstance(cells, BrokenRecord):
            return (0, 0, 0)
        with contextlib.suppress(UnreadableFile):
            as_wide = sum(len(row) == len(cells) for row in islice(rows, 50) if not isinstance(row, BrokenRecord))
        return (known(cells), as_wide, len(cells))

    found = max((Dialect(delimiter, quote) for quote in quotes for delimiter in delimiters), key=columns)
    quote, ends = re.escape(found.quote), re.escape(found.delimiter)
    return found._replace(backslashes=bool(re.search(rf"\\{quote}(?!{quote}|{ends}|\s*[\r\n]|$)", head)))


# --- records ------------------------------------------------------------------------------------------------------


class LineReader:
    """The lines of a file for csv.reader, which asks for more than one to a record only inside of quotes."""

    def __init__(self, text: TextIO, dialect: Dialect) -> None:
        self.text, self.dialect = text, dialect
        self.escaped = re.compile(rf"\\([\\{dialect.quote}])")
        self.record: list[str] = []  # the lines of the record that is being read
        self.size = 0  # characters of them
        self.again: deque[str] = deque()  # lines to read once more
        self.credit = MAX_REREAD

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self.again:
            line = self.again.popleft()
        else:
            line = self.text.readline(MAX_RECORD)
            self.credit = min(MAX_REREAD, self.credit + 10 * len(line))
        if not line:
            if self.record:
                raise UnreadableRecord("a quote opens in this row and never closes")
            raise StopIteration
        self.record.append(line)
        self.size += len(line)
        if len(line) == MAX_RECORD or (len(self.record) > 1 and self.size > MAX_RECORD):
            while len(line) == MAX_RECORD:  # the rest of a line without end
                line = self.text.readline(MAX_RECORD)
            raise UnreadableRecord(f"is longer than {MAX_RECORD:,} characters, or a quote in it never closes")
        if self.dialect.backslashes:
            return self.escaped.sub(lambda found: "\\" if found[1] == "\\" else found[1] * 2, line)
        return line

    def begin(self) -> None:
        self.record, self.size = [], 0

    def give_back(self) -> str:
        """Only the first line of this record is at fault: let the others be read on their own."""
        first, *others = self.record
        self.credit -= self.size + 20 * len(others)
        if self.credit < 0:
            raise UnreadableFile("Row after row has a quote that does not close where it should.")
        self.again.extendleft(reversed(others))
        return first


class UnreadableRecord(Exception):
    pass


def records(text: TextIO, dialect: Dialect) -> Iterator[list[str] | BrokenRecord]:
    """The records of a CSV file (RFC 4180). One that can't be read costs its first line, not those after it."""
    lines = LineReader(text, dialect)
    reader = csv.reader(lines, delimiter=dialect.delimiter, quotechar=dialect.quote)
    width = 0
    while True:
        lines.begin()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except (UnreadableRecord, csv.Error) as error:
            yield BrokenRecord(lines.give_back(), str(error))
            continue
        if cells and not width:
            width = len(cells)
        if len(cells) != width and len(lines.record) > 1:
            yield BrokenRecord(lines.give_back(), "a quote in this row does not close where it should")
        else:
            yield cells


# --- writing ------------------------------------------------------------------------------------------------------

# What a spreadsheet would run (OWASP, "CSV Injection"). An apostrophe before it makes it text there; whoever reads it
# back takes one away, and only from what looks so.
SUSPECT = frozenset("'=+-@\t\r")
FORMULA, GUARDED = re.compile(r"'*[=+\-@\t\r]"), re.compile(r"''*[=+\-@\t\r]")


def escape_formula(text: str) -> str:
    return f"'{text}" if FORMULA.match(text) else text


def unescape_formula(text: str) -> str:
    return text[1:] if GUARDED.match(text) else text


def to_csv(rows: Iterable[Sequence[object]]) -> str:
    """Rows as RFC 4180 has them. Texts are guarded, numbers are not."""
    buffer = io.StringIO(newline="")
    # Few cells begin so that it is worth to look closer.
    csv.writer(buffer).writerows(
        [escape_formula(cell) if type(cell) is str and cell[:1] in SUSPECT else cell for cell in row] for row in rows
    )
    return buffer.getvalue()


class InvalidCell(Exception):
    """A value that can't be taken, and why."""

    def __init__(self, field_name: str, value: str, message: str) -> None:
        super().__init__(message)
        self.field, self.value, self.message = field_name, value, message


def describe_cell_error(error: Any, value: str) -> str:
    """Why pydantic refused this cell, as the error of its row."""
    if any("\udc80" <= c <= "\udcff" for c in value):
        return "has bytes that the encoding of the file has not"
    return "is missing" if not value else schemas.describe_error(error)


def repair_isbn(text: str) -> str | None:
    """The ISBN as 13 digits: also one that lost its leading zeros to a spreadsheet, if its check digit then fits."""
    if schemas.is_isbn13(text):
        return text
    if re.fullmatch(r"[\d.]+e\+?\d+", text, re.IGNORECASE):  # 9.78043902348e+12 has lost its last digits
        return None
    compact = re.sub(r"[\s-]|\.0$", "", text)
    if re.fullmatch(r"\d{6,8}[\dXx]", compact):
        compact = compact.zfill(10)
    try:
        return str(isbn_numbers.validate(compact, convert=True))
    except isbn_numbers.ValidationError:
        return None


def decimal_point(name: str, text: str) -> str:
    """`12,50` as `12.50`. With both signs in it, the last one is the decimal one."""
    if "," not in text:
        return text
    if re.fullmatch(r"\d{1,3}(\.\d{3})*,\d{1,2}|\d+,\d{1,2}", text):
        return text.replace(".", "").replace(",", ".")
    if re.fullmatch(r"\d{1,3}(,\d{3})+\.\d{1,2}", text):
        return text.replace(",", "")
    raise InvalidCell(name, text, "may be a decimal comma or one between thousands")


MONTHS = {
    name: number
    for number, names in enumerate(
        "january february march april may june july august september october november december".split(), start=1
    )
    for name in (names, names[:3])
} | {"sept": 9}


def read_date(name: str, text: str, day_first: Callable[[], bool | None]) -> tuple[date | None, int | None]:
    """A full date, or only the year where the text does not tell the day."""
    try:
        if found := re.fullmatch(r"(\d{4})[-/.](\d{1,2})[-/.](\d{1,2})", text):
            return date(*map(int, found.groups())), None
        if found := re.fullmatch(r"(\d{1,2})\.(\d{1,2})\.(\d{4})", text):
            return date(int(found[3]), int(found[2]), int(found[1])), None
        if found := SLASHED.fullmatch(text):
            first, second, year = map(int, found.groups())
            if first <= 12 and second <= 12 and first != second:
                told = day_first()
                if told is None:
                    raise InvalidCell(name, text, "may be day first or month first, and no other row of the file tells")
            else:
                told = first > 12 or second <= 12
            return date(year, *((second, first) if told else (first, second))), None
        if found := re.fullmatch(r"-?\d{1,4}(?:\.0+)?", text):
            return None, int(float(text))
        if found := re.fullmatch(r"(\d{4})-(\d\d)", text):
            return None, int(found[1])
        if found := re.fullmatch(r"(?:(\d{1,2})\.? )?([A-Za-z]+)\.?(?: (\d{1,2})(?:st|nd|rd|th)?,)?,? (\d{4})", text):
            month = MONTHS.get(found[2].lower())
            day = found[1] or found[3]
            if month is not None and not (found[1] and found[3]):
                return (date(int(found[4]), month, int(day)), None) if day else (None, int(found[4]))
    except ValueError:
        raise InvalidCell(name, text, "is no day of the calendar") from None
    raise InvalidCell(name, text, "is not a date like 2008-08-11")


SLASHED = re.compile(r"(\d{1,2})[/-](\d{1,2})[/-](\d{4})")


def which_comes_first(dates: Sequence[str]) -> tuple[bool, bool]:
    """Whether any of these dates can only be day first, and whether any can only be month first."""
    pairs = [(int(found[1]), int(found[2])) for text in dates if (found := SLASHED.fullmatch(text.strip()))]
    return any(first > 12 for first, _ in pairs), any(second > 12 for _, second in pairs)


def unescape(text: str) -> str:
    """HTML's `&amp;` and `&#38;` as the characters that they stand for."""
    try:
        return html.unescape(text)
    except ValueError:  # a number with more digits than Python converts
        return text


def from_html(text: str) -> str:
    """A review as text: Goodreads and StoryGraph keep them as HTML."""
    broken = re.sub(r"<br\s*/?>", "\n", text, flags=re.IGNORECASE)
    return unescape(re.sub(r"</?[a-zA-Z][^<>]*>", "", broken)).strip()


def to_html(text: str) -> str:
    return html.escape(text, quote=False).replace("\n", "<br/>")


def strip_invalid(text: str) -> str:
    """`text` as it came, but for what no database takes: NUL, and bytes without a meaning."""
    return text.replace("\x00", "").encode("utf-8", "replace").decode()


def printable(text: str, most: int = 200) -> str:
    """`text` as it can be stored and shown: bytes without a meaning and control characters replaced."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text[:most])


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


MAX_COLUMNS = 500  # those of Goodreads, StoryGraph and ours are thirty; each name is kept, and shown with the upload


class ColumnMapping(NamedTuple):
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


def read_header(cells: Sequence[str], *, enrich: bool = False) -> ColumnMapping:
    """Which column is which. To enrich them, rows need no more than an ISBN."""
    if len(cells) > MAX_COLUMNS:
        raise UnreadableFile(
            f"The first row has {len(cells):,} columns; at most {MAX_COLUMNS} are read. {describe_header(cells)}"
        )
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
        raise UnreadableFile(f"The first row names no column for {' and '.join(missing)}. {describe_header(cells)}")
    known = {i for found in fields.values() for i in found}
    ignored = [printable(c, 100) for i, c in enumerate(cells) if i not in known]
    ours = kind == Format.own or (kind == Format.goodreads and set(_keys(OUR_COLUMNS)) <= set(keys))
    return ColumnMapping(kind, list(cells), fields, ignored, ours, given_back or ours)


def describe_header(cells: Sequence[str]) -> str:
    return f"It has: {', '.join(repr(printable(cell, 40)) for cell in cells[:20])}."


# What may be looked up by ISBN where a row does not say it.
LOOKED_UP = {"title", "author", "genre", "publisher", "pages", "cover_url", "publication_year"}

# --- rows ---------------------------------------------------------------------------------------------------------


class RowIssue(NamedTuple):
    field: str | None
    value: str
    message: str


class ShelfData(NamedTuple):
    """A place on a shelf, as the file tells it: what it does not tell is None, and is not made up."""

    status: ShelfStatus
    rating: int | None
    review: str | None
    tags: list[str]
    started_at: datetime | None
    finished_at: datetime | None
    added_at: datetime | None


@dataclass
class ImportRow:
    number: int  # as a spreadsheet counts: the header is row 1
    cells: Sequence[str]
    book: Any = None  # a FileBook, which has the fields of a BookBase
    told: set[str] = field(default_factory=set)  # the fields of the book that the row has
    values: dict[str, Any] = field(default_factory=dict)  # what it says of them
    wanted: str | None = None  # the ISBN to look up before it is decided whether the row is good
    filled: set[str] = field(default_factory=set)  # the fields that were looked up
    entry: ShelfData | None = None
    problems: list[RowIssue] = field(default_factory=list)

    def refuse(self, field_name: str | None, value: str, message: str) -> "ImportRow":
        self.book, self.wanted, self.problems = None, None, [RowIssue(field_name, value, message)]
        return self


# The fields and rules of a new book, without SQLModel's own constructor, which takes longer than all of them.
FILE_BOOK: dict[str, Any] = {name: (info.annotation, info) for name, info in BookBase.model_fields.items()}
FileBook: Any = create_model("FileBook", **FILE_BOOK)
MOMENT: TypeAdapter[datetime] = TypeAdapter(Timestamp)


class RowParser:
    """Makes rows of cells. `day_first` tells, for a date like 03/04/2008, what the other rows of the file say."""

    def __init__(self, columns: ColumnMapping, day_first: Callable[[], bool | None], *, enrich: bool = False) -> None:
        self.columns, self.day_first, self.enrich = columns, day_first, enrich
        self.width = len(columns.header)
        book_fields = [(name, columns.fields[name]) for name in ALIASES if name in columns.fields]
        self.fields = [(name, found[0]) for name, found in book_fields]
        self.as_html = columns.fields.get("review", [])
        self.others = [(name, found[1:]) for name, found in book_fields if len(found) > 1]

    def row(self, number: int, cells: Sequence[str]) -> ImportRow:
        row = ImportRow(number, cells)
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
                RowIssue(name, given.get(name, ""), describe_cell_error(e, given.get(name, "")))
                for e in error.errors(include_url=False)
                for name in (str(e["loc"][0]),)
            ]
            return row
        except InvalidCell as error:
            return row.refuse(error.field, error.value, error.message)
        if self.columns.format.has_shelf:
            self._read_entry(row, cells)
        return row

    def _clean(self, cells: Sequence[str]) -> list[str]:
        values = [cell.strip() for cell in cells]
        if self.columns.guarded:
            values = [unescape_formula(value) for value in values]
        if not self.columns.ours and ("&" in (line := "".join(values)) or '="' in line):
            values = [value if i in self.as_html else self._plain(value) for i, value in enumerate(values)]
        return values

    def _plain(self, value: str) -> str:
        if value.startswith('="') and value.endswith('"'):  # Excel's text
            value = value[2:-1].strip()
        if "&" in value:
            value = re.sub(r"&(?:#\d+|#x[0-9a-fA-F]+|\w+);", lambda found: unescape(found[0]), value).strip()
        return value

    def _mend_isbn(self, row: ImportRow, cells: Sequence[str], values: dict[str, Any]) -> None:
        if is_isbn13(values["isbn"]):
            return
        isbns = [cells[i] for i in self.columns.fields["isbn"] if cells[i]]
        values.pop("isbn")
        if isbn := next(filter(None, map(repair_isbn, isbns)), None):
            values["isbn"] = isbn
        elif self.columns.format != Format.storygraph:  # whose column holds ids of its own, too
            message = "is not an ISBN, nor can it be mended; the book is in without it"
            row.problems.append(RowIssue("isbn", isbns[0], message))

    def _read_numbers_and_dates(self, values: dict[str, Any]) -> set[str]:
        """Read them in place; the fields that the row tells, which a year that is only the date's is not."""
        for name in ("publication_year", "pages"):
            if name in values:
                if re.fullmatch(r"\d{1,3}([.,]\d{3})+", values[name]):
                    raise InvalidCell(name, values[name], "may have a decimal sign or one between thousands")
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

    def _read_entry(self, row: ImportRow, cells: Sequence[str]) -> None:
        told = {
            name: _first(cells, found)
            for name, found in self.columns.fields.items()
            if name not in ALIASES and name != "additional"
        }
        try:
            row.entry = self._entry(row, told)
        except InvalidCell as error:
            row.refuse(error.field, error.value, error.message)

    def _entry(self, row: ImportRow, told: dict[str, str]) -> ShelfData:
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
                    row.problems.append(RowIssue(name, str(value), message))
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
            raise InvalidCell(name, told.get(name, ""), describe_cell_error(first, "x")) from None
        return ShelfData(status, rating, checked.review, checked.tags or [], **moments)

    def _rating(self, row: ImportRow, text: str) -> int | None:
        if not text:
            return None
        try:
            stars = float(text.replace(",", "."))
        except ValueError:
            stars = math.nan
        if not 0 <= stars <= 5:
            raise InvalidCell("rating", text, "must be a number from 0, for none, to 5")
        if stars == 0:
            return None
        rounded = max(1, math.floor(stars + 0.5))
        if rounded != stars:
            row.problems.append(RowIssue("rating", text, f"is not a whole star: rounded to {rounded}"))
        return rounded

    def _moment(self, name: str, text: str | None) -> datetime | None:
        if not text:
            return None
        told = text
        if not re.match(r"\d{4}-\d\d-\d\d[T ]", text):
            day, _ = read_date(name, text, self.day_first)
            if day is None:
                raise InvalidCell(name, text, "is not a full date")
            told = day.isoformat()
        try:
            return MOMENT.validate_python(told)
        except ValidationError as error:
            raise InvalidCell(name, text, describe_cell_error(error.errors(include_url=False)[0], text)) from None


def _first(cells: Sequence[str], found: Sequence[int]) -> str:
    return next((cells[i] for i in found if cells[i]), "")
