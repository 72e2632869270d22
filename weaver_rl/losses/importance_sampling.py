"""Importance sampling: −Σ w·clamp(iw, −c, c)·log p(target) / Σ w. Knows not where importance weights come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from weaver_rl.errors import BatchError
from weaver_rl.losses.contract import AggregatedLoss
from weaver_rl.losses.reference import loss_over_logits

if TYPE_CHECKING:
    import torch


class ImportanceSampling(AggregatedLoss):
    """Policy gradient: each token's log-probability is pushed by its importance weight, a constant of the gradient."""

    required_inputs: ClassVar[tuple[str, ...]] = ("target_tokens", "weights", "importance_weights")

    name: Literal["importance_sampling"]
    """Which loss."""
    clip_ratio: float | None = Field(default=None, gt=0)
    """Importance weights are clamped to [−clip_ratio, +clip_ratio] (no unit); null: no clamp."""

    def token_losses(self, logprobs: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """−w·clamp(iw, −c, c)·log p."""
        importance_weights = inputs["importance_weights"].detach()
        if self.clip_ratio is not None:
            importance_weights = importance_weights.clamp(-self.clip_ratio, self.clip_ratio)
        return -(inputs["weights"] * importance_weights * logprobs)


def importance_sampling_loss(
    logits: torch.Tensor,
    target_tokens: torch.Tensor,
    weights: torch.Tensor,
    importance_weights: torch.Tensor,
    clip_ratio: float | None = None,
) -> torch.Tensor:
    """−Σ w·clamp(iw, −c, c)·log p(target) / Σ w with c = `clip_ratio`; no gradient flows through iw."""
    if clip_ratio is not None and not 0 < clip_ratio < float("inf"):
        raise BatchError(f"clip_ratio must be > 0 or None, seen {clip_ratio}")
    loss = ImportanceSampling(name="importance_sampling", clip_ratio=clip_ratio)
    inputs = {"weights": weights, "importance_weights": importance_weights}
    return loss_over_logits(loss, logits, target_tokens, inputs)
