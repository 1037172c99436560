"""Exports are imported unchanged, whatever they contain. Needs hypothesis (tests/requirements.txt)."""

from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stdnum import ean

from tests.fixtures import service, two_services, without_ids

pytestmark = pytest.mark.slow

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


# Few titles and authors, so that books repeat, and characters special to CSV, spreadsheets and our escaping.
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
def test_catalogue_survives_export_and_import(first_start: Path, books: list[dict[str, Any]]) -> None:
    one, other = two_services(first_start)
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
        "rating": st.integers(1, 20).map(lambda quarters: quarters / 4),
        "review": ODD | TEXT | st.sampled_from(["<b>x</b>", "a & b &lt; c", "one\n\ntwo", "<br/>"]),
        "page": st.none() | st.integers(0, 100_000),
        "tags": st.lists(st.sampled_from(["read", "to-read", "sf", "=x", "'", "a b", "é"]), max_size=4, unique=True),
        "started_at": MOMENTS,
        "finished_at": st.none() | MOMENTS,
    },
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(shelf=st.lists(st.tuples(CATALOGUE.filter(bool).map(lambda books: books[0]), ENTRY), max_size=5))
def test_shelf_survives_export_and_import(
    first_start: Path, shelf: list[tuple[dict[str, Any], dict[str, Any]]]
) -> None:
    one, other = two_services(first_start)
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
