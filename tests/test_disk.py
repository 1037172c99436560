"""A full disk: reads work, writes are 507, and both work again once there is room."""

import os
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures import DUNE, Person, Server, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.sqlite]

ROWS = 20_000
FILE = "title,author\n" + "".join(f"Book {number},Somebody\n" for number in range(ROWS))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MiB. Needs root."""
    mount_point = tmp_path / "disk"
    mount_point.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", mount_point], check=True)
    yield mount_point
    subprocess.run(["umount", "--lazy", mount_point], check=True)


def fill(disk: Path, leave: int = 0) -> Path:
    """Fill the disk with a file, except for `leave` bytes."""
    ballast = disk / "ballast"
    room = os.statvfs(disk)
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_frsize - leave)
    return ballast


def is_consistent(file: Path) -> bool:
    with sqlite3.connect(file) as connection:
        return bool(connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)])


def test_a_full_disk_refuses_writes_and_allows_reads(serve: Callable[..., Server], disk: Path) -> None:
    server = serve(file=disk / "books.db")
    admin = Person(server.client, "admin", "admin")
    book = admin.add_book(**DUNE)
    ballast = fill(disk)
    count, refusals = 1, 0
    while refusals < 5:  # the write-ahead log may still have room for some
        answer = admin.post("/books", json={"title": "Emma", "author": "Jane Austen", "description": "x" * 4000})
        count += answer.status_code == 201
        refusals += answer.status_code != 201
    assert answer.status_code == 507, answer.text
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.json()["detail"].startswith("The disk is full")
    requests: dict[tuple[str, str], dict[str, Any]] = {
        ("PATCH", "/books/1"): {"json": {"pages": 3}},
        ("POST", "/books/upload"): {"files": {"file": ("books.csv", FILE)}},
        ("GET", "/admin/backup"): {},
    }
    for (method, path), options in requests.items():
        assert admin.request(method, path, **options).status_code == 507, path
    time.sleep(5)  # until the next probe; each request is a transaction, and many of them cause a checkpoint
    assert server.client.get("/health").status_code == 503
    assert admin.get("/books/1").json() == book
    assert server.client.get("/books", params={"search": "emma"}).json()["total"] == count - 1
    assert [event["type"] for event in admin.get("/events").json()["items"]][1] == "book.created"

    ballast.unlink()
    assert admin.patch("/books/1", json={"pages": 412}).status_code == 200
    assert server.client.get("/health").status_code == 200
    assert server.client.get("/books").json()["total"] == count
    events = admin.get("/events?limit=100&types=book.*").json()["items"]
    assert len(events) == count + 1
    server.stop()
    assert is_consistent(disk / "books.db")


def test_an_import_continues_once_there_is_room(serve: Callable[..., Server], disk: Path) -> None:
    server = serve(file=disk / "books.db")
    admin = Person(server.client, "admin", "admin")
    ballast = fill(disk, leave=3 << 20)
    upload = admin.post("/books/upload", files={"file": ("books.csv", FILE)})
    assert upload.status_code == 202
    where = upload.headers["Location"]
    wait_for(lambda: "disk is full" in server.log.read_text() or None, seconds=30)
    before = admin.get(where).json()
    assert before["status"] in ("queued", "processing")
    ballast.unlink()
    after = wait_for(lambda: ((got := admin.get(where).json())["status"] == "completed" and got) or None, seconds=120)
    assert (after["rows"], after["inserted"]) == (ROWS, ROWS)
    assert server.client.get("/books").json()["total"] == ROWS
    server.stop()
    assert is_consistent(disk / "books.db")
