"""The OpenAPI schema: complete, correct, and sufficient to generate a client from."""

import importlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from fastapi.testclient import TestClient

from main import app
from tests.fixtures import DUNE, Server

Json = dict[str, Any]
SCHEMA: Json = app.openapi()
COMPONENTS: Json = SCHEMA["components"]["schemas"]
OPERATIONS = {
    operation["operationId"]: (method.upper(), path, operation)
    for path, methods in SCHEMA["paths"].items()
    for method, operation in methods.items()
}


def nodes(value: Any, pointer: str = "#") -> Iterator[tuple[str, Json]]:
    if isinstance(value, dict):
        yield pointer, value
        for name, part in value.items():
            yield from nodes(part, f"{pointer}/{name}")
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from nodes(part, f"{pointer}/{number}")


def examples() -> Iterator[tuple[str, Json, Any]]:
    """Every example, with its schema."""
    for pointer, node in nodes(SCHEMA):
        schema = node["schema"] if "schema" in node else node.get("itemSchema", node)
        if pointer.endswith("/properties"):
            continue  # a field of that name
        if isinstance(node.get("examples"), list):
            yield from ((pointer, schema, example) for example in node["examples"])
        if "example" in node:
            yield pointer, schema, node["example"]


def schema_errors(schema: Json, example: Any) -> list[str]:
    rooted = {**schema, "components": SCHEMA["components"]}
    validator = jsonschema_rs.Draft202012Validator(rooted, validate_formats=True)
    return [error.message for error in validator.iter_errors(example)]


def test_every_example_is_valid_by_its_schema() -> None:
    found = list(examples())
    assert len(found) > 150
    assert {pointer: errors for pointer, schema, example in found if (errors := schema_errors(schema, example))} == {}


def test_an_invalid_example_is_detected() -> None:
    assert schema_errors({"$ref": "#/components/schemas/BookCreate"}, {"title": "", "colour": "red"})


def has_examples(model: str) -> bool:
    """On the model, or on each of its fields."""
    schema = COMPONENTS[model]
    fields = schema["properties"].values()
    return "examples" in schema or all(
        any(key in part for _, part in nodes(field) for key in ("examples", "enum", "$ref")) for field in fields
    )


BODIES = {
    reference.rpartition("/")[2]
    for _, _, operation in OPERATIONS.values()
    if (body := operation.get("requestBody", {}).get("content", {}).get("application/json"))
    if (reference := body["schema"].get("$ref"))
}
RESPONSES = ("BookPublic", "EntryPublic", "LoanPublic", "UserPublic", "ReviewPublic", "EventPublic", "UploadPublic")
MORE_RESPONSES = ("SessionPublic", "UploadErrorPublic", "StockPublic", "GenreCount", "Problem", "FieldError", "Health")


def test_every_body_has_an_example() -> None:
    assert len(BODIES) > 15
    assert {model for model in BODIES if not has_examples(model)} == set()


@pytest.mark.parametrize("model", RESPONSES + MORE_RESPONSES)
def test_responses_have_an_example(model: str) -> None:
    assert has_examples(model)


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_is_described(name: str) -> None:
    _, _, operation = OPERATIONS[name]
    assert len(operation["summary"]) > 6
    assert operation["summary"][0].isupper()
    assert not operation["summary"].endswith(".")
    assert operation["description"].startswith(operation["summary"]) or name == "token"
    assert operation["description"].rstrip().endswith((".", "`", ")"))
    assert operation["tags"]
    described = {tag["name"] for tag in SCHEMA["tags"] if tag["description"]}
    assert set(operation["tags"]) <= described
    assert name.isidentifier()
    assert name.islower()


def test_every_tag_is_used_and_summaries_differ() -> None:
    assert {tag["name"] for tag in SCHEMA["tags"]} == {tag for _, _, o in OPERATIONS.values() for tag in o["tags"]}
    assert len({operation["summary"] for _, _, operation in OPERATIONS.values()}) == len(OPERATIONS)


def test_every_error_is_documented_as_a_problem() -> None:
    for name, (_, _, operation) in OPERATIONS.items():
        assert {"400", "422", "503"} <= operation["responses"].keys()
        for status, response in operation["responses"].items():
            if int(status) >= 400:
                documented = SCHEMA["components"]["responses"][response["$ref"].rpartition("/")[2]]
                problem = documented["content"]["application/problem+json"]
                assert problem["example"]["status"] == int(status), name
                assert problem["example"]["title"] == HTTPStatus(int(status)).phrase


def test_operations_that_read_a_token_document_401() -> None:
    for name, (_, _, operation) in OPERATIONS.items():
        if "security" in operation:
            assert "401" in operation["responses"], name


OPTIONAL_TOKEN = {"list_books", "export_books", "list_events", "stream"}


def test_operations_with_an_optional_token_say_so_and_work_without_one(client: TestClient) -> None:
    assert {name for name, (_, _, o) in OPERATIONS.items() if {} in o.get("security", ())} == OPTIONAL_TOKEN
    for name in OPTIONAL_TOKEN:
        _, path, operation = OPERATIONS[name]
        assert operation["security"] == [{"OAuth2PasswordBearer": []}, {}]
        assert client.get(path, params={"seconds": 0.01} if name == "stream" else {}).status_code == 200


def test_other_operations_with_a_token_require_it(client: TestClient) -> None:
    for name, (method, path, operation) in OPERATIONS.items():
        if "security" in operation and name not in OPTIONAL_TOKEN and "requestBody" not in operation:
            address = re.sub(r"\{\w+_id\}", "1", path).replace("{username}", "rita")
            assert client.request(method, address).status_code == 401, name


@pytest.mark.slow
def test_a_generated_client_works(
    serve: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve()
    (tmp_path / "openapi.json").write_text(server.client.get("/openapi.json").text)
    # The generator knows no type for a database file, and formatting its code takes long.
    (tmp_path / "config.yaml").write_text(
        "content_type_overrides: {application/vnd.sqlite3: application/octet-stream}\npost_hooks: []\n"
    )
    generate = [sys.executable, "-m", "openapi_python_client", "generate", "--path", "openapi.json", "--meta", "none"]
    generated = subprocess.run(
        [*generate, "--config", "config.yaml", "--output-path", "generated_client", "--fail-on-warning"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert generated.returncode == 0, generated.stdout + generated.stderr
    monkeypatch.syspath_prepend(str(tmp_path))

    def api(tag: str, name: str) -> Any:
        return importlib.import_module(f"generated_client.api.{tag}.{name}")

    models, generated_client = (
        importlib.import_module("generated_client.models"),
        importlib.import_module("generated_client"),
    )
    base = str(server.client.base_url)
    with generated_client.Client(base_url=base) as visitor:
        rita = models.UserCreate(username="rita", email="rita@example.com", password="a long way to Arrakis")
        assert api("accounts", "register").sync(client=visitor, body=rita).username == "rita"
        # For an operation with two kinds of body, this generator makes a module that fails to import.
        given = models.LoginJsonCredentials(username="rita", password="a long way to Arrakis").to_dict()
        tokens = models.TokenPair.from_dict(visitor.get_httpx_client().post("/login", json=given).json())
    with generated_client.AuthenticatedClient(base_url=base, token=tokens.access_token) as signed_in:
        book = api("catalogue", "create_book").sync(client=signed_in, body=models.BookCreate(**DUNE))
        assert (book.title, book.isbn) == ("Dune", "9780441172719")
        found = api("catalogue", "list_books").sync(client=signed_in, search="dune")
        assert [one.id for one in found.items] == [book.id]
        shelved = api("my_library", "shelve_book").sync(book.id, client=signed_in, body=models.EntryCreate())
        assert shelved.status == models.ShelfStatus.WISHLIST
        refused = api("my_library", "shelve_book").sync(book.id, client=signed_in, body=models.EntryCreate())
        assert (refused.status, refused.title) == (409, "Conflict")
