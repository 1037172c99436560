"""My account, all that is stored about me, and administration."""

import json
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2 as httpx
import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient
from sqlmodel import Session

import csv_files
import database
import events
import main
import models
import security
import users
from accounts import Email
from models import Principal
from schemas import UserPublic
from settings import check_database_url, settings
from tests.fixtures import (
    DUNE,
    NEW,
    PASSWORD,
    Clock,
    Person,
    Server,
    code_in,
    make,
    sign_up,
    token_in,
    url_of,
    wait_for,
)

# --- my account ---------------------------------------------------------------------------------------------------

NEW_ADDRESS = {"email": "new@example.com", "current_password": PASSWORD}
ACCEPT_JSON = {"Accept": "application/json"}


@pytest.fixture
def confirmed(client: TestClient, mailbox: list[Email]) -> Person:
    """Rita, who has confirmed her address."""
    rita = sign_up(client, "rita")
    assert confirm(client, mailbox.pop()) == 200
    return rita


def confirm(client: httpx.Client, email: Email) -> int:
    return client.post(f"/auth/verify-email/{token_in(email)}").status_code


def last_to(address: str, mailbox: list[Email]) -> Email:
    return [email for email in mailbox if email.to == address][-1]


def reset(client: httpx.Client, mailbox: list[Email], address: str, password: str) -> int:
    client.post("/auth/forgot-password", json={"email": address})
    body = {"email": address, "otp": code_in(last_to(address, mailbox)), "new_password": password}
    return client.post("/auth/reset-password", json=body).status_code


def login(client: httpx.Client, name: str, password: str = PASSWORD) -> int:
    return client.post("/login", json={"username": name, "password": password}).status_code


def test_i_can_change_my_name(reader: Person) -> None:
    assert reader.patch("/users/me", json={"full_name": "Rita R."}).json()["full_name"] == "Rita R."
    changed = reader.patch("/users/me", json={"email": "RITA@example.com", "full_name": None}).json()
    assert (changed["email"], changed["full_name"], changed["pending_email"]) == ("rita@example.com", None, None)


@pytest.mark.parametrize(
    ("change", "status"),
    [
        pytest.param({"role": "admin"}, 422, id="my role"),
        pytest.param({"is_active": False}, 422, id="whether I am active"),
        pytest.param({"username": "root"}, 422, id="my user name"),
        pytest.param({"pending_email": "new@example.com"}, 422, id="my pending address"),
        pytest.param({"email": None, "current_password": PASSWORD}, 422, id="no address"),
        pytest.param({"email": "admin@example.com", "current_password": PASSWORD}, 409, id="somebody else's address"),
        pytest.param({"email": "new@example.com"}, 403, id="without my password"),
        pytest.param({"email": "new@example.com", "current_password": None}, 403, id="null as password"),
        pytest.param({"email": "new@example.com", "current_password": ""}, 403, id="an empty password"),
        pytest.param({"email": "new@example.com", "current_password": "wrong password"}, 403, id="a wrong password"),
        pytest.param({"email": "new@example.com", "current_password": 12345678}, 422, id="a number as password"),
        pytest.param({"email": "new@example.com", "current_password": "x\0"}, 422, id="a password with NUL"),
        pytest.param({"email": "new@example.com", "current_password": "x" * 1001}, 422, id="a huge password"),
        pytest.param({"email": ["new@example.com"], "current_password": PASSWORD}, 422, id="a list of addresses"),
        pytest.param({"email": "new@example.com\0", "current_password": PASSWORD}, 422, id="an address with NUL"),
        pytest.param({"email": f"{'x' * 300}@example.com", "current_password": PASSWORD}, 422, id="a huge address"),
    ],
)
def test_i_can_not_change(reader: Person, mailbox: list[Email], change: dict[str, Any], status: int) -> None:
    before = reader.get("/users/me").json()
    answer = reader.patch("/users/me", json={**change, "full_name": "Another"})
    assert answer.status_code == status
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert reader.get("/users/me").json() == before
    assert mailbox == []


def test_an_address_in_use_names_the_field(reader: Person) -> None:
    answer = reader.patch("/users/me", json={"email": "Admin@Example.com", "current_password": PASSWORD})
    assert (answer.json()["detail"], answer.json()["errors"][0]["loc"]) == ("This email is taken.", ["body", "email"])


def test_a_new_address_changes_nothing_until_it_is_confirmed(
    client: TestClient, confirmed: Person, mailbox: list[Email]
) -> None:
    before = confirmed.get("/users/me").json()
    change = {"email": " New@Example.com ", "current_password": PASSWORD, "full_name": "Rita R."}
    changed = confirmed.patch("/users/me", json=change).json()
    assert changed == {**before, "pending_email": "new@example.com", "full_name": "Rita R."}
    notice, link = mailbox
    assert (notice.to, link.to) == ("rita@example.com", "new@example.com")
    assert "new@example.com" in notice.text
    assert "verify-email" not in notice.text
    assert confirmed.get("/users/me").json() == changed
    assert (login(client, "rita@example.com"), login(client, "new@example.com")) == (200, 401)
    for address in ("new@example.com", "rita@example.com"):
        client.post("/auth/forgot-password", json={"email": address})
    assert [email.to for email in mailbox[2:]] == ["rita@example.com"]
    types = "account.email_verified,account.email_change_requested,account.email_changed"
    events = confirmed.get("/events", params={"types": types}).json()["items"]
    assert [event["type"] for event in events] == ["account.email_verified", "account.email_change_requested"]
    assert events[1]["data"] == {"old": "rita@example.com", "new": "new@example.com", "by": changed["id"]}


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_confirming_a_new_address_moves_the_account_to_it(
    client: TestClient, clock: Clock, confirmed: Person, mailbox: list[Email], method: str
) -> None:
    before = confirmed.patch("/users/me", json=NEW_ADDRESS).json()
    link = f"/auth/verify-email/{token_in(mailbox[-1])}"
    clock.advance(minutes=5)
    answer = client.request(method, link, headers=ACCEPT_JSON)
    after = confirmed.get("/users/me").json()
    assert answer.json() == {"email": "new@example.com", "email_verified_at": after["email_verified_at"]}
    assert after["email_verified_at"] > before["email_verified_at"]
    assert after == {**before, **answer.json(), "pending_email": None}
    assert (login(client, "rita@example.com"), login(client, "new@example.com")) == (401, 200)
    assert client.request(method, link, headers=ACCEPT_JSON).status_code == 404
    client.post("/auth/register", json={**NEW, "username": "another"})
    assert last_to("rita@example.com", mailbox).subject == "Confirm your e-mail address", "the old one is free"
    events = confirmed.get("/events", params={"types": "account.email_changed"}).json()["items"]
    assert [event["data"] for event in events] == [
        {"old": "rita@example.com", "new": "new@example.com", "by": after["id"]}
    ]


def test_codes_to_the_old_address_end_when_the_new_one_is_confirmed(
    client: TestClient, confirmed: Person, mailbox: list[Email], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accounts.REFUSAL_SECONDS", 0)
    confirmed.patch("/users/me", json=NEW_ADDRESS)
    client.post("/auth/forgot-password", json={"email": "rita@example.com"})
    code = code_in(mailbox[-1])
    assert confirm(client, last_to("new@example.com", mailbox)) == 200
    for address in ("rita@example.com", "new@example.com"):
        body = {"email": address, "otp": code, "new_password": "another horse"}
        assert client.post("/auth/reset-password", json=body).status_code == 400
    assert reset(client, mailbox, "new@example.com", "another horse") == 204


@pytest.mark.parametrize("later", ["later@example.com", "new@example.com"], ids=["another address", "the same address"])
def test_a_later_change_of_address_replaces_the_earlier_one(
    client: TestClient, confirmed: Person, mailbox: list[Email], later: str
) -> None:
    confirmed.patch("/users/me", json=NEW_ADDRESS)
    first = mailbox[-1]
    changed = confirmed.patch("/users/me", json={**NEW_ADDRESS, "email": later}).json()
    assert changed["pending_email"] == later
    assert confirm(client, first) == 404
    assert confirm(client, last_to(later, mailbox)) == 200
    assert confirmed.get("/users/me").json()["email"] == later


@pytest.mark.parametrize("spelling", ["rita@example.com", " RITA@example.com "])
def test_the_present_address_cancels_a_change_of_address(
    client: TestClient, confirmed: Person, mailbox: list[Email], spelling: str
) -> None:
    before = confirmed.get("/users/me").json()
    confirmed.patch("/users/me", json=NEW_ADDRESS)
    assert confirmed.patch("/users/me", json={"email": spelling}).json() == before
    assert len(mailbox) == 2
    assert confirm(client, mailbox[-1]) == 404
    client.post("/auth/verify-email", json={"email": "new@example.com"})
    assert len(mailbox) == 2
    assert confirmed.get("/users/me").json() == before


def reset_password(admin: Person, rita: Person, mailbox: list[Email]) -> None:
    assert reset(rita.client, mailbox, "rita@example.com", "another horse") == 204


def change_password(admin: Person, rita: Person, mailbox: list[Email]) -> None:
    body = {"current_password": PASSWORD, "new_password": "another horse"}
    assert rita.post("/auth/change-password", json=body).status_code == 204


def switch_off_and_on(admin: Person, rita: Person, mailbox: list[Email]) -> None:
    for is_active in (False, True):
        assert admin.patch("/users/2", json={"is_active": is_active}).status_code == 200


Cancel = Callable[[Person, Person, list[Email]], None]


@pytest.mark.parametrize("cancel", [reset_password, change_password, switch_off_and_on])
def test_a_new_password_and_deactivation_cancel_all_that_was_mailed(
    client: TestClient, admin: Person, mailbox: list[Email], monkeypatch: pytest.MonkeyPatch, cancel: Cancel
) -> None:
    """Somebody who knew the old password may have requested it. The mail to the old address says so."""
    monkeypatch.setattr("accounts.REFUSAL_SECONDS", 0)
    rita = sign_up(client, "rita")
    rita.patch("/users/me", json=NEW_ADDRESS)
    client.post("/auth/forgot-password", json={"email": "rita@example.com"})
    link, notice, pending_link, code = mailbox
    assert "A new password cancels the change." in notice.text
    cancel(admin, rita, mailbox)
    assert (confirm(client, link), confirm(client, pending_link)) == (404, 404)
    body = {"email": "rita@example.com", "otp": code_in(code), "new_password": "a third horse"}
    assert client.post("/auth/reset-password", json=body).status_code == 400
    mailbox.clear()
    client.post("/auth/verify-email", json={"email": "new@example.com"})
    assert mailbox == [], "no account waits for the new address"
    me = admin.get("/users/2").json()
    assert (me["email"], me["pending_email"]) == ("rita@example.com", None)


@pytest.mark.parametrize("is_active", [False, True], ids=["deactivated", "reactivated"])
def test_the_link_to_an_address_that_is_set_with_the_deactivation_is_valid(
    client: TestClient, admin: Person, reader: Person, mailbox: list[Email], is_active: bool
) -> None:
    admin.patch("/users/2", json={"is_active": not is_active})
    admin.patch("/users/2", json={"is_active": is_active, "email": "new@example.com"})
    assert confirm(client, mailbox[-1]) == 200


def test_an_unconfirmed_address_can_be_confirmed_beside_a_pending_one(client: TestClient, mailbox: list[Email]) -> None:
    rita = sign_up(client, "rita")
    rita.patch("/users/me", json=NEW_ADDRESS)
    first, _, second = mailbox
    assert confirm(client, first) == 200
    me = rita.get("/users/me").json()
    assert (me["email"], me["email_verified_at"] is None, me["pending_email"]) == (
        *("rita@example.com", False),
        "new@example.com",
    )
    assert confirm(client, second) == 200
    assert rita.get("/users/me").json()["email"] == "new@example.com"


def test_links_to_an_address_end_when_the_account_has_left_it(client: TestClient, mailbox: list[Email]) -> None:
    rita = sign_up(client, "rita")
    rita.patch("/users/me", json=NEW_ADDRESS)
    first, _, second = mailbox
    assert confirm(client, second) == 200
    assert confirm(client, first) == 404
    me = rita.get("/users/me").json()
    assert (me["email"], me["email_verified_at"] is None) == ("new@example.com", False)


def test_another_link_to_a_pending_address_can_be_requested(
    client: TestClient, clock: Clock, confirmed: Person, mailbox: list[Email]
) -> None:
    confirmed.patch("/users/me", json=NEW_ADDRESS)
    clock.advance(hours=25)
    assert confirm(client, mailbox[-1]) == 404
    client.post("/auth/verify-email", json={"email": "new@example.com"})
    assert confirm(client, mailbox[-1]) == 200
    assert login(client, "new@example.com") == 200


TAKERS: dict[str, Callable[[Person, Person], httpx.Response]] = {
    "by a registration": lambda admin, other: other.client.post(
        "/auth/register", json={**NEW, "username": "another", "email": "new@example.com"}
    ),
    "by an account that an admin makes": lambda admin, other: admin.post(
        "/users", json={**NEW, "username": "another", "email": "new@example.com"}
    ),
    "by an account that an admin changes": lambda admin, other: admin.patch(
        "/users/2", json={"email": "new@example.com"}
    ),
}


@pytest.mark.parametrize("take", TAKERS.values(), ids=TAKERS)
def test_a_pending_address_can_be_taken_before_it_is_confirmed(
    client: TestClient,
    other_reader: Person,
    confirmed: Person,
    admin: Person,
    mailbox: list[Email],
    take: Callable[[Person, Person], httpx.Response],
) -> None:
    other_reader.patch("/users/me", json=NEW_ADDRESS)
    before = confirmed.patch("/users/me", json=NEW_ADDRESS).json()
    link = mailbox[-1]
    assert take(admin, other_reader).status_code in (200, 201)
    for headers in ({}, {"Accept": "text/html"}):
        answer = client.post(f"/auth/verify-email/{token_in(link)}", headers=headers)
        assert (answer.status_code, answer.json()["detail"]) == (409, "This email is taken.")
    assert confirmed.get("/users/me").json() == before
    assert "409" in client.get("/openapi.json").json()["paths"]["/auth/verify-email/{token}"]["get"]["responses"]
    client.post("/auth/verify-email", json={"email": "new@example.com"})
    assert '"rita"' not in mailbox[-1].text, "the account that has the address comes first"


def test_of_two_accounts_the_first_to_confirm_gets_the_address(
    client: TestClient, confirmed: Person, other_reader: Person, mailbox: list[Email]
) -> None:
    links = []
    for person in (confirmed, other_reader):
        assert person.patch("/users/me", json=NEW_ADDRESS).json()["pending_email"] == "new@example.com"
        links.append(mailbox[-1])
    assert (confirm(client, links[1]), confirm(client, links[0])) == (200, 409)
    assert other_reader.get("/users/me").json()["email"] == "new@example.com"
    assert confirmed.get("/users/me").json()["email"] == "rita@example.com"
    assert confirmed.patch("/users/me", json=NEW_ADDRESS).status_code == 409
    assert confirmed.get("/users/me").json()["pending_email"] == "new@example.com", "a refused change cancels nothing"


def test_a_new_address_need_not_be_confirmed_for_the_next_sign_in(
    client: TestClient, confirmed: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "require_verified_email", True)
    confirmed.patch("/users/me", json=NEW_ADDRESS)
    assert login(client, "rita") == 200
    refresh = {"refresh_token": confirmed.tokens["refresh_token"]}
    assert client.post("/auth/refresh", json=refresh).status_code == 200


@pytest.mark.slow
def test_concurrent_confirmations_of_one_address_give_it_to_one_account(server: Server) -> None:
    """Ten accounts wait for one address; each of their links is opened twice."""
    people = [sign_up(server.client, f"reader{number}") for number in range(10)]
    for person in people:
        assert person.patch("/users/me", json=NEW_ADDRESS).status_code == 200
    mails = r"Mail to new@example.com: (?s:.*?)/auth/verify-email/([\w-]+)\n"
    tokens = wait_for(lambda: found if len(found := re.findall(mails, server.log.read_text())) == 10 else None)

    def attempt(token: str) -> int:
        return server.client.post(f"/auth/verify-email/{token}").status_code

    with ThreadPoolExecutor(20) as pool:
        answers = sorted(pool.map(attempt, tokens * 2))
    assert answers == [200, 404] + [409] * 18
    owners = [person for person in people if person.get("/users/me").json()["email"] == "new@example.com"]
    assert len(owners) == 1
    assert server.client.post("/login", json={"username": "new@example.com", "password": PASSWORD}).status_code == 200


def test_deleting_my_account_needs_my_password(client: TestClient, reader: Person, mailbox: list[Email]) -> None:
    assert reader.delete("/users/me").status_code == 422
    assert reader.delete("/users/me", json={"password": "wrong password"}).status_code == 403
    assert reader.get("/users/me").status_code == 200
    assert reader.delete("/users/me", json={"password": PASSWORD}).status_code == 204
    assert reader.get("/users/me").status_code == 401
    assert client.post("/login", json={"username": "rita", "password": PASSWORD}).status_code == 401
    assert [email.subject for email in mailbox] == ["Your account was deleted"]


def test_personal_data_is_deleted_with_the_account_and_books_stay(
    client: TestClient, reader: Person, other_reader: Person, admin: Person
) -> None:
    book = reader.add_book(**DUNE)
    shelf = f"/my-library/{book['id']}"
    for person, rating in ((reader, 1), (other_reader, 5)):
        person.post(shelf)
        person.patch(shelf, json={"status": "completed", "rating": rating, "review": "So."})
    reader.upload("title,author\nEmma,Jane Austen\n")
    start = client.get("/events", params={"limit": 100}).json()["next"]
    assert reader.delete("/users/me", json={"password": PASSWORD}).status_code == 204

    left = client.get(f"/books/{book['id']}").json()
    assert (left["rating"], left["rating_count"], left["added_by"]) == (5.0, 1, None)
    assert left["version"] > book["version"]
    assert [review["username"] for review in client.get(f"/books/{book['id']}/reviews").json()["items"]] == ["Oskar"]
    assert client.get("/books", params={"search": "emma"}).json()["total"] == 1
    assert admin.get("/books/upload").json()["total"] == 0
    assert other_reader.patch(f"/books/{book['id']}", json={"title": "Mine"}).status_code == 403
    recorded = client.get("/events", params={"after": start}).json()["items"]
    assert [(event["type"], event["data"]) for event in recorded] == [
        ("reviews.deleted", {"count": 1, "first_book_id": 1, "last_book_id": 1}),
        ("books.updated", {"count": 2, "first_id": 1, "last_id": 2}),
    ]
    seen = admin.get("/events", params={"after": start, "types": "account.deleted"}).json()["items"]
    assert [event["data"] for event in seen] == [{"user_id": 2, "username": "Rita", "by": 2}]
    reviews = client.get("/events", params={"types": "review.created", "limit": 100}).json()["items"]
    assert {event["data"].get("username") for event in reviews} == {"Oskar"}, "another Rita may register"


def test_streams_drop_the_reviews_of_a_deleted_account(reader: Person) -> None:
    book = reader.add_book()
    reader.post(f"/my-library/{book['id']}", json={"status": "completed"})
    reader.patch(f"/my-library/{book['id']}", json={"rating": 4})
    wait_for(lambda: any(b'"Rita"' in event.frame for event in events.tail.buffer) or None)
    assert reader.request("DELETE", "/users/me", json={"password": PASSWORD}).status_code == 204
    wait_for(lambda: any(event.type == "account.deleted" for event in events.tail.buffer) or None)
    assert not [event for event in events.tail.buffer if event.type.startswith("review.")]
    assert events.tail.start < events.tail.buffer[0].id


def test_the_name_of_a_deleted_account_can_be_registered_again(client: TestClient, reader: Person) -> None:
    reader.delete("/users/me", json={"password": PASSWORD})
    again = sign_up(client, "rita")
    assert again.get("/users/me").json()["id"] > 2
    assert again.get("/my-library").json()["total"] == 0
    assert reader.get("/users/me").status_code == 401


def test_the_export_has_all_that_is_stored_about_me(client: TestClient, reader: Person, other_reader: Person) -> None:
    book = reader.add_book(**DUNE)
    reader.post(f"/my-library/{book['id']}", json={"status": "reading"})
    reader.patch(f"/my-library/{book['id']}", json={"status": "completed", "rating": 4, "review": "Sand."})
    reader.upload("title,author\nEmma,Jane Austen\nNobody's,\n", "my books.csv")
    other_reader.post(f"/my-library/{book['id']}")
    answer = reader.get("/users/me/export")
    assert answer.headers["Content-Disposition"] == 'attachment; filename="books-api-Rita.json"'
    stored = answer.json()
    assert stored["exported_at"].endswith("Z")
    assert stored["account"] == reader.get("/users/me").json()
    assert stored["shelf"] == reader.get("/my-library").json()["items"]
    assert stored["loans"] == []
    assert stored["sessions"] == reader.get("/auth/sessions").json()["items"]
    assert [added["title"] for added in stored["books_added"]] == ["Dune", "Emma"]
    assert [upload["filename"] for upload in stored["uploads"]] == ["my books.csv"]
    assert [(error["row"], error["field"]) for error in stored["upload_errors"]] == [(3, "author")]
    assert {event["type"] for event in stored["events"]} == {
        "account.login",
        "shelf.created",
        "shelf.updated",
        "upload.progress",
        "review.created",
    }
    assert "argon2" not in answer.text
    assert "Oskar" not in answer.text


# --- large accounts -----------------------------------------------------------------------------------------------


def wrong_figures(connection: sa.Connection) -> int:
    """Of how many books the counts differ from what is on the shelves."""
    ratings = "FROM shelf_entry WHERE book_id = book.id"
    wrong = (
        f"rating_count <> (SELECT count(rating) {ratings}) OR rating_sum <> (SELECT coalesce(sum(rating), 0) {ratings})"
    )
    return int(connection.exec_driver_sql(f"SELECT count(*) FROM book WHERE {wrong}").scalar_one())


def import_shelf(person: Person, size: int) -> None:
    header = "Title,Author,My Rating,Exclusive Shelf"
    file = "\n".join([header, *(f"Book {number},Somebody,{1 + number % 5},read" for number in range(size))])
    assert person.upload(file, path="/my-library/import")["inserted"] == size


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(users, "MAX_BOOKS", 2)
    monkeypatch.setattr(models, "MAX_ROWS", 3)


@pytest.mark.usefixtures("small_batches")
def test_a_large_account_is_gone_at_once_and_its_rows_in_batches(
    client: TestClient, admin: Person, reader: Person, other_reader: Person
) -> None:
    import_shelf(reader, 5)
    for book in range(1, 6):
        other_reader.post(f"/my-library/{book}", json={"status": "completed"})
        other_reader.patch(f"/my-library/{book}", json={"rating": 2})
    reader.patch("/my-library/5", json={"rating": None, "review": "No stars."})
    start = client.get("/events", params={"limit": 100}).json()["next"]
    assert reader.delete("/users/me", json={"password": PASSWORD}).status_code == 204

    assert client.get("/books/1/reviews").json()["total"] == 2, "the rest is still there"
    for method, path in (("GET", "/users/me"), ("POST", "/books"), ("PATCH", "/my-library/1"), ("GET", "/stream")):
        assert reader.request(method, path).status_code == 401
    assert client.post("/auth/refresh", json={"refresh_token": reader.tokens["refresh_token"]}).status_code == 401
    assert {login(client, name) for name in ("rita", "rita@example.com", "deleted 2")} == {401}
    for method, body in (("GET", None), ("PATCH", {"is_active": True}), ("DELETE", None)):
        assert admin.request(method, "/users/2", json=body).status_code == 404
    assert [user["username"] for user in admin.get("/users").json()["items"]] == ["admin", "Oskar"]
    assert admin.get("/users", params={"search": "deleted"}).json()["total"] == 0
    again = sign_up(client, "rita")
    again.post("/my-library/1", json={"status": "completed"})
    again.patch("/my-library/1", json={"rating": 5})

    assert client.portal is not None
    client.portal.call(main.delete_accounts)
    assert database.read_sync(users.deleted_accounts) == []
    assert database.read_sync(wrong_figures) == 0
    assert client.get("/books/5").json().items() >= {"rating": 2.0, "rating_count": 1, "added_by": None}.items()
    recorded = client.get("/events", params={"after": start, "types": "books.*,reviews.*"}).json()["items"]
    reviews, disowned = [
        [tuple(event["data"].values()) for event in recorded if event["type"] == kind]
        for kind in ("reviews.deleted", "books.updated")
    ]
    assert reviews == [(2, 1, 2), (2, 3, 4), (1, 5, 5)]
    assert [count for count, _, _ in disowned] == [2, 2, 1]
    assert (min(first for _, first, _ in disowned), max(last for _, _, last in disowned)) == (1, 5)
    logged = client.get("/events", params={"types": "review.created,review.updated", "limit": 100}).json()["items"]
    assert {(event["data"]["username"], event["data"]["book_id"]) for event in logged} == {
        *(("Oskar", book) for book in range(1, 6)),
        ("rita", 1),
    }
    assert again.get("/my-library").json()["total"] == 1
    assert len(admin.get("/events", params={"types": "account.deleted"}).json()["items"]) == 1


@pytest.mark.usefixtures("small_batches")
def test_an_import_ends_with_its_account(client: TestClient, reader: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    deleted = []

    def delete_and_detect(file: Any, detect: Any = csv_files.detect_dialect) -> Any:
        deleted.append(reader.delete("/users/me", json={"password": PASSWORD}).status_code)
        return detect(file)

    monkeypatch.setattr(csv_files, "detect_dialect", delete_and_detect)
    reader.post("/books/upload", files={"file": ("a.csv", b"title,author\nDune,Frank Herbert\n", "text/csv")})
    assert deleted == [204]
    assert client.get("/books").json()["total"] == 0


@pytest.mark.usefixtures("small_batches")
def test_an_export_goes_on_while_the_account_is_deleted(client: TestClient, reader: Person) -> None:
    import_shelf(reader, 5)
    user = database.read_sync(security._find_principal, 2, 1, 0)
    assert user is not None
    pieces = users.export_account(user, UserPublic(**reader.get("/users/me").json()))
    text = next(pieces) + next(pieces)
    assert reader.delete("/users/me", json={"password": PASSWORD}).status_code == 204
    assert json.loads(text + "".join(pieces)).keys() == users.AccountExport.model_fields.keys()


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_killed_service_goes_on_with_the_deletion(serve: Callable[..., Server], workers: str) -> None:
    server = serve("--workers", workers)
    rita = sign_up(server.client, "rita")
    import_shelf(rita, 2000)
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(rita.delete, "/users/me", json={"password": PASSWORD}) for _ in range(8)]
    assert sorted({answer.result().status_code for answer in answers}) == [204, 401]
    assert sum(answer.result().status_code == 204 for answer in answers) == 1
    server.close()
    server.start()
    assert login(server.client, "rita") == 401
    engine = sa.create_engine(check_database_url(url_of(server.file)))

    def count(table: str, condition: str) -> int:
        with engine.connect() as connection:
            return int(connection.exec_driver_sql(f"SELECT count(*) FROM {table} WHERE {condition}").scalar_one())

    wait_for(lambda: count('"user"', "id = 2") == 0 or None, seconds=60)
    assert [count(table, condition) for table, condition in LEFT.items()] == [0] * len(LEFT)
    with engine.connect() as connection:
        assert wrong_figures(connection) == 0
    engine.dispose()
    recorded = server.client.get("/events", params={"types": "reviews.deleted,books.updated", "limit": 100}).json()
    for kind in ("reviews.deleted", "books.updated"):
        assert sum(event["data"]["count"] for event in recorded["items"] if event["type"] == kind) == 2000


@pytest.mark.sqlite
def test_deleted_accounts_are_found_by_an_index(client: TestClient) -> None:
    def plan(session: Session) -> str:
        session.execute(sa.text("UPDATE user SET email = 'deleted 2' WHERE id = 2"))
        statements: list[str] = []
        driver: Any = session.connection().connection.dbapi_connection
        driver.set_trace_callback(statements.append)
        assert users.deleted_accounts(session.connection()) == [2]
        driver.set_trace_callback(None)
        return str(session.execute(sa.text(f"EXPLAIN QUERY PLAN {statements[0]}")).all())

    for name in ("deleted", "deletee", "reader"):
        make(client, name)
    assert "SEARCH user USING" in database.write_sync(plan)


@pytest.mark.slow
def test_an_account_with_50_000_ratings_is_deleted_in_short_transactions(client: TestClient, reader: Person) -> None:
    import_shelf(reader, 50_000)
    start, seconds = events.tail.last_event_id, []

    def delete(session: Session) -> bool:
        began = time.monotonic()
        is_gone = not users.delete_batch(session, 2)
        session.flush()
        seconds.append(time.monotonic() - began)
        return is_gone

    while not database.write_sync(delete):
        pass
    print(f"{len(seconds)} transactions, {sorted(seconds)[len(seconds) // 2]:.3f} s, at most {max(seconds):.3f} s")
    assert sorted(seconds)[len(seconds) * 95 // 100] < 0.2
    logged = [event["data"]["count"] for event in all_events(client, start)]
    assert sum(logged) == 2 * 50_000, "reviews, and books without an owner"
    assert len(logged) <= 2 * 50_000 // users.MAX_BOOKS
    assert max(logged) <= users.MAX_BOOKS, "one event for each transaction"


def all_events(client: TestClient, after: int) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    while page := client.get("/events", params={"after": after, "limit": 100}).json()["items"]:
        items += page
        after = page[-1]["id"]
    return items


LEFT = {
    "shelf_entry": "TRUE",
    "upload": "TRUE",
    "login_session": "user_id = 2",
    "event": "user_id = 2",
    "book": "added_by IS NOT NULL OR rating_count <> 0 OR rating_sum <> 0",
}


@pytest.mark.parametrize("route", ["GET /users/me", "GET /users/me/export", "PATCH /users/me"])
def test_an_account_that_is_deleted_during_a_request_is_signed_out(
    reader: Person, monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    monkeypatch.setattr(security, "_find_principal", lambda *_: Principal(999, "gone", "reader", 1))
    method, path = route.split()
    answer = reader.request(method, path, json={"full_name": "R."} if method == "PATCH" else None)
    assert (answer.status_code, answer.headers["Content-Type"]) == (401, "application/problem+json")


# --- administration -----------------------------------------------------------------------------------------------


def test_an_admin_creates_accounts_with_any_role(client: TestClient, admin: Person, mailbox: list[Email]) -> None:
    answer = admin.post("/users", json={**NEW, "username": "lib", "role": "librarian"})
    assert answer.status_code == 201
    assert admin.get(answer.headers["Location"]).json() == answer.json()
    assert answer.json().items() >= {"username": "lib", "role": "librarian", "is_active": True}.items()
    assert Person(client, "lib").get("/users/me").json() == answer.json()
    assert [email.to for email in mailbox] == ["rita@example.com"]


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        pytest.param({"role": "owner"}, 422, id="an unknown role"),
        pytest.param({"role": None}, 422, id="no role"),
        pytest.param({"password": "password1"}, 422, id="a common password"),
        pytest.param({"is_active": False}, 422, id="is_active"),
        pytest.param({"username": "ADMIN"}, 409, id="a user name in use"),
    ],
)
def test_invalid_accounts_are_not_created(admin: Person, fields: dict[str, Any], status: int) -> None:
    assert admin.post("/users", json={**NEW, **fields}).status_code == status
    assert admin.get("/users").json()["total"] == 1


SEARCHES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "all": ({}, ["admin", "Rita", "Oskar", "Lydia"]),
    "part of a name": ({"search": "RIT"}, ["Rita"]),
    "part of an address": ({"search": "a@example"}, ["Rita", "Lydia"]),
    "part of a full name": ({"search": "von"}, ["Oskar"]),
    "a wildcard of LIKE": ({"search": "%"}, []),
    "the escape of LIKE": ({"search": "/"}, []),
    "upper case beyond ASCII": ({"search": "ÉMILE"}, ["Lydia"]),
    "mixed case beyond ASCII": ({"search": "'éMile"}, ["Lydia"]),
    "a role": ({"role": "librarian"}, ["Lydia"]),
    "deactivated": ({"is_active": False}, ["Oskar"]),
    "a page": ({"limit": 2, "offset": 1}, ["Rita", "Oskar"]),
    "blank": ({"search": " "}, ["admin", "Rita", "Oskar", "Lydia"]),
}


@pytest.fixture
def everyone(admin: Person, reader: Person, other_reader: Person, librarian: Person) -> Person:
    admin.patch("/users/3", json={"full_name": "Oskar von Matzerath", "is_active": False})
    admin.patch("/users/4", json={"full_name": "Lydia d'Émile"})
    return admin


@pytest.mark.parametrize(("query", "names"), SEARCHES.values(), ids=SEARCHES)
def test_an_admin_searches_accounts(everyone: Person, query: dict[str, Any], names: list[str]) -> None:
    assert [user["username"] for user in everyone.get("/users", params=query).json()["items"]] == names


def test_an_admin_changes_role_name_and_address(
    client: TestClient, admin: Person, reader: Person, mailbox: list[Email]
) -> None:
    changed = admin.patch("/users/2", json={"role": "librarian", "full_name": "R.", "email": "r@example.com"}).json()
    assert (changed["role"], changed["full_name"], changed["email"]) == ("librarian", "R.", "r@example.com")
    assert reader.get("/users/me").json() == changed
    assert [email.to for email in mailbox] == ["rita@example.com", "r@example.com"]
    recorded = admin.get("/events", params={"types": "account.role_changed,account.email_changed"}).json()["items"]
    assert [event["data"] for event in recorded] == [
        {"old": "rita@example.com", "new": "r@example.com", "by": 1},
        {"old": "reader", "new": "librarian", "by": 1},
    ]


SAME_ACCOUNT: dict[str, tuple[str, dict[str, Any]]] = {
    "my account, nothing": ("/users/me", {}),
    "my account, my name": ("/users/me", {"full_name": "Rita R."}),
    "my account, my address": ("/users/me", {"email": " RITA@example.com"}),
    "my account, only a password": ("/users/me", {"current_password": PASSWORD}),
    "an account, nothing": ("/users/2", {}),
    "an account, its name": ("/users/2", {"full_name": " Rita R. "}),
    "an account, its address": ("/users/2", {"email": "Rita@Example.com"}),
    "an account, its role and state": ("/users/2", {"role": "reader", "is_active": True}),
}


@pytest.mark.parametrize(("path", "change"), SAME_ACCOUNT.values(), ids=SAME_ACCOUNT)
def test_a_change_that_changes_nothing_makes_no_event_and_no_mail(
    admin: Person, confirmed: Person, mailbox: list[Email], path: str, change: dict[str, Any]
) -> None:
    before = confirmed.patch("/users/me", json={"full_name": "Rita R."}).json()
    cursor = admin.get("/books").headers["X-Event-Cursor"]
    answer = (confirmed if path == "/users/me" else admin).patch(path, json=change)
    assert (answer.status_code, answer.json()) == (200, before)
    assert confirmed.get("/users/me").json() == before
    assert (admin.get("/books").headers["X-Event-Cursor"], mailbox) == (cursor, [])


@pytest.mark.parametrize(
    "change",
    [{"username": "root"}, {"password": PASSWORD}, {"role": None}, {"is_active": None}, {"is_active": "perhaps"}],
    ids=str,
)
def test_an_admin_can_not_change(admin: Person, reader: Person, change: dict[str, Any]) -> None:
    assert admin.patch("/users/2", json=change).status_code == 422


def test_deactivating_an_account_ends_its_sessions_for_good(client: TestClient, admin: Person, reader: Person) -> None:
    assert admin.patch("/users/2", json={"is_active": False}).json()["is_active"] is False
    assert reader.get("/users/me").status_code == 401
    assert client.post("/auth/refresh", json={"refresh_token": reader.tokens["refresh_token"]}).status_code == 401
    assert client.post("/login", json={"username": "rita", "password": PASSWORD}).status_code == 401
    admin.patch("/users/2", json={"is_active": True})
    assert reader.get("/users/me").status_code == 401, "earlier tokens stay revoked"
    assert Person(client, "rita").get("/users/me").status_code == 200


def test_a_new_role_applies_to_existing_tokens(admin: Person, reader: Person, other_reader: Person) -> None:
    book = other_reader.add_book()
    assert reader.delete(f"/books/{book['id']}").status_code == 403
    admin.patch("/users/2", json={"role": "librarian"})
    assert reader.delete(f"/books/{book['id']}").status_code == 204


def test_an_admin_deletes_an_account(client: TestClient, admin: Person, reader: Person) -> None:
    assert admin.delete("/users/2").status_code == 204
    assert reader.get("/users/me").status_code == 401
    assert admin.get("/users/2").status_code == 404
    assert admin.delete("/users/2").status_code == 404
    assert admin.patch("/users/2", json={"full_name": "Nobody"}).status_code == 404


NO_OTHER_ADMIN = "This is the last active admin: make another one first."


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        pytest.param("PATCH", "/users/1", {"role": "librarian"}, id="demoted"),
        pytest.param("PATCH", "/users/1", {"is_active": False}, id="deactivated"),
        pytest.param("DELETE", "/users/1", None, id="deleted"),
        pytest.param("DELETE", "/users/me", {"password": "admin"}, id="deleted by itself"),
    ],
)
def test_the_last_active_admin_can_not_be_removed(
    admin: Person, method: str, path: str, body: dict[str, Any] | None
) -> None:
    answer = admin.request(method, path, json=body)
    assert answer.status_code == 409
    assert answer.json()["detail"] == NO_OTHER_ADMIN
    assert admin.patch("/users/me", json={"full_name": "Still here"}).status_code == 200
    # A deactivated one does not count.
    other = admin.post("/users", json={**NEW, "role": "admin"}).json()["id"]
    admin.patch(f"/users/{other}", json={"is_active": False})
    assert admin.request(method, path, json=body).status_code == 409
    admin.patch(f"/users/{other}", json={"is_active": True})
    assert admin.request(method, path, json=body).status_code in (200, 204)


def test_an_admin_who_can_not_sign_in_does_not_count(admin: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    admin.post("/users", json={**NEW, "role": "admin"})
    monkeypatch.setattr(settings, "require_verified_email", True)
    assert admin.patch("/users/1", json={"role": "reader"}).status_code == 409
    monkeypatch.setattr(settings, "require_verified_email", False)
    assert admin.patch("/users/1", json={"role": "reader"}).status_code == 200


@pytest.mark.parametrize("change", [{}, {"full_name": "Adam"}, {"role": "admin"}], ids=str)
def test_the_last_admin_keeps_a_confirmed_address_where_one_is_required(
    client: TestClient, admin: Person, mailbox: list[Email], monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    """Nobody could sign in again if its link were lost."""
    monkeypatch.setattr(settings, "require_verified_email", True)
    before = admin.get("/users/1").json()
    answer = admin.patch("/users/1", json={"email": "typo@example.com", **change})
    assert (answer.status_code, answer.json()["detail"]) == (409, NO_OTHER_ADMIN)
    assert (admin.get("/users/1").json(), mailbox) == (before, [])
    assert login(client, "admin", "admin") == 200
    admin.post("/users", json={**NEW, "role": "admin"})
    assert admin.patch("/users/1", json={"email": "typo@example.com"}).status_code == 409, "the other is unconfirmed"
    assert confirm(client, mailbox.pop()) == 200
    assert admin.patch("/users/1", json={"email": "right@example.com"}).status_code == 200


def test_the_last_admin_changes_the_address_by_confirming_it(
    client: TestClient, admin: Person, mailbox: list[Email], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "require_verified_email", True)
    assert admin.patch("/users/me", json={**NEW_ADDRESS, "current_password": "admin"}).status_code == 200
    assert login(client, "admin", "admin") == 200
    assert confirm(client, mailbox[-1]) == 200
    assert login(client, "new@example.com", "admin") == 200


@pytest.mark.parametrize(("method", "body"), [("PATCH", {"role": "reader"}), ("DELETE", None)], ids=str)
def test_the_last_admin_can_not_be_removed_while_unconfirmed(
    admin: Person, monkeypatch: pytest.MonkeyPatch, method: str, body: dict[str, Any] | None
) -> None:
    assert admin.patch("/users/1", json={"email": "unconfirmed@example.com"}).status_code == 200
    monkeypatch.setattr(settings, "require_verified_email", True)
    assert admin.request(method, "/users/1", json=body).status_code == 409
    reader = admin.post("/users", json=NEW).json()["id"]
    assert admin.delete(f"/users/{reader}").status_code == 204


def test_an_address_that_an_admin_sets_takes_effect_at_once(
    client: TestClient, admin: Person, confirmed: Person, mailbox: list[Email], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is unconfirmed, and whatever was mailed before is void."""
    monkeypatch.setattr("accounts.REFUSAL_SECONDS", 0)
    confirmed.patch("/users/me", json=NEW_ADDRESS)
    pending = mailbox[-1]
    client.post("/auth/forgot-password", json={"email": "rita@example.com"})
    code = code_in(mailbox[-1])
    rita = confirmed.get("/users/me").json()["id"]
    mailbox.clear()
    changed = admin.patch(f"/users/{rita}", json={"email": "Successor@example.com"}).json()
    assert (changed["email"], changed["email_verified_at"], changed["pending_email"]) == (
        *("successor@example.com", None),
        None,
    )
    assert confirmed.get("/users/me").json() == changed
    notice, link = mailbox
    assert (notice.to, link.to) == ("rita@example.com", "successor@example.com")
    assert "was changed to successor@example.com by an admin" in notice.text
    assert "verify-email" not in notice.text
    assert confirm(client, pending) == 404
    for address in ("rita@example.com", "successor@example.com"):
        body = {"email": address, "otp": code, "new_password": "another horse"}
        assert client.post("/auth/reset-password", json=body).status_code == 400
    assert (login(client, "rita@example.com"), login(client, "successor@example.com")) == (401, 200)
    assert confirm(client, link) == 200


def test_an_admin_can_not_set_an_address_in_use(admin: Person, confirmed: Person, mailbox: list[Email]) -> None:
    rita = confirmed.get("/users/me").json()
    assert admin.patch(f"/users/{rita['id']}", json={"email": "admin@example.com"}).status_code == 409
    assert confirmed.get("/users/me").json() == rita
    assert mailbox == []


def test_the_present_address_from_an_admin_leaves_a_pending_one(admin: Person, confirmed: Person) -> None:
    before = confirmed.patch("/users/me", json=NEW_ADDRESS).json()
    assert admin.patch(f"/users/{before['id']}", json={"email": "rita@example.com"}).json() == before


@pytest.mark.slow
@pytest.mark.parametrize("removal", ["demoted", "deactivated", "deleted"])
def test_concurrent_removals_leave_one_admin(server: Server, removal: str) -> None:
    admin = Person(server.client, "admin", "admin")
    other = admin.post("/users", json={**NEW, "role": "admin"}).json()["id"]
    rita = Person(server.client, "rita")
    change = {"demoted": {"role": "reader"}, "deactivated": {"is_active": False}}.get(removal)

    def remove(number: int) -> int:
        who, whom = ((admin, other), (rita, 1))[number % 2]
        return who.request("DELETE" if removal == "deleted" else "PATCH", f"/users/{whom}", json=change).status_code

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(remove, range(20)))
    assert sum(status in (200, 204) for status in answers) >= 1
    assert set(answers) <= {200, 204, 401, 403, 404, 409}
    left = [person for person in (admin, rita) if person.get("/users").status_code == 200]
    assert len(left) == 1
    assert left[0].get("/users", params={"role": "admin", "is_active": True}).json()["total"] == 1
