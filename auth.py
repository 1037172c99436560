"""Sign in and out: `/login`, `/auth/token`, `/auth/refresh`, and the sessions behind the tokens."""

import secrets
from collections.abc import Sequence
from datetime import timedelta
from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import Depends, HTTPException, Path, Query, Request, Response
from pydantic import BaseModel, Field, ValidationError
from sqlalchemy import ColumnElement, Connection
from sqlmodel import Session, col

import database
import models
import security
from api import MAX_ACCOUNT_BODY, PAGE, Router, errors, invalid_body, transactional
from events import record_account_event
from models import ANSWERS_KEPT, InvalidField, LoginSession, OneTimeCode, Principal, StoredAnswer, User
from pagination import JsonObject, Listing, Page, PageQuery, columns_of, page_response
from schemas import Id, RequestModel, SessionPublic, Storable
from security import CurrentUser, unauthorized
from settings import settings

router = Router(tags=["Accounts"], max_body_size=MAX_ACCOUNT_BODY)

# --- token pairs --------------------------------------------------------------------------------------------------

REFRESH_RETRY = timedelta(seconds=10)  # for a client that did not receive the answer to its refresh


class TokenPair(BaseModel):
    access_token: str
    token_type: str = Field(default="bearer", examples=["bearer"])
    expires_in: int = Field(description="Seconds until the access token expires.", examples=[1800])
    refresh_token: str = Field(description="Works once, at `/auth/refresh`.")


class RefreshRequest(RequestModel):
    refresh_token: Annotated[str, Field(max_length=security.MAX_TOKEN), Storable] = Field(
        examples=["eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIyIn0.c2lnbmF0dXJl"]
    )


def rotate_tokens(login: LoginSession, jti: str) -> TokenPair:
    """A new pair for this session; `jti` is the id of its refresh token, of which the session has the hash."""
    now = models.utcnow()
    login.previous_hash, login.refresh_hash = login.refresh_hash, security.sha256(jti)
    login.last_used_at, login.expires_at = now, now + timedelta(days=settings.refresh_token_expire_days)
    return create_pair(login, jti)


def create_pair(login: LoginSession, jti: str) -> TokenPair:
    now, lifetime = models.utcnow(), timedelta(minutes=settings.access_token_expire_minutes)
    return TokenPair(
        access_token=security.create_token("access", login, now, now + lifetime, secrets.token_urlsafe(12)),
        expires_in=int(lifetime.total_seconds()),
        refresh_token=security.create_token("refresh", login, login.last_used_at, login.expires_at, jti),
    )


# --- sign in ------------------------------------------------------------------------------------------------------


class Credentials(BaseModel):
    username: Annotated[str, Field(max_length=254, description="Or the e-mail address.", examples=["admin"]), Storable]
    password: Annotated[str, Field(max_length=1000, examples=["admin"]), Storable]


async def parse_credentials(request: Request) -> Credentials:
    """The two fields, from a form (OAuth2's password grant, whose other fields are ignored) or from JSON."""
    try:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json":
            return Credentials.model_validate_json(await request.body(), extra="forbid")
        form = {name: value for name, value in (await security.read_form(request)).items() if isinstance(value, str)}
        if any(name.lstrip().startswith("{") for name in form):  # JSON as curl sends it
            raise InvalidField("username", "is needed in a form; JSON needs the Content-Type application/json")
        return Credentials.model_validate(form)
    except ValidationError as error:
        raise invalid_body(error) from None


LOGIN_CONTENT = {
    "application/x-www-form-urlencoded": {"schema": Credentials.model_json_schema()},
    "application/json": {"schema": {**Credentials.model_json_schema(), "additionalProperties": False}},
}
LOGIN_BODY = {"requestBody": {"required": True, "content": LOGIN_CONTENT}}
# Ids begin with 1.
UNKNOWN_USER = User(id=0, username="", email="", password_hash=security.DUMMY_PASSWORD_HASH, is_active=False)
TOKEN_SUMMARY = "Sign in (the address that OAuth2 clients expect)"
LOGIN_RESPONSES = errors(401, 403, 415, 429)


@router.post("/login", openapi_extra=LOGIN_BODY, responses=LOGIN_RESPONSES)
@router.post("/auth/token", openapi_extra=LOGIN_BODY, name="token", summary=TOKEN_SUMMARY, responses=LOGIN_RESPONSES)
async def login(credentials: Annotated[Credentials, Depends(parse_credentials)], request: Request) -> TokenPair:
    """Sign in: with a form (OAuth2 password grant) or JSON.

    The answer is the same, and takes the same time, for an unknown user, a wrong password and a deactivated account.
    """
    name, agent = credentials.username.strip().lower(), request.headers.get("user-agent")
    device = {"address": security.client_address(request), "user_agent": agent and agent[:200]}
    # By the name as typed: a shared count would reveal which user name and address belong together.
    await security.check_rate_limit("login", request, name)
    user = await database.read(find_user, name) or UNKNOWN_USER
    is_right, new_hash = await security.verify_password(credentials.password, user.password_hash)
    if is_right and settings.require_verified_email and user.is_active and user.email_verified_at is None:
        raise HTTPException(403, "Confirm your e-mail address first. POST /auth/verify-email mails another link.")
    # Refused or not, one transaction: the reason does not show in the response time.
    pair = await database.write(start_session, user.id, user.password_hash if is_right else None, device, new_hash)
    if pair is None:
        raise unauthorized("Wrong user name or password.")
    await security.reset_rate_limit("login", request, name)
    await security.uncount_attempt("login", request)
    return pair


def find_user(connection: Connection, name: str) -> Any:
    # User names have no @, so that none can equal an address.
    column = col(User.email) if "@" in name else sa.func.lower(col(User.username))
    return connection.execute(sa.select(User).where(column == name)).first()


def start_session(
    session: Session, user_id: int, verified_hash: str | None, device: dict[str, Any], new_hash: str | None
) -> TokenPair | None:
    user = session.get(User, user_id)
    # Since the password was verified, it may have been changed, or the account deactivated.
    if user is None or not user.is_active or user.password_hash != verified_hash:
        record_account_event(session, user.id if user else None, "login_failed", **device)
        return None
    if new_hash is not None:
        user.password_hash = new_hash
    login = LoginSession(user_id=user.id, refresh_hash="", user_agent=device["user_agent"])
    session.add(login)
    session.flush()
    record_account_event(session, user.id, "login", session_id=login.id, **device)
    return rotate_tokens(login, secrets.token_urlsafe(24))


@router.post("/auth/refresh", responses=errors(401, 429))
async def refresh(body: RefreshRequest, request: Request) -> TokenPair:
    """Exchange a refresh token for a new pair. Each works once: one that is used again ends its session.

    A client that did not receive the answer may repeat the request for 10 seconds, and gets the same refresh token, so
    that there is never more than one that works.
    """
    claims = security.verify_token("refresh", body.refresh_token)
    await security.check_rate_limit("refresh", request, claims and claims.sid)
    pair = None if claims is None else await database.write(rotate_session, claims)
    if pair is None:
        raise unauthorized()
    return pair


def rotate_session(session: Session, claims: security.Claims) -> TokenPair | None:
    login = session.get(LoginSession, claims.sid)
    if login is None or login.revoked_at is not None or login.user_id != claims.sub:
        return None
    user = session.get_one(User, login.user_id)
    if not user.is_active or (settings.require_verified_email and user.email_verified_at is None):
        return None
    jti_hash = security.sha256(claims.jti)
    next_jti = security.hmac_hash("refresh", claims.jti)  # the same at each retry
    if secrets.compare_digest(login.refresh_hash, jti_hash):
        return rotate_tokens(login, next_jti)
    if login.previous_hash == jti_hash and models.utcnow() - login.last_used_at <= REFRESH_RETRY:
        return create_pair(login, next_jti)
    # Reuse, by its owner or a thief (RFC 9700, 4.14.2).
    login.revoked_at = models.utcnow()
    record_account_event(session, login.user_id, "token_reused", session_id=login.id)
    return None


# --- sessions -----------------------------------------------------------------------------------------------------


def is_live(now: Any) -> ColumnElement[bool]:
    return sa.and_(col(LoginSession.revoked_at).is_(None), col(LoginSession.expires_at) > now)


def end_sessions(session: Session, user_id: int, which: ColumnElement[bool]) -> Sequence[int]:
    """End the user's live sessions that match `which`; their ids."""
    now = models.utcnow()
    ended = sa.update(LoginSession).where(col(LoginSession.user_id) == user_id, is_live(now), which)
    return session.scalars(ended.values(revoked_at=now).returning(col(LoginSession.id))).all()


def log_out(session: Session, user: Principal, which: ColumnElement[bool]) -> int:
    """End the user's live sessions that match `which`; how many."""
    ids = end_sessions(session, user.id, which)
    for session_id in ids:
        record_account_event(session, user.id, "logout", session_id=session_id)
    return len(ids)


@router.post("/auth/logout", status_code=204)
@transactional
def logout(session: Session, user: CurrentUser) -> None:
    """Sign out: my access and refresh tokens are revoked at once."""
    log_out(session, user, col(LoginSession.id) == user.session_id)


@router.post("/auth/logout-all", status_code=204)
@transactional
def logout_everywhere(session: Session, user: CurrentUser) -> None:
    """Sign out everywhere: all my sessions end, this one included."""
    log_out(session, user, sa.true())


SessionId = Annotated[Id, Path(description="The session's `id`.")]
IS_CURRENT = col(LoginSession.id) == sa.bindparam("session_id")
SESSIONS = Listing(
    sa.select(JsonObject(columns_of(LoginSession, SessionPublic, current=IS_CURRENT))),
    filters={
        "user_id": col(LoginSession.user_id) == sa.bindparam("user_id"),
        "live_at": is_live(sa.bindparam("live_at", type_=models.UtcDateTime)),
    },
    orders={"-id": (col(LoginSession.id),), "id": (col(LoginSession.id),)},
)


@router.get("/auth/sessions", response_model=Page[SessionPublic], responses=PAGE)
async def list_sessions(query: Annotated[PageQuery, Query()], user: CurrentUser, request: Request) -> Response:
    """List my sessions, newest first."""
    filters = {"user_id": user.id, "session_id": user.session_id, "live_at": models.utcnow()}
    return page_response(request, await database.read(SESSIONS.page, filters, "-id", query))


@router.delete("/auth/sessions/{session_id:id}", status_code=204, responses=errors(404))
@transactional
def end_session(session: Session, session_id: SessionId, user: CurrentUser) -> None:
    """End one of my sessions: its tokens are revoked at once."""
    if not log_out(session, user, col(LoginSession.id) == session_id):
        raise HTTPException(404, "You have no such session.")


def delete_expired(session: Session) -> None:
    """Delete sessions, codes and stored answers that have ended. What happened to them is in the log."""
    now = models.utcnow()
    ended = sa.or_(col(LoginSession.expires_at) <= now, col(LoginSession.revoked_at).is_not(None))
    session.execute(sa.delete(LoginSession).where(ended))
    session.execute(sa.delete(OneTimeCode).where(col(OneTimeCode.expires_at) <= now))
    session.execute(sa.delete(StoredAnswer).where(col(StoredAnswer.created_at) <= now - ANSWERS_KEPT))
