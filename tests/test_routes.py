"""FastRoute: every request gets the same response as from FastAPI's own route; and writes on the event loop."""

import random
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2 as httpx
import pytest
from fastapi.testclient import TestClient

import api
import database
from api import FastRoute
from main import app
from tests.fixtures import Person, recurring_work, wait_for

FAST_ROUTES = [route for route in app.routes if isinstance(route, FastRoute)]
Send = Callable[[], httpx.Response]


async def fail(*_: object) -> None:
    raise AssertionError("FastRoute should have answered this itself")


@pytest.fixture
def both_ways(monkeypatch: pytest.MonkeyPatch) -> Callable[[Send], tuple[httpx.Response, httpx.Response]]:
    def send(request: Send) -> tuple[httpx.Response, httpx.Response]:
        answer = request()
        with monkeypatch.context() as patch:
            for route in FAST_ROUTES:
                patch.setattr(route, "app", route.ordinary)
            return answer, request()

    return send


def comparable(answer: httpx.Response) -> tuple[Any, ...]:
    own = answer.headers["x-request-id"]
    headers = {name: value for name, value in answer.headers.items() if name != "x-request-id"}
    return answer.status_code, headers, answer.content.replace(own.encode(), b"")


@pytest.fixture
def shelf(reader: Person) -> None:
    for title in ("Dune", "Emma", "Persuasion"):
        book = reader.add_book(title=title, genre="Novel")
        reader.post(f"/my-library/{book['id']}")


VALID = {
    "a book": "/books/1",
    "leading zeros": "/books/0000000001",
    "the catalogue": "/books",
    "trailing slash": "/books/",
    "a page": "/books?limit=2&sort=-title",
    "a search": "/books?search=du%20em",
    "blank filters": "/books?genre=&search=%20&cursor=",
    "plus sign as space": "/books?search=du+",
    "my shelf": "/my-library?status=wishlist",
    "my shelf, one book": "/my-library?book_id=1",
    "invalid UTF-8": "/books?search=%ff",
    "lone surrogate": "/books?search=%ed%a0%80",
}
INVALID = {
    "unknown book": "/books/4",
    "id zero": "/books/0",
    "id out of range": "/books/2147483648",
    "id of ten digits": "/books/9999999999",
    "unknown parameter": "/books?sise=3",
    "limit too high": "/books?limit=101",
    "limit is a word": "/books?limit=two",
    "parameter twice": "/books?limit=5&limit=0",
    "parameter twice, the same": "/books?search=du&search=du",
    "parameter twice, of a shelf": "/my-library?limit=5&limit=5",
    "NUL": "/books?search=%00",
    "unknown sort": "/books?sort=size",
    "cursor of another order": "/books?cursor=WyJpZCIsMV0&sort=title",
    "cursor and offset": "/books?cursor=WyJpZCIsMV0&offset=2",
    "added_by=me": "/books?added_by=me",
    "unknown status": "/my-library?status=lost",
    "book_id zero": "/my-library?book_id=0",
}


@pytest.mark.usefixtures("shelf")
@pytest.mark.parametrize("path", VALID.values(), ids=VALID)
def test_valid_reads_are_answered_by_the_fast_route(
    reader: Person, both_ways: Callable[[Send], Any], monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    short, ordinary = both_ways(lambda: reader.get(path))
    assert comparable(short) == comparable(ordinary)
    assert short.status_code == 200
    for route in FAST_ROUTES:
        monkeypatch.setattr(route, "ordinary", fail)
    assert comparable(reader.get(path)) == comparable(short)


@pytest.mark.usefixtures("shelf")
@pytest.mark.parametrize("path", INVALID.values(), ids=INVALID)
def test_invalid_reads_get_the_same_error(
    client: TestClient, reader: Person, both_ways: Callable[[Send], Any], path: str
) -> None:
    for get in (client.get, reader.get):
        short, ordinary = both_ways(partial(get, path))
        assert comparable(short) == comparable(ordinary)
        assert short.status_code in (401, 404, 422) or "added_by" in path


TOKENS = {
    "no header": {},
    "empty": {"Authorization": ""},
    "basic": {"Authorization": "Basic cmVhZGVyOnNlY3JldA=="},
    "no token": {"Authorization": "Bearer"},
    "invalid": {"Authorization": "Bearer nonsense"},
    "lower-case scheme": {"Authorization": "bearer nonsense"},
    "not ASCII": {"Authorization": "Bearer \xe4".encode("latin-1")},
    "very long": {"Authorization": f"Bearer {'x' * 5000}"},
}


@pytest.mark.usefixtures("shelf")
@pytest.mark.parametrize("headers", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("path", ["/books", "/my-library", "/my-library?limit=0"])
def test_authorization_headers_get_the_same_response(
    client: TestClient, both_ways: Callable[[Send], Any], headers: dict[str, Any], path: str
) -> None:
    short, ordinary = both_ways(lambda: client.get(path, headers=headers))
    assert comparable(short) == comparable(ordinary)


@pytest.mark.slow
@pytest.mark.usefixtures("shelf")
def test_random_queries_get_the_same_response(reader: Person, both_ways: Callable[[Send], Any]) -> None:
    chance = random.Random(8)
    names = "search genre author publisher language year_from year_to available added_by sort limit offset skip cursor"
    names += " status book_id"  # of the shelf
    values = ["", " ", "0", "1", "2", "-1", "01", "1.0", "true", "no", "me", "id", "-title", "Novel", "é", "a" * 600]
    for _ in range(300):
        pairs = [(chance.choice([*names.split(), "size"]), chance.choice(values)) for _ in range(chance.randrange(4))]
        query = "&".join(f"{name}={quote(value)}" for name, value in pairs)
        path = chance.choice(("/books", "/my-library")) + f"?{query}"
        short, ordinary = both_ways(partial(reader.get, path))
        assert comparable(short) == comparable(ordinary), path


JSON = {"Content-Type": "application/json"}
BOOK = b'{"title": "A", "author": "B"}'


def in_chunks(text: bytes) -> Iterator[bytes]:
    yield text[:5]
    yield text[5:]


BODIES: dict[str, tuple[Any, dict[str, str], int]] = {
    "JSON": (BOOK, JSON, 201),
    "with a charset": (BOOK, {"Content-Type": "application/json; charset=utf-8"}, 201),
    "+json media type": (BOOK, {"Content-Type": "application/vnd.api+json"}, 201),
    "chunked": (in_chunks, JSON, 201),
    "no media type": (BOOK, {}, 415),
    "form media type": (BOOK, {"Content-Type": "application/x-www-form-urlencoded"}, 415),
    "empty": (b"", JSON, 422),
    "null": (b"null", JSON, 422),
    "list": (b"[1]", JSON, 422),
    "invalid JSON": (b'{"title": ', JSON, 422),
    "invalid UTF-8": (b'{"title": "\xff", "author": "B"}', JSON, 400),
    "unknown field": (b'{"title": "A", "author": "B", "id": 1}', JSON, 422),
    "repeated field": (b'{"title": "A", "author": "B", "author": "C"}', JSON, 201),
    "missing field": (b'{"title": "A"}', JSON, 422),
    "number as text": (b'{"title": 1, "author": "B"}', JSON, 422),
    "lone surrogate": (b'{"title": "\\ud800", "author": "B"}', JSON, 422),
    "too deep": (b"[" * 100_000, JSON, 400),
    "too long": (b" " * api.MAX_BODY + BOOK, JSON, 413),
    "too long, chunked": (lambda: iter([b" " * api.MAX_BODY, BOOK]), JSON, 413),
}


@pytest.mark.parametrize("case", BODIES.values(), ids=BODIES)
def test_bodies_get_the_same_response(
    client: TestClient, reader: Person, both_ways: Callable[[Send], Any], case: tuple[Any, dict[str, str], int]
) -> None:
    body, headers, status = case

    def send() -> httpx.Response:
        content = body if isinstance(body, bytes) else body(BOOK) if body is in_chunks else body()
        answer = reader.post("/books", content=content, headers=headers)
        if answer.status_code == 201:
            assert reader.get(answer.headers["Location"]).json() == answer.json()
            assert reader.delete(answer.headers["Location"]).status_code == 204
        return answer

    short, ordinary = both_ways(send)
    assert short.status_code == ordinary.status_code == status
    if status == 201:
        same = {"title", "author", "isbn", "version", "added_by"}
        assert {n: v for n, v in short.json().items() if n in same} == {
            n: v for n, v in ordinary.json().items() if n in same
        }
        assert short.headers["ETag"] == ordinary.headers["ETag"] == '"1"'
    else:
        assert comparable(short) == comparable(ordinary)
    unknown = client.post("/books", content=BOOK, headers=headers)
    assert unknown.status_code in (401, 422)


def test_a_disconnect_within_the_body_is_no_error(client: TestClient, reader: Person) -> None:
    sent: list[Any] = []
    headers = {
        "content-type": "application/json",
        "content-length": "30",
        "authorization": f"Bearer {reader.tokens['access_token']}",
    }
    scope = {
        "type": "http",
        "method": "POST",
        "scheme": "http",
        "path": "/books",
        "raw_path": b"/books",
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }
    messages = [{"type": "http.disconnect"}, {"type": "http.request", "body": b'{"title": ', "more_body": True}]

    async def receive() -> Any:
        return messages.pop()

    async def send(message: object) -> None:
        sent.append(message)

    assert client.portal is not None
    client.portal.call(app, scope, receive, send)
    assert sent[0]["status"] == 400, "for the access log"
    assert client.get("/books").json()["total"] == 0


@pytest.mark.sqlite
def test_a_write_waiting_for_another_process_does_not_block_reads(client: TestClient, reader: Person) -> None:
    """Another worker, Litestream, or the sqlite3 shell."""
    backend: Any = database.backend()
    other = sqlite3.connect(backend.engine.url.database, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(reader.add_book, title=f"Late {number}", author="B") for number in range(3)]
        for _ in range(5):
            assert client.get("/books").json()["total"] == 0
            time.sleep(0.02)
        assert not any(one.done() for one in waiting), "they are refused after BUSY_TIMEOUT"
        other.execute("COMMIT")
        assert {one.result(10)["title"] for one in waiting} == {"Late 0", "Late 1", "Late 2"}
    other.close()
    assert client.get("/books").json()["total"] == 3


@pytest.mark.slow
@pytest.mark.sqlite
def test_writes_are_checkpointed(reader: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    """The write-ahead log must not grow without bound."""
    monkeypatch.setattr(database, "CHECKPOINT_AFTER", 10)
    backend: Any = database.backend()
    file = backend.engine.url.database

    def checkpointed() -> int:
        # immutable=1 ignores the write-ahead log and locks.
        connection = sqlite3.connect(f"file:{file}?immutable=1", uri=True)
        try:
            return int(connection.execute("SELECT count(*) FROM book").fetchone()[0])
        except sqlite3.DatabaseError:
            return 0  # a checkpoint is half done
        finally:
            connection.close()

    sequence = []
    with recurring_work(reader.client):
        for round_ in range(1, 4):
            for _ in range(30):
                reader.add_book(title="Dune")
            assert wait_for(lambda least=30 * round_ - 20: checkpointed() >= least or None, 30)  # type: ignore[misc]  # no type for mypy
            # The checkpoint sequence number (SQLite, "WAL-mode File Format").
            sequence.append(int.from_bytes(Path(f"{file}-wal").read_bytes()[12:16], "big"))
    assert sequence[0] < sequence[-1], sequence
