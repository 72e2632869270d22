"""What the service remembers: frozen records, one per row of its database. They know no SQL and no wire protocol.

Times are seconds since the epoch (`time.time()`); ids are hyphenated UUIDs; `owner` is the name of an API key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

TrainingMode = Literal["lora", "full_ft"]
ModelStatus = Literal["active", "terminated"]
TrainingState = Literal["fresh", "trained", "lost"]
OperationStatus = Literal["pending", "running", "done", "error"]
ENDED: tuple[OperationStatus, ...] = ("done", "error")
OperationKind = Literal[
    "forward", "forward_backward", "optim_step", "export_sampler", "save", "load", "export_hf", "sample", "logprobs"
]
CheckpointKind = Literal["weight", "weight_and_optimizer", "sampling"]
ArtifactKind = Literal["hf_model", "hf_adapter"]
FileStatus = Literal["pending", "completed", "error", "deleted"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One client's visit."""

    id: str
    owner: str
    created_at: float
    last_seen_at: float
    """Of its last heartbeat or call."""
    name: str | None = None
    sdk_version: str | None = None
    tags: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    user_metadata: Mapping[str, Any] = field(default_factory=dict)
    scheduling_policy: Mapping[str, Any] | None = None
    """As the client sent it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraParams:
    """Which low-rank adapter a model trains, as Weaver's `lora_config` says it."""

    rank: int = 32
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True
    seed: int | None = None
    """Of the random half of the adapter; None: drawn when the model is created, and recorded here then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One training run: an adapter on a base model, or a base model trained whole."""

    id: str
    owner: str
    session_id: str
    model_seq_id: int
    base_model: str
    """Name in the lineup."""
    training_mode: TrainingMode
    lora: LoraParams | None
    max_length: int
    """Tokens of a training sequence at most."""
    created_at: float
    updated_at: float
    status: ModelStatus = "active"
    training_state: TrainingState = "fresh"
    """`fresh`: as created, can be made again; `trained`: only in a learner; `lost`: went with it, load a checkpoint."""
    num_steps: int = 0
    """Optimizer steps behind its weights: the version that sampling reports."""
    last_seq_id: int = 0
    user_metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One long-running call and, once it ended, its answer."""

    id: str
    owner: str
    kind: OperationKind
    created_at: float
    model_id: str | None = None
    sampling_session_id: str | None = None
    seq_id: int | None = None
    digest: str | None = None
    """SHA-256 of the request, to tell a request sent twice from another one with the same seq_id."""
    status: OperationStatus = "pending"
    response: bytes | None = None
    """JSON, in the shape of the protocol that asked; when `done`."""
    attachment: bytes | None = None
    """Binary part of the response. The store gives it by a method of its own alone: here it is None then."""
    error_code: str | None = None
    error_message: str | None = None
    error_details: Mapping[str, Any] = field(default_factory=dict)
    retryable: bool = False
    finished_at: float | None = None

    @property
    def ended(self) -> bool:
        return self.status in ENDED


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Saved weights of a model: `sampling` for samplers, `weight` and `weight_and_optimizer` to go on from."""

    id: str
    owner: str
    model_id: str
    name: str
    """Unique among the model's checkpoints that are not deleted; a newer export of the same name replaces it."""
    kind: CheckpointKind
    base_model: str
    training_mode: TrainingMode
    lora: LoraParams | None
    num_steps: int
    created_at: float
    status: FileStatus = "completed"
    ttl_seconds: int | None = None
    expires_at: float | None = None
    """None: permanent."""

    @property
    def path(self) -> str:
        """Its name on the wire."""
        return f"weaver://{self.model_id}/checkpoints/{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactFile:
    """One file of an artifact."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """An exported Hugging Face or PEFT directory that clients download."""

    id: str
    owner: str
    checkpoint_id: str
    model_id: str
    checkpoint_name: str
    kind: ArtifactKind
    created_at: float
    updated_at: float
    status: FileStatus = "pending"
    files: tuple[ArtifactFile, ...] = ()
    error: str | None = None
    ttl_seconds: int | None = None
    expires_at: float | None = None

    @property
    def uri(self) -> str:
        return f"weaver://{self.model_id}/checkpoints/{self.checkpoint_name}/artifacts/{self.kind}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSession:
    """A client's right to sample from one set of weights, which never change for it."""

    id: str
    owner: str
    session_id: str
    seq_id: int
    base_model: str
    checkpoint_id: str | None
    """None: the base model as it is."""
    model_id: str | None
    created_at: float
    last_used_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionMetric:
    """A number that a client reports of its own loop."""

    session_id: str
    model_id: str | None
    name: str
    value: float
    step: int
    occurred_at: str
    labels: Mapping[str, str] = field(default_factory=dict)
