"""Figures for Prometheus through Ray, which serves those of a process at the metrics port of its node.

It knows no figure: their names, labels and kinds are in the table that it is given.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from actors.cluster import is_private
from weaver_rl.meter import NO_METER, Meter
from weaver_rl.placement import ClusterConfig
from weaver_rl.prometheus import Exported

_log = logging.getLogger(__name__)


class CounterFromZero(Counter):
    """A counter of Ray's that can be seen before it has counted anything."""

    def begin(self, tags: Mapping[str, str]) -> None:
        """The series stands at 0: `inc` refuses that, what Ray's `inc` hands its figures to does not."""
        self._record(0.0, dict(tags))


class RayMeter:
    """A `Meter` of a process that is connected to Ray.

    Args:
        table: what may be told.
        common: labels that everything has, `run` for example.
    """

    def __init__(self, table: Iterable[Exported], common: Mapping[str, str]) -> None:
        self._table = {row.name: row for row in table}
        self._common = dict(common)
        self._made: dict[str, Any] = {}
        self._gauges: set[tuple[str, tuple[tuple[str, str], ...]]] = set()
        self._has_warned = False
        for row in self._table.values():
            for labels in row.known:
                self._tell(partial(self._begin, row.name, labels))

    def set(self, name: str, value: float, /, **labels: str) -> None:
        """See `Meter`."""
        self._tell(lambda: self._set(name, value, labels))

    def add(self, name: str, amount: float, /, **labels: str) -> None:
        """See `Meter`."""
        if amount > 0:
            self._tell(lambda: self._metric(name).inc(float(amount), self._common | labels))

    def observe(self, name: str, value: float, /, **labels: str) -> None:
        """See `Meter`."""
        self._tell(lambda: self._metric(name).observe(float(value), self._common | labels))

    def close(self) -> None:
        """Takes every gauge away: Ray would show them for a while as if the process still lived."""
        for name, labels in tuple(self._gauges):
            self.set(name, math.nan, **dict(labels))

    def _begin(self, name: str, labels: Mapping[str, str]) -> None:
        self._metric(name).begin({**self._common, **labels})

    def _set(self, name: str, value: float, labels: dict[str, str]) -> None:
        self._gauges.add((name, tuple(sorted(labels.items()))))
        self._metric(name).set(float(value), self._common | labels)

    def _metric(self, name: str) -> Any:
        if name not in self._made:
            row = self._table[name]
            if row.kind == "histogram":
                self._made[name] = Histogram(name, row.meaning, boundaries=list(row.buckets), tag_keys=row.labels)
            else:
                kinds: dict[str, Callable[..., Any]] = {"gauge": Gauge, "counter": CounterFromZero}
                self._made[name] = kinds[row.kind](name, row.meaning, row.labels)
        return self._made[name]

    def _tell(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - boundary: a figure that cannot be shown must not end what it is of
            if not self._has_warned:
                self._has_warned = True
                _log.warning("metrics for Prometheus are incomplete: %s: %s", type(error).__name__, error)


@contextlib.contextmanager
def metered(cluster: ClusterConfig, table: Iterable[Exported], common: Mapping[str, str]) -> Iterator[Meter]:
    """A meter for the length of the block, to be left before Ray is. A cluster that lives with the process has nobody
    who looks: nothing is told there."""
    if is_private(cluster):
        yield NO_METER
        return
    meter = RayMeter(table, common)
    try:
        yield meter
    finally:
        meter.close()
