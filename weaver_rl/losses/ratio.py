"""What the losses of a probability ratio share: r = p(target) / q(target), learner over sampler. Knows no objective."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from weaver_rl.losses.contract import AggregatedLoss

if TYPE_CHECKING:
    import torch

MAX_METRIC_LOG_RATIO = 80.0
"""Ratios are reported as e^80 at most: one token that the sampler all but excluded must not make a metric infinite."""


class RatioLoss(AggregatedLoss):
    """A loss of r = exp(log p − log q) and of each token's advantage A; `logprobs` among the inputs are log q."""

    required_inputs: ClassVar[tuple[str, ...]] = ("target_tokens", "weights", "logprobs", "advantages")

    def metric_sums(self, logprobs: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`ratio_mean` of r, `approx_kl` of log q − log p and, where r is bounded, `ratio_clipped_fraction`."""
        weights = inputs["weights"].double()
        log_ratios = (logprobs - inputs["logprobs"]).double()
        ratios = log_ratios.clamp(max=MAX_METRIC_LOG_RATIO).exp()
        sums = {"ratio_mean": (weights * ratios).sum(), "approx_kl": -(weights * log_ratios).sum()}
        clipped = self.clipped(ratios, inputs["advantages"])
        if clipped is not None:
            sums["ratio_clipped_fraction"] = (weights * clipped).sum()
        return sums

    def clipped(self, ratios: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor | None:
        """Whether the bound on r makes a difference to each token, bool (num_tokens,); None: r has no bound."""
        raise NotImplementedError


class ClippedRatioLoss(RatioLoss):
    """A ratio loss with two bounds."""

    clip_low_threshold: float = Field(default=0.8, ge=0)
    """Lower bound of r (no unit)."""
    clip_high_threshold: float = Field(default=1.2, gt=0)
    """Upper bound of r (no unit)."""

    @model_validator(mode="after")
    def _check_order(self) -> ClippedRatioLoss:
        if self.clip_low_threshold > self.clip_high_threshold:
            raise ValueError(
                f"clip_low_threshold is {self.clip_low_threshold}, clip_high_threshold {self.clip_high_threshold}: "
                "the low one must not be above the high one"
            )
        return self


def log_ratios(logprobs: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """log p − log q (num_tokens,), differentiable; 0 without gradient for tokens whose weight or advantage is 0.

    Bound it before `exp`: that is the bound on r, and what overflowed would have a gradient of NaN even unused.
    """
    unused = (inputs["weights"] == 0) | (inputs["advantages"] == 0)
    return (logprobs - inputs["logprobs"]).masked_fill(unused, 0.0)


def log_bound(ratio: float) -> float:
    """The bound on log r that a bound on r >= 0 is."""
    return math.log(ratio) if ratio > 0 else -math.inf
