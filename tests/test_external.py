"""Google Books and Open Library: search, adding, look-up for imports, the daily import, and their failures."""

import asyncio
import csv
import io
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from http.server import BaseHTTPRequestHandler
from typing import Any

import anyio
import pytest
from cachetools import TTLCache
from fastapi.testclient import TestClient

import database
import external
import imports
import uploads
from external import Candidate, Source, date_and_year, make_candidate, parse_edition, parse_google_volume, parse_work
from models import Setting, UploadStatus
from settings import settings
from tests.fixtures import DUNE, Catalogues, Clock, Fault, Person, Server, send, sign_up, wait_for

GOOGLE_EMMA = {"source": "google", "ref": "Qe7kAwAAQBAJ"}
OPEN_EMMA = {"source": "openlibrary", "ref": "OL7353617M"}
EMMA, UNKNOWN = "9780141439587", "9780306406157"


def look(person: Person, **params: Any) -> dict[str, Any]:
    answer = person.get("/books/external", params=params)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


# --- search -----------------------------------------------------------------------------------------------------------

EMPTY = dict.fromkeys(
    ("isbn", "genre", "description", "publisher", "language", "pages", "price", "cover_url", "published_date")
)
GOOGLE = [
    {
        **GOOGLE_EMMA,
        "title": "Emma",
        "author": "Jane Austen",
        "isbn": EMMA,
        "genre": "Fiction",
        "description": "Emma is handsome, clever & rich.\nA comedy.",
        "publisher": "Penguin Classics",
        "language": "en",
        "pages": 474,
        "price": None,
        "cover_url": "https://books.google.com/books/content?id=Qe7kAwAAQBAJ&zoom=1",
        "published_date": "2008-08-11",
        "publication_year": 2008,
    },
    {
        **EMPTY,
        "source": "google",
        "ref": "aBcDEfghIJkl",
        "title": "Emma, a forgotten pamphlet",
        "author": "Unknown",
        "language": "en",
        "publication_year": 1816,
    },
    {
        **EMPTY,
        "source": "google",
        "ref": "m-_0AAAAcAAJ",
        "title": "Emma and the numbers that are wrong",
        "author": "A. Nonymous, B. Nonymous",
        "isbn": "9780441172719",
        "publication_year": 1999,
    },
]
OPEN = [
    {
        **EMPTY,
        **OPEN_EMMA,
        "title": "Emma (Penguin)",
        "author": "Jane Austen",
        "isbn": EMMA,
        "genre": "Young women",
        "publisher": "Penguin Books",
        "language": "en",
        "pages": 448,
        "published_date": "2008-08-11",
        "publication_year": 2008,
    },
    {
        **EMPTY,
        "source": "openlibrary",
        "ref": "OL27448W",
        "title": "Emma's letters",
        "author": "Unknown",
        "language": "de",
        "cover_url": "https://covers.openlibrary.org/b/id/14627060-L.jpg",
        "publication_year": 1937,
    },
]


def test_search_google_books(reader: Person, others: Catalogues) -> None:
    found = look(reader, q="emma", max_results=40)
    assert found == {"items": GOOGLE, "total": 4}, "one of them has no title"
    assert others.requests == ["/volumes?q=emma&startIndex=0&maxResults=40&printType=books"]
    assert look(reader, q="emma", start_index=2, max_results=1)["items"] == GOOGLE[2:]
    assert look(reader, q="nothing like it") == {"items": [], "total": 0}


def test_search_open_library(reader: Person, others: Catalogues) -> None:
    assert look(reader, q="emma", source="openlibrary") == {"items": OPEN, "total": 3}
    page = look(reader, q="emma", source="openlibrary", start_index=1, max_results=1)
    assert page == {"items": OPEN[1:], "total": 3}


def test_search_by_isbn_in_any_notation(reader: Person, others: Catalogues) -> None:
    assert look(reader, isbn="0-14-143958-0")["items"] == GOOGLE[:1]
    assert "isbn%3A9780141439587" in others.requests[0]
    found = look(reader, isbn=EMMA, source="openlibrary")
    assert (found["total"], found["items"][0]["ref"], found["items"][0]["pages"]) == (1, "OL7353617M", 474)
    assert found["items"][0]["cover_url"] == "https://covers.openlibrary.org/b/id/1-L.jpg"
    assert look(reader, isbn=UNKNOWN, source="openlibrary") == {"items": [], "total": 0}


INVALID_QUERIES: dict[str, dict[str, Any]] = {
    "neither q nor isbn": {},
    "q and isbn": {"q": "emma", "isbn": EMMA},
    "blank q": {"q": " "},
    "invalid ISBN": {"isbn": "9780141439580"},
    "unknown source": {"q": "emma", "source": "amazon"},
    "max_results 0": {"q": "emma", "max_results": 0},
    "max_results 41": {"q": "emma", "max_results": 41},
    "negative start_index": {"q": "emma", "start_index": -1},
    "NUL": {"q": "a\0b"},
    "unknown parameter": {"q": "emma", "key": "mine"},
}


@pytest.mark.parametrize("params", INVALID_QUERIES.values(), ids=INVALID_QUERIES)
def test_invalid_query_is_422(reader: Person, others: Catalogues, params: dict[str, Any]) -> None:
    assert reader.get("/books/external", params=params).status_code == 422
    assert others.requests == []


def test_concurrent_requests_are_limited(reader: Person, others: Catalogues, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external, "slots", asyncio.Semaphore(1))
    let_go = threading.Event()

    def late(handler: BaseHTTPRequestHandler) -> None:
        let_go.wait(5)
        send(handler, {"totalItems": 0})

    others.faults = [late]
    with ThreadPoolExecutor() as threads:
        first = threads.submit(look, reader, q="slow")
        wait_for(lambda: others.requests or None)
        second = reader.get("/books/external", params={"q": "emma"})
        let_go.set()
        assert (second.status_code, second.headers["Retry-After"]) == (503, "5")
        assert first.result()["total"] == 0
    assert look(reader, q="emma")["total"] == 4


DATES: dict[str, tuple[str | None, str | None, int | None]] = {
    "a day": ("2008-08-11", "2008-08-11", 2008),
    "a month": ("2008-08", None, 2008),
    "a year": ("2008", None, 2008),
    "a day in words": ("August 11, 2008", "2008-08-11", 2008),
    "a month in words": ("Aug 2008", None, 2008),
    "about": ("c1998", None, 1998),
    "a guess": ("1998?", None, 1998),
    "two years": ("1998-1999", None, None),
    "impossible day": ("2008-02-31", None, 2008),
    "ambiguous order": ("03/04/2008", None, 2008),
    "a century": ("19--", None, None),
    "none": (None, None, None),
}


@pytest.mark.parametrize(("text", "day", "year"), DATES.values(), ids=DATES)
def test_date_and_year(text: str | None, day: str | None, year: int | None) -> None:
    found = date_and_year(text)
    assert (found["published_date"] and str(found["published_date"]), found["publication_year"]) == (day, year)


def test_description_with_a_huge_character_reference() -> None:
    entity = f"&#{'9' * 5000};"
    info = {"title": "T", "description": f"<p>One</p><p>{entity}</p>"}
    book = parse_google_volume({"id": "x", "volumeInfo": info})
    assert book is not None
    assert book.description == f"One\n{entity}"


def test_invalid_fields_are_left_out() -> None:
    fields = {"author": "A" * 2000, "language": "x" * 99, "pages": 10**9, "publication_year": 9999, "genre": "a\0"}
    book = make_candidate(Source.google, "x", title="T", **fields)
    assert book == Candidate(source=Source.google, ref="x", title="T", author="Unknown")
    assert book.book().title == "T"
    assert make_candidate(Source.google, "../x", title="T") is None


ODD_VALUES: list[Any] = [
    None,
    True,
    -1,
    3.5,
    1e400,
    10**30,
    "",
    "474",
    "a\0b",
    "x" * 30_000,
    [],
    ["a", 1],
    {},
    {"a": 1},
]


def replace_each(value: Any, odd: Any) -> Iterator[Any]:
    """Copies of the JSON `value`, each with another of its parts replaced by `odd`."""
    yield odd
    if isinstance(value, dict):
        yield from ({**value, key: part} for key, old in value.items() for part in replace_each(old, odd))
    if isinstance(value, list):
        yield from (
            [*value[:i], part, *value[i + 1 :]] for i, old in enumerate(value) for part in replace_each(old, odd)
        )


@pytest.mark.parametrize("odd", ODD_VALUES, ids=lambda odd: repr(odd)[:20])
def test_values_of_any_type_are_parsed_or_left_out(others: Catalogues, odd: Any) -> None:
    parsers: list[tuple[Callable[[Any], Candidate | None], list[Any]]] = [
        (parse_google_volume, others.volumes),
        (parse_edition, others.editions),
        (parse_work, others.works),
    ]
    for parse, items in parsers:
        for item in items:
            for changed in replace_each(item, odd):
                candidate = parse(changed) if isinstance(changed, dict) else None
                assert candidate is None or candidate.book().title


# --- adding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("payload", "title", "pages"), [(GOOGLE_EMMA, "Emma", 474), (OPEN_EMMA, "Emma", 474)], ids=["google", "openlibrary"]
)
def test_add_a_book(
    client: TestClient, reader: Person, others: Catalogues, *, payload: dict[str, str], title: str, pages: int
) -> None:
    start = client.get("/events").json()["next"]
    answer = reader.post("/books/external", json=payload)
    assert (answer.status_code, answer.headers["ETag"]) == (201, '"1"'), answer.text
    book = client.get(answer.headers["Location"]).json()
    assert book == answer.json()
    assert (book["title"], book["isbn"], book["pages"], book["published_date"]) == (title, EMMA, pages, "2008-08-11")
    assert client.get("/books", params={"search": "emma austen"}).json()["items"] == [book]
    logged = client.get("/events", params={"after": start}).json()["items"]
    assert [(event["type"], event["data"]["id"]) for event in logged] == [("book.created", book["id"])]
    again = reader.post("/books/external", json=payload)
    assert (again.status_code, again.json()["errors"][0]["loc"]) == (409, ["body", "isbn"])


def test_add_a_work_without_edition_and_a_volume_without_author(reader: Person, others: Catalogues) -> None:
    work = reader.post("/books/external", json={"source": "openlibrary", "ref": "OL27448W"}).json()
    assert (work["title"], work["author"], work["publication_year"]) == ("Emma's letters", "Unknown", 1937)
    volume = reader.post("/books/external", json={"source": "google", "ref": "aBcDEfghIJkl"}).json()
    assert (volume["author"], volume["isbn"], volume["pages"]) == ("Unknown", None, None)


@pytest.mark.parametrize(
    "payload",
    [
        {"source": "google", "ref": "AAAAAAAAAAAA"},
        {"source": "google", "ref": "noTitle_AAJ"},
        {"source": "openlibrary", "ref": "OL9M"},
        {"source": "openlibrary", "ref": "OL9W"},
    ],
    ids=lambda payload: payload["ref"],
)
def test_unknown_ref_is_404(reader: Person, others: Catalogues, payload: dict[str, str]) -> None:
    assert reader.post("/books/external", json=payload).status_code == 404
    assert len(others.requests) == 1


INVALID_REFS = {
    "parent path": ("google", "../../admin"),
    "subpath": ("google", "a/b"),
    "encoded path": ("google", "..%2f..%2fadmin"),
    "dots": ("google", ".."),
    "a query": ("google", "a?key=1"),
    "a fragment": ("google", "a#b"),
    "another host": ("google", "@evil.example"),
    "URL": ("openlibrary", "http://127.0.0.1/"),
    "line break": ("openlibrary", "OL1M\n"),
    "a second key": ("openlibrary", "OL1M,OLID:OL2M"),
    "author key": ("openlibrary", "OL1A"),
    "no number": ("openlibrary", "OLM"),
    "digits of another script": ("openlibrary", "OL\N{ARABIC-INDIC DIGIT ONE}M"),
    "empty": ("google", ""),
    "too long": ("google", "x" * 41),
}


@pytest.mark.parametrize(("source", "ref"), INVALID_REFS.values(), ids=INVALID_REFS)
def test_invalid_ref_is_422(reader: Person, others: Catalogues, source: str, ref: str) -> None:
    answer = reader.post("/books/external", json={"source": source, "ref": ref})
    assert (answer.status_code, answer.json()["errors"][0]["loc"]) == (422, ["body", "ref"])
    assert others.requests == []


def test_readers_who_may_not_add_books_cause_no_request(
    reader: Person, librarian: Person, others: Catalogues, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "readers_can_add", False)
    assert reader.post("/books/external", json=GOOGLE_EMMA).status_code == 403
    assert others.requests == []
    assert librarian.post("/books/external", json=GOOGLE_EMMA).status_code == 201


# --- failures ---------------------------------------------------------------------------------------------------------


def hang(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(1.5)
    send(handler, {"totalItems": 0})


def drip(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(60):
        handler.wfile.write(b" ")
        time.sleep(0.05)


def half(handler: BaseHTTPRequestHandler) -> None:
    send(handler, b'{"totalItems": 1, "items": [', Content_Length="1000")


def flood(handler: BaseHTTPRequestHandler) -> None:
    """50 MB, of an unknown length."""
    handler.send_response(200)
    handler.end_headers()
    for _ in range(50):
        handler.wfile.write(b" " * 1_000_000)


def answering(answer: Any, status: int = 200, **headers: str) -> Fault:
    return lambda handler: send(handler, answer, status, **headers)


TRIES = external.CLIENT_POLICY.tries
FAULTS: dict[str, tuple[Fault, int, int]] = {
    "no answer": (hang, 504, 2),
    "slow body": (drip, 504, 1),
    "500": (answering({}, 500), 502, TRIES),
    "503": (answering(b"<html>Sorry</html>", 503), 502, TRIES),
    "429": (answering({}, 429), 502, TRIES),
    "429 for an hour": (answering({}, 429, Retry_After="3600"), 502, 1),
    "503 until a date": (answering({}, 503, Retry_After="Fri, 01 Jan 2100 00:00:00 GMT"), 502, TRIES),
    "403 invalid key": (answering({"error": {"code": 403}}, 403), 502, 1),
    "truncated body": (half, 502, TRIES),
    "HTML": (answering(b"<html>It works!</html>"), 502, TRIES),
    "JSON of another shape": (answering([1, 2]), 502, TRIES),
    "deeply nested JSON": (answering(b"[" * 100_000), 502, TRIES),
    "empty body": (answering(b""), 502, TRIES),
    "50 MB": (flood, 502, 1),
    "compressed body": (answering(b"\x1f\x8b", Content_Encoding="gzip"), 502, TRIES),
    "redirect": (answering({}, 302, Location="/volumes?q=dune"), 502, 1),
}


@pytest.mark.parametrize(("fault", "status", "tries"), FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("adding", [False, True], ids=["search", "add"])
def test_faulty_source_is_502_or_504_in_time(
    reader: Person,
    others: Catalogues,
    *,
    fault: Fault,
    status: int,
    tries: int,
    adding: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short = external.RetryPolicy(TRIES, seconds=0.6, each=0.35, pause=0.01)
    if fault in (hang, drip):
        monkeypatch.setattr(external, "CLIENT_POLICY", short)
    others.always = fault
    started = time.monotonic()
    if adding:
        answer = reader.post("/books/external", json=GOOGLE_EMMA)
    else:
        answer = reader.get("/books/external", params={"q": "emma"})
    assert answer.status_code == status
    assert answer.json()["detail"].startswith("Google Books ")
    assert len(others.requests) == tries
    assert time.monotonic() - started < 3
    assert reader.get("/books").json()["total"] == 0
    others.always = None
    assert look(reader, q="emma")["total"] == 4, "a failure is not kept"


def test_unreachable_source_is_502(reader: Person) -> None:
    for source in Source:
        answer = reader.get("/books/external", params={"q": "emma", "source": source})
        assert (answer.status_code, answer.headers["Content-Type"]) == (502, "application/problem+json")


@pytest.mark.slow
def test_retry_after_is_respected(reader: Person, others: Catalogues) -> None:
    others.faults = [answering({}, 500), answering({}, 429, Retry_After="1")]
    started = time.monotonic()
    assert look(reader, q="emma")["total"] == 4
    assert 1 <= time.monotonic() - started < 3
    assert len(others.requests) == 3


def test_broken_items_are_left_out(reader: Person, others: Catalogues) -> None:
    others.volumes[1:1] = [
        {"id": "x"},
        {"id": 7, "volumeInfo": {}},
        "emma",
        {"id": "e", "volumeInfo": {"title": ["emma"]}},
    ]
    assert look(reader, q="emma")["items"] == GOOGLE


@pytest.mark.slow
def test_slow_source_does_not_block_other_requests(serve: Callable[..., Server], others: Catalogues) -> None:
    server = serve(GOOGLE_BOOKS_URL=others.url)
    rita = sign_up(server.client, "Rita")
    released = threading.Event()

    def wait(handler: BaseHTTPRequestHandler) -> None:
        released.wait(10)
        send(handler, {"totalItems": 0})

    others.always = wait
    with ThreadPoolExecutor(10) as threads:
        asking = [threads.submit(look, rita, q=f"slow {number}") for number in range(8)]
        wait_for(lambda: len(others.requests) == 8 or None)
        for _ in range(20):
            assert server.client.get("/health").status_code == 200
        assert not any(each.done() for each in asking)
        released.set()
        assert [each.result()["total"] for each in asking] == [0] * 8


# --- cache and headers ------------------------------------------------------------------------------------------------


def test_answers_are_cached_for_an_hour(reader: Person, others: Catalogues) -> None:
    assert look(reader, q="emma") == look(reader, q="emma")
    assert len(others.requests) == 1
    look(reader, q="emma", start_index=1)
    look(reader, q="emma", source="openlibrary")
    assert len(others.requests) == 3
    external.cache.expire(time.monotonic() + 3590)
    look(reader, q="emma")
    assert len(others.requests) == 3
    others.volumes.clear()
    external.cache.expire(time.monotonic() + 3600)
    assert look(reader, q="emma")["total"] == 0
    assert len(others.requests) == 4


def test_cache_is_bounded(reader: Person, others: Catalogues, monkeypatch: pytest.MonkeyPatch) -> None:
    look(reader, q="emma")
    size = external.cache.currsize + 10
    bounded: TTLCache[str, bytes, Any] = TTLCache(size, external.cache.ttl, getsizeof=len)
    monkeypatch.setattr(external, "cache", bounded)
    look(reader, q="emma")
    look(reader, q="dune")
    assert len(bounded) == 1
    assert bounded.currsize < size
    look(reader, q="emma")
    assert len(others.requests) == 4


def test_adding_a_book_bypasses_the_cache(reader: Person, others: Catalogues) -> None:
    look(reader, isbn=EMMA, source="openlibrary")
    others.editions[0]["number_of_pages"] = 500
    assert reader.post("/books/external", json=OPEN_EMMA).json()["pages"] == 500


def test_user_agent_is_sent_and_api_key_is_not_logged(
    reader: Person, others: Catalogues, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(settings, "public_url", "https://books.example.com")
    monkeypatch.setattr(settings, "google_books_key", "s3cret-key")
    caplog.set_level(logging.INFO, "books")
    others.faults = [answering({}, 500)]
    look(reader, q="emma")
    look(reader, q="emma", source="openlibrary")
    assert others.agents == {"BooksAPI/0.1.0 (+https://books.example.com)"}
    assert ["key=s3cret-key" in path for path in others.requests] == [True, True, False]
    assert "500" in caplog.text
    assert "s3cret" not in caplog.text


# --- look-up for imports ----------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external, "LOOKUP_PAUSE", 0)


def counts(upload: dict[str, Any]) -> tuple[int, ...]:
    assert upload["status"] == "completed", upload
    assert upload["rows"] == sum(upload[name] for name in ("inserted", "updated", "skipped", "failed"))
    return tuple(upload[name] for name in ("rows", "inserted", "updated", "skipped", "failed", "warnings"))


def reasons(upload: dict[str, Any]) -> list[tuple[int, str | None, str]]:
    return [(error["row"], error["field"], error["message"]) for error in upload["errors"]]


def test_import_of_isbns(client: TestClient, reader: Person, others: Catalogues) -> None:
    content = f"isbn\n0-14-143958-0\n441172717\n{UNKNOWN}\n9780340960196\n123\n{EMMA}\n"
    upload = reader.upload(content, enrich="true")
    assert upload["enrich"] is True
    assert counts(upload) == (6, 2, 0, 1, 3, 0)
    assert reasons(upload) == [
        (4, "isbn", "is not known to Open Library"),
        (5, "isbn", "is not known to Open Library"),
        (6, "isbn", "is not an ISBN, and can't be repaired; this row needs one"),
    ]
    books = client.get("/books").json()["items"]
    assert [
        (book["title"], book["author"], book["isbn"], book["pages"], book["publication_year"]) for book in books
    ] == [
        ("Emma", "Jane Austen", EMMA, 474, 2008),
        ("Dune", "Unknown", "9780441172719", None, 1965),
    ]
    assert others.requests == [
        "/api/books?bibkeys=ISBN%3A9780141439587%2CISBN%3A9780441172719%2CISBN%3A9780306406157%2CISBN%3A9780340960196"
        "&format=json&jscmd=data"
    ]
    refused = reader.get(f"/books/upload/{upload['id']}/errors", params={"format": "csv"}).text
    assert [row[0] for row in csv.reader(io.StringIO(refused))] == ["isbn", UNKNOWN, "9780340960196", "123"]


def test_import_without_enrich_looks_nothing_up(reader: Person, others: Catalogues) -> None:
    assert reader.upload(f"isbn\n{EMMA}\n")["status"] == "failed"
    assert counts(reader.upload(f"title,author,isbn\nEmma,Jane,{EMMA}\n"))[1] == 1
    assert others.requests == []


def test_values_of_the_file_win(client: TestClient, reader: Person, others: Catalogues) -> None:
    content = (
        f"title,author,isbn,pages,year\nEMMA,,{EMMA},12,1999\nNo ISBN,Nobody,,,\nOther,Author,{UNKNOWN},,\n,X,,,\n"
    )
    upload = reader.upload(content, enrich="true")
    assert counts(upload) == (4, 3, 0, 0, 1, 0)
    assert reasons(upload) == [(5, "title", "is missing")]
    emma, _, other = client.get("/books").json()["items"]
    assert (emma["title"], emma["author"], emma["pages"], emma["publication_year"]) == ("EMMA", "Jane Austen", 12, 1999)
    assert (emma["published_date"], emma["publisher"], emma["genre"]) == (None, "Penguin Books", "Young women")
    assert (other["title"], other["publisher"]) == ("Other", None)


def test_an_invalid_value_is_looked_up(reader: Person, others: Catalogues) -> None:
    upload = reader.upload(f"isbn,pages\n{EMMA},-1\n", enrich="true")
    assert (counts(upload), upload["errors"][0]["field"]) == ((1, 1, 0, 0, 0, 1), "pages")
    assert reader.get("/books/1").json()["pages"] == 474


def test_update_fills_only_missing_fields_of_a_book(client: TestClient, reader: Person, others: Catalogues) -> None:
    reader.add_book(title="My Emma", author="J. A.", isbn=EMMA, pages=1)
    assert counts(reader.upload(f"isbn\n{EMMA}\n", enrich="true"))[3] == 1
    assert client.get("/books/1").json()["version"] == 1
    upload = reader.upload(f"isbn\n{EMMA}\n", enrich="true", on_duplicate="update")
    assert counts(upload)[2] == 1
    book = client.get("/books/1").json()
    assert (book["title"], book["pages"], book["publisher"]) == ("My Emma", 1, "Penguin Books")
    assert counts(reader.upload(f"isbn\n{EMMA}\n", enrich="true", on_duplicate="update"))[2:4] == (0, 1)


def test_dry_run_looks_up_and_writes_nothing(client: TestClient, reader: Person, others: Catalogues) -> None:
    assert counts(reader.upload(f"isbn\n{EMMA}\n", enrich="true", dry_run="true"))[1] == 1
    assert client.get("/books").json()["total"] == 0


def test_shelf_import_with_look_up(reader: Person, others: Catalogues) -> None:
    header = "Title,Author,ISBN13,My Rating,Exclusive Shelf,Date Read\n"
    rows = f"Emma,,{EMMA},4,read,2020/01/02\nDune,Frank Herbert,9780441172719,9,read,\n"
    upload = reader.upload(header + rows, enrich="true", shelve="true")
    assert counts(upload) == (2, 2, 0, 0, 0, 1)
    assert reasons(upload) == [(3, "My Rating", "9 is not a rating from 0.25 to 5; left out")]
    assert reader.get("/my-library/2").json()["rating"] is None
    entry = reader.get("/my-library/1").json()
    assert (entry["rating"], entry["finished_at"]) == (4, "2020-01-02T00:00:00Z")
    assert (entry["book"]["author"], entry["book"]["pages"]) == ("Jane Austen", 474)


def test_look_up_of_fifty_isbns_a_request(reader: Person, others: Catalogues) -> None:
    content = "isbn\n" + "".join(f"{isbn13(number)}\n" for number in range(120))
    upload = reader.upload(content, enrich="true")
    assert counts(upload) == (120, 0, 0, 0, 120, 0)
    assert [path.count("ISBN") for path in others.requests] == [50, 50, 20]


def isbn13(number: int) -> str:
    body = f"978{number:09d}"
    return body + str(-sum(int(digit) * (1, 3)[place % 2] for place, digit in enumerate(body)) % 10)


@pytest.mark.slow
def test_pause_between_two_requests_of_a_job(
    reader: Person, others: Catalogues, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "ENRICH_BATCH", 1)
    monkeypatch.setattr(external, "LOOKUP_PAUSE", 0.4)
    started = time.monotonic()
    reader.upload(f"isbn\n{EMMA}\n9780441172719\n{UNKNOWN}\n", enrich="true")
    assert len(others.requests) == 3
    assert 0.8 <= time.monotonic() - started < 5


def test_outage_refuses_only_rows_that_need_a_look_up(
    client: TestClient, reader: Person, others: Catalogues, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "ENRICH_BATCH", 2)
    others.faults = [answering({}, 503)] * external.JOB_POLICY.tries * 2
    rows = f"{EMMA},,\n9780441172719,Dune,Frank Herbert\n{UNKNOWN},,\n,No ISBN,Nobody\n0-14-143958-0,,\n"
    upload = reader.upload(f"isbn,title,author\n{rows}", enrich="true")
    assert counts(upload) == (5, 3, 0, 0, 2, 1)
    why = "Open Library answers with 503"
    assert reasons(upload) == [
        (2, None, f"could not be looked up: {why}"),
        (3, "isbn", f"could not be looked up, the book was imported without it: {why}"),
        (4, None, f"could not be looked up: {why}"),
    ]
    assert len(others.requests) == external.JOB_POLICY.tries * 2 + 1, "two batches, and one that is good"
    assert [book["title"] for book in client.get("/books").json()["items"]] == ["Dune", "No ISBN", "Emma"]


def test_short_outage_refuses_nothing(reader: Person, others: Catalogues) -> None:
    others.faults = [half, answering({}, 429, Retry_After="0"), answering(b"[")]
    assert counts(reader.upload(f"isbn\n{EMMA}\n", enrich="true")) == (1, 1, 0, 0, 0, 0)


@pytest.mark.slow
def test_waiting_job_keeps_its_lease_and_blocks_no_writer(
    reader: Person, others: Catalogues, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imports, "LEASE", timedelta(seconds=1))
    monkeypatch.setattr(external, "STOP_CHECK_INTERVAL", 0.05)
    asked, released = threading.Event(), threading.Event()

    def slow(handler: BaseHTTPRequestHandler) -> None:
        asked.set()
        released.wait(10)
        send(handler, others.answer(handler.path))

    others.faults = [slow]
    with ThreadPoolExecutor() as threads:
        upload = threads.submit(reader.upload, f"isbn\n{EMMA}\n", enrich="true")
        assert asked.wait(5)
        for number in range(18):  # nearly twice as long as the lease
            assert database.read_sync(uploads.next_upload, True) is None
            reader.add_book(title=f"Meanwhile {number}")  # no transaction is open while it waits
            time.sleep(0.1)
        assert not upload.done()
        released.set()
        assert counts(upload.result()) == (1, 1, 0, 0, 0, 0)
    assert len(others.requests) == 1


@pytest.mark.slow
def test_waiting_job_can_be_cancelled(
    client: TestClient, reader: Person, others: Catalogues, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(external, "STOP_CHECK_INTERVAL", 0.05)
    others.always = hang
    with ThreadPoolExecutor() as threads:
        upload = threads.submit(reader.upload, f"isbn\n{EMMA}\n", enrich="true")
        wait_for(lambda: others.requests or None)
        assert reader.delete("/books/upload/1").json()["status"] == "cancelled"
        assert (upload.result()["status"], upload.result()["rows"]) == ("cancelled", 0)
    assert client.get("/books").json()["total"] == 0


@pytest.mark.slow
def test_waiting_job_continues_after_a_restart(serve: Callable[..., Server], others: Catalogues) -> None:
    server = serve(OPEN_LIBRARY_URL=others.url)
    rita = sign_up(server.client, "Rita")
    others.always = lambda handler: time.sleep(20)
    rita.post(
        "/books/upload", files={"file": ("a.csv", f"isbn\n{EMMA}\n{UNKNOWN}\n".encode())}, data={"enrich": "true"}
    )
    wait_for(lambda: others.requests or None)
    assert server.stop() < 5
    others.always = None
    server.start()
    rita = Person(server.client, "Rita")

    def done() -> dict[str, Any] | None:
        upload = dict(rita.get("/books/upload/1").json())
        return upload if upload["status"] not in (UploadStatus.queued, UploadStatus.processing) else None

    assert counts(wait_for(done, seconds=20)) == (2, 1, 0, 0, 1, 0)


# --- the daily import -------------------------------------------------------------------------------------------------


def run_harvest(client: TestClient) -> None:
    assert client.portal is not None
    client.portal.call(external.harvest)


def harvest_events(person: Person) -> list[tuple[str, dict[str, Any]]]:
    items = person.get("/events", params={"types": "harvest.*"}).json()["items"]
    return [(event["type"], event["data"]) for event in items]


@pytest.fixture
def query(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(settings, "harvest_query", "emma")
    return "emma"


def test_daily_import(
    client: TestClient, admin: Person, reader: Person, others: Catalogues, *, clock: Clock, query: str
) -> None:
    reader.add_book(**DUNE)
    run_harvest(client)
    counted = {"query": query, "found": 3, "added": 1, "skipped": 2}
    assert harvest_events(admin) == [("harvest.completed", counted)], "one is here, one has no ISBN"
    assert harvest_events(reader) == []
    assert harvest_events(Person(client, "admin", "admin", admin.tokens)) == [("harvest.completed", counted)]
    book = client.get("/books", params={"search": EMMA}).json()["items"][0]
    assert book["added_by"] is None
    assert others.requests == ["/volumes?q=emma&startIndex=0&maxResults=40&printType=books&orderBy=newest"]
    clock.advance(hours=23, minutes=59)
    run_harvest(client)
    assert len(others.requests) == 1
    clock.advance(minutes=1)
    run_harvest(client)
    assert len(others.requests) == 2
    admin = Person(client, "admin", "admin")
    assert harvest_events(admin)[1:] == [("harvest.completed", {**counted, "added": 0, "skipped": 3})]


@pytest.mark.slow
def test_only_admins_see_harvest_events_in_the_stream(
    client: TestClient, admin: Person, librarian: Person, others: Catalogues, query: str
) -> None:
    start = client.get("/events").json()["next"]
    run_harvest(client)
    for person, sees in ((admin, True), (librarian, False)):
        frames = person.get("/stream", params={"since": start, "seconds": 0.3, "types": "harvest.*"}).text
        assert ("event: harvest.completed" in frames) == sees


def test_failed_harvest_is_retried_after_an_hour(
    client: TestClient, admin: Person, others: Catalogues, *, clock: Clock, query: str, caplog: pytest.LogCaptureFixture
) -> None:
    others.always = answering({}, 503)
    run_harvest(client)
    assert harvest_events(admin) == [("harvest.failed", {"query": query, "error": "Google Books answers with 503."})]
    assert "tried again in an hour" in caplog.text
    others.always = None
    clock.advance(minutes=59)
    run_harvest(client)
    assert client.get("/books").json()["total"] == 0
    clock.advance(minutes=1)
    run_harvest(client)
    assert client.get("/books").json()["total"] == 2


def test_harvest_is_retried_after_an_hour_if_the_process_dies(
    client: TestClient, admin: Person, others: Catalogues, *, clock: Clock, query: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def die(_query: str) -> dict[str, int]:
        raise KeyboardInterrupt

    with monkeypatch.context() as dying:
        dying.setattr(external, "add_newest_books", die)
        with pytest.raises(KeyboardInterrupt):
            asyncio.run(external.harvest())
    clock.advance(minutes=59)
    run_harvest(client)
    assert others.requests == []
    clock.advance(minutes=1)
    run_harvest(client)
    assert len(others.requests) == 1


def test_harvest_due_of_an_older_version_is_respected(
    client: TestClient, admin: Person, others: Catalogues, *, clock: Clock, query: str
) -> None:
    due = (clock.read() + timedelta(hours=5)).strftime("%Y-%m-%dT%H:%M:%SZ")
    database.write_sync(lambda session: session.add(Setting(key="harvest_due", value=due)))
    clock.advance(hours=4, minutes=59)
    run_harvest(client)
    assert others.requests == []
    clock.advance(minutes=1)
    run_harvest(client)
    run_harvest(client)
    assert len(others.requests) == 1


def test_concurrent_harvests_run_once(client: TestClient, admin: Person, others: Catalogues, query: str) -> None:
    async def all_at_once() -> None:
        async with anyio.create_task_group() as workers:
            for _ in range(10):
                workers.start_soon(external.harvest)

    assert client.portal is not None
    client.portal.call(all_at_once)
    assert len(others.requests) == 1
    assert len(harvest_events(admin)) == 1


@pytest.mark.slow
def test_two_workers_harvest_once(serve: Callable[..., Server], others: Catalogues) -> None:
    server = serve("--workers", "2", HARVEST_QUERY="emma", GOOGLE_BOOKS_URL=others.url)
    admin = Person(server.client, "admin", "admin")
    wait_for(lambda: harvest_events(admin) or None)
    time.sleep(0.5)
    assert [what for what, _ in harvest_events(admin)] == ["harvest.completed"]
    assert len(others.requests) == 1


def test_number_of_harvested_pages_is_bounded(
    client: TestClient, admin: Person, others: Catalogues, query: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(external, "HARVEST_PAGE", 1)
    monkeypatch.setattr(external, "HARVEST_PAGES", 3)
    run_harvest(client)
    assert len(others.requests) == 3
    assert harvest_events(admin)[0][1].items() >= {"found": 3, "added": 2}.items()
