"""A disk that is full: what was kept is kept and can be read, writing is refused, and goes on when there is room."""

import os
import sqlite3
import subprocess
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
    """A disk of 12 MiB. To make one takes root."""
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", place], check=True)
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def fill(disk: Path, leave: int = 0) -> Path:
    """With a file of no use, but for so many bytes."""
    ballast = disk / "ballast"
    room = os.statvfs(disk)
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_frsize - leave)
    return ballast


def is_well(file: Path) -> bool:
    with sqlite3.connect(file) as connection:
        return bool(connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)])


def test_a_full_disk_stops_writing_and_nothing_else(serve: Callable[..., Server], disk: Path) -> None:
    server = serve(file=disk / "books.db")
    admin = Person(server.client, "admin", "admin")
    book = admin.add_book(**DUNE)
    ballast = fill(disk)
    kept, refusals = 1, 0
    while refusals < 5:  # the log of the file may still have room for some
        answer = admin.post("/books", json={"title": "Emma", "author": "Jane Austen", "description": "x" * 4000})
        kept += answer.status_code == 201
        refusals += answer.status_code != 201
    assert answer.status_code == 507, answer.text
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.json()["detail"].startswith("The disk is full")
    ways: dict[tuple[str, str], dict[str, Any]] = {
        ("PATCH", "/books/1"): {"json": {"pages": 3}},
        ("POST", "/books/upload"): {"files": {"file": ("books.csv", FILE)}},
        ("GET", "/admin/backup"): {},
    }
    for (method, path), options in ways.items():
        assert admin.request(method, path, **options).status_code == 507, path
    assert wait_for(lambda: server.client.get("/health").status_code == 503 or None)
    assert admin.get("/books/1").json() == book
    assert server.client.get("/books", params={"search": "emma"}).json()["total"] == kept - 1
    assert [event["type"] for event in admin.get("/events").json()["items"]][1] == "book.created"

    ballast.unlink()
    assert admin.patch("/books/1", json={"pages": 412}).status_code == 200
    assert server.client.get("/health").status_code == 200
    assert server.client.get("/books").json()["total"] == kept
    told = admin.get("/events?limit=100&types=book.*").json()["items"]
    assert len(told) == kept + 1
    server.stop()
    assert is_well(disk / "books.db")


def test_an_import_waits_for_room(serve: Callable[..., Server], disk: Path) -> None:
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
    assert is_well(disk / "books.db")
