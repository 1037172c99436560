"""A server process to measure."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx2 as httpx

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Process:
    """A server on this machine. It has started when it answers `ready`, a path."""

    def __init__(self, name: str, port: int, command: Sequence[str], ready: str, **options: Any) -> None:
        self.name, self.port, self.url, self.headers = name, port, f"http://127.0.0.1:{port}", dict[str, str]()
        started = time.perf_counter()
        with open(os.environ.get("BENCH_LOG", os.devnull), "ab") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output, **options)
        self.client = httpx.Client(base_url=self.url, timeout=60)
        self._wait(ready)
        self.start_seconds = time.perf_counter() - started

    def _wait(self, ready: str) -> None:
        while True:
            try:
                self.client.get(ready)
                return
            except httpx.TransportError:
                if self.process.poll() is not None:
                    sys.exit(f"{self.name} ended with {self.process.returncode}; BENCH_LOG=file keeps its output")
                time.sleep(0.02)

    def sign_in(self) -> None:
        """Set the headers of requests that need a user."""

    def memory_mb(self, name: str = "VmRSS") -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith(name))) / 1024

    def cpu_seconds(self) -> float:
        """Of this process and its workers."""
        pid = self.process.pid
        total = 0
        for one in (pid, *Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
            fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
        return total / os.sysconf("SC_CLK_TCK")

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_error: object) -> None:
        self.client.close()
        self.process.terminate()
        self.process.wait()


class Server(Process):
    """uvicorn as the README starts it, with the code of `checkout`, on an SQLite file or the URL of a database.

    Without uvicorn's access log, which the service silences as well: it logs each request by itself.
    """

    def __init__(
        self,
        database: Path | str,
        app: str = "main:app",
        *,
        checkout: Path = ROOT,
        workers: int = 1,
        log: str = "INFO",
    ) -> None:
        environment = {
            "DATABASE_URL": f"sqlite:///{database}" if isinstance(database, Path) else database,
            "RATE_LIMITS": "false",
            "LOG_LEVEL": log,
            "FLOOR_DB": str(database),
        }
        port = free_port()
        command = [sys.executable, "-m", "uvicorn", app, f"--port={port}", f"--workers={workers}", "--no-access-log"]
        super().__init__(app, port, command, "/books?limit=1", cwd=checkout, env={**os.environ, **environment})
        if workers > 1:
            time.sleep(2)  # the first worker answers before the others have started

    def sign_in(self) -> None:
        tokens = self.client.post("/login", data={"username": "admin", "password": "admin"}).json()
        self.headers = {"Authorization": f"Bearer {tokens['access_token']}"}
        self.client.headers.update(self.headers)
