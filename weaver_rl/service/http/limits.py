"""How often one API key may call: a token bucket for each. Operations in flight are the service's to count."""

from __future__ import annotations

import time
from collections.abc import Callable

from weaver_rl.errors import ServiceError
from weaver_rl.service.config import LimitsConfig


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
