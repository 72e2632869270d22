"""Cross-entropy: −Σ w·log p(target) / Σ w. Knows nothing of models, micro-batches or ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from weaver_rl.losses.contract import TokenLoss
from weaver_rl.losses.reference import check_logits, check_targets, check_token_factors, normalise, target_logprobs

if TYPE_CHECKING:
    import torch


class CrossEntropy(TokenLoss):
    """Supervised learning: make the targets more likely."""

    name: Literal["cross_entropy"]
    """Which loss."""

    def token_losses(self, logprobs: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """−w·log p."""
        return -(inputs["weights"] * logprobs)


def cross_entropy_loss(logits: torch.Tensor, target_tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """−Σ w·log p(target) / Σ w, for logits (num_tokens, vocab), targets (num_tokens,) and weights (num_tokens,)."""
    check_logits(logits)
    check_targets(logits, target_tokens)
    check_token_factors("weights", weights, len(logits))
    inputs = {"weights": weights}
    return normalise(
        CrossEntropy(name="cross_entropy").token_losses(target_logprobs(logits, target_tokens), inputs), weights
    )
