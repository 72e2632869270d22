"""Cross-entropy: −Σ w·log p(target) / Σ w. Knows nothing of models, micro-batches or ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from weaver_rl.losses.contract import AggregatedLoss
from weaver_rl.losses.reference import loss_over_logits

if TYPE_CHECKING:
    import torch


class CrossEntropy(AggregatedLoss):
    """Supervised learning: make the targets more likely."""

    name: Literal["cross_entropy"]
    """Which loss."""

    def token_losses(self, logprobs: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """−w·log p."""
        return -(inputs["weights"] * logprobs)


def cross_entropy_loss(logits: torch.Tensor, target_tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """−Σ w·log p(target) / Σ w, for logits (num_tokens, vocab), targets (num_tokens,) and weights (num_tokens,)."""
    return loss_over_logits(CrossEntropy(name="cross_entropy"), logits, target_tokens, {"weights": weights})
