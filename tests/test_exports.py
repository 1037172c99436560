"""Exports, and that they are imported unchanged."""

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fastapi.testclient import TestClient

import pagination
from csv_files import BOOK_COLUMNS, escape_formula, unescape_formula
from tests.fixtures import DUNE, ROOT, Person, Server, service, sign_up, two_services, without_ids

CLASSICS = (ROOT / "static" / "sample_books.csv").read_bytes()


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


@pytest.fixture
def classics(client: TestClient, librarian: Person) -> TestClient:
    assert librarian.upload(CLASSICS)["inserted"] == 50
    return client


def test_importing_an_export_changes_nothing(
    classics: TestClient, librarian: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pagination, "EXPORT_BATCH", 7)
    answer = classics.get("/books/export")
    assert answer.headers["Content-Type"] == "text/csv; charset=utf-8"
    assert answer.headers["Content-Disposition"] == 'attachment; filename="books.csv"'
    assert list(rows_of(answer.text)[0]) == BOOK_COLUMNS
    assert len(rows_of(answer.text)) == 50
    before = classics.get("/books", params={"limit": 100}).json()
    for how in ("skip", "update"):
        again = librarian.upload(answer.content, on_duplicate=how)
        assert (again["format"], again["skipped"], again["warnings"], again["failed"]) == ("books-api", 50, 0, 0)
    assert classics.get("/books", params={"limit": 100}).json() == before


def test_ndjson_has_the_books_of_the_list(classics: TestClient) -> None:
    answer = classics.get("/books/export", params={"format": "ndjson"})
    assert answer.headers["Content-Type"] == "application/x-ndjson"
    books = [json.loads(line) for line in answer.text.splitlines()]
    assert books == classics.get("/books", params={"limit": 100}).json()["items"]


@pytest.mark.parametrize(
    "query",
    [
        {"search": "jane aus"},
        {"genre": "romance"},
        {"author": "dickens", "sort": "-year"},
        {"year_to": 1800, "sort": "title"},
        {"sort": "-rating"},
        {"language": "en", "sort": "author", "available": True},
    ],
    ids=str,
)
def test_export_is_filtered_and_sorted_like_the_list(
    classics: TestClient, monkeypatch: pytest.MonkeyPatch, query: dict[str, Any]
) -> None:
    monkeypatch.setattr(pagination, "EXPORT_BATCH", 3)
    listed = classics.get("/books", params={"limit": 100, **query}).json()["items"]
    exported = classics.get("/books/export", params={"format": "ndjson", **query}).text.splitlines()
    key = (lambda book: book["id"]) if "search" in query else (lambda _: 0)  # the list has the best match first
    assert [json.loads(line) for line in exported] == sorted(listed, key=key)


@pytest.mark.parametrize(
    ("query", "status"),
    [({"limit": 5}, 422), ({"format": "xlsx"}, 422), ({"sort": "price"}, 422), ({"added_by": "me"}, 401)],
    ids=str,
)
def test_invalid_queries_are_refused(client: TestClient, query: dict[str, Any], status: int) -> None:
    assert client.get("/books/export", params=query).status_code == status


def test_export_of_own_books(reader: Person, other_reader: Person) -> None:
    reader.add_book(title="Mine")
    other_reader.add_book(title="Not mine")
    assert [row["title"] for row in rows_of(reader.get("/books/export", params={"added_by": "me"}).text)] == ["Mine"]


@pytest.mark.parametrize(("price", "cell"), [(9, "9"), (9.5, "9.5"), (0.07, "0.07"), (0, "0"), (None, "")])
def test_prices_have_no_superfluous_zeros(reader: Person, price: float | None, cell: str) -> None:
    book = reader.add_book(title="T", author="A", price=price)
    assert rows_of(reader.get("/books/export").text)[0]["price"] == cell
    reader.post(f"/my-library/{book['id']}")
    assert rows_of(reader.get("/my-library/export").text)[0]["Price"] == cell


FORMULAS = ["=1+1", "+1", "-1", "@x", "'=1", "''=1", "='", "'x", "x'=", "-", '= "', "\u2212 1"]
# Where a spreadsheet splits in another way than the file.
FORMULAS += [f"{before}{split}{quote}=1+1" for split in ",;|\t\n\r" for before in ("", "a") for quote in ("", '"', "'")]
FORMULAS += ["a;;=1", "a;'=1", "a;''=1", "a\r\n- b\r\n\r\n- c", "&lt;=", "a;b", ";", "a; =1", '"=1"', "x\t\t-"]


class Restored(NamedTuple):
    """What a text became in an exported file, and in the book that was made of it."""

    cells: dict[str, str]
    book: dict[str, Any]


@pytest.fixture(scope="module")
def restored(first_start: Path) -> dict[str, Restored]:
    """All of FORMULAS, by way of one file."""
    here, elsewhere = two_services(first_start)
    with service(here) as admin:
        for number, text in enumerate(FORMULAS):
            admin.add_book(title=text, author=text, description=text, publication_year=1000 + number)
        exported = admin.get("/books/export").text
    with service(elsewhere) as admin:
        assert admin.upload(exported)["inserted"] == len(FORMULAS)
        books = {book["publication_year"]: book for book in admin.get("/books?limit=100").json()["items"]}
    cells = {int(row["publication_year"]): row for row in rows_of(exported)}
    return {text: Restored(cells[year], books[year]) for year, text in enumerate(FORMULAS, start=1000)}


@pytest.mark.parametrize("text", FORMULAS)
def test_formulas_are_escaped_and_restored(restored: dict[str, Restored], text: str) -> None:
    cells, book = restored[text]
    assert not any(cell.startswith(("=", "+", "-", "@", "\t", "\r")) for cell in cells.values())
    for split in ",;|\t\r\n":
        assert not any(re.match('"*[=+@-]', part) for cell in cells.values() for part in cell.split(split))
    assert unescape_formula(escape_formula(text)) == text
    stored = text.strip()
    assert book.items() >= {"title": stored, "author": stored, "description": stored}.items()


# --- my shelf -----------------------------------------------------------------------------------------------------

SHELVED: dict[str, Any] = {
    "completed": {
        "status": "completed",
        "rating": 4,
        "review": "So <b>so</b>.\n\n& on.",
        "tags": ["read", "sf", "a b"],
    },
    "abandoned": {"status": "abandoned", "review": "'=1", "finished_at": None},
    "reading": {"status": "reading", "started_at": "2026-01-02T03:04:05.678901Z"},
    "wishlist": {"status": "wishlist", "tags": ["-x", "to-read"]},
}


@pytest.mark.slow
def test_shelf_is_exported_and_imported(serve: Callable[..., Server], tmp_path: Path) -> None:
    here, elsewhere = (serve(file=tmp_path / name) for name in ("here.db", "elsewhere.db"))
    rita, again = sign_up(here.client, "rita"), sign_up(elsewhere.client, "rita")
    for number, change in enumerate(SHELVED.values(), start=1):
        rita.add_book(**(DUNE if number == 1 else {"title": "Twice", "author": "One, Another, and More"}))
        rita.post(f"/my-library/{number}")
        assert rita.patch(f"/my-library/{number}", json=change).status_code == 200
    exported = rita.get("/my-library/export")
    assert exported.headers["Cache-Control"] == "no-store"
    assert exported.text.startswith("Book Id,Title,Author,Author l-f,Additional Authors,ISBN,ISBN13,My Rating,")
    upload = again.upload(exported.content, path="/my-library/import")
    assert (upload["inserted"], upload["errors"]) == (4, [])
    shelf = {"sort": "added"}
    assert without_ids(again.get("/my-library", params=shelf).json()["items"]) == without_ids(
        rita.get("/my-library", params=shelf).json()["items"]
    )
    # Also on the same service, into an empty shelf; a second import changes nothing.
    oskar = sign_up(here.client, "oskar")
    for expected in ((4, 0), (0, 4)):
        upload = oskar.upload(exported.content, path="/my-library/import")
        assert (upload["inserted"], upload["skipped"]) == expected
    assert here.client.get("/books").json()["total"] == 4
    assert len(oskar.get("/my-library").json()["items"]) == 4


def test_shelf_export_is_private(client: TestClient, reader: Person, other_reader: Person) -> None:
    book = reader.add_book(**DUNE)
    reader.post(f"/my-library/{book['id']}")
    assert len(rows_of(reader.get("/my-library/export").text)) == 1
    entry = reader.get(f"/my-library/{book['id']}").json()
    assert rows_of(reader.get("/my-library/export").text)[0]["Added At"] == entry["added_at"]
    assert rows_of(other_reader.get("/my-library/export").text) == []
    assert client.get("/my-library/export").status_code == 401


@pytest.mark.parametrize("author", ["A , B", "A\N{NO-BREAK SPACE}, B", "A, B", "A,B", "A, ", "'=A , B"], ids=ascii)
def test_imported_shelf_finds_the_same_book_for_any_author(reader: Person, author: str) -> None:
    reader.post(f"/my-library/{reader.add_book(title='T', author=author)['id']}")
    upload = reader.upload(reader.get("/my-library/export").content, path="/my-library/import")
    assert (upload["skipped"], upload["inserted"], upload["failed"]) == (1, 0, 0)
    assert reader.get("/books").json()["total"] == 1
