"""The engines of a server: one for a base model with all its adapters, one for each model that was trained whole.

It starts them when they are needed and anew after a loss; it knows no client and no checkpoint but its directory.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from actors.calls import GIVE_UP_MARGIN_S
from actors.engine_process import LOAD_TIMEOUT_S, EngineProcess, engine_spec
from actors.lineup import PreparedModel
from actors.spawn import MAX_CALLS_IN_FLIGHT
from weaver_rl.errors import ActorFailedError, CallFailedError, EngineLostError
from weaver_rl.placement import Placement, plan_placement
from weaver_rl.rollout import SamplingConfig
from weaver_rl.service.config import ServeConfig
from weaver_rl.service.roles import PauseMode, SamplerWeights
from weaver_rl.service.weight_turns import WeightTurns
from weaver_rl.types import Adapter, Completion, GroupSample, PromptLogprobs, SampleRequest
from weaver_rl.waits import current_waits

log = logging.getLogger(__name__)

WATCH_EVERY_S = 5.0
MAX_REQUESTS = MAX_CALLS_IN_FLIGHT - 100
"""Samples and scores in an actor at a time: pauses, loads and heartbeats must always find room beside them."""
ABORT_AGAIN_S = 0.5


class EngineHost:
    """One engine, started when it is first used.

    Args:
        placement: the bundle of one sampler.
        adapters: the engine takes LoRA adapters.
        paused: how it was paused before there was an engine.
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
        paused: PauseMode | None = None,
    ) -> None:
        self.name = name
        self.base_model = prepared.config.name
        self._prepared = prepared
        self._placement = placement
        self._config = config
        self._adapters = adapters
        self._num_threads = num_threads
        self._engine: EngineProcess | None = None
        self._starting: asyncio.Task[EngineProcess] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._closed = False
        self._paused = paused
        self._telling = asyncio.Lock()
        self._room = asyncio.Semaphore(MAX_REQUESTS)
        self._outside: set[asyncio.Timeout] = set()
        self._inside: set[asyncio.Future[None]] = set()
        self._num_requests = 0
        self.turns: WeightTurns[SamplerWeights, EngineProcess] = WeightTurns(name, self._load)

    @property
    def is_up(self) -> bool:
        return self._engine is not None

    @property
    def is_idle(self) -> bool:
        """Nobody waits for it."""
        return not self._num_requests

    async def engine(self) -> EngineProcess:
        """The engine, up. All who ask meanwhile share one start and its failure; a later call tries again.

        Raises ResourcesError or ActorFailedError when it did not start, EngineLostError once the host is closed.
        """
        if self._closed:
            raise EngineLostError(f"{self.name} was closed")
        if self._engine is not None:
            return self._engine
        starting = self._starting
        if starting is None or starting.done():
            starting = self._starting = asyncio.create_task(self._start())
            starting.add_done_callback(self._start_ended)
        with current_waits().waiting(self.name, "starts its engine"):
            await asyncio.wait([starting])  # whoever gives up leaves the start to the others
        if starting.cancelled():
            raise EngineLostError(f"{self.name} was closed")
        return starting.result()

    async def sample(self, weights: SamplerWeights, request: SampleRequest, sampling: SamplingConfig) -> GroupSample:
        """See `Samplers`. Before it is in the engine, `pause("abort")` ends it with nothing."""
        outside = asyncio.timeout(None)
        self._outside.add(outside)
        try:
            async with outside, self._admitted(weights) as engine:
                if outside not in self._outside:  # just aborted
                    return _nothing(request, self.name)
                self._outside.remove(outside)
                group: GroupSample = await self._watched_sample(engine, request, sampling)
                return group
        except TimeoutError:
            if not outside.expired():
                raise
            return _nothing(request, self.name)
        finally:
            self._outside.discard(outside)

    async def prompt_logprobs(
        self, weights: SamplerWeights, token_ids: Sequence[int], temperature: float, adapter: Adapter | None
    ) -> PromptLogprobs:
        """See `Samplers`."""
        async with self._admitted(weights) as engine:
            scored: PromptLogprobs = await self._ask(
                engine,
                "scoring a prompt",
                lambda actor: actor.prompt_logprobs.remote(tuple(token_ids), temperature, adapter),
                self._deadline_s(),
            )
            return scored

    async def pause(self, mode: PauseMode) -> None:
        """See `Samplers`. Without an engine, the next comes up paused."""
        self._paused = mode
        if mode == "abort":
            for outside in self._outside:
                outside.reschedule(asyncio.get_running_loop().time())
            self._outside.clear()
        before = set(self._inside)
        await self._tell(mode)
        # A sample that was on its way may come to the engine after the pause, and would wait there.
        while mode == "abort" and before and self._paused == "abort":
            _, before = await asyncio.wait(before, timeout=ABORT_AGAIN_S)
            if before and self._paused == "abort":
                await self._tell(mode)

    async def resume(self) -> None:
        """See `Samplers`."""
        self._paused = None
        await self._tell(None)

    async def close(self) -> None:
        """Ends the engine in good order and gives its room back; a start is broken off. There is no other after it."""
        self._closed = True
        self.turns.forget()
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.wait([self._starting])
        engine, self._engine = self._engine, None
        if engine is not None:
            self._stop_watching()
            await engine.end(kill=False)

    # -- requests --------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _admitted(self, weights: SamplerWeights) -> AsyncIterator[EngineProcess]:
        """The engine, which samples with these weights for the length of the block (one with adapters has them all)."""
        self._num_requests += 1
        try:
            async with self._room:
                if self._adapters:
                    yield await self.engine()
                    return
                async with self.turns.using(weights) as engine:
                    yield engine
        finally:
            self._num_requests -= 1

    async def _watched_sample(self, engine: EngineProcess, request: SampleRequest, sampling: SamplingConfig) -> Any:
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._inside.add(ended)
        try:
            return await self._ask(
                engine,
                "sampling",
                lambda actor: actor.sample.remote(request, sampling),
                self._deadline_s(),
            )
        finally:
            self._inside.discard(ended)
            ended.set_result(None)

    async def _ask(self, engine: EngineProcess, doing: str, call: Callable[[Any], Any], timeout_s: float) -> Any:
        """One call of that engine and of no other: another has other weights. Raises ActorFailedError when it died or
        was too late, EngineLostError when it is not the host's any more."""
        if engine is not self._engine:
            raise EngineLostError(f"{self.name} was lost before it was {doing}")
        try:
            return await engine.ask(doing, call, timeout_s)
        except (EngineLostError, CallFailedError):  # a step or a call failed: the actor lives, and is watched
            raise
        except ActorFailedError as error:
            await self._lose(engine, error)
            raise

    def _deadline_s(self) -> float:
        """Of one request in the engine: later than that of the service, which costs one client its request only."""
        return self._config.operations.timeout_s + GIVE_UP_MARGIN_S

    async def _load(self, weights: SamplerWeights) -> EngineProcess:
        engine = await self.engine()
        directory = weights.directory or self._prepared.model_dir
        await self._ask(
            engine,
            f"loading weights v{weights.version}",
            lambda actor: actor.load_directory.remote(directory, weights.version),
            LOAD_TIMEOUT_S,
        )
        return engine

    async def _tell(self, mode: PauseMode | None) -> None:
        """Pauses the engine or lets it go on, in the order of the calls; one that starts is told by its start."""
        async with self._telling:
            engine = self._engine
            if engine is None:
                return
            try:
                await engine.pause(mode)
            except ActorFailedError as error:
                if isinstance(error, (EngineLostError, CallFailedError)) and engine is self._engine:
                    raise
                await self._lose(engine, error)  # the next comes up as it was told

    # -- the engine ------------------------------------------------------------------------------------------------

    async def _start(self) -> EngineProcess:
        config = self._prepared.config.sampler
        engine = await EngineProcess.start(
            engine_spec(self.name, self._prepared, self._config.seed, adapters=self._adapters),
            config,
            self._placement,
            room_timeout_s=self._config.cluster.start_timeout_s,
            num_threads=self._num_threads,
        )
        try:
            told: PauseMode | None = None
            while told != self._paused:  # it may change while the engine is told
                told = self._paused
                await engine.pause(told)
        except BaseException:  # boundary: cleans up, then raises again
            await asyncio.shield(engine.end(kill=True))
            raise
        self._engine = engine
        self._watching = asyncio.create_task(self._watch_over(engine))
        return engine

    def _start_ended(self, starting: asyncio.Task[EngineProcess]) -> None:
        if self._starting is starting:
            self._starting = None
        if not starting.cancelled():
            starting.exception()  # whoever waited has it; perhaps nobody does any more

    async def _watch_over(self, engine: EngineProcess) -> None:
        while True:
            await asyncio.sleep(min(WATCH_EVERY_S, self._prepared.config.sampler.unresponsive_after_s))
            try:
                await engine.replica.check()
            except ActorFailedError as error:
                await self._lose(engine, error)
                return

    async def _lose(self, engine: EngineProcess, reason: ActorFailedError) -> None:
        """Ends what is left of it: calls that still wait for it fail, and the next one starts another."""
        if self._engine is not engine:
            return
        log.warning("%s is lost: %s", self.name, reason)
        self._engine = None
        self.turns.forget()
        self._stop_watching()
        await asyncio.shield(engine.end(kill=True))

    def _stop_watching(self) -> None:
        watching, self._watching = self._watching, None
        if watching is not None and watching is not asyncio.current_task():
            watching.cancel()


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
        self._paused: dict[str, PauseMode] = {}
        """Of models without an engine yet."""

    def num_up(self) -> Counter[str]:
        """Engines that are up, by base model."""
        return Counter(host.base_model for host in (*self._shared.values(), *self._whole.values()) if host.is_up)

    async def preload(self, base_model: str) -> None:
        """Starts the engine of a base."""
        await self._shared[base_model].engine()

    async def sample(self, weights: SamplerWeights, request: SampleRequest, sampling: SamplingConfig) -> GroupSample:
        """See `Samplers`."""
        request = replace(request, adapter=_adapter(weights))
        return await self._of(weights).sample(weights, request, sampling)

    async def prompt_logprobs(
        self, weights: SamplerWeights, token_ids: Sequence[int], temperature: float
    ) -> PromptLogprobs:
        """See `Samplers`."""
        return await self._of(weights).prompt_logprobs(weights, token_ids, temperature, _adapter(weights))

    async def pause(self, model_id: str, mode: PauseMode) -> None:
        """See `Samplers`. A model without an engine gets one that is paused."""
        if model_id in self._whole:
            await self._whole[model_id].pause(mode)
        else:
            self._paused[model_id] = mode

    async def resume(self, model_id: str) -> None:
        """See `Samplers`."""
        self._paused.pop(model_id, None)
        if model_id in self._whole:
            await self._whole[model_id].resume()

    async def close(self, model_id: str) -> None:
        """See `Samplers`."""
        self._paused.pop(model_id, None)
        host = self._whole.pop(model_id, None)
        if host is not None:
            await host.close()

    async def close_all_but(self, model_ids: Collection[str]) -> None:
        """See `Samplers`."""
        for model_id in self._paused.keys() - set(model_ids):
            del self._paused[model_id]
        idle = [model_id for model_id, host in self._whole.items() if model_id not in model_ids and host.is_idle]
        await asyncio.gather(*(self.close(model_id) for model_id in idle))

    async def close_all(self) -> None:
        """Ends every engine."""
        hosts = [*self._shared.values(), *self._whole.values()]
        await asyncio.gather(*(host.close() for host in hosts), return_exceptions=True)

    def _of(self, weights: SamplerWeights) -> EngineHost:
        if weights.mode != "full_ft":
            return self._shared[weights.base_model]
        model_id = weights.model_id
        assert model_id is not None
        if model_id not in self._whole:
            paused = self._paused.pop(model_id, None)
            self._whole[model_id] = self._host(
                f"engine of {model_id}", weights.base_model, adapters=False, paused=paused
            )
        return self._whole[model_id]

    def _host(self, name: str, base_model: str, *, adapters: bool, paused: PauseMode | None = None) -> EngineHost:
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
            paused=paused,
        )


def _adapter(weights: SamplerWeights) -> Adapter | None:
    if weights.mode != "lora":
        return None
    assert weights.directory is not None
    return Adapter(name=weights.key, directory=weights.directory)


def _nothing(request: SampleRequest, name: str) -> GroupSample:
    """What an abort leaves of a request that no engine had yet."""
    nothing = Completion(
        token_ids_L=np.empty(0, np.int32),
        logprobs_L=np.empty(0, np.float32),
        versions_L=np.empty(0, np.int32),
        stop_reason="abort",
    )
    num = len(request.seeds_G)
    return GroupSample(group_id=request.group_id, completions_G=(nothing,) * num, sampler=name, texts_G=("",) * num)
