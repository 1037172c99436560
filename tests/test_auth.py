"""Tokens, passwords, roles and the first admin."""

import base64
import json
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from fastapi.testclient import TestClient
from jose import jws, jwt
from passlib.context import CryptContext
from sqlmodel import Session, select

import database
import models
import security
from accounts import Email
from models import LoginSession, OneTimeCode, User
from settings import COMMON_PASSWORDS, settings
from tests.fixtures import NEW, PASSWORD, Clock, Person, Server, code_in, make, sign_up, token_in, user_named, wait_for

# --- tokens -------------------------------------------------------------------------------------------------------


def forged(client: TestClient, key: str | None = None, algorithm: str = "HS256", **claims: Any) -> str:
    """A token of `admin` with these claims changed; None removes a claim."""
    tokens = Person(client, "admin", "admin").tokens
    real = jwt.get_unverified_claims(tokens["access_token"])
    changed = {name: value for name, value in {**real, **claims}.items() if value is not None}
    return str(jwt.encode(changed, security._SigningKey.value if key is None else key, algorithm=algorithm))


def part(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


def signed_with_rsa(client: TestClient) -> str:
    """With a valid signature of an attacker's own key."""
    private = rsa.generate_private_key(65537, 2048)
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return forged(client, key=pem.decode(), algorithm="RS256")


def b64url(text: bytes) -> str:
    return base64.urlsafe_b64encode(text).decode().rstrip("=")


def of_a_deleted_user(client: TestClient) -> str:
    gone = make(client, "gone")
    assert gone.request("DELETE", "/users/me", json={"password": PASSWORD}).status_code == 204
    return str(gone.tokens["access_token"])


FORGERIES: dict[str, Callable[[TestClient], str]] = {
    "empty": lambda client: "",
    "not a token": lambda client: "abc",
    "another key": lambda client: forged(client, key="another key"),
    "an empty key": lambda client: forged(client, key=""),
    "another algorithm": lambda client: forged(client, algorithm="HS512"),
    "no algorithm": lambda client: f"{part({'alg': 'none'})}.{forged(client).split('.')[1]}.",
    "no algorithm, in capitals": lambda client: f"{part({'alg': 'NONE'})}.{forged(client).split('.')[1]}.",
    "an algorithm that is a list": lambda client: f"{part({'alg': ['HS256']})}.{forged(client).split('.', 1)[1]}",
    "a header that is a list": lambda client: f"{part(['HS256'])}.{forged(client).split('.', 1)[1]}",
    "RSA": signed_with_rsa,
    "claims that are a list": lambda client: str(jws.sign(b"[1]", security._SigningKey.value, algorithm="HS256")),
    "claims that are no JSON": lambda client: f"{part({'alg': 'HS256'})}.e30x.AAAA",
    "another signature": lambda client: forged(client)[:-4] + "AAAA",
    "expired": lambda client: forged(client, exp=models.utcnow() - timedelta(seconds=1)),
    "no expiry": lambda client: forged(client, exp=None),
    "no session": lambda client: forged(client, sid=None),
    "no type": lambda client: forged(client, typ=None),
    "a refresh token": lambda client: str(Person(client, "admin", "admin").tokens["refresh_token"]),
    "issued tomorrow": lambda client: forged(client, iat=models.utcnow() + timedelta(days=1)),
    "issued further ahead than it lives": lambda client: forged(
        client, iat=models.utcnow() + timedelta(minutes=31), exp=models.utcnow() + timedelta(minutes=60)
    ),
    "somebody else's session": lambda client: forged(client, sub="2"),
    "a session that is a word": lambda client: forged(client, sid="one"),
    "a huge session": lambda client: forged(client, sid=str(10**30)),
    "a user that is a list": lambda client: forged(client, sub=["1"]),
    "an expiry that is a word": lambda client: forged(client, exp="never"),
    "an expiry without end": lambda client: forged(client, exp=float("inf")),
    "a time of issue that is a word": lambda client: forged(client, iat="now"),
    "no id": lambda client: forged(client, jti=None),
    "no user": lambda client: forged(client, sub=None),
    "nobody": lambda client: forged(client, sub="0"),
    "a user who is deleted": of_a_deleted_user,
    "a header deeper than Python": lambda client: f"{b64url(b'[' * 2900)}.e30.AAAA",
    "100 KB": lambda client: forged(client, jti="x" * 100_000),
    "100 KB of nothing": lambda client: "x" * 100_000,
}


@pytest.mark.parametrize("forge", FORGERIES.values(), ids=FORGERIES)
def test_forged_tokens_are_401(client: TestClient, forge: Callable[[TestClient], str]) -> None:
    token = forge(client)
    answer = client.get("/users/me", headers={"Authorization": f"Bearer {token}"})
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_an_access_token_lasts_half_an_hour(client: TestClient, clock: Clock, reader: Person) -> None:
    clock.advance(minutes=29, seconds=59)
    assert reader.get("/users/me").status_code == 200
    clock.advance(seconds=2)
    assert reader.get("/users/me").status_code == 401


def test_sessions_go_on_when_the_clock_goes_back(client: TestClient, clock: Clock, reader: Person) -> None:
    clock.advance(minutes=-29)
    assert reader.get("/users/me").status_code == 200
    clock.advance(days=-1)
    answer = client.post("/auth/refresh", json={"refresh_token": reader.tokens["refresh_token"]})
    assert answer.status_code == 200
    assert Person(client, "Rita", tokens=answer.json()).get("/users/me").status_code == 200


def test_an_invalid_token_is_401_even_where_none_is_needed(client: TestClient, reader: Person) -> None:
    reader.post("/auth/logout")
    for path in ("/events", "/stream?limit=1", "/books?added_by=me"):
        assert reader.get(path).status_code == 401


@pytest.mark.usefixtures("as_in_production")
def test_the_database_stores_no_plain_secrets(client: TestClient, mailbox: list[Email]) -> None:
    reader = sign_up(client, "rita")
    client.post("/auth/forgot-password", json={"email": "rita@example.com"})
    client.post("/auth/verify-email", json={"email": "rita@example.com"})
    _, code, link = mailbox

    def stored(session: Session) -> str:
        tables: tuple[Any, ...] = (User, LoginSession, OneTimeCode)
        return str([vars(row) for table in tables for row in session.exec(select(table))])

    rows = database.write_sync(stored)
    assert PASSWORD not in rows
    assert jwt.get_unverified_claims(reader.tokens["refresh_token"])["jti"] not in rows
    assert code_in(code) not in rows
    assert token_in(link) not in rows
    assert "$argon2id$v=19$m=19456,t=2,p=1$" in rows


def test_codes_can_not_be_guessed_from_their_hashes(client: TestClient) -> None:
    """A million codes are quickly tried, but not without the key of the service."""
    before = security.hmac_hash("reset_password", 1, "271828")
    assert before == security.hmac_hash("reset_password", 1, "271828")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(security._SigningKey, "value", "another key")
        assert security.hmac_hash("reset_password", 1, "271828") != before


@pytest.mark.usefixtures("as_in_production")
def test_a_hash_with_older_parameters_is_replaced_at_the_next_login(client: TestClient, reader: Person) -> None:
    old = CryptContext(["argon2"], argon2__memory_cost=1024, argon2__time_cost=1, argon2__parallelism=1).hash(PASSWORD)

    def hash_of(session: Session) -> str:
        return user_named(session, reader.username).password_hash

    def age(session: Session) -> None:
        user_named(session, reader.username).password_hash = old

    database.write_sync(age)
    for _ in range(2):
        assert client.post("/login", json={"username": "rita", "password": PASSWORD}).status_code == 200
    assert "m=19456,t=2,p=1" in database.write_sync(hash_of)


def test_the_list_of_common_passwords() -> None:
    assert len(COMMON_PASSWORDS) == 3000
    assert {"password", "12345678", "iloveyou", "qwertyuiop"} <= COMMON_PASSWORDS
    assert all(len(password) >= 8 for password in COMMON_PASSWORDS)


@pytest.mark.parametrize(
    "password",
    [
        pytest.param("ÿ" * 128, id="the longest"),
        pytest.param("  spaces at both ends  ", id="spaces"),
        pytest.param("пароль-длинный-и-верный", id="Cyrillic"),
        pytest.param("\U0001f40d" * 8, id="emoji"),
    ],
)
def test_passwords_are_taken_literally(client: TestClient, password: str) -> None:
    new = {"username": "rita", "email": "rita@example.com", "password": password}
    assert client.post("/auth/register", json=new).status_code == 201
    for given, status in ((password, 200), (password.strip()[:-1], 401)):
        assert client.post("/login", data={"username": "rita", "password": given}).status_code == status


# --- roles and the first admin ------------------------------------------------------------------------------------


def test_adding_books_can_be_restricted_to_staff(
    client: TestClient, reader: Person, librarian: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "readers_can_add", False)
    book = {"title": "Emma", "author": "Jane Austen"}
    assert client.post("/books", json=book).status_code == 401
    assert reader.post("/books", json=book).status_code == 403
    assert reader.post("/books/upload", files={"file": ("a.csv", b"title,author\nA,B\n")}).status_code == 403
    assert librarian.post("/books", json=book).status_code == 201


WARNING = "Development mode: SECRET_KEY is not set. The first account is admin / admin.\n"


@pytest.mark.slow
def test_development_mode_warns_at_each_start_and_keeps_its_key(serve: Callable[..., Server]) -> None:
    server = serve(SECRET_KEY="")
    admin = Person(server.client, "admin", "admin")
    assert server.log.read_text().count(WARNING) == 1
    assert "data-hint" in server.client.get("/").text
    server.restart()
    admin.client = server.client
    assert admin.get("/users/me").json()["role"] == "admin"
    assert server.log.read_text().count(WARNING) == 2
    change = {"current_password": "admin", "new_password": PASSWORD}
    assert admin.post("/auth/change-password", json=change).status_code == 204
    server.restart()
    assert Person(server.client, "admin", PASSWORD).get("/users/me").status_code == 200, "the password stays"


@pytest.mark.slow
def test_development_mode_names_no_account_that_it_does_not_make(serve: Callable[..., Server]) -> None:
    server = serve(SECRET_KEY="", ADMIN_USERNAME="root", ADMIN_PASSWORD="long enough")
    log = server.log.read_text()
    assert "Development mode: SECRET_KEY is not set.\n" in log
    assert "admin / admin" not in log
    assert "data-hint" not in server.client.get("/").text
    assert Person(server.client, "root", "long enough").get("/users/me").status_code == 200


@pytest.mark.slow
def test_every_worker_warns_of_development_mode(serve: Callable[..., Server]) -> None:
    server = serve("--workers", "2", SECRET_KEY="")
    wait_for(lambda: server.log.read_text().count("Application startup complete") == 2 or None)
    assert server.log.read_text().count(WARNING) == 2


KEY = "an-example-key-of-forty-characters-or-so"


@pytest.mark.slow
def test_with_a_key_the_first_admin_comes_from_the_settings(serve: Callable[..., Server]) -> None:
    server = serve(SECRET_KEY=KEY, ADMIN_USERNAME="root", ADMIN_PASSWORD="long enough", ADMIN_EMAIL="root@example.com")
    root = Person(server.client, "root", "long enough")
    assert root.get("/users/me").json().items() >= {"username": "root", "role": "admin"}.items()
    assert "long enough" not in server.log.read_text()


@pytest.mark.slow
def test_with_a_key_and_no_password_no_admin_is_made(serve: Callable[..., Server]) -> None:
    server = serve(SECRET_KEY=KEY)
    assert server.client.post("/login", data={"username": "admin", "password": "admin"}).status_code == 401


@pytest.mark.slow
def test_the_password_of_development_mode_stops_the_start_with_a_key(serve: Callable[..., Server]) -> None:
    server = serve(SECRET_KEY="")
    server.stop()
    for options in ({}, {"ADMIN_PASSWORD": "long enough"}, {"ADMIN_PASSWORD": "long enough", "ADMIN_USERNAME": "root"}):
        with pytest.raises(AssertionError, match="the account admin still has the password of development mode"):
            serve(SECRET_KEY=KEY, **options)
    server.start()
    change = {"current_password": "admin", "new_password": PASSWORD}
    assert Person(server.client, "admin", "admin").post("/auth/change-password", json=change).status_code == 204
    server.stop()
    public = serve(SECRET_KEY=KEY, ADMIN_PASSWORD="long enough", ADMIN_USERNAME="root")
    assert "ADMIN_USERNAME is not made: there is an admin already, admin." in public.log.read_text()
    assert public.client.post("/login", data={"username": "admin", "password": "admin"}).status_code == 401
    assert Person(public.client, "admin", PASSWORD).get("/users/me").status_code == 200


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        pytest.param({}, "the account admin still has", id="an admin"),
        pytest.param({"role": "reader"}, "the account admin still has", id="ADMIN_USERNAME as a reader"),
        pytest.param({"is_active": False}, None, id="a deactivated admin"),
        pytest.param({"role": "reader", "is_active": False}, None, id="a deactivated reader"),
    ],
)
@pytest.mark.parametrize("password", [None, "long enough"], ids=["no ADMIN_PASSWORD", "ADMIN_PASSWORD"])
def test_accounts_whose_development_password_stops_the_start(
    client: TestClient,
    admin: Person,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    error: str | None,
    password: str | None,
) -> None:
    admin.post("/users", json={**NEW, "role": "admin"})
    assert Person(client, "rita").patch("/users/1", json=changes).status_code == 200
    with monkeypatch.context() as patch:
        patch.setattr(security._SigningKey, "value", security._SigningKey.value)
        patch.setattr(settings, "secret_key", KEY)
        patch.setattr(settings, "admin_password", password)
        with nullcontext() if error is None else pytest.raises(RuntimeError, match=error):
            database.write_sync(security.prepare)
    assert client.post("/login", data={"username": "admin", "password": "long enough"}).status_code == 401


def test_another_admin_with_the_development_password_stops_the_start(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(client, "root", models.Role.admin)

    def set_password(session: Session) -> None:
        user_named(session, "root").password_hash = user_named(session, "admin").password_hash
        user_named(session, "admin").password_hash = security.passwords.hash(PASSWORD)

    database.write_sync(set_password)
    monkeypatch.setattr(security._SigningKey, "value", "")
    monkeypatch.setattr(settings, "secret_key", KEY)
    with pytest.raises(RuntimeError, match="the account root still has"):
        database.write_sync(security.prepare)


@pytest.mark.slow
def test_the_first_admin_is_made_beside_readers(serve: Callable[..., Server]) -> None:
    server = serve(SECRET_KEY=KEY)
    sign_up(server.client, "rita")
    server.stop()
    with pytest.raises(AssertionError, match="another account has this email"):
        serve(SECRET_KEY=KEY, ADMIN_PASSWORD="long enough", ADMIN_EMAIL="rita@example.com")
    again = serve(SECRET_KEY=KEY, ADMIN_PASSWORD="long enough")
    assert Person(again.client, "admin", "long enough").get("/users").json()["total"] == 2
