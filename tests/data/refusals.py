"""The rules that the OpenAPI document can't express: they refuse requests with 422 that its schemas allow."""

import re
from typing import Any, NamedTuple


class Refusal(NamedTuple):
    fields: str  # a regular expression, as is the message
    message: str
    method: str  # a request that is refused by this rule and no other
    path: str
    values: dict[str, Any]  # its body, or its query

    def excuses(self, error: dict[str, Any]) -> bool:
        """An item of a problem's `errors`."""
        field = str(error["loc"][-1])
        return bool(re.fullmatch(self.fields, field) and re.fullmatch(self.message, error["msg"]))


LOGIN = {"username": "rita", "email": "rita@example.com"}
BOOK = {"title": "Dune", "author": "Frank Herbert"}
LIST = "is not a cursor of this list in this order"
REFUSALS = {
    # What a value means
    "check digits": Refusal("isbn", "is not an ISBN: .*", "POST", "/books", BOOK | {"isbn": "9780441172718"}),
    "common passwords": Refusal(
        "(new_)?password", "is one of the most common.*", "POST", "/auth/register", LOGIN | {"password": "password"}
    ),
    "cursors of another list": Refusal("cursor", LIST, "GET", "/books", {"cursor": "abcd"}),
    "ids of other catalogues": Refusal(
        "ref", "is not one of .*", "POST", "/books/external", {"source": "openlibrary", "ref": "zyTCAlFPjgYC"}
    ),
    "numbers of words": Refusal(
        "search|title|author|publisher",
        "must have at most 16 words",
        "GET",
        "/books",
        {"search": " ".join("abcdefghijklmnopq")},
    ),
    "empty files": Refusal("file", "is empty", "POST", "/books/upload", {"file": ""}),
    "fields of a form, given twice": Refusal(
        ".*", "is given more than once", "POST", "/auth/token", {"username": "a", "password": "b", "scope": ["c", "d"]}
    ),
    # What depends on the time
    "years ahead": Refusal(
        "publication_year", "must be between .*", "POST", "/books", BOOK | {"publication_year": 9999}
    ),
    "dates ahead": Refusal(
        "published_date", "must be between .*", "POST", "/books", BOOK | {"published_date": "9999-01-01"}
    ),
    "loans from now on": Refusal(
        "due_at", "must be in the future.*", "POST", "/loans", {"book_id": 1, "due_at": "2026-01-01T00:00:00Z"}
    ),
    "times that databases hold": Refusal(
        "(due|started|finished)_at", "is out of range", "PATCH", "/my-library/1", {"started_at": "9999-12-31T00:00:00Z"}
    ),
    # What depends on another field
    "passwords that are names": Refusal(
        "(new_)?password",
        "must not be the user name or the e-mail address",
        "POST",
        "/auth/register",
        LOGIN | {"password": "rita@example.com"},
    ),
    "the same password": Refusal(
        "new_password",
        "must not be the current one",
        "POST",
        "/auth/change-password",
        {"current_password": "a long way", "new_password": "a long way"},
    ),
    "a cursor and an offset": Refusal(
        "cursor", "can't be combined with offset or skip", "GET", "/books", {"cursor": "abcd", "offset": 1}
    ),
    "a query or an ISBN": Refusal(
        "q", "is needed where isbn is not given, and not beside it", "GET", "/books/external", {}
    ),
    # What depends on what is stored
    "keys of another request": Refusal(
        "idempotency-key", "was used for another request", "POST", "/books", BOOK | {"title": "Dune Messiah"}
    ),
    "copies together": Refusal(
        "quantity", "would make more than 1000000 copies", "POST", "/books/1/stock", {"quantity": 1_000_000}
    ),
}
