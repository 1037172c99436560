"""Books of other catalogues: found there, added here, filled in, harvested; and what happens when they are at fault."""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from fastapi.testclient import TestClient

import catalogues
import external
from conftest import Catalogues, Clock, Fault, Person, Server, send, sign_up, wait_for
from settings import settings
from sources import Candidate, Source, candidate, date_and_year

GOOGLE_EMMA = {"source": "google", "ref": "Qe7kAwAAQBAJ"}
OPEN_EMMA = {"source": "openlibrary", "ref": "OL7353617M"}
EMMA, UNKNOWN = "9780141439587", "9780306406157"


def look(person: Person, **params: Any) -> dict[str, Any]:
    answer = person.get("/books/external", params=params)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


# --- finding ------------------------------------------------------------------------------------------------------

NOTHING_SAID = dict.fromkeys(
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
        **NOTHING_SAID,
        "source": "google",
        "ref": "aBcDEfghIJkl",
        "title": "Emma, a forgotten pamphlet",
        "author": "Unknown",
        "language": "en",
        "publication_year": 1816,
    },
    {
        **NOTHING_SAID,
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
        **NOTHING_SAID,
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
        **NOTHING_SAID,
        "source": "openlibrary",
        "ref": "OL27448W",
        "title": "Emma's letters",
        "author": "Unknown",
        "language": "de",
        "cover_url": "https://covers.openlibrary.org/b/id/14627060-L.jpg",
        "publication_year": 1937,
    },
]


def test_what_google_books_finds_is_shown_as_a_book_of_ours(reader: Person, others: Catalogues) -> None:
    found = look(reader, q="emma", max_results=40)
    assert found == {"items": GOOGLE, "total": 4}, "one of them has no title"
    assert others.asked == ["/volumes?q=emma&startIndex=0&maxResults=40&printType=books"]
    assert look(reader, q="emma", start_index=2, max_results=1)["items"] == GOOGLE[2:]
    assert look(reader, q="nothing like it") == {"items": [], "total": 0}


def test_what_open_library_finds_is_shown_as_a_book_of_ours(reader: Person, others: Catalogues) -> None:
    assert look(reader, q="emma", source="openlibrary") == {"items": OPEN, "total": 3}
    page = look(reader, q="emma", source="openlibrary", start_index=1, max_results=1)
    assert page == {"items": OPEN[1:], "total": 3}


def test_an_isbn_in_any_dress_finds_one_book(reader: Person, others: Catalogues) -> None:
    assert look(reader, isbn="0-14-143958-0")["items"] == GOOGLE[:1]
    assert "isbn%3A9780141439587" in others.asked[0]
    found = look(reader, isbn=EMMA, source="openlibrary")
    assert (found["total"], found["items"][0]["ref"], found["items"][0]["pages"]) == (1, "OL7353617M", 474)
    assert found["items"][0]["cover_url"] == "https://covers.openlibrary.org/b/id/1-L.jpg"
    assert look(reader, isbn=UNKNOWN, source="openlibrary") == {"items": [], "total": 0}


NO_QUESTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "both": {"q": "emma", "isbn": EMMA},
    "a blank": {"q": " "},
    "no ISBN": {"isbn": "9780141439580"},
    "another source": {"q": "emma", "source": "amazon"},
    "a page of none": {"q": "emma", "max_results": 0},
    "a page of too many": {"q": "emma", "max_results": 41},
    "a place before the first": {"q": "emma", "start_index": -1},
    "a NUL": {"q": "a\0b"},
    "an unknown parameter": {"q": "emma", "key": "mine"},
}


@pytest.mark.parametrize("params", NO_QUESTIONS.values(), ids=NO_QUESTIONS)
def test_what_can_not_be_asked(reader: Person, others: Catalogues, params: dict[str, Any]) -> None:
    assert reader.get("/books/external", params=params).status_code == 422
    assert others.asked == []


def test_only_so_many_wait_for_other_catalogues(
    reader: Person, others: Catalogues, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(external, "AT_ONCE", 1)
    let_go = threading.Event()
    others.faults = [lambda handler: (let_go.wait(5), send(handler, {"totalItems": 0}))]  # type: ignore[func-returns-value, list-item]
    with ThreadPoolExecutor() as threads:
        first = threads.submit(look, reader, q="slow")
        wait_for(lambda: others.asked or None)
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
    "a day that there is not": ("2008-02-31", None, 2008),
    "which comes first": ("03/04/2008", None, 2008),
    "a century": ("19--", None, None),
    "none": (None, None, None),
}


@pytest.mark.parametrize(("text", "day", "year"), DATES.values(), ids=DATES)
def test_dates_as_they_write_them(text: str | None, day: str | None, year: int | None) -> None:
    told = date_and_year(text)
    assert (told["published_date"] and str(told["published_date"]), told["publication_year"]) == (day, year)


def test_what_is_too_long_or_impossible_is_left_out_and_the_rest_kept() -> None:
    said = {"author": "A" * 2000, "language": "x" * 99, "pages": 10**9, "publication_year": 9999, "genre": "a\0"}
    book = candidate(Source.google, "x", title="T", **said)
    assert book == Candidate(source=Source.google, ref="x", title="T", author="Unknown")
    assert book.book().title == "T"
    assert candidate(Source.google, "../x", title="T") is None


# --- adding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "title", "pages"), [(GOOGLE_EMMA, "Emma", 474), (OPEN_EMMA, "Emma", 474)], ids=["google", "openlibrary"]
)
def test_a_book_from_there_is_a_book_here(
    client: TestClient, reader: Person, others: Catalogues, *, wanted: dict[str, str], title: str, pages: int
) -> None:
    start = client.get("/events").json()["next"]
    answer = reader.post("/books/external", json=wanted)
    assert (answer.status_code, answer.headers["ETag"]) == (201, '"1"'), answer.text
    book = client.get(answer.headers["Location"]).json()
    assert book == answer.json()
    assert (book["title"], book["isbn"], book["pages"], book["published_date"]) == (title, EMMA, pages, "2008-08-11")
    assert client.get("/books", params={"search": "emma austen"}).json()["items"] == [book]
    told = client.get("/events", params={"after": start}).json()["items"]
    assert [(event["type"], event["data"]["id"]) for event in told] == [("book.created", book["id"])]
    again = reader.post("/books/external", json=wanted)
    assert (again.status_code, again.json()["errors"][0]["loc"]) == (409, ["body", "isbn"])


def test_a_work_without_an_edition_and_a_volume_without_an_author_can_be_added(
    reader: Person, others: Catalogues
) -> None:
    work = reader.post("/books/external", json={"source": "openlibrary", "ref": "OL27448W"}).json()
    assert (work["title"], work["author"], work["publication_year"]) == ("Emma's letters", "Unknown", 1937)
    volume = reader.post("/books/external", json={"source": "google", "ref": "aBcDEfghIJkl"}).json()
    assert (volume["author"], volume["isbn"], volume["pages"]) == ("Unknown", None, None)


@pytest.mark.parametrize(
    "wanted",
    [
        {"source": "google", "ref": "AAAAAAAAAAAA"},
        {"source": "google", "ref": "noTitle_AAJ"},
        {"source": "openlibrary", "ref": "OL9M"},
        {"source": "openlibrary", "ref": "OL9W"},
    ],
    ids=lambda wanted: wanted["ref"],
)
def test_what_is_not_there_is_404(reader: Person, others: Catalogues, wanted: dict[str, str]) -> None:
    assert reader.post("/books/external", json=wanted).status_code == 404
    assert len(others.asked) == 1


NO_REFS = {
    "a path up": ("google", "../../admin"),
    "a path down": ("google", "a/b"),
    "an encoded path": ("google", "..%2f..%2fadmin"),
    "dots": ("google", ".."),
    "a query": ("google", "a?key=1"),
    "a fragment": ("google", "a#b"),
    "another host": ("google", "@evil.example"),
    "an address": ("openlibrary", "http://127.0.0.1/"),
    "a line break": ("openlibrary", "OL1M\n"),
    "a second key": ("openlibrary", "OL1M,OLID:OL2M"),
    "an author": ("openlibrary", "OL1A"),
    "no number": ("openlibrary", "OLM"),
    "digits of another script": ("openlibrary", "OL\N{ARABIC-INDIC DIGIT ONE}M"),
    "nothing": ("google", ""),
    "a long one": ("google", "x" * 41),
}


@pytest.mark.parametrize(("source", "ref"), NO_REFS.values(), ids=NO_REFS)
def test_what_is_no_ref(reader: Person, others: Catalogues, source: str, ref: str) -> None:
    answer = reader.post("/books/external", json={"source": source, "ref": ref})
    assert (answer.status_code, answer.json()["errors"][0]["loc"]) == (422, ["body", "ref"])
    assert others.asked == []


def test_where_only_staff_add_books_nothing_is_fetched_for_readers(
    reader: Person, librarian: Person, others: Catalogues, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "readers_can_add", False)
    assert reader.post("/books/external", json=GOOGLE_EMMA).status_code == 403
    assert others.asked == []
    assert librarian.post("/books/external", json=GOOGLE_EMMA).status_code == 201


# --- at fault -----------------------------------------------------------------------------------------------------


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


def saying(answer: Any, status: int = 200, **headers: str) -> Fault:
    return lambda handler: send(handler, answer, status, **headers)


TRIES = catalogues.A_CLIENT_WAITS.tries
FAULTS: dict[str, tuple[Fault, int, int]] = {
    "silent": (hang, 504, 2),
    "a byte now and then": (drip, 504, 1),
    "500": (saying({}, 500), 502, TRIES),
    "503": (saying(b"<html>Sorry</html>", 503), 502, TRIES),
    "429": (saying({}, 429), 502, TRIES),
    "429 for an hour": (saying({}, 429, Retry_After="3600"), 502, 1),
    "503 until tomorrow": (saying({}, 503, Retry_After="Fri, 01 Jan 2100 00:00:00 GMT"), 502, 1),
    "a key that is no good": (saying({"error": {"code": 403}}, 403), 502, 1),
    "half an answer": (half, 502, TRIES),
    "no JSON": (saying(b"<html>It works!</html>"), 502, TRIES),
    "JSON of another shape": (saying([1, 2]), 502, TRIES),
    "JSON without end": (saying(b"[" * 100_000), 502, TRIES),
    "nothing": (saying(b""), 502, TRIES),
    "fifty megabytes": (flood, 502, 1),
    "a bomb": (saying(b"\x1f\x8b", Content_Encoding="gzip"), 502, 1),
    "a way elsewhere": (saying({}, 302, Location="http://localhost:1/volumes"), 502, 1),
    "a way to a file": (saying({}, 302, Location="file:///etc/passwd"), 502, 1),
    "a way in circles": (saying({}, 301, Location="/volumes?q=again"), 502, 4),
}


@pytest.mark.parametrize(("fault", "status", "tries"), FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("adding", [False, True], ids=["finding", "adding"])
def test_a_source_at_fault_is_told_in_time(
    reader: Person,
    others: Catalogues,
    *,
    fault: Fault,
    status: int,
    tries: int,
    adding: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short = catalogues.Patience(TRIES, seconds=0.8, each=0.5, pause=0.01)
    if fault in (hang, drip):
        monkeypatch.setattr(catalogues, "A_CLIENT_WAITS", short)
    others.always = fault
    started = time.monotonic()
    if adding:
        answer = reader.post("/books/external", json=GOOGLE_EMMA)
    else:
        answer = reader.get("/books/external", params={"q": "emma"})
    assert answer.status_code == status
    assert answer.json()["detail"].startswith("Google Books ")
    assert len(others.asked) == tries
    assert time.monotonic() - started < 3
    assert reader.get("/books").json()["total"] == 0
    others.always = None
    assert look(reader, q="emma")["total"] == 4, "a failure is not kept"


def test_a_source_that_nobody_runs_is_502(reader: Person) -> None:
    for source in Source:
        answer = reader.get("/books/external", params={"q": "emma", "source": source})
        assert (answer.status_code, answer.headers["Content-Type"]) == (502, "application/problem+json")


def test_it_is_tried_again_when_it_says_so(reader: Person, others: Catalogues) -> None:
    others.faults = [saying({}, 500), saying({}, 429, Retry_After="1")]
    started = time.monotonic()
    assert look(reader, q="emma")["total"] == 4
    assert 1 <= time.monotonic() - started < 3
    assert len(others.asked) == 3


def test_a_redirect_to_the_same_place_is_followed(reader: Person, others: Catalogues) -> None:
    others.faults = [saying({}, 302, Location=f"{others.url}/volumes?q=dune&startIndex=0&maxResults=10")]
    assert [book["title"] for book in look(reader, q="emma")["items"]] == ["Dune"]


def test_one_broken_book_does_not_hide_the_others(reader: Person, others: Catalogues) -> None:
    others.volumes[1:1] = [
        {"id": "x"},
        {"id": 7, "volumeInfo": {}},
        "emma",
        {"id": "e", "volumeInfo": {"title": ["emma"]}},
    ]
    assert look(reader, q="emma")["items"] == GOOGLE


@pytest.mark.slow
def test_a_slow_source_keeps_nobody_else_waiting(serve: Callable[..., Server], others: Catalogues) -> None:
    server = serve(GOOGLE_BOOKS_URL=others.url)
    rita = sign_up(server.client, "Rita")
    others.always = hang
    with ThreadPoolExecutor(10) as threads:
        asking = [threads.submit(look, rita, q=f"slow {number}") for number in range(8)]
        wait_for(lambda: len(others.asked) == 8 or None)
        waits = []
        while not any(each.done() for each in asking):
            started = time.monotonic()
            assert server.client.get("/health").status_code == 200
            waits.append(time.monotonic() - started)
        # Were they waited for on the event loop, one or two would be all, and take as long as the source.
        assert len(waits) > 10
        assert max(waits) < 1
        assert [each.result()["total"] for each in asking] == [0] * 8


# --- manners ------------------------------------------------------------------------------------------------------


def test_answers_are_kept_for_an_hour(reader: Person, others: Catalogues, clock: Clock) -> None:
    assert look(reader, q="emma") == look(reader, q="emma")
    assert len(others.asked) == 1
    look(reader, q="emma", start_index=1)
    look(reader, q="emma", source="openlibrary")
    assert len(others.asked) == 3
    clock.advance(minutes=59)
    reader = Person(reader.client, "Rita")
    look(reader, q="emma")
    assert len(others.asked) == 3
    others.volumes.clear()
    clock.advance(minutes=2)
    assert look(reader, q="emma")["total"] == 0
    assert len(others.asked) == 4


def test_only_so_much_is_kept(reader: Person, others: Catalogues, monkeypatch: pytest.MonkeyPatch) -> None:
    look(reader, q="emma")
    monkeypatch.setattr(catalogues, "CACHE_MAX", catalogues.cache.size + 10)
    look(reader, q="dune")
    assert len(catalogues.cache.answers) == 1
    look(reader, q="emma")
    assert len(others.asked) == 3
    monkeypatch.setattr(catalogues, "CACHE_MAX", 0)
    look(reader, q="pamphlet")
    assert (catalogues.cache.size, len(catalogues.cache.answers)) == (0, 0)


def test_what_is_added_is_fetched_anew(reader: Person, others: Catalogues) -> None:
    look(reader, isbn=EMMA, source="openlibrary")
    others.editions[0]["number_of_pages"] = 500
    assert reader.post("/books/external", json=OPEN_EMMA).json()["pages"] == 500


def test_it_says_who_asks_and_keeps_its_key(
    reader: Person, others: Catalogues, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(settings, "public_url", "https://books.example.com")
    monkeypatch.setattr(settings, "google_books_key", "s3cret-key")
    caplog.set_level(logging.INFO, "books")
    others.faults = [saying({}, 500)]
    look(reader, q="emma")
    look(reader, q="emma", source="openlibrary")
    assert others.agents == {"BooksAPI/0.1.0 (+https://books.example.com)"}
    assert ["key=s3cret-key" in path for path in others.asked] == [True, True, False]
    assert "500" in caplog.text
    assert "s3cret" not in caplog.text
