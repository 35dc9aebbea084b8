"""What API keys use of what they may: requests, tokens, and what is running. Per process."""

import math
import time
from collections import Counter

from limits import RateLimitItem, RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter, MovingWindowRateLimiter, RateLimiter

from server.errors import RateLimited
from server.keys import Key


class Quotas:
    """Counts for each key what its limits are about, but for stored bytes: the registry knows them.

    Requests are those of the last sixty seconds. Tokens are counted when a request ends, since
    nobody knows them before, in minutes that begin with the first: a key that has used up one is
    refused until the next.
    """

    def __init__(self) -> None:
        storage = MemoryStorage()
        self._requests = MovingWindowRateLimiter(storage)
        self._tokens = FixedWindowRateLimiter(storage)
        self._running: Counter[str] = Counter()

    def enter(self, key: Key) -> None:
        """Counts a request that begins. Raises RateLimited, and then it is not counted."""
        limits = key.limits
        if limits.concurrent_requests and self._running[key.id] >= limits.concurrent_requests:
            raise RateLimited(
                f"This key may have {limits.concurrent_requests} requests at once, and has them.", 1
            )
        item = _tokens(key)
        if item is not None and not self._tokens.test(item, key.id):
            raise _used_up(self._tokens, item, key, "tokens")
        if limits.requests_per_minute:
            item = RateLimitItemPerMinute(limits.requests_per_minute, namespace="requests")
            if not self._requests.hit(item, key.id):
                raise _used_up(self._requests, item, key, "requests")
        self._running[key.id] += 1

    def leave(self, key: Key, tokens: int = 0) -> None:
        """Counts that a request has ended, and the tokens that it took."""
        self._running[key.id] -= 1
        if not self._running[key.id]:
            del self._running[key.id]
        if tokens and (item := _tokens(key)) is not None:
            self._tokens.hit(item, key.id, cost=tokens)


def _tokens(key: Key) -> RateLimitItem | None:
    limit = key.limits.tokens_per_minute
    return RateLimitItemPerMinute(limit, namespace="tokens") if limit else None


def _used_up(limiter: RateLimiter, item: RateLimitItem, key: Key, what: str) -> RateLimited:
    wait = math.ceil(limiter.get_window_stats(item, key.id).reset_time - time.time())
    return RateLimited(f"This key may use {item.amount} {what} a minute, and has.", max(1, wait))
