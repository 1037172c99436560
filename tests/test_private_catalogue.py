"""`PUBLIC_CATALOGUE=false`: all but the service's health, signing in and the page needs a token."""

import pytest
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient

import covers
import database
from main import app
from settings import settings
from tests.fixtures import DUNE, PASSWORD, Person, sign_up

OPEN = ("/", "/health", "/login", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json", "/b/{book_id:id}")
ROUTES = [
    (method, route.path)
    for route in app.routes
    if isinstance(route, APIRoute)
    if not route.path.startswith(("/auth/", "/static")) and route.path not in OPEN
    for method in sorted(route.methods or ())
]


@pytest.fixture(autouse=True)
def private_catalogue(monkeypatch: pytest.MonkeyPatch, client: TestClient, reader: Person) -> None:
    reader.add_book(**DUNE)
    monkeypatch.setattr(settings, "public_catalogue", False)


@pytest.mark.parametrize(("method", "path"), ROUTES, ids=[" ".join(route) for route in ROUTES])
def test_a_visitor_is_asked_to_sign_in(client: TestClient, method: str, path: str) -> None:
    for name in ("book_id", "upload_id", "loan_id", "user_id"):
        path = path.replace(f"{{{name}:id}}", "1")
    for variant in (path, f"{path}/"):
        for headers in ({}, {"Authorization": "Bearer nonsense"}):
            answer = client.request(method, variant, headers=headers)
            assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
            assert answer.headers["Content-Type"] == "application/problem+json"
            assert "Dune" not in answer.text


@pytest.mark.parametrize("path", ["/", "/b/1", "/health", "/docs", "/redoc", "/openapi.json", "/static/app.js"])
def test_the_page_and_health_need_no_token(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 200
    assert "Dune" not in answer.text or path == "/openapi.json"  # an example


def test_a_reader_signs_up_and_reads_the_catalogue(client: TestClient) -> None:
    ada = sign_up(client, "ada")
    for path in ("/books", "/books/1", "/books/genres", "/books/1/reviews", "/books/1/stock", "/books/export"):
        assert ada.get(path).status_code == 200
    ada.post("/auth/logout")
    assert ada.get("/books").status_code == 401
    assert client.post("/login", json={"username": "ada", "password": PASSWORD}).status_code == 200


def test_unknown_paths_do_not_tell_what_exists(client: TestClient) -> None:
    assert {client.get(path).status_code for path in ("/books/1", "/books/2", "/nowhere")} == {401}


@pytest.mark.parametrize("query", ["v=1", "optional=true"])
def test_shared_caches_keep_no_cover(reader: Person, query: str) -> None:
    database.write_sync(covers.store, "9780441172719", b"\xff\xd8\xff")
    answer = reader.get(f"/books/1/cover?{query}")
    assert (answer.status_code, "public" in answer.headers["Cache-Control"]) == (200, False)
