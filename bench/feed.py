"""How soon a change reaches many streams, and what they cost: `python -m bench feed`."""

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
from typing import ClassVar

from bench.server import ROOT, Server


class Listener(asyncio.Protocol):
    """A client of /stream: counts, for each event, who has it."""

    having: ClassVar[Counter[bytes]] = Counter()
    all_ready: ClassVar[asyncio.Event] = asyncio.Event()
    ready, of = 0, 0

    def __init__(self) -> None:
        self.rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(b"GET /stream HTTP/1.1\r\nHost: bench\r\n\r\n")

    def data_received(self, data: bytes) -> None:
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"id: "):
                Listener.having[line] += 1
                if Listener.having[line] == Listener.of:
                    print(int(line[4:]), time.monotonic(), flush=True)
            elif line.startswith(b"event: ready"):
                Listener.ready += 1
                if Listener.ready == Listener.of:
                    Listener.all_ready.set()

    def connection_lost(self, exc: Exception | None) -> None:
        os._exit(1)  # the measure is none if one is lost

    @classmethod
    async def listen(cls, port: int, streams: int) -> None:
        """In a process of its own. Prints the id of an event, and when, as soon as the last client has it."""
        loop = asyncio.get_running_loop()
        cls.of = streams
        for _ in range(streams):
            await loop.create_connection(cls, "127.0.0.1", port)
        await cls.all_ready.wait()
        print("ready", flush=True)
        await asyncio.sleep(3600)


async def create_rate(port: int, token: str, seconds: float, writers: int = 8) -> float:
    """Books a second, by so many clients that wait for each answer."""
    body = b'{"title": "A book", "author": "Somebody"}'
    head = f"POST /books HTTP/1.1\r\nHost: bench\r\nAuthorization: {token}\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    end = time.monotonic() + seconds

    async def write() -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        done = 0
        while time.monotonic() < end:
            writer.write(request)
            answer = await reader.readuntil(b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 201"), answer
            length = re.search(rb"content-length: (\d+)", answer)
            assert length is not None
            await reader.readexactly(int(length[1]))
            done += 1
        writer.close()
        return done

    return sum(await asyncio.gather(*(write() for _ in range(writers)))) / seconds


def feed_once(streams: int, events: int, seconds: float) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        server = Server(folder)
        port = server.client.base_url.port
        assert port is not None
        token = server.client.headers["Authorization"]
        server.client.get("/books")
        alone = asyncio.run(create_rate(port, token, seconds))
        before = server.memory_mb("VmRSS")
        command = [sys.executable, "-m", "bench", "listen", str(port), str(streams)]
        listeners = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        try:
            told: queue.SimpleQueue[str] = queue.SimpleQueue()
            threading.Thread(target=lambda: deque(map(told.put, listeners.stdout or ()), 0), daemon=True).start()
            assert told.get(timeout=60) == "ready\n"
            memory = server.memory_mb("VmRSS") - before
            took: list[float] = []
            for number in range(events):
                begun = time.monotonic()  # what the writing itself takes is counted, too
                server.client.post("/books", json={"title": f"Event {number}", "author": "Somebody"})
                took.append((float(told.get(timeout=30).split()[1]) - begun) * 1000)
                time.sleep(0.1)
            with_listeners = asyncio.run(create_rate(port, token, seconds))
            head = server.client.get("/events", params={"after": 2**63 - 1}).json()["next"]
            while not told.get(timeout=30).startswith(f"{head} "):
                pass
        finally:
            listeners.kill()
            listeners.wait()
            server.stop()
    took.sort()
    return {
        "median": statistics.median(took),
        "p99": took[math.ceil(len(took) * 0.99) - 1],
        "kb": memory * 1024 / streams,
        "alone": alone,
        "with_listeners": with_listeners,
    }


def bench_feed(streams: int, rounds: int) -> None:
    # The server has a core, and its clients the other.
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    runs = [feed_once(streams, events=50, seconds=5) for _ in range(rounds)]

    def spread(name: str) -> str:
        values = [run[name] for run in runs]
        return f"{statistics.median(values):8.0f}   ({min(values):.0f} to {max(values):.0f})"

    print(f"{streams:,} streams of one worker; median of {rounds} runs (least to most)")
    print(f"  from the request to the last client, median {spread('median')} ms")
    print(f"  from the request to the last client, p99    {spread('p99')} ms")
    print(f"  memory of a stream                          {spread('kb')} KB")
    print(f"  books made in a second, nobody listening    {spread('alone')}")
    print(f"  books made in a second, all listening       {spread('with_listeners')}")
