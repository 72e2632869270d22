"""What clients ask of the service, in its own terms: checked and decoded by the protocol that they came by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from weaver_rl.rollout import SamplingConfig
from weaver_rl.service.loss_functions import LossRequest
from weaver_rl.service.records import LoraParams, TrainingMode

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class NewSession:
    """A client's visit that begins."""

    name: str | None = None
    sdk_version: str | None = None
    tags: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    user_metadata: Mapping[str, Any] = field(default_factory=dict)
    scheduling_policy: Mapping[str, Any] | None = None
    """Means nothing here, and is told again as it came."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewModel:
    """A training run that begins."""

    model_seq_id: int
    base_model: str
    training_mode: TrainingMode = "lora"
    lora: LoraParams = field(default_factory=LoraParams)
    """Without meaning for `full_ft`."""
    max_length: int | None = None
    """Tokens of a training sequence at most; None: what the base model takes."""
    user_metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class NewSamplingSession:
    """A right to sample: from the base model alone, or from a checkpoint (`path`, a `weaver://` name)."""

    seq_id: int
    base_model: str | None = None
    path: str | None = None
    model_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingCall:
    """One forward or forward_backward."""

    seq_id: int
    digest: str
    """SHA-256 of the request."""
    datum_ids: tuple[str | None, ...]
    """As the client gave them."""
    request: LossRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleCall:
    """One prompt to complete."""

    token_ids: tuple[int, ...]
    num_samples: int
    sampling: SamplingConfig
    """Its `max_tokens` counts only if `max_tokens` here is not None."""
    max_tokens: int | None = None
    """None: as many as the model has room for."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    """None: another one every time."""
    wants_prompt_logprobs: bool = False
    num_top_prompt_logprobs: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Page(Generic[T]):
    """Part of a listing, newest first."""

    items: tuple[T, ...]
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LineupModel:
    """A base model as clients see it."""

    name: str
    training_modes: tuple[TrainingMode, ...]
    max_length: int
    tokenizer_path: str
    max_lora_rank: int
    vocab_size: int
