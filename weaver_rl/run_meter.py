"""What a run tells a meter: every step's metrics, the ledger, how its samplers stand. It does not know who looks."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from weaver_rl.ledger import LedgerRow
from weaver_rl.meter import Meter
from weaver_rl.prometheus import place_of

LOOK_EVERY_S = 5.0
HELD = "eval/"
"""Metrics that are measured now and then; they stand until the next time, which takes what it lacks away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetFigures:
    """The samplers of a run at one moment.

    Example:
        FleetFigures(num_serving=3, num_starting=1, num_groups=40)
    """

    num_serving: int
    num_starting: int
    num_groups: int
    """Groups asked of them and not delivered."""


class RunMeter:
    """A `MetricsSink` that shows the newest step. What a step lacks disappears: missing is not the last value.

    So does what was measured at a step that the run went back behind.
    """

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._shown: dict[str, int] = {}
        """The step at which each metric that is shown was measured."""
        self._look: Callable[[], FleetFigures] | None = None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See `MetricsSink`."""
        is_evaluated = any(name.startswith(HELD) for name in values)
        self._forget([name for name in self._shown.keys() - values if is_evaluated or not name.startswith(HELD)])
        for name, value in values.items():
            self._set(name, value)
        self._shown |= dict.fromkeys(values, step)
        self._meter.set("weaver_rl_step", step)
        if self._look is not None:
            self._show(self._look())

    def rewound(self, step: int) -> None:
        """See `MetricsSink`."""
        self._forget([name for name, measured_at in self._shown.items() if measured_at > step])
        self._meter.set("weaver_rl_step", max(step, 0))

    def add_rows(self, rows: Iterable[LedgerRow]) -> None:
        """Of one step: where the time of every actor went."""
        for row in rows:
            for state, seconds in row.seconds.items():
                self._meter.add("weaver_rl_actor_seconds_total", seconds, actor=row.actor, role=row.role, state=state)

    async def follow(self, look: Callable[[], FleetFigures]) -> None:
        """Shows the samplers as they stand, now and then and with each step, until it is cancelled."""
        self._look = look
        try:
            while True:
                self._show(look())
                await asyncio.sleep(LOOK_EVERY_S)
        finally:
            self._look = None

    def _show(self, figures: FleetFigures) -> None:
        self._meter.set("weaver_rl_samplers_serving", figures.num_serving)
        self._meter.set("weaver_rl_samplers_starting", figures.num_starting)
        self._meter.set("weaver_rl_groups_sampling", figures.num_groups)

    def _forget(self, names: Iterable[str]) -> None:
        for name in names:
            self._set(name, math.nan)
            del self._shown[name]

    def _set(self, name: str, value: float) -> None:
        exported, labels = place_of(name)
        self._meter.set(exported, value, **labels)
