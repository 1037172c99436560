"""The front page in a browser: my account, lending, the desk of staff and the users. Needs playwright and chromium."""

import json
import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from playwright.sync_api import Locator, Page, Route, expect
from sqlmodel import col

import models
from models import Loan
from tests import fixtures
from tests.browser import SIZES, Visit, axe, here, sign_in, staff, tab_to
from tests.fixtures import DUNE, PASSWORD, Person, Server, sign_up, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.sqlite]  # to the browser, both databases are the same

NEW = "a short way home"


def opened(server: Server, visit: Visit, username: str, address: str, **options: Any) -> Page:
    """The page at an address, as one sees it who has signed in."""
    page = visit(server, address=address, **options)
    sign_in(page, username, "admin" if username == "admin" else PASSWORD)
    return page


def rows(page: Page) -> Locator:
    return here(page).locator(".rows > li, tbody > tr")


def panel(page: Page, title: str) -> Locator:
    return here(page).locator(".panel").filter(has=page.get_by_role("heading", name=title, exact=True))


def mailed(server: Server, pattern: str) -> str:
    """What the newest mail says; it is in the log."""
    return str(wait_for(lambda: re.findall(pattern, server.log.read_text()) or None)[-1])


def make_overdue(server: Server, loan_id: int) -> None:
    then = models.utcnow() - timedelta(days=30)
    engine = sa.create_engine(fixtures.url_of(server.file).replace("postgresql:", "postgresql+psycopg:"))
    change = {"borrowed_at": then, "due_at": then + timedelta(days=21)}
    with engine.begin() as connection:
        connection.execute(sa.update(Loan).where(col(Loan.id) == loan_id).values(change))
    engine.dispose()


# --- my account ---------------------------------------------------------------------------------------------------


def test_my_name_and_address_can_be_changed(server: Server, visit: Visit) -> None:
    rita = sign_up(server.client, "Rita")
    page = opened(server, visit, "Rita", "#/account", expected=r"status of (403|409)")
    expect(here(page)).to_contain_text(f"Card number {rita.get('/users/me').json()['id']}")
    expect(here(page)).to_contain_text("not confirmed yet")
    panel(page, "Who I am").get_by_label("Full name").fill("Rita Reader")
    panel(page, "Who I am").get_by_role("button").click()
    expect(page.locator("#who")).to_contain_text("Rita Reader")
    expect(panel(page, "Who I am").get_by_label("Full name")).to_have_value("Rita Reader")

    address = panel(page, "E-mail address")
    address.get_by_role("button", name="Send the mail again").click()
    expect(address).to_contain_text("It is on its way.")
    link = mailed(server, r"/auth/verify-email/[\w-]+\n").strip()
    assert server.client.post(link).status_code == 200
    page.reload()
    expect(address).to_contain_text("rita@example.com ✓ confirmed", ignore_case=True)
    address.get_by_label("New address").fill("rita@example.org")
    address.get_by_label("My password").fill("not it at all")
    address.get_by_role("button", name="Change the address").click()
    expect(address).to_contain_text("This is not your password.")
    address.get_by_label("My password").fill(PASSWORD)
    address.get_by_role("button", name="Change the address").click()
    expect(address).to_contain_text("A mail is on its way to rita@example.org.")
    expect(address).to_contain_text("rita@example.org takes its place")
    assert rita.get("/users/me").json()["pending_email"] == "rita@example.org"
    address.get_by_role("button", name="Keep the old one").click()
    expect(address).to_contain_text("Your address stays as it is.")
    assert rita.get("/users/me").json()["pending_email"] is None


def test_a_new_password_ends_the_other_sessions(server: Server, visit: Visit) -> None:
    sign_up(server.client, "Rita")
    page = opened(server, visit, "Rita", "#/account", expected="status of 403")
    expect(rows(page)).to_have_count(2)
    expect(rows(page).filter(has_text="this one")).to_contain_text("Chrome on Linux")
    form = panel(page, "Password")
    for present, told in (("not it at all", "This is not your password."), (PASSWORD, "Your new password is set.")):
        form.get_by_label("Present password").fill(present)
        form.get_by_label("New password").fill(NEW)
        form.get_by_role("button").click()
        expect(form).to_contain_text(told)
    expect(rows(page)).to_have_count(1)
    expect(form.get_by_label("New password")).to_have_value("")
    assert server.client.post("/login", json={"username": "Rita", "password": NEW}).status_code == 200


def test_sessions_are_ended_one_by_one_or_all(server: Server, visit: Visit) -> None:
    others = [sign_up(server.client, "Rita")] + [Person(server.client, "Rita") for _ in range(3)]
    page = opened(server, visit, "Rita", "#/account")
    expect(rows(page)).to_have_count(5)
    rows(page).filter(has_not_text="this one").first.get_by_role("button").click()
    expect(rows(page)).to_have_count(4)
    page.get_by_role("button", name="Sign out everywhere else").click()
    expect(rows(page)).to_have_count(1)
    expect(rows(page)).to_contain_text("this one")
    assert [other.get("/users/me").status_code for other in others] == [401] * 4
    page.reload()
    expect(rows(page)).to_have_count(1)


def test_all_about_me_is_downloaded_and_my_account_deleted(server: Server, visit: Visit) -> None:
    lydia, rita = staff(server), sign_up(server.client, "Rita")
    lydia.put(f"/books/{lydia.add_book(**DUNE)['id']}/stock", json={"copies": 1})
    loan = rita.post("/loans", json={"book_id": 1}).json()
    page = opened(server, visit, "Rita", "#/account", expected=r"status of (403|409)")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download it").click()
    stored = json.loads(Path(download.value.path()).read_text())
    assert (stored["account"]["username"], stored["loans"][0]["title"]) == ("Rita", "Dune")

    form = panel(page, "Delete my account")
    for password, told in (("not it", "This is not your password."), (PASSWORD, "Return what is on loan first")):
        form.get_by_label("My password").fill(password)
        form.get_by_role("button").click()
        expect(form).to_contain_text(told)
    rita.post(f"/loans/{loan['id']}/return")
    form.get_by_role("button").click()
    expect(page.locator("#notice")).to_contain_text("Your account is deleted.")
    expect(page.locator("#sign-in")).to_be_visible()
    assert server.client.post("/login", json={"username": "Rita", "password": PASSWORD}).status_code == 401


def test_a_forgotten_password_is_set_with_a_mailed_code(server: Server, visit: Visit) -> None:
    sign_up(server.client, "rita")
    page = visit(server, expected="status of 400", address="#/shelf")
    page.locator("#sign-in").click()
    dialog = page.locator("#account")
    dialog.get_by_role("button", name="Forgotten your password?").click()
    expect(dialog.get_by_role("heading")).to_have_text("A new password")
    dialog.get_by_role("textbox", name="E-mail address", exact=True).press_sequentially("rita@example.com")
    page.keyboard.press("Enter")
    expect(dialog.get_by_text("a code of six digits is on its way")).to_be_visible()
    expect(dialog.get_by_label("Code")).to_be_focused()
    code = mailed(server, r"\n {4}(\d{6})\n")
    for otp, told in ((f"{(int(code) + 1) % 10**6:06}", "The code is wrong"), (code, "")):
        dialog.get_by_label("Code").fill(otp)
        dialog.get_by_label("New password").fill(NEW)
        dialog.get_by_role("button", name="Set the new password").click()
        expect(dialog.locator("#forgot .problem")).to_contain_text(told)
    expect(page.locator("#who")).to_contain_text("rita")
    expect(page.get_by_text("Your new password is set.")).to_be_visible()
    page.locator("#sign-out").click()
    page.locator("#sign-in").click()
    expect(dialog.get_by_label("User name or e-mail address")).to_be_focused()


def test_signing_out_cancels_a_stream_that_has_just_been_asked_for(server: Server, visit: Visit) -> None:
    """Its token is revoked before the server reads it: browsers would report the 401."""
    sign_up(server.client, "Rita")
    page = opened(server, visit, "Rita", "#/shelf")
    expect(page.locator("#live")).to_have_text("connected")
    page.wait_for_timeout(1000)  # then it reads its lists once more
    held: list[Route] = []

    def hold(route: Route) -> None:
        held.append(route)

    def log_out(route: Route) -> None:
        answer = route.fetch()
        held[0].continue_()
        page.wait_for_timeout(100)
        route.fulfill(response=answer)

    page.route("**/stream?*", hold, times=1)
    page.route("**/auth/logout", log_out)
    with page.expect_request("**/stream?*"):
        page.evaluate("dispatchEvent(new Event('online'))")  # then the page connects again
    page.locator("#sign-out").click()
    expect(page.locator("#sign-in")).to_be_visible()


def test_the_page_of_a_mailed_link_leads_back(server: Server, visit: Visit) -> None:
    sign_up(server.client, "rita")
    page = visit(server)
    page.goto(server.url + mailed(server, r"/auth/verify-email/[\w-]+\n").strip())
    page.get_by_role("button", name="Confirm my address").click()
    page.get_by_role("link", name="Go on to the library").click()
    expect(here(page).get_by_role("button", name="Sign in")).to_be_visible()
    sign_in(page, "rita")
    expect(here(page)).to_contain_text("✓ confirmed")


# --- lending ------------------------------------------------------------------------------------------------------


def test_lending_opens_on_what_is_overdue(server: Server, visit: Visit) -> None:
    lydia, rita = staff(server), sign_up(server.client, "Rita")
    for title in ("Dune", "Emma", "Ulysses"):
        lydia.put(f"/books/{lydia.add_book(title=title)['id']}/stock", json={"copies": 2})
        rita.post("/loans", json={"book_id": lydia.get("/books?sort=-id").json()["items"][0]["id"]})
    make_overdue(server, 2)
    for _ in range(2):
        rita.post("/loans/3/renew")
    page = opened(server, visit, "Rita", "#/lending")
    tabs = page.get_by_role("navigation", name="Loans")
    expect(tabs.locator("[aria-current=page]")).to_have_text("Overdue 1")
    expect(rows(page)).to_contain_text("Emma")
    expect(rows(page)).to_contain_text("overdue since")
    expect(page.get_by_role("button", name="Renew Emma")).to_have_count(0)
    tabs.get_by_role("link", name="On loan").click()
    expect(rows(page)).to_have_count(2)
    expect(page.get_by_role("button", name="Renew Ulysses")).to_have_count(0)  # it was renewed twice
    page.get_by_role("button", name="Renew Dune").click()
    expect(rows(page).filter(has_text="Dune")).to_contain_text("renewed 1 time")
    page.go_back()
    page.get_by_role("button", name="Return Emma").click()
    expect(page.get_by_text("Nothing is overdue.")).to_be_visible()
    tabs.get_by_role("link", name="Returned").click()
    expect(rows(page)).to_contain_text("Emma")
    expect(page).to_have_url(re.compile("#/lending/returned$"))

    desk = opened(server, visit, "Lydia", "#/lending")
    expect(desk.get_by_role("navigation", name="Loans").locator("[aria-current=page]")).to_have_text("On loan 2")
    expect(rows(desk).first).to_contain_text("lent to Rita")
    desk.get_by_label("Only of the card number").fill("99")
    expect(desk.get_by_text("No loans here.")).to_be_visible()


def test_a_book_that_i_hold_can_be_renewed(server: Server, visit: Visit) -> None:
    lydia, rita = staff(server), sign_up(server.client, "Rita")
    lydia.put(f"/books/{lydia.add_book(**DUNE)['id']}/stock", json={"copies": 2})
    rita.post("/loans", json={"book_id": 1})
    page = opened(server, visit, "Rita", "#/book/1")
    expect(page.get_by_role("button", name="Borrow it")).to_be_hidden()
    for _ in range(2):
        page.get_by_role("button", name="Renew it").click()
        expect(page.get_by_text("You may keep it until")).to_be_visible()
    expect(page.get_by_role("button", name="Renew it")).to_be_hidden()
    expect(page.get_by_role("button", name="Return it")).to_be_visible()


# --- the desk -----------------------------------------------------------------------------------------------------


def test_copies_are_set_but_not_below_those_on_loan(server: Server, visit: Visit) -> None:
    lydia, rita = staff(server), sign_up(server.client, "Rita")
    lydia.add_book(**DUNE)
    answer = lydia.post("/books/1/stock", json={"quantity": -1})
    assert answer.json()["detail"] == "0 of 0 are on loan: 0 can be removed."
    page = opened(server, visit, "Lydia", "#/book/1")
    copies = page.get_by_label("Copies that the library has")
    for number, told in (
        ("3", "3 copies"),
        ("1", "1 copy"),
        ("0", "There is no copy to lend."),
        ("2", "2 of 2 copies"),
    ):
        copies.fill(number)
        copies.press("Enter")
        expect(page.locator("#stock-now")).to_contain_text(told)
        expect(page.locator("#stock[aria-busy=true]")).to_have_count(0)
    rita.post("/loans", json={"book_id": 1})
    expect(page.locator("#stock-now")).to_have_text("1 of 2 copies available.")
    copies.fill("0")
    copies.press("Enter")
    assert page.evaluate("document.querySelector('[name=copies]').validity.rangeUnderflow")


@pytest.mark.parametrize("role", ["librarian", "admin"])
def test_the_desk_lends_and_takes_back(server: Server, visit: Visit, role: str) -> None:
    lydia, rita = staff(server), sign_up(server.client, "Rita")
    for title, isbn in (("Dune", "9780441172719"), ("Emma", None)):
        lydia.put(f"/books/{lydia.add_book(title=title, isbn=isbn)['id']}/stock", json={"copies": 1})
    card = str(rita.get("/users/me").json()["id"])
    page = opened(
        server, visit, "Lydia" if role == "librarian" else "admin", "#/book/2", expected=r"status of (403|409)"
    )
    page.get_by_role("link", name="Lend it to somebody").click()
    form, reader = panel(page, "Lend to a reader"), page.get_by_label("Reader:")
    expect(page.get_by_label("Book:")).to_have_value(re.compile("^Emma, .* #2$"))
    expect(reader).to_be_focused()
    reader.fill("Rita" if role == "admin" else card)
    reader.press("Enter")
    expect(form).to_contain_text("Emma is lent to Rita until")
    expect(page.get_by_label("Book:")).to_be_focused()
    page.get_by_label("Book:").press_sequentially("9780441172719")  # as a scanner does
    page.keyboard.press("Enter")
    expect(form).to_contain_text("Dune is lent to Rita until")
    for book, told in (("Dune", "Too few are available"), ("Nowhere", "“Nowhere” is not found.")):
        page.get_by_label("Book:").fill(book)
        reader.press("Enter")
        expect(form).to_contain_text(told)
    form.get_by_role("link", name="their loans").click()
    expect(rows(page)).to_have_count(2)
    page.get_by_role("button", name="Return Emma").click()
    expect(rows(page)).to_have_count(1)
    assert [loan["title"] for loan in rita.get("/loans?status=active").json()["items"]] == ["Dune"]


def test_a_book_is_edited_and_what_others_changed_meanwhile_is_kept(server: Server, visit: Visit) -> None:
    lydia = staff(server)
    lydia.add_book(**DUNE)
    page = opened(server, visit, "Lydia", "#/book/1", expected="status of 412")
    page.get_by_role("link", name="Edit it").click()
    form = here(page)
    expect(form.get_by_label("Title")).to_have_value("Dune")
    form.get_by_label("Pages").fill("535")
    lydia.patch("/books/1", json={"genre": "Sand"})
    form.get_by_role("button", name="Save").click()
    expect(form).to_contain_text("Somebody has changed it meanwhile. Genre is now “Sand”.")
    expect(form.get_by_label("Genre")).to_have_value("Sand")
    expect(form.get_by_label("Pages")).to_have_value("535")
    form.get_by_role("button", name="Save").click()
    expect(page.get_by_role("heading", name="Dune")).to_be_visible()
    book = lydia.get("/books/1").json()
    assert (book["pages"], book["genre"]) == (535, "Sand")

    page.get_by_role("link", name="Edit it").click()
    expect(form.get_by_label("Genre")).to_have_value("Sand")
    form.get_by_label("Genre").fill("Spice")
    form.get_by_label("Pages").fill("")
    lydia.patch("/books/1", json={"genre": "Worms", "publisher": "Ace"})
    form.get_by_role("button", name="Save").click()
    expect(form).to_contain_text("Genre is now “Worms”")
    expect(form.get_by_label("Publisher")).to_have_value("Ace")
    form.get_by_role("button", name="Save").click()
    expect(page.get_by_role("heading", name="Dune")).to_be_visible()
    book = lydia.get("/books/1").json()
    assert (book["pages"], book["genre"], book["publisher"]) == (None, "Spice", "Ace")
    page.go_back()
    expect(form).not_to_contain_text("Edit a book")  # what was left is not in the history


def test_a_book_is_deleted_once_that_is_sure(server: Server, visit: Visit) -> None:
    lydia, rita = staff(server), sign_up(server.client, "Rita")
    lydia.add_book(**DUNE)
    rita.add_book(title="Emma")
    page = opened(server, visit, "Lydia", "#/edit/1", expected="status of 412")
    page.get_by_role("button", name="Delete this book").click()
    expect(page.get_by_role("button", name="Cancel")).to_be_focused()
    page.keyboard.press("Enter")
    assert lydia.get("/books/1").status_code == 200
    lydia.patch("/books/1", json={"genre": "Sand"})
    for told in ("Somebody has changed it meanwhile", ""):
        page.get_by_role("button", name="Delete this book").click()
        page.get_by_role("button", name="Delete it").click()
        expect(page.locator("#edit-form .problem")).to_contain_text(told)
    expect(page.get_by_role("heading", name="Catalogue")).to_be_visible()
    assert lydia.get("/books/1").status_code == 404

    page = opened(server, visit, "Rita", "#/book/2")
    expect(page.get_by_role("link", name="Edit it")).to_be_visible()  # she added it
    lydia.add_book(title="Ulysses")
    page.evaluate("location.hash = '#/book/3'")
    expect(page.locator("#book-title")).to_have_text("Ulysses")
    expect(page.get_by_role("link", name="Edit it")).to_be_hidden()


def test_staff_take_away_a_review(server: Server, visit: Visit) -> None:
    lydia, rita = staff(server), sign_up(server.client, "Rita")
    lydia.add_book(**DUNE)
    rita.post("/my-library/1", json={"status": "completed"})
    rita.patch("/my-library/1", json={"rating": 1, "review": "Rude."})
    page = visit(server, address="#/book/1")
    expect(page.get_by_text("Rude.")).to_be_visible()
    expect(page.get_by_role("button", name="Remove the review of Rita")).to_be_hidden()
    sign_in(page, "Lydia")
    page.get_by_role("button", name="Remove the review of Rita").click()
    page.get_by_role("button", name="Remove").last.click()
    expect(page.get_by_text("Nobody has reviewed it yet.")).to_be_visible()
    expect(page.locator("#book-head")).to_contain_text("Not rated yet")
    assert rita.get("/my-library/1").json()["status"] == "completed"


# --- users --------------------------------------------------------------------------------------------------------


def test_an_admin_keeps_the_users(server: Server, visit: Visit) -> None:
    for name in ("Rita", "Rolf", "Sam"):
        sign_up(server.client, name)
    page = opened(server, visit, "admin", "#/users", expected=r"status of (409|422)")
    expect(rows(page)).to_have_count(4)
    here(page).get_by_label("Role").select_option("reader")
    expect(rows(page)).to_have_count(3)
    here(page).get_by_label("Search users for").fill("r")
    expect(rows(page)).to_have_count(2)
    rows(page).filter(has_text="Rolf").locator("td").nth(2).click(force=True)  # anywhere on it
    drawer = page.locator("#user")
    expect(drawer.get_by_role("heading")).to_have_text("Rolf")
    drawer.get_by_label("Role").select_option("librarian")
    drawer.get_by_label("Full name").fill("Rolf Lindqvist")
    drawer.get_by_role("button", name="Save").click()
    expect(drawer).to_be_hidden()
    expect(page).to_have_url(re.compile("search=r"))
    expect(here(page).get_by_label("Search users for")).to_have_value("r")
    here(page).get_by_label("Role").select_option("librarian")
    expect(rows(page)).to_have_text(re.compile("Rolf Lindqvist"))

    rows(page).get_by_role("link", name="Rolf").press("Enter")
    drawer.get_by_label("Active").uncheck()
    drawer.get_by_role("button", name="Save").click()
    expect(rows(page)).to_contain_text("Deactivated")
    expect(rows(page).get_by_role("link", name="Rolf")).to_be_focused()
    page.keyboard.press("Enter")
    expect(drawer).to_be_visible()
    page.keyboard.press("Escape")
    expect(drawer).to_be_hidden()
    expect(page).not_to_have_url(re.compile("users/3"))
    page.go_forward()
    drawer.get_by_role("button", name="Delete the account").click()
    page.get_by_role("button", name="Delete it").click()
    expect(page.get_by_text("No users match.")).to_be_visible()

    page.get_by_role("link", name="New user").click()
    for name, value in {"User name": "Rita", "E-mail address": "new@example.com", "Password": PASSWORD}.items():
        drawer.get_by_label(name).fill(value)
    drawer.get_by_label("Role").select_option("admin")
    drawer.get_by_role("button", name="Create").click()
    expect(drawer).to_contain_text("is taken")
    drawer.get_by_label("User name").fill("Nora")
    drawer.get_by_role("button", name="Create").click()
    expect(drawer).to_be_hidden()
    assert Person(server.client, "Nora").get("/users").json()["total"] == 4


def test_the_last_admin_stays(server: Server, visit: Visit) -> None:
    page = opened(server, visit, "admin", "#/users/1", expected="status of 409")
    drawer = page.locator("#user")
    drawer.get_by_label("Role").select_option("reader")
    drawer.get_by_role("button", name="Save").click()
    expect(drawer).to_contain_text("This is the last active admin")
    drawer.get_by_role("button", name="Close").click()
    expect(page).to_have_url(re.compile("#/users$"))
    expect(page.get_by_role("link", name="admin", exact=True)).to_be_focused()


def test_an_admin_downloads_a_backup(server: Server, visit: Visit, request: pytest.FixtureRequest) -> None:
    on_sqlite = request.config.getoption("--database") != "postgresql"
    page = opened(server, visit, "admin", "#/desk", expected=None if on_sqlite else "status of 409")
    if on_sqlite:
        with page.expect_download() as download:
            page.get_by_role("button", name="Download a backup").click()
        assert Path(download.value.path()).read_bytes().startswith(b"SQLite format 3")
    else:
        page.get_by_role("button", name="Download a backup").click()
        expect(panel(page, "Backup")).to_contain_text("pg_dump")


# --- for everybody ------------------------------------------------------------------------------------------------


def walk(page: Page, server: Server) -> Callable[[], Any]:
    """Every view of this file, as an admin."""
    for title in ("Dune", "A title that is a good deal longer than what fits on the screen of any phone"):
        book = Person(server.client, "admin", "admin").add_book(title=title)
        Person(server.client, "admin", "admin").put(f"/books/{book['id']}/stock", json={"copies": 1})
    rita = sign_up(server.client, "Rita")
    rita.post("/loans", json={"book_id": 2})
    rita.post("/my-library/1", json={"status": "completed"})
    rita.patch("/my-library/1", json={"rating": 1, "review": "Rude."})
    sign_in(page, "admin", "admin")

    def views() -> Any:
        for address in ("account", "lending", "desk", "users", "book/1", "edit/2"):
            page.evaluate(f"location.hash = '#/{address}'")
            expect(here(page).locator("h2")).to_be_visible()
            expect(page.locator("[aria-busy=true]")).to_have_count(0)
            yield address
        page.get_by_role("button", name="Delete this book").click()
        yield "sure"
        page.keyboard.press("Escape")
        for address in ("users/2", "users/new"):
            page.evaluate(f"location.hash = '#/{address}'")
            expect(page.locator("#user form")).to_be_visible()
            yield address
        page.get_by_role("button", name="Close").click()
        page.locator("#sign-out").click()
        page.locator("#sign-in").click()
        page.get_by_role("button", name="Forgotten your password?").click()
        yield "forgotten"
        page.get_by_role("textbox", name="E-mail address", exact=True).fill("rita@example.com")
        page.get_by_role("button", name="Mail me a code").click()
        expect(page.get_by_label("Code")).to_be_visible()
        yield "code"

    return views


@SIZES
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_and_nothing_is_wider_than_the_screen(
    server: Server, visit: Visit, scheme: str, size: tuple[int, int]
) -> None:
    page = visit(server, size, scheme)
    faults: list[str] = []
    for view in walk(page, server)():
        faults += axe(page, view)
        if page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth"):
            faults.append(f"{view} is wider than the screen")
    assert faults == []


def test_the_keyboard_is_enough_for_the_desk(server: Server, visit: Visit) -> None:
    sign_up(server.client, "Rita")
    page = opened(server, visit, "admin", "")
    tab_to(page, page.get_by_role("link", name="Users"))
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Users")).to_be_focused()
    tab_to(page, page.get_by_role("link", name="Rita"))
    page.keyboard.press("Enter")
    tab_to(page, page.locator("#user").get_by_label("Active"))
    page.keyboard.press("Space")
    tab_to(page, page.locator("#user").get_by_role("button", name="Save"))
    page.keyboard.press("Enter")
    expect(page.get_by_role("link", name="Rita")).to_be_focused()
    expect(rows(page).last).to_contain_text("Deactivated")


def test_at_200_percent_the_desk_is_there(server: Server, visit: Visit) -> None:
    page = visit(server, (640, 450))  # a desktop of 1280 x 900 at 200 %
    for view in walk(page, server)():
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), view
