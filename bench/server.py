"""A server process to measure."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx2 as httpx

ROOT = Path(__file__).resolve().parent.parent


class Server:
    """uvicorn as the README starts it, on the SQLite database `file`, with the code of `checkout`.

    Without uvicorn's access log, which the service silences as well: it logs each request by itself.
    """

    def __init__(
        self,
        file: Path,
        app: str = "main:app",
        *,
        checkout: Path = ROOT,
        options: Sequence[str] = (),
        log: str = "INFO",
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        environment = {
            "DATABASE_URL": f"sqlite:///{file}",
            "RATE_LIMITS": "false",
            "LOG_LEVEL": log,
            "FLOOR_DB": str(file),
        }
        command = [sys.executable, "-m", "uvicorn", app, "--port", str(self.port), "--no-access-log", *options]
        started = time.perf_counter()
        with open(os.environ.get("BENCH_LOG", os.devnull), "ab") as output:
            self.process = subprocess.Popen(
                command, cwd=checkout, env={**os.environ, **environment}, stdout=output, stderr=output
            )
        self.app, self.url, self.headers = app, f"http://127.0.0.1:{self.port}", dict[str, str]()
        self.client = httpx.Client(base_url=self.url, timeout=60)
        self._wait()
        self.start_seconds = time.perf_counter() - started

    def _wait(self) -> None:
        while True:
            try:
                self.client.get("/books?limit=1")
                return
            except httpx.TransportError:
                if self.process.poll() is not None:
                    sys.exit(f"{self.app} ended with {self.process.returncode}; BENCH_LOG=file keeps its output")
                time.sleep(0.02)

    def sign_in(self) -> None:
        tokens = self.client.post("/login", data={"username": "admin", "password": "admin"}).json()
        self.headers = {"Authorization": f"Bearer {tokens['access_token']}"}
        self.client.headers.update(self.headers)

    def memory_mb(self, name: str = "VmRSS") -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith(name))) / 1024

    def cpu_seconds(self) -> float:
        """Of this process; not of further workers."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_error: object) -> None:
        self.client.close()
        self.process.terminate()
        self.process.wait()
