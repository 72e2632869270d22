"""The records that cross process boundaries: frozen, slotted, keyword-only. They know neither Ray, torch nor vLLM.

Suffixes name axes: `_P` tokens of a prompt, `_L` of a completion, `_N` of a datum, `_G` rollouts of a group.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from weaver_rl.packed_arrays import pack, unpack

Int64Array = npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]

StopReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One problem of a task, rendered and tokenised.

    Example:
        Prompt(prompt_id="train-17", text="3 + 4 =", token_ids_P=(5, 9, 6, 11), answer="7")
    """

    prompt_id: str
    """Unique within the task and the same in every run of it."""
    text: str
    """What the policy reads, chat template applied."""
    token_ids_P: tuple[int, ...]
    answer: str | None = None
    """The gold answer, when the task has one."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Everything else the task knows about the problem (picklable); passed to the rewards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A LoRA adapter on disk, as PEFT writes it. Caches go by `name`: another content needs another name."""

    name: str
    directory: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRequest:
    """One group to sample: one prompt, `len(seeds_G)` completions, each with its own seed."""

    group_id: str
    token_ids_P: tuple[int, ...]
    seeds_G: tuple[int, ...]
    adapter: Adapter | None = None
    """What the engine's weights are changed by; None: they are used as they are."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion; their tokens stay in it. Needs an engine with a tokenizer."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a completion, besides the engine's own; the last token of what they end."""
    num_prompt_logprobs: int | None = None
    """Log-probabilities of the prompt, at temperature 1. None: none; k: of its tokens and of the k likeliest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLogprobs:
    """What a policy gives the tokens of a prompt, each given those before it, at temperature 1."""

    logprobs_P: Float32Array
    """Natural-log probability of each token; NaN for the first, which nothing is before."""
    top_P: tuple[tuple[tuple[int, float], ...], ...] = ()
    """For each position the likeliest tokens with their log-probabilities, likeliest first; nothing for the first
    position, and no positions at all unless they were asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One generated turn, as tokens: the sampler never decodes."""

    token_ids_L: Int32Array
    logprobs_L: Float32Array
    """Natural-log probability of each token under the distribution it was really drawn from."""
    versions_L: Int32Array
    """Version of the weights that produced each token."""
    stop_reason: StopReason
    """`stop`: an end token, which is the last of `token_ids_L`; `length`: max_tokens or the model's limit; `abort`."""

    def __post_init__(self) -> None:
        lengths = {len(self.token_ids_L), len(self.logprobs_L), len(self.versions_L)}
        if len(lengths) != 1:
            raise ValueError(f"token_ids_L, logprobs_L and versions_L must have one length, seen {sorted(lengths)}")

    def __reduce__(self) -> tuple[Any, ...]:
        arrays = (self.token_ids_L, self.logprobs_L, self.versions_L)
        return _completion, (*map(pack, arrays), self.stop_reason)


def _completion(token_ids_L: Any, logprobs_L: Any, versions_L: Any, stop_reason: StopReason) -> Completion:
    return Completion(
        token_ids_L=unpack(token_ids_L),
        logprobs_L=unpack(logprobs_L),
        versions_L=unpack(versions_L),
        stop_reason=stop_reason,
    )


def oldest_version(completions: Iterable[Completion]) -> int:
    """Version of the oldest token."""
    return min(int(c.versions_L.min()) for c in completions if len(c.versions_L))


def newest_version(completions: Iterable[Completion]) -> int:
    """Version of the newest token."""
    return max(int(c.versions_L.max()) for c in completions if len(c.versions_L))


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSample:
    """What a sampler returns for one `SampleRequest`; completions in the order of its seeds."""

    group_id: str
    completions_G: tuple[Completion, ...]
    sampler: str
    """Name of the sampler that generated it, for reports and blame."""
    texts_G: tuple[str, ...] = ()
    """Each completion decoded, special tokens and the stop text left out; empty without a tokenizer."""
    prompt_logprobs: PromptLogprobs | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One episode: what a reward function is given.

    Example:
        def brevity(rollout: Rollout) -> float:
            return -len(rollout.text) / 100
    """

    rollout_id: str
    prompt: Prompt
    completion: Completion
    text: str
    """The completion decoded, special tokens left out."""
    sample_index: int = 0
    """Position within the group."""
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardComponent:
    """One reward function's answer for one rollout. Exactly one of `value` and `missing` is None."""

    name: str
    value: float | None
    """Finite, before its weight is applied."""
    missing: str | None = None
    """Why there is no value, in words for the user."""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRollout:
    """A rollout with its components; `reward` is their weighted sum, None when one that counts is missing."""

    rollout: Rollout
    components: tuple[RewardComponent, ...]
    reward: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Datum:
    """One trainable token sequence. Position i of `token_ids_N` predicts `target_tokens[i]` (already shifted).

    Example:
        Datum(datum_id="000001-train-17-0", token_ids_N=np.array([5, 9, 6]),
              loss_fn_inputs={"target_tokens": np.array([9, 6, 2]), "weights": np.array([0.0, 1.0, 1.0], np.float32)})
    """

    datum_id: str
    token_ids_N: Int64Array
    loss_fn_inputs: Mapping[str, npt.NDArray[Any]]
    """1-D arrays of length N: `target_tokens` int64, `weights` float32 (0 on the prompt) and, for
    `importance_sampling`, `importance_weights` float32."""

    def __reduce__(self) -> tuple[Any, ...]:
        inputs = {name: pack(values) for name, values in self.loss_fn_inputs.items()}
        return _datum, (self.datum_id, pack(self.token_ids_N), inputs)


def _datum(datum_id: str, token_ids_N: Any, inputs: dict[str, Any]) -> Datum:
    return Datum(
        datum_id=datum_id,
        token_ids_N=unpack(token_ids_N),
        loss_fn_inputs={name: unpack(values) for name, values in inputs.items()},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamParams:
    """One AdamW update, as Weaver's `optim_step` takes it."""

    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip_norm: float = 1.0
    """Gradients are scaled down to this global L2 norm; 0 disables clipping."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardOutput:
    """Log-probabilities of the targets under the current policy, one float32 array (N,) per datum, in order."""

    logprobs_per_datum: tuple[Float32Array, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        return _forward_output, tuple(map(pack, self.logprobs_per_datum))


def _forward_output(*logprobs_per_datum: Any) -> ForwardOutput:
    return ForwardOutput(logprobs_per_datum=tuple(map(unpack, logprobs_per_datum)))


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBackwardOutput:
    """Result of one accumulation of gradients."""

    loss: float
    num_tokens: int
    """Input tokens that went through the model."""
    sum_weights: float
    """The normaliser: sum of `weights` over the whole request."""
    logprobs_per_datum: tuple[Float32Array, ...]
    metrics: Mapping[str, float] = field(default_factory=dict)

    def __reduce__(self) -> tuple[Any, ...]:
        logprobs = tuple(map(pack, self.logprobs_per_datum))
        return _forward_backward_output, (self.loss, self.num_tokens, self.sum_weights, logprobs, self.metrics)


def _forward_backward_output(
    loss: float, num_tokens: int, sum_weights: float, logprobs: tuple[Any, ...], metrics: Mapping[str, float]
) -> ForwardBackwardOutput:
    return ForwardBackwardOutput(
        loss=loss,
        num_tokens=num_tokens,
        sum_weights=sum_weights,
        logprobs_per_datum=tuple(map(unpack, logprobs)),
        metrics=metrics,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimStepOutput:
    """Result of one optimizer update."""

    grad_norm: float
    """Global L2 norm before clipping."""
    learning_rate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedWeights:
    """A version of the weights that samplers can load. `handle` means something only to the transport that made it."""

    version: int
    handle: Any
    num_bytes: int
