"""Named fakes of the processes behind the fleets, on a virtual clock: slow, hung, dying and lying, as they are told.

A sampler keeps a history of its loads and stamps each token with the version that it held at the token's own time.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from fakes import EOS, FakeLearner, fake_draw, fake_logprob

from weaver_rl.errors import ActorFailedError, LearnerLostError, WeaverRLError
from weaver_rl.rollout import SamplingConfig
from weaver_rl.types import (
    AdamParams,
    Completion,
    Datum,
    Float32Array,
    ForwardBackwardOutput,
    ForwardOutput,
    GroupSample,
    OptimStepOutput,
    PublishedWeights,
    RewardComponent,
    Rollout,
    SampleRequest,
)
from weaver_rl.waits import current_waits

ANSWER_TIMEOUT_S = 60.0
"""A load, a probe or a score that takes longer fails."""
UNRESPONSIVE_AFTER_S = 20.0
HANGS = 1e9
WRONG_BY = 0.4
"""What a wrong load adds to theta."""

Seconds = Callable[..., float]
"""How long something takes; given what it is: ("generate", group, serial number of its sampler), ("load", name, …)."""


def uniform(seed: int, shortest: float = 0.1, longest: float = 5.0) -> Seconds:
    """Any time between, a function of what it is for."""
    span = longest - shortest
    return lambda *what: shortest + span * fake_draw(seed, *what, below=10_000) / 10_000


class Mortal:
    """A process: it may hang or die at any time; what it is asked then never ends, or fails."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.hung = False
        self.dead = asyncio.Event()
        self.closed = False
        self.killed_in_s = 0.0
        self._upset = asyncio.Event()

    def die(self) -> None:
        self.dead.set()
        self._upset.set()

    def hang(self) -> None:
        self.hung = True
        self._upset.set()

    async def spend(self, seconds: float) -> None:
        """Works for so long. Raises ActorFailedError when it dies meanwhile."""
        try:
            async with asyncio.timeout(seconds):
                await self._upset.wait()
        except TimeoutError:
            return
        await self.dead.wait()
        raise ActorFailedError(f"{self.name} died")

    async def answer(self, doing: str, seconds: float, about: Sequence[str] = ()) -> None:
        """Spends the time; raises ActorFailedError when it takes too long."""
        try:
            with current_waits().waiting(self.name, doing, timeout_s=ANSWER_TIMEOUT_S, about=about):
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    await self.spend(seconds)
        except TimeoutError:
            raise ActorFailedError(f"{self.name} was not done {doing} within {ANSWER_TIMEOUT_S:g} s") from None

    async def check(self) -> None:
        if self.hung and not self.dead.is_set():
            await asyncio.sleep(UNRESPONSIVE_AFTER_S)
            raise ActorFailedError(f"{self.name} did not answer whether it lives")
        if self.dead.is_set():
            raise ActorFailedError(f"{self.name} died")

    async def close(self, *, kill: bool = False) -> None:
        self.die()
        await asyncio.sleep(self.killed_in_s if kill else 0.1)
        self.closed = True


class FakeSampler(Mortal):
    """Draws tokens from the seed alone and log-probabilities from the theta it held at each token's time."""

    def __init__(self, name: str, serial: int, factory: FakeSamplers) -> None:
        super().__init__(name)
        self.serial = serial
        self._factory = factory
        self._loaded_at = [-1.0]
        self._loaded: list[tuple[int, float]] = [(-1, 99.0)]
        self.num_streams = 0

    async def generate(
        self, requests: Sequence[SampleRequest], sampling: SamplingConfig
    ) -> AsyncIterator[Sequence[GroupSample]]:
        begun = _now()
        ends = sorted(
            (begun + self._factory.seconds("generate", r.group_id, self.serial), i) for i, r in enumerate(requests)
        )
        self._factory.asked.extend((self.name, request.group_id) for request in requests)
        self.num_streams += 1
        try:
            for end, index in ends:
                await self.spend(max(0.0, end - _now()))
                yield (self._sample(requests[index], sampling, begun, end),)
        finally:
            self.num_streams -= 1

    async def load_weights(self, weights: PublishedWeights) -> None:
        await self._factory.before(self, "load")
        await self.answer(
            f"loads weights v{weights.version}", self._factory.seconds("load", self.name, weights.version)
        )
        theta = weights.handle
        if self._factory.wrong.get((self.name, weights.version), 0):
            self._factory.wrong[self.name, weights.version] -= 1
            theta += WRONG_BY
        self._loaded_at.append(_now())
        self._loaded.append((weights.version, theta))

    async def score(self, token_ids: Sequence[int]) -> Float32Array:
        await self._factory.before(self, "probe")
        await self._factory.before(self, f"probe v{self._loaded[-1][0]}")
        await self.answer("answers the probe", self._factory.seconds("probe", self.name, self._loaded[-1][0]))
        theta = self._loaded[-1][1]
        return np.array([fake_logprob(theta, p, t) for p, t in itertools.pairwise(token_ids)], np.float32)

    def _sample(self, request: SampleRequest, sampling: SamplingConfig, begun: float, end: float) -> GroupSample:
        completions = tuple(self._complete(request, seed, sampling, begun, end) for seed in request.seeds_G)
        return GroupSample(group_id=request.group_id, completions_G=completions, sampler=self.name)

    def _complete(
        self, request: SampleRequest, seed: int, sampling: SamplingConfig, begun: float, end: float
    ) -> Completion:
        length = 1 + fake_draw(request.token_ids_P, seed, "length", below=sampling.max_tokens - 1)
        tokens = [*(2 + fake_draw(request.token_ids_P, seed, i, below=8) for i in range(length)), EOS]
        times = [begun + (end - begun) * (i + 1) / len(tokens) for i in range(len(tokens))]
        held = [self._loaded[bisect.bisect_right(self._loaded_at, at) - 1] for at in times]
        before = [request.token_ids_P[-1], *tokens[:-1]]
        return Completion(
            token_ids_L=np.array(tokens, np.int32),
            logprobs_L=np.array(
                [fake_logprob(theta, p, t) for (_, theta), p, t in zip(held, before, tokens, strict=True)], np.float32
            ),
            versions_L=np.array([version for version, _ in held], np.int32),
            stop_reason="stop",
        )


@dataclass
class FakeSamplers:
    """Starts samplers, and does to them what it was told."""

    seconds: Seconds = lambda *what: 1.0
    failing_starts: list[tuple[str, str, Callable[[], WeaverRLError]]] = field(default_factory=list)
    """(name, "start" | "restart", error): each fails one such start of that name, in order."""
    wrong: dict[tuple[str, int], int] = field(default_factory=dict)
    """(name, version): how many of its loads of that version are wrong."""
    upsets: list[tuple[str, str, str]] = field(default_factory=list)
    """(name, "start" | "restart" | "load" | "probe" | "probe v2", "die" | "hang"): at its next such call, once."""
    asked: list[tuple[str, str]] = field(default_factory=list)
    """(name, group) in the order of the requests."""
    made: list[FakeSampler] = field(default_factory=list)

    async def start(self, name: str) -> FakeSampler:
        sampler = FakeSampler(name, len(self.made), self)
        call = "restart" if any(other.name == name for other in self.made) else "start"
        await self.before(sampler, call)
        await sampler.answer("starts its engine", self.seconds("start", name, sampler.serial))
        for index, (*which, error) in enumerate(self.failing_starts):
            if which == [name, call]:
                del self.failing_starts[index]
                raise error()
        self.made.append(sampler)
        return sampler

    async def before(self, sampler: FakeSampler, call: str) -> None:
        for upset in self.upsets:
            if upset[:2] == (sampler.name, call):
                self.upsets.remove(upset)
                sampler.die() if upset[2] == "die" else sampler.hang()
                return

    def newest(self, name: str) -> FakeSampler | None:
        """The one behind a name that lives."""
        return next((s for s in reversed(self.made) if s.name == name and not s.dead.is_set()), None)


class FakeRewardWorker(Mortal):
    """One component, a function of the text."""

    def __init__(self, name: str, serial: int, factory: FakeRewardWorkers) -> None:
        super().__init__(name)
        self._serial = serial
        self._factory = factory
        self.num_scoring = 0

    async def score(self, rollouts: Sequence[Rollout]) -> Sequence[tuple[RewardComponent, ...]]:
        group = rollouts[0].rollout_id.rpartition("-")[0]
        self._factory.asked.append(group)
        number = len(self._factory.asked) - 1
        if (upset := self._factory.upsets.get(number)) is not None:
            self.die() if upset == "die" else self.hang()
        self.num_scoring += 1
        assert self.num_scoring == 1, "a worker was given two groups at once"
        try:
            await self.answer(f"scores group {group}", self._factory.seconds("reward", group, number), about=(group,))
        finally:
            self.num_scoring -= 1
        return [(RewardComponent(name="task", value=fake_draw(r.text, below=3) / 2),) for r in rollouts]


@dataclass
class FakeRewardWorkers:
    """Starts reward workers."""

    seconds: Seconds = lambda *what: 0.1
    upsets: dict[int, str] = field(default_factory=dict)
    """The how-manieth group that is scored: "die" or "hang"."""
    failing_starts: list[WeaverRLError] = field(default_factory=list)
    """Each fails one start in place of a lost worker, in order."""
    asked: list[str] = field(default_factory=list)
    made: list[FakeRewardWorker] = field(default_factory=list)

    async def start(self, name: str) -> FakeRewardWorker:
        worker = FakeRewardWorker(name, len(self.made), self)
        await worker.answer("loads the rewards", self.seconds("start", name, worker._serial))
        if self.failing_starts and any(other.name == name for other in self.made):
            raise self.failing_starts.pop(0)
        self.made.append(worker)
        return worker


@dataclass
class LosableLearner(FakeLearner):
    """Takes time, and is lost or hangs at the calls it is told; until its restart it answers nothing then."""

    seconds: Seconds = lambda *what: 1.0
    upsets: dict[tuple[str, int], str] = field(default_factory=dict)
    """(operation, how-manieth call of it): "die", before its work; "late", after it; or "hang"."""
    thetas: dict[int, float] = field(default_factory=dict)
    """theta by version, as last published."""
    num_calls: Counter[str] = field(default_factory=Counter)
    lost: bool = False

    async def _work(self, operation: str, work: Callable[[], Any]) -> Any:
        number = self.num_calls[operation]
        self.num_calls[operation] += 1
        upset = self.upsets.get((operation, number))
        with current_waits().waiting("learner rank 0", operation, timeout_s=600):
            await asyncio.sleep(HANGS if upset == "hang" else self.seconds(operation, number))
            self.lost = self.lost or upset == "die"
            if self.lost:
                raise LearnerLostError(f"learner rank 0 died during {operation}")
            result = await work()
        if upset == "late":
            self.lost = True
            raise LearnerLostError(f"learner rank 0 died at the end of {operation}")
        return result

    async def forward(self, data: Sequence[Datum], temperature: float = 1.0) -> ForwardOutput:
        return await self._work("forward", lambda: super(LosableLearner, self).forward(data, temperature))

    async def forward_backward(
        self, data: Sequence[Datum], loss: Any, temperature: float = 1.0, sum_weights: float | None = None
    ) -> ForwardBackwardOutput:
        work = super().forward_backward
        return await self._work("forward_backward", lambda: work(data, loss, temperature, sum_weights))

    async def optim_step(self, params: AdamParams) -> OptimStepOutput:
        work = super().optim_step
        return await self._work("optim_step", lambda: work(params))

    async def publish_weights(self, version: int) -> PublishedWeights:
        work = super().publish_weights
        weights = await self._work("publish_weights", lambda: work(version))
        self.thetas[version] = weights.handle
        return weights

    async def save_state(self, directory: Path) -> None:
        work = super().save_state
        await self._work("save_state", lambda: work(directory))

    async def load_state(self, directory: Path) -> None:
        work = super().load_state
        await self._work("load_state", lambda: work(directory))

    async def save_hf(self, directory: Path) -> None:
        work = super().save_hf
        await self._work("save_hf", lambda: work(directory))

    async def restart(self) -> None:
        self.lost = False
        await self._work("restart", super().restart)


@dataclass
class FleetLog:
    """What a fleet tells of samplers and groups."""

    joined: list[str] = field(default_factory=list)
    lost: list[tuple[str, str, int]] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    reissued: list[tuple[str, str]] = field(default_factory=list)

    def sampler_joined(self, name: str) -> None:
        self.joined.append(name)

    def sampler_lost(self, name: str, reason: str, num_groups: int) -> None:
        self.lost.append((name, reason, num_groups))

    def sampler_left(self, name: str) -> None:
        self.left.append(name)

    def group_reissued(self, group_id: str, sampler: str, reason: str) -> None:
        self.reissued.append((group_id, sampler))


def _now() -> float:
    return asyncio.get_running_loop().time()
