"""A batch on its way to the loss: importance weights, their correction, and the gap between learner and sampler.

Pure: the learner's log-probabilities are given to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from weaver_rl.advantages import (
    Correction,
    LogprobGap,
    LogprobGapLimit,
    NoCorrection,
    effective_sample_share,
    log_ratio,
    logprob_gap,
)
from weaver_rl.batch import BatchEntry, StepBatch, completion_part, sequence_datum
from weaver_rl.errors import LogprobGapError
from weaver_rl.losses.config import CrossEntropy, ImportanceSampling
from weaver_rl.rollout import SamplingConfig
from weaver_rl.summation import mean, total
from weaver_rl.types import Datum, Float32Array, ForwardOutput


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnInput:
    """The rollouts of a step that are trained on, with what the loss multiplies each token by."""

    entries: tuple[BatchEntry, ...]
    importance_weights: tuple[Float32Array, ...]
    """One array (L,) per entry."""
    sum_weights: float
    """Tokens of every rollout of the batch, those left out included: what the loss is normalised by."""
    corrections: tuple[Float32Array, ...] | None = None
    """Factor of each token that the behaviour correction put in."""
    learner_logprobs: tuple[Float32Array, ...] | None = None
    """(L,) per entry, before the update."""

    @staticmethod
    def of(batch: StepBatch) -> LearnInput:
        """Every token of a rollout weighs its advantage.

        Rollouts of advantage 0 add nothing to loss or gradient, so they are left out and only counted in the
        normaliser; without any other they stay, since the step needs a gradient and the gap needs tokens.
        """
        trained = tuple(batch.trained())
        entries = tuple(entry for entry in trained if entry.advantage != 0) or trained
        return LearnInput(
            entries=entries,
            importance_weights=tuple(_advantage_L(entry) for entry in entries),
            sum_weights=float(sum(len(entry.scored.rollout.completion.token_ids_L) for entry in trained)),
        )

    def data(self) -> list[Datum]:
        """The data of the step, in order."""
        return [
            sequence_datum(
                entry.datum_id,
                entry.scored.rollout.prompt.token_ids_P,
                tuple(entry.scored.rollout.completion.token_ids_L.tolist()),
                weights_L,
            )
            for entry, weights_L in zip(self.entries, self.importance_weights, strict=True)
        ]

    def with_learner_logprobs(self, per_datum: Sequence[Float32Array]) -> LearnInput:
        """Takes the learner's answer, arrays (N,), keeping the part of the completion."""
        parts = tuple(
            completion_part(values, len(entry.scored.rollout.prompt.token_ids_P))
            for entry, values in zip(self.entries, per_datum, strict=True)
        )
        return replace(self, learner_logprobs=parts)

    def gap(self, version: int) -> LogprobGap | None:
        """Learner at `version` against sampler, over the trained tokens that were sampled with that same version.

        Older tokens differ by right: they are left to `ratio_metrics`. None when there are no others.
        """
        assert self.learner_logprobs is not None
        completions = [entry.scored.rollout.completion for entry in self.entries]
        current_T = np.concatenate([completion.versions_L for completion in completions]) == version
        if not current_T.any():
            return None
        sampler_T = np.concatenate([completion.logprobs_L for completion in completions])
        return logprob_gap(np.concatenate(self.learner_logprobs)[current_T], sampler_T[current_T])

    def ratio_metrics(self) -> dict[str, float]:
        """How far off the policy the trained tokens are, of whatever version: figures of the ratios learner/sampler."""
        assert self.learner_logprobs is not None
        log_ratios = [
            log_ratio(learner_L, entry.scored.rollout.completion.logprobs_L)
            for entry, learner_L in zip(self.entries, self.learner_logprobs, strict=True)
        ]
        return {
            "ratio/ess": effective_sample_share(np.concatenate(log_ratios)),
            "ratio/ess_sequence": effective_sample_share(np.array([total(values_L) for values_L in log_ratios])),
        }

    def importance_metrics(self, loss: CrossEntropy | ImportanceSampling, correction: Correction) -> dict[str, float]:
        """Figures about the weights that went into the loss."""
        weights_T = np.concatenate(self.importance_weights)
        clip = loss.clip_ratio if isinstance(loss, ImportanceSampling) else None
        metrics = {
            "importance_weights/mean": mean(weights_T),
            "importance_weights/abs_mean": mean(np.abs(weights_T)),
            "importance_weights/clipped_fraction": mean(np.abs(weights_T) > clip) if clip else 0.0,
        }
        if self.corrections is not None and not isinstance(correction, NoCorrection):
            corrections_T = np.concatenate(self.corrections)
            metrics |= {"correction/mean": mean(corrections_T)} | correction.metrics(corrections_T)
        return metrics


def correct(learn_input: LearnInput, forward: ForwardOutput, correction: Correction) -> LearnInput:
    """Multiplies the weights by the behaviour correction, one rollout at a time.

    A masked token gets importance weight 0 and still counts in `sum_weights`, like one whose advantage is 0: masking
    makes the step smaller, it does not make the other tokens weigh more. With all masked, loss and gradient are 0.
    """
    if isinstance(correction, NoCorrection):
        return learn_input
    measured = learn_input.with_learner_logprobs(forward.logprobs_per_datum)
    assert measured.learner_logprobs is not None
    factors = tuple(
        correction(learner_L, entry.scored.rollout.completion.logprobs_L)
        for entry, learner_L in zip(measured.entries, measured.learner_logprobs, strict=True)
    )
    weights = tuple(w * f for w, f in zip(measured.importance_weights, factors, strict=True))
    return replace(measured, importance_weights=weights, corrections=factors)


def _advantage_L(entry: BatchEntry) -> Float32Array:
    assert entry.advantage is not None
    return np.full(len(entry.scored.rollout.completion.token_ids_L), entry.advantage, dtype=np.float32)


def gap_metrics(gap: LogprobGap | None) -> dict[str, float]:
    """Nothing where there was nothing to compare."""
    if gap is None:
        return {}
    return {
        "logprob_gap/mean": gap.mean,
        "logprob_gap/max": gap.max,
        "logprob_gap/kl": gap.kl,
        "logprob_gap/ess": gap.ess,
    }


def require_small_gap(gap: LogprobGap | None, limit: LogprobGapLimit, likely_cause: str) -> None:
    """Raises LogprobGapError with the likely cause when the gap is above the limit. Nothing was updated yet.

    None passes: a batch of older tokens alone says nothing about whether the two sides agree.
    """
    if gap is None or gap.mean <= limit.max_mean:
        return
    raise LogprobGapError(
        "learner and sampler disagree about the tokens that were sampled with the learner's weights: mean "
        f"|Δ log-probability| {gap.mean:.3g} nats (largest {gap.max:.3g}, effective sample size {gap.ess:.2f}), "
        f"logprob_gap.max_mean allows {limit.max_mean:g}. {likely_cause} The step was not trained."
    )


def likely_gap_cause(sampling: SamplingConfig, *, learner_dtype: str, sampler_dtype: str | None) -> str:
    """Why learner and sampler would disagree under these settings, and what to do; `sampler_dtype` None: unset."""
    if filters := sampling.filters():
        return (
            f"Likely cause: rollout.sampling has {', '.join(filters)}; the sampler's probabilities are of the filtered "
            "distribution, the learner's of the whole one. Switch the filter off, or raise the limit and use "
            "correction.name tis or mis."
        )
    if not learner_dtype == sampler_dtype == "float32":
        return (
            "Likely cause: different precision on the two sides (the weights themselves were probed after the last "
            f"sync); learner.dtype is {learner_dtype}, sampler.engine_args.dtype {sampler_dtype or 'unset'}. Use "
            "one precision, or raise the limit and use correction.name tis or mis."
        )
    return (
        "The probe found the same weights on both sides, so the likely cause is what lies around them: keys and values "
        "cached under older weights, an engine argument that changes the computation, or model code that differs "
        "between transformers and vLLM."
    )
