"""Thousands of requests generated from /openapi.json, by schemathesis."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fixtures import ROOT, Catalogues, Person, Server, sign_up

SEED = int(os.environ.get("SCHEMA_SEED", "20260301"))
CASES = int(os.environ.get("SCHEMA_CASES", "4"))  # of each operation, in each random phase
# Walks are sequences of up to ten linked requests. Responses change what Hypothesis draws next, which ends a round
# early as inconsistent: hence several rounds.
WALKS, ROUNDS = 25 * CASES, CASES
LONG_SESSION = {"ACCESS_TOKEN_EXPIRE_MINUTES": "1440"}
# These would end the session of the run.
EXCLUDED = ("/auth/logout", "/auth/logout-all")
# DELETE cancels an upload, which can still be read: a walk would report it as an error.
NOT_WALKED = "DELETE /books/upload/{upload_id}"
# How valid requests may be answered: 412, if they name a version; 422, by `valid_data_is_not_refused` in the hooks.
EXPECTED = ["2xx", "3xx", "401", "403", "404", "409", "412", "422", "429"]
ALL = 'include-path-regex = "^/"'


def configuration() -> str:
    lines = [f'hooks = "{ROOT / "tests" / "data" / "schema_hooks.py"}"']
    lines += ["[phases.stateful]", "max-steps = 10", f"generation.max-examples = {WALKS}"]
    # 400: the code was never mailed.
    for operations, statuses in ('include-name = "POST /auth/reset-password"', [*EXPECTED, "400"]), (ALL, EXPECTED):
        lines += ["[[operations]]", operations, f"checks.positive_data_acceptance.expected-statuses = {statuses}"]
    return "\n".join(lines)


@pytest.mark.slow
@pytest.mark.parametrize("role", ["reader", "admin"])
def test_every_response_is_documented(
    serve: Callable[..., Server], others: Catalogues, tmp_path: Path, role: str
) -> None:
    server = serve(GOOGLE_BOOKS_URL=others.url, OPEN_LIBRARY_URL=others.url, LOG_LEVEL="WARNING", **LONG_SESSION)
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
    command += [part for path in EXCLUDED for part in ("--exclude-path", path)]
    own = {"MY_USER_ID": "2", "MY_SESSION_ID": str(session), "PYTHONPATH": str(ROOT)}
    links = 0
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
        links += sum(map(int, re.findall(r"API Links: +(\d+) covered", run.stdout)))
    assert links > 10 * ROUNDS
    assert "Traceback" not in server.log.read_text()
