"""A mixed load with kills and hostile clients: nothing is lost or repeated, memory stays bounded and does not grow."""

import json
import os
import signal
import sqlite3
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from tests.fixtures import ROOT, Server, resident_mb, sign_up, url_of, wait_for

SECONDS, WORKERS = float(os.environ.get("SOAK_SECONDS", "60")), os.environ.get("SOAK_WORKERS", "2")
# Fractions of that time at which one worker, or all in turn, are killed. After the last one, the catalogue does not
# grow: the memory that responses take depends on its size.
KILLS = (0.1, 0.2, 0.3, 0.4)
HOSTILE_UNTIL = 0.65  # as a fraction, too; SOAK_CALLERS names those of `Hostile.callers` that take part
WARM_UP = 10  # seconds after the last kill and the last hostile request before growth is measured, at least
ROWS = 200  # of each upload
BOOKS = 50_000  # in the catalogue at the start
MAX_MB = 300  # of each worker, at any time
CANCELLED = 409  # an upload, in the end, while it was being stored
MAX_UNFINISHED = 5  # uploads of a reader
MAX_READ = 5  # seconds; how long a book may take beside the hostile clients
# The service with small page caches: SQLite's default ones fill for an hour, which would hide a leak.
SOAKED = """
import database
assert "cache_size" in database.WRITER_PRAGMAS
database.PRAGMAS["cache_size"] = database.WRITER_PRAGMAS["cache_size"] = "-200"
from main import app
"""


class Soak:
    """The clients of the load, and the responses and events that they got."""

    def __init__(self, server: Server) -> None:
        self.server, self.stopping, self.grown = server, threading.Event(), threading.Event()
        self.created: list[int] = []  # answered with 201
        self.shelved: list[int] = []  # answered with 201
        self.deleted: list[int] = []  # answered with 204
        self.uploads: list[tuple[int, str]] = []
        self.reads, self.faults = 0, list[str]()
        self.followed: list[list[int]] = []
        self.token = ""

    def client(self, token: str | None = None) -> httpx.Client:
        headers = {"Authorization": f"Bearer {token or self.token}"}
        return httpx.Client(base_url=self.server.url, timeout=20, headers=headers)

    def repeat(self, work: Callable[[httpx.Client, int], None], pause: float) -> None:
        """Until the end, through the kills."""
        self.repeat_until(self.stopping, work, pause)

    def repeat_until(
        self, end: threading.Event, work: Callable[[httpx.Client, int], None], pause: float, token: str | None = None
    ) -> None:
        turn = 0
        while not end.is_set():
            try:
                with self.client(token) as client:
                    while not end.wait(pause):
                        turn += 1
                        work(client, turn)
            except httpx.TransportError:
                time.sleep(0.1)
            except AssertionError as error:
                self.faults.append(str(error)[:500])

    def read(self, client: httpx.Client, turn: int) -> None:
        paths = ("/books?limit=50", "/books?search=so", "/books/genres", "/events?limit=100", "/my-library", "/health")
        answer = client.get(paths[turn % len(paths)])
        assert answer.status_code == 200, answer.text
        self.reads += 1

    def write(self, client: httpx.Client, turn: int) -> None:
        new = {"title": f"Soak {threading.get_ident()} {turn}", "author": "A", "genre": f"G{turn % 20}"}
        answer = client.post("/books", json=new)
        assert answer.status_code == 201, answer.text
        self.created.append(answer.json()["id"])
        shelf = f"/my-library/{answer.json()['id']}"
        assert client.post(shelf, json={"status": "completed"}).status_code == 201
        self.shelved.append(answer.json()["id"])
        assert client.patch(shelf, json={"rating": turn % 5 + 1}).status_code == 200
        if self.grown.is_set():
            assert client.delete(shelf).status_code == 204
            assert client.delete(f"/books/{answer.json()['id']}").status_code == 204
            self.deleted.append(answer.json()["id"])

    def upload(self, client: httpx.Client, turn: int) -> None:
        prefix = self.uploads[-1][1] if self.grown.is_set() else f"Upload {turn} "
        rows = "".join(f"{prefix}{number},B\n" for number in range(ROWS))
        answer = client.post("/books/upload", files={"file": ("books.csv", f"title,author\n{rows}")})
        if answer.status_code == 429:  # five wait for the lease of a worker that was killed
            return
        assert answer.status_code == 202, answer.text
        self.uploads.append((answer.json()["id"], prefix))

    def follow(self) -> None:
        """A stream of all that Rita may see, resumed after each disconnect."""
        with self.client() as client:
            seen = [int(client.get("/books").headers["X-Event-Cursor"])]
        self.followed.append(seen)
        while not self.stopping.is_set():
            try:
                self.listen(seen, seconds=5)
            except httpx.TransportError:
                time.sleep(0.1)

    def listen(self, seen: list[int], **limits: float) -> None:
        headers = {"Last-Event-ID": str(seen[-1])}
        with self.client() as client, client.stream("GET", "/stream", params=limits, headers=headers) as stream:
            if stream.status_code != 200:
                self.faults.append(f"a stream was answered with {stream.status_code}")
            event_id: int | None = None
            for line in stream.iter_lines():
                if line.startswith("id: "):
                    event_id = int(line[4:])
                elif not line and event_id is not None:  # the frame is complete
                    seen.append(event_id)
                    event_id = None

    @contextmanager
    def running(self) -> Iterator[None]:
        works = [(self.read, 0.01)] * 3 + [(self.write, 0.03)] * 2 + [(self.upload, 0.8)]
        threads = [threading.Thread(target=self.repeat, args=work) for work in works]
        threads += [threading.Thread(target=self.follow) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.stopping.set()
            for thread in threads:
                thread.join()

    def kill(self, *, everything: bool) -> None:
        if everything or WORKERS == "1":
            self.server.close()  # by SIGKILL
            self.server.start()
        else:
            os.kill(workers(self.server)[0], signal.SIGKILL)

    def fill(self) -> None:
        """Titles with words of all letters, so that each word of a search has much to find."""
        words = [f"{chr(97 + n % 26)}{n:x}" for n in range(1000)]
        rows = (f"Filled {n} {' '.join(words[n * k % 1000] for k in (1, 3, 7, 11))},B\n" for n in range(BOOKS))
        with self.client() as client:
            answer = client.post("/books/upload", files={"file": ("books.csv", "title,author\n" + "".join(rows))})
            assert answer.status_code == 202, answer.text
            upload = wait_for(lambda: finished_upload(client, answer.json()["id"]), seconds=120)
        assert upload["inserted"] == BOOKS, upload

    def memory_mb(self) -> float:
        """Anonymous memory of the workers, without mapped files."""
        return sum(resident_mb(pid, "RssAnon") for pid in workers(self.server))


class Hostile:
    """Clients that want to cost as much as they can. Each may be refused, but never with a bug."""

    def __init__(self, soak: Soak) -> None:
        self.soak, self.ended = soak, threading.Event()
        self.statuses: dict[str, Counter[int | str]] = {}
        self.read_times: list[float] = []
        self.peaks: dict[int, float] = {}  # by process
        self.tokens = {name: sign_up(soak.server.client, name).tokens["access_token"] for name in ("mallory", "trudy")}
        self.book = f"/books/{soak.server.client.get('/books?limit=1').json()['items'][0]['id']}"
        every = {
            "punycode forms": (self.punycode_form, 1, None),
            "bodies without a token": (self.body_without_token, 4, None),
            "long searches": (self.long_search, 4, None),
            "files of commas": (self.commas, 1, "mallory"),
            "a queue of files": (self.queue, 2, "trudy"),
            "streams of nothing": (self.stream_of_nothing, 2, None),
            "polls of pruned places": (self.pruned_place, 1, None),
        }
        chosen = os.environ.get("SOAK_CALLERS", ",".join(every)).split(",")
        self.callers = {name: every[name] for name in chosen if name}

    def expect(self, name: str, answer: httpx.Response, *statuses: int) -> None:
        """Also 429 and 503, which say when to try again."""
        self.statuses.setdefault(name, Counter())[answer.status_code] += 1
        assert answer.status_code in (*statuses, 429, 503), f"{name}: {answer.status_code} {answer.text[:300]}"
        assert answer.status_code not in (429, 503) or "Retry-After" in answer.headers, f"{name}: no Retry-After"

    def punycode_form(self, client: httpx.Client, turn: int) -> None:
        part = b'--b\r\nContent-Disposition: form-data; name="username"\r\n\r\n' + b"b" * 15_000
        body, codec = part + b"\r\n--b--\r\n", ("punycode", "idna", "utf-7", "no-such")[turn % 4]
        headers = {"Content-Type": f"multipart/form-data; boundary=b; charset={codec}"}
        self.expect("punycode forms", client.post("/login", content=body, headers=headers), 415)

    def body_without_token(self, client: httpx.Client, turn: int) -> None:
        def body() -> Iterator[bytes]:
            disposition = b'--b\r\nContent-Disposition: form-data; name="%d"' + b'; filename="a"' * (turn % 2)
            for number in range(95):
                yield disposition % number + b"\r\n\r\n" + b"x" * 1_000_000 + b"\r\n"
            yield b"--b--\r\n"

        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        answer = httpx.post(f"{client.base_url}/books/upload", content=body(), headers=headers, timeout=20)
        self.expect("bodies without a token", answer, 401, 413)

    def long_search(self, client: httpx.Client, turn: int) -> None:
        words = "+".join(chr(97 + (turn + number) % 26) for number in range(250))
        self.expect("long searches", client.get(f"/books?search={words}"), 422)

    def commas(self, client: httpx.Client, _turn: int) -> None:
        content = b"title,author\n" + (b"," * 1_900_000 + b"\n") * 8
        answer = client.post("/books/upload", files={"file": ("commas.csv", content)})
        self.expect("files of commas", answer, 202, CANCELLED)

    def queue(self, client: httpx.Client, _turn: int) -> None:
        content = b"title,author\n" + b"Queue,Q\n" * 1_000_000
        answer = client.post("/books/upload", files={"file": ("queue.csv", content)})
        self.expect("a queue of files", answer, 202, CANCELLED)
        uploads = client.get("/books/upload?limit=100").json()["items"]
        unfinished = [upload for upload in uploads if upload["finished_at"] is None]
        assert len(unfinished) <= MAX_UNFINISHED, f"a queue of files: {len(unfinished)} are unfinished"

    def stream_of_nothing(self, client: httpx.Client, _turn: int) -> None:
        with client.stream("GET", "/stream?types=no.such&since=0&seconds=2") as answer:
            answer.read()
        self.expect("streams of nothing", answer, 200)

    def pruned_place(self, client: httpx.Client, turn: int) -> None:
        answer = client.get("/events", params={"after": (1, 2**53)[turn % 2]})
        self.expect("polls of pruned places", answer, 200)
        if answer.status_code == 200:
            assert answer.json().get("reset"), f"polls of pruned places: {answer.text[:300]}"

    def read(self, client: httpx.Client, _turn: int) -> None:
        began = time.monotonic()
        try:
            assert client.get(self.book).status_code == 200
        finally:
            if self.soak.grown.is_set():  # a kill breaks connections
                self.read_times.append(time.monotonic() - began)

    def watch_memory(self) -> None:
        while not self.soak.stopping.wait(0.5):
            with suppress(OSError, StopIteration):  # one that was killed, or is a zombie
                for pid in workers(self.soak.server):
                    self.peaks[pid] = resident_mb(pid, "VmHWM")

    @contextmanager
    def running(self) -> Iterator[None]:
        work: list[tuple[Callable[[httpx.Client, int], None], float, str | None]] = [(self.read, 0.02, None)]
        for call, count, name in self.callers.values():
            work += [(call, 0.2, self.tokens[name] if name else None)] * count
        threads = [threading.Thread(target=self.soak.repeat_until, args=(self.ended, *each)) for each in work]
        watcher = threading.Thread(target=self.watch_memory)
        for thread in (*threads, watcher):
            thread.start()
        try:
            yield
        finally:
            self.ended.set()
            for thread in (*threads, watcher):
                thread.join()

    def end(self) -> None:
        """No more requests, nor work of those sent."""
        self.ended.set()
        for token in self.tokens.values():
            with self.soak.client(token) as client:
                for upload in client.get("/books/upload?limit=100").json()["items"]:
                    if upload["finished_at"] is None:
                        client.delete(f"/books/upload/{upload['id']}")


def workers(server: Server) -> list[int]:
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    spawned = [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return spawned or [server.process.pid]  # one worker needs no supervisor


def log_after(client: httpx.Client, after: int) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    while page := client.get("/events", params={"after": after, "limit": 100}).json()["items"]:
        events += page
        after = page[-1]["id"]
    return events


def finished_upload(client: httpx.Client, upload_id: int) -> dict[str, Any] | None:
    upload: dict[str, Any] = client.get(f"/books/upload/{upload_id}").json()
    return upload if upload["finished_at"] else None


@pytest.mark.slow
def test_a_load_with_kills_loses_nothing(serve: Callable[..., Server], tmp_path: Path) -> None:
    options = {"EVENT_RETENTION": "10000000", "LOG_LEVEL": "WARNING", "ACCESS_TOKEN_EXPIRE_MINUTES": "1440"}
    (tmp_path / "soaked.py").write_text(SOAKED)
    server = serve("--workers", WORKERS, "--app-dir", str(ROOT), app="soaked:app", PYTHONPATH=str(tmp_path), **options)
    soak = Soak(server)
    rita = sign_up(server.client, "rita")
    soak.token = rita.tokens["access_token"]
    start = int(server.client.get("/books").headers["X-Event-Cursor"])
    soak.fill()
    hostile = Hostile(soak)
    began, memory = time.monotonic(), list[tuple[float, float]]()
    with hostile.running(), soak.running():
        for turn, part in enumerate(KILLS):
            time.sleep(max(0.0, began + part * SECONDS - time.monotonic()))
            soak.kill(everything=turn % 2 == 1)
        soak.grown.set()
        time.sleep(max(WARM_UP, began + HOSTILE_UNTIL * SECONDS - time.monotonic()))
        hostile.end()
        warm = time.monotonic() + max(WARM_UP, 0.1 * SECONDS)
        while time.monotonic() < max(began + SECONDS, warm + 10):
            time.sleep(1)
            if time.monotonic() > warm:
                memory.append((time.monotonic() - began, soak.memory_mb()))
    figures = f"{soak.reads} reads, {len(soak.created)} books, {len(soak.deleted)} gone, {len(soak.uploads)} uploads"
    print(f"{figures}, memory {[round(mb) for _, mb in memory]}")
    slowest, peaks = sorted(hostile.read_times)[-5:], sorted(round(mb) for mb in hostile.peaks.values())
    print(f"hostile: {hostile.statuses}")
    print(f"{len(hostile.read_times)} reads of a book beside them, the slowest {[round(s, 2) for s in slowest]} s")
    print(f"peak memory of each worker (VmHWM): {peaks} MB")
    assert Counter(soak.faults) == Counter()
    assert slowest[-1] < MAX_READ
    assert peaks[-1] < MAX_MB
    assert soak.reads > SECONDS / 2
    assert len(soak.created) > SECONDS / 6
    assert len(soak.deleted) > SECONDS / 30

    with soak.client() as client:
        for upload_id, _ in soak.uploads:
            upload = wait_for(lambda id_=upload_id: finished_upload(client, id_), seconds=60)  # type: ignore[misc]  # mypy gives a lambda's default no type
            assert (upload["status"], upload["rows"]) == ("completed", ROWS), upload
            assert upload["inserted"] + upload["skipped"] == ROWS
        books = [json.loads(line) for line in client.get("/books/export?format=ndjson").text.splitlines()]
        assert client.get("/books").json()["total"] == len(books)
        log = log_after(client, start)
    titles = [book["title"] for book in books]
    assert len(set(titles)) == len(titles), "a book was inserted twice"
    stored, deleted = {book["id"] for book in books}, set(soak.deleted)
    assert stored >= set(soak.created) - deleted, "a created book is missing"
    assert not stored & deleted, "a deleted book exists"
    for _, prefix in soak.uploads:
        assert sum(title.startswith(prefix) for title in titles) == ROWS
    created = [event["data"]["id"] for event in log if event["type"] == "book.created"]
    assert len(set(created)) == len(created)
    assert set(created) >= set(soak.created), "a created book has no event"
    deletions = [event["data"]["id"] for event in log if event["type"] == "book.deleted"]
    assert sorted(deletions) == sorted(soak.deleted), "a deletion has no event, or two"
    imported = sum(event["data"]["count"] for event in log if event["type"] == "books.imported")
    assert len(created) + imported - len(deletions) == len(books)
    shelved = [event["data"]["book_id"] for event in log if event["type"] == "shelf.created"]
    assert len(set(shelved)) == len(shelved)
    assert set(shelved) >= set(soak.shelved), "a private change has no event"
    ids = [event["id"] for event in log]
    for seen in soak.followed:
        following = [number for number in ids if number > seen[0]]
        missing = [number for number in following if number > seen[-1]]
        assert len(missing) < len(following) / 2, "a stream was hardly ever connected"
        if missing:
            soak.listen(seen, limit=len(missing), seconds=20)
        assert seen[1:] == following, "a stream missed or repeated an event"
    server.stop()
    assert "Traceback" not in server.log.read_text()
    if url_of(tmp_path / "books.db").startswith("sqlite"):
        with sqlite3.connect(tmp_path / "books.db") as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
            connection.execute("INSERT INTO book_fts(book_fts, rank) VALUES ('integrity-check', 1)")
    times, sizes = zip(*memory, strict=True)
    grown = statistics.linear_regression(times, sizes).slope * (times[-1] - times[0])
    # A leak of 1 KB per request would be more than that in ten minutes.
    assert grown < 0.05 * statistics.mean(sizes), f"{grown:.1f} MB: {memory}"
