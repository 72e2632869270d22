"""PPO's clipped objective: −Σ w·min(r·A, clip(r, lo, hi)·A) / Σ w. Knows not where advantages come from.

Schulman et al., "Proximal Policy Optimization Algorithms", arXiv 1707.06347, equation 7, with 1−ε and 1+ε as two keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from weaver_rl.losses.ratio import ClippedRatioLoss, log_bound, log_ratios
from weaver_rl.losses.reference import loss_over_logits

if TYPE_CHECKING:
    import torch


class PpoClip(ClippedRatioLoss):
    """Policy gradient of r·A that stops where r has gone far enough in the direction that A asks for."""

    name: Literal["ppo_clip"]
    """Which loss."""

    def token_losses(self, logprobs: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """−w·min(r·A, clip(r, lo, hi)·A), which is −w·min(r, hi)·A for A > 0 and −w·max(r, lo)·A for A < 0."""
        unbounded, advantages = log_ratios(logprobs, inputs), inputs["advantages"]
        above = unbounded.clamp(max=log_bound(self.clip_high_threshold))
        below = unbounded.clamp(min=log_bound(self.clip_low_threshold))
        return -(inputs["weights"] * advantages * above.where(advantages > 0, below).exp())

    def clipped(self, ratios: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
        """r above hi where A > 0, below lo where A < 0: these have no gradient."""
        too_high = (advantages > 0) & (ratios > self.clip_high_threshold)
        return too_high | ((advantages < 0) & (ratios < self.clip_low_threshold))


def ppo_clip_loss(
    logits: torch.Tensor,
    target_tokens: torch.Tensor,
    weights: torch.Tensor,
    logprobs: torch.Tensor,
    advantages: torch.Tensor,
    clip_low_threshold: float = 0.8,
    clip_high_threshold: float = 1.2,
) -> torch.Tensor:
    """−Σ w·min(r·A, clip(r, lo, hi)·A) / Σ w, with r = exp(log p(target) − `logprobs`) and A = `advantages`."""
    loss = PpoClip(name="ppo_clip", clip_low_threshold=clip_low_threshold, clip_high_threshold=clip_high_threshold)
    inputs = {"weights": weights, "logprobs": logprobs, "advantages": advantages}
    return loss_over_logits(loss, logits, target_tokens, inputs)
