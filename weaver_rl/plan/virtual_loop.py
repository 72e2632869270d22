"""An event loop whose time jumps to the next timer when nothing is ready. It knows nothing of runs.

Threads stay real: while one is at work that somebody awaits, time stands still. When nothing is ready, no timer is set
and no thread is at work, nothing can ever happen any more: that is a deadlock, and raised as one.
"""

from __future__ import annotations

import asyncio
import contextlib
import selectors
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

from weaver_rl.errors import WeaverRLError

T = TypeVar("T")

REAL_PATIENCE_S = 20.0
"""Real seconds that a thread may take."""


class DeadlockError(WeaverRLError, AssertionError):
    """Nothing can ever happen any more; the message has what every task waits in."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """Timers cost no time; `time` is virtual seconds from 0 on."""

    def __init__(self) -> None:
        self._virtual_now = 0.0
        self._num_real = 0
        self.errors: list[dict[str, Any]] = []
        super().__init__(_JumpingSelector(self))
        self.set_exception_handler(lambda _, context: self.errors.append(context))

    def time(self) -> float:
        return self._virtual_now

    def spend(self, seconds: float) -> None:
        """The loop's own thread is busy for so long: what is due meanwhile happens, late, after it."""
        self._virtual_now += seconds

    @contextlib.contextmanager
    def real_work(self) -> Iterator[None]:
        """A thread is at work on what the block awaits."""
        self._num_real += 1
        try:
            yield
        finally:
            self._num_real -= 1

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Any, *args: Any
    ) -> Any:
        future = super().run_in_executor(executor, func, *args)
        work = self.real_work()
        work.__enter__()
        future.add_done_callback(lambda _: work.__exit__(None, None, None))
        return future

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        with self.real_work():
            await super().shutdown_default_executor()

    def jump(self, seconds: float | None) -> None:
        """Lets time pass until the next timer; None: there is none."""
        if seconds is None:
            stacks = "\n".join(sorted(_place(task) for task in asyncio.all_tasks(self)))
            raise DeadlockError(f"at {self._virtual_now:.1f} s nothing can happen any more:\n{stacks}")
        self._virtual_now += seconds

    @property
    def waits_for_threads(self) -> bool:
        return self._num_real > 0


class _JumpingSelector(selectors.DefaultSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if ready or (timeout is not None and timeout <= 0):
            return ready
        if not self._loop.waits_for_threads:
            self._loop.jump(timeout)
            return []
        if not (ready := super().select(REAL_PATIENCE_S)):
            raise DeadlockError(f"a thread did not answer for {REAL_PATIENCE_S:g} real seconds")
        return ready


def run_virtually(work: Coroutine[Any, Any, T]) -> T:
    """Runs to the end on a loop of its own, like `asyncio.run`; what a task or callback failed with unseen fails it."""
    loop = VirtualLoop()
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        result = runner.run(work)
    if loop.errors:
        raise loop.errors[0].get("exception") or AssertionError(loop.errors[0]["message"])
    return result


def _place(task: asyncio.Task[Any]) -> str:
    """The innermost line that a task stands in."""
    coroutine: Any = task.get_coro()
    frames = []
    while coroutine is not None:
        frame = getattr(coroutine, "cr_frame", None) or getattr(coroutine, "ag_frame", None)
        if frame is None:
            break
        frames.append(f"{frame.f_code.co_name}:{frame.f_lineno}")
        coroutine = getattr(coroutine, "cr_await", None) or getattr(coroutine, "ag_await", None)
    return f"{task.get_name()}: {' > '.join(frames)}"
