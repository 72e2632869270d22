"""Which process of a run is killed when, decided beforehand by a seed. It kills nothing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

TITLES = {"sampler": "ray::Sampler", "reward worker": "ray::RewardActor", "learner rank": "ray::LearnerRank"}
"""What may be killed, and how Ray titles its process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """One SIGKILL.

    Example:
        Kill(kind="sampler", gap_s=17.5, which=0.7)
    """

    kind: str
    gap_s: float
    """Seconds after the one before, or after the beginning."""
    which: float
    """Picks one of the processes of its kind; in [0, 1)."""

    def victim(self, processes: list[T]) -> T:
        return processes[int(self.which * len(processes))]


def kill_plan(seed: int, mean_gap_s: float) -> Iterator[Kill]:
    """Without end. Gaps are within half of their mean; of every three kills each kind is one, in random order."""
    draw = random.Random(seed)
    while True:
        for kind in draw.sample(list(TITLES), len(TITLES)):
            yield Kill(kind=kind, gap_s=draw.uniform(0.5 * mean_gap_s, 1.5 * mean_gap_s), which=draw.random())
