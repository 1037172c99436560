"""This checkout compared with another, in alternation: `python -m bench --against CHECKOUT`."""

import json
import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from bench.apps import make_database
from bench.csv_import import import_once
from bench.load import LoadGenerator, make_cases
from bench.server import ROOT, Server

T = TypeVar("T")


Figures = tuple[float, float]  # of one round: the rate, and the CPU time


class Comparison(NamedTuple):
    """Medians of the rounds. A ratio above 1 means that the new code is faster."""

    name: str
    old: float
    new: float
    ratio: float
    cpu_ratio: float  # by CPU time, which other processes of the machine disturb less


def alternate(rounds: int, old: Callable[[], T], new: Callable[[], T]) -> list[tuple[T, T]]:
    """The results of both in each round; every other round starts with the new one."""
    results = []
    for number in range(rounds):
        if number % 2:
            second = new()
            results.append((old(), second))
        else:
            results.append((old(), new()))
    return results


def compare(name: str, rounds: list[tuple[Figures, Figures]]) -> Comparison:
    return Comparison(
        name,
        old=statistics.median(old[0] for old, _ in rounds),
        new=statistics.median(new[0] for _, new in rounds),
        ratio=statistics.median(new[0] / old[0] for old, new in rounds),
        cpu_ratio=statistics.median(old[1] / new[1] for old, new in rounds),
    )


def show(title: str, comparisons: list[Comparison], as_json: bool) -> None:
    if as_json:
        result: dict[str, Any] = {"title": title, "figures": [comparison._asdict() for comparison in comparisons]}
        print(json.dumps(result, indent=2))
        return
    print(f"{title}\n\n{'':44}{'old':>9}{'new':>9}{'new/old':>9}{'by CPU time':>13}")
    for name, old, new, ratio, cpu_ratio in comparisons:
        print(f"{name:44}{old:9,.0f}{new:9,.0f}{ratio:9.2f}{cpu_ratio:13.2f}")


def compare_routes(checkout: Path, books: int, rounds: int, seconds: int, only: str, as_json: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        load = LoadGenerator(folder, seconds)
        # By the older schema, which the new code migrates in its own copy.
        make_database(folder / "old.db", books, checkout=checkout)
        shutil.copy(folder / "old.db", folder / "new.db")
        with Server(folder / "new.db"):
            pass  # a process that has run migrations is slower: it has loaded more for the garbage collector to scan
        comparisons = []
        with Server(folder / "old.db", checkout=checkout) as old, Server(folder / "new.db") as new:
            old.sign_in()
            new.sign_in()
            for case in make_cases(books):
                if only.lower() not in case.name.lower():
                    continue
                results = alternate(rounds, lambda: load.run(old, case), lambda: load.run(new, case))  # noqa: B023
                figures = [((a.rate, a.cpu), (b.rate, b.cpu)) for a, b in results]
                comparisons.append(compare(case.name, figures))
        title = f"{books:,} books; requests/s of {checkout} and {ROOT}, median of {rounds} rounds"
        show(title, comparisons, as_json)


def import_figures(run: dict[str, Any]) -> Figures:
    return run["rows"] / run["seconds"], run["cpu"] / run["rows"]


def compare_imports(checkout: Path, file: Path, rounds: int) -> None:
    results = alternate(rounds, lambda: import_once(file, checkout), lambda: import_once(file))
    figures = [(import_figures(a), import_figures(b)) for a, b in results]
    title = f"{file.name}: {results[0][0]['rows']:,} rows; rows/s of {checkout} and {ROOT}, median of {rounds} rounds"
    show(title, [compare("import", figures)], as_json=False)
