"""The learners of a server: one shared by all LoRA models of a base, one of its own for each model trained whole.

It knows which model is in which learner, and no client, no file of a checkpoint and no loss.

- `_opened`  one task per model that is opened: waits for the same model being closed, for its learner and its adapter.
- `_closed`  one task per model that is closed: waits for the same model being opened, and for its adapter to be freed.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from dataclasses import dataclass

from actors.calls import shared
from actors.learner_host import HostedModel, LearnerHost
from actors.lineup import PreparedModel
from weaver_rl.errors import ConfigError, LearnerLostError, ResourcesError
from weaver_rl.learner.adapter_config import AdapterConfig
from weaver_rl.placement import plan_placement
from weaver_rl.service.config import ServeConfig
from weaver_rl.service.records import LoraParams, TrainingMode

CLOSE_TIMEOUT_S = 15.0
"""How long `close_all` may take."""

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Opening:
    """A model on its way into a learner, and who waits for it."""

    task: asyncio.Task[HostedModel]
    num_waiting: int = 0
    is_taken: bool = False
    """Somebody has got the model."""


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
        self._open: dict[str, HostedModel] = {}
        self._opening: dict[str, _Opening] = {}
        self._closing: dict[str, asyncio.Task[None]] = {}

    def num_up(self) -> Counter[str]:
        """Learners that are up, by base model."""
        hosts = (*self._shared.values(), *self._whole.values())
        return Counter(host.base_model for host in hosts if host.is_up)

    async def preload(self, base_model: str) -> None:
        """Starts the learner that LoRA models of a base share."""
        await self._shared[base_model].group()

    async def open(self, model_id: str, base_model: str, mode: TrainingMode, lora: LoraParams | None) -> HostedModel:
        """See `Learners`. It goes on when this is cancelled; what nobody wants then is freed."""
        if model_id in self._open and model_id not in self._opening and model_id not in self._closing:
            return self._open[model_id]
        opening = self._opening.get(model_id)
        if opening is None:
            opening = self._begin_opening(model_id, base_model, mode, lora or LoraParams())
        opening.num_waiting += 1
        try:
            model = await shared(opening.task, f"model {model_id} was closed while it was opened")
            opening.is_taken = True
            return model
        finally:
            opening.num_waiting -= 1
            self._settle(model_id, opening)

    def get(self, model_id: str) -> HostedModel | None:
        """See `Learners`."""
        return self._open.get(model_id)

    async def close(self, model_id: str) -> None:
        """See `Learners`. It never fails, and goes on when this is cancelled."""
        opening = self._opening.get(model_id)
        if opening is not None and not opening.num_waiting:
            return  # `_settle` frees it once it is there: the caller need not wait for a learner to start
        await asyncio.shield(self._begin_closing(model_id))

    async def close_all(self) -> None:
        """Ends every learner, also those that start. Whoever still waits for one gets LearnerLostError."""
        hosts = [*self._shared.values(), *self._whole.values()]
        ending = [asyncio.create_task(host.close(), name=f"{host.name} ends") for host in hosts]
        if not ending:
            return
        ended, late = await asyncio.wait(ending, timeout=CLOSE_TIMEOUT_S)
        for task in late:
            _log.error("%s: not over after %g s", task.get_name(), CLOSE_TIMEOUT_S)
        for task in ended:
            if not task.cancelled() and (error := task.exception()) is not None:
                _log.error("%s: failed", task.get_name(), exc_info=error)

    # -- opening ---------------------------------------------------------------------------------------------------

    def _begin_opening(self, model_id: str, base_model: str, mode: TrainingMode, lora: LoraParams) -> _Opening:
        task = asyncio.create_task(self._opened(model_id, base_model, mode, lora, self._closing.get(model_id)))
        opening = self._opening[model_id] = _Opening(task)
        task.add_done_callback(lambda _: self._settle(model_id, opening))
        return opening

    async def _opened(
        self,
        model_id: str,
        base_model: str,
        mode: TrainingMode,
        lora: LoraParams,
        closing: asyncio.Task[None] | None,
    ) -> HostedModel:
        if closing is not None:
            await asyncio.wait([closing])
        if model_id not in self._open:
            if mode == "lora":
                model = await self._open_lora(model_id, base_model, lora)
            else:
                model = await self._open_whole(model_id, base_model)
            if not model.is_up:
                raise LearnerLostError(f"{model.host.name} was lost while model {model_id} was opened")
            self._open[model_id] = model
        return self._open[model_id]

    def _settle(self, model_id: str, opening: _Opening) -> None:
        """Forgets an opening that is over; a model that all who had waited for it gave up is freed."""
        if opening.num_waiting or not opening.task.done() or self._opening.get(model_id) is not opening:
            return
        del self._opening[model_id]
        failed = opening.task.cancelled() or opening.task.exception() is not None
        if not failed and not opening.is_taken:
            self._begin_closing(model_id)

    async def _open_lora(self, model_id: str, base_model: str, lora: LoraParams) -> HostedModel:
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
        return HostedModel(host, group, group.with_adapter(model_id))

    async def _open_whole(self, model_id: str, base_model: str) -> HostedModel:
        limit = self._prepared[base_model].config.max_full_ft_models
        taken = sum(host.base_model == base_model for host in self._whole.values())
        if model_id not in self._whole and taken >= limit:
            raise ResourcesError(
                f"{base_model} trains {limit} model(s) whole at a time and has {taken}: terminate one, or raise "
                "max_full_ft_models on the server"
            )
        if model_id not in self._whole:
            self._whole[model_id] = self._host(f"learner of {model_id}", base_model)
        host = self._whole[model_id]
        try:
            group = await host.group()
        except BaseException:  # boundary: cleans up, then raises again
            self._whole.pop(model_id, None)
            raise
        return HostedModel(host, group, group)

    # -- closing ---------------------------------------------------------------------------------------------------

    def _begin_closing(self, model_id: str) -> asyncio.Task[None]:
        """An opening of the same model that begins later waits for this, one that began before is waited for."""
        if model_id not in self._closing:
            opening = self._opening.get(model_id)
            closing = asyncio.create_task(self._closed(model_id, opening.task if opening is not None else None))
            self._closing[model_id] = closing
            closing.add_done_callback(lambda _: self._closing.pop(model_id))
        return self._closing[model_id]

    async def _closed(self, model_id: str, opening: asyncio.Task[HostedModel] | None) -> None:
        if opening is not None:
            await asyncio.wait([opening])
        model, own = self._open.pop(model_id, None), self._whole.pop(model_id, None)
        try:
            if own is not None:
                await own.close()
            elif model is not None:
                await model.remove(model_id)
        except LearnerLostError:
            pass  # it went with its learner
        except Exception as error:  # noqa: BLE001 - boundary: who ends a model has more to end
            _log.warning("model %s was forgotten, but may still take memory in its learner: %s", model_id, error)

    # -- learners --------------------------------------------------------------------------------------------------

    def _host(self, name: str, base_model: str) -> LearnerHost:
        served = self._prepared[base_model].config
        whole = plan_placement(
            self._config.cluster, served.learner, served.sampler, cluster_gpus=self._cluster_gpus, may_colocate=False
        )
        return LearnerHost(name, self._prepared[base_model], whole.only_learner(), self._config, self._lost)

    def _lost(self, host: LearnerHost) -> None:
        for model_id in [model_id for model_id, model in self._open.items() if model.host is host]:
            del self._open[model_id]
