"""How a vLLM engine is started in this process, and what must be so before. It knows no requests.

Three things that would train on lies are switched off here and tested for: linear layers repacked by oneDNN (they stop
taking new weights), raw instead of processed log-probabilities, and LoRA kernels that give an adapter to who has none.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from weaver_rl.engines.adapters import VLLM_CACHE
from weaver_rl.engines.config import DEFAULT_MAX_NUM_BATCHED_TOKENS, LoraLimits
from weaver_rl.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

CPU_KV_CACHE_BYTES = 256 << 20
"""Left to itself a CPU engine takes nearly all memory for its KV cache."""
CPU_TOKENS_PER_STEP = DEFAULT_MAX_NUM_BATCHED_TOKENS
"""vLLM's own default there."""


def prepare_process(num_threads: int | None = None) -> None:
    """Sets what vLLM reads from the environment. Must run before vllm or torch is first imported in the process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    # The learner works on the same cores while the sampler waits: a spinning OpenMP pool would take them from it.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    if num_threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(num_threads)


def import_vllm() -> None:
    """Imports what an engine needs: seconds that can pass while the model is still being made."""
    import vllm.v1.engine.llm_engine  # noqa: F401


def on_cpu() -> bool:
    """Whether engines of this process compute on the CPU."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def start_engine(
    *,
    model_dir: Path,
    name: str,
    engine_args: dict[str, Any],
    seed: int,
    tensor_parallel: int,
    weight_transfer: str | None,
    with_tokenizer: bool,
    lora: LoraLimits | None,
) -> LLMEngine:
    """A started engine. Raises ConfigError for arguments that vLLM refuses, ModelError for a model."""
    from vllm import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    args = _args(engine_args, tensor_parallel, weight_transfer, lora)
    if lora is not None or with_tokenizer:
        # On GPUs vLLM has two model runners; only the first can be made to score prompts at other temperatures and
        # under adapters (see prompt_rows).
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    try:
        all_args = EngineArgs(
            model=str(model_dir),
            skip_tokenizer_init=not with_tokenizer,
            logprobs_mode="processed_logprobs",
            seed=seed,
            tensor_parallel_size=tensor_parallel,
            disable_log_stats=True,
            **args,
        )
    except TypeError as error:
        raise ConfigError(f"sampler.engine_args: vLLM does not know one of {sorted(engine_args)}: {error}") from None
    try:
        return LLMEngine.from_engine_args(all_args)
    except (ValueError, RuntimeError, OSError) as error:
        raise ModelError(
            f"{name}: vLLM could not start with model {model_dir} and engine_args {engine_args}: {error}"
        ) from error


def _args(
    given: dict[str, Any], tensor_parallel: int, weight_transfer: str | None, lora: LoraLimits | None
) -> dict[str, Any]:
    args = (_cpu_args(given) if on_cpu() else {}) | given
    if tensor_parallel > 1:
        # Inside a placement group vLLM would choose Ray, whose workers need bundles of their own.
        args.setdefault("distributed_executor_backend", "mp")
    if weight_transfer is not None:
        args["weight_transfer_config"] = {"backend": weight_transfer}
    if lora is not None:
        args |= _lora_args(lora, tensor_parallel)
    return args


def _cpu_args(given: dict[str, Any]) -> dict[str, Any]:
    """Our defaults, and the two global switches that a CPU engine needs."""
    import torch
    import vllm._custom_ops as ops

    # Repacked linear layers lose `weight` and silently keep old values (tied lm_head) on an update.
    ops._supports_onednn = False
    # A seeded prompt cut in two needs a generator that can be set back, and torch's for the CPU cannot: the
    # step would fail ("CPU Generator does not use offset"). So prompts are not cut, and each fits a step.
    longest = int(given.get("max_model_len", 0))
    args: dict[str, Any] = {
        "enforce_eager": True,
        "dtype": "float32",
        "kv_cache_memory_bytes": CPU_KV_CACHE_BYTES,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(CPU_TOKENS_PER_STEP, longest),
    }
    if given.get("enforce_eager", True):
        # The first request for log-probabilities would otherwise compile for seconds.
        torch._dynamo.config.disable = True
    return args


def _lora_args(limits: LoraLimits, tensor_parallel: int) -> dict[str, Any]:
    from vllm.config.lora import MaxLoRARanks
    from vllm.platforms import current_platform

    ranks = [rank for rank in get_args(MaxLoRARanks) if rank >= limits.max_rank]
    if not ranks:
        raise ConfigError(f"adapters of rank {limits.max_rank} are asked for, vLLM takes {get_args(MaxLoRARanks)[-1]}")
    if on_cpu():
        if tensor_parallel > 1:
            raise ConfigError(f"tensor_parallel is {tensor_parallel}: CPU engines with adapters take 1")
        platform: Any = type(current_platform)
        platform.get_punica_wrapper = classmethod(lambda cls: "weaver_rl.engines.cpu_lora.GroupedLora")
    return {
        "enable_lora": True,
        "max_loras": limits.max_loras,
        "max_lora_rank": ranks[0],
        "max_cpu_loras": VLLM_CACHE,
    }
