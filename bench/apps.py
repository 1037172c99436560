"""The apps that the service is compared with, and the catalogue that the measurements use."""

import base64
import contextlib
import json
import os
import random
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import psycopg
from fastapi import FastAPI

from bench.server import ROOT, Server

ceiling = FastAPI()


@ceiling.get("/small")
async def small() -> dict[str, int | str]:
    return {"id": 1, "title": "Pride and Prejudice", "author": "Jane Austen", "genre": "Romance"}


class Floor:
    """The least that a route must do, in bare ASGI (`uvicorn bench.apps:floor`): no users, errors or filters."""

    columns = (
        "id, title, author, isbn, genre, description, publisher, language, pages, price / 100.0, cover_url,"
        " published_date, publication_year, copies, available, rating_sum * 1.0 / nullif(rating_count, 0),"
        " rating_count, added_by, version, created_at, updated_at"
    )
    names = (
        "id title author isbn genre description publisher language pages price cover_url published_date"
        " publication_year copies available rating rating_count added_by version created_at updated_at"
    ).split()

    connection: sqlite3.Connection | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while (await receive())["type"] == "lifespan.startup":
                self.connection = sqlite3.connect(os.environ["FLOOR_DB"], isolation_level=None)
                self.connection.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL")
                await send({"type": "lifespan.startup.complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        if scope["method"] == "POST":
            body = self.add((await receive())["body"])
        elif scope["path"] == "/my-library":
            body = self.shelf()
        elif scope["path"] == "/books":
            body = self.page({name: values[0] for name, values in parse_qs(scope["query_string"].decode()).items()})
        else:
            body = self.dump(self.books("WHERE id = ?", int(scope["path"][7:]))[0])
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    @staticmethod
    def dump(value: object) -> bytes:
        import orjson  # only the floor needs it

        return orjson.dumps(value)

    def run(self, statement: str, *values: object) -> list[Any]:
        assert self.connection is not None
        return self.connection.execute(statement, values).fetchall()

    def books(self, tail: str, *values: object) -> list[dict[str, Any]]:
        rows = self.run(f"SELECT {self.columns} FROM book {tail}", *values)
        return [dict(zip(self.names, row, strict=True)) for row in rows]

    def page(self, query: dict[str, str]) -> bytes:
        limit, offset = int(query.get("limit", 20)), int(query.get("offset", 0))
        if "search" in query:
            match = " ".join(f'"{word}"*' for word in query["search"].split())
            total = self.run("SELECT count(*) FROM book_fts WHERE book_fts MATCH ?", match)
            rows = self.run("SELECT rowid FROM book_fts WHERE book_fts MATCH ? LIMIT ?", match, limit)
            items = self.books(f"WHERE id IN ({','.join(str(row[0]) for row in rows)})")
        elif "genre" in query:
            genre = query["genre"].lower()
            total = self.run("SELECT count(*) FROM book WHERE genre_key = ?", genre)
            items = self.books("WHERE genre_key = ? ORDER BY id LIMIT ? OFFSET ?", genre, limit, offset)
        else:
            total = self.run("SELECT value FROM setting WHERE key = 'book_count'")
            after = json.loads(base64.urlsafe_b64decode(query["cursor"] + "=="))[1] if "cursor" in query else 0
            items = self.books("WHERE id > ? ORDER BY id LIMIT ? OFFSET ?", after, limit, offset)
        return self.dump({"items": items, "total": int(total[0][0]), "next": items[-1]["id"] if items else None})

    def shelf(self) -> bytes:
        entries = self.run(
            "SELECT book_id, status, rating, review, tags, started_at, finished_at, added_at, updated_at"
            " FROM shelf_entry WHERE user_id = 1 ORDER BY id DESC LIMIT 20"
        )
        books = {book["id"]: book for book in self.books(f"WHERE id IN ({','.join(str(row[0]) for row in entries)})")}
        total = self.run("SELECT count(*) FROM shelf_entry WHERE user_id = 1")
        return self.dump({"items": [[*row, books[row[0]]] for row in entries], "total": total[0][0]})

    def add(self, body: bytes) -> bytes:
        new = json.loads(body)
        moment = datetime.now(UTC).isoformat(" ")
        self.run("BEGIN IMMEDIATE")
        (book_id,) = self.run(
            "INSERT INTO book (title, author, isbn, title_key, author_key, copies, available, rating_count,"
            " rating_sum, version, created_at, updated_at)"
            " VALUES (?, ?, ?, lower(?1), lower(?2), 0, 0, 0, 0, 1, ?4, ?4) RETURNING id",
            *(new["title"], new["author"], new["isbn"], moment),
        )[0]
        words = (book_id, new["title"].lower(), new["author"].lower(), new["isbn"])
        self.run("INSERT INTO book_fts (rowid, title_key, author_key, isbn) VALUES (?, ?, ?, ?)", *words)
        created = self.dump(new | {"id": book_id})
        self.run(
            "INSERT INTO event (at, type, private, data) VALUES (?, 'book.created', 0, ?)", moment, created.decode()
        )
        self.run("COMMIT")
        return created


floor = Floor()


GENRES = 25
SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]


def word(number: int) -> str:
    """One of 4,900 words."""
    return SYLLABLES[number % 70] + SYLLABLES[number // 70 % 70] + "n"


def isbn_of(number: int) -> str:
    digits = f"978{number:09}"
    return digits + str(-sum(int(d) * (3 if i % 2 else 1) for i, d in enumerate(digits)) % 10)


def make_book(number: int, rng: random.Random) -> dict[str, Any]:
    """The columns of a row. A third of the titles have the word `shared`."""
    title = [word(int(rng.expovariate(1 / 900)) % 4900) for _ in range(3)]
    author = [word(rng.randrange(4900)), word(rng.randrange(300) * 7)]
    if rng.random() < 1 / 3:
        title.insert(1, "shared")
    genre, description = rng.randrange(GENRES), "What it is about, in some words. " * rng.randrange(8)
    publisher, language = word(rng.randrange(200)), rng.choice(["en", "de", "fr"])
    return {
        "title": " ".join(title).capitalize(),
        "author": " ".join(author).title(),
        "isbn": isbn_of(number),
        "genre": f"Genre {genre}",
        "description": description,
        "publisher": f"{publisher} press".title(),
        "language": language,
        "pages": rng.randrange(80, 900),
        "publication_year": rng.randrange(1900, 2026),
        "title_key": " ".join(title),
        "author_key": " ".join(author),
        "publisher_key": f"{publisher} press",
        "genre_key": f"genre {genre}",
        "language_key": language,
        **dict.fromkeys(("copies", "available", "added_by", "version"), 1),
        **dict.fromkeys(("rating_count", "rating_sum"), 0),
        **dict.fromkeys(("created_at", "updated_at"), MOMENT),
    }


def make_books(books: int, first: int = 1) -> Iterator[dict[str, Any]]:
    rng = random.Random(first)
    return (make_book(number, rng) for number in range(first, first + books))


def insert_books(connection: sqlite3.Connection, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    values = ", ".join(f":{name}" for name in columns)
    connection.executemany(f"INSERT INTO book ({', '.join(columns)}) VALUES ({values})", rows)


MOMENT = "2026-01-01 00:00:00.000000"
COLUMNS = [*make_book(1, random.Random())]
INDEX_BOOKS = "INSERT INTO book_fts (book_fts) VALUES ('rebuild')"
INSERT_ENTRIES = f"""
INSERT INTO shelf_entry (book_id, user_id, status, tags, added_at, updated_at)
SELECT id, 1, 'reading', '["bench"]', '{MOMENT}', '{MOMENT}' FROM book ORDER BY genre, id LIMIT 500
"""


def known(names: Iterable[Any]) -> list[str]:
    """The columns that a table has; an older checkout lacks some."""
    found = {row[0] for row in names}
    return [name for name in COLUMNS if name in found]


def make_database(database: Path | str, books: int, checkout: Path = ROOT) -> None:
    """A catalogue, and the shelf of the first admin, in the schema of this checkout."""
    with Server(database, checkout=checkout):
        pass  # its start creates the tables and the admin
    if isinstance(database, Path):
        with contextlib.closing(sqlite3.connect(database)) as connection, connection:
            columns = known(connection.execute("SELECT name FROM pragma_table_info('book')"))
            insert_books(connection, columns, make_books(books))
            connection.execute(INDEX_BOOKS)
            connection.execute(INSERT_ENTRIES)
        return
    with psycopg.connect(database, autocommit=True) as server:
        names = server.execute("SELECT column_name FROM information_schema.columns WHERE table_name = 'book'")
        columns = known(names)
        with server.cursor().copy(f"COPY book ({', '.join(columns)}) FROM STDIN") as copy:
            for book in make_books(books):
                copy.write_row([book[name] for name in columns])
        server.execute(INSERT_ENTRIES.encode())
        server.execute("VACUUM ANALYZE book")
