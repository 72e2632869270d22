"""Contenders measured in turns, and the ratio of two of them. It knows nothing of what they do.

On a machine that others use too, absolute figures drift; the ratio of two measurements taken seconds apart drifts
less. So contenders stay alive side by side and take turns, and only ratios within a round are compared.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """Median and quartiles of one number per round."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""
    rounds: int
    values: tuple[float, ...]
    """Round by round."""

    @staticmethod
    def of(values: Sequence[float]) -> Ratio:
        if not values:
            raise ValueError("a ratio needs at least one round")
        low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
        return Ratio(median=statistics.median(values), low=low, high=high, rounds=len(values), values=tuple(values))


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How long to measure."""

    rounds: int
    max_seconds: float
    """No further round starts after it; three are run in any case."""
    warmups: int = 1
    """Rounds thrown away first."""


def alternate(
    contenders: Mapping[str, Callable[[], float]], effort: Effort, now: Callable[[], float] = time.monotonic
) -> dict[str, list[float]]:
    """What every contender returned in each round. Every other round goes in the opposite order."""
    for _ in range(effort.warmups):
        for measure in contenders.values():
            measure()
    started = now()
    values: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(effort.rounds):
        if index >= 3 and now() - started > effort.max_seconds:
            break
        for name in contenders if index % 2 == 0 else reversed(list(contenders)):
            values[name].append(contenders[name]())
    return values


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """ours / theirs, round by round."""
    return Ratio.of([a / b for a, b in zip(ours, theirs, strict=True)])
