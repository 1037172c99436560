"""Measurements, against a real server.

`python -m bench`: how fast the routes are, beside a FastAPI route that does nothing (the ceiling) and beside the same
work by `sqlite3` and orjson in bare ASGI (the floor). `python -m bench import books.csv`: how fast a CSV file goes in.
`python -m bench feed`: how soon a change reaches many streams, and what they cost.
"""

import argparse
import asyncio
import csv
import json
import os
import random
import shutil
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import httpx2 as httpx

from bench.apps import GENRES, make_book, make_database, word
from bench.csv_import import bench_import
from bench.feed import Listener, bench_feed
from bench.server import ROOT
from pagination import encode

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


BODIES = 8000  # a second: more than the floor takes


class Load(NamedTuple):
    """What one round measured."""

    rate: float
    p50: float  # ms
    p99: float


class Bench:
    """A folder with a database, `wrk`'s script, and the servers that were started on it."""

    def __init__(self, folder: Path, books: int, seconds: int) -> None:
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
        # Longer for writes: the first request of each client waits until all are connected, and is to be none of a
        # hundred.
        seconds = self.seconds if case.make else 4 * self.seconds
        lines = self.paths(case.name, case.make) if case.make else self.bodies(BODIES * seconds)
        headers = [
            part for pair in ({**case.headers, **(served.headers if case.signed_in else {})}).items() for part in pair
        ]
        method = ["POST", "/books"] if case.make is None else ["GET", "-"]
        command = ["wrk", "-t1", f"-c{clients}", f"-d{seconds}s", "--timeout=10s", f"-s{self.script}", served.url]
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
            self.process = subprocess.Popen([*command, *options], cwd=ROOT, env=environment, stdout=log, stderr=log)
        self.client = httpx.Client(base_url=self.url, timeout=60)
        self._wait()
        self.start_seconds = time.perf_counter() - started

    def _wait(self) -> None:
        path = {"main:app": "/books?limit=1", "bench.apps:ceiling": "/small", "bench.apps:floor": "/books/1"}[self.app]
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
        file = bench.folder / "books.db"
        starts = []
        for number in range(rounds):
            with bench.serve("main:app", bench.folder / f"empty{number}.db") as fresh:
                starts.append(fresh.start_seconds)
        make_database(file, books)
        floor_file = bench.folder / "floor.db"
        shutil.copy(file, floor_file)
        told: dict[str, Any] = {"books": books, "bytes_per_book": round(file.stat().st_size / books), "figures": []}
        told["seconds_to_first_answer"] = round(statistics.median(starts), 2)
        with (
            bench.serve("main:app", file) as ours,
            bench.serve("bench.apps:ceiling", file) as top,
            bench.serve("bench.apps:floor", floor_file) as bottom,
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
    from csv_files import BOOK_COLUMNS

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
