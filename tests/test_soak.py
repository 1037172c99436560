"""A mixed load with kills: nothing is lost or repeated, and memory does not grow."""

import json
import os
import signal
import sqlite3
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from tests.fixtures import ROOT, Server, resident_mb, sign_up, url_of, wait_for

SECONDS, WORKERS = float(os.environ.get("SOAK_SECONDS", "60")), os.environ.get("SOAK_WORKERS", "2")
# Fractions of that time at which one worker, or all in turn, are killed. After the last one, the catalogue does not
# grow: the memory that responses take depends on its size.
KILLS = (0.1, 0.2, 0.3, 0.4)
WARM_UP = 10  # seconds after the last kill before memory is measured, at least
ROWS = 200  # of each upload
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

    def client(self) -> httpx.Client:
        token = {"Authorization": f"Bearer {self.token}"}
        return httpx.Client(base_url=self.server.url, timeout=20, headers=token)

    def repeat(self, work: Callable[[httpx.Client, int], None], pause: float) -> None:
        """Until the end, through the kills."""
        turn = 0
        while not self.stopping.is_set():
            try:
                with self.client() as client:
                    while not self.stopping.wait(pause):
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
        if everything:
            self.server.close()  # by SIGKILL
            self.server.start()
        else:
            os.kill(workers(self.server)[0], signal.SIGKILL)

    def memory_mb(self) -> float:
        """Anonymous memory of the workers, without mapped files."""
        return sum(resident_mb(pid, "RssAnon") for pid in workers(self.server))


def workers(server: Server) -> list[int]:
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


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
    began, memory = time.monotonic(), list[tuple[float, float]]()
    with soak.running():
        for turn, part in enumerate(KILLS):
            time.sleep(max(0.0, began + part * SECONDS - time.monotonic()))
            soak.kill(everything=turn % 2 == 1)
        soak.grown.set()
        warm = time.monotonic() + max(WARM_UP, 0.1 * SECONDS)
        while time.monotonic() < max(began + SECONDS, warm + 10):
            time.sleep(1)
            if time.monotonic() > warm:
                memory.append((time.monotonic() - began, soak.memory_mb()))
    figures = f"{soak.reads} reads, {len(soak.created)} books, {len(soak.deleted)} gone, {len(soak.uploads)} uploads"
    print(f"{figures}, memory {[round(mb) for _, mb in memory]}")
    assert soak.faults == []
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
