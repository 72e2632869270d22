"""Adapters on CUDA: float32 beside a bfloat16 policy, as on the CPU, and none of them changes the policy by a bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_learner_gpu import LOSS, make_data, model_dir

from weaver_rl.learner.adapter_config import AdapterConfig
from weaver_rl.learner.config import LearnerConfig
from weaver_rl.learner.learner import Learner
from weaver_rl.learner.microbatches import sum_weights
from weaver_rl.types import AdamParams

__all__ = ["model_dir"]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU: torch.cuda.is_available() is false"),
]
ADAPTER = AdapterConfig(rank=8, seed=3)
PARAMS = AdamParams(learning_rate=1e-3)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-3), ("auto", 5e-2)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_on_cuda_agree_with_those_on_the_cpu(model_dir: Path, dtype, tolerance, checkpointing):
    data = make_data()
    cpu = Learner(model_dir, LearnerConfig(num_gpus=0, logprob_chunk_tokens=64)).with_adapter("a", ADAPTER)
    config = LearnerConfig(dtype=dtype, logprob_chunk_tokens=64, activation_checkpointing=checkpointing)
    base = Learner(model_dir, config)
    try:
        before = base.forward(data).logprobs_per_datum
        cuda = base.with_adapter("a", ADAPTER)
        for _ in range(3):
            expected = cpu.forward_backward(data, LOSS, sum_weights(data), with_grad_norm=True)
            seen = cuda.forward_backward(data, LOSS, sum_weights(data), with_grad_norm=True)
            assert seen.loss == pytest.approx(expected.loss, rel=tolerance, abs=tolerance)
            assert seen.metrics["grad_norm"] == pytest.approx(expected.metrics["grad_norm"], rel=tolerance)
            for one, other in zip(seen.logprobs_per_datum, expected.logprobs_per_datum, strict=True):
                np.testing.assert_allclose(one, other, atol=20 * tolerance)
            cpu.optim_step(PARAMS)
            cuda.optim_step(PARAMS)
        for name, parameter in cuda._trained.named_parameters():
            assert (parameter.dtype, parameter.device.type) == (torch.float32, "cuda"), name
        for one, other in zip(base.forward(data).logprobs_per_datum, before, strict=True):
            np.testing.assert_array_equal(one, other)
    finally:
        base.close()


def test_the_state_of_an_adapter_resumes_bit_for_bit_on_cuda(model_dir: Path, tmp_path):
    data = make_data()
    base = Learner(model_dir, LearnerConfig())
    try:
        learner = base.with_adapter("a", ADAPTER)

        def step() -> dict[str, torch.Tensor]:
            learner.forward_backward(data, LOSS, sum_weights(data))
            learner.optim_step(PARAMS)
            return {name: parameter.detach().clone() for name, parameter in learner._trained.named_parameters()}

        saved = step()
        learner.save_state(tmp_path / "state")
        step()
        learner.load_state(tmp_path / "state")
        for name, parameter in learner._trained.named_parameters():
            assert torch.equal(parameter, saved[name]), name
        assert learner._optimizer.state_dict()["state"][0]["step"] == 1
    finally:
        base.close()
