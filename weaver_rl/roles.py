"""What the controller asks of the processes of a run, as Protocols. No Ray here: unit tests give it named fakes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
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


class SamplerReplica(Protocol):
    """One sampler that is up. Every call ends: with an answer, or with ActorFailedError when it is dead or too late."""

    @property
    def name(self) -> str: ...

    def generate(
        self, requests: Sequence[SampleRequest], sampling: SamplingConfig
    ) -> AsyncIterator[Sequence[GroupSample]]:
        """Yields groups as they are completed. Closing the iterator ends what is left of them."""
        ...

    async def load_weights(self, weights: PublishedWeights) -> None:
        """Loads a version between two engine steps; running completions go on with it, nothing cached survives."""
        ...

    async def score(self, token_ids: Sequence[int]) -> Float32Array:
        """Log-probabilities (N-1,) of a fixed sequence, at temperature 1."""
        ...

    async def check(self) -> None:
        """Raises ActorFailedError when it is dead, does not answer, or has work and makes no progress."""
        ...

    async def close(self, *, kill: bool = False) -> None:
        """Ends it in bounded time, whatever state it is in; never raises. `kill`: at once, without asking it."""
        ...


class SamplerFactory(Protocol):
    """Makes samplers."""

    async def start(self, name: str) -> SamplerReplica:
        """A sampler that is up, with the weights that the run began with.

        Raises:
            UserError: it can never start like this. ResourcesError: there is no room for it now.
            ActorFailedError: it died or took too long; another try may succeed.
        """
        ...


class FleetEvents(Protocol):
    """Who wants to know what happens to samplers and groups."""

    def sampler_joined(self, name: str) -> None: ...

    def sampler_lost(self, name: str, reason: str, num_groups: int) -> None:
        """`num_groups`: groups that it owed and others are given."""

    def sampler_left(self, name: str) -> None: ...

    def group_reissued(self, group_id: str, sampler: str, reason: str) -> None: ...


class SamplerPool(Protocol):
    """All samplers of the run."""

    @property
    def names(self) -> Sequence[str]:
        """Every sampler that serves."""
        ...

    async def ready(self) -> None:
        """Returns once every sampler of the beginning is up."""
        ...

    def bring_up_with(self, bring_up: Callable[[SamplerReplica, Callable[[], None]], Awaitable[None]]) -> None:
        """Says how a sampler that started later comes to the newest weights; the second argument lets it serve."""
        ...

    def replace(self, name: str, reason: str) -> None:
        """Ends a sampler that cannot be trusted and starts another; its unfinished groups go to others."""
        ...

    def generate(self, requests: Sequence[SampleRequest], sampling: SamplingConfig) -> AsyncIterator[GroupSample]:
        """Samples every group; yields each when its last completion ends, in any order."""
        ...

    async def load_weights(self, weights: PublishedWeights, only: str | None = None) -> None:
        """Makes every sampler (or the one named) use these weights and forget what it cached under older ones.

        Those that are lost over it are replaced.
        """
        ...

    async def score(self, token_ids: Sequence[int]) -> Mapping[str, Float32Array]:
        """Each sampler's log-probabilities (N-1,) of a fixed sequence, by sampler name."""
        ...


class RewardReplica(Protocol):
    """One reward worker that is up. Every call ends: with an answer, or with ActorFailedError."""

    @property
    def name(self) -> str: ...

    async def score(self, rollouts: Sequence[Rollout]) -> Sequence[tuple[RewardComponent, ...]]: ...

    async def check(self) -> None:
        """Raises ActorFailedError when it is dead or does not answer."""
        ...

    async def close(self, *, kill: bool = False) -> None:
        """Ends it in bounded time, whatever state it is in; never raises. `kill`: at once, without asking it."""
        ...


class RewardFactory(Protocol):
    """Makes reward workers."""

    async def start(self, name: str) -> RewardReplica:
        """A worker that has loaded the rewards. Raises UserError when they cannot be loaded."""
        ...


class RewardPool(Protocol):
    """All reward workers of the run."""

    async def score(self, rollouts: Sequence[Rollout]) -> Sequence[tuple[RewardComponent, ...]]:
        """The components of each rollout, in the order of the rollouts and of the configuration's rewards."""
        ...


class LearnerGroup(Protocol):
    """All ranks of the learner, as one. Operations are Weaver's; gradients accumulate until `optim_step`.

    Every operation raises LearnerLostError when a rank died or did not answer in time.
    """

    async def forward(self, data: Sequence[Datum], temperature: float = 1.0) -> ForwardOutput: ...

    async def forward_backward(
        self, data: Sequence[Datum], loss: LossConfig, temperature: float = 1.0, sum_weights: float | None = None
    ) -> ForwardBackwardOutput:
        """Accumulates gradients. `sum_weights` normalises; None: the sum of the data's weights.

        The answer's `metrics` have `num_microbatches`: how many each rank ran.
        """
        ...

    async def restart(self) -> None:
        """Ends what is left of it and starts anew, at the weights that the run began with."""
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
