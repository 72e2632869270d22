"""Estimates of memory beside what is really so: parameters of real models, what autograd really keeps."""

from __future__ import annotations

import pytest
import torch
from check_parts import GIB, ROOT, a_run, cluster, lines, node
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from weaver_rl.check.finding import RoleMemory
from weaver_rl.check.memory import (
    SamplerLoad,
    activation_bytes,
    checkpoint_bytes,
    kv_bytes_per_token,
    layer_bytes_per_token,
    learner_memory,
    sampler_memory,
    sequences_that_fit,
)
from weaver_rl.check.memory_check import check_memory
from weaver_rl.check.policy_shape import PolicyShape, shape_of
from weaver_rl.learner.config import LearnerConfig
from weaver_rl.learner.policy import Policy
from weaver_rl.losses.chunked_head import IDENTITY

pytestmark = pytest.mark.unit

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 300,
}
FAMILIES = {
    "llama": LlamaConfig(**SIZES),
    "llama tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, head_dim=16),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "qwen3 mixture": Qwen3MoeConfig(
        **SIZES, head_dim=16, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2
    ),
    "gemma2": Gemma2Config(**SIZES, head_dim=32),
    "gpt2": GPT2Config(n_embd=64, n_layer=3, n_head=4, vocab_size=300, bos_token_id=0, eos_token_id=0),
}
QWEN_1_5B = Qwen2Config(
    hidden_size=1536,
    intermediate_size=8960,
    num_attention_heads=12,
    num_key_value_heads=2,
    num_hidden_layers=28,
    vocab_size=151936,
    tie_word_embeddings=True,
)


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_are_those_of_the_real_model(name: str):
    shape, model = shape_of(FAMILIES[name]), AutoModelForCausalLM.from_config(FAMILIES[name])
    assert shape.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.root_parameters + shape.num_layers * shape.layer_parameters == shape.num_parameters
    assert shape.tied == (name in ("llama tied", "gemma2", "gpt2"))
    assert shape.num_kv_heads == (4 if name == "gpt2" else 2)
    assert shape.qk_norm == name.startswith("qwen3")
    assert shape.feed_forward_size == {"qwen3 mixture": 2 * 32, "gpt2": 256}.get(name, 160)


def test_a_published_model_has_its_published_size():
    assert shape_of(QWEN_1_5B).num_parameters == 1_543_714_304


def kept_bytes(config: PretrainedConfig, num_tokens: int, dtype: torch.dtype) -> int:
    """What autograd really keeps of a forward: storages that are no weights, once each."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    policy = Policy(model, chunk_tokens=8, transform=IDENTITY)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    token_ids = torch.arange(num_tokens).reshape(2, -1) % 300
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        policy(token_ids, torch.arange(num_tokens), torch.zeros(num_tokens, dtype=torch.long), 1.0)
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config])
def test_a_layer_keeps_for_backward_what_the_formula_says(family: type[PretrainedConfig], dtype: torch.dtype):
    num_tokens = 64
    sizes = SIZES if family is not Qwen3Config else SIZES | {"head_dim": 16}
    three, two = family(**sizes), family(**(sizes | {"num_hidden_layers": 2}))
    counted = kept_bytes(three, num_tokens, dtype) - kept_bytes(two, num_tokens, dtype)
    assert num_tokens * layer_bytes_per_token(shape_of(three), dtype.itemsize) == pytest.approx(counted, rel=0.01)


def test_checkpointing_keeps_the_inputs_of_layers_and_one_layer_at_work():
    shape = shape_of(LlamaConfig(**(SIZES | {"num_hidden_layers": 24})))
    assert activation_bytes(shape, 512, 4, checkpointing=True) < 0.2 * activation_bytes(
        shape, 512, 4, checkpointing=False
    )


shapes = st.builds(
    PolicyShape,
    num_parameters=st.integers(10_000_000, 10_000_000_000),
    layer_parameters=st.integers(100_000, 200_000),
    num_layers=st.integers(1, 50),
    hidden_size=st.integers(64, 8192),
    feed_forward_size=st.integers(64, 30_000),
    num_heads=st.integers(8, 64),
    num_kv_heads=st.integers(1, 8),
    head_dim=st.sampled_from([64, 128]),
    vocab_size=st.integers(300, 200_000),
    qk_norm=st.booleans(),
    tied=st.booleans(),
)


@given(shape=shapes, ranks=st.integers(1, 64), tokens=st.integers(1, 100_000), on_gpu=st.booleans())
def test_more_ranks_hold_less_each_and_more_tokens_more(shape: PolicyShape, ranks: int, tokens: int, on_gpu: bool):
    def total(num_ranks: int, max_tokens: int, **more) -> int:
        config = LearnerConfig(num_ranks=num_ranks, max_tokens_per_microbatch=max_tokens, **more)
        return learner_memory(shape, config, on_gpu=on_gpu, longest=1, chunk_mb=1, capacity_bytes=None).total_bytes

    assert total(ranks, tokens + 1000) >= total(ranks, tokens)
    assert total(2 * ranks + 1, tokens) <= total(2 * ranks, tokens)
    states = {
        part.name: part.num_bytes
        for part in learner_memory(
            shape, LearnerConfig(num_ranks=ranks), on_gpu=on_gpu, longest=1, chunk_mb=1, capacity_bytes=None
        ).parts
    }
    held = states["weights"] + states["gradients"] + states["optimizer"]
    assert 16 * shape.num_parameters <= ranks * held <= 16 * (shape.num_parameters + ranks)
    assert checkpoint_bytes(shape) == 12 * shape.num_parameters


@given(shape=shapes, length=st.integers(16, 100_000), cache=st.integers(1 << 20, 1 << 36))
def test_the_cache_holds_sequences_in_proportion(shape: PolicyShape, length: int, cache: int):
    load = SamplerLoad(
        dtype_bytes=2,
        kv_dtype_bytes=2,
        tensor_parallel=1,
        max_model_len=length,
        max_num_seqs=8,
        max_num_batched_tokens=2048,
        gpu_memory_utilization=0.9,
        kv_cache_bytes=cache,
    )
    number = sequences_that_fit(shape, load, cache)
    assert number * length * kv_bytes_per_token(shape, load) == pytest.approx(cache)
    memory = sampler_memory(shape, load, on_gpu=True, num_replicas=1, capacity_bytes=80 * GIB)
    assert next(part.num_bytes for part in memory.parts if part.name == "kv cache") == cache


def test_a_known_models_cache_is_what_its_documents_say():
    """28 layers, 2 key-value heads of 128, bfloat16: 28 KiB a token."""
    load = SamplerLoad(
        dtype_bytes=2,
        kv_dtype_bytes=2,
        tensor_parallel=1,
        max_model_len=1280,
        max_num_seqs=8,
        max_num_batched_tokens=2048,
        gpu_memory_utilization=0.9,
        kv_cache_bytes=None,
    )
    assert kv_bytes_per_token(shape_of(QWEN_1_5B), load) == 28 * 1024


@pytest.fixture
def qwen(tmp_path, monkeypatch):
    """`gsm8k_1gpu.yaml` with its real model's configuration, which is all that is read of it."""
    from safetensors.numpy import save_file

    directory = tmp_path / "qwen"
    QWEN_1_5B.save_pretrained(directory)
    save_file({}, directory / "model.safetensors")
    return f"model.name={directory}"


def checked(*overrides: str, config: str = "gsm8k_1gpu", **more):
    entries = list(check_memory(a_run(*overrides, config=ROOT / "configs" / f"{config}.yaml", **more)))
    return lines(entries), {entry.role: entry for entry in entries if isinstance(entry, RoleMemory)}


def test_a_model_on_one_shared_gpu_fits_or_does_not(qwen: str):
    fits, roles = checked(qwen, facts=cluster(node(gpus=1, gpu_memory_bytes=80 * GIB)))
    assert fits["one GPU for both"].level == "pass", fits
    assert "about 6" in fits["one GPU for both"].seen
    assert roles["learner rank"].where == "GPU"
    too_small, _ = checked(qwen, facts=cluster(node(gpus=1, gpu_memory_bytes=40 * GIB)))
    assert too_small["one GPU for both"].level == "fail"
    assert "lower gpu_memory_utilization" in too_small["one GPU for both"].advice


def test_memory_that_the_user_gives_wins_and_unknown_memory_is_said(qwen: str):
    given, _ = checked(qwen, gpu_memory_gb=24)
    assert given["one GPU for both"].level == "fail"
    unknown, roles = checked(qwen)
    assert unknown["GPU memory"].level == "warn"
    assert "--gpu-memory-gb" in unknown["GPU memory"].advice
    assert roles["sampler"].capacity_bytes is None


def test_split_ranks_and_samplers_are_judged_apart(qwen: str):
    found, roles = checked(qwen, config="gsm8k_8gpu", facts=cluster(node(gpus=8, gpu_memory_bytes=80 * GIB)))
    assert found["GPU of a learner rank"].level == "pass"
    assert found["GPU of a sampler"].level == "pass"
    assert found["kv cache"].level == "pass"
    assert (roles["learner rank"].count, roles["sampler"].count) == (4, 4)
    tiny_gpu, _ = checked(qwen, config="gsm8k_8gpu", gpu_memory_gb=8)
    assert tiny_gpu["GPU of a sampler"].level == "pass"
    assert tiny_gpu["GPU of a learner rank"].level == "fail"
    assert "more learner.num_ranks" in tiny_gpu["GPU of a learner rank"].advice


def test_a_cache_for_less_than_one_sequence_fails(qwen: str):
    found, _ = checked(qwen, "sampler.engine_args.kv_cache_memory_bytes=1048576", gpu_memory_gb=80)
    assert found["kv cache"].level == "fail"
    few, _ = checked(qwen, "sampler.engine_args.kv_cache_memory_bytes=104857600", gpu_memory_gb=80)
    assert few["kv cache"].level == "warn"


def test_a_part_of_a_sequence_is_none(qwen: str):
    """`hold 1 sequences` and a failure would contradict each other."""
    of_one = "sampler.engine_args.kv_cache_memory_bytes={}"
    whole, _ = checked(qwen, of_one.format(104857600), gpu_memory_gb=80)
    held = int(whole["kv cache"].seen.partition("hold ")[2].partition(" ")[0])
    almost, _ = checked(qwen, of_one.format(104857600 // (held + 1) * 3 // 4), gpu_memory_gb=80)
    assert "hold 0 sequences" in almost["kv cache"].seen


def test_on_cpus_all_processes_share_the_machine():
    fine, roles = checked(config="quickstart", facts=cluster(node(memory_bytes=16 * GIB)))
    assert fine["memory of this machine"].level == "pass"
    assert roles["reward worker"].count == 2
    small, _ = checked(config="quickstart", facts=cluster(node(memory_bytes=1 * GIB)))
    assert small["memory of this machine"].level == "fail"


def test_a_frozen_policy_needs_no_gradients_of_its_own():
    shape = shape_of(QWEN_1_5B)
    config = LearnerConfig(num_gpus=1)

    def parts(trained: int | None) -> dict[str, int]:
        memory = learner_memory(
            shape, config, on_gpu=True, longest=1, chunk_mb=1, capacity_bytes=None, trained_parameters=trained
        )
        return {part.name: part.num_bytes for part in memory.parts}

    whole, adapter = parts(None), parts(1000)
    assert adapter["gradients"] + adapter["optimizer"] == 12_000
    assert adapter["weights"] == whole["weights"] + 4000
    assert adapter["gathered"] < whole["gathered"]
    assert adapter["head"] < whole["head"]
