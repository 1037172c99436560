"""The sample data that an empty database begins with (SAMPLE=true)."""

import csv
import secrets

import sqlalchemy as sa
from sqlmodel import Session, col

import books
import library
import loans
import security
from models import Book, ShelfEntry, ShelfStatus, User
from schemas import CSV_CONTEXT, BookCreate, EntryUpdate
from settings import STATIC


def add_sample(session: Session) -> None:
    """Classics, copies and reviews, in a database that has never had a user, and so no books."""
    if session.scalar(sa.select(col(User.id)).limit(1)) is not None:
        return
    book_ids, readers = dict[str, int](), dict[str, User]()
    for row in read_sample("books"):
        book = books.add_book(session, BookCreate.model_validate(row, context=CSV_CONTEXT), None)
        book_ids[book.title] = book.id
        if copies := book.id % 3:
            loans.move_stock(session, book.id, copies=copies, available=copies)
    password_hash = security.passwords.hash(secrets.token_hex())  # nobody knows this password
    for row in read_sample("reviews"):
        name, title, tags = (row.pop(column) for column in ("reader", "title", "tags"))
        if name not in readers:
            username = name.lower().replace(" ", ".")
            email = f"{username}@sample.invalid"
            readers[name] = User(username=username, full_name=name, email=email, password_hash=password_hash)
            session.add(readers[name])
            session.flush()
        entry = ShelfEntry(user_id=readers[name].id, book_id=book_ids[title], status=ShelfStatus.wishlist)
        session.add(entry)
        values = {column: cell for column, cell in row.items() if cell} | {"tags": tags.split()}
        change = EntryUpdate.model_validate(values, context=CSV_CONTEXT)
        library.revise_entry(session, entry, session.get_one(Book, entry.book_id), readers[name], change)


def read_sample(name: str) -> list[dict[str, str]]:
    return list(csv.DictReader((STATIC / f"sample_{name}.csv").read_text("utf-8").splitlines()))
