"""The manual at /docs: what FastAPI can't know of the routes by itself.

A route names the errors that are its own (`responses=answers(403, 409)`). What follows from its shape is added here:
401 where a token is looked at, 404 where the path names something, 422 where anything is sent, and so on.
"""

from collections.abc import Iterator
from http import HTTPStatus
from typing import Any, NamedTuple

from pydantic.json_schema import models_json_schema

from schemas import Problem

PROBLEM_JSON = "application/problem+json"
Json = dict[str, Any]

TAGS = [
    {"name": name, "description": text}
    for name, text in {
        "Accounts": "Signing up, in and out, confirming an address, and forgotten passwords. Start with `POST /login`.",
        "Users": "My own profile and all that is stored of me; for admins, everybody's account.",
        "Catalogue": "Finding books, adding and changing them, and what readers say of them.",
        "My library": "My shelf: what I want to read, am reading and have read, with my ratings and reviews.",
        "Lending": "How many copies of a book there are, who has them, and until when.",
        "In and out": "Files of books and shelves in both directions, and books of other catalogues.",
        "Changes": "Every change as it is committed: as a stream, or as a log to poll.",
        "Service": "Whether it is well, and a copy of its data.",
    }.items()
]

# Where the name of the function does not say it well.
SUMMARIES = {
    "token": "Sign in (the address that OAuth2 clients expect)",
    "login": "Sign in",
    "refresh": "Change a refresh token for a new pair",
    "logout": "Sign out",
    "logout_everywhere": "Sign out everywhere",
    "list_sessions": "List where I am signed in",
    "end_session": "End one of my logins",
    "register": "Sign up",
    "verify_email": "Confirm an e-mail address",
    "request_verification": "Ask for another link that confirms my address",
    "forgot_password": "Have a code mailed for a new password",
    "reset_password": "Set a new password with the code",
    "change_password": "Change my password",
    "read_me": "Read my account",
    "update_me": "Change my account",
    "delete_me": "Delete my account",
    "export_me": "Download all that is stored about me",
    "list_users": "List accounts",
    "create_user": "Make an account",
    "read_user": "Read an account",
    "update_user": "Change an account",
    "delete_user": "Delete an account",
    "list_books": "Find books",
    "create_book": "Add a book",
    "list_genres": "List genres",
    "read_book": "Read a book",
    "replace_book": "Replace a book",
    "update_book": "Change a book",
    "delete_book": "Delete a book",
    "list_reviews": "List the reviews of a book",
    "remove_review": "Remove a review",
    "upload_books": "Upload a file of books",
    "import_library": "Import my shelf from a file",
    "list_uploads": "List uploads",
    "read_upload": "See how an upload goes",
    "cancel_upload": "Cancel an upload",
    "list_upload_errors": "List the rows that were refused",
    "export_books": "Download the catalogue",
    "export_library": "Download my shelf",
    "find_external_books": "Find books in other catalogues",
    "add_external_book": "Add a book of another catalogue",
    "list_entries": "List my shelf",
    "read_entry": "Read a book on my shelf",
    "shelve_book": "Put a book on my shelf",
    "update_entry": "Move, rate, review or tag a book",
    "remove_entry": "Take a book off my shelf",
    "read_stats": "See my reading in figures",
    "read_stock": "See how many copies there are",
    "change_stock": "Add or remove copies",
    "borrow": "Borrow a book",
    "list_loans": "List loans",
    "read_loan": "Read a loan",
    "return_loan": "Return a loan",
    "renew_loan": "Renew a loan",
    "list_events": "Read the change log",
    "stream": "Follow changes live",
    "health": "Ask whether the service is well",
    "back_up": "Download a backup",
}


class Why(NamedTuple):
    """What an error means, and what it may say."""

    description: str
    detail: str
    headers: tuple[str, ...] = ()


ERRORS = {
    400: Why("The request can't be read, or the code in it is no good.", "The body is not UTF-8."),
    401: Why(
        "Sign in first.", "Sign in first: the token is missing, expired or revoked.", headers=("WWW-Authenticate",)
    ),
    403: Why("Not for you.", "Only for: librarian, admin."),
    404: Why("There is no such thing, or it is not yours to see.", "No such book."),
    409: Why("It conflicts with what is there.", "This isbn is taken."),
    412: Why("It has changed since you read it.", 'The book has changed: its ETag is now "7".'),
    413: Why("The request is larger than this path takes.", "The request is larger than this path takes."),
    422: Why("Something in the request is not as it must be; `errors` says what.", "title: Field required"),
    429: Why("Too many attempts.", "Too many attempts. Try again in 60 s.", headers=("Retry-After",)),
    502: Why("The other catalogue is down, or says nonsense.", "Google Books can't be reached, or breaks off."),
    503: Why("The service can't do this now.", "The database can't do this now. Try again.", headers=("Retry-After",)),
    504: Why("The other catalogue is too slow.", "Google Books did not answer in time."),
    507: Why("The disk is full: nothing can be written.", "The disk is full. Reading still works."),
}
HEADERS: dict[str, tuple[str, str]] = {
    "ETag": ("The version of the book, for `If-Match` and `If-None-Match`.", '"1"'),
    "Link": ("The next page, with `rel=next`, unless this is the last.", '</books?cursor=WyJpZCIsMjBd>; rel="next"'),
    "Location": ("Where it is.", "/books/1"),
    "Retry-After": ("Seconds until it is worth another try.", "60"),
    "WWW-Authenticate": ("Always `Bearer`.", "Bearer"),
    "X-Event-Cursor": ("The id of the last change that this page contains: follow from there.", "1795254571301"),
}
NOT_ALWAYS = {"Link", "Retry-After"}
# A token is not needed here, but shows more.
OPEN_TO_ALL = {"list_books", "export_books", "list_events", "stream"}
A_BOOK = {
    "id": 1,
    "title": "Dune",
    "author": "Frank Herbert",
    "isbn": "9780441172719",
    "genre": "Science fiction",
    "description": None,
    "publisher": "Ace",
    "language": "en",
    "pages": 535,
    "price": 9.99,
    "cover_url": None,
    "published_date": "1965-08-01",
    "publication_year": 1965,
    "copies": 3,
    "available": 2,
    "rating": 4.5,
    "rating_count": 2,
    "added_by": 2,
    "version": 7,
    "created_at": "2026-03-01T09:30:00Z",
    "updated_at": "2026-03-08T18:00:00Z",
}
SAID = ("title", "author", "isbn", "genre", "publisher", "language", "pages", "price", "published_date")
A_SHELF = {"status": "completed", "rating": 5, "review": "Sandy.", "tags": ["desert"]}
DATES = {"started_at": "2026-03-02T20:00:00Z", "finished_at": "2026-03-08T18:00:00Z"}
A_USER = {"username": "rita", "email": "rita@example.com", "full_name": "Rita Reader"}
EXAMPLES: dict[str, Json] = {
    "BookCreate": {name: A_BOOK[name] for name in SAID},
    "BookUpdate": {"price": 8.5, "publisher": None},
    "BookPublic": A_BOOK,
    "GenreCount": {"genre": "Science fiction", "count": 12},
    "ReviewPublic": {
        "username": "rita",
        "rating": 5,
        "review": "Sandy.",
        "finished_at": DATES["finished_at"],
        "updated_at": DATES["finished_at"],
    },
    "EntryCreate": {"status": "reading"},
    "EntryUpdate": A_SHELF,
    "EntryPublic": {
        "book_id": 1,
        **A_SHELF,
        **DATES,
        "added_at": "2026-03-01T09:31:00Z",
        "updated_at": DATES["finished_at"],
        "book": A_BOOK,
    },
    "UserCreate": {**A_USER, "password": "a long way to Arrakis"},
    "AccountCreate": {**A_USER, "password": "a long way to Arrakis", "role": "librarian"},
    "UserUpdate": {"full_name": "Rita R. Reader"},
    "AccountUpdate": {"role": "librarian"},
    "UserPublic": {
        "id": 2,
        **A_USER,
        "role": "reader",
        "is_active": True,
        "email_verified_at": None,
        "created_at": "2026-03-01T09:00:00Z",
    },
    "RefreshRequest": {"refresh_token": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIyIn0.c2lnbmF0dXJl"},
    "ForgottenPassword": {"email": "rita@example.com"},
    "PasswordReset": {"email": "rita@example.com", "otp": "271828", "new_password": "a short way home"},
    "PasswordChange": {"current_password": "a long way to Arrakis", "new_password": "a short way home"},
    "MyPassword": {"password": "a long way to Arrakis"},
    "StockChange": {"quantity": 3},
    "StockPublic": {"copies": 3, "available": 2, "on_loan": 1},
    "LoanCreate": {"book_id": 1},
    "LoanPublic": {
        "id": 1,
        "user_id": 2,
        "username": "rita",
        "book_id": 1,
        "title": "Dune",
        "quantity": 1,
        "borrowed_at": "2026-03-09T10:00:00Z",
        "due_at": "2026-03-30T10:00:00Z",
        "returned_at": None,
        "renewals": 0,
        "status": "active",
    },
    "EventPublic": {
        "id": 1795254571301,
        "at": "2026-03-01T09:30:00Z",
        "type": "book.deleted",
        "data": {"id": 1, "title": "Dune", "author": "Frank Herbert"},
    },
    "Health": {"status": "ok", "version": "0.1.0", "database": "sqlite"},
}
# What an answer of this shape is about: the parameter of other paths that its field of this name is for.
LEADS_TO = {
    "BookPublic": ("book_id", "id"),
    "EntryPublic": ("book_id", "book_id"),
    "LoanPublic": ("loan_id", "id"),
    "UploadPublic": ("upload_id", "id"),
    "UserPublic": ("user_id", "id"),
}


def answers(*errors: int, sends: dict[int, str] | None = None) -> dict[int | str, Json]:
    """For `responses=`: the errors of a route, and the headers that its other answers send."""
    found: dict[int | str, Json] = {status: {} for status in errors}
    for status, names in (sends or {}).items():
        found[status] = {"headers": {name: {"$ref": f"#/components/headers/{name}"} for name in names.split()}}
    return found


PAGE = answers(sends={200: "Link"})
FOLLOWED_PAGE = answers(sends={200: "Link X-Event-Cursor"})


def complete(schema: Json) -> Json:
    """The schema that FastAPI made, with all that stands above."""
    components = schema["components"]
    _, problems = models_json_schema([(Problem, "serialization")], ref_template="#/components/schemas/{model}")
    components["schemas"].update(problems["$defs"])
    for unused in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(unused, None)
    components["headers"] = {
        name: {
            "description": text,
            "required": name not in NOT_ALWAYS,
            "schema": {"type": "string"},
            "example": example,
        }
        for name, (text, example) in HEADERS.items()
    }
    components["responses"] = {HTTPStatus(status).name.title().replace("_", ""): _error(status) for status in ERRORS}
    for name, example in EXAMPLES.items():
        if name in components["schemas"]:
            components["schemas"][name]["examples"] = [example]
        if (page := components["schemas"].get(f"Page_{name}_")) is not None:
            page["examples"] = [{"items": [example], "total": 1, "next": None}]
    operations = list(_operations(schema))
    for method, path, operation in operations:
        operation["summary"] = SUMMARIES.get(operation["operationId"], _readable(operation["operationId"]))
        if operation["operationId"] in OPEN_TO_ALL:
            operation["security"].append({})
        for parameter in operation.get("parameters", ()):
            parameter["schema"] = _without_null(parameter["schema"])
        told = {status: answer for status, answer in operation["responses"].items() if int(status) < 400}
        own = {int(status) for status in operation["responses"]} & {*ERRORS} - {422}
        for status in sorted(own | set(_errors_that_follow(method, path, operation))):
            told[str(status)] = {"$ref": f"#/components/responses/{HTTPStatus(status).name.title().replace('_', '')}"}
        operation["responses"] = told
    for _, _, operation in operations:
        _link(operation, [other for _, _, other in operations])
    return schema


def _operations(schema: Json) -> Iterator[tuple[str, str, Json]]:
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            yield method, path, operation


def _readable(name: str) -> str:
    return name.replace("_", " ").capitalize()


def _error(status: int) -> Json:
    why = ERRORS[status]
    title = HTTPStatus(status).phrase
    example: Json = {"type": "about:blank", "title": title, "status": status, "detail": why.detail}
    if status == 422:
        example["errors"] = [{"loc": ["body", "title"], "msg": "Field required", "type": "missing"}]
    content: Json = {PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/Problem"}, "example": example}}
    if status == 400:  # what is no HTTP at all, or too long an address, never comes as far as this service's own code
        content["text/plain"] = {"schema": {"type": "string"}, "example": "Invalid HTTP request received."}
    headers = {name: {"$ref": f"#/components/headers/{name}"} for name in why.headers}
    return {"description": why.description, "content": content, **({"headers": headers} if headers else {})}


def _errors_that_follow(method: str, path: str, operation: Json) -> Iterator[int]:
    """From what a route takes. Whatever touches the database may find that it can't be reached."""
    yield 503
    if operation.get("security"):
        yield 401
    if operation.get("parameters") or "requestBody" in operation:
        yield from (400, 422)
    if "{" in path:
        yield 404
    if "requestBody" in operation:
        yield 413
    if method != "get":
        yield 507


def _without_null(schema: Json) -> Json:
    """What is left out of an address or a header is left out: there is no null to send."""
    choices = [choice for choice in schema.get("anyOf", ()) if choice != {"type": "null"}]
    if len(choices) == len(schema.get("anyOf", ())):
        return schema
    rest = {name: value for name, value in schema.items() if name != "anyOf"}
    return {**rest, **choices[0]} if len(choices) == 1 else {**rest, "anyOf": choices}


def _link(operation: Json, others: list[Json]) -> None:
    """What can be done next with what was made."""
    for status in ("201", "202"):
        answer = operation["responses"].get(status, {})
        shape = answer.get("content", {}).get("application/json", {}).get("schema", {}).get("$ref", "")
        if shape.rpartition("/")[2] not in LEADS_TO or not operation.get("security"):
            continue
        parameter, field = LEADS_TO[shape.rpartition("/")[2]]
        answer["links"] = {
            other["operationId"]: {
                "operationId": other["operationId"],
                "parameters": {parameter: f"$response.body#/{field}"},
            }
            for other in others
            if parameter in [p["name"] for p in other.get("parameters", ()) if p["in"] == "path"]
        }
