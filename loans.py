"""The lending desk: how many copies of a book there are, who has them, and until when.

A copy is taken and brought back by one conditional UPDATE of its book, so that of two who want the last one, one gets
it. At all times a book's `copies - available` is what its open loans hold.
"""

from datetime import datetime, timedelta
from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import HTTPException, Path, Query, Request, Response
from pydantic import Field, TypeAdapter
from sqlalchemy import ColumnElement, Connection
from sqlmodel import Session, col

import database
import events
import models
from api import FOLLOWED_PAGE, Router, errors
from books import BookId, no_such_book
from models import MAX_COPIES, MAX_RENEWALS, Book, DomainError, Loan, LoanStatus, Principal, User
from pagination import Order, Page, PageQuery, last_event_id, named, page_answer, read_page
from schemas import Id, LoanCreate, LoanPublic, StockChange, StockPublic
from security import CurrentUser, Staff
from settings import settings

router = Router(tags=["Lending"])

LoanId = Annotated[Id, Path(description="The loan's `id`.")]
LOAN_COLUMNS: dict[str, Any] = {name: getattr(Loan, name) for name in LoanPublic.model_fields if hasattr(Loan, name)}
LOAN_COLUMNS |= {"username": col(User.username), "title": col(Book.title)}
SELECT_LOANS = (
    sa.select(*LOAN_COLUMNS.values())
    .select_from(Loan)
    .join(User, col(Loan.user_id) == col(User.id))
    .join(Book, col(Loan.book_id) == col(Book.id))
)
LOANS, LOAN_PAGE = Order("-id", (col(Loan.id),)), TypeAdapter(Page[LoanPublic])
IS_OPEN = col(Loan.returned_at).is_(None)
as_loan = named(LOAN_COLUMNS)

# --- stock --------------------------------------------------------------------------------------------------------

ON_LOAN = (col(Book.copies) - col(Book.available)).label("on_loan")
STOCK = (col(Book.copies), col(Book.available), ON_LOAN)
STOCK_EVENT = (col(Book.id), col(Book.title), *STOCK, col(Book.version))


@router.get("/books/{book_id:id}/stock")
async def read_stock(book_id: BookId) -> StockPublic:
    """How many copies there are, and how many of them are here or on loan."""
    stock = await database.read(_find_stock, book_id)
    if stock is None:
        raise no_such_book()
    return stock


def _find_stock(connection: Connection, book_id: int) -> StockPublic | None:
    row = connection.execute(sa.select(*STOCK).where(col(Book.id) == book_id)).first()
    return None if row is None else StockPublic.model_validate(row._asdict())


@router.post("/books/{book_id:id}/stock", responses=errors(403, 409))
async def change_stock(book_id: BookId, change: StockChange, user: Staff) -> StockPublic:
    """Add copies, or with a negative `quantity` remove some. Those on loan can't be removed: 409."""
    return await database.write(_change_stock, book_id, change.quantity)


def _change_stock(session: Session, book_id: int, quantity: int) -> StockPublic:
    if not move_stock(session, book_id, copies=quantity, available=quantity):
        stock = _stock_now(session, book_id)
        if quantity > 0:
            raise DomainError("quantity", f"would make more than {MAX_COPIES} copies")
        raise HTTPException(409, f"{stock.on_loan} of {stock.copies} copies are on loan: they can't be removed.")
    return _stock_now(session, book_id)


def _stock_now(session: Session, book_id: int) -> StockPublic:
    stock = _find_stock(session.connection(), book_id)
    if stock is None:
        raise no_such_book()
    return stock


def move_stock(session: Session, book_id: int, *, copies: int = 0, available: int) -> bool:
    """Change how many copies there are and are here, and tell of it, if that leaves none missing or too many."""
    fits = (col(Book.available) + available >= 0, col(Book.copies) + copies <= MAX_COPIES)
    figures = {"copies": col(Book.copies) + copies, "available": col(Book.available) + available}
    moved = session.execute(
        sa.update(Book)
        .where(col(Book.id) == book_id, *fits)
        .values(**figures, version=col(Book.version) + 1, updated_at=models.utcnow())
        .returning(*STOCK_EVENT),
        execution_options={"synchronize_session": False},
    ).first()
    if moved is not None:
        events.record(session, "book.stock", moved._asdict())
    return moved is not None


# --- loans --------------------------------------------------------------------------------------------------------


@router.post("/loans", status_code=201, responses=errors(403, 404, 409, sends={201: "Location"}))
async def borrow(new: LoanCreate, user: CurrentUser, response: Response) -> LoanPublic:
    """Borrow copies of a book. 409 where too few are here. Staff may lend to somebody else, by `user_id`."""
    loan = await database.write(_borrow, new, user)
    response.headers["Location"] = f"/loans/{loan.id}"
    return loan


def _borrow(session: Session, new: LoanCreate, user: Principal) -> LoanPublic:
    borrower_id = _borrower(session, new, user)
    now = models.utcnow()
    loan = Loan(
        user_id=borrower_id,
        book_id=new.book_id,
        quantity=new.quantity,
        borrowed_at=now,
        due_at=_due(new.due_at, now),
    )
    if not move_stock(session, new.book_id, available=-new.quantity):
        stock = _stock_now(session, new.book_id)
        raise HTTPException(409, f"Too few are available: {stock.available} of {stock.copies} copies.")
    session.add(loan)
    return record_loan(session, "loan.created", loan)


def _borrower(session: Session, new: LoanCreate, user: Principal) -> int:
    """Who borrows; until the transaction ends, their account can't be deleted."""
    borrower_id = new.user_id or user.id
    if borrower_id != user.id and not user.is_staff:
        raise HTTPException(403, "Only librarians and admins lend to others.")
    theirs = sa.select(col(User.is_active)).where(col(User.id) == borrower_id)
    is_active = session.scalars(theirs.with_for_update(read=True, key_share=True)).first()
    if is_active is None:
        raise HTTPException(404, "No such user.")
    if not is_active:
        raise HTTPException(409, "This account is switched off.")
    return borrower_id


def _due(wanted: datetime | None, now: datetime) -> datetime:
    span = timedelta(days=settings.loan_days)
    if wanted is None:
        return now + span
    if not now < wanted <= now + 2 * span:
        raise DomainError("due_at", f"must be in the future, and at most {2 * settings.loan_days} days from now")
    return wanted


def record_loan(session: Session, event_type: str, loan: Loan) -> LoanPublic:
    session.flush()
    shown = LoanPublic.model_validate(as_loan(session.execute(SELECT_LOANS.where(col(Loan.id) == loan.id)).one()))
    events.record(session, event_type, shown.model_dump(mode="json"), owner=shown.user_id)
    return shown


class LoanQuery(PageQuery):
    status: LoanStatus | None = Field(
        default=None, description="`active`: open and not yet due; `overdue`: open and past its day; `returned`."
    )
    user_id: Id | None = Field(default=None, description="Only this borrower's; for staff.")

    def conditions(self) -> list[ColumnElement[bool]]:
        is_late = col(Loan.due_at) < models.utcnow()
        by_status: dict[LoanStatus | None, list[ColumnElement[bool]]] = {
            None: [],
            LoanStatus.active: [IS_OPEN, sa.not_(is_late)],
            LoanStatus.overdue: [IS_OPEN, is_late],
            LoanStatus.returned: [sa.not_(IS_OPEN)],
        }
        of_user = [] if self.user_id is None else [col(Loan.user_id) == self.user_id]
        return by_status[self.status] + of_user


@router.get("/loans", response_model=Page[LoanPublic], responses=errors(403) | FOLLOWED_PAGE)
async def list_loans(query: Annotated[LoanQuery, Query()], user: CurrentUser, request: Request) -> Response:
    """My loans, the newest first; for staff, everybody's.

    `X-Event-Cursor` is the id of the last change that the page contains.
    """
    if query.user_id not in (None, user.id) and not user.is_staff:
        raise HTTPException(403, "Only librarians and admins see the loans of others.")
    how = database.read_in_thread if user.is_staff else database.read  # a desk's whole history takes longer to count
    page, cursor = await how(_find_loans, user, query)
    return page_answer(page, LOAN_PAGE, request, cursor)


def _find_loans(connection: Connection, user: Principal, query: LoanQuery) -> tuple[dict[str, Any], int]:
    found = SELECT_LOANS.where(_visible(user), *query.conditions())
    return read_page(connection, found, LOANS, query, as_loan), last_event_id(connection)


def _visible(user: Principal) -> ColumnElement[bool]:
    return sa.true() if user.is_staff else col(Loan.user_id) == user.id


def no_such_loan() -> HTTPException:
    return HTTPException(404, "No such loan.")


@router.get("/loans/{loan_id:id}")
async def read_loan(loan_id: LoanId, user: CurrentUser) -> LoanPublic:
    """One loan."""
    row = await database.read(_find_loan, loan_id, user)
    if row is None:
        raise no_such_loan()
    return LoanPublic.model_validate(as_loan(row))


def _find_loan(connection: Connection, loan_id: int, user: Principal) -> Any:
    return connection.execute(SELECT_LOANS.where(col(Loan.id) == loan_id, _visible(user))).first()


@router.post("/loans/{loan_id:id}/return", responses=errors(409))
async def return_loan(loan_id: LoanId, user: CurrentUser) -> LoanPublic:
    """Bring the copies back. 409 where they are back already."""
    return await database.write(_return, loan_id, user)


def _return(session: Session, loan_id: int, user: Principal) -> LoanPublic:
    loan = _open_loan(session, loan_id, user)
    loan.returned_at = models.utcnow()
    session.flush()
    move_stock(session, loan.book_id, available=loan.quantity)
    return record_loan(session, "loan.returned", loan)


@router.post("/loans/{loan_id:id}/renew", responses=errors(409))
async def renew_loan(loan_id: LoanId, user: CurrentUser) -> LoanPublic:
    """Keep it for `LOAN_DAYS` longer than `due_at`. At most twice, and not when it is overdue: 409."""
    return await database.write(_renew, loan_id, user)


def _renew(session: Session, loan_id: int, user: Principal) -> LoanPublic:
    loan = _open_loan(session, loan_id, user)
    if loan.status == LoanStatus.overdue:
        raise HTTPException(409, "This loan is overdue: it can't be renewed.")
    if loan.renewals == MAX_RENEWALS:
        raise HTTPException(409, f"This loan was renewed {MAX_RENEWALS} times: that is all.")
    loan.renew(settings.loan_days)
    return record_loan(session, "loan.renewed", loan)


def _open_loan(session: Session, loan_id: int, user: Principal) -> Loan:
    """The loan, locked until the transaction ends: of two who return it at once, the second finds it returned."""
    visible = sa.select(Loan).where(col(Loan.id) == loan_id, _visible(user))
    loan = session.scalars(visible.with_for_update()).first()
    if loan is None:
        raise no_such_loan()
    if loan.returned_at is not None:
        raise HTTPException(409, "This loan was returned already.")
    return loan


def refuse_while_borrowing(session: Session, user_id: int) -> None:
    """An account that goes takes its loans with it, and then nobody would know where the copies are."""
    theirs = sa.select(col(Loan.id), col(Book.title)).join_from(Loan, Book, col(Loan.book_id) == col(Book.id))
    rows = session.execute(theirs.where(col(Loan.user_id) == user_id, IS_OPEN).order_by(col(Loan.id)).limit(11)).all()
    if rows:
        named_loans = ", ".join(f"loan {loan_id} ({title})" for loan_id, title in rows[:10])
        raise HTTPException(409, f"Return what is on loan first: {named_loans}{', …' if len(rows) > 10 else ''}.")
