"""Where live figures are told, whoever shows them. It knows neither the figures nor Prometheus."""

from __future__ import annotations

from typing import Protocol


class Meter(Protocol):
    """Takes figures by the names of a table of `weaver_rl.prometheus.Exported`. It never raises and never waits.

    Labels that all figures share, such as `run`, are the meter's own.
    """

    def set(self, name: str, value: float, /, **labels: str) -> None:
        """A gauge stands at this value from now on; NaN: it has none."""

    def add(self, name: str, amount: float, /, **labels: str) -> None:
        """A counter goes up; by nothing if `amount` is not above 0."""

    def observe(self, name: str, value: float, /, **labels: str) -> None:
        """One more value of a histogram."""


class NoMeter:
    """Nobody looks."""

    def set(self, name: str, value: float, /, **labels: str) -> None:
        """Nothing."""

    def add(self, name: str, amount: float, /, **labels: str) -> None:
        """Nothing."""

    def observe(self, name: str, value: float, /, **labels: str) -> None:
        """Nothing."""


NO_METER = NoMeter()
