"""The OpenAPI schema: complete, correct, and sufficient to generate a client from."""

import re
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

import jsonschema_rs
import pytest
from fastapi.testclient import TestClient

from main import app
from tests.data.refusals import REFUSALS
from tests.fixtures import DUNE, Person

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
        schema = node.get("schema", node)
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


# JSON Schema 2020-12, as far as it is used here.
KEYWORDS = set(
    "$ref title description type format enum const default examples anyOf not items properties required"
    " additionalProperties minLength maxLength pattern minimum maximum exclusiveMinimum multipleOf minItems maxItems"
    " propertyNames".split()
)
MEDIA_TYPE_FIELDS = {"schema", "example", "examples", "encoding"}


def schemas() -> Iterator[tuple[str, Json]]:
    """Every schema, with those within it."""
    for pointer, node in nodes({name: part for name, part in SCHEMA.items() if name != "components"}):
        if isinstance(node.get("schema"), dict):
            yield from within(node["schema"], pointer)
    for name, schema in COMPONENTS.items():
        yield from within(schema, name)


def within(schema: Json, pointer: str) -> Iterator[tuple[str, Json]]:
    yield pointer, schema
    parts = {**schema.get("properties", {}), **dict(enumerate(schema.get("anyOf", ())))}
    parts |= {
        name: schema[name] for name in ("items", "additionalProperties", "not") if isinstance(schema.get(name), dict)
    }
    for name, part in parts.items():
        yield from within(part, f"{pointer}/{name}")


def test_schemas_have_only_keywords_of_json_schema() -> None:
    """Such as `minimum`, not pydantic's `ge` or `max_digits`."""
    found = list(schemas())
    assert len(found) > 300
    assert {pointer: set(schema) - KEYWORDS for pointer, schema in found if set(schema) - KEYWORDS} == {}


def test_media_types_have_only_fields_of_openapi_3_1() -> None:
    """`itemSchema` is one of 3.2."""
    assert SCHEMA["openapi"] == "3.1.0"
    for _, node in nodes(SCHEMA):
        contents: Any = node.get("content", {})
        for content in contents.values():
            assert content.keys() <= MEDIA_TYPE_FIELDS, content


def test_references_lead_somewhere() -> None:
    for pointer, node in nodes(SCHEMA):
        if isinstance(reference := node.get("$ref"), str):
            target: Any = SCHEMA
            for name in reference.removeprefix("#/").split("/"):
                assert name in target, (pointer, reference)
                target = target[name]


PATCHES = {name: operation for name, (method, _, operation) in OPERATIONS.items() if method == "PATCH"}


@pytest.mark.parametrize("name", PATCHES)
def test_shapes_of_a_patch_have_no_default_and_no_required_field(name: str) -> None:
    """A generated client sends a default, which would change what its user has left out."""
    shape = COMPONENTS[PATCHES[name]["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]]
    assert [pointer for pointer, schema in within(shape, name) if "default" in schema] == []
    assert "required" not in shape


def test_no_other_shape_needs_null_as_a_default() -> None:
    assert [pointer for pointer, schema in schemas() if schema.get("default", "") is None] == []


BOUNDS: dict[tuple[str, str], Json] = {
    ("EntryUpdate", "rating"): {"minimum": 0.25, "maximum": 5, "multipleOf": 0.25},
    ("BookCreate", "pages"): {"minimum": 1, "maximum": 100_000},
    ("BookUpdate", "publication_year"): {"minimum": -5000, "maximum": 9999},
    ("BookCreate", "price"): {"minimum": 0, "maximum": 9_999_999.99, "multipleOf": 0.01},
    ("LoanCreate", "book_id"): {"minimum": 1, "maximum": 2**31 - 1},
    ("StockChange", "quantity"): {"minimum": -1_000_000, "maximum": 1_000_000},
}


@pytest.mark.parametrize(("model", "field"), BOUNDS, ids=map(" ".join, BOUNDS))
def test_numbers_have_their_bounds(model: str, field: str) -> None:
    schema = COMPONENTS[model]["properties"][field]
    number = schema.get("anyOf", [schema])[0]
    assert number["type"] in ("number", "integer")
    expected = BOUNDS[model, field]
    assert {name: number[name] for name in expected} == expected
    assert "pattern" not in number


def test_alternatives_are_only_null() -> None:
    """Generators make a class of its own for any other."""
    unions = {pointer: schema["anyOf"] for pointer, schema in schemas() if "anyOf" in schema}
    assert len(unions) > 40
    assert {p: u for p, u in unions.items() if len(u) != 2 or u[1] != {"type": "null"}} == {
        "FieldError/loc/items": [{"type": "string"}, {"type": "integer"}]
    }


OPTIONAL_TEXTS = {"isbn": "978-0-441-17271-9", "genre": "Novel", "cover_url": "HTTPS://example.com/a"}


@pytest.mark.parametrize("field", OPTIONAL_TEXTS)
@pytest.mark.parametrize("blank", ["", "  "], ids=["empty", "spaces"])
def test_a_blank_text_is_valid_and_taken_for_null(reader: Person, field: str, blank: str) -> None:
    reference = {"$ref": "#/components/schemas/BookCreate"}
    for value in (OPTIONAL_TEXTS[field], blank):
        assert schema_errors(reference, {"title": "A", "author": "B", field: value}) == []
    assert reader.add_book(**{field: blank})[field] is None


def test_patterns_are_valid_where_unicode_is_on() -> None:
    """JavaScript's flag `u` allows a backslash only before what needs one."""
    patterns = {schema["pattern"] for _, schema in schemas() if "pattern" in schema}
    assert len(patterns) > 5
    invalid = re.compile(r"\\(?!x[0-9a-f]{2})[^\^$.*+?()\[\]{}|/\\dDsSwWbB]")
    assert {pattern for pattern in patterns if invalid.search(pattern)} == set()


def test_files_are_binary() -> None:
    for name in ("upload_books", "import_library"):
        content = OPERATIONS[name][2]["requestBody"]["content"]
        (form,) = content.values()
        file = COMPONENTS[form["schema"]["$ref"].rpartition("/")[2]]["properties"]["file"]
        assert list(content) == ["multipart/form-data"]
        assert (file["type"], file["format"]) == ("string", "binary")


def test_every_body_and_every_error_has_one_media_type() -> None:
    for name, (_, _, operation) in OPERATIONS.items():
        assert len(operation.get("requestBody", {"content": [1]})["content"]) == 1, name
    for name, response in SCHEMA["components"]["responses"].items():
        assert list(response["content"]) == ["application/problem+json"], name
    assert list(OPERATIONS["login"][2]["requestBody"]["content"]) == ["application/json"]
    assert list(OPERATIONS["token"][2]["requestBody"]["content"]) == ["application/x-www-form-urlencoded"]


def test_security_servers_and_license_are_defined() -> None:
    assert (SCHEMA["security"], SCHEMA["servers"]) == ([], [{"url": "/"}])
    assert SCHEMA["info"]["license"]["identifier"] == "MIT"
    under = TestClient(app, root_path="/library").get("/openapi.json").json()
    assert under["servers"][0] == {"url": "/library"}


def test_every_parameter_of_a_path_has_an_example() -> None:
    for name, (_, _, operation) in OPERATIONS.items():
        for parameter in operation.get("parameters", ()):
            assert parameter["in"] != "path" or "example" in parameter, name


def test_examples_of_two_operations_do_not_collide() -> None:
    """So that one can be tried after the other."""
    register, new = (COMPONENTS["UserCreate"]["properties"], COMPONENTS["AccountCreate"]["examples"][0])
    for name in ("username", "email"):
        assert new[name] not in register[name]["examples"]
    replaced = OPERATIONS["replace_book"][2]["requestBody"]["content"]["application/json"]["examples"]
    for example in replaced.values():
        assert example["value"]["isbn"] not in COMPONENTS["BookCreate"]["properties"]["isbn"]["examples"]
        assert schema_errors({"$ref": "#/components/schemas/BookCreate"}, example["value"]) == []


def test_every_operation_has_one_tag() -> None:
    """Of an operation with two, generators make two, whose names collide."""
    assert {name: o["tags"] for name, (_, _, o) in OPERATIONS.items() if len(o["tags"]) != 1} == {}
    assert SCHEMA["tags"][0]["name"] == "Catalogue"


def test_every_example_is_valid_by_its_schema() -> None:
    found = list(examples())
    assert len(found) > 150
    assert {pointer: errors for pointer, schema, example in found if (errors := schema_errors(schema, example))} == {}


def test_an_invalid_example_is_detected() -> None:
    assert schema_errors({"$ref": "#/components/schemas/BookCreate"}, {"title": "", "colour": "red"})


def values_errors(method: str, path: str, values: Json) -> list[str]:
    """Of a request's query or body, by the document."""
    (operation,) = (o for m, p, o in OPERATIONS.values() if m == method and re.sub(r"{\w+}", "1", p) == path)
    if "requestBody" in operation:
        (content,) = operation["requestBody"]["content"].values()
        return schema_errors(content["schema"], values)
    schemas = {parameter["name"]: parameter["schema"] for parameter in operation["parameters"]}
    return [error for name, value in values.items() for error in schema_errors(schemas[name], value)]


@pytest.mark.parametrize("rule", REFUSALS)
def test_a_rule_that_may_refuse_valid_data_is_needed(admin: Person, rule: str) -> None:
    """A request that is valid by the document is refused by this rule, which test_schema.py excuses, and no other."""
    refusal = REFUSALS[rule]
    method, path, values = refusal.method, refusal.path, refusal.values
    assert values_errors(method, path, values) == []
    book = admin.add_book()["id"]
    admin.put(f"/books/{book}/stock", json={"copies": 1})
    admin.post(f"/my-library/{book}")
    headers = {"Idempotency-Key": "1"} if refusal.fields == "idempotency-key" else {}
    admin.post("/books", json=DUNE, headers=headers)
    how = {"GET /books": "params", "GET /books/external": "params", "POST /books/upload": "files"}
    how["POST /auth/token"] = "data"
    answer = admin.request(method, path, headers=headers, **{how.get(f"{method} {path}", "json"): values})
    assert answer.status_code == 422, answer.text
    (error,) = answer.json()["errors"]
    assert [name for name, one in REFUSALS.items() if one.excuses(error)] == [rule]


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
    if (reference := body["schema"].get("anyOf", [body["schema"]])[0].get("$ref"))
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
    summaries = [operation["summary"] for _, _, operation in OPERATIONS.values() if "deprecated" not in operation]
    assert len(set(summaries)) == len(summaries)


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
