"""Records of the service for tests: valid, and different each time."""

from __future__ import annotations

import uuid
from typing import Any

from weaver_rl.service.records import (
    Artifact,
    ArtifactFile,
    Checkpoint,
    LoraParams,
    Model,
    Operation,
    SamplingSession,
    Session,
    SessionMetric,
)

OWNER = "team-a"
ODD_TEXT = "a\x00b\ud800c ✓"
"""Nothing that a database can hold as it is."""


def new_id() -> str:
    return str(uuid.uuid4())


def a_session(**more: Any) -> Session:
    usual = {
        "id": new_id(),
        "owner": OWNER,
        "created_at": 100.5,
        "last_seen_at": 100.5,
        "name": "grüße",
        "sdk_version": "1.19.2",
        "tags": ("a", "b"),
        "labels": {"k": "v"},
        "user_metadata": {"odd": [ODD_TEXT, float("inf"), None, {"deep": 2**80}]},
    }
    return Session(**usual | more)


def a_model(session_id: str, model_seq_id: int = 1, **more: Any) -> Model:
    usual = {
        "id": new_id(),
        "owner": OWNER,
        "session_id": session_id,
        "model_seq_id": model_seq_id,
        "base_model": "tiny",
        "training_mode": "lora",
        "lora": LoraParams(rank=4, train_mlp=False, seed=7),
        "max_length": 128,
        "created_at": 101.0,
        "updated_at": 101.0,
        "user_metadata": {"run": 3},
    }
    return Model(**usual | more)


def an_operation(model_id: str | None = None, seq_id: int | None = None, **more: Any) -> Operation:
    usual = {
        "id": new_id(),
        "owner": OWNER,
        "kind": "sample" if model_id is None else "forward_backward",
        "created_at": 102.0,
        "model_id": model_id,
        "seq_id": seq_id,
        "digest": None if seq_id is None else f"digest {seq_id}",
    }
    return Operation(**usual | more)


def a_checkpoint(model_id: str, name: str = "one", **more: Any) -> Checkpoint:
    usual = {
        "id": new_id(),
        "owner": OWNER,
        "model_id": model_id,
        "name": name,
        "kind": "sampling",
        "base_model": "tiny",
        "training_mode": "lora",
        "lora": LoraParams(rank=4),
        "num_steps": 5,
        "created_at": 103.0,
    }
    return Checkpoint(**usual | more)


def an_artifact(checkpoint: Checkpoint, **more: Any) -> Artifact:
    usual = {
        "id": new_id(),
        "owner": OWNER,
        "checkpoint_id": checkpoint.id,
        "model_id": checkpoint.model_id,
        "checkpoint_name": checkpoint.name,
        "kind": "hf_adapter",
        "created_at": 104.0,
        "updated_at": 104.0,
        "status": "completed",
        "files": (ArtifactFile(name="a/b.json", size=3, sha256="00ff"),),
    }
    return Artifact(**usual | more)


def a_sampling_session(session_id: str, seq_id: int = 1, **more: Any) -> SamplingSession:
    usual = {
        "id": new_id(),
        "owner": OWNER,
        "session_id": session_id,
        "seq_id": seq_id,
        "base_model": "tiny",
        "checkpoint_id": None,
        "model_id": None,
        "created_at": 105.0,
        "last_used_at": 105.0,
    }
    return SamplingSession(**usual | more)


def a_metric(session_id: str, **more: Any) -> SessionMetric:
    usual = {
        "session_id": session_id,
        "model_id": "m",
        "name": "reward",
        "value": 0.5,
        "step": 3,
        "occurred_at": "2026-01-01T00:00:00Z",
        "labels": {"split": "train"},
    }
    return SessionMetric(**usual | more)
