"""Properties of books, searches and uploads for random input. Needs hypothesis (tests/requirements.txt)."""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fixtures import Person, service

pytestmark = pytest.mark.slow

# Any text that JSON can carry: refused with 422, or returned as it was sent.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
BOOKS = st.fixed_dictionaries(
    {"title": TEXT, "author": TEXT},
    optional={
        "genre": st.none() | TEXT,
        "description": st.none() | TEXT,
        "publisher": st.none() | TEXT,
        "language": st.none() | TEXT,
        "pages": st.none() | st.integers(-1, 2**40),
        "price": st.none()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.decimals(0, 10**8, places=2).map(float),
        "cover_url": st.none() | TEXT.map("https://example.com/{}".format),
        "published_date": st.none() | st.dates().map(str),
        "publication_year": st.none() | st.integers(-6000, 3000),
    },
)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Person]:
    with service(tmp_path_factory.mktemp("books") / "books.db") as admin:
        yield admin


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(given_book=BOOKS)
def test_a_valid_book_is_returned_as_it_was_sent(reader: Person, given_book: dict[str, Any]) -> None:
    answer = reader.post("/books", json=given_book)
    assert answer.status_code in (201, 422), answer.text
    if answer.status_code == 422:
        return
    book = answer.json()
    path = f"/books/{book['id']}"
    for name, value in given_book.items():
        assert book[name] == (value.strip() or None if isinstance(value, str) else value) or name == "publication_year"
    assert reader.get(path).json() == book
    assert reader.get("/books", params={"sort": "-id", "limit": 1}).json()["items"] == [book]
    for sort in ("title", "author", "year", "rating"):
        assert reader.get("/books", params={"sort": sort}).status_code == 200
    found = reader.get("/books", params={"search": book["title"], "limit": 100})
    assert found.status_code == 200, found.text
    fields = {name: value for name, value in book.items() if name in given_book}
    assert reader.put(path, json=fields).json()["title"] == book["title"]
    assert reader.patch(path, json=fields).status_code == 200
    assert reader.delete(path).status_code == 204


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.text(st.characters(), max_size=80), sort=st.sampled_from(["title", "-year", ""]))
def test_any_search_is_200_or_422(reader: Person, words: str, sort: str) -> None:
    query = (
        {"search": words.encode(errors="surrogatepass"), "sort": sort}
        if sort
        else {"search": words.encode(errors="surrogatepass")}
    )
    assert reader.get("/books", params=query).status_code in (200, 422)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(min_size=1, max_size=400) | TEXT.map(lambda text: f"title,author\n{text}\n".encode()))
def test_any_file_is_completed_or_failed(reader: Person, content: bytes) -> None:
    if not content:
        return
    upload = reader.upload(content)
    assert upload["status"] in ("completed", "failed")
    assert upload["error"] is None or "server's log" not in upload["error"]
    assert upload["rows"] == upload["inserted"] + upload["updated"] + upload["skipped"] + upload["failed"]
