"""Once a day, new books from Google Books, where HARVEST_QUERY asks for them."""

import logging
from datetime import timedelta

import sqlalchemy as sa
from fastapi import HTTPException
from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, col

import catalogues
import database
import events
import models
import schemas
from books import add_book
from models import Role, Setting, User
from settings import settings
from sources import Source

log = logging.getLogger("books.harvest")

LOOK_SECONDS = 300  # between two looks whether it is time
DAY, RETRY = timedelta(days=1), timedelta(hours=1)
PAGE, PAGES = 40, 5  # books to a page, and pages: the newest come first
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
        await database.write(_end, {"query": query, **counts})


async def _fail(query: str, why: str) -> None:
    log.error("the harvest failed, and is tried again in an hour: %s", why)
    await database.write(_tell, "harvest.failed", {"query": query, "error": why})


def _is_due(connection: Connection) -> bool:
    due = connection.execute(sa.select(col(Setting.value)).where(col(Setting.key) == DUE)).scalar()
    return due is None or due <= _stamp()


def _stamp(later: timedelta = timedelta(0)) -> str:
    """A time whose order is that of its letters."""
    return (models.utcnow() + later).strftime("%Y-%m-%dT%H:%M:%SZ")


async def _claim() -> bool:
    try:
        return await database.write(_take_turn)
    except IntegrityError:  # another worker was the first ever, at the same moment
        return False


def _take_turn(session: Session) -> bool:
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
    for page in range(PAGES):
        wanted = catalogues.Search(query, start=page * PAGE, limit=PAGE, newest=True)
        found = await catalogues.search(Source.google, wanted, patience=catalogues.A_JOB_WAITS, cached=False)
        for candidate in found.items:
            counts["found"] += 1
            # Without an ISBN nothing tells whether it is here already: it would come in every day.
            added = candidate.isbn is not None and await _add(candidate.book(), admin)
            counts["added" if added else "skipped"] += 1
        if (page + 1) * PAGE >= found.total or not found.items:
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


def _end(session: Session, told: dict[str, object]) -> None:
    session.get_one(Setting, DUE).value = _stamp(DAY)
    _tell(session, "harvest.completed", told)


def _tell(session: Session, what: str, told: dict[str, object]) -> None:
    events.record(session, what, told, private=True)
