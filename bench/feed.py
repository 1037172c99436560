"""The delay of events to many streams, and the streams' cost: `python -m bench feed`."""

import asyncio
import math
import os
import queue
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from pathlib import Path
from typing import ClassVar

from bench.server import ROOT, Server


class Listener(asyncio.Protocol):
    """A client of /stream. All clients count together how many have received each event."""

    received: ClassVar[Counter[bytes]] = Counter()
    all_ready: ClassVar[asyncio.Event] = asyncio.Event()
    ready, streams = 0, 0

    def __init__(self) -> None:
        self.incomplete = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(b"GET /stream HTTP/1.1\r\nHost: bench\r\n\r\n")

    def data_received(self, data: bytes) -> None:
        *lines, self.incomplete = (self.incomplete + data).split(b"\n")
        for line in lines:
            if line.startswith(b"id: "):
                Listener.received[line] += 1
                if Listener.received[line] == Listener.streams:
                    print(int(line[4:]), time.monotonic(), flush=True)
            elif line.startswith(b"event: ready"):
                Listener.ready += 1
                if Listener.ready == Listener.streams:
                    Listener.all_ready.set()

    def connection_lost(self, exc: Exception | None) -> None:
        os._exit(1)  # the figures need all of them

    @classmethod
    async def listen(cls, port: int, streams: int) -> None:
        """In a process of its own: print the id of each event, and the time, when the last client has received it."""
        loop = asyncio.get_running_loop()
        cls.streams = streams
        for _ in range(streams):
            await loop.create_connection(cls, "127.0.0.1", port)
        await cls.all_ready.wait()
        print("ready", flush=True)
        await asyncio.sleep(3600)


async def create_rate(port: int, token: str, seconds: float, writers: int = 8) -> float:
    """Books created a second, by clients that send one request at a time."""
    body = b'{"title": "A book", "author": "Somebody"}'
    head = f"POST /books HTTP/1.1\r\nHost: bench\r\nAuthorization: {token}\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    end = time.monotonic() + seconds

    async def write() -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        created = 0
        while time.monotonic() < end:
            writer.write(request)
            response = await reader.readuntil(b"\r\n\r\n")
            assert response.startswith(b"HTTP/1.1 201"), response
            length = re.search(rb"content-length: (\d+)", response)
            assert length is not None
            await reader.readexactly(int(length[1]))
            created += 1
        writer.close()
        return created

    return sum(await asyncio.gather(*(write() for _ in range(writers)))) / seconds


def feed_once(streams: int, events: int, seconds: float) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder, Server(Path(folder) / "books.db", log="WARNING") as server:
        server.sign_in()
        token = server.headers["Authorization"]
        alone = asyncio.run(create_rate(server.port, token, seconds))
        memory_before = server.memory_mb()
        command = [sys.executable, "-m", "bench", "listen", str(server.port), str(streams)]
        listeners = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        try:
            output: queue.SimpleQueue[str] = queue.SimpleQueue()
            threading.Thread(target=lambda: deque(map(output.put, listeners.stdout or ()), 0), daemon=True).start()
            assert output.get(timeout=60) == "ready\n"
            memory = server.memory_mb() - memory_before
            delays: list[float] = []
            for number in range(events):
                started = time.monotonic()  # the delay includes the request itself
                server.client.post("/books", json={"title": f"Event {number}", "author": "Somebody"})
                delays.append((float(output.get(timeout=30).split()[1]) - started) * 1000)
                time.sleep(0.1)
            with_listeners = asyncio.run(create_rate(server.port, token, seconds))
            last_id = server.client.get("/events", params={"after": 2**63 - 1}).json()["next"]
            while not output.get(timeout=30).startswith(f"{last_id} "):
                pass
        finally:
            listeners.kill()
            listeners.wait()
    delays.sort()
    return {
        "median": statistics.median(delays),
        "p99": delays[math.ceil(len(delays) * 0.99) - 1],
        "kb": memory * 1024 / streams,
        "alone": alone,
        "with_listeners": with_listeners,
    }


def bench_feed(streams: int, rounds: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    runs = [feed_once(streams, events=50, seconds=5) for _ in range(rounds)]

    def spread(name: str) -> str:
        values = [run[name] for run in runs]
        return f"{statistics.median(values):8.0f}   ({min(values):.0f} to {max(values):.0f})"

    print(f"{streams:,} streams of one worker; median of {rounds} runs (minimum to maximum)")
    print(f"  from the request to the last client, median {spread('median')} ms")
    print(f"  from the request to the last client, p99    {spread('p99')} ms")
    print(f"  memory of a stream                          {spread('kb')} KB")
    print(f"  books created in a second, no streams       {spread('alone')}")
    print(f"  books created in a second, all streams open {spread('with_listeners')}")
