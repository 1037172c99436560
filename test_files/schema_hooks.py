"""What schemathesis, as test_schema.py runs it, must know of this service."""

import os
from typing import Any

import schemathesis

# Who signs in for the run must not be made an outlaw in the middle of it.
MINE = {"user_id": os.environ["MY_USER_ID"], "session_id": os.environ["MY_SESSION_ID"]}
A_STREAM = 0.05  # seconds


def _number(value: object) -> str:
    return str(value).lstrip("0")  # 002 is 2, too


@schemathesis.hook
def filter_case(_context: Any, case: Any) -> bool:
    changes = case.method in ("PATCH", "DELETE")
    return not (changes and any(_number(case.path_parameters.get(name)) == mine for name, mine in MINE.items()))


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
