"""Compares what the processes of a run hold with the memory there is. The estimates themselves are in memory.py."""

from __future__ import annotations

import math
from collections.abc import Iterator

from weaver_rl.check.capacity import placement_of
from weaver_rl.check.checklist import Entry
from weaver_rl.check.finding import Finding, MemoryPart, RoleMemory, failed, passed, warned
from weaver_rl.check.memory import (
    REWARD_PROCESS_BYTES,
    GiB,
    SamplerLoad,
    learner_memory,
    sampler_memory,
    sequences_that_fit,
)
from weaver_rl.check.policy_shape import PolicyShape
from weaver_rl.check.resources import ClusterFacts
from weaver_rl.check.subject import RunUnderCheck
from weaver_rl.engines.config import DEFAULT_MAX_NUM_BATCHED_TOKENS, DEFAULT_MAX_NUM_SEQS, SamplerConfig
from weaver_rl.engines.start import CPU_KV_CACHE_BYTES
from weaver_rl.errors import ResourcesError

GPU_MEMORY_UTILIZATION = 0.92
"""vLLM 0.32's default."""
DTYPE_BYTES = {"float32": 4, "float": 4, "bfloat16": 2, "half": 2, "float16": 2}
TIGHT_SHARE = 0.9
"""An estimate above this share of what there is may be wrong by the rest."""
FEW_SEQUENCES = 8


def check_memory(run: RunUnderCheck) -> Iterator[Entry]:
    """The table's rows, then a line for each device."""
    facts = run.cluster.needed()
    shape = run.shape.needed()
    on_gpu = _wants_gpu(run, facts)
    gpu_bytes = int(run.gpu_memory_gb * 1e9) if run.gpu_memory_gb is not None else facts.gpu_memory_bytes
    cpu_bytes = min((node.memory_bytes for node in facts.nodes if node.memory_bytes), default=None)
    capacity = gpu_bytes if on_gpu else cpu_bytes
    config = run.config
    learner = learner_memory(
        shape,
        config.learner,
        on_gpu=on_gpu,
        longest=run.max_length(),
        chunk_mb=config.weights.chunk_mb,
        capacity_bytes=capacity,
    )
    load = sampler_load(config.sampler, run.max_length(), on_gpu=on_gpu)
    sampler = sampler_memory(
        shape, load, on_gpu=on_gpu, num_replicas=config.sampler.num_replicas, capacity_bytes=capacity
    )
    rewards = RoleMemory(
        role="reward worker",
        count=config.reward_workers.num_workers,
        where="CPU",
        parts=(MemoryPart(name="process", num_bytes=REWARD_PROCESS_BYTES),),
        capacity_bytes=cpu_bytes,
    )
    yield learner
    yield sampler
    yield rewards
    yield passed("model", f"{shape.num_parameters:,} parameters, {shape.num_layers} layers of {shape.hidden_size}")
    yield from check_cache(shape, load, sampler)
    if on_gpu:
        yield from _on_gpus(run, learner, sampler, load, gpu_bytes)
        yield from _host(shape, cpu_bytes)
    else:
        yield from _on_cpu(facts, (learner, sampler, rewards))


def _wants_gpu(run: RunUnderCheck, facts: ClusterFacts) -> bool:
    config = run.config
    if run.gpu_memory_gb is not None or config.cluster.placement == "colocated":
        return True
    given = (config.learner.num_gpus, config.sampler.num_gpus)
    return any(given) or (facts.num_gpus > 0 and given != (0, 0)) or config.sampler.tensor_parallel > 1


def sampler_load(config: SamplerConfig, max_model_len: int, *, on_gpu: bool) -> SamplerLoad:
    """What the engine would run with: what is given, else vLLM's defaults."""
    engine_args = config.engine_args
    dtype = str(engine_args.get("dtype", "auto" if on_gpu else "float32"))
    dtype_bytes = DTYPE_BYTES.get(dtype, 2)
    cache = engine_args.get("kv_cache_memory_bytes", None if on_gpu else CPU_KV_CACHE_BYTES)
    return SamplerLoad(
        dtype_bytes=dtype_bytes,
        kv_dtype_bytes=1 if str(engine_args.get("kv_cache_dtype", "auto")).startswith("fp8") else dtype_bytes,
        tensor_parallel=config.tensor_parallel,
        max_model_len=max_model_len,
        max_num_seqs=int(engine_args.get("max_num_seqs", DEFAULT_MAX_NUM_SEQS)),
        max_num_batched_tokens=int(
            engine_args.get("max_num_batched_tokens", max(DEFAULT_MAX_NUM_BATCHED_TOKENS, max_model_len))
        ),
        gpu_memory_utilization=float(engine_args.get("gpu_memory_utilization", GPU_MEMORY_UTILIZATION)),
        kv_cache_bytes=None if cache is None else int(cache),
    )


def check_cache(shape: PolicyShape, load: SamplerLoad, sampler: RoleMemory) -> Iterator[Finding]:
    """How many sequences an engine holds at once."""
    cache = next(part.num_bytes for part in sampler.parts if part.name == "kv cache")
    if load.kv_cache_bytes is None and sampler.capacity_bytes is None:
        return  # nothing is known of the GPU, and another line says so
    number = sequences_that_fit(shape, load, max(0, cache))
    seen = (
        f"{gib(max(0, cache))} hold {math.floor(number):,} sequences of {load.max_model_len} tokens at once; "
        f"max_num_seqs {load.max_num_seqs}"
    )
    if number < 1:
        yield failed("kv cache", seen, "raise gpu_memory_utilization or kv_cache_memory_bytes, or lower max_model_len")
    elif number < min(FEW_SEQUENCES, load.max_num_seqs):
        yield warned("kv cache", seen, "sampling is slow with so few: give the cache more, or lower max_model_len")
    else:
        yield passed("kv cache", seen)


def _on_gpus(
    run: RunUnderCheck, learner: RoleMemory, sampler: RoleMemory, load: SamplerLoad, gpu_bytes: int | None
) -> Iterator[Finding]:
    least = learner.total_bytes
    if gpu_bytes is None:
        yield warned(
            "GPU memory",
            f"a learner rank needs about {gib(least)}, and no GPU is seen here",
            "say what there will be: --gpu-memory-gb 80, or --address of the cluster",
        )
        return
    share = int(gpu_bytes * load.gpu_memory_utilization)
    colocated = run.config.cluster.placement == "colocated" or learner_and_sampler_share(run)
    if colocated:
        advice = "lower gpu_memory_utilization or max_tokens_per_microbatch, or set activation_checkpointing: true"
        yield fits("one GPU for both", least + share, gpu_bytes, f"learner {gib(least)}, engine {gib(share)}", advice)
        return
    advice = "use more learner.num_ranks, fewer max_tokens_per_microbatch, or activation_checkpointing: true"
    yield fits("GPU of a learner rank", least, gpu_bytes, f"{gib(least)}", advice)
    needed = sum(part.num_bytes for part in sampler.parts if part.name != "kv cache")
    yield fits(
        "GPU of a sampler",
        max(share, needed),
        gpu_bytes,
        f"{gib(share)} by gpu_memory_utilization {load.gpu_memory_utilization:g}, {gib(needed)} before the cache",
        "lower gpu_memory_utilization, or raise sampler.tensor_parallel",
        tight=False,
    )


def learner_and_sampler_share(run: RunUnderCheck) -> bool:
    """Whether `auto` comes to one GPU for both."""
    try:
        return placement_of(run, run.cluster.needed()).colocated
    except ResourcesError:
        return False


def fits(subject: str, needed: int, there: int, seen: str, advice: str, *, tight: bool = True) -> Finding:
    """A line about an estimate beside what there is; `tight`: one that is close is a warning."""
    seen = f"about {gib(needed)} of {gib(there)}: {seen}"
    if needed > there:
        return failed(subject, seen, advice)
    if tight and needed > TIGHT_SHARE * there:
        return warned(subject, f"{seen}; close", advice)
    return passed(subject, seen)


def _host(shape: PolicyShape, cpu_bytes: int | None) -> Iterator[Finding]:
    needed = 4 * shape.num_parameters
    if cpu_bytes is not None and needed > TIGHT_SHARE * cpu_bytes:
        yield warned(
            "memory of the node",
            f"rank 0 reads the whole policy in float32, {gib(needed)}, and a node has {gib(cpu_bytes)}",
            "give the node of rank 0 more memory",
        )


def _on_cpu(facts: ClusterFacts, roles: tuple[RoleMemory, ...]) -> Iterator[Finding]:
    total = sum(role.count * role.total_bytes for role in roles)
    there = sum(node.memory_bytes or 0 for node in facts.nodes)
    if there == 0:
        return
    advice = "use fewer processes, fewer max_tokens_per_microbatch, or activation_checkpointing: true"
    where = "memory of this machine" if facts.address is None else "memory of all nodes"
    yield fits(where, total, there, "all processes together", advice)


def gib(num_bytes: int) -> str:
    """As a person reads it."""
    return f"{num_bytes / GiB:.1f} GiB" if num_bytes >= GiB else f"{num_bytes / (1 << 20):.0f} MiB"
