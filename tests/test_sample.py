"""`SAMPLE=true`: what an empty database begins with. `/b/{id}`: the front page of a book."""

import csv
import html
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

import main
from main import app
from settings import STATIC, Settings, settings
from tests.fixtures import Person, Server, url_of

# --- sample data --------------------------------------------------------------------------------------------------

Start = Callable[..., TestClient]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """A client of a database that is empty at first."""
    monkeypatch.setattr(settings, "rate_limits", False)
    monkeypatch.setattr(main, "recurring_jobs", nullcontext)

    def start(**values: Any) -> TestClient:
        for name, value in {"database_url": url_of(tmp_path / "new.db"), "sample": True, **values}.items():
            monkeypatch.setattr(settings, name, value)
        return TestClient(app)

    return start


@pytest.mark.slow
def test_an_empty_database_begins_with_books_copies_and_reviews(start: Start) -> None:
    with start() as client:
        page = client.get("/books?limit=100").json()
        assert (page["total"], len(page["items"])) == (50, 50)
        assert 20 < client.get("/books?available=true").json()["total"] < 50
        rated = client.get("/books?sort=-rating").json()["items"]
        assert (rated[0]["title"], rated[0]["rating"], rated[0]["rating_count"]) == ("Emma", 4.5, 2)
        reviews = client.get(f"/books/{rated[0]['id']}/reviews").json()["items"]
        assert [review["username"] for review in reviews] == ["amara.okafor", "ines.kowalska"]
        assert all(review["review"] and review["finished_at"] for review in reviews)
        admin = Person(client, "admin", "admin")
        users = admin.get("/users").json()["items"]
        names = {user["username"]: (user["role"], user["full_name"]) for user in users}
        assert len(names) == 5
        assert names["joao.marques"] == ("reader", "Joao Marques")
        uploads = admin.get("/books/upload").json()["items"]
        assert {(upload["status"], upload["failed"], upload["warnings"]) for upload in uploads} == {("completed", 0, 0)}
        kinds = {event["type"] for event in client.get("/events?after=0&limit=100").json()["items"]}
        assert {"books.imported", "book.stock", "reviews.imported"} <= kinds
        for password in ("", "admin", "ines.kowalska", "password"):
            answer = client.post("/login", json={"username": "ines.kowalska", "password": password})
            assert answer.status_code in (401, 422)


@pytest.mark.slow
def test_it_comes_once(start: Start) -> None:
    with start() as client:
        admin = Person(client, "admin", "admin")
        for book in client.get("/books?limit=100").json()["items"]:
            admin.delete(f"/books/{book['id']}")
        assert client.get("/books").json()["total"] == 0
    with start() as client:
        assert client.get("/books").json()["total"] == 0
        assert Person(client, "admin", "admin").get("/users").json()["total"] == 5


@pytest.mark.slow
def test_a_database_in_use_gets_none(start: Start) -> None:
    with start(sample=False) as client:
        assert client.get("/books").json()["total"] == 0
    with start() as client:
        assert client.get("/books").json()["total"] == 0


@pytest.mark.slow
def test_it_comes_where_readers_may_not_add_and_nobody_is_an_admin(start: Start) -> None:
    with start(readers_can_add=False, admin_username="ines.kowal", secret_key="k" * 40) as client:
        assert client.get("/books").json()["total"] == 50
    with start(readers_can_add=False, admin_username="ines.kowal", secret_key="k" * 40) as client:
        assert client.get("/books").json()["total"] == 50


@pytest.mark.slow
def test_two_servers_that_start_at_once_add_it_once(serve: Callable[..., Server]) -> None:
    with ThreadPoolExecutor(2) as pool:
        servers = list(pool.map(lambda _: serve(SAMPLE="true"), range(2)))
    for server in servers:
        assert server.client.get("/books").json()["total"] == 50
        assert "Traceback" not in server.log.read_text()


def test_app_json_asks_for_it() -> None:
    text = (STATIC.parent / "app.json").read_text()
    assert re.search(r'"SAMPLE": \{[^}]*"value": "true"', text)
    assert Settings(_env_file=None).sample is False


def test_every_review_is_of_a_book_of_the_sample() -> None:
    def rows(name: str) -> list[dict[str, str]]:
        return list(csv.DictReader((STATIC / name).read_text("utf-8").splitlines()))

    books = {(row["title"], row["author"]) for row in rows("sample_books.csv")}
    assert [row for row in rows("sample_reviews.csv") if (row["Title"], row["Author"]) not in books] == []


# --- the page of a book -------------------------------------------------------------------------------------------

HOSTILE = "<script>\"&amp;' \\1 é</title>"


def tags(page: str) -> dict[str, str]:
    found = re.findall(r'<meta property="og:(\w+)" content="([^"]*)">', page)
    return {name: html.unescape(value) for name, value in found}


def test_the_page_of_a_book_has_tags_for_previews(client: TestClient, reader: Person) -> None:
    dune = reader.add_book(title="Dune", author="Frank Herbert", isbn="9780441172719", description="Spice." * 100)
    answer = client.get(f"/b/{dune['id']}")
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "base-uri 'self'" in answer.headers["Content-Security-Policy"]
    assert "script-src 'self'" in answer.headers["Content-Security-Policy"]
    assert answer.text.count("<title>") == 1
    assert "<title>Dune</title>" in answer.text
    assert f'<html data-book="{dune["id"]}" ' in answer.text
    assert tags(answer.text) == {
        "type": "book",
        "title": "Dune",
        "description": ("Spice." * 100)[:300],
        "url": f"http://testserver/b/{dune['id']}",
        "image": f"http://testserver/books/{dune['id']}/cover?v=9780441172719",
    }
    assert client.get(f"/b/{dune['id']}/").text == answer.text
    etag = {"If-None-Match": answer.headers["ETag"]}
    assert client.get(f"/b/{dune['id']}", headers=etag).status_code == 304
    assert client.get("/", headers=etag).status_code == 200
    reader.patch(f"/books/{dune['id']}", json={"title": "Dune Messiah"})
    assert client.get(f"/b/{dune['id']}", headers=etag).status_code == 200
    assert client.head(f"/b/{dune['id']}").status_code == 200


def test_what_is_in_a_book_is_escaped(client: TestClient, reader: Person) -> None:
    book = reader.add_book(title=HOSTILE, author=HOSTILE)
    page = client.get(f"/b/{book['id']}").text
    assert page.count("<script>") == client.get("/").text.count("<script>")
    assert f"<title>{html.escape(HOSTILE)}</title>" in page
    assert tags(page)["title"] == HOSTILE
    assert tags(page)["description"] == f"A book by {HOSTILE}."
    assert "image" not in tags(page)


UNKNOWN = {
    "no such book": ("/b/99", 404),
    "a huge id": ("/b/9999999999", 422),
    "no id": ("/b/x", 404),
    "none": ("/b", 404),
}


@pytest.mark.parametrize(("path", "status"), UNKNOWN.values(), ids=UNKNOWN)
def test_pages_of_unknown_books_are_problems(client: TestClient, path: str, status: int) -> None:
    answer = client.get(path)
    assert answer.status_code == status
    assert answer.headers["Content-Type"] == "application/problem+json"


@pytest.mark.parametrize("root", ["", "/x", '/"><b'])
def test_addresses_on_the_page_do_not_depend_on_its_own(client: TestClient, reader: Person, root: str) -> None:
    book = reader.add_book(isbn="9780441172719")
    behind = TestClient(client.app, root_path=root)
    for path in ("/", f"/b/{book['id']}"):
        page = behind.get(root + path).text
        assert page.count("<base ") == 1
        assert page.index("<base ") < page.index("static/")
        assert f'<base href="{html.escape(root)}/">' in page
    if root == "/x":
        assert tags(page)["image"].startswith(f"http://testserver/x/books/{book['id']}/cover?v=")


@pytest.mark.slow
def test_assets_load_behind_a_root_path(serve: Callable[..., Server]) -> None:
    server = serve("--root-path", "/x", SAMPLE="true")
    page = server.client.get("/b/1")  # a proxy takes the prefix away
    assert page.status_code == 200
    base = re.findall(r'<base href="([^"]*)">', page.text)[0]
    assert base == "/x/"
    assets = re.findall(r'(?:src|href)="(static/[^"]+)"', page.text)
    assert assets
    for asset in assets:
        assert server.client.get(f"/{asset}").status_code == 200
