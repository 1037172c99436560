"""The codes and request ids of problem documents."""

import re
from http import HTTPStatus
from typing import Any

import pytest
from fastapi.testclient import TestClient

from api import CODES, ERRORS
from tests.fixtures import DUNE, ROOT, Person

DOCUMENTED = set(re.findall(r"`([a-z_]+)`", (ROOT / "docs" / "errors.md").read_text().partition("| --- |")[2]))


def test_every_code_is_documented() -> None:
    sources = "\n".join(path.read_text() for path in ROOT.glob("*.py") if not path.name.startswith("test_"))
    conflicts = set(re.findall(r'Conflict\(\s*"(\w+)"', sources)) | {f"{name}_taken" for name in UNIQUE}
    names = {CODES.get(status, HTTPStatus(status).name.lower()) for status in {*ERRORS, 405, 416, 500} - {409}}
    assert conflicts | names | {"referenced"} == DOCUMENTED - {"errors"}
    assert len(conflicts) > 15


UNIQUE: dict[str, tuple[str, dict[str, Any]]] = {
    "isbn": ("/books", DUNE),
    "username": ("/auth/register", {"username": "RITA", "email": "a@example.com", "password": "far from Arrakis"}),
    "email": ("/auth/register", {"username": "Ada", "email": "Rita@example.com", "password": "far from Arrakis"}),
}


@pytest.mark.parametrize("field", UNIQUE)
def test_a_taken_value_has_a_code_of_its_field(reader: Person, field: str) -> None:
    path, body = UNIQUE[field]
    reader.post("/books", json=DUNE)
    answer = reader.post(path, json=body)
    assert (answer.status_code, answer.json()["code"]) == (409, f"{field}_taken")


def test_conflicts_are_told_apart_by_their_codes(reader: Person, librarian: Person) -> None:
    book = reader.add_book()["id"]
    librarian.put(f"/books/{book}/stock", json={"copies": 1})
    reader.post(f"/my-library/{book}")
    loan = reader.post("/loans", json={"book_id": book}).json()["id"]
    expected = {
        "already_shelved": reader.post(f"/my-library/{book}"),
        "no_copies_left": reader.post("/loans", json={"book_id": book}),
        "on_loan": librarian.put(f"/books/{book}/stock", json={"copies": 0}),
        "has_copies": reader.delete(f"/books/{book}"),
        "has_open_loans": reader.delete("/users/me", json={"password": "correct horse battery"}),
    }
    reader.post(f"/loans/{loan}/return")
    expected["already_returned"] = reader.post(f"/loans/{loan}/return")
    for code, answer in expected.items():
        assert (answer.status_code, answer.json()["code"]) == (409, code)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/books/999", 404, "not_found"),
        ("DELETE", "/books", 405, "method_not_allowed"),
        ("GET", "/my-library", 401, "unauthorized"),
        ("GET", "/books?limit=0", 422, "invalid"),
        ("GET", "/books?limit=1&limit=2", 422, "invalid"),
        ("POST", "/books/upload", 401, "unauthorized"),
    ],
)
def test_each_error_has_a_code_and_the_id_of_its_request(
    client: TestClient, method: str, path: str, status: int, code: str
) -> None:
    answers = [client.request(method, path) for _ in range(2)]
    for answer in answers:
        problem = answer.json()
        assert (answer.status_code, problem["status"], problem["code"]) == (status, status, code)
        assert problem["request_id"] == answer.headers["X-Request-ID"]
    assert len({answer.json()["request_id"] for answer in answers}) == 2
