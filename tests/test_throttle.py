"""Rate limits, per address and per account."""

import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from starlette.requests import Request

import security
from accounts import Email
from settings import settings
from tests.fixtures import NEW, PASSWORD, ROOT, Person, Server, code_in, free_port, wait_for


class Later:
    """Moves the clock of the rate limits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds, real = 0.0, time.time
        monkeypatch.setattr(time, "time", lambda: real() + self.seconds)


@pytest.fixture
def limited(client: TestClient, monkeypatch: pytest.MonkeyPatch, mailbox: list[Email]) -> TestClient:
    """A service with rate limits, and Rita's account."""
    assert client.post("/auth/register", json=NEW).status_code == 201
    monkeypatch.setattr(settings, "rate_limits", True)
    return client


def attempts(client: TestClient, path: str, body: dict[str, Any], times: int) -> list[int]:
    return [client.post(path, json=body).status_code for _ in range(times)]


WRONG = {"username": "rita", "password": "wrong password"}
RIGHT = {"username": "rita", "password": PASSWORD}


def test_ten_wrong_passwords_block_logins_for_a_quarter_of_an_hour(
    limited: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = Later(monkeypatch)
    assert attempts(limited, "/login", WRONG, 10) == [401] * 10
    refused = limited.post("/login", json=RIGHT)
    assert refused.status_code == 429
    assert refused.headers["Content-Type"] == "application/problem+json"
    seconds = int(refused.headers["Retry-After"])
    assert 890 < seconds <= 900
    assert refused.json()["detail"] == f"Too many attempts. Try again in {seconds} s."
    assert limited.post("/login", json={**RIGHT, "username": " RITA "}).status_code == 429
    by_address = limited.post("/login", json={**RIGHT, "username": "rita@example.com"})
    assert by_address.status_code == 200, "a common count would tell that the name and the address belong together"
    later.seconds = seconds - 2
    assert limited.post("/login", json=RIGHT).status_code == 429
    later.seconds = seconds + 1
    assert limited.post("/login", json=RIGHT).status_code == 200


@pytest.mark.slow
def test_a_successful_login_resets_the_count(limited: TestClient) -> None:
    for _ in range(3):
        assert attempts(limited, "/login", WRONG, 9) == [401] * 9
        assert limited.post("/login", json=RIGHT).status_code == 200


def test_unknown_accounts_are_limited_in_the_same_way(limited: TestClient) -> None:
    nobody = {"username": "nobody", "password": "wrong password"}
    assert attempts(limited, "/login", nobody, 12) == [401] * 10 + [429] * 2


def test_guessing_the_password_within_a_session_is_limited(limited: TestClient) -> None:
    rita = Person(limited, "rita")
    guess = {"current_password": "wrong password", "new_password": "another horse"}
    assert [rita.post("/auth/change-password", json=guess).status_code for _ in range(11)] == [403] * 10 + [429]
    assert rita.delete("/users/me", json={"password": PASSWORD}).status_code == 429
    assert rita.get("/users/me").status_code == 200
    assert limited.post("/login", json=RIGHT).status_code == 200


def move_to(client: TestClient, number: int) -> None:
    """Send the next requests from another address."""
    client._transport.client = (f"203.0.113.{number}", 1)  # type: ignore[attr-defined]  # of Starlette's client


BY_STRANGERS: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "login": ("/login", WRONG, 10, 401),
    "register": ("/auth/register", {**NEW, "username": "other"}, 5, 409),
    "reset": ("/auth/reset-password", {"email": NEW["email"], "otp": "000000", "new_password": PASSWORD}, 10, 400),
    "forgot": ("/auth/forgot-password", {"email": "rita@example.com"}, 5, 202),
    "verify": ("/auth/verify-email", {"email": "rita@example.com"}, 5, 202),
}


@pytest.mark.slow
@pytest.mark.parametrize(("path", "body", "times", "status"), BY_STRANGERS.values(), ids=BY_STRANGERS)
def test_strangers_lock_an_account_for_nobody_else(
    limited: TestClient, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], times: int, status: int
) -> None:
    monkeypatch.setattr("accounts.REFUSAL_SECONDS", 0)
    for number in range(11):
        move_to(limited, number)
        assert attempts(limited, path, body, times + 1) == [status] * times + [429]
    move_to(limited, 99)
    assert attempts(limited, path, body, 1) == [status]


@pytest.mark.parametrize("path", ["forgot-password", "verify-email"])
def test_beyond_ten_an_hour_one_mail_a_minute_is_sent(
    limited: TestClient, mailbox: list[Email], monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """Whoever asks, and with the same answer: two addresses must not keep the owner from asking."""
    later, answers = Later(monkeypatch), []
    mailbox.clear()

    def ask(number: int, times: int, email: str = "rita@example.com") -> int:
        """How many mails are sent."""
        move_to(limited, number)
        before = len(mailbox)
        for _ in range(times):
            answer = limited.post(f"/auth/{path}", json={"email": email})
            answers.append((answer.status_code, answer.text))
        return len(mailbox) - before

    assert [ask(number, 5) for number in range(3)] == [5, 5, 0]
    later.seconds = 61
    assert [ask(4, 3), ask(5, 2)] == [1, 0]
    later.seconds = 122
    assert [ask(6, 3), ask(7, 5, "nobody@example.com")] == [1, 0]
    later.seconds = 3605
    assert ask(8, 5) == 5
    assert len(set(answers)) == 1
    assert answers[0][0] == 202


def test_the_last_mailed_code_works_while_strangers_request_others(
    limited: TestClient, mailbox: list[Email], monkeypatch: pytest.MonkeyPatch
) -> None:
    later = Later(monkeypatch)
    for number in range(3):
        move_to(limited, number)
        attempts(limited, "/auth/forgot-password", {"email": NEW["email"]}, 5)
    later.seconds = 61
    move_to(limited, 99)
    attempts(limited, "/auth/forgot-password", {"email": NEW["email"]}, 1)
    move_to(limited, 4)
    attempts(limited, "/auth/forgot-password", {"email": NEW["email"]}, 5)
    body = {"email": NEW["email"], "otp": code_in(mailbox[-1]), "new_password": "another horse"}
    assert limited.post("/auth/reset-password", json=body).status_code == 204


@pytest.mark.slow
def test_successful_logins_are_not_counted(limited: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(security.RATE_LIMITS, "login", ("4 per 1 minute", "3 per 15 minutes"))
    assert attempts(limited, "/login", RIGHT, 9) == [200] * 9
    assert attempts(limited, "/login", WRONG, 1) == [401]
    assert attempts(limited, "/login", RIGHT, 9) == [200] * 9, "nor do they extend the limit of the address:"
    nobody = [{"username": f"nobody{number}", "password": "wrong password"} for number in range(4)]
    assert [limited.post("/login", json=body).status_code for body in nobody] == [401] * 3 + [429]
    assert attempts(limited, "/login", RIGHT, 1) == [429]


def test_a_password_reset_by_mail_resets_the_count(limited: TestClient, mailbox: list[Email]) -> None:
    attempts(limited, "/login", WRONG, 11)
    limited.post("/auth/forgot-password", json={"email": NEW["email"]})
    body = {"email": NEW["email"], "otp": code_in(mailbox[-1]), "new_password": "another horse"}
    assert limited.post("/auth/reset-password", json=body).status_code == 204
    assert limited.post("/login", json={**RIGHT, "password": "another horse"}).status_code == 200


def test_a_user_name_that_is_a_number_is_not_counted_as_an_id(limited: TestClient) -> None:
    attempts(limited, "/login", {"username": "2", "password": "wrong password"}, 11)
    assert limited.post("/login", json=RIGHT).status_code == 200


def test_logins_with_an_unconfirmed_address_are_limited_and_mail_nothing(
    limited: TestClient, mailbox: list[Email], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "require_verified_email", True)
    assert attempts(limited, "/login", RIGHT, 11) == [403] * 10 + [429]
    assert len(mailbox) == 1


BY_ACCOUNT: dict[str, tuple[str, dict[str, Any], list[int]]] = {
    "register": ("register", {**NEW, "username": "other"}, [409] * 5),
    "forgot": ("forgot-password", {"email": "rita@example.com"}, [202] * 5),
    "forgot, unknown": ("forgot-password", {"email": "nobody@example.com"}, [202] * 5),
    "verify": ("verify-email", {"email": "rita@example.com"}, [202] * 5),
    "verify, unknown": ("verify-email", {"email": "nobody@example.com"}, [202] * 5),
    "reset": ("reset-password", {"email": NEW["email"], "otp": "000000", "new_password": PASSWORD}, [400] * 10),
}


@pytest.mark.parametrize(("path", "body", "answers"), BY_ACCOUNT.values(), ids=BY_ACCOUNT)
def test_each_account_has_its_limit(
    limited: TestClient, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], answers: list[int]
) -> None:
    monkeypatch.setattr("accounts.REFUSAL_SECONDS", 0)
    later = Later(monkeypatch)
    assert attempts(limited, f"/auth/{path}", body, len(answers) + 1) == [*answers, 429]
    later.seconds = 3601
    assert attempts(limited, f"/auth/{path}", body, 1) == answers[:1]


def test_refreshes_of_one_session_are_limited(limited: TestClient) -> None:
    rita, other = Person(limited, "rita"), Person(limited, "rita")
    for _ in range(30):
        answer = limited.post("/auth/refresh", json={"refresh_token": rita.tokens["refresh_token"]})
        assert answer.status_code == 200
        rita.tokens = answer.json()
    for person, status in ((rita, 429), (other, 200)):
        body = {"refresh_token": person.tokens["refresh_token"]}
        assert limited.post("/auth/refresh", json=body).status_code == status


def test_changes_of_address_are_limited(limited: TestClient, mailbox: list[Email]) -> None:
    rita = Person(limited, "rita")

    def change(number: int) -> int:
        body = {"email": f"a{number}@example.com", "current_password": PASSWORD}
        return rita.patch("/users/me", json=body).status_code

    assert [change(number) for number in range(6)] == [200] * 5 + [429]
    assert [email.to for email in mailbox[-2:]] == ["rita@example.com", "a4@example.com"]
    for body in ({"full_name": "R."}, {"email": "rita@example.com"}):
        assert rita.patch("/users/me", json=body).status_code == 200


def test_guessing_the_password_by_changes_of_address_is_limited(limited: TestClient) -> None:
    rita = Person(limited, "rita")
    guess = {"email": "thief@example.com", "current_password": "wrong password"}
    assert [rita.patch("/users/me", json=guess).status_code for _ in range(6)] == [403] * 5 + [429]


def test_links_requested_for_many_addresses_are_limited(limited: TestClient, mailbox: list[Email]) -> None:
    bodies = [{"email": f"somebody{number}@example.com"} for number in range(31)]
    answers = [limited.post("/auth/verify-email", json=body) for body in bodies]
    assert [answer.status_code for answer in answers] == [202] * 30 + [429]
    assert answers[-1].headers["Retry-After"].isdigit()
    assert len(mailbox) == 1


# --- client addresses ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_each_address_is_limited_by_itself(serve: Callable[..., Server]) -> None:
    """Behind a proxy, the rightmost address is the one that the proxy added; a client can send any others before it."""
    server = serve(RATE_LIMITS="true")

    def forgot(number: int, forwarded: str) -> int:
        body = {"email": f"somebody{number}@example.com"}
        headers = {"X-Forwarded-For": forwarded}
        return server.client.post("/auth/forgot-password", json=body, headers=headers).status_code

    answers = [forgot(number, f"198.51.100.{number}, 203.0.113.7") for number in range(31)]
    assert answers == [202] * 30 + [429]
    assert forgot(99, "203.0.113.7, 203.0.113.8") == 202


@pytest.mark.slow
def test_without_a_trusted_proxy_the_header_is_ignored(serve: Callable[..., Server]) -> None:
    server = serve("--forwarded-allow-ips", "10.0.0.0/8", RATE_LIMITS="true")
    answers = [
        server.client.post(
            "/auth/forgot-password",
            json={"email": f"somebody{number}@example.com"},
            headers={"X-Forwarded-For": f"203.0.113.{number}"},
        ).status_code
        for number in range(31)
    ]
    assert answers == [202] * 30 + [429]


@pytest.mark.parametrize(
    ("client", "address"),
    [
        pytest.param(("203.0.113.7", 1), "203.0.113.7", id="IPv4"),
        pytest.param(("2001:db8:1:2:3:4:5:6", 1), "2001:db8:1:2::/64", id="IPv6"),
        pytest.param(("::ffff:203.0.113.7", 1), "203.0.113.7", id="IPv4 in IPv6"),
        pytest.param(("fe80::1%eth0", 1), "fe80::/64", id="IPv6 with a zone"),
        pytest.param(("unix", 0), "unix", id="Unix socket"),
        pytest.param(("x" * 5000, 0), "x" * 100, id="no address"),
        pytest.param(None, "nowhere", id="none"),
    ],
)
def test_client_addresses(client: tuple[str, int] | None, address: str) -> None:
    assert security.client_address(Request({"type": "http", "client": client})) == address


# --- storage ------------------------------------------------------------------------------------------------------


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[int]:
    """The port of a real Redis. CI installs it."""
    program = shutil.which("redis-server")
    assert program, "install redis-server"
    port = free_port()
    command = [program, "--port", str(port), "--save", "", "--bind", "127.0.0.1"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    wait_for(lambda: "Ready to accept" in ((process.stdout and process.stdout.readline()) or "") or None)
    try:
        yield port
    finally:
        process.terminate()
        process.communicate()


@pytest.mark.slow
def test_processes_share_the_counts_in_redis(serve: Callable[..., Server], redis: int) -> None:
    options = {"RATE_LIMITS": "true", "RATE_LIMIT_STORAGE": f"redis://127.0.0.1:{redis}/0"}
    one, two = serve(**options), serve(**options)
    answers = [
        server.client.post("/login", json={"username": "admin", "password": "wrong"}).status_code
        for server in (one, two) * 6
    ]
    assert answers == [401] * 10 + [429] * 2


@pytest.mark.slow
def test_each_process_counts_while_redis_is_down(serve: Callable[..., Server]) -> None:
    server = serve(RATE_LIMITS="true", RATE_LIMIT_STORAGE=f"redis://127.0.0.1:{free_port()}/0")
    wrong = {"username": "admin", "password": "wrong"}
    answers = [server.client.post("/login", json=wrong).status_code for _ in range(11)]
    assert answers == [401] * 10 + [429]
    assert "RATE_LIMIT_STORAGE does not answer" in server.log.read_text()


def test_the_documentation_states_the_limits() -> None:
    section = (ROOT / "docs" / "security.md").read_text().split("\n## Limits\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\w+) \| (.*?) \| (.*?) \|$", section, re.MULTILINE)
    assert rows == [
        (name, first.replace("per", "in"), "; from all addresses ".join(others).replace("per", "in"))
        for name, (first, *others) in security.RATE_LIMITS.items()
    ]
    assert security.MAIL_LIMITS == ("10 per 1 hour", "1 per 1 minute")
    assert "After ten mails to one account in an hour, one a minute is sent" in " ".join(section.split())
