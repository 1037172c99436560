"""Who is asking: passwords, logins, tokens, roles, and people's own accounts."""

import asyncio
import hashlib
import logging
import secrets
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import APIRouter, Depends, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.security import OAuth2PasswordBearer
from jose import JWTError, jwt
from passlib.context import CryptContext
from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from sqlalchemy import Connection
from sqlmodel import Session, col

import database
import models
from models import (
    Email,
    Id,
    LoginSession,
    Principal,
    Role,
    Setting,
    Shape,
    Storable,
    User,
    UserCreate,
    Username,
    UserPublic,
    UserUpdate,
)
from settings import settings

log = logging.getLogger("books.auth")
router = APIRouter(tags=["Accounts"])

# --- passwords ----------------------------------------------------------------------------------------------------

# OWASP's second set for argon2id: 19 MiB a hash. The library's default of 64 MiB, times the threads of a busy
# server, would not fit into 512 MB.
passwords = CryptContext(
    schemes=["argon2"], argon2__type="id", argon2__memory_cost=19456, argon2__time_cost=2, argon2__parallelism=1
)
# At most two at once, off the event loop: enough to use both cores, and a flood of logins waits here, not elsewhere.
hashers = ThreadPoolExecutor(max_workers=2, thread_name_prefix="argon2")
# Verified where there is no such user, so that the answer takes the same time.
NOBODYS_HASH = passwords.hash(secrets.token_urlsafe())


async def hash_password(password: str) -> str:
    return await asyncio.get_running_loop().run_in_executor(hashers, passwords.hash, password)


async def verify_password(password: str, password_hash: str) -> bool:
    return await asyncio.get_running_loop().run_in_executor(hashers, passwords.verify, password, password_hash)


# --- tokens -------------------------------------------------------------------------------------------------------


class _Key:
    """What signs tokens: SECRET_KEY, or in development mode a random key from the database."""

    value = ""


class TokenPair(BaseModel):
    access_token: str
    token_type: str = Field(default="bearer", examples=["bearer"])
    expires_in: int = Field(description="Seconds until the access token expires.", examples=[1800])
    refresh_token: str = Field(description="Good once, at `/auth/refresh`.")


class RefreshRequest(Shape):
    refresh_token: Annotated[str, Storable, Field(max_length=4000)]


def _sign(kind: str, login: LoginSession, lifetime: timedelta, jti: str) -> str:
    issued = models.now()
    claims = {"sub": str(login.user_id), "sid": str(login.id), "iat": issued, "exp": issued + lifetime, "jti": jti}
    return str(jwt.encode({**claims, "typ": kind}, _Key.value, algorithm="HS256"))


class Claims(BaseModel):
    sub: Id
    sid: Id
    jti: str
    iat: float
    exp: float
    typ: str


def _verify(kind: str, token: str) -> Claims | None:
    """The claims of a token of this kind, or None. Tokens of one kind never pass for another."""
    try:
        # Whether it has expired is asked below, of our own clock; that it has an expiry, Claims insists on.
        claims = Claims.model_validate(jwt.decode(token, _Key.value, ["HS256"], options={"verify_exp": False}))
    except (JWTError, ValidationError):
        return None
    now = models.now().timestamp()
    issued_later = claims.iat > now + 60  # a minute, for clocks that differ
    return None if claims.typ != kind or issued_later or claims.exp <= now else claims


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _issue(login: LoginSession) -> TokenPair:
    """A new pair for this login, in place of its last. The caller's transaction keeps the new hash."""
    now, jti = models.now(), secrets.token_urlsafe(24)
    login.refresh_hash = _hash(jti)
    login.last_used_at, login.expires_at = now, now + timedelta(days=settings.refresh_token_expire_days)
    access_lifetime = timedelta(minutes=settings.access_token_expire_minutes)
    return TokenPair(
        access_token=_sign("access", login, access_lifetime, secrets.token_urlsafe(12)),
        expires_in=int(access_lifetime.total_seconds()),
        refresh_token=_sign("refresh", login, timedelta(days=settings.refresh_token_expire_days), jti),
    )


# --- who is asking ------------------------------------------------------------------------------------------------

bearer = OAuth2PasswordBearer(tokenUrl="login", auto_error=False)


def not_signed_in(detail: str = "Sign in first: the token is missing, expired or revoked.") -> HTTPException:
    return HTTPException(401, detail, {"WWW-Authenticate": "Bearer"})


_PRINCIPAL = (
    sa.select(col(User.id), col(User.username), col(User.role), col(LoginSession.id))
    .join_from(LoginSession, User, col(LoginSession.user_id) == col(User.id))
    .where(
        col(LoginSession.id) == sa.bindparam("session_id"),
        col(User.id) == sa.bindparam("user_id"),
        col(LoginSession.revoked_at).is_(None),
        col(User.is_active),
    )
)


def _find_principal(connection: Connection, claims: Claims) -> Principal | None:
    row = connection.execute(_PRINCIPAL, {"user_id": claims.sub, "session_id": claims.sid}).first()
    return None if row is None else Principal(*row)


async def identify(token: Annotated[str | None, Depends(bearer)]) -> Principal | None:
    """Who signed in, None without a token. A token that is no good is an error even where none is needed."""
    if token is None:
        return None
    claims = _verify("access", token)
    principal = None if claims is None else await database.read(_find_principal, claims)
    if principal is None:
        raise not_signed_in()
    return principal


async def current_user(principal: Annotated[Principal | None, Depends(identify)]) -> Principal:
    if principal is None:
        raise not_signed_in()
    return principal


Viewer = Annotated[Principal | None, Depends(identify)]
CurrentUser = Annotated[Principal, Depends(current_user)]


def require(*roles: Role) -> Any:
    """A dependency: the user who asks, who must have one of these roles."""

    async def check(user: CurrentUser) -> Principal:
        if user.role not in roles:
            raise HTTPException(403, f"Only for: {', '.join(roles)}.")
        return user

    return Depends(check)


Staff = Annotated[Principal, require(Role.librarian, Role.admin)]
Admin = Annotated[Principal, require(Role.admin)]


async def may_add(user: CurrentUser) -> Principal:
    if not (settings.readers_can_add or user.is_staff):
        raise HTTPException(403, "Here only librarians and admins add books.")
    return user


Contributor = Annotated[Principal, Depends(may_add)]

# --- accounts -----------------------------------------------------------------------------------------------------


@router.post("/auth/register", status_code=201)
async def register(new: UserCreate, response: Response) -> UserPublic:
    """Make an account with the role reader. User names and e-mail addresses are unique whatever their case."""
    if new.password_is_name:
        raise _bad_body("password", "must not be the user name or the e-mail address")
    password_hash = await hash_password(new.password)
    user = await database.write(add_user, new, password_hash, Role.reader)
    response.headers["Location"] = "/users/me"
    return UserPublic.model_validate(user, from_attributes=True)


def add_user(session: Session, new: UserCreate, password_hash: str, role: Role) -> User:
    user = User(**new.model_dump(exclude={"password"}), password_hash=password_hash, role=role)
    session.add(user)
    session.flush()
    return user


def _bad_body(field: str, message: str) -> RequestValidationError:
    return RequestValidationError([{"loc": ("body", field), "msg": f"{field} {message}", "type": "value_error"}])


class Credentials(BaseModel):
    username: Annotated[str, Storable, Field(max_length=254, description="Or the e-mail address.", examples=["admin"])]
    password: Annotated[str, Storable, Field(max_length=1000, examples=["admin"])]


async def credentials(request: Request) -> Credentials:
    """The two fields, from a form (as OAuth2's password grant sends them) or from JSON."""
    try:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json":
            return Credentials.model_validate_json(await request.body())
        return Credentials.model_validate({k: v for k, v in (await request.form()).items() if isinstance(v, str)})
    except ValidationError as error:
        found = error.errors(include_input=False, include_url=False)
        raise RequestValidationError([{**e, "loc": ("body", *e["loc"])} for e in found]) from None


LOGIN_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            kind: {"schema": Credentials.model_json_schema()}
            for kind in ("application/x-www-form-urlencoded", "application/json")
        },
    }
}


@router.post("/login", openapi_extra=LOGIN_BODY)
@router.post("/auth/token", openapi_extra=LOGIN_BODY, name="token")
async def login(given: Annotated[Credentials, Depends(credentials)], request: Request, response: Response) -> TokenPair:
    """Sign in, with a form (OAuth2 password grant) or JSON.

    The answer is the same, and takes the same time, for an unknown user, a wrong password and an account that is
    switched off.
    """
    found = await database.read(_find_login, given.username.strip())
    user_id, password_hash, is_active = found or (0, NOBODYS_HASH, False)
    if not await verify_password(given.password, password_hash) or not is_active:
        raise not_signed_in("Wrong user name or password.")
    response.headers["Cache-Control"] = "no-store"
    return await database.write(_start_session, user_id, request.headers.get("user-agent"))


def _find_login(connection: Connection, name: str) -> tuple[int, str, bool] | None:
    # A user name has no @, so a name can never be taken for somebody else's address.
    column = col(User.email) if "@" in name else sa.func.lower(col(User.username))
    query = sa.select(col(User.id), col(User.password_hash), col(User.is_active)).where(column == name.lower())
    row = connection.execute(query).first()
    return None if row is None else (row.id, row.password_hash, row.is_active)


def _start_session(session: Session, user_id: int, user_agent: str | None) -> TokenPair:
    login = LoginSession(user_id=user_id, refresh_hash="", user_agent=user_agent and user_agent[:200])
    session.add(login)
    session.flush()
    return _issue(login)


@router.post("/auth/refresh")
async def refresh(given: RefreshRequest, response: Response) -> TokenPair:
    """Change a refresh token for a new pair. Each is good once: one that is shown again ends its whole login."""
    claims = _verify("refresh", given.refresh_token)
    pair = None if claims is None else await database.write(_rotate, claims)
    if pair is None:
        raise not_signed_in()
    response.headers["Cache-Control"] = "no-store"
    return pair


def _rotate(session: Session, claims: Claims) -> TokenPair | None:
    login = session.get(LoginSession, claims.sid, with_for_update=True)
    if login is None or login.revoked_at is not None or login.user_id != claims.sub:
        return None
    user = session.get_one(User, login.user_id)
    if not secrets.compare_digest(login.refresh_hash, _hash(claims.jti)):
        # We signed it, and it is not the current one: it was used before, by its owner or by a thief.
        login.revoked_at = models.now()
        return None
    return _issue(login) if user.is_active else None


@router.post("/auth/logout", status_code=204)
async def logout(user: CurrentUser) -> None:
    """End this login: its access and refresh tokens are dead at once."""
    await database.write(_revoke, user.session_id)


def _revoke(session: Session, session_id: int) -> None:
    session.get_one(LoginSession, session_id).revoked_at = models.now()


@router.get("/users/me")
async def read_me(user: CurrentUser) -> UserPublic:
    """My account."""
    return await database.read(_account, user.id)


def _account(connection: Connection, user_id: int) -> UserPublic:
    row = connection.execute(sa.select(User).where(col(User.id) == user_id)).one()
    return UserPublic.model_validate(row, from_attributes=True)


@router.patch("/users/me")
async def update_me(change: UserUpdate, user: CurrentUser) -> UserPublic:
    """Change my name or e-mail address (RFC 7396). Role, user name and state are not mine to change."""
    return await database.write(_change_account, user.id, change)


def _change_account(session: Session, user_id: int, change: UserUpdate) -> UserPublic:
    user = session.get_one(User, user_id)
    if change.email and change.email != user.email:
        user.email_verified_at = None
    for name, value in change.model_dump(exclude_unset=True).items():
        setattr(user, name, value)
    session.flush()
    return UserPublic.model_validate(user, from_attributes=True)


# --- the first start ----------------------------------------------------------------------------------------------


def prepare() -> None:
    """Set the signing key, and on the first start make the first admin. Safe in several processes at once."""
    database.transact(_prepare)


def _prepare(session: Session) -> None:
    password = settings.admin_password.get_secret_value() if settings.admin_password else None
    if settings.secret_key is None:
        kept = session.get(Setting, "secret_key") or Setting(key="secret_key", value=secrets.token_hex(32))
        session.add(kept)
        _Key.value = kept.value
        password = password or "admin"
    else:
        _Key.value = settings.secret_key.get_secret_value()
        _replace_development_password(session, password)
    nobody_yet = session.execute(sa.select(col(User.id)).limit(1)).first() is None
    if password is None or not nobody_yet:
        return
    admin = User(
        username=TypeAdapter(Username).validate_python(settings.admin_username),
        email=TypeAdapter(Email).validate_python(settings.admin_email),
        password_hash=passwords.hash(password),
        role=Role.admin,
        email_verified_at=models.now(),
    )
    session.add(admin)
    if password == "admin":
        log.warning("Development mode: SECRET_KEY is not set. Sign in as %s / admin.", admin.username)
    else:
        log.info("Made the first admin: %s.", admin.username)


def _replace_development_password(session: Session, password: str | None) -> None:
    """A database that was begun in development mode must not go public with its `admin` / `admin`."""
    name = settings.admin_username.lower()
    admin = session.scalars(sa.select(User).where(sa.func.lower(col(User.username)) == name)).first()
    if admin is None or not passwords.verify("admin", admin.password_hash):
        return
    if password is None:
        raise RuntimeError(f"{admin.username} still has the password of development mode: set ADMIN_PASSWORD")
    admin.password_hash = passwords.hash(password)
