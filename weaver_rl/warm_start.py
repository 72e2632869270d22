"""The `warm_start` section: supervised steps before the first rollout."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from weaver_rl.learner.config import LearnerConfig, ScheduleConfig
from weaver_rl.section import Section
from weaver_rl.tasks.config import TaskConfig
from weaver_rl.types import AdamParams


class WarmStartConfig(Section):
    """Steps of `cross_entropy` on the answers of a task."""

    task: TaskConfig | None = None
    """Where the demonstrations come from; null: the run's own task. Held-out prompts are refused either way."""
    loss: Literal["cross_entropy"] = "cross_entropy"
    """What is minimised; the only choice so far."""
    num_steps: int = Field(ge=1)
    """Supervised steps; the first step of reinforcement learning comes after them."""
    prompts_per_step: int = Field(default=64, ge=1)
    """Prompts in the batch of one supervised step, each with its answer."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""
    schedule: ScheduleConfig = ScheduleConfig(warmup_steps=10)
    """Warm-up and decay over the steps of the warm start; the optimizer's other values are the learner's."""

    def adam_params_at(self, step: int, learner: LearnerConfig) -> AdamParams:
        """The update of `step`, counted from 0."""
        changes = {"learning_rate": self.learning_rate, "schedule": self.schedule}
        return learner.model_copy(update=changes).adam_params_at(step, self.num_steps)
