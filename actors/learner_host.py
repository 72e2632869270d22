"""The learners of a server: one shared by all LoRA models of a base, one of its own for each model trained whole.

It starts them when they are needed and anew after a loss; it knows no client, no file of a checkpoint and no loss.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

from ray.util.placement_group import PlacementGroup, remove_placement_group

from actors.calls import first_error
from actors.cluster import reserve
from actors.learner import RayLearnerGroup
from actors.learner_start import start_learner
from actors.lineup import PreparedModel
from actors.spawn import Actors, spawn_learner
from weaver_rl.errors import ActorFailedError, ConfigError, LearnerLostError, ResourcesError
from weaver_rl.learner.adapter_config import AdapterConfig
from weaver_rl.losses.config import LossConfig
from weaver_rl.placement import Placement, plan_placement
from weaver_rl.service.config import ServeConfig
from weaver_rl.service.records import LoraParams, TrainingMode
from weaver_rl.types import AdamParams, Datum, ForwardBackwardOutput, ForwardOutput, OptimStepOutput

CHUNK_BYTES = 512 << 20


class LearnerHost:
    """One learner group, started when it is first used.

    Args:
        placement: the bundles of its ranks.
        on_lost: is told once for every group that was lost.
    """

    def __init__(
        self,
        name: str,
        prepared: PreparedModel,
        placement: Placement,
        config: ServeConfig,
        on_lost: Callable[[LearnerHost], None],
    ) -> None:
        self.name = name
        self.base_model = prepared.config.name
        self._prepared = prepared
        self._placement = placement
        self._config = config
        self._on_lost = on_lost
        self._actors = Actors()
        self._room: PlacementGroup | None = None
        self._group: RayLearnerGroup | None = None
        self._starting = asyncio.Lock()

    @property
    def is_up(self) -> bool:
        return self._group is not None

    async def group(self) -> RayLearnerGroup:
        """The group, up. Raises ResourcesError for lack of room, LearnerLostError if it died while it started."""
        async with self._starting:
            if self._group is None:
                self._group = await self._start()
            return self._group

    @contextlib.asynccontextmanager
    async def watched(self, group: RayLearnerGroup) -> AsyncIterator[None]:
        """An operation of that group: one that loses it ends what is left of it, so that the next starts anew."""
        try:
            yield
        except LearnerLostError:
            if self._group is group:
                self._group = None
                await self._end()
                self._on_lost(self)
            raise

    async def close(self) -> None:
        """Ends the ranks and gives their room back."""
        async with self._starting:
            self._group = None
            await self._end()

    async def _start(self) -> RayLearnerGroup:
        config = self._prepared.config.learner
        try:
            self._room = await reserve(self.name, self._placement.bundles, self._config.cluster.start_timeout_s)
            spawn_learner(self._actors, config, self._placement, self._room)
            await start_learner(
                self._actors.learner_ranks,
                config,
                model_dir=self._prepared.model_dir,
                seed=self._config.seed,
                transport="object_store",
                chunk_bytes=CHUNK_BYTES,
                name=self.name,
            )
        except BaseException as error:
            await asyncio.shield(self._end())
            cause = first_error(error)
            if isinstance(cause, ActorFailedError):
                raise LearnerLostError(str(cause)) from error
            raise cause from error
        return RayLearnerGroup(self._actors.learner_ranks, config.timeout_s, outlives_failed_calls=True)

    async def _end(self) -> None:
        await self._actors.kill_learner()
        if self._room is not None:
            remove_placement_group(self._room)
            self._room = None


class HostedModel:
    """One model in a host's group: `ModelLearner` of the service."""

    def __init__(self, host: LearnerHost, group: RayLearnerGroup, model: RayLearnerGroup) -> None:
        self._host = host
        self._group = group
        self._model = model

    async def forward(self, data: Sequence[Datum], temperature: float = 1.0) -> ForwardOutput:
        async with self._host.watched(self._group):
            return await self._model.forward(data, temperature)

    async def forward_backward(
        self, data: Sequence[Datum], loss: LossConfig, temperature: float = 1.0
    ) -> ForwardBackwardOutput:
        async with self._host.watched(self._group):
            return await self._model.forward_backward(data, loss, temperature, positions="all", with_grad_norm=True)

    async def optim_step(self, params: AdamParams) -> OptimStepOutput:
        async with self._host.watched(self._group):
            return await self._model.optim_step(params)

    async def save_state(self, directory: Path, with_optimizer: bool = True) -> None:
        async with self._host.watched(self._group):
            await self._model.save_state(directory, with_optimizer)

    async def load_state(self, directory: Path, with_optimizer: bool = True) -> None:
        async with self._host.watched(self._group):
            await self._model.load_state(directory, with_optimizer)

    async def save_for_sampler(self, directory: Path) -> None:
        async with self._host.watched(self._group):
            await self._model.save_for_sampler(directory)

    async def save_hf(self, directory: Path) -> None:
        async with self._host.watched(self._group):
            await self._model.save_hf(directory)


class RayLearners:
    """All learners of a server.

    Args:
        cluster_gpus: GPUs of the whole cluster.
    """

    def __init__(self, config: ServeConfig, prepared: dict[str, PreparedModel], *, cluster_gpus: float) -> None:
        self._config = config
        self._prepared = prepared
        self._cluster_gpus = cluster_gpus
        self._shared = {name: self._host(f"learner of {name}", name) for name in prepared}
        self._whole: dict[str, LearnerHost] = {}
        self._open: dict[str, tuple[LearnerHost, HostedModel]] = {}
        self._opening: dict[str, asyncio.Lock] = {}

    async def preload(self, base_model: str) -> None:
        """Starts the learner that LoRA models of a base share."""
        await self._shared[base_model].group()

    async def open(self, model_id: str, base_model: str, mode: TrainingMode, lora: LoraParams | None) -> HostedModel:
        """See `Learners`."""
        async with self._opening.setdefault(model_id, asyncio.Lock()):
            if model_id not in self._open:
                opening = self._open_lora if mode == "lora" else self._open_whole
                self._open[model_id] = await opening(model_id, base_model, lora or LoraParams())
            return self._open[model_id][1]

    def get(self, model_id: str) -> HostedModel | None:
        """See `Learners`."""
        return self._open[model_id][1] if model_id in self._open else None

    async def close(self, model_id: str) -> None:
        """See `Learners`."""
        async with self._opening.setdefault(model_id, asyncio.Lock()):
            host, model = self._open.pop(model_id, (None, None))
            if model_id in self._whole:
                await self._whole.pop(model_id).close()
            elif host is not None and model is not None and host.is_up:
                group = await host.group()
                with contextlib.suppress(LearnerLostError):
                    async with host.watched(group):
                        await group.remove_adapter(model_id)
        self._opening.pop(model_id, None)

    async def close_all(self) -> None:
        """Ends every learner."""
        hosts = [*self._shared.values(), *self._whole.values()]
        await asyncio.gather(*(host.close() for host in hosts), return_exceptions=True)

    async def _open_lora(self, model_id: str, base_model: str, lora: LoraParams) -> tuple[LearnerHost, HostedModel]:
        host = self._shared[base_model]
        limit = self._prepared[base_model].config.max_lora_rank
        if not 1 <= lora.rank <= limit:
            raise ConfigError(f"lora_config.rank is {lora.rank}; {base_model} allows 1..{limit}")
        group = await host.group()
        async with host.watched(group):
            await group.add_adapter(
                model_id,
                AdapterConfig(
                    rank=lora.rank,
                    train_attn=lora.train_attn,
                    train_mlp=lora.train_mlp,
                    train_unembed=lora.train_unembed,
                    seed=lora.seed if lora.seed is not None else 0,
                ),
            )
        return host, HostedModel(host, group, group.with_adapter(model_id))

    async def _open_whole(self, model_id: str, base_model: str, _lora: LoraParams) -> tuple[LearnerHost, HostedModel]:
        limit = self._prepared[base_model].config.max_full_ft_models
        taken = sum(host.base_model == base_model for host in self._whole.values())
        if model_id not in self._whole and taken >= limit:
            raise ResourcesError(
                f"{base_model} trains {limit} model(s) whole at a time and has {taken}: terminate one, or raise "
                "max_full_ft_models on the server"
            )
        host = self._whole.setdefault(model_id, self._host(f"learner of {model_id}", base_model))
        try:
            group = await host.group()
        except BaseException:
            self._whole.pop(model_id, None)
            raise
        return host, HostedModel(host, group, group)

    def _host(self, name: str, base_model: str) -> LearnerHost:
        served = self._prepared[base_model].config
        whole = plan_placement(
            self._config.cluster, served.learner, served.sampler, cluster_gpus=self._cluster_gpus, may_colocate=False
        )
        return LearnerHost(name, self._prepared[base_model], whole.only_learner(), self._config, self._lost)

    def _lost(self, host: LearnerHost) -> None:
        for model_id in [model_id for model_id, (its, _) in self._open.items() if its is host]:
            del self._open[model_id]
