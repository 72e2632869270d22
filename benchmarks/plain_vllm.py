"""vLLM as its own documentation uses it offline: one `LLM`, one `generate`. It knows nothing of weaver-rl."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROCESS_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
PASSIVE_OPENMP = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
"""What a sampler sets because a learner shares its cores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainRequest:
    """One completion to sample."""

    token_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainSpec:
    """What the baseline generates with."""

    model_dir: Path
    engine_args: dict[str, Any]
    requests: tuple[PlainRequest, ...]
    sampling: dict[str, Any]
    """Arguments of `SamplingParams`, the same for all."""
    onednn: bool
    """Linear layers repacked by oneDNN, vLLM's default on CPU, instead of `F.linear`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """One round's outcome."""

    seconds: float
    num_tokens: int
    digest: int
    """Of all tokens: two engines that sampled the same completions have the same."""


def build_plain_vllm(spec: PlainSpec) -> Callable[[], Generated]:
    """Starts the engine; the result generates all requests once, from an empty prefix cache."""
    if not spec.onednn:
        import torch
        import vllm._custom_ops as ops

        ops._supports_onednn = False
        torch._dynamo.config.disable = True
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=str(spec.model_dir), skip_tokenizer_init=True, logprobs_mode="processed_logprobs", **spec.engine_args
    )

    def generate() -> Generated:
        engine.reset_prefix_cache()
        started = time.perf_counter()
        prompts: list[Any] = [{"prompt_token_ids": list(request.token_ids)} for request in spec.requests]
        params = [SamplingParams(**spec.sampling, seed=request.seed) for request in spec.requests]
        outputs = engine.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        completions = [tuple(output.outputs[0].token_ids) for output in outputs]
        return Generated(
            seconds=seconds, num_tokens=sum(map(len, completions)), digest=hash(tuple(completions)) & 0xFFFFFFFF
        )

    return generate
