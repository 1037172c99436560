"""Books of Google Books and Open Library: finding them there, and adding one of them here."""

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import Depends, HTTPException, Query, Response
from pydantic import BaseModel, Field, StringConstraints

import catalogues
import database
from api import Router, errors
from books import add_book, etag_of
from pagination import invalid_query
from schemas import BlankIsNull, BookPublic, Isbn, RequestModel, Title, invalid_body
from security import Contributor, CurrentUser
from sources import REFS, Candidate, Source

AT_ONCE = 20  # requests of this process that wait for another catalogue


class _Waiting:
    count = 0


async def take_turn() -> AsyncIterator[None]:
    if _Waiting.count >= AT_ONCE:
        raise HTTPException(503, "Too many are asking other catalogues just now. Try again.", {"Retry-After": "5"})
    _Waiting.count += 1
    try:
        yield
    finally:
        _Waiting.count -= 1


router = Router(prefix="/books/external", tags=["In and out"], dependencies=[Depends(take_turn)])


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
    wanted = catalogues.Search(query.q, query.isbn, query.start_index, query.max_results)
    found = await catalogues.search(query.source, wanted)
    return Candidates(items=found.items, total=found.total)


class ExternalBook(RequestModel):
    source: Source
    ref: Annotated[str, StringConstraints(max_length=40)] = Field(examples=["zyTCAlFPjgYC"])


@router.post("", status_code=201, responses=errors(403, 404, 409, 502, 504, sends={201: "Location ETag"}))
async def add_external_book(wanted: ExternalBook, user: Contributor, response: Response) -> BookPublic:
    """Add a book as Google Books or Open Library has it now. An ISBN that is here already is refused with 409."""
    if not REFS[wanted.source].fullmatch(wanted.ref):
        raise invalid_body("ref", f"is not one of {wanted.source.label}")
    found = await catalogues.fetch(wanted.source, wanted.ref)
    if found is None:
        raise HTTPException(404, f"{wanted.source.label} has no such book.")
    book = await database.write(add_book, found.book(), user.id)
    response.headers.update({"Location": f"/books/{book.id}", "ETag": etag_of(book.version)})
    return book
