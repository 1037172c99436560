"""A tour of the product: what a visitor, readers, a librarian and an admin do with it.

Then what holds for every route, the interactive docs, the documents, and the structure of the code.
"""

import ast
import json
import re
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2 as httpx
import pytest
from fastapi.testclient import TestClient

from main import app
from schemas import NOT_BLANK, PATTERN_MESSAGES, SPACE
from settings import Settings, settings
from tests.fixtures import DUNE, ROOT, Person, Server, wait_for

pytest_plugins = ["tests.fixtures"]  # where this file is run alone, pytest does not see tests/conftest.py

README = ROOT / "README.md"
TEST_FILES = [ROOT / "test_main.py", *ROOT.glob("tests/test_*.py")]
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md"))]

# --- the tour -----------------------------------------------------------------------------------------------------


def test_a_visitor_sees_the_front_page_and_an_empty_catalogue(client: TestClient) -> None:
    page = client.get("/", follow_redirects=False)
    assert (page.status_code, page.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert 'href="docs"' in page.text
    kind = settings.database_url.partition(":")[0].partition("+")[0]
    assert client.get("/health").json() == {"status": "ok", "version": "0.1.0", "database": kind}
    assert client.get("/books").json() == {"items": [], "total": 0, "next": None}


def test_a_reader_registers_and_signs_in(client: TestClient) -> None:
    new = {"username": "Rita", "email": "Rita@Example.com", "password": "correct horse battery", "full_name": "Rita R."}
    answer = client.post("/auth/register", json=new)
    assert answer.status_code == 201
    assert answer.headers["Location"] == "/users/me"
    assert "password" not in answer.text
    rita = Person(client, "rita@example.com", "correct horse battery")
    me = rita.get("/users/me").json()
    assert (me["username"], me["email"], me["full_name"], me["role"]) == (
        "Rita",
        "rita@example.com",
        "Rita R.",
        "reader",
    )


def test_a_reader_adds_a_book_and_everybody_sees_it(client: TestClient, reader: Person) -> None:
    answer = reader.post("/books", json={**DUNE, "price": 9.99, "published_date": "1965-08-01"})
    assert answer.status_code == 201
    book = client.get(answer.headers["Location"]).json()
    assert book == answer.json()
    assert (book["isbn"], book["price"], book["publication_year"]) == ("9780441172719", 9.99, 1965)
    assert (book["rating"], book["rating_count"], book["copies"], book["available"]) == (None, 0, 0, 0)
    assert client.get("/books", params={"search": "herb dune"}).json()["items"] == [book]


def test_a_reader_shelves_and_reviews_a_book(client: TestClient, reader: Person, other_reader: Person) -> None:
    book = reader.add_book(**DUNE)
    shelf = f"/my-library/{book['id']}"
    assert other_reader.post(shelf).json()["status"] == "wishlist"
    assert other_reader.patch(shelf, json={"status": "reading"}).status_code == 200
    entry = other_reader.patch(shelf, json={"status": "completed", "rating": 4, "review": "Sandy."}).json()
    assert entry["finished_at"].endswith("Z")
    reviews = client.get(f"/books/{book['id']}/reviews").json()
    assert reviews["total"] == 1
    assert reviews["items"][0].items() >= {"username": "Oskar", "rating": 4, "review": "Sandy."}.items()
    rated = client.get(f"/books/{book['id']}").json()
    assert (rated["rating"], rated["rating_count"]) == (4.0, 1)
    assert reader.get("/my-library").json()["total"] == 0


def test_a_reader_borrows_and_returns_a_book(client: TestClient, reader: Person, librarian: Person) -> None:
    book = reader.add_book(**DUNE)
    stock = f"/books/{book['id']}/stock"
    assert librarian.post(stock, json={"quantity": 1}).json() == {"copies": 1, "available": 1, "on_loan": 0}
    answer = reader.post("/loans", json={"book_id": book["id"]})
    assert (answer.status_code, answer.json()["status"]) == (201, "active")
    assert librarian.post("/loans", json={"book_id": book["id"]}).status_code == 409
    assert client.get(stock).json() == {"copies": 1, "available": 0, "on_loan": 1}
    assert reader.post(f"{answer.headers['Location']}/return").json()["status"] == "returned"
    assert client.get("/books", params={"available": True}).json()["total"] == 1


def test_a_librarian_imports_a_csv_file(client: TestClient, librarian: Person) -> None:
    upload = librarian.upload((ROOT / "static" / "sample_books.csv").read_bytes())
    assert upload.items() >= {"status": "completed", "rows": 50, "inserted": 50, "failed": 0, "progress": 1.0}.items()
    assert client.get("/books", params={"search": "bronte"}).json()["total"] == 2
    assert client.get("/books/genres").json()[0] == {"genre": "Novel", "count": 14}
    oldest = client.get("/books", params={"sort": "year", "limit": 1}).json()["items"][0]
    assert (oldest["title"], oldest["publication_year"]) == ("The Epic of Gilgamesh", -1800)


def test_an_admin_makes_a_reader_a_librarian_and_sees_all_accounts(admin: Person, reader: Person) -> None:
    book = reader.add_book(**DUNE)
    stock = f"/books/{book['id']}/stock"
    assert reader.post(stock, json={"quantity": 1}).status_code == 403
    promoted = admin.patch(f"/users/{reader.get('/users/me').json()['id']}", json={"role": "librarian"})
    assert (promoted.status_code, promoted.json()["role"]) == (200, "librarian")
    assert reader.post(stock, json={"quantity": 1}).status_code == 200
    assert reader.get("/users").status_code == 403
    assert {user["role"] for user in admin.get("/users").json()["items"]} == {"admin", "librarian"}


def test_the_change_log_shows_public_events_and_own_private_ones(client: TestClient, reader: Person) -> None:
    book = reader.add_book(**DUNE)
    reader.post(f"/my-library/{book['id']}", json={"status": "reading"})
    public = [event["type"] for event in client.get("/events").json()["items"]]
    own = [event["type"] for event in reader.get("/events").json()["items"]]
    assert public == ["book.created"]
    assert own == ["account.login", "book.created", "shelf.created"]


# --- every route --------------------------------------------------------------------------------------------------

ERRORS: dict[str, tuple[str, str, int]] = {
    "unknown path": ("GET", "/nothing", 404),
    "unknown book": ("GET", "/books/1", 404),
    "word as an id": ("GET", "/books/one", 404),
    "id of 31 digits": ("GET", f"/books/{10**30}", 404),
    "id with a line break": ("GET", "/books/1%0A", 404),
    "id above 32 bits": ("GET", "/books/2147483648", 422),
    "unsupported method": ("DELETE", "/books", 405),
    "missing token": ("GET", "/users/me", 401),
    "unknown parameter": ("GET", "/books?colour=red", 422),
    "limit of zero": ("GET", "/books?limit=0", 422),
    "limit above the maximum": ("GET", "/books?limit=101", 422),
    "negative limit": ("GET", "/books?limit=-1", 422),
    "NUL in a search": ("GET", "/books?search=%00", 422),
    "malformed JSON": ("POST", "/auth/register", 422),
}


@pytest.mark.parametrize(("method", "path", "status"), ERRORS.values(), ids=ERRORS)
def test_every_error_is_a_problem_document(client: TestClient, method: str, path: str, status: int) -> None:
    answer = client.request(
        method, path, content=b"{" if method == "POST" else None, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == status
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.json().keys() >= {"type", "title", "status", "detail"}
    assert answer.json()["status"] == status
    assert ("errors" in answer.json()) == (status == 422)
    assert ("WWW-Authenticate" in answer.headers) == (status == 401)


def test_405_lists_every_method_of_the_path(client: TestClient) -> None:
    assert client.post("/books/1").headers["Allow"] == "DELETE, GET, PATCH, PUT"
    assert client.put("/books/upload").headers["Allow"] == "GET, POST"
    assert client.post("/static/style.css").headers["Allow"] == "GET"


def test_an_unexpected_error_is_500_without_internals(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagination.last_event_id", lambda _connection: 1 / 0)
    client._transport.raise_server_exceptions = False  # type: ignore[attr-defined]  # of Starlette's client
    answer = client.get("/health")
    assert answer.status_code == 500
    assert answer.json()["detail"] == "Something went wrong here; it is in the server's log."
    assert "division" not in answer.text


def test_trailing_slashes_are_optional(client: TestClient, reader: Person) -> None:
    book = reader.post("/books/", json=DUNE)
    assert book.status_code == 201
    for path in ("/books/", "/books", "/books/1/", "/health/", "/docs/"):
        assert client.get(path, follow_redirects=False).status_code == 200


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One for all: the tests of this file change nothing on it."""
    started = Server(tmp_path_factory.mktemp("server") / "books.db")
    yield started
    started.close()


def test_head_is_get_without_a_body(server: Server) -> None:
    answer = server.client.head("/books")
    assert (answer.status_code, answer.content) == (200, b"")
    assert int(answer.headers["Content-Length"]) == len(server.client.get("/books").content)


def test_a_request_that_is_too_large_is_413(client: TestClient) -> None:
    answer = client.post("/auth/register", json={"username": "x" * (1 << 20)})
    assert answer.status_code == 413
    assert answer.headers["Content-Type"] == "application/problem+json"

    def endless() -> list[bytes]:
        return [b"x" * 65536] * 20

    chunked = client.post("/auth/register", content=iter(endless()), headers={"Content-Type": "application/json"})
    assert chunked.status_code == 413
    assert chunked.json()["detail"] == answer.json()["detail"]


def test_each_request_is_one_line_in_the_log(server: Server) -> None:
    answer = server.client.get("/books/7", params={"secret": "s3cret"})
    line = wait_for(lambda: next((row for row in server.log.read_text().splitlines() if "/books/7" in row), None))
    assert re.search(r"INFO books\.access GET /books/7 404 \d+\.\d ms " + answer.headers["X-Request-ID"], line)
    assert "s3cret" not in server.log.read_text()


def security_headers(answer: httpx.Response) -> dict[str, str | None]:
    names = ("X-Content-Type-Options", "Referrer-Policy", "X-Frame-Options", "Strict-Transport-Security")
    return {name: answer.headers.get(name) for name in names}


@pytest.mark.parametrize("path", ["/", "/books", "/books/1", "/nothing", "/users/me", "/health", "/docs", "/bug"])
def test_every_answer_has_security_headers(client: TestClient, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "/bug":
        monkeypatch.setattr("pagination.last_event_id", lambda _connection: 1 / 0)
        path = "/health"
    client._transport.raise_server_exceptions = False  # type: ignore[attr-defined]  # of Starlette's client
    plain = {
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "X-Frame-Options": "DENY",
        "Strict-Transport-Security": None,
    }
    answer = client.get(path, follow_redirects=False)
    assert security_headers(answer) == plain
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy if path == "/docs" else policy.startswith("default-src 'none'")
    secure = client.get(f"https://testserver{path}", follow_redirects=False)
    assert security_headers(secure) == {**plain, "Strict-Transport-Security": "max-age=31536000"}


def test_headers_of_a_path_are_the_same_behind_a_prefix(client: TestClient) -> None:
    client = TestClient(client.app, root_path="/books-api")
    assert client.get("/books-api/docs").headers["Content-Security-Policy"].startswith("default-src 'self'")
    assert client.post("/books-api/login", data={}).headers["Cache-Control"] == "no-store"
    signed_in = client.post("/books-api/login", json={"username": "admin", "password": "admin"}).json()
    authorization = {"Authorization": f"Bearer {signed_in['access_token']}"}
    book = client.post("/books-api/books", json={"title": "Dune", "author": "Frank Herbert"}, headers=authorization)
    assert book.headers["Location"] == "/books-api/books/1"
    assert client.get(book.headers["Location"]).json() == book.json()
    assert client.head("/books-api/auth/verify-email/x").status_code == 405


def test_https_is_recognised_behind_a_proxy(server: Server) -> None:
    answer = server.client.get("/health", headers={"X-Forwarded-Proto": "https"})
    assert answer.headers["Strict-Transport-Security"] == "max-age=31536000"


def test_personal_answers_are_not_cached(client: TestClient, reader: Person) -> None:
    book = reader.add_book()
    reader.post(f"/my-library/{book['id']}")
    for path in (
        "/users/me",
        "/users/me/export",
        "/auth/sessions",
        "/my-library",
        "/loans",
        "/books/upload",
        "/events",
        "/books",
    ):
        assert reader.get(path).headers["Cache-Control"] == "no-store", path
    body = {"username": "admin", "password": "admin"}
    for path in ("/login", "/auth/token", "/auth/refresh", "/auth/forgot-password"):
        assert client.post(path, json=body).headers["Cache-Control"] == "no-store", path
    for person in (client, reader):
        assert "Cache-Control" not in person.get(f"/books/{book['id']}").headers, "it has an ETag"


OTHER_SITE = {"Origin": "https://elsewhere.example"}


def test_cors_is_closed_by_default(server: Server) -> None:
    assert "Access-Control-Allow-Origin" not in server.client.get("/books", headers=OTHER_SITE).headers


def test_cors_allows_the_configured_origins(serve: Callable[..., Server]) -> None:
    server = serve(CORS_ORIGINS="https://elsewhere.example, http://localhost:3000/")
    for query in ("limit=1&limit=2", "limit=101"):
        answer = server.client.get(f"/books?{query}", headers=OTHER_SITE)
        assert answer.status_code == 422, "errors are readable, too"
        assert answer.headers["Access-Control-Allow-Origin"] == "https://elsewhere.example"
    assert "ETag" in answer.headers["Access-Control-Expose-Headers"]
    preflight = {**OTHER_SITE, "Access-Control-Request-Method": "PATCH", "Access-Control-Request-Headers": "if-match"}
    assert server.client.options("/books/1", headers=preflight).status_code == 200
    other = server.client.options("/books/1", headers={**preflight, "Origin": "https://evil.example"})
    assert "Access-Control-Allow-Origin" not in other.headers
    assert (other.status_code, other.headers["Content-Type"]) == (400, "application/problem+json")
    assert other.json()["detail"].startswith("Not allowed for this origin")


def test_errors_of_starlette_are_problem_documents(server: Server) -> None:
    style = "/static-offline-docs/swagger-ui.css"
    answers = {
        416: server.client.get(style, headers={"Range": "bytes=99999999-"}),
        400: server.client.get(style, headers={"Range": "x"}),
        404: server.client.get("/nothing"),
        405: server.client.delete("/books"),
    }
    for status, answer in answers.items():
        assert (answer.status_code, answer.headers["Content-Type"]) == (status, "application/problem+json")
    # the request of a browser for a web socket
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    socket = server.client.get("/stream", headers={**upgrade, "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="})
    assert (socket.status_code, socket.json()["detail"][:26]) == (404, "There is no WebSocket here")
    assert [answer.json()["detail"] for answer in answers.values()] == [
        "The file has no such range.",
        "The header Range can't be read.",
        "There is nothing at this path.",
        "This path does not take DELETE.",
    ]


def test_errors_explain_patterns_in_words(client: TestClient, reader: Person) -> None:
    """A text that does not match a pattern of the schema gets an error in words, not the pattern."""
    account = {"username": "r ita", "email": "rita", "password": "a long way to Arrakis"}
    reset = {"email": "rita@example.com", "otp": "12345", "new_password": "a long way to Arrakis"}
    refused = [
        client.post("/auth/register", json=account),
        client.post("/auth/reset-password", json=reset),
        reader.post("/books", json={"title": "A", "author": "B", "cover_url": "javascript:alert(1)"}),
        client.get("/events?types=everything"),
        client.get("/books?cursor=!"),
    ]
    assert {error["loc"][-1]: error["msg"] for answer in refused for error in answer.json()["errors"]} == {
        "username": "must be of the letters A to Z, digits, '.', '_' and '-', a letter or digit first",
        "email": "must be an e-mail address, like ada@example.com",
        "otp": "must be the six digits of the code",
        "cover_url": "must be an address that begins with http:// or https://",
        "types": "must be at most 16 event types separated by commas, like book.*,review.created",
        "cursor": "is not a cursor of this service",
    }
    schema = json.dumps(client.get("/openapi.json").json())
    patterns = {json.loads(text) for text in re.findall(r'(?<!"not": {)"pattern": ("(?:[^"\\]|\\.)*")', schema)}
    named = {pattern.removeprefix(f"^[{SPACE}]*$|") for pattern in patterns}  # of optional texts, which may be blank
    assert named - {NOT_BLANK} <= PATTERN_MESSAGES.keys(), "a blank text has a message of its own"


# --- the docs -----------------------------------------------------------------------------------------------------


def test_the_docs_load_nothing_from_other_hosts(client: TestClient) -> None:
    for page in ("/docs", "/redoc"):
        html = client.get(page).text
        loaded = re.findall(r"""(?:src|href)=["']([^"']+)""", html)
        assert loaded
        for asset in loaded:
            assert asset.startswith("/"), f"{page} loads {asset}"
            assert client.get(asset).status_code == 200


def test_the_authorize_button_uses_the_login(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()
    flow = schema["components"]["securitySchemes"]["OAuth2PasswordBearer"]["flows"]["password"]
    form = {"grant_type": "password", "username": "admin", "password": "admin", "scope": ""}
    answer = client.post(f"/{flow['tokenUrl']}", data=form)
    assert answer.json()["token_type"] == "bearer"


def test_every_operation_has_a_unique_id_and_a_description(client: TestClient) -> None:
    operations = [
        operation for path in client.get("/openapi.json").json()["paths"].values() for operation in path.values()
    ]
    names = [operation["operationId"] for operation in operations]
    assert len(set(names)) == len(names)
    assert [operation["operationId"] for operation in operations if not operation.get("description")] == []


def test_a_blank_parameter_is_ignored(client: TestClient, reader: Person) -> None:
    """HTML forms send blank fields. Numbers may refuse them with 422."""
    book = reader.add_book()
    reader.post(f"/my-library/{book['id']}")
    reader.upload("title,author\nA,\n")
    for path, operations in client.get("/openapi.json").json()["paths"].items():
        for parameter in operations.get("get", {}).get("parameters", []):
            if parameter["in"] == "query" and path != "/stream":
                answer = reader.get(path.format(book_id=1, upload_id=1), params={parameter["name"]: ""})
                assert answer.status_code in (200, 403, 404, 422), f"{path} {parameter['name']}: {answer.text}"
    assert client.get("/stream", params={"types": "", "seconds": 0.1}).status_code == 200


# --- the README and docs/ -----------------------------------------------------------------------------------------


def section(heading: str) -> str:
    return README.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]


def commands(heading: str) -> str:
    """The shell commands under a heading of the README."""
    return "\n".join(re.findall(r"```sh\n(.*?)```", section(heading), re.DOTALL))


def table(heading: str) -> list[list[str]]:
    rows = [line.strip("|").split(" | ") for line in section(heading).splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in row] for row in rows]


def test_the_readme_begins_with_the_run_and_test_commands() -> None:
    run, test = re.findall(r"```sh\n(.*?)```", README.read_text(), re.DOTALL)[:2]
    assert run.strip().endswith("&& .venv/bin/uvicorn main:app")
    assert '-m pytest -q -n auto -m "not slow"' in test  # .ci/run extracts it


def test_the_readme_lists_every_endpoint() -> None:
    listed = [tuple(row[0].strip("`").split()) for row in table("Endpoints")]
    schema = app.openapi()["paths"]
    assert sorted(listed) == sorted((method.upper(), path) for path, methods in schema.items() for method in methods)


def test_the_readme_and_env_example_list_every_setting_with_its_default() -> None:
    fields = Settings.model_fields.items()
    defaults = {name.upper(): "" if field.default in (None, ()) else str(field.default) for name, field in fields}
    defaults |= {name.upper(): str(field.default).lower() for name, field in fields if field.annotation is bool}
    listed = {row[0].strip("`"): row[1].partition(": ")[0].strip("`") for row in table("Settings")}
    assert listed.pop("DATABASE_URL") == "books.db` beside `main.py"
    example = (ROOT / ".env.example").read_text()
    exemplified = dict(re.findall(r"^#?([A-Z_]+)=(.*)$", example, re.MULTILINE))
    assert exemplified.keys() == defaults.keys()
    for name in ("DATABASE_URL", "LOG_FILE"):
        assert "xample" in example.split(f"#{name}=")[0].rpartition("=")[2], "its value there is not the default"
        exemplified[name] = defaults[name]
    assert exemplified == defaults
    assert listed == {name: default or "none" for name, default in defaults.items() if name != "DATABASE_URL"}
    Settings(_env_file=ROOT / ".env.example")  # an unchanged copy is valid


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: file.name)
def test_the_documents_name_files_and_tests_that_exist(file: Path) -> None:
    text = file.read_text()
    tests = {name for path in TEST_FILES for name in re.findall(r"def (test_\w+)", path.read_text())}
    names = set(re.findall(r"`([\w./]+)`", text))
    assert {name for name in names if re.fullmatch(r"test_\w+", name)} <= tests
    assert [name for name in names if name.endswith((".py", ".toml", ".csv")) and not (ROOT / name).is_file()] == []


def anchors(file: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: file.name)
def test_links_between_the_documents_work(file: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", file.read_text()):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = (file.parent / path).resolve() if path else file
            assert target.is_file(), link
            assert not anchor or anchor in anchors(target), link


def test_the_readme_links_every_document() -> None:
    links = set(re.findall(r"\]\((docs/\w[\w-]*\.md)", README.read_text()))
    assert {f"docs/{file.name}" for file in DOCUMENTS if file != README} <= links


def test_the_readme_tour_works_as_written(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve()
    script = commands("Tour").replace("http://localhost:8000", str(server.client.base_url).rstrip("/"))
    assert script.count("curl") >= 5
    (tmp_path / "static").symlink_to(ROOT / "static")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    output = done.stdout.replace('" : ', '":')  # PostgreSQL's JSON has spaces
    for expected in (
        '"inserted":50',
        '"title":"Emma"',
        '"status":"completed"',
        '"rating":5',
        '"on_loan":1',
        '"status":"returned"',
        '"top_authors":[{"author":"Jane Austen"',
        "event: books.imported",
        "event: book.stock",
    ):
        assert expected in output
    assert '"status":4' not in output


@pytest.mark.slow
@pytest.mark.sqlite  # it starts on a file of its own, whatever the other tests run on
def test_the_readme_commands_work_in_a_clean_clone(tmp_path: Path) -> None:
    clone = tmp_path / "books-api"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    environment = {
        "PATH": f"{make_python(tmp_path)}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    command = commands("Run").strip()
    run = subprocess.Popen(["bash", "-ec", f"exec 2>&1; {command}"], cwd=clone, env=environment, start_new_session=True)
    try:

        def up() -> bool | None:
            assert run.poll() is None
            try:
                return httpx.get("http://localhost:8000/health").status_code == 200 or None
            except httpx.TransportError:
                return None

        wait_for(up, seconds=180)
        assert httpx.get("http://localhost:8000/docs").status_code == 200
        assert (clone / "books.db").exists()
        changed = subprocess.run(
            ["git", "status", "--porcelain"], cwd=clone, capture_output=True, text=True, check=True
        )
        assert changed.stdout == "", "starting it leaves nothing that git would see"
    finally:
        subprocess.run(["pkill", "-TERM", "-s", str(run.pid)], check=False)
        run.wait(timeout=30)


def make_python(folder: Path) -> Path:
    """A folder with a plain `python3`, whatever environment the tests run in."""
    venv.create(folder / "python", with_pip=True)
    return folder / "python" / "bin"


# --- the structure of the code ------------------------------------------------------------------------------------

MODULES = sorted(path.stem for path in ROOT.glob("*.py") if path.name != "test_main.py")


def imported_modules(name: str) -> set[str]:
    """The other modules that this one imports, anywhere in it."""
    nodes = ast.walk(ast.parse((ROOT / f"{name}.py").read_text()))
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    nodes = ast.walk(ast.parse((ROOT / f"{name}.py").read_text()))
    found |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    return {module.partition(".")[0] for module in found} & set(MODULES) - {name}


def test_imports_run_downward_only() -> None:
    """No module imports, directly or not, a module that imports it."""
    remaining = {name: imported_modules(name) for name in MODULES}
    floors = 0
    while remaining:
        floor = {name for name, imported in remaining.items() if not imported & remaining.keys()}
        assert floor, f"these import each other: {sorted(remaining)}"
        remaining = {name: imported for name, imported in remaining.items() if name not in floor}
        floors += 1
    assert floors <= 11


def test_the_tour_of_the_code_shows_every_module() -> None:
    """In one reading order, in which every module comes after those that it imports."""
    listed = re.findall(r"^- \[(\w+)\.py\]\(\1\.py\): ", section("The code, in reading order"), re.MULTILINE)
    assert sorted(listed) == MODULES
    docstring = ast.get_docstring(ast.parse((ROOT / "main.py").read_text()), clean=False) or ""
    assert [*re.findall(r"^    (\w+)\.py +\S", docstring, re.MULTILINE), "main"] == listed
    for number, name in enumerate(listed):
        on_demand = {"postgresql"} if name == "database" else set()
        assert imported_modules(name) - on_demand <= set(listed[:number]), name


def test_the_procfile_and_python_version_are_valid() -> None:
    procfile = (ROOT / "Procfile").read_text()
    assert "uvicorn main:app" in procfile
    assert "--forwarded-allow-ips 10.0.0.0/8" in procfile, "with '*' uvicorn would trust X-Forwarded-For of any client"
    version = (ROOT / ".python-version").read_text().strip()
    assert version in ("3.11", "3.12", "3.13")
    assert sys.version_info >= (3, 11)
