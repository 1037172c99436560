"""Running it: the log, work that recurs, /health and the backup."""

import asyncio
import contextlib
import logging
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import BinaryIO

import anyio
import anyio.to_thread
from fastapi import HTTPException
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlmodel import Session

import database
import events
import harvest
import imports
import logins
import models
from database import Sqlite
from manual import answers
from models import Setting
from routes import Routes
from security import Admin
from settings import VERSION, settings

if sys.platform != "win32":
    import resource

log = logging.getLogger("books")
router = Routes(tags=["Service"])

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
async def running_jobs() -> AsyncIterator[None]:
    async with anyio.create_task_group() as jobs:
        jobs.start_soon(every, 1, database.checkpoint_wal)
        jobs.start_soon(every, RESUME_SECONDS, resume_uploads)
        jobs.start_soon(every, 60, prune_events)
        jobs.start_soon(every, 600, sweep_logins)
        if settings.harvest_query is not None:
            jobs.start_soon(every, harvest.LOOK_SECONDS, harvest.harvest)
        try:
            yield
        finally:
            jobs.cancel_scope.cancel()


async def every(seconds: float, work: Callable[[], Awaitable[None]]) -> None:
    while True:
        try:
            await work()
        except OperationalError as error:  # a full disk, a locked file: it may be better in a while
            log.error("%s: %s", work.__name__, error)
        except Exception:
            # Whatever it is, it must not take the service with it.
            log.exception("%s failed", work.__name__)
        await anyio.sleep(seconds)


def take_turn(session: Session, work: str, span: timedelta) -> bool:
    """Whether this is to be done now, and by whoever asks: of all processes one is told so, once in each span."""
    last = session.get(Setting, f"last_{work}")
    now = models.utcnow()
    if last is not None and datetime.fromisoformat(last.value) > now - span:
        return False
    session.merge(Setting(key=f"last_{work}", value=now.isoformat()))
    return True


async def resume_uploads() -> None:
    """Take up the uploads of processes that died, this one's earlier life included."""
    for upload_id in await database.read_in_thread(imports.abandoned_uploads):
        await database.run_job(imports.run_upload, upload_id)


async def prune_events() -> None:
    if await database.write(take_turn, "pruning", timedelta(seconds=50)):
        while await database.write(events.prune):  # noqa: ASYNC110  # there is nothing to wait for
            await anyio.sleep(0.05)  # others write, too


async def sweep_logins() -> None:
    if await database.write(take_turn, "sweep", timedelta(minutes=55)):
        await database.write(logins.sweep)


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
        await database.read(events.head)
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


def no_room(error: OSError) -> HTTPException:
    """What to answer where the system has no place for a file."""
    log.error("no place for a file: %s", error)
    return HTTPException(507, "The disk is full, or can't be written: this needs room for a file.")


# --- backup -------------------------------------------------------------------------------------------------------


BACKUP = answers(403, 409, 507) | {
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
        raise no_room(error) from None
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
