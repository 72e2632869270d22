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


RatioLevel = Literal["token", "sequence"]
"""What a ratio learner/sampler is of: one token, or the whole rollout (the product over its tokens)."""

MAX_RATIO = 1e6
"""No correction lets a larger factor through, so that advantage times factor stays within float32."""


def log_ratio(learner_logprobs_L: Float32Array, sampler_logprobs_L: Float32Array) -> Float64Array:
    """log(learner / sampler) of each token, in float64."""
    return np.asarray(learner_logprobs_L.astype(np.float64) - sampler_logprobs_L)


def _log_ratio_at(level: RatioLevel, learner_L: Float32Array, sampler_L: Float32Array) -> Float64Array:
    per_token_L = log_ratio(learner_L, sampler_L)
    return per_token_L if level == "token" else np.full(len(per_token_L), total(per_token_L))


class NoCorrection(Section):
    """Every token counts as it is."""

    name: Literal["none"] = "none"


class Tis(Section):
    """Truncated importance sampling (Ionides 2008): min(ratio, cap), ratio = exp(logp_learner - logp_sampler).

    Per token as in Yao et al. 2025 ("Your efficient RL framework secretly brings you off-policy RL training"), or one
    ratio per rollout as in Liu, Li et al. 2025 ("When speed kills stability"): unbiased but for the cap, and of a
    spread that grows with the length. The definitions are those of verl's docs/algo/rollout_corr_math.md.
    """

    name: Literal["tis"] = "tis"
    cap: float = Field(default=2.0, gt=0, le=MAX_RATIO)
    """Largest factor a token may get (a ratio of probabilities, no unit)."""
    level: RatioLevel = "token"
    """`token`: each token by its own ratio. `sequence`: every token of a rollout by the product of them all."""

    def __call__(self, learner_logprobs_L: Float32Array, sampler_logprobs_L: Float32Array) -> Float32Array:
        """Factors (L,) of the tokens of one rollout, in [0, cap]."""
        log_ratio_L = _log_ratio_at(self.level, learner_logprobs_L, sampler_logprobs_L)
        log_cap = np.log(self.cap)
        # The cap itself, not exp of its logarithm: `metrics` finds the capped tokens by it.
        factors_L = np.where(log_ratio_L >= log_cap, self.cap, np.exp(np.minimum(log_ratio_L, log_cap)))
        return factors_L.astype(np.float32)

    def metrics(self, factors_T: Float32Array) -> dict[str, float]:
        """How often the cap was reached, over the factors of a batch."""
        return {"correction/capped_fraction": mean(factors_T == np.float32(self.cap))}


class Mis(Section):
    """Masked importance sampling: the ratio where it lies within [min_ratio, max_ratio], else 0.

    Per token with both bounds it is IcePop (Ling team 2025), per rollout with the upper bound alone Seq-MIS (Liu, Li et
    al. 2025, "When speed kills stability"). The geometric mean over a rollout, a third level in verl's
    docs/algo/rollout_corr_math.md, is not offered: there it only rejects rollouts and is no importance weight.
    """

    name: Literal["mis"] = "mis"
    min_ratio: float | None = Field(default=None, gt=0, le=1)
    """Smallest ratio that is kept (no unit); null: no lower bound."""
    max_ratio: float = Field(default=2.0, ge=1, le=MAX_RATIO)
    """Largest ratio that is kept (no unit)."""
    level: RatioLevel = "token"
    """`token`: each token by its own ratio. `sequence`: a rollout as a whole, by the product of them all."""

    def __call__(self, learner_logprobs_L: Float32Array, sampler_logprobs_L: Float32Array) -> Float32Array:
        """Factors (L,) of the tokens of one rollout, 0 or in [min_ratio, max_ratio]."""
        log_ratio_L = _log_ratio_at(self.level, learner_logprobs_L, sampler_logprobs_L)
        log_min = -np.inf if self.min_ratio is None else np.log(self.min_ratio)
        log_max = np.log(self.max_ratio)
        kept_L = (log_min <= log_ratio_L) & (log_ratio_L <= log_max)
        # A product, not np.where: a log-probability that is NaN must stay NaN and be refused, not be masked in silence.
        factors_L = np.exp(np.minimum(log_ratio_L, log_max)) * kept_L
        return np.asarray(factors_L, dtype=np.float32)

    def metrics(self, factors_T: Float32Array) -> dict[str, float]:
        """How much was masked, over the factors of a batch."""
        return {"correction/masked_fraction": mean(factors_T == 0)}


Correction = NoCorrection | Tis | Mis
CorrectionConfig = Annotated[Correction, Field(discriminator="name")]


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
    """How far the learner's log-probabilities are from the sampler's, over some tokens of a batch (in nats)."""

    mean: float
    """Mean |logp_learner - logp_sampler|."""
    max: float
    kl: float
    """KL(sampler || learner), the non-negative estimator mean(r - 1 - log r) (Schulman 2020, "k3")."""
    ess: float
    """Effective sample size of the ratios r as a share of the tokens, in (0, 1]."""


def logprob_gap(learner_logprobs_T: Float32Array, sampler_logprobs_T: Float32Array) -> LogprobGap:
    """Compares the two over at least one token, each an array (T,)."""
    delta = log_ratio(learner_logprobs_T, sampler_logprobs_T)
    return LogprobGap(
        mean=mean(np.abs(delta)),
        max=float(np.abs(delta).max()),
        kl=mean(np.expm1(delta) - delta),
        ess=effective_sample_share(delta),
    )


def effective_sample_share(log_ratios: Float64Array) -> float:
    """(Σr)² / (n Σr²) of the ratios r (Kong 1992), in [1/n, 1]: 1 where all are equal, 1/n where one outweighs all."""
    # Relative to the largest, so that the squares do not overflow; the share does not depend on the scale.
    ratios = np.exp(log_ratios - log_ratios.max())
    return min(total(ratios) ** 2 / (len(ratios) * total(ratios**2)), 1.0)


class LogprobGapLimit(Section):
    """When sampler and learner disagree too much to go on."""

    max_mean: float = Field(default=0.05, gt=0)
    """Largest mean |Δ| in nats over the tokens of lag 0; a step above it stops the run. Float32 on both sides stays
    below 1e-4."""
