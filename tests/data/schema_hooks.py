"""Hooks of schemathesis for test_schema.py."""

import os
from typing import Any
from uuid import uuid4

import schemathesis

from tests.data.refusals import REFUSALS

# The run must not change or delete its own user and session.
MINE = {"user_id": os.environ["MY_USER_ID"], "session_id": os.environ["MY_SESSION_ID"]}
STREAM_SECONDS = 0.05
EVENT = {
    "id": {"type": "string"},
    "event": {"type": "string"},
    "data": {"type": "string"},
    "retry": {"type": "integer"},
}


@schemathesis.hook
def before_load_schema(_context: Any, raw_schema: dict[str, Any]) -> None:
    """The document describes a stream as the text that it is; schemathesis checks the schema against each event. And
    uvicorn answers broken HTTP by itself."""
    raw_schema["components"]["responses"]["BadRequest"]["content"]["text/plain"] = {}
    content = raw_schema["paths"]["/stream"]["get"]["responses"]["200"]["content"]["text/event-stream"]
    content["schema"] = {"type": "object", "properties": EVENT}


@schemathesis.hook
def filter_case(_context: Any, case: Any) -> bool:
    return not (_ends_the_run(case) or _is_valid_after_all(case))


def _ends_the_run(case: Any) -> bool:
    changes = case.method in ("PATCH", "DELETE")
    # 002 is 2, too.
    return changes and any(str(case.path_parameters.get(name)).lstrip("0") == mine for name, mine in MINE.items())


def _is_valid_after_all(case: Any) -> bool:
    """Forms have only texts: a number as `file` is sent as a file of digits, and 0 as `dry_run` is false."""
    is_form = case.media_type == "multipart/form-data" and isinstance(case.body, dict)
    return is_form and not all(isinstance(value, str | bytes | bool) for value in case.body.values())


@schemathesis.hook
def before_call(_context: Any, case: Any, _kwargs: Any) -> None:
    """Without `seconds`, a stream does not end. A key that comes again would get the answer to another walk, whose book
    may be deleted since."""
    if "Idempotency-Key" in (case.headers or {}) and case.meta is not None and case.meta.generation.mode.is_positive:
        case.headers["Idempotency-Key"] = str(uuid4())
    if case.path != "/stream":
        return
    query = dict(case.query or {})
    try:
        ends_soon = float(query["seconds"]) <= STREAM_SECONDS
    except (KeyError, TypeError, ValueError):
        ends_soon = "seconds" in query  # not a number: 422
    if not ends_soon:
        query["seconds"] = STREAM_SECONDS
    case.query = query


@schemathesis.check
def valid_data_is_not_refused(_context: Any, response: Any, case: Any) -> None:
    """But for a few rules, 422 needs data that the schema forbids."""
    if response.status_code == 422 and case.meta is not None and case.meta.generation.mode.is_positive:
        errors = response.json()["errors"]
        unexpected = [error for error in errors if not any(rule.excuses(error) for rule in REFUSALS.values())]
        assert unexpected == [], f"valid by its schema, and refused: {unexpected}"
