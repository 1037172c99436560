"""Sign in and out: logins, refresh tokens, sessions and the audit trail."""

import socket
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2 as httpx
import pytest
from fastapi.testclient import TestClient
from sqlmodel import Session, select

import auth
import database
import models
from accounts import Email
from models import LoginSession, OneTimeCode, StoredAnswer
from settings import settings
from tests.fixtures import JSON, NEW, PASSWORD, Clock, Person, Server, sign_up, token_in, wait_for

# --- signing in ---------------------------------------------------------------------------------------------------


def test_a_form_that_repeats_a_field_is_refused(client: TestClient) -> None:
    client.post("/auth/register", json=NEW)
    answer = client.post("/login", data={"username": ["admin", "rita"], "password": PASSWORD})
    assert (answer.status_code, answer.json()["detail"]) == (422, "username: is given more than once")


def test_json_with_the_content_type_of_a_form_is_explained(client: TestClient) -> None:
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = client.post("/login", content='{"username": "rita", "password": "x"}', headers=form)
    assert answer.status_code == 422
    assert "JSON needs the Content-Type application/json" in answer.json()["detail"]


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/login", "/auth/register"])
def test_a_client_that_disconnects_during_its_body_is_no_server_error(server: Server, path: str) -> None:
    with socket.create_connection(("127.0.0.1", server.client.base_url.port or 0)) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n"
        connection.sendall(head.encode() + b"{}")
    wait_for(lambda: f"POST {path} 400" in server.log.read_text() or None)
    assert "Traceback" not in server.log.read_text()


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


def test_a_wrong_password_an_unknown_name_and_a_deactivated_account_look_the_same(
    client: TestClient, admin: Person
) -> None:
    client.post("/auth/register", json=NEW)
    sign_up(client, "closed")
    assert admin.patch("/users/3", json={"is_active": False}).json()["username"] == "closed"
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
    assert len({answer.text.replace(answer.headers["X-Request-ID"], "") for answer in answers}) == 1


@pytest.mark.parametrize(
    "body",
    [
        pytest.param({"json": {"username": "rita"}}, id="no password"),
        pytest.param({"data": {"password": "x"}}, id="no name"),
        pytest.param({"json": ["rita", "x"]}, id="a list"),
        pytest.param({"json": {"username": {"$ne": ""}, "password": {"$ne": ""}}}, id="objects"),
        pytest.param({"content": b"{", "headers": JSON}, id="half of a body"),
        pytest.param({"content": b"\xff", "headers": JSON}, id="not UTF-8"),
        pytest.param(
            {"content": b'{"username": "rita", "password": "\\ud800"}', "headers": JSON}, id="half of a surrogate pair"
        ),
        pytest.param({}, id="no body"),
    ],
)
def test_an_invalid_login_is_422(client: TestClient, body: dict[str, Any]) -> None:
    assert client.post("/login", **body).status_code == 422


@pytest.mark.parametrize("media_type", ["text/plain", "application/xml", "application/octet-stream"])
def test_a_login_of_another_type_is_415(client: TestClient, media_type: str) -> None:
    answer = client.post("/login", content=b"username=rita&password=x", headers={"Content-Type": media_type})
    assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_media_type")
    assert media_type in answer.json()["detail"]


@pytest.mark.parametrize("path", ["/login", "/auth/token"])
def test_json_takes_no_other_fields_and_a_form_those_of_oauth2(client: TestClient, path: str) -> None:
    client.post("/auth/register", json=NEW)
    right = {"username": "rita", "password": PASSWORD}
    answer = client.post(path, json={**right, "x": 1})
    assert answer.status_code == 422
    assert [error["loc"] for error in answer.json()["errors"]] == [["body", "x"]]
    form = {**right, "grant_type": "password", "scope": "", "client_id": "a phone", "client_secret": ""}
    assert client.post(path, data=form).status_code == 200


def test_a_password_that_is_changed_during_a_login_opens_no_session(client: TestClient, reader: Person) -> None:
    """It is verified before the transaction that starts the session."""
    account = database.read_sync(auth.find_user, "rita")
    device = {"address": "testclient", "user_agent": None}

    def start(session: Session) -> bool:
        return auth.start_session(session, account.id, account.password_hash, device, None) is not None

    assert database.write_sync(start) is True
    change = {"current_password": PASSWORD, "new_password": "another horse"}
    assert reader.post("/auth/change-password", json=change).status_code == 204
    assert database.write_sync(start) is False


# --- refreshing and signing out ------------------------------------------------------------------------------------


def test_logout_revokes_both_tokens_at_once(client: TestClient, reader: Person) -> None:
    elsewhere = Person(client, reader.username)
    assert reader.post("/auth/logout").status_code == 204
    assert reader.get("/users/me").status_code == 401
    assert client.post("/auth/refresh", json={"refresh_token": reader.tokens["refresh_token"]}).status_code == 401
    assert elsewhere.get("/users/me").status_code == 200


def refreshed(client: TestClient, token: str) -> dict[str, Any] | None:
    answer = client.post("/auth/refresh", json={"refresh_token": token})
    assert answer.status_code in (200, 401)
    return dict(answer.json()) if answer.status_code == 200 else None


def test_a_refresh_token_works_once_and_its_reuse_ends_the_session(
    client: TestClient, clock: Clock, reader: Person
) -> None:
    first = reader.tokens["refresh_token"]
    reader.tokens = refreshed(client, first) or {}
    assert reader.get("/users/me").status_code == 200
    clock.advance(seconds=11)
    assert refreshed(client, first) is None
    assert reader.get("/users/me").status_code == 401
    assert refreshed(client, reader.tokens["refresh_token"]) is None


def test_a_refresh_can_be_repeated_for_ten_seconds(client: TestClient, clock: Clock, reader: Person) -> None:
    first = reader.tokens["refresh_token"]
    lost = refreshed(client, first)
    clock.advance(seconds=10)
    again = refreshed(client, first)
    assert lost is not None
    assert again is not None
    assert lost["refresh_token"] == again["refresh_token"], "only one refresh token works"
    for pair in (lost, again):
        reader.tokens = pair
        assert reader.get("/users/me").status_code == 200


def test_reuse_within_ten_seconds_is_detected_at_the_next_refresh(client: TestClient, reader: Person) -> None:
    stolen = reader.tokens["refresh_token"]
    own, stolen_pair = refreshed(client, stolen), refreshed(client, stolen)
    assert own is not None
    assert stolen_pair is not None
    newest = refreshed(client, stolen_pair["refresh_token"])
    assert newest is not None
    assert refreshed(client, stolen) is None, "even within the ten seconds: its successor has been used"
    assert refreshed(client, newest["refresh_token"]) is None
    for reader.tokens in (own, stolen_pair, newest):
        assert reader.get("/users/me").status_code == 401


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


@pytest.mark.slow
def test_concurrent_refreshes_of_one_token_give_one_refresh_token(server: Server) -> None:
    reader = sign_up(server.client, "rita")

    def refresh(_number: int) -> str:
        body = {"refresh_token": reader.tokens["refresh_token"]}
        return str(server.client.post("/auth/refresh", json=body).json().get("refresh_token"))

    for _ in range(3):
        with ThreadPoolExecutor(20) as pool:
            successors = set(pool.map(refresh, range(20)))
        assert len(successors) == 1
        reader.tokens["refresh_token"] = successors.pop()


# --- sessions -----------------------------------------------------------------------------------------------------


def test_sessions_can_be_listed_and_ended(client: TestClient, clock: Clock) -> None:
    client.post("/auth/register", json=NEW)
    client.headers["User-Agent"] = "a lost phone"
    phone = Person(client, "rita")
    clock.advance(minutes=5)
    client.headers["User-Agent"] = "a desk" * 100
    desk = Person(client, "rita")
    sessions = desk.get("/auth/sessions").json()
    assert [(one["user_agent"], one["current"]) for one in sessions["items"]] == [
        (("a desk" * 100)[:200], True),
        ("a lost phone", False),
    ]
    lost = sessions["items"][1]["id"]
    assert desk.delete(f"/auth/sessions/{lost}").status_code == 204
    assert phone.get("/users/me").status_code == 401
    assert desk.delete(f"/auth/sessions/{lost}").status_code == 404
    assert [one["current"] for one in desk.get("/auth/sessions").json()["items"]] == [True]


def test_the_sessions_of_others_can_not_be_seen_or_ended(reader: Person, other_reader: Person, admin: Person) -> None:
    session_id = reader.get("/auth/sessions").json()["items"][0]["id"]
    for person in (other_reader, admin):
        assert session_id not in [one["id"] for one in person.get("/auth/sessions").json()["items"]]
        assert person.delete(f"/auth/sessions/{session_id}").status_code == 404
    assert reader.get("/users/me").status_code == 200


def test_logout_everywhere_ends_all_my_sessions_only(client: TestClient, reader: Person, other_reader: Person) -> None:
    elsewhere = Person(client, reader.username)
    assert reader.post("/auth/logout-all").status_code == 204
    for person in (reader, elsewhere):
        assert person.get("/users/me").status_code == 401
        assert refreshed(client, person.tokens["refresh_token"]) is None
    assert other_reader.get("/users/me").status_code == 200


def test_expired_sessions_and_codes_are_deleted(
    client: TestClient, clock: Clock, reader: Person, mailbox: list[Email]
) -> None:
    Person(client, reader.username).post("/auth/logout")
    client.post("/auth/forgot-password", json={"email": "rita@example.com"})

    def left(session: Session) -> tuple[int, int]:
        return len(session.exec(select(LoginSession)).all()), len(session.exec(select(OneTimeCode)).all())

    database.write_sync(auth.delete_expired)
    assert database.write_sync(left) == (1, 1)
    clock.advance(minutes=11)
    database.write_sync(auth.delete_expired)
    assert database.write_sync(left) == (1, 0)
    assert reader.get("/users/me").status_code == 200
    clock.advance(days=14)
    database.write_sync(auth.delete_expired)
    assert database.write_sync(left) == (0, 0)


def test_expired_rows_are_deleted_in_batches(client: TestClient, reader: Person, clock: Clock) -> None:
    """200,000 stored answers in one transaction kept other writers waiting for two seconds."""

    def fill(session: Session) -> None:
        common: dict[str, Any] = {
            "user_id": 2,
            "request_hash": "",
            "status": 201,
            "headers": {},
            "body": "",
            "created_at": clock.now,
        }
        session.add_all(StoredAnswer(key=str(n), **common) for n in range(2 * models.MAX_ROWS + 1))

    database.write_sync(fill)
    assert database.write_sync(auth.delete_expired) is False
    clock.advance(days=2)
    assert [database.write_sync(auth.delete_expired) for _ in range(3)] == [True, True, False]
    assert database.write_sync(lambda session: session.exec(select(StoredAnswer)).first()) is None


# --- unconfirmed addresses ---------------------------------------------------------------------------------------


def test_a_login_may_need_a_confirmed_address(
    client: TestClient, clock: Clock, mailbox: list[Email], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "require_verified_email", True)
    client.post("/auth/register", json=NEW)
    (first,) = mailbox
    for _ in range(2):
        refused = client.post("/login", json={"username": "rita", "password": PASSWORD})
        assert (refused.status_code, refused.json()["detail"]) == (
            403,
            "Confirm your e-mail address first. POST /auth/verify-email mails another link.",
        )
        assert client.post("/login", json={"username": "rita", "password": "wrong password"}).status_code == 401
        clock.advance(hours=13)
    assert mailbox == [first], "a refused login mails nothing"
    assert client.post(f"/auth/verify-email/{token_in(first)}").status_code == 404
    client.post("/auth/verify-email", json={"email": "rita@example.com"})
    assert client.post(f"/auth/verify-email/{token_in(mailbox[1])}").status_code == 200
    assert Person(client, "rita").get("/users/me").json()["email_verified_at"] is not None


def test_a_refresh_may_need_a_confirmed_address(
    client: TestClient, reader: Person, mailbox: list[Email], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "require_verified_email", True)
    assert refreshed(client, reader.tokens["refresh_token"]) is None
    client.post("/auth/verify-email", json={"email": "rita@example.com"})
    client.post(f"/auth/verify-email/{token_in(mailbox[-1])}")
    assert refreshed(client, reader.tokens["refresh_token"]) is not None


# --- the audit trail ----------------------------------------------------------------------------------------------


def test_logins_and_failures_are_recorded_for_the_owner_and_admins(
    client: TestClient, reader: Person, other_reader: Person, librarian: Person, admin: Person
) -> None:
    start = admin.get("/events", params={"limit": 100}).json()["next"]
    client.post("/login", json={"username": "rita", "password": "wrong password"}, headers={"User-Agent": "a thief"})
    client.post("/login", json={"username": "nobody", "password": "wrong password"})
    Person(client, "rita").post("/auth/logout")
    seen = {
        person.username: person.get("/events", params={"after": start, "types": "account.*"}).json()["items"]
        for person in (reader, other_reader, librarian, admin)
    }
    assert [event["type"] for event in seen["Rita"]] == ["account.login_failed", "account.login", "account.logout"]
    assert seen["Rita"][0]["data"] == {"address": "testclient", "user_agent": "a thief"}
    assert [event for event in seen["admin"] if event in seen["Rita"]] == seen["Rita"]
    nobody = [event for event in seen["admin"] if event not in seen["Rita"]]
    assert [event["type"] for event in nobody] == ["account.login_failed"], "attempts without an account"
    assert seen["Oskar"] == seen["Lydia"] == []
    assert client.get("/events", params={"after": start, "types": "account.*"}).json()["items"] == []


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/login", {"username": "NAME", "password": "wrong password"}),
        ("/auth/forgot-password", {"email": "NAME@example.com"}),
    ],
)
def test_the_ids_of_public_events_do_not_reveal_accounts(
    client: TestClient, reader: Person, path: str, body: dict[str, str]
) -> None:
    def spent(name: str) -> int:
        start = client.get("/books").headers["X-Event-Cursor"]
        client.post(path, json={key: value.replace("NAME", name) for key, value in body.items()})
        return int(client.get("/books").headers["X-Event-Cursor"]) - int(start)

    assert spent("rita") == spent("nobody") == 1


def test_the_reuse_of_a_token_is_recorded(client: TestClient, clock: Clock, reader: Person, admin: Person) -> None:
    refreshed(client, reader.tokens["refresh_token"])
    clock.advance(seconds=11)
    refreshed(client, reader.tokens["refresh_token"])
    recorded = admin.get("/events", params={"types": "account.token_reused"}).json()["items"]
    assert [event["data"] for event in recorded] == [{"session_id": 1}]


# --- response times -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize(
    ("path", "known", "unknown"),
    [
        pytest.param(
            "/login",
            {"username": "rita", "password": "wrong password"},
            {"username": "nora", "password": "wrong password"},
            id="login",
        ),
        pytest.param(
            "/auth/forgot-password", {"email": "rita@example.com"}, {"email": "nora@example.com"}, id="forgot-password"
        ),
        pytest.param(
            "/auth/verify-email", {"email": "rita@example.com"}, {"email": "nora@example.com"}, id="verify-email"
        ),
        pytest.param(
            "/auth/reset-password",
            {"email": "rita@example.com", "otp": "000000", "new_password": PASSWORD},
            {"email": "nora@example.com", "otp": "000000", "new_password": PASSWORD},
            id="reset-password",
        ),
    ],
)
def test_response_times_do_not_reveal_accounts(
    server: Server, path: str, known: dict[str, str], unknown: dict[str, str]
) -> None:
    """Of a request for a known and one for an unknown account, either is the slower one about as often."""
    sign_up(server.client, "rita")
    server.client.post("/auth/forgot-password", json={"email": "rita@example.com"})
    # A mail is composed 0.05 s after the response, and must not delay the next request.
    pause = 0.08 if path in ("/auth/forgot-password", "/auth/verify-email") else 0.01

    def seconds(body: dict[str, str]) -> float:
        # A new connection, without leftovers, and without reading the certificates of all authorities.
        with httpx.Client(base_url=server.client.base_url, verify=False) as client:
            client.get("/health")
            started = time.perf_counter()
            client.post(path, json=body)
            spent = time.perf_counter() - started
            time.sleep(pause)
            return spent

    # Each of the two comes first as often as the other.
    pairs = [
        (seconds(known), seconds(unknown)) if number % 2 else (seconds(unknown), seconds(known))[::-1]
        for number in range(200)
    ]
    slower = sum(one > other for one, other in pairs) / len(pairs)
    medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
    assert 0.35 < slower < 0.65, f"a known account is the slower one {slower:.0%} of the time"  # 4.2 sigma
    assert abs(medians[0] - medians[1]) < 0.002, medians
