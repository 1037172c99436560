"""The change log and the live feed that reads it.

`record` writes an event in the transaction of the change that it tells of: both are committed or neither is. One
tail per process reads what was committed, by this process or another, into a buffer; every stream reads from there
at its own pace, and from the log itself when it lies further back.
"""

import asyncio
import contextlib
import json
import logging
import math
import random
import signal
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple

import anyio
import sqlalchemy as sa
from fastapi import APIRouter, Depends, Header, Query
from pydantic import BaseModel, Field
from sqlalchemy import Connection
from sqlalchemy import event as orm_event
from sqlalchemy.exc import OperationalError
from sqlmodel import Session, col
from sse_starlette import EventSourceResponse, ServerSentEvent

import database
from models import BlankIsNull, Event, EventPublic, Principal, Role, Setting, Shape

log = logging.getLogger("books.events")

LOOK_SECONDS = 5  # without being told that there is something new
HEARTBEAT_SECONDS = 15  # well under the 55 s after which Heroku's router cuts a silent connection
BUFFER = 1000  # events kept in memory; a stream further back than that reads the log
BATCH = 500
EVENT_ID_MAX = 2**63 - 1


class Logged(NamedTuple):
    """A row of the log, as the feed keeps it. `data` is the JSON text as stored: serialised once for all streams."""

    id: int
    type: str
    private: bool
    user_id: int | None
    data: str


# --- writing ------------------------------------------------------------------------------------------------------


def record(
    session: Session,
    type: str,  # noqa: A002
    data: dict[str, Any],
    owner: int | None = None,
    *,
    private: bool = False,
) -> None:
    """Log a change, in the transaction that makes it. With `owner` it is private: only that user will see it.

    Admins also see what happens to accounts (`account.*`), which may be private without an owner who is still there.
    """
    session.add(Event(type=type, data=data, user_id=owner, private=private or owner is not None))
    session.info["recorded"] = True


def forget_reviewer(session: Session, username: str) -> None:
    """Take a name out of the log: its owner is gone, and another may come to have it."""
    theirs = sa.and_(col(Event.type).startswith("review."), Event.data["username"].as_string() == username)
    session.flush()
    for event in session.scalars(sa.select(Event).where(theirs)):
        event.data = {**event.data, "username": None}


@orm_event.listens_for(Session, "before_commit")
def _tell_other_processes(session: Session) -> None:
    if session.info.get("recorded", False):
        database.backend().announce(session)


@orm_event.listens_for(Session, "after_commit")
def _tell_the_feed(session: Session) -> None:
    if session.info.pop("recorded", False):
        feed.wake()


# --- reading ------------------------------------------------------------------------------------------------------


def head(connection: Connection) -> int:
    """The id of the last committed event; what "everything up to now" means."""
    newest = sa.select(sa.func.max(col(Event.id))).scalar_subquery()
    return int(connection.execute(sa.select(sa.func.coalesce(newest, _floor_query()))).scalar_one())


def floor(connection: Connection) -> int:
    """Ids up to this one are not in the log, or no longer."""
    return int(connection.execute(sa.select(_floor_query())).scalar_one())


def _floor_query() -> sa.ScalarSelect[int]:
    value = sa.cast(Setting.value, sa.BigInteger)
    return sa.select(value).where(col(Setting.key) == "event_floor").scalar_subquery()


def after(connection: Connection, cursor: int, limit: int = BATCH) -> list[Logged]:
    """The events that follow `cursor`, whoever they are for."""
    text = sa.cast(Event.data, sa.Text)
    columns = (col(Event.id), col(Event.type), col(Event.private), col(Event.user_id), text)
    rows = connection.execute(sa.select(*columns).where(col(Event.id) > cursor).order_by(col(Event.id)).limit(limit))
    return [Logged(*row) for row in rows]


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
        return event.user_id == self.viewer.id or (self.viewer.role == Role.admin and event.type.startswith("account."))

    def condition(self) -> sa.ColumnElement[bool]:
        """The same in SQL."""
        visible = sa.not_(col(Event.private))
        if self.viewer is not None:
            visible |= col(Event.user_id) == self.viewer.id
            if self.viewer.role == Role.admin:
                visible |= col(Event.type).startswith("account.")
        wanted = [
            col(Event.type).startswith(t[:-1], autoescape=True) if t.endswith("*") else col(Event.type) == t
            for t in self.types
        ]
        return sa.and_(visible, sa.or_(*wanted)) if wanted else visible


def _matches(type_: str, pattern: str) -> bool:
    return type_.startswith(pattern[:-1]) if pattern.endswith("*") else type_ == pattern


# --- the feed -----------------------------------------------------------------------------------------------------


@dataclass
class Feed:
    """This process's tail of the log. Lives on the event loop; only `wake` may be called from elsewhere."""

    buffer: deque[Logged] = field(default_factory=lambda: deque(maxlen=BUFFER))
    start: int = 0  # the buffer holds everything after this id, and up to `head`
    head: int = 0
    closing: anyio.Event | None = None  # sse-starlette sets it at SIGTERM
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _nudged: asyncio.Event = field(default_factory=asyncio.Event)
    _loop: asyncio.AbstractEventLoop | None = None

    def wake(self) -> None:
        """This process has committed an event. Safe from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: a job's last commit at shutdown
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._nudged.set)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        self.buffer.clear()
        self.start = self.head = await database.read(head)
        self.closing, self._changed, self._nudged = anyio.Event(), asyncio.Event(), asyncio.Event()
        self._loop = asyncio.get_running_loop()
        # anyio's cancelling, unlike asyncio's, waits for what is in a thread: it still needs the database.
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._tail)
            tasks.start_soon(self._close)
            tasks.start_soon(database.backend().watch, self._nudged.set)
            try:
                yield
            finally:
                self._loop = None
                tasks.cancel_scope.cancel()

    async def _tail(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._nudged.wait(), LOOK_SECONDS)
            self._nudged.clear()
            try:
                while events := await database.read(after, self.head):
                    self._append(events)
                    await asyncio.sleep(0)
            except OperationalError as error:  # it may be better in a while; what was missed is still in the log
                log.error("can't read the change log: %s", error)
                await asyncio.sleep(1)
                self._nudged.set()

    def _append(self, events: Sequence[Logged]) -> None:
        for event in events:
            if len(self.buffer) == BUFFER:
                self.start = self.buffer[0].id
            self.buffer.append(event)
        self.head = events[-1].id
        self._tell_streams()

    def _tell_streams(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _close(self) -> None:
        assert self.closing is not None
        await self.closing.wait()
        self._tell_streams()

    async def since(self, cursor: int) -> Sequence[Logged]:
        """What follows `cursor`: from the buffer, or from the log where the buffer no longer reaches back."""
        if cursor >= self.head:
            return ()
        if cursor < self.start:
            return [event for event in await database.read(after, cursor) if event.id <= self.head]
        # From the newest end: a stream that keeps up looks at no more than what is new to it.
        new: deque[Logged] = deque()
        for event in reversed(self.buffer):
            if event.id <= cursor:
                break
            new.appendleft(event)
        return new

    async def follow(
        self,
        wanted: Filter,
        cursor: int | None,
        limit: int | None,
        seconds: float | None,
        is_still: Callable[[Principal], Awaitable[bool]],
    ) -> AsyncIterator[ServerSentEvent]:
        """The frames of one stream. It ends by itself at its limits, when the server is about to stop, and when its
        viewer's token is no good any more."""
        assert self.closing is not None
        position, lost = await database.read(_resume, cursor)
        retry = random.randint(1500, 2500)  # noqa: S311  # spreads the clients that all lost one server
        yield ServerSentEvent(event="ready", data=json.dumps({"head": position.head}), retry=retry)
        if lost:
            reset = {"reason": lost, "oldest": position.floor + 1, "head": position.head}
            yield ServerSentEvent(event="reset", data=json.dumps(reset))
        at = position.cursor
        clock = asyncio.get_running_loop().time
        deadline = math.inf if seconds is None else clock() + seconds
        left = limit if limit is not None else EVENT_ID_MAX
        looked_at = clock()
        while not self.closing.is_set():
            changed = self._changed  # taken before reading: what comes in between is not slept through
            events = await self.since(at)
            for event in events:
                at = event.id
                if wanted.admits(event):
                    if event.private and wanted.viewer and not await is_still(wanted.viewer):
                        return
                    yield ServerSentEvent(id=str(event.id), event=event.type, data=event.data)
                    left -= 1
                    if not left:
                        return
            if clock() >= deadline:
                return
            if clock() - looked_at >= HEARTBEAT_SECONDS:
                looked_at = clock()
                if wanted.viewer and not await is_still(wanted.viewer):
                    return
            if not events:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(min(deadline, looked_at + HEARTBEAT_SECONDS)):
                        await changed.wait()


feed = Feed()


def server_is_stopping() -> bool:
    """Whether uvicorn was told to stop. Its lifespan says so only after the jobs are done, which is too late."""
    return bool(getattr(getattr(signal.getsignal(signal.SIGTERM), "__self__", None), "should_exit", False))


class Position(NamedTuple):
    cursor: int
    floor: int
    head: int


def _resume(connection: Connection, cursor: int | None) -> tuple[Position, str | None]:
    """Where a client that has seen up to `cursor` goes on, and why it has lost its place, if it has."""
    oldest, newest = floor(connection), head(connection)
    if cursor is None:
        return Position(newest, oldest, newest), None
    if oldest <= cursor <= newest:
        return Position(cursor, oldest, newest), None
    return Position(newest, oldest, newest), "expired" if cursor < oldest else "future"


# --- routes -------------------------------------------------------------------------------------------------------

Types = Annotated[
    str,
    Field(
        max_length=500,
        pattern=r"^(\*|[a-z]+\.(\*|[a-z_]+))(,(\*|[a-z]+\.(\*|[a-z_]+)))*$",
        examples=["book.*,review.created"],
    ),
]
TypesParameter = Annotated[
    Types | None,
    BlankIsNull,
    Field(description="Only these types, separated by commas; `book.*` means all of the book."),
]
EventId = Annotated[int, Field(ge=0, le=EVENT_ID_MAX)]


class EventsQuery(Shape):
    after: EventId = Field(default=0, description="The `next` of the answer before; 0 for the oldest that are kept.")
    limit: Annotated[int, Field(ge=1, le=100)] = 20
    types: TypesParameter = None


class StreamQuery(Shape):
    types: TypesParameter = None
    since: EventId | None = Field(default=None, description="Resume after this id. `Last-Event-ID` wins over it.")
    limit: Annotated[int | None, Field(ge=1, le=10_000, description="End after so many events.")] = None
    seconds: Annotated[float | None, Field(gt=0, le=86_400, description="End after so many seconds.")] = None


class EventPage(BaseModel):
    items: list[EventPublic]
    next: int = Field(description="Give it as `after` to read on. At the end of the log, ask again with it later.")


STREAM = {
    "description": "Frames, until the client closes.",
    "content": {"text/event-stream": {"schema": {"type": "string"}}},
}


def split_types(types: str | None) -> tuple[str, ...]:
    return tuple(types.split(",")) if types else ()


def build_router(
    identify: Callable[..., Awaitable[Principal | None]], is_still: Callable[[Principal], Awaitable[bool]]
) -> APIRouter:
    """The routes. `identify` tells who asks, `is_still` whether they may still: signing in is built on this module."""
    router = APIRouter(tags=["Changes"])
    Viewer = Annotated[Principal | None, Depends(identify)]  # noqa: N806

    @router.get("/events")
    async def list_events(query: Annotated[EventsQuery, Query()], viewer: Viewer) -> EventPage:
        """The change log, oldest first, for clients that poll.

        Public changes for anyone; with a bearer token also your own private ones.
        """
        wanted = Filter(viewer, split_types(query.types))
        return await database.scan(_events_page, wanted, query)

    @router.get("/stream", response_class=EventSourceResponse, responses={200: STREAM})
    async def stream(
        query: Annotated[StreamQuery, Query()],
        viewer: Viewer,
        last_event_id: Annotated[EventId | None, Header()] = None,
    ) -> EventSourceResponse:
        """Every change as it is committed, as Server-Sent Events.

        The first frame is `ready`. To see it end here in the docs, give `limit` or `seconds`. A client that comes
        back sends the last `id` it saw as `Last-Event-ID` and gets what it missed; where that is no longer known it
        gets `reset` and goes on live.
        """
        cursor = last_event_id if last_event_id is not None else query.since
        frames = feed.follow(Filter(viewer, split_types(query.types)), cursor, query.limit, query.seconds, is_still)
        return EventSourceResponse(
            frames,
            ping=HEARTBEAT_SECONDS,
            ping_message_factory=lambda: ServerSentEvent(comment="still here"),
            sep="\n",
            shutdown_event=feed.closing,
            shutdown_grace_period=2,
        )

    return router


def _events_page(connection: Connection, wanted: Filter, query: EventsQuery) -> EventPage:
    rows = connection.execute(
        sa.select(col(Event.id), col(Event.at), col(Event.type), col(Event.data))
        .where(col(Event.id) > query.after, wanted.condition())
        .order_by(col(Event.id))
        .limit(query.limit)
    ).all()
    items = [EventPublic.model_validate(row, from_attributes=True) for row in rows]
    return EventPage(items=items, next=items[-1].id if len(items) == query.limit else head(connection))
