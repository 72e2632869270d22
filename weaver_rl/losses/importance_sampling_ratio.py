"""Importance sampling in the ratio form: −Σ w·min(r, c)·A / Σ w. Knows not where advantages come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from weaver_rl.losses.ratio import RatioLoss, log_bound, log_ratios
from weaver_rl.losses.reference import loss_over_logits

if TYPE_CHECKING:
    import torch


class ImportanceSamplingRatio(RatioLoss):
    """Policy gradient of r·A, r = exp(log p − log q): the gradient flows through r, as r·A·∇log p."""

    name: Literal["importance_sampling_ratio"]
    """Which loss."""
    clip_ratio: float | None = Field(default=None, gt=0)
    """Upper bound c of r (no unit): a token above it adds a constant, without gradient; null: no bound."""

    def token_losses(self, logprobs: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """−w·min(r, c)·A."""
        bounded = log_ratios(logprobs, inputs)
        if self.clip_ratio is not None:
            bounded = bounded.clamp(max=log_bound(self.clip_ratio))
        return -(inputs["weights"] * inputs["advantages"] * bounded.exp())

    def clipped(self, ratios: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor | None:
        """r > c."""
        return None if self.clip_ratio is None else ratios > self.clip_ratio


def importance_sampling_ratio_loss(
    logits: torch.Tensor,
    target_tokens: torch.Tensor,
    weights: torch.Tensor,
    logprobs: torch.Tensor,
    advantages: torch.Tensor,
    clip_ratio: float | None = None,
) -> torch.Tensor:
    """−Σ w·min(r, c)·A / Σ w, with r = exp(log p(target) − `logprobs`), A = `advantages` and c = `clip_ratio`."""
    loss = ImportanceSamplingRatio(name="importance_sampling_ratio", clip_ratio=clip_ratio)
    inputs = {"weights": weights, "logprobs": logprobs, "advantages": advantages}
    return loss_over_logits(loss, logits, target_tokens, inputs)
