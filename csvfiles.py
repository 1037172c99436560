"""CSV files as they come: their encoding, delimiter and quotes are found by looking; their records, read one by one."""

import codecs
import contextlib
import csv
import io
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import BinaryIO, NamedTuple, TextIO

from charset_normalizer import from_bytes

RECORD_MAX = 2_000_000  # characters; a record that is longer has lost its way, mostly by a quote that never closes
# What reading lines once more may cost, in characters, with twenty for each line: some seconds. What is read for the
# first time gives ten times its length back. Else a file where each row opens a quote would be read as often as it has
# rows.
REREAD_MAX = 20_000_000
SAMPLE = 256 * 1024  # bytes of a file that are looked at
DELIMITERS = ",;\t|"
BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
CANDIDATES = ["utf_8", "utf_16_le", "utf_16_be", "cp1252", "latin_1"]
NAMES = {"cp1252": "windows-1252", "latin_1": "iso-8859-1", "utf_16_le": "utf-16-le", "utf_16_be": "utf-16-be"}
CONTROLS = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x81\x8d\x8f\x90\x9d]")  # in Windows-1252
UTF8_SEQUENCE = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")
# Python's csv gives up at 128 KB otherwise.
csv.field_size_limit(RECORD_MAX)


# Bytes without a meaning in the encoding become half a surrogate pair, which no text has, and no database takes: so the
# row that has them is refused, and not the file.
MEANINGLESS = "meaningless"
codecs.register_error(MEANINGLESS, lambda error: ("\udcff", error.end))  # type: ignore[attr-defined]  # decoding errors have it


class UnreadableFile(Exception):
    """No row of this file can be read. The message is for who sent it."""


class Broken(NamedTuple):
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
        if isinstance(cells, Broken):
            return (0, 0, 0)
        with contextlib.suppress(UnreadableFile):
            as_wide = sum(len(row) == len(cells) for row in islice(rows, 50) if not isinstance(row, Broken))
        return (known(cells), as_wide, len(cells))

    found = max((Dialect(delimiter, quote) for quote in quotes for delimiter in delimiters), key=columns)
    quote, ends = re.escape(found.quote), re.escape(found.delimiter)
    return found._replace(backslashes=bool(re.search(rf"\\{quote}(?!{quote}|{ends}|\s*[\r\n]|$)", head)))


# --- records ------------------------------------------------------------------------------------------------------


class Lines:
    """The lines of a file for csv.reader, which asks for more than one to a record only inside of quotes."""

    def __init__(self, text: TextIO, dialect: Dialect) -> None:
        self.text, self.dialect = text, dialect
        self.escaped = re.compile(rf"\\([\\{dialect.quote}])")
        self.record: list[str] = []  # the lines of the record that is being read
        self.size = 0  # characters of them
        self.again: deque[str] = deque()  # lines to read once more
        self.credit = REREAD_MAX

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self.again:
            line = self.again.popleft()
        else:
            line = self.text.readline(RECORD_MAX)
            self.credit = min(REREAD_MAX, self.credit + 10 * len(line))
        if not line:
            if self.record:
                raise BrokenRecord("a quote opens in this row and never closes")
            raise StopIteration
        self.record.append(line)
        self.size += len(line)
        if len(line) == RECORD_MAX or (len(self.record) > 1 and self.size > RECORD_MAX):
            while len(line) == RECORD_MAX:  # the rest of a line without end
                line = self.text.readline(RECORD_MAX)
            raise BrokenRecord(f"is longer than {RECORD_MAX:,} characters, or a quote in it never closes")
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


class BrokenRecord(Exception):
    pass


def records(text: TextIO, dialect: Dialect) -> Iterator[list[str] | Broken]:
    """The records of a CSV file (RFC 4180). One that can't be read costs its first line, not those after it."""
    lines = Lines(text, dialect)
    reader = csv.reader(lines, delimiter=dialect.delimiter, quotechar=dialect.quote)
    width = 0
    while True:
        lines.begin()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except (BrokenRecord, csv.Error) as error:
            yield Broken(lines.give_back(), str(error))
            continue
        if cells and not width:
            width = len(cells)
        if len(cells) != width and len(lines.record) > 1:
            yield Broken(lines.give_back(), "a quote in this row does not close where it should")
        else:
            yield cells


# --- writing ------------------------------------------------------------------------------------------------------

# What a spreadsheet would run (OWASP, "CSV Injection"). An apostrophe before it makes it text there; whoever reads it
# back takes one away, and only from what looks so.
SUSPECT = frozenset("'=+-@\t\r")
FORMULA, GUARDED = re.compile(r"'*[=+\-@\t\r]"), re.compile(r"''*[=+\-@\t\r]")


def guard(text: str) -> str:
    return f"'{text}" if FORMULA.match(text) else text


def unguard(text: str) -> str:
    return text[1:] if GUARDED.match(text) else text


def to_csv(rows: Iterable[Sequence[object]]) -> str:
    """Rows as RFC 4180 has them. Texts are guarded, numbers are not."""
    buffer = io.StringIO(newline="")
    # Few cells begin so that it is worth to look closer.
    csv.writer(buffer).writerows(
        [guard(cell) if type(cell) is str and cell[:1] in SUSPECT else cell for cell in row] for row in rows
    )
    return buffer.getvalue()
