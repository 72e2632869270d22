"""Metrics over steps as compact columns: many steps become few buckets, each with its mean and extremes. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from weaver_rl.metrics import MetricsLine

MAX_BUCKETS = 500
"""Columns of a curve; of more steps each bucket keeps mean, lowest and highest, so that no spike is lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One metric, a value for each bucket, None where it was not measured."""

    mean: tuple[float | None, ...]
    low: tuple[float | None, ...]
    high: tuple[float | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """The metrics of some steps in order, in buckets of `size` steps."""

    size: int
    steps: tuple[int, ...]
    """The last step of each bucket."""
    times_s: tuple[float, ...]
    """Seconds since the start of the run at the end of each bucket."""
    tokens: tuple[float, ...]
    """Tokens sampled for training up to the end of each bucket."""
    curves: dict[str, Curve]

    def to_json(self) -> dict[str, Any]:
        """Compact: extremes only where a bucket holds several steps."""
        return {
            "size": self.size,
            "step": self.steps,
            "time": [round(time_s, 1) for time_s in self.times_s],
            "tokens": [round(count) for count in self.tokens],
            "series": {
                name: {"y": rounded(curve.mean)}
                | ({"lo": rounded(curve.low), "hi": rounded(curve.high)} if self.size > 1 else {})
                for name, curve in self.curves.items()
            },
        }


def bucketed(lines: Sequence[MetricsLine], max_buckets: int = MAX_BUCKETS) -> Curves:
    """Every metric of the lines."""
    size = max(1, math.ceil(len(lines) / max_buckets))
    chunks = [lines[start : start + size] for start in range(0, len(lines), size)]
    names = dict.fromkeys(name for line in lines for name in line.values)
    tokens = list(accumulate(line.values.get("sampler/num_tokens", 0.0) for line in lines))
    return Curves(
        size=size,
        steps=tuple(chunk[-1].step for chunk in chunks),
        times_s=tuple(chunk[-1].time_s for chunk in chunks),
        tokens=tuple(tokens[min(start + size, len(lines)) - 1] for start in range(0, len(lines), size)),
        curves={name: _curve(chunks, name) for name in names},
    )


def _curve(chunks: Sequence[Sequence[MetricsLine]], name: str) -> Curve:
    found = ([_value(line, name) for line in chunk] for chunk in chunks)
    values = [[value for value in part if value is not None] for part in found]
    return Curve(
        mean=tuple(math.fsum(part) / len(part) if part else None for part in values),
        low=tuple(min(part, default=None) for part in values),
        high=tuple(max(part, default=None) for part in values),
    )


def _value(line: MetricsLine, name: str) -> float | None:
    """A share of the step's time or tokens that a line does not name was 0: a mean must not leave it out."""
    for family, whole in (("seconds/", "seconds/step"), ("lag/", "lag/max")):
        if name.startswith(family) and whole in line.values:
            return line.values.get(name, 0.0)
    return line.values.get(name)


def rounded(values: Sequence[float | None], digits: int = 5) -> list[float | int | None]:
    """Significant digits, whole numbers without a point: what a chart or a reader can tell apart."""
    return [None if value is None else short(value, digits) for value in values]


def short(value: float, digits: int = 5) -> float | int | None:
    """One value to significant digits; None for what JSON cannot hold."""
    if not math.isfinite(value):
        return None
    number = float(f"{value:.{digits}g}")
    return int(number) if number == int(number) and abs(number) < 1e15 else number
