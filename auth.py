"""Sign in and out: `/login`, `/auth/token`, `/auth/refresh`, and the sessions behind the tokens."""

import secrets
from collections.abc import Sequence
from datetime import timedelta
from typing import Annotated, Any
from urllib.parse import quote

import sqlalchemy as sa
from fastapi import Depends, HTTPException, Path, Query, Request, Response
from pydantic import BaseModel, Field, ValidationError
from pydantic.json_schema import SkipJsonSchema
from sqlalchemy import ColumnElement, Connection
from sqlmodel import Session, UTCDateTime, col

import database
import models
import security
from api import MAX_ACCOUNT_BODY, PAGE, Router, errors, invalid_body, transactional
from events import record_account_event
from models import ANSWER_LIFETIME, InvalidField, LoginSession, OneTimeCode, Principal, StoredAnswer, User
from pagination import JsonObject, Listing, Page, PageQuery, page_response
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
    refresh_token: str | SkipJsonSchema[None] = Field(
        default=None, description="Works once, at `/auth/refresh`. Left out where it is in a cookie."
    )


class RefreshRequest(RequestModel):
    refresh_token: Annotated[str, Field(max_length=security.MAX_TOKEN), Storable] = Field(
        examples=["eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIyIn0.c2lnbmF0dXJl"]
    )


def rotate_tokens(login: LoginSession, used: str) -> TokenPair:
    """A new pair for this session, in place of the refresh token whose id is `used`."""
    login.last_used_at = models.utcnow()
    login.expires_at = login.last_used_at + timedelta(days=settings.refresh_token_expire_days)
    login.previous_hash, login.refresh_hash = security.sha256(used), security.sha256(next_jti(login, used))
    return create_pair(login, used)


def next_jti(login: LoginSession, used: str) -> str:
    """The id of the refresh token that replaced `used`: the same at each retry, another after another rotation."""
    return security.hmac_hash("refresh", used, login.last_used_at.isoformat())


def create_pair(login: LoginSession, used: str) -> TokenPair:
    now, lifetime, jti = models.utcnow(), timedelta(minutes=settings.access_token_expire_minutes), next_jti(login, used)
    return TokenPair(
        access_token=security.create_token("access", login, now, now + lifetime, secrets.token_urlsafe(12)),
        expires_in=int(lifetime.total_seconds()),
        refresh_token=security.create_token("refresh", login, login.last_used_at, login.expires_at, jti),
    )


# --- the refresh token as a cookie of the front page -----------------------------------------------------------------

COOKIE = "refresh_token"
UseCookie = Annotated[bool, Query(description="For pages of this service: the refresh token is set as a cookie.")]


def set_cookie(request: Request, response: Response, token: str = "", max_age: int = 0) -> None:
    """Set the cookie; without a token, clear it."""
    path, secure = quote(request.scope.get("root_path", "").rstrip("/")) + "/auth", request.url.scheme == "https"
    response.set_cookie(COOKIE, token, max_age, path=path, secure=secure, httponly=True, samesite="strict")


async def clear_cookie(request: Request, response: Response) -> None:
    set_cookie(request, response)


ENDS_SESSION = [Depends(clear_cookie)]


def move_to_cookie(pair: TokenPair, request: Request, response: Response) -> TokenPair:
    set_cookie(request, response, pair.refresh_token or "", settings.refresh_token_expire_days * 86400)
    return pair.model_copy(update={"refresh_token": None})


def refuse_other_sites(request: Request) -> None:
    """403 for what the page of another origin makes a browser send. SameSite allows other ports and subdomains, and
    sets the cookie of a foreign login; browsers tell `Sec-Fetch-Site` only under https and to localhost."""
    site, origin, host = map(request.headers.get, ("sec-fetch-site", "origin", "host"))
    is_own = origin in (None, f"http://{host}", f"https://{host}") if site is None else site == "same-origin"
    if not is_own:
        raise HTTPException(403, "Only pages of this service can use its cookie.")


def read_cookie(request: Request) -> str | None:
    """The refresh token. None if there are two: a sibling host can set a cookie for the whole domain, with any path."""
    pairs = [pair.strip() for header in request.headers.getlist("cookie") for pair in header.split(";")]
    tokens = [pair.removeprefix(f"{COOKIE}=") for pair in pairs if pair.startswith(f"{COOKIE}=")]
    return tokens[0] if len(tokens) == 1 else None


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


# Ids begin with 1.
UNKNOWN_USER = User(id=0, username="", email="", password_hash=security.DUMMY_PASSWORD_HASH, is_active=False)
SETS_COOKIE = errors(401, 403, 429, sends={200: "Set-Cookie"})
LOGIN: Any = {"responses": SETS_COOKIE | errors(415), "response_model_exclude_none": True}


def takes(media_type: str, **more: Any) -> dict[str, Any]:
    """For the docs. Both paths take both media types; of an operation with two, generators make invalid code."""
    content = {media_type: {"schema": {**Credentials.model_json_schema(), **more}}}
    return {"requestBody": {"required": True, "content": content}}


@router.post("/login", openapi_extra=takes("application/json", additionalProperties=False), **LOGIN)
@router.post(
    "/auth/token",
    name="token",
    summary="Sign in (the address that OAuth2 clients expect)",
    openapi_extra=takes("application/x-www-form-urlencoded", title="LoginForm"),
    **LOGIN,
)
async def login(
    credentials: Annotated[Credentials, Depends(parse_credentials)],
    request: Request,
    response: Response,
    cookie: UseCookie = False,
) -> TokenPair:
    """Sign in: with JSON or a form (OAuth2 password grant), at either path.

    The answer is the same, and takes the same time, for an unknown user, a wrong password and a deactivated account.
    """
    if cookie:
        refuse_other_sites(request)
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
    return move_to_cookie(pair, request, response) if cookie else pair


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


@router.post("/auth/refresh", responses=SETS_COOKIE, response_model_exclude_none=True)
async def refresh(request: Request, response: Response, body: RefreshRequest | None = None) -> TokenPair:
    """Exchange a refresh token for a new pair. Each works once: one that is used again ends its session.

    A client that did not receive the answer may repeat the request for 10 seconds, and gets the same refresh token, so
    that there is never more than one that works. Without a body, the token is read from the cookie that
    `POST /login?cookie=true` has set, and so is the next one.
    """
    if body is None:
        refuse_other_sites(request)
    token = read_cookie(request) if body is None else body.refresh_token
    claims = security.verify_token("refresh", token) if token else None
    await security.check_rate_limit("refresh", request, claims and claims.sid)
    pair = None if claims is None else await database.write(rotate_session, claims)
    if pair is not None:
        return move_to_cookie(pair, request, response) if body is None else pair
    refusal = unauthorized()
    if body is None and token:
        set_cookie(request, response)
        refusal.headers = {**(refusal.headers or {}), "Set-Cookie": response.headers["Set-Cookie"]}
    raise refusal


def rotate_session(session: Session, claims: security.Claims) -> TokenPair | None:
    login = session.get(LoginSession, claims.sid)
    if login is None or login.revoked_at is not None or login.user_id != claims.sub:
        return None
    user = session.get_one(User, login.user_id)
    if not user.is_active or (settings.require_verified_email and user.email_verified_at is None):
        return None
    jti_hash = security.sha256(claims.jti)
    if secrets.compare_digest(login.refresh_hash, jti_hash):
        return rotate_tokens(login, claims.jti)
    if login.previous_hash == jti_hash and models.utcnow() - login.last_used_at <= REFRESH_RETRY:
        return create_pair(login, claims.jti)
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


@router.post("/auth/logout", status_code=204, dependencies=ENDS_SESSION)
@transactional
def logout(session: Session, user: CurrentUser) -> None:
    """Sign out: my access and refresh tokens are revoked at once."""
    log_out(session, user, col(LoginSession.id) == user.session_id)


@router.post("/auth/logout-all", status_code=204, dependencies=ENDS_SESSION)
@transactional
def logout_everywhere(session: Session, user: CurrentUser) -> None:
    """Sign out everywhere: all my sessions end, this one included."""
    log_out(session, user, sa.true())


SessionId = Annotated[Id, Path(description="The session's `id`.")]
SESSIONS = Listing(
    sa.select(JsonObject(LoginSession, SessionPublic, current=col(LoginSession.id) == sa.bindparam("session_id"))),
    filters={
        "user_id": col(LoginSession.user_id) == sa.bindparam("user_id"),
        "live_at": is_live(sa.bindparam("live_at", type_=UTCDateTime)),
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
def end_session(
    session: Session, session_id: SessionId, user: CurrentUser, request: Request, response: Response
) -> None:
    """End one of my sessions: its tokens are revoked at once."""
    if not log_out(session, user, col(LoginSession.id) == session_id):
        raise HTTPException(404, "You have no such session.")
    if session_id == user.session_id:
        set_cookie(request, response)


def delete_expired(session: Session) -> bool:
    """Delete a batch of sessions, codes and stored answers that have ended; whether more are left to delete. The event
    log keeps what happened to them."""
    now, execute = models.utcnow(), session.connection().execute
    ended: dict[Any, ColumnElement[bool]] = {
        LoginSession: sa.or_(col(LoginSession.expires_at) <= now, col(LoginSession.revoked_at).is_not(None)),
        OneTimeCode: col(OneTimeCode.expires_at) <= now,
        StoredAnswer: col(StoredAnswer.created_at) <= now - ANSWER_LIFETIME,
    }
    batches = (sa.delete(table).where(models.is_of_batch(table, condition)) for table, condition in ended.items())
    return any(execute(batch).rowcount == models.MAX_ROWS for batch in batches)
