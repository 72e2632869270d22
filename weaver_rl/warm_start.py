"""The `warm_start` section: supervised steps before the first rollout."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from weaver_rl.section import Section


class WarmStartConfig(Section):
    """Steps of `cross_entropy` on the task's own answers."""

    loss: Literal["cross_entropy"] = "cross_entropy"
    num_steps: int = Field(ge=1)
    prompts_per_step: int = Field(default=64, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak; warmed up linearly and held."""
    warmup_steps: int = Field(default=10, ge=0)

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of the `step`-th update of the warm start, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        return self.learning_rate
