"""Which rollouts go into a report: a bounded number, from steps spread over the run. It reads outcomes, no texts.

Groups are taken whole, so that a rollout is seen beside the others of its prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from weaver_rl.errors import UserError
from weaver_rl.rollout_files import recorded_steps, rollouts_file
from weaver_rl.step_range import EVERY_STEP, StepRange

MAX_STEPS = 12
"""Steps that rollouts are taken from."""
_COLUMNS = ["rollout_id", "group_id", "phase", "reward", "dropped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The rollouts of one step that go into the report, and how many the step has."""

    step: int
    rollout_ids: frozenset[str]
    num_rollouts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What goes into a report of the rollouts of a run, and what was left out."""

    choices: tuple[Choice, ...]
    num_steps: int
    """Steps with rollouts that the report could have taken from."""
    damaged: tuple[str, ...] = ()
    """Files that could not be read, each with the reason."""

    @property
    def num_chosen(self) -> int:
        return sum(len(choice.rollout_ids) for choice in self.choices)

    @property
    def num_left_out(self) -> int:
        """Of the steps that rollouts were taken from."""
        return sum(choice.num_rollouts for choice in self.choices) - self.num_chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """The outcomes of one prompt in one step; evaluations are groups of one."""

    ids: tuple[str, ...]
    rewards: tuple[float, ...]
    phase: str
    num_dropped: int
    num_missing: int

    @property
    def mean(self) -> float:
        return sum(self.rewards) / len(self.rewards) if self.rewards else 0.0

    @property
    def spread(self) -> float:
        return max(self.rewards) - min(self.rewards) if self.rewards else 0.0


def select(run_dir: Path, max_rollouts: int, steps: StepRange = EVERY_STEP) -> Selection:
    """Chooses at most `max_rollouts`: of the first step, the last, and some evenly between."""
    there = [step for step in recorded_steps(run_dir) if step in steps]
    some = evenly(there, MAX_STEPS if max_rollouts >= 4 * MAX_STEPS else max(1, max_rollouts // 4))
    choices, damaged = [], []
    left = max_rollouts
    # From the last step on: where the budget ends early, the end of the run is what people look for.
    for index, step in enumerate(reversed(some)):
        try:
            groups = _groups(rollouts_file(run_dir, step))
        except UserError as error:
            damaged.append(str(error))
            continue
        ids = _chosen(groups, left // (len(some) - index))
        left -= len(ids)
        choices.append(Choice(step=step, rollout_ids=ids, num_rollouts=sum(len(group.ids) for group in groups)))
    return Selection(choices=tuple(reversed(choices)), num_steps=len(there), damaged=tuple(damaged))


def evenly(values: Sequence[int], count: int) -> list[int]:
    """At most `count` of the values: the last, the first, and the others evenly between them."""
    if len(values) <= count:
        return list(values)
    if count <= 1:
        return list(values[-1:])
    return [values[round(index * (len(values) - 1) / (count - 1))] for index in range(count)]


def _groups(path: Path) -> list[_Group]:
    try:
        rows = pq.read_table(path, columns=_COLUMNS).to_pylist()
    except (pa.ArrowInvalid, OSError, KeyError) as error:
        raise UserError(f"{path} is no file of rollouts: {error}") from error
    by_group: dict[tuple[str, str], list[dict[str, object]]] = {}
    for row in rows:
        alone = row["phase"] == "eval" or not row["group_id"]
        by_group.setdefault((row["phase"], row["rollout_id"] if alone else row["group_id"]), []).append(row)
    return [
        _Group(
            ids=tuple(str(row["rollout_id"]) for row in members),
            rewards=tuple(row["reward"] for row in members if isinstance(row["reward"], float)),
            phase=phase,
            num_dropped=sum(row["dropped"] is not None for row in members),
            num_missing=sum(row["reward"] is None for row in members),
        )
        for (phase, _), members in by_group.items()
    ]


def _chosen(groups: Sequence[_Group], quota: int) -> frozenset[str]:
    """Whole groups in turn from several orders, until the quota is full; of the first group at least a part."""
    trained = [group for group in groups if group.phase != "eval"]
    held_out = [group for group in groups if group.phase == "eval"]
    orders = [
        sorted(trained, key=lambda group: -group.mean),
        sorted(trained, key=lambda group: group.mean),
        [group for group in trained if group.num_missing or group.num_dropped],
        sorted(trained, key=lambda group: -group.spread),
        sorted(held_out, key=lambda group: group.mean),
        sorted(held_out, key=lambda group: -group.mean),
        trained,
        held_out,
    ]
    chosen: dict[str, None] = {}
    for group in _in_turn(orders):
        new = [rollout_id for rollout_id in group.ids if rollout_id not in chosen]
        if len(chosen) + len(new) <= quota:
            chosen |= dict.fromkeys(new)
        elif not chosen:
            chosen |= dict.fromkeys(new[:quota])
        if len(chosen) >= quota:
            break
    return frozenset(chosen)


def _in_turn(orders: Sequence[Sequence[_Group]]) -> Iterable[_Group]:
    for index in range(max(map(len, orders))):
        yield from (order[index] for order in orders if index < len(order))
