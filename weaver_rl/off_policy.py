"""A batch on its way to the loss: importance weights, their correction, and the gap between learner and sampler.

Pure: the learner's log-probabilities are given to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from weaver_rl.advantages import LogprobGap, NoCorrection, Tis, logprob_gap
from weaver_rl.batch import BatchEntry, StepBatch, completion_part, sequence_datum
from weaver_rl.config import RunConfig
from weaver_rl.errors import LogprobGapError
from weaver_rl.losses.config import CrossEntropy, ImportanceSampling
from weaver_rl.summation import mean
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

    def gap(self) -> LogprobGap:
        """Learner against sampler over all trained tokens."""
        assert self.learner_logprobs is not None
        sampler = np.concatenate([entry.scored.rollout.completion.logprobs_L for entry in self.entries])
        return logprob_gap(np.concatenate(self.learner_logprobs), sampler)

    def importance_metrics(
        self, loss: CrossEntropy | ImportanceSampling, correction: NoCorrection | Tis
    ) -> dict[str, float]:
        """Figures about the weights that went into the loss."""
        weights_T = np.concatenate(self.importance_weights)
        clip = loss.clip_ratio if isinstance(loss, ImportanceSampling) else None
        metrics = {
            "importance_weights/mean": mean(weights_T),
            "importance_weights/abs_mean": mean(np.abs(weights_T)),
            "importance_weights/clipped_fraction": mean(np.abs(weights_T) > clip) if clip else 0.0,
        }
        if self.corrections is not None and isinstance(correction, Tis):
            corrections_T = np.concatenate(self.corrections)
            metrics["correction/mean"] = mean(corrections_T)
            # A capped factor is the cap up to the rounding of exp(log(cap)) to float32.
            metrics["correction/capped_fraction"] = mean(np.isclose(corrections_T, correction.cap, rtol=1e-6, atol=0))
        return metrics


def correct(learn_input: LearnInput, forward: ForwardOutput, correction: NoCorrection | Tis) -> LearnInput:
    """Multiplies the weights by the behaviour correction."""
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


def gap_metrics(gap: LogprobGap) -> dict[str, float]:
    return {
        "logprob_gap/mean": gap.mean,
        "logprob_gap/max": gap.max,
        "logprob_gap/kl": gap.kl,
        "logprob_gap/ess": gap.ess,
    }


def require_small_gap(gap: LogprobGap, config: RunConfig) -> None:
    """Raises LogprobGapError naming the likely cause when the gap is above the limit. Nothing was updated yet."""
    if gap.mean <= config.logprob_gap.max_mean:
        return
    raise LogprobGapError(
        f"learner and sampler disagree about the sampled tokens: mean |Δ log-probability| {gap.mean:.3g} nats (largest "
        f"{gap.max:.3g}, effective sample size {gap.ess:.2f}), logprob_gap.max_mean allows "
        f"{config.logprob_gap.max_mean:g}. {_likely_cause(config)} The step was not trained."
    )


def _likely_cause(config: RunConfig) -> str:
    sampling = config.rollout.sampling
    filters = [
        f"{name} {value:g}"
        for name, value, off in (
            ("top_p", sampling.top_p, 1.0),
            ("top_k", sampling.top_k, 0),
            ("min_p", sampling.min_p, 0.0),
        )
        if value != off
    ]
    if filters:
        return (
            f"Likely cause: rollout.sampling has {', '.join(filters)}; the sampler's probabilities are of the filtered "
            "distribution, the learner's of the whole one. Switch the filter off, or raise the limit and use "
            "correction.name tis."
        )
    precision = config.sampler.engine_args.get("dtype")
    if not config.learner.dtype == precision == "float32":
        return (
            "Likely cause: different precision on the two sides (the weights themselves were probed after the last "
            f"sync); learner.dtype is {config.learner.dtype}, sampler.engine_args.dtype {precision or 'unset'}. Use "
            "one precision, or raise the limit and use correction.name tis."
        )
    return (
        "The probe found the same weights on both sides, so the likely cause is what lies around them: keys and values "
        "cached under older weights, an engine argument that changes the computation, or model code that differs "
        "between transformers and vLLM."
    )
