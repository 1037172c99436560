"""Access control: every route, requested with every kind of token."""

import copy
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx2 as httpx
import pytest
import sqlalchemy as sa
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from sqlmodel import SQLModel

import database
import security
from main import app
from models import Role
from tests.fixtures import NEW, PASSWORD, Person, Server, copy_of, make, service, use

DOCS = ("/docs", "/docs/oauth2-redirect", "/redoc", "/static-offline-docs/redoc.standalone.js")
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

    def on(self, client: TestClient) -> "World":
        """The same on a copy of its database."""
        same = copy.copy(self)
        same.client, same.victim = client, Person(client, "victim", tokens=self.victim.tokens)
        same.people = {name: Person(client, name, tokens=person.tokens) for name, person in self.people.items()}
        return same

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


@pytest.fixture(scope="module")
def made(first_start: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, World]:
    """A database with all of it: making it anew for each test would take most of the time."""
    file = tmp_path_factory.mktemp("world") / "books.db"
    copy_of(first_start, file)
    with service(file) as admin:
        assert isinstance(admin.client, TestClient)
        return file, World(admin.client)


@pytest.fixture
def world(made: tuple[Path, World], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    file, first = made
    use(copy_of(file, tmp_path / "books.db"), monkeypatch)
    with TestClient(app) as client:
        yield first.on(client)


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
    "GET /b/{book_id}": Access(always(200)),
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
    "GET /books/{book_id}/cover": Access(always(204), lambda _: {"params": {"optional": True}}),
    "GET /books/{book_id}/reviews": Access(always(200)),
    "DELETE /books/{book_id}/reviews/{username}": Access(
        succeeding_with(204, STAFF), path=lambda world: {"book_id": world.reviewed_book(), "username": "reader"}
    ),
    "GET /books/{book_id}/stock": Access(always(200)),
    "POST /books/{book_id}/stock": Access(STAFF, lambda _: {"json": {"quantity": 1}}),
    "PUT /books/{book_id}/stock": Access(STAFF, lambda _: {"json": {"copies": 9}}),
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
    "POST /books/upload/{upload_id}/cancel": Access(succeeding_with(409, OWNER_AND_STAFF)),
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
    world: World, route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accounts.REFUSAL_SECONDS", 0)
    access = MATRIX[route]
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


# --- rights that end while a request is under way -----------------------------------------------------------------

RIGHT_PASSWORD: dict[str, dict[str, Any]] = {
    "POST /auth/change-password": {"current_password": PASSWORD, "new_password": "another horse"},
    "PATCH /users/me": {"email": "new@example.com", "current_password": PASSWORD},
}
WRITES = [
    pytest.param(route, body, id=f"{route}{note}")
    for route, access in MATRIX.items()
    if not route.startswith("GET ") and access.statuses[0] == 401
    for note, body in (("", None), (" with the password", RIGHT_PASSWORD.get(route)))
    if body or not note
]
ENDINGS = {
    "signed out": "UPDATE login_session SET revoked_at = created_at WHERE user_id = :id",
    "switched off": 'UPDATE "user" SET is_active = false WHERE id = :id',
    "demoted": "UPDATE \"user\" SET role = 'reader' WHERE id = :id",
    "deleted": 'DELETE FROM "user" WHERE id = :id',
}


@pytest.mark.parametrize(("route", "body"), WRITES)
@pytest.mark.usefixtures("others")
def test_a_write_is_refused_when_rights_end_after_the_token_was_verified(
    world: World, monkeypatch: pytest.MonkeyPatch, route: str, body: dict[str, Any] | None
) -> None:
    """The worst case of a race: they end between the read of the dependency and the transaction of the write."""
    access = MATRIX[route]
    method, pattern = route.split()
    read: Any = database.read
    ending, before = "", {}

    async def read_and_end(query: Any, *args: Any, **kwargs: Any) -> Any:
        result = await read(query, *args, **kwargs)
        if query is security._find_principal:
            statement = sa.text(ENDINGS[ending]).bindparams(id=result.id)
            database.write_sync(lambda session: session.connection().execute(statement))
            before.update(database.read_sync(everything))
        return result

    for ending in ENDINGS:
        person = make(world.client, ending.replace(" ", "-"), Role.admin)
        path = pattern.format(
            **(access.path(world) if access.path else {"book_id": world.book, "upload_id": world.upload})
        )
        options = {"json": body} if body else access.body(world) if access.body else {}
        monkeypatch.setattr(database, "read", read_and_end)
        answer = person.request(method, path, **options)
        monkeypatch.setattr(database, "read", read)
        assert answer.status_code == 401, f"{ending}: {answer.text}"
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert database.read_sync(everything) == before, ending


def everything(connection: sa.Connection) -> dict[str, list[Any]]:
    """All rows, but for accounts and sessions: these are changed by the test."""
    tables = [table for name, table in SQLModel.metadata.tables.items() if name not in ("user", "login_session")]
    return {table.name: sorted(map(repr, connection.execute(sa.select(table)))) for table in tables}


SWITCHED_OFF = {"is_active": False}
REMOVALS: dict[str, tuple[str, Callable[[Person, Person, int], httpx.Response]]] = {
    "demoted": ("account.role_changed", lambda admin, _, id_: admin.patch(f"/users/{id_}", json={"role": "reader"})),
    "switched off": ("account.switched_off", lambda admin, _, id_: admin.patch(f"/users/{id_}", json=SWITCHED_OFF)),
    "deleted": ("account.deleted", lambda admin, _, id_: admin.delete(f"/users/{id_}")),
    "signed out": ("account.logout", lambda _, person, id_: person.post("/auth/logout-all")),
}
ROUNDS = 5


@pytest.mark.slow
@pytest.mark.parametrize(("event", "remove"), REMOVALS.values(), ids=REMOVALS)
def test_no_write_is_committed_after_the_event_that_ends_its_rights(
    serve: Callable[..., Server], event: str, remove: Callable[[Person, Person, int], httpx.Response]
) -> None:
    """Eight requests at a time of a librarian, on two workers, who loses the account, the role or the session."""
    server = serve("--workers", "2")
    admin = Person(server.client, "admin", "admin")
    late = written = 0
    for number in range(ROUNDS):
        new = {**NEW, "username": f"rita{number}", "email": f"rita{number}@example.com", "role": "librarian"}
        user_id = admin.post("/users", json=new).json()["id"]
        person, book = Person(server.client, new["username"]), admin.add_book()["id"]
        start = admin.get("/books", params={"limit": 1}).headers["X-Event-Cursor"]
        with ThreadPoolExecutor(8) as pool:
            writers = [pool.submit(write_while_allowed, person, book, letter) for letter in "abcdefgh"]
            time.sleep(0.05)
            assert remove(admin, person, user_id).status_code in (200, 204)
        assert {writer.result() for writer in writers} <= {401, 403}
        query = {"after": start, "types": f"{event},book.updated", "limit": 100}
        types = [each["type"] for each in admin.get("/events", params=query).json()["items"]]
        written, late = written + types.count("book.updated"), late + len(types) - types.index(event) - 1
    assert written > ROUNDS
    assert late == 0, f"{late} of {written} writes were late"


def write_while_allowed(person: Person, book: int, letter: str) -> int:
    """Change a book until the answer is not 200; the status."""
    for number in range(10):
        status = person.patch(f"/books/{book}", json={"title": f"{letter}{number}"}).status_code
        if status != 200:
            return status
    return 401
