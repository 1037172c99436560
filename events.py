"""The change log: writing it, reading it, and who may see what.

`record` writes an event in the transaction of the change that it tells of: both are committed or neither is.
"""

import logging
import signal
from dataclasses import dataclass
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy import Connection
from sqlmodel import Session, col

import database
import models
from database import CompiledQuery, Insert
from models import Event, Principal, Role, Setting
from settings import settings

log = logging.getLogger("books.events")

BATCH = 500
EVENT_ID_MAX = 2**63 - 1
ADD = Insert(Event)
FOR_ADMINS = ("account.", "harvest.")


class Logged(NamedTuple):
    """A row of the log, as the feed keeps it, with its frame: made once for all streams."""

    id: int
    type: str
    private: bool
    user_id: int | None
    frame: bytes


# --- writing ------------------------------------------------------------------------------------------------------


def record(
    session: Session,
    type: str,  # noqa: A002  # as in the table
    data: dict[str, Any],
    owner: int | None = None,
    *,
    private: bool = False,
) -> None:
    """Log a change, in the transaction that makes it. With `owner` it is private: only that user will see it.

    Admins also see what happens to accounts (`account.*`), which may be private without an owner who is still there,
    and what the daily job did (`harvest.*`), which has none.
    """
    shown_to = {"user_id": owner, "private": private or owner is not None}
    ADD(session, {"at": models.utcnow(), "type": type, "data": data, **shown_to})
    session.info["recorded"] = True


def record_each(session: Session, type: str, rows: sa.Select[Any]) -> None:  # noqa: A002  # as in the table
    """Log a public change for each of these rows, whose only column is its data as JSON."""
    data: Any = rows.selected_columns[0]
    if database.is_postgresql():
        data = sa.cast(data, sa.JSON)
    moment = sa.literal(models.utcnow(), models.UtcDateTime)
    columns = ("at", "type", "data", "private")
    told = rows.with_only_columns(moment, sa.literal(type), data, sa.false(), maintain_column_froms=True)
    session.execute(sa.insert(Event).from_select(columns, told))
    session.info["recorded"] = True


def forget_reviewer(session: Session, username: str) -> None:
    """Take a name out of the log: its owner is gone, and another may come to have it."""
    theirs = sa.and_(col(Event.type).startswith("review."), Event.data["username"].as_string() == username)
    session.flush()
    for event in session.scalars(sa.select(Event).where(theirs)):
        event.data = {**event.data, "username": None}


# --- reading ------------------------------------------------------------------------------------------------------


def _floor_query() -> sa.ScalarSelect[int]:
    value = sa.cast(Setting.value, sa.BigInteger)
    return sa.select(value).where(col(Setting.key) == "event_floor").scalar_subquery()


FLOOR = CompiledQuery(sa.select(_floor_query()))


def floor(connection: Connection) -> int:
    """Ids up to this one are not in the log, or no longer."""
    return int(FLOOR.first(connection)[0])


HEAD = CompiledQuery(
    sa.select(sa.func.coalesce(sa.select(sa.func.max(col(Event.id))).scalar_subquery(), _floor_query()))
)


def head(connection: Connection) -> int:
    """The id of the last committed event; what "everything up to now" means."""
    return int(HEAD.first(connection)[0])


AFTER = CompiledQuery(
    sa.select(col(Event.id), col(Event.type), col(Event.private), col(Event.user_id), sa.cast(Event.data, sa.Text))
    .where(col(Event.id) > sa.bindparam("cursor", type_=sa.BigInteger))
    .order_by(col(Event.id))
    .limit(sa.bindparam("most", type_=sa.Integer))
)


def after(connection: Connection, cursor: int, limit: int = BATCH) -> list[Logged]:
    """The events that follow `cursor`, whoever they are for."""
    rows = AFTER.all(connection, {"cursor": cursor, "most": limit})
    return [
        Logged(number, kind, bool(private), user_id, frame(number, kind, data))
        for number, kind, private, user_id, data in rows
    ]


def frame(id: int, type: str, data: str) -> bytes:  # noqa: A002  # as in the table
    """As Server-Sent Events have it. JSON text as it is stored has no line breaks."""
    return f"id: {id}\nevent: {type}\ndata: {data}\n\n".encode()


@dataclass(frozen=True)
class Filter:
    """Which events a client gets: of the types it asked for, those that are public or its own."""

    viewer: Principal | None
    types: tuple[str, ...] = ()

    def admits(self, event: Logged) -> bool:
        return self._may_see(event) and (not self.types or any(_matches(event.type, t) for t in self.types))

    def _may_see(self, event: Logged) -> bool:
        if not event.private:
            return True
        if self.viewer is None:
            return False
        is_theirs = self.viewer.role == Role.admin and event.type.startswith(FOR_ADMINS)
        return event.user_id == self.viewer.id or is_theirs

    def condition(self) -> sa.ColumnElement[bool]:
        """The same in SQL."""
        visible = sa.not_(col(Event.private))
        if self.viewer is not None:
            visible |= col(Event.user_id) == self.viewer.id
            if self.viewer.role == Role.admin:
                visible |= sa.or_(*(col(Event.type).startswith(kind) for kind in FOR_ADMINS))
        wanted = [
            col(Event.type).startswith(t[:-1], autoescape=True) if t.endswith("*") else col(Event.type) == t
            for t in self.types
        ]
        return sa.and_(visible, sa.or_(*wanted)) if wanted else visible


def _matches(type_: str, pattern: str) -> bool:
    return type_.startswith(pattern[:-1]) if pattern.endswith("*") else type_ == pattern


# --- keeping it bounded -------------------------------------------------------------------------------------------

PRUNED_AT_ONCE = 1000  # some 5 ms in which writers wait


def prune(session: Session) -> bool:
    """Delete some of the oldest events beyond EVENT_RETENTION; whether there are more."""
    newest_first = sa.select(col(Event.id)).order_by(col(Event.id).desc())
    newest_to_go = session.scalars(newest_first.offset(settings.event_retention).limit(1)).first()
    if newest_to_go is None:
        return False
    oldest = sa.select(col(Event.id)).where(col(Event.id) <= newest_to_go).order_by(col(Event.id))
    going = session.scalars(oldest.limit(PRUNED_AT_ONCE)).all()
    session.execute(sa.delete(Event).where(col(Event.id) <= going[-1]))
    session.execute(sa.update(Setting).where(col(Setting.key) == "event_floor").values(value=str(going[-1])))
    return going[-1] < newest_to_go


def server_is_stopping() -> bool:
    """Whether uvicorn was told to stop. Its lifespan says so only after the jobs are done, which is too late."""
    return bool(getattr(getattr(signal.getsignal(signal.SIGTERM), "__self__", None), "should_exit", False))


def record_account_event(session: Session, /, user_id: int | None, what: str, **data: object) -> None:
    """Keep in the log what happened to an account, for its owner and admins to read.

    What was tried on an account that there is not is kept, too: ids of events are public, and one that is missing
    would tell who has an account.
    """
    record(session, f"account.{what}", data, owner=user_id, private=True)
