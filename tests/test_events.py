"""The event log and its streams: each committed change once, in order, to clients that may see it."""

import asyncio
import json
import re
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from fastapi.testclient import TestClient
from sqlmodel import Session

import database
import events
from settings import settings
from tests.fixtures import NEW, Clock, Person, Server, copy_of, service, sign_up, wait_for


class Stream:
    """An EventSource: reads frames in its own thread."""

    def __init__(self, client: httpx.Client, person: Person | None = None, **query: Any) -> None:
        self.frames: list[dict[str, str]] = []
        self.ended: float | None = None
        self.error: Exception | None = None
        self.base, self.query = client.base_url, query
        last_event_id = query.pop("last_event_id", None)
        self.headers = {"Authorization": f"Bearer {person.tokens['access_token']}"} if person else {}
        if last_event_id is not None:
            self.headers["Last-Event-ID"] = str(last_event_id)
        threading.Thread(target=self._read, daemon=True).start()
        wait_for(lambda: self.frames or None)

    def _read(self) -> None:
        frame: dict[str, str] = {}
        try:
            with httpx.stream(
                "GET", self.base.join("/stream"), params=self.query, headers=self.headers, timeout=60
            ) as answer:
                for line in answer.iter_lines():
                    if line:
                        name, _, value = line.partition(": ")
                        frame[name] = value
                        frame["seen"] = str(time.monotonic())
                    elif frame:
                        self.frames.append(frame)
                        frame = {}
        except httpx.HTTPError as error:
            self.error = error
        self.ended = time.monotonic()

    @property
    def events(self) -> list[dict[str, str]]:
        return [frame for frame in self.frames if "id" in frame]

    @property
    def titles(self) -> list[str]:
        return [json.loads(event["data"]).get("title", "") for event in self.events]

    def wait(self, count: int) -> list[dict[str, str]]:
        return wait_for(lambda: self.events if len(self.events) >= count else None)


@pytest.fixture
def rita(server: Server) -> Person:
    return sign_up(server.client, "rita")


@pytest.mark.slow
def test_the_first_frame_is_ready_with_the_last_id(server: Server, rita: Person) -> None:
    rita.add_book()
    head = server.client.get("/events").json()["next"]
    first = Stream(server.client).frames[0]
    assert (first["event"], json.loads(first["data"])) == ("ready", {"head": head})
    assert "id" not in first
    assert 1500 <= int(first["retry"]) <= 2500


def test_changes_arrive_within_half_a_second_as_they_are_logged(server: Server, rita: Person) -> None:
    stream = Stream(server.client)
    book = rita.add_book(title="Dune")
    created = time.monotonic()
    event = stream.wait(1)[0]
    assert float(event["seen"]) - created < 0.5
    logged = server.client.get("/events").json()["items"][-1]
    assert (int(event["id"]), event["event"], json.loads(event["data"])) == (
        logged["id"],
        "book.created",
        logged["data"],
    )
    assert logged["data"] == {name: value for name, value in book.items() if name != "description"}
    assert logged["at"].endswith("Z")


@pytest.mark.slow
def test_private_changes_reach_their_owner_only(server: Server, rita: Person) -> None:
    oskar = sign_up(server.client, "oskar")
    admin = Person(server.client, "admin", "admin")
    start = server.client.get("/events").json()["next"]
    viewers = (rita, oskar, admin, None)
    live = {viewer: Stream(server.client, viewer) for viewer in viewers}
    book = rita.add_book()
    rita.post(f"/my-library/{book['id']}")
    rita.patch(f"/books/{book['id']}", json={"title": "Last"})
    resumed = {viewer: Stream(server.client, viewer, since=start) for viewer in viewers}
    everything, public = ["book.created", "shelf.created", "book.updated"], ["book.created", "book.updated"]
    for streams in (live, resumed):
        for viewer, stream in streams.items():
            expected = everything if viewer is rita else public
            stream.wait(len(expected))
            assert [event["event"] for event in stream.events] == expected
    for person in (rita, oskar, admin):
        polled = person.get("/events", params={"after": start}).json()["items"]
        assert [event["type"] for event in polled] == (everything if person is rita else public)


@pytest.mark.slow
def test_streams_end_before_private_events_once_access_is_lost(server: Server, rita: Person) -> None:
    admin = Person(server.client, "admin", "admin")
    demoted = admin.post("/users", json={**NEW, "username": "ada", "email": "ada@example.com", "role": "admin"}).json()
    ada = Person(server.client, "ada")
    streams = [Stream(server.client, rita), Stream(server.client, ada, types="account.*")]
    elsewhere = Person(server.client, "rita")
    assert streams[1].wait(1)[0]["event"] == "account.login"
    rita.post("/auth/logout")
    admin.patch(f"/users/{demoted['id']}", json={"role": "reader"})
    book = elsewhere.add_book()
    elsewhere.post(f"/my-library/{book['id']}")
    for stream in streams:
        while stream.ended is None:
            time.sleep(0.02)
    assert [event["event"] for event in streams[0].events] == ["account.login"]


TYPES: dict[str, tuple[str, list[str]]] = {
    "a prefix": ("book.*", ["book.created", "book.updated", "book.deleted", "books.imported"]),
    "a longer prefix": ("books.*", ["books.imported"]),
    "one type": ("book.updated", ["book.updated"]),
    "two types": ("shelf.*,book.deleted", ["shelf.created", "book.deleted"]),
    "both": ("book.created,books.imported", ["book.created", "books.imported"]),
}


@pytest.mark.slow
def test_types_filter_events(server: Server, rita: Person) -> None:
    start = server.client.get("/events").json()["next"]
    book = rita.add_book()
    rita.post(f"/my-library/{book['id']}")
    rita.patch(f"/books/{book['id']}", json={"pages": 3})
    rita.delete(f"/books/{book['id']}")
    rita.upload("title,author\nEmma,Jane Austen\n")
    for name, (types, expected) in TYPES.items():
        stream = Stream(server.client, rita, since=start, types=types, limit=len(expected))
        assert [event["event"] for event in stream.wait(len(expected))] == expected, name
        polled = rita.get("/events", params={"after": start, "types": types}).json()["items"]
        assert [event["type"] for event in polled] == expected, name


@pytest.mark.parametrize(
    "query",
    ["types=book", "types=book.*;x", "types=*.created", "since=-1", "since=x", "limit=0", "seconds=0", "colour=red"],
)
def test_bad_queries_are_422(client: TestClient, query: str) -> None:
    assert client.get(f"/stream?{query}").status_code == 422


def test_a_bad_last_event_id_is_422(client: TestClient) -> None:
    for value in ("abc", "-1", "1.5", str(10**30)):
        assert client.get("/stream", headers={"Last-Event-ID": value}).status_code == 422


@pytest.mark.slow
def test_limit_and_seconds_end_a_stream(server: Server, rita: Person) -> None:
    start = server.client.get("/events").json()["next"]
    for _ in range(3):
        rita.add_book()
    limited = Stream(server.client, since=start, limit=2)
    wait_for(lambda: limited.ended)
    assert (len(limited.events), limited.error) == (2, None)
    timed = Stream(server.client, seconds=0.3)
    began = time.monotonic()
    assert 0.2 < wait_for(lambda: timed.ended) - began < 2
    assert timed.error is None


@pytest.mark.slow
def test_reconnecting_clients_get_missed_events_across_a_restart(server: Server, rita: Person) -> None:
    stream = Stream(server.client)
    rita.add_book(title="one")
    seen = stream.wait(1)[0]["id"]
    server.stop(signal.SIGKILL)
    server.start()
    rita.client = server.client
    for number in range(5):
        rita.add_book(title=f"missed {number}")
    back = Stream(server.client, last_event_id=seen, since=0)
    back.wait(5)
    rita.add_book(title="live")
    back.wait(6)
    assert back.titles == [f"missed {number}" for number in range(5)] + ["live"]
    assert [int(event["id"]) for event in back.events] == sorted({int(event["id"]) for event in back.events})


def test_clients_behind_the_buffer_read_the_log(client: TestClient, reader: Person) -> None:
    """More events than the buffer or one batch holds."""
    start = client.get("/events").json()["next"]

    def fill(session: Session) -> None:
        for number in range(events.BUFFER_SIZE + 700):
            events.record(session, "book.updated", {"number": number})

    database.write_sync(fill)
    wait_for(lambda: True if events.tail.last_event_id > start + events.BUFFER_SIZE else None)
    total = events.BUFFER_SIZE + 700
    text = client.get("/stream", params={"since": start, "limit": total}).text
    assert [json.loads(line[6:])["number"] for line in text.splitlines() if "number" in line] == list(range(total))


@pytest.mark.slow
def test_ids_that_are_not_in_the_log_cause_a_reset(serve: Callable[..., Server]) -> None:
    server = serve()
    rita = sign_up(server.client, "Rita")
    rita.add_book()
    oldest, head = rita.get("/events").json()["items"][0]["id"], server.client.get("/events").json()["next"]
    for ahead, reason in ((-head, "expired"), (-1000, "expired"), (1, "future"), (2**63 - 1 - head, "future")):
        stream = Stream(server.client, since=min(head + ahead, 2**63 - 1))
        reset = wait_for(lambda stream=stream: stream.frames[1] if len(stream.frames) > 1 else None)  # type: ignore[misc]  # mypy gives a lambda's default no type
        assert reset["event"] == "reset"
        assert "id" not in reset
        assert json.loads(reset["data"]) == {"reason": reason, "oldest": oldest, "head": head}
        rita.add_book(title="after the reset")
        stream.wait(1)
        assert stream.titles == ["after the reset"]
        head = server.client.get("/events").json()["next"]


@pytest.mark.slow
def test_streams_of_two_processes_have_the_same_order(serve: Callable[..., Server]) -> None:
    one, two = serve(), serve()
    sign_up(one.client, "rita")
    streams = [Stream(server.client) for server in (one, two)]
    writers = [Person(server.client, "rita") for server in (one, two)]
    started = time.monotonic()
    writers[0].add_book(title="from one")
    for stream in streams:
        assert float(stream.wait(1)[0]["seen"]) - started < 1

    def write(writer: Person) -> None:
        for number in range(30):
            writer.add_book(title=f"{writer.client.base_url} {number}")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, writers))
    logged = []
    after = 0
    while page := one.client.get("/events", params={"after": after, "limit": 100}).json()["items"]:
        logged += [str(event["id"]) for event in page]
        after = page[-1]["id"]
    for stream in streams:
        stream.wait(61)
        assert [event["id"] for event in stream.events] == logged


def test_rolled_back_changes_are_not_logged(client: TestClient, reader: Person) -> None:
    reader.add_book(isbn="9780441172719")
    start = client.get("/events").json()["next"]
    assert reader.post("/books", json={"title": "A", "author": "B", "isbn": "9780441172719"}).status_code == 409
    assert client.get("/events", params={"after": start}).json() == {"items": [], "next": start, "reset": None}


def test_polling_reads_to_the_end_and_then_new_events(client: TestClient, reader: Person) -> None:
    for number in range(5):
        reader.add_book(title=str(number))
    seen, after = [], 0
    while True:
        page = client.get("/events", params={"after": after, "limit": 2}).json()
        if not page["items"]:
            break
        seen += [event["data"]["title"] for event in page["items"]]
        after = page["next"]
    assert seen == ["0", "1", "2", "3", "4"]
    reader.add_book(title="later")
    assert [e["data"]["title"] for e in client.get("/events", params={"after": after}).json()["items"]] == ["later"]


def record_some(session: Session, count: int, event_type: str = "book.updated") -> None:
    for number in range(count):
        events.record(session, event_type, {"number": number})


# From the ids of the events in the log and the last one that was pruned: a cursor, and the reason of the reset.
CURSORS: dict[str, tuple[Callable[[list[int], int], int], str | None]] = {
    "the first event": (lambda ids, pruned: ids[0], None),
    "before the first event": (lambda ids, pruned: ids[0] - 1, None),
    "the last event before a start": (lambda ids, pruned: ids[2], None),
    "before the first event after a start": (lambda ids, pruned: ids[3] - 1, None),
    "the last event": (lambda ids, pruned: ids[-1], None),
    "the last that was pruned": (lambda ids, pruned: pruned, None),
    "the last but one that was pruned": (lambda ids, pruned: pruned - 1, "expired"),
    "1": (lambda ids, pruned: 1, "expired"),
    "lost before a start": (lambda ids, pruned: ids[2] + 1, "unknown"),
    "long before the first event after a start": (lambda ids, pruned: ids[3] - 2, "unknown"),
    "the next": (lambda ids, pruned: ids[-1] + 1, "future"),
    "the largest": (lambda ids, pruned: 2**63 - 1, "future"),
}


@pytest.fixture
def log_with_a_gap(client: TestClient, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], int]:
    """Three events, a start, and three more; of older ones the last that was pruned."""
    monkeypatch.setattr(settings, "event_retention", 6)
    for _ in range(2):
        database.write_sync(record_some, 3)
        clock.advance(hours=1)
        database.write_sync(events.continue_ids)
    pruned = int(client.get("/events", params={"limit": 100}).json()["next"])
    for pause in (0, 1):
        clock.advance(hours=pause)
        database.write_sync(events.continue_ids)
        database.write_sync(record_some, 3)
    while database.write_sync(events.prune):
        pass
    ids = [event["id"] for event in client.get("/events").json()["items"]]
    assert len(ids) == 6
    assert pruned == database.read_sync(events.pruned_up_to)
    return ids, pruned


@pytest.mark.parametrize("case", CURSORS.values(), ids=CURSORS)
def test_cursors_that_are_no_position_of_the_log_cause_a_reset(
    client: TestClient, log_with_a_gap: tuple[list[int], int], case: tuple[Callable[[list[int], int], int], str | None]
) -> None:
    ids, pruned = log_with_a_gap
    cursor, reason = case[0](ids, pruned), case[1]
    reset = None if reason is None else {"reason": reason, "oldest": ids[0], "head": ids[-1]}
    page = client.get("/events", params={"after": cursor}).json()
    assert page["reset"] == reset
    assert [event["id"] for event in page["items"]] == [id_ for id_ in ids if id_ > cursor], "what the log still has"
    assert page["next"] == ids[-1]
    frames = client.get("/stream", params={"since": cursor, "seconds": 0.2}).text
    if reset is None:
        assert "event: reset" not in frames
        assert [int(one) for one in re.findall(r"^id: (\d+)", frames, re.MULTILINE)] == [i for i in ids if i > cursor]
    else:
        assert json.loads(re.findall(r"event: reset\s+data: (.*)", frames)[0]) == reset
        assert "id: " not in frames, "then live"


@pytest.mark.parametrize("query", ["", "after=0"])
def test_a_poll_without_a_position_reads_from_the_start_of_the_log(
    client: TestClient, log_with_a_gap: tuple[list[int], int], query: str
) -> None:
    page = client.get(f"/events?{query}").json()
    assert ([event["id"] for event in page["items"]], page["reset"]) == (log_with_a_gap[0], None)


def test_positions_stay_valid_where_the_log_is_empty(client: TestClient, clock: Clock) -> None:
    cursors = {int(client.get("/books").headers["X-Event-Cursor"]), client.get("/events").json()["next"]}
    clock.advance(hours=1)
    database.write_sync(events.continue_ids)
    cursors |= {int(client.get("/books").headers["X-Event-Cursor"]), client.get("/events").json()["next"]}
    for _ in range(2):
        for cursor in cursors:
            page = client.get("/events", params={"after": cursor}).json()
            assert page["reset"] is None
        database.write_sync(record_some, 1)
    assert len(page["items"]) == 1


def test_positions_stay_valid_when_their_event_is_deleted_with_its_account(
    client: TestClient, reader: Person, other_reader: Person, admin: Person
) -> None:
    book = reader.add_book()
    reader.post(f"/my-library/{book['id']}", json={"status": "completed"})
    reader.patch(f"/my-library/{book['id']}", json={"rating": 4, "review": "Rita was here."})
    cursors = [event["id"] for event in reader.get("/events", params={"limit": 100}).json()["items"]]
    assert len(cursors) > 3
    assert client.get("/books").headers["X-Event-Cursor"] == str(cursors[-1])
    assert admin.delete("/users/2").status_code == 204
    for cursor in cursors:
        page = client.get("/events", params={"after": cursor}).json()
        assert page["reset"] is None
        assert page["items"][-1]["type"] == "books.updated"
    for person in (other_reader, admin):
        left = person.get("/events", params={"limit": 100}).text
        assert "Rita was here" not in left
        assert '"erased"' not in left


def test_ids_lost_with_a_restored_backup_are_not_given_out_again(tmp_path: Path) -> None:
    original, backup = tmp_path / "books.db", tmp_path / "backup.db"
    with service(original) as admin:
        admin.add_book(title="Kept")
        kept = int(admin.get("/books").headers["X-Event-Cursor"])
    copy_of(original, backup)
    with service(original) as admin:
        for _ in range(5):
            admin.add_book(title="Lost")
        lost = [event["id"] for event in admin.client.get("/events", params={"after": kept}).json()["items"]]
    with service(backup) as admin:
        for title in ("", *"abcdef"):  # more than were lost
            if title:
                admin.add_book(title=title)
            for cursor in lost[:: len(lost) - 1]:
                assert admin.client.get("/events", params={"after": cursor}).json()["reset"] is not None
                assert "event: reset" in admin.client.get("/stream", params={"since": cursor, "seconds": 0.01}).text
        page = admin.client.get("/events", params={"after": kept}).json()
    assert (page["reset"], [event["data"]["title"] for event in page["items"]]) == (None, [*"abcdef"])
    assert page["items"][0]["id"] > lost[-1]


def test_a_start_beside_other_processes_gives_out_no_id_twice(client: TestClient, reader: Person) -> None:
    def start(_: int) -> int:
        return database.write_sync(events.continue_ids)

    def write(_: int) -> None:
        database.write_sync(record_some, 1)

    first = int(client.get("/books").headers["X-Event-Cursor"])
    with ThreadPoolExecutor(8) as pool:
        starts, writes = pool.map(start, range(30)), pool.map(write, range(30))
        assert len([*starts, *writes]) == 60
    ids = [event["id"] for event in client.get("/events", params={"after": first, "limit": 100}).json()["items"]]
    assert len(ids) == 30
    assert ids == sorted(set(ids))


# --- rare types in a long log ---------------------------------------------------------------------------------------


def test_a_rare_type_is_read_in_slices_that_leave_others_their_turn(
    client: TestClient, reader: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "SLICE", 50)
    start = int(client.get("/books").headers["X-Event-Cursor"])
    for _ in range(4):
        database.write_sync(record_some, 3 * 50 - 1)
        database.write_sync(record_some, 1, "shelf.rare")
        reader.post("/books", json={"title": "For all", "author": "B"})
    wait_for(lambda: events.tail.last_event_id >= start + 604 or None)
    events.tail.buffer.clear()  # as after a start
    events.tail.start = events.tail.last_event_id
    turns = [0]

    async def count_turns() -> None:
        while True:
            await asyncio.sleep(0)
            turns[0] += 1

    async def follow() -> bytes:
        stream = events.tail.stream(events.EventFilter(None, "shelf.rare,no.*"), start, 5, 20)
        others = asyncio.create_task(count_turns())
        chunks = [await anext(stream) for _ in range(5)]
        others.cancel()
        await database.write(record_some, 1, "shelf.rare")
        return b"".join(chunks + [chunk async for chunk in stream])

    assert client.portal is not None
    frames = client.portal.call(follow).decode()
    assert turns[0] >= 12
    ids = [int(one) for one in re.findall(r"^id: (\d+)", frames, re.MULTILINE)]
    assert ids == [start + 150, start + 301, start + 452, start + 603, start + 605]


def test_a_poll_for_a_rare_type_looks_at_a_bounded_part_of_the_log(
    client: TestClient, reader: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "SLICE", 10)
    monkeypatch.setattr(events, "MAX_SLICES", 5)
    start = after = int(client.get("/books").headers["X-Event-Cursor"])
    database.write_sync(record_some, 120)
    database.write_sync(record_some, 2, "shelf.rare")
    database.write_sync(record_some, 60)
    pages = []
    while True:
        page = client.get("/events", params={"after": after, "types": "shelf.rare"}).json()
        assert page["reset"] is None
        pages.append([event["id"] - start for event in page["items"]])
        if page["next"] == after:
            break
        after = page["next"]
    assert pages == [[], [], [121, 122], [], []]
    assert after == start + 182
    full = client.get("/events", params={"after": start + 95, "limit": 1, "types": "shelf.rare"}).json()
    assert (len(full["items"]), full["next"]) == (1, start + 121)


def test_ids_start_at_the_creation_time_of_the_database(tmp_path: Path) -> None:
    with service(tmp_path / "new.db") as admin:
        admin.add_book()
        first = admin.get("/events").json()["items"][0]["id"]
    assert abs(first / 1000 - time.time()) < 120


def test_sigterm_ends_streams_cleanly_within_five_seconds(server: Server, rita: Person) -> None:
    streams = [Stream(server.client) for _ in range(20)]
    rita.add_book()
    for stream in streams:
        stream.wait(1)
    assert server.stop() < 5
    for stream in streams:
        wait_for(lambda stream=stream: stream.ended)  # type: ignore[misc]  # mypy gives a lambda's default no type
        assert stream.error is None, "closed in the middle of a chunk"
    log = server.log.read_text()
    assert "Traceback" not in log
    assert "ERROR" not in log


@pytest.mark.slow
def test_a_hundred_streams_hold_no_database_connection(server: Server, rita: Person) -> None:
    streams = [Stream(server.client, rita) for _ in range(100)]
    for number in range(5):
        rita.add_book(title=str(number))
    for stream in streams:
        stream.wait(5)
        assert stream.titles == ["0", "1", "2", "3", "4"]
    assert rita.get("/books").status_code == 200


@pytest.mark.slow
def test_idle_streams_have_a_heartbeat(server: Server) -> None:
    with httpx.stream("GET", server.client.base_url.join("/stream"), timeout=30) as answer:
        started = time.monotonic()
        beat = next(line for line in answer.iter_lines() if line.startswith(":"))
    assert beat == ": still here"
    assert 10 < time.monotonic() - started < 20
