"""The change log: writing events, `/events` for clients that poll, and `/stream` for those that listen.

`record` writes an event in the transaction of its change: both are committed or neither is. One tail per process reads
what was committed, by this process or another, into a buffer from which all streams read.
"""

import asyncio
import contextlib
import json
import logging
import math
import random
import socket
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple, ParamSpec, TypeVar

import anyio
import sqlalchemy as sa
from fastapi import Header, HTTPException, Query, Request
from pydantic import BaseModel, Field
from sqlalchemy import Connection
from sqlalchemy import event as orm_event
from sqlalchemy.exc import OperationalError
from sqlmodel import Session, col
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import SendTimeoutError
from starlette.types import Receive, Scope, Send

import database
import models
import security
from api import Router, errors
from database import CompiledQuery, Insert
from models import Event, Principal, Role, Setting
from pagination import last_event_id, pruned_up_to_query
from schemas import BlankIsNull, EventPublic, RequestModel, pattern
from security import Viewer, is_token_valid
from settings import settings

log = logging.getLogger("books.events")

READ_BATCH = 500
MAX_EVENT_ID = 2**63 - 1
INSERT_EVENT = Insert(Event)
FOR_ADMINS = ("account.", "harvest.")


class LoggedEvent(NamedTuple):
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
    INSERT_EVENT(session, {"at": models.utcnow(), "type": type, "data": data, **shown_to})
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


def anonymize_reviewer(session: Session, username: str) -> None:
    """Take a name out of the log: its owner is gone, and another may come to have it."""
    theirs = sa.and_(col(Event.type).startswith("review."), Event.data["username"].as_string() == username)
    session.flush()
    for event in session.scalars(sa.select(Event).where(theirs)):
        event.data = {**event.data, "username": None}


# --- reading ------------------------------------------------------------------------------------------------------


PRUNED_UP_TO = CompiledQuery(sa.select(pruned_up_to_query()))


def pruned_up_to(connection: Connection) -> int:
    """Ids up to this one are not in the log, or no longer."""
    return int(PRUNED_UP_TO.first(connection)[0])


EVENTS_AFTER = CompiledQuery(
    sa.select(col(Event.id), col(Event.type), col(Event.private), col(Event.user_id), sa.cast(Event.data, sa.Text))
    .where(col(Event.id) > sa.bindparam("cursor", type_=sa.BigInteger))
    .order_by(col(Event.id))
    .limit(sa.bindparam("most", type_=sa.Integer))
)


def events_after(connection: Connection, cursor: int, limit: int = READ_BATCH) -> list[LoggedEvent]:
    """The events that follow `cursor`, whoever they are for."""
    rows = EVENTS_AFTER.all(connection, {"cursor": cursor, "most": limit})
    return [
        LoggedEvent(number, kind, bool(private), user_id, event_frame(number, kind, data))
        for number, kind, private, user_id, data in rows
    ]


def event_frame(id: int, type: str, data: str) -> bytes:  # noqa: A002  # as in the table
    """As Server-Sent Events have it. JSON text as it is stored has no line breaks."""
    return f"id: {id}\nevent: {type}\ndata: {data}\n\n".encode()


@dataclass(frozen=True)
class EventFilter:
    """Which events a client gets: of the types it asked for, those that are public or its own."""

    viewer: Principal | None
    types: tuple[str, ...] = ()

    def admits(self, event: LoggedEvent) -> bool:
        return self._may_see(event) and (not self.types or any(_matches(event.type, t) for t in self.types))

    def _may_see(self, event: LoggedEvent) -> bool:
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

PRUNE_BATCH = 1000  # some 5 ms in which writers wait


def prune(session: Session) -> bool:
    """Delete some of the oldest events beyond EVENT_RETENTION; whether there are more."""
    newest_first = sa.select(col(Event.id)).order_by(col(Event.id).desc())
    newest_to_go = session.scalars(newest_first.offset(settings.event_retention).limit(1)).first()
    if newest_to_go is None:
        return False
    oldest = sa.select(col(Event.id)).where(col(Event.id) <= newest_to_go).order_by(col(Event.id))
    going = session.scalars(oldest.limit(PRUNE_BATCH)).all()
    session.execute(sa.delete(Event).where(col(Event.id) <= going[-1]))
    session.execute(sa.update(Setting).where(col(Setting.key) == "event_floor").values(value=str(going[-1])))
    return going[-1] < newest_to_go


def record_account_event(session: Session, /, user_id: int | None, what: str, **data: object) -> None:
    """Keep in the log what happened to an account, for its owner and admins to read.

    What was tried on an account that there is not is kept, too: ids of events are public, and one that is missing
    would tell who has an account.
    """
    record(session, f"account.{what}", data, owner=user_id, private=True)


T = TypeVar("T")
P = ParamSpec("P")
router = Router(tags=["Changes"])

POLL_INTERVAL = 5  # without being told that there is something new
HEARTBEAT_INTERVAL = 15  # well under the 55 s after which Heroku's router cuts a silent connection
SEND_TIMEOUT = 30  # a client that takes nothing for so long is closed; it comes back and gets what it missed
TCP_USER_TIMEOUT = 45  # without an acknowledgement, after which the system gives a connection up
MAX_CHUNK = 64_000  # bytes that are sent at once
MAX_PAUSE = 0.25  # at most, after telling the streams
BUFFER_SIZE = 1000  # events kept in memory; a stream further back than that reads the log
# Some 50 KB each: a dyno of 512 MB has room for so many; and no single place can take them all.
MAX_STREAMS, MAX_STREAMS_PER_ADDRESS = 4000, 1500


@orm_event.listens_for(Session, "before_commit")
def _notify_other_processes(session: Session) -> None:
    if session.info.get("recorded", False):
        database.backend().notify_listeners(session)


@orm_event.listens_for(Session, "after_commit")
def _notify_tail(session: Session) -> None:
    if session.info.pop("recorded", False):
        tail.wake()


# --- the feed -----------------------------------------------------------------------------------------------------


@dataclass
class EventTail:
    """This process's tail of the log. Lives on the event loop; only `wake` may be called from elsewhere."""

    buffer: deque[LoggedEvent] = field(default_factory=lambda: deque(maxlen=BUFFER_SIZE))
    start: int = 0  # the buffer holds everything after this id, and up to `last_event_id`
    last_event_id: int = 0
    closing: anyio.Event | None = None  # sse-starlette sets it at SIGTERM
    streams: Counter[str] = field(default_factory=Counter)  # how many are open, by address
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _woken: asyncio.Event = field(default_factory=asyncio.Event)
    _loop: asyncio.AbstractEventLoop | None = None

    def wake(self) -> None:
        """This process has committed an event. Safe from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: a job's last commit at shutdown
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._woken.set)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        self.buffer.clear()
        self.start = self.last_event_id = await database.read(last_event_id)
        self.closing, self._changed, self._woken = anyio.Event(), asyncio.Event(), asyncio.Event()
        self._loop = asyncio.get_running_loop()
        # anyio's cancelling, unlike asyncio's, waits for what is in a thread: it still needs the database.
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._tail)
            tasks.start_soon(self._close)
            tasks.start_soon(database.backend().listen, self._woken.set)
            try:
                yield
            finally:
                self._loop = None
                tasks.cancel_scope.cancel()

    async def _tail(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), POLL_INTERVAL)
            self._woken.clear()
            try:
                while events := await database.read(_unpruned_after, self.last_event_id):
                    self._append(events)
                    await self._breathe()
                if events is None:  # pruned before they were read: streams that are not past them will notice
                    self.buffer.clear()
                    self.start = self.last_event_id = await database.read(pruned_up_to)
                    self._woken.set()
            except Exception as error:
                # Whatever it is, it may be better in a while; what was missed is still in the log.
                log.error("can't read the change log: %s", error, exc_info=not isinstance(error, OperationalError))
                await asyncio.sleep(1)
                self._woken.set()

    async def _breathe(self) -> None:
        """Let the streams send, then others do what they came for. Where many write and many listen, what comes
        meanwhile goes out together, so that telling takes no more than a quarter of the time."""
        clock = asyncio.get_running_loop().time
        began = clock()
        for _ in range(2):  # the first wakes the streams, in the second they have sent
            await asyncio.sleep(0)
        await asyncio.sleep(min(MAX_PAUSE, 3 * (clock() - began)))

    def _append(self, events: Sequence[LoggedEvent]) -> None:
        for event in events:
            if event.type == "account.deleted":  # the log has taken the name out of what was before
                self.buffer.clear()
                self.start = event.id - 1
            if len(self.buffer) == BUFFER_SIZE:
                self.start = self.buffer[0].id
            self.buffer.append(event)
        self.last_event_id = events[-1].id
        self._tell_streams()

    def _tell_streams(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _close(self) -> None:
        assert self.closing is not None
        await self.closing.wait()
        self._tell_streams()

    async def since(self, cursor: int) -> Sequence[LoggedEvent] | None:
        """What follows `cursor`: from the buffer, or from the log where the buffer no longer reaches back; None where
        the log no longer does."""
        if cursor >= self.last_event_id:
            return ()
        if cursor < self.start:
            kept = await database.read(_unpruned_after, cursor)
            return kept and [event for event in kept if event.id <= self.last_event_id]
        # From the newest end: a stream that keeps up looks at no more than what is new to it.
        new: deque[LoggedEvent] = deque()
        for event in reversed(self.buffer):
            if event.id <= cursor:
                break
            new.appendleft(event)
        return new

    @contextlib.contextmanager
    def place_for(self, address: str) -> Iterator[None]:
        headers = {"Retry-After": "30"}
        if self.streams.total() >= MAX_STREAMS:
            raise HTTPException(503, "This server has all the streams that it can hold. Try again.", headers)
        if self.streams[address] >= MAX_STREAMS_PER_ADDRESS:
            raise HTTPException(429, "Your address has all the streams that it can have.", headers)
        self.streams[address] += 1
        try:
            yield
        finally:
            self.streams[address] -= 1
            if not self.streams[address]:
                del self.streams[address]

    async def follow(
        self, wanted: EventFilter, cursor: int | None, limit: int | None, seconds: float | None
    ) -> AsyncIterator[bytes]:
        """The frames of one stream. It ends by itself at its limits, when the server is about to stop, and when its
        viewer's token is no good any more."""
        assert self.closing is not None
        position, lost = await retry_until_available(database.read, _resume, cursor)
        retry = random.randint(1500, 2500)  # noqa: S311  # spreads the clients that all lost one server
        yield control_frame("ready", {"head": position.last_event_id}, retry=retry)
        if lost:
            yield control_frame(
                "reset", {"reason": lost, "oldest": position.pruned_up_to + 1, "head": position.last_event_id}
            )
        at = position.cursor
        clock = asyncio.get_running_loop().time
        deadline = math.inf if seconds is None else clock() + seconds
        left = limit if limit is not None else MAX_EVENT_ID
        looked_at = clock()
        while not self.closing.is_set():
            changed = self._changed  # taken before reading: what comes in between is not slept through
            events = await retry_until_available(self.since, at)
            if events is None:
                return  # the client comes back, and is told that it has lost its place
            chunk, size = [], 0
            for event in events:
                at = event.id
                if wanted.admits(event):
                    if (
                        event.private
                        and wanted.viewer
                        and not await retry_until_available(is_token_valid, wanted.viewer)
                    ):
                        left = 0
                        break
                    chunk.append(event.frame)
                    size += len(event.frame)
                    left -= 1
                    if not left or size >= MAX_CHUNK:
                        break
            if chunk:
                yield b"".join(chunk)
            if not left or clock() >= deadline:
                return
            if clock() - looked_at >= HEARTBEAT_INTERVAL:
                looked_at = clock()
                if wanted.viewer and not await retry_until_available(is_token_valid, wanted.viewer):
                    return
            if not events:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(min(deadline, looked_at + HEARTBEAT_INTERVAL)):
                        await changed.wait()


async def retry_until_available(read: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
    """For as long as it takes: a stream outlives a database that is started anew."""
    while True:
        try:
            return await read(*args, **kwargs)
        except OperationalError:  # which the tail tells the log
            await asyncio.sleep(1)


def control_frame(event: str, data: dict[str, Any], retry: int | None = None) -> bytes:
    """A frame that does not move a client's place."""
    return ServerSentEvent(event=event, data=json.dumps(data), retry=retry, sep="\n").encode()


tail = EventTail()


def _unpruned_after(connection: Connection, cursor: int) -> Sequence[LoggedEvent] | None:
    """What follows `cursor`; None where some of it was pruned."""
    return events_after(connection, cursor) if cursor >= pruned_up_to(connection) else None


class StreamPosition(NamedTuple):
    cursor: int
    pruned_up_to: int
    last_event_id: int


def _resume(connection: Connection, cursor: int | None) -> tuple[StreamPosition, str | None]:
    """Where a client that has seen up to `cursor` goes on, and why it has lost its place, if it has."""
    oldest, newest = pruned_up_to(connection), last_event_id(connection)
    if cursor is None:
        return StreamPosition(newest, oldest, newest), None
    if oldest <= cursor <= newest:
        return StreamPosition(cursor, oldest, newest), None
    return StreamPosition(newest, oldest, newest), "expired" if cursor < oldest else "future"


# --- routes -------------------------------------------------------------------------------------------------------

Types = Annotated[
    str,
    Field(
        max_length=500,
        pattern=pattern(
            r"^(\*|[a-z]+\.(\*|[a-z_]+))(,(\*|[a-z]+\.(\*|[a-z_]+)))*$",
            "must be types of events with commas between them, like book.*,review.created",
        ),
        examples=["book.*,review.created"],
    ),
]
TypesParameter = Annotated[
    Types | None,
    BlankIsNull,
    Field(description="Only these types, separated by commas; `book.*` means all of the book."),
]
EventId = Annotated[int, Field(ge=0, le=MAX_EVENT_ID)]


class EventsQuery(RequestModel):
    after: EventId = Field(default=0, description="The `next` of the answer before; 0 for the oldest that are kept.")
    limit: Annotated[int, Field(ge=1, le=100)] = 20
    types: TypesParameter = None


class StreamQuery(RequestModel):
    types: TypesParameter = None
    since: EventId | None = Field(default=None, description="Resume after this id. `Last-Event-ID` wins over it.")
    limit: Annotated[int | None, Field(ge=1, le=10_000, description="End after so many events.")] = None
    seconds: Annotated[
        float | None, Field(gt=0, le=86_400, allow_inf_nan=False, description="End after so many seconds.")
    ] = None


class EventPage(BaseModel):
    items: list[EventPublic]
    next: int = Field(description="Give it as `after` to read on. At the end of the log, ask again with it later.")


TEXT = {"type": "string"}
FRAME = {
    "type": "object",
    "properties": {"id": TEXT, "event": TEXT, "data": TEXT, "retry": {"type": "integer"}},
    "example": {"id": "1795254571301", "event": "book.deleted", "data": '{"id": 1, "title": "Dune"}'},
}
STREAM = {
    "description": "Frames, until the client closes.",
    "content": {"text/event-stream": {"itemSchema": FRAME}},
}


def split_types(types: str | None) -> tuple[str, ...]:
    return tuple(types.split(",")) if types else ()


@router.get("/events")
async def list_events(query: Annotated[EventsQuery, Query()], viewer: Viewer) -> EventPage:
    """The change log, oldest first, for clients that poll.

    Public changes for anyone; with a bearer token also your own private ones.
    """
    wanted = EventFilter(viewer, split_types(query.types))
    return await database.read_in_thread(_events_page, wanted, query)


@router.get("/stream", response_class=EventSourceResponse, responses=errors(429) | {200: STREAM})
async def stream(
    query: Annotated[StreamQuery, Query()],
    viewer: Viewer,
    last_event_id: Annotated[EventId | None, Header()] = None,
) -> EventSourceResponse:
    """Every change as it is committed, as Server-Sent Events.

    The first frame is `ready`. To see it end here in the docs, give `limit` or `seconds`. A client that comes back
    sends the last `id` it saw as `Last-Event-ID` and gets what it missed; where that is no longer known it gets
    `reset` and goes on live.
    """
    cursor = last_event_id if last_event_id is not None else query.since
    frames = tail.follow(EventFilter(viewer, split_types(query.types)), cursor, query.limit, query.seconds)
    return EventStreamResponse(
        frames,
        ping=HEARTBEAT_INTERVAL,
        ping_message_factory=lambda: ServerSentEvent(comment="still here", sep="\n"),
        sep="\n",
        send_timeout=SEND_TIMEOUT,
        shutdown_event=tail.closing,
        shutdown_grace_period=2,
    )


class EventStreamResponse(EventSourceResponse):
    """Counted among the streams, and rid of a client that takes nothing, whatever still waits to be sent to it."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        transport: asyncio.Transport | None = scope.get("books.transport")
        if transport is not None:
            _limit_silence(transport)
        with tail.place_for(security.client_address(Request(scope))):
            try:
                await super().__call__(scope, receive, send)
            except* SendTimeoutError:
                log.info("closed a stream whose client took nothing for %s s", SEND_TIMEOUT)
                if transport is not None:  # merely closed, it would stay for as long as the client does
                    transport.abort()
                    await asyncio.sleep(0)


def _limit_silence(transport: asyncio.Transport) -> None:
    """For clients that vanished without a word: by itself the system tries for a quarter of an hour to reach them."""
    option = getattr(socket, "TCP_USER_TIMEOUT", None)  # of Linux
    with contextlib.suppress(OSError):  # no TCP
        if option is not None:
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, option, TCP_USER_TIMEOUT * 1000)


def _events_page(connection: Connection, wanted: EventFilter, query: EventsQuery) -> EventPage:
    rows = connection.execute(
        sa.select(col(Event.id), col(Event.at), col(Event.type), col(Event.data))
        .where(col(Event.id) > query.after, wanted.condition())
        .order_by(col(Event.id))
        .limit(query.limit)
    ).all()
    items = [EventPublic.model_validate(row, from_attributes=True) for row in rows]
    return EventPage(items=items, next=items[-1].id if len(items) == query.limit else last_event_id(connection))
