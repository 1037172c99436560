"""`/books/{id}/cover`: pictures from Open Library, fetched once by ISBN and stored."""

import asyncio
import hashlib
import logging
import re
from datetime import timedelta
from typing import Annotated, Any

import httpx2
import sqlalchemy as sa
from cachetools import TTLCache
from fastapi import HTTPException, Query, Response
from pydantic import Field
from sqlalchemy.exc import DBAPIError
from sqlmodel import Session, col

import database
import models
from api import FastRoute, Router, errors
from books import NOT_MODIFIED, BookId, IfNoneMatch, conditional_response
from external import open_client
from models import Book, Cover
from schemas import RequestModel
from settings import settings

router = Router(prefix="/books", tags=["Catalogue"], route_class=FastRoute)
log = logging.getLogger("books.covers")

# --- fetching -----------------------------------------------------------------------------------------------------

MAX_SIZE = 200_000  # bytes; Open Library's pictures of medium size have some 15,000
# By the first bytes. No SVG, which can hold scripts.
PICTURE = re.compile(rb"(?s)(?P<jpeg>\xff\xd8\xff)|(?P<png>\x89PNG\r\n)|(?P<webp>RIFF.{4}WEBP)|(?P<gif>GIF8[79]a)")
# Open Library redirects to archive.org, which has most of its pictures, and that to one of its machines. No other host
# is asked, and so no private address, unless COVERS_URL names it; archive.org by https, which proves who answers.
ARCHIVE = re.compile(r"([a-z0-9-]+\.)*archive\.org")
MAX_REQUESTS = 4  # for one picture: the first, and three redirects


async def download(isbn: str) -> bytes:
    """The picture; empty if there is none, or none that can be used. Raises HTTPError if the source is down."""
    first = url = httpx2.URL(f"{settings.covers_url}/b/isbn/{isbn}-M.jpg?default=false")
    async with await open_client(FETCH_TIMEOUT, "image/*") as client:
        for _ in range(MAX_REQUESTS):
            async with client.stream("GET", url) as response:
                # 403: more than Open Library allows, which is 100 ISBNs in five minutes
                if response.status_code in (403, 429) or response.status_code >= 500:
                    response.raise_for_status()
                if not response.has_redirect_location:
                    return await read_picture(response) if response.status_code == 200 else b""
                url = url.join(response.headers["Location"])
            if ARCHIVE.fullmatch(url.host):
                url = url.copy_with(scheme="https", port=None)
            elif (url.scheme, url.netloc) != (first.scheme, first.netloc):
                break
    return b""


async def read_picture(response: httpx2.Response) -> bytes:
    picture = b""
    async for chunk in response.aiter_raw():
        picture += chunk
        if len(picture) > MAX_SIZE:
            return b""
    return picture if PICTURE.match(picture) else b""


# --- one fetch for all who wait -----------------------------------------------------------------------------------

FETCH_TIMEOUT = 10  # seconds, for one picture
WAIT_TIMEOUT = 5  # seconds, for a request; the fetch goes on, for the next one
PAUSE = 60  # seconds
MAX_WAITING = 60  # fetches of this process
slots = asyncio.Semaphore(6)
fetches: dict[str, asyncio.Task[bytes | None]] = {}  # by ISBN
# Holds the last fault of the source until it is asked again.
faults: TTLCache[str, Exception, float] = TTLCache(1, PAUSE)


async def wait_for_picture(isbn: str) -> bytes | None:
    """The picture, empty if there is none; None if that can't be found out now."""
    if isbn not in fetches:
        if faults or len(fetches) >= MAX_WAITING:
            return None
        fetches[isbn] = asyncio.create_task(fetch(isbn))
        fetches[isbn].add_done_callback(lambda _: fetches.pop(isbn))
    done, _ = await asyncio.wait({fetches[isbn]}, timeout=WAIT_TIMEOUT)
    return done.pop().result() if done else None


async def fetch(isbn: str) -> bytes | None:
    async with slots:
        if faults:
            return None
        try:
            async with asyncio.timeout(FETCH_TIMEOUT):
                picture = await download(isbn)
            await database.write(store, isbn, picture)
        except (TimeoutError, ValueError, httpx2.HTTPError, httpx2.InvalidURL, DBAPIError) as error:
            log.warning("no covers for %s s: %s: %r", PAUSE, isbn, error)
            faults["last"] = error
            return None
        return picture


# --- storing ------------------------------------------------------------------------------------------------------

MAX_STORED = 256 << 20  # bytes; some 17,000 pictures
ROW_SIZE = 500  # bytes, beside the picture
MISS_LIFETIME = timedelta(days=7)
IS_VALID = sa.or_(sa.func.length(Cover.data) > 0, col(Cover.fetched_at) > sa.bindparam("since"))
FIND_COVER = database.CompiledQuery(
    sa.select(col(Book.isbn), col(Cover.data))
    .outerjoin(Cover, sa.and_(col(Cover.isbn) == col(Book.isbn), IS_VALID))
    .where(col(Book.id) == sa.bindparam("book_id"))
)


def store(session: Session, isbn: str, picture: bytes) -> None:
    """Store it, or that there is none. Deletes the oldest of what is too much."""
    session.execute(sa.delete(Cover).where(col(Cover.isbn) == isbn))
    position = (session.scalar(sa.select(sa.func.max(Cover.position))) or 0) + ROW_SIZE + len(picture)
    session.add(Cover(position=position, isbn=isbn, data=picture))
    session.execute(sa.delete(Cover).where(col(Cover.position) <= position - MAX_STORED))


# --- the route ----------------------------------------------------------------------------------------------------

CONTENT = {f"image/{kind}": {"schema": {"type": "string", "format": "binary"}} for kind in PICTURE.groupindex}
NO_PICTURE = {"description": "With `optional=true`: no such book, or no picture of its cover."}
RESPONSES: dict[int | str, Any] = errors(404) | NOT_MODIFIED | {200: {"content": CONTENT}, 204: NO_PICTURE}


class CoverQuery(RequestModel):
    optional: bool = Field(default=False, description="`true`: 204 instead of 404.")
    v: str | None = Field(default=None, description="Any value: caches keep the picture for a year. Send the ISBN.")


@router.get("/{book_id:id}/cover", response_class=Response, responses=RESPONSES)
async def read_cover(
    book_id: BookId, query: Annotated[CoverQuery, Query()], if_none_match: IfNoneMatch = None
) -> Response:
    """Read the picture of a book's cover. It is fetched once from Open Library, by the book's ISBN, and stored.

    404 if there is none, which is remembered for a week, or while Open Library is slow or down.
    """
    values = {"book_id": book_id, "since": models.utcnow() - MISS_LIFETIME}
    isbn, picture = await database.read(FIND_COVER.first, values) or (None, None)
    if picture is None and isbn is not None and settings.covers:
        picture = await wait_for_picture(isbn)
    caches = "public" if settings.public_catalogue else "private"
    kind = PICTURE.match(picture) if picture and settings.covers else None
    if picture is None or kind is None:
        headers = {"Cache-Control": "no-store" if picture is None else f"{caches}, max-age=3600"}
        if query.optional:
            return Response(status_code=204, headers=headers)
        raise HTTPException(404, "No such book, or no picture of its cover.", headers)
    etag = f'"{hashlib.sha256(picture).hexdigest()[:32]}"'
    headers = {"ETag": etag, "Cache-Control": f"{caches}, max-age=31536000, immutable" if query.v else "no-cache"}
    return conditional_response(picture, f"image/{kind.lastgroup}", headers, if_none_match)
