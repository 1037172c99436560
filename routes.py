"""Routes: how a noun's paths get into the app, and a short way through FastAPI for those that are asked most.

FastAPI's solver of parameters looks at every parameter's type anew for each request, which takes longer than finding a
book. `Routes.short` adds a route whose parameters are worked out when the app starts. A request that they do not fit
goes the ordinary way, so that what is refused, and how it is said, stays FastAPI's.
"""

import inspect
import json
from collections.abc import Awaitable, Callable
from operator import attrgetter
from typing import Any
from urllib.parse import parse_qsl

from fastapi import APIRouter, Request, params
from fastapi.routing import APIRoute
from fastapi.security.utils import get_authorization_scheme_param
from pydantic import TypeAdapter
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

import security

BODY_MAX = 1 << 20  # bytes of a request, but for uploads
Handler = Callable[..., Awaitable[Any]]
Reader = Callable[[Scope], Any]


class Routes(APIRouter):
    """The routes of a noun, for main.py to put into the app's own list. A router that is included in the ordinary way
    is searched twice for each request, route by route."""

    def __init__(self, prefix: str = "", **more: Any) -> None:
        name_of: Any = attrgetter("name")  # what clients that are made from the schema call it
        super().__init__(prefix=prefix, generate_unique_id_function=name_of, max_body_size=BODY_MAX, **more)

    def short(self, method: str, path: str, **more: Any) -> Callable[[Handler], Handler]:
        """A route that takes the short way. Its handler answers with a Response, and takes nothing but a number of the
        path, a query shape, headers, a JSON body, the request, and who is asking."""

        def add(handler: Handler) -> Handler:
            self.add_api_route(path, handler, methods=[method], route_class_override=ShortRoute, **more)
            return handler

        return add


class ShortRoute(APIRoute):
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
    known = length.isascii() and length.isdecimal() and int(length) <= BODY_MAX
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
