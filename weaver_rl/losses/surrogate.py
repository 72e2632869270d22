"""The linear loss Σ s·log p(target), whose gradient is whatever its caller computed. Knows not from which loss.

A caller who has ∂L/∂log p of a loss L of his own gets L's gradient of the weights from it, by the chain rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from weaver_rl.losses.contract import TokenLoss
from weaver_rl.losses.reference import loss_over_logits

if TYPE_CHECKING:
    import torch


class Surrogate(TokenLoss):
    """Σ s·log p, minimised and never normalised; `weights` only say which tokens count: 1 or 0."""

    required_inputs: ClassVar[tuple[str, ...]] = ("target_tokens", "weights", "surrogate_weights")

    name: Literal["surrogate"]
    """Which loss."""

    @property
    def normalised(self) -> bool:
        """Never: the gradient with respect to log p is s itself."""
        return False

    def token_losses(self, logprobs: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """w·s·log p."""
        return inputs["weights"] * inputs["surrogate_weights"] * logprobs


def surrogate_loss(
    logits: torch.Tensor, target_tokens: torch.Tensor, weights: torch.Tensor, surrogate_weights: torch.Tensor
) -> torch.Tensor:
    """Σ w·s·log p(target), with s = `surrogate_weights`."""
    inputs = {"weights": weights, "surrogate_weights": surrogate_weights}
    return loss_over_logits(Surrogate(name="surrogate"), logits, target_tokens, inputs)
