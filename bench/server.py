"""The service, started to be measured."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx2 as httpx

ROOT = Path(__file__).resolve().parent.parent


class Server:
    """uvicorn as the README starts it, on an empty database."""

    def __init__(self, folder: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {**os.environ, "DATABASE_URL": f"sqlite:///{folder}/books.db", "LOG_LEVEL": "WARNING"}
        command = [sys.executable, "-m", "uvicorn", "main:app", "--port", str(port), "--log-level", "warning"]
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
        while True:
            try:
                self.client.get("/health")
                break
            except httpx.TransportError:
                time.sleep(0.05)
        tokens = self.client.post("/login", data={"username": "admin", "password": "admin"}).json()
        self.client.headers["Authorization"] = f"Bearer {tokens['access_token']}"

    def memory_mb(self, which: str = "VmHWM") -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith(which))) / 1024

    def stop(self) -> None:
        self.client.close()
        self.process.terminate()
        self.process.wait()
