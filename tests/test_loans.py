"""Stock and loans, also with concurrent borrowers."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient
from sqlalchemy.exc import IntegrityError

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
    """Advance the clock, and sign them in again."""
    clock.advance(**span)
    for person in people:
        person.tokens = Person(person.client, person.username).tokens


def loan_ids(person: Person, **query: Any) -> list[int]:
    answer = person.get("/loans", params=query)
    assert answer.status_code == 200, answer.text
    return [loan["id"] for loan in answer.json()["items"]]


# --- stock --------------------------------------------------------------------------------------------------------


def test_copies_can_be_added_and_removed(client: TestClient, librarian: Person) -> None:
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
        pytest.param(-3, 409, id="copies on loan"),
        pytest.param(-MAX_COPIES, 409, id="more than all"),
        pytest.param(0, 422, id="zero"),
        pytest.param(-MAX_COPIES - 1, 422, id="below the minimum"),
        pytest.param(MAX_COPIES, 422, id="sum above the maximum"),
        pytest.param(10**30, 422, id="out of range"),
        pytest.param(1.5, 422, id="fraction"),
        pytest.param(None, 422, id="null"),
        pytest.param("many", 422, id="word"),
    ],
)
def test_invalid_changes_of_stock_are_refused(librarian: Person, book: int, quantity: Any, status: int) -> None:
    lend(librarian, book)
    answer = librarian.post(f"/books/{book}/stock", json={"quantity": quantity})
    assert answer.status_code == status
    if status == 422:
        assert answer.json()["errors"][0]["loc"][-1] == "quantity"
    else:
        assert answer.json()["detail"] == "1 of 3 are on loan: 2 can be removed."
    assert stock_of(librarian, book) == (3, 2, 1)


@pytest.mark.parametrize(
    ("copies", "status", "left"),
    [
        pytest.param(5, 200, (5, 4, 1), id="more"),
        pytest.param(3, 200, (3, 2, 1), id="as many"),
        pytest.param(1, 200, (1, 0, 1), id="only those on loan"),
        pytest.param(MAX_COPIES, 200, (MAX_COPIES, MAX_COPIES - 1, 1), id="the maximum"),
        pytest.param(0, 409, (3, 2, 1), id="fewer than are on loan"),
        pytest.param(-1, 422, (3, 2, 1), id="negative"),
        pytest.param(MAX_COPIES + 1, 422, (3, 2, 1), id="above the maximum"),
        pytest.param("3", 422, (3, 2, 1), id="text"),
        pytest.param(None, 422, (3, 2, 1), id="null"),
    ],
)
def test_copies_can_be_set(librarian: Person, book: int, copies: Any, status: int, left: tuple[int, ...]) -> None:
    lend(librarian, book)
    assert librarian.put(f"/books/{book}/stock", json={"copies": copies}).status_code == status
    assert stock_of(librarian, book) == left


def test_changes_of_stock_change_the_etag(client: TestClient, reader: Person, librarian: Person) -> None:
    book = stocked(librarian, 2)
    path = f"/books/{book}"
    for person, address, body in (
        (librarian, f"{path}/stock", {"quantity": 1}),
        (reader, "/loans", {"book_id": book}),
        (reader, "/loans/1/return", None),
    ):
        before = client.get(path)
        person.post(address, json=body)
        after = client.get(path, headers={"If-None-Match": before.headers["ETag"]})
        assert after.status_code == 200
        assert after.json()["version"] == before.json()["version"] + 1
    assert (after.json()["copies"], after.json()["available"]) == (3, 3)


def test_available_lists_only_books_with_a_copy_to_lend(client: TestClient, reader: Person, librarian: Person) -> None:
    book = stocked(librarian, 1)
    librarian.add_book()
    here = {"available": True}
    assert [found["id"] for found in client.get("/books", params=here).json()["items"]] == [book]
    lend(reader, book)
    assert client.get("/books", params=here).json()["total"] == 0


# --- borrowing ----------------------------------------------------------------------------------------------------


def test_a_loan_is_due_in_21_days(client: TestClient, clock: Clock, reader: Person, book: int) -> None:
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


def test_loan_days_sets_the_default_and_the_maximum(
    clock: Clock, reader: Person, book: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "loan_days", 7)
    assert lend(reader, book)["due_at"] == iso(clock.now + timedelta(days=7))
    longest = iso(clock.now + timedelta(days=14))
    assert lend(reader, book, due_at=longest)["due_at"] == longest
    too_long = iso(clock.now + timedelta(days=14, seconds=1))
    assert reader.post("/loans", json={"book_id": book, "due_at": too_long}).status_code == 422


REFUSED: dict[str, tuple[dict[str, Any], int]] = {
    "more than available": ({"quantity": 4}, 409),
    "quantity 0": ({"quantity": 0}, 422),
    "negative quantity": ({"quantity": -10}, 422),
    "quantity out of range": ({"quantity": 10**30}, 422),
    "due now": ({"due_at": timedelta()}, 422),
    "due yesterday": ({"due_at": timedelta(days=-1)}, 422),
    "due too late": ({"due_at": timedelta(days=42, seconds=1)}, 422),
    "due in the year 9999": ({"due_at": "9999-12-31T23:59:59Z"}, 422),
    "word as time": ({"due_at": "soon"}, 422),
    "unknown book": ({"book_id": 999}, 404),
    "null book": ({"book_id": None}, 422),
    "for another user": ({"user_id": 1}, 403),
    "unknown field": ({"returned_at": "2026-01-01"}, 422),
}


@pytest.mark.parametrize(("fields", "status"), REFUSED.values(), ids=REFUSED)
def test_invalid_loans_are_refused(
    clock: Clock, reader: Person, book: int, fields: dict[str, Any], status: int
) -> None:
    ((name, value),) = fields.items()
    body = {name: iso(clock.now + value) if isinstance(value, timedelta) else value}
    answer = reader.post("/loans", json={"book_id": book, **body})
    assert answer.status_code == status, answer.text
    if status == 422:
        assert answer.json()["errors"][0]["loc"][:2] == ["body", name]
    assert stock_of(reader, book) == (3, 3, 0)
    assert loan_ids(reader) == []


def test_staff_can_lend_to_a_reader(admin: Person, reader: Person, librarian: Person, book: int) -> None:
    rita = reader.get("/users/me").json()["id"]
    loan = lend(librarian, book, user_id=rita)
    assert (loan["user_id"], loan["username"]) == (rita, "Rita")
    assert loan_ids(reader) == [loan["id"]]
    assert lend(reader, book, user_id=rita)["username"] == "Rita", "a reader may name themselves"
    for person in (librarian, admin):
        assert person.post(f"/loans/{loan['id']}/renew").json()["renewals"] in (1, 2)
    assert librarian.post(f"/loans/{loan['id']}/return").json()["status"] == "returned"
    assert librarian.post("/loans", json={"book_id": book, "user_id": 999}).status_code == 404
    admin.patch(f"/users/{rita}", json={"is_active": False})
    assert librarian.post("/loans", json={"book_id": book, "user_id": rita}).status_code == 409
    assert stock_of(librarian, book) == (3, 2, 1)


# --- lists --------------------------------------------------------------------------------------------------------


def test_loans_of_others_are_404(
    reader: Person, other_reader: Person, librarian: Person, book: int, client: TestClient
) -> None:
    loan = lend(reader, book)
    path = f"/loans/{loan['id']}"
    for method, address in (("GET", path), ("POST", f"{path}/return"), ("POST", f"{path}/renew")):
        existing, unknown = (
            other_reader.request(method, address.replace(path, other)) for other in (path, "/loans/999")
        )
        assert existing.status_code == unknown.status_code == 404
        assert existing.text.replace(existing.headers["X-Request-ID"], unknown.headers["X-Request-ID"]) == unknown.text
        assert client.request(method, address).status_code == 401
    assert loan_ids(other_reader) == []
    assert other_reader.get("/loans", params={"user_id": loan["user_id"]}).status_code == 403
    assert loan_ids(librarian) == loan_ids(reader, user_id=loan["user_id"]) == [loan["id"]]


def test_loans_can_be_filtered_by_status_and_borrower_and_paged(
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
    assert loan_ids(librarian, status="overdue") == [], "not yet at due_at itself"
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


def test_a_loan_can_be_returned_once(client: TestClient, clock: Clock, reader: Person, book: int) -> None:
    loan = f"/loans/{lend(reader, book, quantity=3)['id']}"
    later(clock, reader, days=30)
    assert reader.get(loan).json()["status"] == "overdue"
    returned = reader.post(f"{loan}/return")
    assert returned.status_code == 200, "also when it is overdue"
    assert returned.json().items() >= {"status": "returned", "returned_at": iso(clock.now)}.items()
    assert reader.get(loan).json() == returned.json()
    for what in ("return", "renew"):
        assert reader.post(f"{loan}/{what}").status_code == 409
    assert stock_of(client, book) == (3, 3, 0)


def test_a_loan_can_be_renewed_twice_from_its_due_date(clock: Clock, reader: Person, book: int) -> None:
    start = clock.now
    loan = f"/loans/{lend(reader, book)['id']}"
    for number in (1, 2):
        later(clock, reader, days=20)
        renewed = reader.post(f"{loan}/renew")
        assert renewed.status_code == 200
        assert renewed.json().items() >= {"renewals": number, "status": "active"}.items()
        assert renewed.json()["due_at"] == iso(start + timedelta(days=21 * (number + 1)))
    third = reader.post(f"{loan}/renew")
    assert (third.status_code, third.json()["detail"]) == (409, "This loan was renewed 2 times, the maximum.")
    assert reader.get(loan).json() == renewed.json()


def test_an_overdue_loan_can_not_be_renewed(clock: Clock, reader: Person, librarian: Person, book: int) -> None:
    loan = f"/loans/{lend(reader, book)['id']}"
    later(clock, reader, librarian, days=21, seconds=1)
    for person in (reader, librarian):
        answer = person.post(f"{loan}/renew")
        assert (answer.status_code, answer.json()["detail"]) == (409, "This loan is overdue: it can't be renewed.")


def test_events_of_a_loan(client: TestClient, reader: Person, other_reader: Person, book: int) -> None:
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


# --- deleting -------------------------------------------------------------------------------


def test_a_book_on_loan_can_not_be_deleted(reader: Person, librarian: Person, book: int) -> None:
    first, second = (lend(reader, book)["id"] for _ in range(2))
    reader.post(f"/loans/{first}/return")
    answer = librarian.delete(f"/books/{book}")
    assert answer.status_code == 409
    assert answer.json()["detail"] == "1 of its copies are on loan: have them returned first."
    reader.post(f"/loans/{second}/return")
    assert librarian.delete(f"/books/{book}").status_code == 204


def test_loans_outlive_their_book_and_keep_its_title(
    client: TestClient, reader: Person, other_reader: Person, librarian: Person, book: int
) -> None:
    kept = stocked(librarian, 1, title="Emma", isbn=None)
    borrowed = [lend(reader, book, quantity=2), lend(other_reader, book), lend(reader, kept)]
    for loan in borrowed:
        librarian.post(f"/loans/{loan['id']}/return")
    librarian.patch(f"/books/{book}", json={"title": "Dune Messiah"})
    before = librarian.get("/loans").json()
    assert librarian.delete(f"/books/{book}").status_code == 204
    for loan in before["items"]:
        loan["book_id"] = kept if loan["book_id"] == kept else None
    assert librarian.get("/loans").json() == before
    emma, others, mine = before["items"]
    assert mine.items() >= {"title": "Dune Messiah", "book_id": None, "quantity": 2, "status": "returned"}.items()
    assert reader.get("/loans").json()["items"] == [emma, mine]
    assert other_reader.get(f"/loans/{others['id']}").json() == others
    assert reader.get("/users/me/export").json()["loans"] == [mine, emma]
    for what in ("return", "renew"):
        assert reader.post(f"/loans/{mine['id']}/{what}").status_code == 409
    assert reader.delete("/users/me", json={"password": PASSWORD}).status_code == 204
    assert librarian.get("/loans").json()["items"] == [others]


def test_no_book_is_deleted_without_its_title_in_its_loans(reader: Person, book: int) -> None:
    reader.post(f"/loans/{lend(reader, book)['id']}/return")
    with pytest.raises(IntegrityError) as failure:
        database.write_sync(lambda session: session.execute(sa.text("DELETE FROM book")))
    assert database.violation(failure.value) == ("check", "title")


Stock = Callable[[Person, Person, int], object]
STOCK_OF_A_BOOK: dict[str, tuple[Stock, int]] = {
    "never": (lambda _reader, _librarian, _book: None, 204),
    "refused": (lambda _reader, staff, book: staff.post(f"/books/{book}/stock", json={"quantity": -1}), 204),
    "now": (lambda _reader, staff, book: staff.post(f"/books/{book}/stock", json={"quantity": 1}), 409),
    "removed": (
        lambda _reader, staff, book: [staff.post(f"/books/{book}/stock", json={"quantity": n}) for n in (2, -2)],
        409,
    ),
    "lent, returned and removed": (
        lambda reader, staff, book: [
            staff.post(f"/books/{book}/stock", json={"quantity": 1}),
            reader.post("/loans", json={"book_id": book}),
            reader.post("/loans/1/return"),
            staff.post(f"/books/{book}/stock", json={"quantity": -1}),
        ],
        409,
    ),
}


@pytest.mark.parametrize(("stock", "status"), STOCK_OF_A_BOOK.values(), ids=STOCK_OF_A_BOOK)
def test_only_staff_delete_a_book_that_ever_had_copies(
    client: TestClient, reader: Person, other_reader: Person, librarian: Person, stock: Stock, status: int
) -> None:
    path = f"/books/{reader.add_book()['id']}"
    stock(other_reader, librarian, 1)
    before = client.get(path).json()
    answer = reader.delete(path)
    assert answer.status_code == status, answer.text
    if status == 409:
        assert answer.json()["detail"] == "This book has or had copies to lend: only librarians and admins delete it."
        assert client.get(path).json() == before
        assert librarian.delete(path).status_code == 204


def test_an_account_with_open_loans_can_not_be_deleted(
    client: TestClient, admin: Person, reader: Person, book: int
) -> None:
    rita = reader.get("/users/me").json()["id"]
    returned, unreturned = (lend(reader, book)["id"] for _ in range(2))
    reader.post(f"/loans/{returned}/return")
    for answer in (reader.delete("/users/me", json={"password": PASSWORD}), admin.delete(f"/users/{rita}")):
        assert answer.status_code == 409
        assert answer.json()["detail"] == f"Return what is on loan first: loan {unreturned} (Dune)."
    assert reader.get("/users/me").status_code == 200
    admin.post(f"/loans/{unreturned}/return")
    assert reader.delete("/users/me", json={"password": PASSWORD}).status_code == 204
    assert loan_ids(admin) == []
    assert stock_of(client, book) == (3, 3, 0)


def test_at_most_ten_open_loans_are_named(reader: Person, librarian: Person) -> None:
    book = stocked(librarian, 12)
    for _ in range(12):
        lend(reader, book)
    detail = reader.delete("/users/me", json={"password": PASSWORD}).json()["detail"]
    assert detail.count("loan ") == 11  # "on loan" is one of them
    assert detail.endswith("loan 10 (Dune), ….")


def test_the_account_export_has_my_loans(reader: Person, other_reader: Person, book: int) -> None:
    for person in (reader, other_reader, reader):
        lend(person, book)
    reader.post("/loans/1/return")
    assert reader.get("/users/me/export").json()["loans"] == reader.get("/loans").json()["items"][::-1]


# --- concurrency --------------------------------------------------------------------------------------------------

Crowd = Callable[[int], list[Person]]


@pytest.fixture
def crowd(client: TestClient, serve: Callable[..., Server]) -> Crowd:
    """That many readers, in turn on two servers with one database."""

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
    query = sa.text("SELECT coalesce(sum(quantity), 0) FROM loan WHERE book_id = :book AND returned_at IS NULL")
    return int(database.read_sync(lambda connection: connection.execute(query, {"book": book}).scalar_one()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("borrowers", "copies"),
    [pytest.param(50, 3, id="50 borrowers of 3 copies"), pytest.param(30, 10, id="30 borrowers of 10 copies")],
)
def test_concurrent_borrowers_never_get_more_than_all_copies(
    crowd: Crowd, librarian: Person, borrowers: int, copies: int
) -> None:
    book = stocked(librarian, copies)
    answers = at_once(crowd(borrowers), "/loans", json={"book_id": book})
    assert answers == [201] * copies + [409] * (borrowers - copies)
    assert stock_of(librarian, book) == (copies, 0, copies)
    assert on_loan(book) == copies
    assert librarian.get("/loans").json()["total"] == copies


@pytest.mark.slow
def test_concurrent_requests_renew_a_loan_twice_and_return_it_once(crowd: Crowd, librarian: Person) -> None:
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
def test_concurrent_borrowing_and_removal_keep_the_stock_consistent(crowd: Crowd, librarian: Person) -> None:
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
