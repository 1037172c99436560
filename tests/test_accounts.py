"""Registration, confirming e-mail addresses, and passwords."""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urljoin

import pytest
from fastapi.testclient import TestClient

from accounts import Email
from settings import settings
from tests.fixtures import NEW, PASSWORD, Clock, Person, Server, code_in, sign_up, token_in, wait_for

# --- registration -------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no e-mail": ({"email": None}, "email"),
    "an e-mail without a host": ({"email": "rita@"}, "email"),
    "an e-mail that mail headers would decode": ({"email": "=?utf-8?q?rita?=@example.com"}, "email"),
    "a name with an @": ({"username": "rita@home"}, "username"),
    "a name with a slash": ({"username": "ri/ta"}, "username"),
    "an empty name": ({"username": "  "}, "username"),
    "a short password": ({"password": "1234567"}, "password"),
    "a long password": ({"password": "x" * 129}, "password"),
    "a password with a NUL": ({"password": "x" * 8 + "\0"}, "password"),
    "the name as password": ({"username": "rita-the-reader", "password": "Rita-the-Reader"}, "password"),
    "the e-mail as password": ({"password": "RITA@example.com"}, "password"),
    "a common password": ({"password": "Password123"}, "password"),
    "a role": ({"role": "admin"}, "role"),
    "is_active": ({"is_active": True}, "is_active"),
}


@pytest.mark.parametrize(("fields", "named"), REFUSED.values(), ids=REFUSED)
def test_registration_refuses(client: TestClient, fields: dict[str, Any], named: str) -> None:
    answer = client.post("/auth/register", json={**NEW, **fields})
    assert answer.status_code == 422
    assert [error["loc"] for error in answer.json()["errors"]] == [["body", named]]


@pytest.mark.parametrize(
    ("fields", "taken"),
    [
        pytest.param({"email": "other@example.com", "username": "RITA"}, "username", id="the user name in upper case"),
        pytest.param({"username": "other", "email": "Rita@EXAMPLE.com"}, "email", id="the address in upper case"),
        # Otherwise a refusal, which leaves no trace, would tell whether there is an account with the address.
        pytest.param({}, "username", id="both, as they are"),
        pytest.param({"username": "admin"}, "username", id="both, of two accounts"),
    ],
)
@pytest.mark.parametrize("path", ["/auth/register", "/users"])
def test_user_names_and_addresses_are_unique_ignoring_case(
    client: TestClient, admin: Person, path: str, fields: dict[str, str], taken: str
) -> None:
    assert client.post("/auth/register", json=NEW).status_code == 201
    answer = admin.post(path, json={**NEW, **fields})
    assert answer.status_code == 409
    assert [error["loc"] for error in answer.json()["errors"]] == [["body", taken]]


@pytest.mark.slow
def test_concurrent_registrations_of_one_name_make_one_account(server: Server) -> None:
    def register(number: int) -> int:
        new = {**NEW, "email": f"rita{number}@example.com"}
        return server.client.post("/auth/register", json=new).status_code

    with ThreadPoolExecutor(20) as pool:
        assert sorted(pool.map(register, range(20))) == [201] + [409] * 19


# --- confirming an address ----------------------------------------------------------------------------------------

JSON_ACCEPTED = {"Accept": "application/json"}
HTML_ACCEPTED = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
BUTTON = '<form method="post">'


def link_in(email: Email) -> str:
    return f"/auth/verify-email/{token_in(email)}"


def confirm(client: TestClient, email: Email) -> int:
    return client.post(link_in(email)).status_code


@pytest.mark.parametrize(
    ("method", "headers"),
    [
        pytest.param("POST", {}, id="POST"),
        pytest.param("POST", JSON_ACCEPTED, id="POST for JSON"),
        pytest.param("GET", JSON_ACCEPTED, id="GET for JSON"),
        pytest.param("GET", {"Accept": "text/plain, Application/JSON;q=0.9, */*"}, id="GET for JSON or text"),
    ],
)
def test_a_link_confirms_the_address_once(
    client: TestClient, mailbox: list[Email], method: str, headers: dict[str, str]
) -> None:
    client.post("/auth/register", json=NEW)
    (email,) = mailbox
    assert email.to == "rita@example.com"
    assert f"{settings.public_url}/auth/verify-email/" in email.text
    rita = Person(client, "rita")
    assert rita.get("/users/me").json()["email_verified_at"] is None
    answer = client.request(method, link_in(email), headers=headers)
    assert answer.status_code == 200
    assert answer.json() == {
        "email": "rita@example.com",
        "email_verified_at": rita.get("/users/me").json()["email_verified_at"],
    }
    assert client.request(method, link_in(email), headers=headers).status_code == 404
    assert confirm(client, email) == 404
    events = rita.get("/events", params={"types": "account.email_verified"}).json()["items"]
    assert [event["data"] for event in events] == [{"email": "rita@example.com"}]


NOT_JSON = [
    *("*/*", "text/html", HTML_ACCEPTED["Accept"], "application/*", "", None),
    *("application/jsonp", "application/problem+json", "text/html, application/json;q=0.1"),
]


@pytest.mark.parametrize("accept", NOT_JSON, ids=str)
def test_following_a_link_shows_a_button_and_confirms_nothing(
    client: TestClient, mailbox: list[Email], accept: str | None
) -> None:
    """Mail scanners follow links, most of them with a browser's headers or none."""
    client.post("/auth/register", json=NEW)
    link = link_in(mailbox[0])
    del client.headers["Accept"]
    for _ in range(2):
        page = client.get(link, headers={} if accept is None else {"Accept": accept})
        assert (page.status_code, page.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
        assert BUTTON in page.text
    assert client.head(link).status_code == 405
    assert Person(client, "rita").get("/users/me").json()["email_verified_at"] is None
    assert confirm(client, mailbox[0]) == 200


def test_the_pages_of_a_link_are_locked_down(client: TestClient, mailbox: list[Email]) -> None:
    new = {**NEW, "email": "a&lt'b@example.com"}
    assert client.post("/auth/register", json=new).status_code == 201
    link = link_in(mailbox[0])
    shown, confirmed = client.get(link), client.post(link, headers=HTML_ACCEPTED)
    assert "<h1>Your e-mail address is confirmed</h1>" in confirmed.text
    assert "The address a&amp;lt&#x27;b@example.com is confirmed." in confirmed.text
    assert BUTTON not in confirmed.text
    for page in (shown, confirmed):
        assert page.headers["Content-Security-Policy"] == (
            "default-src 'none'; style-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
        )
        assert page.headers["Cache-Control"] == "no-store"
        assert page.headers["Referrer-Policy"] == "no-referrer"
        style = re.findall(r'<link rel="stylesheet" href="(.*?)">', page.text)
        assert [client.get(urljoin(link, address)).status_code for address in style] == [200]
    assert client.post(link, headers=HTML_ACCEPTED).status_code == 404


def test_the_token_of_a_link_is_not_logged(
    client: TestClient, mailbox: list[Email], caplog: pytest.LogCaptureFixture
) -> None:
    client.post("/auth/register", json=NEW)
    token = token_in(mailbox[0])
    caplog.set_level("INFO", "books")
    paths = (token, f"{token}/", f"{token}/x", f"{token}?a=b", f"{token}%00")
    for path in (*(f"/auth/verify-email/{path}" for path in paths), f"/auth/verify%2Demail/{token}"):
        for method in ("HEAD", "GET", "PUT", "POST"):
            client.request(method, path)
    logged = [record.getMessage() for record in caplog.records]
    assert sum("/auth/verify-email/ " in line for line in logged) == 24
    assert not [line for line in logged if token in line]


def test_links_in_mails_ignore_the_host_header(client: TestClient, mailbox: list[Email]) -> None:
    """Whoever registers somebody else's address must not choose where its link leads."""
    hostile = {"Host": "evil.example", "X-Forwarded-Host": "evil.example"}
    client.post("/auth/register", json=NEW, headers=hostile)
    assert "evil" not in mailbox[0].text


@pytest.mark.parametrize(("hours", "status"), [(23.9, 200), (24.1, 404)], ids=["in time", "too late"])
def test_a_link_is_valid_for_24_hours(
    client: TestClient, clock: Clock, mailbox: list[Email], hours: float, status: int
) -> None:
    client.post("/auth/register", json=NEW)
    clock.advance(hours=hours)
    assert confirm(client, mailbox[0]) == status


@pytest.mark.parametrize("token", ["x", "x" * 101, "%00", "%ff", "..%2f..", "'--"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_unknown_link_confirms_nothing(client: TestClient, method: str, token: str) -> None:
    answer = client.request(method, f"/auth/verify-email/{token}", headers=JSON_ACCEPTED)
    assert answer.status_code in (404, 422)
    assert answer.headers["Content-Type"] == "application/problem+json"


def test_a_code_for_a_password_confirms_nothing(client: TestClient, reader: Person, mailbox: list[Email]) -> None:
    client.post("/auth/forgot-password", json={"email": "rita@example.com"})
    code = code_in(mailbox[0])
    for token in (code, f"2:{code}"):
        assert client.post(f"/auth/verify-email/{token}").status_code == 404


def test_another_link_can_be_requested(client: TestClient, mailbox: list[Email]) -> None:
    client.post("/auth/register", json=NEW)
    assert client.post("/auth/verify-email", json={"email": " Rita@Example.com "}).status_code == 202
    first, second = mailbox
    assert second.to == "rita@example.com"
    assert confirm(client, second) == 200
    assert confirm(client, first) == 404, "of one address, confirming it uses up all links"


def test_requests_for_a_link_do_not_reveal_accounts(client: TestClient, admin: Person, mailbox: list[Email]) -> None:
    client.post("/auth/register", json=NEW)
    confirmed, closed = sign_up(client, "confirmed"), sign_up(client, "closed")
    assert confirm(client, mailbox[1]) == 200
    admin.patch(f"/users/{closed.get('/users/me').json()['id']}", json={"is_active": False})
    pending = sign_up(client, "pending")
    assert confirm(client, mailbox[-1]) == 200
    pending.patch("/users/me", json={"email": "new@example.com", "current_password": PASSWORD})
    mailbox.clear()
    names = ("rita", "confirmed", "closed", "pending", "new", "nobody")
    answers = [client.post("/auth/verify-email", json={"email": f"{name}@example.com"}) for name in names]
    answers.append(confirmed.post("/auth/verify-email", json={"email": "rita@example.com"}))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.text for answer in answers}) == 1
    assert [email.to for email in mailbox] == ["rita@example.com", "new@example.com", "rita@example.com"]


@pytest.mark.parametrize(
    "body",
    [
        pytest.param({}, id="no address"),
        pytest.param({"email": None}, id="null"),
        pytest.param({"email": 1}, id="a number"),
        pytest.param({"email": ["rita@example.com"]}, id="a list"),
        pytest.param({"email": "rita@example.com\0"}, id="NUL"),
        pytest.param({"email": "rita@example.com\nBcc: x@example.com"}, id="a line break"),
        pytest.param({"email": f"{'r' * 10_000}@example.com"}, id="huge"),
        pytest.param({"email": "rita@example.com", "x": 1}, id="another field"),
    ],
)
def test_an_invalid_request_for_a_link_mails_nothing(
    client: TestClient, mailbox: list[Email], body: dict[str, Any]
) -> None:
    client.post("/auth/register", json=NEW)
    mailbox.clear()
    assert client.post("/auth/verify-email", json=body).status_code == 422
    assert mailbox == []


@pytest.mark.slow
@pytest.mark.parametrize(("method", "headers"), [("POST", {}), ("GET", JSON_ACCEPTED)], ids=["POST", "GET"])
def test_of_concurrent_confirmations_one_succeeds(server: Server, method: str, headers: dict[str, str]) -> None:
    sign_up(server.client, "rita")
    token = wait_for(lambda: tokens_in_log(server) or None)[0]

    def attempt(_number: int) -> int:
        return server.client.request(method, f"/auth/verify-email/{token}", headers=headers).status_code

    with ThreadPoolExecutor(20) as pool:
        assert sorted(pool.map(attempt, range(20))) == [200] + [404] * 19
    access_log = [line for line in server.log.read_text().splitlines() if " books.access " in line]
    assert not [line for line in access_log if token in line]


def tokens_in_log(server: Server) -> list[str]:
    """Without SMTP_HOST, mails are in the log."""
    return re.findall(r"/auth/verify-email/([\w-]{20,})\n", server.log.read_text())


# --- forgotten passwords ------------------------------------------------------------------------------------------

FORGOTTEN = {"email": "rita@example.com"}
NEW_PASSWORD = "another horse, another battery"


def reset(client: TestClient, code: str, email: str = "rita@example.com", password: str = NEW_PASSWORD) -> int:
    body = {"email": email, "otp": code, "new_password": password}
    return client.post("/auth/reset-password", json=body).status_code


@pytest.fixture
def code(client: TestClient, reader: Person, mailbox: list[Email], monkeypatch: pytest.MonkeyPatch) -> str:
    """The code in the mail to Rita, who forgot her password."""
    monkeypatch.setattr("accounts.REFUSAL_SECONDS", 0)
    client.post("/auth/forgot-password", json={"email": "Rita@Example.com"})
    return code_in(mailbox.pop())


def wrong(code: str) -> str:
    return f"{(int(code) + 1) % 10**6:06}"


def test_a_code_sets_a_new_password_once_and_ends_every_session(
    client: TestClient, reader: Person, code: str, mailbox: list[Email]
) -> None:
    assert reset(client, code) == 204
    assert reader.get("/users/me").status_code == 401
    assert client.post("/auth/refresh", json={"refresh_token": reader.tokens["refresh_token"]}).status_code == 401
    assert client.post("/login", json={"username": "rita", "password": PASSWORD}).status_code == 401
    rita = Person(client, "rita", NEW_PASSWORD)
    assert rita.get("/users/me").json()["email_verified_at"], "the code was mailed to that address"
    assert [(email.to, email.subject) for email in mailbox] == [("rita@example.com", "Your password was changed")]
    assert reset(client, code, password="a third one") == 400


@pytest.mark.parametrize(("minutes", "status"), [(9.9, 204), (10.1, 400)], ids=["in time", "too late"])
def test_a_code_is_valid_for_ten_minutes(
    client: TestClient, clock: Clock, code: str, minutes: float, status: int
) -> None:
    clock.advance(minutes=minutes)
    assert reset(client, code) == status


def test_a_code_has_five_attempts(client: TestClient, code: str) -> None:
    assert [reset(client, wrong(code)) for _ in range(5)] == [400] * 5
    assert reset(client, code) == 400


def test_the_fifth_attempt_may_succeed(client: TestClient, code: str) -> None:
    assert [reset(client, wrong(code)) for _ in range(4)] == [400] * 4
    assert reset(client, code) == 204


def test_a_new_code_replaces_the_earlier_one(client: TestClient, code: str, mailbox: list[Email]) -> None:
    client.post("/auth/forgot-password", json=FORGOTTEN)
    newer = code_in(mailbox.pop())
    if newer != code:  # one time in a million they are the same
        assert reset(client, code) == 400
    assert reset(client, newer) == 204


def test_a_code_works_for_its_own_address_only(client: TestClient, other_reader: Person, code: str) -> None:
    assert reset(client, code, email="oskar@example.com") == 400
    assert reset(client, code, email="nobody@example.com") == 400
    assert other_reader.get("/users/me").status_code == 200
    assert reset(client, code, email="RITA@example.com") == 204


@pytest.mark.slow
def test_password_resets_do_not_reveal_accounts(
    client: TestClient, admin: Person, reader: Person, mailbox: list[Email]
) -> None:
    closed = sign_up(client, "closed")
    admin.patch(f"/users/{closed.get('/users/me').json()['id']}", json={"is_active": False})
    mailbox.clear()
    answers = [
        client.post("/auth/forgot-password", json={"email": email})
        for email in ("rita@example.com", "nobody@example.com", "closed@example.com")
    ]
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.text for answer in answers}) == 1
    assert [email.to for email in mailbox] == ["rita@example.com"]
    refusals = [
        client.post("/auth/reset-password", json={"email": email, "otp": "000000", "new_password": NEW_PASSWORD})
        for email in ("rita@example.com", "nobody@example.com", "closed@example.com")
    ]
    assert len({(answer.status_code, answer.json()["detail"]) for answer in refusals}) == 1


def test_a_code_of_a_deactivated_account_is_refused(
    client: TestClient, admin: Person, reader: Person, code: str
) -> None:
    admin.patch("/users/2", json={"is_active": False})
    assert reset(client, code) == 400


@pytest.mark.parametrize(
    "body",
    [
        pytest.param({"otp": "12345"}, id="five digits"),
        pytest.param({"otp": "1234567"}, id="seven digits"),
        pytest.param({"otp": "١٢٣٤٥٦"}, id="Arabic digits"),
        pytest.param({"otp": 123456}, id="a number"),
        pytest.param({"otp": ["123456"]}, id="a list"),
        pytest.param({"new_password": "short"}, id="a short password"),
        pytest.param({"new_password": "password1"}, id="a common password"),
        pytest.param({"new_password": "rita@example.com"}, id="the address"),
        pytest.param({"email": None}, id="no address"),
    ],
)
def test_an_invalid_reset_request_counts_no_attempt(client: TestClient, code: str, body: dict[str, Any]) -> None:
    right = {"email": "rita@example.com", "otp": code, "new_password": NEW_PASSWORD}
    for _ in range(6):
        assert client.post("/auth/reset-password", json={**right, **body}).status_code == 422
    assert reset(client, code) == 204


@pytest.mark.slow
def test_concurrent_resets_with_one_code_set_one_password(serve: Callable[..., Server]) -> None:
    server = serve()
    sign_up(server.client, "rita")
    server.client.post("/auth/forgot-password", json=FORGOTTEN)
    code = wait_for(lambda: _logged_code(server))

    def attempt(number: int) -> int:
        body = {**FORGOTTEN, "otp": code, "new_password": f"{NEW_PASSWORD} {number}"}
        return server.client.post("/auth/reset-password", json=body).status_code

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(attempt, range(20)))
    assert sorted(answers) == [204] + [400] * 19
    Person(server.client, "rita", f"{NEW_PASSWORD} {answers.index(204)}").get("/users/me")


def _logged_code(server: Server) -> str | None:
    """Without SMTP_HOST, mails are in the log."""
    text = server.log.read_text()
    if "Your code for a new password" not in text:
        return None
    return code_in(Email("", "", text))


# --- changing the password ----------------------------------------------------------------------------------------


def test_changing_my_password_ends_my_other_sessions(client: TestClient, reader: Person, mailbox: list[Email]) -> None:
    elsewhere = Person(client, reader.username)
    change = {"current_password": PASSWORD, "new_password": NEW_PASSWORD}
    assert reader.post("/auth/change-password", json=change).status_code == 204
    assert reader.get("/users/me").status_code == 200
    assert elsewhere.get("/users/me").status_code == 401
    assert client.post("/login", json={"username": "rita", "password": PASSWORD}).status_code == 401
    assert [email.subject for email in mailbox] == ["Your password was changed"]
    events = reader.get("/events", params={"types": "account.password_changed"}).json()["items"]
    assert len(events) == 1


def test_changing_my_password_cancels_codes(client: TestClient, reader: Person, code: str) -> None:
    reader.post("/auth/change-password", json={"current_password": PASSWORD, "new_password": NEW_PASSWORD})
    assert reset(client, code) == 400


@pytest.mark.parametrize(
    ("change", "status"),
    [
        pytest.param({"current_password": "wrong password"}, 403, id="a wrong password"),
        pytest.param({"current_password": ""}, 403, id="no password"),
        pytest.param({"new_password": "short"}, 422, id="a short password"),
        pytest.param({"new_password": "qwertyuiop"}, 422, id="a common password"),
        pytest.param({"new_password": "RITA@example.com"}, 422, id="my address"),
    ],
)
def test_password_changes_are_refused(client: TestClient, reader: Person, change: dict[str, str], status: int) -> None:
    body = {"current_password": PASSWORD, "new_password": NEW_PASSWORD, **change}
    assert reader.post("/auth/change-password", json=body).status_code == status
    Person(client, "rita").get("/users/me")
