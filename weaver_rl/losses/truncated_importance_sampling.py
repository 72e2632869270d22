"""Truncated importance sampling: −Σ w·min(r, cap)·A·log p(target) / Σ w with r constant. Knows no advantage's origin.

Ionides, "Truncated Importance Sampling", Journal of Computational and Graphical Statistics 17(2), 2008: a weight that
is cut from above has bounded variance. Here the cut weight multiplies the policy gradient A·∇log p.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from weaver_rl.losses.ratio import RatioLoss, log_bound, log_ratios
from weaver_rl.losses.reference import loss_over_logits

if TYPE_CHECKING:
    import torch


class TruncatedImportanceSampling(RatioLoss):
    """Policy gradient whose ratio is a constant of the gradient and never above a cap."""

    name: Literal["truncated_importance_sampling"]
    """Which loss."""
    tis_cap: float = Field(default=2.0, gt=0)
    """Upper bound of r (no unit); a token above it keeps its gradient, with the cap as its ratio."""

    def token_losses(self, logprobs: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """−w·min(r, cap)·A·log p."""
        ratios = log_ratios(logprobs.detach(), inputs).clamp(max=log_bound(self.tis_cap)).exp()
        return -(inputs["weights"] * inputs["advantages"] * ratios * logprobs)

    def clipped(self, ratios: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
        """r > cap."""
        return ratios > self.tis_cap


def truncated_importance_sampling_loss(
    logits: torch.Tensor,
    target_tokens: torch.Tensor,
    weights: torch.Tensor,
    logprobs: torch.Tensor,
    advantages: torch.Tensor,
    tis_cap: float = 2.0,
) -> torch.Tensor:
    """−Σ w·min(r, cap)·A·log p(target) / Σ w, with r = exp(log p(target) − `logprobs`) constant, A = `advantages`."""
    loss = TruncatedImportanceSampling(name="truncated_importance_sampling", tis_cap=tis_cap)
    inputs = {"weights": weights, "logprobs": logprobs, "advantages": advantages}
    return loss_over_logits(loss, logits, target_tokens, inputs)
