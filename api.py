"""What all routes share: problem documents, documented errors, `Router`, `FastRoute` and `RequestMiddleware`."""

import functools
import inspect
import json
import logging
import re
import secrets
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterator
from contextvars import ContextVar
from http import HTTPStatus
from statistics import mode
from typing import Annotated, Any, Concatenate
from urllib.parse import parse_qsl

from fastapi import APIRouter, Header, Request, Response, params
from fastapi.dependencies.models import Dependant
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from fastapi.security.utils import get_authorization_scheme_param
from pydantic import TypeAdapter, ValidationError
from sqlalchemy.exc import DatabaseError, DataError, IntegrityError, ProgrammingError
from sqlalchemy.exc import TimeoutError as NoConnection
from sqlmodel import Session
from starlette.convertors import IntegerConvertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import database
import models
import security
from database import P, T
from models import ANSWER_LIFETIME, InvalidField, Principal, StoredAnswer
from schemas import Problem, describe_error
from settings import STATIC, settings

log = logging.getLogger("books")
access_log = logging.getLogger("books.access")

# --- errors as problem documents (RFC 9457) -----------------------------------------------------------------------

JSON, PROBLEM_JSON = "application/json", "application/problem+json"
TOO_LARGE = "The request is larger than this path takes."
INTERNAL_ERROR = "Something went wrong here; it is in the server's log."
# Where Starlette's detail is only the name of the status.
DETAILS = {404: "There is nothing at this path.", 405: "This path does not take {method}.", 413: TOO_LARGE}
# Why a body can't be parsed as JSON, where Python's message is not meant for clients.
UNREADABLE_BODY = {
    UnicodeDecodeError: "The body is not UTF-8.",
    RecursionError: "The body is nested too deep.",
    ValueError: "The body has a number with too many digits.",
}


REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
# The code of a status; that of any other is its name.
CODES = {413: "too_large", 416: "invalid_range", 422: "invalid"}  # whose names differ by the version of Python


class Conflict(HTTPException):
    """409, with the `code` of its problem document: docs/errors.md lists them."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(409, detail)
        self.code = code


def problem(
    status: int,
    detail: str,
    headers: dict[str, str] | None = None,
    errors: list[dict[str, Any]] | None = None,
    code: str | None = None,
) -> Response:
    title, code = HTTPStatus(status).phrase, code or CODES.get(status, HTTPStatus(status).name.lower())
    body: dict[str, Any] = {"type": "about:blank", "title": title, "status": status, "detail": detail, "code": code}
    body |= {"request_id": REQUEST_ID.get()} | ({} if errors is None else {"errors": errors})
    # ASCII: what a client sent may contain lone surrogates, which UTF-8 can't encode.
    return Response(json.dumps(body), status, headers, media_type=PROBLEM_JSON)


async def on_http_error(request: Request, error: HTTPException) -> Response:
    detail, headers = str(error.detail), dict(error.headers or {})
    if detail in (HTTPStatus(error.status_code).phrase, "Content Too Large"):  # Python 3.13's name of 413
        detail = DETAILS.get(error.status_code, detail).format(method=request.method)
    if error.status_code == HTTPStatus.BAD_REQUEST and error.__cause__ is not None:
        detail = next((text for kind, text in UNREADABLE_BODY.items() if isinstance(error.__cause__, kind)), detail)
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = ", ".join(allowed_methods(request))
    return problem(error.status_code, detail, headers, code=getattr(error, "code", None))


def allowed_methods(request: Request) -> list[str]:
    """The methods of all routes with this path; Starlette names only those of the first."""
    routes = (route for route in request.app.routes if route.matches(request.scope)[0] == Match.PARTIAL)
    return sorted({method for route in routes for method in route.methods} - {"HEAD"}) or ["GET"]  # of static files


async def on_disconnect(_request: Request, _error: Exception) -> Response:
    return problem(400, "The body ends before it is complete.")  # for the access log: the client is gone


async def on_invalid_request(request: Request, error: RequestValidationError) -> Response:
    if isinstance(error.body, bytes):  # FastAPI parses no body of another type
        media_type = request.headers.get("content-type", "")[:100] or "nothing"
        return problem(415, f"This path takes {JSON}; the Content-Type says {media_type}.")
    errors = [{"loc": list(e["loc"]), "msg": describe_error(e), "type": e["type"]} for e in error.errors()[:100]]
    first = errors[0]
    field = ".".join(str(part) for part in first["loc"][1:]) or first["loc"][0]
    detail = f"{field}: {first['msg']}"
    if first["type"] == "json_invalid" and len(first["loc"]) > 1:  # FastAPI's own message does not give the reason
        detail = f"The body is not JSON: {error.errors()[0]['ctx']['error']}, at character {first['loc'][1]}."
    return problem(422, detail, errors=errors)


def invalid_body(error: ValidationError) -> RequestValidationError:
    """For a body that is not validated by FastAPI."""
    return RequestValidationError([{**fault, "loc": ("body", *fault["loc"])} for fault in error.errors()])


async def on_invalid_field(_request: Request, error: InvalidField) -> Response:
    return problem(422, str(error), errors=[field_error(error.field, error.message, "value_error", error.source)])


async def on_violation(_request: Request, error: IntegrityError) -> Response:
    """A constraint of the database, as an error of its field."""
    kind, field = database.violation(error)
    if kind == "unique":
        return problem(
            409, f"This {field} is taken.", errors=[field_error(field, "is taken", "unique")], code=f"{field}_taken"
        )
    if kind == "check":
        return problem(422, f"{field} is out of range.", errors=[field_error(field, "is out of range", "check")])
    return problem(409, "It refers to a row that does not exist, or another row refers to it.", code="referenced")


def or_404(value: T | None, detail: str) -> T:
    if value is None:
        raise HTTPException(404, detail)
    return value


def field_error(field: str, message: str, kind: str, source: str = "body") -> dict[str, Any]:
    return {"loc": [source, field], "msg": message, "type": kind}


async def on_unavailable(_request: Request, error: Exception) -> Response:
    if isinstance(error, ProgrammingError | DataError):
        raise error  # a bug of ours
    log.error("the database refused: %s", error)
    if database.is_full(error):
        return problem(507, "The disk is full: nothing can be written. Reading still works.")
    return problem(503, "The database is busy, or does not answer. Try again.", {"Retry-After": "1"})


HANDLERS: Any = {
    HTTPException: on_http_error,
    ClientDisconnect: on_disconnect,
    RequestValidationError: on_invalid_request,
    InvalidField: on_invalid_field,
    IntegrityError: on_violation,
    DatabaseError: on_unavailable,
    NoConnection: on_unavailable,
    sqlite3.OperationalError: on_unavailable,  # from a backup
}

# --- their documentation ------------------------------------------------------------------------------------------

ERROR_HEADERS = {401: "WWW-Authenticate", 429: "Retry-After", 503: "Retry-After"}
# Whether it is always sent, its description, and an example.
HEADERS = {
    "ETag": (True, "The version of the book, for `If-Match` and `If-None-Match`.", '"1"'),
    "Link": (False, "The next page, with `rel=next`, except on the last.", '</books?cursor=WyJpZCIsMjBd>; rel="next"'),
    "Location": (True, "The address of what was made.", "/books/1"),
    "Retry-After": (False, "Seconds until another try is worthwhile.", "60"),
    "Set-Cookie": (False, "The refresh token, where a page asked for it.", "refresh_token=eyJhbGci; Path=/auth"),
    "WWW-Authenticate": (True, "Always `Bearer`.", "Bearer"),
    "X-Event-Cursor": (True, "The id of the last event that this page includes: follow from there.", "1795254571301"),
}


def _name(status: int) -> str:
    return HTTPStatus(status).name.title().replace("_", "")


def errors(*statuses: int, sends: dict[int, str] | None = None) -> dict[int | str, dict[str, Any]]:
    """For `responses=`: the errors of a route, and the headers that its other responses send."""
    responses: dict[int | str, dict[str, Any]] = {
        status: {"$ref": f"#/components/responses/{_name(status)}"} for status in statuses
    }
    for status, names in (sends or {}).items():
        responses[status] = {"headers": {name: {"$ref": f"#/components/headers/{name}"} for name in names.split()}}
    return responses


PAGE = errors(sends={200: "Link X-Event-Cursor"})
EVENT_DATA = json.loads((STATIC / "event_data.json").read_text("utf-8"))  # `EventData`, and what it refers to


def complete_openapi(schema: dict[str, Any]) -> None:
    """Add the components that `errors` refers to, 401 where a token is read, and what FastAPI can't express."""
    components = schema["components"]
    shape = Problem.model_json_schema(ref_template="#/components/schemas/{model}", mode="serialization")
    shape["properties"]["errors"].pop("default")
    components["schemas"] |= EVENT_DATA | shape.pop("$defs") | {"Problem": shape}
    components["headers"] = {
        name: {"description": text, "required": always, "schema": {"type": "string"}, "example": example}
        for name, (always, text, example) in HEADERS.items()
    }
    components["responses"] = {}
    schema["security"] = []  # where an operation names none
    for method, operation in (item for path in schema["paths"].values() for item in path.items()):
        for parameter in operation.get("parameters", ()):
            shape = parameter["schema"]
            if {"type": "null"} in shape.get("anyOf", ()):  # an address or a header has no null: it is left out
                shape |= shape.pop("anyOf")[0]
            if "examples" in shape or parameter["in"] == "path":  # where /docs looks for what it fills in
                parameter["example"] = shape.pop("examples", [1])[0]
        if method == "patch":  # what is left out stays as it is
            reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
            for field in components["schemas"][reference.rpartition("/")[2]]["properties"].values():
                field.pop("default", None)
        if "security" in operation:
            operation["responses"].setdefault("401", errors(401)[401])
        for status, response in operation["responses"].items():
            if "$ref" in response:
                response.pop("description", None)  # FastAPI adds one of its own
                components["responses"][_name(int(status))] = _error_response(int(status))


def _error_response(status: int) -> dict[str, Any]:
    phrase, header = HTTPStatus(status).phrase, ERROR_HEADERS.get(status)
    example = json.loads(bytes(problem(status, phrase).body))
    content = {PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/Problem"}, "example": example}}
    headers = {header: {"$ref": f"#/components/headers/{header}"}} if header else {}
    return {"description": phrase, "content": content, "headers": headers}


# --- routes -------------------------------------------------------------------------------------------------------

MAX_BODY = 256 << 10  # bytes, except for uploads; a text of 20,000 characters has up to 240,000 in JSON
MAX_ACCOUNT_BODY = 16 << 10  # where no token is needed: 300 bodies of 1 MB at once took 300 MB
Handler = Callable[..., Awaitable[Any]]
Reader = Callable[[Scope], Any]


def readonly(handler: database.Read[P, T]) -> Callable[P, Awaitable[T]]:
    """Run a route handler as one `read`. FastAPI does not see its first parameter, the connection."""
    return _without_first_parameter(handler, database.read)


def transactional(handler: database.Write[P, T]) -> Callable[P, Awaitable[T]]:
    """Run a route handler as one `write`, if its user is still authorized then. FastAPI does not see its first
    parameter, the session."""
    return _without_first_parameter(security.authorized(handler), database.write)


def transactional_in_thread(handler: database.Write[P, T]) -> Callable[P, T]:
    """`transactional` for a change that may take longer than the event loop can wait."""
    return _without_first_parameter(security.authorized(handler), database.write_sync)


IdempotencyKey = Annotated[
    str | None, Header(min_length=1, max_length=255, description="For a day, a retry with it gets the same answer.")
]


def idempotent(handler: Callable[..., Response]) -> Callable[..., Response]:
    """Answer a retry as the first request was answered, in the transaction of the change, for a day. 422 for
    the same key with another request (draft-ietf-httpapi-idempotency-key-header-07)."""

    @functools.wraps(handler)
    def answer_once(session: Session, /, *, idempotency_key: str | None, user: Principal, **values: Any) -> Response:
        if idempotency_key is None:
            return handler(session, user=user, **values)
        request_hash = security.sha256(f"{handler.__name__} {values}")
        stored, now = session.get(StoredAnswer, (user.id, idempotency_key)), models.utcnow()
        if stored is not None and now - stored.created_at < ANSWER_LIFETIME:
            if stored.request_hash != request_hash:
                raise InvalidField("idempotency-key", "was used for another request", "header")
            return Response(stored.body, stored.status, stored.headers, "application/json")
        response = handler(session, user=user, **values)
        answer = StoredAnswer(
            user_id=user.id,
            key=idempotency_key,
            request_hash=request_hash,
            status=response.status_code,
            headers={name: response.headers[name] for name in ("Location", "ETag") if name in response.headers},
            body=bytes(response.body).decode(),
            created_at=now,
        )
        session.merge(answer)
        return response

    signature = inspect.signature(handler, eval_str=True)
    key = inspect.Parameter("idempotency_key", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=IdempotencyKey)
    vars(answer_once)["__signature__"] = signature.replace(parameters=[*signature.parameters.values(), key])
    return answer_once


def _without_first_parameter(handler: Callable[Concatenate[Any, P], Any], run: Any) -> Callable[P, Any]:
    route = functools.partial(run, handler)
    signature = inspect.signature(handler, eval_str=True)
    names = ("__name__", "__qualname__", "__doc__", "__module__")
    vars(route).update({name: getattr(handler, name) for name in names})
    vars(route)["__signature__"] = signature.replace(parameters=[*signature.parameters.values()][1:])
    return route


class IdConvertor(IntegerConvertor):
    """`{book_id:id}` in a path: only digits, so that `/books/upload` never matches the route of a book."""

    regex = r"[0-9]{1,10}(?!\n)"  # Starlette ends its pattern with $, which also matches before a final line break


register_url_convertor("id", IdConvertor())


class Router(APIRouter):
    """The routes of a noun, with the errors that every route can answer. main.py puts them into the app's own list:
    `include_router` adds 62 µs to each request."""

    def __init__(self, prefix: str = "", **options: Any) -> None:
        options["generate_unique_id_function"] = lambda route: route.name  # the name of the function
        super().__init__(prefix=prefix, **{"max_body_size": MAX_BODY} | options)

    def add_api_route(self, path: str, endpoint: Handler, **options: Any) -> None:
        # The beginning of the docstring, which as a whole is the description.
        options["summary"] = options.get("summary") or re.split(r"[.:;(]", endpoint.__doc__ or "")[0].strip()
        always = (400, 422, 503) if options.get("methods") == ["GET"] else (400, 413, 415, 422, 503, 507)
        options["responses"] = errors(*always) | (options.get("responses") or {})
        if any(p.annotation == security.Viewer for p in inspect.signature(endpoint, eval_str=True).parameters.values()):
            options["openapi_extra"] = {"security": [{}]}  # in addition to the token, which is optional here
        super().add_api_route(path, endpoint, **options)


class FastRoute(APIRoute):
    """A route whose parameters are prepared when the app starts.

    FastAPI's solver looks at every parameter anew for each request, 70 to 190 µs: longer than finding a book. A request
    that does not validate here goes through FastAPI, so that errors stay its own. The handler returns a Response and
    takes nothing but path ids, a query model, headers, a JSON body, the request, and the current user.
    """

    def __init__(self, path: str, endpoint: Handler, **more: Any) -> None:
        super().__init__(path, endpoint, **more)
        if self.dependencies:
            raise TypeError(f"{path}: FastRoute skips dependencies that are not parameters")
        self.ordinary, self.app = self.app, self.answer
        self.readers: dict[str, Reader] = {}
        self.user_checks = {str(user.name): user_checks(user) for user in self.dependant.dependencies}
        self.body: tuple[str, Callable[[Any], Any]] | None = None
        for name, parameter in inspect.signature(endpoint, eval_str=True).parameters.items():
            marks = getattr(parameter.annotation, "__metadata__", ())
            if name in self.user_checks:
                continue
            if marks or parameter.annotation is Request:
                self.readers[name] = _reader(name, parameter, marks)
            else:
                self.body = name, TypeAdapter(parameter.annotation).validate_python

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        values: dict[str, Any] = {}
        for name, checks in self.user_checks.items():
            values[name] = await security.get_principal(_token(scope))
            for check in checks:
                values[name] = await check(values[name])
        try:
            values |= {name: read(scope) for name, read in self.readers.items()}
            if self.body is not None:
                if _header(scope, b"content-type") != JSON or int(_header(scope, b"content-length") or "") > MAX_BODY:
                    raise ValueError("not a short body of plain JSON")
                name, validate = self.body
                text = await Request(scope, receive).body()

                async def receive() -> Message:
                    return {"type": "http.request", "body": text}

                values[name] = validate(json.loads(text))
        except (ValueError, RecursionError):  # pydantic's ValidationError among them
            await self.ordinary(scope, receive, send)
        else:
            response = await self.endpoint(**values)
            await response(scope, receive, send)


def user_checks(user: Dependant) -> list[Any]:
    """The dependencies that check what `get_principal` returned, the outermost last."""
    return [] if user.call is security.get_principal else [*user_checks(user.dependencies[0]), user.call]


def _reader(name: str, parameter: inspect.Parameter, marks: Any) -> Reader:
    """A function that gives the parameter's value in a request, or raises pydantic's ValidationError."""
    if parameter.annotation is Request:
        return Request
    (mark,) = (mark for mark in marks if isinstance(mark, params.Param))
    validate = TypeAdapter(parameter.annotation).validate_python
    if isinstance(mark, params.Path):
        return lambda scope: validate(scope["path_params"][name])
    if isinstance(mark, params.Query):
        return lambda scope: validate(scope["books.parameters"])
    assert isinstance(mark, params.Header)
    header = name.replace("_", "-").encode()
    return lambda scope: validate(_header(scope, header))


def _header(scope: Scope, name: bytes) -> str | None:
    for key, value in scope["headers"]:
        if key == name:
            return str(value, "latin-1")
    return None


def _token(scope: Scope) -> str | None:
    scheme, token = get_authorization_scheme_param(_header(scope, b"authorization"))
    return token if scheme.lower() == "bearer" else None


# --- every request ------------------------------------------------------------------------------------------------

SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),  # for browsers without frame-ancestors
)
DEFAULT_CSP = b"default-src 'none'; frame-ancestors 'none'"
# FastAPI's pages have an inline script and inline styles; no user's data is in them.
DOCS_CSP = (
    b"default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    b"img-src 'self' data:; worker-src blob:; frame-ancestors 'none'"
)
# Trusted types: browsers refuse to use text as HTML.
PAGE_CSP = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; manifest-src 'self'; "
    b"connect-src 'self'; base-uri 'self'; form-action 'none'; frame-ancestors 'none'; "
    b"require-trusted-types-for 'script'; trusted-types 'none'"
)
VERIFY_CSP = b"default-src 'none'; style-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
CSP_BY_PATH = {"/": PAGE_CSP, "/docs": DOCS_CSP, "/docs/oauth2-redirect": DOCS_CSP, "/redoc": DOCS_CSP}
HSTS = (b"strict-transport-security", b"max-age=31536000")
VERIFY_LINK = "/auth/verify-email/"
# With PUBLIC_CATALOGUE=false: what needs no token, or looks at it itself.
OPEN_PATHS = ("/health", "/login", "/auth/", "/static", "/docs", "/redoc", "/openapi.json", "/b/")
NO_HEAD = ("/stream", VERIFY_LINK)  # where GET never ends, or may change something
# Starlette's plain-text errors: its body limit, its file responses, its CORS.
PLAIN_TEXT_ERRORS = {413: TOO_LARGE, 416: "The file has no such range.", 400: "The header Range can't be read."}
CORS_REFUSED = "Not allowed for this origin, method or header (see CORS_ORIGINS)."


class RequestMiddleware:
    """For every path: access log, request id, security headers, HEAD as GET, `/books/` as `/books`, and no parameter
    twice."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            refusal = problem(404, "There is no WebSocket here: /stream sends Server-Sent Events.")
            return await refusal(scope, receive, send)
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, status, replaced = time.perf_counter(), 0, False
        request_id = secrets.token_hex(8)
        REQUEST_ID.set(request_id)
        root = scope.get("root_path", "").rstrip("/")
        path = scope["path"].removeprefix(root).rstrip("/") or "/"
        head = scope["method"] == "HEAD" and not path.startswith(NO_HEAD)
        # A copy: the server must still see HEAD, to send no body.
        inner = {**scope, "path": root + path, "method": "GET" if head else scope["method"]}
        inner["books.transport"] = getattr(getattr(receive, "__self__", None), "transport", None)  # uvicorn's

        async def send_response(message: Message) -> None:
            nonlocal status, replaced
            if replaced:
                return
            if message["type"] == "http.response.start":
                status, headers = message["status"], dict(message["headers"])
                if status in PLAIN_TEXT_ERRORS and headers.get(b"content-type", b"").startswith(b"text/plain"):
                    detail = CORS_REFUSED if scope["method"] == "OPTIONS" else PLAIN_TEXT_ERRORS[status]
                    await problem(status, detail)(scope, receive, send_response)
                    replaced = True
                    return
                added = common_headers(scope, path, bool({b"etag", b"cache-control"} & headers.keys()))
                message["headers"] = [*message["headers"], *added, (b"x-request-id", request_id.encode())]
                if root and b"location" in headers:
                    message["headers"].remove((b"location", headers[b"location"]))
                    message["headers"].append((b"location", root.encode() + headers[b"location"]))
                if access_log.isEnabledFor(logging.INFO):  # the time until the response begins, as uvicorn's
                    milliseconds = (time.perf_counter() - started) * 1000
                    address = scope["raw_path"].decode("ascii", "replace")[:500]
                    if path.startswith(VERIFY_LINK):  # a secret follows
                        address = root + VERIFY_LINK
                    access_log.info("%s %s %d %.1f ms %s", scope["method"], address, status, milliseconds, request_id)
            await send(message)

        try:
            await self.app(inner, receive, send_response)
        except Exception:  # a bug, or the connection is lost
            if not status:
                await problem(500, INTERNAL_ERROR)(scope, receive, send_response)
            raise  # the server logs it


def checked(router: Any) -> Any:
    """What holds for every path, before it is routed: no parameter is given twice, of which FastAPI would take the
    last; with PUBLIC_CATALOGUE=false, a valid token."""

    async def check(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            parameters = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
            scope["books.parameters"] = dict(parameters)
            if len(scope["books.parameters"]) < len(parameters):
                raise InvalidField(mode(name for name, _ in parameters), "is given twice", "query")
            path = scope["path"].removeprefix(scope.get("root_path", "").rstrip("/"))
            if not (settings.public_catalogue or path == "/" or path.startswith(OPEN_PATHS)):
                await security.get_current_user(await security.get_principal(_token(scope)))
        await router(scope, receive, send)

    return check


def common_headers(scope: Scope, path: str, decides_caching: bool) -> Iterator[tuple[bytes, bytes]]:
    yield from SECURITY_HEADERS
    page = "/" if path.startswith("/b/") else path
    policy = VERIFY_CSP if path.startswith(VERIFY_LINK) else CSP_BY_PATH.get(page, DEFAULT_CSP)
    yield b"content-security-policy", policy
    if scope["scheme"] == "https":
        yield HSTS
    # A response to a token may be private, unless it has an ETag or its own Cache-Control.
    is_private = not decides_caching and any(name == b"authorization" for name, _ in scope["headers"])
    if is_private or path.startswith(("/login", "/auth/")):
        yield b"cache-control", b"no-store"
