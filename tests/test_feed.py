"""Guarantees of `/stream`: crashes, gaps, lost connections, and slow, vanished or many clients."""

import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from fastapi.testclient import TestClient
from sqlmodel import Session

import database
import events
import postgresql
from settings import settings
from tests.fixtures import ROOT, Person, Postgres, Server, resident_mb, service, sign_up, wait_for
from tests.test_events import Stream

# The service with short timeouts, few stream slots and a route that creates many events.
QUICK = """
import socket
from fastapi import Request
from sqlmodel import Session
import database, events, main
events.HEARTBEAT_INTERVAL, events.SEND_TIMEOUT, events.MAX_STREAMS, events.MAX_STREAMS_PER_ADDRESS = 0.5, 1, 15, 10
app = main.app

def record(session: Session, count: int, size: int) -> None:
    for number in range(count):
        events.record(session, "book.updated", {"number": number, "text": "x" * size})

@app.post("/fill")
async def fill(count: int, size: int = 10) -> None:
    await database.write(record, count, size)

@app.get("/open")
async def open_streams() -> int:
    return events.tail.streams.total()

@app.get("/user-timeout")
async def user_timeout(request: Request) -> int:
    connection = request.scope["books.transport"].get_extra_info("socket")
    return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
"""
# Its tokens are valid for three seconds.
SHORT_TOKENS = (
    "from settings import settings\nsettings.__dict__['access_token_expire_minutes'] = 1 / 20\nfrom main import app"
)
HEARTBEAT = 0.5
SOON = HEARTBEAT + 4  # with room for a busy machine


@pytest.fixture
def quick(serve: Callable[..., Server], tmp_path: Path) -> Callable[..., Server]:
    (tmp_path / "quick.py").write_text(QUICK)
    (tmp_path / "short_tokens.py").write_text(SHORT_TOKENS)

    def start(app: str = "quick", **environment: str) -> Server:
        return serve("--app-dir", str(ROOT), app=f"{app}:app", PYTHONPATH=str(tmp_path), **environment)

    return start


def last_id(server: Server) -> int:
    return int(server.client.get("/books").headers["X-Event-Cursor"])


def logged_ids(client: httpx.Client | Person, after: int) -> list[int]:
    """The ids in `/events`, to its end."""
    ids: list[int] = []
    while page := client.get("/events", params={"after": after, "limit": 100}).json()["items"]:
        ids += [event["id"] for event in page]
        after = ids[-1]
    return ids


def ids_of(stream: Stream) -> list[int]:
    return [int(event["id"]) for event in stream.events]


class SocketClient:
    """A client of /stream on a bare socket."""

    def __init__(self, server: Server, *headers: str, window: int | None = None) -> None:
        self.socket = socket.socket()
        if window is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
        self.socket.settimeout(20)
        self.socket.connect(("127.0.0.1", server.port))
        lines = ["GET /stream HTTP/1.1", "Host: here", *headers, "", ""]
        self.socket.sendall("\r\n".join(lines).encode())

    def head(self) -> bytes:
        """The headers of the response, and what was received with them."""
        got = b""
        while b"\r\n\r\n" not in got:
            got += self.socket.recv(4096)
        return got

    def rest(self) -> bytes:
        """Everything up to the end."""
        got = b""
        with suppress(ConnectionResetError):
            while piece := self.socket.recv(1 << 20):
                got += piece
        return got

    def close(self) -> None:
        self.socket.close()

    def abort(self) -> None:
        """Close with RST instead of FIN."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.socket.close()


# --- crashes --------------------------------------------------------------------------------------------------------


class Follower(threading.Thread):
    """Follows the log on random servers, disconnects at random and reconnects."""

    def __init__(self, servers: list[Server], person: Person | None, start: int, seed: str) -> None:
        super().__init__(daemon=True)
        self.servers, self.start_at, self.chance = servers, start, random.Random(seed)
        self.token = {"Authorization": f"Bearer {person.tokens['access_token']}"} if person else {}
        self.ids: list[int] = []
        self.wrong: list[str] = []
        self.connections = 0
        self.done = threading.Event()

    def run(self) -> None:
        with httpx.Client(timeout=10) as client:
            while not self.done.is_set():
                with suppress(httpx.TransportError):
                    self.follow(client)
                time.sleep(self.chance.uniform(0, 0.3))

    def follow(self, client: httpx.Client) -> None:
        query: dict[str, Any] = {"since": self.start_at, "seconds": self.chance.uniform(0.3, 4)}
        headers = {**self.token, **({"Last-Event-ID": str(self.ids[-1])} if self.ids else {})}
        url = f"http://127.0.0.1:{self.chance.choice(self.servers).port}/stream"
        with client.stream("GET", url, params=query, headers=headers) as answer:
            if answer.status_code != 200:
                self.wrong.append(f"{answer.status_code}")
                return
            self.connections += 1
            seen = None
            for line in answer.iter_lines():
                name, _, value = line.partition(": ")
                if name == "id":
                    seen = int(value)
                elif line == "event: reset":
                    self.wrong.append(line)
                elif not line and seen is not None:  # the frame is complete
                    self.ids.append(seen)
                    seen = None
                    if self.chance.random() < 0.03:
                        return


class Writer:
    """Adds, changes, shelves and deletes books on random servers."""

    def __init__(self, servers: list[Server], person: Person, seed: str) -> None:
        self.servers, self.chance = servers, random.Random(seed)
        self.token = {"Authorization": f"Bearer {person.tokens['access_token']}"}
        self.books: list[int] = []

    def write(self, steps: int) -> list[str]:
        """Responses that are server errors."""
        wrong = []
        with httpx.Client(timeout=20, headers=self.token) as client:
            for _ in range(steps):
                try:
                    answer = self.step(client)
                except httpx.TransportError:  # killed: the change may be committed or not
                    continue
                if answer.status_code >= 500:
                    wrong.append(answer.text)
                if answer.status_code == 201 and "/books" in str(answer.url):
                    self.books.append(answer.json()["id"])
                time.sleep(self.chance.uniform(0, 0.15))
        return wrong

    def step(self, client: httpx.Client) -> httpx.Response:
        url = f"http://127.0.0.1:{self.chance.choice(self.servers).port}"
        action = self.chance.choice(["add", "add", "shelve", "change", "delete"]) if self.books else "add"
        if action == "add":
            return client.post(f"{url}/books", json={"title": f"Book {self.chance.random()}", "author": "Somebody"})
        book = self.chance.choice(self.books)
        if action == "shelve":
            return client.post(f"{url}/my-library/{book}")
        if action == "change":
            return client.patch(f"{url}/books/{book}", json={"pages": self.chance.randint(1, 999)})
        return client.delete(f"{url}/books/{book}")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(int(os.environ.get("CRASHES", "1"))))
def test_followers_get_the_whole_log_through_crashes(serve: Callable[..., Server], seed: int) -> None:
    """For a longer test: `CRASHES=20 pytest -m slow -k through_crashes`."""
    print(f"seed {seed}")
    chance = random.Random(seed)
    servers = [serve(), serve()]
    people = [sign_up(servers[0].client, name) for name in ("rita", "oskar")]
    start = last_id(servers[0])
    viewers = [None, None, *people, *people]
    followers = [Follower(servers, viewer, start, f"{seed} {n}") for n, viewer in enumerate(viewers)]
    for follower in followers:
        follower.start()
    writers = [Writer(servers, person, f"{seed} {n}") for n, person in enumerate(people * 2)]
    with ThreadPoolExecutor(len(writers)) as pool:
        writing = [pool.submit(writer.write, 120) for writer in writers]
        for _ in range(6):
            time.sleep(chance.uniform(0.5, 3))
            victim = chance.choice(servers)
            victim.stop(signal.SIGKILL)
            time.sleep(chance.uniform(0, 0.5))
            victim.start()
        assert [one.result() for one in writing] == [[], [], [], []]
    for person in people:
        person.client = servers[0].client
    for viewer, follower in zip(viewers, followers, strict=True):
        log = logged_ids(viewer or servers[0].client, start)
        assert len(log) > 100
        with suppress(AssertionError):  # the comparison below says more
            wait_for(lambda follower=follower, log=log: follower.ids[-1:] == log[-1:] or None, 20)  # type: ignore[misc]  # mypy gives a lambda's default no type
        follower.done.set()
        assert follower.ids == log, f"seed {seed}"
        assert follower.wrong == []
        assert follower.connections > 5
    for follower in followers:
        follower.join(20)


@pytest.mark.slow
def test_busy_writers_of_two_processes_do_not_lock_each_other_out(serve: Callable[..., Server]) -> None:
    servers = [serve(), serve()]
    sign_up(servers[0].client, "rita")
    writers = [Person(server.client, "rita") for server in servers for _ in range(2)]
    start, end = last_id(servers[0]), time.monotonic() + 15

    def write(person: Person) -> int:
        count = 0
        while time.monotonic() < end:
            person.add_book(title=f"{count}")  # asserts 201
            count += 1
        return count

    with ThreadPoolExecutor(len(writers)) as pool:
        counts = list(pool.map(write, writers))
    assert min(counts) > 10
    assert len(logged_ids(servers[0].client, start)) == sum(counts)
    for server in servers:
        assert "locked" not in server.log.read_text()
        assert "ERROR" not in server.log.read_text()


# --- PostgreSQL -----------------------------------------------------------------------------------------------------


@pytest.mark.postgresql
@pytest.mark.parametrize("locked", [True, False], ids=["with the write lock", "without the write lock"])
def test_the_write_lock_keeps_ids_in_commit_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locked: bool
) -> None:
    if not locked:
        monkeypatch.setattr(postgresql.Postgresql, "begin_write", "BEGIN")
    has_id, may_commit = threading.Event(), threading.Event()

    def write_slowly(session: Session) -> None:
        events.record(session, "book.updated", {"writer": "slow"})
        session.flush()
        has_id.set()
        assert may_commit.wait(20)

    def write(session: Session) -> None:
        events.record(session, "book.updated", {"writer": "quick"})

    with service(tmp_path / "books.db") as admin, ThreadPoolExecutor(5) as pool:
        start = int(admin.client.get("/events").json()["next"])
        slow = pool.submit(database.write_sync, write_slowly)
        assert has_id.wait(20)
        quick = [pool.submit(database.write_sync, write) for _ in range(4)]
        if locked:
            time.sleep(0.5)  # enough to commit, if they did not block
            assert not any(one.done() for one in quick)
        else:
            for one in quick:
                one.result(20)
            wait_for(lambda: events.tail.last_event_id >= start + 5 or None)  # the tail is past the slow writer's id
        may_commit.set()
        for one in (slow, *quick):
            one.result(20)
        database.write_sync(write)
        log = logged_ids(admin.client, start)
        assert len(log) == 6
        wait_for(lambda: events.tail.last_event_id == log[-1] or None)
        read = [event.id for event in events.tail.buffer if event.id > start]
    assert read == (log if locked else log[1:])


@pytest.mark.postgresql
@pytest.mark.slow
def test_streams_survive_a_restart_of_the_database(quick: Callable[..., Server]) -> None:
    assert Postgres.current is not None
    one, two = quick(), quick()
    rita = sign_up(two.client, "rita")
    start = last_id(one)
    streams = {viewer: Stream(one.client, viewer) for viewer in (None, rita)}
    for round_ in range(2):
        rita.post(f"/my-library/{rita.add_book(title=f'before {round_}')['id']}")
        Postgres.current.stop()
        time.sleep(3 * HEARTBEAT)
        assert two.client.get("/health").status_code == 503
        back = Stream(one.client, since=start)  # connects while the database is down
        Postgres.current.start()
        wait_for(lambda: two.client.get("/health").status_code == 200 or None, 20)
        rita.post(f"/my-library/{rita.add_book(title=f'after {round_}')['id']}")
        for viewer, stream in ((None, back), *streams.items()):
            log = logged_ids(viewer or one.client, start)
            wait_for(lambda stream=stream, log=log: ids_of(stream)[-1:] == log[-1:] or None, 20)  # type: ignore[misc]  # mypy gives a lambda's default no type
            assert ids_of(stream) == log
            assert stream.ended is None
    for server in (one, two):
        assert "Exception in ASGI" not in server.log.read_text()


# --- slow and vanished clients --------------------------------------------------------------------------------------


def complete_ids(received: bytes) -> list[int]:
    """Ids of complete frames. The lengths of HTTP chunks are lines between them."""
    text = received[: received.rfind(b"\n\n")]
    return [int(line[4:]) for line in text.splitlines() if line.startswith(b"id: ")]


@pytest.mark.slow
def test_clients_that_read_nothing_are_closed_and_resume(quick: Callable[..., Server]) -> None:
    server = quick()

    def fill(batches: int) -> None:
        for _ in range(batches):
            assert server.client.post("/fill", params={"count": 100, "size": 10_000}).status_code == 200

    fill(15)  # more than the buffer holds
    time.sleep(1)
    start, before = last_id(server), resident_mb(server.process.pid)
    slow = [SocketClient(server, window=4096) for _ in range(8)]
    for wire in slow:
        assert b" 200 " in wire.socket.recv(20)
    fill(20)
    wait_for(lambda: server.log.read_text().count("closed a stream: its client read nothing for 1 s") == 8 or None, 20)
    assert resident_mb(server.process.pid) - before < 25, "20 MB that each client did not read"
    log = logged_ids(server.client, start)
    assert len(log) == 2000
    for wire in slow:
        had = complete_ids(wire.rest())
        assert had == log[: len(had)]
        assert len(had) < len(log)
        wire.close()
        if wire is slow[0]:
            back = Stream(server.client, last_event_id=had[-1] if had else start)
            back.wait(len(log) - len(had))
            assert had + ids_of(back) == log
    assert server.stop() < 5
    assert "ERROR" not in server.log.read_text()


@pytest.mark.slow
def test_silent_clients_are_closed(quick: Callable[..., Server]) -> None:
    """Linux drops the connection, which ends the stream; by default after a quarter of an hour."""
    client = quick().client
    assert client.get("/user-timeout").json() == 0
    assert client.get("/stream", params={"seconds": 0.1}).status_code == 200
    assert client.get("/user-timeout").json() == events.TCP_USER_TIMEOUT * 1000, "on the same connection"


# --- many clients ---------------------------------------------------------------------------------------------------


def refusal(server: Server, address: str) -> tuple[int, str | None] | None:
    """Status and Retry-After of another stream from this address; None if it is not refused."""
    headers = {"X-Forwarded-For": address}
    with httpx.stream("GET", server.client.base_url.join("/stream?seconds=0.01"), headers=headers) as answer:
        if answer.status_code == 200:
            return None
        assert answer.headers["Content-Type"] == "application/problem+json"
        return answer.status_code, answer.headers["Retry-After"]


@pytest.mark.slow
def test_streams_are_limited_and_slots_are_freed(quick: Callable[..., Server]) -> None:
    server = quick()

    def open_some(address: str, count: int) -> list[SocketClient]:
        wires = [SocketClient(server, f"X-Forwarded-For: {address}") for _ in range(count)]
        opened = [wire for wire in wires if b" 200 OK" in wire.head()]
        for wire in wires:
            if wire not in opened:
                wire.close()
        return opened

    def are_open(count: int) -> bool:
        return bool(wait_for(lambda: server.client.get("/open").json() == count or None, SOON))

    for disconnect in (SocketClient.close, SocketClient.abort):
        here = open_some("192.0.2.1", 25)
        assert len(here) == 10, "the limit holds for concurrent requests"
        assert refusal(server, "192.0.2.1") == (429, "30")
        assert refusal(server, "192.0.2.2") is None
        assert are_open(10)
        there = open_some("192.0.2.2", 10)
        assert len(there) == 5
        assert refusal(server, "192.0.2.3") == (503, "30")
        assert server.client.get("/books").status_code == 200
        for wire in (*here, *there):
            disconnect(wire)
        assert are_open(0)
    again = open_some("192.0.2.1", 12)
    assert len(again) == 10, "each slot was freed"
    for wire in again:
        wire.close()
    assert "ERROR" not in server.log.read_text()


@pytest.mark.slow
def test_a_thousand_streams_get_all_events(serve: Callable[..., Server]) -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 10_000), most))
    server = serve()
    rita = sign_up(server.client, "rita")
    command = [sys.executable, "-m", "bench", "listen", str(server.port), "1000"]
    with ExitStack() as stack:
        clients = stack.enter_context(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True))
        stack.callback(clients.kill)
        lines = clients.stdout
        assert lines is not None
        assert lines.readline() == "ready\n"
        seconds = []
        for number in range(20):
            began = time.monotonic()
            rita.add_book(title=f"{number}")
            seconds.append(float(lines.readline().split()[1]) - began)
    assert max(seconds) < 5


# --- invalid tokens and pruned events -------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_stream_ends_with_its_token(quick: Callable[..., Server]) -> None:
    server, short_tokens = quick(), quick("short_tokens")
    admin, rita, oskar = (
        Person(server.client, "admin", "admin"),
        *(sign_up(server.client, n) for n in ("rita", "oskar")),
    )
    sign_up(server.client, "flora")
    oskars_id = oskar.get("/users/me").json()["id"]
    visitor, stays = Stream(server.client), Stream(server.client, admin)
    ends: dict[str, tuple[Person, Callable[[], object]]] = {
        "expired": (Person(short_tokens.client, "flora"), lambda: time.sleep(3)),
        "logged out": (rita, lambda: rita.post("/auth/logout")),
        "deactivated": (oskar, lambda: admin.patch(f"/users/{oskars_id}", json={"is_active": False})),
    }
    for how, (person, end) in ends.items():
        stream = Stream(server.client, person, types="book.*")  # public types
        assert stream.ended is None
        end()
        wait_for(lambda stream=stream: stream.ended, SOON)  # type: ignore[misc]  # mypy gives a lambda's default no type
        assert stream.error is None, how
        again = httpx.get(server.client.base_url.join("/stream"), headers=stream.headers)
        assert again.status_code == 401, how
    admin.add_book(title="For the others")
    assert visitor.wait(1)[-1]["event"] == "book.created"
    wait_for(lambda: "book.created" in [event["event"] for event in stays.events] or None)
    assert (visitor.ended, stays.ended) == (None, None)


@pytest.mark.parametrize("at_once", [False, True], ids=["between two chunks", "before the tail read them"])
def test_streams_that_pruning_has_passed_end_and_are_reset(
    client: TestClient, reader: Person, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    monkeypatch.setattr(settings, "event_retention", 10)
    start = int(client.get("/books").headers["X-Event-Cursor"])

    def fill(session: Session) -> None:
        for number in range(2 * events.BUFFER_SIZE):
            events.record(session, "book.updated", {"number": number, "title": "x" * 400})
        if at_once:
            prune(session)

    def prune(session: Session) -> None:  # all in one transaction, before the tail reads on
        while events.prune(session):
            pass

    async def follow() -> list[bytes]:
        stream = events.tail.stream(events.EventFilter(None), start, None, 10)
        chunks = [await anext(stream)]
        await database.write(fill)
        chunks += [await anext(stream)] if not at_once else []
        await database.write(prune)
        return chunks + [chunk async for chunk in stream]

    assert client.portal is not None
    began = time.monotonic()
    frames = b"".join(client.portal.call(follow)).decode()
    assert time.monotonic() - began < 9, "it ended by itself"
    ids = [int(number) for number in re.findall(r"^id: (\d+)$", frames, re.MULTILINE)]
    assert ids == list(range(start + 1, start + 1 + len(ids)))
    in_flight = events.READ_BATCH if database.is_postgresql() else 0  # a read in a thread sees what it began with
    assert len(ids) <= events.BUFFER_SIZE + in_flight, "only what was read before the rest was pruned"
    back = client.get("/stream", params={"since": (ids or [start])[-1], "seconds": 0.2}).text
    assert '"reason": "expired"' in back
    now = client.get("/events", params={"limit": 100}).json()["next"]
    reader.add_book(title="After the reset")
    assert "After the reset" in client.get("/stream", params={"since": now, "limit": 1}).text
