"""What happens to samplers, told to the person who watches and written into the journal. It decides nothing."""

from __future__ import annotations

from collections.abc import Callable

from weaver_rl.journal import Journal
from weaver_rl.meter import NO_METER, Meter
from weaver_rl.terminal import LiveView


class FleetLog:
    """The `FleetEvents` of a run. What happens before `listen` is not told: nothing is in flight then.

    Args:
        on_left: is told the name of a sampler that has left for good.
        meter: counts losses.
    """

    def __init__(self, on_left: Callable[[str], None], meter: Meter = NO_METER) -> None:
        self._on_left = on_left
        self._meter = meter
        self._up: set[str] = set()
        self._journal: Journal | None = None
        self._view: LiveView | None = None
        self._known: set[str] = set()
        self._told: dict[str, str] = {}

    def listen(self, journal: Journal, view: LiveView) -> None:
        self._journal, self._view = journal, view

    def sampler_joined(self, name: str) -> None:
        self._write(name, "joined", f"{name} is up again" if name in self._known else None)
        if name in self._known:
            self._meter.add("weaver_rl_actor_restarts_total", 1, role="sampler")
        self._known.add(name)
        self._up.add(name)
        self._told.pop(name, None)

    def sampler_lost(self, name: str, reason: str, num_groups: int) -> None:
        self._known.add(name)
        if name in self._up:  # else it did not come up, which is tried again and again
            self._up.remove(name)
            self._meter.add("weaver_rl_actor_losses_total", 1, role="sampler")
        owed = f", {num_groups} groups go to others" if num_groups else ""
        # One that finds no room is tried again and again, for hours where a cluster has to grow: told once.
        told = self._told.get(name) == reason
        self._told[name] = reason
        self._write(name, "lost", None if told else f"{name} is lost{owed}: {reason}", reason=reason)

    def sampler_left(self, name: str) -> None:
        self._up.discard(name)
        self._write(name, "left", f"{name} has left")
        self._on_left(name)

    def group_reissued(self, group_id: str, sampler: str, reason: str) -> None:
        self._meter.add("weaver_rl_groups_reissued_total", 1)
        # An evaluation's groups are no prompts of the training stream.
        if self._journal is not None and group_id.isdigit():
            self._journal.reissued(group_id, sampler=sampler, reason=reason)

    def worker_lost(self, name: str, reason: str) -> None:
        """A reward worker; another scores its group."""
        self._meter.add("weaver_rl_actor_losses_total", 1, role="reward")
        self._meter.add("weaver_rl_actor_restarts_total", 1, role="reward")
        self._write(name, "lost", f"{name} is lost and replaced: {reason}", reason=reason)

    def tell(self, note: str) -> None:
        """A line for the person who watches."""
        if self._view is not None:
            self._view.note(note)

    def _write(self, name: str, what: str, note: str | None, **detail: str) -> None:
        if self._journal is not None:
            self._journal.noted(name, what, **detail)
        if self._view is not None and note is not None:
            self._view.note(note)
