"""Named fakes of sampler actors and of the cluster that runs them. They start no Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError

import actors.engine_process
from actors.engine_host import EngineHost, RaySamplers
from actors.identity import Identity
from actors.lineup import PreparedModel
from actors.sampler import Heartbeat
from actors.sampler_replica import RaySampler
from weaver_rl.config_file import load_file
from weaver_rl.rollout import SamplingConfig
from weaver_rl.service.calls import LineupModel
from weaver_rl.service.config import ServeConfig
from weaver_rl.service.roles import SamplerWeights
from weaver_rl.types import Completion, GroupSample, SampleRequest

CONFIG = load_file(ServeConfig, Path(__file__).parents[2] / "configs" / "serve_quickstart.yaml")
BASE = "weaver-rl/tiny"
SAMPLING = SamplingConfig(max_tokens=4)
OF_THE_BASE = -1
"""Version of an engine that was started and given no other weights."""


class FakeActor:
    """A sampler whose every method takes a while; what is asked of it after its end fails as Ray says it."""

    def __init__(self, cluster: FakeCluster, index: int) -> None:
        self.index = index
        self.version = OF_THE_BASE
        self.paused: str | None = None
        self.is_dead = False
        self.told: list[str] = []
        self.in_flight: dict[str, asyncio.Future[str]] = {}
        self.most_in_flight = 0
        self.beat = Heartbeat(num_steps=0, is_busy=False)
        self._cluster = cluster
        self._calls: set[asyncio.Task[Any]] = set()

    def __getattr__(self, name: str) -> Any:
        return Method(self, f"_{name}")

    def begin(self, method: str, *args: Any) -> asyncio.Task[Any]:
        call = asyncio.ensure_future(self._run(getattr(type(self), method)(self, *args)))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        return call

    async def _run(self, call: Coroutine[Any, Any, Any]) -> Any:
        try:
            return await call
        except asyncio.CancelledError:
            if self.is_dead:
                raise ActorDiedError from None
            raise

    def die(self) -> None:
        self.is_dead = True
        for call in list(self._calls):
            call.cancel()

    async def _start(self, spec: Any) -> int:
        await asyncio.sleep(self._cluster.start_s)
        if self._cluster.start_error is not None:
            raise self._cluster.start_error
        return 1

    async def _identity(self) -> Identity:
        return Identity(pid=1, node_id="node", started_at=None)

    async def _load_directory(self, directory: Path, version: int) -> None:
        await asyncio.sleep(self._cluster.load_s)
        self.version = version
        if self._cluster.after_load is not None:
            self._cluster.after_load()

    async def _pause(self, mode: str) -> None:
        self.told.append(mode)
        await asyncio.sleep(self._cluster.tell_s)
        self.paused = mode
        if mode == "abort":
            for waiting in self.in_flight.values():
                waiting.set_result("abort")
            self.in_flight.clear()

    async def _resume(self) -> None:
        self.told.append("resume")
        await asyncio.sleep(self._cluster.tell_s)
        self.paused = None

    async def _sample(self, request: SampleRequest, sampling: SamplingConfig) -> GroupSample:
        await asyncio.sleep(self._cluster.on_the_way_s)
        if self._cluster.sample_error is not None:
            raise self._cluster.sample_error
        aborted = self.in_flight[request.group_id] = asyncio.get_running_loop().create_future()
        self.most_in_flight = max(self.most_in_flight, len(self.in_flight))
        try:
            reason = "stop"
            left_s = self._cluster.sample_s
            while left_s > 0 or self.paused is not None:
                done, _ = await asyncio.wait([aborted], timeout=0.25)
                if done:
                    reason = aborted.result()
                    break
                left_s -= 0.0 if self.paused else 0.25
        finally:
            self.in_flight.pop(request.group_id, None)
        one = Completion(
            token_ids_L=np.array([3], np.int32),
            logprobs_L=np.array([-1.0], np.float32),
            versions_L=np.array([self.version], np.int32),
            stop_reason=reason,  # type: ignore[arg-type]
        )
        return GroupSample(group_id=request.group_id, completions_G=(one,), sampler=str(self.index), texts_G=("x",))


class Method:
    """`actor.method`, to be called as `actor.method.remote(…)`."""

    def __init__(self, actor: FakeActor, name: str) -> None:
        self._actor = actor
        self._name = name

    def remote(self, *args: Any) -> Any:
        if self._actor.is_dead:
            dead: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            dead.set_exception(ActorDiedError())
            return dead
        return self._actor.begin(self._name, *args)


class FakeReplica(RaySampler):
    """Its `check` is the real one."""

    def __init__(self, name: str, actor: FakeActor, identity: Identity, **options: float) -> None:
        self.name = name
        self._actor = FakeHeart(actor)
        self._unresponsive_after_s = options["unresponsive_after_s"]
        self._num_steps, self._stepped_at = -1, 0.0


class FakeHeart:
    """The one method that a watch asks for."""

    def __init__(self, actor: FakeActor) -> None:
        self._actor = actor
        self.heartbeat = self

    def remote(self) -> Any:
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        answer.set_exception(ActorDiedError()) if self._actor.is_dead else answer.set_result(self._actor.beat)
        return answer


class FakeCluster:
    """Rooms and actors, counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.actors: list[FakeActor] = []
        self.rooms: set[int] = set()
        self.num_reserved = 0
        self.reserve_s = 1.0
        self.reserve_error: Exception | None = None
        self.start_s = 5.0
        self.start_error: Exception | None = None
        self.load_s = 1.0
        self.after_load: Callable[[], None] | None = None
        self.tell_s = 0.5
        self.sample_s = 1.0
        self.on_the_way_s = 0.0
        self.sample_error: Exception | None = None
        module = actors.engine_process
        monkeypatch.setattr(module, "reserve", self._reserve)
        monkeypatch.setattr(module, "spawn_sampler", self._spawn)
        monkeypatch.setattr(module, "end_actor", self._end)
        monkeypatch.setattr(module, "model_on", self._model_on)
        monkeypatch.setattr(module, "remove_placement_group", self.rooms.discard)
        monkeypatch.setattr(module, "RaySampler", FakeReplica)
        monkeypatch.setattr(module.ray, "cancel", lambda call: call.cancel())

    @property
    def alive(self) -> list[FakeActor]:
        return [actor for actor in self.actors if not actor.is_dead]

    async def _reserve(self, name: str, bundles: Any, timeout_s: float) -> int:
        self.num_reserved += 1
        room = self.num_reserved
        await asyncio.sleep(self.reserve_s)
        if self.reserve_error is not None:
            raise self.reserve_error
        self.rooms.add(room)
        return room

    def _spawn(self, *args: Any) -> FakeActor:
        self.actors.append(FakeActor(self, len(self.actors)))
        return self.actors[-1]

    async def _model_on(self, actor: FakeActor, directory: Path, **_: Any) -> Path:
        return directory

    async def _end(self, actor: FakeActor, *, kill: bool) -> None:
        await asyncio.sleep(0.0 if kill else 0.5)
        actor.die()


def prepared() -> PreparedModel:
    lineup = LineupModel(
        name=BASE, training_modes=("lora", "full_ft"), max_length=64, tokenizer_path="", max_lora_rank=8, vocab_size=99
    )
    return PreparedModel(config=CONFIG.models[0], model_dir=Path("/base"), stop_tokens=(2,), lineup=lineup)


def all_samplers() -> RaySamplers:
    return RaySamplers(CONFIG, {BASE: prepared()}, cluster_gpus=0.0, num_threads=1)


def whole(version: int, model_id: str = "m") -> SamplerWeights:
    """The weights of a model trained whole."""
    return SamplerWeights(
        base_model=BASE,
        mode="full_ft",
        directory=Path(f"/{model_id}/v{version}"),
        key=f"{model_id}-{version}",
        model_id=model_id,
        version=version,
    )


def base() -> SamplerWeights:
    return SamplerWeights(base_model=BASE, mode=None, directory=None, key="base", model_id=None, version=0)


def request(name: str = "g", num: int = 1) -> SampleRequest:
    return SampleRequest(group_id=name, token_ids_P=(1, 2), seeds_G=tuple(range(num)))


def host_of(samplers: RaySamplers, model_id: str = "m") -> EngineHost:
    return samplers._whole[model_id]


def version_of(group: GroupSample) -> int:
    return int(group.completions_G[0].versions_L[0])
