"""The cast and the stage: a fresh database file per test, in this process or behind a real server."""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import httpx2 as httpx
import pytest
from fastapi.testclient import TestClient
from sqlmodel import Session, col, select

import auth
import database
import models
from main import app
from settings import settings

if importlib.util.find_spec("hypothesis") is None:
    collect_ignore = ["test_properties.py"]  # CI has it

T = TypeVar("T")
HERE = Path(__file__).resolve().parent
REAL_BOOKS = HERE.parent / "shared" / "data" / "goodbooks-10k.csv"
PASSWORD = "correct horse battery"
DUNE = {"title": "Dune", "author": "Frank Herbert", "isbn": "978-0-441-17271-9", "genre": "Science fiction"}


class Person:
    """Somebody with an account, who sends requests with its token."""

    def __init__(self, client: httpx.Client, username: str, password: str = PASSWORD) -> None:
        self.client, self.username, self.password = client, username, password
        self.tokens = client.post("/login", json={"username": username, "password": password}).json()

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.tokens['access_token']}", **options.pop("headers", {})}
        return self.client.request(method, path, headers=headers, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)

    def post(self, path: str, **options: Any) -> httpx.Response:
        return self.request("POST", path, **options)

    def put(self, path: str, **options: Any) -> httpx.Response:
        return self.request("PUT", path, **options)

    def patch(self, path: str, **options: Any) -> httpx.Response:
        return self.request("PATCH", path, **options)

    def delete(self, path: str, **options: Any) -> httpx.Response:
        return self.request("DELETE", path, **options)

    def add_book(self, **fields: Any) -> dict[str, Any]:
        answer = self.post("/books", json={"title": "A book", "author": "Somebody", **fields})
        assert answer.status_code == 201, answer.text
        return dict(answer.json())

    def upload(self, content: bytes | str, filename: str = "books.csv") -> dict[str, Any]:
        """Upload, wait until it is done, and give what became of it, its errors included."""
        data = content.encode() if isinstance(content, str) else content
        answer = self.post("/books/upload", files={"file": (filename, data, "text/csv")})
        assert answer.status_code == 202, answer.text
        where = answer.headers["Location"]
        upload = wait_for(lambda: self._finished(where), seconds=60)
        return {**upload, "errors": self.get(f"{where}/errors", params={"limit": 100}).json()["items"]}

    def _finished(self, where: str) -> dict[str, Any] | None:
        upload = dict(self.get(where).json())
        return None if upload["status"] in ("queued", "processing") else upload


def sign_up(client: httpx.Client, username: str) -> Person:
    new = {"username": username, "email": f"{username}@example.com", "password": PASSWORD}
    answer = client.post("/auth/register", json=new)
    assert answer.status_code == 201, answer.text
    return Person(client, username)


def wait_for(ask: Callable[[], T | None], seconds: float = 10) -> T:
    """What `ask` answers as soon as it answers anything."""
    end = time.monotonic() + seconds
    while (answer := ask()) is None:
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return answer


# --- in this process ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def first_start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database file as the first start leaves it: migrating it anew for each test would take most of the time."""
    file = tmp_path_factory.mktemp("first") / "books.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, "database_url", f"sqlite:///{file}")
        with TestClient(app):
            pass
    return file


@pytest.fixture
def client(first_start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    """A visitor, who has no account, of a service with an empty catalogue."""
    file = shutil.copy(first_start, tmp_path / "books.db")
    monkeypatch.setattr(settings, "database_url", f"sqlite:///{file}")
    with TestClient(app) as visitor:
        yield visitor


@pytest.fixture
def admin(client: TestClient) -> Person:
    return Person(client, "admin", "admin")


@pytest.fixture
def reader(client: TestClient) -> Person:
    return make(client, "Rita")


@pytest.fixture
def other_reader(client: TestClient) -> Person:
    return make(client, "Oskar")


@pytest.fixture
def librarian(client: TestClient) -> Person:
    return make(client, "Lydia", models.Role.librarian)


PASSWORD_HASH = auth.passwords.hash(PASSWORD)


def make(client: TestClient, username: str, role: models.Role = models.Role.reader) -> Person:
    """Somebody who signed up before the test began."""
    new = models.UserCreate(username=username, email=f"{username}@example.com", password=PASSWORD)
    database.transact(auth.add_user, new, PASSWORD_HASH, role)
    return Person(client, username)


def set_role(session: Session, username: str, role: models.Role) -> None:
    user_named(session, username).role = role


def switch_off(session: Session, username: str) -> None:
    user_named(session, username).is_active = False


def user_named(session: Session, username: str) -> models.User:
    return session.exec(select(models.User).where(col(models.User.username) == username)).one()


class Clock:
    def __init__(self) -> None:
        self.now = datetime.now(UTC)

    def read(self) -> datetime:
        return self.now

    def advance(self, **span: float) -> None:
        self.now += timedelta(**span)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Time stands still, but for `clock.advance(minutes=31)`."""
    frozen = Clock()
    monkeypatch.setattr(models, "now", frozen.read)
    return frozen


# --- behind a socket ----------------------------------------------------------------------------------------------


class Server:
    """A real uvicorn on a database file, started as the README says."""

    def __init__(self, file: Path, *options: str, **environment: str) -> None:
        self.file, self.options, self.environment = file, options, environment
        self.log = file.with_suffix(f".{time.monotonic_ns()}.log")
        self.start()

    def start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        environment = {**os.environ, "DATABASE_URL": f"sqlite:///{self.file}", **self.environment}
        command = [sys.executable, "-m", "uvicorn", "main:app", "--port", str(self.port), *self.options]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=HERE, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30)
        wait_for(self._up, seconds=30)

    def _up(self) -> bool | None:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return self.client.get("/health").status_code == 200 or None
        except httpx.TransportError:
            return None

    def stop(self, how: signal.Signals = signal.SIGTERM) -> float:
        """Stop it; how many seconds that took."""
        started = time.monotonic()
        self.process.send_signal(how)
        self.process.wait(timeout=30)
        self.client.close()
        return time.monotonic() - started

    def close(self) -> None:
        self.client.close()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # its workers too
        self.process.wait(timeout=30)

    def restart(self) -> None:
        if self.process.poll() is None:
            self.stop()
        self.start()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Start servers: all on one database file unless given another."""
    with ExitStack() as servers:

        def start(*options: str, file: Path = tmp_path / "books.db", **environment: str) -> Server:
            server = Server(file, *options, **environment)
            servers.callback(server.close)
            return server

        yield start


@pytest.fixture
def server(serve: Callable[..., Server]) -> Server:
    return serve()
