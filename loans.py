"""Stock and `/loans`.

A copy is taken and returned by one conditional UPDATE of its book: of two borrowers, one gets the last copy. A book's
`copies - available` is always what its open loans hold.
"""

from datetime import timedelta
from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import HTTPException, Path, Query, Request, Response
from pydantic import Field
from sqlalchemy import Connection
from sqlmodel import Session, UTCDateTime, col

import database
import events
import models
from api import PAGE, Conflict, Router, errors, idempotent, or_404, readonly, transactional
from books import NO_BOOK, BookId
from models import MAX_COPIES, MAX_RENEWALS, Book, InvalidField, Loan, LoanStatus, Principal, User
from pagination import JsonObject, Listing, Page, PageQuery, json_response, page_response
from schemas import Id, LoanCreate, LoanPublic, StockChange, StockPublic, StockUpdate
from security import CurrentUser, Staff
from settings import settings

router = Router(tags=["Lending"])

LoanId = Annotated[Id, Path(description="The loan's `id`.")]
NO_LOAN = "No such loan."
IS_OPEN = col(Loan.returned_at).is_(None)
IS_OVERDUE = col(Loan.due_at) < sa.bindparam("now", type_=UTCDateTime)
STATUS = sa.case((sa.not_(IS_OPEN), "returned"), (IS_OVERDUE, "overdue"), else_="active")
TITLE = sa.func.coalesce(col(Book.title), col(Loan.title))
LOAN_JSON = JsonObject(Loan, LoanPublic, username=col(User.username), title=TITLE, status=STATUS)
LOANS = Listing(
    sa.select(LOAN_JSON).join_from(Loan, User).outerjoin(Book, col(Loan.book_id) == col(Book.id)),
    filters={
        "id": col(Loan.id) == sa.bindparam("id"),
        "user_id": col(Loan.user_id) == sa.bindparam("user_id"),
        "status": sa.bindparam("status") == STATUS,
    },
    orders={"-id": (col(Loan.id),), "id": (col(Loan.id),)},
)

# --- stock --------------------------------------------------------------------------------------------------------

STOCK = (col(Book.copies), col(Book.available), (col(Book.copies) - col(Book.available)).label("on_loan"))


def get_stock(session: Session | Connection, book_id: int) -> StockPublic:
    row = or_404(session.execute(sa.select(*STOCK).where(col(Book.id) == book_id)).first(), NO_BOOK)
    return StockPublic.model_validate(row._asdict())


@router.get("/books/{book_id:id}/stock", responses=errors(404))
@readonly
def read_stock(connection: Connection, book_id: BookId) -> StockPublic:
    """Read how many copies of a book there are, are available and are on loan."""
    return get_stock(connection, book_id)


@router.post("/books/{book_id:id}/stock", response_model=StockPublic, responses=errors(403, 404, 409))
@transactional
@idempotent
def change_stock(session: Session, book_id: BookId, change: StockChange, user: Staff) -> Response:
    """Add copies of a book, or remove some with a negative `quantity`. Those on loan can't be removed: 409."""
    return json_response(add_copies(session, book_id, change.quantity).model_dump_json())


@router.put("/books/{book_id:id}/stock", responses=errors(403, 404, 409))
@transactional
def set_stock(session: Session, book_id: BookId, new: StockUpdate, user: Staff) -> StockPublic:
    """Set how many copies of a book there are. Not fewer than are on loan: 409."""
    return add_copies(session, book_id, new.copies - get_stock(session, book_id).copies)


def add_copies(session: Session, book_id: int, quantity: int) -> StockPublic:
    stock = get_stock(session, book_id)
    if stock.copies + quantity > MAX_COPIES:
        raise InvalidField("quantity", f"would make more than {MAX_COPIES} copies")
    if quantity and not move_stock(session, book_id, copies=quantity, available=quantity):
        raise Conflict("on_loan", f"{stock.on_loan} of {stock.copies} are on loan: {stock.available} can be removed.")
    return get_stock(session, book_id)


def move_stock(session: Session, book_id: int, *, copies: int = 0, available: int) -> bool:
    """Change both counts and record an event. False, and nothing changed, where too few are available."""
    figures = {"copies": col(Book.copies) + copies, "available": col(Book.available) + available, "had_copies": True}
    moved = session.execute(
        sa.update(Book)
        .where(col(Book.id) == book_id, col(Book.available) + available >= 0)
        .values(**figures, version=col(Book.version) + 1, updated_at=models.utcnow())
        .returning(col(Book.id), col(Book.title), *STOCK, col(Book.version)),
        execution_options={"synchronize_session": False},
    ).first()
    if moved is not None:
        events.record(session, "book.stock", moved._asdict())
    return moved is not None


# --- loans --------------------------------------------------------------------------------------------------------


@router.post(
    "/loans", status_code=201, response_model=LoanPublic, responses=errors(403, 404, 409, sends={201: "Location"})
)
@transactional
@idempotent
def borrow(session: Session, new: LoanCreate, user: CurrentUser) -> Response:
    """Borrow copies of a book. 409 when too few are available. Staff may lend to somebody else, by `user_id`."""
    now, days = models.utcnow(), timedelta(days=settings.loan_days)
    if new.due_at is not None and not now < new.due_at <= now + 2 * days:
        raise InvalidField("due_at", f"must be in the future, and at most {2 * settings.loan_days} days from now")
    borrower_id = new.user_id or user.id
    if borrower_id != user.id and not user.is_staff:
        raise HTTPException(403, "Only librarians and admins lend to others.")
    if not or_404(session.get(User, borrower_id), "No such user.").is_active:
        raise Conflict("account_deactivated", "This account is deactivated.")
    loan = Loan(
        user_id=borrower_id,
        book_id=new.book_id,
        quantity=new.quantity,
        borrowed_at=now,
        due_at=new.due_at or now + days,
    )
    if not move_stock(session, new.book_id, available=-new.quantity):
        stock = get_stock(session, new.book_id)
        raise Conflict("no_copies_left", f"Too few are available: {stock.available} of {stock.copies} copies.")
    session.add(loan)
    public = record_loan(session, "loan.created", loan)
    return json_response(public.model_dump_json(), 201, {"Location": f"/loans/{loan.id}"})


def record_loan(session: Session, event_type: str, loan: Loan) -> LoanPublic:
    session.flush()
    public = LoanPublic.model_validate_json(LOANS.first(session, {"id": loan.id, "now": models.utcnow()}) or "")
    events.record(session, event_type, public.model_dump(mode="json"), owner=public.user_id)
    return public


class LoanQuery(PageQuery):
    status: LoanStatus | None = Field(
        default=None, description="`active`: open and not yet due; `overdue`: open and past `due_at`; `returned`."
    )
    user_id: Id | None = Field(default=None, description="Only this borrower's; for staff.")


def visible_to(user: Principal) -> dict[str, Any]:
    return {"now": models.utcnow()} | ({} if user.is_staff else {"user_id": user.id})


@router.get("/loans", response_model=Page[LoanPublic], responses=errors(403) | PAGE)
async def list_loans(query: Annotated[LoanQuery, Query()], user: CurrentUser, request: Request) -> Response:
    """List my loans, newest first; for staff, everybody's.

    `X-Event-Cursor` is the id of the last event that the page includes.
    """
    if query.user_id not in (None, user.id) and not user.is_staff:
        raise HTTPException(403, "Only librarians and admins see the loans of others.")
    filters = visible_to(user) | query.model_dump(include={"user_id", "status"}, exclude_none=True)
    return page_response(request, await database.read(LOANS.page, filters, "-id", query))


@router.get("/loans/{loan_id:id}", response_model=LoanPublic, responses=errors(404))
@readonly
def read_loan(connection: Connection, loan_id: LoanId, user: CurrentUser) -> Response:
    """Read a loan."""
    return json_response(or_404(LOANS.first(connection, visible_to(user) | {"id": loan_id}), NO_LOAN))


@router.post("/loans/{loan_id:id}/return", responses=errors(404, 409))
@transactional
def return_loan(session: Session, loan_id: LoanId, user: CurrentUser) -> LoanPublic:
    """Return a loan. 409 if it was returned already."""
    loan = get_open_loan(session, loan_id, user)
    loan.returned_at = models.utcnow()
    assert loan.book_id is not None  # a book on loan can't be deleted
    move_stock(session, loan.book_id, available=loan.quantity)
    return record_loan(session, "loan.returned", loan)


@router.post("/loans/{loan_id:id}/renew", responses=errors(404, 409))
@transactional
def renew_loan(session: Session, loan_id: LoanId, user: CurrentUser) -> LoanPublic:
    """Renew a loan: `LOAN_DAYS` from its `due_at`. At most twice, and not when overdue: 409."""
    loan = get_open_loan(session, loan_id, user)
    if loan.due_at < models.utcnow():
        raise Conflict("loan_overdue", "This loan is overdue: it can't be renewed.")
    if loan.renewals == MAX_RENEWALS:
        raise Conflict("renewed_too_often", f"This loan was renewed {MAX_RENEWALS} times, the maximum.")
    # From `due_at`, not from now: an early renewal loses no days.
    loan.due_at += timedelta(days=settings.loan_days)
    loan.renewals += 1
    return record_loan(session, "loan.renewed", loan)


def get_open_loan(session: Session, loan_id: int, user: Principal) -> Loan:
    loan = or_404(session.get(Loan, loan_id), NO_LOAN)
    if not (user.is_staff or loan.user_id == user.id):
        raise HTTPException(404, NO_LOAN)
    if loan.returned_at is not None:
        raise Conflict("already_returned", "This loan was returned already.")
    return loan


def refuse_while_borrowing(session: Session, user_id: int) -> None:
    """409 that names the open loans: deleting the account would lose track of the copies."""
    open_loans = sa.select(col(Loan.id), col(Book.title)).join_from(Loan, Book).order_by(col(Loan.id)).limit(11)
    rows = session.execute(open_loans.where(col(Loan.user_id) == user_id, IS_OPEN)).all()
    if rows:
        names = ", ".join(f"loan {loan_id} ({title})" for loan_id, title in rows[:10])
        raise Conflict("has_open_loans", f"Return what is on loan first: {names}{', …' if len(rows) > 10 else ''}.")
