"""The same generated requests to a server on SQLite and one on PostgreSQL must get the same answers."""

# ruff: noqa: RUF001  # it is about letters that look like others
import base64
import csv
import json
import os
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import httpx2 as httpx
import pytest

from tests.fixtures import PASSWORD, Person, Postgres, Server, sign_up, wait_for

SEED = int(os.environ.get("DIFFERENTIAL_SEED", "20261126"))
REQUESTS = int(os.environ.get("DIFFERENTIAL_REQUESTS", "3000"))
TITLES = {
    "Latin": "Dune",
    "French": "Les Misérables",
    "German": "Straße der Träume",
    "Turkish": "İstanbul Hatırası",
    "Polish": "Łódź w ogniu",
    "Vietnamese": "Truyện Kiều",
    "ligature": "The ﬁrst ﬂight",
    "full width": "Ｗｉｄｅ title",
    "combining": "Cafe\u0301 society",
    "Greek": "Ὀδύσσεια τοῦ Ὁμήρου",
    "final sigma": "Ο κόσμος",
    "Cyrillic": "Война и мир",
    "Cyrillic with marks": "Ёлка и йод",
    "Armenian": "Հայոց պատմություն",
    "Georgian": "ვეფხისტყაოსანი",
    "Hebrew": "שיר השירים",
    "Hebrew with points": "בְּרֵאשִׁית בָּרָא",
    "Arabic": "ألف ليلة وليلة",
    "Arabic with signs": "كِتَابُ الأَغَانِي",
    "Persian": "شاهنامه‌ی فردوسی",
    "Hindi": "गोदान और निर्मला",
    "Bengali": "গীতাঞ্জলি কাব্য",
    "Tamil": "திருக்குறள் நூல்",
    "Thai": "สี่แผ่นดิน",
    "Tibetan": "བོད་ཡིག",
    "Amharic": "ፍቅር እስከ መቃብር",
    "Chinese": "红楼梦",
    "Japanese": "吾輩は猫である",
    "Japanese sound marks": "ドグラ・マグラ",
    "half-width kana": "ﾄﾞｸﾞﾗ ﾏｸﾞﾗ",
    "Korean": "난장이가 쏘아올린 공",
    "emoji": "👩‍🚀 in space 🚀",
    "numbers": "1984 and ½ of ⅷ",
    "signs": "C++ & C# — in 21 days!",
    "apostrophe": "Finnegan's Wake",
}
GENRES = ["Novel", "novel", "Été", "été", "SF", "Straße", "STRASSE", "Фантастика", "фантастика", "", "  Essay  "]
LANGUAGES = ["en", "EN", "français", "FRANÇAIS", "日本語"]
NAMES = [
    "Frank Herbert",
    "Émile Zola",
    "EMILE ZOLA",
    "Лев Толстой",
    "村上春樹",
    "Ursula K. Le Guin",
    "=cmd",
    "Å",
    "Ž a",
    "z",
]
HOSTILE = [
    *("", " ", "\x00", "a\x00b", "\ud800", "%", "_", "\\", '"', "'", "''; DROP TABLE book; --", "*", "NEAR(a b)", "-"),
    *("a AND", "a:b", "title:dune", "(", "^", "\u0301", "\u200b", "a\nb", "\u2028", "\r\n", "\t", "\u202eevil"),
    *("x" * 501, "y" * 5000, "a" * 60, "İ", "ß", "ſ", "ﷺ", "¼", "🚀", "🇩🇪", "null", "0", "1e999", "NaN", "<b>&amp;"),
    *("@x", "=1+1", ";=1"),
]
NUMBERS: list[Any] = [0, 1, -1, 2, 3, 5, 2**31 - 1, 2**31, 2**63, 10**30, -(2**31), 1.5, 1e300, True, None, "1", "", []]
ISBNS = ["9780441172719", "978-0-306-40615-7", "0-306-40615-2", "080442957X", "9780441172710", "123", "", None]
ROLES = ("Rita", "Oskar", "Lydia", "admin")
TIMES = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")
KINDS = {"added_by": "user", "by": "user", "user_id": "user", "upload_id": "upload"}
UNCOMPARED = ("request_id", "session_id", "jti")


class Sent(NamedTuple):
    """A request. `{book:3}` in its path or body is the id of the fourth book that a server has shown."""

    role: str | None
    method: str
    path: str
    options: dict[str, Any]


class Target:
    """One of the servers, with its own ids, cursors and tokens."""

    def __init__(self, server: Server) -> None:
        self.server, self.client = server, server.client
        self.ids: dict[str, dict[int, int]] = {}
        self.cursors: dict[str, str] = {}
        self.last_event = int(self.client.get("/books").headers["X-Event-Cursor"])
        self.people = {"admin": Person(self.client, "admin", "admin")}
        for name in ROLES[:3]:
            self.people[name] = sign_up(self.client, name)
        users = self.people["admin"].get("/users").json()["items"]
        self.comparable(users)
        lydia = next(user["id"] for user in users if user["username"] == "Lydia")
        self.people["admin"].patch(f"/users/{lydia}", json={"role": "librarian"})
        self.people["Lydia"] = Person(self.client, "Lydia")

    def resolve(self, text: str) -> str:
        def value(match: re.Match[str]) -> str:
            kind, index = match[1], int(match[2])
            known = list(self.ids.get(kind, ()))
            return str(known[index]) if index < len(known) else "987654321"

        text = re.sub(r"\{(book|loan|upload|user):(\d+)\}", value, text)
        return text.replace("{event}", str(self.last_event))

    def send(self, sent: Sent) -> tuple[Any, ...]:
        path, options = self.resolve(sent.path), dict(sent.options)
        path = path.replace("{cursor}", self.cursors.get(self.list_of(path, sent), ""))
        if isinstance(options.get("content"), str):
            options["content"] = self.resolve(options["content"]).encode()
        person = self.people[sent.role] if sent.role else self.client
        answer = person.request(sent.method, path, **options)
        if answer.status_code == 202 and "upload" in path:
            self.finish_upload(answer.headers["Location"])
        return answer.status_code, *self.comparable_answer(path, sent, answer)

    @staticmethod
    def list_of(path: str, sent: Sent) -> str:
        return f"{sent.role} {path.partition('?')[0]}"

    def finish_upload(self, path: str) -> None:
        admin = self.people["admin"]
        wait_for(lambda: admin.get(path).json()["finished_at"], seconds=60)

    def comparable_answer(self, path: str, sent: Sent, answer: httpx.Response) -> tuple[Any, ...]:
        kind = answer.headers.get("Content-Type", "").split(";")[0]
        kept: dict[str, Any] = {
            name: answer.headers.get(name) for name in ("ETag", "WWW-Authenticate", "Retry-After", "Allow")
        }
        kept["Link"] = "Link" in answer.headers
        if answer.content and kind in ("application/json", "application/problem+json"):
            body = answer.json()
            if isinstance(body, dict) and isinstance(body.get("next"), str):
                self.cursors[self.list_of(path, sent)] = body["next"]
            if path.startswith("/events") and answer.status_code == 200:
                self.last_event = body.pop("next")
            return kind, kept, self.comparable(body)
        if kind == "application/x-ndjson":
            return kind, kept, [self.comparable(json.loads(line)) for line in answer.text.splitlines()]
        if kind == "text/csv":
            rows = list(csv.reader(answer.text.splitlines(keepends=True)))
            ids = [place for place, name in enumerate(rows[0]) if name in ("id", "Book Id")]
            for row in rows[1:]:
                for place in ids:
                    row[place] = str(self.index("book", int(row[place])))
            return kind, kept, self.comparable(rows)
        return kind, kept, answer.text

    def forget(self, known: dict[str, int]) -> None:
        """What an answer has shown that differs, so that later ones can be compared."""
        self.cursors.clear()
        for kind, ids in self.ids.items():
            while len(ids) > known.get(kind, 0):
                ids.popitem()

    def index(self, kind: str, value: int) -> int:
        """How many others of its kind this server has shown before this one."""
        known = self.ids.setdefault(kind, {})
        return known.setdefault(value, len(known))

    def comparable(self, value: Any) -> Any:
        """Without what differs between two servers: ids become the order of their appearance, present times `now`."""
        if isinstance(value, list):
            return [self.comparable(item) for item in value]
        if isinstance(value, str):
            return TIMES.sub(self.comparable_time, value)
        if not isinstance(value, dict):
            return value
        if "at" in value and "type" in value:  # an event
            return {"type": value["type"], "data": self.comparable(value["data"])}
        return {name: self.comparable_field(value, name) for name in value if name not in UNCOMPARED}

    def comparable_field(self, of: dict[str, Any], name: str) -> Any:
        value = of[name]
        if name == "next" and isinstance(value, str):
            order, *keys, _id = json.loads(base64.urlsafe_b64decode(value + "=="))
            return [
                order,
                *(key if type(key) is not str else self.comparable(f"{key}Z".replace(" ", "T")) for key in keys),
            ]
        if type(value) is not int:
            return self.comparable(value)
        if name == "id":
            kinds = {"borrowed_at": "loan", "filename": "upload", "email": "user"}
            return self.index(next((kind for key, kind in kinds.items() if key in of), "book"), value)
        if name.endswith("book_id") or name in ("first_id", "last_id"):
            return self.index("book", value)
        return self.index(KINDS[name], value) if name in KINDS else value

    @staticmethod
    def comparable_time(match: re.Match[str]) -> str:
        is_present = abs(datetime.fromisoformat(match[0]) - datetime.now(UTC)) < timedelta(days=365)
        return "now" if is_present else match[0]


def plain(text: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c))


class Generator:
    """Requests by a seed; the books, loans and uploads that they name are those that were shown so far."""

    def __init__(self, seed: int, known: Callable[[str], int]) -> None:
        self.random, self.known = random.Random(seed), known

    def one(self, *values: Any) -> Any:
        return self.random.choice(values)

    def chance(self, part: float) -> bool:
        return self.random.random() < part

    def ref(self, kind: str) -> str:
        if self.chance(0.03):
            return str(self.one(0, -1, 2**31 - 1, 2**31, 10**30, "x", "1.0", "%00", "٣"))
        return f"{{{kind}:{self.random.randrange(self.known(kind) + 1)}}}"

    def text(self, pool: list[str]) -> str:
        if self.chance(0.1):
            return str(self.random.choice(HOSTILE))
        text = self.random.choice(pool)
        return f"{text} {self.random.randrange(40)}" if self.chance(0.4) else text

    def words(self) -> str:
        """A query: a title as it is, in another case, its first word, a part of a word, or anything."""
        title = self.text([*TITLES.values()])
        word = self.random.choice(title.split() or [""])
        part = word[: self.random.randrange(1, len(word) + 1)] if word else ""
        others = (title.upper(), title.lower(), word, part, f"{word} {self.random.choice(NAMES)}", f"{part} {word}")
        place = self.random.randrange(len(title) + 1)
        misspelled = (title[:place] + title[place + 1 :], title[:place] + self.one("a", "и") + title[place:])
        return str(self.one(title, *others, *misspelled, self.random.choice(NAMES)))

    def book(self) -> dict[str, Any]:
        fields: dict[str, Callable[[], Any]] = {
            "isbn": lambda: self.random.choice(ISBNS),
            "genre": lambda: self.random.choice(GENRES),
            "description": lambda: self.text([*TITLES.values()]),
            "publisher": lambda: self.text(NAMES),
            "language": lambda: self.one("", *LANGUAGES),
            "pages": lambda: self.one(1, 400, 100_000, self.random.choice(NUMBERS)),
            "price": lambda: self.one(0, 9.99, 0.1, 12.345, "7.10", self.random.choice(NUMBERS)),
            "published_date": lambda: self.one("1965-08-01", "0001-01-01", "9999-12-31", "2020-02-30", "x", None),
            "publication_year": lambda: self.one(-5000, -800, 0, 1965, 2024, self.random.choice(NUMBERS)),
            "cover_url": lambda: self.one("https://example.com/a.jpg", "javascript:alert(1)", None),
        }
        body: dict[str, Any] = {"title": self.text([*TITLES.values()]), "author": self.text(NAMES)}
        chosen = self.random.sample(sorted(fields), self.random.randrange(5))
        body |= {name: fields[name]() for name in chosen}
        if self.chance(0.05):
            body[self.one("title", "author", "id", "copies", "colour")] = self.random.choice(NUMBERS)
        return body

    def page(self) -> dict[str, Any]:
        if self.chance(0.3):
            return {"cursor": "{cursor}"}
        if self.chance(0.1):
            wrong = self.one(-1, 0, 101, 2**31, "x", "", "W10", "WyJpZCJd")
            return {self.one("limit", "offset", "skip", "cursor"): wrong}
        return {"limit": self.one(1, 3, 20, 100)} | ({"offset": self.random.randrange(60)} if self.chance(0.3) else {})

    def query(self, path: str, **parameters: Any) -> str:
        # A reference must not be quoted.
        pairs = "&".join(
            f"{name}={value if str(value).startswith('{') else quote(str(value), errors='surrogatepass')}"
            for name, value in parameters.items()
        )
        if self.chance(0.02):
            pairs += self.one("&limit=1&limit=2", "&colour=red", "&search=%ff", "&=", "&search=a&search=b")
        return f"{path}?{pairs}" if pairs else path

    def filters(self) -> dict[str, Any]:
        known: dict[str, Callable[[], Any]] = {
            "search": self.words,
            "genre": lambda: self.random.choice(GENRES),
            "author": lambda: self.random.choice(NAMES),
            "publisher": lambda: self.random.choice(NAMES),
            "language": lambda: self.one(*LANGUAGES),
            "year_from": lambda: self.one(-5000, 1900, 2024, 10**9, "x"),
            "year_to": lambda: self.one(-5000, 1900, 2024, ""),
            "available": lambda: self.one("true", "false", "maybe"),
            "added_by": lambda: self.one("me", "you", self.ref("user")),
            "isbn": lambda: self.random.choice(ISBNS),
            "title": self.words,
        }
        names = self.random.sample(sorted(known), self.one(0, 0, 1, 1, 2, 3))
        if self.chance(0.4):
            names = [*dict.fromkeys([*names, "search"])]
        found = {name: known[name]() for name in names}
        if self.chance(0.6):
            sort = self.one("id", "title", "author", "year", "rating", "created", "best")
            found["sort"] = self.one("", "-") + sort
        return found

    def send(self, role: str | None, method: str, path: str, body: Any = ..., **options: Any) -> Sent:
        if body is not ...:
            text = json.dumps(body)
            if self.chance(0.01):
                text = self.one("", "[]", "{", "null", '{"title": 1e999}', '"\\ud800"', "[" * 5000, text[:-1])
            options |= {"content": text, "headers": {"Content-Type": "application/json", **options.get("headers", {})}}
        return Sent(role, method, path, options)

    def request(self) -> Sent:
        role = self.one(None, *ROLES, *ROLES)
        kinds: list[tuple[int, Callable[[str | None], Sent]]] = [
            *((20, self.add_book), (8, self.change_book), (3, self.delete_book), (25, self.list_books)),
            *((5, self.one_book), (14, self.shelf), (10, self.lending), (3, self.events), (2, self.upload)),
            *((3, self.accounts), (2, self.export), (1, self.anything)),
        ]
        weights, functions = zip(*kinds, strict=True)
        (function,) = self.random.choices(functions, weights)
        sent: Sent = function(role)
        return sent

    def add_book(self, role: str | None) -> Sent:
        return self.send(role, "POST", "/books", self.book())

    def change_book(self, role: str | None) -> Sent:
        method, body = self.one("PUT", "PATCH", "PATCH"), self.book()
        if method == "PATCH":
            body = {name: self.one(value, None) for name, value in body.items() if self.chance(0.7)}
        headers = self.one({}, {}, {"If-Match": self.one('"1"', '"2"', "*", 'W/"1", "3"', "x")})
        return self.send(role, method, f"/books/{self.ref('book')}", body, headers=headers)

    def delete_book(self, role: str | None) -> Sent:
        return self.send(role, "DELETE", f"/books/{self.ref('book')}")

    def list_books(self, role: str | None) -> Sent:
        if self.chance(0.05):
            return self.send(role, "GET", "/books/genres")
        return self.send(role, "GET", self.query("/books", **self.filters(), **self.page()))

    def one_book(self, role: str | None) -> Sent:
        rest, headers = self.one("", "/reviews", "/stock"), self.one({}, {"If-None-Match": self.one('"1"', "*")})
        return self.send(role, "GET", f"/books/{self.ref('book')}{rest}", headers=headers)

    def shelf(self, role: str | None) -> Sent:
        path, method = (
            f"/my-library/{self.ref('book')}",
            self.one("POST", "POST", "PATCH", "PATCH", "GET", "DELETE", "list"),
        )
        if method == "list":
            sort = self.one("", "-") + self.one("added", "finished", "updated", "title", "author", "rating", "best")
            filters = self.one({}, {"status": self.one("completed", "reading", "lost")}, {"book_id": self.ref("book")})
            filters |= self.one({}, {"search": self.words()}, {"tag": self.one("sf", "SF", "été", '"', "a,b", "")})
            listed = self.one(self.query("/my-library", sort=sort, **filters, **self.page()), "/my-library/stats")
            return self.send(role, "GET", listed)
        if method == "POST":
            return self.send(
                role, method, path, self.one({}, {"status": self.one("reading", "completed", "lost", None)})
            )
        if method == "PATCH":
            change = {
                "status": self.one("wishlist", "reading", "completed", "abandoned", "x", None),
                "rating": self.one(0.25, 1, 2.5, 4.75, 5, 0, 5.25, 0.3, None, *NUMBERS),
                "review": self.text([*TITLES.values()]),
                "tags": self.one([], ["sf", "SF", "sf"], ["été"], ["x" * 200], "sf", None, [""]),
                "started_at": self.one("2020-01-01T00:00:00Z", "1999-12-31", "x", None, "0001-01-01T00:00:00Z"),
                "finished_at": self.one("2021-05-05T05:05:05.123456+02:00", "9999-12-31T23:59:59.999999Z", None),
            }
            return self.send(role, method, path, {name: change[name] for name in change if self.chance(0.4)})
        return self.send(role, method, path)

    def lending(self, role: str | None) -> Sent:
        what = self.one("stock", "stock", "borrow", "borrow", "borrow", "return", "return", "renew", "list", "one")
        if what == "stock":
            quantity = self.one(1, 3, 5, -1, -2, *NUMBERS)
            return self.send(
                self.one("Lydia", "admin", role), "POST", f"/books/{self.ref('book')}/stock", {"quantity": quantity}
            )
        if what == "borrow":
            body = {
                "book_id": self.one(1, 2, 3, *NUMBERS) if self.chance(0.1) else "{ref}",
                "quantity": self.one(1, 1, 2, *NUMBERS),
            }
            body |= self.one({}, {}, {"due_at": self.one("2020-01-01T00:00:00Z", "x", None)}, {"user_id": 1})
            sent = self.send(role, "POST", "/loans", body)
            content = sent.options["content"].replace(
                '"{ref}"', f"{{book:{self.random.randrange(self.known('book') + 1)}}}"
            )
            return sent._replace(options={**sent.options, "content": content})
        if what == "list":
            filters = self.one(
                {}, {"status": self.one("active", "overdue", "returned", "x")}, {"user_id": self.ref("user")}
            )
            return self.send(role, "GET", self.query("/loans", **filters, **self.page()))
        path = f"/loans/{self.ref('loan')}"
        return self.send(role, "GET", path) if what == "one" else self.send(role, "POST", f"{path}/{what}")

    def events(self, role: str | None) -> Sent:
        # Always to the end, so that both stand at the same place.
        types = self.one({}, {}, {"types": "x"}, {"types": "book.*"}, {"types": "*,"}) if self.chance(0.1) else {}
        return self.send("admin", "GET", self.query("/events", **types, after="{event}", limit=100))

    def upload(self, role: str | None) -> Sent:
        if self.chance(0.5):
            path = f"/books/upload/{self.ref('upload')}" + self.one(
                "", "/errors", "/errors?format=csv", "/errors?severity=error"
            )
            return self.send(role, "GET", self.one(path, path, self.query("/books/upload", **self.page())))
        lines = ["title,author,isbn,genre,price,pages,year"]
        for _ in range(self.random.randrange(30)):
            cells = [
                self.text([*TITLES.values()]),
                self.text(NAMES),
                self.random.choice(ISBNS) or "",
                self.random.choice(GENRES),
            ]
            cells += [
                str(self.one("", "9.99", "x", "-1", "1,5")),
                str(self.one("", "10", "0")),
                str(self.one("", "1999", "32767")),
            ]
            lines.append(",".join('"' + cell.replace('"', '""') + '"' for cell in cells))
        content = "\n".join(lines).encode("utf-8", "replace")
        options = self.one({}, {"on_duplicate": "update"}, {"dry_run": "true"}, {"on_duplicate": "x"})
        return Sent(role, "POST", "/books/upload", {"files": {"file": ("books.csv", content)}, "data": options})

    def accounts(self, role: str | None) -> Sent:
        what = self.one("me", "rename", "users", "users", "register", "user", "login")
        if what == "register":
            name = self.one("rita", "RITA", "new", "a b", "é", "x" * 60, "")
            mail = self.one("rita@example.com", "OSKAR@example.com", "bad", "neu@exämple.com")
            return self.send(
                role,
                "POST",
                "/auth/register",
                {"username": name, "email": mail, "password": self.one(PASSWORD, "short")},
            )
        if what == "rename":
            return self.send(role, "PATCH", "/users/me", {"full_name": self.text([*TITLES.values()])})
        if what == "users":
            search = self.one("r", "RITA", "%", "_", "example", self.words())
            return self.send(
                "admin", "GET", self.query("/users", **self.one({"search": search}, {"role": "reader"}), **self.page())
            )
        if what == "login":
            return self.send(None, "POST", "/login", {"username": self.one("nobody", "\x00", "é"), "password": "wrong"})
        return self.send(role, "GET", "/users/me" if what == "me" else f"/users/{self.ref('user')}")

    def export(self, role: str | None) -> Sent:
        filters = {name: value for name, value in self.filters().items() if name != "added_by"}
        path = self.query("/books/export", **filters, format=self.one("csv", "ndjson"))
        return self.send(role, "GET", self.one(path, path, "/my-library/export"))

    def anything(self, role: str | None) -> Sent:
        path = self.one(
            "/", "/nothing", "/books/", "/books//", "/books/%00", "/openapi.json?x=1", "/%ff", "/health/x", "/loans/"
        )
        return self.send(role, self.one("GET", "POST", "PUT", "DELETE", "PATCH"), path)


@pytest.fixture
def targets(serve: Callable[..., Server], tmp_path: Path) -> Iterator[list[Target]]:
    """On SQLite and on PostgreSQL."""
    postgres = Postgres()
    try:
        options = {"ACCESS_TOKEN_EXPIRE_MINUTES": "1440", "LOG_LEVEL": "WARNING"}
        files = [tmp_path / "sqlite.db", tmp_path / "postgresql.db"]
        urls = [f"sqlite:///{files[0]}", postgres.database(files[1])]
        servers = [serve(file=file, DATABASE_URL=url, **options) for file, url in zip(files, urls, strict=True)]
        yield [Target(server) for server in servers]
        for server in servers:
            server.stop()
            assert "Traceback" not in server.log.read_text()
    finally:
        postgres.throw_away()


@pytest.mark.slow
@pytest.mark.sqlite  # it starts PostgreSQL itself: once is enough
def test_both_databases_answer_alike(targets: list[Target]) -> None:
    generator = Generator(SEED, lambda kind: len(targets[0].ids.get(kind, ())))
    differences, statuses = list[str](), Counter[int]()
    with ThreadPoolExecutor(2) as pool:
        for number in range(REQUESTS):
            sent, known = generator.request(), {kind: len(ids) for kind, ids in targets[0].ids.items()}
            sqlite, postgresql = pool.map(lambda target, sent=sent: target.send(sent), targets)
            statuses[sqlite[0]] += 1
            if sqlite != postgresql:
                differences.append(describe(number, sent, sqlite, postgresql))
                for target in targets:
                    target.forget(known)
    print(f"{REQUESTS} requests with seed {SEED}: {dict(sorted(statuses.items()))}, {len(differences)} differences")
    assert not [status for status in statuses if status >= 500]
    assert statuses[200] > REQUESTS / 4
    assert not differences, "\n".join(differences[:20])


def describe(number: int, sent: Sent, sqlite: Any, postgresql: Any) -> str:
    """The request and where its answers begin to differ."""
    one, other = (json.dumps(answer, ensure_ascii=True) for answer in (sqlite, postgresql))
    equal = next((place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), 0)
    part, content = slice(max(0, equal - 100), equal + 200), str(sent.options.get("content", ""))[:300]
    return f"{number} {sent.role} {sent.method} {sent.path} {content}\n  {one[part]}\n  {other[part]}"
