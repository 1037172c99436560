"""The cookie in a browser: its own page can use it, and pages of other ports and sites can't. Needs playwright."""

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from playwright.sync_api import BrowserContext, Page

from tests.browser import chromium
from tests.fixtures import PASSWORD, Server, sign_up

pytestmark = pytest.mark.slow

POST = """async ([address, body]) => {
  const json = body && { "Content-Type": "application/json" };
  const answer = await fetch(address, {
    method: "POST", credentials: "include", mode: body === null && !address.startsWith(origin) ? "no-cors" : "cors",
    headers: json || {}, body: body && JSON.stringify(body) });
  return [answer.status, answer.type === "opaque" ? null : await answer.json()];
}"""
FORM = """([address, fields]) => {
  const form = document.createElement("form");
  form.method = "post";
  form.action = address;
  for (const [name, value] of Object.entries(fields)) {
    const input = document.createElement("input");
    [input.name, input.value] = [name, value];
    form.append(input);
  }
  document.body.append(form);
  form.submit();
}"""
CREDENTIALS = {"username": "rita", "password": PASSWORD}


@pytest.fixture
def context() -> Iterator[BrowserContext]:
    # Names that end in .localhost lead to this machine; `evil.example` is made to.
    with chromium("--host-resolver-rules=MAP evil.example 127.0.0.1,MAP *.localhost 127.0.0.1") as browser:
        yield browser.new_context()


@pytest.fixture
def other_port() -> Iterator[int]:
    """An empty page on another port, which any name leads to."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    started = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=started.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield started.server_port
    started.shutdown()
    started.server_close()


def stored(context: BrowserContext) -> str | None:
    """The cookie that the browser has for this service."""
    return next(
        (str(cookie.get("value")) for cookie in context.cookies() if cookie.get("name") == "refresh_token"), None
    )


def post(page: Page, address: str, body: Any = None) -> Any:
    return page.evaluate(POST, [address, body])


@pytest.mark.parametrize("host", ["localhost", "evil.localhost", "evil.example"])
@pytest.mark.parametrize("cors", [False, True], ids=["CORS closed", "CORS open to it"])
def test_only_the_own_page_can_use_the_cookie(
    serve: Callable[..., Server], context: BrowserContext, other_port: int, host: str, cors: bool
) -> None:
    elsewhere = f"http://{host}:{other_port}"
    server = serve(**({"CORS_ORIGINS": elsewhere} if cors else {}))
    sign_up(server.client, "rita")
    service = f"http://localhost:{server.port}"
    own = context.new_page()
    own.goto(service)
    status, tokens = post(own, f"{service}/login?cookie=true", CREDENTIALS)
    assert (status, "refresh_token" in tokens) == (200, False)
    first = stored(context)
    assert first
    assert own.evaluate("document.cookie") == ""
    assert post(own, f"{service}/auth/refresh")[0] == 200
    second = stored(context)
    assert second not in (first, None)

    other = context.new_page()
    other.goto(elsewhere)
    post(other, f"{service}/auth/refresh")
    assert stored(context) == second, "nothing was rotated"
    other.evaluate(FORM, [f"{service}/auth/refresh", {}])
    other.wait_for_url(f"{service}/auth/refresh")
    other.goto(elsewhere)
    other.evaluate(FORM, [f"{service}/login?cookie=true", CREDENTIALS])
    other.wait_for_url(f"{service}/login?cookie=true")
    assert stored(context) == second, "nobody was signed in"
    assert post(own, f"{service}/auth/refresh")[0] == 200


def test_a_closed_tab_does_not_sign_out(server: Server, context: BrowserContext) -> None:
    """The service has rotated, and the browser has not received the answer."""
    sign_up(server.client, "rita")
    page = context.new_page()
    page.goto(server.url)
    post(page, f"{server.url}/login?cookie=true", CREDENTIALS)
    before = stored(context)
    lost = server.client.post("/auth/refresh", headers={"Cookie": f"refresh_token={before}"})
    assert lost.status_code == 200
    page.close()
    again = context.new_page()
    again.goto(server.url)
    assert post(again, f"{server.url}/auth/refresh")[0] == 200
    assert stored(context) not in (before, None)
