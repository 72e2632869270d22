"""What the service asks of a cluster, as Protocols. No Ray here: unit tests give it named fakes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from weaver_rl.losses.config import LossConfig
from weaver_rl.rollout import SamplingConfig
from weaver_rl.service.records import LoraParams, TrainingMode
from weaver_rl.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    ForwardOutput,
    GroupSample,
    OptimStepOutput,
    PromptLogprobs,
    SampleRequest,
)

PauseMode = Literal["abort", "retract", "in_place"]


class ModelLearner(Protocol):
    """One model in the learner. Gradients accumulate until `optim_step`; directories are absolute.

    Every operation raises BatchError or ConfigError for what the caller can mend, with nothing accumulated,
    CheckpointError for files, LearnerLostError when a process died: the model's weights are lost with it.
    """

    async def forward(self, data: Sequence[Datum], temperature: float = 1.0) -> ForwardOutput: ...

    async def forward_backward(
        self, data: Sequence[Datum], loss: LossConfig, temperature: float = 1.0
    ) -> ForwardBackwardOutput:
        """Log-probabilities of every position, also of those without weight; `metrics` has `grad_norm` so far."""
        ...

    async def optim_step(self, params: AdamParams) -> OptimStepOutput: ...

    async def save_state(self, directory: Path, with_optimizer: bool = True) -> None: ...

    async def load_state(self, directory: Path, with_optimizer: bool = True) -> None:
        """`with_optimizer` False: AdamW is as before its first step. Raises CheckpointError for another shape."""
        ...

    async def save_for_sampler(self, directory: Path) -> None:
        """What an engine loads: a PEFT adapter, or a Hugging Face directory for a model trained whole."""
        ...

    async def save_hf(self, directory: Path) -> None:
        """The whole model as a Hugging Face directory, an adapter merged into it."""
        ...


class Learners(Protocol):
    """All learners of the service."""

    async def open(self, model_id: str, base_model: str, mode: TrainingMode, lora: LoraParams | None) -> ModelLearner:
        """The model in a learner, made as it was at its beginning unless it is there already.

        Raises ResourcesError where there is no room, ConfigError for a rank or mode that the lineup does not allow,
        LearnerLostError when the learner died and another try may succeed.
        """
        ...

    def get(self, model_id: str) -> ModelLearner | None:
        """The model if it is in a learner now; one that was trained and is not there any more is lost."""
        ...

    async def close(self, model_id: str) -> None:
        """Forgets the model and frees what it had alone; of an unknown one nothing happens."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerWeights:
    """The weights of a sampling session."""

    base_model: str
    mode: TrainingMode | None
    """None: the base model as it is, and `directory` is None."""
    directory: Path | None
    """What `ModelLearner.save_for_sampler` wrote; its content never changes."""
    key: str
    """Unique for the content."""
    model_id: str | None
    version: int


class Samplers(Protocol):
    """All samplers of the service. Requests with other weights wait for each other only where an engine holds one
    set of weights at a time (`full_ft`), and then take fair turns.

    Raises EngineError for a request that the engine refuses, ActorFailedError when the engine died under it (the same
    request may succeed later), ResourcesError when there is no room for the engine.
    """

    async def sample(
        self, weights: SamplerWeights, request: SampleRequest, sampling: SamplingConfig
    ) -> GroupSample: ...

    async def prompt_logprobs(
        self, weights: SamplerWeights, token_ids: Sequence[int], temperature: float
    ) -> PromptLogprobs: ...

    async def pause(self, model_id: str, mode: PauseMode) -> None:
        """Stops the engine of a model trained whole: `abort` ends what is in flight with its tokens so far, `retract`
        begins it anew after `resume`, `in_place` goes on with it then."""
        ...

    async def resume(self, model_id: str) -> None: ...

    async def close(self, model_id: str) -> None:
        """Frees the engine that a model trained whole had alone; it starts again when it is asked for."""
        ...

    async def close_all_but(self, model_ids: Collection[str]) -> None:
        """Frees engines of models trained whole that are not among these and have nothing in flight."""
        ...
