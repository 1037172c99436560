"""The manual at /docs: whole, true to itself, and good enough to make a client from."""

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from fastapi.testclient import TestClient

from api import EXAMPLES, OPEN_TO_ALL, SUMMARIES
from main import app
from tests.fixtures import DUNE, Server

Json = dict[str, Any]
SCHEMA: Json = app.openapi()
OPERATIONS = {
    operation["operationId"]: (method.upper(), path, operation)
    for path, methods in SCHEMA["paths"].items()
    for method, operation in methods.items()
}


def nodes(value: Any, place: str = "#") -> Iterator[tuple[str, Json]]:
    if isinstance(value, dict):
        yield place, value
        for name, part in value.items():
            yield from nodes(part, f"{place}/{name}")
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from nodes(part, f"{place}/{number}")


def shown() -> Iterator[tuple[str, Json, Any]]:
    """Every example, with the schema that it is one of."""
    for place, node in nodes(SCHEMA):
        schema = node["schema"] if "schema" in node else node.get("itemSchema", node)
        if place.endswith("/properties"):
            continue  # a field that is called so
        if isinstance(node.get("examples"), list):
            yield from ((place, schema, example) for example in node["examples"])
        if "example" in node:
            yield place, schema, node["example"]


def faults(schema: Json, example: Any) -> list[str]:
    rooted = {**schema, "components": SCHEMA["components"]}
    validator = jsonschema_rs.Draft202012Validator(rooted, validate_formats=True)
    return [error.message for error in validator.iter_errors(example)]


def test_every_example_is_one_of_what_it_is_shown_for() -> None:
    found = list(shown())
    assert len(found) > 80
    assert {place: wrong for place, schema, example in found if (wrong := faults(schema, example))} == {}


def test_an_example_that_is_none_would_be_found() -> None:
    assert faults({"$ref": "#/components/schemas/BookCreate"}, {"title": "", "colour": "red"})


def test_every_body_and_every_answer_has_an_example() -> None:
    there = SCHEMA["components"]["schemas"]
    assert set(EXAMPLES) <= set(there), "an example of nothing"
    bodies = {
        reference.rpartition("/")[2]
        for _, _, operation in OPERATIONS.values()
        if (body := operation.get("requestBody", {}).get("content", {}).get("application/json"))
        if (reference := body["schema"].get("$ref"))
    }
    bare = {
        name
        for name in bodies
        if "examples" not in there[name]
        and not all(
            "examples" in part or "enum" in part or "$ref" in part for part in there[name]["properties"].values()
        )
    }
    assert bare == set()


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_says_what_it_is(name: str) -> None:
    _, _, operation = OPERATIONS[name]
    assert len(operation["summary"]) > 6
    assert operation["summary"][0].isupper()
    assert not operation["summary"].endswith(".")
    assert len(operation["description"]) > 8
    assert operation["description"].rstrip().endswith((".", "`", ")"))
    assert operation["tags"]
    told = {tag["name"] for tag in SCHEMA["tags"] if tag["description"]}
    assert set(operation["tags"]) <= told
    assert name.isidentifier()
    assert name.islower()


def test_every_tag_is_in_use_and_no_summary_is_of_something_gone() -> None:
    assert {tag["name"] for tag in SCHEMA["tags"]} == {tag for _, _, o in OPERATIONS.values() for tag in o["tags"]}
    assert set(SUMMARIES) <= set(OPERATIONS)
    assert len({operation["summary"] for _, _, operation in OPERATIONS.values()}) == len(OPERATIONS)


def test_every_error_is_told_as_a_problem_document() -> None:
    for name, (_, _, operation) in OPERATIONS.items():
        for status, answer in operation["responses"].items():
            if int(status) >= 400:
                told = SCHEMA["components"]["responses"][answer["$ref"].rpartition("/")[2]]
                problem = told["content"]["application/problem+json"]
                assert problem["example"]["status"] == int(status), name
                assert problem["example"]["title"] == HTTPStatus(int(status)).phrase


def test_what_needs_no_token_answers_without_one(client: TestClient) -> None:
    for name in OPEN_TO_ALL:
        _, path, operation = OPERATIONS[name]
        assert {} in operation["security"]
        assert client.get(path, params={"seconds": 0.01} if name == "stream" else {}).status_code == 200


LINKED = ("create_book", "borrow", "upload_books", "shelve_book", "create_user")


@pytest.mark.parametrize("name", LINKED)
def test_what_was_made_leads_to_what_can_be_done_with_it(name: str) -> None:
    _, _, operation = OPERATIONS[name]
    links = next(answer["links"] for status, answer in operation["responses"].items() if status in ("201", "202"))
    for link in links.values():
        _, path, _ = OPERATIONS[link["operationId"]]
        assert all(f"{{{parameter}}}" in path for parameter in link["parameters"])


@pytest.mark.slow
def test_a_client_made_from_the_docs_works(
    serve: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve()
    (tmp_path / "openapi.json").write_text(server.client.get("/openapi.json").text)
    # No file of a database is known to it, and nobody reads the code that it makes.
    (tmp_path / "config.yaml").write_text(
        "content_type_overrides: {application/vnd.sqlite3: application/octet-stream}\npost_hooks: []\n"
    )
    generate = [sys.executable, "-m", "openapi_python_client", "generate", "--path", "openapi.json", "--meta", "none"]
    made = subprocess.run(
        [*generate, "--config", "config.yaml", "--output-path", "made_client", "--fail-on-warning"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stdout + made.stderr
    monkeypatch.syspath_prepend(str(tmp_path))

    def api(tag: str, name: str) -> Any:
        return importlib.import_module(f"made_client.api.{tag}.{name}")

    models, made_client = importlib.import_module("made_client.models"), importlib.import_module("made_client")
    base = str(server.client.base_url)
    with made_client.Client(base_url=base) as visitor:
        rita = models.UserCreate(username="rita", email="rita@example.com", password="a long way to Arrakis")
        assert api("accounts", "register").sync(client=visitor, body=rita).username == "rita"
        # Of an operation with two kinds of body this generator makes a module that does not know all its names.
        given = models.LoginJsonCredentials(username="rita", password="a long way to Arrakis").to_dict()
        tokens = models.TokenPair.from_dict(visitor.get_httpx_client().post("/login", json=given).json())
    with made_client.AuthenticatedClient(base_url=base, token=tokens.access_token) as signed_in:
        book = api("catalogue", "create_book").sync(client=signed_in, body=models.BookCreate(**DUNE))
        assert (book.title, book.isbn) == ("Dune", "9780441172719")
        found = api("catalogue", "list_books").sync(client=signed_in, search="dune")
        assert [one.id for one in found.items] == [book.id]
        shelved = api("my_library", "shelve_book").sync(book.id, client=signed_in, body=models.EntryCreate())
        assert shelved.status == models.ShelfStatus.WISHLIST
        refused = api("my_library", "shelve_book").sync(book.id, client=signed_in, body=models.EntryCreate())
        assert (refused.status, refused.title) == (409, "Conflict")
