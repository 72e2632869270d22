"""Named fakes of the service's roles: learners whose policy is one number, engines that read it from a directory.

Training moves the number, saving writes it, sampling repeats it: so a test sees whose weights an answer came from.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from weaver_rl.errors import BatchError, CheckpointError, LearnerLostError
from weaver_rl.losses.config import LossConfig
from weaver_rl.rollout import SamplingConfig
from weaver_rl.service.records import LoraParams, TrainingMode
from weaver_rl.service.roles import PauseMode, SamplerWeights
from weaver_rl.types import (
    AdamParams,
    Completion,
    Datum,
    ForwardBackwardOutput,
    ForwardOutput,
    GroupSample,
    OptimStepOutput,
    PromptLogprobs,
    SampleRequest,
)


class FakeModelLearner:
    """`theta` starts at 0; every datum adds its mean importance to the gradient, a step adds rate × gradient."""

    def __init__(self, learners: FakeLearners, model_id: str) -> None:
        self._learners = learners
        self.model_id = model_id
        self.theta = 0.0
        self.gradient: float | None = None
        self.moment = 0.0

    async def _work(self) -> None:
        await asyncio.sleep(self._learners.seconds)
        if self.model_id in self._learners.dying:
            self._learners.kill()
            raise LearnerLostError("learner rank 0 died after 1.0 s of forward_backward: killed")

    def _logprobs(self, data: Sequence[Datum]) -> tuple[np.ndarray, ...]:
        return tuple(np.full(len(datum.token_ids_N), -1.0 - self.theta, np.float32) for datum in data)

    async def forward(self, data: Sequence[Datum], temperature: float = 1.0) -> ForwardOutput:
        await self._work()
        return ForwardOutput(logprobs_per_datum=self._logprobs(data))

    async def forward_backward(
        self, data: Sequence[Datum], loss: LossConfig, temperature: float = 1.0
    ) -> ForwardBackwardOutput:
        await self._work()
        if any(int(datum.token_ids_N.max()) >= 100 for datum in data):
            raise BatchError("datum 'd0': token_ids_N holds token id 100, the model's vocabulary is 0..99")
        self.gradient = (self.gradient or 0.0) + float(len(data))
        return ForwardBackwardOutput(
            loss=1.0 + self.theta,
            num_tokens=sum(len(datum.token_ids_N) for datum in data),
            sum_weights=1.0,
            logprobs_per_datum=self._logprobs(data),
            metrics={"grad_norm": self.gradient},
        )

    async def optim_step(self, params: AdamParams) -> OptimStepOutput:
        await self._work()
        if self.gradient is None:
            raise BatchError("optim_step needs gradients: no forward_backward was called since the last optim_step")
        self.moment += self.gradient
        self.theta += params.learning_rate * self.moment
        norm, self.gradient = self.gradient, None
        return OptimStepOutput(grad_norm=norm, learning_rate=params.learning_rate)

    async def save_state(self, directory: Path, with_optimizer: bool = True) -> None:
        await self._work()
        if self._learners.disk_is_full:
            raise CheckpointError(f"cannot write the learner state to {directory}: No space left on device")
        (directory / "weights").mkdir(parents=True, exist_ok=True)
        (directory / "weights" / "theta").write_text(repr(self.theta))
        if with_optimizer:
            (directory / "moment").write_text(repr(self.moment))

    async def load_state(self, directory: Path, with_optimizer: bool = True) -> None:
        await self._work()
        if self._learners.load_error is not None:
            raise self._learners.load_error
        self.theta = float((directory / "weights" / "theta").read_text())
        self.moment = float((directory / "moment").read_text()) if with_optimizer else 0.0
        self.gradient = None

    async def save_for_sampler(self, directory: Path) -> None:
        await self._work()
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "theta").write_text(repr(self.theta))

    async def save_hf(self, directory: Path) -> None:
        await self.save_for_sampler(directory)
        (directory / "merged").write_text("yes")


class FakeLearners:
    """One learner for all models: when it dies, everything in it is gone."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.models: dict[str, FakeModelLearner] = {}
        self.opened: list[str] = []
        self.dying: set[str] = set()
        self.disk_is_full = False
        self.load_error: Exception | None = None

    async def open(
        self, model_id: str, base_model: str, mode: TrainingMode, lora: LoraParams | None
    ) -> FakeModelLearner:
        await asyncio.sleep(0)
        if model_id not in self.models:
            self.opened.append(model_id)
            self.models[model_id] = FakeModelLearner(self, model_id)
        return self.models[model_id]

    def get(self, model_id: str) -> FakeModelLearner | None:
        return self.models.get(model_id)

    async def close(self, model_id: str) -> None:
        self.models.pop(model_id, None)

    def kill(self) -> None:
        """The learner's process is gone."""
        self.models.clear()
        self.dying.clear()


class FakeSamplers:
    """Answers with the theta of the weights' directory as every token's log-probability."""

    def __init__(self) -> None:
        self.paused: dict[str, PauseMode] = {}
        self.closed: list[str] = []
        self.seen: list[SampleRequest] = []
        self.error: Exception | None = None
        self.kept: set[str] = set()

    def _theta(self, weights: SamplerWeights) -> float:
        return float((weights.directory / "theta").read_text()) if weights.directory is not None else 0.0

    async def sample(self, weights: SamplerWeights, request: SampleRequest, sampling: SamplingConfig) -> GroupSample:
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        self.seen.append(request)
        tokens = np.arange(sampling.max_tokens, dtype=np.int32) % 7
        completion = Completion(
            token_ids_L=tokens,
            logprobs_L=np.full(len(tokens), -self._theta(weights), np.float32),
            versions_L=np.zeros(len(tokens), np.int32),
            stop_reason="length",
        )
        count = len(request.seeds_G)
        return GroupSample(
            group_id=request.group_id,
            completions_G=(completion,) * count,
            sampler="fake",
            texts_G=(f"theta {self._theta(weights):g}",) * count,
        )

    async def prompt_logprobs(
        self, weights: SamplerWeights, token_ids: Sequence[int], temperature: float
    ) -> PromptLogprobs:
        values = np.full(len(token_ids), -self._theta(weights) / temperature, np.float32)
        values[0] = np.nan
        return PromptLogprobs(logprobs_P=values)

    async def pause(self, model_id: str, mode: PauseMode) -> None:
        self.paused[model_id] = mode

    async def resume(self, model_id: str) -> None:
        self.paused.pop(model_id, None)

    async def close(self, model_id: str) -> None:
        self.closed.append(model_id)

    async def close_all_but(self, model_ids: Collection[str]) -> None:
        self.kept = set(model_ids)
