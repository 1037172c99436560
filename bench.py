"""Measurements, against a real server.

`python bench.py`: how fast the routes are, beside a FastAPI route that does nothing (the ceiling) and beside the same
work by `sqlite3` and orjson in bare ASGI (the floor). `python bench.py import books.csv`: how fast a CSV file goes in.
`python bench.py feed`: how soon a change reaches many streams, and what they cost.
"""

import argparse
import asyncio
import csv
import json
import math
import os
import queue
import random
import re
import resource
import shutil
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple
from urllib.parse import parse_qs

import httpx2 as httpx
from fastapi import FastAPI

import database
import search
from models import Book, ShelfEntry
from pages import encode

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


# --- how fast the routes are ----------------------------------------------------------------------------------------

ceiling = FastAPI()


@ceiling.get("/small")
async def small() -> dict[str, int | str]:
    return {"id": 1, "title": "Pride and Prejudice", "author": "Jane Austen", "genre": "Romance"}


class Floor:
    """`uvicorn bench:floor`: what a route must at least do, by hand. It knows no users, no errors and no filters."""

    columns = (
        "id, title, author, isbn, genre, description, publisher, language, pages, price / 100.0, cover_url,"
        " published_date, publication_year, copies, available, rating_sum * 1.0 / nullif(rating_count, 0),"
        " rating_count, added_by, version, created_at, updated_at"
    )
    names = (
        "id title author isbn genre description publisher language pages price cover_url published_date"
        " publication_year copies available rating rating_count added_by version created_at updated_at"
    ).split()

    connection: sqlite3.Connection | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while (await receive())["type"] == "lifespan.startup":
                self.connection = sqlite3.connect(os.environ["FLOOR_DB"], isolation_level=None)
                self.connection.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL")
                await send({"type": "lifespan.startup.complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        if scope["method"] == "POST":
            body = self.add((await receive())["body"])
        elif scope["path"] == "/my-library":
            body = self.shelf()
        elif scope["path"] == "/books":
            body = self.page({name: found[0] for name, found in parse_qs(scope["query_string"].decode()).items()})
        else:
            body = self.dump(self.books("WHERE id = ?", int(scope["path"][7:]))[0])
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    @staticmethod
    def dump(value: object) -> bytes:
        import orjson

        return orjson.dumps(value)

    def run(self, statement: str, *values: object) -> list[Any]:
        assert self.connection is not None
        return self.connection.execute(statement, values).fetchall()

    def books(self, tail: str, *values: object) -> list[dict[str, Any]]:
        rows = self.run(f"SELECT {self.columns} FROM book {tail}", *values)
        return [dict(zip(self.names, row, strict=True)) for row in rows]

    def page(self, query: dict[str, str]) -> bytes:
        limit = int(query.get("limit", 20))
        if "search" in query:
            match = " ".join(f'"{word}"*' for word in query["search"].split())
            total = self.run("SELECT count(*) FROM book_fts WHERE book_fts MATCH ?", match)
            found = self.run("SELECT rowid FROM book_fts WHERE book_fts MATCH ? LIMIT ?", match, limit)
            items = self.books(f"WHERE id IN ({','.join(str(row[0]) for row in found)})")
        elif "genre" in query:
            genre = query["genre"].lower()
            total = self.run("SELECT count(*) FROM book WHERE lower(genre) = ?", genre)
            items = self.books("WHERE lower(genre) = ? ORDER BY id LIMIT ?", genre, limit)
        else:
            total = self.run("SELECT value FROM setting WHERE key = 'book_count'")
            after = json.loads(_decoded(query["cursor"]))[1] if "cursor" in query else 0
            items = self.books("WHERE id > ? ORDER BY id LIMIT ?", after, limit)
        return self.dump({"items": items, "total": int(total[0][0]), "next": items[-1]["id"] if items else None})

    def shelf(self) -> bytes:
        mine = self.run(
            "SELECT book_id, status, rating, review, tags, started_at, finished_at, added_at, updated_at"
            " FROM shelf_entry WHERE user_id = 1 ORDER BY id DESC LIMIT 20"
        )
        books = {book["id"]: book for book in self.books(f"WHERE id IN ({','.join(str(row[0]) for row in mine)})")}
        total = self.run("SELECT count(*) FROM shelf_entry WHERE user_id = 1")
        return self.dump({"items": [[*row, books[row[0]]] for row in mine], "total": total[0][0]})

    def add(self, body: bytes) -> bytes:
        new = json.loads(body)
        moment = datetime.now(UTC).isoformat(" ")
        self.run("BEGIN IMMEDIATE")
        (book_id,) = self.run(
            "INSERT INTO book (title, author, isbn, title_key, author_key, copies, available, rating_count,"
            " rating_sum, version, created_at, updated_at)"
            " VALUES (?, ?, ?, lower(?1), lower(?2), 0, 0, 0, 0, 1, ?4, ?4) RETURNING id",
            *(new["title"], new["author"], new["isbn"], moment),
        )[0]
        words = (book_id, new["title"], new["author"], new["isbn"])
        self.run("INSERT INTO book_fts (rowid, title, author, isbn) VALUES (?, ?, ?, ?)", *words)
        told = self.dump(new | {"id": book_id})
        self.run("INSERT INTO event (at, type, private, data) VALUES (?, 'book.created', 0, ?)", moment, told.decode())
        self.run("COMMIT")
        return told


floor = Floor()


def _decoded(cursor: str) -> bytes:
    import base64

    return base64.urlsafe_b64decode(cursor + "==")


GENRES = 25
SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]


def word(number: int) -> str:
    """One of 4,900 words."""
    return SYLLABLES[number % 70] + SYLLABLES[number // 70 % 70] + "n"


def isbn_of(number: int) -> str:
    digits = f"978{number:09}"
    return digits + str(-sum(int(d) * (3 if i % 2 else 1) for i, d in enumerate(digits)) % 10)


def make_book(number: int, chance: random.Random) -> dict[str, Any]:
    title = [word(int(chance.expovariate(1 / 900)) % 4900) for _ in range(3)]
    author = [word(chance.randrange(4900)), word(chance.randrange(300) * 7)]
    if chance.random() < 0.5:
        title.insert(1, "shared")
    book: dict[str, Any] = {
        "title": " ".join(title).capitalize(),
        "author": " ".join(author).title(),
        "isbn": isbn_of(number),
        "genre": f"Genre {chance.randrange(GENRES)}",
        "description": "What it is about, in some words. " * chance.randrange(8),
        "publisher": f"{word(chance.randrange(200))} press".title(),
        "language": chance.choice(["en", "de", "fr"]),
        "pages": chance.randrange(80, 900),
        "price": None,
        "publication_year": chance.randrange(1900, 2026),
    }
    return book | {"title_key": book["title"].lower(), "author_key": book["author"].lower()}


def make_database(file: Path, books: int, shelf: int = 500) -> None:
    """A catalogue, and the shelf of the one admin."""
    import auth

    url = f"sqlite:///{file}"
    chance = random.Random(1)

    async def fill() -> None:
        database.open_database(url)
        auth.prepare()
        moment = datetime(2026, 1, 1, tzinfo=UTC)
        same: dict[str, Any] = {
            "copies": 1,
            "available": 1,
            "rating_count": 0,
            "rating_sum": 0,
            "version": 1,
            "added_by": 1,
        }
        same |= {"created_at": moment, "updated_at": moment}
        with database.transaction() as session:
            for first in range(1, books + 1, 10_000):
                rows = [make_book(number, chance) for number in range(first, min(first + 10_000, books + 1))]
                database.insert_many(session, Book.metadata.tables["book"], rows, same)
            search.index_books(session, 1, books)
            chosen = chance.sample(range(1, books + 1), min(shelf, books))
            entries = [{"book_id": book_id, "tags": ["bench"]} for book_id in chosen]
            owner = {"user_id": 1, "status": "reading", "added_at": moment, "updated_at": moment}
            database.insert_many(session, ShelfEntry.metadata.tables["shelf_entry"], entries, owner)
        database.close_database()

    asyncio.run(fill())


# A line of the file is a path to read or, with POST, a body: reads take any, writes each once.
LUA = """
local lines, nth, method, path = {}, 0, nil, nil
function init(args)
  method, path = args[2], args[3]
  for line in io.lines(args[1]) do lines[#lines + 1] = line end
  for i = 4, #args, 2 do wrk.headers[args[i]] = args[i + 1] end
  wrk.headers["Content-Type"] = method == "POST" and "application/json" or nil
  math.randomseed(os.time())
end
function request()
  if method == "GET" then return wrk.format("GET", lines[math.random(#lines)]) end
  nth = nth + 1
  return wrk.format(method, path, nil, lines[nth])
end
function done(summary, latency)
  local e = summary.errors
  io.write(string.format('{"requests": %d, "us": %d, "p50": %d, "p99": %d, "errors": %d}\\n', summary.requests,
    summary.duration, latency:percentile(50), latency:percentile(99),
    e.connect + e.read + e.write + e.status + e.timeout))
end
"""


class Load(NamedTuple):
    """What one round measured."""

    rate: float
    p50: float  # ms
    p99: float


class Bench:
    """A folder with a database, `wrk`'s script, and the servers that were started on it."""

    def __init__(self, folder: Path, books: int, seconds: float) -> None:
        self.folder, self.books, self.seconds = folder, books, seconds
        self.chance, self.next_isbn = random.Random(2), 500_000_000
        self.script = folder / "wrk.lua"
        self.script.write_text(LUA)
        self.files: dict[str, Path] = {}

    @contextmanager
    def serve(self, app: str, file: Path, *options: str) -> Iterator["Served"]:
        served = Served(app, file, options)
        try:
            yield served
        finally:
            served.stop()

    def paths(self, name: str, make: Callable[[], str], count: int = 5000) -> Path:
        if name not in self.files:
            self.files[name] = self.folder / f"{len(self.files)}.txt"
            self.files[name].write_text("".join(f"{make()}\n" for _ in range(count)))
        return self.files[name]

    def bodies(self, count: int) -> Path:
        """New books, never the same one twice."""
        file = self.folder / "bodies.txt"
        with file.open("w") as lines:
            for number in range(self.next_isbn, self.next_isbn + count):
                book = make_book(number, self.chance)
                lines.write(json.dumps({name: book[name] for name in ("title", "author", "isbn")}) + "\n")
        self.next_isbn += count
        return file

    def drive(self, served: "Served", case: "Case", clients: int = 32) -> Load:
        lines = self.bodies(int(6000 * self.seconds)) if case.make is None else self.paths(case.name, case.make)
        headers = [
            part for pair in ({**case.headers, **(served.headers if case.signed_in else {})}).items() for part in pair
        ]
        method = ["POST", "/books"] if case.make is None else ["GET", "-"]
        command = ["wrk", "-t1", f"-c{clients}", f"-d{self.seconds}s", "--timeout=10s", f"-s{self.script}", served.url]
        command += ["--", str(lines), *method, *headers]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        told = json.loads(done.stdout.splitlines()[-1])
        if told["errors"] or not told["requests"]:
            sys.exit(f"{case.name}: {told['errors']} of {told['requests']} requests failed")
        return Load(told["requests"] / told["us"] * 1e6, told["p50"] / 1000, told["p99"] / 1000)


class Case(NamedTuple):
    name: str
    make: Callable[[], str] | None  # a path; None: POST /books
    headers: Mapping[str, str] = MappingProxyType({})
    floor: bool = True
    signed_in: bool = False


class Served:
    """A server of one of the three apps. As the README starts it, but without uvicorn's access log, which the service
    silences in any case: it writes a line per request of its own, and the ceiling none."""

    def __init__(self, app: str, file: Path, options: Sequence[str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        self.app, self.headers = app, dict[str, str]()
        environment = {**os.environ, "DATABASE_URL": f"sqlite:///{file}", "RATE_LIMITS": "false", "FLOOR_DB": str(file)}
        command = [sys.executable, "-m", "uvicorn", app, "--port", self.url.rsplit(":", 1)[1], "--no-access-log"]
        started = time.perf_counter()
        with open(os.environ.get("BENCH_LOG", os.devnull), "ab") as log:
            self.process = subprocess.Popen([*command, *options], cwd=HERE, env=environment, stdout=log, stderr=log)
        self.client = httpx.Client(base_url=self.url, timeout=60)
        self._wait()
        self.start_seconds = time.perf_counter() - started

    def _wait(self) -> None:
        path = {"main:app": "/books?limit=1", "bench:ceiling": "/small", "bench:floor": "/books/1"}[self.app]
        while True:
            try:
                self.client.get(path)
                return
            except httpx.TransportError:
                time.sleep(0.02)

    def sign_in(self) -> None:
        tokens = self.client.post("/login", data={"username": "admin", "password": "admin"}).json()
        self.headers = {"Authorization": f"Bearer {tokens['access_token']}"}

    def memory_mb(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) / 1024

    def stop(self) -> None:
        self.client.close()
        self.process.terminate()
        self.process.wait()


CEILING = Case("ceiling", lambda: "/small")


def cases(bench: Bench) -> list[Case]:
    """What is measured in turn with the ceiling and the floor. Each request draws its book, page or words at random."""
    chance, books = random.Random(3), bench.books

    def a_book() -> str:
        return f"/books/{chance.randrange(1, books + 1)}"

    def after(row: int) -> str:
        return f"/books?limit=20&cursor={encode('id', [row])}"

    def two_words() -> str:
        common = word(int(chance.expovariate(1 / 900)) % 4900)
        return f"/books?search={common}+{word(chance.randrange(4900))[:3]}"

    return [
        Case("GET /books/{id}", a_book),
        Case("GET /books/{id}, If-None-Match: 304", a_book, {"If-None-Match": '"1"'}, floor=False),
        Case("GET /books?limit=20, with the total", lambda: after(chance.randrange(books))),
        Case("the same, first 1,000 rows", lambda: after(chance.randrange(1000)), floor=False),
        Case("the same, last tenth, by cursor", lambda: after(books - chance.randrange(20, books // 10)), floor=False),
        Case(
            "the same, last tenth, by offset",
            lambda: f"/books?limit=20&offset={books - chance.randrange(20, books // 10)}",
            floor=False,
        ),
        Case("GET /books?genre=, with the total", lambda: f"/books?limit=20&genre=Genre+{chance.randrange(GENRES)}"),
        Case("GET /books?search= two words, one a prefix", two_words),
        Case("GET /my-library, 20 of 500", lambda: "/my-library?limit=20", signed_in=True),
        Case("POST /books", None, signed_in=True),
    ]


def bench_routes(books: int, rounds: int, seconds: int, as_json: bool) -> None:
    if shutil.which("wrk") is None:
        sys.exit("This needs wrk: apt-get install -y wrk")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), books, seconds)
        empty, file = bench.folder / "empty.db", bench.folder / "books.db"
        with bench.serve("main:app", empty) as fresh:
            start = fresh.start_seconds
        make_database(file, books)
        floor_file = bench.folder / "floor.db"
        shutil.copy(file, floor_file)
        told: dict[str, Any] = {"books": books, "bytes_per_book": round(file.stat().st_size / books), "figures": []}
        told["seconds_to_first_answer"] = round(start, 2)
        with (
            bench.serve("main:app", file) as ours,
            bench.serve("bench:ceiling", file) as top,
            bench.serve("bench:floor", floor_file) as bottom,
        ):
            told["memory_idle_mb"] = round(ours.memory_mb())
            ours.sign_in()
            for case in cases(bench):
                told["figures"].append(measure(bench, case, (ours, top, bottom) if case.floor else (ours, top), rounds))
            common = Case("a word that half the books share", lambda: "/books?search=shared")
            told["common_word_ms"] = statistics.median(bench.drive(ours, common, 1).p50 for _ in range(rounds))
            told["memory_after_mb"] = round(ours.memory_mb())
            told["export"] = measure_export(ours, file)
        told["two_workers"] = measure_workers(bench, file, rounds)
    print(json.dumps(told, indent=2) if as_json else as_table(told))


def measure(bench: Bench, case: Case, servers: Sequence["Served"], rounds: int) -> dict[str, Any]:
    """`servers`: the service, the ceiling and, where there is one for this, the floor."""
    ours, top, *bottom = servers
    runs, above, below = [], [], []
    for _ in range(rounds):
        most = bench.drive(top, CEILING)
        runs.append(bench.drive(ours, case))
        above.append(runs[-1].rate / most.rate)
        below += [runs[-1].rate / bench.drive(floor, case).rate for floor in bottom]
    return {
        "name": case.name,
        "per_second": round(statistics.median(run.rate for run in runs)),
        "p99_ms": round(statistics.median(run.p99 for run in runs), 1),
        "of_ceiling": round(statistics.median(above), 3),
        "of_floor": round(statistics.median(below), 3) if below else None,
    }


def measure_export(ours: "Served", file: Path) -> dict[str, float]:
    """The catalogue as CSV, and the same columns by `sqlite3` and `csv` alone."""
    from formats import BOOK_COLUMNS

    def by_us() -> None:
        with ours.client.stream("GET", "/books/export") as answer:
            for _ in answer.iter_raw():
                pass

    def by_hand() -> None:
        with sqlite3.connect(file) as connection, open(os.devnull, "w") as out:
            rows = connection.execute(f"SELECT {', '.join(BOOK_COLUMNS)} FROM book ORDER BY id")
            csv.writer(out).writerows(rows)
        connection.close()

    seconds: dict[str, list[float]] = {"seconds": [], "by_hand": []}
    for _ in range(3):
        for name, export in (("seconds", by_us), ("by_hand", by_hand)):
            started = time.perf_counter()
            export()
            seconds[name].append(time.perf_counter() - started)
    medians = {name: round(statistics.median(found), 2) for name, found in seconds.items()}
    return {**medians, "of_by_hand": round(medians["by_hand"] / medians["seconds"], 2)}


def measure_workers(bench: Bench, file: Path, rounds: int) -> dict[str, float]:
    """How many times as much two workers do as one."""
    found: dict[str, list[float]] = {"read": [], "write": []}
    named = {case.name: case for case in cases(bench)}
    chosen = {"read": named["GET /books/{id}"], "write": named["POST /books"]}
    with bench.serve("main:app", file) as one, bench.serve("main:app", file, "--workers", "2") as two:
        one.sign_in()
        two.sign_in()
        for _ in range(rounds):
            for name, case in chosen.items():
                found[name].append(1 / bench.drive(one, case).rate)
                found[name][-1] *= bench.drive(two, case).rate
    return {name: round(statistics.median(ratios), 2) for name, ratios in found.items()}


def as_table(told: dict[str, Any]) -> str:
    lines = [f"{told['books']:,} books; requests/s with 32 clients, and how that compares", ""]
    lines.append(f"{'':44}{'/s':>8}{'p99 ms':>8}{'ceiling':>9}{'floor':>8}")
    for figure in told["figures"]:
        below = "" if figure["of_floor"] is None else f"{figure['of_floor']:.2f}"
        rate, p99, above = figure["per_second"], figure["p99_ms"], figure["of_ceiling"]
        lines.append(f"{figure['name']:44}{rate:8,}{p99:8.1f}{above:9.2f}{below:>8}")
    export, workers = told["export"], told["two_workers"]
    lines += [
        "",
        f"a word that half the books share: {told['common_word_ms']:.1f} ms",
        f"export as CSV: {export['seconds']} s, {export['of_by_hand']} of the speed of sqlite3 and csv alone",
        f"two workers against one: reading {workers['read']} times, writing {workers['write']} times",
        f"start to first answer on an empty file: {told['seconds_to_first_answer']} s",
        f"memory: {told['memory_idle_mb']} MB idle, {told['memory_after_mb']} MB after all this",
        f"size of the file: {told['bytes_per_book']} bytes for a book",
    ]
    return "\n".join(lines)


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
    parser.add_argument("--large", action="store_true", help="1,000,000 books instead of 100,000")
    parser.add_argument("--books", type=int, help="another number of them")
    parser.add_argument("--rounds", type=int, dest="route_rounds", default=5)
    parser.add_argument("--seconds", type=int, default=2, help="of a round")
    parser.add_argument("--json", action="store_true", help="for machines")
    commands = parser.add_subparsers(dest="command")
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
    if arguments.command == "import":
        bench_import(arguments.file, arguments.rounds)
    elif arguments.command == "feed":
        bench_feed(arguments.streams, arguments.rounds)
    elif arguments.command == "listen":
        asyncio.run(Listener.listen(arguments.port, arguments.streams))
    else:
        books = arguments.books or (1_000_000 if arguments.large else 100_000)
        bench_routes(books, arguments.route_rounds, arguments.seconds, arguments.json)


if __name__ == "__main__":
    main()
