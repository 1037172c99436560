"""Rate limits on what could be guessed, flooded, or made to send mail: per address and per account."""

import functools
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
from limits.strategies import MovingWindowRateLimiter

from settings import settings

log = logging.getLogger("books.throttle")
T = TypeVar("T")
P = ParamSpec("P")


class Allowed(NamedTuple):
    by_address: str
    by_account: str


LIMITS = {
    "login": Allowed("100 per 1 minute", "10 per 15 minutes"),  # for an account, those since the last that succeeded
    "register": Allowed("50 per 1 hour", "5 per 1 hour"),
    "refresh": Allowed("60 per 1 minute", "30 per 1 minute"),
    "forgot": Allowed("30 per 1 hour", "5 per 1 hour"),
    "reset": Allowed("30 per 1 hour", "10 per 1 hour"),
    "verify": Allowed("30 per 1 hour", "5 per 1 hour"),
}


class _Counters:
    """This process's own, and those that RATE_LIMIT_STORAGE shares between processes, if it does."""

    own = MovingWindowRateLimiter(MemoryStorage())
    shared: MovingWindowRateLimiter | None = None


def open_counters() -> None:
    _Counters.own.storage.reset()
    _Counters.shared = None
    if not settings.rate_limit_storage.startswith("memory:"):
        patience = {"socket_timeout": 1, "socket_connect_timeout": 1}
        storage = storage_from_string(settings.rate_limit_storage, wrap_exceptions=True, **patience)
        _Counters.shared = MovingWindowRateLimiter(storage)


async def check(action: str, request: Request, account: object = None) -> None:
    """Count an attempt at `action`, or refuse it: 429 that says when to come back."""
    if not settings.rate_limits:
        return
    for limit, key in _keys(action, request, account):
        seconds = await _run(_hit, limit, key)
        if seconds:
            raise HTTPException(429, f"Too many attempts. Try again in {seconds} s.", {"Retry-After": str(seconds)})


async def forgive(action: str, request: Request, account: object) -> None:
    """Forget the attempts on this account: its owner has come in."""
    if settings.rate_limits:
        _, (limit, key) = _keys(action, request, account)
        await _run(MovingWindowRateLimiter.clear, limit, key)


def _keys(action: str, request: Request, account: object) -> list[tuple[limits.RateLimitItem, str]]:
    allowed = LIMITS[action]
    keys = [(limits.parse(allowed.by_address), f"{action} from {address_of(request)}")]
    if account is not None:
        keys.append((limits.parse(allowed.by_account), f"{action} of {account}"))
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


def _hit(limiter: MovingWindowRateLimiter, limit: limits.RateLimitItem, key: str) -> int:
    """Count it: 0, or the seconds until there is room again."""
    if limiter.hit(limit, key):
        return 0
    return max(1, math.ceil(limiter.get_window_stats(limit, key).reset_time - time.time()))


async def _run(use: Callable[Concatenate[MovingWindowRateLimiter, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Use the shared counters, or our own where there are none, or while they do not answer."""
    if _Counters.shared is not None:
        try:
            return await anyio.to_thread.run_sync(functools.partial(use, _Counters.shared, *args, **kwargs))
        except StorageError as error:
            log.error("RATE_LIMIT_STORAGE does not answer; counting in this process: %s", error)
    return use(_Counters.own, *args, **kwargs)
