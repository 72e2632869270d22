"""Why a rollout got its importance weights: every factor computed again from what was stored, beside what was stored.

It holds no formula of its own: rewards are summed by `combine`, advantages made by `build_batch`, corrections by
`correct`, and what the loss does to a weight is asked of the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from weaver_rl.advantages import log_ratio
from weaver_rl.batch import BatchEntry
from weaver_rl.errors import UserError
from weaver_rl.inspection.recorded_step import RecordedStep
from weaver_rl.off_policy import LearnInput, correct
from weaver_rl.rewards.combine import combine
from weaver_rl.rollout_files import RecordedRollout
from weaver_rl.summation import mean, std
from weaver_rl.types import Float32Array, ForwardOutput

FORMULAS = {
    "grpo": "(reward − mean) / (std + eps)",
    "mean_centered": "reward − mean",
    "rloo": "reward − mean of the others",
    "reinforce": "reward − running baseline",
}
"""In words; the numbers beside them come from weaver_rl.advantages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A number as it was stored and as it came out again; None where there is none."""

    stored: float | None
    again: float | None
    is_computed: bool = True
    """False: it could not be computed again, and `again` says nothing."""

    @property
    def equal(self) -> bool | None:
        """Bit for bit; None: not computed again."""
        if not self.is_computed:
            return None
        if self.stored is None or self.again is None:
            return self.stored is self.again
        return float(self.stored).hex() == float(self.again).hex()


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One reward component and what it counts."""

    name: str
    weight: float | None
    """None: the configuration has no reward of that name now."""
    value: float | None
    missing: str | None
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupFigures:
    """The rewards of the group and how they became this rollout's advantage."""

    group_id: str
    rollout_ids: tuple[str, ...]
    rewards: tuple[float | None, ...]
    advantages: tuple[float | None, ...]
    mean: float | None
    std: float | None
    """With G − 1 in the denominator; None where fewer than two rewards are there."""
    estimator: str
    formula: str
    eps: float | None
    baseline: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenFactors:
    """One token: from the two log-probabilities to what the loss multiplies by."""

    token_id: int
    version: int
    sampler_logprob: float
    learner_logprob: float | None
    gap: float | None
    """Learner minus sampler (nat)."""
    correction: float | None
    """Factor of the correction; None where there is no correction, or no log-probability to compute it from."""
    weight: Check
    """The importance weight, stored and again."""
    loss_weight: float | None
    """What the loss makes of the weight: clipped, if it clips."""

    @property
    def ratio(self) -> float | None:
        return None if self.gap is None else float(np.exp(self.gap))

    @property
    def is_clipped(self) -> bool:
        return self.loss_weight is not None and self.weight.again is not None and self.loss_weight != self.weight.again


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Why one rollout weighs what it weighs, from left to right: parts → reward → advantage → correction → weights.

    Example:
        explain(RecordedStep.read(run_dir, 450), "00003200-001").advantage.equal
    """

    record: RecordedRollout
    parts: tuple[Part, ...]
    reward: Check
    group: GroupFigures | None
    """None for a held-out completion."""
    advantage: Check
    correction: str
    """The section of the configuration, on one line."""
    loss: str
    tokens: tuple[TokenFactors, ...]
    sum_weights: float | None
    """What the loss divides by: the tokens of every rollout of the step that could be trained on."""
    notes: tuple[str, ...]
    """What could not be computed, and why."""

    @property
    def largest_weight_difference(self) -> float | None:
        """Between stored and recomputed importance weights; inf where only one side has them, None: not computed."""
        if not all(token.weight.is_computed for token in self.tokens):
            return None
        pairs = [(token.weight.stored, token.weight.again) for token in self.tokens]
        if any((stored is None) != (again is None) for stored, again in pairs):
            return float("inf")
        return max((abs(a - b) for a, b in pairs if a is not None and b is not None), default=0.0)

    @property
    def equal(self) -> bool | None:
        """Whether everything came out as it was stored, bit for bit; None: nothing differs, not all was computed."""
        difference = self.largest_weight_difference
        found = (self.reward.equal, self.advantage.equal, None if difference is None else difference == 0)
        return False if False in found else None if None in found else True


def explain(step: RecordedStep, rollout_id: str) -> Explanation:
    """Computes again what a recorded step did with one of its rollouts.

    Raises:
        UserError: the step has no such rollout; names some that it has.
    """
    record = _find(step, rollout_id)
    config = step.config
    counts = {spec.component_name: spec.weight for spec in config.rewards}
    notes: list[str] = []
    if record.phase == "train" and step.baseline_unknown is not None:
        notes.append(f"the running baseline is not known, so nothing is computed from it: {step.baseline_unknown}")
    entry: BatchEntry | None = None
    group = None
    weights = _Weights(is_computed=record.phase == "eval")
    sum_weights = None
    if record.phase == "train" and step.baseline_unknown is None:
        batch = step.batch()
        entry = next(entry for entry in batch.entries if entry.datum_id == rollout_id)
        group = _group(step, record, batch.entries)
        learn_input = LearnInput.of(batch)
        sum_weights = learn_input.sum_weights
        weights = _weights_again(step, learn_input, entry, notes)
    return Explanation(
        record=record,
        parts=tuple(
            Part(
                name=part.name,
                weight=counts.get(part.name),
                value=part.value,
                missing=part.missing,
                seconds=part.seconds,
            )
            for part in record.scored.components
        ),
        reward=_reward_again(step, record, notes),
        group=group,
        advantage=Check(
            stored=record.advantage,
            again=entry.advantage if entry else None,
            is_computed=entry is not None or record.phase == "eval",
        ),
        correction=_one_line(config.correction.model_dump()),
        loss=_one_line(config.loss.model_dump()),
        tokens=_tokens(step, record, weights),
        sum_weights=sum_weights,
        notes=tuple(notes),
    )


def _find(step: RecordedStep, rollout_id: str) -> RecordedRollout:
    records = [*step.rows, *step.held_out]
    for record in records:
        if record.scored.rollout.rollout_id == rollout_id:
            return record
    some = ", ".join(record.scored.rollout.rollout_id for record in records[:3]) or "none"
    raise UserError(f"step {step.step} of {step.run_dir} has no rollout {rollout_id!r}; it has {some}, …")


def _reward_again(step: RecordedStep, record: RecordedRollout, notes: list[str]) -> Check:
    stored = record.scored.reward
    names = [part.name for part in record.scored.components]
    if names != [spec.component_name for spec in step.config.rewards]:
        notes.append(f"the rewards of the configuration are not the recorded ones ({', '.join(names) or 'none'})")
        return Check(stored=stored, again=None, is_computed=False)
    return Check(
        stored=stored, again=combine(record.scored.rollout, record.scored.components, step.config.rewards).reward
    )


def _group(step: RecordedStep, record: RecordedRollout, entries: Sequence[BatchEntry]) -> GroupFigures:
    ids = {row.scored.rollout.rollout_id for row in step.rows if row.group_id == record.group_id}
    members = [entry for entry in entries if entry.datum_id in ids]
    rewards = [entry.scored.reward for entry in members]
    scored = np.array([reward for reward in rewards if reward is not None], dtype=np.float64)
    estimator = step.config.advantage
    return GroupFigures(
        group_id=record.group_id,
        rollout_ids=tuple(entry.datum_id for entry in members),
        rewards=tuple(rewards),
        advantages=tuple(entry.advantage for entry in members),
        mean=mean(scored) if len(scored) else None,
        std=std(scored, ddof=1) if len(scored) > 1 else None,
        estimator=estimator.name,
        formula=FORMULAS[estimator.name],
        eps=getattr(estimator, "eps", None),
        baseline=step.baseline,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Weights:
    """What was computed again of one rollout; None where the run had none or nothing says what."""

    importance_weights_L: Float32Array | None = None
    corrections_L: Float32Array | None = None
    is_computed: bool = True


def _weights_again(step: RecordedStep, learn_input: LearnInput, entry: BatchEntry, notes: list[str]) -> _Weights:
    num_tokens = len(entry.scored.rollout.completion.token_ids_L)
    if entry.dropped is not None:
        return _Weights()
    place = next((i for i, each in enumerate(learn_input.entries) if each.datum_id == entry.datum_id), None)
    if place is None:
        # What the record says of a rollout that had no part in the forward because its advantage is 0.
        return _Weights(importance_weights_L=np.zeros(num_tokens, dtype=np.float32))
    if step.config.correction.name == "none":
        return _Weights(importance_weights_L=learn_input.importance_weights[place])
    stored = {row.scored.rollout.rollout_id: row.learner_logprobs_L for row in step.rows}
    logprobs_L = stored[entry.datum_id]
    if logprobs_L is None:
        notes.append("the learner's log-probabilities were not recorded, so the correction cannot be computed again")
        return _Weights(is_computed=False)
    alone = LearnInput(
        entries=(entry,), importance_weights=(learn_input.importance_weights[place],), sum_weights=float(num_tokens)
    )
    before_completion = np.zeros(len(entry.scored.rollout.prompt.token_ids_P) - 1, dtype=np.float32)
    forward = ForwardOutput(logprobs_per_datum=(np.concatenate([before_completion, logprobs_L]),))
    corrected = correct(alone, forward, step.config.correction)
    assert corrected.corrections is not None
    return _Weights(importance_weights_L=corrected.importance_weights[0], corrections_L=corrected.corrections[0])


def _tokens(step: RecordedStep, record: RecordedRollout, weights: _Weights) -> tuple[TokenFactors, ...]:
    again_L = weights.importance_weights_L
    completion, learner_L = record.scored.rollout.completion, record.learner_logprobs_L
    gaps = None if learner_L is None else log_ratio(learner_L, completion.logprobs_L)
    in_loss = None if again_L is None else _loss_weights(step, again_L)
    return tuple(
        TokenFactors(
            token_id=int(token_id),
            version=int(completion.versions_L[i]),
            sampler_logprob=float(completion.logprobs_L[i]),
            learner_logprob=_at(learner_L, i),
            gap=None if gaps is None else float(gaps[i]),
            correction=_at(weights.corrections_L, i),
            weight=Check(
                stored=_at(record.importance_weights_L, i), again=_at(again_L, i), is_computed=weights.is_computed
            ),
            loss_weight=_at(in_loss, i),
        )
        for i, token_id in enumerate(completion.token_ids_L)
    )


def _loss_weights(step: RecordedStep, weights_L: Float32Array) -> Float32Array:
    """What each log-probability is multiplied by: the loss of a token whose log-probability is −1."""
    import torch

    weights = torch.from_numpy(np.ascontiguousarray(weights_L))
    ones = torch.ones_like(weights)
    return np.asarray(
        step.config.loss.token_losses(-ones, {"weights": ones, "importance_weights": weights}), dtype=np.float32
    )


def _at(values: Float32Array | None, index: int) -> float | None:
    return None if values is None else float(values[index])


def _one_line(section: dict[str, object]) -> str:
    name = section.pop("name")
    settings = ", ".join(f"{key} {value}" for key, value in section.items() if value is not None)
    return f"{name} ({settings})" if settings else str(name)
