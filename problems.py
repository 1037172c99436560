"""Errors: whatever goes wrong becomes a problem document (RFC 9457), the only shape of error that this service has.

One handler for each kind: what a route raises, what a request breaks, what the database refuses.
"""

import json
import logging
import sqlite3
from http import HTTPStatus
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import DatabaseError, DataError, IntegrityError, ProgrammingError
from sqlalchemy.exc import TimeoutError as NoConnection
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

import database
import operations
from manual import PROBLEM_JSON
from models import DomainError
from schemas import describe_error

log = logging.getLogger("books")

TOO_LARGE = "The request is larger than this path takes."
# Where Starlette has nothing to say but the name of the status.
SAID = {404: "There is nothing at this path.", 405: "This path does not take {method}.", 413: TOO_LARGE}
# Why a body is no JSON, where Python does not say it for clients. The first that fits is told.
UNREADABLE = {
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
        error = operations.no_room(error.__cause__)
    detail, headers = str(error.detail), dict(error.headers or {})
    if detail in (HTTPStatus(error.status_code).phrase, "Content Too Large"):  # which Python 3.13 calls it
        detail = SAID.get(error.status_code, detail).format(method=request.method)
    if error.status_code == HTTPStatus.BAD_REQUEST and error.__cause__ is not None:
        detail = next((said for kind, said in UNREADABLE.items() if isinstance(error.__cause__, kind)), detail)
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
    return problem(422, _said_of_all(request, error) or _said_of(errors[0]), errors=errors)


def _said_of(first: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in first["loc"][1:]) or first["loc"][0]
    return f"{where}: {first['msg']}"


def _said_of_all(request: Request, error: RequestValidationError) -> str | None:
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
