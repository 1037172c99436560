"""The types of events: each that the code records has a schema and a row in docs/live-feed.md."""

import ast
import itertools
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

import external
from events import ADMIN_TYPES
from main import app
from settings import settings
from tests.fixtures import (
    DUNE,
    PASSWORD,
    ROOT,
    Catalogues,
    Clock,
    Person,
    Recorded,
    code_in,
    event_validators,
    sign_up,
    token_in,
)

SCHEMAS: dict[str, Any] = app.openapi()["components"]["schemas"]
TYPES = SCHEMAS["EventData"]["properties"]
ROWS = re.findall(
    r"^\| (`[a-z]+\..+?) \| (.+?) \| (.+?) \|$", (ROOT / "docs" / "live-feed.md").read_text(), re.MULTILINE
)
DOCUMENTED = {name: (reaches, data) for types, reaches, data in ROWS for name in re.findall(r"`(.+?)`", types)}

# --- what the code records, by its calls of `record` --------------------------------------------------------------

Calls = dict[
    str, list[tuple[ast.Call, ast.FunctionDef | None]]
]  # by the function's name, each with the function around


def calls_in(node: ast.AST, around: ast.FunctionDef | None, calls: Calls) -> None:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Call):
            name = child.func.attr if isinstance(child.func, ast.Attribute) else getattr(child.func, "id", "")
            calls[name].append((child, around))
        calls_in(child, child if isinstance(child, ast.FunctionDef) else around, calls)


def values(node: ast.expr, around: ast.FunctionDef | None, calls: Calls) -> Iterator[str]:
    """The texts that an expression may have."""
    match node:
        case ast.Constant():
            yield str(node.value)
        case ast.IfExp():
            yield from values(node.body, around, calls)
            yield from values(node.orelse, around, calls)
        case ast.JoinedStr():
            yield from map("".join, itertools.product(*(values(part, around, calls) for part in node.values)))
        case ast.FormattedValue():
            yield from values(node.value, around, calls)
        case ast.Name() if around is not None:
            parameters = [argument.arg for argument in (*around.args.posonlyargs, *around.args.args)]
            if node.id in parameters:
                for call, caller in calls[around.name]:
                    yield from values(call.args[parameters.index(node.id)], caller, calls)
            for part in ast.walk(around):
                if isinstance(part, ast.Assign) and ast.unparse(part.targets[0]) == node.id:
                    yield from values(part.value, around, calls)
        case _:
            raise AssertionError(ast.unparse(node))


def test_every_type_that_the_code_records_has_a_schema_and_a_row() -> None:
    calls: Calls = defaultdict(list)
    for path in ROOT.glob("*.py"):
        calls_in(ast.parse(path.read_text()), None, calls)
    recorded = {value for call, around in calls["record"] for value in values(call.args[1], around, calls)}
    assert len(recorded) > 35
    assert recorded == TYPES.keys() == DOCUMENTED.keys()


# --- schemas and rows ---------------------------------------------------------------------------------------------


def fields_of(name: str) -> set[str]:
    return set(SCHEMAS[TYPES[name]["$ref"].rpartition("/")[2]].get("properties", ()))


@pytest.mark.parametrize("name", TYPES)
def test_rows_name_the_fields_of_the_schema(name: str) -> None:
    _, data = DOCUMENTED[name]
    named = set(re.findall(r"`(\w+)`", data))
    if data.startswith("the "):
        model = {"book": "BookPublic", "entry": "EntryPublic", "loan": "LoanPublic", "upload": "UploadPublic"}
        whole = set(SCHEMAS[model[data.split()[1]]]["properties"])
        assert fields_of(name) <= whole | {"title"}
        assert {field for field in whole - fields_of(name) if not field.endswith("_at")} <= named
    else:
        assert named == fields_of(name)


def test_every_field_of_every_schema_is_required() -> None:
    names = {"EventData"} | {schema["$ref"].rpartition("/")[2] for schema in TYPES.values()}
    for name in names:
        assert set(SCHEMAS[name].get("required", ())) == set(SCHEMAS[name].get("properties", ())), name


def test_a_polled_event_is_as_its_schema_says(reader: Person) -> None:
    reader.add_book(**DUNE)
    (event,) = reader.get("/events", params={"types": "book.*"}).json()["items"]
    assert event["data"].keys() == fields_of(event["type"])


# --- every type, recorded -----------------------------------------------------------------------------------------


def record_account_types(client: TestClient, admin: Person, mailbox: list[Any], clock: Clock) -> None:
    nora = sign_up(client, "nora")
    client.post(f"/auth/verify-email/{token_in(mailbox[-1])}")
    client.post("/login", json={"username": "nora", "password": "wrong"})
    nora.patch("/users/me", json={"email": "new@example.com", "current_password": PASSWORD})
    client.post(f"/auth/verify-email/{token_in(mailbox[-1])}")
    client.post("/auth/forgot-password", json={"email": "new@example.com"})
    reset = {"email": "new@example.com", "otp": code_in(mailbox[-1]), "new_password": "far from Arrakis"}
    assert client.post("/auth/reset-password", json=reset).status_code == 204
    nora = Person(client, "nora", "far from Arrakis")
    change = {"current_password": "wrong", "new_password": PASSWORD}
    nora.post("/auth/change-password", json=change)
    assert nora.post("/auth/change-password", json=change | {"current_password": "far from Arrakis"}).status_code == 204
    assert nora.post("/auth/logout").status_code == 204
    used = {"refresh_token": Person(client, "nora").tokens["refresh_token"]}
    client.post("/auth/refresh", json=used)
    clock.advance(seconds=11)
    client.post("/auth/refresh", json=used)
    nora_id = admin.get("/users", params={"search": "nora"}).json()["items"][0]["id"]
    for update in ({"role": "librarian"}, {"is_active": False}, {"is_active": True}):
        assert admin.patch(f"/users/{nora_id}", json=update).status_code == 200


def record_book_types(admin: Person, reader: Person) -> None:
    book = reader.add_book(**DUNE)["id"]
    reader.patch(f"/books/{book}", json={"pages": 535})
    admin.post(f"/books/{book}/stock", json={"quantity": 1})
    reader.post(f"/my-library/{book}")
    for rating in (4, 4.5, None):
        reader.patch(f"/my-library/{book}", json={"rating": rating})
    reader.delete(f"/my-library/{book}")
    loan = reader.post("/loans", json={"book_id": book}).headers["Location"]
    reader.post(f"{loan}/renew")
    reader.post(f"{loan}/return")
    assert admin.delete(f"/books/{book}").status_code == 204
    reader.upload("title,author\nA,B\n")
    shelf = "Book Id,Title,Author,My Rating,Exclusive Shelf\n1,Emma,Jane Austen,5,read\n"
    assert reader.upload(shelf, path="/my-library/import")["inserted"] == 1
    assert reader.delete("/users/me", json={"password": PASSWORD}).status_code == 204


def reach(recorded: Recorded) -> set[str]:
    if not recorded.private:
        return {"everybody"}
    owner = {"its owner"} if recorded.owner else set()
    return owner | ({"admins"} if recorded.type.startswith(ADMIN_TYPES) else set())


@pytest.mark.slow
def test_every_type_is_recorded_as_its_schema_and_its_row_say(
    client: TestClient,
    admin: Person,
    reader: Person,
    mailbox: list[Any],
    clock: Clock,
    others: Catalogues,
    monkeypatch: pytest.MonkeyPatch,
    recorded_events: list[Recorded],
) -> None:
    """`recorded_events` compares each with its schema."""
    record_account_types(client, admin, mailbox, clock)
    record_book_types(admin, reader)
    assert client.portal is not None
    monkeypatch.setattr(settings, "harvest_query", "emma")
    client.portal.call(external.harvest)
    others.always = lambda handler: handler.send_error(503)
    clock.advance(days=2)
    client.portal.call(external.harvest)
    reaches: dict[str, set[str]] = defaultdict(set)
    for recorded in recorded_events:
        reaches[recorded.type] |= reach(recorded)
    assert reaches == {name: set(row[0].split(", ")) for name, row in DOCUMENTED.items()}


def test_an_event_that_differs_from_its_schema_is_found(recorded_events: list[Recorded]) -> None:
    good: dict[str, Any] = {"id": 1, "title": "Dune", "author": "Frank Herbert"}
    changes: tuple[dict[str, Any], ...] = ({"id": "1"}, {"more": 1}, {"title": None})
    validate = event_validators()["book.deleted"]
    assert list(validate(good)) == []
    for change in changes:
        assert list(validate(good | change)), json.dumps(change)
    assert list(validate({"id": 1}))
