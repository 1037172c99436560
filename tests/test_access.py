"""Access control: every route, requested with every kind of token."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient

import database
from main import app
from models import Role
from tests.fixtures import NEW, PASSWORD, make

DOCS = ("/docs", "/docs/oauth2-redirect", "/redoc")
# "reader" owns what is requested; "deactivated" and "logged-out" still have an access token.
USERS = ("anonymous", "reader", "other", "librarian", "admin", "deactivated", "logged-out")

ANYONE = (200, 200, 200, 200, 200, 401, 401)  # an invalid token is refused even where none is needed
SIGNED_IN = (401, 200, 200, 200, 200, 401, 401)
OWNER_AND_STAFF = (401, 200, 404, 200, 200, 401, 401)
STAFF = (401, 403, 403, 200, 200, 401, 401)
ADMIN = (401, 403, 403, 403, 200, 401, 401)


class Access(NamedTuple):
    """The status for each of USERS, and how to make the request."""

    statuses: tuple[int, ...]
    body: Callable[["World"], Any] | None = None
    path: Callable[["World"], dict[str, Any]] | None = None


def succeeding_with(status: int, statuses: tuple[int, ...]) -> tuple[int, ...]:
    """The same, with another status instead of 200."""
    return tuple(status if each == 200 else each for each in statuses)


def always(status: int) -> tuple[int, ...]:
    """For routes that read no token."""
    return (status,) * len(USERS)


class World:
    """A service with all accounts, and with a book and an upload of the reader."""

    def __init__(self, client: TestClient) -> None:
        self.client = client
        self.people = {name: make(client, name) for name in ("deactivated", "logged-out", "reader", "other")}
        self.people["librarian"] = make(client, "librarian", Role.librarian)
        self.people["admin"] = make(client, "other-admin", Role.admin)
        self.people["admin"].patch("/users/2", json={"is_active": False})
        self.people["logged-out"].post("/auth/logout")
        self.book = self.another_book()
        self.people["reader"].post(f"/my-library/{self.book}")
        self.people["librarian"].post(f"/books/{self.book}/stock", json={"quantity": 9})
        self.upload = self.people["reader"].upload("title,author\nA,B\n")["id"]
        self.victim = make(client, "victim")
        self.victim_id = self.victim.get("/users/me").json()["id"]

    def another_book(self) -> int:
        return int(self.people["reader"].add_book()["id"])

    def reviewed_book(self) -> int:
        book = self.another_book()
        self.people["reader"].post(f"/my-library/{book}", json={"status": "completed"})
        self.people["reader"].patch(f"/my-library/{book}", json={"rating": 3})
        return book

    def another_loan(self) -> int:
        return int(self.people["reader"].post("/loans", json={"book_id": self.book}).json()["id"])

    def status(self, user: str, method: str, path: str, **options: Any) -> int:
        sender: Any = self.client if user == "anonymous" else self.people[user]
        return int(sender.request(method, path, **options).status_code)


def book_body(_world: World) -> dict[str, Any]:
    return {"json": {"title": "A", "author": "B"}}


def csv_file(_world: World) -> dict[str, Any]:
    return {"files": {"file": ("a.csv", b"title,author\nC,D\n")}}


def loan_path(world: World) -> dict[str, Any]:
    return {"loan_id": world.another_loan()}


def victim_path(world: World) -> dict[str, Any]:
    return {"user_id": world.victim_id}


MATRIX: dict[str, Access] = {
    "GET /": Access(always(200)),
    "GET /health": Access(always(200)),
    "GET /admin/backup": Access(ADMIN),
    # Accounts.
    "POST /auth/register": Access((201, 409, 409, 409, 409, 409, 409), lambda _: {"json": NEW}),
    "POST /login": Access(always(200), lambda _: {"json": {"username": "victim", "password": PASSWORD}}),
    "POST /auth/token": Access(always(200), lambda _: {"json": {"username": "victim", "password": PASSWORD}}),
    "POST /auth/refresh": Access(
        always(200), lambda world: {"json": {"refresh_token": world.victim.tokens["refresh_token"]}}
    ),
    "POST /auth/logout": Access(succeeding_with(204, SIGNED_IN)),
    "POST /auth/logout-all": Access(succeeding_with(204, SIGNED_IN)),
    "GET /auth/sessions": Access(SIGNED_IN),
    "DELETE /auth/sessions/{session_id}": Access(succeeding_with(404, SIGNED_IN), path=lambda _: {"session_id": 1}),
    "GET /auth/verify-email/{token}": Access(always(200), path=lambda _: {"token": "x"}),  # a page with a button
    "POST /auth/verify-email/{token}": Access(always(404), path=lambda _: {"token": "x"}),
    "POST /auth/verify-email": Access(always(202), lambda _: {"json": {"email": "victim@example.com"}}),
    "POST /auth/forgot-password": Access(always(202), lambda _: {"json": {"email": "victim@example.com"}}),
    "POST /auth/reset-password": Access(
        always(400), lambda _: {"json": {"email": "nora@example.com", "otp": "000000", "new_password": PASSWORD}}
    ),
    "POST /auth/change-password": Access(
        succeeding_with(403, SIGNED_IN), lambda _: {"json": {"current_password": "x", "new_password": PASSWORD}}
    ),
    "GET /users/me": Access(SIGNED_IN),
    "PATCH /users/me": Access(SIGNED_IN, lambda _: {"json": {"full_name": "A"}}),
    "DELETE /users/me": Access(succeeding_with(204, SIGNED_IN), lambda _: {"json": {"password": PASSWORD}}),
    "GET /users/me/export": Access(SIGNED_IN),
    "GET /users": Access(ADMIN),
    "POST /users": Access(succeeding_with(201, ADMIN), lambda _: {"json": NEW}),
    "GET /users/{user_id}": Access(ADMIN, path=victim_path),
    "PATCH /users/{user_id}": Access(ADMIN, lambda _: {"json": {"role": "admin"}}, victim_path),
    "DELETE /users/{user_id}": Access(succeeding_with(204, ADMIN), path=victim_path),
    # The catalogue.
    "GET /books": Access(ANYONE),
    "POST /books": Access(succeeding_with(201, SIGNED_IN), book_body),
    "GET /books/genres": Access(always(200)),
    "GET /books/{book_id}": Access(always(200)),
    "PUT /books/{book_id}": Access((401, 200, 403, 200, 200, 401, 401), book_body),
    "PATCH /books/{book_id}": Access((401, 200, 403, 200, 200, 401, 401), lambda _: {"json": {"genre": "A"}}),
    "DELETE /books/{book_id}": Access(
        (401, 204, 403, 204, 204, 401, 401), path=lambda world: {"book_id": world.another_book()}
    ),
    "GET /books/{book_id}/reviews": Access(always(200)),
    "DELETE /books/{book_id}/reviews/{username}": Access(
        succeeding_with(204, STAFF), path=lambda world: {"book_id": world.reviewed_book(), "username": "reader"}
    ),
    "GET /books/{book_id}/stock": Access(always(200)),
    "POST /books/{book_id}/stock": Access(STAFF, lambda _: {"json": {"quantity": 1}}),
    # My library: each user's own, so that what others have is 404.
    "GET /my-library": Access(SIGNED_IN),
    "POST /my-library/{book_id}": Access((401, 409, 201, 201, 201, 401, 401)),
    "GET /my-library/{book_id}": Access((401, 200, 404, 404, 404, 401, 401)),
    "PATCH /my-library/{book_id}": Access((401, 200, 404, 404, 404, 401, 401), lambda _: {"json": {"tags": []}}),
    "DELETE /my-library/{book_id}": Access((401, 204, 404, 404, 404, 401, 401)),
    "GET /my-library/stats": Access(SIGNED_IN),
    # Lending.
    "POST /loans": Access(succeeding_with(201, SIGNED_IN), lambda world: {"json": {"book_id": world.book}}),
    "GET /loans": Access(SIGNED_IN),
    "GET /loans/{loan_id}": Access(OWNER_AND_STAFF, path=loan_path),
    "POST /loans/{loan_id}/return": Access(OWNER_AND_STAFF, path=loan_path),
    "POST /loans/{loan_id}/renew": Access(OWNER_AND_STAFF, path=loan_path),
    # In and out.
    "POST /books/upload": Access(succeeding_with(202, SIGNED_IN), csv_file),
    "GET /books/upload": Access(SIGNED_IN),
    "GET /books/upload/{upload_id}": Access(OWNER_AND_STAFF),
    "GET /books/upload/{upload_id}/errors": Access(OWNER_AND_STAFF),
    "DELETE /books/upload/{upload_id}": Access(succeeding_with(409, OWNER_AND_STAFF)),
    "GET /books/export": Access(ANYONE),
    "GET /books/external": Access(SIGNED_IN, lambda _: {"params": {"q": "emma"}}),
    # Its ISBN is here from the second time on.
    "POST /books/external": Access(
        (401, 201, 409, 409, 409, 401, 401), lambda _: {"json": {"source": "google", "ref": "Qe7kAwAAQBAJ"}}
    ),
    "POST /my-library/import": Access(succeeding_with(202, SIGNED_IN), csv_file),
    "GET /my-library/export": Access(SIGNED_IN),
    # Changes.
    "GET /events": Access(ANYONE),
    "GET /stream": Access(ANYONE, lambda _: {"params": {"seconds": 0.01}}),
}


def routes() -> set[str]:
    """All routes of the app except the docs."""
    included = [getattr(route, "original_router", None) for route in app.routes]
    found = [*app.routes, *(route for router in included if router is not None for route in router.routes)]
    return {
        f"{method} {route.path_format}"
        for route in found
        if isinstance(route, APIRoute) and route.path_format not in DOCS
        for method in route.methods or ()
    }


def test_the_matrix_has_every_route() -> None:
    assert routes() == set(MATRIX)


@pytest.mark.parametrize("route", MATRIX)
@pytest.mark.usefixtures("others")
def test_each_route_answers_each_user_with_the_right_status(
    client: TestClient, route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accounts.REFUSAL_SECONDS", 0)
    access, world = MATRIX[route], World(client)
    method, pattern = route.split()
    statuses = {}
    for user in USERS:
        path = pattern.format(
            **(access.path(world) if access.path else {"book_id": world.book, "upload_id": world.upload})
        )
        statuses[user] = world.status(user, method, path, **(access.body(world) if access.body else {}))
    expected = access.statuses
    if route == "GET /admin/backup" and database.is_postgresql():
        expected = succeeding_with(409, expected)  # pg_dump does this
    assert statuses == dict(zip(USERS, expected, strict=True))
