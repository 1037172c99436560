"""A user of the client that openapi-python-client generates. openapi_fetch.ts and hey_api.ts do the same."""

import io
import sys
import time
from typing import Any, TypeVar

from books_client import AuthenticatedClient, Client
from books_client.api.accounts import login, register
from books_client.api.catalogue import create_book, list_books, update_book
from books_client.api.changes import list_events
from books_client.api.in_and_out import read_upload, upload_books
from books_client.api.lending import borrow, change_stock
from books_client.api.my_library import shelve_book, update_entry
from books_client.api.users import update_user
from books_client.models import (
    AccountUpdate,
    BookCreate,
    BookPublic,
    BookUpdate,
    EntryCreate,
    EntryPublic,
    EntryUpdate,
    EventPage,
    LoanCreate,
    LoanPublic,
    LoginCredentials,
    PageBookPublic,
    Problem,
    ShelfStatus,
    StockChange,
    StockEvent,
    StockPublic,
    TokenPair,
    UploadForm,
    UploadPublic,
    UploadStatus,
    UserCreate,
    UserPublic,
)
from books_client.types import UNSET, File, Unset

T = TypeVar("T")
BASE_URL, NAME, PASSWORD = sys.argv[1], "python", "a long way to Arrakis"


def expect(kind: type[T], answer: object) -> T:
    assert isinstance(answer, kind), answer
    return answer


def sign_in(username: str, password: str) -> AuthenticatedClient:
    answer = login.sync(client=Client(BASE_URL), body=LoginCredentials(username=username, password=password))
    return AuthenticatedClient(BASE_URL, token=expect(TokenPair, answer).access_token)


admin = sign_in("admin", "admin")
new = UserCreate(username=NAME, email=f"{NAME}@example.com", password=PASSWORD)
user = expect(UserPublic, register.sync(client=Client(BASE_URL), body=new))
reader = sign_in(NAME, PASSWORD)

# A patch of one field leaves the others as they are.
described = BookCreate(title="Dune", author=NAME, pages=535, price=9.99)
book = expect(BookPublic, create_book.sync(client=reader, body=described))
changed = expect(BookPublic, update_book.sync(book.id, client=reader, body=BookUpdate(publisher="Ace")))
assert (changed.title, changed.author, changed.pages, changed.price) == ("Dune", NAME, 535, 9.99)
assert (changed.publisher, changed.version) == ("Ace", book.version + 1)

for title in ("Emma", "Persuasion"):
    expect(BookPublic, create_book.sync(client=reader, body=BookCreate(title=title, author=NAME)))
titles: list[str] = []
cursor: str | Unset | None = UNSET
while cursor is not None:
    page = expect(PageBookPublic, list_books.sync(client=reader, author=NAME, limit=2, cursor=cursor))
    titles += [found.title for found in page.items]
    cursor = page.next_
    assert page.total == 3
assert titles == ["Dune", "Emma", "Persuasion"]

file = File(io.BytesIO(f"title,author\nUbik,{NAME}\n".encode()), "books.csv", "text/csv")
upload = expect(UploadPublic, upload_books.sync(client=reader, body=UploadForm(file=file)))
while upload.status in (UploadStatus.QUEUED, UploadStatus.PROCESSING):
    time.sleep(0.05)
    upload = expect(UploadPublic, read_upload.sync(upload.id, client=reader))
assert (upload.status, upload.inserted, upload.failed) == (UploadStatus.COMPLETED, 1, 0)

expect(EntryPublic, shelve_book.sync(book.id, client=reader, body=EntryCreate(status=ShelfStatus.READING)))
refused = expect(Problem, shelve_book.sync(book.id, client=reader, body=EntryCreate()))
assert (refused.status, refused.code) == (409, "already_shelved")
entry = expect(EntryPublic, update_entry.sync(book.id, client=reader, body=EntryUpdate(rating=4.5)))
assert (entry.status, entry.rating) == (ShelfStatus.READING, 4.5)

stock = expect(StockPublic, change_stock.sync(book.id, client=admin, body=StockChange(quantity=1)))
loan = expect(LoanPublic, borrow.sync(client=reader, body=LoanCreate(book_id=book.id)))
assert (stock.available, loan.username, loan.returned_at) == (1, NAME, None)

position = 0
last: dict[str, dict[str, Any]] = {}
while "loan.created" not in last:
    events = expect(EventPage, list_events.sync(client=reader, after=position, limit=5, types="book.*,shelf.*,loan.*"))
    last |= {event.type_: event.data.to_dict() for event in events.items}
    position = events.next_
assert {"book.updated", "books.imported", "shelf.created", "shelf.updated", "book.stock"} < last.keys()
assert LoanPublic.from_dict(last["loan.created"]) == loan
assert StockEvent.from_dict(last["book.stock"]).on_loan == 1

# A suspended account stays suspended, whatever else is patched.
expect(UserPublic, update_user.sync(user.id, client=admin, body=AccountUpdate(is_active=False)))
renamed = expect(UserPublic, update_user.sync(user.id, client=admin, body=AccountUpdate(full_name="Paul")))
assert (renamed.full_name, renamed.is_active, renamed.role) == ("Paul", False, user.role)
assert expect(Problem, create_book.sync(client=reader, body=described)).status == 401
