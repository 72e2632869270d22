"""A meter that remembers, and refuses what its table does not have."""

from __future__ import annotations

import math
from collections.abc import Iterable

from weaver_rl.prometheus import Exported

Series = tuple[str, tuple[tuple[str, str], ...]]


class RecordingMeter:
    """Gauges and counters by name and labels; histograms as lists. `told` has every name that was ever told."""

    def __init__(self, table: Iterable[Exported], common: str) -> None:
        self._table = {row.name: row for row in table}
        self._common = common
        self.gauges: dict[Series, float] = {}
        self.counters: dict[Series, float] = {}
        self.histograms: dict[Series, list[float]] = {}
        self.told: set[str] = set()

    def set(self, name: str, value: float, /, **labels: str) -> None:
        key = self._key(name, "gauge", labels)
        if math.isnan(value):
            self.gauges.pop(key, None)
        else:
            self.gauges[key] = value

    def add(self, name: str, amount: float, /, **labels: str) -> None:
        key = self._key(name, "counter", labels)
        assert amount >= 0
        self.counters[key] = self.counters.get(key, 0.0) + amount

    def observe(self, name: str, value: float, /, **labels: str) -> None:
        self.histograms.setdefault(self._key(name, "histogram", labels), []).append(value)

    def _key(self, name: str, kind: str, labels: dict[str, str]) -> Series:
        row = self._table[name]
        assert row.kind == kind, name
        assert {self._common, *labels} == set(row.labels), name
        assert not row.known or labels in row.known, name
        assert all(isinstance(value, str) for value in labels.values())
        self.told.add(name)
        return series(name, **labels)


def series(name: str, **labels: str) -> Series:
    return name, tuple(sorted(labels.items()))
