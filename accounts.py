"""Making an account, confirming its address, and its password, forgotten ones included."""

import asyncio
import secrets
from datetime import datetime, timedelta
from typing import Annotated, Any, NamedTuple

import sqlalchemy as sa
from fastapi import BackgroundTasks, HTTPException, Path, Request, Response
from pydantic import BaseModel, Field
from sqlalchemy import ColumnElement, Connection
from sqlmodel import Session, col

import database
import mail
import models
import security
from api import Router, errors
from events import record_account_event
from logins import ask_to_confirm, end_sessions, make_link
from mail import Email
from models import CodePurpose, LoginSession, OneTimeCode, Principal, Role, User
from schemas import EmailAddress, Password, RequestModel, Storable, UserCreate, UserPublic, invalid_body, pattern
from security import (
    DUMMY_PASSWORD_HASH,
    CurrentUser,
    check_password_strength,
    check_still_authorized,
    hash_password,
    hmac_hash,
    unauthorized,
    verify_password,
)

router = Router(tags=["Accounts"])

CODE_TRIES = 5
CODE_LIFETIME = timedelta(minutes=10)
UNDO_LIFETIME = timedelta(days=7)
REFUSAL_SECONDS = 0.3  # how long each refusal of a code takes, whatever it was refused for

# --- making one ---------------------------------------------------------------------------------------------------


@router.post("/auth/register", status_code=201, responses=errors(409, 429, sends={201: "Location"}))
async def register(new: UserCreate, request: Request, response: Response, tasks: BackgroundTasks) -> UserPublic:
    """Make an account with the role reader, and mail a link that confirms its address.

    User names and e-mail addresses are unique whatever their case; 409 names the one that is taken.
    """
    await security.check_rate_limit("register", request, new.email)
    user = await create_account(new, Role.reader, tasks)
    response.headers["Location"] = "/users/me"
    return user


async def create_account(
    new: UserCreate, role: Role, tasks: BackgroundTasks, by: Principal | None = None
) -> UserPublic:
    check_password_strength("password", new.password, new.username, new.email)
    user, letter = await database.write(_make, new, await hash_password(new.password), role, by)
    tasks.add_task(mail.send, letter)
    return user


def _make(
    session: Session, new: UserCreate, password_hash: str, role: Role, by: Principal | None
) -> tuple[UserPublic, Email]:
    if by is not None:
        check_still_authorized(session, by)
    user = add_user(session, new, password_hash, role)
    record_account_event(session, user.id, "created", username=user.username, role=role, by=by.id if by else user.id)
    return UserPublic.model_validate(user), ask_to_confirm(session, user)


def add_user(session: Session, new: UserCreate, password_hash: str, role: Role) -> User:
    said = new.model_dump(include={"username", "full_name"})
    user = User(**said, email=_free(session, new.email), password_hash=password_hash, role=role)
    session.add(user)
    session.flush()
    return user


def _free(session: Session, email: str, user_id: int = 0) -> str:
    """This address for this account. One that somebody else can still take back is no more free than one in use: in its
    stead comes the one that they have now, for the constraint to refuse, so that the answer is the same to the letter.
    """
    held = sa.select(col(User.email)).join_from(OneTimeCode, User, col(OneTimeCode.user_id) == col(User.id))
    links = sa.and_(col(OneTimeCode.purpose) == CodePurpose.verify_email, col(OneTimeCode.email) == email, _is_good())
    return session.scalars(held.where(links, col(User.id) != user_id).limit(1)).first() or email


# --- confirming the address ---------------------------------------------------------------------------------------


class Confirmed(BaseModel):
    email: str
    email_verified_at: datetime


A_PAGE = {"content": {"text/plain": {"schema": {"type": "string"}}}}  # for browsers


@router.get("/auth/verify-email/{token}", response_model=Confirmed, responses=errors(409, 507) | {200: A_PAGE})
async def verify_email(token: Annotated[str, Path(max_length=100), Storable], request: Request) -> Response:
    """Follow the link that was mailed: the address is confirmed. The link works once, for 24 hours."""
    confirmed = await database.write(_confirm, token)
    if confirmed is None:
        raise HTTPException(404, "This link is used up or too old. Sign in to ask for another.")
    if "text/html" in request.headers.get("accept", ""):  # somebody's browser
        return Response(
            f"The address {confirmed.email} is confirmed. You can close this page.", media_type="text/plain"
        )
    return Response(confirmed.model_dump_json(), media_type="application/json")


def _confirm(session: Session, token: str) -> Confirmed | None:
    of_token = col(OneTimeCode.code_hash) == hmac_hash(CodePurpose.verify_email, token)
    code = session.scalars(sa.select(OneTimeCode).where(of_token, _is_good()).with_for_update()).first()
    if code is None:
        return None
    user = session.get_one(User, code.user_id)
    if code.email not in (None, user.email):
        # Sent with the news that this confirmed address was replaced: its owner takes it back.
        record_account_event(session, user.id, "email_restored", old=user.email, new=code.email)
        user.email, user.email_verified_at = str(code.email), None
        user.password_hash = DUMMY_PASSWORD_HASH  # whoever replaced the address may know the password, or have set it
        cancel_codes(session, user.id, CodePurpose.reset_password)
        end_sessions(session, user.id, sa.true())
    # Whoever had an address first has the last word: links that went to later ones since are no good any more.
    first = sa.select(sa.func.min(col(OneTimeCode.id))).where(_links_of(user), _is_good()).scalar_subquery()
    links = sa.and_(col(OneTimeCode.user_id) == user.id, col(OneTimeCode.purpose) == CodePurpose.verify_email)
    session.execute(sa.delete(OneTimeCode).where(links, col(OneTimeCode.id) >= first))
    _mark_confirmed(session, user)
    return Confirmed(email=user.email, email_verified_at=user.email_verified_at or models.utcnow())


def _links_of(user: User) -> ColumnElement[bool]:
    """The links that confirm the address that the user has now."""
    of_user = sa.and_(col(OneTimeCode.user_id) == user.id, col(OneTimeCode.email) == user.email)
    return sa.and_(of_user, col(OneTimeCode.purpose) == CodePurpose.verify_email)


def change_address(session: Session, user: User, new: str, by: int) -> list[Email]:
    """Give the account another address, to be confirmed. The old one is told; if it was a confirmed one, its owner can
    take the change back, since it may be somebody else who has made it; but not what an admin has decided."""
    old, undo = user.email, None
    if user.email_verified_at is not None and by == user.id:
        undo = make_link(session, user, UNDO_LIFETIME)
    else:
        session.execute(sa.delete(OneTimeCode).where(_links_of(user)))
    cancel_codes(session, user.id, CodePurpose.reset_password)
    user.email, user.email_verified_at = _free(session, new, user.id), None
    session.flush()
    record_account_event(session, user.id, "email_changed", old=old, new=new, by=by)
    letters = [mail.address_changed(old, user.username, new, undo)]
    if session.scalars(sa.select(OneTimeCode).where(_links_of(user), _is_good())).first() is None:
        return [*letters, ask_to_confirm(session, user)]
    _mark_confirmed(session, user)  # it has such a link from before: it was confirmed within the week
    return letters


def _mark_confirmed(session: Session, user: User) -> None:
    if user.email_verified_at is None:
        user.email_verified_at = models.utcnow()
        record_account_event(session, user.id, "email_verified", email=user.email)


def _is_good() -> ColumnElement[bool]:
    return sa.and_(col(OneTimeCode.expires_at) > models.utcnow(), col(OneTimeCode.attempts) < CODE_TRIES)


def cancel_codes(session: Session, user_id: int, *purposes: CodePurpose) -> None:
    of_user = sa.delete(OneTimeCode).where(col(OneTimeCode.user_id) == user_id)
    session.execute(of_user.where(col(OneTimeCode.purpose).in_(purposes)))


class Notice(BaseModel):
    detail: str


@router.post("/auth/verify-email", status_code=202, responses=errors(409, 429))
async def request_verification(user: CurrentUser, request: Request, tasks: BackgroundTasks) -> Notice:
    """Ask for another link. 409 where the address is confirmed already."""
    await security.check_rate_limit("verify", request, user.id)
    letter = await database.write(_another_link, user.id)
    tasks.add_task(mail.send, letter)
    return Notice(detail=f"A new link is on its way to {letter.to}.")


def _another_link(session: Session, user_id: int) -> Email:
    user = session.get(User, user_id)
    if user is None:
        raise unauthorized()
    if user.email_verified_at is not None:
        raise HTTPException(409, "Your e-mail address is confirmed already.")
    return ask_to_confirm(session, user)


# --- passwords ----------------------------------------------------------------------------------------------------


class ForgottenPassword(RequestModel):
    email: EmailAddress


@router.post("/auth/forgot-password", status_code=202, responses=errors(429))
async def forgot_password(given: ForgottenPassword, request: Request, tasks: BackgroundTasks) -> Notice:
    """Have a 6-digit code mailed, good for 10 minutes, 5 tries and one use. It takes the place of the one before.

    The answer is the same whether or not there is such an account.
    """
    await security.check_rate_limit("forgot", request, given.email)
    tasks.add_task(_mail_code, given.email)  # all of it: the answer must not take longer for addresses that we know
    return Notice(detail="If an account has this address, a code is on its way to it.")


async def _mail_code(email: str) -> None:
    letter = await database.write(_start_reset, email)
    if letter is not None:
        await mail.send(letter)


def _start_reset(session: Session, email: str) -> Email | None:
    user = session.scalars(sa.select(User).where(col(User.email) == email, col(User.is_active))).first()
    record_account_event(session, user.id if user else None, "reset_requested")
    if user is None:
        return None
    code = f"{secrets.randbelow(10**6):06}"
    cancel_codes(session, user.id, CodePurpose.reset_password)
    session.add(
        OneTimeCode(
            user_id=user.id,
            purpose=CodePurpose.reset_password,
            email=user.email,
            code_hash=hmac_hash(CodePurpose.reset_password, user.id, code),
            expires_at=models.utcnow() + CODE_LIFETIME,
        )
    )
    return mail.reset_code(user.email, user.username, code)


class PasswordReset(RequestModel):
    email: EmailAddress
    otp: Annotated[
        str,
        Field(
            pattern=pattern(r"^[0-9]{6}$", "must be the six digits of the code"),
            description="The code.",
            examples=["271828"],
        ),
    ]
    new_password: Password


@router.post("/auth/reset-password", status_code=204, responses=errors(429))
async def reset_password(given: PasswordReset, request: Request, tasks: BackgroundTasks) -> None:
    """Set a new password with the code that was mailed. Ends every session."""
    answer_at = asyncio.get_running_loop().time() + REFUSAL_SECONDS
    await security.check_rate_limit("reset", request, given.email)
    check_password_strength("new_password", given.new_password, given.email)
    right = await database.write(_try_code, given.email, given.otp)
    letter = None
    if right is not None:
        check_password_strength("new_password", given.new_password, right.username)
        letter = await database.write(_use_code, right, await hash_password(given.new_password))
    if right is None or letter is None:
        await asyncio.sleep(answer_at - asyncio.get_running_loop().time())
        raise HTTPException(400, "The code is wrong, used up or too old. Ask for a new one.")
    tasks.add_task(mail.send, letter)
    # Somebody who has failed before has come in.
    await security.reset_rate_limit("reset", request, given.email)
    for name in (given.email, right.username.lower()):
        await security.reset_rate_limit("login", request, name)


class RightCode(NamedTuple):
    code_id: int
    user_id: int
    username: str


def _try_code(session: Session, email: str, otp: str) -> RightCode | None:
    """Whose code it is. Each try counts, and is committed before anything is done with the answer."""
    of_address = sa.select(OneTimeCode, User).join_from(OneTimeCode, User).where(col(User.email) == email)
    live = of_address.where(col(OneTimeCode.purpose) == CodePurpose.reset_password, _is_good(), col(User.is_active))
    found = session.execute(live.with_for_update()).first()
    if found is None:
        return None
    code, user = found
    code.attempts += 1
    if not secrets.compare_digest(code.code_hash, hmac_hash(CodePurpose.reset_password, user.id, otp)):
        return None
    return RightCode(code.id, user.id, user.username)


def _use_code(session: Session, right: RightCode, password_hash: str) -> Email | None:
    """Set the password, unless another request has used the code meanwhile."""
    used = sa.delete(OneTimeCode).where(col(OneTimeCode.id) == right.code_id).returning(col(OneTimeCode.user_id))
    if session.execute(used).first() is None:
        return None
    user = session.get_one(User, right.user_id)
    _mark_confirmed(session, user)  # the code has come through that address
    return _set_password(session, user, password_hash, "password_reset", sa.true())


def _set_password(session: Session, user: User, password_hash: str, what: str, ending: ColumnElement[bool]) -> Email:
    user.password_hash = password_hash
    cancel_codes(session, user.id, CodePurpose.reset_password)
    end_sessions(session, user.id, ending)
    record_account_event(session, user.id, what)
    return mail.password_changed(user.email, user.username)


class PasswordChange(RequestModel):
    current_password: Annotated[str, Field(max_length=1000), Storable]
    new_password: Password


@router.post("/auth/change-password", status_code=204, responses=errors(403, 429))
async def change_password(given: PasswordChange, user: CurrentUser, request: Request, tasks: BackgroundTasks) -> None:
    """Set a new password. Ends all my sessions but this one."""
    if given.new_password == given.current_password:
        raise invalid_body("new_password", "must not be the current one")
    me = await with_password(user, given.current_password, request)
    check_password_strength("new_password", given.new_password, me.username, me.email)
    password_hash = await hash_password(given.new_password)
    tasks.add_task(mail.send, await database.write(_change_password, user, me.password_hash, password_hash))


def _change_password(session: Session, user: Principal, verified_hash: str, password_hash: str) -> Email:
    me, others = still_me(session, user, verified_hash), col(LoginSession.id) != user.session_id
    return _set_password(session, me, password_hash, "password_changed", others)


def still_me(session: Session, user: Principal, verified_hash: str) -> User:
    """My account, if neither my password nor my login has been taken from me since the password was verified."""
    me = session.get(User, user.id, with_for_update=True)
    login = session.get(LoginSession, user.session_id)
    if me is None or me.password_hash != verified_hash or login is None or login.revoked_at is not None:
        raise unauthorized()
    return me


async def with_password(user: Principal, password: str, request: Request) -> Any:
    """My account, after I have shown that I know its password."""
    await security.check_rate_limit("password", request, user.id)
    me = await read_account(user)
    right, _ = await verify_password(password, me.password_hash)
    if not right:
        await database.write(record_account_event, user.id, "password_refused")
        raise HTTPException(403, "This is not your password.")
    return me


async def read_account(user: Principal) -> Any:
    """My account; 401 where it was deleted after my token was looked at."""
    me = await database.read(find_user, user.id)
    if me is None:
        raise unauthorized()
    return me


def find_user(connection: Connection, user_id: int) -> Any:
    return connection.execute(sa.select(User).where(col(User.id) == user_id)).first()
