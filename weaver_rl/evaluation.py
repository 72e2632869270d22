"""Held-out evaluation: the `eval` section and the figures made of scored greedy completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import Field

from weaver_rl.section import Section
from weaver_rl.types import ScoredRollout


class EvalConfig(Section):
    """Greedy completions on problems never trained on, sampled with synced weights."""

    every: int = Field(default=20, ge=0)
    """Steps between evaluations; 0: only before the first and after the last step."""
    num_prompts: int = Field(default=200, ge=1)
    """Held-out prompts of an evaluation, the same ones every time."""
    reward: str | None = None
    """Label of the reward that decides; null: the first one."""
    success_at: float = 1.0
    """A completion counts as right when that reward reaches this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """One evaluation."""

    accuracy: float | None
    """Share of the scored completions that were right, in [0, 1]; None when none was scored."""
    num_scored: int
    num_missing: int
    """Completions whose reward is missing; they count neither as right nor as wrong."""


def evaluate(scored: Sequence[ScoredRollout], label: str, success_at: float) -> EvalResult:
    """Counts the completions that were right by the reward `label`."""
    values = [c.value for s in scored for c in s.components if c.name == label]
    present = [value for value in values if value is not None]
    right = sum(value >= success_at for value in present)
    return EvalResult(
        accuracy=right / len(present) if present else None,
        num_scored=len(present),
        num_missing=len(values) - len(present),
    )
