"""How fast simulated roles are at a step, and how long each was busy. It knows no role."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from weaver_rl.plan.costs import Pace
from weaver_rl.plan.recording import Recording

PUBLISH_SHARE, LOAD_SHARE, PROBE_SHARE = 0.4, 0.4, 0.1
"""Of a weight sync: what publishing, loading and each side's answer to the probe take. A guess; only the sum is
measured. Samplers load at the same time, so that more of them do not make it longer."""


class Tempo:
    """The pace of the recorded step that a simulated one repeats."""

    def __init__(self, recording: Recording, paces: Mapping[int, Pace]) -> None:
        self._recording = recording
        self._paces = paces
        self.newest_sync = 0.0
        """Seconds of the sync that was last asked for."""

    def at(self, index: int) -> Pace:
        """Of the simulated step at `index`, from 0 on."""
        return self._paces[self._recording.step(index).step]

    def sampler(self, group_id: str) -> float:
        """Factor of an engine's seconds for a request; an evaluation's is the usual one."""
        if group_id.startswith("eval-"):
            return 1.0
        return self._paces[self._recording.group(int(group_id)).step].sampler

    def sync(self, version: int) -> float:
        """Seconds of the sync to a version."""
        self.newest_sync = self.at(max(0, version - 1)).sync
        return self.newest_sync


@dataclass(slots=True)
class BusyTimes:
    """Seconds that each actor was in each state."""

    now: Callable[[], float]
    seconds: dict[str, Counter[str]] = field(default_factory=dict)

    @contextlib.contextmanager
    def at(self, actor: str, state: str) -> Iterator[None]:
        """Adds the time of the block."""
        begin = self.now()
        try:
            yield
        finally:
            self.seconds.setdefault(actor, Counter())[state] += self.now() - begin  # type: ignore[assignment]

    def total(self) -> dict[str, float]:
        """By actor, so far."""
        return {actor: float(sum(states.values())) for actor, states in self.seconds.items()}
