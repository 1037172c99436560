"""Signing in and out: logins, their pairs of tokens, and the links that confirm an address."""

import hmac
import secrets
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Annotated, Any, NamedTuple

import sqlalchemy as sa
from fastapi import Depends, HTTPException, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from sqlalchemy import Connection
from sqlmodel import Session, col
from starlette.background import BackgroundTask

import database
import mail
import models
import security
from api import PAGE, Router, errors
from events import record_account_event
from models import CodePurpose, LoginSession, OneTimeCode, Principal, User
from pagination import Order, Page, PageQuery, named, page_answer, read_page
from schemas import Id, RequestModel, SessionPublic, Storable, invalid_body
from security import (
    DUMMY_PASSWORD_HASH,
    MAX_TOKEN,
    Claims,
    CurrentUser,
    create_token,
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
RETRY_WITHIN = timedelta(seconds=10)


class TokenPair(BaseModel):
    access_token: str
    token_type: str = Field(default="bearer", examples=["bearer"])
    expires_in: int = Field(description="Seconds until the access token expires.", examples=[1800])
    refresh_token: str = Field(description="Good once, at `/auth/refresh`.")


class RefreshRequest(RequestModel):
    refresh_token: Annotated[str, Field(max_length=MAX_TOKEN), Storable]


def _renew(login: LoginSession, jti: str) -> TokenPair:
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
    account = await database.read(_find_account, name) or NOBODY
    right, new_hash = await verify_password(given.password, account.password_hash)
    if right and settings.require_verified_email and account.is_active and account.email_verified_at is None:
        why = "Confirm your e-mail address first: open the link that was mailed to you."
        may_mail = not await security.hit_rate_limit("verify", request, account.id)
        raise Refused(403, why, after=BackgroundTask(_mail_link_again, account.id) if may_mail else None)
    pair = await database.write(start_session, account, device, new_hash) if right else None
    if pair is None:
        raise Refused(
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


class Account(NamedTuple):
    """What a login needs to know of an account."""

    id: int
    password_hash: str
    is_active: bool
    email_verified_at: datetime | None


NOBODY = Account(0, DUMMY_PASSWORD_HASH, is_active=False, email_verified_at=None)  # ids begin with 1


def _find_account(connection: Connection, name: str) -> Account | None:
    # A user name has no @, so a name can never be taken for somebody else's address.
    column = col(User.email) if "@" in name else sa.func.lower(col(User.username))
    columns = [col(getattr(User, field)) for field in Account._fields]
    row = connection.execute(sa.select(*columns).where(column == name)).first()
    return None if row is None else Account(*row)


class Refused(HTTPException):
    """An error with something to do `after` it is sent, so that it does not show in how long the answer took."""

    def __init__(self, status: int, detail: str, after: BackgroundTask | None) -> None:
        super().__init__(status, detail, {"WWW-Authenticate": "Bearer"} if status == 401 else None)
        self.after = after


def _record_failure(session: Session, account: Account, device: Device) -> None:
    known = session.get(User, account.id) is not None
    record_account_event(session, account.id if known else None, "login_failed", **device._asdict())


def start_session(session: Session, account: Account, device: Device, new_hash: str | None) -> TokenPair | None:
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
    return _renew(login, secrets.token_urlsafe(24))


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
        return _renew(login, _successor(claims.jti))
    if login.previous_hash == shown and models.utcnow() - login.last_used_at <= RETRY_WITHIN:
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


def sweep(session: Session) -> None:
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
