"""Measurements of a running server.

`python -m bench`: the rates of the routes, compared with a FastAPI route that does nothing (the ceiling) and with the
same work by `sqlite3` and orjson in bare ASGI (the floor); with `--against CHECKOUT` compared with another checkout, on
PostgreSQL with `--postgresql`; with `--pocketbase PROGRAM` compared with PocketBase.
`python -m bench import books.csv`: the speed of an import. `python -m bench feed`: the delay of events to many streams,
and the streams' cost.
"""

import argparse
import asyncio
import csv
import json
import os
import shutil
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.apps import make_database
from bench.compare import compare_routes
from bench.csv_import import bench_import
from bench.feed import Listener, bench_feed
from bench.load import FREQUENT, Case, LoadGenerator
from bench.scenarios import Side, run_scenarios, scenario_table
from bench.server import ROOT, Process, Server

CEILING = Case("ceiling", lambda: "/small")


def bench_routes(books: int, rounds: int, seconds: int, only: str, as_json: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        load = LoadGenerator(folder, seconds, books)
        starts = []
        for number in range(rounds):
            with Server(folder / f"empty{number}.db") as fresh:
                starts.append(fresh.start_seconds)
        made, file, floor_file = folder / "made.db", folder / "books.db", folder / "floor.db"
        make_database(made, books)
        shutil.copy(made, file)
        shutil.copy(made, floor_file)
        results: dict[str, Any] = {"books": books, "bytes_per_book": round(file.stat().st_size / books), "figures": []}
        results["seconds_to_first_answer"] = round(statistics.median(starts), 2)
        with (
            Server(file) as service,
            Server(file, "bench.apps:ceiling") as ceiling,
            Server(floor_file, "bench.apps:floor") as floor,
        ):
            results["memory_idle_mb"] = round(service.memory_mb())
            service.sign_in()
            for case in load.cases.values():
                if only.lower() in case.name.lower():
                    servers = (service, ceiling, floor) if case.has_floor else (service, ceiling)
                    results["figures"].append(measure(load, case, servers, rounds))
            common = Case("a word of a third of all books", lambda: FREQUENT)
            results["common_word_ms"] = statistics.median(load.run(service, common, 1).p50 for _ in range(rounds))
            results["memory_after_mb"] = round(service.memory_mb())
            results["export"] = measure_export(service, file)
        results["scenarios"] = run_scenarios(load, [Side(made, ROOT)], rounds, only)
    print(json.dumps(results, indent=2) if as_json else as_table(results))


def measure(load: LoadGenerator, case: Case, servers: Sequence[Process], rounds: int) -> dict[str, Any]:
    """`servers`: the service, the ceiling and, where the case has one, the floor."""
    service, ceiling, *floors = servers
    runs, of_ceiling, of_floor = [], [], []
    for _ in range(rounds):
        ceiling_rate = load.run(ceiling, CEILING).rate
        runs.append(load.run(service, case))
        of_ceiling.append(runs[-1].rate / ceiling_rate)
        of_floor += [runs[-1].rate / load.run(floor, case).rate for floor in floors]
    return {
        "name": case.name,
        "per_second": round(statistics.median(run.rate for run in runs)),
        "p99_ms": round(statistics.median(run.p99 for run in runs), 1),
        "of_ceiling": round(statistics.median(of_ceiling), 3),
        "of_floor": round(statistics.median(of_floor), 3) if of_floor else None,
    }


def measure_export(service: Process, file: Path) -> dict[str, float]:
    """The catalogue as CSV, and the same columns by `sqlite3` and `csv` alone."""
    from csv_files import BOOK_COLUMNS

    def export() -> None:
        with service.client.stream("GET", "/books/export") as response:
            for _ in response.iter_raw():
                pass

    def bare_export() -> None:
        with sqlite3.connect(file) as connection, open(os.devnull, "w") as out:
            rows = connection.execute(f"SELECT {', '.join(BOOK_COLUMNS)} FROM book ORDER BY id")
            csv.writer(out).writerows(rows)
        connection.close()

    seconds: dict[str, list[float]] = {"seconds": [], "bare": []}
    for _ in range(3):
        for name, run in (("seconds", export), ("bare", bare_export)):
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    medians = {name: round(statistics.median(values), 2) for name, values in seconds.items()}
    return {**medians, "of_bare": round(medians["bare"] / medians["seconds"], 2)}


def as_table(results: dict[str, Any]) -> str:
    lines = [f"{results['books']:,} books; requests/s with 32 clients, and as a part of the ceiling and the floor", ""]
    lines.append(f"{'':44}{'/s':>8}{'p99 ms':>8}{'ceiling':>9}{'floor':>8}")
    for figure in results["figures"]:
        of_floor = "" if figure["of_floor"] is None else f"{figure['of_floor']:.2f}"
        rate, p99, of_ceiling = figure["per_second"], figure["p99_ms"], figure["of_ceiling"]
        lines.append(f"{figure['name']:44}{rate:8,}{p99:8.1f}{of_ceiling:9.2f}{of_floor:>8}")
    export = results["export"]
    lines += [
        "",
        f"a word of a third of all books, one client: {results['common_word_ms']:.1f} ms",
        f"export as CSV: {export['seconds']} s, {export['of_bare']} of the speed of sqlite3 and csv alone",
        f"from start to first answer on an empty file: {results['seconds_to_first_answer']} s",
        f"memory: {results['memory_idle_mb']} MB idle, {results['memory_after_mb']} MB after all this",
        f"size of the file: {results['bytes_per_book']} bytes per book",
    ]
    return "\n".join(lines + scenario_table(results["scenarios"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--large", action="store_true", help="1,000,000 books instead of 100,000")
    parser.add_argument("--books", type=int, help="another number of books")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=2, help="length of a round; for writes four times as long")
    parser.add_argument("--only", default="", metavar="TEXT", help="only the lines whose name contains this")
    peer = parser.add_mutually_exclusive_group()
    peer.add_argument("--against", type=Path, metavar="CHECKOUT", help="compare with this checkout instead")
    peer.add_argument("--pocketbase", type=Path, metavar="PROGRAM", help="compare two workers with PocketBase instead")
    parser.add_argument("--postgresql", action="store_true", help="with --against: on a PostgreSQL server of its own")
    parser.add_argument("--workers", type=int, help="1; with --pocketbase or --postgresql 2")
    parser.add_argument("--json", action="store_true")
    commands = parser.add_subparsers(dest="command")
    import_parser = commands.add_parser("import", help="the speed of an import")
    import_parser.add_argument("file", type=Path)
    import_parser.add_argument("--rounds", type=int, default=3)
    feed_parser = commands.add_parser("feed", help="the delay of events to many streams, and the streams' cost")
    feed_parser.add_argument("--streams", type=int, default=1000)
    feed_parser.add_argument("--rounds", type=int, default=3)
    listen_parser = commands.add_parser("listen", help="the clients of `feed`, in a process of their own")
    listen_parser.add_argument("port", type=int)
    listen_parser.add_argument("streams", type=int)
    options = parser.parse_args()
    options.books = options.books or (1_000_000 if options.large else 100_000)
    if options.postgresql and not options.against:
        parser.error("--postgresql needs --against")
    if options.command == "import":
        bench_import(options.file, options.rounds)
    elif options.command == "feed":
        bench_feed(options.streams, options.rounds)
    elif options.command == "listen":
        asyncio.run(Listener.listen(options.port, options.streams))
    elif options.against or options.pocketbase:
        compare_routes(options)
    else:
        bench_routes(options.books, options.rounds, options.seconds, options.only, options.json)


if __name__ == "__main__":
    main()
