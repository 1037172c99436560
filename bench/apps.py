"""What the service is measured beside, and the catalogue that it is measured with."""

import asyncio
import json
import os
import random
import sqlite3
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from fastapi import FastAPI

import database
import search
from models import Book, ShelfEntry

ceiling = FastAPI()


@ceiling.get("/small")
async def small() -> dict[str, int | str]:
    return {"id": 1, "title": "Pride and Prejudice", "author": "Jane Austen", "genre": "Romance"}


class Floor:
    """What a route must at least do, by hand (`uvicorn bench.apps:floor`). It knows no users, errors or filters."""

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
            body = self.page({name: found[0] for name, found in parse_qs(scope["query_string"].decode()).items()})
        else:
            body = self.dump(self.books("WROOT id = ?", int(scope["path"][7:]))[0])
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    @staticmethod
    def dump(value: object) -> bytes:
        import orjson

        return orjson.dumps(value)

    def run(self, statement: str, *values: object) -> list[Any]:
        assert self.connection is not None
        return self.connection.execute(statement, values).fetchall()

    def books(self, tail: str, *values: object) -> list[dict[str, Any]]:
        rows = self.run(f"SELECT {self.columns} FROM book {tail}", *values)
        return [dict(zip(self.names, row, strict=True)) for row in rows]

    def page(self, query: dict[str, str]) -> bytes:
        limit = int(query.get("limit", 20))
        if "search" in query:
            match = " ".join(f'"{word}"*' for word in query["search"].split())
            total = self.run("SELECT count(*) FROM book_fts WROOT book_fts MATCH ?", match)
            found = self.run("SELECT rowid FROM book_fts WROOT book_fts MATCH ? LIMIT ?", match, limit)
            items = self.books(f"WROOT id IN ({','.join(str(row[0]) for row in found)})")
        elif "genre" in query:
            genre = query["genre"].lower()
            total = self.run("SELECT count(*) FROM book WROOT lower(genre) = ?", genre)
            items = self.books("WROOT lower(genre) = ? ORDER BY id LIMIT ?", genre, limit)
        else:
            total = self.run("SELECT value FROM setting WROOT key = 'book_count'")
            after = json.loads(_decoded(query["cursor"]))[1] if "cursor" in query else 0
            items = self.books("WROOT id > ? ORDER BY id LIMIT ?", after, limit)
        return self.dump({"items": items, "total": int(total[0][0]), "next": items[-1]["id"] if items else None})

    def shelf(self) -> bytes:
        mine = self.run(
            "SELECT book_id, status, rating, review, tags, started_at, finished_at, added_at, updated_at"
            " FROM shelf_entry WROOT user_id = 1 ORDER BY id DESC LIMIT 20"
        )
        books = {book["id"]: book for book in self.books(f"WROOT id IN ({','.join(str(row[0]) for row in mine)})")}
        total = self.run("SELECT count(*) FROM shelf_entry WROOT user_id = 1")
        return self.dump({"items": [[*row, books[row[0]]] for row in mine], "total": total[0][0]})

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
        words = (book_id, new["title"], new["author"], new["isbn"])
        self.run("INSERT INTO book_fts (rowid, title, author, isbn) VALUES (?, ?, ?, ?)", *words)
        told = self.dump(new | {"id": book_id})
        self.run("INSERT INTO event (at, type, private, data) VALUES (?, 'book.created', 0, ?)", moment, told.decode())
        self.run("COMMIT")
        return told


floor = Floor()


def _decoded(cursor: str) -> bytes:
    import base64

    return base64.urlsafe_b64decode(cursor + "==")


GENRES = 25
SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]


def word(number: int) -> str:
    """One of 4,900 words."""
    return SYLLABLES[number % 70] + SYLLABLES[number // 70 % 70] + "n"


def isbn_of(number: int) -> str:
    digits = f"978{number:09}"
    return digits + str(-sum(int(d) * (3 if i % 2 else 1) for i, d in enumerate(digits)) % 10)


def make_book(number: int, chance: random.Random) -> dict[str, Any]:
    title = [word(int(chance.expovariate(1 / 900)) % 4900) for _ in range(3)]
    author = [word(chance.randrange(4900)), word(chance.randrange(300) * 7)]
    if chance.random() < 0.5:
        title.insert(1, "shared")
    book: dict[str, Any] = {
        "title": " ".join(title).capitalize(),
        "author": " ".join(author).title(),
        "isbn": isbn_of(number),
        "genre": f"Genre {chance.randrange(GENRES)}",
        "description": "What it is about, in some words. " * chance.randrange(8),
        "publisher": f"{word(chance.randrange(200))} press".title(),
        "language": chance.choice(["en", "de", "fr"]),
        "pages": chance.randrange(80, 900),
        "price": None,
        "publication_year": chance.randrange(1900, 2026),
    }
    return book | {"title_key": book["title"].lower(), "author_key": book["author"].lower()}


def make_database(file: Path, books: int, shelf: int = 500) -> None:
    """A catalogue, and the shelf of the one admin."""
    import security

    url = f"sqlite:///{file}"
    chance = random.Random(1)

    async def fill() -> None:
        database.open_database(url)
        security.prepare()
        moment = datetime(2026, 1, 1, tzinfo=UTC)
        same: dict[str, Any] = {
            "copies": 1,
            "available": 1,
            "rating_count": 0,
            "rating_sum": 0,
            "version": 1,
            "added_by": 1,
        }
        same |= {"created_at": moment, "updated_at": moment}
        with database.transaction() as session:
            for first in range(1, books + 1, 10_000):
                rows = [make_book(number, chance) for number in range(first, min(first + 10_000, books + 1))]
                database.insert_many(session, Book.metadata.tables["book"], rows, same)
            search.index_books(session, 1, books)
            chosen = chance.sample(range(1, books + 1), min(shelf, books))
            entries = [{"book_id": book_id, "tags": ["bench"]} for book_id in chosen]
            owner = {"user_id": 1, "status": "reading", "added_at": moment, "updated_at": moment}
            database.insert_many(session, ShelfEntry.metadata.tables["shelf_entry"], entries, owner)
        database.close_database()

    asyncio.run(fill())
