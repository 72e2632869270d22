"""Checks and log-probabilities shared by the reference losses, which hold all logits at once. Knows no formula."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from weaver_rl.errors import BatchError

if TYPE_CHECKING:
    import torch

    from weaver_rl.losses.contract import TokenLoss


def loss_over_logits(
    loss: TokenLoss, logits: torch.Tensor, target_tokens: torch.Tensor, inputs: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """The loss of one request, for logits (num_tokens, vocab), targets and other inputs (num_tokens,).

    In the precision of the logits, float32 at least. A BatchError names what has a wrong shape, dtype or value.
    """
    check_logits(logits)
    check_targets(logits, target_tokens)
    for name, values in inputs.items():
        check_token_factors(name, values, len(logits))
    token_losses = loss.token_losses(target_logprobs(logits, target_tokens), inputs)
    return normalise(token_losses, inputs["weights"]) if loss.normalised else token_losses.sum()


def check_logits(logits: torch.Tensor) -> None:
    """Refuse anything but floating point logits of shape (num_tokens, vocab)."""
    if logits.dim() != 2 or not logits.is_floating_point():
        raise BatchError(
            f"logits must be floating point of shape (num_tokens, vocab), seen {logits.dtype} {tuple(logits.shape)}"
        )


def check_targets(logits: torch.Tensor, target_tokens: torch.Tensor) -> None:
    """Refuse targets that are not one int64 vocabulary index per row of logits."""
    import torch

    num_tokens, vocab_size = logits.shape
    if target_tokens.dtype != torch.int64 or tuple(target_tokens.shape) != (num_tokens,):
        raise BatchError(
            f"target_tokens must be int64 of shape ({num_tokens},), seen {target_tokens.dtype} "
            f"{tuple(target_tokens.shape)}"
        )
    low, high = (int(target_tokens.min()), int(target_tokens.max())) if num_tokens else (0, 0)
    if low < 0 or high >= vocab_size:
        raise BatchError(f"target_tokens must lie in 0..{vocab_size - 1}, seen {low}..{high}")


def check_token_factors(name: str, factors: torch.Tensor, num_tokens: int) -> None:
    """Refuse per-token factors that are not finite floating point of shape (num_tokens,)."""
    if not factors.is_floating_point() or tuple(factors.shape) != (num_tokens,):
        raise BatchError(
            f"{name} must be floating point of shape ({num_tokens},), seen {factors.dtype} {tuple(factors.shape)}"
        )
    if not bool(factors.isfinite().all()):
        raise BatchError(f"{name} must be finite, seen NaN or infinity")


def target_logprobs(logits: torch.Tensor, target_tokens: torch.Tensor) -> torch.Tensor:
    """log p(target) of every row, in float32 or better."""
    precise = logits.float() if logits.element_size() < 4 else logits
    return precise.log_softmax(dim=-1).gather(1, target_tokens.unsqueeze(1)).squeeze(1)


def normalise(token_losses: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Σ token_losses / Σ weights; a Σ of 0 is an error, never NaN."""
    sum_weights = weights.sum()
    check_sum_weights(float(sum_weights.detach()))
    return token_losses.sum() / sum_weights


def check_sum_weights(sum_weights: float) -> None:
    """Refuse a normaliser that is 0 or not finite."""
    if sum_weights == 0:
        raise BatchError("all weights are zero (Σ weights = 0): at least one token must have a weight to train on")
    if not abs(sum_weights) < float("inf"):
        raise BatchError(f"Σ weights must be finite, seen {sum_weights}")
