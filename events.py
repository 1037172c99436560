"""The event log, `/events` for clients that poll it, and `/stream`, which sends it as Server-Sent Events.

`record` writes an event in the transaction of its change: both are committed or neither is. Each process has one
`EventTail`, which reads committed events, of all processes, into a buffer that serves its streams.
"""

import asyncio
import contextlib
import functools
import json
import logging
import math
import random
import socket
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Annotated, Any, Literal, NamedTuple

import anyio
import sqlalchemy as sa
from fastapi import Header, HTTPException, Query, Request
from pydantic import BaseModel, Field, FiniteFloat
from sqlalchemy import Connection
from sqlalchemy.exc import OperationalError
from sqlmodel import Session, col
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import SendTimeoutError
from starlette.types import Receive, Scope, Send

import database
import models
import security
from api import Router, errors, readonly
from database import CompiledQuery, P, T
from models import Event, Principal, Role, Setting
from pagination import LOG_FLOOR, last_event_id
from schemas import BlankIsNull, EventPublic, RequestModel, pattern
from security import Viewer, is_token_valid
from settings import settings

log = logging.getLogger("books.events")
router = Router(tags=["Changes"])

MAX_EVENT_ID = 2**63 - 1
ADMIN_TYPES = ("account.", "harvest.")  # private, but visible to every admin
READ_BATCH, STREAM_BATCH = 500, 100  # events read at once by the tail, and by a stream that is behind: some 40 KB
SLICE = 1000  # rows of the log that are filtered at once
MAX_SLICES = 10  # for one answer to a client that polls
PRUNE_BATCH = 1000  # some 5 ms in which other writers wait

POLL_INTERVAL = 0.1  # seconds between reads of the log for commits of other processes; one takes 20 µs on SQLite
HEARTBEAT_INTERVAL = 15  # Heroku's router closes a connection after 55 s of silence
SEND_TIMEOUT = 30  # a client that reads nothing for so long is disconnected; it resumes when it reconnects
TCP_USER_TIMEOUT = 45  # seconds without an acknowledgement after which Linux drops a connection; by default some 900
BUFFER_SIZE = 1000  # events in memory; a stream that is further behind reads the log
MAX_CHUNK = 64_000  # bytes
MAX_PAUSE = 0.25  # seconds between two reads of the log
# A stream takes some 50 KB: a dyno of 512 MB has room for 4,000, and one address can't take them all.
MAX_STREAMS, MAX_STREAMS_PER_ADDRESS = 4000, 1500

# --- writing ------------------------------------------------------------------------------------------------------

INSERT_EVENT = CompiledQuery(sa.insert(Event))
# What is left of an event of a deleted account: its id, which clients hold as their position in the log.
ERASED = {"type": "erased", "private": True, "user_id": None, "data": {}}


def record(
    session: Session, event_type: str, data: dict[str, Any], owner: int | None = None, *, private: bool | None = None
) -> None:
    """Log a change, in its transaction. With `owner` it is deleted with that account and, unless `private` is False,
    visible to that user only.

    Admins also see `account.*`, which may be private without an owner (of an account that is deleted, or never
    existed), and `harvest.*`, which has none.
    """
    visibility = {"user_id": owner, "private": owner is not None if private is None else private}
    INSERT_EVENT.all(session, {"at": models.utcnow(), "type": event_type, "data": data, **visibility})


def continue_ids(session: Session) -> int:
    """The id of the last event. The next ones begin at the time in milliseconds: ids that a restored backup or a power
    cut has lost are not given out twice."""
    statement = "UPDATE sqlite_sequence SET seq = max(seq, :now) WHERE name = 'event'"
    if database.is_postgresql():
        statement = "SELECT setval('event_id_seq', greatest(last_value, :now)) FROM event_id_seq"
    session.execute(sa.text(statement), {"now": int(models.utcnow().timestamp() * 1000)})
    return last_event_id(session.connection())


def record_account_event(session: Session, user_id: int | None, event: str, /, **data: object) -> None:
    """Log what happened to an account, for its owner and admins.

    Attempts on accounts that do not exist are logged too: event ids are public, and a missing one would show which
    accounts exist.
    """
    record(session, f"account.{event}", data, owner=user_id, private=True)


def prune(session: Session) -> bool:
    """Delete a batch of the oldest events beyond EVENT_RETENTION; whether more are left to delete."""
    newest_first = sa.select(col(Event.id)).order_by(col(Event.id).desc())
    cutoff = session.scalars(newest_first.offset(settings.event_retention).limit(1)).first()
    if cutoff is None:
        return False
    oldest = sa.select(col(Event.id)).where(col(Event.id) <= cutoff).order_by(col(Event.id))
    *_, last = session.scalars(oldest.limit(PRUNE_BATCH))
    session.execute(sa.delete(Event).where(col(Event.id) <= last))
    session.execute(sa.update(Setting).where(col(Setting.key) == "event_floor").values(value=str(last)))
    return last < cutoff


# --- reading ------------------------------------------------------------------------------------------------------

PRUNED_UP_TO = CompiledQuery(sa.select(LOG_FLOOR))
LOGGED = (col(Event.id), col(Event.type), col(Event.private), col(Event.user_id), sa.cast(Event.data, sa.Text))
EVENTS_AFTER = CompiledQuery(
    sa.select(*LOGGED, LOG_FLOOR)
    .where(col(Event.id) > sa.bindparam("cursor", type_=sa.BigInteger))
    .order_by(col(Event.id))
    .limit(sa.bindparam("limit", type_=sa.Integer))
)


class LoggedEvent(NamedTuple):
    """A row of the log with its Server-Sent Event, which is encoded once for all streams."""

    id: int
    type: str
    private: bool
    user_id: int | None
    frame: bytes


def pruned_up_to(connection: Connection) -> int:
    """The log holds only events with larger ids than this."""
    return int(PRUNED_UP_TO.first(connection)[0])


def logged_events(rows: Sequence[Any]) -> list[LoggedEvent]:
    return [  # JSON text as it is stored has no line breaks
        LoggedEvent(id_, type_, bool(private), user_id, f"id: {id_}\nevent: {type_}\ndata: {data}\n\n".encode())
        for id_, type_, private, user_id, data, *_ in rows
    ]


class Reset(BaseModel):
    """The client must reload its lists: events after its position were pruned (`expired`), or the position is no id of
    this log, perhaps one from before a backup was restored (`future`, `unknown`)."""

    reason: Literal["expired", "future", "unknown"]
    oldest: int = Field(description="The id of the oldest event in the log.", examples=[1795254571301])
    head: int = Field(description="The id of the last event.", examples=[1795254571301])


def check_cursor(connection: Connection, cursor: int | None) -> tuple[int, Reset | None]:
    """The last event's id, and a `reset` unless the log can be read on from `cursor`: the id of an event, or the one
    before it, or the last that was pruned."""
    pruned, last = pruned_up_to(connection), last_event_id(connection)
    cursor = pruned if cursor is None else cursor
    oldest = EVENTS_AFTER.first(connection, {"cursor": pruned, "limit": 1})
    following = EVENTS_AFTER.first(connection, {"cursor": cursor - 1, "limit": 1})
    if cursor == pruned or (cursor > pruned and following is not None and following[0] <= cursor + 1):
        return last, None
    reason: Any = "expired" if cursor < pruned else "future" if following is None else "unknown"
    return last, Reset(reason=reason, oldest=oldest[0] if oldest else last + 1, head=last)


class EventFilter:
    """Public events and the viewer's own. With `types`, only those; `book.*` is every `book.` and `books.`."""

    def __init__(self, viewer: Principal | None, types: str | None = None) -> None:
        self.viewer = viewer
        self.owner = viewer.id if viewer else 0  # no user has this id; private events without an owner have None
        self.admin_types = ADMIN_TYPES if viewer and viewer.role == Role.admin else ()
        self.types = [type_ for type_ in (types or "*").split(",") if not type_.endswith("*")]
        prefixes = [type_[:-1] for type_ in (types or "*").split(",") if type_.endswith("*")]
        self.prefixes = (*prefixes, *(f"{prefix[:-1]}s." for prefix in prefixes if prefix.endswith(".")))

    def matches(self, event: LoggedEvent) -> bool:
        is_visible = not event.private or event.user_id == self.owner or event.type.startswith(self.admin_types)
        return is_visible and (event.type in self.types or event.type.startswith(self.prefixes))

    def condition(self) -> sa.ColumnElement[bool]:
        """`matches` in SQL."""
        is_visible = [sa.not_(col(Event.private)), col(Event.user_id) == self.owner]
        is_visible += [col(Event.type).startswith(prefix) for prefix in self.admin_types]
        prefixes = [col(Event.type).startswith(prefix, autoescape=True) for prefix in self.prefixes]
        return sa.and_(sa.or_(*is_visible), sa.or_(col(Event.type).in_(self.types), *prefixes))

    def read(self, connection: Connection, after: int, slices: int, limit: int, *columns: Any) -> tuple[list[Any], int]:
        """The matches in the next slices of the log, `limit` at most, and the id up to which these are all."""
        rows: list[Any] = []
        last = last_event_id(connection)
        for _ in range(slices):
            following = sa.select(col(Event.id)).where(col(Event.id) > after).order_by(col(Event.id))
            after = connection.scalar(following.offset(SLICE - 1).limit(1)) or last
            matches = following.add_columns(*columns).where(col(Event.id) <= after, self.condition())
            rows += connection.execute(matches.limit(limit - len(rows))).all()
            if len(rows) == limit or after == last:
                break
        return rows, rows[-1].id if len(rows) == limit else after

    def events_after(self, connection: Connection, cursor: int) -> tuple[list[LoggedEvent], int] | None:
        """Matches after `cursor`, and the id up to which these are all. None if some were pruned."""
        if cursor < pruned_up_to(connection):
            return None
        rows, read_up_to = self.read(connection, cursor, 1, STREAM_BATCH, *LOGGED[1:])
        return logged_events(rows), read_up_to


async def retry_until_available(read: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
    """Streams survive a restart of the database."""
    while True:
        try:
            return await read(*args, **kwargs)
        except OperationalError:  # the tail logs it
            await asyncio.sleep(1)


# --- the tail -----------------------------------------------------------------------------------------------------


@dataclass
class EventTail:
    """This process's tail of the log, of one event loop."""

    buffer: deque[LoggedEvent] = field(default_factory=lambda: deque(maxlen=BUFFER_SIZE))
    start: int = 0  # the buffer holds all events after this id, up to `last_event_id`
    last_event_id: int = 0
    closing: anyio.Event = field(default_factory=anyio.Event)  # set by sse-starlette at SIGTERM
    streams: Counter[str] = field(default_factory=Counter)  # open streams by address
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _notified: asyncio.Event = field(default_factory=asyncio.Event)
    _reading_log: asyncio.Lock = field(default_factory=asyncio.Lock)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        # Unlike asyncio, anyio waits for threads on cancellation: they still use the database.
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._read_log)
            tasks.start_soon(self._notify_streams_at_shutdown)
            loop = asyncio.get_running_loop()
            database.call_after_commit(functools.partial(loop.call_soon_threadsafe, self._notified.set))
            yield
            tasks.cancel_scope.cancel()

    async def _read_log(self) -> None:
        while True:
            try:
                after = {"cursor": self.last_event_id, "limit": READ_BATCH}
                rows = await database.read(EVENTS_AFTER.all, after)
                if not rows:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._notified.wait(), POLL_INTERVAL)
                    self._notified.clear()
                elif self.last_event_id < (pruned := rows[0][-1]):  # streams that are behind will end
                    self.buffer.clear()
                    self.start = self.last_event_id = pruned
                else:
                    self._append(logged_events(rows))
                    await self._pause()
            except Exception as error:  # the tail must not end: what it missed is still in the log
                log.error("can't read the event log: %s", error, exc_info=not isinstance(error, OperationalError))
                await asyncio.sleep(1)

    async def _pause(self) -> None:
        """Let streams send, then wait. Under load, fan-out takes at most a quarter of the time, in larger chunks."""
        clock = asyncio.get_running_loop().time
        started = clock()
        for _ in range(2):  # streams wake up in the first turn of the loop, and have sent by the second
            await asyncio.sleep(0)
        await asyncio.sleep(min(MAX_PAUSE, 3 * (clock() - started)))

    def _append(self, events: Sequence[LoggedEvent]) -> None:
        for event in events:
            if event.type == "account.deleted":  # earlier events still hold the name, which the log no longer does
                self.buffer.clear()
                self.start = event.id - 1
            if len(self.buffer) == BUFFER_SIZE:
                self.start = self.buffer[0].id
            self.buffer.append(event)
        self.last_event_id = events[-1].id
        self._notify_streams()

    def _notify_streams(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _notify_streams_at_shutdown(self) -> None:
        await self.closing.wait()
        self._notify_streams()

    async def since(self, cursor: int, event_filter: EventFilter) -> tuple[Sequence[LoggedEvent], int] | None:
        """Matches after `cursor`, from the buffer or the log, and the id up to which these are all. None if some were
        pruned."""
        if cursor < self.start:
            async with self._reading_log:  # one read for all streams, then others have their turn
                await asyncio.sleep(0)
                return await database.read(event_filter.events_after, cursor)
        # From the newest: a stream that keeps up looks only at the events that it has not sent.
        new = takewhile(lambda event: event.id > cursor, reversed(self.buffer))
        return [event for event in new if event_filter.matches(event)][::-1], max(cursor, self.last_event_id)

    @contextlib.contextmanager
    def stream_slot(self, address: str) -> Iterator[None]:
        headers = {"Retry-After": "30"}
        if self.streams.total() >= MAX_STREAMS:
            raise HTTPException(503, "This server has no room for another stream. Try again later.", headers)
        if self.streams[address] >= MAX_STREAMS_PER_ADDRESS:
            raise HTTPException(429, "Too many streams are open from your address.", headers)
        self.streams[address] += 1
        try:
            yield
        finally:
            self.streams[address] -= 1
            if not self.streams[address]:
                del self.streams[address]

    async def stream(
        self, event_filter: EventFilter, cursor: int | None, limit: int | None, seconds: float | None
    ) -> AsyncIterator[bytes]:
        """The frames of one stream. It ends at its limits, at shutdown, and when its token is no longer valid."""
        last, reset = await retry_until_available(database.read, check_cursor, cursor)
        retry = random.randint(1500, 2500)  # noqa: S311  # so that clients do not all reconnect at once after a restart
        yield control_frame("ready", {"head": last}, retry=retry)
        if reset is not None:
            yield control_frame("reset", reset.model_dump())
        position = last if cursor is None or reset is not None else cursor
        clock = asyncio.get_running_loop().time
        checked_at = clock()
        deadline, remaining = checked_at + (seconds or math.inf), limit or MAX_EVENT_ID
        while not self.closing.is_set():
            changed = self._changed  # before reading, so that no change in between is missed
            found = await retry_until_available(self.since, position, event_filter)
            if found is None:
                return  # pruned: the client gets a `reset` when it reconnects
            events, position = found
            chunk, needs_check = bytearray(), clock() - checked_at >= HEARTBEAT_INTERVAL
            for event in events:
                chunk += event.frame
                needs_check |= event.private
                remaining -= 1
                if not remaining or len(chunk) >= MAX_CHUNK:
                    position = event.id
                    break
            if needs_check:
                checked_at = clock()
                viewer = event_filter.viewer
                if viewer is not None and not await retry_until_available(is_token_valid, viewer):
                    return
            if chunk:
                yield bytes(chunk)
            if not remaining or clock() >= deadline:
                return
            if position >= self.last_event_id:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(min(deadline, checked_at + HEARTBEAT_INTERVAL)):
                        await changed.wait()


tail = EventTail()  # `main.lifespan` makes another one for its event loop


def control_frame(event: str, data: dict[str, Any], retry: int | None = None) -> bytes:
    """A frame without an id, which does not move the client's position."""
    return ServerSentEvent(event=event, data=json.dumps(data), retry=retry, sep="\n").encode()


class EventStreamResponse(EventSourceResponse):
    """Counts as one of the open streams, and drops a client that reads nothing, with what is still buffered for it."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        transport: asyncio.Transport | None = scope.get("books.transport")
        if transport is not None and (option := getattr(socket, "TCP_USER_TIMEOUT", None)) is not None:  # Linux only
            with contextlib.suppress(OSError):  # not a TCP socket
                transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, option, TCP_USER_TIMEOUT * 1000)
        with tail.stream_slot(security.client_address(Request(scope))):
            try:
                await super().__call__(scope, receive, send)
            except* SendTimeoutError:
                log.info("closed a stream: its client read nothing for %s s", SEND_TIMEOUT)
                if transport is not None:  # `close` would first wait for the buffer to be sent
                    transport.abort()
                    await asyncio.sleep(0)


# --- routes -------------------------------------------------------------------------------------------------------

TYPES = pattern(
    r"^(\*|[a-z]+\.(\*|[a-z_]+))(,(\*|[a-z]+\.(\*|[a-z_]+))){0,15}$",
    "must be at most 16 event types separated by commas, like book.*,review.created",
)
Types = Annotated[str, Field(max_length=500, pattern=TYPES)]
TypesParameter = Annotated[
    Types | None,
    BlankIsNull,
    Field(description="Only these types, like `book.*,review.created`; `book.*` is all that begin with `book.`."),
]
EventId = Annotated[int, Field(ge=0, le=MAX_EVENT_ID)]
Seconds = Annotated[FiniteFloat, Field(gt=0, le=86_400)]


class EventsQuery(RequestModel):
    after: EventId = Field(default=0, description="`next` of the page before; 0 for the start of the log.")
    limit: Annotated[int, Field(ge=1, le=100)] = 20
    types: TypesParameter = None


class StreamQuery(RequestModel):
    types: TypesParameter = None
    since: EventId | None = Field(default=None, description="Resume after this id. `Last-Event-ID` takes precedence.")
    limit: Annotated[int | None, Field(ge=1, le=10_000, description="End after this many events.")] = None
    seconds: Seconds | None = Field(default=None, description="End after this many seconds.", examples=[5])


class EventPage(BaseModel):
    items: list[EventPublic]
    next: int = Field(description="The `after` of the next page; at the end of the log, to poll for new events.")
    reset: Reset | None = Field(description="Where `after` is not, or no longer, a position in this log.")


FRAME = 'id: 1795254571301\nevent: book.deleted\ndata: {"id": 1, "title": "Dune"}\n\n'
STREAM = {"text/event-stream": {"schema": {"type": "string"}, "example": FRAME}}
STREAM_RESPONSES = errors(429) | {200: {"description": "Events, until the client disconnects.", "content": STREAM}}


@router.get("/events")
@readonly
def list_events(connection: Connection, query: Annotated[EventsQuery, Query()], viewer: Viewer) -> EventPage:
    """Read the change log, oldest first: for clients that poll.

    Public changes for anyone; with a bearer token also your own private ones. One request looks at 10,000 changes at
    most, so a page may be short or empty before the end of the log, which is where `next` equals `after`. With `reset`,
    reload your lists; `items` go on with what the log still has after that id.
    """
    _, reset = check_cursor(connection, query.after or None)
    columns, event_filter = (col(Event.at), col(Event.type), col(Event.data)), EventFilter(viewer, query.types)
    rows, following = event_filter.read(connection, query.after, MAX_SLICES, query.limit, *columns)
    return EventPage(items=[EventPublic.model_validate(row) for row in rows], next=following, reset=reset)


@router.get("/stream", response_class=EventSourceResponse, responses=STREAM_RESPONSES)
async def stream(
    query: Annotated[StreamQuery, Query()], viewer: Viewer, last_event_id: Annotated[EventId | None, Header()] = None
) -> EventSourceResponse:
    """Follow every change as it is committed, by Server-Sent Events.

    The first event is `ready`. Without `limit` or `seconds`, the stream does not end. A client that reconnects with the
    last `id` it received as `Last-Event-ID` gets what it missed; if the log can't be read on from there, it gets
    `reset` and then new changes.
    """
    cursor = last_event_id if last_event_id is not None else query.since
    return EventStreamResponse(
        tail.stream(EventFilter(viewer, query.types), cursor, query.limit, query.seconds),
        ping=HEARTBEAT_INTERVAL,
        ping_message_factory=lambda: ServerSentEvent(comment="still here", sep="\n"),
        sep="\n",
        send_timeout=SEND_TIMEOUT,
        shutdown_event=tail.closing,
        shutdown_grace_period=2,
    )
