"""/docs and /redoc in a browser: what can be tried there without reading. Needs playwright and Debian's chromium."""

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.browser import Visit
from tests.fixtures import Server

pytestmark = [pytest.mark.slow, pytest.mark.sqlite]  # to the browser, both databases are the same


def operation(page: Page, name: str) -> Locator:
    """Unfolded, and ready to be tried."""
    block = page.locator(f"[id$='-{name}']")
    block.locator(".opblock-summary-control").click()
    block.get_by_role("button", name="Try it out").click()
    return block


def execute(block: Locator) -> int:
    """The status of the answer."""
    with block.page.expect_response(lambda _: True) as answer:
        block.get_by_role("button", name="Execute").click()
    return answer.value.status


def authorize(page: Page, username: str = "admin", password: str = "admin") -> None:
    page.get_by_role("button", name="Authorize").click()
    dialog = page.locator(".dialog-ux")
    dialog.locator("#oauth_username").fill(username)
    dialog.locator("#oauth_password").fill(password)
    dialog.get_by_role("button", name="Apply given OAuth2 credentials").click()
    expect(dialog.get_by_role("button", name="Remove authorization")).to_be_visible()
    dialog.get_by_role("button", name="Close").first.click()


def test_the_stream_ends_when_it_is_tried(server: Server, open_page: Visit) -> None:
    page = open_page(server, address="docs")
    block = operation(page, "stream")
    expect(block.locator("tr[data-param-name=seconds] input")).to_have_value("5")
    assert execute(block) == 200
    expect(block.locator(".live-responses-table")).to_contain_text("event: ready")


def test_authorization_outlives_a_reload(server: Server, open_page: Visit) -> None:
    page = open_page(server, address="docs")
    authorize(page)
    page.reload()
    assert execute(operation(page, "read_me")) == 200


def test_ids_are_filled_in_and_examples_can_be_tried_in_turn(server: Server, open_page: Visit) -> None:
    page = open_page(server, address="docs")
    authorize(page)
    assert execute(operation(page, "register")) == 201
    assert execute(operation(page, "create_user")) == 201
    for name, status in (("create_book", 201), ("read_book", 200), ("replace_book", 200), ("update_book", 200)):
        assert execute(operation(page, name)) == status, name
    assert execute(page.locator("[id$='-create_book']")) == 201, "what was replaced has another ISBN"


def test_types_are_plain_and_the_catalogue_comes_first(server: Server, open_page: Visit) -> None:
    page = open_page(server, address="docs")
    expect(page.locator(".opblock-tag").first).to_contain_text("Catalogue")
    block = page.locator("[id$='-create_book']")
    block.locator(".opblock-summary-control").click()
    block.get_by_role("tab", name="Schema").first.click()
    model = block.locator(".json-schema-2020-12").first
    expect(model).to_contain_text("(string | null)")
    expect(model).to_contain_text("(number | null)")
    assert "| (" not in model.inner_text()


def test_redoc_logs_no_error(server: Server, open_page: Visit) -> None:
    page = open_page(server, address="redoc")
    expect(page.get_by_role("heading", name="Books API").first).to_be_visible()
    expect(page.get_by_role("menuitem").first).to_contain_text("Catalogue")
