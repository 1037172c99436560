"""PocketBase (https://pocketbase.io) with the same books."""

import contextlib
import json
import sqlite3
from pathlib import Path

from bench.apps import COLUMNS, insert_books, make_books
from bench.server import Process, free_port

RECORDS = "/api/collections/book/records"
NUMBERS = "pages publication_year copies available rating_count rating_sum added_by version".split()
DATES = ["created_at", "updated_at"]
TEXTS = "title author isbn genre description publisher language cover_url published_date".split()
# Those of `models.Book`, on the columns as PocketBase filters them.
INDEXES = [
    "CREATE UNIQUE INDEX ix_isbn ON book (isbn) WHERE isbn != ''",
    "CREATE INDEX ix_title ON book (title, author)",
    "CREATE INDEX ix_author ON book (author)",
    "CREATE INDEX ix_year ON book (publication_year)",
    "CREATE INDEX ix_score ON book"
    " (CASE WHEN rating_count = 0 THEN 0.0 ELSE (rating_sum + 30.0) / (rating_count + 10) END)",
    "CREATE INDEX ix_genre ON book (genre)",
    "CREATE INDEX ix_language ON book (language)",
    "CREATE INDEX ix_available ON book (id, available) WHERE available > 0",
    "CREATE INDEX ix_added_by ON book (added_by)",
]


class PocketBase(Process):
    def __init__(self, program: Path, folder: Path) -> None:
        port = free_port()
        # Without --dev=false, a program below /tmp takes itself for one that is being developed, and logs statements.
        command = [str(program.resolve()), "serve", f"--http=127.0.0.1:{port}", "--dev=false", f"--dir={folder}/data"]
        super().__init__("pocketbase", port, [*command, f"--migrationsDir={folder}"], "/api/health", cwd=folder)


def make_pocketbase(program: Path, folder: Path, books: int) -> None:
    folder.mkdir()
    fields: list[dict[str, str | bool]] = [{"name": name, "type": "text"} for name in TEXTS]
    fields += [{"name": name, "type": "number"} for name in ("price", *NUMBERS)]
    fields += [{"name": name, "type": "autodate", "onCreate": True} for name in DATES]
    anyone = dict.fromkeys(("listRule", "viewRule", "createRule"), "")
    collection = {"type": "base", "name": "book", "fields": fields, "indexes": INDEXES, **anyone}
    migration = f"migrate((app) => app.save(new Collection({json.dumps(collection)})))"
    (folder / "1_book.js").write_text(migration)
    with PocketBase(program, folder):
        pass
    columns = [name for name in COLUMNS if name in (*TEXTS, *NUMBERS, *DATES)]
    rows = ({**book, "id": f"{number:015}"} for number, book in enumerate(make_books(books), 1))
    with contextlib.closing(sqlite3.connect(folder / "data" / "data.db")) as connection, connection:
        insert_books(connection, ["id", *columns], rows)
