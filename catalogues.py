"""Asking Google Books and Open Library: bounded in time, in tries and in size, whatever they answer.

A question that fails is an `HTTPException`: 502 where a source is down or answers nonsense, 504 where it is slow.
"""

import asyncio
import contextlib
import functools
import json
import logging
import random
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

import httpx2
from fastapi import HTTPException
from pydantic import ValidationError

import models
from settings import VERSION, settings
from sources import OPEN_EDITIONS, Candidate, Found, GoogleVolume, GoogleVolumes, OpenWorks, Source, last_part

T = TypeVar("T")
Params = dict[str, str | int]
log = logging.getLogger("books.catalogues")

ANSWER_MAX = 4 << 20  # bytes; forty books with long descriptions have some 400,000
REDIRECTS_MAX = 3
ISBNS_MAX = 50  # of one question: what Open Library asks for
CACHE_HOUR = timedelta(hours=1)
CACHE_MAX = 16 << 20  # bytes
EDITION_FIELDS = "key,title,isbn,publisher,publish_date,language,cover_i".split(",")
WORK_FIELDS = "key,title,author_name,first_publish_year,isbn,publisher,language,number_of_pages_median,subject,cover_i"
SEARCH_FIELDS = ",".join([WORK_FIELDS, "editions", *(f"editions.{name}" for name in EDITION_FIELDS)])


class Patience(NamedTuple):
    """How long to ask. `seconds` is all of it, tries and pauses included."""

    tries: int
    seconds: float
    each: float  # seconds for one try to connect, or to send the next piece
    pause: float = 0.5  # before the second try, and twice as long before each one after it


A_CLIENT_WAITS = Patience(tries=3, seconds=10, each=6)
A_JOB_WAITS = Patience(tries=5, seconds=60, each=15, pause=1)
ONCE = Patience(tries=1, seconds=15, each=15)


class Unanswered(HTTPException):
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
        while self.size > CACHE_MAX:
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
async def _client(patience: Patience) -> AsyncIterator[httpx2.AsyncClient]:
    headers = {
        "User-Agent": f"BooksAPI/{VERSION} (+{quote(settings.public_url, safe=':/?#[]@!$&()*+,;=~%')})",
        "Accept": "application/json",
        "Accept-Encoding": "identity",  # so that a small answer can't unfold into a large one
    }
    context = await asyncio.to_thread(tls)
    async with httpx2.AsyncClient(verify=context, timeout=patience.each, headers=headers) as client:
        yield client


async def ask(
    source: Source,
    path: str,
    params: Params,
    read: Callable[[bytes], T],
    *,
    patience: Patience | None = None,
    cached: bool = False,
) -> T:
    """What the source answers, as `read` makes it of the body. Raises Unanswered, or NotThere."""
    patience = patience or A_CLIENT_WAITS
    base = settings.google_books_url if source is Source.google else settings.open_library_url
    url = httpx2.URL(base + path, params=params)
    body = cache.get(str(url)) if cached else None
    if body is not None:
        return await _parse(source, read, body)
    try:
        async with asyncio.timeout(patience.seconds):
            body, answer = await _ask_until_answered(source, url, read, patience)
    except TimeoutError:
        raise Unanswered(504, source, "does not answer in time") from None
    if cached:
        cache.put(str(url), body)
    return answer


async def _ask_until_answered(
    source: Source, url: httpx2.URL, read: Callable[[bytes], T], patience: Patience
) -> tuple[bytes, T]:
    clock = asyncio.get_running_loop().time
    end = clock() + patience.seconds
    async with _client(patience) as client:
        for attempt in range(1, patience.tries + 1):
            try:
                body = await _ask_once(client, source, url)
                return body, await _parse(source, read, body)
            except Unanswered as error:
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
        raise Unanswered(502, source, "answers what can't be read", again=True) from None


async def _ask_once(client: httpx2.AsyncClient, source: Source, url: httpx2.URL) -> bytes:
    place = url
    if source is Source.google and settings.google_books_key is not None:
        place = url.copy_merge_params({"key": settings.google_books_key.get_secret_value()})
    try:
        for _ in range(REDIRECTS_MAX + 1):
            async with client.stream("GET", place) as answer:
                if not answer.has_redirect_location:
                    return await _body(source, answer)
                there = place.join(answer.headers["Location"])
            if (there.scheme, there.host, there.port) != (place.scheme, place.host, place.port):
                raise Unanswered(502, source, "sends us elsewhere")
            place = there
    except httpx2.TimeoutException:
        raise Unanswered(504, source, "does not answer in time", again=True) from None
    except (httpx2.RequestError, httpx2.InvalidURL) as error:
        log.info("%s: %s", source.label, type(error).__name__)
        raise Unanswered(502, source, "can't be reached, or breaks off", again=True) from None
    raise Unanswered(502, source, "sends us in circles")


async def _body(source: Source, answer: httpx2.Response) -> bytes:
    status = answer.status_code
    if status in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE):
        raise NotThere
    if status != HTTPStatus.OK:
        again = status == HTTPStatus.TOO_MANY_REQUESTS or status >= HTTPStatus.INTERNAL_SERVER_ERROR
        raise Unanswered(502, source, f"answers with {status}", again=again, pause=_retry_after(answer))
    if answer.headers.get("Content-Encoding", "identity") != "identity":
        raise Unanswered(502, source, "answers in an encoding that was not asked for")
    body = bytearray()
    async for piece in answer.aiter_raw():
        body += piece
        if len(body) > ANSWER_MAX:
            raise Unanswered(502, source, "answers more than is taken")
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


class Search(NamedTuple):
    """Words, or an ISBN as 13 digits."""

    words: str | None = None
    isbn: str | None = None
    start: int = 0
    limit: int = 10
    newest: bool = False


async def search(source: Source, wanted: Search, *, patience: Patience | None = None, cached: bool = True) -> Found:
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
            works = await ask(source, "/search.json", params, read, patience=patience, cached=cached)
            return works.found()
        editions = await _editions([f"ISBN:{wanted.isbn}"], patience, cached)
        found = [book for book in editions.values() if book is not None]
        return Found(found[wanted.start : wanted.start + wanted.limit], len(found))
    except NotThere:
        return Found([], 0)


async def _search_google(wanted: Search, patience: Patience | None, cached: bool) -> Found:
    words = wanted.words if wanted.isbn is None else f"isbn:{wanted.isbn}"
    params: Params = {"q": words or "", "startIndex": wanted.start, "maxResults": wanted.limit, "printType": "books"}
    if wanted.newest:
        params["orderBy"] = "newest"
    read = GoogleVolumes.model_validate_json
    volumes = await ask(Source.google, "/volumes", params, read, patience=patience, cached=cached)
    return volumes.found()


async def fetch(source: Source, ref: str) -> Candidate | None:
    """The book behind a `ref`, which must be one (see REFS), as its source tells it now."""
    try:
        if source is Source.google:
            volume = await ask(source, f"/volumes/{ref}", {}, GoogleVolume.model_validate_json)
            return volume.candidate()
        if ref.endswith("M"):
            return (await _editions([f"OLID:{ref}"], None)).get(f"OLID:{ref}")
        params: Params = {"q": f"key:/works/{ref}", "limit": 1, "fields": WORK_FIELDS}
        works = await ask(source, "/search.json", params, OpenWorks.model_validate_json)
        return next((work.candidate() for work in works.docs if last_part(work.key) == ref), None)
    except NotThere:
        return None


async def by_isbn(isbns: Sequence[str], patience: Patience) -> dict[str, Candidate]:
    """What Open Library knows of up to fifty ISBNs."""
    assert len(isbns) <= ISBNS_MAX
    keys = {f"ISBN:{isbn}": isbn for isbn in isbns}
    try:
        editions = await _editions(list(keys), patience)
    except NotThere:
        return {}
    return {keys[key]: book for key, book in editions.items() if key in keys and book is not None}


async def _editions(
    keys: Sequence[str],
    patience: Patience | None,
    cached: bool = False,
) -> dict[str, Candidate | None]:
    params: Params = {"bibkeys": ",".join(keys), "format": "json", "jscmd": "data"}
    answer = await ask(Source.openlibrary, "/api/books", params, _read_editions, patience=patience, cached=cached)
    isbns = {key: key.removeprefix("ISBN:") for key in keys if key.startswith("ISBN:")}
    return {key: edition.candidate(isbns.get(key)) for key, edition in answer.items() if edition is not None}


def _read_editions(body: bytes) -> dict[str, Any]:
    # Where nothing is found it has been seen to answer an empty list.
    return {} if json.loads(body) == [] else OPEN_EDITIONS.validate_json(body)
