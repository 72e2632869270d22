"""The reference losses against the formula written out, and their configuration."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from weaver_rl.errors import BatchError
from weaver_rl.losses import cross_entropy_loss, importance_sampling_loss
from weaver_rl.losses.config import CrossEntropy, ImportanceSampling, LossConfig

pytestmark = pytest.mark.unit


def make_case(num_tokens: int = 6, vocab: int = 5) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(num_tokens, vocab, dtype=torch.float64, generator=generator, requires_grad=True)
    targets = torch.randint(vocab, (num_tokens,), generator=generator)
    weights = torch.rand(num_tokens, dtype=torch.float64, generator=generator)
    weights[1] = 0.0
    importance = torch.randn(num_tokens, dtype=torch.float64, generator=generator) * 2
    return logits, targets, weights, importance


def by_hand(logits, targets, weights, importance, clip_ratio) -> float:
    total = 0.0
    for row, target, weight, iw in zip(
        logits.tolist(), targets.tolist(), weights.tolist(), importance.tolist(), strict=True
    ):
        logprob = row[target] - math.log(sum(math.exp(value) for value in row))
        clamped = iw if clip_ratio is None else max(-clip_ratio, min(clip_ratio, iw))
        total -= weight * clamped * logprob
    return total / sum(weights.tolist())


def test_cross_entropy_is_the_formula():
    logits, targets, weights, _ = make_case()
    expected = by_hand(logits, targets, weights, torch.ones(6), None)
    assert cross_entropy_loss(logits, targets, weights).item() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("clip_ratio", [None, 0.5, 100.0])
def test_importance_sampling_is_the_formula(clip_ratio):
    logits, targets, weights, importance = make_case()
    loss = importance_sampling_loss(logits, targets, weights, importance, clip_ratio)
    assert loss.item() == pytest.approx(by_hand(logits, targets, weights, importance, clip_ratio), rel=1e-13)


def test_gradients_are_those_of_the_formula():
    logits, targets, weights, importance = make_case()
    assert torch.autograd.gradcheck(lambda x: cross_entropy_loss(x, targets, weights), logits)
    assert torch.autograd.gradcheck(lambda x: importance_sampling_loss(x, targets, weights, importance, 0.5), logits)


def test_no_gradient_flows_through_importance_weights():
    logits, targets, weights, importance = make_case()
    importance.requires_grad_()
    importance_sampling_loss(logits, targets, weights, importance, 0.5).backward()
    assert importance.grad is None
    assert logits.grad is not None


def test_all_weights_zero_is_an_error_that_says_so():
    logits, targets, _, importance = make_case()
    zeros = torch.zeros(6, dtype=torch.float64)
    with pytest.raises(BatchError, match="all weights are zero"):
        cross_entropy_loss(logits, targets, zeros)
    with pytest.raises(BatchError, match="all weights are zero"):
        importance_sampling_loss(logits, targets, zeros, importance)


@pytest.mark.parametrize("clip_ratio", [0.0, -1.0, math.inf, math.nan])
def test_clip_ratio_must_be_positive(clip_ratio):
    logits, targets, weights, importance = make_case()
    with pytest.raises(BatchError, match="clip_ratio"):
        importance_sampling_loss(logits, targets, weights, importance, clip_ratio)
    with pytest.raises(ValidationError, match="clip_ratio"):
        ImportanceSampling(name="importance_sampling", clip_ratio=clip_ratio)


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        ({"logits": torch.zeros(2, 6, 5)}, "logits"),
        ({"logits": torch.zeros(6, 5, dtype=torch.int64)}, "logits"),
        ({"target_tokens": torch.zeros(6)}, "target_tokens"),
        ({"target_tokens": torch.zeros(5, dtype=torch.int64)}, "target_tokens"),
        ({"target_tokens": torch.full((6,), 5)}, r"0\.\.4, seen 5\.\.5"),
        ({"target_tokens": torch.full((6,), -100)}, "seen -100"),
        ({"weights": torch.ones(6, dtype=torch.int64)}, "weights"),
        ({"weights": torch.tensor([1.0, math.nan, 1, 1, 1, 1])}, "weights must be finite"),
        ({"importance_weights": torch.ones(3)}, "importance_weights"),
        ({"importance_weights": torch.full((6,), math.inf)}, "importance_weights must be finite"),
    ],
)
def test_wrong_tensors_are_refused_by_name(change, seen):
    logits, targets, weights, importance = make_case()
    arguments = {"logits": logits, "target_tokens": targets, "weights": weights, "importance_weights": importance}
    with pytest.raises(BatchError, match=seen):
        importance_sampling_loss(**(arguments | change))


def test_low_precision_logits_are_computed_in_float32():
    logits, targets, weights, _ = make_case()
    low = logits.detach().bfloat16()
    loss = cross_entropy_loss(low, targets, weights.float())
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(cross_entropy_loss(low.double(), targets, weights)), rel=1e-6)


def test_config_is_chosen_by_name():
    adapter = TypeAdapter(LossConfig)
    assert adapter.validate_python({"name": "cross_entropy"}) == CrossEntropy(name="cross_entropy")
    chosen = adapter.validate_python({"name": "importance_sampling", "clip_ratio": 1.0})
    assert chosen == ImportanceSampling(name="importance_sampling", clip_ratio=1.0)
    with pytest.raises(ValidationError, match="importance_sampling"):
        adapter.validate_python({"name": "ppo"})
    with pytest.raises(ValidationError, match="clip"):
        adapter.validate_python({"name": "cross_entropy", "clip_ratio": 1.0})


def test_configs_import_no_torch():
    code = (
        "import sys, weaver_rl.losses.config, weaver_rl.learner.config; "
        "sys.exit(bool({'torch', 'transformers', 'ray', 'vllm'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
