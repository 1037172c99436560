"""Accounts: making one, confirming its address, forgetting and changing its password."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient

from mail import Email
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


@pytest.mark.slow
def test_twenty_registrations_of_one_name_make_one_account(server: Server) -> None:
    def register(number: int) -> int:
        new = {**NEW, "email": f"rita{number}@example.com"}
        return server.client.post("/auth/register", json=new).status_code

    with ThreadPoolExecutor(20) as pool:
        assert sorted(pool.map(register, range(20))) == [201] + [409] * 19


# --- confirming the address ---------------------------------------------------------------------------------------


def test_a_link_confirms_the_address_once(client: TestClient, mailbox: list[Email]) -> None:
    client.post("/auth/register", json=NEW)
    (letter,) = mailbox
    assert letter.to == "rita@example.com"
    assert f"{settings.public_url}/auth/verify-email/" in letter.text
    rita = Person(client, "rita")
    assert rita.get("/users/me").json()["email_verified_at"] is None
    link = f"/auth/verify-email/{token_in(letter)}"
    assert client.head(link).status_code == 405, "what looks at links before people do must not use them up"
    answer = client.get(link)
    assert answer.status_code == 200
    assert answer.json() == {
        "email": "rita@example.com",
        "email_verified_at": rita.get("/users/me").json()["email_verified_at"],
    }
    assert client.get(link).status_code == 404


def test_a_browser_gets_a_sentence(client: TestClient, mailbox: list[Email]) -> None:
    client.post("/auth/register", json=NEW)
    link = f"/auth/verify-email/{token_in(mailbox[0])}"
    answer = client.get(link, headers={"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    assert answer.text == "The address rita@example.com is confirmed. You can close this page."


def test_links_in_mails_do_not_follow_the_host_header(client: TestClient, mailbox: list[Email]) -> None:
    """Whoever registers somebody else's address must not choose where its link leads."""
    hostile = {"Host": "evil.example", "X-Forwarded-Host": "evil.example"}
    client.post("/auth/register", json=NEW, headers=hostile)
    assert "evil" not in mailbox[0].text


@pytest.mark.parametrize(("hours", "status"), [(23.9, 200), (24.1, 404)], ids=["in time", "too late"])
def test_a_link_is_good_for_a_day(
    client: TestClient, clock: Clock, mailbox: list[Email], hours: float, status: int
) -> None:
    client.post("/auth/register", json=NEW)
    clock.advance(hours=hours)
    assert client.get(f"/auth/verify-email/{token_in(mailbox[0])}").status_code == status


@pytest.mark.parametrize("token", ["x", "x" * 101, "%00", "%ff", "..%2f..", "'--"])
def test_what_is_no_link_confirms_nothing(client: TestClient, token: str) -> None:
    assert client.get(f"/auth/verify-email/{token}").status_code in (404, 422)


def test_i_can_ask_for_another_link(client: TestClient, mailbox: list[Email]) -> None:
    rita = sign_up(client, "rita")
    assert rita.post("/auth/verify-email").status_code == 202
    first, second = mailbox
    assert client.get(f"/auth/verify-email/{token_in(second)}").status_code == 200
    assert client.get(f"/auth/verify-email/{token_in(first)}").status_code == 404
    assert rita.post("/auth/verify-email").status_code == 409
    assert client.post("/auth/verify-email").status_code == 401


# --- a forgotten password -----------------------------------------------------------------------------------------

FORGOTTEN = {"email": "rita@example.com"}
NEW_PASSWORD = "another horse, another battery"


def reset(client: TestClient, code: str, email: str = "rita@example.com", password: str = NEW_PASSWORD) -> int:
    body = {"email": email, "otp": code, "new_password": password}
    return client.post("/auth/reset-password", json=body).status_code


@pytest.fixture
def code(client: TestClient, reader: Person, mailbox: list[Email], monkeypatch: pytest.MonkeyPatch) -> str:
    """What Rita was mailed, who forgot her password."""
    monkeypatch.setattr("auth.REFUSAL_SECONDS", 0)
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
    assert rita.get("/users/me").json()["email_verified_at"], "the code came through the address"
    assert [(letter.to, letter.subject) for letter in mailbox] == [("rita@example.com", "Your password was changed")]
    assert reset(client, code, password="a third one") == 400


@pytest.mark.parametrize(("minutes", "status"), [(9.9, 204), (10.1, 400)], ids=["in time", "too late"])
def test_a_code_is_good_for_ten_minutes(
    client: TestClient, clock: Clock, code: str, minutes: float, status: int
) -> None:
    clock.advance(minutes=minutes)
    assert reset(client, code) == status


def test_a_code_has_five_tries(client: TestClient, code: str) -> None:
    assert [reset(client, wrong(code)) for _ in range(5)] == [400] * 5
    assert reset(client, code) == 400


def test_the_fifth_try_may_be_right(client: TestClient, code: str) -> None:
    assert [reset(client, wrong(code)) for _ in range(4)] == [400] * 4
    assert reset(client, code) == 204


def test_a_new_code_cancels_the_one_before(client: TestClient, code: str, mailbox: list[Email]) -> None:
    client.post("/auth/forgot-password", json=FORGOTTEN)
    newer = code_in(mailbox.pop())
    if newer != code:  # one time in a million they are the same
        assert reset(client, code) == 400
    assert reset(client, newer) == 204


def test_a_code_is_good_for_its_own_address_only(client: TestClient, other_reader: Person, code: str) -> None:
    assert reset(client, code, email="oskar@example.com") == 400
    assert reset(client, code, email="nobody@example.com") == 400
    assert other_reader.get("/users/me").status_code == 200
    assert reset(client, code, email="RITA@example.com") == 204


def test_whether_an_address_is_known_shows_nowhere(
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
    assert [letter.to for letter in mailbox] == ["rita@example.com"]
    refusals = [
        client.post("/auth/reset-password", json={"email": email, "otp": "000000", "new_password": NEW_PASSWORD})
        for email in ("rita@example.com", "nobody@example.com", "closed@example.com")
    ]
    assert len({(answer.status_code, answer.text) for answer in refusals}) == 1


def test_a_code_of_an_account_that_was_switched_off_is_no_good(
    client: TestClient, admin: Person, reader: Person, code: str
) -> None:
    admin.patch("/users/2", json={"is_active": False})
    assert reset(client, code) == 400


@pytest.mark.parametrize(
    "body",
    [
        pytest.param({"otp": "12345"}, id="five digits"),
        pytest.param({"otp": "1234567"}, id="seven digits"),
        pytest.param({"otp": "١٢٣٤٥٦"}, id="other digits"),
        pytest.param({"otp": 123456}, id="a number"),
        pytest.param({"otp": ["123456"]}, id="a list"),
        pytest.param({"new_password": "short"}, id="a short password"),
        pytest.param({"new_password": "password1"}, id="a common password"),
        pytest.param({"new_password": "rita@example.com"}, id="the address"),
        pytest.param({"email": None}, id="no address"),
    ],
)
def test_a_reset_that_is_not_in_form_costs_no_try(client: TestClient, code: str, body: dict[str, Any]) -> None:
    right = {"email": "rita@example.com", "otp": code, "new_password": NEW_PASSWORD}
    for _ in range(6):
        assert client.post("/auth/reset-password", json={**right, **body}).status_code == 422
    assert reset(client, code) == 204


@pytest.mark.slow
def test_twenty_resets_at_once_with_one_code_set_one_password(serve: Callable[..., Server]) -> None:
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


# --- changing it --------------------------------------------------------------------------------------------------


def test_changing_my_password_ends_my_other_sessions(client: TestClient, reader: Person, mailbox: list[Email]) -> None:
    elsewhere = Person(client, reader.username)
    change = {"current_password": PASSWORD, "new_password": NEW_PASSWORD}
    assert reader.post("/auth/change-password", json=change).status_code == 204
    assert reader.get("/users/me").status_code == 200
    assert elsewhere.get("/users/me").status_code == 401
    assert client.post("/login", json={"username": "rita", "password": PASSWORD}).status_code == 401
    assert [letter.subject for letter in mailbox] == ["Your password was changed"]
    told = reader.get("/events", params={"types": "account.password_changed"}).json()["items"]
    assert len(told) == 1


def test_changing_my_password_makes_a_code_that_is_out_useless(client: TestClient, reader: Person, code: str) -> None:
    reader.post("/auth/change-password", json={"current_password": PASSWORD, "new_password": NEW_PASSWORD})
    assert reset(client, code) == 400


@pytest.mark.parametrize(
    ("change", "status"),
    [
        pytest.param({"current_password": "wrong password"}, 403, id="another's password"),
        pytest.param({"current_password": ""}, 403, id="no password"),
        pytest.param({"new_password": "short"}, 422, id="a short one"),
        pytest.param({"new_password": "qwertyuiop"}, 422, id="a common one"),
        pytest.param({"new_password": "RITA@example.com"}, 422, id="my address"),
    ],
)
def test_my_password_does_not_change(client: TestClient, reader: Person, change: dict[str, str], status: int) -> None:
    body = {"current_password": PASSWORD, "new_password": NEW_PASSWORD, **change}
    assert reader.post("/auth/change-password", json=body).status_code == status
    Person(client, "rita").get("/users/me")
