"""What a recorded step took and what it made of it, by group: figures, no words. It recomputes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from weaver_rl.inspection.recorded_step import RecordedStep
from weaver_rl.ledger import LedgerRow, read_ledger
from weaver_rl.metrics import MetricsLine
from weaver_rl.rewards.combine import missing_reasons
from weaver_rl.rollout_files import RecordedRollout
from weaver_rl.run_folder import RunFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSummary:
    """One group of the step."""

    group_id: str
    sampler: str
    prompt: str
    rollout_ids: tuple[str, ...]
    rewards: tuple[float | None, ...]
    advantages: tuple[float | None, ...]
    num_dropped: int
    oldest_version: int | None
    """Of its tokens; None where there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFigures:
    """A step of a run, ready to be shown.

    Example:
        step_figures(RecordedStep.read(Path("runs/quickstart"), 450)).dropped
    """

    step: int
    line: MetricsLine | None
    groups: tuple[GroupSummary, ...]
    num_held_out: int
    dropped: dict[str, int]
    """Rollouts that were not trained on, by reason."""
    missing: dict[str, int]
    """Reward components without a value, by kind of reason."""
    ledger: tuple[LedgerRow, ...] | None
    """None for a run that kept no ledger."""


def step_figures(step: RecordedStep) -> StepFigures:
    """Figures of a step of reinforcement learning, of a warm start, or of one that only evaluated."""
    by_group: dict[str, list[RecordedRollout]] = {}
    for record in step.rows:
        by_group.setdefault(record.group_id, []).append(record)
    ledger_file = RunFolder(step.run_dir).ledger_file
    ledger = tuple(row for row in read_ledger(ledger_file) if row.step == step.step) if ledger_file.exists() else None
    return StepFigures(
        step=step.step,
        line=step.line,
        groups=tuple(_summary(group_id, members) for group_id, members in by_group.items()),
        num_held_out=len(step.held_out),
        dropped=dict(Counter(record.dropped for record in step.rows if record.dropped is not None).most_common()),
        missing=dict(missing_reasons([record.scored for record in step.rows]).most_common()),
        ledger=ledger,
    )


def _summary(group_id: str, members: Sequence[RecordedRollout]) -> GroupSummary:
    members = sorted(members, key=lambda record: record.scored.rollout.sample_index)
    versions = [int(v) for record in members for v in record.scored.rollout.completion.versions_L]
    return GroupSummary(
        group_id=group_id,
        sampler=members[0].sampler,
        prompt=members[0].scored.rollout.prompt.text,
        rollout_ids=tuple(record.scored.rollout.rollout_id for record in members),
        rewards=tuple(record.scored.reward for record in members),
        advantages=tuple(record.advantage for record in members),
        num_dropped=sum(record.dropped is not None for record in members),
        oldest_version=min(versions, default=None),
    )
