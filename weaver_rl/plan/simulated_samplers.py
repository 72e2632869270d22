"""Simulated samplers: engines in which only time passes, behind the real fleet. They sample nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import numpy as np

from weaver_rl.plan.cores import SharedCores
from weaver_rl.plan.recording import Recording
from weaver_rl.plan.simulated_engine import EngineCosts, EngineLimits, FinishedGroup, SimulatedEngine
from weaver_rl.plan.work import LOAD_SHARE, PROBE_SHARE, BusyTimes, Tempo
from weaver_rl.rollout import SamplingConfig
from weaver_rl.types import Completion, Float32Array, GroupSample, PublishedWeights, SampleRequest

_LONGEST = 1 << 20
_TOKENS = np.zeros(_LONGEST, np.int32)
LOGPROBS = np.full(_LONGEST, -1.0, np.float32)
"""What simulated samplers and learner say of every token: they agree."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerWorld:
    """What all simulated samplers of a run have in common."""

    recording: Recording
    tempo: Tempo
    costs: EngineCosts
    limits: EngineLimits
    cores: SharedCores
    num_threads: float
    max_tokens: int
    busy: BusyTimes


class SimulatedSampler:
    """One sampler. Its engine steps while it has work and no weights are being loaded."""

    def __init__(self, name: str, world: SamplerWorld) -> None:
        self.name = name
        self._world = world
        self._engine = SimulatedEngine(world.limits)
        self._pace = 1.0
        self._has_work = asyncio.Event()
        self._between_steps = asyncio.Lock()
        self._streams: dict[object, asyncio.Queue[GroupSample]] = {}
        self._stepping = asyncio.create_task(self._step_for_ever())
        self._stepping.add_done_callback(_raise)

    async def generate(
        self, requests: Sequence[SampleRequest], sampling: SamplingConfig
    ) -> AsyncIterator[Sequence[GroupSample]]:
        """Yields groups when their last completion ends."""
        world = self._world
        arrived: asyncio.Queue[GroupSample] = asyncio.Queue()
        pace = world.tempo.sampler(requests[0].group_id)
        await asyncio.sleep(world.costs.per_wave * pace)
        self._pace = pace
        self._engine.add([self._asked(request) for request in requests])
        self._streams |= {request.group_id: arrived for request in requests}
        self._has_work.set()
        num_left = len(requests)
        try:
            while num_left:
                done = [await arrived.get()]
                while not arrived.empty():
                    done.append(arrived.get_nowait())
                num_left -= len(done)
                yield done
        finally:
            left = {r.group_id for r in requests if self._streams.pop(r.group_id, None) is not None}
            if left:
                self._engine.drop(set(left))

    def _asked(self, request: SampleRequest) -> tuple[object, int, Sequence[int]]:
        recording = self._world.recording
        group = recording.of_request(request.group_id)
        lengths = [
            min(group.lengths_G[member], self._world.max_tokens) for member in recording.members(request.group_id)
        ]
        return request.group_id, len(request.token_ids_P), lengths

    async def load_weights(self, weights: PublishedWeights) -> None:
        """Between two engine steps."""
        async with self._between_steps:
            await self._work("sync", LOAD_SHARE * self._world.tempo.sync(weights.version), 1.0)
            self._engine.load(weights.version)

    async def score(self, token_ids: Sequence[int]) -> Float32Array:
        """The probe waits for the step that runs, too."""
        async with self._between_steps:
            await self._work("sync", PROBE_SHARE * self._world.tempo.newest_sync, 1.0)
        return LOGPROBS[: len(token_ids) - 1]

    async def check(self) -> None:
        """It lives."""

    async def close(self, *, kill: bool = False) -> None:
        """Ends it."""
        self._stepping.cancel()
        await asyncio.gather(self._stepping, return_exceptions=True)

    async def _step_for_ever(self) -> None:
        while True:
            if not self._engine.is_busy:
                self._has_work.clear()
                await self._has_work.wait()
            async with self._between_steps:
                if not self._engine.is_busy:
                    continue
                leap = self._engine.plan()
                seconds = leap.seconds(self._world.costs)
                num_threads = leap.mean_threads(self._world.costs, self._world.num_threads)
                await self._work("generate", seconds * self._pace, num_threads)
                for ended in self._engine.finish():
                    if (stream := self._streams.pop(ended.key, None)) is not None:
                        stream.put_nowait(self._sample(ended))

    async def _work(self, state: str, seconds: float, num_threads: float) -> None:
        with self._world.busy.at(self.name, state):
            await self._world.cores.work(seconds, num_threads)

    def _sample(self, ended: FinishedGroup) -> GroupSample:
        completions = tuple(self._completion(versions) for versions in ended.versions_G)
        return GroupSample(group_id=str(ended.key), completions_G=completions, sampler=self.name)

    def _completion(self, versions: Sequence[tuple[int, int]]) -> Completion:
        length = sum(number for _, number in versions)
        return Completion(
            token_ids_L=_TOKENS[:length],
            logprobs_L=LOGPROBS[:length],
            versions_L=np.repeat([v for v, _ in versions], [n for _, n in versions]).astype(np.int32),
            stop_reason="length" if length >= self._world.max_tokens else "stop",
        )


class SimulatedSamplers:
    """Makes simulated samplers, at once."""

    def __init__(self, world: SamplerWorld) -> None:
        self._world = world

    async def start(self, name: str) -> SimulatedSampler:
        return SimulatedSampler(name, self._world)


def _raise(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        raise error
