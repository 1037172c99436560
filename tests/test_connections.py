"""Many clients that never finish their request do not delay others."""

import re
import resource
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.fixtures import ROOT, Person, Server, resident_mb

CLIENTS = 10_000
PARTIAL_REQUEST = b"GET /books HTTP/1.1\r\nHost: books.example\r\nX-Slow: "
FILE_LIMIT = 1024  # the default of open files for a process


@pytest.fixture
def hard_limit() -> Iterator[int]:
    """Lowers the limit of open files to the default, for processes started now. Yields the hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILE_LIMIT, hard))
    yield hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def send_partial_request(port: int) -> socket.socket:
    slow = socket.create_connection(("127.0.0.1", port), timeout=30)
    slow.sendall(PARTIAL_REQUEST)
    return slow


def response_times(server: Server, book: int) -> list[float]:
    """Seconds for each of several reads, on new connections."""
    times = []
    for number in range(60):
        started = time.perf_counter()
        answer = server.client.get((f"/books/{book}", "/books", "/health")[number % 3], headers={"Connection": "close"})
        times.append(time.perf_counter() - started)
        assert answer.status_code == 200
    return times


@pytest.mark.slow
def test_ten_thousand_partial_requests_do_not_delay_readers(serve: Callable[..., Server], hard_limit: int) -> None:
    server = serve()
    admin = Person(server.client, "admin", "admin")
    book = admin.add_book()["id"]
    before, memory = response_times(server, book), resident_mb(server.process.pid)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
    count = min(CLIENTS, hard_limit - 500)
    with ExitStack() as stack:
        slow = [stack.enter_context(send_partial_request(server.port)) for _ in range(count)]
        during = response_times(server, book)
        for connection in slow:  # as slow-loris clients do to keep the connection open
            connection.sendall(b"x")
        dripping = response_times(server, book)
        assert admin.post("/books", json={"title": "Emma", "author": "Jane Austen"}).status_code == 201
        kib = (resident_mb(server.process.pid) - memory) * 1024 / count
    medians = [round(statistics.median(times), 4) for times in (before, during, dripping)]
    print(f"{count} partial requests, {kib:.1f} KiB each; readers take {medians} s")
    assert count > 4 * FILE_LIMIT
    assert kib < 30
    assert statistics.median(during) < 5 * statistics.median(before) + 0.1
    assert statistics.median(dripping) < 5 * statistics.median(before) + 0.1
    assert max(response_times(server, book)) < 5


def test_the_procfile_does_not_limit_concurrency() -> None:
    """`--limit-concurrency` counts idle connections too, and answers everybody else with 503."""
    assert not re.search(r"--limit-concurrency", (ROOT / "Procfile").read_text())
