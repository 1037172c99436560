"""`/users`: my account, all that is stored about me, and administration."""

import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Annotated, Any

import anyio.to_thread
import sqlalchemy as sa
from fastapi import BackgroundTasks, HTTPException, Path, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field
from sqlalchemy import ColumnElement, Connection
from sqlmodel import Session, col

import accounts
import database
import events
import library
import loans
import models
import schemas
from api import PAGE, Conflict, Router, errors, or_404, readonly, transactional, transactional_in_thread
from auth import ENDS_SESSION, SESSIONS, end_sessions
from books import BOOKS, disown_books
from events import record_account_event
from models import Event, Loan, LoginSession, Principal, Role, StoredAnswer, Upload, UploadChunk, UploadError, User
from pagination import JsonObject, Listing, Page, PageQuery, json_response, page_response
from schemas import AccountCreate, AccountUpdate, EventPublic, Id, Name, RequestModel, UserPublic, UserUpdate
from security import Admin, CurrentUser, authorized, check_rate_limit
from settings import settings

router = Router(prefix="/users", tags=["Users"])

# --- my account ---------------------------------------------------------------------------------------------------


@router.get("/me")
async def read_me(user: CurrentUser) -> UserPublic:
    """Read my account."""
    return UserPublic.model_validate(await accounts.read_account(user))


@router.patch("/me", responses=errors(403, 409, 429))
async def update_me(change: UserUpdate, user: CurrentUser, request: Request, tasks: BackgroundTasks) -> UserPublic:
    """Change my name or e-mail address (RFC 7396).

    A new address needs `current_password`. It is kept as `pending_email` and takes effect when it is confirmed by the
    link that is mailed there; the old address is informed at once. The present address cancels the change, and so does
    a new password.
    """
    me = await accounts.read_account(user)
    changes_address = "email" in change.model_fields_set and change.email != me.email
    if changes_address:
        if change.current_password is None:
            raise HTTPException(403, "A new e-mail address needs your password, as `current_password`.")
        await check_rate_limit("verify", request, user.id)
        await accounts.confirm_password(user, change.current_password, request)
    return await database.write(change_me, user, change, changes_address, tasks)


@authorized
def change_me(
    session: Session, user: Principal, change: UserUpdate, changes_address: bool, tasks: BackgroundTasks
) -> UserPublic:
    me = session.get_one(User, user.id)
    if "full_name" in change.model_fields_set:
        me.full_name = change.full_name
    if "email" in change.model_fields_set:
        accounts.cancel_address_change(session, me)
    if changes_address:
        with session.begin_nested() as attempt:  # 409 if it is taken; the constraint decides again when it is confirmed
            session.execute(sa.update(User).where(col(User.id) == me.id).values(email=change.email))
            attempt.rollback()
        me.pending_email = change.email
        record_account_event(session, me.id, "email_change_requested", old=me.email, new=change.email, by=me.id)
        email = accounts.compose("address_change_requested", me.email, username=me.username, new=change.email)
        tasks.add_task(accounts.send, email)
        tasks.add_task(accounts.send, accounts.confirmation_email(session, me, change.email))
    return UserPublic.model_validate(me)


class MyPassword(RequestModel):
    password: Annotated[str, Field(max_length=1000), schemas.Storable] = Field(examples=["a long way to Arrakis"])


@router.delete("/me", status_code=204, dependencies=ENDS_SESSION, responses=errors(403, 409, 429))
async def delete_me(body: MyPassword, user: CurrentUser, request: Request, tasks: BackgroundTasks) -> None:
    """Delete my account, with my shelf, reviews, uploads and past loans. The books that I added stay.

    Needs my password. 409 while I have books on loan: it names them. Of a large account, a part of the shelf and of the
    reviews, without my name, is deleted in the seconds after the answer.
    """
    await accounts.confirm_password(user, body.password, request)
    email = await anyio.to_thread.run_sync(database.write_sync, authorized(delete_account), user.id, user)
    tasks.add_task(accounts.send, email)


# --- all that is stored about me ----------------------------------------------------------------------------------


class UploadProblem(schemas.UploadErrorPublic):
    upload_id: int


class AccountExport(BaseModel):
    exported_at: datetime
    account: UserPublic
    sessions: list[schemas.SessionPublic]
    shelf: list[schemas.EntryPublic]
    loans: list[schemas.LoanPublic]
    books_added: list[schemas.BookPublic]
    uploads: list[schemas.UploadPublic]
    upload_errors: list[UploadProblem]
    events: list[EventPublic] = Field(description="From the change log: my private events, and those of my reviews.")


def _mine(shape: type[BaseModel], table: Any, condition: ColumnElement[bool]) -> Listing:
    columns = JsonObject(table, shape)
    return Listing(sa.select(columns), filters={"user_id": condition}, orders={"id": (col(table.id),)})


USER_ID: Any = sa.bindparam("user_id")
MY_UPLOADS = sa.select(col(Upload.id)).where(col(Upload.user_id) == USER_ID)
PARTS: dict[str, tuple[Listing, str]] = {
    "sessions": (SESSIONS, "id"),
    "shelf": (library.ENTRIES, "added"),
    "loans": (loans.LOANS, "id"),
    "books_added": (BOOKS, "id"),
    "uploads": (_mine(schemas.UploadPublic, Upload, col(Upload.user_id) == USER_ID), "id"),
    "upload_errors": (_mine(UploadProblem, UploadError, col(UploadError.upload_id).in_(MY_UPLOADS)), "id"),
    "events": (_mine(EventPublic, Event, col(Event.user_id) == USER_ID), "id"),
}


@router.get("/me/export", response_model=AccountExport)
async def export_me(user: CurrentUser) -> StreamingResponse:
    """Download all that is stored about me, as one JSON file. Of the password only a hash is stored: it is left out."""
    account = UserPublic.model_validate(await accounts.read_account(user))
    headers = {"Content-Disposition": f'attachment; filename="books-api-{user.username}.json"'}
    return StreamingResponse(export_account(user, account), media_type="application/json", headers=headers)


def export_account(user: Principal, account: UserPublic) -> Iterator[str]:
    """In batches: the errors of my uploads may be a million rows."""
    now = models.utcnow()
    yield f'{{"exported_at": "{now:%Y-%m-%dT%H:%M:%SZ}",\n"account": {account.model_dump_json()}'
    values = {"user_id": user.id, "added_by": user.id, "session_id": user.session_id, "now": now}
    for name, (listing, order) in PARTS.items():
        yield f',\n"{name}": ['
        separator = "\n"
        for items in listing.batches(values, order):
            yield separator + ",\n".join(items) if items else ""
            separator = ",\n"
        yield "]"
    yield "}\n"


# --- administration -----------------------------------------------------------------------------------------------

UserId = Annotated[Id, Path(description="The user's `id`.")]
NO_USER = "No such user."
EXISTS = col(User.email).contains("@")  # not so what is left of a deleted account; see `delete_account`
SEARCHED = col(User.username) + "\n" + col(User.email) + "\n" + sa.func.coalesce(col(User.full_name), "")
USERS = Listing(
    sa.select(JsonObject(User, UserPublic)),
    filters={
        "exists": EXISTS,
        "id": col(User.id) == sa.bindparam("id"),
        "search": SEARCHED.icontains(sa.bindparam("search", type_=sa.String), escape="/"),
        "role": col(User.role) == sa.bindparam("role"),
        "is_active": col(User.is_active) == sa.bindparam("is_active", type_=sa.Boolean),
    },
    orders={"id": (col(User.id),)},
)


class UserQuery(PageQuery):
    search: Annotated[Name | None, schemas.BlankIsNull] = Field(
        default=None, description="Part of the user name, e-mail address or full name."
    )
    role: Role | None = None
    is_active: bool | None = None


@router.get("", response_model=Page[UserPublic], responses=errors(403) | PAGE)
async def list_users(query: Annotated[UserQuery, Query()], admin: Admin, request: Request) -> Response:
    """List or search all accounts."""
    filters = {"exists": True, **query.model_dump(include={"role", "is_active"}, exclude_none=True)}
    if query.search is not None:
        filters["search"] = re.sub("([%_/])", r"/\1", query.search)
    return page_response(request, await database.read(USERS.page, filters, "id", query))


@router.post("", status_code=201, responses=errors(403, 409, sends={201: "Location"}))
async def create_user(new: AccountCreate, admin: Admin, response: Response, tasks: BackgroundTasks) -> UserPublic:
    """Make an account with any role. Its owner gets a link that confirms the address, and the password from you."""
    user = await accounts.create_account(new, new.role, tasks, by=admin)
    response.headers["Location"] = f"/users/{user.id}"
    return user


@router.get("/{user_id:id}", response_model=UserPublic, responses=errors(403, 404))
@readonly
def read_user(connection: Connection, user_id: UserId, admin: Admin) -> Response:
    """Read an account."""
    return json_response(or_404(USERS.first(connection, {"exists": True, "id": user_id}), NO_USER))


@router.patch("/{user_id:id}", responses=errors(403, 404, 409))
@transactional
def update_user(
    session: Session, user_id: UserId, change: AccountUpdate, admin: Admin, tasks: BackgroundTasks
) -> UserPublic:
    """Change an account's role, address or name, or deactivate and reactivate it (RFC 7396).

    Deactivating ends all sessions at once, and cancels every mailed link and code. The last active admin stays one, and
    with `REQUIRE_VERIFIED_EMAIL` keeps the confirmed address: 409.
    """
    user = get_user(session, user_id)
    role, was_active, was_admin, old_email = user.role, user.is_active, is_active_admin(user), user.email
    fields = change.model_dump(exclude_unset=True)
    new_email = fields.pop("email", old_email)
    user.sqlmodel_update(fields)
    if was_active and not user.is_active:  # before a new address gets its link
        end_sessions(session, user_id, sa.true())  # also for when it is reactivated
        accounts.cancel_all_mailed(session, user)
    if new_email != old_email:  # at once, unconfirmed
        user.email, user.email_verified_at = new_email, None
        accounts.cancel_all_mailed(session, user)
        record_account_event(session, user_id, "email_changed", old=old_email, new=new_email, by=admin.id)
        email = accounts.compose("address_changed", old_email, username=user.username, new=new_email)
        tasks.add_task(accounts.send, email)
        tasks.add_task(accounts.send, accounts.confirmation_email(session, user, new_email))
    if was_admin and (new_email != old_email or not is_active_admin(user)):
        require_an_admin(session)
    if user.role != role:
        record_account_event(session, user_id, "role_changed", old=role, new=user.role, by=admin.id)
    if user.is_active != was_active:
        record_account_event(session, user_id, "switched_on" if user.is_active else "switched_off", by=admin.id)
    return UserPublic.model_validate(user)


def get_user(session: Session, user_id: int) -> User:
    return or_404(session.scalars(sa.select(User).where(col(User.id) == user_id, EXISTS)).first(), NO_USER)


def is_active_admin(user: User) -> bool:
    return user.role == Role.admin and user.is_active


def require_an_admin(session: Session) -> None:
    """409 if the transaction has left no admin who can sign in."""
    admins = sa.select(col(User.id)).where(col(User.role) == Role.admin, col(User.is_active))
    if settings.require_verified_email:
        admins = admins.where(col(User.email_verified_at).is_not(None))
    if session.execute(admins.limit(1)).first() is None:
        raise Conflict("last_admin", "This is the last active admin: make another one first.")


@router.delete("/{user_id:id}", status_code=204, responses=errors(403, 404, 409))
@transactional_in_thread
def delete_user(session: Session, user_id: UserId, admin: Admin, tasks: BackgroundTasks) -> None:
    """Delete an account, with its shelf, reviews, uploads and past loans. The books that it added stay.

    409 while it has books on loan: return them for it first.
    """
    tasks.add_task(accounts.send, delete_account(session, user_id, admin))


MAX_BOOKS = 100  # to a transaction, as MAX_ROWS


def delete_account(session: Session, user_id: int, by: Principal) -> accounts.Email:
    """Delete an account. Of a large one, only hide it and delete some rows: `main.delete_accounts` deletes the others.

    The answer does not wait for them: 50,000 books take longer than a proxy waits, and after a crash that job must go
    on anyway.
    """
    user = get_user(session, user_id)
    was_admin = is_active_admin(user)
    loans.refuse_while_borrowing(session, user_id)
    data = {"user_id": user_id, "username": user.username, "by": by.id}
    email = accounts.compose("account_deleted", user.email, username=user.username)
    user.username = user.email = f"deleted {user_id}"  # which nobody can register or sign in with
    user.is_active, user.full_name, user.pending_email = False, None, None
    session.flush()
    if was_admin:
        require_an_admin(session)
    delete_batch(session, user_id)
    # The account's own events are deleted with it; admins can read that it was deleted.
    events.record(session, "account.deleted", data, private=True)
    return email


def deleted_accounts(connection: Connection) -> Sequence[int]:
    by_index = col(User.email).between("deleted ", "deletee")  # in every collation
    return connection.scalars(sa.select(col(User.id)).where(by_index, sa.not_(EXISTS))).all()


def delete_batch(session: Session, user_id: int) -> bool:
    """Delete the next rows of a deleted account, its own last; whether more are left to delete."""
    uploads, execute = sa.select(col(Upload.id)).where(col(Upload.user_id) == user_id), session.connection().execute
    rows: dict[Any, ColumnElement[bool]] = {
        UploadError: col(UploadError.upload_id).in_(uploads),
        UploadChunk: col(UploadChunk.upload_id).in_(uploads),
        **{table: col(table.user_id) == user_id for table in (Upload, Loan, LoginSession, StoredAnswer, Event)},
    }
    for table, condition in rows.items():
        change = sa.update(Event).values(events.ERASED) if table is Event else sa.delete(table)
        if execute(change.where(models.is_of_batch(table, condition))).rowcount == models.MAX_ROWS:
            return True
    if any(change(session, user_id, MAX_BOOKS) == MAX_BOOKS for change in (library.delete_entries, disown_books)):
        return True
    execute(sa.delete(User).where(col(User.id) == user_id))
    return False
