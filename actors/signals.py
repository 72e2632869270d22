"""SIGINT, SIGTERM and SIGHUP of a run: the first stops it, clean-ups are finished in peace. It knows no Ray."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from types import FrameType
from typing import Any, Self

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
KILLS_AT = 3
"""The user insists: this many signals end the process whatever it is doing; Ray and the reward workers go with it."""


class StopSignals:
    """A context manager that owns the signals of the process; outside of `running` the first raises KeyboardInterrupt.

    Example:
        with StopSignals() as stop:
            with stop.deferred():
                ray.init()
            stop.check()
    """

    def __init__(self) -> None:
        self._received: list[str] = []
        self._num_deferred = 0
        self._cancel: Any = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.getsignal(number) for number in STOPPING}
        self.install()
        return self

    def __exit__(self, *_exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def install(self) -> None:
        """Takes the signals (again: `ray.init` puts handlers of its own in place).

        Those that were ignored stay so: under `nohup` a closed terminal must not end the run.
        """
        for number, before in self._before.items():
            signal.signal(number, signal.SIG_IGN if before is signal.SIG_IGN else self._handle)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """A clean-up, or a start that must not be cut in half: signals are noted, and `check` says so afterwards."""
        self._num_deferred += 1
        try:
            yield
        finally:
            self._num_deferred -= 1

    def check(self) -> None:
        """Raises KeyboardInterrupt if a signal came while it was deferred."""
        if self._received:
            raise KeyboardInterrupt(self._received[0])

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Within it the first signal cancels the current task, which comes out as KeyboardInterrupt."""
        self.check()
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        # From a signal handler only this wakes a loop that waits in its selector.
        self._cancel = lambda: loop.call_soon_threadsafe(task.cancel)
        try:
            yield
        except asyncio.CancelledError:
            self.check()
            raise
        finally:
            self._cancel = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._received.append(signal.Signals(number).name)
        if len(self._received) >= KILLS_AT:
            os.kill(os.getpid(), signal.SIGKILL)
        if len(self._received) > 1 or self._num_deferred:
            sys.stderr.write(f"{self._received[-1]}: ending the run; once or twice more kills it\n")
        elif self._cancel is not None:
            self._cancel()
        else:
            raise KeyboardInterrupt(self._received[0])
