"""The speed of an import: `python -m bench import books.csv`."""

import contextlib
import csv
import sqlite3
import statistics
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from bench.apps import INDEX_BOOKS, make_books
from bench.server import ROOT, Server

BARE_TABLE = """
PRAGMA journal_mode=WAL;
PRAGMA synchronous=NORMAL;
CREATE TABLE book (id INTEGER PRIMARY KEY, title, author, isbn UNIQUE, publisher, publication_year, price);
CREATE VIRTUAL TABLE book_fts USING fts5(title, author, isbn, publisher, content='book', content_rowid='id');
"""


def make_csv(file: Path, rows: int) -> None:
    with file.open("w", newline="") as text:
        writer = csv.writer(text)
        writer.writerow(("isbn", "title", "author", "year", "price"))
        for book in make_books(rows):
            writer.writerow((book["isbn"], book["title"], book["author"], book["publication_year"], "9.99"))


def bare_seconds(file: Path) -> float:
    """The same file by `csv` and `sqlite3` alone, into a table with one unique index and a full-text index."""
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.closing(sqlite3.connect(Path(folder) / "bare.db")) as connection,
        file.open(encoding="utf-8-sig", errors="replace", newline="") as text,
    ):
        connection.executescript(BARE_TABLE)
        started = time.perf_counter()
        connection.executemany(
            "INSERT OR IGNORE INTO book (title, author, isbn, publication_year, price) VALUES (?, ?, ?, ?, ?)",
            (
                (
                    row.get("title"),
                    row.get("authors") or row.get("author"),
                    row.get("isbn13") or row.get("isbn"),
                    row.get("original_publication_year") or row.get("year"),
                    row.get("price"),
                )
                for row in csv.DictReader(text)
            ),
        )
        connection.execute(INDEX_BOOKS)
        connection.commit()
        return time.perf_counter() - started


def import_once(file: Path, checkout: Path = ROOT) -> dict[str, Any]:
    """Upload the file. Until the import ends, read a book fifty times a second, and the upload once a second."""
    with tempfile.TemporaryDirectory() as folder, Server(Path(folder) / "books.db", checkout=checkout) as server:
        server.sign_in()
        book = server.client.post("/books", json={"title": "Read me", "author": "Meanwhile"}).headers["Location"]
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
            "read_p99": reads[int(len(reads) * 0.99)],
            "memory": server.memory_mb("VmHWM"),
        }


def bench_import(file: Path, rounds: int) -> None:
    runs = [{**import_once(file), "bare": bare_seconds(file)} for _ in range(rounds)]

    def median(name: str) -> float:
        return float(statistics.median(run[name] for run in runs))

    rate = runs[0]["rows"] / median("seconds")
    print(f"{file.name}: {runs[0]['rows']:,} rows, {runs[0]['status']}; median of {rounds} runs")
    print(f"  from 202 to completed      {median('seconds'):8.2f} s   {rate:10,.0f} rows/s")
    ratio = median("seconds") / median("bare")
    print(f"  csv and sqlite3 alone      {median('bare'):8.2f} s   {ratio:10.1f} times faster")
    print(f"  a book read meanwhile, p99 {median('read_p99'):8.1f} ms")
    print(f"  peak memory of the server  {median('memory'):8.0f} MB")
