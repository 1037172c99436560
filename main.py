"""Books API: a small library service. This module puts the parts together; read them in this order.

    settings.py   what can be set, and what is refused
    sqlite.py     one writer at a time, short reads and changes inline
    postgresql.py the same promises on a server
    database.py   the file, its transactions, and what runs inline or in a thread
    values.py     the clock, kinds of value, columns: what tables and shapes are made of
    people.py     users, logins, codes: tables, shapes and rules
    records.py    settings, uploads, events, likewise
    models.py     books, shelves, loans, likewise
    rows.py       statements compiled once, rows as JSON
    manual.py     what /docs says beside what FastAPI knows
    pages.py      lists: cursors, offsets, links
    search.py     words: what is looked up, and what matches best
    events.py     the change log
    mail.py       letters, and how they are sent
    throttle.py   rate limits
    auth.py       passwords, tokens, the signed-in user, roles
    routes.py     how paths get into the app, and the short way of those asked most
    feed.py       /events and /stream
    logins.py     signing in, refreshing, signing out
    books.py      the catalogue and its search
    library.py    /my-library
    reviews.py    what readers say of a book
    loans.py      the lending desk: stock, loans
    csvfiles.py   CSV: encodings, delimiters, records
    cells.py      numbers, dates and ISBNs as they come
    sources.py    what Google Books and Open Library say of books
    catalogues.py asking them, within bounds
    formats.py    the columns of other services, and what a row says
    placing.py    rows on their way into the catalogue and onto a shelf
    enrichment.py filling in what rows lack, from Open Library
    imports.py    the stored file, and the job that brings it in
    uploads.py    taking a file, how it goes, what was refused
    exports.py    the catalogue and my shelf as files
    external.py   finding and adding books of other catalogues
    harvest.py    new books, once a day
    accounts.py   registration, confirming an address, forgotten passwords
    users.py      my profile, administration
    operations.py logging, work that recurs, /health, the backup
    problems.py   every error as a problem document: which status, and what is said of it
    index.html    the front page, which uses nothing but the paths of the above

A request: `Manners` below, the route, `auth.identify` if it asks for a user, one read or one transaction by way of
`database`, the answer. Whatever goes wrong on the way becomes a problem document in one of the handlers of `problems`.
"""

import base64
import contextlib
import gc
import hashlib
import logging
import re
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any

from fastapi import FastAPI, Header, Response
from fastapi.responses import FileResponse, HTMLResponse
from fastapi_offline import FastAPIOffline
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import accounts
import books
import database
import exports
import external
import feed
import library
import loans
import logins
import manual
import operations
import reviews
import security
import uploads
import users
from manual import TAGS
from problems import HANDLERS, TOO_LARGE, problem
from settings import HERE, VERSION, settings

log = logging.getLogger("books")
access_log = logging.getLogger("books.access")

# --- life ---------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    operations.configure_logging()
    operations.allow_many_connections()
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
        async with feed.feed.running(), operations.running_jobs():
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


# --- every request ------------------------------------------------------------------------------------------------


SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),  # for browsers that do not know frame-ancestors
)
# Nothing that is answered here is a page, but for the front page (see below) and the docs. Those start themselves by a
# script within the page, and draw with styles and pictures within it; nobody's data is written into that page.
POLICY = b"default-src 'none'; frame-ancestors 'none'"
DOCS_POLICY = (
    b"default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    b"img-src 'self' data:; worker-src blob:; frame-ancestors 'none'"
)
DOCS = ("/docs", "/docs/oauth2-redirect", "/redoc")
A_YEAR_OF_HTTPS = (b"strict-transport-security", b"max-age=31536000")
NO_STORE = (b"cache-control", b"no-store")
# Where HEAD is not GET without a body: a stream would never end, and a link in a mail is used up by following it.
VERIFY_LINK = "/auth/verify-email/"
NO_HEAD = ("/stream", VERIFY_LINK)
# What Starlette answers by itself, in plain text: its body limit, its CORS, and its files to a bad `Range`.
PLAIN = {
    413: TOO_LARGE,
    416: "The file has no such range.",
    400: "The header Range can't be read.",
}
NOT_FOR_OTHERS = "Another site may not call it so: its address, the method or a header is not among those that may."


class Manners:
    """What every path has in common: its log line, request id and headers, HEAD, both spellings of `/books/`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            refused = problem(404, "There is no web socket here: /stream sends Server-Sent Events.")
            return await refused(scope, receive, send)
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, status, told = time.perf_counter(), 0, not access_log.isEnabledFor(logging.INFO)
        replaced = False
        request_id = secrets.token_hex(8)
        # A copy: the server must still see HEAD to know that it sends no body.
        root = scope.get("root_path", "").rstrip("/")
        path = scope["path"].removeprefix(root).rstrip("/") or "/"
        head = scope["method"] == "HEAD" and not path.startswith(NO_HEAD)
        inner = {**scope, "path": root + path, "method": "GET" if head else scope["method"]}
        inner["books.transport"] = getattr(getattr(receive, "__self__", None), "transport", None)  # uvicorn's

        def tell() -> None:
            nonlocal told
            told = True
            milliseconds = (time.perf_counter() - started) * 1000
            shown = scope["raw_path"].decode("ascii", "replace")[:500]
            if path.startswith(VERIFY_LINK):  # what follows is a secret
                shown = root + VERIFY_LINK
            access_log.info("%s %s %d %.1f ms %s", scope["method"], shown, status, milliseconds, request_id)

        async def answer(message: Message) -> None:
            nonlocal status, replaced
            if replaced:
                return
            if message["type"] == "http.response.start":
                status = message["status"]
                if status in PLAIN and is_plain(message):
                    detail = NOT_FOR_OTHERS if scope["method"] == "OPTIONS" else PLAIN[status]
                    await problem(status, detail)(scope, receive, answer)
                    replaced = True
                    return
                message["headers"] = [*message["headers"], *headers_of_every_answer(scope, path, message)]
                message["headers"].append((b"x-request-id", request_id.encode()))
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body") and not told:
                tell()  # here, not at the end: background tasks run on after the answer

        try:
            await self.app(inner, receive, answer)
        except Exception:
            if not status:
                bug = problem(500, "Something went wrong here; it is in the server's log.")
                await bug(scope, receive, answer)
            raise  # the server logs it
        finally:
            if not told:  # the server stops, or the client is gone
                tell()


def headers_of_every_answer(scope: Scope, path: str, message: Message) -> Iterator[tuple[bytes, bytes]]:
    yield from SECURITY_HEADERS
    yield b"content-security-policy", DOCS_POLICY if path in DOCS else FRONT_POLICY if path == "/" else POLICY
    if scope["scheme"] == "https":
        yield A_YEAR_OF_HTTPS
    # What is answered to a token may be somebody's own; only what has an ETag is the same for all.
    theirs = has(scope, b"authorization") and not has(message, b"etag")
    if theirs or path.startswith(("/login", "/auth/")):
        yield NO_STORE


def has(message: Scope | Message, header: bytes) -> bool:
    return any(name == header for name, _ in message["headers"])


def is_plain(message: Message) -> bool:
    return any(name == b"content-type" and value.startswith(b"text/plain") for name, value in message["headers"])


# --- the front page -----------------------------------------------------------------------------------------------

FRONT_PAGE = (HERE / "index.html").read_text("utf-8")
if settings.makes_admin_admin:
    FRONT_PAGE = FRONT_PAGE.replace("<body>", '<body data-hint="In development mode: admin / admin.">')
FRONT_ETAG = f'"{hashlib.sha256(FRONT_PAGE.encode()).hexdigest()[:32]}"'


def hash_source(tag: str) -> str:
    """How a policy names the page's own script or style; what has another hash, a browser does not run."""
    inline = re.findall(f"<{tag}[^>]*>(.*?)</{tag}>", FRONT_PAGE, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in inline)


# Trusted types: a browser that knows them refuses to take text for HTML, whatever a later change of the script tries.
FRONT_POLICY = (
    f"default-src 'none'; script-src {hash_source('script')}; style-src {hash_source('style')}; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
).encode()


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
app.add_middleware(Manners)  # outermost: what goes wrong further in is answered with its headers, too
ROUTERS = (  # what is asked most comes first, even before /docs: routes are tried in turn
    books.router,
    library.router,
    logins.router,
    accounts.router,
    users.router,
    reviews.router,
    uploads.router,
    exports.router,
    external.router,
    loans.router,
    feed.router,
    operations.router,
)
app.router.routes[:0] = [route for router in ROUTERS for route in router.routes]


plain_openapi = app.openapi


def openapi() -> dict[str, Any]:
    if app.openapi_schema is None:
        manual.complete(plain_openapi())
    return plain_openapi()


app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI's manual has it


@app.get("/", include_in_schema=False)
async def front_page(if_none_match: Annotated[str | None, Header()] = None) -> Response:
    """The page for people. A browser keeps it, and asks each time whether it is still the same."""
    headers = {"ETag": FRONT_ETAG, "Cache-Control": "no-cache"}
    if if_none_match is not None and books.names_etag(if_none_match, FRONT_ETAG):
        return Response(status_code=304, headers=headers)
    return HTMLResponse(FRONT_PAGE, headers=headers)


@app.get("/sample_books.csv", include_in_schema=False)
async def sample_books() -> FileResponse:
    """Fifty classics, which the front page offers to an admin whose catalogue is empty."""
    return FileResponse(HERE / "sample_books.csv", media_type="text/csv")
