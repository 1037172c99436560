"""`Idempotency-Key`: a retry gets the answer of the first request, and changes nothing."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import pytest
from fastapi.testclient import TestClient

from tests.fixtures import Clock, Person, Server, make, wait_for

KEY = {"Idempotency-Key": "8e03978e-40d5-43e8-bc93-6894a57f9324"}
REQUESTS = {
    "a book": ("/books", {"title": "Dune", "author": "Frank Herbert"}),
    "a loan": ("/loans", {"book_id": 1}),
    "copies": ("/books/1/stock", {"quantity": 2}),
}
parametrize_requests = pytest.mark.parametrize(("path", "body"), REQUESTS.values(), ids=REQUESTS)


@pytest.fixture(autouse=True)
def first_book(request: pytest.FixtureRequest) -> None:
    """A book with three copies, for the tests in this process."""
    if "librarian" in request.fixturenames:
        librarian: Person = request.getfixturevalue("librarian")
        librarian.post(f"/books/{librarian.add_book()['id']}/stock", json={"quantity": 3})


def counts(person: Person) -> tuple[int, int, int]:
    """Of books, loans, and copies of the first book."""
    books, loans = (person.get(path).json()["total"] for path in ("/books", "/loans"))
    return books, loans, person.get("/books/1/stock").json()["copies"]


@parametrize_requests
def test_a_retry_changes_nothing_and_gets_the_same_answer(librarian: Person, path: str, body: Any) -> None:
    first = librarian.post(path, json=body, headers=KEY)
    assert first.is_success
    after, event = counts(librarian), librarian.get("/events").json()["items"][-1]
    again = librarian.post(path, json=body, headers=KEY)
    assert (again.status_code, again.text) == (first.status_code, first.text)
    for name in ("Location", "ETag", "Content-Type"):
        assert again.headers.get(name) == first.headers.get(name)
    assert counts(librarian) == after
    assert librarian.get("/events").json()["items"][-1] == event
    assert librarian.post(path, json=body).is_success
    assert counts(librarian) != after


@parametrize_requests
def test_a_key_belongs_to_one_request(librarian: Person, path: str, body: Any) -> None:
    librarian.post(path, json=body, headers=KEY)
    after = counts(librarian)
    for other_path, other_body in (*REQUESTS.values(), ("/books", {"title": "Emma", "author": "Jane Austen"})):
        if (other_path, other_body) != (path, body):
            answer = librarian.post(other_path, json=other_body, headers=KEY)
            assert answer.status_code == 422
            assert answer.json()["errors"][0]["loc"] == ["header", "idempotency-key"]
    assert counts(librarian) == after


def test_the_same_key_of_another_user_is_another_key(client: TestClient, librarian: Person, reader: Person) -> None:
    for person in (librarian, reader):
        assert person.post("/loans", json={"book_id": 1}, headers=KEY).json()["username"] == person.username


def test_a_key_is_kept_for_a_day(librarian: Person, clock: Clock) -> None:
    def borrow() -> int:
        return int(Person(librarian.client, librarian.username).post("/loans", json=loan, headers=KEY).json()["id"])

    loan = {"book_id": 1}
    first = borrow()
    clock.advance(hours=23, minutes=59)
    assert borrow() == first
    clock.advance(minutes=2)
    assert borrow() == first + 1


def test_a_refused_request_is_not_kept(librarian: Person) -> None:
    loan = {"book_id": 1, "quantity": 5}
    assert librarian.post("/loans", json=loan, headers=KEY).status_code == 409
    librarian.post("/books/1/stock", json={"quantity": 2})
    assert librarian.post("/loans", json=loan, headers=KEY).status_code == 201


@pytest.mark.parametrize("key", ["", "x" * 256], ids=["empty", "too long"])
@parametrize_requests
def test_keys_have_1_to_255_characters(librarian: Person, path: str, body: Any, key: str) -> None:
    answer = librarian.post(path, json=body, headers={"Idempotency-Key": key})
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["loc"][0] == "header"


def test_a_key_may_have_any_character_of_a_header(librarian: Person) -> None:
    key = {"Idempotency-Key": b'"\xff\xfe \'; DROP TABLE loan"'}
    first, again = (librarian.post("/loans", json={"book_id": 1}, headers=key).json() for _ in range(2))
    assert first["id"] == again["id"]


def test_a_key_does_not_outlive_the_rights_of_its_user(client: TestClient, admin: Person) -> None:
    librarian = make(client, "Lena")
    admin.patch("/users/2", json={"role": "librarian"})
    librarian = Person(client, "Lena")
    book = librarian.add_book()["id"]
    change, path = {"quantity": 2}, f"/books/{book}/stock"
    assert librarian.post(path, json=change, headers=KEY).status_code == 200
    admin.patch("/users/2", json={"role": "reader"})
    assert Person(client, "Lena").post(path, json=change, headers=KEY).status_code == 403


@pytest.mark.slow
def test_retries_at_once_and_after_a_lost_answer_lend_once(server: Server) -> None:
    admin = Person(server.client, "admin", "admin")
    admin.post(f"/books/{admin.add_book()['id']}/stock", json={"quantity": 10})
    with ThreadPoolExecutor(8) as threads:
        answers = [threads.submit(admin.post, "/loans", json={"book_id": 1}, headers=KEY) for _ in range(32)]
    assert {answer.result().text for answer in answers} == {answers[0].result().text}
    assert counts(admin)[1] == 1

    body, address = json.dumps({"book_id": 1}).encode(), urlsplit(server.url)
    head = f"POST /loans HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {admin.tokens['access_token']}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nIdempotency-Key: lost\r\n\r\n"
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(head.encode() + body)  # closed without reading the answer
    wait_for(lambda: counts(admin)[1] == 2 or None)
    again = admin.post("/loans", json={"book_id": 1}, headers={"Idempotency-Key": "lost"})
    assert (again.status_code, counts(admin)[1]) == (201, 2)
