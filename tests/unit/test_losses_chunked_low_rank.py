"""A head with a low-rank change in the chunked head: value and gradient of the whole, in pieces and in float32."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from weaver_rl.losses.chunked_head import LogitTransform, LowRank, target_logprobs

pytestmark = pytest.mark.unit
TOKENS, HIDDEN, VOCAB, RANK = 10, 6, 11, 3


def make_case(dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {
        "hidden": (TOKENS, HIDDEN),
        "weight": (VOCAB, HIDDEN),
        "bias": (VOCAB,),
        "down": (RANK, HIDDEN),
        "up": (VOCAB, RANK),
    }
    case = {
        name: torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
        for name, shape in shapes.items()
    }
    return case | {"targets": torch.randint(VOCAB, (TOKENS,), generator=generator)}


@pytest.mark.parametrize("chunk_tokens", [1, 3, 5, 10, 64])
@pytest.mark.parametrize("transform", [LogitTransform(temperature=0.6), LogitTransform(scale=1.5, softcap=2.0)])
@pytest.mark.parametrize("frozen", [False, True])
def test_value_and_gradients_are_those_of_the_changed_weight(chunk_tokens, transform, frozen):
    case = make_case()
    for name in ("weight", "bias"):
        case[name].requires_grad_(not frozen)
    leaves = [tensor for tensor in case.values() if tensor.requires_grad]
    changed = case["weight"] + 0.7 * case["up"] @ case["down"]
    logits = (case["hidden"] @ changed.T + case["bias"]) * transform.scale
    if transform.softcap is not None:
        logits = transform.softcap * (logits / transform.softcap).tanh()
    logits = logits / transform.temperature
    expected = logits.log_softmax(-1).gather(1, case["targets"][:, None])[:, 0]
    seen = target_logprobs(
        case["hidden"],
        case["weight"],
        case["bias"],
        case["targets"],
        transform=transform,
        chunk_tokens=chunk_tokens,
        low_rank=LowRank(down=case["down"], up=case["up"], scaling=0.7),
    )
    torch.testing.assert_close(seen, expected, rtol=1e-12, atol=1e-12)
    factors = torch.arange(1.0, TOKENS + 1, dtype=torch.float64)
    expected_grads = torch.autograd.grad((factors * expected).sum(), leaves)
    grads = torch.autograd.grad((factors * seen).sum(), leaves)
    assert len(grads) == (3 if frozen else 5)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-11)


def test_a_change_too_small_for_half_precision_weights_counts_in_full():
    case = make_case(torch.bfloat16)
    change = LowRank(down=case["down"].detach().float(), up=case["up"].detach().float() * 1e-4, scaling=1.0)
    rounded = (case["weight"].float() + change.up @ change.down).bfloat16()
    assert (rounded != case["weight"]).float().mean() < 0.3

    def logprobs(low_rank: LowRank | None) -> torch.Tensor:
        return target_logprobs(
            case["hidden"].detach(), case["weight"].detach(), None, case["targets"], chunk_tokens=4, low_rank=low_rank
        )

    wide = case["hidden"].detach().float() @ case["weight"].detach().float().T
    plain, moved = (
        (wide + delta).log_softmax(-1).gather(1, case["targets"][:, None])[:, 0]
        for delta in (0.0, case["hidden"].detach().float() @ (change.up @ change.down).T)
    )
    torch.testing.assert_close(logprobs(change) - logprobs(None), moved - plain, rtol=0.05, atol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Of those that are made; views of the weight are not."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.numel = 0
        self._weight = weight.untyped_storage().data_ptr()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() != self._weight:
            self.numel = max(self.numel, out.numel())
        return out


def test_nothing_of_the_size_of_the_weight_is_ever_made():
    hidden, down = torch.randn(64, 32, requires_grad=True), torch.randn(2, 32, requires_grad=True)
    weight, up = torch.randn(1000, 32), torch.randn(1000, 2, requires_grad=True)
    with LargestTensor(weight) as largest:
        target_logprobs(
            hidden,
            weight,
            None,
            torch.arange(64),
            chunk_tokens=4,
            low_rank=LowRank(down=down, up=up, scaling=1.0),
        ).sum().backward()
    assert up.grad is not None
    assert largest.numel < weight.numel() / 2
