"""Shelves as readers really upload them: nothing that has a title and an author is lost. Needs hypothesis."""

import csv
import io
import re
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from csv_files import (
    FORMATS,
    GOODREADS_COLUMNS,
    OUR_COLUMNS,
    SHELF_ALIASES,
    SHELF_FORMATS,
    SHELVES,
    column_keys,
)
from tests.fixtures import ROOT, Person, service, two_services, without_ids

# --- made-up shelves, damaged at random ---------------------------------------------------------------------------

WORDS = st.sampled_from(["Sand", "rain", "l'été", "“Fire”", 'a "b"', "x; y", "c, d", "Ω", "&", "{}", "1984"])
TEXT = st.lists(WORDS, min_size=1, max_size=4).map(" ".join)
REVIEW = st.lists(TEXT, min_size=1, max_size=3).map("\n".join)
OWN_SHELVES = ["trash", "skimmed", "stopped-reading", "wont-finish", "on-hold", "gave-up", "Did Not Finish"]
DAYS = st.dates(date(1960, 1, 1), date(2025, 12, 31))


class Book(NamedTuple):
    author: str
    shelf: str
    rating: float
    review: str
    tags: list[str]
    added: date
    read: date | None
    pages: str
    year: str


BOOKS = st.builds(
    Book,
    author=st.sampled_from(["Frank Herbert", "Ursula K. Le Guin", "Émile Zola"]),
    shelf=st.sampled_from(["read", "to-read", "currently-reading", "dnf", *OWN_SHELVES]),
    rating=st.sampled_from([0, 1, 3, 5, 0.25, 3.5, 4.25, 4.75]),
    review=st.just("") | REVIEW,
    tags=st.lists(st.sampled_from(["sf", "in a garden", "é", "read twice"]), unique=True),
    added=DAYS,
    read=st.none() | DAYS,
    pages=st.sampled_from(["", "12", "0", "-3", "1,000", "many", "374.0"]),
    year=st.sampled_from(["", "1965", "32767", "soon", "-720"]),
)
# What happens to a file on its way here.
DAMAGE = st.fixed_dictionaries(
    {
        "blanks": st.booleans(),  # before quotes
        "wrapped": st.sampled_from(["", "rows", "all"]),  # lines quoted as a whole, and ended by `;`
        "joined": st.booleans(),  # the header and the first row on one line
        "dates": st.sampled_from(["%Y/%m/%d", "%d/%m/%y", "%m/%d/%y", "%d.%m.%Y", "%Y-%m-%d"]),
        "bytes": st.booleans(),  # that are not UTF-8
        "long": st.booleans(),  # texts
        "missing": st.booleans(),  # titles or authors, in two rows
        "lines": st.sampled_from(["\n", "\r\n"]),
    }
)


def render(books: list[Book], damage: dict[str, Any]) -> tuple[bytes, list[str]]:
    """The file, and the titles of the books."""

    def shown(day: date | None) -> str:
        return day.strftime(damage["dates"]) if day else ""

    def line(cells: list[str]) -> str:
        buffer = io.StringIO(newline="")
        csv.writer(buffer, lineterminator="").writerow(cells)
        text = buffer.getvalue()
        if damage["blanks"]:  # before each cell: what is within quotes stays
            quoted = [f'"{cell.replace(chr(34), chr(34) * 2)}"' if cell else "" for cell in cells]
            text = cells[0] + "".join(f", {cell}" for cell in quoted[1:])
        return text

    def wrap(text: str) -> str:
        return '"' + text.replace('"', '""') + '";'

    # One date that shows whether the day or the month comes first.
    books = [books[0]._replace(added=date(2020, 3, 31)), *books[1:]]
    titles = [f"Book {n}, the {'first' if n else 'zeroth'}" for n in range(len(books))]
    rows = []
    for n, book in enumerate(books):
        author = ", ".join([book.author] * 120) if damage["long"] and n % 2 else book.author
        review = f"{book.review} " + "word " * 5000 if damage["long"] and not n else book.review
        row = dict.fromkeys(GOODREADS_COLUMNS, "") | {"Book Id": str(n), "Title": titles[n], "Author": author}
        row |= {"My Rating": f"{book.rating:g}", "Exclusive Shelf": book.shelf, "My Review": as_html(review)}
        row |= {"Bookshelves": ", ".join([*book.tags, book.shelf]), "Number of Pages": book.pages, "Owned Copies": "0"}
        row |= {"Private Notes": "élève déjà là"}  # it is UTF-8 for the most part
        row |= {"Original Publication Year": book.year, "Date Added": shown(book.added), "Date Read": shown(book.read)}
        rows.append(row)
    if damage["missing"]:
        rows += [rows[0] | {"Title": " "}, rows[-1] | {"Author": ""}]
    header, lines = line(GOODREADS_COLUMNS), [line([row[name] for name in GOODREADS_COLUMNS]) for row in rows]
    if damage["joined"]:
        header, lines = header + lines[0], lines[1:]
    if damage["wrapped"]:
        lines = [wrap(text) for text in lines]
        header = wrap(header) if damage["wrapped"] == "all" else header
    content = damage["lines"].join([header, *lines, ""]).encode()
    if damage["bytes"]:
        content = content.replace(b", the first", b", the first \xff\xfe")
        titles = [
            title.replace(", the first", ", the first \N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}")
            for title in titles
        ]
    return content, titles


def as_html(text: str) -> str:
    return text.replace("&", "&amp;").replace("\n", "<br/>")


@pytest.mark.slow
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(books=st.lists(BOOKS, min_size=1, max_size=6), damage=DAMAGE)
def test_nothing_that_a_reader_has_said_is_lost(first_start: Path, books: list[Book], damage: dict[str, Any]) -> None:
    content, titles = render(books, damage)
    one, other = two_services(first_start)
    with service(one) as admin:
        upload = admin.upload(content, path="/my-library/import")
        assert (upload["status"], upload["error"]) == ("completed", None)
        counts = [upload[name] for name in ("inserted", "updated", "skipped", "failed")]
        assert (upload["rows"], counts) == (sum(counts), [len(books), 0, 0, 2 * damage["missing"]]), upload["errors"]
        entries = {entry["book"]["title"]: entry for entry in shelf_of(admin)}
        assert entries.keys() == set(titles)
        for n, (title, book) in enumerate(zip(titles, books, strict=True)):
            check(entries[title], book, damage, first=n == 0)
        exported = admin.get("/my-library/export").content
        before = without_ids(shelf_of(admin))
        again = admin.upload(exported, path="/my-library/import", on_duplicate="update")
        assert (again["skipped"], again["errors"]) == (len(books), [])
    with service(other) as admin:
        upload = admin.upload(exported, path="/my-library/import")
        assert (upload["inserted"], upload["errors"]) == (len(books), [])
        assert without_ids(shelf_of(admin)) == before


def check(entry: dict[str, Any], book: Book, damage: dict[str, Any], *, first: bool) -> None:
    status = SHELVES.get(book.shelf.lower().replace(" ", "-"))
    assert entry["status"] == (status or "wishlist")
    assert entry["rating"] == (book.rating or None)
    assert entry["tags"] == [*([] if status else [book.shelf]), *book.tags]
    if damage["long"] and first:
        assert entry["review"].startswith(book.review)
        assert 19_900 < len(entry["review"]) <= 20_000
    else:
        assert entry["review"] == (book.review or None)
    added, read = date(2020, 3, 31) if first else book.added, book.read
    century = 1970 if damage["dates"].endswith("%y") else 0  # the sixties might be those of this century
    assert entry["added_at"] == f"{added}T00:00:00Z" or added.year < century
    assert entry["finished_at"] == (f"{read}T00:00:00Z" if read else None) or (read and read.year < century)
    assert entry["book"]["author"].startswith(book.author)
    pages, year = {"12": 12, "374.0": 374}.get(book.pages), {"1965": 1965, "-720": -720}.get(book.year)
    assert (entry["book"]["pages"], entry["book"]["publication_year"]) == (pages, year)


def shelf_of(person: Person) -> list[dict[str, Any]]:
    return list(person.get("/my-library", params={"sort": "added", "limit": 100}).json()["items"])


# --- one trait each -----------------------------------------------------------------------------------------------

HEADER = (
    "Title,Author,My Rating,Exclusive Shelf,Bookshelves,Date Read,Date Added,Number of Pages,Original Publication Year"
)
FULL = "1,Dune,Frank Herbert,,,,,5,4.2,Ace,,604,1990,1965,2015/03/02,2014/12/24,sf,,read,,,,1,0"
LIBRARYTHING = (
    "Book Id\tTitle\tPrimary Author\tSecondary Author\tPublication\tDate\tReview\tRating\tSummary\tPage Count\t"
    "Date Started\tDate Read\tTags\tCollections\tLanguages\tISBN\tEntry Date\n"
    "1\tHopscotch\tCortázar, Julio\t\tPantheon (1987)\t1987\tOn and on.\t4.5\tHopscotch by Julio Cortázar (1987)\t"
    "576 \t[2007-04-16]\t[2007-05-08]\tnovel, Paris\tYour library\tEnglish\t[0394752848]\t[2006-08-09]\n"
    "2\tGood Omens\tPratchett, Terry\tGaiman, Neil|Homer\t\tc1990\t\t\t\t\t\t\t\tTo read\t\t\t[2020-01-02]\n"
    "3\tEmma\tAusten, Jane\t\t\t1815\t\t\t\t\t[2021-02-03]\t\t\tYour library, Favorites\t\t\t[2021-02-01]\n"
)
BOOKWYRM = (
    "title,author_text,remote_id,isbn_10,isbn_13,start_date,finish_date,stopped_date,rating,review_name,review_cw,"
    "review_content,review_published,shelf,shelf_name,shelf_date\n"
    "Dune,Frank Herbert,https://a.example/1,0441172717,9780441172719,2021-01-02,2021-02-03,,3.5,Sand,,<p>And worms.</p>"
    ",2021-02-04,read,Read,2020-12-01\n"
    "Emma,Jane Austen,https://a.example/2,,,2022-01-01,,2022-01-09,,,,,,stopped-reading,Stopped Reading,2022-01-01\n"
    '"A, B","C D, E F",https://a.example/3,,,,,,4,,,,,classics-12,Classics,2022-03-01\n'
)
OF_DUNE = {"title": "Dune", "author": "Frank Herbert", "status": "completed", "rating": 5, "pages": 604}
TRAITS: dict[str, tuple[str, list[dict[str, Any]], list[tuple[int, str, str]]]] = {
    "0 pages, and a year that is none": (
        f"{HEADER}\nDune,A,4.25,trash,,,2020/01/02,0,32767\n",
        [{"rating": 4.25, "status": "wishlist", "tags": ["trash"], "pages": None, "publication_year": None}],
        [
            (2, "Number of Pages", "0 is not a number of pages; left out"),
            (2, "Original Publication Year", "32767 is not a year of publication; left out"),
        ],
    ),
    "two-digit years, day first by another row": (
        f"{HEADER}\nA,B,0,read,,8/1/23,31/3/22,,\nC,D,0,read,,1/2/49,1/2/50,,\n",
        [
            {"finished_at": None, "added_at": "1950-02-01T00:00:00Z"},
            {"finished_at": "2023-01-08T00:00:00Z", "added_at": "2022-03-31T00:00:00Z"},
        ],
        [(3, "Date Read", "1/2/49 has a year of two digits, which may be in another century; left out")],
    ),
    "two-digit years in either order": (
        f"{HEADER}\nA,B,0,read,,8/1/23,2022/01/01,,\n",
        [{"finished_at": None, "status": "completed"}],
        [
            (
                2,
                "Date Read",
                "8/1/23 may be day first or month first, and no other date of the file shows which; left out",
            )
        ],
    ),
    "a rating between quarters": (
        f"{HEADER}\nA,B,4.3,read,,,2022/01/01,,\nC,D,7,read,,,2022/01/02,,\n",
        [{"rating": 4.25}, {"rating": None}],
        [
            (2, "My Rating", "4.3 is no quarter of a star: 4.25 instead"),
            (3, "My Rating", "7 is not a rating from 0.25 to 5; left out"),
        ],
    ),
    "a long tag, and many": (
        f'{HEADER}\nA,B,0,read,"{"long " * 12},{",".join(f"t{n}" for n in range(60))}",,2022/01/01,,\n',
        [{"tags": ["long " * 9 + "long", *(f"t{n}" for n in range(49))]}],
        [
            (2, "Bookshelves", "has more than 50 characters: this was cut off"),
            (2, "Bookshelves", "more than 50 tags: these were left out"),
        ],
    ),
    "blanks before quotes, and header names with blanks": (
        'Title  , Author,"My Rating" ,  Exclusive Shelf\n"Raintree County"   , "Lockridge, Ross", 4, "read"\n',
        [{"title": "Raintree County", "author": "Lockridge, Ross", "rating": 4, "status": "completed"}],
        [],
    ),
    "lines that are quoted as a whole": (
        '"Title,Author,My Rating,Exclusive Shelf";\n"""A, B"",C,3.75,""dropped""";\n"D,E,0,paused";\n',
        [
            {"title": "A, B", "author": "C", "rating": 3.75, "status": "abandoned", "tags": []},
            {"title": "D", "status": "reading", "tags": []},
        ],
        [],
    ),
    "rows that are quoted as a whole below a header that is not": (
        'Title,Author,My Rating,Exclusive Shelf\n"A,B,5,read"\n"C,""D, E"",1,read"\n',
        [{"title": "A", "rating": 5}, {"title": "C", "author": "D, E", "rating": 1}],
        [],
    ),
    "header and first row on one line": (
        f"{','.join(GOODREADS_COLUMNS)}{FULL}\n{FULL.replace('Dune', 'Emma')}\n",
        [OF_DUNE, OF_DUNE | {"title": "Emma"}],
        [],
    ),
    "blanks and semicolons as Excel has them": (
        'sep=;\nTitle;Author;My Rating;Exclusive Shelf;My Review\nA;B;4,5;read;"one\ntwo"\n',
        [{"rating": 4.5, "review": "one\ntwo"}],
        [],
    ),
    "no shelf, by its dates": (
        f"{HEADER}\nA,B,0,,,2020/01/02,2020/01/01,,\nC,D,0,,,,2020/01/02,,\n",
        [{"status": "completed"}, {"status": "wishlist"}],
        [],
    ),
    "StoryGraph, with several readings and paragraphs": (
        "Title,Authors,ISBN/UID,Read Status,Star Rating,Review,Last Date Read,Dates Read\n"
        'A,B,,read,4.25,"<p>One &amp; <b>two</b></p><ul><li>a</li><li>b</li></ul>",2023/03/01,'
        '"2023/02/20-2023/03/01, 2021/09/14, 2020/01/01-2020/02/02"\n'
        'C,D,,read,5,"<div>See <https://e.org/x>,</div><DIV>a<b and 1<2</DIV>",,'
        '"2020/01/01-2020/02/02, 2019/01/01-2019/01/02"\n'
        'E,F,,currently-reading,,,2020/02/02,"2019/01/01-2020/02/02, 2024/05/06-"\n'
        "G,H,,read,,,2021/09/14,2020/01/01-2020/02/02\n",
        [
            {
                **{"review": "One & two\na\nb", "rating": 4.25},
                **{"started_at": "2023-02-20T00:00:00Z", "finished_at": "2023-03-01T00:00:00Z"},
            },
            {
                "review": "See <https://e.org/x>,\na<b and 1<2",
                **{"started_at": "2020-01-01T00:00:00Z", "finished_at": "2020-02-02T00:00:00Z"},
            },
            {"status": "reading", "started_at": "2024-05-06T00:00:00Z", "finished_at": "2020-02-02T00:00:00Z"},
            {"started_at": None, "finished_at": "2021-09-14T00:00:00Z"},
        ],
        [],
    ),
    "LibraryThing": (
        LIBRARYTHING,
        [
            {
                **{"title": "Hopscotch", "author": "Julio Cortázar", "isbn": "9780394752846", "publication_year": 1987},
                **{"pages": 576, "language": "English", "description": None, "publisher": None},
                **{"status": "completed", "rating": 4.5, "review": "On and on.", "started_at": "2007-04-16T00:00:00Z"},
                **{"tags": ["Your library", "novel", "Paris"], "finished_at": "2007-05-08T00:00:00Z"},
                "added_at": "2006-08-09T00:00:00Z",
            },
            {
                **{"title": "Good Omens", "author": "Terry Pratchett, Neil Gaiman, Homer"},
                **{"status": "wishlist", "tags": [], "publication_year": None},
            },
            {"title": "Emma", "author": "Jane Austen", "status": "reading", "tags": ["Your library", "Favorites"]},
        ],
        [(3, "Date", "c1990 is not a date like 2008-08-11; left out")],
    ),
    "BookWyrm": (
        BOOKWYRM,
        [
            {
                **{"title": "Dune", "author": "Frank Herbert", "isbn": "9780441172719", "status": "completed"},
                **{"rating": 3.5, "review": "Sand\n\nAnd worms.", "finished_at": "2021-02-03T00:00:00Z"},
                "added_at": "2020-12-01T00:00:00Z",
            },
            {"title": "Emma", "status": "abandoned", "finished_at": "2022-01-09T00:00:00Z", "tags": []},
            {"title": "A, B", "author": "C D, E F", "status": "wishlist", "rating": 4, "tags": ["classics-12"]},
        ],
        [],
    ),
}


@pytest.mark.parametrize(("content", "entries", "warnings"), TRAITS.values(), ids=TRAITS)
def test_each_shelf_is_read(
    reader: Person,
    content: str,
    entries: list[dict[str, Any]],
    warnings: list[tuple[int, str, str]],
) -> None:
    upload = reader.upload(content, path="/my-library/import")
    assert (upload["error"], upload["rows"], upload["inserted"]) == (None, len(entries), len(entries))
    assert [(e["row"], e["field"], e["message"]) for e in upload["errors"]] == warnings
    assert {error["severity"] for error in upload["errors"]} <= {"warning"}
    for entry, expected in zip(shelf_of(reader), entries, strict=True):
        assert (entry["book"] | entry).items() >= expected.items()


def test_goodreads_columns_without_their_header_are_recognised(reader: Person) -> None:
    upload = reader.upload(f"{FULL}\n{FULL}\n", path="/my-library/import")
    assert upload["status"] == "failed"
    assert upload["error"].startswith("This looks like Goodreads' columns without their header.")
    header = upload["error"].rsplit(": ", 1)[1]
    assert reader.upload(f"{header}\n{FULL}\n", path="/my-library/import")["inserted"] == 1


def test_a_quoted_cell_with_a_line_break_is_no_row(reader: Person) -> None:
    upload = reader.upload('title,author\n"A,B\nC,D"\nE,F\n')
    assert (upload["status"], upload["inserted"]) == ("completed", 2)
    assert [(error["row"], error["message"]) for error in upload["errors"]] == [
        (2, "a quote in this row does not close where it should")
    ]


def test_text_that_is_cut_off_is_in_the_warning(reader: Person) -> None:
    author, review = ", ".join(f"Author {n}" for n in range(100)), " ".join(f"word{n}" for n in range(3000))
    content = f'Title,Author,My Rating,Exclusive Shelf,My Review\nA,"{author}",4,read,{review}\n'
    upload = reader.upload(content, path="/my-library/import")
    (entry,) = shelf_of(reader)
    cut = {"Author": (entry["book"]["author"], author), "My Review": (entry["review"], review)}
    for error in upload["errors"]:
        stored, whole = cut.pop(error["field"])
        assert "this was cut off" in error["message"]
        assert whole.startswith(stored)
        assert whole[len(stored) :].strip(" ,").startswith(error["value"].rsplit(" ", 1)[0])
    assert cut == {}


def test_an_update_without_a_status_keeps_the_one_that_is_known(reader: Person) -> None:
    """LibraryThing's collections need not say whether a book was read."""
    row = "Title\tPrimary Author\tCollections\tRating\nEmma\tJane Austen\tYour library\t\n"
    reader.upload(row, path="/my-library/import")
    assert shelf_of(reader)[0]["status"] == "wishlist"
    reader.patch("/my-library/1", json={"status": "completed", "rating": 5})
    upload = reader.upload(row, path="/my-library/import", on_duplicate="update")
    assert (upload["updated"], upload["skipped"]) == (0, 1)
    assert shelf_of(reader)[0]["status"] == "completed"


def test_a_second_reading_of_a_book_is_in_a_warning(reader: Person) -> None:
    """A shelf has one entry of a book; readers list another edition to read it again."""
    header = "Title,Author,My Rating,Exclusive Shelf,My Review"
    rows = f"{header}\nEmma,Jane Austen,4,read,First\nEmma,Jane Austen,2,read,Second\nEmma,Jane Austen,0,to-read,\n"
    for dry_run in (True, False, False):
        upload = reader.upload(rows, path="/my-library/import", dry_run=dry_run)
        assert [(error["row"], error["value"], error["message"]) for error in upload["errors"]] == [
            (3, "Emma,Jane Austen,2,read,Second", "is about the same book as an earlier row, and was left out")
        ]
        assert upload["warnings"] == 1
    assert [entry["review"] for entry in shelf_of(reader)] == ["First"]


def test_an_unreadable_page_is_left_out(reader: Person) -> None:
    content = "Title,Author,My Rating,Exclusive Shelf,Current Page\nA,B,0,currently-reading,many\nC,D,0,read,12\n"
    upload = reader.upload(content, path="/my-library/import")
    assert [(error["field"], error["value"]) for error in upload["errors"]] == [("Current Page", "many")]
    assert {entry["book"]["title"]: entry["page"] for entry in shelf_of(reader)} == {"A": None, "C": 12}


def test_documented_columns_are_those_that_are_read() -> None:
    table = (ROOT / "docs" / "files.md").read_text().split("| | Goodreads |")[1].split("\n\n")[0]
    columns = [line.split("|")[2:6] for line in table.splitlines()[2:]]
    for n, name in enumerate(SHELF_FORMATS):
        documented = set(column_keys(re.findall("`(.+?)`", " ".join(cells[n] for cells in columns))))
        own = {key for names in SHELF_ALIASES.values() for key in names[n].split()} - {"-", *column_keys(OUR_COLUMNS)}
        assert own <= documented <= {key for names in FORMATS[name].values() for key in names}
