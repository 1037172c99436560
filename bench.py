"""Measurements, against a real server. `python bench.py import books.csv`: how fast a CSV file goes in."""

import argparse
import csv
import os
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx2 as httpx

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

    def memory_mb(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 1024

    def stop(self) -> None:
        self.client.close()
        self.process.terminate()
        self.process.wait()


def bare_seconds(file: Path, folder: str) -> float:
    """The floor: the same file by `csv` and `sqlite3` alone, into a table with a unique and a search index."""
    connection = sqlite3.connect(f"{folder}/bare.db", isolation_level=None)
    connection.executescript(
        """PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;
        CREATE TABLE book (id INTEGER PRIMARY KEY, title TEXT, author TEXT, isbn TEXT UNIQUE, year TEXT);
        CREATE VIRTUAL TABLE book_fts USING fts5(title, author, content='book', content_rowid='id');"""
    )
    started = time.perf_counter()
    connection.execute("BEGIN")
    with file.open(encoding="utf-8-sig", errors="replace", newline="") as text:
        rows = csv.DictReader(text)
        connection.executemany(
            "INSERT OR IGNORE INTO book (title, author, isbn, year) VALUES (?, ?, ?, ?)",
            (
                (
                    row.get("title"),
                    row.get("authors") or row.get("author"),
                    row.get("isbn") or None,
                    row.get("original_publication_year") or row.get("year"),
                )
                for row in rows
            ),
        )
    connection.execute("INSERT INTO book_fts (rowid, title, author) SELECT id, title, author FROM book")
    connection.execute("COMMIT")
    seconds = time.perf_counter() - started
    connection.close()
    return seconds


def import_once(file: Path) -> dict[str, Any]:
    """Upload the file, reading a book from another connection meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(folder)
        try:
            book = server.client.post("/books", json={"title": "Read me", "author": "Meanwhile"}).headers["Location"]
            answer = server.client.post("/books/upload", files={"file": (file.name, file.read_bytes())})
            started, reads = time.perf_counter(), []
            while True:
                before = time.perf_counter()
                server.client.get(book)
                reads.append((time.perf_counter() - before) * 1000)
                upload = server.client.get(answer.headers["Location"]).json()
                if upload["status"] in ("completed", "failed"):
                    break
                time.sleep(0.02)
            seconds = time.perf_counter() - started
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    of_import = commands.add_parser("import", help="how fast a CSV file goes in")
    of_import.add_argument("file", type=Path)
    of_import.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    bench_import(arguments.file, arguments.rounds)


if __name__ == "__main__":
    main()
