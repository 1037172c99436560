"""The accounts themselves: my profile, all that is stored of me, and what admins may do."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2 as httpx
import pytest
from fastapi import HTTPException
from fastapi.testclient import TestClient

import auth
import database
import events
import security
import users
from mail import Email
from models import Principal, User
from schemas import AccountUpdate, UserCreate
from settings import settings
from tests.fixtures import DUNE, NEW, PASSWORD, Clock, Person, Server, code_in, sign_up, token_in, wait_for

# --- my account ---------------------------------------------------------------------------------------------------


def test_i_can_change_my_name_and_address(reader: Person) -> None:
    assert reader.patch("/users/me", json={"full_name": "Rita R."}).json()["full_name"] == "Rita R."
    changed = reader.patch("/users/me", json={"email": "New@Example.com", "full_name": None}).json()
    assert (changed["email"], changed["full_name"]) == ("new@example.com", None)


@pytest.mark.parametrize(
    ("change", "status"),
    [
        pytest.param({"role": "admin"}, 422, id="my role"),
        pytest.param({"is_active": False}, 422, id="my state"),
        pytest.param({"username": "root"}, 422, id="my user name"),
        pytest.param({"email": None}, 422, id="no address"),
        pytest.param({"email": "admin@example.com"}, 409, id="somebody else's address"),
    ],
)
def test_i_can_not_change(reader: Person, change: dict[str, Any], status: int) -> None:
    before = reader.get("/users/me").json()
    assert reader.patch("/users/me", json=change).status_code == status
    assert reader.get("/users/me").json() == before


def test_a_new_address_is_confirmed_anew_and_the_old_one_is_told(client: TestClient, mailbox: list[Email]) -> None:
    rita = sign_up(client, "rita")
    (first,) = mailbox
    changed = rita.patch("/users/me", json={"email": "new@example.com"}).json()
    assert changed["email_verified_at"] is None
    _, notice, link = mailbox
    assert (notice.to, link.to) == ("rita@example.com", "new@example.com")
    assert "was changed to new@example.com" in notice.text
    assert client.get(f"/auth/verify-email/{token_in(first)}").status_code == 404, "it went to the old address"
    assert client.get(f"/auth/verify-email/{token_in(link)}").json()["email"] == "new@example.com"
    assert client.post("/login", json={"username": "rita@example.com", "password": PASSWORD}).status_code == 401


@pytest.fixture
def confirmed(client: TestClient, mailbox: list[Email]) -> Person:
    """Rita, whose address is a confirmed one."""
    rita = sign_up(client, "rita")
    client.get(f"/auth/verify-email/{token_in(mailbox.pop())}")
    return rita


def last_to(address: str, mailbox: list[Email]) -> Email:
    return [letter for letter in mailbox if letter.to == address][-1]


def reset(client: TestClient, mailbox: list[Email], email: str, password: str) -> int:
    client.post("/auth/forgot-password", json={"email": email})
    body = {"email": email, "otp": code_in(last_to(email, mailbox)), "new_password": password}
    return client.post("/auth/reset-password", json=body).status_code


def test_a_thief_of_a_session_does_not_get_away_with_the_account(
    client: TestClient, clock: Clock, confirmed: Person, mailbox: list[Email]
) -> None:
    """The owner of the address that was confirmed takes the change back, by the link in the news of it."""
    thief = Person(client, "rita")
    for address in ("thief@example.com", "thief2@example.com"):
        thief.patch("/users/me", json={"email": address})
    undo = token_in(last_to("rita@example.com", mailbox))
    client.get(f"/auth/verify-email/{token_in(mailbox[-1])}")
    clock.advance(days=6)
    assert client.get(f"/auth/verify-email/{undo}").json()["email"] == "rita@example.com"
    for person in (confirmed, thief):
        assert person.get("/users/me").status_code == 401
    assert client.get(f"/auth/verify-email/{undo}").status_code == 404
    assert client.post("/login", json={"username": "rita", "password": PASSWORD}).status_code == 401, "the thief's, too"
    assert reset(client, mailbox, "rita@example.com", "Rita's new one") == 204
    again = Person(client, "rita@example.com", "Rita's new one").get("/users/me").json()
    assert (again["email"], again["email_verified_at"] is not None) == ("rita@example.com", True)


def test_a_thief_who_set_a_password_is_out_with_it(
    client: TestClient, confirmed: Person, mailbox: list[Email], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("auth.REFUSAL_SECONDS", 0)
    confirmed.patch("/users/me", json={"email": "thief@example.com"})
    assert reset(client, mailbox, "thief@example.com", "the thief's own") == 204
    thief = Person(client, "rita", "the thief's own")
    client.post("/auth/forgot-password", json={"email": "thief@example.com"})
    code = code_in(last_to("thief@example.com", mailbox))
    client.get(f"/auth/verify-email/{token_in(last_to('rita@example.com', mailbox))}")
    assert thief.get("/users/me").status_code == 401
    assert client.post("/auth/refresh", json={"refresh_token": thief.tokens["refresh_token"]}).status_code == 401
    assert client.post("/login", json={"username": "rita", "password": "the thief's own"}).status_code == 401
    for email in ("thief@example.com", "rita@example.com"):
        body = {"email": email, "otp": code, "new_password": "the thief's next"}
        assert client.post("/auth/reset-password", json=body).status_code == 400
    assert reset(client, mailbox, "rita@example.com", "Rita's new one") == 204


ROUNDABOUT = {
    "back and away again": ["thief@example.com", "rita@example.com", "thief2@example.com"],
    "round and round": ["thief@example.com", "rita@example.com", "thief@example.com", "thief2@example.com"],
}


@pytest.mark.parametrize("which", [0, -1], ids=["the first link", "the last link"])
@pytest.mark.parametrize("addresses", ROUNDABOUT.values(), ids=ROUNDABOUT)
def test_whoever_had_an_address_first_has_the_last_word(
    client: TestClient, confirmed: Person, mailbox: list[Email], addresses: list[str], which: int
) -> None:
    """Neither a change there and back makes the link of the owner useless, nor a link that went to the thief."""
    thief = Person(client, "rita")
    for address in addresses:
        thief.patch("/users/me", json={"email": address})
        if mailbox[-1].to == "thief@example.com":
            client.get(f"/auth/verify-email/{token_in(mailbox[-1])}")
    links = {
        whose: [token_in(one) for one in mailbox if one.to == f"{whose}@example.com" and "verify-email" in one.text]
        for whose in ("rita", "thief")
    }
    assert client.get(f"/auth/verify-email/{links['rita'][which]}").json()["email"] == "rita@example.com"
    assert {client.get(f"/auth/verify-email/{link}").status_code for link in links["thief"]} == {404}


def test_a_link_of_the_thief_leaves_that_of_the_owner(
    client: TestClient, confirmed: Person, mailbox: list[Email]
) -> None:
    confirmed.patch("/users/me", json={"email": "thief@example.com"})
    client.get(f"/auth/verify-email/{token_in(mailbox[-1])}")
    confirmed.patch("/users/me", json={"email": "thief2@example.com"})
    for address in ("thief@example.com", "rita@example.com"):
        undo = token_in(last_to(address, mailbox))
        assert client.get(f"/auth/verify-email/{undo}").json()["email"] == address


def test_an_address_that_was_mine_is_confirmed_when_i_come_back_to_it(confirmed: Person, mailbox: list[Email]) -> None:
    confirmed.patch("/users/me", json={"email": "new@example.com"})
    assert confirmed.patch("/users/me", json={"email": "rita@example.com"}).json()["email_verified_at"] is not None
    assert [letter.to for letter in mailbox[2:]] == ["new@example.com"], "it is told, and nothing is to be confirmed"


TAKERS: dict[str, Callable[[dict[str, Person], str], httpx.Response]] = {
    "who signs up": lambda cast, email: cast["Oskar"].client.post(
        "/auth/register", json={**NEW, "username": "squat", "email": email}
    ),
    "who signs up by a name that is taken": lambda cast, email: cast["Oskar"].client.post(
        "/auth/register", json={**NEW, "username": "oskar", "email": email}
    ),
    "who has an account": lambda cast, email: cast["Oskar"].patch("/users/me", json={"email": email}),
    "an admin, for somebody new": lambda cast, email: cast["admin"].post(
        "/users", json={**NEW, "username": "squat", "email": email}
    ),
    "an admin, for somebody": lambda cast, email: cast["admin"].patch("/users/3", json={"email": email}),
}


@pytest.mark.parametrize("take", TAKERS.values(), ids=TAKERS)
def test_an_address_that_can_be_taken_back_is_taken(
    confirmed: Person,
    admin: Person,
    other_reader: Person,
    mailbox: list[Email],
    take: Callable[[dict[str, Person], str], httpx.Response],
) -> None:
    """Whoever changed it must not keep its owner from coming back, by giving it to another account."""
    cast = {"admin": admin, "Oskar": other_reader}
    confirmed.patch("/users/me", json={"email": "thief@example.com"})
    held, in_use = take(cast, "rita@example.com"), take(cast, "thief@example.com")
    assert (held.status_code, held.text) == (409, in_use.text), "nobody can tell them apart"
    undo = token_in(last_to("rita@example.com", mailbox))
    assert confirmed.client.get(f"/auth/verify-email/{undo}").json()["email"] == "rita@example.com"


@pytest.mark.parametrize(("days", "status"), [(6.9, 409), (7.1, 201)], ids=["as long as that", "no longer"])
def test_an_address_is_held_for_a_week(clock: Clock, confirmed: Person, days: float, status: int) -> None:
    confirmed.patch("/users/me", json={"email": "new@example.com"})
    clock.advance(days=days)
    assert confirmed.client.post("/auth/register", json={**NEW, "username": "another"}).status_code == status


def test_an_address_that_is_in_use_after_all_is_not_taken_back(
    client: TestClient, confirmed: Person, mailbox: list[Email]
) -> None:
    """The operator gave it to the first admin, say."""
    confirmed.patch("/users/me", json={"email": "new@example.com"})
    database.write_sync(lambda session: session.add(User(username="root", email="rita@example.com", password_hash="")))
    undo = f"/auth/verify-email/{token_in(last_to('rita@example.com', mailbox))}"
    assert client.get(undo).json()["detail"] == "This email is taken."
    assert "409" in client.get("/openapi.json").json()["paths"]["/auth/verify-email/{token}"]["get"]["responses"]


def test_an_address_that_was_taken_back_is_in_use_again(
    client: TestClient, confirmed: Person, other_reader: Person, mailbox: list[Email]
) -> None:
    confirmed.patch("/users/me", json={"email": "thief@example.com"})
    client.get(f"/auth/verify-email/{token_in(last_to('rita@example.com', mailbox))}")
    assert other_reader.patch("/users/me", json={"email": "rita@example.com"}).status_code == 409
    assert other_reader.patch("/users/me", json={"email": "thief@example.com"}).status_code == 200


def test_the_same_address_again_changes_nothing(client: TestClient, mailbox: list[Email]) -> None:
    rita = sign_up(client, "rita")
    client.get(f"/auth/verify-email/{token_in(mailbox.pop())}")
    assert rita.patch("/users/me", json={"email": "RITA@example.com"}).json()["email_verified_at"] is not None
    assert mailbox == []


def test_deleting_my_account_asks_for_the_password(client: TestClient, reader: Person, mailbox: list[Email]) -> None:
    assert reader.delete("/users/me").status_code == 422
    assert reader.delete("/users/me", json={"password": "wrong password"}).status_code == 403
    assert reader.get("/users/me").status_code == 200
    assert reader.delete("/users/me", json={"password": PASSWORD}).status_code == 204
    assert reader.get("/users/me").status_code == 401
    assert client.post("/login", json={"username": "rita", "password": PASSWORD}).status_code == 401
    assert [letter.subject for letter in mailbox] == ["Your account was deleted"]


def test_what_is_personal_goes_with_the_account_and_the_books_stay(
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
    said = client.get("/events", params={"after": start}).json()["items"]
    assert said[1]["data"] == {name: value for name, value in left.items() if name != "description"}
    told = [event["type"] for event in said]
    assert told == ["review.deleted", "book.updated", "book.updated"]
    seen = admin.get("/events", params={"after": start, "types": "account.deleted"}).json()["items"]
    assert [event["data"] for event in seen] == [{"user_id": 2, "username": "Rita", "by": 2}]
    said = client.get("/events", params={"types": "review.*", "limit": 100}).json()["items"]
    assert {event["data"]["username"] for event in said} == {"Oskar", None}, "the next Rita said nothing yet"


def test_streams_forget_the_name_too(reader: Person) -> None:
    book = reader.add_book()
    reader.post(f"/my-library/{book['id']}", json={"status": "completed"})
    reader.patch(f"/my-library/{book['id']}", json={"rating": 4})
    wait_for(lambda: any(b'"Rita"' in event.frame for event in events.tail.buffer) or None)
    assert reader.request("DELETE", "/users/me", json={"password": PASSWORD}).status_code == 204
    wait_for(lambda: any(event.type == "account.deleted" for event in events.tail.buffer) or None)
    assert not [event for event in events.tail.buffer if event.type.startswith("review.")]
    assert events.tail.start < events.tail.buffer[0].id


def test_a_name_that_is_free_again_is_a_new_account(client: TestClient, reader: Person) -> None:
    reader.delete("/users/me", json={"password": PASSWORD})
    again = sign_up(client, "rita")
    assert again.get("/users/me").json()["id"] > 2
    assert again.get("/my-library").json()["total"] == 0
    assert reader.get("/users/me").status_code == 401


def test_all_that_is_stored_of_me_is_one_file(client: TestClient, reader: Person, other_reader: Person) -> None:
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
    told = {event["type"] for event in stored["events"]}
    assert told == {"account.login", "shelf.created", "shelf.updated", "upload.progress", "review.created"}
    assert "argon2" not in answer.text
    assert "Oskar" not in answer.text


@pytest.mark.parametrize("asked", ["GET /users/me", "GET /users/me/export", "POST /auth/verify-email"])
def test_an_account_that_goes_while_it_is_asked_for_is_signed_out(
    reader: Person, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    monkeypatch.setattr(security, "_find_principal", lambda *_: Principal(999, "gone", "reader", 1))
    answer = reader.request(*asked.split())
    assert database.write_sync(auth._ask_again, 999) is None
    assert (answer.status_code, answer.headers["Content-Type"]) == (401, "application/problem+json")


# --- administration -----------------------------------------------------------------------------------------------


def test_an_admin_makes_accounts_of_any_role(client: TestClient, admin: Person, mailbox: list[Email]) -> None:
    answer = admin.post("/users", json={**NEW, "username": "lib", "role": "librarian"})
    assert answer.status_code == 201
    assert admin.get(answer.headers["Location"]).json() == answer.json()
    assert answer.json().items() >= {"username": "lib", "role": "librarian", "is_active": True}.items()
    assert Person(client, "lib").get("/users/me").json() == answer.json()
    assert [letter.to for letter in mailbox] == ["rita@example.com"]


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        pytest.param({"role": "owner"}, 422, id="an unknown role"),
        pytest.param({"role": None}, 422, id="no role"),
        pytest.param({"password": "password1"}, 422, id="a common password"),
        pytest.param({"is_active": False}, 422, id="what is set later"),
        pytest.param({"username": "ADMIN"}, 409, id="a name that is taken"),
    ],
)
def test_an_account_is_not_made(admin: Person, fields: dict[str, Any], status: int) -> None:
    assert admin.post("/users", json={**NEW, **fields}).status_code == status
    assert admin.get("/users").json()["total"] == 1


FOUND: dict[str, tuple[dict[str, Any], list[str]]] = {
    "all": ({}, ["admin", "Rita", "Oskar", "Lydia"]),
    "part of a name": ({"search": "RIT"}, ["Rita"]),
    "part of an address": ({"search": "a@example"}, ["Rita", "Lydia"]),
    "part of a full name": ({"search": "von"}, ["Oskar"]),
    "what LIKE would take for anything": ({"search": "%"}, []),
    "letters that SQLite does not know": ({"search": "ÉMILE"}, ["Lydia"]),
    "a role": ({"role": "librarian"}, ["Lydia"]),
    "switched off": ({"is_active": False}, ["Oskar"]),
    "a page": ({"limit": 2, "offset": 1}, ["Rita", "Oskar"]),
    "blank": ({"search": " "}, ["admin", "Rita", "Oskar", "Lydia"]),
}


@pytest.fixture
def everybody(admin: Person, reader: Person, other_reader: Person, librarian: Person) -> Person:
    admin.patch("/users/3", json={"full_name": "Oskar von Matzerath", "is_active": False})
    admin.patch("/users/4", json={"full_name": "Lydia d'Émile"})
    return admin


@pytest.mark.parametrize(("query", "names"), FOUND.values(), ids=FOUND)
def test_an_admin_finds_accounts(everybody: Person, query: dict[str, Any], names: list[str]) -> None:
    assert [user["username"] for user in everybody.get("/users", params=query).json()["items"]] == names


def test_an_admin_changes_role_name_and_address(
    client: TestClient, admin: Person, reader: Person, mailbox: list[Email]
) -> None:
    changed = admin.patch("/users/2", json={"role": "librarian", "full_name": "R.", "email": "r@example.com"}).json()
    assert (changed["role"], changed["full_name"], changed["email"]) == ("librarian", "R.", "r@example.com")
    assert reader.get("/users/me").json() == changed
    assert [letter.to for letter in mailbox] == ["rita@example.com", "r@example.com"]
    told = admin.get("/events", params={"types": "account.role_changed,account.email_changed"}).json()["items"]
    assert [event["data"] for event in told] == [
        {"old": "rita@example.com", "new": "r@example.com", "by": 1},
        {"old": "reader", "new": "librarian", "by": 1},
    ]


@pytest.mark.parametrize(
    "change",
    [{"username": "root"}, {"password": PASSWORD}, {"role": None}, {"is_active": None}, {"is_active": "perhaps"}],
    ids=str,
)
def test_an_admin_can_not_change(admin: Person, reader: Person, change: dict[str, Any]) -> None:
    assert admin.patch("/users/2", json=change).status_code == 422


def test_an_account_that_is_switched_off_is_out_at_once_and_stays_out(
    client: TestClient, admin: Person, reader: Person
) -> None:
    assert admin.patch("/users/2", json={"is_active": False}).json()["is_active"] is False
    assert reader.get("/users/me").status_code == 401
    assert client.post("/auth/refresh", json={"refresh_token": reader.tokens["refresh_token"]}).status_code == 401
    assert client.post("/login", json={"username": "rita", "password": PASSWORD}).status_code == 401
    admin.patch("/users/2", json={"is_active": True})
    assert reader.get("/users/me").status_code == 401, "the tokens of before do not come back to life"
    assert Person(client, "rita").get("/users/me").status_code == 200


def test_a_new_role_holds_for_the_tokens_that_are_out(admin: Person, reader: Person, other_reader: Person) -> None:
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


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        pytest.param("PATCH", "/users/1", {"role": "librarian"}, id="demoted"),
        pytest.param("PATCH", "/users/1", {"is_active": False}, id="switched off"),
        pytest.param("DELETE", "/users/1", None, id="deleted"),
        pytest.param("DELETE", "/users/me", {"password": "admin"}, id="deleted by themselves"),
    ],
)
def test_the_last_active_admin_stays(admin: Person, method: str, path: str, body: dict[str, Any] | None) -> None:
    answer = admin.request(method, path, json=body)
    assert answer.status_code == 409
    assert answer.json()["detail"] == "This is the last active admin: make another one first."
    assert admin.patch("/users/me", json={"full_name": "Still here"}).status_code == 200
    # One who is switched off is none.
    other = admin.post("/users", json={**NEW, "role": "admin"}).json()["id"]
    admin.patch(f"/users/{other}", json={"is_active": False})
    assert admin.request(method, path, json=body).status_code == 409
    admin.patch(f"/users/{other}", json={"is_active": True})
    assert admin.request(method, path, json=body).status_code in (200, 204)


def test_an_admin_who_can_not_sign_in_is_none(admin: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    admin.post("/users", json={**NEW, "role": "admin"})
    monkeypatch.setattr(settings, "require_verified_email", True)
    assert admin.patch("/users/1", json={"role": "reader"}).status_code == 409
    monkeypatch.setattr(settings, "require_verified_email", False)
    assert admin.patch("/users/1", json={"role": "reader"}).status_code == 200


@pytest.mark.parametrize(("method", "body"), [("PATCH", {"role": "reader"}), ("DELETE", None)], ids=str)
def test_nor_is_the_only_one_let_go(
    admin: Person, monkeypatch: pytest.MonkeyPatch, method: str, body: dict[str, Any] | None
) -> None:
    monkeypatch.setattr(settings, "require_verified_email", True)
    assert admin.patch("/users/me", json={"email": "to-be-confirmed@example.com"}).status_code == 200
    assert admin.request(method, "/users/1", json=body).status_code == 409
    reader = admin.post("/users", json=NEW).json()["id"]
    assert admin.delete(f"/users/{reader}").status_code == 204


def test_rights_that_went_while_a_change_waited_change_nothing(client: TestClient, admin: Person) -> None:
    other = admin.post("/users", json={**NEW, "role": "admin"}).json()["id"]
    before = Principal(1, "admin", "admin", admin.get("/auth/sessions").json()["items"][0]["id"])
    assert Person(client, "rita").patch("/users/1", json={"role": "reader"}).status_code == 200
    new = UserCreate(username="late", email="late@example.com", password=PASSWORD)
    changes: list[tuple[Any, ...]] = [
        (users._change_account, 1, AccountUpdate(role="admin"), before),
        (users._delete_account, other, before),
        (auth._create_account, new, "hash", "admin", before),
    ]
    for change in changes:
        with pytest.raises(HTTPException, match="401"):
            database.write_sync(*change)


def test_what_an_admin_has_decided_the_old_address_does_not_undo(
    client: TestClient, admin: Person, confirmed: Person, mailbox: list[Email]
) -> None:
    rita = confirmed.get("/users/me").json()["id"]
    mailbox.clear()
    assert admin.patch(f"/users/{rita}", json={"email": "successor@example.com"}).status_code == 200
    assert "verify-email" not in last_to("rita@example.com", mailbox).text
    assert "verify-email" in last_to("successor@example.com", mailbox).text


@pytest.mark.slow
@pytest.mark.parametrize("gone", ["demoted", "switched off", "deleted"])
def test_twenty_at_once_leave_one_admin(server: Server, gone: str) -> None:
    admin = Person(server.client, "admin", "admin")
    other = admin.post("/users", json={**NEW, "role": "admin"}).json()["id"]
    rita = Person(server.client, "rita")
    change = {"demoted": {"role": "reader"}, "switched off": {"is_active": False}}.get(gone)

    def remove(number: int) -> int:
        who, whom = ((admin, other), (rita, 1))[number % 2]
        return who.request("DELETE" if gone == "deleted" else "PATCH", f"/users/{whom}", json=change).status_code

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(remove, range(20)))
    assert sum(status in (200, 204) for status in answers) >= 1
    assert set(answers) <= {200, 204, 401, 403, 404, 409}
    left = [person for person in (admin, rita) if person.get("/users").status_code == 200]
    assert len(left) == 1
    assert left[0].get("/users", params={"role": "admin", "is_active": True}).json()["total"] == 1
