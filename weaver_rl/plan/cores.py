"""Roles that compute on one CPU machine share its cores. It knows no roles, only threads.

Work is given in seconds that it takes alone. While more threads want to compute than there are cores, each gets the
same share of one: work of n threads among N on C cores goes on at C / N of its speed (processor sharing). Python that
runs on one core while the other threads of its process wait is not told apart from work on all of them, and neither
are caches and memory bandwidth, nor the driver, nor rewards that compute.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

EPSILON_S = 1e-9


def speed(num_threads: float, cores: float | None) -> float:
    """Of each, when so many threads want to compute."""
    return 1.0 if cores is None or num_threads <= cores else cores / num_threads


@dataclass(slots=True, eq=False)
class _Job:
    left: float
    num_threads: float
    done: asyncio.Future[None]


class SharedCores:
    """The cores of a machine; None: everybody has enough.

    Args:
        num: how many.
        now: the clock, that of the running loop.
    """

    def __init__(self, num: float | None, now: Callable[[], float]) -> None:
        self._num = num
        self._now = now
        self._jobs: set[_Job] = set()
        self._settled_at = 0.0
        self._timer: asyncio.TimerHandle | None = None

    async def work(self, seconds: float, num_threads: float) -> None:
        """Returns when work that takes so long alone is done."""
        if seconds <= 0:
            return
        if self._num is None:
            await asyncio.sleep(seconds)
            return
        job = _Job(seconds, num_threads, asyncio.get_running_loop().create_future())
        self._settle()
        self._jobs.add(job)
        self._arm()
        try:
            await job.done
        finally:
            if job in self._jobs:
                self._settle()
                self._jobs.discard(job)
                self._arm()

    def _speed(self) -> float:
        return speed(sum(job.num_threads for job in self._jobs), self._num)

    def _settle(self) -> None:
        now = self._now()
        passed = (now - self._settled_at) * self._speed()
        self._settled_at = now
        for job in self._jobs:
            job.left -= passed

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._jobs:
            seconds = max(0.0, min(job.left for job in self._jobs)) / self._speed()
            self._timer = asyncio.get_running_loop().call_later(seconds, self._ring)

    def _ring(self) -> None:
        self._timer = None
        self._settle()
        ended = [job for job in self._jobs if job.left <= EPSILON_S]
        for job in ended:
            self._jobs.discard(job)
            if not job.done.done():
                job.done.set_result(None)
        self._arm()
