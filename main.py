"""Books API: a small library service. This module assembles the app. Reading order of the modules:

    settings.py    settings and their validation
    models.py      tables, columns, constraints, and rules on single rows
    database.py    SQLite: engine, transactions, compiled statements, migrations, constraint violations
    postgresql.py  the same interface on PostgreSQL
    schemas.py     request and response models, validated field types
    pagination.py  lists: rows as JSON, cursors, offsets, Link headers
    security.py    password hashing, JWTs, the current user, roles, rate limits, the first admin
    csv_files.py   CSV: encoding, dialect, records, cells, known formats
    api.py         what routes share: problem documents, Router, FastRoute, RequestMiddleware
    events.py      the change log, /events and /stream
    auth.py        /login, /auth/refresh, /auth/sessions
    accounts.py    registration, confirming addresses, passwords, mail
    search.py      full-text search: FTS5 and tsvector
    books.py       the catalogue and its export
    library.py     /my-library, its export, statistics, reviews
    loans.py       stock and /loans
    external.py    Google Books and Open Library
    covers.py      /books/{id}/cover: pictures from Open Library, fetched once
    users.py       /users: profile, account export, administration
    imports.py     cells to rows, rows into the catalogue and onto a shelf, duplicates
    uploads.py     /books/upload, /my-library/import, the import job, refused rows

A request passes `api.RequestMiddleware` and reaches its route, which depends on `security.get_principal` if it needs a
user. The route makes one read or one transaction through `database` and answers; the transaction first verifies the
user again (`security.authorized`), and records what it changed as events. Every error becomes a problem document in one
of the handlers in `api`.

Routes use two verbs. `database.read` gives a function a connection with one snapshot; `database.write` gives it a
session, and commits what it changed with its events, or nothing. On SQLite both run on the event loop, where a switch
to a thread would take longer than finding a book: a read that exceeds its budget is run again in a thread, and changes
that are made at the same time share a transaction, each in a savepoint of its own. On PostgreSQL both run in threads.
One transaction writes at a time on either: what it reads stays as it is until its commit, no row needs a lock of its
own, and ids are committed in their order. Jobs, exports and changes that take long run in threads, with `read_sync`
and `write_sync`.
"""

import asyncio
import contextlib
import gc
import hashlib
import html
import json
import logging
import os
import re
import sqlite3
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

import anyio.to_thread
import fastapi_offline
from cachetools import TTLCache
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field
from sqlalchemy.exc import DBAPIError, OperationalError
from starlette.middleware.cors import CORSMiddleware
from starlette.staticfiles import StaticFiles

import accounts
import api
import auth
import books
import covers
import database
import events
import external
import library
import loans
import models
import pagination
import security
import uploads
import users
from api import HANDLERS, Conflict, RequestMiddleware, Router, errors, or_404
from migrations.sample import add_sample
from models import claim_job
from settings import STATIC, VERSION, settings

if sys.platform != "win32":
    import resource

log = logging.getLogger("books")
router = Router(tags=["Service"])

# --- logging and limits of the process ----------------------------------------------------------------------------

MAX_OPEN_FILES = 65_536  # each connection is one; the usual soft limit is 1,024


def configure_logging() -> None:
    # Not in our format, so not to be looked up for each line (Python's logging HOWTO, "Optimization").
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    if not log.handlers:
        handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
        if settings.log_file is not None:  # shared by all workers
            import concurrent_log_handler as shared  # noqa: PLC0415  # 5 MB of memory, which few need

            handlers.append(shared.ConcurrentRotatingFileHandler(settings.log_file, maxBytes=10 << 20, backupCount=5))
        for handler in handlers:
            handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
            log.addHandler(handler)
    log.setLevel(settings.log_level)
    # Our access log has more. Without handlers, uvicorn does not even format its own.
    uvicorn_access = logging.getLogger("uvicorn.access")
    uvicorn_access.handlers.clear()
    uvicorn_access.propagate = False


def raise_file_limit() -> None:
    if sys.platform != "win32":
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        limit = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(MAX_OPEN_FILES, hard)
        if soft != resource.RLIM_INFINITY and soft < limit:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


# --- recurring jobs -----------------------------------------------------------------------------------------------

RESUME_INTERVAL = 5  # seconds between looks for uploads without a worker, and for deleted accounts
PAUSE = 0.01  # seconds between two batches, for other writers


@contextlib.asynccontextmanager
async def recurring_jobs() -> AsyncIterator[None]:
    async with anyio.create_task_group() as jobs:
        jobs.start_soon(run_every, 1, database.checkpoint_wal)
        for enrich in (False, True):  # go on with the uploads of processes that were stopped or killed
            jobs.start_soon(run_every, RESUME_INTERVAL, uploads.import_waiting, enrich)
        jobs.start_soon(run_every, RESUME_INTERVAL, delete_accounts)
        jobs.start_soon(run_every, 60, prune_events)
        jobs.start_soon(run_every, 600, sweep_logins)
        jobs.start_soon(run_every, external.HARVEST_POLL_INTERVAL, external.harvest)
        yield
        jobs.cancel_scope.cancel()


async def run_every(seconds: float, job: Callable[..., Awaitable[None]], *args: Any) -> None:
    while True:
        try:
            await job(*args)
        except Exception as error:  # must not stop the service; a full disk or a locked file may be temporary
            log.error("%s failed: %s", job.__name__, error, exc_info=not isinstance(error, OperationalError))
        await anyio.sleep(seconds)


async def run_batches(delete: Callable[..., bool], *args: Any) -> None:
    """Each call deletes a batch, and says whether more is left to delete."""
    while await anyio.to_thread.run_sync(database.write_sync, delete, *args):  # noqa: ASYNC110  # no event to wait for
        await anyio.sleep(PAUSE)


async def delete_accounts() -> None:
    """Go on with the accounts that were too large for one transaction. Several workers may do so at once."""
    for user_id in await database.read(users.deleted_accounts):
        await run_batches(users.delete_batch, user_id)


async def prune_events() -> None:
    if await database.write(claim_job, "pruning", timedelta(seconds=50)):
        await run_batches(events.prune)


async def sweep_logins() -> None:
    if await database.write(claim_job, "sweep", timedelta(minutes=55)):
        await run_batches(auth.delete_expired)


# --- health -------------------------------------------------------------------------------------------------------

# The last write that succeeded: frequent requests must not keep the disk busy, or other writers waiting.
probes: TTLCache[str, bool, float] = TTLCache(1, 5)


class Health(BaseModel):
    status: str = Field(examples=["ok"])
    version: str = Field(examples=[VERSION])
    database: str = Field(examples=["sqlite"])


@router.get("/health")
async def health() -> Health:
    """Check whether the database can be read, and every five seconds written: 200, or 503 with what is wrong."""
    verb = "read"
    try:
        await database.read(pagination.last_event_id)
        verb = "written"
        if "probe" not in probes:
            await database.write(models.schedule_job, "probe", timedelta())
            probes["probe"] = True
    except DBAPIError as error:
        log.error("the database can't be %s: %s", verb, error.orig)
        raise HTTPException(503, f"The database can't be {verb}.", {"Retry-After": "5"}) from None
    return Health(status="ok", version=VERSION, database=database.backend().kind)


# --- backup -------------------------------------------------------------------------------------------------------


BACKUP = errors(403, 409, 507) | {
    200: {"content": {"application/vnd.sqlite3": {"schema": {"type": "string", "format": "binary"}}}}
}


@router.get("/admin/backup", response_class=StreamingResponse, responses=BACKUP)
async def back_up(admin: security.Admin) -> StreamingResponse:
    """Download a consistent copy of the SQLite file, while writes go on. On PostgreSQL 409: use `pg_dump`."""
    backend = database.backend()
    if not isinstance(backend, database.Sqlite):
        raise Conflict("no_sqlite_file", "This service keeps its data in PostgreSQL: back it up with pg_dump.")
    try:
        copy = await anyio.to_thread.run_sync(open_copy, str(backend.engine.url.database))
    except OSError as error:
        log.error("can't write a copy: %s", error)
        raise HTTPException(507, "The disk is full, or can't be written: this needs room for a file.") from None
    name = {"Content-Disposition": f'attachment; filename="books-{models.utcnow():%Y%m%d-%H%M%S}.db"'}
    headers = name | {"Content-Length": str(os.fstat(copy.fileno()).st_size)}
    return StreamingResponse(read_copy(copy), media_type="application/vnd.sqlite3", headers=headers)


def open_copy(file: str) -> BinaryIO:
    """A consistent copy beside the file, without a write-ahead log. It is unlinked, so that nothing is left if the
    process is killed."""
    with tempfile.NamedTemporaryFile(prefix="books-backup-", dir=Path(file).parent) as new:
        with contextlib.closing(sqlite3.connect(file)) as live, contextlib.closing(sqlite3.connect(new.name)) as copy:
            live.backup(copy)
            copy.execute("PRAGMA journal_mode=DELETE")
        return open(new.name, "rb")  # closed in `read_copy`


def read_copy(copy: BinaryIO) -> Iterator[bytes]:
    with copy:
        yield from iter(lambda: copy.read(1 << 20), b"")


# --- lifespan -----------------------------------------------------------------------------------------------------


START_TIMEOUT = 60  # seconds that a start waits for its database


async def when_available(step: Callable[..., Any], *args: Any) -> Any:
    """Do a step of the start, once the database is there: uvicorn ends all workers if one of them fails to start."""
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        try:
            return step(*args)
        except OperationalError as error:
            if time.monotonic() > deadline or database.server_is_stopping():
                raise
            log.warning("waiting for the database: %s", error.orig)
            await asyncio.sleep(1)


@contextlib.asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    """Open the database, start the event tail and the recurring jobs; stop them in reverse.

    At SIGTERM, sse-starlette sets `events.tail.closing` and streams end; a running import releases its upload after the
    present batch, and retries of mails are dropped. uvicorn waits for requests and background tasks, at most for its
    `--timeout-graceful-shutdown`, and then shuts down the lifespan. Uploads that are left over go on at the next start.
    """
    configure_logging()
    raise_file_limit()
    # sqlite3 releases the GIL on every call; a busy thread then keeps it for one switch interval. With Python's 5 ms, a
    # read of a book beside an import took 90 ms.
    sys.setswitchinterval(0.0005)
    gc.freeze()  # a full collection took 50 ms
    await when_available(database.open_database, settings.database_url)
    try:
        last_event_id = await when_available(database.write_sync, events.continue_ids)
        if settings.sample:
            await when_available(database.write_sync, add_sample)
        await when_available(database.write_sync, security.prepare)
        security.open_rate_limits()
        events.tail = events.EventTail(start=last_event_id, last_event_id=last_event_id)
        async with events.tail.running(), recurring_jobs():
            yield
    finally:
        await database.close_database()


# --- the front page -----------------------------------------------------------------------------------------------

FRONT_PAGE = (STATIC / "index.html").read_text("utf-8")
if settings.makes_admin_admin:
    FRONT_PAGE = FRONT_PAGE.replace("<body", '<body data-hint="In development mode: admin / admin."', 1)
if not settings.public_catalogue:
    FRONT_PAGE = FRONT_PAGE.replace("<body", "<body data-private", 1)


def render_page(request: Request, page: str, if_none_match: str | None) -> Response:
    """The page, which browsers revalidate each time. Its addresses do not depend on its own."""
    root = html.escape(request.scope.get("root_path", "").rstrip("/"))
    page = page.replace("<head>", f'<head>\n<base href="{root}/">', 1)
    headers = {"ETag": f'"{hashlib.sha256(page.encode()).hexdigest()[:32]}"', "Cache-Control": "no-cache"}
    return books.conditional_response(page, "text/html", headers, if_none_match)


# --- Redoc --------------------------------------------------------------------------------------------------------

REDOC = Path(fastapi_offline.__file__).parent / "static" / "redoc.standalone.js"


@router.get("/static-offline-docs/redoc.standalone.js", include_in_schema=False)
def redoc() -> Response:
    """Redoc without its logo, which is on another host: browsers report that the policy forbids it."""
    script = REDOC.read_text("utf-8").replace("https://cdn.redoc.ly/redoc/logo-mini.svg", "data:,")
    return Response(script, media_type="text/javascript")


# --- the app ------------------------------------------------------------------------------------------------------

TAGS = {
    "Catalogue": "Books: find, add and change them; genres, reviews.",
    "My library": "My shelf: what I want to read, am reading and have read, with my ratings and reviews.",
    "Lending": "Copies of a book, who has them, and until when.",
    "In and out": "Import and export of books and shelves, and books of other catalogues.",
    "Changes": "Every committed change: as a stream, or as a log to poll.",
    "Accounts": "Sign up, in and out, confirm an address, reset a password. Start with `POST /login`.",
    "Users": "My account and all that is stored about me; for admins, all accounts.",
    "Service": "Health, and a copy of the database.",
}
app = fastapi_offline.FastAPIOffline(
    title="Books API",
    version=VERSION,
    summary="A catalogue, personal shelves with reviews, a lending desk, CSV import, and a live feed of every change.",
    description="Sign in with **Authorize**; in development mode as `admin` / `admin`. Errors are "
    "[problem documents](https://www.rfc-editor.org/rfc/rfc9457).",
    lifespan=lifespan,
    exception_handlers=HANDLERS,
    openapi_tags=[{"name": name, "description": text} for name, text in TAGS.items()],
    servers=[{"url": "/"}],
    license_info={"name": "MIT", "identifier": "MIT"},
    swagger_ui_parameters={"persistAuthorization": True},
    redirect_slashes=False,
    telemetry={"tracing": False, "metrics": False, "logs": False},  # OpenTelemetry's providers: 5 % of a small request
)
if settings.cors_origins:
    app.add_middleware(
        CORSMiddleware,
        allow_origins=settings.cors_origins,
        allow_methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
        allow_headers=["Authorization", "Idempotency-Key", "If-Match", "If-None-Match", "Last-Event-ID"],
        expose_headers=["ETag", "Link", "Location", "Retry-After", "X-Event-Cursor", "X-Request-ID"],
    )
app.add_middleware(RequestMiddleware)  # outermost, so that its headers are on errors of the others, too
NOUNS = (books, covers, library, auth, accounts, users, uploads, external, loans, events)
# The most frequent first, even before /docs: Starlette tries routes in turn.
ROUTERS = (books.fast, library.fast, *(noun.router for noun in NOUNS), library.reviews_router, books.exports, router)
app.router.routes[:0] = [route for each in ROUTERS for route in each.routes]
# Within CORS and the error handlers, unlike `add_middleware`: its errors are problem documents with CORS headers.
app.router.middleware_stack = api.checked(app.router.middleware_stack)


plain_openapi = app.openapi


def openapi() -> dict[str, Any]:
    if app.openapi_schema is None:
        api.complete_openapi(plain_openapi())
    return plain_openapi()


app.openapi = openapi  # type: ignore[method-assign]  # FastAPI docs, "Extending OpenAPI"


@app.get("/", include_in_schema=False)
async def front_page(request: Request, if_none_match: books.IfNoneMatch = None) -> Response:
    return render_page(request, FRONT_PAGE, if_none_match)


@app.get("/b/{book_id:id}", include_in_schema=False)
async def book_page(request: Request, book_id: books.BookId, if_none_match: books.IfNoneMatch = None) -> Response:
    """The front page with the tags that previews of links show (https://ogp.me). It opens the book of `data-book`."""
    page = FRONT_PAGE.replace("<html ", f'<html data-book="{book_id}" ', 1)
    if not settings.public_catalogue:
        return render_page(request, page, if_none_match)
    text, _ = or_404(await database.read(books.FIND_BOOK.first, {"book_id": book_id}), books.NO_BOOK)
    book, address = json.loads(text), str(request.base_url)
    description = book["description"] or f"A book by {book['author']}."
    tags = {"type": "book", "title": book["title"], "description": description[:300], "url": f"{address}b/{book_id}"}
    if book["isbn"] is not None:
        tags["image"] = f"{address}books/{book_id}/cover?v={book['isbn']}"
    head = f"<title>{html.escape(book['title'])}</title>"
    head += "".join(f'\n<meta property="og:{name}" content="{html.escape(tag)}">' for name, tag in tags.items())
    return render_page(request, re.sub("<title>.*</title>", lambda _: head, page, count=1), if_none_match)


app.mount("/static", StaticFiles(directory=STATIC), name="static")
