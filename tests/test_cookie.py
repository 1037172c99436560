"""The refresh token as a cookie: only for pages of this service, and of no use to other sites."""

from collections.abc import Callable
from http.cookies import Morsel, SimpleCookie
from typing import Any

import httpx2 as httpx
import pytest
from fastapi.testclient import TestClient

from main import app
from settings import settings
from tests.fixtures import PASSWORD, Clock, Person, Server, code_in, sign_up

CREDENTIALS = {"username": "rita", "password": PASSWORD}


def cookie_of(answer: httpx.Response) -> Morsel[str]:
    return SimpleCookie(answer.headers["Set-Cookie"])["refresh_token"]


def sign_in(client: httpx.Client, path: str = "/login") -> httpx.Response:
    answer = client.post(f"{path}?cookie=true", json=CREDENTIALS)
    assert answer.status_code == 200, answer.text
    return answer


def send(client: httpx.Client, cookie: str | None, **headers: str) -> httpx.Response:
    """A refresh with this cookie, whatever the client has stored."""
    client.cookies.clear()
    given = {} if cookie is None else {"Cookie": f"refresh_token={cookie}"}
    return client.post(
        "/auth/refresh", headers=given | {name.replace("_", "-"): text for name, text in headers.items()}
    )


def is_alive(client: httpx.Client, answer: httpx.Response) -> bool:
    """Whether the session of this answer's access token goes on."""
    token = answer.json()["access_token"]
    return client.get("/users/me", headers={"Authorization": f"Bearer {token}"}).status_code == 200


def is_cleared(answer: httpx.Response) -> bool:
    morsel = cookie_of(answer)
    return (morsel.value, morsel["max-age"], morsel["path"]) == ("", "0", "/auth")


@pytest.fixture
def page(reader: Person) -> TestClient:
    """A browser with the page open."""
    assert isinstance(reader.client, TestClient)
    return reader.client


@pytest.fixture
def cookie(reader: Person) -> str:
    """What a sign-in sets, without the time that a password takes."""
    return str(reader.tokens["refresh_token"])


# --- signing in, refreshing, signing out --------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/login", "/auth/token"])
@pytest.mark.parametrize("kind", ["json", "data"])
def test_a_page_gets_the_refresh_token_as_a_cookie(page: TestClient, path: str, kind: str) -> None:
    body: dict[str, Any] = {kind: CREDENTIALS}
    answer = page.post(f"{path}?cookie=true", **body)
    assert answer.json().keys() == {"access_token", "token_type", "expires_in"}
    cookie = cookie_of(answer)
    assert cookie["httponly"] is True
    assert (cookie["samesite"].lower(), cookie["path"], cookie["domain"]) == ("strict", "/auth", "")
    assert not cookie["secure"], "it came over http"
    assert int(cookie["max-age"]) == settings.refresh_token_expire_days * 86400
    assert answer.headers["Cache-Control"] == "no-store"
    refreshed = page.post("/auth/refresh")
    assert refreshed.json().keys() == answer.json().keys()
    assert cookie_of(refreshed).value not in (cookie.value, "")
    assert cookie_of(refreshed)["max-age"] == cookie["max-age"]
    assert is_alive(page, refreshed)


@pytest.mark.parametrize("query", ["", "?cookie=false"])
def test_other_clients_get_no_cookie(page: TestClient, query: str) -> None:
    answer = page.post(f"/login{query}", json=CREDENTIALS)
    refreshed = page.post("/auth/refresh", json={"refresh_token": answer.json()["refresh_token"]})
    for each in (answer, refreshed):
        assert "Set-Cookie" not in each.headers
        assert each.json().keys() == {"access_token", "token_type", "expires_in", "refresh_token"}


def test_a_body_is_used_instead_of_the_cookie(page: TestClient, cookie: str) -> None:
    token = Person(page, "rita").tokens["refresh_token"]
    headers = {"Cookie": f"refresh_token={cookie}"}
    answer = page.post("/auth/refresh", json={"refresh_token": token}, headers=headers)
    assert "refresh_token" in answer.json()
    assert "Set-Cookie" not in answer.headers
    assert send(page, cookie).status_code == 200


@pytest.mark.parametrize("cookie", [None, "", "nonsense", '"quoted"', "x" * 5000, "\xe4"], ids=repr)
def test_a_refresh_without_a_valid_token_is_401(page: TestClient, cookie: str | None) -> None:
    headers: Any = {} if cookie is None else {"Cookie": f"refresh_token={cookie}".encode("latin-1")}
    answer = page.post("/auth/refresh", headers=headers)
    assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert is_cleared(answer) if cookie else "Set-Cookie" not in answer.headers


ENDS: dict[str, tuple[str, str, Any]] = {
    "logout": ("POST", "/auth/logout", None),
    "logout everywhere": ("POST", "/auth/logout-all", None),
    "end this session": ("DELETE", "/auth/sessions/{current}", None),
    "delete the account": ("DELETE", "/users/me", {"password": PASSWORD}),
}


@pytest.mark.parametrize(("method", "path", "body"), ENDS.values(), ids=ENDS)
def test_the_end_of_the_session_clears_the_cookie(page: TestClient, method: str, path: str, body: Any) -> None:
    rita = Person(page, "rita", tokens=sign_in(page).json())
    sessions = rita.get("/auth/sessions").json()["items"]
    current = next(one["id"] for one in sessions if one["current"])
    answer = rita.request(method, path.format(current=current), json=body)
    assert answer.status_code == 204
    assert is_cleared(answer)
    assert not page.cookies
    assert page.post("/auth/refresh").status_code == 401


def test_a_new_password_by_mail_clears_the_cookie(page: TestClient, mailbox: list[Any]) -> None:
    sign_in(page)
    page.post("/auth/forgot-password", json={"email": "rita@example.com"})
    reset = {"email": "rita@example.com", "otp": code_in(mailbox[-1]), "new_password": "another horse"}
    assert is_cleared(page.post("/auth/reset-password", json=reset))


def test_the_end_of_another_session_leaves_the_cookie(page: TestClient, reader: Person) -> None:
    rita = Person(page, "rita", tokens=sign_in(page).json())
    other = next(one["id"] for one in rita.get("/auth/sessions").json()["items"] if not one["current"])
    assert "Set-Cookie" not in rita.delete(f"/auth/sessions/{other}").headers
    assert page.post("/auth/refresh").status_code == 200


def test_a_session_that_was_ended_elsewhere_clears_the_cookie_at_the_next_refresh(
    page: TestClient, cookie: str, reader: Person
) -> None:
    reader.post("/auth/logout-all")
    assert is_cleared(send(page, cookie))


# --- rotation -----------------------------------------------------------------------------------------------------


def test_the_cookie_lasts_as_long_as_its_session(page: TestClient, cookie: str, clock: Clock) -> None:
    clock.advance(days=13)
    cookie = cookie_of(send(page, cookie)).value
    clock.advance(days=13)
    assert send(page, cookie).status_code == 200
    clock.advance(days=14)
    assert is_cleared(send(page, cookie))


def test_the_reuse_of_an_old_cookie_ends_its_session(page: TestClient, cookie: str, clock: Clock) -> None:
    newest = send(page, cookie_of(send(page, cookie)).value)
    clock.advance(seconds=11)
    assert is_cleared(send(page, cookie))
    assert not is_alive(page, newest)
    assert send(page, cookie_of(newest).value).status_code == 401


def test_a_lost_answer_can_be_repeated_at_once(page: TestClient, cookie: str, clock: Clock) -> None:
    """Of two tabs, or where the connection broke: the browser still has the used cookie."""
    send(page, cookie)
    clock.advance(seconds=9)
    again, at_once = send(page, cookie), send(page, cookie)
    assert cookie_of(again).value == cookie_of(at_once).value
    assert is_alive(page, send(page, cookie_of(again).value))


def test_a_used_token_is_used_whether_it_comes_as_cookie_or_in_a_body(
    page: TestClient, cookie: str, clock: Clock
) -> None:
    for body in (None, "refresh_token"):
        answer = send(page, cookie)
        clock.advance(seconds=11)
        reuse = send(page, cookie) if body is None else page.post("/auth/refresh", json={body: cookie})
        assert reuse.status_code == 401
        assert not is_alive(page, answer)
        cookie = cookie_of(sign_in(page)).value


# --- other sites --------------------------------------------------------------------------------------------------

OWN = {
    "fetch metadata": {"Sec_Fetch_Site": "same-origin"},
    "fetch metadata, behind a proxy that changes Host": {
        "Sec_Fetch_Site": "same-origin",
        "Origin": "https://books.example.com",
        "Host": "127.0.0.1:8000",
    },
    "plain http": {"Origin": "http://testserver"},
    "plain http, another port": {"Origin": "http://nas:8000", "Host": "nas:8000"},
    "no browser": {},
}
FOREIGN = {
    "another site": {"Sec_Fetch_Site": "cross-site", "Origin": "https://evil.example"},
    "a subdomain": {"Sec_Fetch_Site": "same-site", "Origin": "https://evil.testserver"},
    "another port of localhost": {
        "Sec_Fetch_Site": "same-site",
        "Origin": "http://localhost:3000",
        "Host": "localhost:8000",
    },
    "another site, without fetch metadata": {"Origin": "http://evil.example"},
    "another port, without fetch metadata": {"Origin": "http://testserver:3000"},
    "a host whose name begins the same": {"Origin": "http://testserver.evil.example"},
    "a user in the address": {"Origin": "http://testserver@evil.example"},
    "a hidden origin": {"Origin": "null"},
    "a hidden origin, beside fetch metadata": {"Sec_Fetch_Site": "cross-site", "Origin": "null"},
    "no page": {"Sec_Fetch_Site": "none"},
    "an unknown word": {"Sec_Fetch_Site": "Same-Origin, same-origin"},
    "no valid address": {"Origin": "http://[testserver"},
}


@pytest.mark.parametrize("headers", OWN.values(), ids=OWN)
def test_pages_of_this_service_can_use_the_cookie(page: TestClient, cookie: str, headers: dict[str, str]) -> None:
    assert send(page, cookie, **headers).status_code == 200
    given = {name.replace("_", "-"): text for name, text in headers.items()}
    refused = page.post("/login?cookie=true", json={}, headers=given)
    assert refused.status_code == 422, "not 403"


@pytest.mark.parametrize("headers", FOREIGN.values(), ids=FOREIGN)
def test_other_sites_can_not_use_the_cookie(
    page: TestClient, cookie: str, clock: Clock, headers: dict[str, str]
) -> None:
    refused = send(page, cookie, **headers)
    assert refused.status_code == 403
    assert "Set-Cookie" not in refused.headers
    clock.advance(minutes=1)
    own = send(page, cookie)
    assert is_alive(page, own), "nothing was rotated"
    assert is_alive(page, send(page, cookie_of(own).value))


@pytest.mark.parametrize("headers", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("kind", ["json", "data"])
def test_other_sites_can_not_sign_a_browser_in(page: TestClient, headers: dict[str, str], kind: str) -> None:
    body: dict[str, Any] = {kind: CREDENTIALS}
    given = {name.replace("_", "-"): text for name, text in headers.items()}
    refused = page.post("/login?cookie=true", headers=given, **body)
    assert refused.status_code == 403
    assert "Set-Cookie" not in refused.headers


@pytest.mark.parametrize("order", [1, -1], ids=["first", "last"])
@pytest.mark.parametrize("separator", ["; ", ";"], ids=["with a space", "without"])
def test_a_second_cookie_set_by_a_sibling_host_is_refused(
    page: TestClient, cookie: str, other_reader: Person, order: int, separator: str
) -> None:
    """It may have a longer path or be older, and so come first (RFC 6265, 5.4)."""
    foreign = str(other_reader.tokens["refresh_token"])
    both = f"{separator}refresh_token=".join([cookie, foreign][::order])
    refused = send(page, both)
    assert refused.status_code == 401
    assert "Set-Cookie" not in refused.headers, "the foreign one would be left"
    for each in (cookie, foreign):
        assert send(page, each).status_code == 200, "nothing was rotated"


def test_a_cookie_of_a_similar_name_is_ignored(page: TestClient, cookie: str) -> None:
    assert send(page, f"{cookie}; refresh_token_2=x; x=refresh_token=y").status_code == 200


# --- where it is served -------------------------------------------------------------------------------------------


ROOT_PATHS = {"/library": "/library/auth", "/a/": "/a/auth", "/a b;c": "/a%20b%3Bc/auth", "/é": "/%C3%A9/auth"}


@pytest.mark.usefixtures("page")
@pytest.mark.parametrize(("root_path", "path"), ROOT_PATHS.items(), ids=ROOT_PATHS)
def test_the_cookie_is_scoped_to_the_root_path(cookie: str, root_path: str, path: str) -> None:
    assert cookie_of(send(TestClient(app, root_path=root_path), cookie))["path"] == path


@pytest.mark.slow
def test_the_cookie_is_secure_behind_a_proxy_with_https(serve: Callable[..., Server]) -> None:
    server = serve("--proxy-headers", "--root-path", "/library", CORS_ORIGINS="https://elsewhere.example")
    sign_up(server.client, "rita")
    forwarded = {"X-Forwarded-Proto": "https"}
    answer = server.client.post("/login?cookie=true", json=CREDENTIALS, headers=forwarded)
    cookie = cookie_of(answer)
    assert cookie["secure"] is True
    assert cookie["path"] == "/library/auth"
    elsewhere = {**forwarded, "Origin": "https://elsewhere.example", "Cookie": f"refresh_token={cookie.value}"}
    refused = server.client.post("/auth/refresh", headers=elsewhere)
    assert refused.status_code == 403, "CORS_ORIGINS does not open the cookie"
    assert "Access-Control-Allow-Credentials" not in refused.headers
    assert server.client.post("/auth/refresh", headers={**elsewhere, "Origin": server.url}).status_code == 200
