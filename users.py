"""The accounts themselves: my profile, all that is stored of me, and administration."""

from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Annotated, Any, NamedTuple

import sqlalchemy as sa
from fastapi import BackgroundTasks, HTTPException, Path, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field, TypeAdapter
from sqlalchemy import ColumnElement, Connection
from sqlmodel import Session, col

import database
import events
import library
import loans
import mail
import models
import security
from api import PAGE, Router, errors
from auth import change_address, create_account, end_sessions, find_user, read_account, still_me, with_password
from books import SELECT_BOOKS, as_book, disown_books
from events import record_account_event
from mail import Email
from models import Book, Event, Loan, LoginSession, Principal, Role, ShelfEntry, Upload, UploadError, User
from pagination import Order, Page, PageQuery, named, page_answer, read_page
from schemas import (
    AccountCreate,
    AccountUpdate,
    BlankIsNull,
    BookPublic,
    EntryPublic,
    EventPublic,
    Id,
    LoanPublic,
    Name,
    RequestModel,
    SessionPublic,
    Storable,
    UploadErrorPublic,
    UploadPublic,
    UserPublic,
    UserUpdate,
)
from security import Admin, CurrentUser, check_still_authorized
from settings import settings

router = Router(prefix="/users", tags=["Users"])

# --- my profile ---------------------------------------------------------------------------------------------------


@router.get("/me")
async def read_me(user: CurrentUser) -> UserPublic:
    """My account."""
    return UserPublic.model_validate(await read_account(user))


@router.patch("/me", responses=errors(409, 429))
async def update_me(change: UserUpdate, user: CurrentUser, request: Request, tasks: BackgroundTasks) -> UserPublic:
    """Change my name or e-mail address (RFC 7396). Role, user name and state are not mine to change.

    A new address must be confirmed by the link that is mailed there; the old one is told.
    """
    if "email" in change.model_fields_set:
        await security.check_rate_limit("verify", request, user.id)
    return await _update(user.id, change, user, tasks)


async def _update(user_id: int, change: UserUpdate, by: Principal, tasks: BackgroundTasks) -> UserPublic:
    user, letters = await database.write(_change_account, user_id, change, by)
    for letter in letters:
        tasks.add_task(mail.send, letter)
    return user


def _change_account(
    session: Session, user_id: int, change: UserUpdate, by: Principal
) -> tuple[UserPublic, list[Email]]:
    admins = _lock_admins(session)
    check_still_authorized(session, by)  # now that nobody else changes admins
    user = session.get(User, user_id, with_for_update=True)
    if user is None:
        raise no_such_user()
    role, was_active, was_admin = user.role, user.is_active, _is_admin(user)
    changed = change.model_dump(exclude_unset=True)
    new_email = changed.pop("email", user.email)
    for name, value in changed.items():
        setattr(user, name, value)
    if was_admin and not _is_admin(user):
        _keep_an_admin(admins, user_id)
    letters = change_address(session, user, new_email, by.id) if new_email != user.email else []
    if user.role != role:
        record_account_event(session, user_id, "role_changed", old=role, new=user.role, by=by.id)
    if user.is_active != was_active:
        end_sessions(session, user_id, sa.true())  # so that they stay dead when it is switched on again
        record_account_event(session, user_id, "switched_on" if user.is_active else "switched_off", by=by.id)
    return UserPublic.model_validate(user), letters


def _lock_admins(session: Session) -> set[int]:
    """The active admins, locked in one order until the transaction ends: of two who go at once, one stays."""
    admins = sa.select(col(User.id)).where(col(User.role) == Role.admin, col(User.is_active))
    if settings.require_verified_email:  # the others can't sign in
        admins = admins.where(col(User.email_verified_at).is_not(None))
    return set(session.scalars(admins.order_by(col(User.id)).with_for_update()))


def _is_admin(user: User) -> bool:
    return user.role == Role.admin and user.is_active


def _keep_an_admin(admins: set[int], leaving: int) -> None:
    if not admins - {leaving}:
        raise HTTPException(409, "This is the last active admin: make another one first.")


class MyPassword(RequestModel):
    password: Annotated[str, Field(max_length=1000), Storable]


@router.delete("/me", status_code=204, responses=errors(403, 409, 429))
async def delete_me(given: MyPassword, user: CurrentUser, request: Request, tasks: BackgroundTasks) -> None:
    """Delete my account, with my shelf, reviews, uploads and past loans. The books that I added stay.

    Needs my password. 409 while I have books on loan: it names them.
    """
    me = await with_password(user, given.password, request)
    tasks.add_task(mail.send, await database.write(_delete_my_account, user, me.password_hash))


def _delete_my_account(session: Session, user: Principal, verified_hash: str) -> Email:
    still_me(session, user, verified_hash)
    return _delete_account(session, user.id, user)


def _delete_account(session: Session, user_id: int, by: Principal) -> Email:
    admins = _lock_admins(session)
    check_still_authorized(session, by)  # now that nobody else changes admins
    user = session.get(User, user_id, with_for_update=True)
    if user is None:
        raise no_such_user()
    if _is_admin(user):
        _keep_an_admin(admins, user_id)
    loans.refuse_while_borrowing(session, user_id)
    library.withdraw_reviews(session, user)
    disown_books(session, user_id)
    events.anonymize_reviewer(session, user.username)
    session.delete(user)
    session.flush()
    # What was logged of the account is gone with it; that it is gone, admins can still read.
    told = {"user_id": user_id, "username": user.username, "by": by.id}
    events.record(session, "account.deleted", told, private=True)
    return mail.account_deleted(user.email, user.username)


# --- all that is stored of me -------------------------------------------------------------------------------------


class UploadProblem(UploadErrorPublic):
    upload_id: int


class AccountExport(BaseModel):
    exported_at: datetime
    account: UserPublic
    sessions: list[SessionPublic]
    shelf: list[EntryPublic]
    loans: list[LoanPublic]
    books_added: list[BookPublic]
    uploads: list[UploadPublic]
    upload_errors: list[UploadProblem]
    events: list[EventPublic] = Field(description="What the change log keeps: my private ones, and of my reviews.")


class Part(NamedTuple):
    """A list of the export: what it selects, by which id it is read on, and how an item is made of a row."""

    shape: type[BaseModel]
    select: sa.Select[Any]
    id: Any
    item: Callable[[Any], dict[str, Any]]


@router.get("/me/export", response_model=AccountExport)
async def export_me(user: CurrentUser) -> StreamingResponse:
    """All that is stored about me, as one JSON file. The password is not in it: only its hash is stored."""
    account = UserPublic.model_validate(await read_account(user))
    headers = {"Content-Disposition": f'attachment; filename="books-api-{user.username}.json"'}
    return StreamingResponse(_export(user, account), media_type="application/json", headers=headers)


def _export(user: Principal, account: UserPublic) -> Iterator[str]:
    """A piece at a time: somebody's uploads may have explained a million rows."""
    yield f'{{"exported_at": "{models.isoformat(models.utcnow())}",\n"account": {account.model_dump_json()}'
    for name, part in _parts(user).items():
        yield f',\n"{name}": ['
        last, separator = 0, "\n"
        while rows := database.read_sync(_next_rows, part, last):
            last = rows[-1][-1]
            items = [part.shape.model_validate(part.item(row)).model_dump_json() for row in rows]
            yield separator + ",\n".join(items)
            separator = ",\n"
        yield "]"
    yield "}\n"


def _next_rows(connection: Connection, part: Part, last: int) -> Sequence[Any]:
    page = part.select.add_columns(part.id).where(part.id > last).order_by(part.id).limit(500)
    return connection.execute(page).all()


def _parts(user: Principal) -> dict[str, Part]:
    current = (col(LoginSession.id) == user.session_id).label("current")
    said = sa.and_(col(Event.type).startswith("review."), Event.data["username"].as_string() == user.username)
    return {
        "sessions": _part(SessionPublic, LoginSession, col(LoginSession.user_id) == user.id, current=current),
        "shelf": Part(
            EntryPublic,
            library.SELECT_ENTRIES.where(col(ShelfEntry.user_id) == user.id),
            col(ShelfEntry.id),
            library.as_entry,
        ),
        "loans": Part(LoanPublic, loans.SELECT_LOANS.where(col(Loan.user_id) == user.id), col(Loan.id), loans.as_loan),
        "books_added": Part(BookPublic, SELECT_BOOKS.where(col(Book.added_by) == user.id), col(Book.id), as_book),
        "uploads": _part(UploadPublic, Upload, col(Upload.user_id) == user.id),
        "upload_errors": _part(
            UploadProblem,
            UploadError,
            col(UploadError.upload_id).in_(sa.select(col(Upload.id)).where(col(Upload.user_id) == user.id)),
        ),
        "events": _part(EventPublic, Event, sa.or_(col(Event.user_id) == user.id, said)),
    }


def _part(shape: type[BaseModel], table: Any, mine: ColumnElement[bool], **more: ColumnElement[Any]) -> Part:
    columns = {name: getattr(table, name) for name in shape.model_fields if name not in more} | more
    return Part(shape, sa.select(*columns.values()).where(mine), col(table.id), named(columns))


# --- administration -----------------------------------------------------------------------------------------------

UserId = Annotated[Id, Path(description="The user's `id`.")]
USERS, USER_PAGE = Order("id", (col(User.id),)), TypeAdapter(Page[UserPublic])
SELECT_USERS = sa.select(*[col(getattr(User, name)) for name in UserPublic.model_fields])


class UserQuery(PageQuery):
    search: Annotated[Name | None, BlankIsNull] = Field(
        default=None, description="Part of the user name, e-mail address or full name."
    )
    role: Role | None = None
    is_active: bool | None = None


def no_such_user() -> HTTPException:
    return HTTPException(404, "No such user.")


@router.get("", response_model=Page[UserPublic], responses=errors(403) | PAGE)
async def list_users(query: Annotated[UserQuery, Query()], admin: Admin, request: Request) -> Response:
    """Everybody who has an account."""
    return page_answer(await database.read_in_thread(_find_users, query), USER_PAGE, request)


def _find_users(connection: Connection, query: UserQuery) -> dict[str, Any]:
    found = SELECT_USERS
    if query.search is not None:
        texts = (User.username, User.email, User.full_name)
        part = query.search
        # SQLite's lower() knows ASCII only: other letters are looked for as they may be written.
        spelled = {part.lower(), part.upper(), part.title(), part}
        like = [sa.func.lower(col(text)).contains(part.lower(), autoescape=True) for text in texts]
        like += [col(text).contains(one, autoescape=True) for text in texts for one in spelled]
        found = found.where(sa.or_(*like))
    if query.role is not None:
        found = found.where(col(User.role) == query.role)
    if query.is_active is not None:
        found = found.where(col(User.is_active) == query.is_active)
    return read_page(connection, found, USERS, query, named(UserPublic.model_fields))


@router.post("", status_code=201, responses=errors(403, 409, sends={201: "Location"}))
async def create_user(new: AccountCreate, admin: Admin, response: Response, tasks: BackgroundTasks) -> UserPublic:
    """Make an account with any role. Its owner gets a link that confirms the address, and the password from you."""
    user = await create_account(new, new.role, tasks, by=admin)
    response.headers["Location"] = f"/users/{user.id}"
    return user


@router.get("/{user_id:id}", responses=errors(403))
async def read_user(user_id: UserId, admin: Admin) -> UserPublic:
    """One account."""
    user = await database.read(find_user, user_id)
    if user is None:
        raise no_such_user()
    return UserPublic.model_validate(user)


@router.patch("/{user_id:id}", responses=errors(403, 409))
async def update_user(user_id: UserId, change: AccountUpdate, admin: Admin, tasks: BackgroundTasks) -> UserPublic:
    """Change an account's role, address or name, or switch it off and on (RFC 7396).

    An account that is switched off is signed out everywhere at once. The last active admin stays one: 409.
    """
    return await _update(user_id, change, admin, tasks)


@router.delete("/{user_id:id}", status_code=204, responses=errors(403, 409))
async def delete_user(user_id: UserId, admin: Admin, tasks: BackgroundTasks) -> None:
    """Delete an account, with its shelf, reviews, uploads and past loans. The books that it added stay.

    409 while it has books on loan: return them for it first.
    """
    tasks.add_task(mail.send, await database.write(_delete_account, user_id, admin))
