"""What all routes share: problem documents, the documented errors, `Router`, `FastRoute` and `RequestMiddleware`."""

import inspect
import json
import logging
import secrets
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterator
from http import HTTPStatus
from operator import attrgetter
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from fastapi import APIRouter, Request, Response, params
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from fastapi.security.utils import get_authorization_scheme_param
from pydantic import TypeAdapter
from pydantic.json_schema import models_json_schema
from sqlalchemy.exc import DatabaseError, DataError, IntegrityError, ProgrammingError
from sqlalchemy.exc import TimeoutError as NoConnection
from starlette.convertors import IntegerConvertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import database
import security
from models import DomainError
from schemas import Problem, describe_error

log = logging.getLogger("books")
access_log = logging.getLogger("books.access")

TOO_LARGE = "The request is larger than this path takes."
# Where Starlette has nothing to say but the name of the status.
DETAILS = {404: "There is nothing at this path.", 405: "This path does not take {method}.", 413: TOO_LARGE}
# Why a body is no JSON, where Python does not say it for clients. The first that fits is told.
UNREADABLE_BODY = {
    UnicodeDecodeError: "The body is not UTF-8.",
    RecursionError: "The body is nested too deep.",
    ValueError: "The body has a number with too many digits.",
}


def problem(
    status: int,
    detail: str,
    headers: dict[str, str] | None = None,
    errors: list[dict[str, Any]] | None = None,
) -> Response:
    body = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail}
    # ASCII: what a client sent may hold half a surrogate pair, which UTF-8 can't carry.
    content = json.dumps(body if errors is None else body | {"errors": errors})
    return Response(content, status, headers, media_type=PROBLEM_JSON)


# --- what a route raises ------------------------------------------------------------------------------------------


async def on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 400 and isinstance(error.__cause__, OSError):  # an upload that is kept in a file meanwhile
        error = disk_full(error.__cause__)
    detail, headers = str(error.detail), dict(error.headers or {})
    if detail in (HTTPStatus(error.status_code).phrase, "Content Too Large"):  # which Python 3.13 calls it
        detail = DETAILS.get(error.status_code, detail).format(method=request.method)
    if error.status_code == HTTPStatus.BAD_REQUEST and error.__cause__ is not None:
        detail = next((said for kind, said in UNREADABLE_BODY.items() if isinstance(error.__cause__, kind)), detail)
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = ", ".join(allowed_methods(request))
    answer = problem(error.status_code, detail, headers)
    answer.background = getattr(error, "after", None)
    return answer


async def on_lost_client(_request: Request, _error: Exception) -> Response:
    return problem(400, "The body ends before it is complete.")  # for the log: nobody is there to read it


def allowed_methods(request: Request) -> list[str]:
    """What this path takes, over all its routes; Starlette itself names only the first's."""
    routes = request.app.routes
    return [
        method
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE")
        if any(route.matches({**request.scope, "method": method})[0] == Match.FULL for route in routes)
    ]


# --- what a request breaks ----------------------------------------------------------------------------------------


async def on_invalid_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    errors = [{"loc": list(e["loc"]), "msg": describe_error(e), "type": e["type"]} for e in error.errors()[:100]]
    return problem(422, _describe_body_error(request, error) or _describe_first(errors[0]), errors=errors)


def _describe_first(first: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in first["loc"][1:]) or first["loc"][0]
    return f"{where}: {first['msg']}"


def _describe_body_error(request: Request, error: RequestValidationError) -> str | None:
    """What is wrong with a body as a whole: it has another type than this path takes, or is not JSON."""
    first = error.errors()[0]
    field = getattr(request.scope.get("route"), "body_field", None)
    if field is None or first["loc"][0] != "body":
        return None
    wanted, given = field.field_info.media_type, request.headers.get("content-type", "")
    kind = given.partition(";")[0].strip().lower()
    takes = ("application/json", "+json") if wanted == "application/json" else ("form-data", "form-urlencoded")
    is_there = request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers
    if is_there and not kind.endswith(takes):
        return f"This path takes {wanted}; the Content-Type says {given[:100] or 'nothing'}."
    if first["type"] == "json_invalid":  # FastAPI's own message does not say why
        return f"The body is not JSON: {first['ctx']['error']}, at character {first['loc'][1]}."
    return None


async def on_broken_rule(_request: Request, error: Exception) -> Response:
    assert isinstance(error, DomainError)
    return problem(422, str(error), errors=[field_error(error.field, error.message, "value_error")])


# --- what the database refuses ------------------------------------------------------------------------------------


async def on_violation(_request: Request, error: Exception) -> Response:
    """The database decides what is unique and what is in range; this says it to the client."""
    assert isinstance(error, IntegrityError)
    kind, field = database.violation(error)
    if kind == "unique":
        return problem(409, f"This {field} is taken.", errors=[field_error(field, "is taken", "unique")])
    if kind == "check":
        return problem(422, f"{field} is out of range.", errors=[field_error(field, "is out of range", "check")])
    return problem(409, "Something that this refers to, or that refers to this, stands in the way.")


def field_error(field: str, message: str, kind: str) -> dict[str, Any]:
    return {"loc": ["body", field], "msg": message, "type": kind}


async def on_unavailable(_request: Request, error: Exception) -> Response:
    if isinstance(error, ProgrammingError | DataError):
        raise error  # that is us
    log.error("the database refused: %s", error)
    if database.is_full(error):
        return problem(507, "The disk is full: nothing can be written. What is here can still be read.")
    return problem(503, "The database can't do this now. Try again.", {"Retry-After": "1"})


HANDLERS: Any = {
    HTTPException: on_http_error,
    ClientDisconnect: on_lost_client,
    RequestValidationError: on_invalid_request,
    DomainError: on_broken_rule,
    IntegrityError: on_violation,
    DatabaseError: on_unavailable,
    NoConnection: on_unavailable,
    sqlite3.OperationalError: on_unavailable,  # from a backup
}

PROBLEM_JSON = "application/problem+json"
Json = dict[str, Any]

TAGS = [
    {"name": name, "description": text}
    for name, text in {
        "Accounts": "Signing up, in and out, confirming an address, and forgotten passwords. Start with `POST /login`.",
        "Users": "My own profile and all that is stored of me; for admins, everybody's account.",
        "Catalogue": "Finding books, adding and changing them, and what readers say of them.",
        "My library": "My shelf: what I want to read, am reading and have read, with my ratings and reviews.",
        "Lending": "How many copies of a book there are, who has them, and until when.",
        "In and out": "Files of books and shelves in both directions, and books of other catalogues.",
        "Changes": "Every change as it is committed: as a stream, or as a log to poll.",
        "Service": "Whether it is well, and a copy of its data.",
    }.items()
]

# Where the name of the function does not say it well.
SUMMARIES = {
    "token": "Sign in (the address that OAuth2 clients expect)",
    "login": "Sign in",
    "refresh": "Change a refresh token for a new pair",
    "logout": "Sign out",
    "logout_everywhere": "Sign out everywhere",
    "list_sessions": "List where I am signed in",
    "end_session": "End one of my logins",
    "register": "Sign up",
    "verify_email": "Confirm an e-mail address",
    "request_verification": "Ask for another link that confirms my address",
    "forgot_password": "Have a code mailed for a new password",
    "reset_password": "Set a new password with the code",
    "change_password": "Change my password",
    "read_me": "Read my account",
    "update_me": "Change my account",
    "delete_me": "Delete my account",
    "export_me": "Download all that is stored about me",
    "list_users": "List accounts",
    "create_user": "Make an account",
    "read_user": "Read an account",
    "update_user": "Change an account",
    "delete_user": "Delete an account",
    "list_books": "Find books",
    "create_book": "Add a book",
    "list_genres": "List genres",
    "read_book": "Read a book",
    "replace_book": "Replace a book",
    "update_book": "Change a book",
    "delete_book": "Delete a book",
    "list_reviews": "List the reviews of a book",
    "remove_review": "Remove a review",
    "upload_books": "Upload a file of books",
    "import_library": "Import my shelf from a file",
    "list_uploads": "List uploads",
    "read_upload": "See how an upload goes",
    "cancel_upload": "Cancel an upload",
    "list_upload_errors": "List the rows that were refused",
    "export_books": "Download the catalogue",
    "export_library": "Download my shelf",
    "find_external_books": "Find books in other catalogues",
    "add_external_book": "Add a book of another catalogue",
    "list_entries": "List my shelf",
    "read_entry": "Read a book on my shelf",
    "shelve_book": "Put a book on my shelf",
    "update_entry": "Move, rate, review or tag a book",
    "remove_entry": "Take a book off my shelf",
    "read_stats": "See my reading in figures",
    "read_stock": "See how many copies there are",
    "change_stock": "Add or remove copies",
    "borrow": "Borrow a book",
    "list_loans": "List loans",
    "read_loan": "Read a loan",
    "return_loan": "Return a loan",
    "renew_loan": "Renew a loan",
    "list_events": "Read the change log",
    "stream": "Follow changes live",
    "health": "Ask whether the service is well",
    "back_up": "Download a backup",
}


class Why(NamedTuple):
    """What an error means, and what it may say."""

    description: str
    detail: str
    headers: tuple[str, ...] = ()


ERRORS = {
    400: Why("The request can't be read, or the code in it is no good.", "The body is not UTF-8."),
    401: Why(
        "Sign in first.", "Sign in first: the token is missing, expired or revoked.", headers=("WWW-Authenticate",)
    ),
    403: Why("Not for you.", "Only for: librarian, admin."),
    404: Why("There is no such thing, or it is not yours to see.", "No such book."),
    409: Why("It conflicts with what is there.", "This isbn is taken."),
    412: Why("It has changed since you read it.", 'The book has changed: its ETag is now "7".'),
    413: Why("The request is larger than this path takes.", "The request is larger than this path takes."),
    422: Why("Something in the request is not as it must be; `errors` says what.", "title: Field required"),
    429: Why("Too many attempts.", "Too many attempts. Try again in 60 s.", headers=("Retry-After",)),
    502: Why("The other catalogue is down, or says nonsense.", "Google Books can't be reached, or breaks off."),
    503: Why("The service can't do this now.", "The database can't do this now. Try again.", headers=("Retry-After",)),
    504: Why("The other catalogue is too slow.", "Google Books did not answer in time."),
    507: Why("The disk is full: nothing can be written.", "The disk is full. Reading still works."),
}
HEADERS: dict[str, tuple[str, str]] = {
    "ETag": ("The version of the book, for `If-Match` and `If-None-Match`.", '"1"'),
    "Link": ("The next page, with `rel=next`, unless this is the last.", '</books?cursor=WyJpZCIsMjBd>; rel="next"'),
    "Location": ("Where it is.", "/books/1"),
    "Retry-After": ("Seconds until it is worth another try.", "60"),
    "WWW-Authenticate": ("Always `Bearer`.", "Bearer"),
    "X-Event-Cursor": ("The id of the last change that this page contains: follow from there.", "1795254571301"),
}
NOT_ALWAYS = {"Link", "Retry-After"}
# A token is not needed here, but shows more.
OPEN_TO_ALL = {"list_books", "export_books", "list_events", "stream"}
A_BOOK = {
    "id": 1,
    "title": "Dune",
    "author": "Frank Herbert",
    "isbn": "9780441172719",
    "genre": "Science fiction",
    "description": None,
    "publisher": "Ace",
    "language": "en",
    "pages": 535,
    "price": 9.99,
    "cover_url": None,
    "published_date": "1965-08-01",
    "publication_year": 1965,
    "copies": 3,
    "available": 2,
    "rating": 4.5,
    "rating_count": 2,
    "added_by": 2,
    "version": 7,
    "created_at": "2026-03-01T09:30:00Z",
    "updated_at": "2026-03-08T18:00:00Z",
}
DESCRIBED = ("title", "author", "isbn", "genre", "publisher", "language", "pages", "price", "published_date")
A_SHELF = {"status": "completed", "rating": 5, "review": "Sandy.", "tags": ["desert"]}
DATES = {"started_at": "2026-03-02T20:00:00Z", "finished_at": "2026-03-08T18:00:00Z"}
A_USER = {"username": "rita", "email": "rita@example.com", "full_name": "Rita Reader"}
EXAMPLES: dict[str, Json] = {
    "BookCreate": {name: A_BOOK[name] for name in DESCRIBED},
    "BookUpdate": {"price": 8.5, "publisher": None},
    "BookPublic": A_BOOK,
    "GenreCount": {"genre": "Science fiction", "count": 12},
    "ReviewPublic": {
        "username": "rita",
        "rating": 5,
        "review": "Sandy.",
        "finished_at": DATES["finished_at"],
        "updated_at": DATES["finished_at"],
    },
    "EntryCreate": {"status": "reading"},
    "EntryUpdate": A_SHELF,
    "EntryPublic": {
        "book_id": 1,
        **A_SHELF,
        **DATES,
        "added_at": "2026-03-01T09:31:00Z",
        "updated_at": DATES["finished_at"],
        "book": A_BOOK,
    },
    "UserCreate": {**A_USER, "password": "a long way to Arrakis"},
    "AccountCreate": {**A_USER, "password": "a long way to Arrakis", "role": "librarian"},
    "UserUpdate": {"full_name": "Rita R. Reader"},
    "AccountUpdate": {"role": "librarian"},
    "UserPublic": {
        "id": 2,
        **A_USER,
        "role": "reader",
        "is_active": True,
        "email_verified_at": None,
        "created_at": "2026-03-01T09:00:00Z",
    },
    "RefreshRequest": {"refresh_token": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIyIn0.c2lnbmF0dXJl"},
    "ForgottenPassword": {"email": "rita@example.com"},
    "PasswordReset": {"email": "rita@example.com", "otp": "271828", "new_password": "a short way home"},
    "PasswordChange": {"current_password": "a long way to Arrakis", "new_password": "a short way home"},
    "MyPassword": {"password": "a long way to Arrakis"},
    "StockChange": {"quantity": 3},
    "StockPublic": {"copies": 3, "available": 2, "on_loan": 1},
    "LoanCreate": {"book_id": 1},
    "LoanPublic": {
        "id": 1,
        "user_id": 2,
        "username": "rita",
        "book_id": 1,
        "title": "Dune",
        "quantity": 1,
        "borrowed_at": "2026-03-09T10:00:00Z",
        "due_at": "2026-03-30T10:00:00Z",
        "returned_at": None,
        "renewals": 0,
        "status": "active",
    },
    "EventPublic": {
        "id": 1795254571301,
        "at": "2026-03-01T09:30:00Z",
        "type": "book.deleted",
        "data": {"id": 1, "title": "Dune", "author": "Frank Herbert"},
    },
    "Health": {"status": "ok", "version": "0.1.0", "database": "sqlite"},
}
# What an answer of this shape is about: the parameter of other paths that its field of this name is for.
LEADS_TO = {
    "BookPublic": ("book_id", "id"),
    "EntryPublic": ("book_id", "book_id"),
    "LoanPublic": ("loan_id", "id"),
    "UploadPublic": ("upload_id", "id"),
    "UserPublic": ("user_id", "id"),
}


def errors(*errors: int, sends: dict[int, str] | None = None) -> dict[int | str, Json]:
    """For `responses=`: the errors of a route, and the headers that its other answers send."""
    found: dict[int | str, Json] = {status: {} for status in errors}
    for status, names in (sends or {}).items():
        found[status] = {"headers": {name: {"$ref": f"#/components/headers/{name}"} for name in names.split()}}
    return found


PAGE = errors(sends={200: "Link"})
FOLLOWED_PAGE = errors(sends={200: "Link X-Event-Cursor"})


def complete(schema: Json) -> Json:
    """The schema that FastAPI made, with all that stands above."""
    components = schema["components"]
    _, problems = models_json_schema([(Problem, "serialization")], ref_template="#/components/schemas/{model}")
    components["schemas"].update(problems["$defs"])
    for unused in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(unused, None)
    components["headers"] = {
        name: {
            "description": text,
            "required": name not in NOT_ALWAYS,
            "schema": {"type": "string"},
            "example": example,
        }
        for name, (text, example) in HEADERS.items()
    }
    components["responses"] = {HTTPStatus(status).name.title().replace("_", ""): _error(status) for status in ERRORS}
    for name, example in EXAMPLES.items():
        if name in components["schemas"]:
            components["schemas"][name]["examples"] = [example]
        if (page := components["schemas"].get(f"Page_{name}_")) is not None:
            page["examples"] = [{"items": [example], "total": 1, "next": None}]
    operations = list(_operations(schema))
    for method, path, operation in operations:
        operation["summary"] = SUMMARIES.get(operation["operationId"], _readable(operation["operationId"]))
        if operation["operationId"] in OPEN_TO_ALL:
            operation["security"].append({})
        for parameter in operation.get("parameters", ()):
            parameter["schema"] = _without_null(parameter["schema"])
        told = {status: answer for status, answer in operation["responses"].items() if int(status) < 400}
        own = {int(status) for status in operation["responses"]} & {*ERRORS} - {422}
        for status in sorted(own | set(_errors_that_follow(method, path, operation))):
            told[str(status)] = {"$ref": f"#/components/responses/{HTTPStatus(status).name.title().replace('_', '')}"}
        operation["responses"] = told
    for _, _, operation in operations:
        _link(operation, [other for _, _, other in operations])
    return schema


def _operations(schema: Json) -> Iterator[tuple[str, str, Json]]:
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            yield method, path, operation


def _readable(name: str) -> str:
    return name.replace("_", " ").capitalize()


def _error(status: int) -> Json:
    why = ERRORS[status]
    title = HTTPStatus(status).phrase
    example: Json = {"type": "about:blank", "title": title, "status": status, "detail": why.detail}
    if status == 422:
        example["errors"] = [{"loc": ["body", "title"], "msg": "Field required", "type": "missing"}]
    content: Json = {PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/Problem"}, "example": example}}
    if status == 400:  # what is no HTTP at all, or too long an address, never comes as far as this service's own code
        content["text/plain"] = {"schema": {"type": "string"}, "example": "Invalid HTTP request received."}
    headers = {name: {"$ref": f"#/components/headers/{name}"} for name in why.headers}
    return {"description": why.description, "content": content, **({"headers": headers} if headers else {})}


def _errors_that_follow(method: str, path: str, operation: Json) -> Iterator[int]:
    """From what a route takes. Whatever touches the database may find that it can't be reached."""
    yield 503
    if operation.get("security"):
        yield 401
    if operation.get("parameters") or "requestBody" in operation:
        yield from (400, 422)
    if "{" in path:
        yield 404
    if "requestBody" in operation:
        yield 413
    if method != "get":
        yield 507


def _without_null(schema: Json) -> Json:
    """What is left out of an address or a header is left out: there is no null to send."""
    choices = [choice for choice in schema.get("anyOf", ()) if choice != {"type": "null"}]
    if len(choices) == len(schema.get("anyOf", ())):
        return schema
    rest = {name: value for name, value in schema.items() if name != "anyOf"}
    return {**rest, **choices[0]} if len(choices) == 1 else {**rest, "anyOf": choices}


def _link(operation: Json, others: list[Json]) -> None:
    """What can be done next with what was made."""
    for status in ("201", "202"):
        answer = operation["responses"].get(status, {})
        shape = answer.get("content", {}).get("application/json", {}).get("schema", {}).get("$ref", "")
        if shape.rpartition("/")[2] not in LEADS_TO or not operation.get("security"):
            continue
        parameter, field = LEADS_TO[shape.rpartition("/")[2]]
        answer["links"] = {
            other["operationId"]: {
                "operationId": other["operationId"],
                "parameters": {parameter: f"$response.body#/{field}"},
            }
            for other in others
            if parameter in [p["name"] for p in other.get("parameters", ()) if p["in"] == "path"]
        }


MAX_BODY = 1 << 20  # bytes of a request, but for uploads
Handler = Callable[..., Awaitable[Any]]
Reader = Callable[[Scope], Any]


class Router(APIRouter):
    """The routes of a noun, for main.py to put into the app's own list. A router that is included in the ordinary way
    is searched twice for each request, route by route."""

    def __init__(self, prefix: str = "", **more: Any) -> None:
        name_of: Any = attrgetter("name")  # what clients that are made from the schema call it
        super().__init__(prefix=prefix, generate_unique_id_function=name_of, max_body_size=MAX_BODY, **more)

    def short(self, method: str, path: str, **more: Any) -> Callable[[Handler], Handler]:
        """A route that takes the short way. Its handler answers with a Response, and takes nothing but a number of the
        path, a query shape, headers, a JSON body, the request, and who is asking."""

        def add(handler: Handler) -> Handler:
            self.add_api_route(path, handler, methods=[method], route_class_override=FastRoute, **more)
            return handler

        return add


class FastRoute(APIRoute):
    def __init__(self, path: str, endpoint: Handler, **more: Any) -> None:
        super().__init__(path, endpoint, **more)
        if self.dependencies:
            raise TypeError(f"{path}: the short way passes over dependencies that are not parameters")
        self.ordinary, self.app = self.app, self.answer
        self.readers: dict[str, Reader] = {}
        self.identified: dict[str, list[Handler]] = {}
        self.body: tuple[str, Callable[[Any], Any]] | None = None
        for name, parameter in inspect.signature(endpoint, eval_str=True).parameters.items():
            marks = getattr(parameter.annotation, "__metadata__", ())
            if (depends := _dependency(marks)) is not None:
                self.identified[name] = _checks(depends)
            elif marks or parameter.annotation is Request:
                self.readers[name] = _reader(name, parameter, marks)
            else:
                self.body = name, TypeAdapter(parameter.annotation).validate_python

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            values = {name: read(scope) for name, read in self.readers.items()}
            if self.body is not None:
                if not _is_plain_json(scope):
                    return await self.ordinary(scope, receive, send)
                name, validate = self.body
                text = await Request(scope, receive).body()
                receive = _again(text, receive)
                values[name] = validate(json.loads(text))
        except (ValueError, RecursionError):  # pydantic's ValidationError among them
            return await self.ordinary(scope, receive, send)
        except ClientDisconnect:
            return None
        for name, checks in self.identified.items():
            values[name] = await security.get_principal(_token(scope))
            for check in checks:
                values[name] = await check(values[name])
        response = await self.endpoint(**values)
        await response(scope, receive, send)
        return None


def _dependency(marks: Any) -> Any:
    return next((mark.dependency for mark in marks if isinstance(mark, params.Depends)), None)


def _checks(dependency: Any) -> list[Handler]:
    """What a user goes through that `auth.identify` has found: dependencies on each other, the outermost last."""
    if dependency is security.get_principal:
        return []
    (parameter,) = inspect.signature(dependency, eval_str=True).parameters.values()
    return [*_checks(_dependency(parameter.annotation.__metadata__)), dependency]


def _reader(name: str, parameter: inspect.Parameter, marks: Any) -> Reader:
    """What finds this parameter's value in a request, or raises pydantic's ValidationError."""
    if parameter.annotation is Request:
        return Request
    (mark,) = (mark for mark in marks if isinstance(mark, params.Param))
    validate = TypeAdapter(parameter.annotation).validate_python
    if isinstance(mark, params.Path):
        return lambda scope: validate(scope["path_params"][name])
    if isinstance(mark, params.Query):
        return lambda scope: validate(dict(parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)))
    assert isinstance(mark, params.Header)
    header = name.replace("_", "-").encode()
    return lambda scope: validate(_header(scope, header))


def _is_plain_json(scope: Scope) -> bool:
    """Whether the headers say so, and that it is not too long."""
    length = _header(scope, b"content-length") or ""
    known = length.isascii() and length.isdecimal() and int(length) <= MAX_BODY
    return known and _header(scope, b"content-type") == "application/json"


def _again(body: bytes, receive: Receive) -> Receive:
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return messages.pop() if messages else await receive()

    return again


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
    (b"x-frame-options", b"DENY"),  # for browsers that do not know frame-ancestors
)
# Nothing that is answered here is a page, but for the front page (see below) and the docs. Those start themselves by a
# script within the page, and draw with styles and pictures within it; nobody's data is written into that page.
DEFAULT_CSP = b"default-src 'none'; frame-ancestors 'none'"
DOCS_CSP = (
    b"default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    b"img-src 'self' data:; worker-src blob:; frame-ancestors 'none'"
)
# Trusted types: a browser that knows them refuses to take text for HTML, whatever a later change of the script tries.
PAGE_CSP = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; base-uri 'none'; "
    b"form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
DOCS = ("/docs", "/docs/oauth2-redirect", "/redoc")
HSTS = (b"strict-transport-security", b"max-age=31536000")
NO_STORE = (b"cache-control", b"no-store")
# Where HEAD is not GET without a body: a stream would never end, and a link in a mail is used up by following it.
VERIFY_LINK = "/auth/verify-email/"
NO_HEAD = ("/stream", VERIFY_LINK)
# What Starlette answers by itself, in plain text: its body limit, its CORS, and its files to a bad `Range`.
PLAIN_TEXT_ERRORS = {
    413: TOO_LARGE,
    416: "The file has no such range.",
    400: "The header Range can't be read.",
}
CORS_REFUSED = "Another site may not call it so: its address, the method or a header is not among those that may."


class RequestMiddleware:
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
                if status in PLAIN_TEXT_ERRORS and is_plain(message):
                    detail = CORS_REFUSED if scope["method"] == "OPTIONS" else PLAIN_TEXT_ERRORS[status]
                    await problem(status, detail)(scope, receive, answer)
                    replaced = True
                    return
                message["headers"] = [*message["headers"], *common_headers(scope, path, message)]
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


def common_headers(scope: Scope, path: str, message: Message) -> Iterator[tuple[bytes, bytes]]:
    yield from SECURITY_HEADERS
    yield b"content-security-policy", DOCS_CSP if path in DOCS else PAGE_CSP if path == "/" else DEFAULT_CSP
    if scope["scheme"] == "https":
        yield HSTS
    # What is answered to a token may be somebody's own; only what has an ETag is the same for all.
    theirs = has(scope, b"authorization") and not has(message, b"etag")
    if theirs or path.startswith(("/login", "/auth/")):
        yield NO_STORE


def has(message: Scope | Message, header: bytes) -> bool:
    return any(name == header for name, _ in message["headers"])


def is_plain(message: Message) -> bool:
    return any(name == b"content-type" and value.startswith(b"text/plain") for name, value in message["headers"])


def disk_full(error: OSError) -> HTTPException:
    """What to answer where the system has no place for a file."""
    log.error("no place for a file: %s", error)
    return HTTPException(507, "The disk is full, or can't be written: this needs room for a file.")


class IdConvertor(IntegerConvertor):
    """`{book_id:id}` in a path: a number that an id can be, so that `/books/upload` is never taken for a book."""

    regex = r"[0-9]{1,10}(?!\n)"  # Starlette ends its pattern with $, which also matches before a last line break


register_url_convertor("id", IdConvertor())
