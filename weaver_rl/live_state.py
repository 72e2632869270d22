"""live.json: what a running driver tells other terminals. It knows neither who writes nor who reads it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveWait:
    """One wait.

    Example:
        LiveWait(owner="learner rank 0", what="forward_backward", seconds=12.0, timeout_s=600.0)
    """

    owner: str
    what: str
    seconds: float
    """How long it has lasted."""
    timeout_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveState:
    """How the run stands at one moment.

    Example:
        LiveState(time_s=1767225600.0, pid=4711, chain="learner waits for 3 groups", waited_s=4.0)
    """

    time_s: float
    """Seconds since the epoch."""
    pid: int
    """The driver."""
    chain: str | None
    """What the run waits for and why, in one line; None when nothing is waited for."""
    waited_s: float
    """How long the run has waited without getting anything of it."""
    alarms: Mapping[str, str] = field(default_factory=dict)
    """Actors in a state that explains a stall, waited for or not: name to state."""
    waits: tuple[LiveWait, ...] = ()
    """The oldest waits."""
    num_waits: int = 0
    """All waits."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the run says of itself: `step`; `samplers`, a list of mappings from column to figure; `ledger`, by actor the
    states of its last step with their shares of the time; other figures."""

    def write(self, path: Path) -> None:
        """Writes aside and renames. Not fsynced, it is written all the time: a lost one is followed by the next."""
        aside = path.with_name(f".{path.name}.writing-{os.getpid()}")
        try:
            aside.write_text(json.dumps(asdict(self), default=str) + "\n")
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)


def read_live_state(path: Path) -> LiveState | None:
    """None when there is none, or none that can be read: after a power cut the file may be empty."""
    try:
        raw = json.loads(path.read_text())
        known = {item.name for item in fields(LiveState)}
        state = {key: value for key, value in raw.items() if key in known}
        state["waits"] = tuple(LiveWait(**wait) for wait in raw["waits"])
        return LiveState(**state)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
