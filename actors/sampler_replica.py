"""One sampler's actor as the fleet sees it, and how one is made. It shares out nothing."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError

from actors.calls import answer, explained
from actors.ending import end_actor
from actors.identity import ActorFacts, Identity, this_process
from actors.model_files import model_on
from actors.sampler import Heartbeat, SamplerSpec
from weaver_rl.errors import ActorFailedError
from weaver_rl.rollout import SamplingConfig
from weaver_rl.types import Float32Array, GroupSample, PublishedWeights, SampleRequest
from weaver_rl.waits import current_waits

ANSWER_MARGIN_S = 10.0
MAX_FAILED_STEPS = 3
"""Failed engine steps in a row after which the engine is as good as lost."""


class RaySampler:
    """A started sampler.

    Args:
        load_timeout_s: how long a load or a probe may take.
        unresponsive_after_s: how long it may not answer, or make no engine step while it has work.
    """

    def __init__(
        self, name: str, actor: Any, identity: Identity, *, load_timeout_s: float, unresponsive_after_s: float
    ) -> None:
        self.name = name
        self.identity = identity
        self._actor = actor
        self._load_timeout_s = load_timeout_s
        self._unresponsive_after_s = unresponsive_after_s
        self._num_steps = -1
        self._stepped_at = time.monotonic()
        current_waits().describe(name, ActorFacts(identity, here=this_process().node_id))

    async def generate(
        self, requests: Sequence[SampleRequest], sampling: SamplingConfig
    ) -> AsyncIterator[Sequence[GroupSample]]:
        started = time.monotonic()
        stream = self._actor.generate.options(num_returns="streaming").remote(requests, sampling)
        ended = False
        try:
            async for reference in stream:
                yield await reference
            ended = True
        except RayError as error:
            ended = True
            seconds = time.monotonic() - started
            raise explained(error, self.name, f"sampling {len(requests)} groups", seconds) from error
        finally:
            if not ended:
                with contextlib.suppress(RayError):
                    ray.cancel(stream)

    async def load_weights(self, weights: PublishedWeights) -> None:
        await self._ask(self._actor.load_weights.remote(weights), f"loading weights v{weights.version}")

    async def score(self, token_ids: Sequence[int]) -> Float32Array:
        scored: Float32Array = await self._ask(self._actor.score.remote(tuple(token_ids)), "answering the probe")
        return scored

    async def check(self) -> None:
        """Raises ActorFailedError when the sampler must be replaced: it does not answer, or its engine is of no use."""
        heartbeat: Heartbeat = await answer(
            self._actor.heartbeat.remote(),
            actor=self.name,
            doing="answering whether it lives",
            timeout_s=self._unresponsive_after_s,
        )
        if heartbeat.is_closed:
            raise ActorFailedError(f"{self.name} lives and its engine has ended")
        if heartbeat.num_failed_in_a_row >= MAX_FAILED_STEPS:
            raise ActorFailedError(f"{self.name} has failed {heartbeat.num_failed_in_a_row} engine steps in a row")
        now = time.monotonic()
        if not heartbeat.is_busy or heartbeat.num_steps != self._num_steps:
            self._num_steps, self._stepped_at = heartbeat.num_steps, now
        elif now - self._stepped_at > self._unresponsive_after_s:
            raise ActorFailedError(
                f"{self.name} has work and its engine has made no step for {now - self._stepped_at:.0f} s "
                f"(sampler.unresponsive_after_s {self._unresponsive_after_s:g})"
            )

    async def close(self, *, kill: bool = False) -> None:
        current_waits().forget(self.name)
        await end_actor(self._actor, kill=kill)

    async def _ask(self, reference: Any, doing: str) -> Any:
        return await answer(reference, actor=self.name, doing=doing, timeout_s=self._load_timeout_s)


class RaySamplerFactory:
    """Makes samplers: the first of each name from an actor that is being made already, later ones from `spawn`.

    Args:
        spawned: actors by name, made while the model was still being prepared.
        spawn: makes an actor where there is room for it; raises ResourcesError where there is none.
        spec: what a sampler of a name starts with.
    """

    def __init__(
        self,
        spawned: dict[str, Any],
        spawn: Callable[[str], Awaitable[Any]],
        spec: Callable[[str], SamplerSpec],
        *,
        load_timeout_s: float,
        unresponsive_after_s: float,
    ) -> None:
        self._spawned = dict(spawned)
        self._spawn = spawn
        self._spec = spec
        self._load_timeout_s = load_timeout_s
        self._unresponsive_after_s = unresponsive_after_s
        self.replicas: dict[str, RaySampler] = {}

    async def start(self, name: str) -> RaySampler:
        actor = self._spawned.pop(name, None)
        if actor is None:
            actor = await self._spawn(name)
        spec = self._spec(name)
        try:
            # The sampler itself gives up first, and says where its engine stands.
            timeout_s = spec.start_timeout_s + ANSWER_MARGIN_S
            model_dir = await model_on(actor, spec.model_dir, name=name, start_timeout_s=timeout_s)
            spec = replace(spec, model_dir=model_dir)
            await answer(actor.start.remote(spec), actor=name, doing="starting its engine", timeout_s=timeout_s)
            identity = await answer(
                actor.identity.remote(), actor=name, doing="saying which process it is", timeout_s=self._load_timeout_s
            )
        except BaseException:  # boundary: cleans up, then raises again
            await asyncio.shield(end_actor(actor, kill=True))
            raise
        self.replicas[name] = RaySampler(
            name,
            actor,
            identity,
            load_timeout_s=self._load_timeout_s,
            unresponsive_after_s=self._unresponsive_after_s,
        )
        return self.replicas[name]
