"""Two servers in alternation: this checkout and another, on SQLite or PostgreSQL, or this checkout and PocketBase."""

import argparse
import contextlib
import json
import shutil
import statistics
import tempfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bench.apps import make_database
from bench.load import BOOK, NEW_BOOK, LoadGenerator
from bench.pocketbase import PocketBase, make_pocketbase
from bench.scenarios import Side, alternate, number, run_scenarios, scenario_table
from bench.server import ROOT, Process, Server

OFFSET, GENRE, SEARCH = "page by offset, first 1,000 rows", "page of a genre by offset", "search of a word"
POCKETBASE_GOALS = {BOOK: "≥ 1.4", OFFSET: "≥ 16", GENRE: "≥ 1.6", SEARCH: "≥ 50", NEW_BOOK: "≥ 1.0, p99 ≤ 30"}
POSTGRESQL_GOALS = {BOOK: "≥ 3", OFFSET: "≥ 4", GENRE: "≥ 6", SEARCH: "≥ 4", NEW_BOOK: "≥ 5"}


class Pair(NamedTuple):
    """The servers to compare. `sides`: what the scenarios compare."""

    old_name: str
    old: Process
    new: Process
    goals: dict[str, str]
    sides: list[Side]


def start_pocketbase(options: argparse.Namespace, folder: Path, stack: contextlib.ExitStack) -> Pair:
    file, peer = folder / "ours.db", folder / "pocketbase"
    make_database(file, options.books)
    shutil.copy(file, folder / "new.db")
    make_pocketbase(options.pocketbase, peer, options.books)
    old = stack.enter_context(PocketBase(options.pocketbase, peer))
    new = stack.enter_context(Server(file, workers=options.workers or 2))
    return Pair("PocketBase", old, new, POCKETBASE_GOALS, [Side(folder / "new.db", ROOT)])


def start_checkouts(options: argparse.Namespace, folder: Path, stack: contextlib.ExitStack) -> Pair:
    checkout, workers = options.against, options.workers or 1
    make_database(folder / "old.db", options.books, checkout)
    # By the older schema, which the new code migrates in its own copy.
    shutil.copy(folder / "old.db", folder / "new.db")
    with Server(folder / "new.db"):
        pass  # a process that has run migrations is slower: it has loaded more for the garbage collector to scan
    sides = [Side(folder / "new.db", ROOT), Side(folder / "old.db", checkout)]
    files = [shutil.copy(side.file, folder / f"{side.file.stem}-served.db") for side in sides]
    new = stack.enter_context(Server(files[0], workers=workers))
    old = stack.enter_context(Server(files[1], checkout=checkout, workers=workers))
    return Pair(str(checkout), old, new, {}, sides)


def start_on_postgresql(options: argparse.Namespace, _folder: Path, stack: contextlib.ExitStack) -> Pair:
    from tests.fixtures import Postgres

    postgres, checkout, workers = Postgres(), options.against, options.workers or 2
    stack.callback(postgres.throw_away)
    settings = f"-p {postgres.port} -k {postgres.folder} -c listen_addresses=127.0.0.1 -c max_connections=200"
    data, log = f"{postgres.folder}/data", f"{postgres.folder}/log"
    postgres.run("pg_ctl", "-D", data, "-l", log, "-w", "-o", settings, "restart")  # with fsync, unlike in tests
    postgres.execute("CREATE DATABASE old")
    old_url, new_url = postgres.url_of("old"), postgres.url_of("new")
    make_database(old_url, options.books, checkout)
    postgres.execute("CREATE DATABASE new TEMPLATE old")
    with Server(new_url):
        pass  # migrates
    new = stack.enter_context(Server(new_url, workers=workers))
    old = stack.enter_context(Server(old_url, checkout=checkout, workers=workers))
    return Pair(str(checkout), old, new, POSTGRESQL_GOALS, [])


def median(values: Iterable[float]) -> float | None:
    known = [*values]
    return statistics.median(known) if known else None


def compare_routes(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        load = LoadGenerator(folder, options.seconds, options.books)
        start = start_on_postgresql if options.postgresql else start_checkouts
        pair = (start_pocketbase if options.pocketbase else start)(options, folder, stack)
        figures = []
        for case in load.cases.values():
            if options.only.lower() not in case.name.lower() or (options.postgresql and not case.peer):
                continue
            pair.new.sign_in()  # tokens live for 30 minutes
            pair.old.sign_in()
            peer = case.peer if options.pocketbase else case
            runs = [partial(load.run, pair.new, case), *([partial(load.run, pair.old, peer)] if peer else [])]
            new, old = [*alternate(options.rounds, *runs), []][:2]
            figures.append(
                {
                    "name": case.name,
                    "old": median(run.rate for run in old),
                    "new": median(run.rate for run in new),
                    "ratio": median(b.rate / a.rate for a, b in zip(old, new, strict=False)),
                    # Other processes of the machine disturb it less.
                    "cpu_ratio": median(a.cpu / b.cpu for a, b in zip(old, new, strict=False)),
                    "old_p99": median(run.p99 for run in old),
                    "new_p99": median(run.p99 for run in new),
                    "goal": pair.goals.get(case.name, ""),
                }
            )
        stack.close()
        scenarios = run_scenarios(load, pair.sides, options.rounds, options.only)
    title = f"{options.books:,} books; requests/s with 32 clients, median of {options.rounds} rounds"
    results = {"title": f"{title}; old: {pair.old_name}, new: {ROOT}", "figures": figures, "scenarios": scenarios}
    print(json.dumps(results, indent=2) if options.json else "\n".join(as_table(results)))


def as_table(results: dict[str, Any]) -> list[str]:
    names, titles = "old new ratio cpu_ratio old_p99 new_p99".split(), "old,new,new/old,by CPU,p99 old,p99 new"
    head = "".join(f"{title:>9}" for title in titles.split(","))
    lines = [
        f"{figure['name']:44}{''.join(number(figure[name]) for name in names)}  {figure['goal']}"
        for figure in results["figures"]
    ]
    return [results["title"], "", f"{'':44}{head}  goal", *lines, *scenario_table(results["scenarios"])]
