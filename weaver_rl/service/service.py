"""Everything a client can ask for: who may ask, which collaborator answers. It knows neither a wire protocol nor Ray.

`training.py` has what runs in a learner, `sampling.py` what runs in an engine, `weights.py` the files, `operations.py`
the order. The first argument of every method is the owner: what belongs to another is the same as what is not there.
"""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from weaver_rl import __version__
from weaver_rl.errors import ActorFailedError, ResourcesError, ServiceError
from weaver_rl.meter import NO_METER, Meter
from weaver_rl.service.calls import (
    LineupModel,
    NewModel,
    NewSamplingSession,
    NewSession,
    Page,
    SampleCall,
    TrainingCall,
)
from weaver_rl.service.config import ServeConfig
from weaver_rl.service.endings import Endings
from weaver_rl.service.operations import Operations
from weaver_rl.service.records import (
    Artifact,
    Checkpoint,
    CheckpointKind,
    Model,
    Operation,
    SamplingSession,
    Session,
    SessionMetric,
)
from weaver_rl.service.results import Render
from weaver_rl.service.roles import Learners, PauseMode, Samplers
from weaver_rl.service.sampling import Sampling, own_number, unknown_base_model
from weaver_rl.service.service_meter import SessionMetrics
from weaver_rl.service.state_files import StateFiles
from weaver_rl.service.store import Store
from weaver_rl.service.sweeper import Sweeper
from weaver_rl.service.training import Training
from weaver_rl.service.weights import Weights
from weaver_rl.types import AdamParams
from weaver_rl.waits import current_waits

TERMINATE_ANSWER_S = 5.0
"""How long the answer to `terminate` waits for what is freed; it goes on afterwards."""
SENT_AGAIN_WITHIN_S = 240.0
"""The SDK sends what it had no answer to again for about that long."""


class Service:
    """A server's operations. An asynchronous context manager: entering recovers what a killed server left.

    Args:
        lineup: the base models, by name.
        clock: seconds since the epoch.
        meter: counts tokens, and shows what clients measure.
    """

    def __init__(
        self,
        *,
        config: ServeConfig,
        store: Store,
        operations: Operations,
        files: StateFiles,
        learners: Learners,
        samplers: Samplers,
        lineup: Mapping[str, LineupModel],
        clock: Callable[[], float] = time.time,
        meter: Meter = NO_METER,
    ) -> None:
        self._session_metrics = SessionMetrics(meter)
        self._config = config
        self._store = store
        self._operations = operations
        self._lineup = dict(lineup)
        self._clock = clock
        self._weights = Weights(store, files, clock)
        self._training = Training(store, operations, learners, self._weights, clock, meter)
        self._sampling = Sampling(
            store,
            operations,
            samplers,
            self._weights,
            self._lineup,
            idle_s=config.retention.sampling_session_idle_s,
            clock=clock,
            meter=meter,
        )
        self._endings = Endings(operations, learners, samplers)
        self._sweeper = Sweeper(config, store, files, samplers, self._endings, clock)
        self._sweeping: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self._store.fail_unfinished(
            "server_restarted",
            "the server was restarted before this operation had ended; what it saved, if it came so far, is in the "
            "list of checkpoints",
        )
        await self._store.mark_models_lost()
        await self._sweeper.start()
        self._sweeping = asyncio.create_task(self._sweeper.run())
        return self

    async def __aexit__(self, *_exception: object) -> None:
        if self._sweeping is not None:
            self._sweeping.cancel()
            await asyncio.gather(self._sweeping, return_exceptions=True)
        await self._endings.close()

    # -- sessions --------------------------------------------------------------------------------------------------

    async def create_session(self, owner: str, new: NewSession) -> Session:
        now = self._clock()
        session = Session(
            id=str(uuid.uuid4()),
            owner=owner,
            created_at=now,
            last_seen_at=now,
            name=new.name,
            sdk_version=new.sdk_version,
            tags=new.tags,
            labels=new.labels,
            user_metadata=new.user_metadata,
            scheduling_policy=new.scheduling_policy,
        )
        return await self._store.add_session(session)

    async def session(self, owner: str, session_id: str) -> Session:
        found = await self._store.session(owner, session_id)
        if found is None:
            raise ServiceError("not_found", f"there is no session {session_id}", status=404)
        return found

    async def heartbeat(self, owner: str, session_id: str) -> None:
        await self.session(owner, session_id)
        await self._store.touch_session(session_id, self._clock())

    async def add_metrics(self, owner: str, session_id: str, metrics: Sequence[SessionMetric]) -> None:
        await self.session(owner, session_id)
        await self._store.add_metrics(metrics)
        self._session_metrics.add(metrics)

    # -- models ----------------------------------------------------------------------------------------------------

    def lineup(self) -> Sequence[LineupModel]:
        """The base models, in the order of the configuration."""
        return tuple(self._lineup.values())

    async def create_model(self, owner: str, session_id: str, new: NewModel) -> Model:
        await self.session(owner, session_id)
        served = self._lineup.get(new.base_model)
        if served is None:
            raise unknown_base_model(new.base_model, self._lineup)
        _check_new_model(new, served)
        now = self._clock()
        seed = new.lora.seed if new.lora.seed is not None else secrets.randbits(31)
        model = Model(
            id=str(uuid.uuid4()),
            owner=owner,
            session_id=session_id,
            model_seq_id=new.model_seq_id,
            base_model=new.base_model,
            training_mode=new.training_mode,
            lora=replace(new.lora, seed=seed) if new.training_mode == "lora" else None,
            max_length=new.max_length or served.max_length,
            created_at=now,
            updated_at=now,
            user_metadata=new.user_metadata,
        )
        stored = await self._store.add_model(model)
        if stored.id != model.id:
            if _is_sent_twice(stored, model, had_seed=new.lora.seed is not None):
                return stored
            # Another client counts from 1 again in the same session: it asked for a model of its own.
            model = await self._store.add_model(replace(model, model_seq_id=own_number()))
        await self._check_quota(model)
        return model

    async def _check_quota(self, model: Model) -> None:
        """Counted with the new one in it, so that a request sent twice is never refused for its own first try."""
        limit = self._config.limits.models
        if await self._store.count_active_models(model.owner) > limit:
            await self._store.update_model(model.id, status="terminated", updated_at=self._clock())
            raise ServiceError(
                "quota_exceeded",
                f"this key has {limit} active models already; terminate one",
                status=429,
                retryable=True,
            )

    async def model(self, owner: str, model_id: str) -> Model:
        found = await self._store.model(owner, model_id)
        if found is None:
            raise ServiceError("not_found", f"there is no model {model_id}", status=404)
        return found

    async def models(self, owner: str, limit: int, offset: int) -> Page[Model]:
        return await self._store.models(owner, limit, offset)

    async def terminate_model(
        self, owner: str, model_id: str, *, trainer: bool = True, inference: bool = True
    ) -> Model:
        """Frees what the model has; with both it is over. Checkpoints and sampling sessions live on."""
        model = await self.model(owner, model_id)
        if trainer and inference and model.status == "active":
            await self._store.update_model(model_id, status="terminated", updated_at=self._clock())
        ending = self._endings.begin(model_id, trainer=trainer, inference=inference)
        await asyncio.wait([ending], timeout=TERMINATE_ANSWER_S)
        return await self.model(owner, model_id)

    # -- training --------------------------------------------------------------------------------------------------

    async def forward(self, owner: str, model_id: str, call: TrainingCall, render: Render) -> Operation:
        return await self._training.forward(await self._served(owner, model_id), call, render)

    async def forward_backward(self, owner: str, model_id: str, call: TrainingCall, render: Render) -> Operation:
        return await self._training.forward_backward(await self._served(owner, model_id), call, render)

    async def optim_step(
        self, owner: str, model_id: str, seq_id: int, digest: str, params: AdamParams, render: Render
    ) -> Operation:
        return await self._training.optim_step(await self._served(owner, model_id), seq_id, digest, params, render)

    async def export_sampler(
        self,
        owner: str,
        model_id: str,
        seq_id: int,
        digest: str,
        name: str | None,
        ttl_seconds: int | None,
        render: Render,
    ) -> Operation:
        model = await self._served(owner, model_id)
        return await self._training.export_sampler(model, seq_id, digest, name, ttl_seconds, render)

    async def save_checkpoint(
        self,
        owner: str,
        model_id: str,
        kind: CheckpointKind,
        name: str | None,
        ttl_seconds: int | None,
        render: Render,
    ) -> Operation:
        return await self._training.save(await self._served(owner, model_id), kind, name, ttl_seconds, render)

    async def load_checkpoint(
        self, owner: str, model_id: str, path: str, include_optimizer: bool, render: Render
    ) -> Operation:
        return await self._training.load(await self._served(owner, model_id), path, include_optimizer, render)

    async def export_hf(
        self, owner: str, model_id: str, merge_adapter: bool, ttl_seconds: int | None, render: Render
    ) -> Operation:
        return await self._training.export_hf(await self._served(owner, model_id), merge_adapter, ttl_seconds, render)

    async def export_checkpoint(
        self,
        owner: str,
        checkpoint_id: str,
        merge_adapter: bool,
        ttl_seconds: int | None,
        force: bool,
        render: Render,
    ) -> Operation | Artifact:
        checkpoint = await self._weights.checkpoint(owner, checkpoint_id)
        return await self._training.export_checkpoint(checkpoint, merge_adapter, ttl_seconds, force, render)

    async def _served(self, owner: str, model_id: str) -> Model:
        """A model whose base is still in the lineup."""
        model = await self.model(owner, model_id)
        if model.base_model not in self._lineup:
            raise unknown_base_model(model.base_model, self._lineup)
        return model

    def receiving(self, owner: str, model_id: str) -> AbstractContextManager[None]:
        """A request body of that model is arriving: missing seq_ids are waited for meanwhile."""
        return self._operations.receiving(owner, model_id)

    async def skip_seq(self, owner: str, model_id: str, seq_id: int) -> None:
        """A request with that seq_id was refused before it became an operation: it leaves no gap."""
        await self._operations.skip(owner, model_id, seq_id)

    async def operation(self, owner: str, operation_id: str, wait_s: float) -> Operation:
        """As it is when it ended, or after `wait_s`."""
        return await self._operations.wait(owner, operation_id, wait_s)

    async def operation_attachment(self, owner: str, operation_id: str) -> bytes:
        """The binary part of its response."""
        return await self._operations.attachment(owner, operation_id)

    def operations_in_flight(self, owner: str) -> int:
        """Of that owner, those that have not ended."""
        return self._operations.in_flight(owner)

    # -- checkpoints and artifacts ---------------------------------------------------------------------------------

    async def checkpoints(self, owner: str, model_id: str) -> Sequence[Checkpoint]:
        await self.model(owner, model_id)
        return await self._weights.checkpoints(owner, model_id)

    async def set_ttl(self, owner: str, model_id: str, path: str, ttl_seconds: int | None) -> Checkpoint:
        await self.model(owner, model_id)
        return await self._weights.set_ttl(owner, model_id, path, ttl_seconds)

    async def artifacts(self, owner: str, checkpoint_id: str) -> Sequence[Artifact]:
        return await self._weights.artifacts(owner, checkpoint_id)

    async def artifact(self, owner: str, artifact_id: str) -> Artifact:
        return await self._weights.artifact(owner, artifact_id)

    async def artifact_file(self, artifact_id: str, name: str) -> Path:
        """For who holds a download link."""
        return await self._weights.artifact_file(artifact_id, name)

    # -- sampling --------------------------------------------------------------------------------------------------

    async def create_sampling_session(self, owner: str, session_id: str, new: NewSamplingSession) -> SamplingSession:
        await self.session(owner, session_id)
        return await self._sampling.create(owner, session_id, new)

    async def sampling_session(self, owner: str, sampling_session_id: str) -> SamplingSession:
        return await self._sampling.session(owner, sampling_session_id)

    async def delete_sampling_session(self, owner: str, sampling_session_id: str) -> None:
        await self._sampling.delete(owner, sampling_session_id)

    async def sample(self, owner: str, sampling_session_id: str, call: SampleCall, render: Render) -> Operation:
        return await self._sampling.sample(await self.sampling_session(owner, sampling_session_id), call, render)

    async def logprobs(
        self, owner: str, sampling_session_id: str, token_ids: Sequence[int], temperature: float, render: Render
    ) -> Operation:
        session = await self.sampling_session(owner, sampling_session_id)
        return await self._sampling.logprobs(session, token_ids, temperature, render)

    async def pause_generation(self, owner: str, sampling_session_id: str, mode: PauseMode) -> None:
        with _told():
            await self._sampling.pause(await self.sampling_session(owner, sampling_session_id), mode)

    async def continue_generation(self, owner: str, sampling_session_id: str) -> None:
        with _told():
            await self._sampling.resume(await self.sampling_session(owner, sampling_session_id))

    def health(self) -> Mapping[str, Any]:
        """For people and probes: that it lives, and what it waits for just now."""
        return {
            "status": "ok",
            "version": __version__,
            "models": list(self._lineup),
            "waits": [f"{wait.owner}: {wait.what}" for wait in current_waits().current()],
        }


@contextmanager
def _told() -> Iterator[None]:
    """Failures of actors, as an answer to a request that is no operation."""
    try:
        yield
    except ResourcesError as error:
        raise ServiceError("no_capacity", str(error), status=503, retryable=True) from error
    except ActorFailedError as error:
        raise ServiceError("backend_lost", str(error), status=503, retryable=True) from error


def _is_sent_twice(first: Model, second: Model, *, had_seed: bool) -> bool:
    """Whether `second` is the request of `first` sent again: the same, soon, and nobody has used the model yet."""

    def request(model: Model) -> tuple[Any, ...]:
        lora = model.lora if model.lora is None or had_seed else replace(model.lora, seed=None)
        return model.base_model, model.training_mode, lora, model.max_length, model.user_metadata

    if second.created_at - first.created_at > SENT_AGAIN_WITHIN_S:
        return False
    is_unused = first.status == "active" and first.training_state == "fresh" and first.last_seq_id == 0
    return is_unused and request(first) == request(second)


def _check_new_model(new: NewModel, served: LineupModel) -> None:
    if new.training_mode not in served.training_modes:
        raise ServiceError(
            "invalid_request",
            f"{served.name} is served for {', '.join(served.training_modes)}; seen training_mode {new.training_mode}",
        )
    if new.max_length is not None and not 2 <= new.max_length <= served.max_length:
        raise ServiceError(
            "invalid_request",
            f"training_max_sequence_length is {new.max_length}; {served.name} allows 2..{served.max_length}",
        )
    if new.training_mode != "lora":
        return
    if not 1 <= new.lora.rank <= served.max_lora_rank:
        raise ServiceError(
            "invalid_request", f"lora_config.rank is {new.lora.rank}; {served.name} allows 1..{served.max_lora_rank}"
        )
    if not (new.lora.train_attn or new.lora.train_mlp or new.lora.train_unembed):
        raise ServiceError(
            "invalid_request", "lora_config trains nothing: one of train_attn, train_mlp, train_unembed must be true"
        )
