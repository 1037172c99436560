"""Many who connect and never say what they want: the others are answered as before."""

import re
import resource
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.fixtures import ROOT, Person, Server, resident_mb

HALF = 10_000
BEGUN = b"GET /books HTTP/1.1\r\nHost: books.example\r\nX-Slow: "
USUAL = 1024  # what a login gives a process in the way of open files


@pytest.fixture
def few_files() -> Iterator[int]:
    """As many open files as is usual, for what is started now; how many there may be at most."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (USUAL, hard))
    yield hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def half_a_request(port: int) -> socket.socket:
    slow = socket.create_connection(("127.0.0.1", port), timeout=30)
    slow.sendall(BEGUN)
    return slow


def waits(server: Server, book: int) -> list[float]:
    """How many seconds readers wait, each on a new connection as a newcomer would."""
    times = []
    for turn in range(60):
        started = time.perf_counter()
        answer = server.client.get((f"/books/{book}", "/books", "/health")[turn % 3], headers={"Connection": "close"})
        times.append(time.perf_counter() - started)
        assert answer.status_code == 200
    return times


@pytest.mark.slow
def test_ten_thousand_half_requests_stop_nobody(serve: Callable[..., Server], few_files: int) -> None:
    server = serve()
    admin = Person(server.client, "admin", "admin")
    book = admin.add_book()["id"]
    before, memory = waits(server, book), resident_mb(server.process.pid)
    resource.setrlimit(resource.RLIMIT_NOFILE, (few_files, few_files))
    count = min(HALF, few_files - 500)
    with ExitStack() as stack:
        slow = [stack.enter_context(half_a_request(server.port)) for _ in range(count)]
        during = waits(server, book)
        for one in slow:  # each a little further, as such clients do to look alive
            one.sendall(b"x")
        dripping = waits(server, book)
        assert admin.post("/books", json={"title": "Emma", "author": "Jane Austen"}).status_code == 201
        kib = (resident_mb(server.process.pid) - memory) * 1024 / count
    medians = [round(statistics.median(times), 4) for times in (before, during, dripping)]
    print(f"{count} half requests, {kib:.1f} KiB each; readers wait {medians} s")
    assert count > 4 * USUAL
    assert kib < 30
    assert statistics.median(during) < 5 * statistics.median(before) + 0.1
    assert statistics.median(dripping) < 5 * statistics.median(before) + 0.1
    assert max(waits(server, book)) < 5


def test_the_procfile_sets_no_limit_that_idle_connections_could_reach() -> None:
    """`--limit-concurrency` counts connections that have asked for nothing, and answers everybody else with 503."""
    assert not re.search(r"--limit-concurrency", (ROOT / "Procfile").read_text())
