"""Where the time of a step goes: seconds by stage that add up to the step's wall time. It knows no run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from weaver_rl.spans import span


class StageClock:
    """Times the stages of one step; they must not overlap.

    Example:
        clock = StageClock()
        with clock.stage("sample"):
            ...
        clock.metrics()  # {"seconds/sample": 1.2, "seconds/other": 0.01, "seconds/step": 1.21}
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._started = now()
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time of the block to `name`; it is a span, too: by it the ledger tells what was waited for."""
        begin = self._now()
        try:
            with span(f"controller/{name}"):
                yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._now() - begin

    def seconds(self, name: str) -> float:
        """Time spent in one stage so far."""
        return self._seconds.get(name, 0.0)

    def elapsed(self) -> float:
        """Time since the step began."""
        return self._now() - self._started

    def metrics(self) -> dict[str, float]:
        """All stages, what is outside them as `other`, and the whole as `step`."""
        elapsed = self.elapsed()
        known = {f"seconds/{name}": seconds for name, seconds in self._seconds.items()}
        return known | {"seconds/other": max(0.0, elapsed - sum(known.values())), "seconds/step": elapsed}
