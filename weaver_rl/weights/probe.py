"""The check that a sampler really uses the weights it was given. Pure; it neither samples nor computes.

A probe is a fixed sequence; the learner's log-probabilities of it are compared with the sampler's after each load. What
the probe cannot see in one sync (a change smaller than its tolerance) it sees later: a sampler left behind drifts out.
One that ignores its loads altogether is seen at once: the learner's answer moves and its own does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from weaver_rl.types import Datum, Float32Array


def probe_token_ids(vocab_size: int, num_tokens: int, seed: int = 0) -> tuple[int, ...]:
    """A fixed pseudo-random sequence that touches many rows of the embedding."""
    generator = np.random.default_rng([seed, vocab_size, num_tokens])
    return tuple(int(token) for token in generator.integers(0, vocab_size, size=num_tokens))


def probe_datum(token_ids: tuple[int, ...]) -> Datum:
    """The probe as the learner reads it: `forward` gives the (N-1,) log-probabilities that a sampler should give."""
    tokens = np.array(token_ids, dtype=np.int64)
    return Datum(
        datum_id="probe",
        token_ids_N=tokens[:-1],
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": np.ones(len(tokens) - 1, dtype=np.float32)},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """One sampler against the learner at one version."""

    sampler: str
    version: int
    max_abs: float
    """Largest |Δ| in nats; infinite when a value was not finite."""
    tolerance: float
    stale: bool = False
    """The learner's answer changed since the version before and the sampler's did not, by not a single bit."""

    @property
    def passed(self) -> bool:
        return self.max_abs <= self.tolerance and not self.stale


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeAnswers:
    """What both sides said to one probe, arrays (N-1,)."""

    learner: Float32Array
    by_sampler: Mapping[str, Float32Array]


def is_stale(sampler: str, before: ProbeAnswers | None, now: ProbeAnswers) -> bool:
    """Whether a sampler stood still while the learner moved: seen even where a step is smaller than the tolerance."""
    if before is None or sampler not in before.by_sampler:
        return False
    moved = not np.array_equal(before.learner, now.learner)
    return moved and np.array_equal(before.by_sampler[sampler], now.by_sampler[sampler])


def compare(
    sampler: str,
    version: int,
    sampler_logprobs: Float32Array,
    learner_logprobs: Float32Array,
    tolerance: float,
    stale: bool = False,
) -> ProbeResult:
    """Compares the two answers to one probe, arrays (N-1,) each."""
    if sampler_logprobs.shape != learner_logprobs.shape:
        raise ValueError(f"{sampler}: probe shapes {sampler_logprobs.shape} and {learner_logprobs.shape} differ")
    with np.errstate(invalid="ignore"):
        worst = float(np.abs(sampler_logprobs.astype(np.float64) - learner_logprobs).max())
    max_abs = worst if np.isfinite(worst) else float("inf")
    return ProbeResult(sampler=sampler, version=version, max_abs=max_abs, tolerance=tolerance, stale=stale)
