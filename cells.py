"""What single cells say: numbers, dates, ISBNs and texts, as spreadsheets and other services write them."""

import html
import re
from collections.abc import Callable, Sequence
from datetime import date
from typing import Any

from stdnum import isbn as isbn_numbers

import schemas


class BadValue(Exception):
    """A value that can't be taken, and why."""

    def __init__(self, field_name: str, value: str, message: str) -> None:
        super().__init__(message)
        self.field, self.value, self.message = field_name, value, message


def reason(error: Any, value: str) -> str:
    """Why pydantic refused this cell, as the error of its row."""
    if any("\udc80" <= c <= "\udcff" for c in value):
        return "has bytes that the encoding of the file has not"
    return "is missing" if not value else schemas.describe_error(error)


def mend_isbn(text: str) -> str | None:
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
    raise BadValue(name, text, "may be a decimal comma or one between thousands")


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
                    raise BadValue(name, text, "may be day first or month first, and no other row of the file tells")
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
        raise BadValue(name, text, "is no day of the calendar") from None
    raise BadValue(name, text, "is not a date like 2008-08-11")


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


def storable(text: str) -> str:
    """`text` as it came, but for what no database takes: NUL, and bytes without a meaning."""
    return text.replace("\x00", "").encode("utf-8", "replace").decode()


def printable(text: str, most: int = 200) -> str:
    """`text` as it can be stored and shown: bytes without a meaning and control characters replaced."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text[:most])
