"""What a loss is to the learner: a config section that turns log-probabilities into token losses. Knows no formula.

A new loss is one file with a subclass and its line in the table of `weaver_rl/losses/config.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from weaver_rl.section import Section

if TYPE_CHECKING:
    import torch


class TokenLoss(Section):
    """A loss of the form Σ token_loss / Σ w, where w is `weights` and Σ runs over the whole request.

    The learner calls `token_losses` once per micro-batch with the positions whose weight is not 0, divides by the
    request's Σw and differentiates; so a token's loss must be 0, with no gradient, wherever its weight is 0.
    """

    required_inputs: ClassVar[tuple[str, ...]] = ("target_tokens", "weights")
    """Names of `Datum.loss_fn_inputs` that must be present."""

    def token_losses(self, logprobs: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Unnormalised loss of each token: (num_tokens,) from log p(target) (num_tokens,), differentiable in it."""
        raise NotImplementedError
