"""The chunked head equals the reference losses, value and gradient, and never holds all logits."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from weaver_rl.losses import importance_sampling_loss
from weaver_rl.losses.chunked_head import LogitTransform, target_logprobs
from weaver_rl.losses.config import ImportanceSampling

pytestmark = pytest.mark.unit
LOSS = ImportanceSampling(name="importance_sampling", clip_ratio=0.7)


def make_case(num_tokens: int = 10, hidden: int = 4, vocab: int = 7) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    return {
        "hidden": normal(num_tokens, hidden).requires_grad_(),
        "weight": normal(vocab, hidden).requires_grad_(),
        "bias": normal(vocab).requires_grad_(),
        "targets": torch.randint(vocab, (num_tokens,), generator=generator),
        "weights": normal(num_tokens).abs(),
        "importance_weights": normal(num_tokens),
    }


@pytest.mark.parametrize("chunk_tokens", [1, 3, 5, 10, 64])
@pytest.mark.parametrize("with_bias", [False, True])
def test_chunked_equals_reference(chunk_tokens, with_bias):
    case = make_case()
    bias = case["bias"] if with_bias else None
    leaves = [case["hidden"], case["weight"], *([bias] if bias is not None else [])]
    logits = case["hidden"] @ case["weight"].T + (0 if bias is None else bias)
    expected = importance_sampling_loss(logits, case["targets"], case["weights"], case["importance_weights"], 0.7)
    expected_grads = torch.autograd.grad(expected, leaves)

    logprobs = target_logprobs(case["hidden"], case["weight"], bias, case["targets"], chunk_tokens=chunk_tokens)
    loss = LOSS.token_losses(logprobs, case).sum() / case["weights"].sum()
    grads = torch.autograd.grad(loss, leaves)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-13)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    "transform",
    [
        LogitTransform(temperature=0.6),
        LogitTransform(scale=0.25, temperature=1.5),
        LogitTransform(scale=1.5, softcap=2.0, temperature=0.8),
    ],
)
def test_transforms_are_those_of_the_models(transform):
    case = make_case()
    raw = case["hidden"] @ case["weight"].T * transform.scale
    capped = raw if transform.softcap is None else transform.softcap * torch.tanh(raw / transform.softcap)
    expected = (capped / transform.temperature).log_softmax(-1).gather(1, case["targets"][:, None])[:, 0]

    def chunked(hidden, weight):
        return target_logprobs(hidden, weight, None, case["targets"], transform=transform, chunk_tokens=3)

    torch.testing.assert_close(chunked(case["hidden"], case["weight"]), expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(chunked, (case["hidden"], case["weight"]))


def test_tied_head_gets_both_gradients():
    case = make_case()
    tied = case["weight"]
    token_ids = torch.arange(10) % 7

    def loss_with(logprobs_of) -> torch.Tensor:
        return -(case["weights"] * logprobs_of(tied[token_ids].tanh(), tied)).sum()

    expected = loss_with(lambda h, w: (h @ w.T).log_softmax(-1).gather(1, case["targets"][:, None])[:, 0])
    chunked = loss_with(lambda h, w: target_logprobs(h, w, None, case["targets"], chunk_tokens=4))
    torch.testing.assert_close(*torch.autograd.grad(chunked, tied), *torch.autograd.grad(expected, tied))


@pytest.mark.parametrize("extreme", [1e4, -1e4])
def test_extreme_logits_stay_finite(extreme):
    hidden = torch.tensor([[extreme, 0.0]], requires_grad=True)
    logprobs = target_logprobs(hidden, torch.eye(2), None, torch.tensor([0]), chunk_tokens=1)
    logprobs.sum().backward()
    assert bool(hidden.grad.isfinite().all())
    assert float(logprobs.detach()) == pytest.approx(min(extreme, 0.0))


def test_no_positions_give_zero_gradients():
    case = make_case()
    empty = target_logprobs(case["hidden"][:0], case["weight"], None, case["targets"][:0], chunk_tokens=4)
    empty.sum().backward()
    assert float(case["weight"].grad.abs().sum()) == 0.0
    assert float(case["hidden"].grad.abs().sum()) == 0.0


class LargestTensor(TorchDispatchMode):
    """Records the most elements any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_logits_of_the_whole_batch_never_exist():
    num_tokens, hidden_size, vocab, chunk = 256, 8, 512, 16
    hidden = torch.randn(num_tokens, hidden_size, requires_grad=True)
    weight = torch.randn(vocab, hidden_size, requires_grad=True)
    targets = torch.randint(vocab, (num_tokens,))
    with LargestTensor() as chunked:
        target_logprobs(hidden, weight, None, targets, chunk_tokens=chunk).sum().backward()
    with LargestTensor() as reference:
        (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None]).sum().backward()
    assert chunked.numel == chunk * vocab
    assert reference.numel == num_tokens * vocab
