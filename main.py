"""TOUR"""

import asyncio
import contextlib
import gc
import hashlib
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import anyio
import anyio.to_thread
from fastapi import FastAPI, Header, HTTPException, Response
from fastapi.responses import HTMLResponse, StreamingResponse
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlmodel import Session
from starlette.middleware.cors import CORSMiddleware
from starlette.staticfiles import StaticFiles

import api
import auth
import books
import database
import events
import external
import imports
import library
import loans
import models
import pagination
import security
import uploads
import users
from api import HANDLERS, TAGS, RequestMiddleware, Router, disk_full, errors
from database import Sqlite
from models import Setting, claim_job
from security import Admin
from settings import STATIC, VERSION, settings

if sys.platform != "win32":
    import resource

log = logging.getLogger("books")
router = Router(tags=["Service"])

# --- the log ------------------------------------------------------------------------------------------------------


def configure_logging() -> None:
    # What our lines do not tell need not be found out for each of them (as Python's logging HOWTO has it).
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    if not log.handlers:
        handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
        if settings.log_file is not None:  # by several workers, which take writer_queue to begin a new file
            from concurrent_log_handler import (  # noqa: PLC0415  # 5 MB of memory, which few need
                ConcurrentRotatingFileHandler,
            )

            handlers.append(ConcurrentRotatingFileHandler(settings.log_file, maxBytes=10 << 20, backupCount=5))
        for handler in handlers:
            handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
            log.addHandler(handler)
    log.setLevel(settings.log_level)
    # Our own line per request says more. Without handlers uvicorn doesn't even format its own.
    uvicorn_access = logging.getLogger("uvicorn.access")
    uvicorn_access.handlers.clear()
    uvicorn_access.propagate = False


# --- room for many ------------------------------------------------------------------------------------------------


def allow_many_connections() -> None:
    """Each is an open file, streams and clients that are slow to say what they want among them. The usual limit for a
    start, 1,024, is a fraction of what one process can hold."""
    if sys.platform != "win32":
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = CONNECTIONS if hard == resource.RLIM_INFINITY else min(CONNECTIONS, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


# --- work that recurs ---------------------------------------------------------------------------------------------

CONNECTIONS = 65_536
RESUME_SECONDS = 5  # between two looks for uploads that nobody is at


@contextlib.asynccontextmanager
async def recurring_jobs() -> AsyncIterator[None]:
    async with anyio.create_task_group() as jobs:
        jobs.start_soon(run_every, 1, database.checkpoint_wal)
        jobs.start_soon(run_every, RESUME_SECONDS, resume_uploads)
        jobs.start_soon(run_every, 60, prune_events)
        jobs.start_soon(run_every, 600, sweep_logins)
        if settings.harvest_query is not None:
            jobs.start_soon(run_every, external.HARVEST_POLL_INTERVAL, external.harvest)
        try:
            yield
        finally:
            jobs.cancel_scope.cancel()


async def run_every(seconds: float, work: Callable[[], Awaitable[None]]) -> None:
    while True:
        try:
            await work()
        except OperationalError as error:  # a full disk, a locked file: it may be better in a while
            log.error("%s: %s", work.__name__, error)
        except Exception:
            # Whatever it is, it must not take the service with it.
            log.exception("%s failed", work.__name__)
        await anyio.sleep(seconds)


async def resume_uploads() -> None:
    """Take up the uploads of processes that died, this one's earlier life included."""
    for upload_id in await database.read_in_thread(imports.abandoned_uploads):
        await database.run_job(imports.run_upload, upload_id)


async def prune_events() -> None:
    if await database.write(claim_job, "pruning", timedelta(seconds=50)):
        while await database.write(events.prune):  # noqa: ASYNC110  # there is nothing to wait for
            await anyio.sleep(0.05)  # others write, too


async def sweep_logins() -> None:
    if await database.write(claim_job, "sweep", timedelta(minutes=55)):
        await database.write(auth.delete_expired)


# --- is it well? --------------------------------------------------------------------------------------------------

PROBE_TIMEOUT = 15  # longer than a writer waits for others
PROBE_SECONDS = 5  # how long the answer is taken to be true: asking must not be a way to keep the disk busy


class _Probe:
    at = float("-inf")
    running: asyncio.Task[None] | None = None


class Health(BaseModel):
    status: str
    version: str
    database: str


@router.get("/health")
async def health() -> Health:
    """Whether the service can read and write its database: 200, or 503 with what is wrong."""
    try:
        await database.read(pagination.last_event_id)
    except DBAPIError as error:
        raise _unwell("read", error.orig) from None
    if time.monotonic() - _Probe.at > PROBE_SECONDS:
        # One for all that ask; and whoever holds the lock, the answer must come.
        if _Probe.running is None or _Probe.running.done():
            _Probe.running = asyncio.create_task(database.write(_probe))
        probe = _Probe.running
        done, _ = await asyncio.wait([probe], timeout=PROBE_TIMEOUT)
        if not done:
            raise _unwell("written", TimeoutError(f"for {PROBE_TIMEOUT} s somebody else has been writing"))
        try:
            probe.result()
        except DBAPIError as error:
            raise _unwell("written", error.orig) from None
        _Probe.at = time.monotonic()
    return Health(status="ok", version=VERSION, database=database.backend().kind)


def _probe(session: Session) -> None:
    session.merge(Setting(key="probed", value=models.utcnow().isoformat()))


def _unwell(what: str, error: BaseException | None) -> HTTPException:
    log.error("the database can't be %s: %s", what, error)
    return HTTPException(503, f"The database can't be {what}.", {"Retry-After": "5"})


# --- backup -------------------------------------------------------------------------------------------------------


BACKUP = errors(403, 409, 507) | {
    200: {"content": {"application/vnd.sqlite3": {"schema": {"type": "string", "format": "binary"}}}}
}


@router.get("/admin/backup", response_class=StreamingResponse, responses=BACKUP)
async def back_up(admin: Admin) -> StreamingResponse:
    """A copy of the SQLite file as of one moment, while writes go on. On PostgreSQL 409: use `pg_dump`."""
    where = database.backend()
    if not isinstance(where, Sqlite):
        raise HTTPException(409, "This service keeps its data in PostgreSQL: back it up with pg_dump.")
    try:
        copy = await anyio.to_thread.run_sync(_copy, str(where.engine.url.database))
    except OSError as error:
        raise disk_full(error) from None
    name = f"books-{models.utcnow():%Y%m%d-%H%M%S}.db"
    headers = {
        "Content-Disposition": f'attachment; filename="{name}"',
        "Content-Length": str(os.fstat(copy.fileno()).st_size),
    }
    return StreamingResponse(_pieces(copy), media_type="application/vnd.sqlite3", headers=headers)


def _copy(file: str) -> BinaryIO:
    """Beside the file, where there is room for it; without a name, so that nothing is left if we are killed."""
    handle, path = tempfile.mkstemp(prefix="books-backup-", dir=Path(file).parent)
    os.close(handle)
    try:
        database.copy_sqlite(file, Path(path))
        return open(path, "rb")  # closed when it is sent
    finally:
        os.unlink(path)


def _pieces(copy: BinaryIO) -> Iterator[bytes]:
    with copy:
        yield from iter(lambda: copy.read(1 << 20), b"")


# --- life ---------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    configure_logging()
    allow_many_connections()
    # Each call of SQLite gives Python's lock away, and a busy thread (an import) keeps it for this long: with the 5 ms
    # that Python has by itself, a read of a book beside an import took 90 ms.
    sys.setswitchinterval(0.0005)
    # What was made so far stays: the collector need not look at it again and again, for 50 ms each time.
    gc.freeze()
    database.open_database(settings.database_url)
    serving = False
    try:
        security.prepare()
        security.open_rate_limits()
        async with events.tail.running(), recurring_jobs():
            serving = True
            yield
    except Exception:
        # A server ends by itself where the start fails, but not later: without its lifespan it would go on and answer
        # everything with 500. It is better stopped, for whoever runs it to start it anew.
        if serving and signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            log.exception("the service can't go on")
            signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        database.close_database()


# --- the front page -----------------------------------------------------------------------------------------------

FRONT_PAGE = (STATIC / "index.html").read_text("utf-8")
if settings.makes_admin_admin:
    FRONT_PAGE = FRONT_PAGE.replace("<body>", '<body data-hint="In development mode: admin / admin.">')
FRONT_ETAG = f'"{hashlib.sha256(FRONT_PAGE.encode()).hexdigest()[:32]}"'


# --- the app ------------------------------------------------------------------------------------------------------

app = FastAPIOffline(
    title="Books API",
    version=VERSION,
    summary="A catalogue, personal shelves with reviews, a lending desk, CSV import, and a live feed of every change.",
    description="Sign in with **Authorize**; in development mode as `admin` / `admin`. Errors are "
    "[problem documents](https://www.rfc-editor.org/rfc/rfc9457).",
    lifespan=lifespan,
    exception_handlers=HANDLERS,
    openapi_tags=TAGS,
    redirect_slashes=False,
)
if settings.cors_origins:
    app.add_middleware(
        CORSMiddleware,
        allow_origins=settings.cors_origins,
        allow_methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
        allow_headers=["Authorization", "If-Match", "If-None-Match", "Last-Event-ID"],
        expose_headers=["ETag", "Link", "Location", "Retry-After", "X-Event-Cursor", "X-Request-ID"],
    )
app.add_middleware(RequestMiddleware)  # outermost: what goes wrong further in is answered with its headers, too
ROUTERS = (  # what is asked most comes first, even before /docs: routes are tried in turn
    books.router,
    library.router,
    auth.router,
    users.router,
    library.reviews_router,
    uploads.router,
    external.router,
    loans.router,
    events.router,
    router,
)
app.router.routes[:0] = [route for each in ROUTERS for route in each.routes]


plain_openapi = app.openapi


def openapi() -> dict[str, Any]:
    if app.openapi_schema is None:
        api.complete(plain_openapi())
    return plain_openapi()


app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI's manual has it


@app.get("/", include_in_schema=False)
async def front_page(if_none_match: Annotated[str | None, Header()] = None) -> Response:
    """The page for people. A browser keeps it, and asks each time whether it is still the same."""
    headers = {"ETag": FRONT_ETAG, "Cache-Control": "no-cache"}
    if if_none_match is not None and books.names_etag(if_none_match, FRONT_ETAG):
        return Response(status_code=304, headers=headers)
    return HTMLResponse(FRONT_PAGE, headers=headers)


app.mount("/static", StaticFiles(directory=STATIC), name="static")
