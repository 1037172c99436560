"""What schemathesis, as test_schema.py runs it, must know of this service."""

import os
from typing import Any

import schemathesis

# Who signs in for the run must not be made an outlaw in the middle of it.
MINE = {"user_id": os.environ["MY_USER_ID"], "session_id": os.environ["MY_SESSION_ID"]}
A_STREAM = 0.05  # seconds


@schemathesis.hook
def filter_case(_context: Any, case: Any) -> bool:
    return not (_ends_the_run(case) or _is_no_fault(case))


def _ends_the_run(case: Any) -> bool:
    changes = case.method in ("PATCH", "DELETE")
    # 002 is 2, too.
    return changes and any(str(case.path_parameters.get(name)).lstrip("0") == mine for name, mine in MINE.items())


def _is_no_fault(case: Any) -> bool:
    """A file that is a number is, once it is sent, a file of digits like any other."""
    is_form = case.media_type == "multipart/form-data" and isinstance(case.body, dict)
    return is_form and not isinstance(case.body.get("file", ""), str | bytes)


@schemathesis.hook
def before_call(_context: Any, case: Any, _kwargs: Any) -> None:
    """A stream ends by itself only if it is told when."""
    if case.path != "/stream":
        return
    query = dict(case.query or {})
    try:
        soon = float(query["seconds"]) <= A_STREAM
    except (KeyError, TypeError, ValueError):
        soon = "seconds" in query  # and not a number: to be refused
    if not soon:
        query["seconds"] = A_STREAM
    case.query = query
