"""Rewards to advantages to importance weights: pure functions, numpy in, numpy out. It knows no models and no data.

The importance weight of a token is its rollout's advantage times a behaviour correction, a constant of the gradient.
An estimator is one class here and one line in `AdvantageConfig`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from weaver_rl.section import Section
from weaver_rl.summation import mean, std, total
from weaver_rl.types import Float32Array

Float64Array = npt.NDArray[np.float64]


class Grpo(Section):
    """(r - mean) / (std + eps) within the group, std with G - 1 in the denominator (Shao et al. 2024, DeepSeekMath)."""

    name: Literal["grpo"] = "grpo"
    eps: float = Field(default=1e-6, gt=0)
    """Added to the standard deviation."""

    def __call__(self, rewards_G: Float64Array, baseline: float = 0.0) -> Float64Array:
        deviations_G = _deviations(rewards_G)
        return np.asarray(deviations_G / (std(deviations_G, ddof=1) + self.eps))


class MeanCentered(Section):
    """r - mean within the group, no division by the spread (Liu et al. 2025, Dr. GRPO)."""

    name: Literal["mean_centered"] = "mean_centered"

    def __call__(self, rewards_G: Float64Array, baseline: float = 0.0) -> Float64Array:
        return _deviations(rewards_G)


class Rloo(Section):
    """r minus the mean of the others in the group (Ahmadian et al. 2024, RLOO)."""

    name: Literal["rloo"] = "rloo"

    def __call__(self, rewards_G: Float64Array, baseline: float = 0.0) -> Float64Array:
        return np.asarray(_deviations(rewards_G) * len(rewards_G) / (len(rewards_G) - 1))


class Reinforce(Section):
    """The raw reward, minus a running mean of the rewards of earlier steps if asked (Williams 1992)."""

    name: Literal["reinforce"] = "reinforce"
    baseline_decay: float | None = Field(default=None, gt=0, lt=1)
    """Share of the old baseline kept at each step; null: no baseline."""

    def __call__(self, rewards_G: Float64Array, baseline: float = 0.0) -> Float64Array:
        return rewards_G - baseline

    def next_baseline(self, baseline: float | None, mean_reward: float) -> float | None:
        """The baseline of the next step; the first step's mean starts it, so that it is not biased towards 0."""
        if self.baseline_decay is None:
            return None
        if baseline is None:
            return mean_reward
        return self.baseline_decay * baseline + (1 - self.baseline_decay) * mean_reward


AdvantageConfig = Annotated[Grpo | MeanCentered | Rloo | Reinforce, Field(discriminator="name")]


def _deviations(rewards_G: Float64Array) -> Float64Array:
    # From the first reward, not from 0: the mean of equal floats need not be one of them, and a group without signal
    # must come out as exactly 0.
    from_first_G = rewards_G - rewards_G[0]
    return np.asarray(from_first_G - mean(from_first_G))


class NoCorrection(Section):
    """Every token counts as it is."""

    name: Literal["none"] = "none"


class Tis(Section):
    """Truncated importance sampling (Ionides 2008): min(exp(logp_learner - logp_sampler), cap) per token."""

    name: Literal["tis"] = "tis"
    cap: float = Field(default=2.0, gt=0)
    """Largest factor a token may get (a ratio of probabilities, no unit)."""

    def __call__(self, learner_logprobs_L: Float32Array, sampler_logprobs_L: Float32Array) -> Float32Array:
        delta = learner_logprobs_L.astype(np.float64) - sampler_logprobs_L
        return np.exp(np.minimum(delta, np.log(self.cap))).astype(np.float32)


CorrectionConfig = Annotated[NoCorrection | Tis, Field(discriminator="name")]


def num_needed(estimator: Grpo | MeanCentered | Rloo | Reinforce) -> int:
    """Scored rollouts that a group needs at least."""
    return 1 if isinstance(estimator, Reinforce) else 2


def group_advantages(
    rewards_G: list[float | None],
    estimator: Grpo | MeanCentered | Rloo | Reinforce,
    baseline: float = 0.0,
) -> list[float | None] | None:
    """Advantages of one group, None where the reward is missing (it takes no part in the group's baseline).

    Returns None for the whole group when fewer than two rewards are there: nothing to compare, so it is dropped.
    `reinforce` compares with no sibling, one reward is enough for it.
    """
    scored = np.array([r for r in rewards_G if r is not None], dtype=np.float64)
    if len(scored) < num_needed(estimator):
        return None
    values = iter(estimator(scored, baseline))
    return [None if r is None else float(next(values)) for r in rewards_G]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobGap:
    """How far the learner's log-probabilities are from the sampler's, over the tokens of one batch (in nats)."""

    mean: float
    """Mean |logp_learner - logp_sampler|."""
    max: float
    kl: float
    """KL(sampler || learner), the non-negative estimator mean(r - 1 - log r) (Schulman 2020, "k3")."""
    ess: float
    """Effective sample size of the ratios r as a share of the tokens, in (0, 1]."""


def logprob_gap(learner_logprobs_T: Float32Array, sampler_logprobs_T: Float32Array) -> LogprobGap:
    """Compares the two over all completion tokens of a batch, each an array (T,)."""
    delta = learner_logprobs_T.astype(np.float64) - sampler_logprobs_T
    # Relative to the largest, so that the squares do not overflow; the share does not depend on the scale.
    ratio = np.exp(delta - delta.max())
    return LogprobGap(
        mean=mean(np.abs(delta)),
        max=float(np.abs(delta).max()),
        kl=mean(np.expm1(delta) - delta),
        ess=min(1.0, total(ratio) ** 2 / (len(ratio) * total(ratio**2))),
    )


class LogprobGapLimit(Section):
    """When sampler and learner disagree too much to go on."""

    max_mean: float = Field(default=0.05, gt=0)
    """Largest mean |Δ| in nats; a step above it stops the run. Float32 on both sides stays below 1e-4."""
