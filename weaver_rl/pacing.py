"""How far sampling may run ahead of learning, and which finished groups a step takes. Pure: positions and versions.

A step trains `groups_per_step` groups and makes version s from version s - 1. A group admitted while the samplers hold
version v has tokens of v or newer, so it may be trained until step v + max_lag + 1: its deadline. At most
(max_lag + 1) steps' worth of groups are admitted and not trained, which leaves room for each before its deadline; so
nothing is ever too old, and nothing is thrown away.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence


class Ledger:
    """Which groups are admitted, which of them are finished, and by which step each must be trained.

    Every operation costs O(max_lag), however many groups are in flight; taking a step's groups also sorts those.

    Example:
        ledger = Ledger(groups_per_step=2, max_lag=1)
        for position in range(ledger.room()):
            ledger.admit(position, version=0)
        ledger.finish(3)
        ledger.finish(0)
        ledger.choose(step=1)  # [0, 3]
    """

    def __init__(self, *, groups_per_step: int, max_lag: int) -> None:
        self._groups_per_step = groups_per_step
        self._max_lag = max_lag
        self._deadlines: dict[int, int] = {}
        self._unfinished: Counter[int] = Counter()
        self._finished: dict[int, set[int]] = {}

    def room(self) -> int:
        """Groups that may be admitted now."""
        return max(0, (self._max_lag + 1) * self._groups_per_step - len(self._deadlines))

    def admit(self, position: int, version: int) -> None:
        """A group whose tokens will be of `version` or newer."""
        if position in self._deadlines:
            raise ValueError(f"position {position} is admitted already")
        self._deadlines[position] = version + self._max_lag + 1
        self._unfinished[self._deadlines[position]] += 1

    def finish(self, position: int) -> None:
        deadline = self._deadlines[position]
        self._unfinished[deadline] -= 1
        self._finished.setdefault(deadline, set()).add(position)

    def unfinish(self, position: int) -> None:
        """What was finished cannot be used and comes again."""
        deadline = self._deadlines[position]
        self._finished[deadline].remove(position)
        self._unfinished[deadline] += 1

    def choose(self, step: int) -> Sequence[int] | None:
        """The groups that `step` trains, in order of position; None while it must wait for others to finish.

        Most urgent first (earliest deadline first). It waits while a step after it would otherwise find more groups
        due than it can train.
        """
        taken: dict[int, int] = {}
        short = self._groups_per_step
        num_left = 0
        for deadline in sorted(self._finished.keys() | self._unfinished.keys()):
            num_finished = len(self._finished.get(deadline, ()))
            taken[deadline] = min(short, num_finished)
            short -= taken[deadline]
            num_left += num_finished - taken[deadline] + self._unfinished[deadline]
            if num_left > max(0, deadline - step) * self._groups_per_step:
                return None
        if short:
            return None
        chosen: list[int] = []
        for deadline, number in taken.items():
            chosen += sorted(self._finished.get(deadline, ()))[:number]
        return sorted(chosen)

    def take(self, positions: Iterable[int]) -> None:
        """These are trained: they are forgotten and make room."""
        for position in positions:
            deadline = self._deadlines.pop(position)
            self._finished[deadline].remove(position)
            if not self._finished[deadline] and not self._unfinished[deadline]:
                del self._finished[deadline], self._unfinished[deadline]
