"""Small files with one trait each, as spreadsheets and other services write them."""

from typing import Any, NamedTuple

import pytest
from fastapi.testclient import TestClient

from tests.fixtures import ROOT, Person

FILES = ROOT / "tests" / "data"
Problems = list[tuple[int, str | None, str]]  # row, field, a part of the reason

DUNE_AND_EMMA = [("Dune", "Frank Herbert"), ("Emma", "Jane Austen")]
FRENCH_AND_GERMAN = [("Pêche à la ligne", "Émile Zola"), ("Die Verwandlung für Anfänger", "Jürgen Groß")]


class Expected(NamedTuple):
    """Rows that are neither refused nor skipped are inserted."""

    books: list[tuple[str, str]]  # title and author
    refused: Problems = []  # noqa: RUF012  # not changed
    warned: Problems = []  # noqa: RUF012  # not changed
    skipped: int = 0
    encoding: str = "utf-8"
    delimiter: str = ","
    first: dict[str, Any] = {}  # noqa: RUF012  # not changed; of the first book


def ab(*letters: str) -> list[tuple[str, str]]:
    return [(pair[0], pair[1]) for pair in letters]


TRAITS: dict[str, Expected] = {
    "comma": Expected(DUNE_AND_EMMA, first={"isbn": "9780441172719", "price": 9.99}),
    "semicolon": Expected(DUNE_AND_EMMA, delimiter=";", first={"price": 9.99}),
    "tab": Expected(DUNE_AND_EMMA, delimiter="\t", first={"price": 9.99}),
    "pipe": Expected(DUNE_AND_EMMA, delimiter="|", first={"price": 9.99}),
    "excel_sep": Expected(DUNE_AND_EMMA[:1], delimiter=";"),
    "crlf": Expected(DUNE_AND_EMMA, first={"price": 9.99}),
    "cr": Expected(DUNE_AND_EMMA, first={"price": 9.99}),
    "single_quotes": Expected([("Dune, Messiah", "Frank Herbert"), ("O'Brien's Book", "Somebody")]),
    "quoted_line_breaks": Expected([("A,\nB", "C"), ("D", "E")], first={"description": "one\r\ntwo"}),
    "backslash_quotes": Expected(
        [
            ("Classical Mythology", "Mark P. O. Morford"),
            ('Nights Below Station Street; "The Sequel"', "David Adams Richards"),
            ('Tell Me "Why"', 'Lydia "L." Davis'),
        ],
        delimiter=";",
        first={"isbn": "9780195153446", "publication_year": 2002},
    ),
    "utf8_bom": Expected(FRENCH_AND_GERMAN, encoding="utf-8-sig"),
    "utf16_le": Expected(FRENCH_AND_GERMAN, encoding="utf-16"),
    "utf16_be": Expected(FRENCH_AND_GERMAN, encoding="utf-16"),
    "windows1252": Expected(
        [FRENCH_AND_GERMAN[0], ("“Die” Verwandlung für Anfänger", "Jürgen Groß")], encoding="windows-1252"
    ),
    "latin1": Expected(FRENCH_AND_GERMAN, encoding="windows-1252"),  # of which it is a part
    "mixed_encodings": Expected(
        [*FRENCH_AND_GERMAN, ("Caf\N{REPLACEMENT CHARACTER} de nuit", "Somebody"), ("Nana", "Zola")],
        warned=[(4, "title", "bytes that are no text")],
    ),
    "utf16_cut_off": Expected(
        [("A", "B"), ("C", "\N{REPLACEMENT CHARACTER}")],
        warned=[(3, "author", "bytes that are no text")],
        encoding="utf-16",
    ),
    "surrogates": Expected(
        [("A" + 3 * "\N{REPLACEMENT CHARACTER}", "B"), ("C", "D")], warned=[(2, "title", "bytes that are no text")]
    ),
    "right_to_left": Expected([("\u200f\u05d7\u05e1\u05d3\u200e", "\u202eevil\u202c"), ("A", "B")]),
    "entities": Expected([("Cats & Dogs", "Gabriel García Márquez"), ("AT&T", "R&D; and others")]),
    "excel_text": Expected(DUNE_AND_EMMA, first={"isbn": "9780441172719"}),
    "formulas": Expected([("=1+1", "+SUM(A1)"), ("-2", '=HYPERLINK("http://evil")')], first={"publisher": "@cmd"}),
    "decimal_comma": Expected(
        ab("AB", "CD", "EF", "GH"),
        warned=[(5, "price", "1,234 has a comma that may be a decimal comma or one between thousands; left out")],
        delimiter=";",
        first={"price": 12.5},
    ),
    "dates": Expected(
        ab("AB", "CD", "EF", "GH", "IJ", "KL", "MN"),
        warned=[(8, "published_date", "soon is not a date like 2008-08-11; left out")],
        first={"published_date": "2008-08-11", "publication_year": 2008},
    ),
    "dates_ambiguous": Expected(
        ab("AB", "CD"), warned=[(2, "published_date", "03/04/2008 may be day first or month first")]
    ),
    "dates_settled": Expected(ab("AB", "CD"), first={"published_date": "2008-04-03"}),
    "dates_settled_month_first": Expected(ab("AB", "CD"), first={"published_date": "2008-03-04"}),
    "dates_in_both_orders": Expected(
        ab("AB", "CD", "EF"), warned=[(2, "published_date", "may be day first or month first")]
    ),
    "damaged_isbns": Expected(
        ab("AB", "CD", "EF", "GH"), warned=[(2, "isbn", "not an ISBN"), (4, "isbn", "not an ISBN")]
    ),
    "no_isbn_twice": Expected([("The Hobbit", "J.R.R. Tolkien"), ("The Hobbit", "Somebody Else")], skipped=1),
    "one_cell_too_many": Expected(DUNE_AND_EMMA[1:], refused=[(2, None, "has 4 cells where the header has 3")]),
    "huge_cell": Expected(ab("AB", "CD"), warned=[(2, "description", "more than 20,000")]),
    "header_twice": Expected(ab("AB", "CD"), refused=[(3, None, "is the header again")]),
    "duplicate_headers": Expected(ab("AB", "DB"), first={"isbn": "9780441172719"}),
}


def test_every_file_is_in_the_table() -> None:
    shelves = {"goodreads", "goodreads_31_columns", "storygraph"}
    assert {file.stem for file in FILES.glob("*.csv")} == {*TRAITS, *shelves}


@pytest.mark.parametrize(("name", "expected"), TRAITS.items(), ids=TRAITS)
def test_each_row_is_imported_or_refused(client: TestClient, reader: Person, name: str, expected: Expected) -> None:
    content = (FILES / f"{name}.csv").read_bytes()
    check(reader.upload(content, dry_run=True), expected)
    assert client.get("/books").json()["items"] == []
    check(reader.upload(content), expected)
    books = client.get("/books").json()["items"]
    assert [(book["title"], book["author"]) for book in books] == expected.books
    assert books[0].items() >= expected.first.items()


def check(upload: dict[str, Any], expected: Expected) -> None:
    assert (upload["status"], upload["error"]) == ("completed", None)
    assert (upload["encoding"], upload["delimiter"]) == (expected.encoding, expected.delimiter)
    counts = (len(expected.books), 0, expected.skipped, len(expected.refused))
    assert (upload["inserted"], upload["updated"], upload["skipped"], upload["failed"]) == counts
    assert (upload["rows"], upload["warnings"]) == (sum(counts), len(expected.warned))
    refused, warned = [(*it, "error") for it in expected.refused], [(*it, "warning") for it in expected.warned]
    for error, (row, field, part, severity) in zip(upload["errors"], sorted(refused + warned, key=str), strict=True):
        assert (error["row"], error["field"], error["severity"]) == (row, field, severity)
        assert part in error["message"]


# --- shelves of other services ------------------------------------------------------------------------------------


def shelf_of(person: Person) -> list[dict[str, Any]]:
    """The entries without their books' own data, in the order of `added_at`."""
    entries = person.get("/my-library", params={"sort": "added", "limit": 100}).json()["items"]
    return [
        {
            "title": entry["book"]["title"],
            **{name: value for name, value in entry.items() if value and name not in ("book", "book_id", "updated_at")},
        }
        for entry in entries
    ]


GOODREADS = [
    {
        "title": "Dune (Dune, #1)",
        "status": "completed",
        "rating": 5,
        "review": "Sand.\n\nAnd worms & spice.",
        "tags": ["favorites", "sci-fi"],
        "finished_at": "2015-03-02T00:00:00Z",
        "added_at": "2014-12-24T00:00:00Z",
    },
    {"title": "The Catcher in the Rye", "status": "wishlist", "added_at": "2016-01-05T00:00:00Z"},
    {"title": "Hyperion (Hyperion Cantos, #1)", "status": "reading", "added_at": "2016-02-01T00:00:00Z"},
    {
        "title": "Good Omens",
        "status": "abandoned",
        "rating": 2,
        "review": "Not for me.",
        "finished_at": "2017-01-01T00:00:00Z",
        "added_at": "2016-12-01T00:00:00Z",
    },
    {"title": "Ulysses", "status": "wishlist", "rating": 4, "tags": ["someday"], "added_at": "2018-05-05T00:00:00Z"},
]


@pytest.mark.parametrize("path", ["/my-library/import", "/books/upload"])
def test_goodreads_export_is_imported(client: TestClient, reader: Person, path: str) -> None:
    options: dict[str, Any] = {} if path == "/my-library/import" else {"shelve": True}
    upload = reader.upload((FILES / "goodreads.csv").read_bytes(), path=path, **options)
    assert (upload["format"], upload["rows"], upload["inserted"], upload["failed"]) == ("goodreads", 5, 5, 0)
    assert upload["errors"] == []
    assert shelf_of(reader) == GOODREADS
    omens = client.get("/books", params={"search": "omens"}).json()["items"][0]
    assert (
        omens.items()
        >= {
            "author": "Terry Pratchett, Neil Gaiman",
            "publication_year": 1990,
            "pages": 491,
            "rating": 2.0,
        }.items()
    )


def test_repeated_import_skips_or_updates(reader: Person) -> None:
    content = (FILES / "goodreads.csv").read_bytes()
    reader.upload(content, path="/my-library/import")
    reader.patch("/my-library/1", json={"rating": 1, "review": "On second thought.", "tags": []})
    reader.patch("/books/2", json={"publisher": "Penguin"})
    before = reader.get("/my-library").json()["items"]
    again = reader.upload(content, path="/my-library/import")
    assert (again["inserted"], again["updated"], again["skipped"], again["failed"]) == (0, 0, 5, 0)
    assert reader.get("/my-library").json()["items"] == before
    updated = reader.upload(content, path="/my-library/import", on_duplicate="update")
    assert (updated["inserted"], updated["updated"], updated["skipped"]) == (0, 2, 3)
    assert shelf_of(reader) == GOODREADS
    assert reader.get("/books/2").json()["publisher"] == "Little, Brown and Company"


def test_older_goodreads_export_is_imported(reader: Person) -> None:
    upload = reader.upload((FILES / "goodreads_31_columns.csv").read_bytes(), path="/my-library/import")
    assert (upload["format"], upload["inserted"], upload["errors"]) == ("goodreads", 1, [])
    assert shelf_of(reader)[0].items() >= {"title": "Dune", "rating": 5, "status": "completed"}.items()
    assert {"Recommended For", "BCID", "Private Notes"} <= set(upload["ignored_columns"])


def test_storygraph_export_is_imported(reader: Person) -> None:
    upload = reader.upload((FILES / "storygraph.csv").read_bytes(), path="/my-library/import")
    assert (upload["format"], upload["inserted"], upload["failed"]) == ("storygraph", 4, 0)
    assert upload["errors"] == []
    assert shelf_of(reader) == [
        {"title": "Middlemarch", "status": "abandoned", "rating": 2.5, "added_at": "2020-01-01T00:00:00Z"},
        {
            "title": "The Left Hand of Darkness",
            "status": "completed",
            "rating": 4.25,
            "review": "Winter.",
            "tags": ["sf", "hainish"],
            "started_at": "2021-03-10T00:00:00Z",
            "finished_at": "2021-04-02T00:00:00Z",
            "added_at": "2021-03-01T00:00:00Z",
        },
        {"title": "Piranesi", "status": "wishlist", "added_at": "2021-05-01T00:00:00Z"},
        {
            "title": "Emma",
            "status": "reading",
            "started_at": "2022-02-03T00:00:00Z",
            "added_at": "2022-02-02T00:00:00Z",
        },
    ]


def test_file_without_a_shelf_fails_with_a_reason(reader: Person) -> None:
    upload = reader.upload((FILES / "comma.csv").read_bytes(), path="/my-library/import")
    assert upload["status"] == "failed"
    assert upload["error"] == (
        "This is no shelf of Goodreads, StoryGraph, LibraryThing or BookWyrm."
        " It has: 'title', 'author', 'isbn', 'price'."
    )
    assert reader.get("/my-library").json()["total"] == reader.get("/books").json()["total"] == 0
