"""The front page in a browser: my shelf, its statistics, and files that come in. Needs playwright and chromium."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import FilePayload, Locator, Page, expect

from tests.browser import (
    DESKTOP,
    EVIL,
    SIZES,
    Visit,
    axe,
    book_view,
    cards,
    go,
    here,
    read_a_little,
    sign_in,
    tab_to,
    upload,
)
from tests.fixtures import DATA, Person, Server, sign_up

pytestmark = [pytest.mark.slow, pytest.mark.sqlite]  # to the browser, both databases are the same

GOODREADS = "Title,Author,My Rating,Exclusive Shelf,Bookshelves,Number of Pages,Date Read,Date Added\n"
SHELVES = ("read", "to-read", "currently-reading", "did-not-finish")


def reader(server: Server, visit: Visit, address: str = "", size: tuple[int, int] = DESKTOP, **options: Any) -> Page:
    """The page as Rita sees it, who has signed in."""
    page = visit(server, size, address=address, **options)
    sign_in(page, "Rita")
    return page


def shelve(rita: Person, title: str, book: dict[str, Any] | None = None, **entry: Any) -> int:
    book_id = int(rita.add_book(title=title, **(book or {}))["id"])
    assert rita.post(f"/my-library/{book_id}").status_code == 201
    answer = rita.patch(f"/my-library/{book_id}", json=entry)
    assert answer.status_code == 200, answer.text
    return book_id


def rows(count: int) -> str:
    """So many books on all four shelves, as Goodreads has them."""
    tags = ("owned", '"lent, owned"')
    lines = (
        f"Volume {i:04},Author {i % 90},{i % 6},{SHELVES[i % 4]},{tags[i % 3 == 0]},"
        f"{100 + i},{2010 + i % 15}/05/{1 + i % 28:02},2020/01/{1 + i % 28:02}\n"
        for i in range(count)
    )
    return GOODREADS + "".join(lines)


def titles(page: Page) -> list[str]:
    return here(page).locator(".rows h3").all_inner_texts()


# --- my shelf -----------------------------------------------------------------------------------------------------


def test_the_shelf_has_an_address_for_each_of_its_parts(server: Server, visit: Visit) -> None:
    rita = sign_up(server.client, "Rita")
    rita.upload(rows(200), path="/my-library/import")
    page = reader(server, visit, "#/shelf")
    tabs = page.get_by_role("navigation", name="Parts of my shelf")
    expect(tabs).to_have_text("All 200Wishlist 50Reading 50Completed 50Abandoned 50")
    expect(tabs.get_by_role("link", name="All")).to_have_attribute("aria-current", "page")
    expect(cards(page)).to_have_count(24)
    tabs.get_by_role("link", name="Completed").click()
    expect(tabs.get_by_role("link", name="Completed")).to_have_attribute("aria-current", "page")
    expect(here(page).locator(".count")).to_have_text("50")
    here(page).get_by_label("Sort by").select_option("title")
    expect(cards(page).first).to_contain_text("Volume 0000")
    here(page).get_by_role("link", name="Next").click()
    expect(cards(page).first).to_contain_text("Volume 0096")
    assert page.url.endswith("#/shelf/completed?sort=title&page=2")
    page.reload()
    expect(cards(page).first).to_contain_text("Volume 0096")
    expect(here(page).get_by_label("Sort by")).to_have_value("title")
    tabs.get_by_role("link", name="Wishlist").click()  # keeps the order, not the page
    expect(cards(page).first).to_contain_text("Volume 0001")
    page.go_back()
    expect(cards(page).first).to_contain_text("Volume 0096")


def test_the_shelf_is_searched_filtered_by_tag_and_sorted(server: Server, visit: Visit) -> None:
    rita = sign_up(server.client, "Rita")
    shelve(rita, "Emma", {"author": "Jane Austen"}, status="completed", finished_at="2023-05-01T12:00:00Z")
    shelve(rita, "Dune", tags=["desert", "<b>"], status="completed", finished_at="2024-05-01T12:00:00Z", rating=4)
    shelve(rita, "Persuasion", {"author": "Jane Austen"}, status="completed", finished_at=None, rating=5)
    page = reader(server, visit, "#/shelf")
    expect(cards(page)).to_have_count(3)
    for order, first in (("-finished", "Dune"), ("author", "Emma"), ("-rating", "Persuasion")):
        here(page).get_by_label("Sort by").select_option(order)
        expect(cards(page).first).to_contain_text(first)
    here(page).get_by_label("Search my shelf for").fill("austen")
    expect(cards(page)).to_have_count(2)
    assert page.url.endswith("#/shelf?search=austen&sort=-rating")
    page.get_by_role("link", name="Wishlist 0").click()
    assert page.url.endswith("#/shelf/wishlist?search=austen&sort=-rating")
    page.go_back()
    expect(cards(page)).to_have_count(2)
    here(page).get_by_label("Search my shelf for").fill("nobody")
    expect(page.get_by_text("No books on your shelf match.")).to_be_visible()
    page.get_by_role("link", name="Show all of it").click()
    cards(page).get_by_role("link", name="desert").click()
    expect(cards(page)).to_have_count(1)
    expect(here(page).get_by_label("Tag")).to_have_value("desert")
    here(page).get_by_label("Tag").select_option("<b>")
    expect(cards(page)).to_contain_text("Dune")
    here(page).get_by_label("Tag").select_option("")
    expect(cards(page)).to_have_count(3)


def test_a_row_says_what_i_did_with_the_book(server: Server, visit: Visit) -> None:
    rita = sign_up(server.client, "Rita")
    shelve(rita, "Emma", status="completed", finished_at="2023-05-01T00:00:00Z", rating=4, review="Handsome.")
    shelve(rita, "Dune", status="completed", finished_at=None)
    shelve(rita, "Ulysses", status="reading", started_at="2024-01-31T23:30:00Z")
    shelve(rita, "Kim", status="abandoned", finished_at="2022-02-02T12:00:00Z")
    shelve(rita, "Persuasion", rating=5)
    page = reader(server, visit, "#/shelf", timezone_id="America/New_York")
    row = {title: cards(page).filter(has_text=title) for title in ("Emma", "Dune", "Ulysses", "Kim", "Persuasion")}
    expect(row["Emma"]).to_contain_text("finished May 1, 2023")  # a day is the same everywhere
    expect(row["Emma"]).to_contain_text("4 of 5 stars")
    expect(row["Emma"]).to_contain_text("Handsome.")
    expect(row["Emma"].locator(".cover")).to_be_visible()
    expect(row["Dune"]).to_contain_text("finished, day not known")
    expect(row["Ulysses"]).to_contain_text("started Jan 31, 2024")
    expect(row["Kim"]).to_contain_text("put aside Feb 2, 2022")
    expect(row["Persuasion"]).to_contain_text("rated before reading it")
    row["Kim"].locator(".cover").click()
    book_view(page, "Kim")


@SIZES
def test_members_land_on_what_they_are_reading(server: Server, visit: Visit, size: tuple[int, int]) -> None:
    rita = sign_up(server.client, "Rita")
    book_id = shelve(rita, "Dune", {"pages": 400}, status="reading")
    shelve(rita, "Kim", {}, status="reading")
    page = visit(server, size)
    strip = page.get_by_role("region", name="Reading now")
    expect(strip).to_be_hidden()
    sign_in(page, "Rita")
    expect(strip.get_by_role("link", name="Dune")).to_be_visible()
    strip.get_by_label("Page reached in Dune").fill("100")
    strip.get_by_label("Page reached in Dune").press("Enter")
    expect(strip.get_by_role("progressbar", name="How much of Dune is read")).to_have_js_property("value", 100)
    expect(strip.get_by_label("Page reached in Dune")).to_be_focused()
    assert rita.get(f"/my-library/{book_id}").json()["page"] == 100
    expect(strip.get_by_role("progressbar")).to_have_count(1)  # the other's pages are not known
    page.get_by_label("Search for").fill("kim")
    expect(cards(page)).to_have_count(1)
    expect(strip).to_be_visible()  # typing does not move the field away
    page.reload()
    expect(cards(page)).to_have_count(1)
    expect(strip).to_be_hidden()
    page.goto(f"{server.url}/#/")
    strip.get_by_role("button", name="I finished Dune").click()
    expect(strip.get_by_role("link", name="Dune")).to_have_count(0)
    assert rita.get(f"/my-library/{book_id}").json()["finished_at"] is not None
    strip.get_by_role("button", name="I finished Kim").click()
    expect(strip).to_contain_text("Nothing at the moment.")
    page.locator("#sign-out").click()
    expect(strip).to_be_hidden()


def test_a_page_that_is_none_is_refused_beside_its_field(server: Server, visit: Visit) -> None:
    rita = sign_up(server.client, "Rita")
    book_id = shelve(rita, "Dune", {"pages": 400}, status="reading", page=7)
    page = reader(server, visit, "#/shelf/reading")
    field = cards(page).get_by_label("Page reached in Dune")
    field.fill("100001")
    field.press("Enter")
    assert field.evaluate("node => !node.validity.valid")
    field.fill("500")  # another edition has more pages
    field.press("Tab")
    expect(cards(page).get_by_role("progressbar")).to_have_js_property("value", 400)
    field.fill("")
    field.press("Tab")
    expect(cards(page).get_by_role("progressbar")).to_have_js_property("value", 0)
    assert rita.get(f"/my-library/{book_id}").json()["page"] is None


def open_mine(page: Page, title: str) -> Locator:
    cards(page).filter(has_text=title).get_by_role("link", name="Rate and review").click()
    book_view(page, title)
    expect(page.locator("#mine")).to_be_visible()
    return page.locator("#mine")


def save(mine: Locator) -> None:
    mine.get_by_role("button", name="Save").click()
    expect(mine.page.locator("#view-book")).to_contain_text("Saved.")


def test_days_and_tags_can_be_changed_and_forgotten(server: Server, visit: Visit) -> None:
    rita = sign_up(server.client, "Rita")
    book_id = shelve(rita, "Dune", status="completed", finished_at="2024-05-01T18:30:00Z", tags=["desert"])

    def entry() -> dict[str, Any]:
        return dict(rita.get(f"/my-library/{book_id}").json())

    page = reader(server, visit, "#/shelf", timezone_id="Asia/Tokyo")
    mine = open_mine(page, "Dune")
    expect(mine.get_by_label("Finished")).to_have_value("2024-05-01")
    expect(mine.get_by_label("Page reached")).to_be_hidden()
    mine.get_by_label("Tags").fill("sand , big worms,,sand")
    mine.get_by_label("Started").fill("2024-04-01")
    save(mine)
    assert entry()["finished_at"].startswith("2024-05-01T18:30"), "what was not touched keeps its time"
    assert (entry()["started_at"][:10], entry()["tags"]) == ("2024-04-01", ["sand", "big worms"])
    mine.get_by_label("I don\N{RIGHT SINGLE QUOTATION MARK}t remember when").check()
    expect(mine.get_by_label("Finished")).to_be_disabled()
    save(mine)
    assert entry()["finished_at"] is None
    expect(mine.get_by_label("I don\N{RIGHT SINGLE QUOTATION MARK}t remember when")).to_be_checked()
    mine.get_by_label("I don\N{RIGHT SINGLE QUOTATION MARK}t remember when").uncheck()
    mine.get_by_label("Finished").fill("2023-12-31")
    save(mine)
    assert entry()["finished_at"][:10] == "2023-12-31"
    mine.get_by_label("Status").select_option("reading")
    expect(mine.get_by_label("Finished")).to_be_hidden()
    mine.get_by_label("Page reached").fill("12")
    save(mine)
    assert (entry()["status"], entry()["page"]) == ("reading", 12)
    page.get_by_role("link", name="Back to the list").click()
    expect(cards(page)).to_contain_text("big worms")


def test_stars_on_the_wishlist_explain_themselves(server: Server, visit: Visit) -> None:
    shelve(sign_up(server.client, "Rita"), "Dune")
    page = reader(server, visit, "#/shelf/wishlist")
    mine = open_mine(page, "Dune")
    told = mine.get_by_text("You may rate it before you have read it")
    expect(told).to_be_visible()
    mine.get_by_label("Status").select_option("completed")
    expect(told).to_be_hidden()


def test_the_shelf_is_exported_with_one_click(server: Server, visit: Visit) -> None:
    shelve(sign_up(server.client, "Rita"), "Dune", rating=4)
    page = reader(server, visit, "#/shelf")
    with page.expect_download() as download:
        page.get_by_role("button", name="Export as CSV").click()
    assert download.value.suggested_filename == "my-library.csv"
    assert "Dune" in Path(download.value.path()).read_text("utf-8")


def test_a_move_changes_the_counts_or_says_why_not(server: Server, visit: Visit) -> None:
    rita = sign_up(server.client, "Rita")
    for title in ("Dune", "Emma", "Kim"):
        shelve(rita, title, status="reading")
    page = reader(server, visit, "#/shelf/reading", expected="status of 409")
    cards(page).get_by_label("Status of Emma").select_option("completed")
    expect(cards(page)).to_have_count(2)
    expect(page.get_by_role("link", name="Completed 1")).to_be_visible()
    page.route("**/my-library/3", lambda route: route.fulfill(status=409, json={"detail": "Not now."}))
    cards(page).get_by_label("Status of Kim").select_option("completed")
    expect(cards(page).filter(has_text="Kim")).to_contain_text("Not now.")
    expect(cards(page).get_by_label("Status of Kim")).to_have_value("reading")


# --- statistics ---------------------------------------------------------------------------------------------------


def test_statistics_are_drawn(server: Server, visit: Visit) -> None:
    rita = sign_up(server.client, "Rita")
    read_a_little(rita)
    page = reader(server, visit, "#/stats")
    expect(page.locator(".big").last).to_have_text("★ 4.00")
    for name, told in (
        ("On my shelf", "Wishlist 1 books Reading 0 books Completed 2 books Abandoned 0 books"),
        ("Books finished by year", "2024 1 books 2023 1 books"),
        ("Pages finished by year", "2024 412 pages 2023 474 pages"),
        ("Top genres", "Novel 1 books Science fiction 1 books"),
        ("Top tags", "sea 1 books"),
        ("Top authors", "Frank Herbert 1 books Jane Austen 1 books"),
    ):
        lines = page.get_by_role("list", name=name).get_by_role("listitem").all_text_contents()
        assert " ".join(lines) == told
    rita.patch("/my-library/3", json={"status": "reading"})
    expect(page.get_by_role("list", name="On my shelf")).to_contain_text("Reading 1 books")
    rita.patch("/my-library/3", json={"status": "completed", "finished_at": None})
    expect(page.get_by_role("list", name="Books finished by year")).to_contain_text("day not known 1 books")
    page.get_by_role("link", name="sea").click()
    expect(cards(page)).to_have_count(1)
    expect(cards(page)).to_contain_text("Emma")


@SIZES
def test_figures_and_names_are_whole(server: Server, visit: Visit, size: tuple[int, int]) -> None:
    rita = sign_up(server.client, "Rita")
    author = "Hans Jakob Christoffel von Grimmelshausen-Wolkenstein"
    for i in range(12):
        book = {"author": author, "genre": "Historical science fiction", "pages": 99_999}
        shelve(rita, f"Volume {i}", book, status="completed", finished_at=f"{2010 + i % 2}-05-01T12:00:00Z")
    page = reader(server, visit, "#/stats", size)
    expect(page.get_by_role("list", name="Pages finished by year")).to_contain_text("599,994")
    for text in (author, "Historical science fiction", "599,994"):
        part = page.locator("#charts .bars").get_by_text(text).first
        assert part.evaluate(
            """node => { // nothing over it, nothing outside
                const box = node.getBoundingClientRect(), panel = node.closest('.panel').getBoundingClientRect();
                node.scrollIntoView({block: 'center'});
                const now = node.getClientRects()[0];
                return box.left >= panel.left && box.right <= panel.right && node.scrollWidth <= node.clientWidth + 1
                    && node.contains(document.elementFromPoint(now.left + 2, now.top + now.height / 2));
            }"""
        ), text


# --- files --------------------------------------------------------------------------------------------------------


def choose(page: Page, name: str, content: str | bytes) -> None:
    data = content.encode() if isinstance(content, str) else content
    file: FilePayload = {"name": name, "mimeType": "text/csv", "buffer": data}
    page.get_by_label("CSV file").set_input_files(file)
    expect(page.locator("#recognised")).to_contain_text(name)


LIBRARYTHING = "Book Id\tTitle\tPrimary Author\tRating\tCollections\n1\tEmma\tAusten, Jane\t4\tYour library\n"


@pytest.mark.parametrize(
    ("content", "told", "shelves"),
    [
        pytest.param((DATA / "goodreads.csv").read_bytes(), "an export of Goodreads", True, id="Goodreads"),
        pytest.param((DATA / "storygraph.csv").read_bytes(), "an export of the StoryGraph", True, id="StoryGraph"),
        pytest.param(LIBRARYTHING.encode("utf-16"), "an export of LibraryThing", True, id="LibraryThing, UTF-16"),
        pytest.param(LIBRARYTHING.encode("utf-16-be"), "an export of LibraryThing", True, id="without its mark"),
        pytest.param(b"author_text,title,shelf,rating\n", "an export of BookWyrm", True, id="BookWyrm"),
        pytest.param(b'\xef\xbb\xbf"Title";"Author"\r\n', "a list of books", False, id="a list"),
        pytest.param(b"\xff\x00\x01\x02", "no columns", False, id="no text"),
        pytest.param(b"", "no columns", False, id="empty"),
    ],
)
def test_a_file_is_recognised_before_it_is_sent(
    server: Server, visit: Visit, content: bytes, told: str, shelves: bool
) -> None:
    sign_up(server.client, "Rita")
    page = reader(server, visit, "#/import")
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.method))
    expect(page.locator("#choices")).to_be_hidden()
    choose(page, "mine.csv", content)
    expect(page.locator("#recognised")).to_contain_text(told)
    expect(page.locator("#recognised")).to_be_focused()
    expect(page.get_by_label("Put them on my shelf")).to_be_checked(checked=shelves)
    expect(page.get_by_label("Put them on my shelf")).to_be_visible(visible=shelves)
    expect(page.locator("#public")).to_be_visible(visible=shelves)
    goal = "Upload to my shelf" if shelves else "Upload to the catalogue"
    expect(page.get_by_role("button", name=goal)).to_be_visible()
    page.get_by_label("Dry run").check()
    expect(page.get_by_role("button", name="Upload to try it")).to_be_visible()
    assert "POST" not in sent


def test_a_shelf_is_imported_and_told_in_words(server: Server, visit: Visit) -> None:
    sign_up(server.client, "Rita")
    page, other = reader(server, visit), visit(server)
    go(page, "Import")
    odd = "Emma,Jane Austen,3.5,to-read,,0,,\nKim,Rudyard Kipling,0,read,,0,2024/05/01,\n,Nobody,,,,,,\n"
    choose(page, "export.csv", rows(40) + odd)
    expect(page.locator("#upload")).to_contain_text("ratings and reviews become public")
    page.get_by_role("button", name="Upload").click()
    told = page.locator("#job-told")
    expect(told).to_have_text("42 books are on your shelf, 1 row was refused, 2 went in without a page count.")
    expect(page.locator("#job-hint")).to_contain_text("Ratings and reviews become public")
    expect(page.get_by_role("table", name="Warnings")).to_contain_text("0 is not a number of pages; left out")
    expect(page.get_by_role("table", name="Refused rows").get_by_role("row")).to_have_count(2)
    expect(other.locator(".ticker")).to_contain_text("Ratings and reviews that came in from a file")
    assert page.url.endswith("#/import/1")
    page.reload()  # after which all of it is there again
    expect(told).to_have_text("42 books are on your shelf, 1 row was refused, 2 went in without a page count.")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download the refused rows as CSV").click()
    assert "Nobody" in Path(download.value.path()).read_text("utf-8")
    page.get_by_role("link", name="To my shelf").click()
    expect(page.get_by_role("link", name="All 42")).to_be_visible()
    here(page).get_by_label("Search my shelf for").fill("emma")
    expect(cards(page)).to_have_count(1)
    expect(cards(page)).to_contain_text("★★★½☆")
    mine = open_mine(page, "Emma")
    expect(mine.get_by_role("radio", name="3.5 stars")).to_be_checked()
    mine.get_by_label("My review").fill("So far.")
    mine.get_by_role("radio", name="4 stars").check(force=True)
    save(mine)
    expect(page.locator("#book-reviews")).to_contain_text("So far.")
    expect(mine.get_by_role("radio", name="3.5 stars")).to_have_count(0)
    expect(mine.get_by_role("radio", name="4 stars")).to_be_checked()


def test_a_try_says_what_would_be(server: Server, visit: Visit) -> None:
    rita = sign_up(server.client, "Rita")
    page = reader(server, visit, "#/import")
    choose(page, "export.csv", GOODREADS + "Emma,Jane Austen,3,read,,0,,\n")
    page.get_by_label("Dry run").check()
    page.get_by_role("button", name="Upload to try it").click()
    told = "1 book would be on your shelf, 1 would go in without a page count."
    expect(page.locator("#job-told")).to_have_text(told)
    expect(page.get_by_role("link", name="To my shelf")).to_be_hidden()
    assert rita.get("/my-library").json()["total"] == 0
    page.get_by_role("link", name="Import another file").click()
    expect(page.locator("#job")).to_be_hidden()
    expect(page.locator("#choices")).to_be_hidden()
    page.get_by_role("link", name="export.csv").click()
    expect(page.locator("#job-told")).to_have_text(told)


def test_a_list_goes_into_the_catalogue_alone(server: Server, visit: Visit) -> None:
    rita = sign_up(server.client, "Rita")
    page = reader(server, visit, "#/import")
    upload(page, "list.csv", "title,author\nEmma,Jane Austen\nEmma,Jane Austen\n")
    expect(page.locator("#job-told")).to_have_text("1 book is in the catalogue, 1 was there already.")
    assert rita.get("/my-library").json()["total"] == 0
    page.get_by_role("link", name="To the catalogue").click()
    expect(cards(page)).to_have_count(1)


def test_refused_rows_are_shown_with_their_reasons(server: Server, visit: Visit) -> None:
    sign_up(server.client, "Rita")
    page = reader(server, visit)
    go(page, "Import")
    page.get_by_role("button", name="Upload").click()
    expect(page.get_by_label("CSV file")).to_be_focused()  # the browser asks for it
    expect(page.locator("#job")).to_be_hidden()
    evil = EVIL[0].replace("/", "")
    upload(page, f"{evil}.csv", f'title,author,price\nEmma,Jane Austen,5\n,Nobody,5\n"{evil}",Someone,"{evil}"\n')
    expect(page.locator("#job-state")).to_have_text("Done.")
    expect(page.locator("#job-name")).to_have_text(f"{evil}.csv")
    expect(page.locator("#job-told")).to_contain_text("2 books are in the catalogue, 1 row was refused")
    refused = page.get_by_role("table", name="Refused rows")
    expect(refused.get_by_role("row", name=re.compile("^3 title"))).to_be_visible()
    expect(refused.get_by_role("row")).to_have_count(2)
    warnings = page.get_by_role("table", name="Warnings")
    expect(warnings.get_by_role("row", name=re.compile("^4 price"))).to_contain_text(f"{evil} is not a price; left out")
    expect(warnings.get_by_role("row")).to_have_count(2)
    page.get_by_role("link", name="Import another file").click()
    expect(cards(page).filter(has_text=evil)).to_contain_text("1 refused")
    expect(page.locator("img")).to_have_count(0)


def drop(page: Page, name: str, content: str) -> None:
    file = page.evaluate_handle(
        """([name, content]) => {
            const dropped = new DataTransfer();
            dropped.items.add(new File([content], name, {type: 'text/csv'}));
            return dropped;
        }""",
        [name, content],
    )
    page.locator("#view-import h2").dispatch_event("drop", {"dataTransfer": file})


def test_a_dropped_file_waits_for_the_choices_and_shows_its_progress(server: Server, visit: Visit) -> None:
    rita = sign_up(server.client, "Rita")
    page = reader(server, visit)
    go(page, "Import")
    lines = [f"Volume {i},Somebody,{i}" for i in range(1, 20_001)] + [",Nobody,1", "Emma,Jane Austen,cheap"]
    drop(page, "box.csv", "title,author,pages\n" + "\n".join(lines))
    expect(page.locator("#recognised")).to_contain_text("box.csv: a list of books")
    assert rita.get("/books/upload").json()["total"] == 0
    page.evaluate(
        """() => {
            window.progress = [];
            const bar = document.querySelector('#job progress');
            new MutationObserver(() => progress.push(bar.value)).observe(bar, {attributes: true});
        }"""
    )
    page.get_by_role("button", name="Upload to the catalogue").click()
    expect(page.locator("#job-name")).to_have_text("box.csv")
    expect(page.locator("#job-state")).to_have_text("Done.")
    expect(page.locator("#job-told")).to_contain_text("20,001 books are in the catalogue, 1 row was refused")
    seen = page.evaluate("progress")
    assert seen == sorted(seen)
    assert seen[-1] == 1
    assert [value for value in seen if 0 < value < 1]


def test_an_import_can_be_cancelled(server: Server, visit: Visit) -> None:
    rita = sign_up(server.client, "Rita")
    page = reader(server, visit, "#/import")
    expect(page.get_by_text("No file yet.")).to_be_visible()
    choose(page, "big.csv", rows(30_000))
    page.get_by_role("button", name="Upload to my shelf").click()
    page.get_by_role("button", name="Cancel the import").click()
    expect(page.locator("#job-state")).to_have_text("Cancelled.")
    expect(page.get_by_role("button", name="Cancel the import")).to_be_hidden()
    assert rita.get("/books/upload/1").json()["status"] == "cancelled"
    page.get_by_role("link", name="Import another file").click()
    expect(cards(page).filter(has_text="big.csv")).to_contain_text("Cancelled.")


def test_an_upload_of_another_is_said_not_to_be_there(server: Server, visit: Visit) -> None:
    sign_up(server.client, "Nora").upload(rows(3), path="/my-library/import")
    sign_up(server.client, "Rita")
    page = reader(server, visit, "#/import/1", expected="status of 404")
    expect(here(page)).to_contain_text("No such upload.")
    go(page, "Import")
    expect(here(page)).not_to_contain_text("No such upload.")
    expect(page.get_by_text("No file yet.")).to_be_visible()


# --- for everybody ------------------------------------------------------------------------------------------------


def views(page: Page) -> list[Callable[[], None]]:
    """Each of these views, full."""

    def opened(address: str, part: str) -> Callable[[], None]:
        def work() -> None:
            page.goto(f"{page.url.split('#')[0]}#/{address}")
            expect(page.locator(part).first).to_be_visible()

        return work

    return [
        opened("", "#now progress"),
        opened("shelf", "#view-shelf .rows > li:not(.skeleton)"),
        opened("shelf/reading", "#view-shelf progress"),
        opened("stats", ".bars"),
        opened("import", "#uploads li"),
        lambda: choose(page, "mine.csv", GOODREADS),
        opened("import/1", "#job-warning td"),
        opened("book/3", "#days"),
    ]


@SIZES
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_and_nothing_is_too_wide(
    server: Server, visit: Visit, scheme: str, size: tuple[int, int]
) -> None:
    rita = sign_up(server.client, "Rita")
    rita.upload(rows(1500) + "Emma,Jane Austen,3,read,a,0,,\n,Nobody,,,,,,\n", path="/my-library/import")
    page = reader(server, visit, size=size, scheme=scheme)
    faults = []
    for number, show in enumerate(views(page)):
        show()
        faults += axe(page, str(number))
        if page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth"):
            faults.append(f"{number} is wider than the screen")
    assert faults == []
    page.set_viewport_size({"width": 640, "height": 450})  # 200 % of 1280 x 900
    for number, show in enumerate(views(page)):
        show()
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), number


@SIZES
@pytest.mark.parametrize("address", ["#/", "#/shelf", "#/shelf/reading"], ids=["reading now", "shelf", "a part"])
def test_nothing_moves_while_it_loads(server: Server, visit: Visit, size: tuple[int, int], address: str) -> None:
    rita = sign_up(server.client, "Rita")
    rita.upload(rows(120), path="/my-library/import")
    page = reader(server, visit, size=size)
    page.goto("about:blank")
    page.add_init_script(
        "window.moved = 0; new PerformanceObserver(list => { for (const shift of list.getEntries())"
        " if (!shift.hadRecentInput) window.moved += shift.value; }).observe({type: 'layout-shift', buffered: true});"
    )
    page.goto(f"{server.url}/{address}")
    expect(cards(page)).to_have_count(24)
    expect(here(page).locator("progress").first).to_be_visible()
    expect(page.locator("#live")).to_have_text("connected")
    assert page.evaluate("moved") < 0.05


def test_a_keyboard_is_enough_for_the_shelf(server: Server, visit: Visit) -> None:
    rita = sign_up(server.client, "Rita")
    book_id = shelve(rita, "Dune", {"pages": 400}, status="reading")
    page = reader(server, visit, "#/shelf")
    tab_to(page, page.get_by_role("link", name="Reading 1"))
    page.keyboard.press("Enter")
    expect(page.get_by_role("link", name="Reading 1")).to_have_attribute("aria-current", "page")
    expect(page.locator("#h-shelf")).to_be_focused()
    field = cards(page).get_by_label("Page reached in Dune")
    tab_to(page, field)
    page.keyboard.type("200")
    page.keyboard.press("Enter")
    expect(cards(page).get_by_role("progressbar")).to_have_js_property("value", 200)
    expect(field).to_be_focused()
    tab_to(page, cards(page).get_by_role("button", name="I finished Dune"))
    page.keyboard.press("Enter")
    expect(page.get_by_text("Nothing here yet.")).to_be_visible()
    expect(here(page).locator(".rows")).to_be_focused()  # the button that was pressed is gone
    assert rita.get(f"/my-library/{book_id}").json()["status"] == "completed"


def test_the_focus_stays_where_it_is_in_statistics(server: Server, visit: Visit) -> None:
    rita = sign_up(server.client, "Rita")
    shelve(rita, "Dune", {"genre": "Novel"}, status="completed")
    page = reader(server, visit, "#/stats")
    genre = page.locator("#charts").get_by_role("link", name="Novel")
    genre.focus()
    shelve(rita, "Emma", {"genre": "Novel"}, status="completed")
    expect(page.get_by_role("list", name="Top genres")).to_contain_text("2 books")
    expect(genre).to_be_focused()
