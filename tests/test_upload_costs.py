"""What one client's forms and files may cost others: memory, time, places for jobs."""

import csv
import io
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from fastapi import HTTPException, UploadFile
from fastapi.testclient import TestClient
from sqlalchemy.exc import OperationalError
from sqlmodel import Session, col, select

import api
import csv_files
import database
import imports
import security
import uploads
from imports import JobCancelled
from models import Principal, Role, Upload, UploadChunk, UploadStatus, User
from settings import settings
from tests.fixtures import Catalogues, Clock, Person, Server, resident_mb, sign_up, user_named, wait_for

BOOKS = "title,author\nDune,Frank Herbert\nEmma,Jane Austen\n"
PATHS = ["/books/upload", "/my-library/import"]


# --- forms --------------------------------------------------------------------------------------------------------


def part(name: str, value: bytes, filename: str = "") -> bytes:
    about = f'; filename="{filename}"' if filename else ""
    return f'--b\r\nContent-Disposition: form-data; name="{name}"{about}\r\n\r\n'.encode() + value + b"\r\n"


MULTIPART = "multipart/form-data; boundary=b"
URLENCODED = "application/x-www-form-urlencoded"
CHARSETS = {
    f"{charset} in {media_type.partition(';')[0]}": (f"{media_type}; charset={charset}", is_utf8)
    for media_type in (MULTIPART, URLENCODED)
    for charset, is_utf8 in {
        "utf-8": True,
        "UTF8": True,
        '"utf-8"': True,
        "punycode": False,
        "idna": False,
        "latin-1": False,
        "utf-7": False,
        "hex": False,
        "no such": False,
        "utf-8; charset=punycode": False,
        "punycode; charset*=utf-8": False,
    }.items()
}


@pytest.mark.parametrize("path", ["/login", "/auth/token", *PATHS])
@pytest.mark.parametrize(("content_type", "is_utf8"), CHARSETS.values(), ids=CHARSETS)
def test_forms_are_utf8(reader: Person, path: str, content_type: str, is_utf8: bool) -> None:
    fields = {"username": "é" * 3000, "password": "x"} if path not in PATHS else {"dry_run": "é"}
    parts = b"".join(part(name, value.encode()) for name, value in fields.items())
    body = parts + b"--b--\r\n" if "multipart" in content_type else b"username=%C3%A9&password=x"
    answer = reader.post(path, content=body, headers={"Content-Type": content_type})
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.status_code in ((400, 401, 422) if is_utf8 else (415,)), answer.text


@pytest.mark.slow
def test_a_form_in_punycode_does_not_stop_the_server(server: Server) -> None:
    """1 MB took 198 s."""
    for length, status in ((7000, 415), (500_000, 413)):
        body = part("username", ("é" * length).encode()) + b"--b--\r\n"
        for path in ("/login", "/auth/token"):
            answer = server.client.post(path, content=body, headers={"Content-Type": f"{MULTIPART}; charset=punycode"})
            assert answer.status_code == status


FORMS: dict[str, tuple[bytes, int, str]] = {
    "a long field": (part("dry_run", b"x" * 5000), 400, "exceeded maximum size"),
    "many fields": (b"".join(part(f"field{n}", b"x") for n in range(17)), 400, "Too many fields"),
    "a long field after the file": (part("file", b"A", "a.csv") + part("dry_run", b"x" * 5000), 400, "exceeded"),
    "no boundary at the end": (part("file", BOOKS.encode(), "a.csv")[:-2], 422, "file: Field required"),
    "an unknown file": (part("other", b"A", "a.csv"), 422, "other: is not a known field"),
    "two files": (part("file", b"A", "a.csv") * 2, 422, "file: is given more than once"),
    "an unknown option after the file": (part("file", b"A", "a.csv") + part("colour", b"red"), 422, "colour: "),
    "an invalid option after the file": (part("file", b"A", "a.csv") + part("dry_run", b"?"), 422, "dry_run: "),
    "an option twice after the file": (part("file", b"A", "a.csv") + part("dry_run", b"1") * 2, 422, "more than once"),
}


@pytest.mark.parametrize(("body", "status", "detail"), FORMS.values(), ids=FORMS)
def test_nothing_is_left_of_a_form_that_is_refused(
    reader: Person, monkeypatch: pytest.MonkeyPatch, body: bytes, status: int, detail: str
) -> None:
    monkeypatch.setattr(uploads, "CHUNK", 1)
    end = b"" if "boundary" in detail else b"--b--\r\n"
    if detail == "file: Field required":
        end = b""
    answer = reader.post("/books/upload", content=body + end, headers={"Content-Type": MULTIPART})
    assert (answer.status_code, answer.headers["Content-Type"]) == (status, "application/problem+json")
    assert detail in answer.json()["detail"]
    assert reader.get("/books/upload").json()["total"] == 0
    assert database.write_sync(lambda session: session.exec(select(UploadChunk)).all()) == []


def test_options_may_follow_the_file(client: TestClient, reader: Person) -> None:
    body = part("file", BOOKS.encode(), "a.csv") + part("dry_run", b"true") + part("on_duplicate", b"") + b"--b--\r\n"
    answer = reader.post("/books/upload", content=body, headers={"Content-Type": MULTIPART})
    assert (answer.status_code, answer.json()["dry_run"], answer.json()["on_duplicate"]) == (202, True, "skip")
    upload = reader.get(answer.headers["Location"]).json()
    assert (upload["status"], upload["inserted"], upload["filename"]) == ("completed", 2, "a.csv")
    assert client.get("/books").json()["total"] == 0


# --- bodies -------------------------------------------------------------------------------------------------------

MEGABYTE = 1 << 20


def send_head(server: Server, path: str, length: int, token: str | None = None) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Type: {MULTIPART}", f"Content-Length: {length}"]
    lines += [f"Authorization: Bearer {token}"] if token else []
    connection.sendall("\r\n".join([*lines, "", ""]).encode())
    return connection


@pytest.mark.slow
@pytest.mark.parametrize("path", [*PATHS, "/books"])
@pytest.mark.parametrize("token", [None, "x.y.z"], ids=["no token", "wrong token"])
def test_the_token_is_looked_at_before_the_body(server: Server, path: str, token: str | None) -> None:
    with send_head(server, path, 95 * MEGABYTE if path in PATHS else 1000, token) as connection:
        assert connection.recv(1000).startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize(("path", "most"), [("/login", api.MAX_ACCOUNT_BODY), ("/loans", api.MAX_BODY)])
def test_bodies_are_no_larger_than_their_fields_need(client: TestClient, path: str, most: int) -> None:
    for length, is_too_large in ((most, False), (most + 1, True)):
        answer = client.post(path, content=b" " * length, headers={"Content-Type": "application/json"})
        assert (answer.status_code == 413) == is_too_large


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fields", "files"])
def test_bodies_of_strangers_cost_no_memory(serve: Callable[..., Server], kind: str) -> None:
    """It was 750 MB of memory, and as files as much of temporary disk."""
    server = serve()
    before = resident_mb(server.process.pid, "VmHWM")
    piece = part("field", b"x" * (MEGABYTE - 200), "a.csv" if kind == "files" else "")

    def send(_: int) -> bytes:
        with send_head(server, "/books/upload", 95 * len(piece)) as connection:
            for _number in range(95):
                connection.sendall(piece)
            return connection.recv(1000)

    with ThreadPoolExecutor(8) as pool:
        assert all(answer.startswith(b"HTTP/1.1 401 ") for answer in pool.map(send, range(8)))
    growth = resident_mb(server.process.pid, "VmHWM") - before
    print(f"eight bodies of 95 MB: +{growth:.0f} MB")
    assert growth < 20


@pytest.mark.slow
def test_a_file_is_stored_as_it_arrives(server: Server) -> None:
    rita = sign_up(server.client, "rita")
    body = part("file", BOOKS.encode() + b"A,B\n" * 500_000, "a.csv")
    with send_head(server, "/books/upload", len(body) + 7, rita.tokens["access_token"]) as connection:
        connection.sendall(body[:MEGABYTE])
        wait_for(lambda: rita.get("/books/upload").json()["total"] or None)
        upload = rita.get("/books/upload/1").json()
        assert (upload["status"], upload["rows"], upload["started_at"]) == ("processing", 0, None)
        connection.sendall(body[MEGABYTE:] + b"--b--\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 202 ")
    assert wait_for(lambda: rita.get("/books/upload/1").json()["finished_at"], seconds=60)
    with send_head(server, "/books/upload", len(body) + 7, rita.tokens["access_token"]) as connection:
        connection.sendall(body[:MEGABYTE])
        wait_for(lambda: rita.get("/books/upload").json()["total"] == 2 or None)
    wait_for(lambda: rita.get("/books/upload").json()["total"] == 1 or None)  # the client is gone


@pytest.mark.parametrize(("pause", "status"), [(40, "queued"), (61, "failed")], ids=["slow", "silent"])
def test_a_slow_client_has_a_minute_for_each_piece(reader: Person, clock: Clock, pause: int, status: str) -> None:
    claims = security.verify_token("access", reader.tokens["access_token"])
    assert claims is not None
    user = Principal(2, "Rita", Role.reader, claims.sid)
    file = uploads.StoredFile(user, "a.csv")
    form = uploads.UploadForm(file=UploadFile(file))
    with suppress(JobCancelled):
        for piece in (BOOKS, "A,", "B\n", "C,D\n"):
            file.write(piece.encode())
            clock.advance(seconds=pause)
            uploads.import_all(enrich=False)
        database.write_sync(uploads.complete_upload, user, form)
    upload = reader.get("/books/upload/1").json()
    assert (upload["status"], upload["error"] is None) == (status, status == "queued")


def test_a_file_of_somebody_who_signed_out_is_not_taken(reader: Person) -> None:
    claims = security.verify_token("access", reader.tokens["access_token"])
    assert claims is not None
    user = Principal(2, "Rita", Role.reader, claims.sid)
    file = uploads.StoredFile(user, "a.csv")
    file.write(BOOKS.encode())
    assert reader.post("/auth/logout-all").status_code == 204
    with pytest.raises(HTTPException, match="401"):
        database.write_sync(uploads.complete_upload, user, uploads.UploadForm(file=UploadFile(file)))


def test_a_user_has_at_most_five_unfinished_uploads(
    client: TestClient, reader: Person, other_reader: Person, librarian: Person
) -> None:
    add_uploads("Rita", 5)
    files = {"file": ("a.csv", BOOKS)}
    for path in PATHS:
        answer = reader.post(path, files=files)
        assert (answer.status_code, answer.headers["Retry-After"]) == (429, "10")
        assert answer.json()["detail"].startswith("You have 5 uploads that are not finished")
    assert reader.get("/books/upload").json()["total"] == 5
    assert reader.delete("/books/upload/1").status_code == 200
    assert reader.post("/books/upload", files=files).status_code == 202
    add_uploads("Rita", 5)
    assert other_reader.post("/books/upload", files=files).status_code == 202


# --- records ------------------------------------------------------------------------------------------------------

PROSE = "one, two; three " * 1000
CELLS: dict[str, tuple[str, str | None]] = {
    "commas in quotes": (f'"{PROSE}",B', None),
    "commas in quotes, on many lines": ('"' + f"{PROSE}\n" * 20 + '",B', None),
    "quotes in quotes": (f'"{PROSE.replace(" ", chr(34) * 2)}",B', None),
    "a thousand cells": ("," * 999, "has 1000 cells where the header has 2"),
    "a thousand and one": ("," * 1000, "has more than 1,000 cells"),
    "quoted cells": ('"a",' * 1001, "has more than 1,000 cells"),
    "after a quote within a cell": ('x"' + "," * 5000 + '"x', "has more than 1,000 cells"),
    "on many lines": ('a,"\n' + '",b,"\n' * 3000 + '",c', "has more than 1,000 cells"),
    "quoted as a whole": ('"' + "," * 5000 + '"', "has 1 cells where the header has 2"),
}


@pytest.mark.parametrize(("line", "reason"), CELLS.values(), ids=CELLS)
def test_a_record_of_too_many_cells_is_refused(reader: Person, line: str, reason: str | None) -> None:
    upload = reader.upload(f"title,author\n{line}\nDune,Frank Herbert\n")
    assert (upload["status"], upload["inserted"], upload["failed"] > 0) == (
        "completed",
        1 if reason else 2,
        reason is not None,
    )
    if reason:
        assert upload["errors"][0]["message"] == reason


@pytest.mark.parametrize("line", ["," * 1_900_000, '"",' * 600_000], ids=["empty", "quoted"])
def test_cells_are_counted_before_a_record_is_split(monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    read, split = csv.reader, list[str]()

    def reader(lines: Iterable[str], **options: Any) -> Any:
        def watch() -> Iterator[str]:
            for each in lines:
                split.append(each)
                yield each

        return read(watch(), **options)

    monkeypatch.setattr(csv, "reader", reader)
    found = [*csv_files.records(io.StringIO(f"title,author\n{line}\n", newline=""), csv_files.Dialect())]
    assert [isinstance(record, csv_files.BrokenRecord) for record in found] == [False, True]
    assert split == ["title,author\n"]


def test_a_blank_is_no_delimiter() -> None:
    """Where blanks may precede a quote, the pattern that counts cells would take hours for 2 MB of them."""
    head = io.StringIO("sep= \ntitle  author\n" + "a b\n" * 60 + 'x, "y"\n', newline="")
    assert csv_files.detect_dialect(head).delimiter != " "


LONG_ROWS = {
    "commas": "," * 1_900_000,
    "lines in a cell": '"' + "\n" * 1_900_000 + '"',
    "text": "\N{BOOKS}A," + "b" * 1_900_000,
}


@pytest.mark.slow
@pytest.mark.parametrize("line", LONG_ROWS.values(), ids=LONG_ROWS)
def test_long_rows_cost_little_memory(serve: Callable[..., Server], line: str) -> None:
    """88 MB; of commas it was 1.9 GB."""
    server = serve()
    rita = sign_up(server.client, "rita")
    before = resident_mb(server.process.pid, "VmHWM")
    path = rita.post("/books/upload", files={"file": ("a.csv", f"title,author\n{f'{line}{chr(10)}' * 46}")}).headers
    wait_for(lambda: rita.get(path["Location"]).json()["finished_at"], seconds=120)
    growth = resident_mb(server.process.pid, "VmHWM") - before
    print(f"46 rows of 1.9 MB: +{growth:.0f} MB")
    assert growth < 150


@pytest.mark.slow
def test_refused_rows_are_returned_in_little_memory(serve: Callable[..., Server]) -> None:
    """81 MB; with 1,000 rows in memory at once it was 290 MB."""
    server = serve()
    rita = sign_up(server.client, "rita")
    header, row = ",".join(f"c{n}" for n in range(400)), ",".join(["x" * 4400] * 400)
    upload = rita.upload(f"title,author,{header}\n" + f",,{row}\n" * 46)
    assert upload["failed"] == 46
    before, size = resident_mb(server.process.pid, "VmHWM"), 0
    path, token = (
        f"/books/upload/{upload['id']}/errors?format=csv",
        {"Authorization": f"Bearer {rita.tokens['access_token']}"},
    )
    with server.client.stream("GET", path, headers=token) as answer:
        for piece in answer.iter_raw():
            size += len(piece)
    growth = resident_mb(server.process.pid, "VmHWM") - before
    print(f"{size / 1e6:.0f} MB: +{growth:.0f} MB")
    assert size > 80_000_000
    assert growth < 150


# --- jobs ---------------------------------------------------------------------------------------------------------


def add_uploads(username: str, count: int, *, enrich: bool = False) -> list[int]:
    """Uploads that wait."""

    def add(session: Session) -> list[int]:
        user, data = user_named(session, username), BOOKS.encode()
        new = [Upload(user_id=user.id, filename="a.csv", size=len(data), enrich=enrich) for _ in range(count)]
        session.add_all(new)
        session.flush()
        session.add_all(UploadChunk(upload_id=upload.id, number=0, data=data) for upload in new)
        return [upload.id for upload in new]

    return database.write_sync(add)


def claim(enrich: bool = False) -> int | None:
    job = database.write_sync(uploads._claim, enrich)
    return None if job is None else job.upload_id


def end(upload_id: int) -> None:
    database.write_sync(lambda s: uploads.finish(s, s.get_one(Upload, upload_id), UploadStatus.completed))


def test_a_user_has_one_upload_at_work(reader: Person, other_reader: Person, librarian: Person, clock: Clock) -> None:
    first, second, third = add_uploads("Rita", 3)
    (looked_up,) = add_uploads("Rita", 1, enrich=True)
    (others,) = add_uploads("Oskar", 1)
    assert [claim(), claim(), claim()] == [first, others, None]
    assert [claim(enrich=True), claim(enrich=True)] == [looked_up, None]
    clock.advance(seconds=1)
    (last,) = add_uploads("Lydia", 1)
    end(first)
    assert [claim(), claim()] == [last, second], "who had no turn is first"
    end(second)
    assert claim() == third


def test_waiting_uploads_run_one_after_another(client: TestClient, reader: Person) -> None:
    add_uploads("Rita", 4)
    assert reader.upload(BOOKS)["skipped"] == 2
    assert {upload["status"] for upload in reader.get("/books/upload").json()["items"]} == {"completed"}
    assert client.get("/books").json()["total"] == 2


@pytest.mark.slow
def test_lookups_of_a_slow_source_do_not_block_other_imports(serve: Callable[..., Server], others: Catalogues) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def hang(_: BaseHTTPRequestHandler) -> None:
        asked.set()
        go_on.wait(60)

    others.always = hang
    server = serve(OPEN_LIBRARY_URL=others.url)
    people = [sign_up(server.client, name) for name in ("rita", "oskar", "lydia")]
    for person in people[:2]:
        files = {"file": ("a.csv", "isbn\n9780141439587\n")}
        assert person.post("/books/upload", files=files, data={"enrich": "true"}).status_code == 202
    assert asked.wait(10)
    try:
        for person in people:
            assert person.upload(BOOKS)["status"] == "completed"
        assert people[0].get("/books/upload/1").json()["status"] == "processing"
    finally:
        go_on.set()


def test_an_upload_whose_job_died_three_times_fails(reader: Person, clock: Clock) -> None:
    (upload_id,) = add_uploads("Rita", 1)
    for _ in range(3):
        assert [claim(), claim()] == [upload_id, None]
        clock.advance(seconds=16)
    uploads.import_all(enrich=False)
    upload = reader.get(f"/books/upload/{upload_id}").json()
    assert (upload["status"], upload["rows"]) == ("failed", 0)
    assert upload["error"] == "3 processes ended while they imported this file: it is not tried again."


def test_an_upload_that_gets_on_is_resumed_any_number_of_times(
    client: TestClient, reader: Person, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def die() -> bool:
        raise Killed

    monkeypatch.setattr(uploads, "BATCH", 1)
    rows = "".join(f"Book {number},Somebody\n" for number in range(8))
    with monkeypatch.context() as patch:
        patch.setattr(uploads, "import_waiting", lambda _: None)
        path = reader.post("/books/upload", files={"file": ("a.csv", f"title,author\n{rows}")}).headers["Location"]
    for done in range(1, 8):
        with monkeypatch.context() as patch:
            patch.setattr(database, "server_is_stopping", die)
            with pytest.raises(Killed):
                uploads.import_all(enrich=False)
        assert reader.get(path).json()["rows"] == done
        clock.advance(seconds=16)
    uploads.import_all(enrich=False)
    assert reader.get(path).json()["inserted"] == client.get("/books").json()["total"] == 8


def test_a_full_disk_is_no_failed_attempt(reader: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    (upload_id,) = add_uploads("Rita", 1)

    def fail(*_: Any) -> None:
        raise OperationalError("INSERT", None, Exception("the disk is full"))

    with monkeypatch.context() as patch:
        patch.setattr(uploads, "_store_batch", fail)
        for _ in range(5):
            uploads.import_all(enrich=False)
            assert reader.get(f"/books/upload/{upload_id}").json()["status"] == "queued"
    uploads.import_all(enrich=False)
    assert reader.get(f"/books/upload/{upload_id}").json()["inserted"] == 2


@pytest.mark.parametrize("hours", [-1, -24, 1])
def test_an_import_goes_on_after_the_clock_was_set(reader: Person, clock: Clock, hours: int) -> None:
    (upload_id,) = add_uploads("Rita", 1)
    job = database.write_sync(uploads._claim, False)
    assert job is not None
    clock.advance(hours=hours)
    assert database.read_sync(uploads.next_upload, False) == upload_id
    job.renew_lease()  # the process is alive
    assert database.read_sync(uploads.next_upload, False) is None
    clock.advance(seconds=imports.LEASE.total_seconds() + 1)
    uploads.import_all(enrich=False)
    assert database.write_sync(lambda session: session.get_one(Upload, upload_id).status) == "completed"


# --- rights -------------------------------------------------------------------------------------------------------

RIGHTS: dict[str, tuple[str, dict[str, Any], bool, int]] = {
    "switched off": ("/books/upload", {"is_active": False}, True, 10),
    "demoted": ("/books/upload", {"role": Role.reader}, False, 10),
    "demoted where readers add books": ("/books/upload", {"role": Role.reader}, True, 25),
    "a shelf, switched off": ("/my-library/import", {"is_active": False}, True, 10),
    "a shelf, demoted": ("/my-library/import", {"role": Role.reader}, False, 25),
}


@pytest.mark.parametrize(("path", "change", "readers_can_add", "rows"), RIGHTS.values(), ids=RIGHTS)
def test_an_import_goes_on_only_while_its_owner_may_add_books(
    librarian: Person,
    admin: Person,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    change: dict[str, Any],
    readers_can_add: bool,
    rows: int,
) -> None:
    monkeypatch.setattr(settings, "readers_can_add", readers_can_add)
    monkeypatch.setattr(uploads, "BATCH", 10)

    def change_owner() -> bool:
        def update(session: Session) -> None:
            user = session.exec(select(User).where(col(User.username) == "Lydia")).one()
            for name, value in change.items():
                setattr(user, name, value)

        database.write_sync(update)
        return False

    monkeypatch.setattr(database, "server_is_stopping", change_owner)
    shelf = "".join(f"Book {number},Somebody,5,read\n" for number in range(25))
    file = {"file": ("a.csv", f"Title,Author,My Rating,Exclusive Shelf\n{shelf}")}
    location = librarian.post(path, files=file).headers["Location"]
    upload = admin.get(location).json()
    expected = ("completed", None) if rows == 25 else ("failed", "Its owner may not add books any more.")
    assert (upload["rows"], upload["status"], upload["error"]) == (rows, *expected)
    chunks = database.write_sync(lambda session: session.exec(select(UploadChunk)).all())
    assert (chunks, upload["finished_at"] is None) == ([], False)
