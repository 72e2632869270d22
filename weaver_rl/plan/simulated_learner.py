"""A simulated learner: only time passes. It learns nothing, and its samplers always agree with it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from weaver_rl.losses.config import LossConfig
from weaver_rl.plan.cores import SharedCores
from weaver_rl.plan.costs import LearnerCosts
from weaver_rl.plan.simulated_samplers import LOGPROBS
from weaver_rl.plan.work import PROBE_SHARE, PUBLISH_SHARE, BusyTimes, Tempo
from weaver_rl.types import (
    AdamParams,
    Datum,
    Float32Array,
    ForwardBackwardOutput,
    ForwardOutput,
    OptimStepOutput,
    PublishedWeights,
)

FORWARD_SHARE = 0.25
"""Of the work per token where a correction asks for the log-probabilities first: one forward of forward, forward and
backward, which is two forwards."""
NAME = "learner"


@dataclass(slots=True, kw_only=True)
class SimulatedLearner:
    """All ranks as one."""

    costs: LearnerCosts
    tempo: Tempo
    cores: SharedCores
    busy: BusyTimes
    num_ranks: int
    efficiency: float
    threads_per_rank: float
    corrects: bool
    """A step asks for the log-probabilities first."""
    checkpoint_s: float
    steps: int = 0

    async def forward(self, data: Sequence[Datum], temperature: float = 1.0) -> ForwardOutput:
        """A probe, or what a correction asks for."""
        if data[0].datum_id == "probe":
            await self._work("sync", PROBE_SHARE * self.tempo.newest_sync)
        else:
            await self._learn(data, FORWARD_SHARE)
        return ForwardOutput(logprobs_per_datum=_logprobs(data))

    async def forward_backward(
        self, data: Sequence[Datum], loss: LossConfig, temperature: float = 1.0, sum_weights: float | None = None
    ) -> ForwardBackwardOutput:
        """The part of a step that goes by tokens."""
        num_tokens = await self._learn(data, 1 - FORWARD_SHARE if self.corrects else 1.0)
        return ForwardBackwardOutput(
            loss=0.0,
            num_tokens=num_tokens,
            sum_weights=sum_weights or 1.0,
            logprobs_per_datum=_logprobs(data),
            metrics={"num_microbatches": 1.0},
        )

    async def optim_step(self, params: AdamParams) -> OptimStepOutput:
        """The part of a step that is there whatever the batch."""
        await self._work("learn", self.costs.fixed * self.tempo.at(self.steps).learner)
        self.steps += 1
        return OptimStepOutput(grad_norm=1.0, learning_rate=params.learning_rate)

    async def publish_weights(self, version: int) -> PublishedWeights:
        await self._work("sync", PUBLISH_SHARE * self.tempo.sync(version))
        return PublishedWeights(version=version, handle=None, num_bytes=0)

    async def save_state(self, directory: Path) -> None:
        (directory / "simulated").touch()
        with self.busy.at(NAME, "checkpoint"):
            await asyncio.sleep(self.checkpoint_s)

    async def load_state(self, directory: Path) -> None:
        raise NotImplementedError("a simulated run is never resumed")

    async def restart(self) -> None:
        raise NotImplementedError("a simulated learner is never lost")

    async def save_hf(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_text("{}")

    async def _learn(self, data: Sequence[Datum], share: float) -> int:
        num_tokens = sum(len(datum.token_ids_N) for datum in data)
        whole = self.costs.seconds(num_tokens, self.num_ranks, self.efficiency) - self.costs.fixed
        await self._work("learn", share * whole * self.tempo.at(self.steps).learner)
        return num_tokens

    async def _work(self, state: str, seconds: float) -> None:
        num_threads = self.threads_per_rank * self.num_ranks if state == "learn" else 1.0
        with self.busy.at(NAME, state):
            await self.cores.work(seconds, num_threads)


def _logprobs(data: Sequence[Datum]) -> tuple[Float32Array, ...]:
    return tuple(LOGPROBS[: len(datum.token_ids_N)] for datum in data)
