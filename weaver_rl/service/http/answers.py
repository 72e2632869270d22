"""What clients get, but for operations' results: each answer as the OpenAPI description shows it, made of records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict

from weaver_rl.service.calls import LineupModel, Page
from weaver_rl.service.records import Artifact, Checkpoint, LoraParams, Model, SamplingSession, Session

PRICE_KINDS = (
    "training_tokens",
    "sampling_prefill_tokens",
    "sampling_cached_prefill_tokens",
    "sampling_output_tokens",
)
ORGANIZATION_ID = "00000000-0000-4000-8000-000000000001"
PROJECT_ID = "00000000-0000-4000-8000-000000000002"
"""There is one of each, the same on every server."""

T = TypeVar("T")


def iso_time(epoch_s: float) -> str:
    """Seconds since the epoch as ISO 8601 in UTC."""
    return datetime.fromtimestamp(epoch_s, UTC).isoformat()


def iso_time_or_none(epoch_s: float | None) -> str | None:
    return None if epoch_s is None else iso_time(epoch_s)


class Answer(BaseModel):
    """Base of all answers."""

    model_config = ConfigDict(frozen=True)

    def json_bytes(self) -> bytes:
        return self.model_dump_json().encode()


class Pagination(Answer):
    total_count: int
    limit: int
    offset: int


class SessionAnswer(Answer):
    id: str
    name: str | None
    tags: list[str]
    labels: dict[str, str]
    user_metadata: dict[str, Any]
    sdk_version: str | None
    organization_id: str
    project_id: str
    scheduling_policy: dict[str, Any] | None
    created_at: str
    last_seen_at: str

    @classmethod
    def of(cls, session: Session) -> Self:
        policy = session.scheduling_policy
        return cls(
            id=session.id,
            name=session.name,
            tags=list(session.tags),
            labels=dict(session.labels),
            user_metadata=dict(session.user_metadata),
            sdk_version=session.sdk_version,
            organization_id=ORGANIZATION_ID,
            project_id=PROJECT_ID,
            scheduling_policy=None if policy is None else dict(policy),
            created_at=iso_time(session.created_at),
            last_seen_at=iso_time(session.last_seen_at),
        )


class LoraAnswer(Answer):
    rank: int
    train_attn: bool
    train_mlp: bool
    train_unembed: bool
    seed: int | None

    @classmethod
    def of(cls, lora: LoraParams) -> Self:
        return cls(
            rank=lora.rank,
            train_attn=lora.train_attn,
            train_mlp=lora.train_mlp,
            train_unembed=lora.train_unembed,
            seed=lora.seed,
        )


class ModelAnswer(Answer):
    id: str
    session_id: str
    base_model: str
    training_mode: Literal["lora", "full_ft"]
    lora_config: LoraAnswer | None
    max_length: int
    tokenizer_path: str | None
    status: str
    training_state: str
    num_steps: int
    model_seq_id: int
    last_seq_id: int
    user_metadata: dict[str, Any]
    created_at: str
    updated_at: str
    last_request_at: str

    @classmethod
    def of(cls, model: Model, lineup: Iterable[LineupModel]) -> Self:
        return cls(**cls._fields_of(model, lineup))

    @staticmethod
    def _fields_of(model: Model, lineup: Iterable[LineupModel]) -> dict[str, Any]:
        return {
            "id": model.id,
            "session_id": model.session_id,
            "base_model": model.base_model,
            "training_mode": model.training_mode,
            "lora_config": None if model.lora is None else LoraAnswer.of(model.lora),
            "max_length": model.max_length,
            "tokenizer_path": tokenizer_path_of(model.base_model, lineup),
            "status": model.status,
            "training_state": model.training_state,
            "num_steps": model.num_steps,
            "model_seq_id": model.model_seq_id,
            "last_seq_id": model.last_seq_id,
            "user_metadata": dict(model.user_metadata),
            "created_at": iso_time(model.created_at),
            "updated_at": iso_time(model.updated_at),
            "last_request_at": iso_time(model.updated_at),
        }


class ModelsAnswer(Answer):
    items: list[ModelAnswer]
    pagination: Pagination

    @classmethod
    def of(cls, page: Page[Model], lineup: Sequence[LineupModel], limit: int, offset: int) -> Self:
        items = [ModelAnswer.of(model, lineup) for model in page.items]
        return cls(items=items, pagination=Pagination(total_count=page.total, limit=limit, offset=offset))


class CheckpointAnswer(Answer):
    id: str
    model_id: str
    path: str
    name: str
    type: Literal["weight", "weight_and_optimizer", "sampling"]
    status: str
    base_model: str
    training_mode: Literal["lora", "full_ft"]
    train_unembed: bool
    train_mlp: bool
    train_attn: bool
    num_steps: int
    ttl_seconds: int | None
    created_at: str
    expires_at: str | None

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Self:
        return cls(**checkpoint_fields(checkpoint))


def checkpoint_fields(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint as the wire has it; a model trained whole trains everything."""
    lora = checkpoint.lora
    return {
        "id": checkpoint.id,
        "model_id": checkpoint.model_id,
        "path": checkpoint.path,
        "name": checkpoint.name,
        "type": checkpoint.kind,
        "status": checkpoint.status,
        "base_model": checkpoint.base_model,
        "training_mode": checkpoint.training_mode,
        "train_unembed": lora is None or lora.train_unembed,
        "train_mlp": lora is None or lora.train_mlp,
        "train_attn": lora is None or lora.train_attn,
        "num_steps": checkpoint.num_steps,
        "ttl_seconds": checkpoint.ttl_seconds,
        "created_at": iso_time(checkpoint.created_at),
        "expires_at": iso_time_or_none(checkpoint.expires_at),
    }


class CheckpointsAnswer(Answer):
    items: list[CheckpointAnswer]

    @classmethod
    def of(cls, checkpoints: Iterable[Checkpoint]) -> Self:
        return cls(items=[CheckpointAnswer.of(checkpoint) for checkpoint in checkpoints])


class TrainingRunAnswer(ModelAnswer):
    checkpoints: list[CheckpointAnswer]
    owner_user_id: str
    owner_tenant_id: str

    @classmethod
    def of_run(cls, model: Model, lineup: Iterable[LineupModel], checkpoints: Iterable[Checkpoint]) -> Self:
        return cls(
            **cls._fields_of(model, lineup),
            checkpoints=[CheckpointAnswer.of(checkpoint) for checkpoint in checkpoints],
            owner_user_id=model.owner,
            owner_tenant_id=ORGANIZATION_ID,
        )


class ArtifactAnswer(Answer):
    id: str
    checkpoint_id: str
    model_id: str
    kind: Literal["hf_model", "hf_adapter"]
    status: str
    uri: str
    size_bytes: int
    manifest: dict[str, Any]
    error: str | None
    ttl_seconds: int | None
    created_at: str
    updated_at: str
    expires_at: str | None

    @classmethod
    def of(cls, artifact: Artifact) -> Self:
        return cls(**artifact_fields(artifact))


def artifact_fields(artifact: Artifact) -> dict[str, Any]:
    files = [{"name": file.name, "size": file.size, "sha256": file.sha256} for file in artifact.files]
    return {
        "id": artifact.id,
        "checkpoint_id": artifact.checkpoint_id,
        "model_id": artifact.model_id,
        "kind": artifact.kind,
        "status": artifact.status,
        "uri": artifact.uri,
        "size_bytes": sum(file.size for file in artifact.files),
        "manifest": {"format_version": 1, "files": files},
        "error": artifact.error,
        "ttl_seconds": artifact.ttl_seconds,
        "created_at": iso_time(artifact.created_at),
        "updated_at": iso_time(artifact.updated_at),
        "expires_at": iso_time_or_none(artifact.expires_at),
    }


class ArtifactsAnswer(Answer):
    items: list[ArtifactAnswer]


class DownloadFile(Answer):
    name: str
    url: str
    size: int
    sha256: str
    url_expires_at: str


class DownloadAnswer(Answer):
    artifact_id: str
    files: list[DownloadFile]


class SamplingSessionAnswer(Answer):
    id: str
    session_id: str
    sampling_session_seq_id: int
    base_model: str
    model_id: str | None
    checkpoint_id: str | None
    tokenizer_path: str | None
    created_at: str

    @classmethod
    def of(cls, session: SamplingSession, lineup: Iterable[LineupModel]) -> Self:
        return cls(
            id=session.id,
            session_id=session.session_id,
            sampling_session_seq_id=session.seq_id,
            base_model=session.base_model,
            model_id=session.model_id,
            checkpoint_id=session.checkpoint_id,
            tokenizer_path=tokenizer_path_of(session.base_model, lineup),
            created_at=iso_time(session.created_at),
        )


class SupportedModel(Answer):
    name: str
    status: Literal["healthy"]
    config: dict[str, Any]

    @classmethod
    def of(cls, model: LineupModel) -> Self:
        config = {
            "training_modes": list(model.training_modes),
            "max_length": model.max_length,
            "max_lora_rank": model.max_lora_rank,
            "vocab_size": model.vocab_size,
            "resource": {"tokenizer": {"path": model.tokenizer_path}},
        }
        return cls(name=model.name, status="healthy", config=config)


class SupportedModelsAnswer(Answer):
    items: list[SupportedModel]
    pagination: Pagination


class CatalogModel(Answer):
    id: str
    name: str
    status: Literal["available"]
    visibility: Literal["public"]
    training_modes: list[Literal["lora", "full_ft"]]
    prices: dict[str, dict[str, Any]]
    metadata: dict[str, Any]

    @classmethod
    def of(cls, model: LineupModel) -> Self:
        free = {"unit": "million_tokens", "unit_price_micros": 0}
        return cls(
            id=model.name,
            name=model.name,
            status="available",
            visibility="public",
            training_modes=list(model.training_modes),
            prices={f"{kind}:{mode}": free for mode in model.training_modes for kind in PRICE_KINDS},
            metadata={"max_length": model.max_length, "max_lora_rank": model.max_lora_rank},
        )


class CatalogAnswer(Answer):
    items: list[CatalogModel]
    pagination: Pagination


class OperationAnswer(Answer):
    """An operation. It has ended when `status` is `done` or `error`."""

    id: str
    type: str
    status: Literal["pending", "running", "done", "error"]
    model_id: str | None = None
    sampling_session_id: str | None = None
    seq_id: int | None = None
    created_at: str
    finished_at: str | None = None
    response: Any = None
    error_code: str | None = None
    error_message: str | None = None
    error_details: dict[str, Any] | None = None
    retryable: bool | None = None
    pending_info: dict[str, Any] | None = None


def tokenizer_path_of(base_model: str, lineup: Iterable[LineupModel]) -> str | None:
    """Of a model in the lineup; None for one that is no longer in it."""
    return next((model.tokenizer_path for model in lineup if model.name == base_model), None)


def page_of(items: Sequence[T], limit: int, offset: int, show: Callable[[T], Any]) -> dict[str, Any]:
    """Part of a list that is all here."""
    return {
        "items": [show(item) for item in items[offset : offset + limit]],
        "pagination": Pagination(total_count=len(items), limit=limit, offset=offset),
    }
