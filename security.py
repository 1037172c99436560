"""Password hashing, JWTs, the current-user dependency, roles, rate limits and the first admin."""

import asyncio
import functools
import hashlib
import hmac
import ipaddress
import logging
import math
import multiprocessing
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Annotated, Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import anyio.to_thread
import limits
import sqlalchemy as sa
from fastapi import Depends, HTTPException, Request
from fastapi.security import OAuth2PasswordBearer
from jose import JWTError, jwt
from limits.errors import StorageError
from limits.storage import MemoryStorage, storage_from_string
from limits.strategies import FixedWindowRateLimiter
from passlib.context import CryptContext
from pydantic import BaseModel, FiniteFloat, TypeAdapter, ValidationError
from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlmodel import Session, col

import database
import models
from database import CompiledQuery, connection_of
from models import LoginSession, Principal, Role, Setting, User
from schemas import EmailAddress, Id, Username, invalid_body
from settings import COMMON_PASSWORDS, settings

log = logging.getLogger("books.security")
MAX_TOKEN = 4000  # characters; ours have some 300

# --- passwords ----------------------------------------------------------------------------------------------------

# OWASP's second set for argon2id: 19 MiB a hash. The library's default of 64 MiB, times the threads of a busy
# server, would not fit into 512 MB.
passwords = CryptContext(
    schemes=["argon2"], argon2__type="id", argon2__memory_cost=19456, argon2__time_cost=2, argon2__parallelism=1
)
# At most two at once, off the event loop: enough to use both cores, and a flood of logins waits here, not elsewhere.
hashers = ThreadPoolExecutor(max_workers=2, thread_name_prefix="argon2")
# Verified where there is no such user, so that the answer takes the same time.
DUMMY_PASSWORD_HASH = passwords.hash(secrets.token_urlsafe())


async def hash_password(password: str) -> str:
    return await asyncio.get_running_loop().run_in_executor(hashers, passwords.hash, password)


async def verify_password(password: str, password_hash: str) -> tuple[bool, str | None]:
    """Whether it is the right one, and a new hash of it where the old one was made with other parameters."""
    verify = passwords.verify_and_update
    right, new_hash = await asyncio.get_running_loop().run_in_executor(hashers, verify, password, password_hash)
    return right, new_hash


def check_password_strength(field: str, password: str, *names: str) -> None:
    """422 for a password that is somebody's first guess."""
    if password.lower() in [name.lower() for name in names]:
        raise invalid_body(field, "must not be the user name or the e-mail address")
    if password.lower() in COMMON_PASSWORDS:
        raise invalid_body(field, "is one of the most common passwords: choose another")


async def reject_repeated_fields(request: Request) -> None:
    """Refuse a form that gives a field twice (RFC 6749, 3.2): else the last counts, and nobody is told."""
    names = [name for name, _ in (await request.form()).multi_items()]
    for name in names:
        if names.count(name) > 1:
            raise invalid_body(name, "is given more than once")


# --- tokens -------------------------------------------------------------------------------------------------------


class _SigningKey:
    """What signs tokens: SECRET_KEY, or in development mode a random key from the database."""

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
    """What a token with a good signature says: that never changes. Whether its login still lives is not asked here."""
    # Whether it has expired is asked of our own clock; that it has an expiry, Claims insists on.
    return Claims.model_validate(jwt.decode(token, key, ["HS256"], options={"verify_exp": False}))


def verify_token(kind: str, token: str) -> Claims | None:
    """The claims of a token of this kind, or None. Tokens of one kind never pass for another."""
    if len(token) > MAX_TOKEN:
        return None
    try:
        claims = _decode(token, _SigningKey.value)
    except (JWTError, ValidationError, RecursionError):
        return None
    now = models.utcnow().timestamp()
    issued_later = claims.iat > now + 60  # a minute, for clocks that differ
    return None if claims.typ != kind or issued_later or claims.exp <= now else claims


def sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def hmac_hash(*parts: object) -> str:
    """A hash that nobody can try values against without the key: the database alone does not give a code away."""
    text = ":".join(map(str, parts))
    return hmac.new(_SigningKey.value.encode(), text.encode(), hashlib.sha256).hexdigest()


# --- who is asking ------------------------------------------------------------------------------------------------

bearer = OAuth2PasswordBearer(tokenUrl="login", auto_error=False)


def unauthorized(detail: str = "Sign in first: the token is missing, expired or revoked.") -> HTTPException:
    return HTTPException(401, detail, {"WWW-Authenticate": "Bearer"})


_PRINCIPAL = CompiledQuery(
    sa.select(col(User.id), col(User.username), col(User.role), col(LoginSession.id))
    .join_from(LoginSession, User, col(LoginSession.user_id) == col(User.id))
    .where(
        col(LoginSession.id) == sa.bindparam("session_id"),
        col(User.id) == sa.bindparam("user_id"),
        col(LoginSession.revoked_at).is_(None),
        col(User.is_active),
    )
)


def _find_principal(connection: Connection, user_id: int, session_id: int, expires_at: float) -> Principal | None:
    row = _PRINCIPAL.first(connection, {"user_id": user_id, "session_id": session_id})
    return None if row is None else Principal._make((*row, expires_at))


async def get_principal(token: Annotated[str | None, Depends(bearer)]) -> Principal | None:
    """Who signed in, None without a token. A token that is no good is an error even where none is needed."""
    if token is None:
        return None
    claims = verify_token("access", token)
    principal = None
    if claims is not None:
        principal = await database.read(_find_principal, claims.sub, claims.sid, claims.exp)
    if principal is None:
        raise unauthorized()
    return principal


async def is_token_valid(principal: Principal) -> bool:
    """Whether the token is still good, and its owner still who they were: for answers that take long."""
    now = await database.read(_find_principal, principal.id, principal.session_id, principal.expires_at)
    return now == principal and models.utcnow().timestamp() < principal.expires_at


def check_still_authorized(session: Session, principal: Principal) -> None:
    """In a change of an account, which may have waited for others: what it rests on may be gone meanwhile."""
    asked = principal.id, principal.session_id, principal.expires_at
    if _find_principal(connection_of(session), *asked) != principal:
        raise unauthorized()


async def get_current_user(principal: Annotated[Principal | None, Depends(get_principal)]) -> Principal:
    if principal is None:
        raise unauthorized()
    return principal


Viewer = Annotated[Principal | None, Depends(get_principal)]
CurrentUser = Annotated[Principal, Depends(get_current_user)]


def require(*roles: Role) -> Any:
    """A dependency: the user who asks, who must have one of these roles."""

    async def check(user: CurrentUser) -> Principal:
        if user.role not in roles:
            raise HTTPException(403, f"Only for: {', '.join(roles)}.")
        return user

    return Depends(check)


Staff = Annotated[Principal, require(Role.librarian, Role.admin)]
Admin = Annotated[Principal, require(Role.admin)]


async def get_contributor(user: CurrentUser) -> Principal:
    if not (settings.readers_can_add or user.is_staff):
        raise HTTPException(403, "Here only librarians and admins add books.")
    return user


Contributor = Annotated[Principal, Depends(get_contributor)]


# --- the first start ----------------------------------------------------------------------------------------------


def prepare() -> None:
    """Set the signing key, and on the first start make the first admin. Safe in several processes at once."""
    database.write_sync(_prepare)
    if settings.development:
        _tell_of_development_mode()


def _prepare(session: Session) -> None:
    password = settings.admin_password.get_secret_value() if settings.admin_password else None
    if settings.secret_key is None:
        kept = session.get(Setting, "secret_key") or Setting(key="secret_key", value=secrets.token_hex(32))
        session.add(kept)
        _SigningKey.value = kept.value
        password = password or "admin"
    else:
        _SigningKey.value = settings.secret_key.get_secret_value()
        _replace_development_passwords(session, password)
    admins = session.scalars(sa.select(User).where(col(User.role) == Role.admin)).all()
    if password is None or admins:
        if password not in (None, "admin") and settings.admin_username.lower() not in [
            a.username.lower() for a in admins
        ]:
            log.warning("ADMIN_USERNAME is not made: there is an admin already, %s.", admins[0].username)
        return
    if password in COMMON_PASSWORDS:
        log.warning("ADMIN_PASSWORD is one of the most common passwords: change it.")
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
        raise RuntimeError(f"can't make the first admin: somebody else has this {field}. Set another one") from None
    if password == "admin":
        session.merge(Setting(key="open_hash", value=admin.password_hash))
    else:
        log.info("Made the first admin: %s.", admin.username)


def _tell_of_development_mode() -> None:
    """At each start, by one of its workers."""
    try:
        first, open_to_all = database.write_sync(_look_around)
    except OperationalError:  # a full disk: nothing can be kept
        first, open_to_all = True, None
    if first:
        hint = f" Sign in as {open_to_all} / admin." if open_to_all else ""
        log.warning("Development mode: SECRET_KEY is not set.%s", hint)


def _look_around(session: Session) -> tuple[bool, str | None]:
    """Whether no other worker has told of this start, and which admin still has the password `admin`: the one whose
    hash is the one that was made of it."""
    start = sha256(multiprocessing.current_process().authkey.hex())  # random, and the same for all its workers
    kept = session.get(Setting, "last_start") or Setting(key="last_start", value="")
    first, kept.value = kept.value != start, start
    session.add(kept)
    made = sa.select(col(Setting.value)).where(col(Setting.key) == "open_hash").scalar_subquery()
    theirs = sa.select(col(User.username)).where(col(User.password_hash) == made, col(User.is_active))
    return first, session.scalars(theirs).first()


def _replace_development_passwords(session: Session, password: str | None) -> None:
    """A database that was begun in development mode must not go public with its `admin` / `admin`, whatever that
    account has become since."""
    made = sa.select(col(Setting.value)).where(col(Setting.key) == "open_hash").scalar_subquery()
    may_have_it = sa.or_(col(User.role) == Role.admin, col(User.password_hash) == made)
    for admin in session.scalars(sa.select(User).where(may_have_it)):
        if not passwords.verify("admin", admin.password_hash):
            continue
        if password is None:
            raise RuntimeError(f"{admin.username} still has the password of development mode: set ADMIN_PASSWORD")
        admin.password_hash = passwords.hash(password)
        log.warning("%s had the password of development mode: it is ADMIN_PASSWORD now.", admin.username)


T = TypeVar("T")
P = ParamSpec("P")


class RateLimit(NamedTuple):
    """How many attempts. `together` is for one account from one address; the limit for an account from all addresses
    is wider, so that it takes many addresses to lock somebody else out."""

    address: str
    together: str
    account: str


RATE_LIMITS = {
    "login": RateLimit("100 per 1 minute", "10 per 15 minutes", "100 per 1 hour"),
    "register": RateLimit("50 per 1 hour", "5 per 1 hour", "10 per 1 hour"),
    "refresh": RateLimit("60 per 1 minute", "30 per 1 minute", "60 per 1 minute"),
    "forgot": RateLimit("30 per 1 hour", "5 per 1 hour", "10 per 1 hour"),
    "reset": RateLimit("30 per 1 hour", "10 per 1 hour", "30 per 1 hour"),
    "verify": RateLimit("30 per 1 hour", "5 per 1 hour", "10 per 1 hour"),
    "password": RateLimit("30 per 1 hour", "10 per 1 hour", "20 per 1 hour"),
}


class _Counters:
    """This process's own, and those that RATE_LIMIT_STORAGE shares between processes, if it does."""

    own = FixedWindowRateLimiter(MemoryStorage())
    shared: FixedWindowRateLimiter | None = None


def open_rate_limits() -> None:
    _Counters.own.storage.reset()
    _Counters.shared = None
    if not settings.rate_limit_storage.startswith("memory:"):
        patience = {"socket_timeout": 1, "socket_connect_timeout": 1}
        storage = storage_from_string(settings.rate_limit_storage, wrap_exceptions=True, **patience)
        _Counters.shared = FixedWindowRateLimiter(storage)


async def check_rate_limit(action: str, request: Request, account: object = None) -> None:
    """Count an attempt at `action`, or refuse it: 429 that says when to come back."""
    if seconds := await hit_rate_limit(action, request, account):
        raise HTTPException(429, f"Too many attempts. Try again in {seconds} s.", {"Retry-After": str(seconds)})


async def hit_rate_limit(action: str, request: Request, account: object = None) -> int:
    """Count an attempt: 0, or the seconds until the next one may be made."""
    if settings.rate_limits:
        for limit, key in _keys(action, request, account):
            if seconds := await _run(_hit, limit, key):
                return seconds
    return 0


async def reset_rate_limit(action: str, request: Request, account: object) -> None:
    """Forget the attempts on this account: its owner has come in."""
    if settings.rate_limits:
        for limit, key in _keys(action, request, account)[1:]:
            await _run(FixedWindowRateLimiter.clear, limit, key)


def _keys(action: str, request: Request, account: object) -> list[tuple[limits.RateLimitItem, str]]:
    allowed, address = RATE_LIMITS[action], client_address(request)
    keys = [(limits.parse(allowed.address), f"{action} from {address}")]
    if account is not None:
        # A hash: what was typed may be long, and somebody's address is nobody's business in a shared storage.
        name = hashlib.blake2b(str(account).encode(), digest_size=16).hexdigest()
        keys.append((limits.parse(allowed.together), f"{action} of {name} from {address}"))
        keys.append((limits.parse(allowed.account), f"{action} of {name}"))
    return keys


def client_address(request: Request) -> str:
    """Where a request comes from. An IPv6 network of 64 bits is one place: each of its hosts can take any address.

    Behind a proxy, uvicorn puts the client's address here, if it was told to trust that proxy.
    """
    host = request.client.host if request.client else "nowhere"
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host[:100]
    if address.version == 4:
        return host
    return str(address.ipv4_mapped or ipaddress.ip_network((int(address), 64), strict=False))


def _hit(limiter: FixedWindowRateLimiter, limit: limits.RateLimitItem, key: str) -> int:
    """Count it: 0, or the seconds until there is room again."""
    if limiter.hit(limit, key):
        return 0
    return max(1, math.ceil(limiter.get_window_stats(limit, key).reset_time - time.time()))


async def _run(use: Callable[Concatenate[FixedWindowRateLimiter, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Use the shared counters, or our own where there are none, or while they do not answer."""
    if _Counters.shared is not None:
        try:
            return await anyio.to_thread.run_sync(functools.partial(use, _Counters.shared, *args, **kwargs))
        except StorageError as error:
            log.error("RATE_LIMIT_STORAGE does not answer; counting in this process: %s", error)
    return use(_Counters.own, *args, **kwargs)
