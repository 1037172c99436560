"""Starting the service other than as the README's first command does: by uv, by FastAPI's command, on Windows."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2 as httpx
import pytest

from settings import Settings, check_database_url
from tests.fixtures import DUNE, ROOT, Person, free_port, wait_for


@contextmanager
def started(command: list[str], folder: Path, port: int, **environment: str) -> Iterator[httpx.Client]:
    log = folder.with_name("start.log")
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **environment}, stdout=file, stderr=file, start_new_session=True
        )

    def is_up() -> bool | None:
        assert process.poll() is None, log.read_text()
        try:
            return client.get("/health").status_code == 200 or None
        except httpx.TransportError:
            return None

    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            wait_for(is_up, seconds=180)
            yield client
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(timeout=30)
    assert "Traceback" not in log.read_text()


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What git has of the working folder, committed or not."""
    folder = tmp_path / "clone"
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in names:
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    subprocess.run("git init -q && git add -A", cwd=folder, shell=True, check=True)
    return folder


@pytest.mark.slow
@pytest.mark.sqlite
def test_uv_starts_the_service_from_a_clone(clone: Path) -> None:
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert uv, "install tests/requirements.txt"
    environment = {"DATABASE_URL": f"sqlite:///{clone.parent}/books.db", "UV_SYSTEM_CERTS": "true"}
    for command in (["uvicorn", "main:app"], ["fastapi", "dev"]):
        port = free_port()
        with started(
            [uv, "run", "--python", sys.executable, *command, f"--port={port}"], clone, port, **environment
        ) as client:
            assert client.get("/books").json()["total"] == 0
    unknown = subprocess.run(["git", "status", "--porcelain"], cwd=clone, capture_output=True, text=True, check=True)
    assert [line for line in unknown.stdout.splitlines() if not line.startswith("A ")] == []


# Before `main` is imported, all packages are, which would look for what else Windows has and Linux has not. The locale
# has an encoding in which a file that is read without naming UTF-8 can't be.
WINDOWS = """
import asyncio, contextlib, importlib, locale, os, sys
for name in ("fcntl", "resource", "uvloop", "pwd", "grp", "termios"):
    sys.modules[name] = None
for package in sys.argv[2:]:
    importlib.import_module(package)
for name in ("fork", "geteuid", "getuid", "chown", "mkfifo", "setsid", "killpg", "statvfs"):
    delattr(os, name)
assert locale.getpreferredencoding(False) == "ANSI_X3.4-1968"
sys.platform = "win32"
import uvicorn
with contextlib.suppress(KeyboardInterrupt):
    asyncio.run(uvicorn.Server(uvicorn.Config("main:app", port=int(sys.argv[1]))).serve())
"""
PACKAGES = (
    *("alembic.command", "alembic.config", "cachetools", "fastapi", "fastapi_offline", "httpx2", "jose", "limits.aio"),
    *("passlib.hash", "pydantic_settings", "python_multipart", "sqlmodel", "sse_starlette", "stdnum.isbn"),
    *("uvicorn.protocols.http.httptools_impl", "uvicorn.lifespan.on", "uvicorn.loops.asyncio"),
)


@pytest.mark.slow
@pytest.mark.sqlite
def test_it_works_without_the_modules_that_windows_lacks(tmp_path: Path) -> None:
    port = free_port()
    ascii_locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    environment = {"DATABASE_URL": f"sqlite:///{tmp_path}/books.db", "PYTHONPATH": str(ROOT), **ascii_locale}
    command = [sys.executable, "-c", WINDOWS, str(port), *PACKAGES]
    (folder := tmp_path / "work").mkdir()
    with started(command, folder, port, **environment) as client:
        admin = Person(client, "admin", "admin")
        assert admin.add_book(**{**DUNE, "title": "Düne"})["title"] == "Düne"
        uploaded = admin.upload((ROOT / "static" / "sample_books.csv").read_bytes())
        assert (uploaded["status"], uploaded["inserted"]) == ("completed", 50)
        assert client.get("/books", params={"search": "dune"}).json()["total"] == 1
        assert "Books" in client.get("/").text
        assert client.get("/stream", params={"limit": 1, "seconds": 1}).text.startswith("event: ready")


def test_the_container_files_agree_with_the_service() -> None:
    dockerfile, compose = (ROOT / "Dockerfile").read_text(), (ROOT / "compose.yaml").read_text()
    version = (ROOT / ".python-version").read_text().strip()
    assert re.findall(r"^ARG BASE=.*:(.*)-slim$", dockerfile, re.MULTILINE) == [version]
    assert "sqlite:////data/books.db" in re.findall(r"^ENV DATABASE_URL=(.*)$", dockerfile, re.MULTILINE)
    assert "${DATABASE_URL:-sqlite:////data/books.db}" in compose
    assert "127.0.0.1:8000:8000" in compose, "development mode is for this machine only"
    # `migrations.copy` does not wait for a server that starts.
    assert "postgresql:\n        condition: service_healthy\n        required: false" in compose
    assert "test: [CMD, pg_isready," in compose
    copied = {name for line in re.findall(r"^COPY (?!--)(.*) \S+$", dockerfile, re.MULTILINE) for name in line.split()}
    assert copied == {"requirements.txt", "LICENSE", "*.py", "migrations", "static"}, "no .env, no books.db"


def test_the_documented_settings_of_compose_are_valid() -> None:
    documented = (ROOT / "docs" / "deploying.md").read_text().partition("COMPOSE_PROFILES=")[2].partition("```")[0]
    values = dict(line.split("=", 1) for line in documented.splitlines()[1:])
    assert check_database_url(values["DATABASE_URL"]).endswith(
        f"//books:{values['POSTGRES_PASSWORD']}@postgresql/books"
    )
    assert {name.lower() for name in values} - {"postgres_password"} <= set(Settings.model_fields)
