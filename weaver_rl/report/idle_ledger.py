"""The idle ledger of a run as compact JSON for the page: seconds by actor, state and bucket of steps. It adds up only.

An older run has no ledger: the page is told so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from weaver_rl.ledger import LedgerRow, read_ledger
from weaver_rl.report.curves import rounded
from weaver_rl.report.run_data import RunData

MAX_NUMBERS = 150_000
"""Of one run in the page: many actors get fewer buckets of steps."""
MAX_BUCKETS = 200

COLORS = {
    "generate": 0, "score": 1, "learn": 2, "sync": 3, "probe": 4, "checkpoint": 6, "start": 5, "other": 7, "unknown": 7,
}  # fmt: skip
"""States that are no waiting, in the order of the page, with their colours; waits come after them."""
ROLES = ("sampler", "learner", "reward", "controller")
"""The order of the actors."""


def ledger_data(run: RunData) -> dict[str, Any] | None:
    """None for a run that kept no ledger."""
    return _columns(lambda: (row for row in read_ledger(run.folder.ledger_file) if row.step in run.steps))


def _columns(read: Callable[[], Iterable[LedgerRow]]) -> dict[str, Any] | None:
    """Reads the rows twice: those of a long run with many actors would fill the memory of its driver."""
    names: set[tuple[str, str]] = set()
    spent_on: set[str] = set()
    phases: dict[int, str] = {}
    for row in read():
        names.add((row.role, row.actor))
        spent_on.update(row.seconds)
        phases[row.step] = row.phase
    if not names:
        return None
    actors, states = sorted(names, key=_actor_order), sorted(spent_on, key=_order)
    training = sorted(step for step, phase in phases.items() if phase == "train")
    before = sorted(phases.keys() - set(training))
    room = max(1, MAX_NUMBERS // (len(actors) * max(1, len(states))))
    size = math.ceil((len(before) + len(training)) / min(MAX_BUCKETS, room))
    # Not across the end of the warm start: the page is about one of the two at a time.
    buckets = [part[start : start + size] for part in (before, training) for start in range(0, len(part), size)]
    bucket_of = {step: number for number, bucket in enumerate(buckets) for step in bucket}
    actor_of = {actor: number for number, actor in enumerate(actors)}
    state_of = {state: number for number, state in enumerate(states)}
    seconds = [[[0.0] * len(buckets) for _ in states] for _ in actors]
    for row in read():
        if row.step not in bucket_of or (row.role, row.actor) not in actor_of or not spent_on.issuperset(row.seconds):
            continue  # of a live run, written since it was read first
        for state, spent in row.seconds.items():
            seconds[actor_of[row.role, row.actor]][state_of[state]][bucket_of[row.step]] += spent
    return {
        "actors": [{"role": role, "name": name} for role, name in actors],
        "states": [{"name": state, "busy": not _is_wait(state), "color": COLORS.get(state, 7)} for state in states],
        "training": training[0] if training else None,
        "from": [bucket[0] for bucket in buckets],
        "to": [bucket[-1] for bucket in buckets],
        "seconds": [[rounded(per_bucket) for per_bucket in per_state] for per_state in seconds],
    }


def _is_wait(state: str) -> bool:
    return state.startswith("wait")


def _order(state: str) -> tuple[int, str]:
    if state in COLORS:
        return list(COLORS).index(state), state
    return len(COLORS) + _is_wait(state), state


def _actor_order(actor: tuple[str, str]) -> tuple[int, str, str, int]:
    """By role, and sampler 2 before sampler 10."""
    role, name = actor
    head = name.rstrip("0123456789")
    place = ROLES.index(role) if role in ROLES else len(ROLES)
    return place, role, head, int(name[len(head) :] or -1)
