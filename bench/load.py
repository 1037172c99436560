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

from bench.apps import GENRES, make_book, word
from bench.server import Server
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
BODIES = 8000  # a second: more than the floor takes


class Load(NamedTuple):
    """The result of one round."""

    rate: float  # requests a second
    p50: float  # ms
    p99: float
    cpu: float  # ms of the server's CPU time a request


class Case(NamedTuple):
    name: str
    make: Callable[[], str] | None  # a path; None: POST /books
    headers: Mapping[str, str] = MappingProxyType({})
    has_floor: bool = True
    signed_in: bool = False


def make_cases(books: int) -> list[Case]:
    """Requests for random books, pages and words of a catalogue of this size."""
    rng, by_id = random.Random(3), Order("id", ())

    def book() -> str:
        return f"/books/{rng.randrange(1, books + 1)}"

    def page_after(row: int) -> str:
        return f"/books?limit=20&cursor={by_id.encode([row])}"

    def frequent_word() -> str:
        return word(int(rng.expovariate(1 / 900)) % 4900)

    last_tenth = range(books - books // 10, books - 20)
    return [
        Case("GET /books/{id}", book),
        Case("GET /books/{id}, If-None-Match: 304", book, {"If-None-Match": '"1"'}, has_floor=False),
        Case("GET /books?limit=20, with the total", lambda: page_after(rng.randrange(books))),
        Case("the same, first 1,000 rows", lambda: page_after(rng.randrange(1000)), has_floor=False),
        Case("the same, last tenth, by cursor", lambda: page_after(rng.choice(last_tenth)), has_floor=False),
        Case(
            "the same, last tenth, by offset",
            lambda: f"/books?limit=20&offset={rng.choice(last_tenth)}",
            has_floor=False,
        ),
        Case("GET /books?genre=, with the total", lambda: f"/books?limit=20&genre=Genre+{rng.randrange(GENRES)}"),
        Case("GET /books?search= a word", lambda: f"/books?search={frequent_word()}"),
        Case(
            "GET /books?search= two words, one a prefix",
            lambda: f"/books?search={frequent_word()}+{word(rng.randrange(4900))[:3]}",
        ),
        Case("GET /my-library, 20 of 500", lambda: "/my-library?limit=20", signed_in=True),
        Case("POST /books", None, signed_in=True),
    ]


class LoadGenerator:
    """`wrk`, with its script and its input files in `folder`."""

    def __init__(self, folder: Path, seconds: int) -> None:
        if shutil.which("wrk") is None:
            sys.exit("This needs wrk: apt-get install -y wrk")
        self.folder, self.seconds = folder, seconds
        self.rng, self.next_isbn = random.Random(2), 500_000_000
        self.script = folder / "wrk.lua"
        self.script.write_text(LUA)
        self.paths: dict[str, Path] = {}

    def run(self, server: Server, case: Case, clients: int = 32) -> Load:
        # Longer for writes: wrk counts the wait for all connections as part of each client's first request, and p99
        # must not show it.
        seconds = self.seconds if case.make else 4 * self.seconds
        lines = self._path_file(case.name, case.make) if case.make else self._body_file(BODIES * seconds)
        headers = {**case.headers, **(server.headers if case.signed_in else {})}
        method = ["POST", "/books"] if case.make is None else ["GET", "-"]
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

    def _path_file(self, name: str, make: Callable[[], str], count: int = 5000) -> Path:
        if name not in self.paths:
            self.paths[name] = self.folder / f"paths{len(self.paths)}.txt"
            self.paths[name].write_text("".join(f"{make()}\n" for _ in range(count)))
        return self.paths[name]

    def _body_file(self, count: int) -> Path:
        """New books, each with an ISBN of its own."""
        file = self.folder / "bodies.txt"
        with file.open("w") as lines:
            for number in range(self.next_isbn, self.next_isbn + count):
                book = make_book(number, self.rng)
                lines.write(json.dumps({name: book[name] for name in ("title", "author", "isbn")}) + "\n")
        self.next_isbn += count
        return file
