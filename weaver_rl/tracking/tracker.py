"""What is asked of a tracking service. It does not know which services there are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from weaver_rl.run_folder import RunState


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedRun:
    """What a service is told of a run at its beginning.

    Example:
        TrackedRun(name="quickstart", config={"seed": 0}, directory=Path("runs/quickstart/tracking"))
    """

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    """The resolved configuration as JSON has it."""
    directory: Path
    """Where the service may keep files."""


class Tracker(Protocol):
    """One run at one service. Its methods are called in one thread, which may wait; every error may be raised, and a
    call that failed is made again."""

    name: str
    """Of the service, for people."""
    arrives_at_end: bool
    """`log` returns before the service has the step; that all arrived is known once `end` returned. Such a tracker
    leaves out what a run that it goes on with has already."""

    def new_id(self) -> str | None:
        """An identifier for a run that does not exist yet; None: the service chooses."""

    def begin(self, run_id: str | None, run: TrackedRun) -> str:
        """Goes on with the run of that identifier, made if there is none; returns its identifier."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One step; in order, and each once to a tracker."""

    def end(self, state: RunState, reason: str | None) -> None:
        """The run is over for now; returns when everything was taken."""

    def give_up(self) -> None:
        """Nobody waits any longer. What would keep this process from ending has ended; from any thread, at any time."""
