"""Accounts: who may come in, and what a token is good for."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from fastapi.testclient import TestClient
from jose import jwt
from sqlmodel import Session, select

import auth
import database
import models
from conftest import PASSWORD, Clock, Person, Server, set_role, sign_up, switch_off
from models import LoginSession, User
from settings import settings

# --- registration -------------------------------------------------------------------------------------------------

JSON = {"Content-Type": "application/json"}
NEW = {"username": "rita", "email": "rita@example.com", "password": PASSWORD}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no e-mail": ({"email": None}, "email"),
    "an e-mail without a host": ({"email": "rita@"}, "email"),
    "a name with an @": ({"username": "rita@home"}, "username"),
    "a name with a slash": ({"username": "ri/ta"}, "username"),
    "an empty name": ({"username": "  "}, "username"),
    "a short password": ({"password": "1234567"}, "password"),
    "a long password": ({"password": "x" * 129}, "password"),
    "a password with a NUL": ({"password": "x" * 8 + "\0"}, "password"),
    "the name as password": ({"username": "rita-the-reader", "password": "Rita-the-Reader"}, "password"),
    "the e-mail as password": ({"password": "RITA@example.com"}, "password"),
    "a role": ({"role": "admin"}, "role"),
    "a state": ({"is_active": True}, "is_active"),
}


@pytest.mark.parametrize(("fields", "named"), REFUSED.values(), ids=REFUSED)
def test_registration_refuses(client: TestClient, fields: dict[str, Any], named: str) -> None:
    answer = client.post("/auth/register", json={**NEW, **fields})
    assert answer.status_code == 422
    assert [error["loc"] for error in answer.json()["errors"]] == [["body", named]]


@pytest.mark.parametrize(
    ("fields", "taken"),
    [
        pytest.param({"email": "other@example.com", "username": "RITA"}, "username", id="the name in other letters"),
        pytest.param({"username": "other", "email": "Rita@EXAMPLE.com"}, "email", id="the e-mail in other letters"),
    ],
)
def test_names_and_addresses_are_unique_whatever_their_case(
    client: TestClient, fields: dict[str, str], taken: str
) -> None:
    assert client.post("/auth/register", json=NEW).status_code == 201
    answer = client.post("/auth/register", json={**NEW, **fields})
    assert answer.status_code == 409
    assert answer.json()["errors"][0]["loc"] == ["body", taken]


def test_twenty_registrations_of_one_name_make_one_account(server: Server) -> None:
    def register(number: int) -> int:
        new = {**NEW, "email": f"rita{number}@example.com"}
        return server.client.post("/auth/register", json=new).status_code

    with ThreadPoolExecutor(20) as pool:
        assert sorted(pool.map(register, range(20))) == [201] + [409] * 19


# --- signing in ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/login", "/auth/token", "/login/"])
@pytest.mark.parametrize("kind", ["json", "data"])
@pytest.mark.parametrize("name", ["rita", "RITA", "Rita@Example.com"])
def test_login_takes_form_or_json_and_name_or_email(client: TestClient, path: str, kind: str, name: str) -> None:
    client.post("/auth/register", json=NEW)
    given: dict[str, Any] = {kind: {"username": name, "password": PASSWORD}}
    answer = client.post(path, **given)
    assert answer.status_code == 200
    assert answer.json().keys() == {"access_token", "token_type", "expires_in", "refresh_token"}
    assert (answer.json()["token_type"], answer.json()["expires_in"]) == ("bearer", 1800)
    assert answer.headers["Cache-Control"] == "no-store"


def test_a_wrong_password_an_unknown_name_and_a_closed_account_look_the_same(client: TestClient) -> None:
    client.post("/auth/register", json=NEW)
    sign_up(client, "closed")
    database.transact(switch_off, "closed")
    answers = [
        client.post("/login", json={"username": name, "password": password})
        for name, password in (
            ("rita", "wrong password"),
            ("nobody", PASSWORD),
            ("closed", PASSWORD),
            ("rita", "x" * 999),
        )
    ]
    assert {answer.status_code for answer in answers} == {401}
    assert len({answer.text for answer in answers}) == 1


@pytest.mark.parametrize(
    "body",
    [
        pytest.param({"json": {"username": "rita"}}, id="no password"),
        pytest.param({"data": {"password": "x"}}, id="no name"),
        pytest.param({"json": ["rita", "x"]}, id="a list"),
        pytest.param({"json": {"username": {"$ne": ""}, "password": {"$ne": ""}}}, id="objects"),
        pytest.param({"content": b"{", "headers": JSON}, id="half a body"),
        pytest.param({"content": b"\xff", "headers": JSON}, id="no UTF-8"),
        pytest.param(
            {"content": b'{"username": "rita", "password": "\\ud800"}', "headers": JSON}, id="half a character"
        ),
        pytest.param({}, id="nothing"),
    ],
)
def test_login_without_its_two_fields_is_422(client: TestClient, body: dict[str, Any]) -> None:
    assert client.post("/login", **body).status_code == 422


# --- tokens -------------------------------------------------------------------------------------------------------


def forged(client: TestClient, key: str | None = None, algorithm: str = "HS256", **claims: Any) -> str:
    """A token like the one that `admin` would get, but for these claims. None takes a claim away."""
    tokens = Person(client, "admin", "admin").tokens
    real = jwt.get_unverified_claims(tokens["access_token"])
    changed = {name: value for name, value in {**real, **claims}.items() if value is not None}
    return str(jwt.encode(changed, auth._Key.value if key is None else key, algorithm=algorithm))


FORGERIES: dict[str, Callable[[TestClient], str]] = {
    "empty": lambda client: "",
    "not a token": lambda client: "abc",
    "another key": lambda client: forged(client, key="another key"),
    "an empty key": lambda client: forged(client, key=""),
    "another algorithm": lambda client: forged(client, algorithm="HS512"),
    "no algorithm": lambda client: "eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0." + forged(client).split(".")[1] + ".",
    "no expiry": lambda client: forged(client, exp=None),
    "no session": lambda client: forged(client, sid=None),
    "no type": lambda client: forged(client, typ=None),
    "a refresh token": lambda client: str(Person(client, "admin", "admin").tokens["refresh_token"]),
    "issued tomorrow": lambda client: forged(client, iat=models.now() + timedelta(days=1)),
    "somebody else's session": lambda client: forged(client, sub="2"),
    "a session that is a word": lambda client: forged(client, sid="one"),
    "a huge session": lambda client: forged(client, sid=str(10**30)),
    "a user that is a list": lambda client: forged(client, sub=["1"]),
    "an expiry that is a word": lambda client: forged(client, exp="never"),
    "100 KB": lambda client: forged(client, jti="x" * 100_000),
}


@pytest.mark.parametrize("forge", FORGERIES.values(), ids=FORGERIES)
def test_forged_tokens_are_401(client: TestClient, forge: Callable[[TestClient], str]) -> None:
    token = forge(client)
    answer = client.get("/users/me", headers={"Authorization": f"Bearer {token}"})
    if token and len(token) > 100_000:
        # Rightly signed, only long: the claims are those of a session that lives.
        assert answer.status_code == 200
    else:
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_an_access_token_lasts_half_an_hour(client: TestClient, clock: Clock, reader: Person) -> None:
    clock.advance(minutes=29, seconds=59)
    assert reader.get("/users/me").status_code == 200
    clock.advance(seconds=2)
    assert reader.get("/users/me").status_code == 401


def test_logout_kills_both_tokens_at_once(client: TestClient, reader: Person) -> None:
    elsewhere = Person(client, reader.username)
    assert reader.post("/auth/logout").status_code == 204
    assert reader.get("/users/me").status_code == 401
    assert client.post("/auth/refresh", json={"refresh_token": reader.tokens["refresh_token"]}).status_code == 401
    assert elsewhere.get("/users/me").status_code == 200


def test_a_bad_token_is_an_error_where_none_is_needed_too(client: TestClient, reader: Person) -> None:
    reader.post("/auth/logout")
    for path in ("/events", "/stream?limit=1", "/books?added_by=me"):
        assert reader.get(path).status_code == 401


def test_switching_an_account_off_kills_its_tokens(client: TestClient, reader: Person) -> None:
    database.transact(switch_off, reader.username)
    assert reader.get("/users/me").status_code == 401
    assert client.post("/auth/refresh", json={"refresh_token": reader.tokens["refresh_token"]}).status_code == 401


def test_each_refresh_token_works_once_and_its_reuse_ends_the_login(client: TestClient, reader: Person) -> None:
    first = reader.tokens["refresh_token"]
    second = client.post("/auth/refresh", json={"refresh_token": first})
    assert second.status_code == 200
    reader.tokens = second.json()
    assert reader.get("/users/me").status_code == 200
    assert client.post("/auth/refresh", json={"refresh_token": first}).status_code == 401
    assert reader.get("/users/me").status_code == 401
    assert client.post("/auth/refresh", json={"refresh_token": reader.tokens["refresh_token"]}).status_code == 401


def test_an_access_token_does_not_refresh(client: TestClient, reader: Person) -> None:
    assert client.post("/auth/refresh", json={"refresh_token": reader.tokens["access_token"]}).status_code == 401
    assert reader.get("/users/me").status_code == 200


def test_a_refresh_token_lasts_two_weeks_from_its_last_use(client: TestClient, clock: Clock, reader: Person) -> None:
    clock.advance(days=13)
    answer = client.post("/auth/refresh", json={"refresh_token": reader.tokens["refresh_token"]})
    clock.advance(days=13)
    answer = client.post("/auth/refresh", json={"refresh_token": answer.json()["refresh_token"]})
    assert answer.status_code == 200
    clock.advance(days=15)
    assert client.post("/auth/refresh", json={"refresh_token": answer.json()["refresh_token"]}).status_code == 401


def test_twenty_refreshes_of_one_token_at_once_give_at_most_one_successor(server: Server) -> None:
    reader = sign_up(server.client, "rita")

    def refresh(_number: int) -> int:
        body = {"refresh_token": reader.tokens["refresh_token"]}
        return server.client.post("/auth/refresh", json=body).status_code

    with ThreadPoolExecutor(20) as pool:
        assert sorted(pool.map(refresh, range(20))) == [200] + [401] * 19


def test_the_database_holds_no_secret_in_plain(client: TestClient, reader: Person) -> None:
    def stored(session: Session) -> str:
        return str([vars(row) for table in (User, LoginSession) for row in session.exec(select(table))])

    rows = database.transact(stored)
    assert PASSWORD not in rows
    assert jwt.get_unverified_claims(reader.tokens["refresh_token"])["jti"] not in rows
    assert "$argon2id$v=19$m=19456,t=2,p=1$" in rows


# --- my account ---------------------------------------------------------------------------------------------------


def test_i_can_change_my_name_and_address(reader: Person) -> None:
    assert reader.patch("/users/me", json={"full_name": "Rita R."}).json()["full_name"] == "Rita R."
    changed = reader.patch("/users/me", json={"email": "New@Example.com", "full_name": None}).json()
    assert (changed["email"], changed["full_name"]) == ("new@example.com", None)


@pytest.mark.parametrize(
    ("change", "status"),
    [
        pytest.param({"role": "admin"}, 422, id="my role"),
        pytest.param({"is_active": False}, 422, id="my state"),
        pytest.param({"username": "root"}, 422, id="my user name"),
        pytest.param({"email": None}, 422, id="no address"),
        pytest.param({"email": "admin@example.com"}, 409, id="somebody else's address"),
    ],
)
def test_i_can_not_change(reader: Person, change: dict[str, Any], status: int) -> None:
    before = reader.get("/users/me").json()
    assert reader.patch("/users/me", json=change).status_code == status
    assert reader.get("/users/me").json() == before


# --- roles and the first start ------------------------------------------------------------------------------------


def test_adding_books_can_be_left_to_staff(
    client: TestClient, reader: Person, librarian: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "readers_can_add", False)
    book = {"title": "Emma", "author": "Jane Austen"}
    assert client.post("/books", json=book).status_code == 401
    assert reader.post("/books", json=book).status_code == 403
    assert reader.post("/books/upload", files={"file": ("a.csv", b"title,author\nA,B\n")}).status_code == 403
    assert librarian.post("/books", json=book).status_code == 201


def test_a_new_role_holds_for_the_tokens_that_are_out(client: TestClient, reader: Person, other_reader: Person) -> None:
    book = other_reader.add_book()
    assert reader.delete(f"/books/{book['id']}").status_code == 403
    database.transact(set_role, reader.username, models.Role.librarian)
    assert reader.delete(f"/books/{book['id']}").status_code == 204


def test_development_mode_says_so_and_keeps_its_key(serve: Callable[..., Server]) -> None:
    server = serve(SECRET_KEY="")
    admin = Person(server.client, "admin", "admin")
    assert "Development mode: SECRET_KEY is not set. Sign in as admin / admin." in server.log.read_text()
    server.restart()
    admin.client = server.client
    assert admin.get("/users/me").json()["role"] == "admin"


KEY = "an-example-key-of-forty-characters-or-so"


def test_in_production_the_first_admin_comes_from_the_settings(serve: Callable[..., Server]) -> None:
    server = serve(SECRET_KEY=KEY, ADMIN_USERNAME="root", ADMIN_PASSWORD="long enough", ADMIN_EMAIL="root@example.com")
    root = Person(server.client, "root", "long enough")
    assert root.get("/users/me").json().items() >= {"username": "root", "role": "admin"}.items()
    assert "long enough" not in server.log.read_text()


def test_in_production_without_a_password_nobody_is_made(serve: Callable[..., Server]) -> None:
    server = serve(SECRET_KEY=KEY)
    assert server.client.post("/login", data={"username": "admin", "password": "admin"}).status_code == 401


def test_the_password_of_development_mode_does_not_go_public(serve: Callable[..., Server]) -> None:
    server = serve(SECRET_KEY="")
    server.stop()
    with pytest.raises(AssertionError, match="set ADMIN_PASSWORD"):
        serve(SECRET_KEY=KEY)
    public = serve(SECRET_KEY=KEY, ADMIN_PASSWORD="long enough")
    assert public.client.post("/login", data={"username": "admin", "password": "admin"}).status_code == 401
    assert Person(public.client, "admin", "long enough").get("/users/me").status_code == 200
