"""The engines of a server: one for a base model with all its adapters, one for each model that was trained whole.

It starts them when they are needed and anew after a loss; it knows no client and no checkpoint but its directory.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group

from actors.calls import answer
from actors.cluster import reserve
from actors.ending import end_actor
from actors.identity import Identity
from actors.lineup import PreparedModel
from actors.sampler import SamplerSpec
from actors.sampler_replica import ANSWER_MARGIN_S, RaySampler
from actors.spawn import spawn_sampler
from weaver_rl.engines.config import LoraLimits
from weaver_rl.errors import ActorFailedError, EngineLostError, ServiceError
from weaver_rl.placement import Placement, plan_placement
from weaver_rl.rollout import SamplingConfig
from weaver_rl.service.config import ServeConfig
from weaver_rl.service.roles import PauseMode, SamplerWeights
from weaver_rl.service.weight_turns import WeightTurns
from weaver_rl.types import Adapter, GroupSample, PromptLogprobs, SampleRequest
from weaver_rl.waits import current_waits

T = TypeVar("T")

LOAD_TIMEOUT_S = 600.0
WATCH_EVERY_S = 5.0


class EngineHost:
    """One engine, started when it is first used.

    Args:
        placement: the bundle of one sampler.
        adapters: the engine takes LoRA adapters.
        generate_timeout_s: how long one request may take.
    """

    def __init__(
        self,
        name: str,
        prepared: PreparedModel,
        placement: Placement,
        config: ServeConfig,
        *,
        adapters: bool,
        num_threads: int | None,
    ) -> None:
        self.name = name
        self._prepared = prepared
        self._placement = placement
        self._config = config
        self._adapters = adapters
        self._num_threads = num_threads
        self._room: PlacementGroup | None = None
        self._actor: Any = None
        self._watch: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._paused: PauseMode | None = None
        self.turns: WeightTurns[SamplerWeights] = WeightTurns(name, self._load)

    @property
    def is_up(self) -> bool:
        return self._actor is not None

    async def actor(self) -> Any:
        """The actor, its engine up. Raises ResourcesError, ModelError, or ActorFailedError when it died meanwhile."""
        async with self._starting:
            if self._actor is None:
                self._actor = await self._start()
            return self._actor

    async def ask(self, doing: str, call: Callable[[Any], Any], timeout_s: float) -> Any:
        """One call of the actor. Raises ActorFailedError when it died or was too late: the next starts another."""
        actor = await self.actor()
        reference = call(actor)
        try:
            return await answer(reference, actor=self.name, doing=doing, timeout_s=timeout_s)
        except EngineLostError:  # a step of the engine failed: the engine itself goes on
            raise
        except ActorFailedError:
            await self._lose(actor)
            raise
        except asyncio.CancelledError:
            ray.cancel(reference)  # frees the engine of what nobody waits for any more
            raise

    @contextlib.asynccontextmanager
    async def holding(self, weights: SamplerWeights) -> AsyncIterator[None]:
        """For the length of the block the engine samples with these weights (an engine with adapters has them all)."""
        if self._adapters:
            yield
            return
        async with self.turns.using(weights):
            yield

    async def pause(self, mode: PauseMode) -> None:
        """See `Samplers`."""
        self._paused = mode
        if self.is_up:
            await self.ask(f"pausing ({mode})", lambda actor: actor.pause.remote(mode), LOAD_TIMEOUT_S)

    async def resume(self) -> None:
        """See `Samplers`."""
        self._paused = None
        if self.is_up:
            await self.ask("resuming", lambda actor: actor.resume.remote(), LOAD_TIMEOUT_S)

    async def close(self) -> None:
        """Ends the engine in good order and gives its room back."""
        async with self._starting:
            actor, self._actor = self._actor, None
            await self._end(actor, kill=False)

    async def _load(self, weights: SamplerWeights) -> None:
        directory = weights.directory or self._prepared.model_dir
        await self.ask(
            f"loading weights v{weights.version}",
            lambda actor: actor.load_directory.remote(directory, weights.version),
            LOAD_TIMEOUT_S,
        )

    async def _start(self) -> Any:
        served = self._prepared.config
        actor: Any = None
        try:
            self._room = await reserve(self.name, self._placement.bundles, self._config.cluster.start_timeout_s)
            actor = spawn_sampler(served.sampler, self._placement, self._room, 0, self._num_threads)
            await answer(
                actor.start.remote(self._spec()),
                actor=self.name,
                doing="starting its engine",
                timeout_s=served.sampler.start_timeout_s + ANSWER_MARGIN_S,
            )
            identity: Identity = await answer(
                actor.identity.remote(), actor=self.name, doing="saying which process it is", timeout_s=LOAD_TIMEOUT_S
            )
            if self._paused is not None:
                await answer(
                    actor.pause.remote(self._paused), actor=self.name, doing="pausing", timeout_s=LOAD_TIMEOUT_S
                )
        except BaseException:
            await asyncio.shield(self._end(actor, kill=True))
            raise
        replica = RaySampler(
            self.name,
            actor,
            identity,
            load_timeout_s=LOAD_TIMEOUT_S,
            unresponsive_after_s=served.sampler.unresponsive_after_s,
        )
        self._watch = asyncio.create_task(self._watch_over(actor, replica))
        return actor

    def _spec(self) -> SamplerSpec:
        served = self._prepared.config
        return SamplerSpec(
            name=self.name,
            model_dir=self._prepared.model_dir,
            engine_args={"max_model_len": self._prepared.max_length} | served.sampler.engine_args,
            seed=self._config.seed,
            stop_token_ids=self._prepared.stop_tokens,
            tensor_parallel=served.sampler.tensor_parallel,
            transport="object_store",
            start_timeout_s=served.sampler.start_timeout_s,
            with_tokenizer=True,
            lora=LoraLimits(max_loras=served.max_loras, max_rank=served.max_lora_rank) if self._adapters else None,
        )

    async def _watch_over(self, actor: Any, replica: RaySampler) -> None:
        while True:
            await asyncio.sleep(min(WATCH_EVERY_S, self._prepared.config.sampler.unresponsive_after_s))
            try:
                await replica.check()
            except ActorFailedError:
                await self._lose(actor)
                return

    async def _lose(self, actor: Any) -> None:
        """Ends what is left of it: calls that still wait for it fail, and the next one starts another."""
        if self._actor is not actor:
            return
        self._actor = None
        self.turns.forget()
        await asyncio.shield(self._end(actor, kill=True))

    async def _end(self, actor: Any, *, kill: bool) -> None:
        watch, self._watch = self._watch, None
        if watch is not None and watch is not asyncio.current_task():
            watch.cancel()
        current_waits().forget(self.name)
        if actor is not None:
            await end_actor(actor, kill=kill)
        room, self._room = self._room, None
        if room is not None:
            remove_placement_group(room)


class RaySamplers:
    """All engines of a server: `Samplers` of the service.

    Args:
        cluster_gpus: GPUs of the whole cluster.
        num_threads: OpenMP threads of a CPU engine, where the configuration leaves them open.
    """

    def __init__(
        self, config: ServeConfig, prepared: dict[str, PreparedModel], *, cluster_gpus: float, num_threads: int
    ) -> None:
        self._config = config
        self._prepared = prepared
        self._cluster_gpus = cluster_gpus
        self._num_threads = num_threads
        self._shared = {name: self._host(f"engine of {name}", name, adapters=True) for name in prepared}
        self._whole: dict[str, EngineHost] = {}

    async def preload(self, base_model: str) -> None:
        """Starts the engine of a base."""
        await self._shared[base_model].actor()

    async def sample(self, weights: SamplerWeights, request: SampleRequest, sampling: SamplingConfig) -> GroupSample:
        """See `Samplers`."""
        request = replace(request, adapter=_adapter(weights))
        return await self._ask(weights, "sampling", lambda actor: actor.sample.remote(request, sampling))

    async def prompt_logprobs(
        self, weights: SamplerWeights, token_ids: Sequence[int], temperature: float
    ) -> PromptLogprobs:
        """See `Samplers`."""
        adapter = _adapter(weights)
        return await self._ask(
            weights,
            "scoring a prompt",
            lambda actor: actor.prompt_logprobs.remote(tuple(token_ids), temperature, adapter),
        )

    async def pause(self, model_id: str, mode: PauseMode) -> None:
        """See `Samplers`."""
        await self._whole_host(model_id).pause(mode)

    async def resume(self, model_id: str) -> None:
        """See `Samplers`."""
        await self._whole_host(model_id).resume()

    async def close(self, model_id: str) -> None:
        """See `Samplers`."""
        host = self._whole.pop(model_id, None)
        if host is not None:
            await host.close()

    async def close_all(self) -> None:
        """Ends every engine."""
        hosts = [*self._shared.values(), *self._whole.values()]
        await asyncio.gather(*(host.close() for host in hosts), return_exceptions=True)

    async def _ask(self, weights: SamplerWeights, doing: str, call: Callable[[Any], Awaitable[T]]) -> T:
        host = self._of(weights)
        async with host.holding(weights):
            answered: T = await host.ask(doing, call, self._config.operations.timeout_s)
            return answered

    def _of(self, weights: SamplerWeights) -> EngineHost:
        if weights.mode != "full_ft":
            return self._shared[weights.base_model]
        assert weights.model_id is not None
        if weights.model_id not in self._whole:
            self._whole[weights.model_id] = self._host(
                f"engine of {weights.model_id}", weights.base_model, adapters=False
            )
        return self._whole[weights.model_id]

    def _whole_host(self, model_id: str) -> EngineHost:
        if model_id not in self._whole:
            raise ServiceError(
                "not_sampling",
                f"model {model_id} has no engine yet: nothing of it was sampled from, so there is nothing to pause",
                status=409,
            )
        return self._whole[model_id]

    def _host(self, name: str, base_model: str, *, adapters: bool) -> EngineHost:
        served = self._prepared[base_model].config
        whole = plan_placement(
            self._config.cluster, served.learner, served.sampler, cluster_gpus=self._cluster_gpus, may_colocate=False
        )
        return EngineHost(
            name,
            self._prepared[base_model],
            whole.only_samplers(),
            self._config,
            adapters=adapters,
            num_threads=served.sampler.num_threads or self._num_threads,
        )


def _adapter(weights: SamplerWeights) -> Adapter | None:
    if weights.mode != "lora":
        return None
    assert weights.directory is not None
    return Adapter(name=weights.key, directory=weights.directory)
