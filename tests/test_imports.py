"""Imports of CSV files: every row is imported, or refused with a reason."""

import csv
import functools
import io
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Connection
from sqlalchemy.exc import OperationalError
from sqlmodel import Session, select

import csv_files
import database
import imports
import uploads
from models import Upload, UploadChunk, UploadError, UploadStatus, User
from settings import settings
from tests.fixtures import DUNE, REAL_BOOKS, ROOT, Clock, Person, Postgres, Server, sign_up, wait_for

# --- files --------------------------------------------------------------------------------------------------------

Counts = tuple[int, int, int, int]  # rows, inserted, skipped, failed

GOOD: dict[str, tuple[str | bytes, Counts, dict[str, Any]]] = {
    "the documented file": (
        "title,author,price,publication_date\nDune,Frank Herbert,9.99,1965-08-01\n",
        (1, 1, 0, 0),
        {"price": 9.99, "published_date": "1965-08-01", "publication_year": 1965},
    ),
    "spellings of headers": (
        "Book Title,BOOK-AUTHOR,Num Pages,Year Published,Language Code,Image_URL\nA,B,12,2008.0,en,https://e.org/a.jpg\n",
        (1, 1, 0, 0),
        {"pages": 12, "publication_year": 2008, "language": "en", "cover_url": "https://e.org/a.jpg"},
    ),
    "a byte order mark": (b"\xef\xbb\xbftitle,author\nA,B\n", (1, 1, 0, 0), {}),
    "UTF-16 without a mark": ("title,author\nÉ,B\n".encode("utf-16-le"), (1, 1, 0, 0), {"title": "É"}),
    "big-endian UTF-16 without a mark": ("title,author\nÉ,B\n".encode("utf-16-be"), (1, 1, 0, 0), {"title": "É"}),
    "line ends of Windows": ("title,author\r\nA,B\r\n", (1, 1, 0, 0), {}),
    "line ends of old Macs": ("title,author\rA,B\r", (1, 1, 0, 0), {}),
    "no line end at the end": ("title,author\nA,B", (1, 1, 0, 0), {}),
    "blank lines": ("\n\ntitle,author\n\nA,B\n\n\n", (1, 1, 0, 0), {}),
    "quotes, commas and line breaks": (
        'title,author,summary\n"A, or ""B""",C,"one\ntwo"\n',
        (1, 1, 0, 0),
        {"title": 'A, or "B"', "description": "one\ntwo"},
    ),
    "an ISBN-10": ("title,author,isbn\nA,B,0-441-17271-7\n", (1, 1, 0, 0), {"isbn": "9780441172719"}),
    "an ISBN without its zeros": ("title,author,isbn\nA,B,441172717\n", (1, 1, 0, 0), {"isbn": "9780441172719"}),
    "an ISBN-13 damaged, an ISBN-10 whole": (
        "title,author,isbn13,isbn\nA,B,9.78044117271e+12,441172717\n",
        (1, 1, 0, 0),
        {"isbn": "9780441172719"},
    ),
    "a year before the common era": ("title,author,year\nA,B,-720.0\n", (1, 1, 0, 0), {"publication_year": -720}),
    "a year for a date": ("title,author,publish_date\nA,B,1999\n", (1, 1, 0, 0), {"publication_year": 1999}),
    "twice the same ISBN": ("title,author,isbn\nA,B,0441172717\nC,D,9780441172719\n", (2, 1, 1, 0), {}),
    "twice the same title and author": ("title,author\nDune ,frank  herbert\nDUNE,Frank Herbert\n", (2, 1, 1, 0), {}),
    "accents make another book": ("title,author\nPeche,A\nPêche,A\n", (2, 2, 0, 0), {}),
    "only a header": ("title,author\n", (0, 0, 0, 0), {}),
}


def test_undecodable_byte_in_the_header_is_shown_as_replacement_character(reader: Person) -> None:
    upload = reader.upload(b"title,author,\xc3\xa9tag\x81re\nA,\xc3\xa9,1\n")
    assert (upload["status"], upload["inserted"]) == ("completed", 1)
    assert upload["ignored_columns"] == ["étag\N{REPLACEMENT CHARACTER}re"]


@pytest.mark.parametrize(("content", "counts", "book"), GOOD.values(), ids=GOOD)
def test_valid_files_are_imported(
    client: TestClient, reader: Person, content: str | bytes, counts: Counts, book: dict[str, Any]
) -> None:
    upload = reader.upload(content)
    assert (upload["status"], upload["progress"], upload["error"]) == ("completed", 1.0, None)
    assert (upload["rows"], upload["inserted"], upload["skipped"], upload["failed"]) == counts
    assert (upload["errors"], upload["warnings"]) == ([], 0)
    books = client.get("/books").json()
    assert books["total"] == counts[1]
    for shown in books["items"][:1]:
        assert shown.items() >= book.items()
        assert shown in client.get("/books", params={"search": shown["title"]}).json()["items"]


Errors = list[tuple[int, str, str | None, str]]  # row, severity, field, a part of the message

PARTLY: dict[str, tuple[str | bytes, Counts, Errors]] = {
    "too many cells": (
        "title,author\nA,B,C\nD,E\n",
        (2, 1, 0, 1),
        [(2, "error", None, "3 cells where the header has 2")],
    ),
    "too few cells": ("title,author\nA\nD,E\n", (2, 1, 0, 1), [(2, "error", None, "1 cells where the header has 2")]),
    "no title": ("title,author\n,B\nD,E\n", (2, 1, 0, 1), [(2, "error", "title", "is missing")]),
    "no title nor author": (
        "title,author,isbn\n , ,0441172717\nD,E,\n",
        (2, 1, 0, 1),
        [(2, "error", "title", "is missing, as is author")],
    ),
    "prices": (
        "title,author,price\nA,B,nan\nA,B,-1\nA,B,inf\nA,B,1.005\nA,B,free\nA,B,0\n",
        (6, 1, 5, 0),
        [(row, "warning", "price", "is not a price; left out") for row in range(2, 7)],
    ),
    "pages": (
        "title,author,pages\nA,B,-5\nA,B,1e99\nA,B,many\nA,B,374.0\n",
        (4, 1, 3, 0),
        [(n, "warning", "pages", "is not a number of pages; left out") for n in (2, 3, 4)],
    ),
    "dates": (
        "title,author,publish_date\nA,B,2023-02-30\nA,B,yesterday\nA,B,12345678\nD,E,2008-08-11\n",
        (4, 2, 2, 0),
        [(row, "warning", "publish_date", "left out") for row in (2, 3, 4)],
    ),
    "years": (
        "title,author,year\nA,B,99999\nA,B,2008.5\nA,B,2008\n",
        (3, 1, 2, 0),
        [(n, "warning", "year", "is not a year of publication; left out") for n in (2, 3)],
    ),
    "damaged ISBNs": (
        "title,author,isbn\nA,B,9.78043902348e+12\nC,D,9780441172710\nE,F,not an isbn\nG,H,123\n",
        (4, 4, 0, 0),
        [(row, "warning", "isbn", "not an ISBN") for row in (2, 3, 4, 5)],
    ),
    "a NUL": ("title,author\nA\0,B\nD,E\n", (2, 2, 0, 0), [(2, "warning", "title", "bytes that are no text")]),
    "a title that is a book": (
        f"title,author\n{'x' * 1_000_000},B\nD,E\n",
        (2, 2, 0, 0),
        [(2, "warning", "title", "has more than 500 characters: this was cut off")],
    ),
    "a line without end": (
        f"title,author\n{'x' * 5_000_000},B\nD,E\n",
        (2, 1, 0, 1),
        [(2, "error", None, "longer than")],
    ),
    "a quote that never closes, in the last row": (
        'title,author\nA,B\n"C,D\n',
        (2, 1, 0, 1),
        [(3, "error", None, "never closes")],
    ),
    "a quote that never closes, and rows behind it": (
        'title,author\nA,B\n"C,D\nE,F\nG,H\n',
        (4, 3, 0, 1),
        [(3, "error", None, "never closes")],
    ),
    "a quote that closes rows later": (
        'title,author\n"A,B\nC,D\n"E, or F",G\nH,I\n',
        (4, 3, 0, 1),
        [(2, "error", None, "does not close where it should")],
    ),
    "a script for a cover": (
        "title,author,cover url\nA,B,javascript:alert(1)\n",
        (1, 1, 0, 0),
        [(2, "warning", "cover url", "is not an address that begins with http:// or https://; left out")],
    ),
}


@pytest.mark.parametrize(("content", "counts", "errors"), PARTLY.values(), ids=PARTLY)
def test_bad_rows_are_refused_with_a_reason_and_good_ones_imported(
    client: TestClient, reader: Person, content: str | bytes, counts: Counts, errors: Errors
) -> None:
    upload = reader.upload(content)
    assert upload["status"] == "completed"
    assert (upload["rows"], upload["inserted"], upload["skipped"], upload["failed"]) == counts
    assert upload["warnings"] == sum(severity == "warning" for _, severity, _, _ in errors)
    found = [(error["row"], error["severity"], error["field"]) for error in upload["errors"]]
    assert found == [error[:3] for error in errors]
    for error, (_, _, _, part) in zip(upload["errors"], errors, strict=True):
        assert part in error["message"]
        assert len(error["value"]) <= 200
    assert client.get("/books").json()["total"] == counts[1]


def test_timestamps_of_a_shelf_are_validated(reader: Person) -> None:
    messages = {
        "9999-12-31T23:59:59.999999Z": "is not a date; left out",
        "9999-12-31": "is not a date; left out",
        "0001-01-01T00:00:00+14:00": "is not a date; left out",
        "2020T": "is not a date like 2008-08-11; left out",
        "2020-13-01T00:00": "is not a date; left out",
        "2020-01-01T10:00:00+02:00": None,
        "2020-01-01T10:00:00": None,
    }
    rows = "".join(f"Book {n},Author,4,read,{moment}\n" for n, moment in enumerate(messages))
    upload = reader.upload(f"Title,Author,My Rating,Exclusive Shelf,Date Read\n{rows}", shelve="true")
    warned = {moment: f"{moment} {message}" for moment, message in messages.items() if message}
    assert {error["value"]: error["message"] for error in upload["errors"]} == warned
    assert {error["field"] for error in upload["errors"]} == {"Date Read"}
    entries = reader.get("/my-library?sort=added").json()["items"]
    assert [e["finished_at"] for e in entries] == [None] * 5 + ["2020-01-01T08:00:00Z", "2020-01-01T10:00:00Z"]
    stats = reader.get("/my-library/stats").json()
    assert (stats["by_year"], stats["undated"]) == ([{"year": 2020, "books": 2, "pages": 0}], 5)


SHELF = "Title,Author,My Rating,Exclusive Shelf,My Review"


def test_rows_of_one_book_update_its_entry_in_turn(client: TestClient, reader: Person) -> None:
    reader.upload(f"{SHELF}\nA,B,5,read,one\n", shelve="true")
    start = client.get("/events").json()["next"]
    rows = "A,B,1,read,two\nA,B,0,to-read,\nA,B,2.75,read,two\nA,B,2.75,read,two\nC,D,0,read,\n"
    upload = reader.upload(f"{SHELF}\n{rows}", shelve="true", on_duplicate="update")
    assert [upload[name] for name in ("status", "inserted", "updated", "skipped")] == ["completed", 1, 3, 1]
    entry = reader.get("/my-library/1").json()
    assert (entry["status"], entry["rating"], entry["review"]) == ("completed", 2.75, "two")
    assert (entry["book"]["rating"], entry["book"]["rating_count"]) == (2.75, 1)
    public = client.get("/events", params={"after": start, "types": "review.*,reviews.*"}).json()["items"]
    assert [(event["type"], event["data"]) for event in public] == [
        ("reviews.imported", {"upload_id": upload["id"], "count": 2})
    ]
    assert reader.delete("/my-library/1").status_code == 204
    assert client.get("/books/1").json()["rating"] is None


def test_reviews_of_a_batch_are_one_public_event(
    client: TestClient, reader: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "BATCH", 20)
    start = client.get("/events").json()["next"]
    rows = "".join(f"Book {n},A,{n % 5},to-read,{'x' if n % 2 else ''}\n" for n in range(50))
    upload = reader.upload(f"{SHELF}\n{rows}", path="/my-library/import")
    public = client.get("/events", params={"after": start}).json()["items"]
    assert [event["type"] for event in public] == ["books.imported", "reviews.imported"] * 3
    counts = [event["data"] for event in public if event["type"] == "reviews.imported"]
    assert counts == [{"upload_id": upload["id"], "count": count} for count in (18, 18, 9)]
    assert sum(client.get(f"/books/{book}/reviews").json()["total"] for book in range(1, 51)) == 45


def test_an_import_says_what_becomes_public(reader: Person) -> None:
    for path, options in (("/my-library/import", {}), ("/books/upload", {"shelve": True, "dry_run": True})):
        files = {"file": ("a.csv", f"{SHELF}\nA,B,5,read,one\n".encode())}
        answer = reader.post(path, files=files, data=options)
        assert answer.status_code == 202
        assert "Ratings and reviews become public" in answer.json()["hint"]
        assert "Ratings and reviews become public" in reader.get(answer.headers["Location"]).json()["hint"]


def test_a_shelf_that_is_uploaded_as_books_gets_a_hint(reader: Person) -> None:
    assert "/my-library/import" in reader.upload(f"{SHELF}\nA,B,5,read,one\n")["hint"]
    assert reader.upload("title,author\nC,D\n")["hint"] is None
    assert reader.get("/my-library").json()["total"] == 0


def test_overlong_html_entity_stays_text(reader: Person) -> None:
    entity = f"&#{'1' * 5000};"
    upload = reader.upload(f"{SHELF},Description\nA,B,5,read,so {entity},{entity}\nC,D,4,read,,\n", shelve="true")
    assert (upload["status"], upload["inserted"]) == ("completed", 2)
    entry = reader.get("/my-library/1").json()
    assert (entry["review"], entry["book"]["description"]) == (f"so {entity}", entity)


def test_review_is_unescaped_once(reader: Person) -> None:
    reader.upload(f"{SHELF}\nA &amp; B,C,5,read,<b>If</b> a &lt;b and c&gt; d<br/>&lt;i&gt;\n", shelve="true")
    entry = reader.get("/my-library/1").json()
    assert (entry["book"]["title"], entry["review"]) == ("A & B", "If a <b and c> d\n<i>")


def test_number_with_an_ambiguous_separator_is_left_out(client: TestClient, reader: Person) -> None:
    upload = reader.upload('title,author,pages\nA,B,"1,000"\nC,D,1.000\nE,F,374.0\nG,H,"374,00"\n')
    assert [(error["row"], error["field"]) for error in upload["errors"]] == [(2, "pages"), (3, "pages")]
    assert [book["pages"] for book in client.get("/books").json()["items"]] == [None, None, 374, 374]


def test_year_derived_from_a_date_does_not_overwrite_the_year_of_a_book(reader: Person) -> None:
    reader.add_book(title="T", author="A", publication_year=1813)
    upload = reader.upload("title,author,published_date\nT,A,2008-08-11\n", on_duplicate="update")
    assert upload["updated"] == 1
    book = reader.get("/books/1").json()
    assert (book["published_date"], book["publication_year"]) == ("2008-08-11", 1813)


@pytest.mark.parametrize("query", ["sort=-id", "genre=Y"])
def test_ambiguous_books_of_an_export_are_not_updated(client: TestClient, reader: Person, query: str) -> None:
    for genre in ("X", "Y"):
        reader.add_book(title="T", author="A", genre=genre)
    exported = client.get(f"/books/export?{query}").content
    upload = reader.upload(exported, on_duplicate="update")
    assert (upload["updated"], upload["skipped"], upload["failed"]) == (0, upload["rows"], 0)
    assert "several books have this title and author" in upload["errors"][0]["message"]
    assert [book["genre"] for book in client.get("/books").json()["items"]] == ["X", "Y"]


EXCEL: dict[str, Callable[[str], bytes]] = {
    "semicolons": lambda text: text.replace(",", ";").encode("utf-8-sig"),
    "tabs, in UTF-16": lambda text: text.replace(",", "\t").encode("utf-16"),
    "rounded ISBNs": lambda text: re.sub(r"978(\d{10})", lambda found: f"{float(found[0]):.5E}", text).encode(),
}


@pytest.mark.parametrize("save", EXCEL.values(), ids=EXCEL)
def test_exports_that_a_spreadsheet_has_saved_change_nothing(
    client: TestClient, reader: Person, save: Callable[[str], bytes]
) -> None:
    for title, isbn in (("Dune", "9780441172719"), ("Emma", None), ("Persuasion", "9780141439587")):
        book = reader.add_book(title=title, author="Somebody", isbn=isbn)
        reader.post(f"/my-library/{book['id']}")
        reader.patch(f"/my-library/{book['id']}", json={"status": "completed", "rating": 4})
    for export, path in (("/books/export", "/books/upload"), ("/my-library/export", "/my-library/import")):
        content = save(reader.get(export).text)
        for on_duplicate in ("skip", "update"):
            upload = reader.upload(content, path=path, on_duplicate=on_duplicate)
            assert (upload["status"], upload["skipped"]) == ("completed", 3), upload["errors"]
    assert client.get("/books").json()["total"] == reader.get("/my-library").json()["total"] == 3


def test_an_update_does_not_guess_which_of_two_equal_books_is_meant(client: TestClient, reader: Person) -> None:
    """The file does not show it; the reviews changed places."""
    first, second = (reader.add_book(title="Poems", author="Anonymous")["id"] for _ in range(2))
    for book, review in ((second, "of the second"), (first, "of the first")):
        reader.post(f"/my-library/{book}")
        reader.patch(f"/my-library/{book}", json={"review": review})
    exported = reader.get("/my-library/export").content
    upload = reader.upload(exported, path="/my-library/import", on_duplicate="update")
    assert (upload["updated"], upload["skipped"]) == (0, 2)
    assert {error["message"] for error in upload["errors"]} <= {imports.AMBIGUOUS}
    assert reader.get(f"/my-library/{first}").json()["review"] == "of the first"


def test_other_encodings_are_in_the_hint(reader: Person) -> None:
    for content, hint in (
        ("Été,Zoé".encode("cp1252"), True),
        ("Война и мир,Лев Толстой".encode("cp1251"), True),
        (b"A,B", False),
    ):
        upload = reader.upload(b"title,author\n" + content)
        assert (uploads.ENCODING_HINT in (upload["hint"] or "")) is hint


def test_short_windows_1252_text_is_detected(client: TestClient, reader: Person) -> None:
    text = "title,author\nÉté,Zoé\nNoël,Andrée Hébé\nDéjà,Célèbre Élève\n"
    upload = reader.upload(text.encode("cp1252"))
    assert (upload["inserted"], upload["encoding"]) == (3, "windows-1252")
    assert client.get("/books").json()["items"][1]["author"] == "Andrée Hébé"


def test_refused_rows_are_stored_uncut_and_beside_any_number_of_warnings(
    reader: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "MAX_ERRORS", 30)
    warned = "".join(f"Book {n},A,not an ISBN,,\n" for n in range(40))
    text = "x" * 20_000
    upload = reader.upload(f"title,author,isbn,price,description\n{warned}Last,,,5,{text}\n")
    assert (upload["warnings"], upload["failed"]) == (40, 1)
    back = reader.get(f"/books/upload/{upload['id']}/errors?format=csv").text.replace("Last,", "Last,A")
    assert reader.upload(back)["inserted"] == 1
    assert reader.get("/books?search=last").json()["items"][0]["description"] == text


@pytest.mark.parametrize("row", ['x","\n', '"A long title of a book","by somebody\n'], ids=["short", "long"])
def test_rereading_of_broken_records_is_bounded(monkeypatch: pytest.MonkeyPatch, row: str) -> None:
    monkeypatch.setattr(csv_files, "MAX_REREAD", 100_000)
    next_line, read = csv_files.LineReader.next_line, 0

    def count(self: csv_files.LineReader) -> str:
        nonlocal read
        line = next_line(self)
        read += len(line)
        return line

    monkeypatch.setattr(csv_files.LineReader, "next_line", count)
    text = "title,author,pages\n" + row * 1000
    with pytest.raises(csv_files.UnreadableFile, match="does not close"):
        list(csv_files.records(io.StringIO(text, newline=""), csv_files.Dialect()))
    assert read < len(text) + 2 * csv_files.MAX_REREAD, "it was hundreds of times the file"


@pytest.mark.parametrize("length", [csv_files.MAX_RECORD - 1, csv_files.MAX_RECORD, 3_000_000])
def test_overlong_line_after_an_open_quote_does_not_hide_the_next_line(length: int) -> None:
    text = io.StringIO(f'title,author\n"A,B\n{"x" * length}\nC,D\n', newline="")
    found = list(csv_files.records(text, csv_files.Dialect()))
    assert [isinstance(record, csv_files.BrokenRecord) for record in found] == [False, True, True, False]
    assert found[-1] == ["C", "D"]


@pytest.mark.slow
@pytest.mark.parametrize("row", ['x","\n', '"A long title of a book","by somebody\n'], ids=["short", "long"])
def test_cost_of_many_broken_records_is_bounded(row: str) -> None:
    """24 MB, where a record may be read again for each of its lines."""
    text = io.StringIO("title,author,pages\n" + row * (24_000_000 // len(row)), newline="")
    started = time.monotonic()
    with pytest.raises(csv_files.UnreadableFile, match="does not close"):
        list(csv_files.records(text, csv_files.Dialect()))
    assert time.monotonic() - started < 30


@pytest.mark.slow
def test_file_whose_rows_all_open_a_quote_fails_with_a_reason(reader: Person) -> None:
    upload = reader.upload(b"title,author\n" + b'x","\n' * 20_000)
    assert upload["status"] == "failed"
    assert "does not close" in upload["error"]


@pytest.mark.slow
def test_stray_quote_costs_one_row(client: TestClient, reader: Person) -> None:
    rows = b"".join(b"Book %d,A\n" % n for n in range(30_000))
    upload = reader.upload(b'title,author\n"Stray,A\n' + rows)
    assert (upload["status"], upload["inserted"], upload["failed"]) == ("completed", 30_000, 1)


def test_overlong_cell_of_dates_is_read_in_linear_time(reader: Person) -> None:
    """A pattern that backtracks would take hours."""
    header = "Title,Authors,Read Status,Star Rating,Dates Read\n"
    assert reader.upload(f"{header}A,B,read,5,{'/' * 1_900_000}\n", shelve="true")["inserted"] == 1


REFUSED: dict[str, tuple[bytes, str]] = {
    "no known column": (
        b"Dune,Frank Herbert\nEmma,Jane Austen\n",
        "has no column for title and author. It has: 'Dune', 'Frank Herbert'",
    ),
    "no author": (b"title,price\nDune,9.99\n", "has no column for author"),
    "only blank lines": (b"\n\n  \n"[:2], "no header"),
    "only a byte order mark": (b"\xef\xbb\xbf", "no header"),
    "a picture": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)), "not a text file"),
    "a picture of noise": (random.Random(1).randbytes(100_000), ""),
    "half a character of UTF-16": (b"\x00\x01\x01\x80\x1a", "has no column"),
    "a zip bomb": (b"PK\x03\x04" + bytes(200_000), ""),
    "one line of ten megabytes": (b"x" * 10_000_000, "can't be read"),
    "one open quote": (b'"title,author\nA,B\n', "can't be read"),
    "NUL for a delimiter": (b"sep=\0\ntitle\0author\nA\0B\n", "not a text file"),
    "ten thousand columns": (
        b"title,author," + b",".join(b"c%d" % n for n in range(9_998)),
        "has no column for title and author. It has: 'title,author,c0,c1",
    ),
    "seven hundred columns": (b"title,author," + b",".join(b"c%d" % n for n in range(698)), "700 columns"),
}


@pytest.mark.parametrize(("content", "reason"), REFUSED.values(), ids=REFUSED)
def test_unreadable_files_fail_with_a_reason(reader: Person, content: bytes, reason: str) -> None:
    upload = reader.upload(content)
    assert upload["status"] == "failed"
    assert reason in upload["error"]
    assert len(upload["error"]) < 2000
    assert (upload["inserted"], upload["failed"], upload["finished_at"] is None) == (0, 0, False)


def test_refused_rows_and_warnings_are_listed_apart(reader: Person) -> None:
    upload = reader.upload("title,author,pages\nA,B,0\n,C,1\nD,E,1\nF,G,x\n")
    path = f"/books/upload/{upload['id']}/errors"
    for severity, rows in (("error", [3]), ("warning", [2, 5])):
        page = reader.get(path, params={"severity": severity}).json()
        assert (page["total"], [error["row"] for error in page["items"]]) == (len(rows), rows)
    assert reader.get(path).json()["total"] == 3
    assert reader.get(path, params={"severity": "fatal"}).status_code == 422


def test_ignored_columns_are_listed(reader: Person) -> None:
    upload = reader.upload("Title,Shelf,author,,Average Rating\nA,x,B,y,4.5\n")
    assert upload["ignored_columns"] == ["Shelf", "", "Average Rating"]
    assert upload["inserted"] == 1


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param({"files": {"file": ("empty.csv", b"")}}, id="an empty file"),
        pytest.param({"files": {"data": ("a.csv", b"title,author\n")}}, id="another name for the part"),
        pytest.param({"data": {"file": "title,author"}}, id="a field that is not a file"),
        pytest.param(
            {"files": {"file": ("a.csv", b"title,author\n")}, "data": {"colour": "red"}}, id="an unknown field"
        ),
        pytest.param({}, id="nothing"),
    ],
)
def test_requests_without_a_file_are_422(client: TestClient, reader: Person, parts: dict[str, Any]) -> None:
    answer = reader.post("/books/upload", **parts)
    assert (answer.status_code, bool(answer.json()["errors"])) == (422, True)
    assert reader.get("/books/upload").json()["total"] == 0


NAMES = {
    "a path": (b"../../etc/passwd", "../../etc/passwd"),
    "a change of direction": ("a\u202egpj.csv".encode(), "a\N{REPLACEMENT CHARACTER}gpj.csv"),
    "a long one": (b"x" * 600, "x" * 255),
    "not UTF-8": (b"\xff.csv", "ÿ.csv"),
    "none": (b"", "upload.csv"),
}


@pytest.mark.parametrize(("name", "shown"), NAMES.values(), ids=NAMES)
def test_file_names_are_only_displayed(reader: Person, name: bytes, shown: str) -> None:
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="%s"\r\n\r\n' % name
    answer = reader.post(
        "/books/upload",
        content=head + b"title,author\nA,B\n\r\n--b--\r\n",
        headers={"Content-Type": "multipart/form-data; boundary=b"},
    )
    assert (answer.status_code, answer.json()["filename"]) == (202, shown)


# --- visibility ---------------------------------------------------------------------------------------------------


def test_uploads_are_visible_to_their_owner_and_staff(
    client: TestClient, reader: Person, other_reader: Person, librarian: Person
) -> None:
    upload = reader.upload("title,author\nA,\n")
    for path in (f"/books/upload/{upload['id']}", f"/books/upload/{upload['id']}/errors"):
        assert client.get(path).status_code == 401
        assert other_reader.get(path).status_code == 404
        assert reader.get(path).status_code == librarian.get(path).status_code == 200
    assert other_reader.get("/books/upload").json()["items"] == []
    assert reader.get("/books/upload").json()["total"] == librarian.get("/books/upload").json()["total"] == 1
    assert client.post("/books/upload", files={"file": ("a.csv", b"title,author\n")}).status_code == 401


def test_events_of_books_are_public_and_those_of_progress_are_private(
    client: TestClient, reader: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "PROGRESS_INTERVAL", 0)
    monkeypatch.setattr(uploads, "BATCH", 500)
    start = client.get("/events").json()["next"]
    rows = "".join(f"Book {number},Somebody\n" for number in range(1250))
    upload = reader.upload(f"title,author\n{rows}")
    public = client.get("/events", params={"after": start}).json()["items"]
    assert [(event["type"], *event["data"].values()) for event in public] == [
        ("books.imported", upload["id"], 500, 1, 500),
        ("books.imported", upload["id"], 500, 501, 1000),
        ("books.imported", upload["id"], 250, 1001, 1250),
    ]
    private = reader.get("/events", params={"after": start, "types": "upload.*"}).json()["items"]
    assert [event["data"]["rows"] for event in private] == [500, 1000, 1250, 1250]
    assert private[-1]["data"].items() >= {"status": "completed", "progress": 1.0}.items()


def test_stored_errors_are_bounded_and_the_count_is_exact(reader: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MAX_ERRORS", 30)
    upload = reader.upload("title,author\n" + ",\n" * 1500)
    assert (upload["rows"], upload["failed"], len(upload["errors"])) == (1500, 1500, 30)


# --- options ------------------------------------------------------------------------------------------------------


def test_update_changes_only_what_the_file_has(client: TestClient, reader: Person) -> None:
    book = reader.add_book(**DUNE, pages=412)
    start = client.get("/events").json()["next"]
    content = "title,author,isbn,genre,publisher,pages\nDUNE,F. Herbert,0441172717,,Ace,\n"
    skipped = reader.upload(content)
    assert (skipped["updated"], skipped["skipped"], client.get("/books/1").json()) == (0, 1, book)
    updated = reader.upload(content, on_duplicate="update")
    assert (updated["inserted"], updated["updated"], updated["skipped"]) == (0, 1, 0)
    now = client.get("/books/1").json()
    changes = {"title": "DUNE", "author": "F. Herbert", "publisher": "Ace", "version": 2}
    assert now == {**book, **changes, "updated_at": now["updated_at"]}
    assert client.get("/books", params={"search": "ace"}).json()["total"] == 1
    again = reader.upload(content, on_duplicate="update")
    assert (again["updated"], again["skipped"]) == (0, 1)
    logged = client.get("/events", params={"after": start}).json()["items"]
    assert [(event["type"], event["data"]["version"]) for event in logged] == [("book.updated", 2)]


def test_only_the_user_who_added_a_book_and_staff_update_it(
    reader: Person, other_reader: Person, librarian: Person
) -> None:
    reader.add_book(**DUNE)
    content = "title,author,isbn,pages\nDune,Frank Herbert,0441172717,412\n"
    refused = other_reader.upload(content, on_duplicate="update")
    assert (refused["updated"], refused["skipped"], refused["warnings"]) == (0, 1, 1)
    assert "added by somebody else" in refused["errors"][0]["message"]
    assert librarian.upload(content, on_duplicate="update")["updated"] == 1
    assert reader.get("/books/1").json()["pages"] == 412


def test_dry_run_reports_the_same_and_writes_nothing(
    client: TestClient, reader: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "BATCH", 2)
    reader.add_book(title="Emma", author="Jane Austen")
    start = client.get("/events").json()["next"]
    content = "title,author,pages\nEmma,Jane Austen,400\nDune,Frank Herbert,\nA,,\nDUNE,frank herbert,\nB,C,1\nB,C,1\n"
    tried = reader.upload(content, dry_run=True, on_duplicate="update")
    logged = {event["type"] for event in reader.get("/events", params={"after": start}).json()["items"]}
    assert logged == {"upload.progress"}
    assert client.get("/books").json()["total"] == 1
    assert client.get("/books/1").json()["pages"] is None
    done = reader.upload(content, on_duplicate="update")
    counts = ("rows", "inserted", "updated", "skipped", "failed", "warnings")
    assert [tried[name] for name in counts] == [done[name] for name in counts] == [6, 2, 1, 2, 1, 0]
    assert tried["errors"] == done["errors"]


@pytest.mark.parametrize("path", ["/books/upload", "/my-library/import"])
def test_dry_run_as_a_query_parameter_is_refused(client: TestClient, reader: Person, path: str) -> None:
    answer = reader.post(f"{path}?dry_run=true", files={"file": ("books.csv", "title,author\nDune,Frank Herbert\n")})
    assert (answer.status_code, answer.json()["errors"][0]["loc"]) == (422, ["query", "dry_run"])
    assert client.get("/books").json()["total"] == reader.get("/books/upload").json()["total"] == 0


@pytest.mark.parametrize("options", [{"on_duplicate": "replace"}, {"dry_run": "perhaps"}, {"shelve": "2"}], ids=str)
def test_invalid_options_are_422(reader: Person, options: dict[str, str]) -> None:
    answer = reader.post("/books/upload", files={"file": ("a.csv", b"title,author\nA,B\n")}, data=options)
    assert answer.status_code == 422


@pytest.mark.parametrize("path", ["/books/upload", "/my-library/import"])
def test_repeated_form_fields_are_422(client: TestClient, reader: Person, path: str) -> None:
    files = [("file", (name, b"title,author\nA,B\n")) for name in ("a.csv", "b.csv")]
    assert client.post(path, files=files).status_code == 401
    answer = reader.post(path, files=files)
    assert (answer.status_code, answer.json()["detail"]) == (422, "file: is given more than once")
    answer = reader.post(path, files=files[:1], data={"dry_run": ["true", "false"]})
    assert (answer.status_code, answer.json()["detail"]) == (422, "dry_run: is given more than once")
    assert reader.get("/books/upload").json()["total"] == 0


def test_shelf_import_without_the_right_to_add_books_uses_the_catalogue(
    reader: Person, librarian: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "readers_can_add", False)
    librarian.add_book(title="Good Omens", author="Terry Pratchett, Neil Gaiman", isbn="9780060853983")
    upload = reader.upload((ROOT / "tests" / "data" / "goodreads.csv").read_bytes(), path="/my-library/import")
    assert (upload["inserted"], upload["failed"]) == (1, 4)
    assert "is not in the catalogue" in upload["errors"][0]["message"]
    assert [entry["book"]["title"] for entry in reader.get("/my-library").json()["items"]] == ["Good Omens"]


def test_books_match_by_isbn_or_without_one_by_title_and_author(reader: Person) -> None:
    reader.add_book(title="Dune", author="Frank Herbert")
    reader.add_book(**{**DUNE, "title": "Dune (film)"})
    upload = reader.upload(
        "title,author,isbn\ndune,FRANK  HERBERT,\nDune,Frank Herbert,9780340960196\nX,Y,0441172717\nDune,Herbert,\n"
    )
    assert (upload["inserted"], upload["skipped"]) == (2, 2)
    books = reader.get("/books").json()["items"]
    assert [(book["author"], book["isbn"]) for book in books[2:]] == [
        ("Frank Herbert", "9780340960196"),
        ("Herbert", None),
    ]


def test_refused_rows_can_be_corrected_and_uploaded_again(reader: Person) -> None:
    header = "title;author;price;note\r\n"
    upload = reader.upload(header + "=Dune; ;free;x\r\nEmma;;1,00;@y\r\nA;B;2,00;\r\nToo;many;1;2;3\r\n")
    answer = reader.get(f"/books/upload/{upload['id']}/errors", params={"format": "csv"})
    assert answer.headers["Content-Type"] == "text/csv; charset=utf-8"
    rows = list(csv.reader(io.StringIO(answer.text, newline="")))
    assert rows[0] == ["title", "author", "price", "note", "reason"]
    assert [row[:4] for row in rows[1:]] == [
        ["'=Dune", " ", "free", "x"],
        ["Emma", "", "1,00", "'@y"],
        ["Too", "many", "1", "2"],
    ]
    assert [row[-1] for row in rows[1:]] == [
        "author is missing",
        "author is missing",
        "has 5 cells where the header has 4",
    ]
    corrected = (
        answer.text.replace("Dune, ,free", "Dune,Frank Herbert,0")
        .replace("Emma,", "Emma,Jane Austen")
        .replace("2,3,", "2,")
    )
    again = reader.upload(corrected)
    assert (again["inserted"], again["failed"], again["ignored_columns"]) == (3, 0, ["note", "reason"])
    books = reader.get("/books").json()["items"]
    assert [book["title"] for book in books] == ["A", "=Dune", "Emma", "Too"]


def test_refused_rows_of_our_own_export_stay_ours(client: TestClient, reader: Person) -> None:
    """However often they are mended and uploaded: in other files `&amp;` is `&`."""
    header = ",".join(csv_files.BOOK_COLUMNS)
    content = f"{header}\nTom &amp; Co,{',' * (header.count(',') - 1)}\n".encode()
    for _ in range(2):
        upload = reader.upload(content)
        assert (upload["format"], upload["failed"]) == ("books-api", 1)
        content = reader.get(f"/books/upload/{upload['id']}/errors?format=csv").content
    assert reader.upload(content.replace(b"Co,,", b"Co,Ann,"))["inserted"] == 1
    assert client.get("/books/1").json()["title"] == "Tom &amp; Co"


def test_a_row_that_an_earlier_version_refused_for_several_reasons_is_returned_once(reader: Person) -> None:
    """It kept the cells with the first reason only. Rows with warnings are not refused."""
    upload = reader.upload("title,author,pages\n,Jane Austen,1\nEmma,Jane Austen,many\n")

    def add_another(session: Session) -> None:
        error = {"upload_id": upload["id"], "row": 2, "severity": "error", "field": "author", "message": "is too long"}
        session.add(UploadError(**error, cells=None))

    database.write_sync(add_another)
    answer = reader.get(f"/books/upload/{upload['id']}/errors")
    assert [error["severity"] for error in answer.json()["items"]] == ["error", "warning", "error"]
    answer = reader.get(f"/books/upload/{upload['id']}/errors", params={"format": "csv"})
    assert answer.text == "title,author,pages,reason\r\n,Jane Austen,1,title is missing\r\n"


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/books/upload/1/cancel"), ("DELETE", "/books/upload/1")], ids=["POST", "DELETE"]
)
def test_cancelled_upload_keeps_committed_batches(
    client: TestClient, reader: Person, monkeypatch: pytest.MonkeyPatch, method: str, path: str
) -> None:
    cancelled: list[dict[str, Any]] = []

    def cancel_between_two_batches() -> bool:
        cancelled.append(reader.request(method, path).json())
        return False

    monkeypatch.setattr(uploads, "BATCH", 10)
    monkeypatch.setattr(database, "server_is_stopping", cancel_between_two_batches)
    upload = reader.upload("title,author\n" + "".join(f"Book {number},Somebody\n" for number in range(25)))
    assert (upload["status"], upload["rows"], upload["inserted"]) == ("cancelled", 10, 10)
    assert [(answer["status"], answer["inserted"]) for answer in cancelled] == [("cancelled", 10)]
    assert client.get("/books").json()["total"] == 10
    assert reader.request(method, path).json()["detail"] == "This upload is cancelled already."
    assert database.write_sync(lambda session: session.exec(select(UploadChunk)).all()) == []


# --- large ones ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(
    not REAL_BOOKS.exists() and "CI" not in os.environ,
    reason="the ten thousand real books lie beside the project, not in it",
)
def test_ten_thousand_real_books_are_imported(client: TestClient, reader: Person) -> None:
    upload = reader.upload(REAL_BOOKS.read_bytes())
    assert upload["status"] == "completed"
    assert (upload["rows"], upload["inserted"], upload["skipped"], upload["failed"]) == (10_000, 10_000, 0, 0)
    assert upload["warnings"] == 158
    assert "average_rating" in upload["ignored_columns"]
    assert client.get("/books").json()["total"] == 10_000
    game = client.get("/books", params={"search": "0439023483"}).json()["items"][0]
    assert game.items() >= {"isbn": "9780439023481", "publication_year": 2008, "language": "eng"}.items()
    oldest = client.get("/books", params={"year_to": -700, "sort": "year"}).json()["items"]
    assert {"The Odyssey"} <= {book["title"] for book in oldest}
    isbns: Counter[bool] = Counter()
    page = {"next": None}
    while True:
        page = client.get("/books", params={"limit": 100, **({"cursor": page["next"]} if page["next"] else {})}).json()
        isbns.update(book["isbn"] is not None for book in page["items"])
        if page["next"] is None:
            break
    assert isbns == {True: 9277, False: 723}
    again = reader.upload(REAL_BOOKS.read_bytes())
    assert (again["inserted"], again["skipped"], again["failed"]) == (0, 10_000, 0)


@pytest.mark.slow
def test_file_over_the_limit_is_413_and_not_stored(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(MAX_UPLOAD_MB="2")
    reader = sign_up(server.client, "rita")
    started = time.monotonic()
    answer = reader.post("/books/upload", files={"file": ("big.csv", io.BytesIO(b"x" * (200 << 20)))})
    assert answer.status_code == 413
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert time.monotonic() - started < 20
    one_byte_more = reader.post("/books/upload", files={"file": ("big.csv", b"x" * ((2 << 20) + 1))})
    assert one_byte_more.status_code == 413
    assert reader.get("/books/upload").json()["total"] == 0
    assert reader.post("/books/upload", files={"file": ("fits.csv", b"x" * (2 << 20))}).status_code == 202


def big_file(rows: int) -> bytes:
    return b"title,author\n" + b"".join(b"Book %d,Author %d\n" % (n, n % 977) for n in range(rows))


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [pytest.param(signal.SIGTERM, id="stopped"), pytest.param(signal.SIGKILL, id="killed")],
)
def test_upload_is_resumed_after_a_restart(serve: Callable[..., Server], how: signal.Signals) -> None:
    server = serve()
    reader = sign_up(server.client, "rita")
    path = reader.post("/books/upload", files={"file": ("big.csv", big_file(30_000))}).headers["Location"]
    wait_for(lambda: reader.get(path).json()["rows"] or None)
    assert server.stop(how) < 5
    server.start()
    reader.client = server.client
    upload = wait_for(lambda: done(reader.get(path).json()), seconds=90)
    assert (upload["status"], upload["rows"], upload["inserted"]) == ("completed", 30_000, 30_000)
    assert server.client.get("/books").json()["total"] == 30_000
    assert server.client.get("/books", params={"search": "29999"}).json()["total"] == 1


def interrupt_second_chunk(monkeypatch: pytest.MonkeyPatch, interrupt: Callable[[Session], Any]) -> None:
    def insert_chunk(session: Session, job: Any, number: int, data: bytes, insert: Any = uploads.insert_chunk) -> None:
        if number == 1:
            interrupt(session)
        insert(session, job, number, data)

    monkeypatch.setattr(uploads, "CHUNK", 8)
    monkeypatch.setattr(uploads, "insert_chunk", insert_chunk)


def test_a_file_that_was_not_stored_whole_is_not_imported(
    client: TestClient, reader: Person, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a crash: a chunk of it is there, and no job may take that for all."""

    def crash(_: Session) -> None:
        raise OperationalError("INSERT", None, Exception("no power"))

    def count_chunks(connection: Connection) -> int:
        return len(connection.execute(select(UploadChunk)).all())

    interrupt_second_chunk(monkeypatch, crash)
    monkeypatch.setattr(uploads, "delete_upload", lambda session, _: crash(session))
    answer = reader.post("/books/upload", files={"file": ("a.csv", b"title,author\nDune,Frank Herbert\n")})
    assert (answer.status_code, database.read_sync(count_chunks)) == (503, 1)
    assert client.portal is not None
    client.portal.call(uploads.import_waiting, False)
    assert reader.get("/books/upload/1").json()["status"] == "processing"
    clock.advance(seconds=61)
    client.portal.call(uploads.import_waiting, False)
    upload = reader.get("/books/upload/1").json()
    assert (upload["status"], upload["inserted"], database.read_sync(count_chunks)) == ("failed", 0, 0)
    assert upload["error"] == "The file was not stored whole: upload it again."


def test_an_upload_that_is_cancelled_while_it_is_stored_ends(reader: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    def cancel(session: Session) -> None:
        uploads.finish(session, session.get_one(Upload, 1), UploadStatus.cancelled)

    interrupt_second_chunk(monkeypatch, cancel)
    answer = reader.post("/books/upload", files={"file": ("a.csv", b"title,author\nDune,Frank Herbert\n")})
    assert answer.status_code == 409
    assert answer.json()["detail"] == "The upload has ended: it is cancelled, not by this job."


# The same service with a shorter lease.
SHORT_LEASE = """
from datetime import timedelta
import imports, main, uploads
imports.LEASE, uploads.BATCH, main.RESUME_INTERVAL = timedelta(seconds=0.6), 100, 0.2
app = main.app
"""
ROWS = "title,author,isbn,pages\n" + "".join(
    f"Book {n % 1900},Author {n % 7},{'' if n % 3 else '97800000' + str(n).zfill(5)},{'many' if n % 50 == 0 else n}\n"
    for n in range(1, 6000)
)


def outcome(person: Person, upload: dict[str, Any]) -> tuple[Any, ...]:
    counts = [upload[name] for name in ("status", "rows", "inserted", "updated", "skipped", "failed", "warnings")]
    errors = person.get(f"/books/upload/{upload['id']}/errors", params={"format": "csv"}).text
    logged = person.get("/events", params={"types": "books.imported", "limit": 100}).json()["items"]
    spans = [(event["data"]["count"], event["data"]["first_id"], event["data"]["last_id"]) for event in logged]
    if Postgres.current:  # which does not give out again the ids of a transaction that was cut off
        spans = [(count, 0, last - first) for count, first, last in spans]
    return counts, errors, spans, person.get("/books/export").text


def test_lease_is_renewed_while_earlier_rows_are_read_again(
    reader: Person, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(60):
        reader.add_book(title=f"Book {number}", author="B")
    exported = reader.get("/books/export").content
    monkeypatch.setattr(uploads, "BATCH", 20)
    monkeypatch.setattr(uploads, "CHUNK", 64)
    stopping = iter([False, True])
    monkeypatch.setattr(database, "server_is_stopping", lambda: next(stopping, False))
    where = reader.post("/books/upload", files={"file": ("books.csv", exported)}).headers["Location"]
    wait_for(lambda: reader.get(where).json()["rows"] == 40 or None)
    other_jobs = []

    parse = imports.RowParser.parse

    def parse_slowly(self: imports.RowParser, number: int, cells: Sequence[str]) -> csv_files.ImportRow:
        clock.advance(seconds=imports.LEASE.total_seconds() / 30)
        other_jobs.append(database.write_sync(uploads._claim, False))
        return parse(self, number, cells)

    with monkeypatch.context() as patch:
        patch.setattr(imports.RowParser, "parse", parse_slowly)
        uploads.import_all(enrich=False)
    assert other_jobs == [None] * 60
    assert reader.get(where).json()["rows"] == 60


def test_lease_is_renewed_while_the_order_of_dates_is_detected(
    reader: Person, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "CHUNK", 64)
    find: Any = imports._find_chunk
    found: Any = imports.CsvUpload.__dict__["day_first"]
    other_jobs = []

    def look(connection: Connection, upload_id: int, number: int) -> bytes | None:
        clock.advance(seconds=imports.LEASE.total_seconds() / 20)
        chunk: bytes | None = find(connection, upload_id, number)
        return chunk

    def day_first(self: imports.CsvUpload) -> bool | None:
        order: bool | None = found.func(self)
        other_jobs.append(database.write_sync(uploads._claim, False))
        return order

    monkeypatch.setattr(imports, "_find_chunk", look)
    once = functools.cached_property(day_first)
    once.__set_name__(imports.CsvUpload, "day_first")
    monkeypatch.setattr(imports.CsvUpload, "day_first", once)
    upload = reader.upload("title,author,published_date\n" + "A,B,03/04/2008\n" * 150 + "C,D,13/04/2008\n")
    assert (upload["status"], upload["inserted"], set(other_jobs)) == ("completed", 2, {None})


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(int(os.environ.get("CRASHES", "3"))))
def test_workers_killed_at_random_give_the_same_result(serve: Callable[..., Server], tmp_path: Path, seed: int) -> None:
    """`CRASHES=50 pytest -k killed_at_random` for a long one."""
    chance = random.Random(seed)
    (tmp_path / "short_lease.py").write_text(SHORT_LEASE)
    options: dict[str, Any] = {"app": "short_lease:app", "PYTHONPATH": f"{tmp_path}"}
    workers = [serve("--app-dir", str(ROOT), **options) for _ in range(2)]
    reader = sign_up(workers[0].client, "rita")
    path = reader.post("/books/upload", files={"file": ("a.csv", ROWS.encode())}).headers["Location"]
    kills = 0
    while True:
        time.sleep(chance.uniform(0, 0.5))
        victim = chance.choice(workers)
        victim.stop(signal.SIGKILL)
        kills += 1
        victim.start()
        reader.client = workers[0].client
        if upload := done(reader.get(path).json()):
            break
        time.sleep(0.7)
    assert "failed" not in "".join(worker.log.read_text() for worker in workers)
    interrupted = outcome(reader, upload)
    other = serve("--app-dir", str(ROOT), file=tmp_path / "other.db", **options)
    uninterrupted = sign_up(other.client, "rita")
    assert interrupted == outcome(uninterrupted, uninterrupted.upload(ROWS))
    assert kills


def done(upload: dict[str, Any]) -> dict[str, Any] | None:
    return upload if upload["status"] in ("completed", "failed") else None


@pytest.mark.slow
def test_others_read_and_write_during_an_import(serve: Callable[..., Server]) -> None:
    importing, other = serve(), serve()
    reader = sign_up(importing.client, "rita")
    path = reader.post("/books/upload", files={"file": ("big.csv", big_file(20_000))}).headers["Location"]
    writers = [Person(server.client, "rita") for server in (importing, other) for _ in range(3)]

    def write(person: Person) -> list[int]:
        return [person.post("/books", json={"title": "Mine", "author": f"{n}"}).status_code for n in range(20)]

    with ThreadPoolExecutor(6) as pool:
        statuses = [status for answers in pool.map(write, writers) for status in answers]
    assert statuses == [201] * 120
    upload = wait_for(lambda: done(reader.get(path).json()), seconds=60)
    assert (upload["status"], upload["inserted"]) == ("completed", 20_000)
    assert other.client.get("/books").json()["total"] == 20_120


def test_deleting_the_owner_cancels_the_upload(
    client: TestClient, reader: Person, admin: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Committed batches stay."""
    store = uploads._store_batch
    batches: list[None] = []

    def store_and_delete_the_owner(session: Session, *batch: Any) -> None:
        batches.append(store(session, *batch))
        session.delete(session.get_one(User, 2))

    monkeypatch.setattr(uploads, "BATCH", 10)
    monkeypatch.setattr(uploads, "_store_batch", store_and_delete_the_owner)
    rows = "".join(f"Book {number},Somebody\n" for number in range(25))
    assert reader.post("/books/upload", files={"file": ("a.csv", f"title,author\n{rows}".encode())}).status_code == 202
    wait_for(lambda: admin.get("/books/upload").json()["total"] == 0 or None)
    assert len(batches) == 1
    assert client.get("/books").json()["total"] == 10
