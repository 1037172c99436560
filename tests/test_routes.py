"""The short way through FastAPI: whatever is sent, a route answers as it does the ordinary way."""

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

import database
from api import FastRoute
from main import app
from tests.fixtures import Person, recurring_work, wait_for

SHORT = [route for route in app.routes if isinstance(route, FastRoute)]
Send = Callable[[], httpx.Response]


async def nowhere(*_: object) -> None:
    raise AssertionError("this should have gone the short way")


@pytest.fixture
def both_ways(monkeypatch: pytest.MonkeyPatch) -> Callable[[Send], tuple[httpx.Response, httpx.Response]]:
    def send(request: Send) -> tuple[httpx.Response, httpx.Response]:
        answer = request()
        with monkeypatch.context() as patch:
            for route in SHORT:
                patch.setattr(route, "app", route.ordinary)
            return answer, request()

    return send


def told(answer: httpx.Response) -> tuple[Any, ...]:
    headers = {name: value for name, value in answer.headers.items() if name != "x-request-id"}
    return answer.status_code, headers, answer.content


@pytest.fixture
def shelf(reader: Person) -> None:
    for title in ("Dune", "Emma", "Persuasion"):
        book = reader.add_book(title=title, genre="Novel")
        reader.post(f"/my-library/{book['id']}")


GOOD = {
    "a book": "/books/1",
    "a book with zeros before": "/books/0000000001",
    "the catalogue": "/books",
    "with a slash": "/books/",
    "a page": "/books?limit=2&sort=-title",
    "a search": "/books?search=du%20em&search=du",
    "blanks": "/books?genre=&search=%20&cursor=",
    "plus for a space": "/books?search=du+",
    "my shelf": "/my-library?status=wishlist",
    "one of it": "/my-library?book_id=1",
    "not UTF-8": "/books?search=%ff",
    "half a pair": "/books?search=%ed%a0%80",
}
REFUSED = {
    "a book that there is not": "/books/4",
    "zero": "/books/0",
    "too large for an id": "/books/2147483648",
    "ten digits": "/books/9999999999",
    "no such field": "/books?sise=3",
    "too many": "/books?limit=101",
    "no number": "/books?limit=two",
    "the last of two counts": "/books?limit=5&limit=0",
    "NUL": "/books?search=%00",
    "no such sort": "/books?sort=size",
    "a cursor of somebody else": "/books?cursor=WyJpZCIsMV0&sort=title",
    "a cursor and an offset": "/books?cursor=WyJpZCIsMV0&offset=2",
    "mine, and nobody is there": "/books?added_by=me",
    "no such status": "/my-library?status=lost",
    "no such id": "/my-library?book_id=0",
}


@pytest.mark.usefixtures("shelf")
@pytest.mark.parametrize("path", GOOD.values(), ids=GOOD)
def test_a_good_read_goes_the_short_way(
    reader: Person, both_ways: Callable[[Send], Any], monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    short, ordinary = both_ways(lambda: reader.get(path))
    assert told(short) == told(ordinary)
    assert short.status_code == 200
    for route in SHORT:
        monkeypatch.setattr(route, "ordinary", nowhere)
    assert told(reader.get(path)) == told(short)


@pytest.mark.usefixtures("shelf")
@pytest.mark.parametrize("path", REFUSED.values(), ids=REFUSED)
def test_a_bad_read_is_refused_as_ever(
    client: TestClient, reader: Person, both_ways: Callable[[Send], Any], path: str
) -> None:
    for get in (client.get, reader.get):
        short, ordinary = both_ways(partial(get, path))
        assert told(short) == told(ordinary)
        assert short.status_code in (401, 404, 422) or "added_by" in path


TOKENS = {
    "none": {},
    "empty": {"Authorization": ""},
    "of another kind": {"Authorization": "Basic cmVhZGVyOnNlY3JldA=="},
    "the word alone": {"Authorization": "Bearer"},
    "nonsense": {"Authorization": "Bearer nonsense"},
    "a lower case scheme": {"Authorization": "bearer nonsense"},
    "not ASCII": {"Authorization": "Bearer \xe4".encode("latin-1")},
    "very long": {"Authorization": f"Bearer {'x' * 5000}"},
}


@pytest.mark.usefixtures("shelf")
@pytest.mark.parametrize("headers", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("path", ["/books", "/my-library", "/my-library?limit=0"])
def test_tokens_are_looked_at_as_ever(
    client: TestClient, both_ways: Callable[[Send], Any], headers: dict[str, Any], path: str
) -> None:
    short, ordinary = both_ways(lambda: client.get(path, headers=headers))
    assert told(short) == told(ordinary)


@pytest.mark.usefixtures("shelf")
def test_whatever_is_asked_is_answered_alike(reader: Person, both_ways: Callable[[Send], Any]) -> None:
    chance = random.Random(8)
    names = "search genre author publisher language year_from year_to available added_by sort limit offset skip cursor"
    names += " status book_id"  # of the shelf
    values = ["", " ", "0", "1", "2", "-1", "01", "1.0", "true", "no", "me", "id", "-title", "Novel", "é", "a" * 600]
    for _ in range(300):
        pairs = [(chance.choice([*names.split(), "size"]), chance.choice(values)) for _ in range(chance.randrange(4))]
        query = "&".join(f"{name}={quote(value)}" for name, value in pairs)
        path = chance.choice(("/books", "/my-library")) + f"?{query}"
        short, ordinary = both_ways(partial(reader.get, path))
        assert told(short) == told(ordinary), path


JSON = {"Content-Type": "application/json"}
BOOK = b'{"title": "A", "author": "B"}'


def in_pieces(text: bytes) -> Iterator[bytes]:
    yield text[:5]
    yield text[5:]


BODIES: dict[str, tuple[Any, dict[str, str], int]] = {
    "plain": (BOOK, JSON, 201),
    "with a charset": (BOOK, {"Content-Type": "application/json; charset=utf-8"}, 201),
    "as a kind of JSON": (BOOK, {"Content-Type": "application/vnd.api+json"}, 201),
    "in pieces": (in_pieces, JSON, 201),
    "without a type": (BOOK, {}, 422),
    "as a form": (BOOK, {"Content-Type": "application/x-www-form-urlencoded"}, 422),
    "nothing": (b"", JSON, 422),
    "null": (b"null", JSON, 422),
    "a list": (b"[1]", JSON, 422),
    "no JSON": (b'{"title": ', JSON, 422),
    "not UTF-8": (b'{"title": "\xff", "author": "B"}', JSON, 400),
    "a field too many": (b'{"title": "A", "author": "B", "id": 1}', JSON, 422),
    "a field twice": (b'{"title": "A", "author": "B", "author": "C"}', JSON, 201),
    "a field missing": (b'{"title": "A"}', JSON, 422),
    "a number for a text": (b'{"title": 1, "author": "B"}', JSON, 422),
    "half a pair": (b'{"title": "\\ud800", "author": "B"}', JSON, 422),
    "deeper than Python": (b"[" * 100_000, JSON, 400),
    "too long": (b" " * (1 << 20) + BOOK, JSON, 413),
    "too long, in pieces": (lambda: iter([b" " * (1 << 20), BOOK]), JSON, 413),
}


@pytest.mark.parametrize("case", BODIES.values(), ids=BODIES)
def test_a_body_is_read_as_ever(
    client: TestClient, reader: Person, both_ways: Callable[[Send], Any], case: tuple[Any, dict[str, str], int]
) -> None:
    body, headers, status = case

    def send() -> httpx.Response:
        content = body if isinstance(body, bytes) else body(BOOK) if body is in_pieces else body()
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
        assert told(short) == told(ordinary)
    unknown = client.post("/books", content=BOOK, headers=headers)
    assert unknown.status_code in (401, 422)


def test_who_breaks_off_a_body_is_let_go(client: TestClient, reader: Person) -> None:
    sent: list[object] = []
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
    assert sent == []
    assert client.get("/books").json()["total"] == 0


@pytest.mark.sqlite
def test_a_short_change_waits_for_another_without_keeping_readers(client: TestClient, reader: Person) -> None:
    with ThreadPoolExecutor() as pool:
        with database.backend().write_lock:  # type: ignore[union-attr]  # of SQLite
            waiting = pool.submit(reader.add_book, title="Late", author="B")
            for _ in range(5):
                assert client.get("/books").json()["total"] == 0
            assert not waiting.done()
        assert waiting.result(10)["title"] == "Late"
    assert client.get("/books").json()["total"] == 1


@pytest.mark.sqlite
def test_a_short_change_waits_for_a_stranger_without_keeping_readers(client: TestClient, reader: Person) -> None:
    """Litestream, say, or somebody in SQLite's own shell: they know nothing of the service's lock."""
    backend: Any = database.backend()
    stranger = sqlite3.connect(backend.engine.url.database, isolation_level=None)
    stranger.execute("BEGIN IMMEDIATE")
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(reader.add_book, title=f"Late {number}", author="B") for number in range(3)]
        for _ in range(5):
            began = time.monotonic()
            assert client.get("/books").json()["total"] == 0
            assert time.monotonic() - began < 1
            time.sleep(0.1)
        assert not any(one.done() for one in waiting)
        stranger.execute("COMMIT")
        assert {one.result(10)["title"] for one in waiting} == {"Late 0", "Late 1", "Late 2"}
    stranger.close()
    assert client.get("/books").json()["total"] == 3


@pytest.mark.sqlite
def test_what_was_written_inline_gets_into_the_file(reader: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the write-ahead log does not grow for ever."""
    monkeypatch.setattr(database, "CHECKPOINT_AFTER", 10)
    backend: Any = database.backend()
    file = backend.engine.url.database

    def kept() -> int:
        # Immutable: without a look at the write-ahead log, nor at locks.
        connection = sqlite3.connect(f"file:{file}?immutable=1", uri=True)
        try:
            return int(connection.execute("SELECT count(*) FROM book").fetchone()[0])
        except sqlite3.DatabaseError:
            return 0  # half of it is there, at this moment
        finally:
            connection.close()

    begun = []
    with recurring_work(reader.client):
        for round_ in range(1, 4):
            for _ in range(30):
                reader.add_book(title="Dune")
            assert wait_for(lambda least=30 * round_ - 20: kept() >= least or None, 30)  # type: ignore[misc]  # no type for mypy
            # How often the log was begun anew: the fourth number of its header (the WAL file format of SQLite).
            begun.append(int.from_bytes(Path(f"{file}-wal").read_bytes()[12:16], "big"))
    assert begun[0] < begun[-1], begun
