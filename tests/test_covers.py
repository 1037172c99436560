"""Pictures of covers: fetched once, by ISBN, from a host that may be slow, down, or send anything."""

import asyncio
import gzip
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from typing import Any
from unittest.mock import Mock

import httpx2 as httpx
import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient
from sqlalchemy.exc import OperationalError
from sqlmodel import Session

import covers
import database
from models import Cover
from settings import settings
from tests.fixtures import NOWHERE, Catalogues, Clock, Fault, Person, Server, send, wait_for

EMMA, DUNE, UNKNOWN = "9780141439587", "9780441172719", "9780306406157"
JPEG, PNG = b"\xff\xd8\xff\xe0 a picture", b"\x89PNG\r\n\x1a\n another"
PICTURES = {
    "image/jpeg": JPEG,
    "image/png": PNG,
    "image/webp": b"RIFF\n\x00\r\x00WEBPVP8 ",
    "image/gif": b"GIF89a\x01\x00",
}


def answering(answer: Any, status: int = 200, **headers: str) -> Fault:
    return lambda handler: send(handler, answer, status, **headers)


def add_book(reader: Person, isbn: str = EMMA) -> str:
    return f"/books/{reader.add_book(isbn=isbn)['id']}/cover"


def stored() -> dict[str, int]:
    """The sizes of what is stored, the oldest first."""
    rows = sa.select(Cover.isbn, sa.func.length(Cover.data)).order_by(Cover.position)  # type: ignore[call-overload]
    return dict(database.read_sync(lambda connection: connection.execute(rows).all()))


def is_none(client: httpx.Client, path: str, cache: str = "public, max-age=3600") -> bool:
    """Whether the answer is that there is no picture, in both ways."""
    missing, optional = client.get(path), client.get(path, params={"optional": "true"})
    assert missing.status_code == 404, missing.text
    assert (missing.headers["Content-Type"], optional.content) == ("application/problem+json", b"")
    assert [answer.headers.get_list("Cache-Control") for answer in (missing, optional)] == [[cache], [cache]]
    return bool(optional.status_code == 204)


def test_picture_is_fetched_once(client: TestClient, reader: Person, others: Catalogues) -> None:
    others.covers[EMMA] = JPEG
    path = add_book(reader)
    for _ in range(2):
        answer = client.get(path)
        assert (answer.status_code, answer.content, answer.headers["Content-Type"]) == (200, JPEG, "image/jpeg")
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert others.requests == [f"/b/isbn/{EMMA}-M.jpg?default=false"]
    assert client.head(path).headers["Content-Length"] == str(len(JPEG))
    assert b"picture" not in reader.get("/users/me/export").content


@pytest.mark.parametrize("kind", PICTURES)
def test_type_is_that_of_the_first_bytes(client: TestClient, reader: Person, others: Catalogues, kind: str) -> None:
    others.faults = [answering(PICTURES[kind], Content_Type="text/html")]
    answer = client.get(add_book(reader))
    assert (answer.content, answer.headers["Content-Type"]) == (PICTURES[kind], kind)


def endless(handler: BaseHTTPRequestHandler) -> None:
    """10 MB, without a Content-Length. It fails where nobody reads."""
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(JPEG)
    for _ in range(100):
        handler.wfile.write(bytes(100_000))
    raise AssertionError("all of it was read")


UNUSABLE: dict[str, Fault] = {
    "404": answering(None),
    "410": answering(JPEG, 410),
    "400": answering(JPEG, 400),
    "201": answering(JPEG, 201),
    "SVG": answering(b"<svg xmlns='http://www.w3.org/2000/svg'/>", Content_Type="image/svg+xml"),
    "HTML": answering(b"<!doctype html>", Content_Type="image/jpeg"),
    "picture after a space": answering(b" " + JPEG),
    "RIFF but no WebP": answering(b"RIFF\n\x00\r\x00WAVEfmt "),
    "compressed": answering(gzip.compress(JPEG), Content_Encoding="gzip"),
    "empty": answering(b""),
    "a byte too many": answering(JPEG.ljust(200_001)),
    "10 MB": endless,
    "redirect without a place": answering(JPEG, 302),
    "redirect to another port": answering(JPEG, 302, Location="http://127.0.0.1:1/a.jpg"),
    "redirect to another name of this host": answering(JPEG, 302, Location="http://localhost:1/a.jpg"),
    "redirect to a private address": answering(JPEG, 302, Location="http://169.254.169.254/latest/meta-data"),
    "redirect to a file": answering(JPEG, 302, Location="file:///etc/passwd"),
    "redirect to a host that begins like the archive": answering(JPEG, 302, Location="http://archive.org.localhost/"),
    "redirect to a host that ends like the archive": answering(JPEG, 302, Location="http://notarchive.org/"),
    "redirect with the archive as user name": answering(JPEG, 302, Location="http://archive.org@127.0.0.1:1/"),
}


@pytest.mark.parametrize("fault", UNUSABLE.values(), ids=UNUSABLE)
def test_unusable_answer_is_remembered_for_a_week(
    client: TestClient, reader: Person, others: Catalogues, clock: Clock, fault: Fault
) -> None:
    path = add_book(reader)
    others.covers[EMMA] = JPEG
    others.faults = [fault]
    assert is_none(client, path)
    clock.advance(days=6, hours=23)
    assert is_none(client, path)
    assert (len(others.requests), stored()) == (1, {EMMA: 0})
    clock.advance(hours=2)
    assert client.get(path).content == JPEG
    clock.advance(days=400)
    assert client.get(path).content == JPEG
    assert (len(others.requests), stored()) == (2, {EMMA: len(JPEG)})


def test_largest_picture(client: TestClient, reader: Person, others: Catalogues) -> None:
    others.covers[EMMA] = JPEG.ljust(200_000)
    assert len(client.get(add_book(reader)).content) == 200_000


def hang(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(1)


def drip(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(60):
        handler.wfile.write(JPEG)
        time.sleep(0.02)


def break_off(handler: BaseHTTPRequestHandler) -> None:
    send(handler, JPEG, Content_Length="1000")
    handler.connection.shutdown(socket.SHUT_RDWR)


def no_http(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(JPEG)


DOWN: dict[str, Fault] = {
    "slow": hang,
    "slow after the first bytes": drip,
    "connection lost": break_off,
    "not HTTP": no_http,
    "redirect to what is no address": answering(JPEG, 302, Location="http://[::1"),
    **{str(status): answering(JPEG, status) for status in (403, 429, 500, 502, 503, 504)},
}


@pytest.mark.parametrize("fault", DOWN.values(), ids=DOWN)
def test_source_that_is_down_is_asked_again_after_a_minute(
    client: TestClient, reader: Person, others: Catalogues, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    monkeypatch.setattr(covers, "FETCH_TIMEOUT", 0.3 if fault in (hang, drip) else 5)
    paths = [add_book(reader, EMMA), add_book(reader, DUNE)]
    others.covers = {EMMA: JPEG, DUNE: PNG}
    others.faults = [fault]
    assert is_none(client, paths[0], "no-store")
    assert is_none(client, paths[1], "no-store")
    covers.faults.expire(time.monotonic() + 58)
    assert is_none(client, paths[0], "no-store")
    assert (len(others.requests), stored()) == (1, {})
    monkeypatch.setattr(covers, "FETCH_TIMEOUT", 5)
    covers.faults.expire(time.monotonic() + 60)
    assert [client.get(path).content for path in paths] == [JPEG, PNG]


def test_nobody_listens(client: TestClient, reader: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings.covers_url == NOWHERE
    path = add_book(reader)
    assert is_none(client, path, "no-store")
    assert reader.get(f"{path}?optional=true").headers.get_list("Cache-Control") == ["no-store"]


def test_write_that_fails_is_a_pause(
    client: TestClient, reader: Person, others: Catalogues, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OperationalError("", None, Exception("database or disk is full"))

    monkeypatch.setattr(covers, "store", fail)
    others.covers[EMMA] = JPEG
    assert is_none(client, add_book(reader), "no-store")
    assert len(others.requests) == 1


# --- redirects ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "status"), [(1, 200), (3, 200), (4, 404)])
def test_redirects_on_the_same_server(
    client: TestClient, reader: Person, others: Catalogues, count: int, status: int
) -> None:
    others.covers[EMMA] = JPEG
    place = f"/b/isbn/{EMMA}-M.jpg"
    places = [place, f"{others.url}{place}", place, place][:count]
    others.faults = [answering(b"", 302, Location=place) for place in places]
    assert client.get(add_book(reader)).status_code == status
    assert len(others.requests) == min(count + 1, 4)


ARCHIVE = "https://archive.org/download/m_covers_0008/m_covers_0008_82.zip/0008821431-M.jpg"
MACHINE = "https://ia800503.us.archive.org/view_archive.php?archive=/12/items/m_covers_0008.zip"
FOLLOWED = {
    "Open Library's": [ARCHIVE, MACHINE],
    "without TLS": [ARCHIVE.replace("https", "http"), MACHINE],
    "another port": [ARCHIVE.replace(".org/", ".org:8080/"), MACHINE],
}


@pytest.mark.parametrize("places", FOLLOWED.values(), ids=FOLLOWED)
def test_redirects_to_the_archive_are_followed_by_https(places: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        requests.append(str(request.url))
        if len(requests) <= len(places):
            return httpx.Response(302, headers={"Location": places[len(requests) - 1]})
        return httpx.Response(200, content=stream())

    async def stream() -> AsyncIterator[bytes]:
        yield JPEG

    async def open_client(*_: object) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.MockTransport(answer))

    monkeypatch.setattr(covers, "open_client", open_client)
    monkeypatch.setattr(settings, "covers_url", "https://covers.openlibrary.org")
    assert asyncio.run(covers.download(EMMA)) == JPEG
    first = f"https://covers.openlibrary.org/b/isbn/{EMMA}-M.jpg?default=false"
    assert requests == [first, ARCHIVE, MACHINE]


# --- many at once ---------------------------------------------------------------------------------------------------


class Slow:
    """Answers when it is let go."""

    def __init__(self, others: Catalogues) -> None:
        self.others, self.let_go, self.now, self.most = others, threading.Event(), 0, 0
        self.lock = threading.Lock()
        others.always = self

    def __call__(self, handler: BaseHTTPRequestHandler) -> None:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        self.let_go.wait(5)
        with self.lock:
            self.now -= 1
        send(handler, JPEG)


def test_two_at_once_fetch_once(
    client: TestClient, reader: Person, others: Catalogues, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, slow, waiting = add_book(reader), Slow(others), Mock(wraps=covers.wait_for_picture)
    monkeypatch.setattr(covers, "wait_for_picture", waiting)
    with ThreadPoolExecutor() as threads:
        answers = [threads.submit(client.get, path) for _ in range(4)]
        wait_for(lambda: (len(covers.fetches) == 1 and waiting.call_count == 4) or None)
        slow.let_go.set()
        assert [answer.result().content for answer in answers] == [JPEG] * 4
    assert (len(others.requests), covers.fetches) == (1, {})


def test_concurrency_is_bounded_and_nothing_else_waits(
    client: TestClient, reader: Person, others: Catalogues, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(covers, "slots", asyncio.Semaphore(2))
    monkeypatch.setattr(covers, "MAX_WAITING", 4)
    isbns = ["9780306406157", "9780141439587", "9780441172719", "9783161484100", "9781861972712"]
    paths, slow = [add_book(reader, isbn) for isbn in isbns], Slow(others)
    connections = database.backend().engine.pool
    before = connections.checkedout()  # type: ignore[attr-defined]
    with ThreadPoolExecutor() as threads:
        answers = [threads.submit(client.get, path) for path in paths[:4]]
        wait_for(lambda: (slow.now == 2 and len(covers.fetches) == 4) or None)
        wait_for(lambda: connections.checkedout() <= before or None)  # type: ignore[attr-defined]  # the tail may read
        assert is_none(client, paths[4], "no-store")
        assert reader.add_book()["id"] == len(isbns) + 1
        slow.let_go.set()
        assert [answer.result().status_code for answer in answers] == [200] * 4
    assert (slow.most, len(others.requests)) == (2, 4)
    assert client.get(paths[4]).content == JPEG


def test_fetches_that_nobody_waits_for_are_bounded(
    client: TestClient, reader: Person, others: Catalogues, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(covers, "WAIT_TIMEOUT", 0.01)
    monkeypatch.setattr(covers, "MAX_WAITING", 1)
    paths, slow = [add_book(reader, EMMA), add_book(reader, DUNE)], Slow(others)
    assert is_none(client, paths[0], "no-store")
    assert is_none(client, paths[1], "no-store")
    slow.let_go.set()
    wait_for(lambda: stored() or None)
    assert (client.get(paths[0]).content, len(others.requests)) == (JPEG, 1)


# --- what is stored -------------------------------------------------------------------------------------------------


def test_book_whose_isbn_changes(client: TestClient, reader: Person, others: Catalogues) -> None:
    others.covers = {EMMA: JPEG, DUNE: PNG}
    path = add_book(reader)
    book = path.removesuffix("/cover")
    first = client.get(path, params={"v": EMMA})
    assert reader.patch(book, json={"isbn": DUNE}).status_code == 200
    second = client.get(path, params={"v": DUNE}, headers={"If-None-Match": first.headers["ETag"]})
    assert (first.content, second.content) == (JPEG, PNG)
    assert reader.patch(book, json={"isbn": None}).status_code == 200
    assert is_none(client, path, "no-store")
    assert len(others.requests) == 2


def test_caching(client: TestClient, reader: Person, others: Catalogues) -> None:
    others.covers[EMMA] = JPEG
    path = add_book(reader)
    plain, versioned = client.get(path), client.get(path, params={"v": EMMA, "optional": "true"})
    assert plain.headers["Cache-Control"] == "no-cache"
    assert versioned.headers["Cache-Control"] == "public, max-age=31536000, immutable"
    etag = plain.headers["ETag"]
    for tag in (etag, f"W/{etag}", "*", f'"x", {etag}'):
        answer = client.get(path, params={"v": "1"}, headers={"If-None-Match": tag})
        assert (answer.status_code, answer.content, answer.headers["ETag"]) == (304, b"", etag)
        assert answer.headers["Cache-Control"] == "public, max-age=31536000, immutable"
    assert client.get(path, headers={"If-None-Match": '"x"'}).status_code == 200
    assert reader.get(path).headers.get_list("Cache-Control") == ["no-cache"]


def test_switched_off(client: TestClient, reader: Person, others: Catalogues, monkeypatch: pytest.MonkeyPatch) -> None:
    others.covers = {EMMA: JPEG, DUNE: PNG}
    paths = [add_book(reader, EMMA), add_book(reader, DUNE)]
    assert client.get(paths[0]).status_code == 200
    monkeypatch.setattr(settings, "covers", False)
    for path in paths:
        assert client.get(path).status_code == 404
        assert client.get(path, params={"optional": "true"}).status_code == 204
    assert len(others.requests) == 1


def test_the_oldest_are_deleted(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(covers, "MAX_STORED", 10_000)

    def store(isbn: int, size: int) -> None:
        database.write_sync(covers.store, str(isbn), bytes(size))

    for isbn in range(9):
        store(isbn, 1500)
    assert stored() == dict.fromkeys("45678", 1500), "with 500 bytes of each row"
    store(6, 0)
    assert [*stored()] == ["4", "5", "7", "8", "6"]
    store(9, 9500)
    assert stored() == {"9": 9500}
    for isbn in range(10, 40):
        store(isbn, 0)
    assert len(stored()) == 20


def test_two_processes_may_fetch_the_same(client: TestClient, reader: Person, others: Catalogues) -> None:
    path = add_book(reader)
    others.covers[EMMA] = JPEG
    assert client.get(path).content == JPEG

    def store_twice(session: Session) -> None:
        covers.store(session, EMMA, b"")
        covers.store(session, EMMA, PNG)

    database.write_sync(store_twice)
    assert client.get(path).content == PNG


REFUSED = {
    "no such book": ("/books/99/cover", 404),
    "id 0": ("/books/0/cover", 422),
    "id beyond an integer": ("/books/2147483648/cover", 422),
    "id of 11 digits": ("/books/99999999999/cover", 404),
    "negative id": ("/books/-1/cover", 404),
    "no id": ("/books/one/cover", 404),
    "id and line break": ("/books/1%0A/cover", 404),
    "path that climbs": ("/books/1/..%2f..%2fcover", 404),
    "no flag": ("/books/1/cover?optional=perhaps", 422),
    "another parameter": ("/books/1/cover?url=http://127.0.0.1/", 422),
    "NUL as version": ("/books/1/cover?v=%00", 404),
    "bytes as version": ("/books/1/cover?v=%ff%fe", 404),
    "long version": (f"/books/1/cover?v={'9' * 10_000}", 404),
}


@pytest.mark.parametrize(("path", "status"), REFUSED.values(), ids=REFUSED)
def test_hostile_requests(client: TestClient, others: Catalogues, path: str, status: int) -> None:
    answer = client.get(path)
    assert (answer.status_code, others.requests) == (status, [])
    assert answer.json()["status"] == status


def test_book_that_does_not_exist_is_optional_too(client: TestClient) -> None:
    assert is_none(client, "/books/99/cover", "no-store")


@pytest.mark.slow
def test_two_workers_and_a_restart_without_covers(serve: Callable[..., Server], others: Catalogues) -> None:
    others.covers[EMMA] = JPEG
    server = serve("--workers", "2", COVERS_URL=others.url)
    admin = Person(server.client, "admin", "admin")
    path = add_book(admin)
    assert {server.client.get(path).content for _ in range(20)} == {JPEG}
    assert len(others.requests) == 1
    server.environment["COVERS"] = "false"
    server.restart()
    assert server.client.get(path, params={"optional": "true"}).status_code == 204
