"""A service in memory for tests of the HTTP face. It trains and samples nothing."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from http_fake_results import artifact_of, ended_operation, prompt_logprobs, sample_result, training_result

from weaver_rl.errors import ServiceError
from weaver_rl.service.calls import (
    LineupModel,
    NewModel,
    NewSamplingSession,
    NewSession,
    Page,
    SampleCall,
    TrainingCall,
)
from weaver_rl.service.records import (
    Artifact,
    Checkpoint,
    Model,
    Operation,
    SamplingSession,
    Session,
    SessionMetric,
)
from weaver_rl.service.results import (
    ArtifactResult,
    CheckpointResult,
    LoadResult,
    LogprobsResult,
    OptimResult,
    Render,
    Result,
)
from weaver_rl.service.weaver_paths import parse_checkpoint_path
from weaver_rl.types import AdamParams

TINY = LineupModel(
    name="tiny",
    training_modes=("lora", "full_ft"),
    max_length=128,
    tokenizer_path="/models/tiny",
    max_lora_rank=64,
    vocab_size=1000,
)


@dataclass
class FakeService:
    """Keeps what it is asked; results are made of the request, at once, unless `hold` is set."""

    files_dir: Path | None = None
    """Where the files of artifacts are."""
    hold: bool = False
    """Operations stay pending until `release`."""
    fail_operations: ServiceError | None = None
    """What operations end with."""
    sessions: dict[str, Session] = field(default_factory=dict)
    models_by_id: dict[str, Model] = field(default_factory=dict)
    operations: dict[str, Operation] = field(default_factory=dict)
    checkpoints_by_id: dict[str, Checkpoint] = field(default_factory=dict)
    artifacts_by_id: dict[str, Artifact] = field(default_factory=dict)
    sampling_sessions: dict[str, SamplingSession] = field(default_factory=dict)
    metrics: list[SessionMetric] = field(default_factory=list)
    calls: list[tuple[str, Any]] = field(default_factory=list)
    """Name and arguments of every operation."""
    skipped: list[tuple[str, int]] = field(default_factory=list)
    num_receiving: int = 0
    most_receiving: int = 0
    in_flight: int = 0
    held: dict[str, tuple[Result, Render]] = field(default_factory=dict)

    def lineup(self) -> Sequence[LineupModel]:
        return (TINY,)

    def health(self) -> Mapping[str, Any]:
        return {"status": "ok", "models": ["tiny"], "waits": []}

    # -- sessions and models

    async def create_session(self, owner: str, new: NewSession) -> Session:
        session = Session(
            id=str(uuid.uuid4()),
            owner=owner,
            created_at=time.time(),
            last_seen_at=time.time(),
            name=new.name,
            sdk_version=new.sdk_version,
            tags=new.tags,
            labels=new.labels,
            user_metadata=new.user_metadata,
            scheduling_policy=new.scheduling_policy,
        )
        self.sessions[session.id] = session
        return session

    async def session(self, owner: str, session_id: str) -> Session:
        return _own(self.sessions, owner, session_id)

    async def heartbeat(self, owner: str, session_id: str) -> None:
        await self.session(owner, session_id)
        self.calls.append(("heartbeat", session_id))

    async def add_metrics(self, owner: str, session_id: str, metrics: Sequence[SessionMetric]) -> None:
        await self.session(owner, session_id)
        self.metrics += metrics

    async def create_model(self, owner: str, session_id: str, new: NewModel) -> Model:
        await self.session(owner, session_id)
        if new.base_model != TINY.name:
            raise ServiceError("not_found", f"base_model {new.base_model!r} is not served here", status=404)
        model = Model(
            id=str(uuid.uuid4()),
            owner=owner,
            session_id=session_id,
            model_seq_id=new.model_seq_id,
            base_model=new.base_model,
            training_mode=new.training_mode,
            lora=replace(new.lora, seed=new.lora.seed or 7) if new.training_mode == "lora" else None,
            max_length=new.max_length or TINY.max_length,
            created_at=time.time(),
            updated_at=time.time(),
            user_metadata=new.user_metadata,
        )
        self.models_by_id[model.id] = model
        return model

    async def model(self, owner: str, model_id: str) -> Model:
        return _own(self.models_by_id, owner, model_id)

    async def models(self, owner: str, limit: int, offset: int) -> Page[Model]:
        found = [model for model in self.models_by_id.values() if model.owner == owner][::-1]
        return Page(items=tuple(found[offset : offset + limit]), total=len(found))

    async def terminate_model(
        self, owner: str, model_id: str, *, trainer: bool = True, inference: bool = True
    ) -> Model:
        model = await self.model(owner, model_id)
        self.calls.append(("terminate", (trainer, inference)))
        if trainer and inference:
            model = self.models_by_id[model_id] = replace(model, status="terminated")
        return model

    # -- operations

    @contextlib.contextmanager
    def receiving(self, owner: str, model_id: str) -> Iterator[None]:
        self.num_receiving += 1
        self.most_receiving = max(self.most_receiving, self.num_receiving)
        try:
            yield
        finally:
            self.num_receiving -= 1

    async def skip_seq(self, owner: str, model_id: str, seq_id: int) -> None:
        if model_id in self.models_by_id and self.models_by_id[model_id].owner == owner:
            self.skipped.append((model_id, seq_id))

    async def forward(self, owner: str, model_id: str, call: TrainingCall, render: Render) -> Operation:
        await self.model(owner, model_id)
        return await self._submit(owner, "forward", call, training_result(call), render, model_id=model_id)

    async def forward_backward(self, owner: str, model_id: str, call: TrainingCall, render: Render) -> Operation:
        await self.model(owner, model_id)
        return await self._submit(owner, "forward_backward", call, training_result(call), render, model_id=model_id)

    async def optim_step(
        self, owner: str, model_id: str, seq_id: int, digest: str, params: AdamParams, render: Render
    ) -> Operation:
        await self.model(owner, model_id)
        result = OptimResult(num_steps=1, metrics={"grad_norm": 0.5, "learning_rate": params.learning_rate})
        return await self._submit(owner, "optim_step", (seq_id, digest, params), result, render, model_id=model_id)

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
        result = CheckpointResult(checkpoint=await self._checkpoint(owner, model_id, "sampling", name, ttl_seconds))
        return await self._submit(
            owner, "export_sampler", (seq_id, digest, ttl_seconds), result, render, model_id=model_id
        )

    async def save_checkpoint(
        self, owner: str, model_id: str, kind: Any, name: str | None, ttl_seconds: int | None, render: Render
    ) -> Operation:
        result = CheckpointResult(checkpoint=await self._checkpoint(owner, model_id, kind, name, ttl_seconds))
        return await self._submit(owner, "save", (kind, name, ttl_seconds), result, render, model_id=model_id)

    async def load_checkpoint(
        self, owner: str, model_id: str, path: str, include_optimizer: bool, render: Render
    ) -> Operation:
        await self.model(owner, model_id)
        self._at_path(owner, path)
        result = LoadResult(path=path, num_steps=3, with_optimizer=include_optimizer)
        return await self._submit(owner, "load", (path, include_optimizer), result, render, model_id=model_id)

    async def export_hf(
        self, owner: str, model_id: str, merge_adapter: bool, ttl_seconds: int | None, render: Render
    ) -> Operation:
        checkpoint = await self._checkpoint(owner, model_id, "weight", None, None)
        result = ArtifactResult(artifact=self._artifact(checkpoint, merge_adapter, ttl_seconds))
        return await self._submit(owner, "export_hf", (merge_adapter, ttl_seconds), result, render, model_id=model_id)

    async def export_checkpoint(
        self,
        owner: str,
        checkpoint_id: str,
        merge_adapter: bool,
        ttl_seconds: int | None,
        force: bool,
        render: Render,
    ) -> Operation | Artifact:
        checkpoint = _own(self.checkpoints_by_id, owner, checkpoint_id)
        ready = [a for a in self.artifacts_by_id.values() if a.checkpoint_id == checkpoint_id]
        if ready and not force:
            return ready[0]
        result = ArtifactResult(artifact=self._artifact(checkpoint, merge_adapter, ttl_seconds))
        return await self._submit(
            owner, "export_hf", (merge_adapter, force), result, render, model_id=checkpoint.model_id
        )

    async def operation(self, owner: str, operation_id: str, wait_s: float) -> Operation:
        operation: Operation = _own(self.operations, owner, operation_id)
        end = time.monotonic() + wait_s
        while not operation.ended and time.monotonic() < end:
            await asyncio.sleep(0.005)
            operation = self.operations[operation_id]
        return operation

    async def operation_attachment(self, owner: str, operation_id: str) -> bytes:
        attachment: bytes | None = _own(self.operations, owner, operation_id).attachment
        if attachment is None:
            raise ServiceError("not_found", f"{operation_id} has none", status=404)
        return attachment

    def operations_in_flight(self, owner: str) -> int:
        return self.in_flight

    def release(self) -> None:
        """Ends what was held."""
        for operation_id, (result, render) in self.held.items():
            self._end(operation_id, result, render)
        self.held.clear()

    # -- checkpoints and artifacts

    async def checkpoints(self, owner: str, model_id: str) -> Sequence[Checkpoint]:
        await self.model(owner, model_id)
        return [c for c in self.checkpoints_by_id.values() if c.model_id == model_id]

    async def set_ttl(self, owner: str, model_id: str, path: str, ttl_seconds: int | None) -> Checkpoint:
        await self.model(owner, model_id)
        checkpoint = self._at_path(owner, path)
        expires_at = None if ttl_seconds is None else time.time() + ttl_seconds
        changed = replace(checkpoint, ttl_seconds=ttl_seconds, expires_at=expires_at)
        self.checkpoints_by_id[checkpoint.id] = changed
        return changed

    async def artifacts(self, owner: str, checkpoint_id: str) -> Sequence[Artifact]:
        _own(self.checkpoints_by_id, owner, checkpoint_id)
        return [a for a in self.artifacts_by_id.values() if a.checkpoint_id == checkpoint_id]

    async def artifact(self, owner: str, artifact_id: str) -> Artifact:
        return _own(self.artifacts_by_id, owner, artifact_id)

    async def artifact_file(self, artifact_id: str, name: str) -> Path:
        files = self.artifacts_by_id[artifact_id].files if artifact_id in self.artifacts_by_id else ()
        if self.files_dir is None or name not in {file.name for file in files}:
            raise ServiceError("not_found", f"artifact {artifact_id} has no file {name!r}", status=404)
        return self.files_dir / name

    # -- sampling

    async def create_sampling_session(self, owner: str, session_id: str, new: NewSamplingSession) -> SamplingSession:
        await self.session(owner, session_id)
        if new.path is None and new.base_model is None:
            raise ServiceError("invalid_request", "a sampling session needs base_model, model_path or both")
        checkpoint = self._at_path(owner, new.path) if new.path is not None else None
        session = SamplingSession(
            id=str(uuid.uuid4()),
            owner=owner,
            session_id=session_id,
            seq_id=new.seq_id,
            base_model=TINY.name,
            checkpoint_id=None if checkpoint is None else checkpoint.id,
            model_id=new.model_id,
            created_at=time.time(),
            last_used_at=time.time(),
        )
        self.sampling_sessions[session.id] = session
        return session

    async def sampling_session(self, owner: str, sampling_session_id: str) -> SamplingSession:
        return _own(self.sampling_sessions, owner, sampling_session_id)

    async def delete_sampling_session(self, owner: str, sampling_session_id: str) -> None:
        await self.sampling_session(owner, sampling_session_id)
        del self.sampling_sessions[sampling_session_id]

    async def sample(self, owner: str, sampling_session_id: str, call: SampleCall, render: Render) -> Operation:
        await self.sampling_session(owner, sampling_session_id)
        return await self._submit(
            owner, "sample", call, sample_result(call), render, sampling_session_id=sampling_session_id
        )

    async def logprobs(
        self, owner: str, sampling_session_id: str, token_ids: Sequence[int], temperature: float, render: Render
    ) -> Operation:
        await self.sampling_session(owner, sampling_session_id)
        result = LogprobsResult(prompt=prompt_logprobs(len(token_ids)), weight_version=4)
        return await self._submit(
            owner, "logprobs", (tuple(token_ids), temperature), result, render, sampling_session_id=sampling_session_id
        )

    async def pause_generation(self, owner: str, sampling_session_id: str, mode: Any) -> None:
        await self.sampling_session(owner, sampling_session_id)
        self.calls.append(("pause", mode))

    async def continue_generation(self, owner: str, sampling_session_id: str) -> None:
        await self.sampling_session(owner, sampling_session_id)
        self.calls.append(("continue", sampling_session_id))

    # -- how

    async def _submit(self, owner: str, kind: Any, call: Any, result: Result, render: Render, **of: str) -> Operation:
        self.calls.append((kind, call))
        operation = Operation(id=str(uuid.uuid4()), owner=owner, kind=kind, created_at=time.time(), **of)
        self.operations[operation.id] = operation
        if self.hold:
            self.held[operation.id] = (result, render)
        else:
            await asyncio.to_thread(self._end, operation.id, result, render)
        return self.operations[operation.id]

    def _end(self, operation_id: str, result: Result, render: Render) -> None:
        made = self.fail_operations or render(result)
        self.operations[operation_id] = ended_operation(self.operations[operation_id], made)

    async def _checkpoint(
        self, owner: str, model_id: str, kind: Any, name: str | None, ttl_seconds: int | None
    ) -> Checkpoint:
        model = await self.model(owner, model_id)
        now = time.time()
        checkpoint = Checkpoint(
            id=str(uuid.uuid4()),
            owner=owner,
            model_id=model_id,
            name=name or f"made-{len(self.checkpoints_by_id)}",
            kind=kind,
            base_model=model.base_model,
            training_mode=model.training_mode,
            lora=model.lora,
            num_steps=3,
            created_at=now,
            ttl_seconds=ttl_seconds,
            expires_at=None if ttl_seconds is None else now + ttl_seconds,
        )
        self.checkpoints_by_id[checkpoint.id] = checkpoint
        return checkpoint

    def _at_path(self, owner: str, path: str) -> Checkpoint:
        asked = parse_checkpoint_path(path)
        for checkpoint in self.checkpoints_by_id.values():
            of = (checkpoint.model_id, checkpoint.name)
            if checkpoint.owner == owner and of == (asked.model_id, asked.name):
                return checkpoint
        raise ServiceError("not_found", f"there is no checkpoint {path}", status=404)

    def _artifact(self, checkpoint: Checkpoint, merge_adapter: bool, ttl_seconds: int | None) -> Artifact:
        artifact = artifact_of(checkpoint, self.files_dir, "hf_model" if merge_adapter else "hf_adapter", ttl_seconds)
        self.artifacts_by_id[artifact.id] = artifact
        return artifact


def _own(records: Mapping[str, Any], owner: str, record_id: str) -> Any:
    record = records.get(record_id)
    if record is None or record.owner != owner:
        raise ServiceError("not_found", f"there is no {record_id}", status=404)
    return record
