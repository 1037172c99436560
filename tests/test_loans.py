"""The lending desk: nobody gets a copy that is not there, and none is ever lost."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient

import database
from models import MAX_COPIES
from settings import settings
from tests.fixtures import DUNE, PASSWORD, Clock, Person, Server, make


@pytest.fixture
def book(librarian: Person) -> int:
    """With three copies."""
    return stocked(librarian, 3)


def stocked(librarian: Person, copies: int, **fields: Any) -> int:
    book = librarian.add_book(**{**DUNE, **fields})["id"]
    assert librarian.post(f"/books/{book}/stock", json={"quantity": copies}).status_code == 200
    return int(book)


def stock_of(client: Any, book: int) -> tuple[int, int, int]:
    stock = client.get(f"/books/{book}/stock").json()
    return stock["copies"], stock["available"], stock["on_loan"]


def lend(person: Person, book: int, **fields: Any) -> dict[str, Any]:
    answer = person.post("/loans", json={"book_id": book, **fields})
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def iso(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")


def later(clock: Clock, *people: Person, **span: float) -> None:
    """Time passes, and they sign in again."""
    clock.advance(**span)
    for person in people:
        person.tokens = Person(person.client, person.username).tokens


def loan_ids(person: Person, **query: Any) -> list[int]:
    answer = person.get("/loans", params=query)
    assert answer.status_code == 200, answer.text
    return [loan["id"] for loan in answer.json()["items"]]


# --- stock --------------------------------------------------------------------------------------------------------


def test_copies_come_and_go(client: TestClient, librarian: Person) -> None:
    book = librarian.add_book()["id"]
    assert stock_of(client, book) == (0, 0, 0)
    for quantity, left in ((5, 5), (-2, 3), (-3, 0), (1, 1)):
        changed = librarian.post(f"/books/{book}/stock", json={"quantity": quantity})
        assert changed.json() == {"copies": left, "available": left, "on_loan": 0}
        assert stock_of(client, book) == (left, left, 0)
    assert client.get("/books/999/stock").status_code == 404
    assert librarian.post("/books/999/stock", json={"quantity": 1}).status_code == 404


@pytest.mark.parametrize(
    ("quantity", "status"),
    [
        pytest.param(-3, 409, id="one that is on loan"),
        pytest.param(-MAX_COPIES, 409, id="far more than there are"),
        pytest.param(0, 422, id="none"),
        pytest.param(-MAX_COPIES - 1, 422, id="too few for any shelf"),
        pytest.param(MAX_COPIES, 422, id="too many together"),
        pytest.param(10**30, 422, id="more than a database can count"),
        pytest.param(1.5, 422, id="half a copy"),
        pytest.param(None, 422, id="null"),
        pytest.param("many", 422, id="a word"),
    ],
)
def test_copies_do_not_change_by(librarian: Person, book: int, quantity: Any, status: int) -> None:
    lend(librarian, book)
    answer = librarian.post(f"/books/{book}/stock", json={"quantity": quantity})
    assert answer.status_code == status
    if status == 422:
        assert answer.json()["errors"][0]["loc"][-1] == "quantity"
    else:
        assert answer.json()["detail"] == "1 of 3 copies are on loan: they can't be removed."
    assert stock_of(librarian, book) == (3, 2, 1)


def test_what_a_book_shows_of_its_copies_has_its_version(client: TestClient, reader: Person, librarian: Person) -> None:
    """Otherwise whoever keeps the book by its ETag would never hear of it."""
    book = stocked(librarian, 2)
    path = f"/books/{book}"
    for person, where, body in (
        (librarian, f"{path}/stock", {"quantity": 1}),
        (reader, "/loans", {"book_id": book}),
        (reader, "/loans/1/return", None),
    ):
        before = client.get(path)
        person.post(where, json=body)
        after = client.get(path, headers={"If-None-Match": before.headers["ETag"]})
        assert after.status_code == 200
        assert after.json()["version"] == before.json()["version"] + 1
    assert (after.json()["copies"], after.json()["available"]) == (3, 3)


def test_only_books_with_a_copy_here_are_available(client: TestClient, reader: Person, librarian: Person) -> None:
    book = stocked(librarian, 1)
    librarian.add_book()
    here = {"available": True}
    assert [found["id"] for found in client.get("/books", params=here).json()["items"]] == [book]
    lend(reader, book)
    assert client.get("/books", params=here).json()["total"] == 0


# --- borrowing ----------------------------------------------------------------------------------------------------


def test_a_loan_is_for_three_weeks(client: TestClient, clock: Clock, reader: Person, book: int) -> None:
    answer = reader.post("/loans", json={"book_id": book, "quantity": 2})
    assert (answer.status_code, answer.headers["Location"]) == (201, "/loans/1")
    assert (
        answer.json()
        == reader.get("/loans/1").json()
        == {
            "id": 1,
            "user_id": reader.get("/users/me").json()["id"],
            "username": "Rita",
            "book_id": book,
            "title": "Dune",
            "quantity": 2,
            "borrowed_at": iso(clock.now),
            "due_at": iso(clock.now + timedelta(days=21)),
            "returned_at": None,
            "renewals": 0,
            "status": "active",
        }
    )
    assert stock_of(client, book) == (3, 1, 2)


def test_how_long_a_loan_is_can_be_set(
    clock: Clock, reader: Person, book: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "loan_days", 7)
    assert lend(reader, book)["due_at"] == iso(clock.now + timedelta(days=7))
    longest = iso(clock.now + timedelta(days=14))
    assert lend(reader, book, due_at=longest)["due_at"] == longest
    too_long = iso(clock.now + timedelta(days=14, seconds=1))
    assert reader.post("/loans", json={"book_id": book, "due_at": too_long}).status_code == 422


REFUSED: dict[str, tuple[dict[str, Any], int]] = {
    "more than there are": ({"quantity": 4}, 409),
    "none": ({"quantity": 0}, 422),
    "minus ten": ({"quantity": -10}, 422),
    "more than a database can count": ({"quantity": 10**30}, 422),
    "due now": ({"due_at": timedelta()}, 422),
    "due yesterday": ({"due_at": timedelta(days=-1)}, 422),
    "due too late": ({"due_at": timedelta(days=42, seconds=1)}, 422),
    "due at the end of time": ({"due_at": "9999-12-31T23:59:59Z"}, 422),
    "due at no time": ({"due_at": "soon"}, 422),
    "an unknown book": ({"book_id": 999}, 404),
    "no book": ({"book_id": None}, 422),
    "for somebody else": ({"user_id": 1}, 403),
    "returned already": ({"returned_at": "2026-01-01"}, 422),
}


@pytest.mark.parametrize(("fields", "status"), REFUSED.values(), ids=REFUSED)
def test_nothing_is_lent(clock: Clock, reader: Person, book: int, fields: dict[str, Any], status: int) -> None:
    ((name, value),) = fields.items()
    asked = {name: iso(clock.now + value) if isinstance(value, timedelta) else value}
    answer = reader.post("/loans", json={"book_id": book, **asked})
    assert answer.status_code == status, answer.text
    if status == 422:
        assert answer.json()["errors"][0]["loc"][:2] == ["body", name]
    assert stock_of(reader, book) == (3, 3, 0)
    assert loan_ids(reader) == []


def test_staff_lend_to_a_reader(admin: Person, reader: Person, librarian: Person, book: int) -> None:
    rita = reader.get("/users/me").json()["id"]
    loan = lend(librarian, book, user_id=rita)
    assert (loan["user_id"], loan["username"]) == (rita, "Rita")
    assert loan_ids(reader) == [loan["id"]]
    assert lend(reader, book, user_id=rita)["username"] == "Rita", "who says that it is for themselves is right"
    for person in (librarian, admin):
        assert person.post(f"/loans/{loan['id']}/renew").json()["renewals"] in (1, 2)
    assert librarian.post(f"/loans/{loan['id']}/return").json()["status"] == "returned"
    assert librarian.post("/loans", json={"book_id": book, "user_id": 999}).status_code == 404
    admin.patch(f"/users/{rita}", json={"is_active": False})
    assert librarian.post("/loans", json={"book_id": book, "user_id": rita}).status_code == 409
    assert stock_of(librarian, book) == (3, 2, 1)


# --- lists --------------------------------------------------------------------------------------------------------


def test_the_loans_of_others_are_not_there(
    reader: Person, other_reader: Person, librarian: Person, book: int, client: TestClient
) -> None:
    loan = lend(reader, book)
    path = f"/loans/{loan['id']}"
    for method, where in (("GET", path), ("POST", f"{path}/return"), ("POST", f"{path}/renew")):
        mine, unknown = (other_reader.request(method, where.replace(path, asked)) for asked in (path, "/loans/999"))
        assert mine.status_code == unknown.status_code == 404
        assert mine.json() == unknown.json()
        assert client.request(method, where).status_code == 401
    assert loan_ids(other_reader) == []
    assert other_reader.get("/loans", params={"user_id": loan["user_id"]}).status_code == 403
    assert loan_ids(librarian) == loan_ids(reader, user_id=loan["user_id"]) == [loan["id"]]


def test_loans_by_status_borrower_and_page(
    clock: Clock, reader: Person, other_reader: Person, librarian: Person
) -> None:
    book = stocked(librarian, 9)
    rita = reader.get("/users/me").json()["id"]
    late = lend(reader, book, due_at=iso(clock.now + timedelta(minutes=5)))["id"]
    back = lend(reader, book)["id"]
    out = lend(reader, book)["id"]
    others = lend(other_reader, book)["id"]
    reader.post(f"/loans/{back}/return")
    assert loan_ids(librarian, status="active") == [others, out, late]
    clock.advance(minutes=5)
    assert loan_ids(librarian, status="overdue") == [], "until its moment has passed"
    clock.advance(seconds=1)
    found = {"active": [others, out], "overdue": [late], "returned": [back]}
    for status, ids in found.items():
        page = librarian.get("/loans", params={"status": status}).json()
        assert [(loan["id"], loan["status"]) for loan in page["items"]] == [(number, status) for number in ids]
        assert page["total"] == len(ids)
    assert loan_ids(librarian) == [others, out, back, late]
    assert loan_ids(librarian, user_id=rita) == loan_ids(reader) == [out, back, late]
    assert loan_ids(reader, status="active") == [out]
    assert loan_ids(librarian, user_id=rita, status="overdue") == [late]
    first = librarian.get("/loans", params={"limit": 3})
    second = librarian.get(first.links["next"]["url"]).json()
    assert [loan["id"] for loan in first.json()["items"] + second["items"]] == [others, out, back, late]
    assert (first.json()["total"], second["next"]) == (4, None)
    assert int(first.headers["X-Event-Cursor"]) == reader.get("/events?limit=100").json()["items"][-1]["id"]
    for query in ({"status": "lost"}, {"user_id": 0}, {"user_id": 10**30}, {"book_id": 1}):
        assert librarian.get("/loans", params=query).status_code == 422


# --- returning, renewing ------------------------------------------------------------------------------------------


def test_a_loan_is_returned_once(client: TestClient, clock: Clock, reader: Person, book: int) -> None:
    loan = f"/loans/{lend(reader, book, quantity=3)['id']}"
    later(clock, reader, days=30)
    assert reader.get(loan).json()["status"] == "overdue"
    returned = reader.post(f"{loan}/return")
    assert returned.status_code == 200, "late is better than never"
    assert returned.json().items() >= {"status": "returned", "returned_at": iso(clock.now)}.items()
    assert reader.get(loan).json() == returned.json()
    for what in ("return", "renew"):
        assert reader.post(f"{loan}/{what}").status_code == 409
    assert stock_of(client, book) == (3, 3, 0)


def test_a_loan_is_renewed_twice_from_the_day_it_is_due(clock: Clock, reader: Person, book: int) -> None:
    start = clock.now
    loan = f"/loans/{lend(reader, book)['id']}"
    for number in (1, 2):
        later(clock, reader, days=20)
        renewed = reader.post(f"{loan}/renew")
        assert renewed.status_code == 200
        assert renewed.json().items() >= {"renewals": number, "status": "active"}.items()
        assert renewed.json()["due_at"] == iso(start + timedelta(days=21 * (number + 1)))
    third = reader.post(f"{loan}/renew")
    assert (third.status_code, third.json()["detail"]) == (409, "This loan was renewed 2 times: that is all.")
    assert reader.get(loan).json() == renewed.json()


def test_an_overdue_loan_is_not_renewed(clock: Clock, reader: Person, librarian: Person, book: int) -> None:
    loan = f"/loans/{lend(reader, book)['id']}"
    later(clock, reader, librarian, days=21, seconds=1)
    for person in (reader, librarian):
        answer = person.post(f"{loan}/renew")
        assert (answer.status_code, answer.json()["detail"]) == (409, "This loan is overdue: it can't be renewed.")


def test_what_a_loan_tells(client: TestClient, reader: Person, other_reader: Person, book: int) -> None:
    start = client.get("/events").json()["next"]
    loan = lend(reader, book)
    for what in ("renew", "return", "return"):
        reader.post(f"/loans/{loan['id']}/{what}")
    query = {"after": start, "types": "book.*,loan.*"}
    public = client.get("/events", params=query).json()["items"]
    assert public == other_reader.get("/events", params=query).json()["items"]
    shown = {"id": book, "title": "Dune", "copies": 3}
    assert [(event["type"], event["data"]) for event in public] == [
        ("book.stock", {**shown, "available": 2, "on_loan": 1, "version": 3}),
        ("book.stock", {**shown, "available": 3, "on_loan": 0, "version": 4}),
    ]
    mine = reader.get("/events", params=query).json()["items"]
    kinds = ["book.stock", "loan.created", "loan.renewed", "book.stock", "loan.returned"]
    assert [event["type"] for event in mine] == kinds
    assert mine[1]["data"] == loan
    assert [event["data"]["status"] for event in mine if event["type"] != "book.stock"] == [
        "active",
        "active",
        "returned",
    ]


# --- what can't go while it is lent -------------------------------------------------------------------------------


def test_a_book_that_is_lent_can_not_be_deleted(reader: Person, librarian: Person, book: int) -> None:
    first, second = (lend(reader, book)["id"] for _ in range(2))
    reader.post(f"/loans/{first}/return")
    answer = librarian.delete(f"/books/{book}")
    assert answer.status_code == 409
    assert answer.json()["detail"] == "1 of its copies are on loan: have them returned first."
    reader.post(f"/loans/{second}/return")
    assert librarian.delete(f"/books/{book}").status_code == 204
    assert loan_ids(librarian) == [], "closed loans go with the book"


def test_an_account_that_has_copies_can_not_be_deleted(
    client: TestClient, admin: Person, reader: Person, book: int
) -> None:
    rita = reader.get("/users/me").json()["id"]
    returned, kept = (lend(reader, book)["id"] for _ in range(2))
    reader.post(f"/loans/{returned}/return")
    for answer in (reader.delete("/users/me", json={"password": PASSWORD}), admin.delete(f"/users/{rita}")):
        assert answer.status_code == 409
        assert answer.json()["detail"] == f"Return what is on loan first: loan {kept} (Dune)."
    assert reader.get("/users/me").status_code == 200
    admin.post(f"/loans/{kept}/return")
    assert reader.delete("/users/me", json={"password": PASSWORD}).status_code == 204
    assert loan_ids(admin) == []
    assert stock_of(client, book) == (3, 3, 0)


def test_no_more_than_ten_open_loans_are_named(reader: Person, librarian: Person) -> None:
    book = stocked(librarian, 12)
    for _ in range(12):
        lend(reader, book)
    detail = reader.delete("/users/me", json={"password": PASSWORD}).json()["detail"]
    assert detail.count("loan ") == 11  # "on loan" is one of them
    assert detail.endswith("loan 10 (Dune), ….")


def test_my_loans_are_in_my_export(reader: Person, other_reader: Person, book: int) -> None:
    for person in (reader, other_reader, reader):
        lend(person, book)
    reader.post("/loans/1/return")
    assert reader.get("/users/me/export").json()["loans"] == reader.get("/loans").json()["items"][::-1]


# --- all at once --------------------------------------------------------------------------------------------------

Crowd = Callable[[int], list[Person]]


@pytest.fixture
def crowd(client: TestClient, serve: Callable[..., Server]) -> Crowd:
    """So many readers, who ask two processes on one database file in turn."""

    def gather(count: int) -> list[Person]:
        people = [make(client, f"reader{number}") for number in range(count)]
        with ThreadPoolExecutor(2) as pool:
            servers = list(pool.map(lambda _: serve(), range(2)))
        for number, person in enumerate(people):
            person.client = servers[number % 2].client
        return people

    return gather


def at_once(people: list[Person], path: str, **options: Any) -> list[int]:
    with ThreadPoolExecutor(len(people)) as pool:
        return sorted(pool.map(lambda person: person.post(path, **options).status_code, people))


def on_loan(book: int) -> int:
    """By the loans themselves."""
    query = sa.text("SELECT coalesce(sum(quantity), 0) FROM loan WHERE book_id = :book AND returned_at IS NULL")
    return int(database.read_sync(lambda connection: connection.execute(query, {"book": book}).scalar_one()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("borrowers", "copies"), [pytest.param(50, 3, id="fifty for three"), pytest.param(30, 10, id="thirty for ten")]
)
def test_no_copy_is_lent_twice(crowd: Crowd, librarian: Person, borrowers: int, copies: int) -> None:
    book = stocked(librarian, copies)
    answers = at_once(crowd(borrowers), "/loans", json={"book_id": book})
    assert answers == [201] * copies + [409] * (borrowers - copies)
    assert stock_of(librarian, book) == (copies, 0, copies)
    assert on_loan(book) == copies
    assert librarian.get("/loans").json()["total"] == copies


@pytest.mark.slow
def test_at_many_desks_at_once_a_loan_is_renewed_twice_and_returned_once(crowd: Crowd, librarian: Person) -> None:
    book = stocked(librarian, 10)
    desks = crowd(4)
    for desk in desks[1:]:
        desk.tokens = desks[0].tokens
    for number in range(1, 9):
        due_at = datetime.fromisoformat(lend(desks[0], book, quantity=number)["due_at"])
        assert at_once(desks, f"/loans/{number}/renew") == [200, 200, 409, 409]
        loan = desks[0].get(f"/loans/{number}").json()
        assert (loan["renewals"], datetime.fromisoformat(loan["due_at"])) == (2, due_at + timedelta(days=42))
        assert at_once(desks, f"/loans/{number}/return") == [200, 409, 409, 409]
    assert stock_of(librarian, book) == (10, 10, 0)


@pytest.mark.slow
def test_copies_are_not_removed_while_they_are_taken(crowd: Crowd, librarian: Person) -> None:
    book = stocked(librarian, 10)
    people = crowd(16)
    desk = Person(people[0].client, "", tokens=librarian.tokens)

    def act(number: int) -> int:
        if number % 2:
            return desk.post(f"/books/{book}/stock", json={"quantity": -1}).status_code
        return people[number].post("/loans", json={"book_id": book}).status_code

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(act, range(16)))
    assert len([status for status in answers if status != 409]) == 10
    copies, available, out = stock_of(librarian, book)
    assert (copies, available, out) == (10 - answers.count(200), 0, answers.count(201))
    assert on_loan(book) == out
