"""Fake prompts, rewards and learner for measuring what is between them: trivial, in the driver's own process.

They count what goes through. They know neither Ray nor a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.sleeping_sampler import LOGPROB, fake_probe
from weaver_rl.losses.config import LossConfig
from weaver_rl.types import (
    AdamParams,
    Datum,
    Float32Array,
    ForwardBackwardOutput,
    ForwardOutput,
    OptimStepOutput,
    Prompt,
    PublishedWeights,
    RewardComponent,
    Rollout,
)

PROMPT_TOKENS = (1,) * 32
HELD_OUT = "held-out"


@dataclass(slots=True)
class Flight:
    """Groups asked for and not come back."""

    groups: int = 0
    peak: int = 0

    def leaves(self) -> None:
        self.groups += 1
        self.peak = max(self.peak, self.groups)

    def lands(self) -> None:
        self.groups -= 1


@dataclass
class FakePrompts:
    """Always the same prompt under another name."""

    flight: Flight
    num_dropped: int = 0

    def prompt(self, index: int) -> Prompt:
        self.flight.leaves()
        return Prompt(prompt_id=f"p-{index}", text="?", token_ids_P=PROMPT_TOKENS)

    def demonstration(self, index: int) -> tuple[Prompt, tuple[int, ...]]:
        raise NotImplementedError("a run without warm start asks for no demonstrations")

    def eval_prompts(self, num: int) -> Sequence[Prompt]:
        return [Prompt(prompt_id=HELD_OUT, text="?", token_ids_P=PROMPT_TOKENS)] * num

    def decode(self, token_ids: Sequence[int]) -> str:
        return "!"


@dataclass
class FakeRewards:
    """Half of each group is right."""

    flight: Flight

    async def score(self, rollouts: Sequence[Rollout]) -> Sequence[tuple[RewardComponent, ...]]:
        if rollouts[0].prompt.prompt_id != HELD_OUT:
            self.flight.lands()
        return [(RewardComponent(name="task", value=float(rollout.sample_index % 2)),) for rollout in rollouts]


class FakeLearner:
    """Agrees with every fake sampler and learns nothing, at once."""

    def __init__(self) -> None:
        self._version = 0

    async def forward(self, data: Sequence[Datum], temperature: float = 1.0) -> ForwardOutput:
        probes = tuple(fake_probe(self._version, len(datum.token_ids_N)) for datum in data)
        return ForwardOutput(logprobs_per_datum=probes)

    async def forward_backward(
        self, data: Sequence[Datum], loss: LossConfig, temperature: float = 1.0, sum_weights: float | None = None
    ) -> ForwardBackwardOutput:
        return ForwardBackwardOutput(
            loss=0.0,
            num_tokens=sum(len(datum.token_ids_N) for datum in data),
            sum_weights=sum_weights or 1.0,
            logprobs_per_datum=tuple(_constant(len(datum.token_ids_N)) for datum in data),
            metrics={"num_microbatches": 1.0},
        )

    async def optim_step(self, params: AdamParams) -> OptimStepOutput:
        return OptimStepOutput(grad_norm=0.0, learning_rate=params.learning_rate)

    async def publish_weights(self, version: int) -> PublishedWeights:
        self._version = version
        return PublishedWeights(version=version, handle=None, num_bytes=0)

    async def restart(self) -> None:
        raise NotImplementedError("nobody kills this learner")

    async def save_state(self, directory: Path) -> None:
        raise NotImplementedError("a run without checkpoints saves no state")

    async def load_state(self, directory: Path) -> None:
        raise NotImplementedError("a run without checkpoints loads no state")

    async def save_hf(self, directory: Path) -> None:
        raise NotImplementedError("the run is stopped before its end")


def _constant(num_tokens: int) -> Float32Array:
    return np.full(num_tokens, LOGPROB, np.float32)
