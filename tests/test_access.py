"""Who may do what: every route, asked by everybody."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient

import database
from api import DOCS
from main import app
from models import Role
from tests.fixtures import NEW, PASSWORD, make

# Who asks. "reader" is the owner of what is asked for; "closed" was switched off and "gone" has logged out, both with
# the token in hand.
CAST = ("nobody", "reader", "other", "librarian", "admin", "closed", "gone")

EVERYBODY = (200, 200, 200, 200, 200, 401, 401)  # but a bad token is never taken for none
SIGNED_IN = (401, 200, 200, 200, 200, 401, 401)
OWNER_AND_STAFF = (401, 200, 404, 200, 200, 401, 401)
STAFF = (401, 403, 403, 200, 200, 401, 401)
ADMIN = (401, 403, 403, 403, 200, 401, 401)


class Asked(NamedTuple):
    """How to ask, and what each of the cast is answered."""

    answers: tuple[int, ...]
    body: Callable[["Stage"], Any] | None = None
    path: Callable[["Stage"], dict[str, Any]] | None = None


def instead(answers: tuple[int, ...], status: int) -> tuple[int, ...]:
    """The same, where the good answer is not 200."""
    return tuple(status if answer == 200 else answer for answer in answers)


def unseen(answers: tuple[int, ...]) -> tuple[int, ...]:
    """Where no token is looked at, everybody is nobody."""
    return answers[:1] * len(answers)


class Stage:
    """A service with a book that the reader added and shelved, an upload of theirs, and everybody's account."""

    def __init__(self, client: TestClient) -> None:
        self.client = client
        self.people = {name: make(client, name) for name in ("closed", "gone", "reader", "other")}
        self.people["librarian"] = make(client, "librarian", Role.librarian)
        self.people["admin"] = make(client, "other-admin", Role.admin)
        self.people["admin"].patch("/users/2", json={"is_active": False})
        self.people["gone"].post("/auth/logout")
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

    def ask(self, who: str, method: str, path: str, **options: Any) -> int:
        sender: Any = self.client if who == "nobody" else self.people[who]
        return int(sender.request(method, path, **options).status_code)


def new_book(_stage: Stage) -> dict[str, Any]:
    return {"json": {"title": "A", "author": "B"}}


def csv(_stage: Stage) -> dict[str, Any]:
    return {"files": {"file": ("a.csv", b"title,author\nC,D\n")}}


def readers_loan(stage: Stage) -> dict[str, Any]:
    return {"loan_id": stage.another_loan()}


def victims(stage: Stage) -> dict[str, Any]:
    return {"user_id": stage.victim_id}


MATRIX: dict[str, Asked] = {
    "GET /": Asked((200,) * 7),
    "GET /health": Asked(unseen(EVERYBODY)),
    "GET /admin/backup": Asked(ADMIN),
    # Accounts. What needs no token does not look at one.
    "POST /auth/register": Asked((201, 409, 409, 409, 409, 409, 409), lambda _: {"json": NEW}),
    "POST /login": Asked(unseen(EVERYBODY), lambda _: {"json": {"username": "victim", "password": PASSWORD}}),
    "POST /auth/token": Asked(unseen(EVERYBODY), lambda _: {"json": {"username": "victim", "password": PASSWORD}}),
    "POST /auth/refresh": Asked(
        unseen(EVERYBODY), lambda stage: {"json": {"refresh_token": stage.victim.tokens["refresh_token"]}}
    ),
    "POST /auth/logout": Asked(instead(SIGNED_IN, 204)),
    "POST /auth/logout-all": Asked(instead(SIGNED_IN, 204)),
    "GET /auth/sessions": Asked(SIGNED_IN),
    "DELETE /auth/sessions/{session_id}": Asked(instead(SIGNED_IN, 404), path=lambda _: {"session_id": 1}),
    "GET /auth/verify-email/{token}": Asked((404,) * 7, path=lambda _: {"token": "x"}),
    "POST /auth/verify-email": Asked(instead(SIGNED_IN, 202)),
    "POST /auth/forgot-password": Asked((202,) * 7, lambda _: {"json": {"email": "victim@example.com"}}),
    "POST /auth/reset-password": Asked(
        (400,) * 7, lambda _: {"json": {"email": "nora@example.com", "otp": "000000", "new_password": PASSWORD}}
    ),
    "POST /auth/change-password": Asked(
        instead(SIGNED_IN, 403), lambda _: {"json": {"current_password": "x", "new_password": PASSWORD}}
    ),
    "GET /users/me": Asked(SIGNED_IN),
    "PATCH /users/me": Asked(SIGNED_IN, lambda _: {"json": {"full_name": "A"}}),
    "DELETE /users/me": Asked(instead(SIGNED_IN, 204), lambda _: {"json": {"password": PASSWORD}}),
    "GET /users/me/export": Asked(SIGNED_IN),
    "GET /users": Asked(ADMIN),
    "POST /users": Asked(instead(ADMIN, 201), lambda _: {"json": NEW}),
    "GET /users/{user_id}": Asked(ADMIN, path=victims),
    "PATCH /users/{user_id}": Asked(ADMIN, lambda _: {"json": {"role": "admin"}}, victims),
    "DELETE /users/{user_id}": Asked(instead(ADMIN, 204), path=victims),
    # The catalogue.
    "GET /books": Asked(EVERYBODY),
    "POST /books": Asked(instead(SIGNED_IN, 201), new_book),
    "GET /books/genres": Asked(unseen(EVERYBODY)),
    "GET /books/{book_id}": Asked(unseen(EVERYBODY)),
    "PUT /books/{book_id}": Asked((401, 200, 403, 200, 200, 401, 401), new_book),
    "PATCH /books/{book_id}": Asked((401, 200, 403, 200, 200, 401, 401), lambda _: {"json": {"genre": "A"}}),
    "DELETE /books/{book_id}": Asked(
        (401, 204, 403, 204, 204, 401, 401), path=lambda stage: {"book_id": stage.another_book()}
    ),
    "GET /books/{book_id}/reviews": Asked(unseen(EVERYBODY)),
    "DELETE /books/{book_id}/reviews/{username}": Asked(
        instead(STAFF, 204), path=lambda stage: {"book_id": stage.reviewed_book(), "username": "reader"}
    ),
    "GET /books/{book_id}/stock": Asked(unseen(EVERYBODY)),
    "POST /books/{book_id}/stock": Asked(STAFF, lambda _: {"json": {"quantity": 1}}),
    # My library: everybody's own, so that what others have is simply not there.
    "GET /my-library": Asked(SIGNED_IN),
    "POST /my-library/{book_id}": Asked((401, 409, 201, 201, 201, 401, 401)),
    "GET /my-library/{book_id}": Asked((401, 200, 404, 404, 404, 401, 401)),
    "PATCH /my-library/{book_id}": Asked((401, 200, 404, 404, 404, 401, 401), lambda _: {"json": {"tags": []}}),
    "DELETE /my-library/{book_id}": Asked((401, 204, 404, 404, 404, 401, 401)),
    "GET /my-library/stats": Asked(SIGNED_IN),
    # Lending.
    "POST /loans": Asked(instead(SIGNED_IN, 201), lambda stage: {"json": {"book_id": stage.book}}),
    "GET /loans": Asked(SIGNED_IN),
    "GET /loans/{loan_id}": Asked(OWNER_AND_STAFF, path=readers_loan),
    "POST /loans/{loan_id}/return": Asked(OWNER_AND_STAFF, path=readers_loan),
    "POST /loans/{loan_id}/renew": Asked(OWNER_AND_STAFF, path=readers_loan),
    # In and out.
    "POST /books/upload": Asked(instead(SIGNED_IN, 202), csv),
    "GET /books/upload": Asked(SIGNED_IN),
    "GET /books/upload/{upload_id}": Asked(OWNER_AND_STAFF),
    "GET /books/upload/{upload_id}/errors": Asked(OWNER_AND_STAFF),
    "DELETE /books/upload/{upload_id}": Asked(instead(OWNER_AND_STAFF, 409)),
    "GET /books/export": Asked(EVERYBODY),
    "GET /books/external": Asked(SIGNED_IN, lambda _: {"params": {"q": "emma"}}),
    # Its ISBN is here from the second time on.
    "POST /books/external": Asked(
        (401, 201, 409, 409, 409, 401, 401), lambda _: {"json": {"source": "google", "ref": "Qe7kAwAAQBAJ"}}
    ),
    "POST /my-library/import": Asked(instead(SIGNED_IN, 202), csv),
    "GET /my-library/export": Asked(SIGNED_IN),
    # Changes.
    "GET /events": Asked(EVERYBODY),
    "GET /stream": Asked(EVERYBODY, lambda _: {"params": {"seconds": 0.01}}),
}


def routes() -> set[str]:
    """Every route that the app has, but for the pages of the docs."""
    included = [getattr(route, "original_router", None) for route in app.routes]
    found = [*app.routes, *(route for router in included if router is not None for route in router.routes)]
    return {
        f"{method} {route.path_format}"
        for route in found
        if isinstance(route, APIRoute) and route.path_format not in DOCS
        for method in route.methods or ()
    }


def test_every_route_stands_in_the_matrix() -> None:
    assert routes() == set(MATRIX)


@pytest.mark.parametrize("route", MATRIX)
@pytest.mark.usefixtures("others")
def test_everybody_is_answered_as_they_should(client: TestClient, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("auth.REFUSAL_SECONDS", 0)
    asked, stage = MATRIX[route], Stage(client)
    method, pattern = route.split()
    answers = {}
    for who in CAST:
        known = {"book_id": stage.book, "upload_id": stage.upload}
        path = pattern.format(**(asked.path(stage) if asked.path else known))
        answers[who] = stage.ask(who, method, path, **(asked.body(stage) if asked.body else {}))
    expected = asked.answers
    if route == "GET /admin/backup" and database.is_postgresql():
        expected = instead(expected, 409)  # it has its own way to back up
    assert answers == dict(zip(CAST, expected, strict=True))
