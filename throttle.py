"""Rate limits on what could be guessed, flooded, or made to send mail: per address and per account."""

import functools
import hashlib
import ipaddress
import logging
import math
import time
from collections.abc import Callable
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

import anyio.to_thread
import limits
from fastapi import HTTPException, Request
from limits.errors import StorageError
from limits.storage import MemoryStorage, storage_from_string
from limits.strategies import FixedWindowRateLimiter

from settings import settings

log = logging.getLogger("books.throttle")
T = TypeVar("T")
P = ParamSpec("P")


class Allowed(NamedTuple):
    """How many attempts. `together` is for one account from one address; the limit for an account from all addresses
    is wider, so that it takes many addresses to lock somebody else out."""

    address: str
    together: str
    account: str


LIMITS = {
    "login": Allowed("100 per 1 minute", "10 per 15 minutes", "100 per 1 hour"),
    "register": Allowed("50 per 1 hour", "5 per 1 hour", "10 per 1 hour"),
    "refresh": Allowed("60 per 1 minute", "30 per 1 minute", "60 per 1 minute"),
    "forgot": Allowed("30 per 1 hour", "5 per 1 hour", "10 per 1 hour"),
    "reset": Allowed("30 per 1 hour", "10 per 1 hour", "30 per 1 hour"),
    "verify": Allowed("30 per 1 hour", "5 per 1 hour", "10 per 1 hour"),
    "password": Allowed("30 per 1 hour", "10 per 1 hour", "20 per 1 hour"),
}


class _Counters:
    """This process's own, and those that RATE_LIMIT_STORAGE shares between processes, if it does."""

    own = FixedWindowRateLimiter(MemoryStorage())
    shared: FixedWindowRateLimiter | None = None


def open_counters() -> None:
    _Counters.own.storage.reset()
    _Counters.shared = None
    if not settings.rate_limit_storage.startswith("memory:"):
        patience = {"socket_timeout": 1, "socket_connect_timeout": 1}
        storage = storage_from_string(settings.rate_limit_storage, wrap_exceptions=True, **patience)
        _Counters.shared = FixedWindowRateLimiter(storage)


async def check(action: str, request: Request, account: object = None) -> None:
    """Count an attempt at `action`, or refuse it: 429 that says when to come back."""
    if seconds := await wait_for(action, request, account):
        raise HTTPException(429, f"Too many attempts. Try again in {seconds} s.", {"Retry-After": str(seconds)})


async def wait_for(action: str, request: Request, account: object = None) -> int:
    """Count an attempt: 0, or the seconds until the next one may be made."""
    if settings.rate_limits:
        for limit, key in _keys(action, request, account):
            if seconds := await _run(_hit, limit, key):
                return seconds
    return 0


async def forgive(action: str, request: Request, account: object) -> None:
    """Forget the attempts on this account: its owner has come in."""
    if settings.rate_limits:
        for limit, key in _keys(action, request, account)[1:]:
            await _run(FixedWindowRateLimiter.clear, limit, key)


def _keys(action: str, request: Request, account: object) -> list[tuple[limits.RateLimitItem, str]]:
    allowed, address = LIMITS[action], address_of(request)
    keys = [(limits.parse(allowed.address), f"{action} from {address}")]
    if account is not None:
        # A hash: what was typed may be long, and somebody's address is nobody's business in a shared storage.
        name = hashlib.blake2b(str(account).encode(), digest_size=16).hexdigest()
        keys.append((limits.parse(allowed.together), f"{action} of {name} from {address}"))
        keys.append((limits.parse(allowed.account), f"{action} of {name}"))
    return keys


def address_of(request: Request) -> str:
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
