"""`/login` and `/auth/*`: sessions and their tokens, registration, confirming an address, and passwords."""

import asyncio
import hmac
import secrets
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Annotated, Any, NamedTuple

import sqlalchemy as sa
from fastapi import BackgroundTasks, Depends, HTTPException, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from sqlalchemy import ColumnElement, Connection
from sqlmodel import Session, col
from starlette.background import BackgroundTask

import database
import mail
import models
import security
from api import PAGE, Router, errors
from events import record_account_event
from mail import Email
from models import CodePurpose, LoginSession, OneTimeCode, Principal, Role, User
from pagination import Order, Page, PageQuery, named, page_answer, read_page
from schemas import (
    EmailAddress,
    Id,
    Password,
    RequestModel,
    SessionPublic,
    Storable,
    UserCreate,
    UserPublic,
    invalid_body,
    pattern,
)
from security import (
    DUMMY_PASSWORD_HASH,
    MAX_TOKEN,
    Claims,
    CurrentUser,
    check_password_strength,
    check_still_authorized,
    create_token,
    hash_password,
    hmac_hash,
    reject_repeated_fields,
    sha256,
    unauthorized,
    verify_password,
    verify_token,
)
from settings import settings

router = Router(tags=["Accounts"])

# --- pairs of tokens ----------------------------------------------------------------------------------------------

# How long a client may take to ask again for the answer to its refresh that it never got.
REFRESH_RETRY = timedelta(seconds=10)


class TokenPair(BaseModel):
    access_token: str
    token_type: str = Field(default="bearer", examples=["bearer"])
    expires_in: int = Field(description="Seconds until the access token expires.", examples=[1800])
    refresh_token: str = Field(description="Good once, at `/auth/refresh`.")


class RefreshRequest(RequestModel):
    refresh_token: Annotated[str, Field(max_length=MAX_TOKEN), Storable]


def _rotate_pair(login: LoginSession, jti: str) -> TokenPair:
    """A new pair for this login, in place of its last. The caller's transaction keeps the new hash."""
    now = models.utcnow()
    login.previous_hash, login.refresh_hash = login.refresh_hash, sha256(jti)
    login.last_used_at, login.expires_at = now, now + timedelta(days=settings.refresh_token_expire_days)
    return _pair(login, jti)


def _pair(login: LoginSession, jti: str) -> TokenPair:
    now, lifetime = models.utcnow(), timedelta(minutes=settings.access_token_expire_minutes)
    return TokenPair(
        access_token=create_token("access", login, now, now + lifetime, secrets.token_urlsafe(12)),
        expires_in=int(lifetime.total_seconds()),
        refresh_token=create_token("refresh", login, login.last_used_at, login.expires_at, jti),
    )


def _successor(jti: str) -> str:
    """The id of the refresh token that follows this one: always the same, and to be known only by who has the key."""
    return hmac_hash("refresh", jti)


# --- signing in and out -------------------------------------------------------------------------------------------


class Credentials(BaseModel):
    username: Annotated[str, Field(max_length=254, description="Or the e-mail address.", examples=["admin"]), Storable]
    password: Annotated[str, Field(max_length=1000, examples=["admin"]), Storable]


async def credentials(request: Request) -> Credentials:
    """The two fields, from a form (as OAuth2's password grant sends them, with others) or from JSON."""
    try:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json":
            return Credentials.model_validate_json(await request.body(), extra="forbid")
        await reject_repeated_fields(request)
        form = {name: value for name, value in (await request.form()).items() if isinstance(value, str)}
        if any(name.lstrip().startswith("{") for name in form):  # as curl sends it
            raise invalid_body("username", "is needed in a form; JSON needs the Content-Type application/json")
        return Credentials.model_validate(form)
    except ValidationError as error:
        found = error.errors(include_input=False, include_url=False)
        raise RequestValidationError([{**e, "loc": ("body", *e["loc"])} for e in found]) from None


LOGIN_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/x-www-form-urlencoded": {"schema": Credentials.model_json_schema()},
            "application/json": {"schema": {**Credentials.model_json_schema(), "additionalProperties": False}},
        },
    }
}


@router.post("/login", openapi_extra=LOGIN_BODY, responses=errors(401, 403, 429))
@router.post("/auth/token", openapi_extra=LOGIN_BODY, name="token", responses=errors(401, 403, 429))
async def login(given: Annotated[Credentials, Depends(credentials)], request: Request) -> TokenPair:
    """Sign in, with a form (OAuth2 password grant) or JSON.

    The answer is the same, and takes the same time, for an unknown user, a wrong password and an account that is
    switched off.
    """
    name, device = given.username.strip().lower(), Device.of(request)
    # By what was typed: a common count for somebody's name and address would tell that they belong together.
    await security.check_rate_limit("login", request, name)
    account = await database.read(_find_account, name) or UNKNOWN_ACCOUNT
    right, new_hash = await verify_password(given.password, account.password_hash)
    if right and settings.require_verified_email and account.is_active and account.email_verified_at is None:
        why = "Confirm your e-mail address first: open the link that was mailed to you."
        may_mail = not await security.hit_rate_limit("verify", request, account.id)
        raise LoginRefused(403, why, after=BackgroundTask(_mail_link_again, account.id) if may_mail else None)
    pair = await database.write(start_session, account, device, new_hash) if right else None
    if pair is None:
        raise LoginRefused(
            401, "Wrong user name or password.", BackgroundTask(database.write, _record_failure, account, device)
        )
    await security.reset_rate_limit("login", request, name)
    return pair


class Device(NamedTuple):
    """What asks, as the audit trail keeps it."""

    address: str
    user_agent: str | None

    @classmethod
    def of(cls, request: Request) -> "Device":
        agent = request.headers.get("user-agent")
        return cls(security.client_address(request), agent and agent[:200])


class LoginAccount(NamedTuple):
    """What a login needs to know of an account."""

    id: int
    password_hash: str
    is_active: bool
    email_verified_at: datetime | None


UNKNOWN_ACCOUNT = LoginAccount(0, DUMMY_PASSWORD_HASH, is_active=False, email_verified_at=None)  # ids begin with 1


def _find_account(connection: Connection, name: str) -> LoginAccount | None:
    # A user name has no @, so a name can never be taken for somebody else's address.
    column = col(User.email) if "@" in name else sa.func.lower(col(User.username))
    columns = [col(getattr(User, field)) for field in LoginAccount._fields]
    row = connection.execute(sa.select(*columns).where(column == name)).first()
    return None if row is None else LoginAccount(*row)


class LoginRefused(HTTPException):
    """An error with something to do `after` it is sent, so that it does not show in how long the answer took."""

    def __init__(self, status: int, detail: str, after: BackgroundTask | None) -> None:
        super().__init__(status, detail, {"WWW-Authenticate": "Bearer"} if status == 401 else None)
        self.after = after


def _record_failure(session: Session, account: LoginAccount, device: Device) -> None:
    known = session.get(User, account.id) is not None
    record_account_event(session, account.id if known else None, "login_failed", **device._asdict())


def start_session(session: Session, account: LoginAccount, device: Device, new_hash: str | None) -> TokenPair | None:
    user = session.get(User, account.id, with_for_update=True)
    # The password was verified a while ago: it may have been changed since, or the account switched off.
    if user is None or not user.is_active or user.password_hash != account.password_hash:
        return None
    if new_hash is not None:
        user.password_hash = new_hash
    login = LoginSession(user_id=user.id, refresh_hash="", user_agent=device.user_agent)
    session.add(login)
    session.flush()
    record_account_event(session, user.id, "login", session_id=login.id, **device._asdict())
    return _rotate_pair(login, secrets.token_urlsafe(24))


@router.post("/auth/refresh", responses=errors(401, 429))
async def refresh(given: RefreshRequest, request: Request) -> TokenPair:
    """Change a refresh token for a new pair. Each is good once: one that is shown again ends its whole login.

    But a client whose answer got lost may ask again within 10 seconds, and gets the same refresh token as before, so
    that there is never more than one that is good.
    """
    claims = verify_token("refresh", given.refresh_token)
    await security.check_rate_limit("refresh", request, claims and claims.sid)
    pair = None if claims is None else await database.write(_rotate, claims)
    if pair is None:
        raise unauthorized()
    return pair


def _rotate(session: Session, claims: Claims) -> TokenPair | None:
    login = session.get(LoginSession, claims.sid, with_for_update=True)
    if login is None or login.revoked_at is not None or login.user_id != claims.sub:
        return None
    user = session.get_one(User, login.user_id)
    if not user.is_active or (settings.require_verified_email and user.email_verified_at is None):
        return None
    shown = sha256(claims.jti)
    if hmac.compare_digest(login.refresh_hash, shown):
        return _rotate_pair(login, _successor(claims.jti))
    if login.previous_hash == shown and models.utcnow() - login.last_used_at <= REFRESH_RETRY:
        return _pair(login, _successor(claims.jti))
    # We signed it, and it is not the current one: it was used before, by its owner or by a thief.
    login.revoked_at = models.utcnow()
    record_account_event(session, login.user_id, "token_reused", session_id=login.id)
    return None


@router.post("/auth/logout", status_code=204)
async def logout(user: CurrentUser) -> None:
    """End this login: its access and refresh tokens are dead at once."""
    await database.write(_log_out, user, col(LoginSession.id) == user.session_id)


@router.post("/auth/logout-all", status_code=204)
async def logout_everywhere(user: CurrentUser) -> None:
    """End all my logins, this one included."""
    await database.write(_log_out, user, sa.true())


def _log_out(session: Session, user: Principal, which: sa.ColumnElement[bool]) -> None:
    for session_id in end_sessions(session, user.id, which):
        record_account_event(session, user.id, "logout", session_id=session_id)


def end_sessions(session: Session, user_id: int, which: sa.ColumnElement[bool]) -> Sequence[int]:
    """End those of a user's logins; their ids."""
    theirs = sa.update(LoginSession).where(col(LoginSession.user_id) == user_id, _is_live(), which)
    return session.scalars(theirs.values(revoked_at=models.utcnow()).returning(col(LoginSession.id))).all()


def _is_live() -> sa.ColumnElement[bool]:
    return sa.and_(col(LoginSession.revoked_at).is_(None), col(LoginSession.expires_at) > models.utcnow())


SESSIONS, SESSION_PAGE = Order("-id", (col(LoginSession.id),)), TypeAdapter(Page[SessionPublic])
SESSION: dict[str, Any] = {
    name: getattr(LoginSession, name) for name in SessionPublic.model_fields if name != "current"
}


@router.get("/auth/sessions", response_model=Page[SessionPublic], responses=PAGE)
async def list_sessions(query: Annotated[PageQuery, Query()], user: CurrentUser, request: Request) -> Response:
    """Where I am signed in, the newest login first."""
    return page_answer(await database.read(_find_sessions, user, query), SESSION_PAGE, request)


def _find_sessions(connection: Connection, user: Principal, query: PageQuery) -> dict[str, Any]:
    current = (col(LoginSession.id) == user.session_id).label("current")
    mine = sa.select(*SESSION.values(), current).where(col(LoginSession.user_id) == user.id, _is_live())
    return read_page(connection, mine, SESSIONS, query, named([*SESSION, "current"]))


@router.delete("/auth/sessions/{session_id:id}", status_code=204)
async def end_session(session_id: Annotated[Id, Path(description="The session's `id`.")], user: CurrentUser) -> None:
    """End one of my logins: its tokens are dead at once."""
    if not await database.write(_end_session, user, session_id):
        raise HTTPException(404, "You have no such session.")


def _end_session(session: Session, user: Principal, session_id: int) -> bool:
    ended = end_sessions(session, user.id, col(LoginSession.id) == session_id)
    if ended:
        record_account_event(session, user.id, "logout", session_id=session_id)
    return bool(ended)


def delete_expired(session: Session) -> None:
    """Delete logins and codes that are of no more use. What happened to them is in the log."""
    now = models.utcnow()
    over = sa.or_(col(LoginSession.expires_at) <= now, col(LoginSession.revoked_at).is_not(None))
    session.execute(sa.delete(LoginSession).where(over))
    session.execute(sa.delete(OneTimeCode).where(col(OneTimeCode.expires_at) <= now))


# --- what is mailed, once -----------------------------------------------------------------------------------------

LINK_LIFETIME = timedelta(hours=24)
LINK_AGAIN_AFTER = timedelta(minutes=5)  # for who tries to sign in and has not confirmed the address


def make_link(session: Session, user: User, lifetime: timedelta = LINK_LIFETIME) -> str:
    """The token of a link that makes the address that the user has now the confirmed one, also if it changes."""
    token = secrets.token_urlsafe(24)
    expires_at, sealed = models.utcnow() + lifetime, hmac_hash(CodePurpose.verify_email, token)
    session.add(
        OneTimeCode(
            user_id=user.id,
            purpose=CodePurpose.verify_email,
            email=user.email,
            code_hash=sealed,
            expires_at=expires_at,
        )
    )
    return token


def ask_to_confirm(session: Session, user: User) -> mail.Email:
    """The letter with a new link that confirms this user's address. Links that are out already stay good."""
    return mail.confirm_address(user.email, user.username, make_link(session, user))


async def _mail_link_again(user_id: int) -> None:
    letter = await database.write(_ask_again, user_id)
    if letter is not None:
        await mail.send(letter)


def _ask_again(session: Session, user_id: int) -> mail.Email | None:
    lately = sa.select(col(OneTimeCode.id)).where(
        col(OneTimeCode.user_id) == user_id,
        col(OneTimeCode.purpose) == CodePurpose.verify_email,
        col(OneTimeCode.created_at) > models.utcnow() - LINK_AGAIN_AFTER,
    )
    if session.execute(lately.limit(1)).first() is not None:
        return None
    user = session.get(User, user_id)
    return None if user is None else ask_to_confirm(session, user)


MAX_CODE_ATTEMPTS = 5
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
    user, letter = await database.write(_create_account, new, await hash_password(new.password), role, by)
    tasks.add_task(mail.send, letter)
    return user


def _create_account(
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
    links = sa.and_(col(OneTimeCode.purpose) == CodePurpose.verify_email, col(OneTimeCode.email) == email, _is_valid())
    return session.scalars(held.where(links, col(User.id) != user_id).limit(1)).first() or email


# --- confirming the address ---------------------------------------------------------------------------------------


class Confirmed(BaseModel):
    email: str
    email_verified_at: datetime


PAGE_RESPONSE = {"content": {"text/plain": {"schema": {"type": "string"}}}}  # for browsers


@router.get("/auth/verify-email/{token}", response_model=Confirmed, responses=errors(409, 507) | {200: PAGE_RESPONSE})
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
    code = session.scalars(sa.select(OneTimeCode).where(of_token, _is_valid()).with_for_update()).first()
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
    first = sa.select(sa.func.min(col(OneTimeCode.id))).where(_links_of(user), _is_valid()).scalar_subquery()
    links = sa.and_(col(OneTimeCode.user_id) == user.id, col(OneTimeCode.purpose) == CodePurpose.verify_email)
    session.execute(sa.delete(OneTimeCode).where(links, col(OneTimeCode.id) >= first))
    _mark_verified(session, user)
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
    if session.scalars(sa.select(OneTimeCode).where(_links_of(user), _is_valid())).first() is None:
        return [*letters, ask_to_confirm(session, user)]
    _mark_verified(session, user)  # it has such a link from before: it was confirmed within the week
    return letters


def _mark_verified(session: Session, user: User) -> None:
    if user.email_verified_at is None:
        user.email_verified_at = models.utcnow()
        record_account_event(session, user.id, "email_verified", email=user.email)


def _is_valid() -> ColumnElement[bool]:
    return sa.and_(col(OneTimeCode.expires_at) > models.utcnow(), col(OneTimeCode.attempts) < MAX_CODE_ATTEMPTS)


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


class AcceptedCode(NamedTuple):
    code_id: int
    user_id: int
    username: str


def _try_code(session: Session, email: str, otp: str) -> AcceptedCode | None:
    """Whose code it is. Each try counts, and is committed before anything is done with the answer."""
    of_address = sa.select(OneTimeCode, User).join_from(OneTimeCode, User).where(col(User.email) == email)
    live = of_address.where(col(OneTimeCode.purpose) == CodePurpose.reset_password, _is_valid(), col(User.is_active))
    found = session.execute(live.with_for_update()).first()
    if found is None:
        return None
    code, user = found
    code.attempts += 1
    if not secrets.compare_digest(code.code_hash, hmac_hash(CodePurpose.reset_password, user.id, otp)):
        return None
    return AcceptedCode(code.id, user.id, user.username)


def _use_code(session: Session, right: AcceptedCode, password_hash: str) -> Email | None:
    """Set the password, unless another request has used the code meanwhile."""
    used = sa.delete(OneTimeCode).where(col(OneTimeCode.id) == right.code_id).returning(col(OneTimeCode.user_id))
    if session.execute(used).first() is None:
        return None
    user = session.get_one(User, right.user_id)
    _mark_verified(session, user)  # the code has come through that address
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
