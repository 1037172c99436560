"""Whatever the shapes allow goes in and comes out again, by every route. Needs hypothesis (requirements-dev.txt)."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stdnum import ean

from conftest import Person, without_ids
from main import app
from settings import settings as ours

pytestmark = pytest.mark.slow

# Any text that JSON can carry; what is refused must be refused cleanly, what is taken must come back as it was.
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
def test_what_is_taken_comes_back_by_every_route(reader: Person, given_book: dict[str, Any]) -> None:
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
    said = {name: value for name, value in book.items() if name in given_book}
    assert reader.put(path, json=said).json()["title"] == book["title"]
    assert reader.patch(path, json=said).status_code == 200
    assert reader.delete(path).status_code == 204


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.text(st.characters(), max_size=80), sort=st.sampled_from(["title", "-year", ""]))
def test_no_query_breaks_the_search(reader: Person, words: str, sort: str) -> None:
    query = (
        {"search": words.encode(errors="surrogatepass"), "sort": sort}
        if sort
        else {"search": words.encode(errors="surrogatepass")}
    )
    assert reader.get("/books", params=query).status_code in (200, 422)


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database as the first start leaves it."""
    file = tmp_path_factory.mktemp("empty") / "books.db"
    with service(file):
        pass
    return file


@contextmanager
def service(file: Path) -> Iterator[Person]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours, "database_url", f"sqlite:///{file}")
        patch.setattr(ours, "rate_limits", False)
        with TestClient(app) as client:
            yield Person(client, "admin", "admin")


def two_services(empty: Path) -> tuple[Path, Path]:
    folder = Path(tempfile.mkdtemp(dir=empty.parent))
    return tuple(Path(shutil.copy(empty, folder / name)) for name in ("one.db", "other.db"))  # type: ignore[return-value]


# Few titles and authors, so that books come twice; and what CSV, spreadsheets and our own guards give a meaning to.
ODD = st.sampled_from(
    ["Dune", "dune", "=1+1", "'=x", "a, b", 'a "b" c', "\\", '\\"', "a\r\nb", ";", "\t|", "&amp;", "é", "-1"]
)
DIGITS = st.integers(0, 10**9 - 1).map(lambda n: f"978{n:09}{ean.calc_check_digit(f'978{n:09}')}")
CATALOGUE = st.lists(
    st.fixed_dictionaries(
        {"title": ODD | TEXT, "author": ODD | TEXT},
        optional={
            "isbn": DIGITS,
            "genre": ODD | TEXT,
            "description": ODD | TEXT,
            "pages": st.integers(1, 1000),
            "price": st.decimals(0, 10**6, places=2).map(float),
            "published_date": st.dates(max_value=date(2026, 1, 1)).map(str),
            "publication_year": st.integers(-5000, 2026),
        },
    ),
    max_size=8,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(books=CATALOGUE)
def test_export_import_export_gives_the_same_bytes(empty: Path, books: list[dict[str, Any]]) -> None:
    one, other = two_services(empty)
    with service(one) as admin:
        for book in books:
            assert admin.post("/books", json=book).status_code in (201, 409, 422)
        exported = admin.get("/books/export").content
        total = admin.get("/books").json()["total"]
        for again in (admin.upload(exported), admin.upload(exported, on_duplicate="update")):
            assert (again["skipped"], again["failed"], again["warnings"]) == (total, 0, 0), again["errors"]
        assert admin.get("/books/export").content == exported
    with service(other) as admin:
        upload = admin.upload(exported)
        assert (upload["inserted"], upload["errors"]) == (total, [])
        assert admin.get("/books/export").content == exported


MOMENTS = st.datetimes(datetime(1990, 1, 1), datetime(2026, 1, 1), timezones=st.just(UTC)).map(datetime.isoformat)
ENTRY = st.fixed_dictionaries(
    {"status": st.sampled_from(["wishlist", "reading", "completed", "abandoned"])},
    optional={
        "rating": st.integers(1, 5),
        "review": ODD | TEXT | st.sampled_from(["<b>x</b>", "a & b &lt; c", "one\n\ntwo", "<br/>"]),
        "tags": st.lists(st.sampled_from(["read", "to-read", "sf", "=x", "'", "a b", "é"]), max_size=4, unique=True),
        "started_at": MOMENTS,
        "finished_at": st.none() | MOMENTS,
    },
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(shelf=st.lists(st.tuples(CATALOGUE.filter(bool).map(lambda books: books[0]), ENTRY), max_size=5))
def test_a_shelf_goes_out_in_and_out_the_same(empty: Path, shelf: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    one, other = two_services(empty)
    with service(one) as admin:
        for book, entry in shelf:
            answer = admin.post("/books", json=book)
            if answer.status_code == 201:
                admin.post(answer.headers["Location"].replace("/books", "/my-library"))
                changed = admin.patch(answer.headers["Location"].replace("/books", "/my-library"), json=entry)
                assert changed.status_code in (200, 422)
        exported = admin.get("/my-library/export").content
        before = without_ids(admin.get("/my-library", params={"sort": "added"}).json()["items"])
        again = admin.upload(exported, path="/my-library/import", on_duplicate="update")
        assert (again["skipped"], again["failed"]) == (len(before), 0), again["errors"]
        assert admin.get("/my-library/export").content == exported
    with service(other) as admin:
        upload = admin.upload(exported, path="/my-library/import")
        assert (upload["inserted"], upload["errors"]) == (len(before), [])
        assert without_ids(admin.get("/my-library", params={"sort": "added"}).json()["items"]) == before


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(min_size=1, max_size=400) | TEXT.map(lambda text: f"title,author\n{text}\n".encode()))
def test_no_file_breaks_an_upload(reader: Person, content: bytes) -> None:
    if not content:
        return
    upload = reader.upload(content)
    assert upload["status"] in ("completed", "failed")
    assert upload["error"] is None or "server's log" not in upload["error"]
    assert upload["rows"] == upload["inserted"] + upload["updated"] + upload["skipped"] + upload["failed"]
