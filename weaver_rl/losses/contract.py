"""What a loss is to the learner: a config section that turns log-probabilities into token losses. Knows no formula.

A new loss is one file with a subclass and its line in the table of `weaver_rl/losses/config.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from weaver_rl.section import Section

if TYPE_CHECKING:
    import torch

Aggregation = Literal["mean", "sum"]


class TokenLoss(Section):
    """A loss of the form Σ token_loss / D, where Σ runs over the whole request: all data, ranks and micro-batches.

    D is Σ `weights` over the same request, or 1 where `normalised` is False. The learner calls `token_losses` once per
    micro-batch, divides by D and differentiates. A micro-batch holds every position or only those whose weight is not
    0, so both must come to the same: a token's loss is exactly 0, with no gradient, wherever its weight is 0, even if
    its other inputs are garbage there. Mask before `exp`, never after: inf·0 is NaN, and so is its gradient.
    """

    required_inputs: ClassVar[tuple[str, ...]] = ("target_tokens", "weights")
    """Names of `Datum.loss_fn_inputs` that must be present; always `target_tokens` and `weights` among them."""

    name: str
    """Which loss."""

    @property
    def normalised(self) -> bool:
        """Whether D is Σ `weights`. If False the learner is given 1.0 as `sum_weights`, whatever normaliser its caller
        has in mind, and weights that add up to 0 are no error."""
        return True

    def token_losses(self, logprobs: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Unnormalised loss of each token: (num_tokens,) from log p(target) (num_tokens,), differentiable in it.

        `inputs` are the `required_inputs`, (num_tokens,) each.
        """
        raise NotImplementedError

    def metric_sums(self, logprobs: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Figures to report beside the loss: name → Σ weight·figure over the micro-batch, a float64 scalar each.

        The learner calls it without gradients, with what it gives to `token_losses`. It adds up each value and Σ
        `weights` over micro-batches and ranks, and reports value / Σ weights under the same name in
        `ForwardBackwardOutput.metrics`: a weighted mean, whether `normalised` or not. Where Σ weights is 0 it reports
        none of them. Which names there are depends on the section alone, never on the data (ranks add up lists of one
        length), and a micro-batch without tokens gives 0 for each.
        """
        return {}


class AggregatedLoss(TokenLoss):
    """A loss that is divided by Σ `weights` unless it is told to be a sum."""

    aggregation: Aggregation = "mean"
    """`mean`: Σ token losses / Σ weights of the request; `sum`: Σ token losses."""

    @property
    def normalised(self) -> bool:
        """False for a sum."""
        return self.aggregation == "mean"
