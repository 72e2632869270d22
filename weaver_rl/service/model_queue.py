"""The order of one model's operations: by `seq_id`, one at a time. It does not know what they do.

An entry with a `seq_id` has the place of its number; one without stands behind the highest number that had come before
it. Where a number is missing, the next entry waits for it, at most `reorder_wait_s`, and only while nothing of the
model runs and no request of it arrives; then the missing numbers are passed, however many, and refused from then on.

- a `Turn` comes  after the entries before it; unblocked by `ended` of the one that runs, by the missing number, or by
                  the clock.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from weaver_rl.errors import ServiceError

MAX_REFUSED = 4096
"""Numbers refused at the edge that are remembered; one that is forgotten costs a wait."""

_Place = tuple[int, int, int]


@dataclass(slots=True, eq=False, kw_only=True)
class Turn:
    """An operation's place in the queue of its model."""

    seq_id: int | None
    is_stored: bool = False
    """Until then it keeps its place but does not run: its row is being written."""
    came: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """Done when it may run, or when the queue was closed."""
    is_withdrawn: bool = False


class ModelQueue:
    """The turns of one model; its methods belong to the event loop.

    Args:
        owner: whose model it is.
        last_seq_id: the highest number that was passed before.
        is_receiving: whether a request of the model arrives just now; whoever knows calls `receiving_changed`.
    """

    def __init__(
        self, *, owner: str, last_seq_id: int, reorder_wait_s: float, is_receiving: Callable[[], bool]
    ) -> None:
        self.owner = owner
        self._next_seq_id = last_seq_id + 1
        self._highest_seq_id = last_seq_id
        self._reorder_wait_s = reorder_wait_s
        self._is_receiving = is_receiving
        self._waiting: list[tuple[_Place, Turn]] = []
        self._arrivals = itertools.count()
        self._refused: dict[int, None] = {}
        self._running: Turn | None = None
        self._clock = _GapClock(asyncio.get_running_loop(), self._pass_gap)
        self._refusal: Callable[[], ServiceError] | None = None

    def has_passed(self, seq_id: int) -> bool:
        """Whether its place was given away: it runs, has run, or was not waited for any longer."""
        return seq_id < self._next_seq_id

    @property
    def next_seq_id(self) -> int:
        """The lowest number that can still come."""
        return self._next_seq_id

    def place(self, turn: Turn) -> None:
        """Gives it its place, which it has from now on. Not for a number that was passed.

        Raises:
            ServiceError: the queue was closed; made by what it was closed with.
        """
        if self._refusal is not None:
            raise self._refusal()
        arrival = next(self._arrivals)
        if turn.seq_id is None:
            place = (self._highest_seq_id, 1, arrival)
        else:
            place = (turn.seq_id, 0, arrival)
            self._highest_seq_id = max(self._highest_seq_id, turn.seq_id)
        heapq.heappush(self._waiting, (place, turn))
        self._advance()

    def stored(self, turn: Turn) -> None:
        """From now on it may run."""
        turn.is_stored = True
        self._advance()

    def withdraw(self, turn: Turn) -> None:
        """It will not run, and leaves no gap."""
        turn.is_withdrawn = True
        if turn.seq_id is not None:
            self.refuse(turn.seq_id)
        self._advance()

    def refuse(self, seq_id: int) -> None:
        """Nothing is to be waited for at this number. If it comes in time all the same, it has its place."""
        if self.has_passed(seq_id):
            return
        self._refused[seq_id] = None
        if len(self._refused) > MAX_REFUSED:
            del self._refused[next(iter(self._refused))]
        self._advance()

    def ended(self, turn: Turn) -> None:
        """The next one may run."""
        if self._running is turn:
            self._running = None
            self._advance()

    def receiving_changed(self) -> None:
        self._advance()

    def close(self, refusal: Callable[[], ServiceError]) -> None:
        """No further turn comes: who waits for one is told at once, and who comes later is refused."""
        self._refusal = refusal
        self._clock.reset()
        waiting, self._waiting = self._waiting, []
        for _, turn in waiting:
            if not turn.came.done():
                turn.came.set_result(None)

    def _advance(self) -> None:
        """Lets the first one run if it can, and the clock tick if that is what it waits for."""
        if self._refusal is not None:
            return
        while self._next_seq_id in self._refused:
            del self._refused[self._next_seq_id]
            self._next_seq_id += 1
            self._clock.reset()
        while self._waiting and self._waiting[0][1].is_withdrawn:
            heapq.heappop(self._waiting)
        if self._running is not None or not self._waiting:
            self._clock.stop()
            return
        first = self._waiting[0][1]
        if first.seq_id is not None and first.seq_id > self._next_seq_id:
            if self._is_receiving():
                self._clock.stop()
            else:
                self._clock.start(self._reorder_wait_s)
            return
        self._clock.reset()
        if first.is_stored:
            self._run(first)

    def _run(self, turn: Turn) -> None:
        heapq.heappop(self._waiting)
        if turn.seq_id is not None:
            self._next_seq_id = turn.seq_id + 1
        self._running = turn
        turn.came.set_result(None)

    def _pass_gap(self) -> None:
        """Nobody came for the numbers before the first one that waits."""
        first = self._waiting[0][1]
        assert first.seq_id is not None
        self._next_seq_id = first.seq_id
        self._refused = {seq_id: None for seq_id in self._refused if seq_id > first.seq_id}
        self._advance()


class _GapClock:
    """Seconds that a gap was waited for, with breaks; calls `at_end` once they are over."""

    def __init__(self, loop: asyncio.AbstractEventLoop, at_end: Callable[[], None]) -> None:
        self._loop = loop
        self._at_end = at_end
        self._waited_s = 0.0
        self._since: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def start(self, wait_s: float) -> None:
        """Goes on from where it was stopped; running already, it goes on."""
        if self._since is None:
            self._since = self._loop.time()
            self._timer = self._loop.call_later(max(0.0, wait_s - self._waited_s), self._ring)

    def stop(self) -> None:
        if self._since is not None:
            self._waited_s += self._loop.time() - self._since
            self._since = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def reset(self) -> None:
        """For another gap."""
        self.stop()
        self._waited_s = 0.0

    def _ring(self) -> None:
        self.reset()
        self._at_end()
