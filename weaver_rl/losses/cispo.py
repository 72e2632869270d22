"""CISPO: −Σ w·clip(r, lo, hi)·A·log p(target) / Σ w with r constant. Knows not where advantages come from.

MiniMax, "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention", arXiv 2506.13585:
the ratio is clipped, not the update, so every token keeps its gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from weaver_rl.losses.ratio import ClippedRatioLoss, log_bound, log_ratios
from weaver_rl.losses.reference import loss_over_logits

if TYPE_CHECKING:
    import torch


class Cispo(ClippedRatioLoss):
    """Policy gradient whose ratio is a constant of the gradient, kept between two bounds."""

    name: Literal["cispo"]
    """Which loss."""

    def token_losses(self, logprobs: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """−w·clip(r, lo, hi)·A·log p."""
        low, high = log_bound(self.clip_low_threshold), log_bound(self.clip_high_threshold)
        ratios = log_ratios(logprobs.detach(), inputs).clamp(min=low, max=high).exp()
        return -(inputs["weights"] * inputs["advantages"] * ratios * logprobs)

    def clipped(self, ratios: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
        """r outside of [lo, hi]."""
        return (ratios < self.clip_low_threshold) | (ratios > self.clip_high_threshold)


def cispo_loss(
    logits: torch.Tensor,
    target_tokens: torch.Tensor,
    weights: torch.Tensor,
    logprobs: torch.Tensor,
    advantages: torch.Tensor,
    clip_low_threshold: float = 0.8,
    clip_high_threshold: float = 1.2,
) -> torch.Tensor:
    """−Σ w·clip(r, lo, hi)·A·log p(target) / Σ w, r = exp(log p(target) − `logprobs`) constant, A = `advantages`."""
    loss = Cispo(name="cispo", clip_low_threshold=clip_low_threshold, clip_high_threshold=clip_high_threshold)
    inputs = {"weights": weights, "logprobs": logprobs, "advantages": advantages}
    return loss_over_logits(loss, logits, target_tokens, inputs)
