"""A browser, Debian's chromium, and what people do with the pages in it."""

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    FilePayload,
    Locator,
    Page,
    expect,
    sync_playwright,
)

from tests.fixtures import DUNE, PASSWORD, Person, Server

Visit = Callable[..., Page]
PHONE, DESKTOP = (390, 844), (1280, 900)
SIZES = pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
WAIT = 20_000  # milliseconds; the machine may be busy
EVIL = ("<img src=x onerror=alert(1)>", '"><script>alert(2)</script>')


@contextmanager
def chromium(*arguments: str) -> Iterator[Browser]:
    expect.set_options(timeout=WAIT)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", *arguments]
        )
        yield started
        started.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Visit]:
    """Open an address as somebody new, or in a tab of a `context`. No dialog may appear, no other host be asked, and
    nothing be in the console but what is `expected`."""
    wrong: list[str] = []

    def start(
        server: Server,
        size: tuple[int, int] = DESKTOP,
        scheme: Any = "light",
        expected: str | None = None,
        address: str = "",
        context: BrowserContext | None = None,
        **options: Any,
    ) -> Page:
        if context is None:
            options = {"reduced_motion": "reduce", "color_scheme": scheme} | options
            context = browser.new_context(viewport={"width": size[0], "height": size[1]}, **options)
            contexts.callback(context.close)
        page = context.new_page()
        page.set_default_timeout(WAIT)

        def hear(message: ConsoleMessage) -> None:
            told = f"{message.text} {message.location['url']}"
            if message.type in ("error", "warning") and not (expected and re.search(expected, told)):
                wrong.append(told)

        page.on("console", hear)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "request",
            lambda request: wrong.extend(
                [request.url] * (not request.url.removeprefix("blob:").startswith(server.url))
            ),
        )
        page.on("dialog", lambda dialog: wrong.append(f"a dialog: {dialog.message}"))
        page.goto(f"{server.url}/{address}")
        return page

    with ExitStack() as contexts:
        yield start
    assert wrong == []


@pytest.fixture
def visit(open_page: Visit) -> Visit:
    """The front page, once it follows the changes."""

    def start(server: Server, *args: Any, **options: Any) -> Page:
        page = open_page(server, *args, **options)
        expect(page.locator("#live")).to_have_text("connected")
        return page

    return start


def staff(server: Server, username: str = "Lydia", role: str = "librarian") -> Person:
    new = {"username": username, "email": f"{username}@example.com", "password": PASSWORD, "role": role}
    assert Person(server.client, "admin", "admin").post("/users", json=new).status_code == 201
    return Person(server.client, username)


def sign_in(page: Page, username: str, password: str = PASSWORD, shown: str | None = None) -> None:
    page.locator("#sign-in").click()
    page.locator("#account").get_by_label("User name").fill(username)
    page.locator("#account").get_by_label("Password").fill(password)
    page.locator("#account").get_by_label("Password").press("Enter")
    expect(page.locator("#who")).to_contain_text(shown or username)
    expect(page.locator("#live")).to_have_text("connected")


def open_book(page: Page, title: str) -> Locator:
    """From the list of the view that is shown."""
    cards(page).get_by_role("link", name=title, exact=True).click()
    view = book_view(page, title)
    expect(view.get_by_role("heading", name="Reviews")).to_be_visible()
    return view


def book_view(page: Page, title: str) -> Locator:
    """Once the book is there."""
    expect(page.locator("#book-title")).to_have_text(title)
    return page.locator("#view-book")


def go(page: Page, view: str) -> None:
    page.get_by_role("navigation", name="Main").get_by_role("link", name=view).click()
    expect(page.get_by_role("heading", name=view, level=2)).to_be_focused()


def here(page: Page) -> Locator:
    """The view that is shown."""
    return page.locator("main > section:visible")


def upload(page: Page, name: str, rows: str) -> None:
    file: FilePayload = {"name": name, "mimeType": "text/csv", "buffer": rows.encode()}
    page.get_by_label("CSV file").set_input_files(file)
    page.get_by_role("button", name="Upload").click()


def cards(page: Page) -> Locator:
    return here(page).locator(".cards > li, .covers > li:not(.skeleton), .rows > li:not(.skeleton)")


def tab_to(page: Page, wanted: Locator, key: str = "Tab") -> None:
    for _ in range(80):
        page.keyboard.press(key)
        if wanted.evaluate("node => node === document.activeElement"):
            return
    pytest.fail("the Tab key does not lead there")


def axe(page: Page, view: str) -> list[str]:
    found = Axe().run(page).response["violations"]
    return [
        f"{view}: {fault['id']}, {node['html']}"
        for fault in found
        if fault["impact"] in ("serious", "critical")
        for node in fault["nodes"]
    ]


def read_a_little(reader: Person) -> None:
    read: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({**DUNE, "pages": 412}, {"status": "completed", "rating": 5, "finished_at": "2024-05-01T12:00:00Z"}),
        (
            {"title": "Emma", "author": "Jane Austen", "genre": "Novel", "pages": 474},
            {
                "status": "completed",
                "rating": 3,
                "review": "Handsome.",
                "finished_at": "2023-05-01T12:00:00Z",
                "tags": ["sea"],
            },
        ),
        ({"title": "Ulysses", "author": "James Joyce", "genre": "Novel"}, {}),
    ]
    for book, entry in read:
        shelf = f"/my-library/{reader.add_book(**book)['id']}"
        assert reader.post(shelf).status_code == 201
        assert reader.patch(shelf, json=entry).status_code == 200
