"""Turns at actors that do one thing at a time. It does not know what they do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from weaver_rl.errors import LearnerLostError

T = TypeVar("T")


class Turns:
    """One call after the other, in the order in which they were asked for.

    A call that nobody waits for any more goes on in its actor: it keeps its turn until it has ended, and what it
    found out about the actor is told to the next.
    """

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._loss: LearnerLostError | None = None

    async def run(self, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """What the call returns. If this is cancelled before its turn the call is never made.

        Raises:
            LearnerLostError: the actor was lost by a call that nobody waited for; or what the call raises.
        """
        await self._turn.acquire()
        if self._loss is not None:
            self._turn.release()
            raise LearnerLostError(str(self._loss))
        is_abandoned = False

        def ended(task: asyncio.Task[T]) -> None:
            error = None if task.cancelled() else task.exception()
            if is_abandoned and isinstance(error, LearnerLostError):
                self._loss = error
            self._turn.release()

        # Its own task from here on, without an await between: the turn ends with it and not with who waits for it.
        task = asyncio.create_task(call())
        task.add_done_callback(ended)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            is_abandoned = True
            raise
