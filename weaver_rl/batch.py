"""From scored groups to the data of one step: shifting, weights, importance weights. It knows no processes.

A rollout whose reward is missing, or whose group was dropped, gives no datum; why is kept for the record.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from weaver_rl.advantages import Grpo, MeanCentered, Reinforce, Rloo, group_advantages, num_needed
from weaver_rl.errors import WeightSyncError
from weaver_rl.types import Datum, Float32Array, ScoredRollout, newest_version, oldest_version


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGroup:
    """The rollouts of one prompt with their rewards, and the sampler they came from."""

    group_id: str
    sampler: str
    scored_G: tuple[ScoredRollout, ...]
    position: int = -1
    """Place of the prompt in the training stream; -1 for an evaluation."""

    @property
    def oldest_version(self) -> int:
        """Version of the oldest token."""
        return oldest_version(scored.rollout.completion for scored in self.scored_G)

    @property
    def newest_version(self) -> int:
        """Version of the newest token."""
        return newest_version(scored.rollout.completion for scored in self.scored_G)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchEntry:
    """What became of one rollout in its step. Exactly one of `advantage` and `dropped` is None."""

    scored: ScoredRollout
    sampler: str
    advantage: float | None
    dropped: str | None

    @property
    def datum_id(self) -> str:
        return self.scored.rollout.rollout_id


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """All rollouts of a step, in a fixed order, with their advantages."""

    entries: tuple[BatchEntry, ...]
    num_groups: int
    num_groups_dropped: int
    num_groups_without_signal: int
    """Groups whose advantages are all 0: every rollout earned the same."""

    def trained(self) -> Iterator[BatchEntry]:
        """The entries that become data, in order."""
        return (entry for entry in self.entries if entry.dropped is None)

    def rewards(self) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """All rewards that are there."""
        return np.array([e.scored.reward for e in self.entries if e.scored.reward is not None], dtype=np.float64)


def require_fresh(groups: Sequence[ScoredGroup], version: int, max_lag: int) -> None:
    """Raises WeightSyncError naming the sampler if a token is of a version that must not be trained at `version`."""
    for group in groups:
        for scored in group.scored_G:
            versions_L = scored.rollout.completion.versions_L
            if len(versions_L) and not (version - max_lag <= versions_L.min() and versions_L.max() <= version):
                raise WeightSyncError(
                    f"{group.sampler} sampled rollout {scored.rollout.rollout_id} with weights "
                    f"v{versions_L.min()} to v{versions_L.max()}; at v{version} with max_lag {max_lag} allowed are "
                    f"v{version - max_lag} to v{version}. It was not trained on."
                )


def build_batch(
    groups: Sequence[ScoredGroup], estimator: Grpo | MeanCentered | Rloo | Reinforce, baseline: float
) -> StepBatch:
    """Turns the rewards of each group into advantages."""
    entries: list[BatchEntry] = []
    num_dropped = num_without_signal = 0
    for group in groups:
        rewards_G = [scored.reward for scored in group.scored_G]
        advantages_G = group_advantages(rewards_G, estimator, baseline)
        if advantages_G is None:
            num_dropped += 1
            num_scored = sum(reward is not None for reward in rewards_G)
            reason = f"group dropped: {num_scored} of {len(rewards_G)} rollouts scored, {num_needed(estimator)} needed"
            advantages_G = [None] * len(rewards_G)
        else:
            reason = "reward missing"
            num_without_signal += not any(advantages_G)
        for scored, advantage in zip(group.scored_G, advantages_G, strict=True):
            dropped = reason if advantage is None else None
            entries.append(BatchEntry(scored=scored, sampler=group.sampler, advantage=advantage, dropped=dropped))
    return StepBatch(
        entries=tuple(entries),
        num_groups=len(groups),
        num_groups_dropped=num_dropped,
        num_groups_without_signal=num_without_signal,
    )


def sequence_datum(
    datum_id: str,
    prompt_token_ids: tuple[int, ...],
    completion_token_ids: tuple[int, ...],
    importance_weights_L: np.ndarray[tuple[int], np.dtype[np.float32]] | None = None,
) -> Datum:
    """One prompt and its completion as a datum: shifted by one, weight 1 on the completion's tokens, 0 elsewhere."""
    tokens = np.array(prompt_token_ids + completion_token_ids, dtype=np.int64)
    first = len(prompt_token_ids) - 1
    weights = np.zeros(len(tokens) - 1, dtype=np.float32)
    weights[first:] = 1.0
    inputs: dict[str, np.ndarray[tuple[int], np.dtype[np.generic]]] = {"target_tokens": tokens[1:], "weights": weights}
    if importance_weights_L is not None:
        importance_weights = np.zeros(len(tokens) - 1, dtype=np.float32)
        importance_weights[first:] = importance_weights_L
        inputs["importance_weights"] = importance_weights
    return Datum(datum_id=datum_id, token_ids_N=tokens[:-1], loss_fn_inputs=inputs)


def completion_part(values_N: Float32Array, num_prompt_tokens: int) -> Float32Array:
    """The positions of a datum's per-target values that belong to the completion: (N,) to (L,)."""
    return values_N[num_prompt_tokens - 1 :]
