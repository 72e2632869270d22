"""Where a recorded run computed, and what its seconds would have been alone. It fits nothing."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from weaver_rl.config import RunConfig
from weaver_rl.plan.cores import speed
from weaver_rl.plan.least_squares import Float64Array

Interval = tuple[float, float]

LOADING_SHARE = 0.5
"""Of a weight sync in which an engine makes no step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The cores that all roles share; None where each has what it needs (GPUs, several nodes).

    Example:
        Machine(cores=2, sampler_threads=2, learner_threads=2)
    """

    cores: float | None
    sampler_threads: float
    """That one sampler computes with."""
    learner_threads: float
    """That one rank computes with."""

    @staticmethod
    def of(config: RunConfig, cores: int | None) -> Machine:
        """What a configuration does on one machine of so many cores."""
        if cores is None:
            return Machine(cores=None, sampler_threads=1, learner_threads=1)
        per_sampler = config.sampler.num_threads or max(1, cores // config.sampler.num_replicas)
        return Machine(cores=cores, sampler_threads=per_sampler, learner_threads=config.learner.num_threads or cores)


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbour:
    """Another actor on the same cores: when it computed, in order and apart, and with how many threads."""

    intervals: Sequence[Interval]
    num_threads: float


def seconds_alone(
    interval: Interval, neighbours: Sequence[Neighbour], num_threads: float, cores: float | None
) -> float:
    """What the work of an interval would have taken had no neighbour computed."""
    begin, end = interval
    if cores is None or end <= begin:
        return max(0.0, end - begin)
    changes = [(begin, 0.0), (end, 0.0)]
    for neighbour in neighbours:
        first = bisect.bisect_right(neighbour.intervals, begin, key=lambda span: span[1])
        for left, right in itertools.islice(neighbour.intervals, first, None):
            if left >= end:
                break
            changes += [(max(left, begin), neighbour.num_threads), (min(right, end), -neighbour.num_threads)]
    changes.sort()
    total = others = 0.0
    for (at, change), (until, _) in itertools.pairwise(changes):
        others += change
        total += (until - at) * speed(num_threads + others, cores)
    return total


class EffectiveClock:
    """Turns times of a recorded run into seconds of a sampler's work alone.

    It goes slower while others compute on the same cores, and while weights are loaded.

    Args:
        num_threads: of all samplers together.
        loading: when weights were synced.
    """

    def __init__(
        self,
        neighbours: Sequence[Neighbour],
        loading: Sequence[Interval],
        num_threads: float,
        cores: float | None,
    ) -> None:
        changes = [
            (at, sign * n.num_threads, 0) for n in neighbours for span in n.intervals for at, sign in _ends(span)
        ]
        changes += [(at, 0.0, int(sign)) for span in loading for at, sign in _ends(span)]
        changes.sort()
        others, num_loading = 0.0, 0
        speeds = [speed(num_threads, cores)]
        for _, more, loads in changes:
            others, num_loading = others + more, num_loading + loads
            speeds.append(speed(num_threads + others, cores) * (1 - LOADING_SHARE if num_loading else 1.0))
        self._times: Float64Array = np.array([at for at, *_ in changes] or [0.0])
        self._speeds: Float64Array = np.array(speeds if changes else speeds * 2)
        self._passed: Float64Array = np.concatenate([[0.0], np.cumsum(np.diff(self._times) * self._speeds[1:-1])])

    def __call__(self, time_s: float) -> float:
        """Seconds of work since the first change; only differences mean anything."""
        place = int(np.searchsorted(self._times, time_s, side="right"))
        if place == 0:
            return float((time_s - self._times[0]) * self._speeds[0])
        return float(self._passed[place - 1] + (time_s - self._times[place - 1]) * self._speeds[place])


def _ends(span: Interval) -> tuple[tuple[float, float], tuple[float, float]]:
    return (span[0], 1.0), (span[1], -1.0)
