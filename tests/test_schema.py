"""The service against its own description: thousands of requests made from /openapi.json, by schemathesis."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fixtures import ROOT, Catalogues, Person, Server, sign_up

SEED = int(os.environ.get("SCHEMA_SEED", "20260301"))
CASES = int(os.environ.get("SCHEMA_CASES", "4"))  # of each operation, in each phase that draws by chance
# Walks along the links, of up to ten steps. What a walk finds changes how the next is drawn, which Hypothesis takes for
# an inconsistency sooner or later, and ends its round: so there are several.
WALKS, ROUNDS = 25 * CASES, CASES
LASTING = {"ACCESS_TOKEN_EXPIRE_MINUTES": "1440"}  # for a run of many cases
# These would end the login that the run goes by.
LEFT_OUT = ("/auth/logout", "/auth/logout-all")
# What a schema can't say, so that a request that follows it may still be refused, and with what.
CURSORS = "422: a cursor is one that the service gave, for a list in this order, and goes with no offset"
RULES = "422: check digits, NUL characters, dates to come, passwords that are too common, fields that need each other"
VERSIONS = "412: only the present version is good. " + RULES
CODES = "400: a code that was not mailed. " + RULES
REFUSALS = {
    CURSORS: (
        *("GET /auth/sessions", "GET /users", "GET /books", "GET /books/{book_id}/reviews", "GET /books/upload"),
        *("GET /books/upload/{upload_id}/errors", "GET /my-library", "GET /loans"),
    ),
    RULES: (
        *("POST /login", "POST /auth/token", "POST /auth/refresh", "POST /auth/register", "POST /auth/change-password"),
        *("GET /auth/verify-email/{token}", "PATCH /users/me", "DELETE /users/me", "POST /users"),
        *("POST /auth/forgot-password", "PATCH /users/{user_id}", "GET /books/export", "POST /books"),
        *("POST /books/upload", "POST /my-library/import", "GET /books/external", "POST /books/external"),
        *("PATCH /my-library/{book_id}", "POST /books/{book_id}/stock", "POST /loans"),
    ),
    VERSIONS: ("PUT /books/{book_id}", "PATCH /books/{book_id}", "DELETE /books/{book_id}"),
    CODES: ("POST /auth/reset-password",),
}
# To delete an upload is to cancel it: what became of it can still be read, which a walk takes for a fault.
NOT_WALKED = "DELETE /books/upload/{upload_id}"
ALWAYS = ["2xx", "3xx", "401", "403", "404", "409", "429"]


def configuration() -> str:
    lines = [f'hooks = "{ROOT / "tests" / "data" / "schema_hooks.py"}"']
    lines += ["[phases.stateful]", "max-steps = 10", f"generation.max-examples = {WALKS}"]
    for why, operations in REFUSALS.items():
        allowed = [*ALWAYS, "422", why[:3]]
        for operation in operations:
            lines += ["[[operations]]", f'include-name = "{operation}"']
            lines += [f"checks.positive_data_acceptance.expected-statuses = {list(dict.fromkeys(allowed))}"]
    return "\n".join(lines)


@pytest.mark.slow
@pytest.mark.parametrize("role", ["reader", "admin"])
def test_every_answer_is_one_that_the_docs_tell_of(
    serve: Callable[..., Server], others: Catalogues, tmp_path: Path, role: str
) -> None:
    server = serve(GOOGLE_BOOKS_URL=others.url, OPEN_LIBRARY_URL=others.url, LOG_LEVEL="WARNING", **LASTING)
    admin = Person(server.client, "admin", "admin")
    rita = sign_up(server.client, "rita")
    admin.patch("/users/2", json={"role": role})
    for title in ("Dune", "Emma"):
        book = rita.add_book(title=title)
        admin.post(f"/books/{book['id']}/stock", json={"quantity": 5})
        rita.post(f"/my-library/{book['id']}", json={"status": "completed"})
        rita.patch(f"/my-library/{book['id']}", json={"rating": 4, "review": "Good."})
    rita.post("/loans", json={"book_id": 1})
    rita.upload("title,author\nA,B\n,C\n")
    (tmp_path / "schemathesis.toml").write_text(configuration())
    session = next(one["id"] for one in rita.get("/auth/sessions").json()["items"] if one["current"])
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", "schemathesis.toml", "run"]
    command += [f"{server.client.base_url}/openapi.json", "--checks", "all", "-n", str(CASES)]
    command += ["--header", f"Authorization: Bearer {rita.tokens['access_token']}", "--request-timeout", "20"]
    command += ["--continue-on-failure", "--generation-database", "none", "--no-color", "--report", "ndjson"]
    command += [part for path in LEFT_OUT for part in ("--exclude-path", path)]
    own = {"MY_USER_ID": "2", "MY_SESSION_ID": str(session)}
    followed = 0
    for number in range(1 + ROUNDS):
        walk = ["--phases", "stateful", "--exclude-name", NOT_WALKED]
        phases = walk if number else ["--phases", "examples,coverage,fuzzing"]
        run = subprocess.run(
            [*command, "--seed", str(SEED + number), *phases],
            cwd=tmp_path,
            env={**os.environ, **own},
            capture_output=True,
            text=True,
            timeout=225 * CASES,
            check=False,
        )
        print(run.stdout[-20_000:], run.stderr[-5000:])
        assert run.returncode == 0, f"seed {SEED + number}"
        followed += sum(map(int, re.findall(r"API Links: +(\d+) covered", run.stdout)))
    assert followed > 10 * ROUNDS
    assert "Traceback" not in server.log.read_text()
