"""Google Books and Open Library: search, adding a book, look-up by ISBN for imports, and the daily import."""

import asyncio
import functools
import logging
import re
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from datetime import timedelta
from enum import StrEnum
from typing import Annotated, Any, NamedTuple
from urllib.parse import quote

import httpx2
from cachetools import TTLCache
from fastapi import Depends, HTTPException, Query, Response
from pydantic import BaseModel, Field, ValidationError
from pydantic_core import from_json
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session

import database
import events
import schemas
from api import INTERNAL_ERROR, Router, errors, or_404
from books import add_book, etag_of
from csv_files import LOOKED_UP, ImportRow, InvalidCell, from_html, read_date, repair_isbn
from database import T
from models import InvalidField, claim_job, schedule_job
from schemas import BlankIsNull, BookBase, BookCreate, BookPublic, Isbn, Price, RequestModel, Title
from security import Contributor, CurrentUser, authorized
from settings import VERSION, settings

Parser = Callable[[Any], T]
log = logging.getLogger("books.external")
MAX_RESPONSE = 4 << 20  # bytes; forty books with long descriptions have some 400,000

# Open Library has MARC's three-letter codes of languages, Google Books and this service have two letters.
LANGUAGES = dict(
    pair.split(":")
    for pair in "eng:en fre:fr ger:de spa:es ita:it por:pt dut:nl rus:ru jpn:ja chi:zh pol:pl swe:sv dan:da nor:no "
    "fin:fi cze:cs hun:hu gre:el tur:tr ara:ar heb:he kor:ko lat:la ukr:uk".split()
)
SUBJECT = re.compile(r"[^:=]{1,100}")  # Open Library has marks like `nyt:hardcover=2008-08-11` among them


Source = StrEnum("Source", ["google", "openlibrary"])
LABELS = {Source.google: "Google Books", Source.openlibrary: "Open Library"}
# A `ref` becomes a part of a URL: these characters can't change the rest of it.
REFS = {Source.google: re.compile(r"[A-Za-z0-9_-]{1,40}"), Source.openlibrary: re.compile(r"OL[1-9][0-9]{0,11}[MW]")}


class ExternalRef(BaseModel):
    source: Source
    ref: str = Field(max_length=40, examples=["zyTCAlFPjgYC"])


class ExternalBook(ExternalRef, extra="forbid"):
    """A book of Google Books or Open Library to add."""


class Candidate(BookBase, ExternalRef):
    """A book of another catalogue. `POST /books/external` takes its `source` and `ref`."""

    price: Price | None = Field(default=None, description="Always null: their prices are of one country and one day.")

    def book(self) -> BookCreate:
        return BookCreate.model_validate(self.model_dump(include=set(BookBase.model_fields)))


class Candidates(BaseModel):
    items: list[Candidate]
    total: int = Field(description="How many the source says it has; Google Books only guesses.")


def make_candidate(source: Source, ref: Any, **fields: Any) -> Candidate | None:
    """A candidate of the fields that are valid for a book. None without a title or a valid `ref`."""
    values = {"source": source, "ref": ref, **fields}
    try:
        candidate = Candidate.model_validate(values)
    except ValidationError as error:
        invalid = {e["loc"][0] for e in error.errors()}
        if invalid & {"title", "ref"}:
            return None
        valid = {name: value for name, value in values.items() if name not in invalid}
        candidate = Candidate.model_validate({"author": "Unknown", **valid})
    return candidate if REFS[source].fullmatch(candidate.ref) else None


def as_dict(value: Any) -> dict[str, Any]:  # this and the next three take any JSON, and leave out other types
    return value if isinstance(value, dict) else {}


def dicts(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def texts(value: Any, key: str | None = None) -> list[str]:
    """The strings of a list, or those that its objects have under `key`."""
    items = value if key is None else [item.get(key) for item in dicts(value)]
    return [item for item in items if isinstance(item, str)] if isinstance(items, list) else []


def text(value: Any, length: int = MAX_RESPONSE) -> str:
    value = value if isinstance(value, str) else ""
    return value if len(value) <= length else f"{value[: length - 1]}…"


def first(values: Iterable[str | None]) -> str:
    return next(filter(None, values), "")


def join_names(values: Iterable[str]) -> str:
    """As many authors as fit."""
    joined = ""
    for name in dict.fromkeys(" ".join(value.split()) for value in values):
        if name and len(joined) + len(name) + 2 <= 1000:
            joined = f"{joined}, {name}" if joined else name
    return joined


def date_and_year(value: Any) -> dict[str, Any]:
    """`2008-08-11`, `August 2008`, `c2008`: the date if it is complete, and the year."""
    value = text(value).strip()
    try:
        day, year = read_date(value, lambda: None)
    except InvalidCell:
        years = re.findall(r"(?<!\d)\d{4}(?!\d)", value)
        day, year = None, int(years[0]) if len(years) == 1 else None
    return {"published_date": day, "publication_year": day.year if day else year}


def parse_google_volume(volume: dict[str, Any]) -> Candidate | None:
    info = as_dict(volume.get("volumeInfo"))
    ids = dicts(info.get("industryIdentifiers"))
    isbns = [item.get("identifier") for kind in ("ISBN_13", "ISBN_10") for item in ids if item.get("type") == kind]
    covers = as_dict(info.get("imageLinks"))
    paragraphs = re.sub(r"</p>\s*", "\n", text(info.get("description")), flags=re.IGNORECASE)
    return make_candidate(
        Source.google,
        volume.get("id"),
        title=text(info.get("title"), 500),
        author=join_names(texts(info.get("authors"))),
        isbn=first(map(repair_isbn, texts(isbns))),
        genre=text(first(texts(info.get("categories"))), 100),
        description=text(from_html(paragraphs), 20_000),
        publisher=text(info.get("publisher"), 300),
        language=info.get("language"),
        pages=info.get("pageCount"),
        # Their addresses begin with http, but https works, too.
        cover_url=re.sub("^http:", "https:", text(covers.get("thumbnail")) or text(covers.get("smallThumbnail"))),
        **date_and_year(info.get("publishedDate")),
    )


def parse_edition(edition: dict[str, Any], isbn: str | None = None) -> Candidate | None:
    """An edition as `/api/books?jscmd=data` describes it."""
    ids, cover = as_dict(edition.get("identifiers")), as_dict(edition.get("cover"))
    return make_candidate(
        Source.openlibrary,
        text(edition.get("key")).rpartition("/")[2],
        title=text(edition.get("title"), 500),
        author=join_names(texts(edition.get("authors"), "name")),
        isbn=isbn or first(map(repair_isbn, texts(ids.get("isbn_13")) + texts(ids.get("isbn_10")))),
        genre=first(item for item in texts(edition.get("subjects"), "name") if SUBJECT.fullmatch(item)),
        publisher=text(first(texts(edition.get("publishers"), "name")), 300),
        pages=edition.get("number_of_pages"),
        cover_url=text(cover.get("large")) or text(cover.get("medium")),
        **date_and_year(edition.get("publish_date")),
    )


def parse_work(work: dict[str, Any]) -> Candidate | None:
    """A work as `/search.json` describes it; of its editions the first, which is the one that matches best."""
    editions = dicts(as_dict(work.get("editions")).get("docs"))
    book = next((item for item in editions if text(item.get("key")) and text(item.get("title"))), work)
    languages = texts(book.get("language"))
    cover = next((n for n in (book.get("cover_i"), work.get("cover_i")) if type(n) is int and n), 0)
    return make_candidate(
        Source.openlibrary,
        text(book.get("key")).rpartition("/")[2],
        title=text(book.get("title"), 500),
        author=join_names(texts(work.get("author_name"))),
        isbn=first(map(repair_isbn, texts(book.get("isbn")))),
        genre=first(item for item in texts(work.get("subject")) if SUBJECT.fullmatch(item)),
        publisher=text(first(texts(book.get("publisher"))), 300),
        language=LANGUAGES.get(languages[0], languages[0]) if len(languages) == 1 else None,
        pages=work.get("number_of_pages_median"),
        cover_url=f"https://covers.openlibrary.org/b/id/{cover}-L.jpg" if cover > 0 else None,
        **date_and_year(first(texts(book.get("publish_date"))) or str(book.get("first_publish_year"))),
    )


# --- requests -----------------------------------------------------------------------------------------------------

tls_context = functools.cache(httpx2.create_ssl_context)  # takes some 100 ms


class RetryPolicy(NamedTuple):
    tries: int
    seconds: float  # for all tries and the pauses between them
    each: float  # seconds to connect, or to wait for the next bytes
    pause: float = 0.5  # before the second try; twice as long before each one after it


CLIENT_POLICY = RetryPolicy(tries=3, seconds=10, each=6)
JOB_POLICY = RetryPolicy(tries=4, seconds=30, each=15, pause=1)


class SourceError(HTTPException):
    """The source gave no answer that can be used. With `pause`, another try may help after so many seconds."""

    def __init__(self, status: int, source: Source, problem: str, pause: float | None = None) -> None:
        super().__init__(status, f"{LABELS[source]} {problem}.")
        self.pause = pause


async def open_client(seconds: float, accept: str) -> httpx2.AsyncClient:
    """A client that waits so long for a connection, and for the next bytes."""
    agent = f"BooksAPI/{VERSION} (+{quote(settings.public_url, safe=':/?#[]@!$&()*+,;=~%')})"
    # Compressed, a small answer could expand to a large one.
    headers = {"User-Agent": agent, "Accept": accept, "Accept-Encoding": "identity"}
    tls = await asyncio.to_thread(tls_context)
    return httpx2.AsyncClient(verify=tls, timeout=seconds, headers=headers)


async def request(source: Source, path: str, params: dict[str, Any], parse: Parser[T], policy: RetryPolicy) -> T | None:
    """What `parse` makes of the JSON (ValueError: it is of another shape); None for 404. Raises SourceError."""
    base = settings.google_books_url if source is Source.google else settings.open_library_url
    url = httpx2.URL(base + path, params=params)
    client = await open_client(policy.each, "application/json")
    clock = asyncio.get_running_loop().time
    deadline, attempt = clock() + policy.seconds, 1
    try:
        async with asyncio.timeout_at(deadline), client:
            while True:
                try:
                    return await get_answer(client, source, url, parse)
                except SourceError as error:
                    log.warning("%s (try %d of %d)", error.detail, attempt, policy.tries)
                    pause = max(error.pause or 0, policy.pause * 2 ** (attempt - 1))
                    if error.pause is None or attempt == policy.tries or clock() + pause >= deadline:
                        raise
                await asyncio.sleep(pause)
                attempt += 1
    except TimeoutError:
        raise SourceError(504, source, "does not answer in time") from None


async def get_answer(client: httpx2.AsyncClient, source: Source, url: httpx2.URL, parse: Parser[T]) -> T | None:
    if source is Source.google and settings.google_books_key is not None:
        url = url.copy_merge_params({"key": settings.google_books_key.get_secret_value()})
    body = bytearray()
    try:
        async with client.stream("GET", url) as response:
            status = response.status_code
            if status in (404, 410):
                return None
            if status != 200:
                seconds = response.headers.get("Retry-After", "")  # or a date, which these sources do not send
                pause = float(seconds[:9]) if seconds.isdecimal() else 0.0
                may_recover = status == 429 or status >= 500
                raise SourceError(502, source, f"answers with {status}", pause if may_recover else None)
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > MAX_RESPONSE:
                    raise SourceError(502, source, "sends too large an answer")
        return await asyncio.to_thread(lambda: parse(from_json(body)))  # a large answer takes a while
    except httpx2.TimeoutException:
        raise SourceError(504, source, "does not answer in time", pause=0) from None
    except httpx2.RequestError as error:
        log.info("%s: %s", LABELS[source], type(error).__name__)
        raise SourceError(502, source, "can't be reached, or closed the connection", pause=0) from None
    except ValueError:
        raise SourceError(502, source, "sent an answer that can't be parsed", pause=0) from None


MAX_ISBNS = 50  # in one request: Open Library asks for it
EDITION_FIELDS = "key,title,isbn,publisher,publish_date,language,cover_i".split(",")
WORK_FIELDS = "key,title,author_name,first_publish_year,isbn,publisher,language,number_of_pages_median,subject,cover_i"
SEARCH_FIELDS = ",".join([WORK_FIELDS, "editions", *(f"editions.{name}" for name in EDITION_FIELDS)])


async def search(source: Source, query: str, start: int, limit: int, policy: RetryPolicy, **options: str) -> Candidates:
    if source is Source.google:
        path, total, items = "/volumes", "totalItems", "items"
        params: dict[str, Any] = {"q": query, "startIndex": start, "maxResults": limit, "printType": "books", **options}
    else:
        path, total, items = "/search.json", "numFound", "docs"
        params = {"q": query, "offset": start, "limit": limit, "fields": SEARCH_FIELDS, **options}

    def parse(answer: Any) -> Candidates:
        count = as_dict(answer).get(total)
        if not isinstance(count, int) or count < 0:
            raise ValueError(f"no {total}")
        parse_item = parse_google_volume if source is Source.google else parse_work
        return Candidates(items=[book for item in dicts(answer.get(items)) if (book := parse_item(item))], total=count)

    return await request(source, path, params, parse, policy) or Candidates(items=[], total=0)


async def fetch_editions(keys: Sequence[str], policy: RetryPolicy) -> dict[str, Candidate]:
    """Editions of Open Library by keys like `ISBN:9780141439587` and `OLID:OL7353617M`."""

    def parse(answer: Any) -> dict[str, Candidate]:
        if not isinstance(answer, dict) and answer != []:  # [] has been seen where nothing is found
            raise ValueError("not an object")
        isbns = {key: key.removeprefix("ISBN:") for key in keys if key.startswith("ISBN:")}
        books = {key: parse_edition(as_dict(as_dict(answer).get(key)), isbns.get(key)) for key in keys}
        return {key: book for key, book in books.items() if book is not None}

    params = {"bibkeys": ",".join(keys), "format": "json", "jscmd": "data"}
    return await request(Source.openlibrary, "/api/books", params, parse, policy) or {}


async def fetch_candidate(source: Source, ref: str) -> Candidate | None:
    def parse(answer: Any) -> Candidate | None:
        if not isinstance(as_dict(answer).get("volumeInfo"), dict) or not isinstance(answer.get("id"), str):
            raise ValueError("not a volume")
        return parse_google_volume(answer)

    if source is Source.google:
        return await request(source, f"/volumes/{ref}", {}, parse, CLIENT_POLICY)
    if ref.endswith("M"):
        return (await fetch_editions([f"OLID:{ref}"], CLIENT_POLICY)).get(f"OLID:{ref}")
    works = await search(source, f"key:/works/{ref}", 0, 1, CLIENT_POLICY, fields=WORK_FIELDS)  # no editions
    return next((book for book in works.items if book.ref == ref), None)


# --- routes -------------------------------------------------------------------------------------------------------

slots = asyncio.Semaphore(20)  # for requests of this process that wait for another catalogue


async def limit_concurrency() -> AsyncIterator[None]:
    if slots.locked():
        raise HTTPException(503, "Too many requests to other catalogues at once. Try again.", {"Retry-After": "5"})
    async with slots:
        yield


router = Router(prefix="/books/external", tags=["In and out"], dependencies=[Depends(limit_concurrency)])


class ExternalQuery(RequestModel):
    q: Annotated[Title | None, BlankIsNull] = Field(default=None, description="Words, or what the source takes there.")
    isbn: Annotated[Isbn | None, BlankIsNull] = Field(default=None, description="In place of `q`.")
    source: Source = Source.google
    start_index: Annotated[int, Field(ge=0, le=10_000, description="How many to jump over.")] = 0
    max_results: Annotated[int, Field(ge=1, le=40)] = 10


cache: TTLCache[str, bytes, float] = TTLCache(16 << 20, 3600, getsizeof=len)  # answers as JSON, by query


@router.get("", response_model=Candidates, responses=errors(502, 504))
async def find_external_books(query: Annotated[ExternalQuery, Query()], _user: CurrentUser) -> Response:
    """Search another catalogue by words or by ISBN. Answers are cached for an hour.

    502 if the source is down, 504 if it is slow.
    """
    if (query.q is None) == (query.isbn is None):
        raise InvalidField("q", "is needed where isbn is not given, and not beside it", "query")
    key, start, limit = query.model_dump_json(), query.start_index, query.max_results
    body = cache.get(key)
    if body is None:
        if query.isbn is not None and query.source is Source.openlibrary:
            editions = [*(await fetch_editions([f"ISBN:{query.isbn}"], CLIENT_POLICY)).values()]
            found = Candidates(items=editions[start : start + limit], total=len(editions))
        else:
            found = await search(query.source, query.q or f"isbn:{query.isbn}", start, limit, CLIENT_POLICY)
        cache[key] = body = found.model_dump_json().encode()
    return Response(body, media_type="application/json")


CREATED = errors(403, 404, 409, 502, 504, sends={201: "Location ETag"})


@router.post("", status_code=201, responses=CREATED)
async def add_external_book(payload: ExternalBook, user: Contributor, response: Response) -> BookPublic:
    """Add a book as Google Books or Open Library has it now. 409 if its ISBN is in the catalogue already."""
    if not REFS[payload.source].fullmatch(payload.ref):
        raise InvalidField("ref", f"is not one of {LABELS[payload.source]}")
    no_book = f"{LABELS[payload.source]} has no such book."
    candidate = or_404(await fetch_candidate(payload.source, payload.ref), no_book)
    book = await database.write(authorized(add_book), candidate.book(), user)
    response.headers.update({"Location": f"/books/{book.id}", "ETag": etag_of(book.version)})
    return book


# --- look-up by ISBN for imports ----------------------------------------------------------------------------------

LOOKUP_PAUSE = 1.0  # seconds between two requests of a job: Open Library asks for it
STOP_CHECK_INTERVAL = 0.5


def look_up_isbns(rows: Sequence[ImportRow], renew_lease: Callable[[], None]) -> bool:
    """Complete or refuse the rows of an import that need a look-up in Open Library. False if the server stops first.
    `renew_lease` raises if the job is no longer this one's."""
    keys = list(dict.fromkeys(f"ISBN:{row.lookup_isbn}" for row in rows if row.lookup_isbn))
    problem = None
    try:
        books = asyncio.run(_fetch_while_running(keys, renew_lease)) if keys else {}
    except HTTPException as error:
        books, problem = {}, str(error.detail).rstrip(".")
    for row in rows:
        if row.lookup_isbn and books is not None:
            complete(row, books.get(f"ISBN:{row.lookup_isbn}"), problem)
    return books is not None


async def _fetch_while_running(keys: Sequence[str], renew_lease: Callable[[], None]) -> dict[str, Candidate] | None:
    await asyncio.sleep(LOOKUP_PAUSE)
    task = asyncio.create_task(fetch_editions(keys, JOB_POLICY))
    while not (await asyncio.wait({task}, timeout=STOP_CHECK_INTERVAL))[0]:
        if database.server_is_stopping():
            return None  # and asyncio.run cancels the task
        await asyncio.to_thread(renew_lease)
    return task.result()


def complete(row: ImportRow, found: Candidate | None, problem: str | None) -> None:
    """Make the row's book of its own values and, for the fields that it lacks, of those found."""
    isbn = row.values["isbn"]
    if found is None and not {"title", "author"} <= row.values.keys():
        if problem is None:
            row.refuse("isbn", isbn, f"is not known to {LABELS[Source.openlibrary]}")
        else:
            row.refuse(None, isbn, f"could not be looked up: {problem}")
        return
    if found is not None:
        values = {name: getattr(found, name) for name in LOOKED_UP | {"published_date", "language"}}
        if row.values.keys() & {"published_date", "publication_year"}:  # two halves of one thing
            values["published_date"] = values["publication_year"] = None
        row.looked_up = {name for name, value in values.items() if value is not None} - row.values.keys()
        row.values |= {name: values[name] for name in row.looked_up}
    elif problem is not None:
        row.warn("isbn", isbn, f"could not be looked up, the book was imported without it: {problem}")
    row.book, row.lookup_isbn = BookCreate.model_validate(row.values, context=schemas.CSV_CONTEXT), None


# --- the daily import ---------------------------------------------------------------------------------------------

HARVEST_POLL_INTERVAL = 300
HARVEST_PAGE, HARVEST_PAGES = 40, 5  # books a page, and pages: the newest come first


async def harvest() -> None:
    """Add new books of Google Books, once a day, in one of all processes."""
    query = settings.harvest_query
    # Due again in an hour, until it has succeeded: another process takes over if this one dies.
    if query is None or not await database.write(claim_job, "harvest", timedelta(hours=1), timedelta(days=1)):
        return
    data: dict[str, Any] = {"query": query}
    try:
        data |= await add_newest_books(query)
        log.info("harvested %s", data)
    except Exception as error:  # whatever it is, admins must find it in the event log
        data["error"] = error.detail if isinstance(error, HTTPException) else INTERNAL_ERROR
        is_bug = data["error"] == INTERNAL_ERROR
        log.error("the harvest failed, and is tried again in an hour: %s", data["error"], exc_info=is_bug)
    await database.write(record_harvest, data)


def record_harvest(session: Session, data: dict[str, Any]) -> None:
    if "error" not in data:
        schedule_job(session, "harvest", timedelta(days=1))
    events.record(session, "harvest.failed" if "error" in data else "harvest.completed", data, private=True)


async def add_newest_books(query: str) -> dict[str, int]:
    found = added = 0
    for start in range(0, HARVEST_PAGE * HARVEST_PAGES, HARVEST_PAGE):
        page = await search(Source.google, query, start, HARVEST_PAGE, JOB_POLICY, orderBy="newest")
        found += len(page.items)
        for candidate in page.items:
            if candidate.isbn is None:  # it would come in again every day
                continue
            try:
                await database.write(add_book, candidate.book(), None)
                added += 1
            except IntegrityError as error:
                if database.violation(error) != ("unique", "isbn"):
                    raise
        if start + HARVEST_PAGE >= page.total or not page.items:
            break
    return {"found": found, "added": added, "skipped": found - added}
