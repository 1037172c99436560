"""The cast and the stage: a fresh database file per test, in this process or behind a real server."""

import asyncio
import functools
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qs, urlsplit

import httpx2 as httpx
import psycopg
import pytest
from fastapi.testclient import TestClient
from sqlmodel import Session, col, select

import accounts
import auth
import covers
import database
import events
import external
import main
import models
import schemas
import security
from accounts import Email
from main import app
from settings import settings

T = TypeVar("T")
NOWHERE = "http://127.0.0.1:9"  # nobody listens there: no test asks the real catalogues
ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data"
REAL_BOOKS = ROOT.parent / "shared" / "data" / "goodbooks-10k.csv"
PASSWORD = "correct horse battery"
JSON = {"Content-Type": "application/json"}
NEW = {"username": "rita", "email": "rita@example.com", "password": PASSWORD}
DUNE = {"title": "Dune", "author": "Frank Herbert", "isbn": "978-0-441-17271-9", "genre": "Science fiction"}


class Person:
    """Somebody with an account, who has signed in and sends requests with the token."""

    def __init__(
        self, client: httpx.Client, username: str, password: str = PASSWORD, tokens: dict[str, Any] | None = None
    ) -> None:
        self.client, self.username = client, username
        self.tokens = tokens or client.post("/login", json={"username": username, "password": password}).json()

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

    def upload(
        self, content: bytes | str, filename: str = "books.csv", path: str = "/books/upload", **options: Any
    ) -> dict[str, Any]:
        """Upload, wait until it is done, and give what became of it, its errors included."""
        data = content.encode() if isinstance(content, str) else content
        answer = self.post(path, files={"file": (filename, data, "text/csv")}, data=options)
        assert answer.status_code == 202, answer.text
        where = answer.headers["Location"]
        upload = wait_for(lambda: self._finished(where), seconds=60)
        return {**upload, "errors": self.get(f"{where}/errors", params={"limit": 100}).json()["items"]}

    def _finished(self, where: str) -> dict[str, Any] | None:
        upload = dict(self.get(where).json())
        return None if upload["status"] in ("queued", "processing") else upload


def without_ids(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What must be the same on another service."""
    left_out = {"id", "book_id", "updated_at", "created_at", "version", "added_by", "copies", "available"}
    entries = [{**entry, "book": {k: v for k, v in entry["book"].items() if k not in left_out}} for entry in entries]
    return [{name: value for name, value in entry.items() if name not in left_out} for entry in entries]


def sign_up(client: httpx.Client, username: str) -> Person:
    new = {"username": username, "email": f"{username}@example.com", "password": PASSWORD}
    answer = client.post("/auth/register", json=new)
    assert answer.status_code == 201, answer.text
    return Person(client, username)


def wait_for(ask: Callable[[], T | None], seconds: float = 10) -> T:
    """What `ask` answers as soon as it answers anything."""
    end, pause = time.monotonic() + seconds, 0.002
    while (answer := ask()) is None:
        assert time.monotonic() < end, "waited in vain"
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    return answer


# --- the database ---------------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--database", choices=["sqlite", "postgresql"], default="sqlite", help="what the tests run on")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("database", "sqlite") == "postgresql" and (
        config.getoption("numprocesses", None) in (None, 0) or hasattr(config, "workerinput")
    ):
        Postgres.current = Postgres()
        config.add_cleanup(Postgres.current.throw_away)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests about one database are no tests of the other: they are left out, not skipped. The longest comes first."""
    other = {"sqlite": "postgresql", "postgresql": "sqlite"}[str(config.getoption("database", "sqlite"))]
    left_out = [item for item in items if item.get_closest_marker(other)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker(other)]
    items.sort(key=lambda item: item.path.name != "test_soak.py")


class Postgres:
    """A server of the tests' own, from Debian's package, thrown away in the end. Each file becomes a database."""

    current: "Postgres | None" = None

    def __init__(self) -> None:
        versions = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
        assert versions, "install postgresql"
        self.programs, self.folder, self.port = versions[-1], Path(tempfile.mkdtemp(prefix="books-pg-")), free_port()
        # PostgreSQL refuses to run as root.
        self.user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.geteuid() == 0 else []
        if self.user:
            shutil.chown(self.folder, "postgres", "postgres")
        self.made: dict[Path, str] = {}
        self.run("initdb", "-U", "books", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "-N", f"{self.folder}/data")
        self.start()

    def start(self) -> None:
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1 -c fsync=off -c max_connections=200"
        log = f"{self.folder}/log"
        self.run("pg_ctl", "-D", f"{self.folder}/data", "-o", options, "-l", log, "-w", "start")

    def run(self, program: str, *arguments: str) -> None:
        command = [*self.user, str(self.programs / program), *arguments]
        done = subprocess.run(command, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        assert done.returncode == 0, done.stdout.decode()

    def stop(self) -> None:
        self.run("pg_ctl", "-D", f"{self.folder}/data", "-m", "immediate", "-w", "stop")

    def throw_away(self) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def execute(self, statement: str) -> None:
        with psycopg.connect(self.url_of("postgres"), autocommit=True) as connection:
            connection.execute(statement)

    def url_of(self, name: str) -> str:
        return f"postgresql://books@127.0.0.1:{self.port}/{name}"

    def database(self, file: Path, like: Path | None = None) -> str:
        """The URL of what stands for this file; at first it is empty, or a copy of what stands for another."""
        if file not in self.made:
            self.made[file] = f"books_{len(self.made)}"
            template = f" TEMPLATE {self.made[like]}" if like else ""
            self.execute(f"CREATE DATABASE {self.made[file]}{template}")
        return self.url_of(self.made[file])


def url_of(file: Path) -> str:
    """Of the database that this file is, or stands for."""
    return f"sqlite:///{file}" if Postgres.current is None else Postgres.current.database(file)


def copy_of(first: Path, file: Path) -> str:
    if Postgres.current is None:
        shutil.copy(first, file)
    else:
        Postgres.current.database(file, like=first)
    return url_of(file)


# --- in this process ----------------------------------------------------------------------------------------------

# Hashes that are made to be slow, and files that survive a power cut, take half the time of the tests.
PRODUCTION = {"passwords": security.passwords.to_dict(), "pragmas": dict(database.PRAGMAS)}
security.passwords.update(argon2__memory_cost=8, argon2__time_cost=1)
database.PRAGMAS["synchronous"] = "OFF"
PASSWORD_HASH = security.passwords.hash(PASSWORD)
auth.UNKNOWN_USER.password_hash = security.passwords.hash("as for any other account")


@pytest.fixture
def as_in_production(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hash passwords and open files as servers do. Ask for it before `client`."""
    monkeypatch.setattr(database, "PRAGMAS", PRODUCTION["pragmas"])
    quick = security.passwords.to_dict()
    security.passwords.load(PRODUCTION["passwords"])
    yield
    security.passwords.load(quick)


@pytest.fixture(scope="session")
def first_start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database file as the first start leaves it: migrating it anew for each test would take most of the time."""
    file = tmp_path_factory.mktemp("first") / "books.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, "database_url", url_of(file))
        with TestClient(app):
            pass
    return file


def two_services(first_start: Path) -> tuple[Path, Path]:
    """Two databases of their own, for an example of a property."""
    folder = Path(tempfile.mkdtemp(dir=first_start.parent))
    one, other = folder / "one.db", folder / "other.db"
    copy_of(first_start, one)
    copy_of(first_start, other)
    return one, other


def use(url: str, patch: pytest.MonkeyPatch) -> None:
    """Let the service of this process have its data there, without limits and recurring work."""
    patch.setattr(settings, "database_url", url)
    patch.setattr(settings, "rate_limits", False)  # but for the tests that are about them
    # What recurs comes when it likes, also between two lines of a test. Who wants it asks for `recurring_work`.
    patch.setattr(main, "recurring_jobs", nullcontext)
    main.probes.clear()


@contextmanager
def service(file: Path) -> Iterator[Person]:
    with pytest.MonkeyPatch.context() as patch:
        use(url_of(file), patch)
        with TestClient(app) as client:
            yield Person(client, "admin", "admin")


@pytest.fixture
def client(first_start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    """A visitor, who has no account, of a service with an empty catalogue."""
    use(copy_of(first_start, tmp_path / "books.db"), monkeypatch)
    with TestClient(app) as visitor:
        yield visitor


class Recorded(NamedTuple):
    type: str
    data: dict[str, Any]
    owner: int | None
    private: bool


@functools.cache
def event_validators() -> dict[str, Callable[[dict[str, Any]], Iterator[Any]]]:
    jsonschema = importlib.import_module("jsonschema_rs")
    components = app.openapi()["components"]
    schemas = components["schemas"]
    return {
        event_type: jsonschema.Draft202012Validator(
            # All fields are required, and nothing else is sent.
            {**schemas[schema["$ref"].rpartition("/")[2]], "unevaluatedProperties": False, "components": components},
            validate_formats=True,
        ).iter_errors
        for event_type, schema in schemas["EventData"]["properties"].items()
    }


@pytest.fixture(autouse=True)
def recorded_events(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Recorded]]:
    """The events that this process records. Each must be as its schema says, where the validator is installed."""
    recorded: list[Recorded] = []
    record = events.record

    def record_and_keep(
        session: Session,
        event_type: str,
        data: dict[str, Any],
        owner: int | None = None,
        *,
        private: bool | None = None,
    ) -> None:
        record(session, event_type, data, owner, private=private)
        # Tests also record what suits them, by themselves or by `write`.
        if not sys._getframe(1).f_globals["__name__"].startswith(("test", "database")):
            stored = json.loads(json.dumps(data))
            recorded.append(Recorded(event_type, stored, owner, owner is not None if private is None else private))

    monkeypatch.setattr(events, "record", record_and_keep)
    yield recorded
    if recorded and importlib.util.find_spec("jsonschema_rs"):
        errors = [(one, str(error)) for one in recorded for error in event_validators()[one.type](one.data)]
        assert errors == []


def recurring_work(client: httpx.Client, running: Any = main.recurring_jobs) -> AbstractContextManager[None]:
    assert isinstance(client, TestClient)
    assert client.portal is not None
    return client.portal.wrap_async_context_manager(running())


@pytest.fixture
def admin(client: TestClient) -> Person:
    return Person(client, "admin", tokens=database.write_sync(lambda session: sign_in(session, 1)))


@pytest.fixture
def reader(client: TestClient) -> Person:
    return make(client, "Rita")


@pytest.fixture
def other_reader(client: TestClient) -> Person:
    return make(client, "Oskar")


@pytest.fixture
def librarian(client: TestClient) -> Person:
    return make(client, "Lydia", models.Role.librarian)


@pytest.fixture
def mailbox(monkeypatch: pytest.MonkeyPatch) -> list[Email]:
    """All that is mailed, whoever it is to."""
    letters: list[Email] = []

    async def keep(letter: Email) -> None:
        letters.append(letter)

    monkeypatch.setattr(accounts, "send", keep)
    return letters


def token_in(letter: Email) -> str:
    """Of the link that a letter holds."""
    return str(re.findall(r"/auth/verify-email/([\w-]+)", letter.text)[0])


def code_in(letter: Email) -> str:
    return str(re.findall(r"^ +(\d{6})\s*$", letter.text, re.MULTILINE)[0])


def make(client: httpx.Client, username: str, role: models.Role = models.Role.reader) -> Person:
    """Somebody who signed up, and in, before the test began."""
    new = schemas.UserCreate(username=username, email=f"{username}@example.com", password=PASSWORD)

    def sign_up_and_in(session: Session) -> dict[str, Any]:
        user = models.User(**new.model_dump(exclude={"password"}), password_hash=PASSWORD_HASH, role=role)
        session.add(user)
        session.flush()
        return sign_in(session, user.id)

    return Person(client, username, tokens=database.write_sync(sign_up_and_in))


def sign_in(session: Session, user_id: int) -> dict[str, Any]:
    """The tokens of a new login, without the time that a password takes."""
    user = session.get_one(models.User, user_id)
    device = {"address": "testclient", "user_agent": None}
    pair = auth.start_session(session, user_id, user.password_hash, device, None)
    assert pair is not None
    return pair.model_dump()


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
    monkeypatch.setattr(models, "utcnow", frozen.read)
    return frozen


# --- other catalogues ---------------------------------------------------------------------------------------------


Fault = Callable[[BaseHTTPRequestHandler], None]


class Catalogues:
    """Google Books, Open Library and its covers on one port: some of their answers, and faults that a test wants."""

    def __init__(self) -> None:
        files = DATA
        self.volumes: list[Any] = json.loads((files / "google_volumes.json").read_text())
        self.works: list[Any] = json.loads((files / "open_library_works.json").read_text())
        self.editions: list[Any] = json.loads((files / "open_library_editions.json").read_text())
        self.covers: dict[str, bytes] = {}  # by ISBN
        self.requests: list[str] = []
        self.agents: set[str] = set()
        self.faults: list[Fault] = []  # of the next answers, in turn
        self.always: Fault | None = None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests.append(self.path)
                outer.agents.add(self.headers["User-Agent"])
                fault = outer.faults.pop(0) if outer.faults else outer.always
                with suppress(ConnectionError):  # who asked has gone away
                    if fault is not None:
                        fault(self)
                    else:
                        send(self, outer.answer(self.path))

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.005}, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, path: str) -> Any:
        """As the real ones do; None for 404."""
        place, query = urlsplit(path).path, {k: v[0] for k, v in parse_qs(urlsplit(path).query).items()}
        if place == "/volumes":
            wanted = query["q"].removeprefix("isbn:").lower()
            found = [volume for volume in self.volumes if wanted in json.dumps(volume).lower()]
            start, most = int(query["startIndex"]), int(query["maxResults"])
            page = {"items": found[start : start + most]} if found[start:] else {}
            return {"kind": "books#volumes", "totalItems": len(found), **page}
        if place.startswith("/volumes/"):
            return next((volume for volume in self.volumes if volume["id"] == place.split("/")[-1]), None)
        if place == "/search.json":
            wanted = query["q"].removeprefix("key:").lower()
            works = [work for work in self.works if wanted in json.dumps(work).lower()]
            start = int(query.get("offset", 0))
            docs = works[start : start + int(query["limit"])]
            return {"numFound": len(works), "start": start, "numFoundExact": True, "docs": docs}
        if place == "/api/books":
            assert (query["format"], query["jscmd"]) == ("json", "data")
            keys = query["bibkeys"].split(",")
            return {key: edition for key in keys for edition in self.editions if is_named(edition, key)}
        return self.covers.get(place.removeprefix("/b/isbn/").removesuffix("-M.jpg"))


def is_named(edition: dict[str, Any], bibkey: str) -> bool:
    kind, _, value = bibkey.partition(":")
    return value in (edition["identifiers"]["isbn_13"] if kind == "ISBN" else [edition["key"].split("/")[-1]])


def send(handler: BaseHTTPRequestHandler, answer: Any, status: int = 200, **headers: str) -> None:
    body = answer if isinstance(answer, bytes) else json.dumps({"error": {}} if answer is None else answer).encode()
    handler.send_response(404 if answer is None else status)
    for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


@pytest.fixture(autouse=True)
def nobody_asks_the_real_catalogues(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "google_books_url", NOWHERE)
    monkeypatch.setattr(settings, "open_library_url", NOWHERE)
    monkeypatch.setattr(settings, "covers_url", NOWHERE)
    external.cache.clear()
    covers.faults.clear()
    covers.fetches.clear()
    monkeypatch.setattr(covers, "slots", asyncio.Semaphore(6))  # of the event loop that waited for it
    for name in ("CLIENT_POLICY", "JOB_POLICY"):
        monkeypatch.setattr(external, name, getattr(external, name)._replace(pause=0.01))


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch, nobody_asks_the_real_catalogues: None) -> Iterator[Catalogues]:
    """Other catalogues, to which the settings point."""
    started = Catalogues()
    monkeypatch.setattr(settings, "google_books_url", started.url)
    monkeypatch.setattr(settings, "open_library_url", started.url)
    monkeypatch.setattr(settings, "covers_url", started.url)
    yield started
    started.close()


# --- behind a socket ----------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Server:
    """A real uvicorn on a database file, started as the README says."""

    def __init__(self, file: Path, *options: str, app: str = "main:app", **environment: str) -> None:
        self.file, self.options, self.app, self.environment = file, options, app, environment
        self.log = file.with_suffix(f".{time.monotonic_ns()}.log")
        self.start()

    def start(self, port: int | None = None) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        limits = {"RATE_LIMITS": "false"}  # but for the tests that are about them
        nowhere = {"GOOGLE_BOOKS_URL": NOWHERE, "OPEN_LIBRARY_URL": NOWHERE, "COVERS_URL": NOWHERE}
        database_url = {"DATABASE_URL": url_of(self.file)}
        patience = {"UVICORN_TIMEOUT_WORKER_HEALTHCHECK": "60"}  # other tests keep the machine busy
        environment = {**os.environ, **database_url, **limits, **nowhere, **patience, **self.environment}
        command = [sys.executable, "-m", "uvicorn", self.app, "--port", str(self.port), *self.options]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        self.client = httpx.Client(base_url=self.url, timeout=30)
        try:
            wait_for(self._up, seconds=120)
        except AssertionError:
            raise AssertionError(f"the server did not start: {self.log.read_text()[-5000:]}") from None

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
def server(serve: Callable[..., Server], first_start: Path, tmp_path: Path) -> Server:
    copy_of(first_start, tmp_path / "books.db")
    return serve()


def resident_mb(pid: int, kind: str = "VmRSS") -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith(kind))) / 1024
