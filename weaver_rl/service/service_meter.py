"""What a server tells a meter now and then, and what its clients tell it. It does not know who looks."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from weaver_rl.meter import Meter
from weaver_rl.service.metrics_table import MAX_SESSION_METRICS
from weaver_rl.service.records import SessionMetric

LOOK_EVERY_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFigures:
    """A server at one moment.

    Example:
        ServerFigures(by_kind={"sample": 12}, by_base_model={"weaver-rl/tiny": 3}, engines={"weaver-rl/tiny": 1})
    """

    by_kind: Mapping[str, int] = field(default_factory=dict)
    """Operations that have not ended; kinds without any may be left out."""
    by_base_model: Mapping[str, int] = field(default_factory=dict)
    """Those of models, by the base."""
    engines: Mapping[str, int] = field(default_factory=dict)
    """Up, by base model."""
    learners: Mapping[str, int] = field(default_factory=dict)
    """Up, by base model."""


async def follow(meter: Meter, look: Callable[[], ServerFigures]) -> None:
    """Shows the server as it stands, until it is cancelled. What is gone is 0, not what it was."""
    kinds: set[str] = set()
    bases: set[str] = set()
    while True:
        figures = look()
        kinds |= figures.by_kind.keys()
        bases |= figures.by_base_model.keys() | figures.engines.keys() | figures.learners.keys()
        for kind in kinds:
            meter.set("weaver_rl_service_operations_in_flight", figures.by_kind.get(kind, 0), kind=kind)
        for base in bases:
            meter.set("weaver_rl_service_queue_depth", figures.by_base_model.get(base, 0), base_model=base)
            meter.set("weaver_rl_service_engines_up", figures.engines.get(base, 0), base_model=base)
            meter.set("weaver_rl_service_learners_up", figures.learners.get(base, 0), base_model=base)
        await asyncio.sleep(LOOK_EVERY_S)


class SessionMetrics:
    """Clients' own metrics, bounded: their names are theirs to choose, and Prometheus keeps each for ever."""

    def __init__(self, meter: Meter, max_names: int = MAX_SESSION_METRICS) -> None:
        self._meter = meter
        self._max_names = max_names
        self._names: set[str] = set()

    def add(self, metrics: Iterable[SessionMetric]) -> None:
        for metric in metrics:
            if math.isfinite(metric.value) and (metric.name in self._names or len(self._names) < self._max_names):
                self._names.add(metric.name)
                self._meter.set("weaver_rl_service_session_metric", metric.value, metric=metric.name)
            else:
                self._meter.add("weaver_rl_service_session_metrics_left_out_total", 1)
