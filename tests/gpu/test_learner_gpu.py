"""The learner on CUDA: bfloat16 compute over float32 masters, beside the same learner on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from weaver_rl.learner.config import LearnerConfig
from weaver_rl.learner.learner import Learner
from weaver_rl.learner.microbatches import sum_weights
from weaver_rl.losses.config import ImportanceSampling
from weaver_rl.types import AdamParams, Datum

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU: torch.cuda.is_available() is false"),
]
LOSS = ImportanceSampling(name="importance_sampling", clip_ratio=1.0)
VOCAB = 512


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def model_dir(request, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=request.param,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def make_data(num: int = 9) -> list[Datum]:
    rng = np.random.default_rng(0)
    data = []
    for index in range(num):
        length = int(rng.integers(5, 100))
        tokens = rng.integers(0, VOCAB, length + 1)
        weights = np.ones(length, np.float32)
        weights[: length // 3] = 0.0
        inputs = {
            "target_tokens": tokens[1:],
            "weights": weights,
            "importance_weights": rng.normal(0, 1.5, length).astype(np.float32),
        }
        data.append(Datum(datum_id=f"d{index}", token_ids_N=tokens[:-1], loss_fn_inputs=inputs))
    return data


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-3), ("auto", 5e-2)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_cuda_agrees_with_cpu(model_dir, dtype, tolerance, checkpointing):
    data = make_data()
    cpu = Learner(model_dir, LearnerConfig(num_gpus=0, logprob_chunk_tokens=64))
    config = LearnerConfig(dtype=dtype, logprob_chunk_tokens=64, activation_checkpointing=checkpointing)
    cuda = Learner(model_dir, config)
    try:
        for _ in range(3):
            expected = cpu.forward_backward(data, LOSS, sum_weights(data))
            seen = cuda.forward_backward(data, LOSS, sum_weights(data))
            assert seen.loss == pytest.approx(expected.loss, rel=tolerance, abs=tolerance)
            for one, other in zip(seen.logprobs_per_datum, expected.logprobs_per_datum, strict=True):
                np.testing.assert_allclose(one, other, atol=20 * tolerance)
            params = AdamParams(learning_rate=1e-3)
            assert cuda.optim_step(params).grad_norm == pytest.approx(cpu.optim_step(params).grad_norm, rel=tolerance)
        assert {parameter.dtype for parameter in cuda._policy.parameters()} == {torch.float32}
    finally:
        cuda.close()


def test_state_resumes_bit_for_bit_on_cuda(model_dir, tmp_path):
    data = make_data()
    learner = Learner(model_dir, LearnerConfig())
    try:
        params = AdamParams(learning_rate=1e-3)
        learner.forward_backward(data, LOSS, sum_weights(data))
        learner.optim_step(params)
        learner.save_state(tmp_path / "state")
        saved = {n: t.clone() for chunk in learner.state_chunks(1 << 30, "float32") for n, t in chunk.items()}
        learner.forward_backward(data, LOSS, sum_weights(data))
        learner.optim_step(params)
        learner.load_state(tmp_path / "state")
        for chunk in learner.state_chunks(1 << 30, "float32"):
            for name, tensor in chunk.items():
                assert torch.equal(tensor, saved[name]), name
    finally:
        learner.close()


def test_peak_memory_of_the_head_is_one_chunk(tmp_path):
    from weaver_rl.losses.chunked_head import target_logprobs

    num_tokens, hidden_size, vocab, chunk = 8192, 256, 32_000, 512
    hidden = torch.randn(num_tokens, hidden_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocab, hidden_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(vocab, (num_tokens,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    target_logprobs(hidden, weight, None, targets, chunk_tokens=chunk).sum().backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < num_tokens * vocab * 4 / 4
