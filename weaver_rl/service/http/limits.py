"""How often one API key may call, a token bucket for each, and how many bytes all bodies in flight may have together.

Operations in flight are the service's to count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from weaver_rl.errors import ServiceError
from weaver_rl.service.config import LimitsConfig

BODY_RETRY_AFTER_S = 2.0


class RequestRate:
    """Buckets of `burst` requests that fill up at `requests_per_s`.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, config: LimitsConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_s = config.requests_per_s
        self._burst = float(config.burst)
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}
        """Of each owner: tokens left, and when that was."""

    def take(self, owner: str) -> None:
        """Counts one request. Raises ServiceError 429 (`rate_limited`, retryable) when there were too many."""
        now = self._clock()
        tokens, then = self._buckets.get(owner, (self._burst, now))
        tokens = min(self._burst, tokens + (now - then) * self._per_s)
        if tokens < 1.0:
            self._buckets[owner] = (tokens, now)
            raise ServiceError(
                "rate_limited",
                f"more than {self._per_s:g} requests a second (at most {self._burst:g} at once) with this API key",
                status=429,
                retryable=True,
                details={"retry_after": round((1.0 - tokens) / self._per_s, 3)},
            )
        self._buckets[owner] = (tokens - 1.0, now)


class BodyBudget:
    """Bytes for the bodies of all requests in flight together. To be used from one event loop."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._left_bytes = limit_bytes

    @contextmanager
    def share(self) -> Iterator[BodyShare]:
        """What one request has of it, for the length of a block."""
        share = BodyShare(self)
        try:
            yield share
        finally:
            self._left_bytes += share.num_bytes

    def take(self, num_bytes: int) -> None:
        """Raises ServiceError 429 (`rate_limited`, retryable) when so much is not left."""
        if num_bytes > self._left_bytes:
            raise ServiceError(
                "rate_limited",
                f"the bodies of all requests together may have {self._limit_bytes} bytes, of which "
                f"{self._left_bytes} are left just now",
                status=429,
                retryable=True,
                details={"retry_after": BODY_RETRY_AFTER_S},
            )
        self._left_bytes -= num_bytes


class BodyShare:
    """One request's part of a `BodyBudget`."""

    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self.num_bytes = 0

    def grow_to(self, num_bytes: int) -> None:
        """The body has so many bytes, or will; what was announced is taken only once. Raises as `take` does."""
        more = num_bytes - self.num_bytes
        if more > 0:
            self._budget.take(more)
            self.num_bytes = num_bytes
