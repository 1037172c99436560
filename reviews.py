"""What readers say of a book. They write it on their shelf; here everybody reads it, and staff can take it away."""

from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import HTTPException, Query, Request, Response
from pydantic import TypeAdapter
from sqlalchemy import Connection
from sqlmodel import Session, col

import database
import library
from api import PAGE, Router, errors
from books import FIND_BOOK, BookId, book_to_change, no_such_book
from models import ShelfEntry, User
from pagination import Order, Page, PageQuery, named, page_answer, read_page
from schemas import EntryUpdate, ReviewPublic, Username
from security import Staff

router = Router(prefix="/books", tags=["Catalogue"])

REVIEWS = Order("-id", (col(ShelfEntry.id),))
REVIEW = {"username": col(User.username)} | {
    name: getattr(ShelfEntry, name) for name in ReviewPublic.model_fields if name != "username"
}
SELECT_REVIEWS = sa.select(*REVIEW.values()).join_from(ShelfEntry, User).where(library.is_review())
REVIEW_PAGE = TypeAdapter(Page[ReviewPublic])


@router.get("/{book_id:id}/reviews", response_model=Page[ReviewPublic], responses=PAGE)
async def list_reviews(book_id: BookId, query: Annotated[PageQuery, Query()], request: Request) -> Response:
    """What readers say of a book, the newest entry first. They are written at `/my-library/{book_id}`."""
    return page_answer(await database.read_in_thread(_find_reviews, book_id, query), REVIEW_PAGE, request)


def _find_reviews(connection: Connection, book_id: int, query: PageQuery) -> dict[str, Any]:
    if FIND_BOOK.first(connection, {"book_id": book_id}) is None:
        raise no_such_book()
    of_book = SELECT_REVIEWS.where(col(ShelfEntry.book_id) == book_id)
    return read_page(connection, of_book, REVIEWS, query, named(REVIEW))


@router.delete("/{book_id:id}/reviews/{username}", status_code=204, responses=errors(403))
async def remove_review(book_id: BookId, username: Username, user: Staff) -> None:
    """Take away what somebody says of a book, text and rating. The book stays on their shelf."""
    await database.write(_remove_review, book_id, username)


def _remove_review(session: Session, book_id: int, username: str) -> None:
    book = book_to_change(session, book_id)
    theirs = sa.select(ShelfEntry, User).join_from(ShelfEntry, User, col(ShelfEntry.user_id) == col(User.id))
    theirs = theirs.where(col(ShelfEntry.book_id) == book_id, sa.func.lower(col(User.username)) == username.lower())
    found = session.execute(theirs.where(library.is_review()).with_for_update(of=ShelfEntry)).first()
    if found is None:
        raise HTTPException(404, "No such review.")
    entry, owner = found
    library.revise_entry(session, entry, book, owner, EntryUpdate(rating=None, review=None))
