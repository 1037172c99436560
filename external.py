"""Google Books and Open Library: search, adding a book, look-up by ISBN for imports, and the daily import."""

import asyncio
import contextlib
import functools
import json
import logging
import random
import re
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import date, datetime, timedelta
from email.utils import parsedate_to_datetime
from enum import StrEnum
from http import HTTPStatus
from typing import Annotated, Any, Literal, NamedTuple, TypeVar
from urllib.parse import quote

import httpx2
import sqlalchemy as sa
from fastapi import Depends, HTTPException, Query, Response
from pydantic import BaseModel, Field, StringConstraints, TypeAdapter, ValidationError, WrapValidator
from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, col

import database
import events
import models
import schemas
from api import Router, errors
from books import add_book, etag_of
from csv_files import LOOKED_UP, ImportRow, InvalidCell, RowIssue, from_html, read_date, repair_isbn
from models import Role, Setting, User
from pagination import invalid_query
from schemas import (
    CSV_CONTEXT,
    BlankIsNull,
    BookCreate,
    BookPublic,
    BookUpdate,
    Isbn,
    RequestModel,
    Title,
    invalid_body,
)
from security import Contributor, CurrentUser
from settings import VERSION, settings

T = TypeVar("T")

log = logging.getLogger("books.external")

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


class SearchResult(NamedTuple):
    """A page of what a source has found, and how many there are in all."""

    items: list[Candidate]
    total: int


def make_candidate(source: Source, ref: str, **said: Any) -> Candidate | None:
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


def join_names(texts: Sequence[str]) -> str | None:
    """Several authors as we keep them; as many of them as there is room for."""
    shown = ""
    for name in dict.fromkeys(" ".join(text.split()) for text in texts):
        if name and len(shown) + len(name) + 2 <= 1000:
            shown = f"{shown}, {name}" if shown else name
    return shown or None


def shorten(text: str | None, most: int) -> str | None:
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
        return make_candidate(
            Source.google,
            self.id,
            title=shorten(info.title, 500),
            author=join_names(info.authors),
            isbn=first_isbn([known.identifier for known in sorted(info.industryIdentifiers, key=isbn_13_first)]),
            genre=shorten(next(iter(info.categories), None), 100),
            description=shorten(paragraphs(info.description), 20_000),
            publisher=shorten(info.publisher, 300),
            language=info.language,
            pages=info.pageCount,
            cover_url=secure(covers.thumbnail or covers.smallThumbnail),
            **date_and_year(info.publishedDate),
        )


class GoogleVolumes(BaseModel):
    totalItems: Annotated[int, Field(ge=0)]
    items: Annotated[list[GoogleVolume], Those] = []

    def found(self) -> SearchResult:
        return SearchResult([found for volume in self.items if (found := volume.candidate())], self.totalItems)


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
        return make_candidate(
            Source.openlibrary,
            last_part(self.key),
            title=shorten(self.title, 500),
            author=join_names([author.name for author in self.authors]),
            isbn=isbn or first_isbn([*ids.isbn_13, *ids.isbn_10]),
            genre=subject([found.name for found in self.subjects]),
            publisher=shorten(next((found.name for found in self.publishers), None), 300),
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
        return make_candidate(
            Source.openlibrary,
            last_part(edition.key),
            title=shorten(edition.title, 500),
            author=join_names(self.author_name),
            isbn=first_isbn(isbns),
            genre=subject(self.subject),
            publisher=shorten(next(iter(publishers), None), 300),
            language=TWO_LETTERS.get(languages[0], languages[0]) if len(languages) == 1 else None,
            pages=self.number_of_pages_median,
            cover_url=f"https://covers.openlibrary.org/b/id/{cover}-L.jpg" if cover and cover > 0 else None,
            **when,
        )


class OpenWorks(BaseModel):
    numFound: Annotated[int, Field(ge=0)]
    docs: Annotated[list[OpenWork], Those] = []

    def found(self) -> SearchResult:
        return SearchResult([found for work in self.docs if (found := work.candidate())], self.numFound)


def last_part(key: str) -> str:
    """`OL7353617M` of `/books/OL7353617M`."""
    return key.rpartition("/")[2]


def subject(subjects: Sequence[str]) -> str | None:
    """The first that is one: among them are marks like `nyt:hardcover=2008-08-11`."""
    return next((name for name in subjects if len(name) <= 100 and ":" not in name and "=" not in name), None)


Params = dict[str, str | int]

MAX_RESPONSE = 4 << 20  # bytes; forty books with long descriptions have some 400,000
MAX_REDIRECTS = 3
MAX_ISBNS = 50  # of one question: what Open Library asks for
CACHE_HOUR = timedelta(hours=1)
MAX_CACHE = 16 << 20  # bytes
EDITION_FIELDS = "key,title,isbn,publisher,publish_date,language,cover_i".split(",")
WORK_FIELDS = "key,title,author_name,first_publish_year,isbn,publisher,language,number_of_pages_median,subject,cover_i"
SEARCH_FIELDS = ",".join([WORK_FIELDS, "editions", *(f"editions.{name}" for name in EDITION_FIELDS)])


class RetryPolicy(NamedTuple):
    """How long to ask. `seconds` is all of it, tries and pauses included."""

    tries: int
    seconds: float
    each: float  # seconds for one try to connect, or to send the next piece
    pause: float = 0.5  # before the second try, and twice as long before each one after it


CLIENT_POLICY = RetryPolicy(tries=3, seconds=10, each=6)
JOB_POLICY = RetryPolicy(tries=5, seconds=60, each=15, pause=1)
SINGLE_TRY = RetryPolicy(tries=1, seconds=15, each=15)


class SourceError(HTTPException):
    """The source gave no answer that can be used."""

    def __init__(self, status: int, source: Source, why: str, *, again: bool = False, pause: float = 0) -> None:
        super().__init__(status, f"{source.label} {why}.")
        self.again, self.pause = again, pause  # whether another try may do better, and not before so many seconds


class NotThere(Exception):
    """The source says that it has no such thing."""


# --- one question -------------------------------------------------------------------------------------------------


class Cache:
    """Answers of the last hour, as they came. It is used on the event loop only."""

    def __init__(self) -> None:
        self.answers: OrderedDict[str, tuple[datetime, bytes]] = OrderedDict()
        self.size = 0

    def get(self, url: str) -> bytes | None:
        until, body = self.answers.get(url, (None, b""))
        if until is None or until > models.utcnow():
            return body if until else None
        self._drop(url)
        return None

    def put(self, url: str, body: bytes) -> None:
        self._drop(url)
        self.answers[url] = (models.utcnow() + CACHE_HOUR, body)
        self.size += len(body)
        while self.size > MAX_CACHE:
            self._drop(next(iter(self.answers)))

    def _drop(self, url: str) -> None:
        _, body = self.answers.pop(url, (None, b""))
        self.size -= len(body)

    def clear(self) -> None:
        self.answers.clear()
        self.size = 0


cache = Cache()


tls_lock = threading.Lock()


def tls() -> Any:
    with tls_lock:  # or the first who ask would each make one
        return _make_tls()


@functools.cache
def _make_tls() -> Any:
    return httpx2.create_ssl_context()  # takes some 100 ms


@contextlib.asynccontextmanager
async def _client(patience: RetryPolicy) -> AsyncIterator[httpx2.AsyncClient]:
    headers = {
        "User-Agent": f"BooksAPI/{VERSION} (+{quote(settings.public_url, safe=':/?#[]@!$&()*+,;=~%')})",
        "Accept": "application/json",
        "Accept-Encoding": "identity",  # so that a small answer can't unfold into a large one
    }
    context = await asyncio.to_thread(tls)
    async with httpx2.AsyncClient(verify=context, timeout=patience.each, headers=headers) as client:
        yield client


async def request(
    source: Source,
    path: str,
    params: Params,
    read: Callable[[bytes], T],
    *,
    patience: RetryPolicy | None = None,
    cached: bool = False,
) -> T:
    """What the source answers, as `read` makes it of the body. Raises Unanswered, or NotThere."""
    patience = patience or CLIENT_POLICY
    base = settings.google_books_url if source is Source.google else settings.open_library_url
    url = httpx2.URL(base + path, params=params)
    body = cache.get(str(url)) if cached else None
    if body is not None:
        return await _parse(source, read, body)
    try:
        async with asyncio.timeout(patience.seconds):
            body, answer = await _ask_until_answered(source, url, read, patience)
    except TimeoutError:
        raise SourceError(504, source, "does not answer in time") from None
    if cached:
        cache.put(str(url), body)
    return answer


async def _ask_until_answered(
    source: Source, url: httpx2.URL, read: Callable[[bytes], T], patience: RetryPolicy
) -> tuple[bytes, T]:
    clock = asyncio.get_running_loop().time
    end = clock() + patience.seconds
    async with _client(patience) as client:
        for attempt in range(1, patience.tries + 1):
            try:
                body = await _ask_once(client, source, url)
                return body, await _parse(source, read, body)
            except SourceError as error:
                pause = max(error.pause, patience.pause * 2 ** (attempt - 1) * random.uniform(0.8, 1.2))  # noqa: S311  # spreads tries
                final = not error.again or attempt == patience.tries or clock() + pause >= end
                log.warning("%s (try %d of %d)", error.detail, attempt, patience.tries)
                if final:
                    raise
            await asyncio.sleep(pause)
    raise AssertionError("the last try has answered or raised")


async def _parse(source: Source, read: Callable[[bytes], T], body: bytes) -> T:
    """In a thread: a large answer takes a while."""
    try:
        return await asyncio.to_thread(read, body)
    except (ValidationError, ValueError, RecursionError):
        raise SourceError(502, source, "answers what can't be read", again=True) from None


async def _ask_once(client: httpx2.AsyncClient, source: Source, url: httpx2.URL) -> bytes:
    place = url
    if source is Source.google and settings.google_books_key is not None:
        place = url.copy_merge_params({"key": settings.google_books_key.get_secret_value()})
    try:
        for _ in range(MAX_REDIRECTS + 1):
            async with client.stream("GET", place) as answer:
                if not answer.has_redirect_location:
                    return await _body(source, answer)
                there = place.join(answer.headers["Location"])
            if (there.scheme, there.host, there.port) != (place.scheme, place.host, place.port):
                raise SourceError(502, source, "sends us elsewhere")
            place = there
    except httpx2.TimeoutException:
        raise SourceError(504, source, "does not answer in time", again=True) from None
    except (httpx2.RequestError, httpx2.InvalidURL) as error:
        log.info("%s: %s", source.label, type(error).__name__)
        raise SourceError(502, source, "can't be reached, or breaks off", again=True) from None
    raise SourceError(502, source, "sends us in circles")


async def _body(source: Source, answer: httpx2.Response) -> bytes:
    status = answer.status_code
    if status in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE):
        raise NotThere
    if status != HTTPStatus.OK:
        again = status == HTTPStatus.TOO_MANY_REQUESTS or status >= HTTPStatus.INTERNAL_SERVER_ERROR
        raise SourceError(502, source, f"answers with {status}", again=again, pause=_retry_after(answer))
    if answer.headers.get("Content-Encoding", "identity") != "identity":
        raise SourceError(502, source, "answers in an encoding that was not asked for")
    body = bytearray()
    async for piece in answer.aiter_raw():
        body += piece
        if len(body) > MAX_RESPONSE:
            raise SourceError(502, source, "answers more than is taken")
    return bytes(body)


def _retry_after(answer: httpx2.Response) -> float:
    """Seconds: as a number, or until a date (RFC 9110, 10.2.3)."""
    text = answer.headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdecimal():
        return float(text[:9])
    try:
        return max(0.0, (parsedate_to_datetime(text) - models.utcnow()).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return 0.0


# --- what is asked ------------------------------------------------------------------------------------------------


class SourceQuery(NamedTuple):
    """Words, or an ISBN as 13 digits."""

    words: str | None = None
    isbn: str | None = None
    start: int = 0
    limit: int = 10
    newest: bool = False


async def search(
    source: Source, wanted: SourceQuery, *, patience: RetryPolicy | None = None, cached: bool = True
) -> SearchResult:
    try:
        if source is Source.google:
            return await _search_google(wanted, patience, cached)
        if wanted.isbn is None:
            params: Params = {
                "q": wanted.words or "",
                "offset": wanted.start,
                "limit": wanted.limit,
                "fields": SEARCH_FIELDS,
            }
            read = OpenWorks.model_validate_json
            works = await request(source, "/search.json", params, read, patience=patience, cached=cached)
            return works.found()
        editions = await _editions([f"ISBN:{wanted.isbn}"], patience, cached)
        found = [book for book in editions.values() if book is not None]
        return SearchResult(found[wanted.start : wanted.start + wanted.limit], len(found))
    except NotThere:
        return SearchResult([], 0)


async def _search_google(wanted: SourceQuery, patience: RetryPolicy | None, cached: bool) -> SearchResult:
    words = wanted.words if wanted.isbn is None else f"isbn:{wanted.isbn}"
    params: Params = {"q": words or "", "startIndex": wanted.start, "maxResults": wanted.limit, "printType": "books"}
    if wanted.newest:
        params["orderBy"] = "newest"
    read = GoogleVolumes.model_validate_json
    volumes = await request(Source.google, "/volumes", params, read, patience=patience, cached=cached)
    return volumes.found()


async def fetch(source: Source, ref: str) -> Candidate | None:
    """The book behind a `ref`, which must be one (see REFS), as its source tells it now."""
    try:
        if source is Source.google:
            volume = await request(source, f"/volumes/{ref}", {}, GoogleVolume.model_validate_json)
            return volume.candidate()
        if ref.endswith("M"):
            return (await _editions([f"OLID:{ref}"], None)).get(f"OLID:{ref}")
        params: Params = {"q": f"key:/works/{ref}", "limit": 1, "fields": WORK_FIELDS}
        works = await request(source, "/search.json", params, OpenWorks.model_validate_json)
        return next((work.candidate() for work in works.docs if last_part(work.key) == ref), None)
    except NotThere:
        return None


async def search_isbns(isbns: Sequence[str], patience: RetryPolicy) -> dict[str, Candidate]:
    """What Open Library knows of up to fifty ISBNs."""
    assert len(isbns) <= MAX_ISBNS
    keys = {f"ISBN:{isbn}": isbn for isbn in isbns}
    try:
        editions = await _editions(list(keys), patience)
    except NotThere:
        return {}
    return {keys[key]: book for key, book in editions.items() if key in keys and book is not None}


async def _editions(
    keys: Sequence[str],
    patience: RetryPolicy | None,
    cached: bool = False,
) -> dict[str, Candidate | None]:
    params: Params = {"bibkeys": ",".join(keys), "format": "json", "jscmd": "data"}
    answer = await request(Source.openlibrary, "/api/books", params, _read_editions, patience=patience, cached=cached)
    isbns = {key: key.removeprefix("ISBN:") for key in keys if key.startswith("ISBN:")}
    return {key: edition.candidate(isbns.get(key)) for key, edition in answer.items() if edition is not None}


def _read_editions(body: bytes) -> dict[str, Any]:
    # Where nothing is found it has been seen to answer an empty list.
    return {} if json.loads(body) == [] else OPEN_EDITIONS.validate_json(body)


LOOKUP_PAUSE = 1.0  # between two questions of a job: Open Library asks for it
STOP_CHECK_INTERVAL = 0.5  # between two looks whether the server stops
LEASE_RENEWAL_INTERVAL = 4.0  # between two signs of life: well under a job's LEASE


class Stopping(Exception):
    """The server stops: the rows that wait are asked for again after its next start."""


class Enricher:
    """`keep` tells that the job is alive. It raises where the job is no longer this one's."""

    def __init__(self, keep: Callable[[], None]) -> None:
        self.keep = keep
        self.patience = JOB_POLICY
        self.has_asked = False

    def fill_in(self, rows: Sequence[ImportRow]) -> bool:
        """Decide the rows that wait for what is looked up. False where the server stops first."""
        waiting = [row for row in rows if row.lookup_isbn]
        if not waiting:
            return True
        isbns = dict.fromkeys(row.lookup_isbn for row in waiting if row.lookup_isbn)
        try:
            found, down = asyncio.run(self._look_up(list(isbns)))
        except Stopping:
            return False
        for row in waiting:
            complete(row, found.get(row.lookup_isbn or ""), down)
        return True

    async def _look_up(self, isbns: Sequence[str]) -> tuple[dict[str, Candidate], str | None]:
        """What is known of them, or why nothing could be asked."""
        asking = asyncio.create_task(self._ask(isbns))
        clock = asyncio.get_running_loop().time
        kept = clock()
        try:
            while not (await asyncio.wait({asking}, timeout=STOP_CHECK_INTERVAL))[0]:
                if database.server_is_stopping():
                    raise Stopping
                if clock() - kept >= LEASE_RENEWAL_INTERVAL:
                    kept = clock()
                    await asyncio.to_thread(self.keep)
            # A source that is down is asked once for each batch from then on, until it answers.
            answer = asking.result(), None
            self.patience = JOB_POLICY
            return answer
        except HTTPException as error:
            self.patience = SINGLE_TRY
            return {}, str(error.detail).rstrip(".")
        finally:
            asking.cancel()
            await asyncio.wait({asking})

    async def _ask(self, isbns: Sequence[str]) -> dict[str, Candidate]:
        if self.has_asked:
            await asyncio.sleep(LOOKUP_PAUSE)
        self.has_asked = True
        return await search_isbns(isbns, self.patience)


def complete(row: ImportRow, found: Candidate | None, down: str | None) -> None:
    """Make the book of what the row says and of what was found; what the row says wins."""
    source = Source.openlibrary.label
    lacks = {"title", "author"} - row.values.keys()
    if found is None and lacks:
        if down is None:
            row.refuse("isbn", row.values["isbn"], f"is not known to {source}")
        else:
            row.refuse(None, row.values["isbn"], f"could not be looked up: {down}")
        return
    if found is not None:
        fills = {name: getattr(found, name) for name in LOOKED_UP | {"published_date", "language"}}
        if row.values.keys() & {"published_date", "publication_year"}:  # two halves of one thing
            fills["published_date"] = fills["publication_year"] = None
        row.looked_up = {name for name, value in fills.items() if value is not None} - row.values.keys()
        row.values |= {name: fills[name] for name in row.looked_up}
    elif down is not None:
        row.issues.append(
            RowIssue("isbn", row.values["isbn"], f"could not be looked up, the book is in as it is: {down}")
        )
    row.book, row.lookup_isbn = BookCreate.model_validate(row.values, context=CSV_CONTEXT), None


MAX_CONCURRENT = 20  # requests of this process that wait for another catalogue


class _Waiting:
    count = 0


async def limit_concurrency() -> AsyncIterator[None]:
    if _Waiting.count >= MAX_CONCURRENT:
        raise HTTPException(503, "Too many are asking other catalogues just now. Try again.", {"Retry-After": "5"})
    _Waiting.count += 1
    try:
        yield
    finally:
        _Waiting.count -= 1


router = Router(prefix="/books/external", tags=["In and out"], dependencies=[Depends(limit_concurrency)])


class ExternalQuery(RequestModel):
    q: Annotated[Title | None, BlankIsNull] = Field(default=None, description="Words, or what the source takes there.")
    isbn: Annotated[Isbn | None, BlankIsNull] = Field(default=None, description="In place of `q`.")
    source: Source = Source.google
    start_index: Annotated[int, Field(ge=0, le=10_000, description="How many to jump over.")] = 0
    max_results: Annotated[int, Field(ge=1, le=40)] = 10


class Candidates(BaseModel):
    items: list[Candidate]
    total: int = Field(description="How many the source says it has; Google Books only guesses.")


@router.get("", responses=errors(502, 504))
async def find_external_books(query: Annotated[ExternalQuery, Query()], _user: CurrentUser) -> Candidates:
    """Look for books in Google Books or Open Library, by words or by ISBN.

    Answers are kept for an hour. Where the source is down it is 502, where it is slow 504.
    """
    if (query.q is None) == (query.isbn is None):
        raise invalid_query("q", "is needed, or isbn, and only one of them")
    wanted = SourceQuery(query.q, query.isbn, query.start_index, query.max_results)
    found = await search(query.source, wanted)
    return Candidates(items=found.items, total=found.total)


class ExternalBook(RequestModel):
    source: Source
    ref: Annotated[str, StringConstraints(max_length=40)] = Field(examples=["zyTCAlFPjgYC"])


@router.post("", status_code=201, responses=errors(403, 404, 409, 502, 504, sends={201: "Location ETag"}))
async def add_external_book(wanted: ExternalBook, user: Contributor, response: Response) -> BookPublic:
    """Add a book as Google Books or Open Library has it now. An ISBN that is here already is refused with 409."""
    if not REFS[wanted.source].fullmatch(wanted.ref):
        raise invalid_body("ref", f"is not one of {wanted.source.label}")
    found = await fetch(wanted.source, wanted.ref)
    if found is None:
        raise HTTPException(404, f"{wanted.source.label} has no such book.")
    book = await database.write(add_book, found.book(), user.id)
    response.headers.update({"Location": f"/books/{book.id}", "ETag": etag_of(book.version)})
    return book


HARVEST_POLL_INTERVAL = 300  # between two looks whether it is time
DAY, RETRY = timedelta(days=1), timedelta(hours=1)
HARVEST_PAGE, HARVEST_PAGES = 40, 5  # books to a page, and pages: the newest come first
DUE = "harvest_due"


async def harvest() -> None:
    """Do it if it is time, and no other worker does."""
    query = settings.harvest_query
    if query is None or not await database.read(_is_due) or not await _claim():
        return
    try:
        counts = await _bring_in(query)
    except HTTPException as error:
        await _fail(query, str(error.detail))
    except Exception:
        # The last line of defence: what nobody waits for must not take the service down with it.
        log.exception("the harvest failed")
        await _fail(query, "Something went wrong here; it is in the server's log.")
    else:
        log.info("harvested %r: %s", query, counts)
        await database.write(_finish_harvest, {"query": query, **counts})


async def _fail(query: str, why: str) -> None:
    log.error("the harvest failed, and is tried again in an hour: %s", why)
    await database.write(_record_harvest, "harvest.failed", {"query": query, "error": why})


def _is_due(connection: Connection) -> bool:
    due = connection.execute(sa.select(col(Setting.value)).where(col(Setting.key) == DUE)).scalar()
    return due is None or due <= _stamp()


def _stamp(later: timedelta = timedelta(0)) -> str:
    """A time whose order is that of its letters."""
    return (models.utcnow() + later).strftime("%Y-%m-%dT%H:%M:%SZ")


async def _claim() -> bool:
    try:
        return await database.write(_claim_harvest)
    except IntegrityError:  # another worker was the first ever, at the same moment
        return False


def _claim_harvest(session: Session) -> bool:
    """Whether it is ours. Until it is done it counts as failed: a worker that dies is followed by another."""
    turn = session.get(Setting, DUE, with_for_update=True)
    if turn is None:
        session.add(Setting(key=DUE, value=_stamp(RETRY)))
    elif turn.value <= _stamp():
        turn.value = _stamp(RETRY)
    else:
        return False
    return True


async def _bring_in(query: str) -> dict[str, int]:
    admin = await database.read(_oldest_admin)
    if admin is None:
        raise HTTPException(409, "There is no active admin to add the books.")
    counts = {"found": 0, "added": 0, "skipped": 0}
    for page in range(HARVEST_PAGES):
        wanted = SourceQuery(query, start=page * HARVEST_PAGE, limit=HARVEST_PAGE, newest=True)
        found = await search(Source.google, wanted, patience=JOB_POLICY, cached=False)
        for candidate in found.items:
            counts["found"] += 1
            # Without an ISBN nothing tells whether it is here already: it would come in every day.
            added = candidate.isbn is not None and await _add(candidate.book(), admin)
            counts["added" if added else "skipped"] += 1
        if (page + 1) * HARVEST_PAGE >= found.total or not found.items:
            break
    return counts


async def _add(book: schemas.BookCreate, admin: int) -> bool:
    try:
        await database.write(add_book, book, admin)
    except IntegrityError as error:
        if database.violation(error) == ("unique", "isbn"):  # it is here
            return False
        raise
    return True


def _oldest_admin(connection: Connection) -> int | None:
    admins = sa.select(col(User.id)).where(col(User.role) == Role.admin, col(User.is_active))
    return connection.execute(admins.order_by(col(User.id)).limit(1)).scalar()


def _finish_harvest(session: Session, told: dict[str, object]) -> None:
    session.get_one(Setting, DUE).value = _stamp(DAY)
    _record_harvest(session, "harvest.completed", told)


def _record_harvest(session: Session, what: str, told: dict[str, object]) -> None:
    events.record(session, what, told, private=True)
