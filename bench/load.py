"""Requests by `wrk`: random paths, or new books."""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from bench.apps import GENRES, make_book, make_books, word
from bench.pocketbase import RECORDS
from bench.server import Process
from pagination import Order

# Each line of the file is a path to read or, with POST, a body. Paths are drawn at random, bodies are used once.
LUA = """
local lines, line, method, path = {}, 0, nil, nil
function init(args)
  method, path = args[2], args[3]
  for text in io.lines(args[1]) do lines[#lines + 1] = text end
  for i = 4, #args, 2 do wrk.headers[args[i]] = args[i + 1] end
  wrk.headers["Content-Type"] = method == "POST" and "application/json" or nil
  math.randomseed(os.time())
end
function request()
  if method == "GET" then return wrk.format("GET", lines[math.random(#lines)]) end
  line = line + 1
  return wrk.format(method, path, nil, lines[line])
end
function done(summary, latency)
  local e = summary.errors
  io.write(string.format('{"requests": %d, "us": %d, "p50": %d, "p99": %d, "errors": %d}\\n', summary.requests,
    summary.duration, latency:percentile(50), latency:percentile(99),
    e.connect + e.read + e.write + e.status + e.timeout))
end
"""
BODIES = 12_000  # a second: more than the floor takes
BOOK, NEW_BOOK, FREQUENT = "a book", "a new book", "/books?search=shared"


class Load(NamedTuple):
    """The result of one round."""

    rate: float  # requests a second
    p50: float  # ms
    p99: float
    cpu: float  # ms of the server's CPU time a request


class Case(NamedTuple):
    name: str
    make: Callable[[], str] | None  # a path to read; None: a new book
    headers: Mapping[str, str] = MappingProxyType({})
    has_floor: bool = True
    signed_in: bool = False
    post: str = "/books"
    peer: "Case | None" = None  # the same request to PocketBase


def make_cases(books: int) -> list[Case]:
    """Requests for random books, pages and words of a catalogue of this size."""
    rng, by_id = random.Random(3), Order("id", ())
    pairs = [f"{book['title_key'].split()[0]}+{book['author_key'][:3]}" for book in make_books(min(books, 5000))]
    last_tenth = range(books - books // 10, books - 20)

    def book_id() -> int:
        return rng.randrange(1, books + 1)

    def page_after(row: int) -> str:
        return f"/books?limit=20&cursor={by_id.encode([row])}"

    def page() -> int:
        return rng.randrange(50)  # of the first 1,000 rows

    def genre() -> str:
        return f"Genre+{rng.randrange(GENRES)}"

    def any_word() -> str:
        return word(int(rng.expovariate(1 / 900)) % 4900)

    def search() -> str:
        return f"/books?search={any_word()}"

    def contains(text: str) -> str:
        return "%7C%7C".join(f"{column}~'{text}'" for column in ("title", "author", "isbn", "publisher"))

    return [
        Case(BOOK, lambda: f"/books/{book_id()}", peer=Case("", lambda: f"{RECORDS}/{book_id():015}")),
        Case("a book, If-None-Match: 304", lambda: f"/books/{book_id()}", {"If-None-Match": '"1"'}, has_floor=False),
        Case("page by cursor", lambda: page_after(rng.randrange(books))),
        Case("page by cursor, first 1,000 rows", lambda: page_after(rng.randrange(1000)), has_floor=False),
        Case("page by cursor, last tenth", lambda: page_after(rng.choice(last_tenth)), has_floor=False),
        Case(
            "page by offset, first 1,000 rows",
            lambda: f"/books?limit=20&offset={20 * page()}",
            peer=Case("", lambda: f"{RECORDS}?perPage=20&page={1 + page()}"),
        ),
        Case("page by offset, last tenth", lambda: f"/books?limit=20&offset={rng.choice(last_tenth)}", has_floor=False),
        Case(
            "page of a genre by offset",
            lambda: f"/books?limit=20&genre={genre()}&offset={20 * page()}",
            # Without the total, and without an order: PocketBase's fastest.
            peer=Case("", lambda: f"{RECORDS}?skipTotal=1&perPage=20&page={1 + page()}&filter=genre%3D'{genre()}'"),
        ),
        Case(
            "search of a word",
            search,
            peer=Case("", lambda: f"{RECORDS}?skipTotal=1&perPage=20&filter={contains(any_word())}"),
        ),
        Case("search of two words, one a prefix", lambda: f"/books?search={rng.choice(pairs)}"),
        Case("search of a rare word", lambda: f"/books?search={word(rng.randrange(4000, 4900))}", has_floor=False),
        Case("search of a word of a third of all books", lambda: FREQUENT, has_floor=False),
        Case("search of a misspelled word", lambda: f"/books?search={any_word()}x", has_floor=False),
        Case(
            "searches, one in five of that word", lambda: FREQUENT if rng.random() < 0.2 else search(), has_floor=False
        ),
        Case("my shelf, 20 of 500", lambda: "/my-library?limit=20", signed_in=True),
        Case(NEW_BOOK, None, signed_in=True, peer=Case("", None, post=RECORDS)),
    ]


class LoadGenerator:
    """`wrk`, with its script and its input files in `folder`."""

    def __init__(self, folder: Path, seconds: int, books: int) -> None:
        if shutil.which("wrk") is None:
            sys.exit("This needs wrk: apt-get install -y wrk")
        self.folder, self.seconds, self.books = folder, seconds, books
        self.cases = {case.name: case for case in make_cases(books)}
        self.rng, self.next_isbn = random.Random(2), 500_000_000
        self.script = folder / "wrk.lua"
        self.script.write_text(LUA)
        self.paths: dict[Callable[[], str], Path] = {}

    def run(self, server: Process, case: Case, clients: int = 32) -> Load:
        # Longer for writes: wrk counts the wait for all connections as part of each client's first request, and p99
        # must not show it.
        seconds = self.seconds if case.make else 4 * self.seconds
        lines = self._path_file(case.make) if case.make else self._body_file(BODIES * seconds)
        headers = {**case.headers, **(server.headers if case.signed_in else {})}
        method = ["GET", "-"] if case.make else ["POST", case.post]
        command = ["wrk", "-t1", f"-c{clients}", f"-d{seconds}s", "--timeout=10s", f"-s{self.script}", server.url]
        command += ["--", str(lines), *method, *(part for header in headers.items() for part in header)]
        cpu_before = server.cpu_seconds()
        process = subprocess.run(command, capture_output=True, text=True, check=True)
        cpu = server.cpu_seconds() - cpu_before
        result = json.loads(process.stdout.splitlines()[-1])
        requests = result["requests"]
        if result["errors"] or not requests:
            sys.exit(f"{case.name}: {result['errors']} of {requests} requests failed")
        return Load(
            rate=requests / result["us"] * 1e6,
            p50=result["p50"] / 1000,
            p99=result["p99"] / 1000,
            cpu=cpu * 1000 / requests,
        )

    def _path_file(self, make: Callable[[], str], count: int = 5000) -> Path:
        if make not in self.paths:
            self.paths[make] = self.folder / f"paths{len(self.paths)}.txt"
            self.paths[make].write_text("".join(f"{make()}\n" for _ in range(count)))
        return self.paths[make]

    def _body_file(self, count: int) -> Path:
        """New books, each with an ISBN of its own."""
        file = self.folder / "bodies.txt"
        with file.open("w") as lines:
            for number in range(self.next_isbn, self.next_isbn + count):
                book = make_book(number, self.rng)
                lines.write(json.dumps({name: book[name] for name in ("title", "author", "isbn")}) + "\n")
        self.next_isbn += count
        return file
