"""How much memory a learner rank and a sampler take. Pure arithmetic over a model's sizes; it knows no machine.

What a learner rank holds of P parameters on R ranks, from weaver_rl.learner: float32 masters 4·P/R, gradients 4·P/R,
two moments of AdamW 8·P/R (fused: no temporaries). In lower precision, or on several ranks, FSDP2 gathers: embedding
and head for the length of forward and backward, one layer and the next, and the whole gradient of the layer at work.

Activations that one token keeps for backward in a decoder layer, by count of what autograd saves of a Llama layer
(tests count it again), c bytes to a number, hidden size h, feed-forward f, q = heads·head_dim, k = key-value
heads·head_dim:

    c·(4·h + 2·q + 2·k + 4·f) + 4·(2·h + heads + 2)      and (c + 4)·(q + k) with normalised queries and keys

It is the account of Korthikanti et al. (2022, "Reducing Activation Recomputation in Large Transformer Models", section
4) for layers without dropout, with a gated feed-forward, and attention that keeps no scores (flash, memory-efficient).
"""

from __future__ import annotations

from dataclasses import dataclass

from weaver_rl.check.finding import MemoryPart, RoleMemory
from weaver_rl.check.policy_shape import PolicyShape
from weaver_rl.learner.config import LearnerConfig

MiB = 1 << 20
GiB = 1 << 30

LEARNER_PROCESS_BYTES = {"CPU": 700 * MiB, "GPU": 1 * GiB}
"""CPU: torch, transformers and Ray (400 MiB), and what kernels and the allocator keep. GPU: CUDA context, libraries,
NCCL's buffers."""
SAMPLER_PROCESS_BYTES = {"CPU": 850 * MiB, "GPU": 1 * GiB}
REWARD_PROCESS_BYTES = 250 * MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerLoad:
    """What decides the memory of one vLLM engine, defaults filled in.

    Example:
        SamplerLoad(dtype_bytes=2, kv_dtype_bytes=2, tensor_parallel=1, max_model_len=1280, max_num_seqs=256,
                    max_num_batched_tokens=8192, gpu_memory_utilization=0.35, kv_cache_bytes=None)
    """

    dtype_bytes: int
    kv_dtype_bytes: int
    tensor_parallel: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    gpu_memory_utilization: float
    """Share of its GPU that an engine takes; of no meaning on the CPU."""
    kv_cache_bytes: int | None
    """Given as `kv_cache_memory_bytes`; None: what the share leaves."""


def activation_bytes(shape: PolicyShape, num_tokens: int, dtype_bytes: int, *, checkpointing: bool) -> int:
    """What a micro-batch takes at the peak of its backward, head apart."""
    layer = num_tokens * layer_bytes_per_token(shape, dtype_bytes)
    around = num_tokens * shape.hidden_size * (2 * dtype_bytes + 4)
    # The layer whose backward runs has gradients of about the size of what it kept.
    at_work = layer
    if not checkpointing:
        return shape.num_layers * layer + around + at_work
    # Only the inputs of layers are kept; the layer whose backward runs is whole once more.
    return shape.num_layers * num_tokens * shape.hidden_size * dtype_bytes + layer + around + at_work


def layer_bytes_per_token(shape: PolicyShape, c: int) -> int:
    """The formula above, for numbers of c bytes."""
    h, f = shape.hidden_size, shape.feed_forward_size
    q, k = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    kept = c * (4 * h + 2 * q + 2 * k + 4 * f) + 4 * (2 * h + shape.num_heads + 2)
    return kept + ((c + 4) * (q + k) if shape.qk_norm else 0)


def head_bytes(
    shape: PolicyShape, num_tokens: int, chunk_tokens: int, dtype_bytes: int, *, frozen: bool = False
) -> int:
    """The chunked head: float32 logits of a chunk, the same rounded where matrices are lower, the head's gradient."""
    chunk = min(num_tokens, chunk_tokens) * shape.vocab_size
    rounded = chunk * dtype_bytes if dtype_bytes < 4 else 0
    # Of a tied matrix there are two gradients, of either use, and their sum.
    gradients = 0 if frozen else (3 if shape.tied else 1) * 4 * shape.vocab_size * shape.hidden_size
    return 4 * chunk + rounded + gradients


def gathered_bytes(shape: PolicyShape, dtype_bytes: int, *, frozen: bool = False) -> int:
    """What FSDP2 puts together of the shards: the root, two layers, and the gradients of the larger of the two."""
    gradients = 0 if frozen else (4 + dtype_bytes) * max(shape.root_parameters, shape.layer_parameters)
    return dtype_bytes * (shape.root_parameters + 2 * shape.layer_parameters) + gradients


def learner_memory(
    shape: PolicyShape,
    config: LearnerConfig,
    *,
    on_gpu: bool,
    longest: int,
    chunk_mb: int,
    capacity_bytes: int | None,
    trained_parameters: int | None = None,
) -> RoleMemory:
    """One learner rank at its peak.

    Args:
        trained_parameters: those of adapters, on a policy that is frozen; None: the whole policy is trained.
        longest: tokens of the longest sequence: one that is longer than a micro-batch gets one of its own.
        chunk_mb: `weights.chunk_mb`, of which a copy is made while weights are published.
    """
    dtype_bytes = 2 if config.dtype == "bfloat16" or (config.dtype == "auto" and on_gpu) else 4
    sharded, frozen = config.num_ranks > 1 or dtype_bytes < 4, trained_parameters is not None
    mine = -(-shape.num_parameters // config.num_ranks)
    tokens = max(config.max_tokens_per_microbatch, longest)
    where = "GPU" if on_gpu else "CPU"
    activations = activation_bytes(shape, tokens, dtype_bytes, checkpointing=config.activation_checkpointing)
    at_work = {
        "activations": activations,
        "head": head_bytes(shape, tokens, config.logprob_chunk_tokens, dtype_bytes, frozen=frozen),
        "gathered": gathered_bytes(shape, dtype_bytes, frozen=frozen) if sharded else 0,
    }
    # While weights are published no step runs: it counts only where it is more than a step.
    publishing = min(chunk_mb * MiB, shape.num_parameters * dtype_bytes) - sum(at_work.values())
    trained = mine if trained_parameters is None else trained_parameters
    parts = {
        "weights": 4 * mine + (4 * trained if frozen else 0),
        "gradients": 4 * trained,
        "optimizer": 8 * trained,
        **at_work,
        "publishing": max(0, publishing),
        "process": LEARNER_PROCESS_BYTES[where],
    }
    return RoleMemory(
        role="learner rank",
        count=config.num_ranks,
        where="GPU" if on_gpu else "CPU",
        parts=tuple(MemoryPart(name=name, num_bytes=num_bytes) for name, num_bytes in parts.items() if num_bytes),
        capacity_bytes=capacity_bytes,
    )


def adapter_parameters(shape: PolicyShape, rank: int) -> int:
    """Of a LoRA adapter on every linear layer but the head; every rank of a learner holds all of it."""
    h, f = shape.hidden_size, shape.feed_forward_size
    q, k = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    return shape.num_layers * rank * (2 * (h + q) + 2 * (h + k) + 3 * (h + f))


def kv_bytes_per_token(shape: PolicyShape, load: SamplerLoad) -> int:
    """Keys and values of one token in all layers, on one of the engine's GPUs."""
    heads = max(1, -(-shape.num_kv_heads // load.tensor_parallel))
    return 2 * shape.num_layers * heads * shape.head_dim * load.kv_dtype_bytes


def sampler_memory(
    shape: PolicyShape, load: SamplerLoad, *, on_gpu: bool, num_replicas: int, capacity_bytes: int | None
) -> RoleMemory:
    """One engine, or one GPU of it. On a GPU it takes its share whatever it needs: the cache gets what is left."""
    weights = -(-shape.num_parameters * load.dtype_bytes // load.tensor_parallel)
    # Two layers' worth of a full step's activations, and float32 logits with their sorted copy for every sequence.
    step = load.max_num_batched_tokens * (2 * shape.hidden_size + 2 * shape.feed_forward_size) * load.dtype_bytes
    logits = 8 * min(load.max_num_seqs, load.max_num_batched_tokens) * shape.vocab_size
    process = SAMPLER_PROCESS_BYTES["GPU" if on_gpu else "CPU"]
    parts = {"weights": weights, "working": step + logits, "process": process}
    if load.kv_cache_bytes is not None:
        cache = load.kv_cache_bytes
    elif on_gpu and capacity_bytes is not None:
        cache = int(capacity_bytes * load.gpu_memory_utilization) - sum(parts.values())
    else:
        cache = 0
    return RoleMemory(
        role="sampler" if load.tensor_parallel == 1 else f"sampler (1 of {load.tensor_parallel} GPUs)",
        count=num_replicas * load.tensor_parallel,
        where="GPU" if on_gpu else "CPU",
        parts=tuple(
            MemoryPart(name=name, num_bytes=num_bytes) for name, num_bytes in {**parts, "kv cache": cache}.items()
        ),
        capacity_bytes=capacity_bytes,
    )


def sequences_that_fit(shape: PolicyShape, load: SamplerLoad, cache_bytes: int) -> float:
    """How many sequences of the engine's full length the cache holds at once."""
    return cache_bytes / (kv_bytes_per_token(shape, load) * load.max_model_len)


def checkpoint_bytes(shape: PolicyShape) -> int:
    """float32 weights and both moments."""
    return 12 * shape.num_parameters
