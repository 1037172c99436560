"""The front page in a browser: what people do with it, and that they can. Needs playwright and Debian's chromium."""

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import (
    APIResponse,
    Browser,
    Page,
    Route,
    expect,
)

from tests.browser import (
    EVIL,
    PHONE,
    SIZES,
    Visit,
    axe,
    book_view,
    cards,
    go,
    here,
    open_book,
    read_a_little,
    sign_in,
    staff,
    tab_to,
    upload,
)
from tests.fixtures import DUNE, PASSWORD, ROOT, Catalogues, Person, Server, send, sign_up, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.sqlite]  # to the browser, both databases are the same

PICTURE = (1080, 680)
GONE = r"net::ERR_"  # what a browser says while the server is away

# --- what people do -----------------------------------------------------------------------------------------------


def test_a_visitor_searches_the_catalogue_and_opens_a_book(server: Server, visit: Visit) -> None:
    admin = Person(server.client, "admin", "admin")
    admin.upload((ROOT / "static" / "sample_books.csv").read_bytes())
    page = visit(server)
    expect(cards(page)).to_have_count(24)
    page.get_by_role("link", name="Next").click()
    expect(page.get_by_text("25\N{EN DASH}48 of 50")).to_be_visible()
    page.get_by_label("Search for").fill("bronte")
    expect(cards(page)).to_have_count(2)
    page.get_by_label("Search for").fill("zzz")
    expect(page.get_by_text("No books match.")).to_be_visible()
    page.get_by_role("link", name="Show everything").click()
    here(page).get_by_label("Genre").select_option("Epic")
    here(page).get_by_label("Sort by").select_option("year")
    expect(cards(page).first).to_contain_text("1800 BCE")
    dialog = open_book(page, "The Epic of Gilgamesh")
    expect(dialog).to_contain_text("Anonymous")
    expect(dialog).to_contain_text("Sign in to shelve, rate and review it.")
    dialog.get_by_role("link", name="Back to the list").click()
    expect(dialog).to_be_hidden()


def test_an_admin_fills_an_empty_catalogue_with_the_sample(server: Server, visit: Visit) -> None:
    page = visit(server)
    expect(page.get_by_text("The catalogue is empty.")).to_be_visible()
    page.locator("#sign-in").click()
    expect(page.locator("#hello")).to_contain_text("In development mode: admin / admin.")
    expect(page.locator("#account")).to_contain_text("In development mode: admin / admin.")
    page.keyboard.press("Escape")
    sign_in(page, "admin", "admin")
    page.get_by_role("button", name="Load fifty classics").click()
    expect(page.locator("#job-state")).to_have_text("Done.")
    expect(page.locator("#job-told")).to_have_text("50 books are in the catalogue.")
    go(page, "Catalogue")
    expect(page.get_by_text("1\N{EN DASH}24 of 50")).to_be_visible()


def test_a_reader_signs_up_shelves_rates_and_reviews(server: Server, visit: Visit) -> None:
    Person(server.client, "admin", "admin").add_book(**DUNE)
    page = visit(server, expected=r"status of (409|422)")
    page.locator("#sign-up").click()
    page.locator("#account").get_by_label("User name").fill("admin")
    page.locator("#account").get_by_label("E-mail address").fill("rita@example.com")
    page.locator("#account").get_by_label("Password").fill(PASSWORD)
    submit = page.locator("#account").get_by_role("button", name="Sign up")
    submit.click()
    expect(page.locator("#account")).to_contain_text("is taken")
    page.locator("#account").get_by_label("User name").fill("Rita")
    submit.click()
    expect(page.locator("#who")).to_have_text("Rita, reader")

    dialog = open_book(page, "Dune")
    dialog.get_by_role("button", name="Put it on my shelf").click()
    expect(dialog).to_contain_text("It is on your shelf.")
    dialog.get_by_role("radio", name="5 stars").check(force=True)
    dialog.get_by_role("button", name="Save").click()
    expect(dialog.locator("#book-reviews")).to_contain_text("5 of 5 stars")
    dialog.get_by_label("Status").select_option("completed")
    dialog.get_by_role("radio", name="4 stars").check(force=True)
    dialog.get_by_label("My review").fill("Sandy.\nVery.")
    dialog.get_by_role("button", name="Save").click()
    expect(dialog).to_contain_text("Saved.")
    expect(dialog.locator("#book-reviews")).to_contain_text("Sandy.")
    expect(dialog.locator("#book-head")).to_contain_text("4.0 (1)")
    dialog.get_by_role("link", name="Back to the list").click()
    expect(cards(page)).to_contain_text("4.0 (1)")

    go(page, "My shelf")
    expect(cards(page)).to_contain_text("4 of 5 stars")
    cards(page).get_by_label("Status of Dune").select_option("abandoned")
    here(page).get_by_role("link", name="Abandoned 1").click()
    expect(cards(page)).to_have_count(1)
    dialog = open_book(page, "Dune")
    dialog.get_by_role("button", name="Take it off my shelf").click()
    expect(dialog).to_contain_text("It is off your shelf.")
    dialog.get_by_role("link", name="Back to the list").click()
    expect(page.get_by_text("Nothing here yet.")).to_be_visible()

    page.locator("#sign-out").click()
    expect(page.get_by_text("This is for those who are signed in")).to_be_visible()
    assert page.evaluate("localStorage.length + sessionStorage.length") == 0


@SIZES
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_button_of_a_mailed_link_confirms_the_address(
    server: Server, visit: Visit, scheme: str, size: tuple[int, int]
) -> None:
    rita = sign_up(server.client, "rita")
    link = wait_for(lambda: re.search(r"/auth/verify-email/[\w-]+\n", server.log.read_text()))[0].strip()
    page = visit(server, size, scheme, expected=r"status of 404")
    page.goto(f"{server.url}{link}")
    heading = page.get_by_role("heading", level=1)
    expect(heading).to_have_text("Confirm your e-mail address")
    expect(heading).to_have_css("font-family", re.compile("Georgia"))
    faults = axe(page, "link")
    page.reload()
    assert rita.get("/users/me").json()["email_verified_at"] is None
    page.get_by_role("button", name="Confirm my address").click()
    expect(heading).to_have_text("Your e-mail address is confirmed")
    expect(page.get_by_text("rita@example.com")).to_be_visible()
    assert rita.get("/users/me").json()["email_verified_at"] is not None
    assert faults + axe(page, "confirmed") == []
    page.goto(f"{server.url}{link}")
    page.get_by_role("button", name="Confirm my address").click()
    expect(page.get_by_text("This link is used up or too old.")).to_be_visible()


def test_books_on_my_shelf_are_marked(server: Server, visit: Visit) -> None:
    rita = sign_up(server.client, "Rita")
    for number in range(1, 4):
        rita.add_book(title=f"Volume {number}")
    rita.post("/my-library/1")
    page = visit(server)
    sign_in(page, "Rita")

    def told_of(title: str) -> str:
        dialog = open_book(page, title)
        expect(dialog.locator("#mine")).to_be_visible()
        told = dialog.locator("#mine .strong").inner_text()
        dialog.get_by_role("link", name="Back to the list").click()
        return told

    assert told_of("Volume 1") == "Save"
    assert told_of("Volume 2") == "Put it on my shelf"
    rita.post("/my-library/3")
    assert told_of("Volume 3") == "Save"
    rita.delete("/my-library/3")
    assert told_of("Volume 3") == "Put it on my shelf"


def test_a_librarian_adds_copies_and_a_reader_borrows_and_returns(server: Server, visit: Visit) -> None:
    staff(server).add_book(**DUNE)
    sign_up(server.client, "Rita")
    desk, reader = visit(server), visit(server)
    sign_in(desk, "Lydia")
    dialog = open_book(desk, "Dune")
    dialog.get_by_label("Copies that the library has").fill("2")
    dialog.get_by_role("button", name="Set the number").click()
    expect(dialog).to_contain_text("2 of 2 copies available.")
    dialog.get_by_role("link", name="Back to the list").click()

    sign_in(reader, "Rita")
    dialog = open_book(reader, "Dune")
    expect(dialog.get_by_label("Copies that the library has")).to_be_hidden()
    dialog.get_by_role("button", name="Borrow it").click()
    expect(dialog).to_contain_text("Yours until")
    expect(dialog).to_contain_text("1 of 2 copies available.")
    dialog.get_by_role("link", name="Back to the list").click()
    expect(cards(desk)).to_contain_text("1 of 2 available")

    go(desk, "Lending")
    expect(cards(desk)).to_contain_text("lent to Rita")
    go(reader, "Lending")
    expect(cards(reader)).to_contain_text("due")
    for told in ("renewed 1 time", "renewed 2 times"):
        cards(reader).get_by_role("button", name="Renew").click()
        expect(cards(reader)).to_contain_text(told)
    expect(cards(reader).get_by_role("button", name="Renew")).to_have_count(0)  # that is the maximum
    cards(reader).get_by_role("button", name="Return").press("Enter")
    expect(reader.get_by_text("No loans here.")).to_be_visible()
    expect(here(reader).locator(".rows")).to_be_focused()  # the button that was pressed is gone
    expect(reader.locator(".ticker")).to_contain_text("You brought back Dune")
    expect(desk.get_by_text("No loans here.")).to_be_visible()
    reader.get_by_role("navigation", name="Loans").get_by_role("link", name="Returned").click()
    expect(cards(reader)).to_contain_text("returned")
    expect(cards(reader).get_by_role("link", name="Dune")).to_be_visible()
    assert Person(server.client, "Lydia").delete("/books/1").status_code == 204
    expect(cards(reader).get_by_role("link")).to_have_count(0)  # no link to the deleted book
    expect(cards(reader)).to_contain_text("Dune")


def test_a_double_click_sends_one_request(server: Server, visit: Visit) -> None:
    lydia, rita = staff(server), sign_up(server.client, "Rita")
    lydia.post(f"/books/{lydia.add_book(**DUNE)['id']}/stock", json={"quantity": 5})
    page = visit(server)
    sign_in(page, "Rita")
    dialog = open_book(page, "Dune")
    dialog.get_by_role("button", name="Borrow it").dblclick()
    expect(dialog).to_contain_text("4 of 5 copies available.")
    go(page, "Lending")
    cards(page).get_by_role("button", name="Renew").dblclick()
    expect(cards(page)).to_contain_text("renewed 1 time")
    cards(page).get_by_role("button", name="Return").click()  # comes after whatever a second click would have sent
    expect(page.get_by_text("No loans here.")).to_be_visible()
    assert [loan["renewals"] for loan in rita.get("/loans").json()["items"]] == [1]


def test_a_late_response_does_not_overwrite_a_newer_one(server: Server, visit: Visit) -> None:
    lydia = staff(server)
    sign_up(server.client, "Rita")
    book = lydia.add_book(**DUNE)
    lydia.post(f"/books/{book['id']}/stock", json={"quantity": 5})
    page = visit(server)
    sign_in(page, "Rita")
    dialog = open_book(page, "Dune")
    expect(dialog).to_contain_text("5 of 5 copies available.")
    late: list[tuple[Route, APIResponse]] = []

    def keep_the_first(route: Route) -> None:
        if late:
            route.fallback()
        else:
            late.append((route, route.fetch()))

    page.route(f"**/books/{book['id']}", keep_the_first)
    with page.expect_request(f"**/books/{book['id']}"):
        lydia.add_book(title="Meanwhile")
    dialog.get_by_role("button", name="Borrow it").click()
    expect(dialog).to_contain_text("4 of 5 copies available.")
    page.evaluate(
        """() => { const stock = document.querySelector('#stock-now'); window.told = [];
        new MutationObserver(() => told.push(stock.textContent)).observe(stock, { childList: true }); }"""
    )
    (route, answer), *_ = late
    with page.expect_response(f"**/books/{book['id']}"):
        route.fulfill(response=answer)
    page.wait_for_timeout(100)
    assert "5 of 5 copies available." not in page.evaluate("told")


def test_a_book_can_be_closed_before_it_is_loaded(server: Server, visit: Visit) -> None:
    book = staff(server).add_book(**DUNE)
    page = visit(server)
    held: list[Route] = []
    page.route(f"**/books/{book['id']}", lambda route: held.append(route))  # noqa: PLW0108  # Playwright marks its handler
    with page.expect_request(f"**/books/{book['id']}"):
        cards(page).get_by_role("link", name="Dune").click()
    page.go_back()
    with page.expect_response(f"**/books/{book['id']}"):
        held[0].fallback()
    page.unroute_all()
    open_book(page, "Dune")  # and `visit` finds nothing in the console


def test_a_typed_password_is_cleared(server: Server, visit: Visit) -> None:
    page = visit(server)
    page.locator("#sign-in").click()
    page.locator("#account").get_by_label("Password").fill(PASSWORD)
    page.keyboard.press("Escape")
    page.locator("#sign-in").click()
    expect(page.locator("#account").get_by_label("Password")).to_have_value("")


def test_changes_show_on_other_pages_at_once(server: Server, visit: Visit) -> None:
    staff(server)
    sign_up(server.client, "Rita")
    first, second = visit(server), visit(server)
    sign_in(first, "Lydia")
    first.get_by_role("link", name="Add a book").click()
    expect(first.get_by_role("heading", name="Add a book")).to_be_visible()
    first.get_by_text("Type it in by hand").click()
    form = here(first).locator("#add-form")
    form.get_by_label("Title").fill("Dune")
    form.get_by_label("Author").fill("Frank Herbert")
    form.get_by_label("Year").fill("1965")
    form.get_by_role("button", name="Save").click()
    dialog = book_view(first, "Dune")
    expect(dialog).to_contain_text("1965")

    expect(cards(second)).to_contain_text("Dune")
    expect(second.locator(".ticker")).to_contain_text("New: Dune by Frank Herbert")
    theirs = open_book(second, "Dune")
    dialog.get_by_label("Status").select_option("completed")
    dialog.get_by_role("button", name="Put it on my shelf").click()
    dialog.get_by_role("radio", name="5 stars").check(force=True)
    dialog.get_by_label("My review").fill("Sandy.")
    dialog.get_by_role("button", name="Save").click()
    expect(theirs.locator("#book-reviews")).to_contain_text("Sandy.")
    expect(theirs.locator("#book-head")).to_contain_text("5.0 (1)")
    expect(second.locator(".ticker")).not_to_contain_text("shelf")
    Person(server.client, "Lydia").add_book(title="Two\N{LINE SEPARATOR}lines")  # ends no line of the stream
    expect(second.locator(".ticker")).to_contain_text(re.compile("Two.lines", re.DOTALL))
    assert Person(server.client, "Lydia").delete("/books/1").status_code == 204
    expect(theirs).to_contain_text("This book has just been deleted.")
    second.go_back()
    expect(cards(second)).to_have_count(1)


def test_live_changes_keep_the_page_of_the_list(server: Server, visit: Visit) -> None:
    admin = Person(server.client, "admin", "admin")
    admin.upload((ROOT / "static" / "sample_books.csv").read_bytes())
    page = visit(server)
    expect(page.get_by_text("1\N{EN DASH}24 of 50")).to_be_visible()
    waiting: list[Route] = []

    def hold_the_first(route: Route) -> None:
        if waiting:
            route.fallback()
        else:
            waiting.append(route)

    page.route("**/books?*offset=24*", hold_the_first)
    with page.expect_request("**/books?*offset=24*"):
        page.get_by_role("link", name="Next").click()
    admin.add_book(title="Meanwhile")
    expect(page.get_by_text("25\N{EN DASH}48 of 51")).to_be_visible()
    assert len(waiting) == 1


# Lists take 1.3 s to come.
SLOW = r"""
const quick = fetch;
window.fetch = (path, how) => !/books\?/.test(path) ? quick(path, how) : new Promise((ok, no) => {
    const later = setTimeout(() => quick(path, how).then(ok, no), 1300);
    how.signal.addEventListener('abort', () => { clearTimeout(later); no(how.signal.reason); });
});
"""


def test_lists_are_current_when_changes_come_faster_than_responses(server: Server, visit: Visit) -> None:
    lydia = staff(server)
    page = visit(server)
    page.add_init_script(SLOW)
    page.reload()
    expect(page.get_by_text("The catalogue is empty.")).to_be_visible()
    stop = threading.Event()

    def add_books() -> None:
        while not stop.wait(0.2):
            lydia.add_book(title=f"Book {time.monotonic()}")

    adding = threading.Thread(target=add_books)
    adding.start()
    try:
        expect(cards(page)).not_to_have_count(0)
    finally:
        stop.set()
        adding.join()


def test_the_ticker_survives_a_restart(serve: Callable[..., Server], tmp_path: Path, visit: Visit) -> None:
    server = serve()
    admin = Person(server.client, "admin", "admin")
    admin.add_book(title="Before")
    page = visit(server, expected=GONE)
    server.stop()
    expect(page.locator("#live")).to_have_text("reconnecting")
    meanwhile = serve()  # another one, on the same database
    Person(meanwhile.client, "admin", "admin").add_book(title="Meanwhile")
    meanwhile.stop()
    server.start(port=server.port)
    expect(page.locator("#live")).to_have_text("connected", timeout=40_000)
    expect(page.locator(".ticker")).to_contain_text("New: Meanwhile")
    expect(cards(page)).to_have_count(2)

    server.stop()
    server.file = tmp_path / "other.db"
    server.start(port=server.port)
    expect(page.get_by_text("The catalogue is empty.")).to_be_visible(timeout=40_000)
    Person(server.client, "admin", "admin").add_book(title="Afterwards")
    expect(cards(page)).to_contain_text("Afterwards")


def test_an_expired_token_is_refreshed_once(server: Server, visit: Visit) -> None:
    rita = sign_up(server.client, "Rita")
    rita.add_book(**DUNE)
    page = visit(server, expected="status of 401")
    sign_in(page, "Rita")
    refreshed: list[str] = []
    page.on("request", lambda request: refreshed.append(request.url) if "/auth/refresh" in request.url else None)

    page.reload()
    expect(page.locator("#who")).to_have_text("Rita, reader")
    expect(page.locator("#live")).to_have_text("connected")
    assert len(refreshed) == 1
    old: list[str] = []

    def refuse(route: Route) -> None:
        token = route.request.headers.get("authorization", "")
        old[:] = old or [token]
        if token == old[0]:
            route.fulfill(status=401, json={"title": "Unauthorized", "status": 401})
        else:
            route.fallback()

    expect(cards(page).first).to_be_visible()
    page.route(re.compile("/(my-library|loans)"), refuse)
    cards(page).first.get_by_role("link").click()  # two requests at once
    dialog = book_view(page, "Dune")
    expect(dialog).to_contain_text("Put it on my shelf")
    expect(dialog).to_contain_text("Nobody has reviewed it yet.")
    assert len(refreshed) == 2
    dialog.get_by_role("link", name="Back to the list").click()

    rita.post("/auth/logout-all")
    page.get_by_role("navigation", name="Main").get_by_role("link", name="My shelf").click()
    expect(page.get_by_text("Your login has ended. Sign in again.")).to_be_visible()
    expect(page.get_by_text("This is for those who are signed in")).to_be_visible()
    # What had it is gone; the heading has it if the stream ended, and with it the login, before the click.
    expect(page.locator("#main:focus, #h-invite:focus")).to_have_count(1)
    expect(page.locator("#sign-in")).to_be_visible()


# --- addresses ----------------------------------------------------------------------------------------------------


@pytest.fixture
def classics(server: Server) -> Server:
    """A server with the fifty classics."""
    Person(server.client, "admin", "admin").upload((ROOT / "static" / "sample_books.csv").read_bytes())
    return server


def test_back_closes_a_book_and_shows_the_list_as_it_was(classics: Server, visit: Visit) -> None:
    admin = Person(classics.client, "admin", "admin")
    for number in range(20):
        admin.add_book(title=f"The book {number}")
    page = visit(classics, PHONE)
    expect(page).to_have_title("Catalogue · Books")
    page.get_by_label("Search for").fill("the")
    expect(page).to_have_url(f"{classics.url}/#/?search=the")
    expect(page).to_have_title("“the” · Catalogue · Books")
    page.get_by_role("link", name="Next").click()
    expect(page).to_have_url(f"{classics.url}/#/?search=the&page=2")
    card = cards(page).nth(6).get_by_role("link")
    expect(page.get_by_text(re.compile("^25\N{EN DASH}"))).to_be_visible()
    card.scroll_into_view_if_needed()
    title, position = card.inner_text(), page.evaluate("scrollY")
    card.click()
    expect(page).to_have_title(f"{title} · Books")
    expect(page.get_by_role("heading", name=title)).to_be_focused()
    page.go_back()
    expect(page).to_have_url(f"{classics.url}/#/?search=the&page=2")
    expect(page.locator("#view-book")).to_be_hidden()
    expect(card).to_be_focused()
    assert page.evaluate("scrollY") == pytest.approx(position, abs=2)
    page.go_forward()
    expect(page.get_by_role("heading", name=title)).to_be_visible()
    page.get_by_role("link", name="Back to the list").click()
    expect(page).to_have_url(f"{classics.url}/#/?search=the&page=2")
    page.go_back()  # of the page of the list: typing left no steps behind
    expect(page).to_have_url(f"{classics.url}/#/?search=the")
    expect(page.get_by_text(re.compile("^1\N{EN DASH}24"))).to_be_visible()


@pytest.mark.parametrize(
    ("address", "title", "told"),
    [
        pytest.param("#/?search=austen&sort=-year", "“austen” · Catalogue", "Emma", id="a search"),
        pytest.param("#/?genre=Epic&page=1", "Catalogue", "The Iliad", id="a genre"),
        pytest.param("#/?page=999", "Catalogue", "49\N{EN DASH}50 of 50", id="a page beyond the last"),
        pytest.param("#/?page=-1&genre=", "Catalogue", "1\N{EN DASH}24 of 50", id="a page that is none"),
        pytest.param("#/?genre=%3Cb%3E&search=%00", "Catalogue", "", id="nonsense"),
        pytest.param("#/book/1", "The Epic of Gilgamesh", "Anonymous", id="a book"),
        pytest.param("#/book/999", "Book", "There is no such book", id="no book"),
        pytest.param("#/book/x", "Book", "There is no such book", id="not even a number"),
        pytest.param("#/shelf/reading", "My shelf", "This is for those who are signed in", id="a member's"),
        pytest.param("#/users", "Users", "This is for those who are signed in", id="an admin's"),
        pytest.param("#/nowhere/1?x", "Catalogue", "The Iliad", id="no view"),
        pytest.param("#/__proto__", "Catalogue", "The Iliad", id="a name of JavaScript"),
    ],
)
def test_an_address_opens_its_view(classics: Server, visit: Visit, address: str, title: str, told: str) -> None:
    page = visit(classics, address=address, expected="status of (404|422)")
    expect(page).to_have_title(re.compile(f"{re.escape(title)} · Books"))
    expect(here(page)).to_contain_text(told)
    expect(page.locator("main > section:visible")).to_have_count(1)


def test_the_whole_card_opens_a_book(classics: Server, visit: Visit) -> None:
    page = visit(classics, PHONE)
    height = cards(page).first.evaluate("card => card.clientHeight")
    cards(page).first.click(position={"x": 20, "y": height - 5})
    expect(page.get_by_role("heading", name="The Epic of Gilgamesh", level=2)).to_be_focused()
    expect(page.locator("header nav [aria-current=page]")).to_have_count(0)
    go(page, "Catalogue")
    expect(page.locator("header nav [aria-current=page]")).to_have_text("Catalogue")


def test_a_choice_keeps_the_focus_and_back_undoes_it(classics: Server, visit: Visit) -> None:
    page = visit(classics)
    genre = here(page).get_by_label("Genre")
    genre.select_option("Epic")
    expect(cards(page)).not_to_have_count(24)
    expect(page).to_have_url(f"{classics.url}/#/?genre=Epic")
    genre.focus()
    genre.select_option("Novel")
    expect(page).to_have_url(f"{classics.url}/#/?genre=Novel")
    expect(genre).to_be_focused()
    page.go_back()
    expect(genre).to_have_value("Epic")
    page.reload()
    expect(genre).to_have_value("Epic")
    expect(cards(page).first).to_contain_text("The Epic of Gilgamesh")


# --- staying signed in --------------------------------------------------------------------------------------------


def test_signing_in_and_out_is_for_all_tabs(server: Server, visit: Visit) -> None:
    sign_up(server.client, "Rita")
    first = visit(server)
    sign_in(first, "Rita")
    stored = first.evaluate("JSON.stringify({...localStorage, ...sessionStorage}) + document.cookie")
    assert stored == '{"role":"reader"}', "the tokens are where no script finds them"
    second = visit(server, context=first.context, address="#/shelf")
    expect(second.locator("#who")).to_contain_text("Rita")
    expect(second.get_by_text("Nothing here yet.")).to_be_visible()
    second.locator("#sign-out").click()
    for page in (first, second):
        expect(page.locator("#sign-in")).to_be_visible()
        expect(page.locator("#who")).to_be_hidden()
    expect(second.get_by_text("This is for those who are signed in")).to_be_visible()
    sign_in(first, "Rita")
    expect(second.locator("#who")).to_contain_text("Rita")
    expect(second.get_by_text("Nothing here yet.")).to_be_visible()


def test_a_restarted_browser_is_still_signed_in(server: Server, visit: Visit, browser: Browser) -> None:
    sign_up(server.client, "Rita")
    page = visit(server)
    sign_in(page, "Rita")
    kept = page.context.storage_state()
    page.context.close()
    with browser.new_context(storage_state=kept) as restarted:
        page = visit(server, context=restarted)
        expect(page.locator("#who")).to_contain_text("Rita")


def test_a_session_that_ended_meanwhile_starts_signed_out(server: Server, visit: Visit) -> None:
    rita = sign_up(server.client, "Rita")
    page = visit(server, expected="status of 401")
    sign_in(page, "Rita")
    rita.post("/auth/logout-all")
    page.reload()
    expect(page.locator("#sign-in")).to_be_visible()
    expect(page.get_by_text("The catalogue is empty.")).to_be_visible()
    assert page.evaluate("localStorage.length") == 0


def test_a_visitor_asks_for_no_token(server: Server, visit: Visit) -> None:
    page = visit(server)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.reload()
    expect(page.locator("#live")).to_have_text("connected")
    assert not [url for url in asked if "/auth/" in url]


def test_signing_up_says_that_a_mail_is_on_its_way(server: Server, visit: Visit) -> None:
    page = visit(server)
    fill_in_sign_up(page)
    expect(page.get_by_text("A mail is on its way to rita@example.com")).to_be_visible()
    page.get_by_role("link", name="My shelf").click()
    expect(page.get_by_text("A mail is on its way to rita@example.com")).to_be_hidden()


def fill_in_sign_up(page: Page) -> None:
    page.locator("#sign-up").click()
    for name, value in {"User name": "Rita", "E-mail address": "rita@example.com", "Password": PASSWORD}.items():
        page.locator("#account").get_by_label(name).fill(value)
    page.locator("#account").get_by_role("button", name="Sign up").click()


def test_an_unconfirmed_address_is_offered_another_mail(serve: Callable[..., Server], visit: Visit) -> None:
    server = serve(REQUIRE_VERIFIED_EMAIL="true")
    page = visit(server, expected="status of 403")
    fill_in_sign_up(page)
    again = page.locator("#confirm")
    expect(again).to_contain_text("A mail is on its way to you.")
    expect(again.get_by_label("Address to confirm")).to_have_value("rita@example.com")
    again.get_by_role("button", name="Send it again").click()
    expect(again).to_contain_text("It is on its way.")
    wait_for(lambda: len(re.findall(r"/auth/verify-email/[\w-]+\n", server.log.read_text())) == 2 or None)
    link = re.findall(r"/auth/verify-email/[\w-]+\n", server.log.read_text())[-1].strip()
    assert server.client.post(link).status_code == 200
    page.locator("#sign").get_by_role("button", name="Sign in").click()
    expect(page.locator("#who")).to_contain_text("Rita")


# --- one book -----------------------------------------------------------------------------------------------------


def test_the_rating_of_one_book_is_not_saved_for_the_next(server: Server, visit: Visit) -> None:
    rita = sign_up(server.client, "Rita")
    for title in ("Dune", "Emma"):
        rita.add_book(title=title)
    page = visit(server)
    sign_in(page, "Rita")
    view = open_book(page, "Dune")
    view.get_by_role("button", name="Put it on my shelf").click()
    view.get_by_role("radio", name="5 stars").check(force=True)
    view.get_by_label("My review").fill("Sandy.")
    view.get_by_role("button", name="Save").click()
    expect(view).to_contain_text("Saved.")
    page.go_back()
    view = open_book(page, "Emma")
    view.get_by_role("button", name="Put it on my shelf").click()
    expect(view.get_by_role("radio", name="no rating")).to_be_checked()
    expect(view.get_by_label("My review")).to_have_value("")
    view.get_by_label("Status").select_option("reading")
    view.get_by_role("button", name="Save").click()
    expect(view).to_contain_text("Saved.")
    entry = rita.get("/my-library/2").json()
    assert (entry["status"], entry["rating"], entry["review"]) == ("reading", None, None)


def test_a_book_that_i_hold_offers_to_return_it(server: Server, visit: Visit) -> None:
    lydia, rita = staff(server), sign_up(server.client, "Rita")
    lydia.post(f"/books/{lydia.add_book(**DUNE)['id']}/stock", json={"quantity": 2})
    rita.post("/loans", json={"book_id": 1})
    page = visit(server)
    view = open_book(page, "Dune")
    expect(view).to_contain_text("1 of 2 copies available.")
    expect(view.get_by_role("button", name="Borrow it")).to_be_hidden()
    sign_in(page, "Rita")
    expect(view).to_contain_text("You have it until")
    expect(view.get_by_role("button", name="Borrow it")).to_be_hidden()
    view.get_by_role("button", name="Return it").click()
    expect(view).to_contain_text("2 of 2 copies available.")
    view.get_by_role("button", name="Borrow it").click()
    expect(view).to_contain_text("Yours until")
    page.locator("#sign-out").click()
    expect(view).not_to_contain_text("You have it until")
    expect(view.get_by_role("button", name="Return it")).to_be_hidden()


def test_each_author_of_a_book_has_a_link(server: Server, visit: Visit) -> None:
    """All of them together may have more words than a search takes."""
    admin, authors = Person(server.client, "admin", "admin"), ", ".join(f"Ann {n} Lee" for n in range(20))
    admin.add_book(title="Letters", author=authors)
    admin.add_book(title="Notes", author="Ann 7 Lee")
    page = visit(server)
    open_book(page, "Letters").get_by_role("link", name="Ann 7 Lee").click()
    expect(cards(page)).to_have_count(2)


def test_a_link_to_a_book_can_be_shared(server: Server, visit: Visit) -> None:
    Person(server.client, "admin", "admin").add_book(**DUNE)
    page = visit(server)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    view = open_book(page, "Dune")
    view.get_by_role("link", name="Copy a link to share").click()
    expect(view).to_contain_text("The link is copied.")
    shared = page.evaluate("navigator.clipboard.readText()")
    assert shared == f"{server.url}/b/1"
    page = visit(server, address="b/1")
    expect(page.get_by_role("heading", name="Dune")).to_be_visible()
    expect(page).to_have_url(f"{server.url}/#/book/1")
    page.get_by_role("link", name="Back to the list").click()
    expect(cards(page)).to_have_count(1)


# --- the catalogue ------------------------------------------------------------------------------------------------


def test_a_search_that_finds_nothing_suggests_others(classics: Server, visit: Visit) -> None:
    page = visit(classics)
    page.get_by_label("Search for").fill("gilgamsh")
    page.get_by_role("link", name="gilgamesh", exact=True).click()
    expect(cards(page)).to_have_count(1)
    expect(page.get_by_label("Search for")).to_have_value("gilgamesh")
    page.get_by_label("Search for").fill("zzz")
    page.get_by_role("link", name="Add it by ISBN or by words").click()
    expect(page.get_by_text("This is for those who are signed in")).to_be_visible()
    expect(page).to_have_url(f"{classics.url}/#/add?search=zzz")


def test_a_picture_comes_over_the_drawn_cover(server: Server, visit: Visit) -> None:
    admin = Person(server.client, "admin", "admin")
    admin.add_book(**DUNE)
    admin.add_book(title="Emma", isbn="9780141439587")
    admin.add_book(title="No ISBN")
    page = visit(server, address="#/add")
    png = (ROOT / "static" / "icon-192.png").read_bytes()
    page.route("**/books/1/cover?*", lambda route: route.fulfill(body=png, content_type="image/png"))
    page.route("**/books/2/cover?*", lambda route: route.fulfill(status=204))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    go(page, "Catalogue")
    expect(cards(page).nth(0).locator("img")).to_have_js_property("naturalWidth", 192)
    expect(page.locator("img")).to_have_count(1)
    for card, title in enumerate(("Dune", "Emma", "No ISBN")):
        expect(cards(page).nth(card).locator(".cover strong")).to_have_text(title)
    queries = [
        f"{server.url}/books/{i}/cover?optional=true&v={isbn}" for i, isbn in ((1, 9780441172719), (2, 9780141439587))
    ]
    assert [url for url in asked if "/cover" in url] == queries


# --- adding books -------------------------------------------------------------------------------------------------


@pytest.fixture
def catalogues() -> Iterator[Catalogues]:
    """Google Books and Open Library."""
    started = Catalogues()
    yield started
    started.close()


def test_a_scanner_adds_books_without_a_mouse(
    serve: Callable[..., Server], visit: Visit, catalogues: Catalogues
) -> None:
    server = serve(GOOGLE_BOOKS_URL=catalogues.url, OPEN_LIBRARY_URL=catalogues.url)
    rita = sign_up(server.client, "Rita")
    rita.add_book(**DUNE)
    page = visit(server, expected="status of 422")
    sign_in(page, "Rita")
    page.get_by_role("link", name="Add a book").click()
    expect(page.get_by_label("ISBN or words")).to_be_focused()
    for scanned in ("9780141439587", "0-441-17271-7", "9780000000002", "9780141439588", "9780141439587"):
        page.keyboard.type(scanned)
        page.keyboard.press("Enter")
    told = page.locator("#added > li")
    expect(told).to_have_count(5)
    expect(told.nth(4)).to_contain_text("Added: Emma")
    expect(told.nth(3)).to_contain_text("Here already: Dune")
    expect(told.nth(2)).to_contain_text("Unknown.")
    expect(told.nth(1)).to_contain_text("9780141439588")
    expect(told.nth(0)).to_contain_text("Here already: Emma")
    expect(page.get_by_label("ISBN or words")).to_be_focused()
    assert rita.get("/books").json()["total"] == 2
    told.nth(2).get_by_role("button", name="Type it in by hand").click()
    form = page.locator("#add-form")
    expect(form.get_by_label("ISBN")).to_have_value("9780000000002")
    form.get_by_label("Title").fill("A pamphlet")
    form.get_by_label("Author").fill("Nobody")
    form.get_by_role("button", name="Save").click()
    expect(page.get_by_role("heading", name="A pamphlet")).to_be_visible()


def test_words_find_candidates_and_one_tap_adds(
    serve: Callable[..., Server], visit: Visit, catalogues: Catalogues
) -> None:
    server = serve(GOOGLE_BOOKS_URL=catalogues.url, OPEN_LIBRARY_URL=catalogues.url)
    sign_up(server.client, "Rita")
    page = visit(server, PHONE, expected="status of 502")
    sign_in(page, "Rita")
    page.get_by_label("Search for").fill("emma")
    page.get_by_role("link", name="Add it by ISBN or by words").click()
    candidates = page.locator("#candidates > li")
    first = candidates.first
    expect(first).to_contain_text("Jane Austen")
    first.get_by_role("button", name="Add").click()
    expect(first).to_contain_text("Added: Emma")
    first.get_by_role("link").click()
    expect(page.get_by_role("heading", name=re.compile("^Emma"))).to_be_visible()
    page.go_back()
    candidates.first.get_by_role("button", name="Add").click()
    expect(candidates.first).to_contain_text("Here already: Emma")
    catalogues.always = lambda handler: send(handler, {}, 500)
    page.get_by_label("ISBN or words").fill("something else")
    page.get_by_role("button", name="Find").click()
    expect(page.locator("#find .problem")).not_to_be_empty()


# --- what happens -------------------------------------------------------------------------------------------------


def test_an_import_is_one_line_and_older_days_are_named(server: Server, visit: Visit) -> None:
    admin = Person(server.client, "admin", "admin")
    page = visit(server)
    admin.upload("title,author\n" + "".join(f"Volume {i},Somebody\n" for i in range(3500)))
    expect(page.locator("#latest")).to_contain_text("Books that came in from a file: 3,500")
    expect(page.locator(".ticker li")).to_have_count(1)
    assert page.locator("#latest time").inner_text().count(":") == 1
    page.clock.set_fixed_time("2031-02-03T10:00:00Z")
    page.reload()
    expect(page.locator("#latest time")).to_contain_text(re.compile(r"[A-Z][a-z]{2} \d|\d [A-Z]"))


def test_user_text_of_another_direction_stands_apart(server: Server, visit: Visit) -> None:
    page = visit(server)
    Person(server.client, "admin", "admin").add_book(title="ألف ليلة وليلة", author="مجهول")
    expect(page.locator("#latest bdi")).to_have_text(["ألف ليلة وليلة", "مجهول"])
    expect(cards(page).first.locator("bdi")).to_have_count(2)


def test_the_ticker_is_small_and_opens(classics: Server, visit: Visit) -> None:
    page = visit(classics, PHONE)
    Person(classics.client, "admin", "admin").patch("/books/1", json={"pages": 100})
    strip = page.locator(".live")
    expect(page.locator("#latest")).to_contain_text("Changed: The Epic of Gilgamesh")
    box = strip.bounding_box()
    assert box is not None
    assert box["y"] + box["height"] < 120, "it is on the first screen, and small"
    header = page.locator("header").bounding_box()
    assert header is not None
    assert header["height"] < 70, "of one line"
    page.get_by_role("button", name="Recent changes").click()
    expect(page.get_by_role("log", name="What happens").get_by_role("link")).to_have_text("The Epic of Gilgamesh")
    page.keyboard.press("Escape")
    expect(page.locator("#log")).to_be_hidden()
    page.get_by_role("button", name="Recent changes").click()
    page.locator("#log").get_by_role("link").click()
    expect(page.locator("#log")).to_be_hidden()  # or it would cover the book
    page.go_back()
    page.get_by_role("button", name="Recent changes").click()
    page.get_by_label("Pause").check()
    Person(classics.client, "admin", "admin").add_book(title="Unheard of")
    expect(page.get_by_text("51", exact=True)).to_be_visible()
    expect(page.locator(".ticker")).not_to_contain_text("Unheard of")


def test_an_outage_is_said_and_forgotten(serve: Callable[..., Server], visit: Visit) -> None:
    server = serve()
    Person(server.client, "admin", "admin").add_book(**DUNE)
    page = visit(server, expected=GONE)
    expect(cards(page)).to_have_count(1)
    server.stop()
    expect(page.get_by_text(re.compile("The library can.t be reached"))).to_be_visible()
    page.get_by_label("Search for").fill("dun")
    expect(page.locator("#catalogue .problem").first).to_contain_text(re.compile("can.t be reached"))
    expect(page.get_by_role("button", name="Try again")).to_be_visible()
    server.start(port=server.port)
    page.locator("#retry").dispatch_event("click")  # the page may have noticed by itself
    expect(page.get_by_text(re.compile("The library can.t be reached"))).to_be_hidden()
    expect(page.locator("#catalogue .problem").first).to_be_empty()
    expect(cards(page)).to_have_count(1)
    expect(page.locator("#live")).to_have_text("connected")


# --- how it looks -------------------------------------------------------------------------------------------------

SHIFTS = """
window.shifts = 0;
new PerformanceObserver(list => {
    for (const entry of list.getEntries()) if (!entry.hadRecentInput) shifts += entry.value;
}).observe({ type: 'layout-shift', buffered: true });
"""


@SIZES
@pytest.mark.parametrize("address", ["#/", "#/?search=the", "#/book/1"], ids=["catalogue", "search", "book"])
def test_nothing_moves_while_it_loads(classics: Server, visit: Visit, size: tuple[int, int], address: str) -> None:
    sign_up(classics.client, "Rita")
    page = visit(classics, size)
    page.add_init_script(SHIFTS)
    page.add_init_script(SLOW)
    for signed_in in (False, True):
        if signed_in:
            sign_in(page, "Rita")
        page.goto("about:blank")
        page.goto(f"{classics.url}/{address}")
        expect(page.locator("#live")).to_have_text("connected")
        expect(here(page).locator(".covers > li:not(.skeleton), #book-head p").first).to_be_visible()
        page.wait_for_timeout(300)
        assert page.evaluate("shifts") < 0.05, f"signed in: {signed_in}"


@SIZES
def test_the_page_ends_with_its_footer(classics: Server, visit: Visit, size: tuple[int, int]) -> None:
    rita = sign_up(classics.client, "Rita")
    for book in range(1, 31):
        rita.post(f"/my-library/{book}", json={"status": "completed"})
        rita.patch(f"/my-library/{book}", json={"rating": 4})
    page = visit(classics, size)
    expect(page.locator(".ticker .star").first).to_be_attached()
    page.get_by_role("button", name="Recent changes").click()
    below = page.evaluate(
        "document.documentElement.scrollHeight - scrollY"
        " - document.querySelector('footer').getBoundingClientRect().bottom"
    )
    assert below < 70  # the bar of the views on a phone
    page.locator("#sign-in").click()
    line = page.locator("#account").get_by_role("button", name="Close").bounding_box()
    assert line is not None
    assert line["height"] < 50, "the word is not broken"


def test_the_page_behind_a_dialog_does_not_scroll(classics: Server, visit: Visit) -> None:
    page = visit(classics, PHONE)
    page.locator("#sign-in").click()
    page.mouse.move(100, 400)
    page.mouse.wheel(0, 600)
    page.keyboard.press("Escape")
    page.mouse.wheel(0, 10)
    page.wait_for_function("scrollY > 0")
    assert page.evaluate("scrollY") < 50


def test_at_200_percent_everything_is_there(classics: Server, visit: Visit) -> None:
    page = visit(classics, (640, 450))  # as a window of 1280x900 is at 200 %
    sign_up(classics.client, "Rita")
    sign_in(page, "Rita")
    for address in ("#/", "#/book/1", "#/add"):
        page.goto(f"{classics.url}/{address}")
        expect(here(page).get_by_role("heading", level=2).last).to_be_visible()
        assert not page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth"), address
    bar = page.locator("header nav").bounding_box()
    assert bar is not None
    assert bar["height"] < 70


@pytest.mark.parametrize("motion", ["reduce", "no-preference"])
def test_motion_is_for_those_who_like_it(classics: Server, visit: Visit, motion: str) -> None:
    page = visit(classics, reduced_motion=motion)
    Person(classics.client, "admin", "admin").add_book(title="The newest")
    expect(page.locator(".count").first).to_have_text("51")
    moving = page.evaluate(
        "[...document.querySelectorAll('*')].filter(node => getComputedStyle(node).animationName !== 'none'"
        " || getComputedStyle(node).transitionDuration !== '0s').length"
    )
    assert bool(moving) == (motion == "no-preference")


def test_it_can_be_installed(server: Server, visit: Visit) -> None:
    page = visit(server)
    manifest = server.client.get("/static/manifest.webmanifest")
    assert manifest.headers["Content-Type"].startswith("application/manifest+json")
    for icon in manifest.json()["icons"]:
        answer = server.client.get(f"/static/{icon['src']}")
        assert (answer.status_code, answer.headers["Content-Type"]) == (200, icon["type"])
    assert (
        page.evaluate("document.querySelector('link[rel=manifest]').href")
        == f"{server.url}/static/manifest.webmanifest"
    )


# --- what nobody may do ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("evil", EVIL, ids=["an image", "a script"])
def test_user_content_is_shown_as_text(server: Server, visit: Visit, evil: str) -> None:
    rita = sign_up(server.client, "Rita")
    assert rita.patch("/users/me", json={"full_name": evil}).status_code == 200
    texts = dict.fromkeys(("title", "author", "genre", "publisher", "description"), evil)
    book = rita.add_book(**texts)
    shelf = f"/my-library/{book['id']}"
    rita.post(shelf)
    assert rita.patch(shelf, json={"status": "completed", "review": evil, "tags": ["<b>x</b>"]}).status_code == 200
    page = visit(server)
    scripts = page.locator("script").count()
    sign_in(page, "Rita", shown=evil)
    expect(page.locator(".ticker")).to_contain_text(f"New: {evil} by {evil}")
    expect(here(page).get_by_label("Genre").locator("option").last).to_have_text(f"{evil} (1)")
    expect(cards(page)).to_contain_text(evil)
    dialog = open_book(page, evil)
    expect(dialog.locator("#book-reviews")).to_contain_text(evil)
    expect(dialog.locator("#book-head")).to_contain_text(evil)
    expect(dialog.locator("#book-info")).to_contain_text(evil)
    dialog.get_by_role("link", name="Back to the list").click()
    for view in ("My shelf", "Statistics"):
        go(page, view)
        expect(page.locator("main > section:visible")).to_contain_text(evil[:14])
    assert (page.locator("img, b").count(), page.locator("script").count()) == (0, scripts)


def test_the_content_security_policy_blocks_injected_code(server: Server, visit: Visit) -> None:
    page = visit(server, expected="TrustedHTML|Trusted Type|Content Security Policy")
    refused = page.evaluate("try { document.body.innerHTML = '<p>'; 'taken' } catch (error) { error.name }")
    assert refused == "TypeError"
    loaded = page.evaluate(
        "new Promise(done => { const s = document.createElement('style'); s.textContent = 'body { zoom: 2 }';"
        "document.head.append(s); done(getComputedStyle(document.body).zoom); })"
    )
    assert loaded == "1"


# --- for everybody ------------------------------------------------------------------------------------------------


def test_the_keyboard_is_enough(server: Server, visit: Visit) -> None:
    rita = sign_up(server.client, "Rita")
    read_a_little(rita)
    page = visit(server)
    page.keyboard.press("Tab")
    expect(page.get_by_text("Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#main")).to_be_focused()
    assert "#main" not in page.url, "the address keeps the view"
    tab_to(page, page.locator("#sign-in"), key="Shift+Tab")
    page.keyboard.press("Enter")
    page.keyboard.type("Rita")
    page.keyboard.press("Tab")
    page.keyboard.type(PASSWORD)
    page.keyboard.press("Enter")
    expect(page.locator("#who")).to_contain_text("Rita")
    expect(page.locator("#main")).to_be_focused()  # the button that opened it is gone

    tab_to(page, page.get_by_label("Search for"))
    page.keyboard.type("dune")
    expect(cards(page)).to_have_count(1)
    card = cards(page).get_by_role("link", name="Dune")
    tab_to(page, card)
    page.keyboard.press("Enter")
    dialog = book_view(page, "Dune")
    expect(dialog).to_contain_text("Frank Herbert")
    expect(dialog.get_by_role("radio", name="5 stars")).to_be_checked()
    tab_to(page, dialog.get_by_role("radio", name="5 stars"))
    page.keyboard.press("ArrowLeft")
    tab_to(page, dialog.get_by_role("button", name="Save"))
    page.keyboard.press("Enter")
    expect(dialog).to_contain_text("Saved.")
    page.go_back()
    expect(dialog).to_be_hidden()
    expect(cards(page)).to_contain_text("4.0 (1)")
    expect(card).to_be_focused()


LONG = "Donaudampfschiffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft" * 3


@SIZES
def test_nothing_is_wider_than_the_screen(server: Server, visit: Visit, size: tuple[int, int]) -> None:
    lydia = staff(server)
    read_a_little(lydia)
    book = lydia.add_book(title=LONG, author=LONG, genre=LONG[:100], publisher=LONG)
    lydia.post(f"/my-library/{book['id']}", json={"status": "completed"})
    lydia.post(f"/books/{book['id']}/stock", json={"quantity": 1})
    lydia.post("/loans", json={"book_id": book["id"]})
    page = visit(server, size)
    sign_in(page, "Lydia")
    for view in tour(page, LONG):
        wide = page.evaluate(
            "[document.documentElement, ...document.querySelectorAll('dialog[open]')]"
            ".some(node => node.scrollWidth > node.clientWidth)"
        )
        assert not wide, view


def tour(page: Page, title: str) -> Iterator[str]:
    """All there is to look at, one after the other."""
    yield "catalogue"
    dialog = open_book(page, title)
    expect(dialog.locator("#mine")).to_be_visible()
    yield "book"
    dialog.get_by_role("link", name="Back to the list").click()
    page.get_by_role("link", name="Add a book").click()
    page.get_by_text("Type it in by hand").click()
    yield "add"
    page.go_back()
    for view in ("My shelf", "Lending"):
        go(page, view)
        expect(cards(page).first).to_be_visible()
        yield view
    go(page, "Statistics")
    expect(page.locator(".bars").first).to_be_visible()
    yield "statistics"
    go(page, "Import")
    upload(page, "books.csv", f"title,author\n,{LONG}\n")
    expect(page.get_by_role("table")).to_be_visible()
    yield "import"


@SIZES
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_accessibility_problems(server: Server, visit: Visit, scheme: str, size: tuple[int, int]) -> None:
    lydia = staff(server)
    read_a_little(lydia)
    lydia.post("/books/1/stock", json={"quantity": 2})
    lydia.post("/loans", json={"book_id": 1})
    page = visit(server, size, scheme, expected="status of 404")
    faults = axe(page, "visitor")
    shown = {
        "shelf": "This is for",
        "?search=zzz": "No books match",
        "book/2": "Handsome",
        "book/999": "There is no such",
    }
    for address, text in shown.items():
        page.goto(f"{server.url}/#/{address}")
        expect(here(page)).to_contain_text(text)
        faults += axe(page, f"visitor, {address}")
    page.get_by_role("button", name="Recent changes").click()
    faults += axe(page, "ticker")
    page.goto(f"{server.url}/#/")
    page.locator("#sign-in").click()
    faults += axe(page, "sign in")
    page.keyboard.press("Escape")
    sign_in(page, "Lydia")
    for view in tour(page, "Dune"):
        faults += axe(page, view)
    assert faults == []


# --- pictures -----------------------------------------------------------------------------------------------------


def test_screenshots(server: Server, visit: Visit, tmp_path: Path) -> None:
    """The screenshots of the README; `SCREENSHOTS=docs/screenshots` replaces them."""
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    folder.mkdir(exist_ok=True)
    lydia = staff(server)
    lydia.upload((ROOT / "static" / "sample_books.csv").read_bytes())
    reviews = ["Handsome, clever, and rich.", "Long, and worth it.", None, "Read it twice.", None, None]
    shelved = lydia.get("/books", params={"genre": "Novel", "limit": 9}).json()["items"]
    for i, book in enumerate(shelved):
        lydia.post(f"/my-library/{book['id']}", json={"status": "completed" if i < 6 else "reading"})
        if i < 6:
            said = {"rating": 5 - i % 3, "review": reviews[i], "finished_at": f"{2024 - i % 3}-05-01T12:00:00Z"}
            lydia.patch(f"/my-library/{book['id']}", json=said)
        lydia.patch(f"/books/{book['id']}", json={"pages": 200 + 40 * i})
        lydia.post(f"/books/{book['id']}/stock", json={"quantity": 1 + i % 3})
    page = visit(server, PICTURE)
    sign_in(page, "Lydia")
    here(page).get_by_label("Sort by").select_option("-rating")
    expect(cards(page).first).to_contain_text("5.0 (1)")
    page.screenshot(path=folder / "catalogue.png")
    go(page, "My shelf")
    expect(cards(page)).to_have_count(9)
    page.screenshot(path=folder / "shelf.png")
    go(page, "Statistics")
    expect(page.locator(".bars").first).to_be_visible()
    page.screenshot(path=folder / "statistics.png")
    page.goto(f"{server.url}/docs")
    expect(page.locator(".opblock").first).to_be_visible()
    page.screenshot(path=folder / "docs.png")
    for name in ("catalogue", "shelf", "statistics", "docs"):
        assert 5_000 < (folder / f"{name}.png").stat().st_size < 150_000, name


# --- a private catalogue ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "view"),
    [
        pytest.param("/", "", id="catalogue"),
        pytest.param("/b/1", "", id="link to a book"),
        pytest.param("/", "#/shelf", id="shelf"),
    ],
)
def test_a_private_catalogue_shows_a_visitor_only_the_sign_in(
    serve: Callable[..., Server], browser: Browser, path: str, view: str
) -> None:
    server = serve(PUBLIC_CATALOGUE="false")
    sign_up(server.client, "Rita").add_book(**DUNE)
    page = browser.new_page()
    console: list[tuple[str, str]] = []
    answers: list[tuple[int, str]] = []
    page.on("console", lambda message: console.append((message.type, message.text)))
    page.on("response", lambda answer: answers.append((answer.status, answer.url)))
    page.goto(f"{server.url}{path}{view}")
    expect(here(page)).to_contain_text("This library shows its books to its members only.")
    expect(here(page).get_by_role("button", name="Sign in")).to_be_visible()
    for part in ("header nav", ".live", "footer"):
        expect(page.locator(part)).to_be_hidden()
    page.wait_for_load_state("networkidle")
    assert [url for _, url in answers if "/static/" not in url] == [f"{server.url}{path}"]

    sign_in(page, "Rita")
    page.goto(f"{server.url}/#/")
    expect(here(page).get_by_label("Genre").locator("option")).to_have_count(2)
    expect(open_book(page, "Dune").locator(".cover")).to_contain_text("Frank Herbert")
    with page.expect_download() as download:
        page.get_by_role("link", name="The catalogue as CSV").click()
    assert "Dune" in Path(download.value.path()).read_text("utf-8")
    page.reload()
    expect(page.locator("#live")).to_have_text("connected")
    expect(page.locator(".ticker")).to_contain_text("New: Dune")
    page.locator("#sign-out").click()
    expect(here(page)).to_contain_text("This library shows its books to its members only.")
    page.close()
    assert [message for message in console if message[0] in ("error", "warning")] == []
    assert [answer for answer in answers if answer[0] >= 400] == []


def test_a_book_that_is_opened_again_has_its_cover(classics: Server, visit: Visit) -> None:
    page = visit(classics)
    for _ in range(2):
        expect(open_book(page, "The Epic of Gilgamesh").locator(".cover")).to_contain_text("Anonymous")
        page.go_back()


def test_after_a_restart_the_ticker_shows_the_newest_books(serve: Callable[..., Server], visit: Visit) -> None:
    server = serve()
    for number in range(7):
        Person(server.client, "admin", "admin").add_book(title=f"Volume {number}")
    server.restart()
    sign_up(server.client, "Rita")  # the ids of this and later events are far from those before
    page = visit(server)
    expect(page.locator("#latest")).to_contain_text("New: Volume 6 by Somebody")
    expect(page.locator(".ticker li")).to_have_count(5)


@pytest.mark.parametrize("width", [360, 390])
def test_bars_of_links_fit_a_phone(server: Server, visit: Visit, width: int) -> None:
    admin = Person(server.client, "admin", "admin")
    for number in range(12):
        book = admin.add_book(title=f"Volume {number}")
        admin.put(f"/books/{book['id']}/stock", json={"copies": 1})
        admin.post("/loans", json={"book_id": book["id"]})
        admin.post(f"/my-library/{book['id']}", json={"status": "abandoned"})
    page = visit(server, (width, 844))
    sign_in(page, "admin", "admin")
    for view, tab in (("Lending", "On loan 12"), ("My shelf", "Abandoned 12")):
        go(page, view)
        expect(here(page).get_by_role("link", name=tab)).to_be_visible()
        for bar in (page.locator("header nav"), here(page).locator(".tabs")):
            assert bar.evaluate("bar => bar.scrollWidth <= bar.clientWidth && bar.scrollLeft === 0"), view
            tops = bar.locator("a").evaluate_all("links => links.map(link => link.getBoundingClientRect().top)")
            assert len(set(tops)) == 1, view


def test_signing_out_leaves_nothing_of_the_account_in_the_page(server: Server, visit: Visit) -> None:
    rita = sign_up(server.client, "Rita")
    rita.post(f"/my-library/{rita.add_book(**DUNE)['id']}")
    rita.patch("/my-library/1", json={"tags": ["guilty pleasure"]})
    page = visit(server, address="#/book/1")
    sign_in(page, "Rita")
    expect(page.locator("#mine").get_by_label("Tags")).to_have_value("guilty pleasure")
    page.locator("#sign-out").click()
    expect(page.locator("#book-title")).to_have_text("Dune")
    expect(page.locator("#sign-in")).to_be_visible()
    typed = page.evaluate("[...document.querySelectorAll('input, textarea')].map(field => field.value)")
    assert not [text for text in (*typed, page.locator("body").text_content()) if re.search("guilty|Rita", text or "")]


def test_a_typed_number_of_copies_is_not_kept_for_the_next_book(server: Server, visit: Visit) -> None:
    lydia = staff(server)
    for title in ("Dune", "Emma"):
        lydia.add_book(title=title)
    page = visit(server, address="#/book/1")
    sign_in(page, "Lydia")
    copies = page.get_by_label("Copies that the library has")
    copies.fill("7")
    lydia.patch("/books/1", json={"pages": 412})
    expect(page.locator("#book-info")).to_contain_text("412")
    expect(copies).to_have_value("7")  # what is typed outlives changes of others
    page.evaluate("location.hash = '#/book/2'")
    expect(page.locator("#book-title")).to_have_text("Emma")
    expect(copies).to_have_value("0")
