"""Measurements, against a real server. `python bench.py import books.csv`: how fast a CSV file goes in.

`python bench.py feed`: how soon a change reaches many streams, and what they cost.
"""

import argparse
import asyncio
import csv
import math
import os
import queue
import re
import resource
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import httpx2 as httpx

import database

HERE = Path(__file__).resolve().parent


class Server:
    """uvicorn as the README starts it, on an empty database."""

    def __init__(self, folder: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {**os.environ, "DATABASE_URL": f"sqlite:///{folder}/books.db", "LOG_LEVEL": "WARNING"}
        command = [sys.executable, "-m", "uvicorn", "main:app", "--port", str(port), "--log-level", "warning"]
        self.process = subprocess.Popen(command, cwd=HERE, env=environment, stdout=subprocess.DEVNULL)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
        while True:
            try:
                self.client.get("/health")
                break
            except httpx.TransportError:
                time.sleep(0.05)
        tokens = self.client.post("/login", data={"username": "admin", "password": "admin"}).json()
        self.client.headers["Authorization"] = f"Bearer {tokens['access_token']}"

    def memory_mb(self, which: str = "VmHWM") -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith(which))) / 1024

    def stop(self) -> None:
        self.client.close()
        self.process.terminate()
        self.process.wait()


def bare_seconds(file: Path, folder: str) -> float:
    """The floor: the same file by `csv` and `sqlite3` alone, into the same table with its indexes, 5,000 rows at once.

    Nothing is looked at: no check digit, no key without accents, no second look for a title.
    """
    path = f"{folder}/bare.db"
    database.migrate(f"sqlite:///{path}")
    connection = sqlite3.connect(path, isolation_level=None)
    connection.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL")
    started = time.perf_counter()
    with file.open(encoding="utf-8-sig", errors="replace", newline="") as text:
        rows = csv.DictReader(text)
        while batch := list(islice(rows, 5000)):
            connection.execute("BEGIN IMMEDIATE")
            last = connection.execute("SELECT coalesce(max(id), 0) FROM book").fetchone()[0]
            connection.executemany(
                "INSERT OR IGNORE INTO book (title, author, isbn, publication_year, price, title_key, author_key,"
                " copies, available, rating_count, rating_sum, version, created_at, updated_at)"
                " VALUES (?, ?, ?, ?, ?, lower(?1), lower(?2), 0, 0, 0, 0, 1, ?6, ?6)",
                (
                    (
                        row.get("title"),
                        row.get("authors") or row.get("author"),
                        (row.get("isbn13") or row.get("isbn") or "").zfill(13)[:13],
                        int(float(row.get("original_publication_year") or row.get("year") or 0)),
                        int(float(row.get("price") or 0) * 100),
                        "2026-01-01 00:00:00",
                    )
                    for row in batch
                ),
            )
            connection.execute(
                "INSERT INTO book_fts (rowid, title, author, isbn, publisher)"
                " SELECT id, title, author, isbn, publisher FROM book WHERE id > ?",
                (last,),
            )
            connection.execute("COMMIT")
    seconds = time.perf_counter() - started
    connection.close()
    return seconds


def import_once(file: Path) -> dict[str, Any]:
    """Upload the file, reading a book fifty times a second meanwhile, and the upload once a second."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(folder)
        try:
            book = server.client.post("/books", json={"title": "Read me", "author": "Meanwhile"}).headers["Location"]
            answer = server.client.post("/books/upload", files={"file": (file.name, file.read_bytes())})
            reads: list[float] = []
            while True:
                before = time.perf_counter()
                server.client.get(book)
                reads.append((time.perf_counter() - before) * 1000)
                if len(reads) % 50 == 0:
                    upload = server.client.get(answer.headers["Location"]).json()
                    if upload["status"] in ("completed", "failed"):
                        break
                time.sleep(max(0, before + 0.02 - time.perf_counter()))
            started_at, finished_at = (datetime.fromisoformat(upload[name]) for name in ("created_at", "finished_at"))
            seconds = (finished_at - started_at).total_seconds()
            reads.sort()
            return {
                "status": upload["status"],
                "rows": upload["rows"],
                "seconds": seconds,
                "bare": bare_seconds(file, folder),
                "read_p99": reads[int(len(reads) * 0.99)],
                "memory": server.memory_mb(),
            }
        finally:
            server.stop()


def bench_import(file: Path, rounds: int) -> None:
    runs = [import_once(file) for _ in range(rounds)]

    def median(name: str) -> float:
        return float(statistics.median(run[name] for run in runs))

    rate = runs[0]["rows"] / median("seconds")
    print(f"{file.name}: {runs[0]['rows']:,} rows, {runs[0]['status']}; median of {rounds} runs")
    print(f"  from 202 to completed      {median('seconds'):8.2f} s   {rate:10,.0f} rows/s")
    ratio = median("seconds") / median("bare")
    print(f"  csv and sqlite3 alone      {median('bare'):8.2f} s   {ratio:10.1f} times faster")
    print(f"  a book read meanwhile, p99 {median('read_p99'):8.1f} ms")
    print(f"  memory of the server, most {median('memory'):8.0f} MB")


# --- the feed -----------------------------------------------------------------------------------------------------


class Listener(asyncio.Protocol):
    """A client of /stream: counts, for each event, who has it."""

    having: ClassVar[Counter[bytes]] = Counter()
    all_ready: ClassVar[asyncio.Event] = asyncio.Event()
    ready, of = 0, 0

    def __init__(self) -> None:
        self.rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(b"GET /stream HTTP/1.1\r\nHost: bench\r\n\r\n")

    def data_received(self, data: bytes) -> None:
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"id: "):
                Listener.having[line] += 1
                if Listener.having[line] == Listener.of:
                    print(int(line[4:]), time.monotonic(), flush=True)
            elif line.startswith(b"event: ready"):
                Listener.ready += 1
                if Listener.ready == Listener.of:
                    Listener.all_ready.set()

    def connection_lost(self, exc: Exception | None) -> None:
        os._exit(1)  # the measure is none if one is lost

    @classmethod
    async def listen(cls, port: int, streams: int) -> None:
        """In a process of its own. Prints the id of an event, and when, as soon as the last client has it."""
        loop = asyncio.get_running_loop()
        cls.of = streams
        for _ in range(streams):
            await loop.create_connection(cls, "127.0.0.1", port)
        await cls.all_ready.wait()
        print("ready", flush=True)
        await asyncio.sleep(3600)


async def create_rate(port: int, token: str, seconds: float, writers: int = 8) -> float:
    """Books a second, by so many clients that wait for each answer."""
    body = b'{"title": "A book", "author": "Somebody"}'
    head = f"POST /books HTTP/1.1\r\nHost: bench\r\nAuthorization: {token}\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    end = time.monotonic() + seconds

    async def write() -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        done = 0
        while time.monotonic() < end:
            writer.write(request)
            answer = await reader.readuntil(b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 201"), answer
            length = re.search(rb"content-length: (\d+)", answer)
            assert length is not None
            await reader.readexactly(int(length[1]))
            done += 1
        writer.close()
        return done

    return sum(await asyncio.gather(*(write() for _ in range(writers)))) / seconds


def feed_once(streams: int, events: int, seconds: float) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        server = Server(folder)
        port = server.client.base_url.port
        assert port is not None
        token = server.client.headers["Authorization"]
        server.client.get("/books")
        alone = asyncio.run(create_rate(port, token, seconds))
        before = server.memory_mb("VmRSS")
        command = [sys.executable, __file__, "listen", str(port), str(streams)]
        listeners = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            told: queue.SimpleQueue[str] = queue.SimpleQueue()
            threading.Thread(target=lambda: deque(map(told.put, listeners.stdout or ()), 0), daemon=True).start()
            assert told.get(timeout=60) == "ready\n"
            memory = server.memory_mb("VmRSS") - before
            took: list[float] = []
            for number in range(events):
                begun = time.monotonic()  # what the writing itself takes is counted, too
                server.client.post("/books", json={"title": f"Event {number}", "author": "Somebody"})
                took.append((float(told.get(timeout=30).split()[1]) - begun) * 1000)
                time.sleep(0.1)
            with_listeners = asyncio.run(create_rate(port, token, seconds))
            head = server.client.get("/events", params={"after": 2**63 - 1}).json()["next"]
            while not told.get(timeout=30).startswith(f"{head} "):
                pass
        finally:
            listeners.kill()
            listeners.wait()
            server.stop()
    took.sort()
    return {
        "median": statistics.median(took),
        "p99": took[math.ceil(len(took) * 0.99) - 1],
        "kb": memory * 1024 / streams,
        "alone": alone,
        "with_listeners": with_listeners,
    }


def bench_feed(streams: int, rounds: int) -> None:
    # The server has a core, and its clients the other.
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    runs = [feed_once(streams, events=50, seconds=5) for _ in range(rounds)]

    def spread(name: str) -> str:
        values = [run[name] for run in runs]
        return f"{statistics.median(values):8.0f}   ({min(values):.0f} to {max(values):.0f})"

    print(f"{streams:,} streams of one worker; median of {rounds} runs (least to most)")
    print(f"  from the request to the last client, median {spread('median')} ms")
    print(f"  from the request to the last client, p99    {spread('p99')} ms")
    print(f"  memory of a stream                          {spread('kb')} KB")
    print(f"  books made in a second, nobody listening    {spread('alone')}")
    print(f"  books made in a second, all listening       {spread('with_listeners')}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    of_import = commands.add_parser("import", help="how fast a CSV file goes in")
    of_import.add_argument("file", type=Path)
    of_import.add_argument("--rounds", type=int, default=3)
    of_feed = commands.add_parser("feed", help="how soon a change reaches many streams, and what they cost")
    of_feed.add_argument("--streams", type=int, default=1000)
    of_feed.add_argument("--rounds", type=int, default=3)
    of_listen = commands.add_parser("listen", help="the clients of `feed`, in a process of their own")
    of_listen.add_argument("port", type=int)
    of_listen.add_argument("streams", type=int)
    arguments = parser.parse_args()
    if arguments.command == "feed":
        bench_feed(arguments.streams, arguments.rounds)
    elif arguments.command == "listen":
        asyncio.run(Listener.listen(arguments.port, arguments.streams))
    else:
        bench_import(arguments.file, arguments.rounds)


if __name__ == "__main__":
    main()
