"""What operations produce, in the service's own terms. How a wire protocol spells them is that protocol's matter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from weaver_rl.service.records import Artifact, Checkpoint
from weaver_rl.types import Float32Array, GroupSample, PromptLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingResult:
    """Of `forward` and `forward_backward`."""

    datum_ids: tuple[str | None, ...]
    """As the client gave them; None where it gave none."""
    logprobs_per_datum: tuple[Float32Array, ...]
    """(N,) of each datum, at every position; 0 where the target was -100."""
    metrics: Mapping[str, float]
    ignored: tuple[str, ...]
    """Inputs and configuration keys that came along and mean nothing to the loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimResult:
    """Of `optim_step`."""

    num_steps: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointResult:
    """Of `save_checkpoint` and `export_sampler`."""

    checkpoint: Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadResult:
    """Of `load_checkpoint`."""

    path: str
    num_steps: int
    with_optimizer: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactResult:
    """Of `export_hf` and `export_checkpoint`."""

    artifact: Artifact


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleResult:
    """Of `sample`; completions in `group`, in the order of their seeds."""

    group: GroupSample
    num_prompt_tokens: int
    wants_prompt_logprobs: bool
    num_top_prompt_logprobs: int
    weight_version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobsResult:
    """Of `logprobs`."""

    prompt: PromptLogprobs
    weight_version: int


Result = TrainingResult | OptimResult | CheckpointResult | LoadResult | ArtifactResult | SampleResult | LogprobsResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A result as one protocol spells it, in two parts."""

    response: bytes
    """JSON."""
    attachment: bytes
    """What the JSON refers to, fetched apart."""


Render = Callable[[Result], bytes | Rendered]
"""Spells a result as one protocol does, as JSON alone or in two parts; called off the event loop."""
