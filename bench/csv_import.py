"""The speed of an import: `python -m bench import books.csv`."""

import csv
import sqlite3
import statistics
import tempfile
import time
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

import database
from bench.server import ROOT, Server


def bare_seconds(file: Path, folder: Path) -> float:
    """The floor: the same file by `csv` and `sqlite3` alone, into the same table with its indexes, 5,000 rows at once.

    Without validation, normalized keys or a search for duplicates by title.
    """
    path = folder / "bare.db"
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


def import_once(file: Path, checkout: Path = ROOT) -> dict[str, Any]:
    """Upload the file. Until the import ends, read a book fifty times a second, and the upload once a second."""
    with tempfile.TemporaryDirectory() as folder, Server(Path(folder) / "books.db", checkout=checkout) as server:
        server.sign_in()
        book = server.client.post("/books", json={"title": "Read me", "author": "Meanwhile"}).headers["Location"]
        cpu_before = server.cpu_seconds()
        response = server.client.post("/books/upload", files={"file": (file.name, file.read_bytes())})
        reads: list[float] = []
        while True:
            before = time.perf_counter()
            server.client.get(book)
            reads.append((time.perf_counter() - before) * 1000)
            if len(reads) % 50 == 0:
                upload = server.client.get(response.headers["Location"]).json()
                if upload["status"] in ("completed", "failed"):
                    break
            time.sleep(max(0, before + 0.02 - time.perf_counter()))
        started_at, finished_at = (datetime.fromisoformat(upload[name]) for name in ("created_at", "finished_at"))
        reads.sort()
        return {
            "status": upload["status"],
            "rows": upload["rows"],
            "seconds": (finished_at - started_at).total_seconds(),
            "cpu": server.cpu_seconds() - cpu_before,
            "read_p99": reads[int(len(reads) * 0.99)],
            "memory": server.memory_mb("VmHWM"),
        }


def bench_import(file: Path, rounds: int) -> None:
    runs = []
    for _ in range(rounds):
        run = import_once(file)
        with tempfile.TemporaryDirectory() as folder:
            runs.append({**run, "bare": bare_seconds(file, Path(folder))})

    def median(name: str) -> float:
        return float(statistics.median(run[name] for run in runs))

    rate = runs[0]["rows"] / median("seconds")
    print(f"{file.name}: {runs[0]['rows']:,} rows, {runs[0]['status']}; median of {rounds} runs")
    print(f"  from 202 to completed      {median('seconds'):8.2f} s   {rate:10,.0f} rows/s")
    ratio = median("seconds") / median("bare")
    print(f"  csv and sqlite3 alone      {median('bare'):8.2f} s   {ratio:10.1f} times faster")
    print(f"  a book read meanwhile, p99 {median('read_p99'):8.1f} ms")
    print(f"  peak memory of the server  {median('memory'):8.0f} MB")
