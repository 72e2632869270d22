"""Configuration of the learner. It knows hyper-parameters and sizes, imports nothing heavy and starts nothing."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from weaver_rl.custom_resources import CustomResources
from weaver_rl.section import Section
from weaver_rl.types import AdamParams


class ScheduleConfig(Section):
    """How the learning rate moves over the steps of a run."""

    name: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after the warm-up: stay, or fall to `min_ratio` at the last step along a line or half a cosine."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up; step 0 already runs at 1/warmup_steps of the peak."""
    min_ratio: float = Field(default=0.0, ge=0, le=1)
    """Learning rate of the last step as a fraction of the peak (linear and cosine)."""


class AdamConfig(Section):
    """AdamW's constants."""

    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment, per step."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the second moment, per step."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""


class LearnerConfig(Section):
    """The learner: how many ranks, how they step, and how much they hold at once."""

    num_ranks: int = Field(default=1, ge=1)
    """Processes that train together; the model is sharded over them (FSDP2)."""
    num_cpus: float = Field(default=1.0, gt=0)
    """CPUs reserved for each rank."""
    num_gpus: float | None = Field(default=None, ge=0)
    """GPUs reserved for each rank; null: 1 where the cluster has GPUs, else 0. 0 trains on the CPU."""
    resources: CustomResources = Field(default_factory=dict)
    """Custom resources of Ray for each rank, to have it on nodes of one kind: `{learner: 1}` where those were started
    with `ray start --resources='{"learner": 4}'`."""
    learning_rate: float = Field(default=1e-5, gt=0)
    """Peak learning rate, reached after the warm-up."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Warm-up and decay of the learning rate."""
    adam: AdamConfig = AdamConfig()
    """AdamW's constants."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay of every parameter, per step and unit of learning rate."""
    grad_clip_norm: float = Field(default=1.0, ge=0)
    """Gradients are scaled down to this global L2 norm; 0 disables clipping."""
    max_tokens_per_microbatch: int = Field(default=4096, ge=1)
    """Padded tokens of one forward; a longer datum gets a micro-batch of its own."""
    logprob_chunk_tokens: int = Field(default=1024, ge=1)
    """Tokens whose float32 logits exist at once: vocabulary × this × 4 bytes is the head's peak memory."""
    activation_checkpointing: bool = False
    """Recompute each layer's activations in backward: a third more compute, far less memory."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What matrices are multiplied in; master weights are always float32. auto: bfloat16 on CUDA, float32 on CPU."""
    num_threads: int | None = Field(default=None, ge=1)
    """Torch's CPU threads in a rank's process; null leaves torch's own choice."""
    timeout_s: float = Field(default=600.0, gt=0)
    """Seconds after which a collective that other ranks did not join is an error."""

    @model_validator(mode="after")
    def _check_schedule(self) -> Self:
        if self.schedule.name == "constant" and self.schedule.min_ratio != 0.0:
            raise ValueError(
                f"schedule.min_ratio {self.schedule.min_ratio} has no effect with schedule.name constant: "
                "write linear or cosine, or remove min_ratio"
            )
        return self

    def learning_rate_at(self, step: int, num_steps: int) -> float:
        """Learning rate of `step` (0-based) in a run of `num_steps`; past the last step it stays there."""
        if step < 0 or num_steps < 1:
            raise ValueError(f"step must be >= 0 and num_steps >= 1, seen step {step} of {num_steps}")
        schedule = self.schedule
        if step < schedule.warmup_steps:
            return self.learning_rate * (step + 1) / schedule.warmup_steps
        if schedule.name == "constant":
            return self.learning_rate
        decay_steps = max(1, num_steps - 1 - schedule.warmup_steps)
        progress = min(1.0, (step - schedule.warmup_steps) / decay_steps)
        height = 1.0 - progress if schedule.name == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.learning_rate * (schedule.min_ratio + (1.0 - schedule.min_ratio) * height)

    def adam_params_at(self, step: int, num_steps: int) -> AdamParams:
        """The whole update of `step`, for `Learner.optim_step`."""
        return AdamParams(
            learning_rate=self.learning_rate_at(step, num_steps),
            beta1=self.adam.beta1,
            beta2=self.adam.beta2,
            eps=self.adam.eps,
            weight_decay=self.weight_decay,
            grad_clip_norm=self.grad_clip_norm,
        )
