"""Everything at once for a while, with kills: nothing lost, nothing twice, no memory that only grows."""

import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from conftest import Server, sign_up, url_of, wait_for

SECONDS = float(os.environ.get("SOAK_SECONDS", "60"))
KILLS = (0.15, 0.3, 0.45)  # parts of that time; then there is calm, in which memory is looked at
ROWS = 200  # of each upload


class Soak:
    """What was done by whom, and what they were told."""

    def __init__(self, server: Server) -> None:
        self.server, self.stopping = server, threading.Event()
        self.created: list[int] = []  # each was answered with 201
        self.uploads: list[tuple[int, str]] = []
        self.reads, self.faults = 0, list[str]()
        self.followed: list[list[int]] = []
        self.token = ""

    def client(self) -> httpx.Client:
        token = {"Authorization": f"Bearer {self.token}"}
        return httpx.Client(base_url=f"http://127.0.0.1:{self.server.port}", timeout=20, headers=token)

    def repeat(self, work: Callable[[httpx.Client, int], None], pause: float) -> None:
        """Again and again, over the kills."""
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
        assert client.patch(shelf, json={"rating": turn % 5 + 1}).status_code == 200

    def upload(self, client: httpx.Client, turn: int) -> None:
        rows = "".join(f"Sown {turn} {number},B\n" for number in range(ROWS))
        answer = client.post("/books/upload", files={"file": ("books.csv", f"title,author\n{rows}")})
        assert answer.status_code == 202, answer.text
        self.uploads.append((answer.json()["id"], f"Sown {turn} "))

    def follow(self) -> None:
        """A stream of public changes, resumed wherever it broke off."""
        seen: list[int] = [int(self.server.client.get("/books").headers["X-Event-Cursor"])]
        self.followed.append(seen)
        while not self.stopping.is_set():
            try:
                with httpx.Client(base_url=f"http://127.0.0.1:{self.server.port}", timeout=20) as client:
                    options: dict[str, Any] = {"params": {"seconds": 5}, "headers": {"Last-Event-ID": str(seen[-1])}}
                    with client.stream("GET", "/stream", **options) as stream:
                        ids = (line[4:] for line in stream.iter_lines() if line.startswith("id: "))
                        seen.extend(map(int, ids))
            except httpx.TransportError:
                time.sleep(0.1)

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

    def memory_mb(self) -> float:
        return resident_mb(self.server.process.pid)


def resident_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) / 1024


def public_events(client: httpx.Client, after: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    while page := client.get("/events", params={"after": after, "limit": 100}).json()["items"]:
        found += page
        after = page[-1]["id"]
    return found


@pytest.mark.slow
def test_a_busy_time_with_kills_loses_nothing(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(EVENT_RETENTION="10000000", LOG_LEVEL="WARNING", ACCESS_TOKEN_EXPIRE_MINUTES="1440")
    soak = Soak(server)
    soak.token = sign_up(server.client, "rita").tokens["access_token"]
    start = int(server.client.get("/books").headers["X-Event-Cursor"])
    began, memory = time.monotonic(), list[float]()
    with soak.running():
        for part in KILLS:
            time.sleep(max(0.0, began + part * SECONDS - time.monotonic()))
            server.close()  # by SIGKILL
            server.start()
        calm = time.monotonic() + 10
        while time.monotonic() < max(began + SECONDS, calm + 5):
            time.sleep(1)
            if time.monotonic() > calm:
                memory.append(soak.memory_mb())
    print(f"{soak.reads} reads, {len(soak.created)} books, {len(soak.uploads)} uploads, memory {memory}")
    assert soak.faults == []
    assert soak.reads > SECONDS / 2
    assert len(soak.created) > SECONDS / 6
    fourth = max(1, len(memory) // 4)
    assert min(memory[-fourth:]) < min(memory[:fourth]) * 1.15 + 10, memory

    with soak.client() as client:
        for upload_id, _ in soak.uploads:
            where = f"/books/upload/{upload_id}"
            upload = wait_for(lambda at=where: ((u := client.get(at).json())["finished_at"] and u) or None, seconds=60)  # type: ignore[misc]
            assert (upload["status"], upload["rows"]) == ("completed", ROWS), upload
            assert upload["inserted"] + upload["skipped"] == ROWS
        books = [json.loads(line) for line in client.get("/books/export?format=ndjson").text.splitlines()]
    log = public_events(server.client, start)
    titles = [book["title"] for book in books]
    assert len(set(titles)) == len(titles), "a book went in twice"
    assert {book["id"] for book in books} >= set(soak.created), "a book that was answered with 201 is gone"
    for _, beginning in soak.uploads:
        assert sum(title.startswith(beginning) for title in titles) == ROWS
    told = [event["data"]["id"] for event in log if event["type"] == "book.created"]
    assert len(set(told)) == len(told)
    assert set(told) >= set(soak.created), "a change was not told of"
    assert len(told) + sum(e["data"]["count"] for e in log if e["type"] == "books.imported") == len(books)
    ids = [event["id"] for event in log]
    for first, *seen in soak.followed:
        following = [number for number in ids if first < number <= (seen or [first])[-1]]
        assert seen == following, "a stream missed something, or heard it twice"
    server.stop()
    if url_of(tmp_path / "books.db").startswith("sqlite"):
        with sqlite3.connect(tmp_path / "books.db") as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
