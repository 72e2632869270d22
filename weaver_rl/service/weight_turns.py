"""Who may use an engine that holds one set of weights at a time. It knows no engine and no files.

- `using`  produces the right to use the engine with some weights; waits for the requests with other weights that are in
           flight; unblocked by the end of the last of them, or by a load that failed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from typing import Generic, TypeVar

from weaver_rl.waits import current_waits

K = TypeVar("K", bound=Hashable)


class WeightTurns(Generic[K]):
    """Lets requests with the same weights run side by side, and those with different weights take turns.

    Requests with the current weights join while nobody else waits, or until somebody else has waited for `turn_s`;
    then those in flight end, the weights of whoever waited longest are loaded, and all who wait for them go on.

    Args:
        name: what waits call the engine.
        load: puts weights into the engine; called with nothing in flight.
        turn_s: how long a turn may go on while somebody else waits.
    """

    def __init__(
        self,
        name: str,
        load: Callable[[K], Awaitable[None]],
        *,
        turn_s: float = 1.0,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._name = name
        self._load = load
        self._turn_s = turn_s
        self._clock = clock
        self._current: K | None = None
        self._loading = False
        self._num_in_flight = 0
        self._waiting: OrderedDict[K, tuple[float, list[asyncio.Future[None]]]] = OrderedDict()

    def forget(self) -> None:
        """The engine was lost: whatever it held is gone."""
        self._current = None

    @contextlib.asynccontextmanager
    async def using(self, key: K) -> AsyncIterator[None]:
        """For the length of the block the engine holds the weights of `key`. Raises what loading them raised."""
        if not self._may_join(key):
            await self._wait_for_turn(key)
        else:
            self._num_in_flight += 1
        try:
            yield
        finally:
            self._num_in_flight -= 1
            self._next_turn()

    def _may_join(self, key: K) -> bool:
        if key != self._current or self._loading:
            return False
        return not self._waiting or self._now() - next(iter(self._waiting.values()))[0] < self._turn_s

    async def _wait_for_turn(self, key: K) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        _, queue = self._waiting.setdefault(key, (self._now(), []))
        queue.append(turn)
        self._next_turn()
        try:
            with current_waits().waiting(self._name, "lets other weights have their turn"):
                await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._num_in_flight -= 1  # it was given a turn that nobody takes
                self._next_turn()
            elif key in self._waiting and turn in self._waiting[key][1]:
                self._waiting[key][1].remove(turn)
                if not self._waiting[key][1]:
                    del self._waiting[key]
            raise

    def _next_turn(self) -> None:
        if self._num_in_flight or self._loading or not self._waiting:
            return
        key, (_, queue) = self._waiting.popitem(last=False)
        if key == self._current:
            self._admit(queue)
            return
        self._loading = True
        task = asyncio.get_running_loop().create_task(self._change(key, queue))
        task.add_done_callback(lambda _: None)

    async def _change(self, key: K, queue: list[asyncio.Future[None]]) -> None:
        self._current = None
        error: Exception | None = None
        try:
            await self._load(key)
        except Exception as failure:  # noqa: BLE001 - boundary: those who wait for the weights get it
            error = failure
        self._loading = False
        if error is None:
            self._current = key
            # Those who came for the same weights while they were being loaded go on with them.
            later = self._waiting.pop(key, None)
            self._admit([*queue, *(later[1] if later else ())])
        else:
            for turn in queue:
                if not turn.done():
                    turn.set_exception(error)
        self._next_turn()

    def _admit(self, queue: list[asyncio.Future[None]]) -> None:
        for turn in queue:
            if not turn.done():
                self._num_in_flight += 1
                turn.set_result(None)

    def _now(self) -> float:
        return self._clock() if self._clock is not None else asyncio.get_running_loop().time()
