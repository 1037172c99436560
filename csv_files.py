"""CSV files: encoding, dialect, records, cells, and the columns of each known format."""

import calendar
import codecs
import csv
import functools
import html
import io
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from itertools import chain, islice, takewhile
from typing import Any, NamedTuple, TextIO

from stdnum import isbn as isbn_numbers

import models
from models import ShelfStatus
from schemas import BookBase, EntryUpdate, Timestamp
from settings import STATIC

MAX_RECORD = 2_000_000  # characters of a record; a longer one is mostly due to a quote that never closes
MAX_CELLS = 1000  # of a record
MAX_REREAD = 200_000_000  # characters of lines that are parsed again, with 20 more for each line: some two seconds
SAMPLE = 256 * 1024  # bytes of a file that are examined
# In Windows-1252, with what it leaves undefined.
CONTROLS = re.compile(rb"[\x00-\x08\x0e-\x1f\x7f\x81\x8d\x8f\x90\x9d]")
UTF8_SEQUENCE = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")
csv.field_size_limit(MAX_RECORD)  # 128 KB by default

# Undecodable bytes become half a surrogate pair, which no text has, and in the end U+FFFD, with a warning.
UNDECODABLE = "undecodable"
codecs.register_error(UNDECODABLE, lambda error: ("\udcff", error.end))  # type: ignore[attr-defined]  # decoding errors have it


class UnreadableFile(Exception):
    """No row of this file can be read. Its owner sees the message."""


class BrokenRecord(NamedTuple):
    """Stands for a record that can't be parsed."""

    line: str  # its first
    reason: str


class Dialect(NamedTuple):
    delimiter: str = ","
    quote: str = '"'
    skip_blanks: bool = False  # before a cell, and so before its quote
    backslashes: bool = False  # whether quotes are escaped as `\"` (MySQL) as well as by doubling


# --- encoding and dialect -----------------------------------------------------------------------------------------


def detect_encoding(file: io.BufferedReader) -> str:
    """By the byte order mark; else UTF-8, unless most of what is not ASCII is invalid in it; else Windows-1252."""
    head = file.peek(3)
    if head.startswith(codecs.BOM_UTF8):
        return "utf-8-sig"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if 0 in head[:2]:  # UTF-16 without its mark, with an ASCII character first
        return "utf-16-le" if head[0] else "utf-16-be"
    sample = bytearray()  # lines that are not ASCII
    while len(sample) < SAMPLE and (line := file.readline(SAMPLE)):
        if not line.isascii():
            sample += line
    rest, valid = UTF8_SEQUENCE.subn(b"", sample)
    invalid = sum(byte > 0x7F for byte in rest)
    if valid > invalid or not invalid:
        return "utf-8"
    if 50 * len(CONTROLS.findall(sample)) > len(sample):
        raise UnreadableFile("This is not a text file, or not in UTF-8, UTF-16 or Windows-1252.")
    return "windows-1252"


def detect_dialect(text: TextIO) -> Dialect:
    """By the most known columns in the first row, then the most rows of its width, then the most columns."""
    head, delimiters = text.read(SAMPLE), ",;\t|"
    if excel := re.match(r"sep=([^\x00\r\n ])\r?\n", head):
        delimiters, head = excel[1], head[excel.end() :]
    quotes = '"' if '"' in head else "\"'"

    def score(dialect: Dialect) -> tuple[int, int, int]:
        rows = (row for row in records(io.StringIO(head, newline=""), dialect) if row)
        header = next(rows, [])
        if isinstance(header, BrokenRecord):
            return (0, 0, 0)
        intact = takewhile(lambda row: not isinstance(row, BrokenRecord), islice(rows, 50))
        as_wide = sum(len(row) == len(header) for row in intact)
        return (sum(key in KNOWN_COLUMNS for key in column_keys(header)), as_wide, len(header))

    skips = (False, True) if re.search(r"[,;\t|] +[\"']", head) else (False,)
    best = max((Dialect(d, quote, skip) for skip in skips for quote in quotes for d in delimiters), key=score)
    quote, delimiter = re.escape(best.quote), re.escape(best.delimiter)
    return best._replace(backslashes=bool(re.search(rf"\\{quote}(?!{quote}|{delimiter}|\s*[\r\n]|$)", head)))


# --- records ------------------------------------------------------------------------------------------------------


class LineReader:
    """Lines for csv.reader, which reads more than one for a record only within quotes."""

    def __init__(self, text: TextIO, dialect: Dialect) -> None:
        self.text = text
        self.escaped = re.compile(rf"\\([\\{dialect.quote}])") if dialect.backslashes else None
        before, quote = re.escape(dialect.delimiter), dialect.quote
        blanks = " *" if dialect.skip_blanks else ""
        # As csv.reader has it, a quote opens only at the beginning of a cell.
        self.quoted = re.compile(rf"(?<![^{before}]){blanks}{quote}(?:[^{quote}]++|{quote}{quote})*+{quote}?")
        self.dialect = dialect
        self.record: list[str] = []  # the lines of the current record
        self.uncounted, self.cells = "", 0  # its last lines, and the cells before them
        self.again: list[str] = []  # lines to parse again, the next one last
        self.size, self.reread = 0, 0  # characters of the record, and of all lines that were parsed again

    def next_line(self) -> str:
        """Empty at the end of the file."""
        if self.again:
            line = self.again.pop()
        else:
            line = rest = self.text.readline(MAX_RECORD)
            while len(rest) == MAX_RECORD and rest[-1] not in "\r\n":  # the rest of such a line is dropped
                rest = self.text.readline(MAX_RECORD)
        if not line and self.record:
            raise csv.Error("a quote opens in this row and never closes")
        self.record.append(line)
        self.size += len(line)
        if self.size >= MAX_RECORD:
            raise csv.Error(f"is longer than {MAX_RECORD:,} characters, or a quote in it never closes")
        if self.escaped:
            line = self.escaped.sub(lambda found: "\\" if found[1] == "\\" else found[1] * 2, line)
        if len(self.record) == 1:
            self.uncounted, self.cells = "", 1
        self.uncounted += line
        if len(self.uncounted) > MAX_CELLS:  # before they become a list: 2 MB of commas took 40 times as much memory
            self.cells += self.quoted.sub("", self.uncounted).count(self.dialect.delimiter)
            self.uncounted = self.dialect.quote  # in which another line of this record would begin
            if self.cells > MAX_CELLS:
                raise csv.Error(f"has more than {MAX_CELLS:,} cells")
        return line

    def reject_first_line(self) -> str:
        """The first line of a broken record. The others are parsed again, as records of their own."""
        first, *others = self.record
        self.reread += self.size - len(first) + 20 * len(others)
        if self.reread > MAX_REREAD:
            raise UnreadableFile("Too many rows have a quote that does not close where it should.")
        self.again.extend(reversed(others))
        return first


def records(text: TextIO, dialect: Dialect) -> Iterator[list[str] | BrokenRecord]:
    """The records of a CSV file (RFC 4180). Of one that can't be parsed only the first line is lost."""
    lines = LineReader(text, dialect)
    options: Any = {"delimiter": dialect.delimiter, "quotechar": dialect.quote, "skipinitialspace": dialect.skip_blanks}
    reader = csv.reader(iter(lines.next_line, ""), **options)
    width = 0
    while True:
        lines.record, lines.size = [], 0
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield BrokenRecord(lines.reject_first_line(), str(error))
            continue
        if len(cells) == 1 != width and cells[0].count(dialect.delimiter) < MAX_CELLS:  # quoted as a whole, then `;`
            inner = [*islice(csv.reader(io.StringIO(cells[0].rstrip("; "), newline=""), **options), 2)]
            if len(inner) == 1 and len(inner[0]) == (width or max(2, len(inner[0]))):
                cells = inner[0]
        if cells and not width:
            header, *first = split_header(cells)
            width = len(header) if header[0] != "sep=" else 0
            yield from (header, *first)
        elif len(cells) != width and len(lines.record) > 1:
            yield BrokenRecord(lines.reject_first_line(), "a quote in this row does not close where it should")
        else:
            yield cells


# The last columns of Goodreads (today's and older exports), StoryGraph, LibraryThing and BookWyrm.
HEADER_END = re.compile(r"(Owned Copies|BCID|Owned\?|Lending End|shelf_date)(.+)", re.DOTALL)


def split_header(cells: list[str]) -> list[list[str]]:
    """The header, and the first row if no line break separates the two."""
    middle = len(cells) // 2
    found = HEADER_END.fullmatch(cells[middle]) if len(cells) % 2 else None
    return [[*cells[:middle], found[1]], [found[2], *cells[middle + 1 :]]] if found else [cells]


# --- writing ------------------------------------------------------------------------------------------------------

# Where a spreadsheet would run what follows (OWASP, "CSV Injection"): at the beginning of a cell, also where one begins
# only if other delimiters or quotes are assumed. An apostrophe there makes it text; reading removes one.
FORMULA_START = r"(?:(?<![^,;|\t\r\n]){}(?=[\"']*[=+\-@])|^{}(?=[\"']*[\t\r\n]))"
WITHIN = re.compile(r"[,;|\t\r\n][\"']*[=+\-@]")  # this search takes a fifth of the time of the other
UNESCAPED, ESCAPED = (re.compile(FORMULA_START.format(prefix, prefix)) for prefix in ("", "'"))


def escape_formula(text: str) -> str:
    return UNESCAPED.sub("'", text) if text[:1] in "\"'=+-@\t\r\n" or WITHIN.search(text) else text


def unescape_formula(text: str) -> str:
    return ESCAPED.sub("", text) if "'" in text else text


def to_csv(rows: Iterable[Sequence[object]]) -> str:
    """Rows as RFC 4180 has them. Formulas in texts are escaped; numbers are as they are."""
    buffer = io.StringIO(newline="")
    write_row = csv.writer(buffer).writerow
    for row in rows:
        write_row([escape_formula(cell) if type(cell) is str else cell for cell in row])
    return buffer.getvalue()


def as_csv(header: Sequence[str], batches: Iterable[Sequence[Any]], cells: Callable[[Any], Any]) -> Iterator[str]:
    return map(to_csv, chain([[header]], (map(cells, rows) for rows in batches)))


def price_cell(cents: float | None) -> str:
    return "" if cents is None else f"{cents / 100:.15g}"  # 9, not 9.0


def strip_invalid(text: str) -> str:
    """`text` without what no database takes: NUL, and undecodable bytes."""
    return text.replace("\x00", "").encode("utf-8", "replace").decode()


def printable(text: str, most: int = 200) -> str:
    """`text` as it can be stored and shown: control characters and undecodable bytes replaced."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text[:most])


# --- cells --------------------------------------------------------------------------------------------------------


class InvalidCell(Exception):
    """A value that can't be read, and why: a sentence that begins with the value."""


def repair_isbn(text: str) -> str | None:
    """The ISBN as 13 digits: also one that lost its leading zeros to a spreadsheet, if its check digit then fits."""
    compact = re.sub(r"[\s\[\]-]|\.0$", "", text)
    if re.fullmatch(r"\d{6,8}[\dXx]", compact):
        compact = compact.zfill(10)
    try:
        return str(isbn_numbers.validate(compact, convert=True))
    except isbn_numbers.ValidationError:
        return None


def read_price(text: str) -> str:
    """`12,50` as `12.50`. Of comma and point, the last is the decimal one."""
    if "," not in text:
        return text
    if re.fullmatch(r"\d{1,3}(\.\d{3})*,\d{1,2}|\d+,\d{1,2}", text):
        return text.replace(".", "").replace(",", ".")
    if re.fullmatch(r"\d{1,3}(,\d{3})+\.\d{1,2}", text):
        return text.replace(",", "")
    raise InvalidCell("has a comma that may be a decimal comma or one between thousands")


def read_number(text: str) -> str:
    """`374.0` as `374`: a number that a spreadsheet took for a float."""
    if re.fullmatch(r"\d{1,3}([.,]\d{3})+", text):
        raise InvalidCell("has a decimal sign or one between thousands")
    return re.sub(r"[.,]0+$", "", text)


def read_rating(text: str) -> float | None:
    """The nearest quarter of a star; None for 0."""
    stars = float(text.replace(",", ".")) if re.fullmatch(r"\d+([.,]\d*)?", text) else -1
    if not 0 <= stars <= 5:
        raise InvalidCell("is not a rating from 0.25 to 5")
    return max(0.25, models.to_quarters(stars)) if stars else None


READERS: dict[str, Callable[[str], str]] = {"publication_year": read_number, "pages": read_number, "price": read_price}
SLASHED = re.compile(r"(\d{1,2})([/-])(\d{1,2})\2(\d{4}|(?<=/)\d\d)")
MONTHS = {name.lower(): n for names in (calendar.month_name, calendar.month_abbr) for n, name in enumerate(names) if n}
MONTHS["sept"] = 9


def day_comes_first(text: str) -> bool | None:
    """True for dates like 13/04/2008, False for those like 04/13/2008, None for any other text."""
    found = SLASHED.fullmatch(text)
    first, second = (int(found[1]) > 12, int(found[3]) > 12) if found else (False, False)
    return first if first != second else None


def full_year(digits: str, *, short: bool) -> int:
    """Of two digits, which only `short` allows: never in the future, nor before 1950."""
    year = int(digits)
    if len(digits) == 2:
        year += 2000 if 2000 + year <= models.utcnow().year else 1900
        if year < 1950 or not short:
            raise InvalidCell("has a year of two digits, which may be in another century")
    return year


def read_date(
    text: str, day_first: Callable[[], bool | None], *, short: bool = False
) -> tuple[date | None, int | None]:
    """A full date, or only the year where the text has no day."""
    try:
        if found := re.fullmatch(r"(\d{4})[-/.](\d{1,2})[-/.](\d{1,2})", text):
            return date(*map(int, found.groups())), None
        if found := re.fullmatch(r"(\d{1,2})\.(\d{1,2})\.(\d{4}|\d\d)", text):
            return date(full_year(found[3], short=short), int(found[2]), int(found[1])), None
        if found := SLASHED.fullmatch(text):
            first, second, year = int(found[1]), int(found[3]), full_year(found[4], short=short)
            is_day = day_first() if max(first, second) <= 12 and first != second else first > 12
            if is_day is None:
                raise InvalidCell("may be day first or month first, and no other date of the file shows which")
            return date(year, *((second, first) if is_day else (first, second))), None
        if found := re.fullmatch(r"(-?\d{1,4})(?:\.0+)?|(\d{4})-\d\d", text):
            return None, int(found[1] or found[2])
        if found := re.fullmatch(r"(?:(\d{1,2})\.? )?([A-Za-z]+)\.?(?: (\d{1,2})(?:st|nd|rd|th)?,)?,? (\d{4})", text):
            month, day = MONTHS.get(found[2].lower()), found[1] or found[3]
            if month is not None and not (found[1] and found[3]):
                return (date(int(found[4]), month, int(day)), None) if day else (None, int(found[4]))
    except ValueError:
        raise InvalidCell("is not a day of the calendar") from None
    raise InvalidCell("is not a date like 2008-08-11")


def unescape_html(text: str) -> str:
    return re.sub(r"&(?:#\d{1,7}|#x[0-9a-fA-F]{1,6}|\w+);", lambda found: html.unescape(found[0]), text)


def unescape_cell(value: str) -> str:
    if value.startswith('="') and value.endswith('"'):  # Excel's text
        value = value[2:-1].strip()
    if "&" in value:
        value = unescape_html(value).strip()
    return value


def from_html(text: str) -> str:
    """A review as text: Goodreads and StoryGraph have HTML."""
    broken = re.sub(r"<br\s*/?>|</(p|div|li|h\d|blockquote)>", "\n", text, flags=re.IGNORECASE)
    return unescape_html(re.sub(r"</?[a-zA-Z][a-zA-Z0-9]*(\s[^<>]*)?/?>", "", broken)).strip()


def to_html(text: str) -> str:
    return html.escape(text, quote=False).replace("\n", "<br/>")


# --- columns ------------------------------------------------------------------------------------------------------

BOOK_COLUMNS = [*BookBase.model_fields]  # of our own export of the catalogue
COLUMNS = tomllib.loads((STATIC / "columns.toml").read_text("utf-8"))  # which explains them
GOODREADS_COLUMNS, OUR_COLUMNS, SHELF_FORMATS = COLUMNS["goodreads"], COLUMNS["ours"], COLUMNS["formats"]
ALIASES, SHELF_ALIASES = COLUMNS["aliases"], COLUMNS["shelf_aliases"]
SHELVES = {name: ShelfStatus(status) for name, status in COLUMNS["shelves"].items()}
REASON = "reason"  # the column that is added to refused rows
MAX_COLUMNS = 500  # exports of Goodreads, StoryGraph and ours have thirty; each name is stored with the upload
FORMATS = {"books": ALIASES} | {
    name: ALIASES | {key: tuple(names[n].split()) for key, names in SHELF_ALIASES.items() if names[n]}
    for n, name in enumerate(SHELF_FORMATS)
}
KNOWN_COLUMNS = {alias for fields in FORMATS.values() for names in fields.values() for alias in names}


@functools.lru_cache(1000)
def shelf_status(shelf: str) -> ShelfStatus | None:
    return SHELVES.get(re.sub(r"[\s_]+", "-", re.sub("['\u2019]", "", shelf.lower())))


class ColumnMapping(NamedTuple):
    format: str  # books, books-api (our own export of the catalogue), or one of SHELF_FORMATS
    header: list[str]
    fields: dict[str, list[int]]  # the columns of each field, the one that counts first
    ignored: list[str]
    ours: bool  # whether it is an export of this service, which is taken as it is
    escaped: bool  # whether apostrophes precede formulas


def column_keys(cells: Sequence[str]) -> list[str]:
    return [re.sub(r"[\s_-]", "", cell).casefold() for cell in cells]


def read_header(cells: Sequence[str], *, enrich: bool, shelve: bool) -> ColumnMapping:
    """Which column is which. With `enrich`, an ISBN will do; `shelve` needs the format of a shelf."""
    shown = f"It has: {', '.join(repr(printable(cell, 40)) for cell in cells[:20])}."
    if len(cells) > MAX_COLUMNS:
        raise UnreadableFile(f"The first row has {len(cells):,} columns, more than {MAX_COLUMNS}. {shown}")
    has_reason, keys = cells[-1:] == [REASON], column_keys(cells)
    needed, fields = ("author", "status", "rating"), dict[str, list[int]]()
    shelves = (name for name in SHELF_FORMATS if all({*FORMATS[name][field]} & {*keys} for field in needed))
    kind = next(shelves, "books")
    for name, names in FORMATS[kind].items():
        if found := [i for alias in names for i, key in enumerate(keys) if key == alias]:
            fields[name] = found
    if [cell for cell in cells if cell != REASON] == BOOK_COLUMNS:
        kind = "books-api"
    missing = [name for name in ("title", "author") if name not in fields]
    if missing and len(cells) == len(GOODREADS_COLUMNS) and shelf_status(cells[18].strip()):
        raise UnreadableFile(
            "This looks like Goodreads' columns without their header. Add this line before the first, and upload it"
            f" again: {','.join(GOODREADS_COLUMNS)}"
        )
    if missing and not (enrich and "isbn" in fields):
        raise UnreadableFile(f"The first row has no column for {' and '.join(missing)}. {shown}")
    if shelve and kind not in SHELF_FORMATS:
        raise UnreadableFile(f"This is no shelf of Goodreads, StoryGraph, LibraryThing or BookWyrm. {shown}")
    mapped = {i for found in fields.values() for i in found}
    ignored = [printable(cell, 100) for i, cell in enumerate(cells) if i not in mapped]
    ours = kind == "books-api" or (kind == "goodreads" and set(column_keys(OUR_COLUMNS)) <= {*keys, "currentpage"})
    return ColumnMapping(kind, list(cells), fields, ignored, ours, has_reason or ours)


# --- rows ---------------------------------------------------------------------------------------------------------

# What is looked up by ISBN where a row does not have it.
LOOKED_UP = {"title", "author", "genre", "publisher", "pages", "cover_url", "publication_year"}


class ShelfData(EntryUpdate):
    """An entry of a shelf. What the file does not have is None."""

    status: Any = None  # a ShelfStatus
    added_at: Timestamp | None = None


class RowIssue(NamedTuple):
    field: str | None
    value: str
    message: str


@dataclass
class ImportRow:
    number: int  # as a spreadsheet counts: the header is row 1
    cells: Sequence[str]
    book: Any = None  # a BookCreate; None if the row is refused, or has to be looked up
    values: dict[str, Any] = field(default_factory=dict)  # the fields of the book, not validated
    has_bad_isbn: bool = False  # which was left out
    lookup_isbn: str | None = None  # to look up before the row can become a book
    looked_up: set[str] = field(default_factory=set)  # the fields that were found by it
    entry: Any = None  # a ShelfData, in a file of a shelf
    issues: list[RowIssue] = field(default_factory=list)
    key: Any = None  # by which the import recognises duplicates
    outcome: str = "skipped"  # or inserted, updated, failed

    def refuse(self, field_name: str | None, value: str, message: str) -> "ImportRow":
        # Earlier warnings do not matter any more.
        self.book, self.lookup_isbn, self.issues, self.outcome = None, None, [], "failed"
        return self.warn(field_name, value, message)

    def warn(self, field_name: str | None, value: str, message: str) -> "ImportRow":
        self.issues.append(RowIssue(field_name, value, message))
        return self
