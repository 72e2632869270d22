"""The `sampler` section: how many engines, on what, with which vLLM arguments. It knows no vLLM and no service."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import Field, field_validator

from weaver_rl.custom_resources import CustomResources
from weaver_rl.section import Section

OWNED_ENGINE_ARGS = {
    "model": "model.name",
    "tokenizer": "model.name",
    "seed": "seed",
    "tensor_parallel_size": "sampler.tensor_parallel",
    "logprobs_mode": "nothing: importance weights need processed_logprobs",
    "weight_transfer_config": "weights.transport",
    "skip_tokenizer_init": "nothing: the sampler is token in, token out",
}
"""vLLM arguments that weaver-rl sets itself, and the key that decides each."""


DEFAULT_MAX_NUM_SEQS = 128
DEFAULT_MAX_NUM_BATCHED_TOKENS = 2048
"""vLLM 0.32's for an engine that a program drives itself, as samplers do, whatever the hardware. Its server and its
`LLM` class have others."""

MIN_MODEL_LEN = 2
"""A prompt of one token and a completion of one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraLimits:
    """Which LoRA adapters an engine takes. Each of the `max_loras` places takes memory for `max_rank`.

    Example:
        LoraLimits(max_loras=8, max_rank=64)
    """

    max_loras: int
    """Different adapters in one engine step; requests with more of them wait for a step."""
    max_rank: int
    """Largest rank; vLLM rounds it up to one of its own."""
    max_idle: int = 16
    """Adapters kept in memory that no request uses; beyond that the longest unused go, and are read again if asked."""


class SamplerConfig(Section):
    """The samplers of a run."""

    num_replicas: int = Field(default=1, ge=1)
    """vLLM engines; each holds the whole policy."""
    tensor_parallel: int = Field(default=1, ge=1)
    """GPUs per engine. CPU engines take 1."""
    num_cpus: float = Field(default=1.0, ge=0)
    """CPUs that Ray reserves for an engine."""
    num_gpus: float | None = Field(default=None, ge=0)
    """GPUs that Ray reserves for an engine; null: `tensor_parallel` where the cluster has GPUs, else 0."""
    resources: CustomResources = Field(default_factory=dict)
    """Custom resources of Ray for an engine, as `learner.resources`: `{sampler: 1}`."""
    num_threads: int | None = Field(default=None, ge=1)
    """OpenMP threads of a CPU engine; null: the CPUs of its node shared out among the engines."""
    engine_args: dict[str, Any] = Field(default_factory=dict)
    """Passed to vLLM's `EngineArgs` as they are."""
    start_timeout_s: float = Field(default=600.0, gt=0)
    """An engine that is not up by then stops the run; one in place of a lost one is tried again."""
    unresponsive_after_s: float = Field(default=60.0, gt=0)
    """Seconds a sampler may not answer, or make no engine step while it has work; then it is replaced."""

    @field_validator("engine_args")
    @classmethod
    def _not_ours(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key in value:
            if key in OWNED_ENGINE_ARGS:
                raise ValueError(f"{key!r} is set by weaver-rl; what decides it is {OWNED_ENGINE_ARGS[key]}")
        max_len = value.get("max_model_len", MIN_MODEL_LEN)
        if not isinstance(max_len, int) or isinstance(max_len, bool) or max_len < MIN_MODEL_LEN:
            raise ValueError(f"max_model_len is {max_len!r}; a number of tokens from {MIN_MODEL_LEN} on is needed")
        return value
