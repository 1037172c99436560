"""Measurements that take more than one load on one server."""

import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from bench.csv_import import bare_seconds, import_once, make_csv
from bench.load import BOOK, FREQUENT, NEW_BOOK, Case, LoadGenerator
from bench.server import Server

T = TypeVar("T")


class Side(NamedTuple):
    """A catalogue as it was made, and the code to serve it."""

    file: Path
    checkout: Path


def two_workers(load: LoadGenerator, side: Side) -> dict[str, float]:
    file, checkout = side
    with Server(file, checkout=checkout) as one, Server(file, checkout=checkout, workers=2) as two:
        one.sign_in()
        two.sign_in()
        cases = [load.cases[name] for name in (BOOK, NEW_BOOK)]
        return {f"{case.name}, times": load.run(two, case).rate / load.run(one, case).rate for case in cases}


def heavy_reads(load: LoadGenerator, side: Side) -> dict[str, float]:
    """A word of a third of all books, by title."""
    heavy = Case("heavy", lambda: f"{FREQUENT}&sort=title")
    with Server(side.file, checkout=side.checkout, workers=2) as server, ThreadPoolExecutor() as pool:
        alone = load.run(server, load.cases[BOOK], clients=4)
        heavy_run = pool.submit(load.run, server, heavy, clients=64)
        beside = load.run(server, load.cases[BOOK], clients=4)
        rate = heavy_run.result().rate
    p99s = {"p99 of a book without them, ms": alone.p99, "p99 of a book, ms": beside.p99}
    return {**p99s, "later by, ms": beside.p99 - alone.p99, "requests/s": rate}


def csv_import(load: LoadGenerator, side: Side) -> dict[str, float]:
    """Of twice as many rows as books."""
    file = load.folder / "books.csv"
    if not file.exists():
        make_csv(file, 2 * load.books)
    run = import_once(file, side.checkout)
    return {
        "rows/s": run["rows"] / run["seconds"],
        "times a bare script's time": run["seconds"] / bare_seconds(file),
        "p99 of a book meanwhile, ms": run["read_p99"],
    }


SCENARIOS: dict[str, Callable[[LoadGenerator, Side], dict[str, float]]] = {
    "two workers against one": two_workers,
    "64 clients with heavy reads": heavy_reads,
    "import": csv_import,
}
GOALS = {
    "two workers against one: a new book, times": "≥ 1.5",
    "64 clients with heavy reads: later by, ms": "≤ 10",
    "import: times a bare script's time": "≤ 7",
    "import: p99 of a book meanwhile, ms": "≤ 12",
}


def alternate(rounds: int, *runs: Callable[[], T]) -> list[list[T]]:
    """The results of each. The first comes last in every other round."""
    results: list[list[T]] = [[] for _ in runs]
    for number in range(rounds):
        for index in sorted(range(len(runs)), reverse=number % 2 == 0):
            results[index].append(runs[index]())
    return results


def run_on_copy(name: str, load: LoadGenerator, side: Side) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copy(side.file, folder))
        return SCENARIOS[name](load, Side(copy, side.checkout))


def run_scenarios(load: LoadGenerator, sides: Sequence[Side], rounds: int, only: str) -> list[dict[str, Any]]:
    """The medians of each figure, for the new side and, if there are two, the old one."""
    lines = []
    for name in SCENARIOS if sides else ():
        if only.lower() in name.lower():
            runs = alternate(rounds, *(partial(run_on_copy, name, load, side) for side in sides))
            for figure in runs[0][0]:
                line = f"{name}: {figure}"
                medians = [statistics.median(run[figure] for run in one) for one in runs]
                values = dict(zip(("new", "old"), medians, strict=False))
                lines.append({"name": line, **values, "goal": GOALS.get(line, "")})
    return lines


def scenario_table(lines: Sequence[dict[str, Any]]) -> list[str]:
    rows = [f"{line['name']:60}{number(line.get('old'))}{number(line['new'])}  {line['goal']}" for line in lines]
    return ["", f"{'':60}{'old':>9}{'new':>9}  goal", *rows] if rows else []


def number(value: float | None) -> str:
    return " " * 9 if value is None else f"{value:9,.2f}" if value < 100 else f"{value:9,.0f}"
