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

from weaver_rl.errors import EngineLostError
from weaver_rl.waits import current_waits

K = TypeVar("K", bound=Hashable)
E = TypeVar("E")


class WeightTurns(Generic[K, E]):
    """Lets requests with the same weights run side by side, and those with different weights take turns.

    Requests with the current weights join while nobody else waits, or until somebody else has waited for `turn_s`;
    then those in flight end, the weights of whoever waited longest are loaded, and all who wait for them go on.

    Args:
        name: what waits call the engine.
        load: puts weights into the engine and returns which engine that was; called with nothing in flight.
        turn_s: how long a turn may go on while somebody else waits.
    """

    def __init__(
        self,
        name: str,
        load: Callable[[K], Awaitable[E]],
        *,
        turn_s: float = 1.0,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._name = name
        self._load = load
        self._turn_s = turn_s
        self._clock = clock
        self._current: tuple[K, E] | None = None
        self._epoch = 0
        self._changing: asyncio.Task[None] | None = None
        self._num_in_flight = 0
        self._waiting: OrderedDict[K, tuple[float, list[asyncio.Future[E]]]] = OrderedDict()

    def forget(self) -> None:
        """The engine was lost: whatever it held is gone, and what it is loading now will be in no engine."""
        self._current = None
        self._epoch += 1

    @contextlib.asynccontextmanager
    async def using(self, key: K) -> AsyncIterator[E]:
        """The engine that holds the weights of `key`, for the length of the block; what was forgotten since may be
        lost. Raises what loading them raised, EngineLostError when the engine was forgotten meanwhile.
        """
        if self._current is not None and self._may_join(key):
            engine = self._current[1]
            self._num_in_flight += 1
        else:
            engine = await self._wait_for_turn(key)
        try:
            yield engine
        finally:
            self._num_in_flight -= 1
            self._next_turn()

    def _may_join(self, key: K) -> bool:
        if not self._holds(key) or self._changing is not None:
            return False
        return not self._waiting or self._now() - next(iter(self._waiting.values()))[0] < self._turn_s

    def _holds(self, key: K) -> bool:
        return self._current is not None and self._current[0] == key

    async def _wait_for_turn(self, key: K) -> E:
        turn: asyncio.Future[E] = asyncio.get_running_loop().create_future()
        _, queue = self._waiting.setdefault(key, (self._now(), []))
        queue.append(turn)
        self._next_turn()
        try:
            with current_waits().waiting(self._name, "lets other weights have their turn"):
                return await turn
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
        if self._num_in_flight or self._changing is not None or not self._waiting:
            return
        key, (_, queue) = self._waiting.popitem(last=False)
        if self._current is not None and self._holds(key):
            self._admit(queue, self._current[1])
            return
        self._changing = asyncio.get_running_loop().create_task(self._change(key, queue))

    async def _change(self, key: K, queue: list[asyncio.Future[E]]) -> None:
        self._current = None
        epoch = self._epoch
        try:
            engine = await self._load(key)
            # Between the answer of a load and this line the engine may have been lost or closed.
            if epoch != self._epoch:
                raise EngineLostError(f"{self._name} was lost while weights were loaded into it")
        except Exception as error:  # noqa: BLE001 - boundary: those who wait for the weights get it
            for turn in queue:
                if not turn.done():
                    turn.set_exception(error)
        else:
            self._current = (key, engine)
            # Those who came for the same weights while they were being loaded go on with them.
            later = self._waiting.pop(key, None)
            self._admit([*queue, *(later[1] if later else ())], engine)
        self._changing = None
        self._next_turn()

    def _admit(self, queue: list[asyncio.Future[E]], engine: E) -> None:
        for turn in queue:
            if not turn.done():
                self._num_in_flight += 1
                turn.set_result(engine)

    def _now(self) -> float:
        return self._clock() if self._clock is not None else asyncio.get_running_loop().time()
