"""What Google Books and Open Library say of books, in their shapes, made into ours.

Their data is as people typed it: fields are left out, or hold what they should not. What can't be used is left out of
the book; a book without a title is none.
"""

import re
from collections.abc import Sequence
from datetime import date
from enum import StrEnum
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, Field, TypeAdapter, ValidationError, WrapValidator

from csv_files import InvalidCell, from_html, read_date, repair_isbn
from schemas import BookCreate, BookUpdate

T = TypeVar("T")

UNKNOWN_AUTHOR = "Unknown"  # the catalogue wants one
# Open Library names languages by three letters (MARC), Google Books by two.
TWO_LETTERS = dict(
    pair.split(":")
    for pair in "eng:en fre:fr ger:de spa:es ita:it por:pt dut:nl rus:ru jpn:ja chi:zh pol:pl swe:sv dan:da nor:no "
    "fin:fi cze:cs hun:hu gre:el tur:tr ara:ar heb:he kor:ko lat:la ukr:uk".split()
)


class Source(StrEnum):
    google = "google"
    openlibrary = "openlibrary"

    @property
    def label(self) -> str:
        return "Google Books" if self is Source.google else "Open Library"


# What a `ref` can be: a part of a path that leads nowhere else.
REFS = {Source.google: re.compile(r"[A-Za-z0-9_-]{1,40}"), Source.openlibrary: re.compile(r"OL[1-9][0-9]{0,11}[MW]")}


class Candidate(BaseModel):
    """A book as one of the sources tells it; `POST /books/external` takes its `source` and `ref`."""

    source: Source
    ref: str = Field(examples=["zyTCAlFPjgYC"])
    title: str
    author: str
    isbn: str | None = None
    genre: str | None = None
    description: str | None = None
    publisher: str | None = None
    language: str | None = None
    pages: int | None = None
    price: float | None = Field(default=None, description="Always null: their prices are of one country and one day.")
    cover_url: str | None = None
    published_date: date | None = None
    publication_year: int | None = None

    def book(self) -> BookCreate:
        return BookCreate.model_validate(self.model_dump(exclude={"source", "ref"}))


class Found(NamedTuple):
    """A page of what a source has found, and how many there are in all."""

    items: list[Candidate]
    total: int


def candidate(source: Source, ref: str, **said: Any) -> Candidate | None:
    """A candidate of what is usable among the values. None without a title."""
    try:
        book = BookUpdate.model_validate(said)
    except ValidationError as error:
        unusable = {e["loc"][0] for e in error.errors()}
        book = BookUpdate.model_validate({name: value for name, value in said.items() if name not in unusable})
    if not book.title or not REFS[source].fullmatch(ref):
        return None
    return Candidate(source=source, ref=ref, **{**vars(book), "author": book.author or UNKNOWN_AUTHOR})


def date_and_year(text: str | None) -> dict[str, Any]:
    """`2008-08-11`, `August 2008`, `c2008`: the day where it is told, and the year."""
    text = (text or "").strip()
    try:
        day, year = read_date("published_date", text, lambda: None)
    except InvalidCell:
        years = re.findall(r"(?<!\d)\d{4}(?!\d)", text)
        day, year = None, int(years[0]) if len(years) == 1 else None
    return {"published_date": day, "publication_year": day.year if day else year}


def first_isbn(texts: Sequence[str]) -> str | None:
    return next(filter(None, map(repair_isbn, texts)), None)


def names(texts: Sequence[str]) -> str | None:
    """Several authors as we keep them; as many of them as there is room for."""
    shown = ""
    for name in dict.fromkeys(" ".join(text.split()) for text in texts):
        if name and len(shown) + len(name) + 2 <= 1000:
            shown = f"{shown}, {name}" if shown else name
    return shown or None


def short(text: str | None, most: int) -> str | None:
    return text if text is None or len(text) <= most else f"{text[: most - 1]}…"


def paragraphs(text: str | None) -> str | None:
    """HTML as text, its paragraphs as lines."""
    return None if text is None else from_html(re.sub(r"</p>\s*", "\n", text, flags=re.IGNORECASE))


def secure(url: str | None) -> str | None:
    """Google Books gives its pictures with http, and serves them by https too."""
    return None if url is None else re.sub(r"^http://", "https://", url)


# --- their shapes -------------------------------------------------------------------------------------------------


def _or_nothing(value: Any, handler: Any) -> Any:
    try:
        return handler(value)
    except ValidationError:
        return None


def _of_those(value: Any, handler: Any) -> Any:
    """The items of a list that are as they should be."""
    found = [_or_nothing(item, lambda one: handler([one])[0]) for item in value] if isinstance(value, list) else []
    return [item for item in found if item is not None]


Lenient = WrapValidator(_or_nothing)
Those = WrapValidator(_of_those)
Text = Annotated[str | None, Lenient]
Number = Annotated[int | None, Lenient]
Texts = Annotated[list[str], Those]


class GoogleId(BaseModel):
    type: Literal["ISBN_13", "ISBN_10"]
    identifier: str


def isbn_13_first(known: GoogleId) -> bool:
    return known.type != "ISBN_13"


class GoogleCovers(BaseModel):
    thumbnail: Text = None
    smallThumbnail: Text = None


class GoogleInfo(BaseModel):
    title: Text = None
    authors: Texts = []
    publisher: Text = None
    publishedDate: Text = None
    description: Text = None
    industryIdentifiers: Annotated[list[GoogleId], Those] = []
    pageCount: Number = None
    categories: Texts = []
    imageLinks: Annotated[GoogleCovers | None, Lenient] = None
    language: Text = None


class GoogleVolume(BaseModel):
    id: str
    volumeInfo: GoogleInfo

    def candidate(self) -> Candidate | None:
        info, covers = self.volumeInfo, self.volumeInfo.imageLinks or GoogleCovers()
        return candidate(
            Source.google,
            self.id,
            title=short(info.title, 500),
            author=names(info.authors),
            isbn=first_isbn([known.identifier for known in sorted(info.industryIdentifiers, key=isbn_13_first)]),
            genre=short(next(iter(info.categories), None), 100),
            description=short(paragraphs(info.description), 20_000),
            publisher=short(info.publisher, 300),
            language=info.language,
            pages=info.pageCount,
            cover_url=secure(covers.thumbnail or covers.smallThumbnail),
            **date_and_year(info.publishedDate),
        )


class GoogleVolumes(BaseModel):
    totalItems: Annotated[int, Field(ge=0)]
    items: Annotated[list[GoogleVolume], Those] = []

    def found(self) -> Found:
        return Found([found for volume in self.items if (found := volume.candidate())], self.totalItems)


class Named(BaseModel):
    name: str


class OpenCover(BaseModel):
    large: Text = None
    medium: Text = None


class OpenIds(BaseModel):
    isbn_13: Texts = []
    isbn_10: Texts = []


class OpenEdition(BaseModel):
    """What `/api/books?jscmd=data` says of an edition."""

    key: str
    title: Text = None
    authors: Annotated[list[Named], Those] = []
    publishers: Annotated[list[Named], Those] = []
    publish_date: Text = None
    number_of_pages: Number = None
    identifiers: Annotated[OpenIds | None, Lenient] = None
    subjects: Annotated[list[Named], Those] = []
    cover: Annotated[OpenCover | None, Lenient] = None

    def candidate(self, isbn: str | None = None) -> Candidate | None:
        ids, cover = self.identifiers or OpenIds(), self.cover or OpenCover()
        return candidate(
            Source.openlibrary,
            last_part(self.key),
            title=short(self.title, 500),
            author=names([author.name for author in self.authors]),
            isbn=isbn or first_isbn([*ids.isbn_13, *ids.isbn_10]),
            genre=subject([found.name for found in self.subjects]),
            publisher=short(next((found.name for found in self.publishers), None), 300),
            pages=self.number_of_pages,
            cover_url=cover.large or cover.medium,
            **date_and_year(self.publish_date),
        )


OPEN_EDITIONS: TypeAdapter[dict[str, OpenEdition | None]] = TypeAdapter(
    dict[str, Annotated[OpenEdition | None, Lenient]]
)


class OpenSearchEdition(BaseModel):
    key: str
    title: Text = None
    isbn: Texts = []
    publisher: Texts = []
    publish_date: Texts = []
    language: Texts = []
    cover_i: Number = None


class OpenSearchEditions(BaseModel):
    docs: Annotated[list[OpenSearchEdition], Those] = []


class OpenWork(BaseModel):
    """What `/search.json` says of a work, with the edition that matches best where it names one."""

    key: str
    title: Text = None
    author_name: Texts = []
    first_publish_year: Number = None
    isbn: Texts = []
    publisher: Texts = []
    language: Texts = []
    number_of_pages_median: Number = None
    subject: Texts = []
    cover_i: Number = None
    editions: Annotated[OpenSearchEditions | None, Lenient] = None

    def candidate(self) -> Candidate | None:
        editions = [found for found in (self.editions.docs if self.editions else []) if found.title]
        edition = editions[0] if editions else self
        isbns, publishers, languages = edition.isbn, edition.publisher, edition.language
        if isinstance(edition, OpenSearchEdition):
            when = date_and_year(next(iter(edition.publish_date), None))
        else:
            when = {"publication_year": self.first_publish_year}
        cover = edition.cover_i or self.cover_i
        return candidate(
            Source.openlibrary,
            last_part(edition.key),
            title=short(edition.title, 500),
            author=names(self.author_name),
            isbn=first_isbn(isbns),
            genre=subject(self.subject),
            publisher=short(next(iter(publishers), None), 300),
            language=TWO_LETTERS.get(languages[0], languages[0]) if len(languages) == 1 else None,
            pages=self.number_of_pages_median,
            cover_url=f"https://covers.openlibrary.org/b/id/{cover}-L.jpg" if cover and cover > 0 else None,
            **when,
        )


class OpenWorks(BaseModel):
    numFound: Annotated[int, Field(ge=0)]
    docs: Annotated[list[OpenWork], Those] = []

    def found(self) -> Found:
        return Found([found for work in self.docs if (found := work.candidate())], self.numFound)


def last_part(key: str) -> str:
    """`OL7353617M` of `/books/OL7353617M`."""
    return key.rpartition("/")[2]


def subject(subjects: Sequence[str]) -> str | None:
    """The first that is one: among them are marks like `nyt:hardcover=2008-08-11`."""
    return next((name for name in subjects if len(name) <= 100 and ":" not in name and "=" not in name), None)
