"""Password hashing, JWTs, the current-user dependency, roles, rate limits and the first admin."""

import asyncio
import functools
import hashlib
import hmac
import ipaddress
import logging
import math
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Annotated, Any

import limits
import sqlalchemy as sa
from fastapi import Depends, HTTPException, Request
from fastapi.security import OAuth2PasswordBearer
from jose import JWTError, jwt
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import FixedWindowRateLimiter
from limits.errors import StorageError
from limits.storage import storage_from_string
from passlib.context import CryptContext
from pydantic import BaseModel, FiniteFloat, TypeAdapter, ValidationError
from python_multipart.multipart import parse_options_header
from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, col
from starlette.datastructures import FormData
from starlette.formparsers import MultiPartException, MultiPartParser

import database
import models
from database import P, T
from models import InvalidField, LoginSession, Principal, Role, Setting, User
from schemas import EmailAddress, Id, Username
from settings import COMMON_PASSWORDS, settings

log = logging.getLogger("books.security")
MAX_TOKEN = 4000  # characters; ours have some 300

# --- passwords ----------------------------------------------------------------------------------------------------

# OWASP's second set for argon2id: 19 MiB a hash. The library's default of 64 MiB, times the threads of a busy
# server, would not fit into 512 MB.
passwords = CryptContext(
    schemes=["argon2"], argon2__type="id", argon2__memory_cost=19456, argon2__time_cost=2, argon2__parallelism=1
)
# Off the event loop, two at once: enough for two cores, and a flood of logins blocks nothing else.
hashers = ThreadPoolExecutor(max_workers=2, thread_name_prefix="argon2")
# Verified for unknown users, so that the answer takes the same time.
DUMMY_PASSWORD_HASH = passwords.hash(secrets.token_urlsafe())


async def hash_password(password: str) -> str:
    return await asyncio.get_running_loop().run_in_executor(hashers, passwords.hash, password)


async def verify_password(password: str, password_hash: str) -> tuple[bool, str | None]:
    """Whether it is right, and a new hash where the old one was made with other parameters."""
    verify = passwords.verify_and_update
    return await asyncio.get_running_loop().run_in_executor(hashers, verify, password, password_hash)


def check_password_strength(field: str, password: str, *names: str) -> None:
    """422 for a password that is guessed first."""
    if password.lower() in [name.lower() for name in names]:
        raise InvalidField(field, "must not be the user name or the e-mail address")
    if password.lower() in COMMON_PASSWORDS:
        raise InvalidField(field, "is one of the most common passwords: choose another")


FORM_LIMITS: Any = {"max_fields": 16, "max_part_size": 4096}  # bytes of each: 64 KiB together


async def read_form(request: Request, parser: MultiPartParser | None = None) -> FormData:
    """A form in UTF-8 (415), which gives no field twice (422; RFC 6749, 3.2). `parser` reads a multipart form."""
    media_type, options = parse_options_header(request.headers.get("content-type"))
    # By this charset, and none of a part, Starlette decodes: on the event loop, 1 MB of `punycode` took 198 s.
    charset = options.get(b"charset", b"utf-8").decode("latin-1")
    if charset.lower() not in ("utf-8", "utf8"):
        raise HTTPException(415, f"Forms are in UTF-8; the Content-Type says {charset[:50]}.")
    if media_type not in (b"", b"multipart/form-data", b"application/x-www-form-urlencoded"):
        shown = media_type[:100].decode("latin-1")
        taken = "a form or JSON" if parser is None else "multipart/form-data"
        raise HTTPException(415, f"This path takes {taken}; the Content-Type says {shown}.")
    if parser is not None and media_type == b"multipart/form-data":
        try:
            request._form = await parser.parse()
        except MultiPartException as error:
            raise HTTPException(400, error.message) from None
    form = await request.form(**FORM_LIMITS)
    for name, count in Counter(name for name, _ in form.multi_items()).items():
        if count > 1:
            raise InvalidField(name, "is given more than once")
    return form


# --- tokens -------------------------------------------------------------------------------------------------------


class _SigningKey:
    """SECRET_KEY, or in development mode a random key from the database."""

    value = ""


def create_token(kind: str, login: LoginSession, issued: datetime, expires: datetime, jti: str) -> str:
    claims = {"sub": str(login.user_id), "sid": str(login.id), "iat": issued, "exp": expires, "jti": jti}
    return str(jwt.encode({**claims, "typ": kind}, _SigningKey.value, algorithm="HS256"))


class Claims(BaseModel):
    sub: Id
    sid: Id
    jti: str
    iat: FiniteFloat
    exp: FiniteFloat
    typ: str


@functools.lru_cache(1000)
def _decode(token: str, key: str) -> Claims:
    """The claims of a token with a valid signature, which never change."""
    # `verify_token` checks the expiry by our own clock; `Claims` requires one.
    return Claims.model_validate(jwt.decode(token, key, ["HS256"], options={"verify_exp": False}))


def verify_token(kind: str, token: str) -> Claims | None:
    """The claims of a valid token of this kind."""
    if len(token) > MAX_TOKEN:
        return None
    try:
        claims = _decode(token, _SigningKey.value)
    except (JWTError, ValidationError, RecursionError):
        return None
    now = models.utcnow().timestamp()
    # A clock that has gone back ends no session: the time of issue may lie ahead by as much as the token lives.
    is_valid = claims.typ == kind and claims.iat - now <= claims.exp - claims.iat and now < claims.exp
    return claims if is_valid else None


def sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def hmac_hash(*parts: object) -> str:
    """Short codes can't be guessed from these without the key."""
    text = ":".join(map(str, parts))
    return hmac.new(_SigningKey.value.encode(), text.encode(), hashlib.sha256).hexdigest()


# --- the current user ---------------------------------------------------------------------------------------------

bearer = OAuth2PasswordBearer(tokenUrl="login", auto_error=False)


def unauthorized(detail: str = "Sign in first: the token is missing, expired or revoked.") -> HTTPException:
    return HTTPException(401, detail, {"WWW-Authenticate": "Bearer"})


_PRINCIPAL = database.CompiledQuery(
    sa.select(col(User.id), col(User.username), col(User.role), col(LoginSession.id))
    .join_from(LoginSession, User, col(LoginSession.user_id) == col(User.id))
    .where(
        col(LoginSession.id) == sa.bindparam("session_id"),
        col(User.id) == sa.bindparam("user_id"),
        col(LoginSession.revoked_at).is_(None),
        col(User.is_active),
    )
)


def _find_principal(
    connection: Connection | Session, user_id: int, session_id: int, expires_at: float
) -> Principal | None:
    row = _PRINCIPAL.first(connection, {"user_id": user_id, "session_id": session_id})
    return None if row is None else Principal._make((*row, expires_at))


async def get_principal(token: Annotated[str | None, Depends(bearer)]) -> Principal | None:
    """The owner of the bearer token; None without one. 401 for an invalid token, even where none is needed."""
    if token is None:
        return None
    claims = verify_token("access", token)
    principal = await database.read(_find_principal, claims.sub, claims.sid, claims.exp) if claims else None
    if principal is None:
        raise unauthorized()
    return principal


async def is_token_valid(principal: Principal) -> bool:
    """Whether token, session and role are still valid: for responses that take long."""
    current = await database.read(_find_principal, principal.id, principal.session_id, principal.expires_at)
    return current == principal and models.utcnow().timestamp() < principal.expires_at


def authorized(change: database.Write[P, T]) -> database.Write[P, T]:
    """`change`, once its transaction has verified that the rights of the Principal among its arguments are still those
    that the token gave: 401 if the session has ended, or the account or its role has changed."""

    @functools.wraps(change)
    def checked(session: Session, /, *args: P.args, **kwargs: P.kwargs) -> T:
        for user in (each for each in (*args, *kwargs.values()) if isinstance(each, Principal)):
            if _find_principal(session, user.id, user.session_id, user.expires_at) != user:
                raise unauthorized()
        return change(session, *args, **kwargs)

    return checked


async def get_current_user(principal: Annotated[Principal | None, Depends(get_principal)]) -> Principal:
    if principal is None:
        raise unauthorized()
    return principal


Viewer = Annotated[Principal | None, Depends(get_principal)]
CurrentUser = Annotated[Principal, Depends(get_current_user)]


def require(is_allowed: Callable[[Principal], bool], refusal: str) -> Any:
    """A dependency: the current user, if allowed (403)."""

    async def check(user: CurrentUser) -> Principal:
        if not is_allowed(user):
            raise HTTPException(403, refusal)
        return user

    return Depends(check)


READERS_CAN_NOT_ADD = "Here only librarians and admins add books."
Staff = Annotated[Principal, require(lambda user: user.is_staff, "Only for: librarian, admin.")]
Admin = Annotated[Principal, require(lambda user: user.role == Role.admin, "Only for: admin.")]
Contributor = Annotated[Principal, require(lambda user: settings.readers_can_add or user.is_staff, READERS_CAN_NOT_ADD)]


# --- the first admin ----------------------------------------------------------------------------------------------


def prepare(session: Session) -> None:
    """Set the signing key and, on the first start, make the first admin. Safe in several processes at once."""
    password = settings.first_password
    admins = session.scalars(sa.select(User).where(col(User.role) == Role.admin)).all()
    if settings.secret_key is None:
        stored = session.get(Setting, "secret_key") or Setting(key="secret_key", value=secrets.token_hex(32))
        session.add(stored)
        _SigningKey.value = stored.value
        hint = " The first account is admin / admin." if settings.makes_admin_admin else ""
        log.warning("Development mode: SECRET_KEY is not set.%s", hint)
    else:
        _SigningKey.value = settings.secret_key.get_secret_value()
        _refuse_default_password(session)
    if password is None or admins:
        names = [admin.username.lower() for admin in admins]
        if password not in (None, "admin") and settings.admin_username.lower() not in names:
            log.warning("ADMIN_USERNAME is not made: there is an admin already, %s.", admins[0].username)
        return
    admin = User(
        username=TypeAdapter(Username).validate_python(settings.admin_username),
        email=TypeAdapter(EmailAddress).validate_python(settings.admin_email),
        password_hash=passwords.hash(password),
        role=Role.admin,
        email_verified_at=models.utcnow(),
    )
    session.add(admin)
    try:
        session.flush()
    except IntegrityError as error:
        field = database.violation(error).field
        raise RuntimeError(f"can't make the first admin: another account has this {field}. Set another one") from None
    if password != "admin":
        log.info("Made the first admin: %s.", admin.username)


def _refuse_default_password(session: Session) -> None:
    """Only development mode makes an account with the password `admin`: passwords have at least 8 characters."""
    names = sa.or_(col(User.role) == Role.admin, sa.func.lower(col(User.username)) == settings.admin_username.lower())
    for user in session.scalars(sa.select(User).where(names, col(User.is_active))):
        if passwords.verify("admin", user.password_hash):
            raise RuntimeError(
                f"the account {user.username} still has the password of development mode, admin. Start once without "
                "SECRET_KEY, sign in and change it (POST /auth/change-password)"
            )


# --- rate limits --------------------------------------------------------------------------------------------------


# Attempts from one address, of one account from one address, and of one account from all addresses, where a token is
# needed: elsewhere strangers could lock the account.
RATE_LIMITS = {
    "login": ("100 per 1 minute", "10 per 15 minutes"),
    "register": ("50 per 1 hour", "5 per 1 hour"),
    "refresh": ("60 per 1 minute", "30 per 1 minute"),
    "forgot": ("30 per 1 hour", "5 per 1 hour"),
    "reset": ("30 per 1 hour", "10 per 1 hour"),
    "verify": ("30 per 1 hour", "5 per 1 hour"),
    "password": ("30 per 1 hour", "10 per 1 hour", "20 per 1 hour"),
}
MAIL_LIMITS = ("10 per 1 hour", "1 per 1 minute")  # one of them must allow a mail that anybody can request


class _Limiters:
    """The counters in RATE_LIMIT_STORAGE, and those of this process for while it does not answer."""

    stored: FixedWindowRateLimiter
    local: FixedWindowRateLimiter


def open_rate_limits() -> None:
    """Call it on the event loop: the memory storage belongs to the one that first uses it."""
    options: Any = {"socket_timeout": 1, "socket_connect_timeout": 1, "implementation": "redispy"}  # for Redis
    storage: Any = storage_from_string(f"async+{settings.rate_limit_storage}", wrap_exceptions=True, **options)
    _Limiters.stored, _Limiters.local = FixedWindowRateLimiter(storage), FixedWindowRateLimiter(MemoryStorage())


async def check_rate_limit(action: str, request: Request, account: object = None) -> None:
    """Count an attempt. 429 with `Retry-After` where there have been too many."""
    for limit, key in _limits(action, request, account):
        if not await _use(FixedWindowRateLimiter.hit, limit, key):
            window = await _use(FixedWindowRateLimiter.get_window_stats, limit, key)
            seconds = max(1, math.ceil(window.reset_time - time.time()))
            raise HTTPException(429, f"Too many attempts. Try again in {seconds} s.", {"Retry-After": str(seconds)})


async def can_mail(action: str, account: str) -> bool:
    """Count a mail that anybody can request for this account. Never False for more than a minute: strangers must not
    keep its owner from asking."""
    if not settings.rate_limits:
        return True
    key = _key(action, account)
    return any([await _use(FixedWindowRateLimiter.hit, limits.parse(rate), key) for rate in MAIL_LIMITS])


async def uncount_attempt(action: str, request: Request) -> None:
    """A successful attempt does not count for its address, from which many may sign in."""
    for limit, key in _limits(action, request, None):
        await _use(functools.partial(FixedWindowRateLimiter.hit, cost=-1), limit, key)


async def reset_rate_limit(action: str, request: Request, account: object) -> None:
    """Forget the attempts on this account, after a successful one."""
    for limit, key in _limits(action, request, account)[1:]:
        await _use(FixedWindowRateLimiter.clear, limit, key)


def _limits(action: str, request: Request, account: object) -> list[tuple[limits.RateLimitItem, str]]:
    if not settings.rate_limits:
        return []
    address = client_address(request)
    keys = [f"{action} from {address}"]
    if account is not None:
        keys += [f"{_key(action, account)} from {address}", _key(action, account)]
    return [(limits.parse(rate), key) for rate, key in zip(RATE_LIMITS[action], keys, strict=False)]


def _key(action: str, account: object) -> str:
    # A hash: names may be long, and addresses do not belong into a shared storage.
    return f"{action} of {hashlib.blake2b(str(account).encode(), digest_size=16).hexdigest()}"


def client_address(request: Request) -> str:
    """The client's IP address; of IPv6 its /64 network, in which a host can take any address.

    Behind a proxy that uvicorn trusts (`--forwarded-allow-ips`), uvicorn has put the client's address here.
    """
    host = request.client.host if request.client else "nowhere"
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host[:100]
    if address.version == 4:
        return host
    return str(address.ipv4_mapped or ipaddress.ip_network((int(address), 64), strict=False))


async def _use(call: Callable[..., Awaitable[T]], limit: limits.RateLimitItem, key: str) -> T:
    try:
        return await call(_Limiters.stored, limit, key)
    except StorageError as error:
        log.error("RATE_LIMIT_STORAGE does not answer; counting in this process: %s", error)
        return await call(_Limiters.local, limit, key)
