"""Stock and loans against a model of them, by random operations. Needs hypothesis."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import sqlalchemy as sa
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

import database
from tests.fixtures import Person, make, service

pytestmark = pytest.mark.slow

COUNTS = sa.text(
    "SELECT book.id, copies, available, (SELECT coalesce(sum(quantity), 0) FROM loan"
    " WHERE book_id = book.id AND returned_at IS NULL) FROM book ORDER BY book.id"
)


class LendingModel(RuleBasedStateMachine):
    """For each book its copies, for each open loan its quantity. Each step predicts the status of its response; after
    each, the database must have the same counts."""

    books, loans = Bundle("books"), Bundle("loans")
    people: ClassVar[list[Person]]  # the first of them is staff

    def __init__(self) -> None:
        super().__init__()
        self.staff = self.people[0]
        self.copies: dict[int, int] = {}
        self.open: dict[int, tuple[int, int, int]] = {}  # by loan: user, book, quantity
        self.renewals: dict[int, int] = {}
        for book, *_ in self.figures():
            assert self.staff.delete(f"/books/{book}").status_code == 204

    def teardown(self) -> None:
        for loan in self.open:
            self.staff.post(f"/loans/{loan}/return")

    def figures(self) -> list[tuple[int, ...]]:
        return [tuple(row) for row in database.read_sync(lambda connection: connection.execute(COUNTS).all())]

    def held(self, book: int) -> int:
        return sum(quantity for _, of, quantity in self.open.values() if of == book)

    @initialize(target=books)
    def begin(self) -> Any:
        return multiple(self.add_book(3), self.add_book(4))

    @precondition(lambda self: len(self.copies) < 2)
    @rule(target=books)
    def another_book(self) -> int:
        return self.add_book(3)

    def add_book(self, copies: int) -> int:
        book = int(self.staff.add_book()["id"])
        self.staff.post(f"/books/{book}/stock", json={"quantity": copies})
        self.copies[book] = copies
        return book

    @rule(book=books, quantity=st.integers(-4, 5))
    def change_stock(self, book: int, quantity: int) -> None:
        expected = 200
        if quantity == 0:
            expected = 422
        elif book not in self.copies:
            expected = 404
        elif self.copies[book] + quantity < self.held(book):
            expected = 409
        answer = self.staff.post(f"/books/{book}/stock", json={"quantity": quantity})
        assert answer.status_code == expected, answer.text
        if expected == 200:
            self.copies[book] += quantity

    @rule(target=loans, book=books, quantity=st.sampled_from([1, 1, 1, 2, 3, 0, -10]), user=st.integers(0, 2))
    def borrow(self, book: int, quantity: int, user: int) -> Any:
        expected = 201
        if quantity < 1:
            expected = 422
        elif book not in self.copies:
            expected = 404
        elif self.copies[book] - self.held(book) < quantity:
            expected = 409
        answer = self.people[user].post("/loans", json={"book_id": book, "quantity": quantity})
        assert answer.status_code == expected, answer.text
        if expected != 201:
            return multiple()
        self.open[answer.json()["id"]] = (user, book, quantity)
        return int(answer.json()["id"])

    @rule(loan=loans, user=st.integers(0, 2))
    def return_loan(self, loan: int, user: int) -> None:
        status = self.people[user].post(f"/loans/{loan}/return").status_code
        if loan in self.open and user in (0, self.open[loan][0]):
            assert status == 200
            del self.open[loan]
        else:
            assert status in (404, 409)

    @rule(loan=loans)
    def renew(self, loan: int) -> None:
        times = self.renewals.get(loan, 0)
        status = self.staff.post(f"/loans/{loan}/renew").status_code
        if loan in self.open and times < 2:
            assert status == 200
            self.renewals[loan] = times + 1
        else:
            assert status in (404, 409)

    @rule(book=books, delete=st.sampled_from([True, False, False]))
    def delete_book(self, book: int, delete: bool) -> None:
        if book in self.copies and not self.held(book) and not delete:
            return  # otherwise there would rarely be one to borrow
        expected = 404 if book not in self.copies else 409 if self.held(book) else 204
        assert self.staff.delete(f"/books/{book}").status_code == expected
        if expected == 204:
            del self.copies[book]

    @invariant()
    def counts_are_equal(self) -> None:
        for book, copies, available, held in self.figures():
            assert 0 <= available <= copies
            assert copies - available == held == self.held(book)
            assert copies == self.copies[book]


def test_no_sequence_of_operations_loses_a_copy(tmp_path: Path) -> None:
    with service(tmp_path / "books.db") as admin:
        LendingModel.people = [admin, make(admin.client, "Rita"), make(admin.client, "Oskar")]
        options = settings(max_examples=40, stateful_step_count=40, deadline=None)
        run_state_machine_as_test(LendingModel, settings=options)
