"""The change log and the stream: every committed change once, in order, to those who may see it."""

import json
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
from tests.fixtures import NEW, Person, Server, service, sign_up, wait_for


class Stream:
    """An EventSource: reads frames in a thread of its own and remembers the last id."""

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


def test_the_first_frame_is_ready_with_the_head(server: Server, rita: Person) -> None:
    rita.add_book()
    head = server.client.get("/events").json()["next"]
    first = Stream(server.client).frames[0]
    assert (first["event"], json.loads(first["data"])) == ("ready", {"head": head})
    assert "id" not in first
    assert 1500 <= int(first["retry"]) <= 2500


def test_changes_arrive_at_once_and_as_they_are_logged(server: Server, rita: Person) -> None:
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


def test_private_changes_reach_their_owner_only(server: Server, rita: Person) -> None:
    oskar = sign_up(server.client, "oskar")
    admin = Person(server.client, "admin", "admin")
    start = server.client.get("/events").json()["next"]
    live = {who: Stream(server.client, who) for who in (rita, oskar, admin, None)}
    book = rita.add_book()
    rita.post(f"/my-library/{book['id']}")
    rita.patch(f"/books/{book['id']}", json={"title": "Last"})
    resumed = {who: Stream(server.client, who, since=start) for who in (rita, oskar, admin, None)}
    everything, public = ["book.created", "shelf.created", "book.updated"], ["book.created", "book.updated"]
    for streams in (live, resumed):
        for who, stream in streams.items():
            expected = everything if who is rita else public
            stream.wait(len(expected))
            assert [event["event"] for event in stream.events] == expected
    for who in (rita, oskar, admin):
        polled = who.get("/events", params={"after": start}).json()["items"]
        assert [event["type"] for event in polled] == (everything if who is rita else public)


def test_a_stream_tells_nothing_private_to_who_may_not_see_it_any_more(server: Server, rita: Person) -> None:
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
    "all of the book": ("book.*", ["book.created", "book.updated", "book.deleted"]),
    "one kind": ("book.updated", ["book.updated"]),
    "two kinds": ("shelf.*,book.deleted", ["shelf.created", "book.deleted"]),
    "everything": ("*", ["book.created", "shelf.created", "book.updated", "book.deleted"]),
}


def test_types_choose(server: Server, rita: Person) -> None:
    start = server.client.get("/events").json()["next"]
    book = rita.add_book()
    rita.post(f"/my-library/{book['id']}")
    rita.patch(f"/books/{book['id']}", json={"pages": 3})
    rita.delete(f"/books/{book['id']}")
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


def test_who_comes_back_gets_what_was_missed_even_over_a_restart(server: Server, rita: Person) -> None:
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


def test_a_client_far_behind_reads_the_log_then_goes_on_live(client: TestClient, reader: Person) -> None:
    """More events than the buffer holds, and more than one batch."""
    start = client.get("/events").json()["next"]

    def fill(session: Session) -> None:
        for number in range(events.BUFFER_SIZE + 700):
            events.record(session, "book.updated", {"number": number})

    database.write_sync(fill)
    wait_for(lambda: True if events.tail.last_event_id > start + events.BUFFER_SIZE else None)
    total = events.BUFFER_SIZE + 700
    text = client.get("/stream", params={"since": start, "limit": total}).text
    assert [json.loads(line[6:])["number"] for line in text.splitlines() if "number" in line] == list(range(total))


def test_a_place_that_is_not_in_the_log_is_reset(server: Server, rita: Person) -> None:
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
def test_two_processes_tell_each_others_changes_in_one_order(serve: Callable[..., Server]) -> None:
    one, two = serve(), serve()
    sign_up(one.client, "rita")
    listening = [Stream(server.client) for server in (one, two)]
    writers = [Person(server.client, "rita") for server in (one, two)]
    started = time.monotonic()
    writers[0].add_book(title="from one")
    for stream in listening:
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
    for stream in listening:
        stream.wait(61)
        assert [event["id"] for event in stream.events] == logged


def test_nothing_that_was_rolled_back_is_told(client: TestClient, reader: Person) -> None:
    reader.add_book(isbn="9780441172719")
    start = client.get("/events").json()["next"]
    assert reader.post("/books", json={"title": "A", "author": "B", "isbn": "9780441172719"}).status_code == 409
    assert client.get("/events", params={"after": start}).json() == {"items": [], "next": start}


def test_polling_reads_the_log_to_its_end_and_on(client: TestClient, reader: Person) -> None:
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


def test_ids_start_at_the_time_the_database_was_made(tmp_path: Path) -> None:
    with service(tmp_path / "new.db") as admin:
        admin.add_book()
        first = admin.get("/events").json()["items"][0]["id"]
    assert abs(first / 1000 - time.time()) < 120


def test_sigterm_ends_open_streams_cleanly_and_soon(server: Server, rita: Person) -> None:
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
def test_a_hundred_streams_hold_no_connection_and_all_are_told(server: Server, rita: Person) -> None:
    streams = [Stream(server.client, rita) for _ in range(100)]
    for number in range(5):
        rita.add_book(title=str(number))
    for stream in streams:
        stream.wait(5)
        assert stream.titles == ["0", "1", "2", "3", "4"]
    assert rita.get("/books").status_code == 200


@pytest.mark.slow
def test_a_silent_stream_has_a_heartbeat(server: Server) -> None:
    with httpx.stream("GET", server.client.base_url.join("/stream"), timeout=30) as answer:
        started = time.monotonic()
        beat = next(line for line in answer.iter_lines() if line.startswith(":"))
    assert beat == ": still here"
    assert 10 < time.monotonic() - started < 20
