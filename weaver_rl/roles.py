"""What the controller asks of the processes of a run, as Protocols. No Ray here: unit tests give it named fakes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from weaver_rl.losses.config import LossConfig
from weaver_rl.rollout import SamplingConfig
from weaver_rl.types import (
    AdamParams,
    Datum,
    Float32Array,
    ForwardBackwardOutput,
    ForwardOutput,
    GroupSample,
    OptimStepOutput,
    Prompt,
    PublishedWeights,
    RewardComponent,
    Rollout,
    SampleRequest,
)


class SamplerPool(Protocol):
    """All samplers of the run."""

    @property
    def names(self) -> Sequence[str]:
        """Every sampler by name."""
        ...

    def generate(self, requests: Sequence[SampleRequest], sampling: SamplingConfig) -> AsyncIterator[GroupSample]:
        """Samples every group; yields each when its last completion ends, in any order."""
        ...

    async def load_weights(self, weights: PublishedWeights, only: str | None = None) -> None:
        """Makes every sampler (or the one named) use these weights and forget what it cached under older ones."""
        ...

    async def score(self, token_ids: Sequence[int]) -> Mapping[str, Float32Array]:
        """Each sampler's log-probabilities (N-1,) of a fixed sequence, by sampler name."""
        ...


class RewardPool(Protocol):
    """All reward workers of the run."""

    async def score(self, rollouts: Sequence[Rollout]) -> Sequence[tuple[RewardComponent, ...]]:
        """The components of each rollout, in the order of the rollouts and of the configuration's rewards."""
        ...


class LearnerGroup(Protocol):
    """All ranks of the learner, as one. Operations are Weaver's; gradients accumulate until `optim_step`."""

    async def forward(self, data: Sequence[Datum], temperature: float = 1.0) -> ForwardOutput: ...

    async def forward_backward(
        self, data: Sequence[Datum], loss: LossConfig, temperature: float = 1.0, sum_weights: float | None = None
    ) -> ForwardBackwardOutput:
        """Accumulates gradients. `sum_weights` normalises; None: the sum of the data's weights.

        The answer's `metrics` have `num_microbatches`: how many each rank ran.
        """
        ...

    async def optim_step(self, params: AdamParams) -> OptimStepOutput: ...

    async def publish_weights(self, version: int) -> PublishedWeights:
        """Puts the current weights where samplers can load them."""
        ...

    async def save_state(self, directory: Path) -> None: ...

    async def load_state(self, directory: Path) -> None: ...

    async def save_hf(self, directory: Path) -> None:
        """Writes the policy as a Hugging Face directory."""
        ...


class PromptSource(Protocol):
    """The task's prompts, addressed by position, so that a run resumes from an integer."""

    @property
    def num_dropped(self) -> int:
        """Training prompts left out so far because they were too long, demonstrations included."""
        ...

    def prompt(self, index: int) -> Prompt:
        """The prompt at a position of the training stream: the same in every process and every run with the seed."""
        ...

    def demonstration(self, index: int) -> tuple[Prompt, tuple[int, ...]]:
        """The prompt at a position and the tokens of its gold completion, end token included."""
        ...

    def eval_prompts(self, num: int) -> Sequence[Prompt]:
        """Held-out prompts, none of which the training stream ever gives."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of a completion, special tokens left out."""
        ...
