"""What the run folder keeps of each rollout: from scored rollouts and learner input to rows. Writes nothing itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from weaver_rl.batch import BatchEntry, ScoredGroup, StepBatch
from weaver_rl.off_policy import LearnInput
from weaver_rl.rollout_files import RecordedRollout
from weaver_rl.types import Float32Array


def train_records(batch: StepBatch, step: int, learn_input: LearnInput | None) -> list[RecordedRollout]:
    """Every rollout of a step, trained or dropped, in order."""
    position = {e.datum_id: i for i, e in enumerate(learn_input.entries)} if learn_input else {}
    weights = learn_input.importance_weights if learn_input else ()
    logprobs = (learn_input.learner_logprobs if learn_input else None) or ()
    records = []
    for entry in batch.entries:
        index = position.get(entry.datum_id)
        records.append(
            RecordedRollout(
                scored=entry.scored,
                step=step,
                sampler=entry.sampler,
                group_id=entry.datum_id.rpartition("-")[0],
                advantage=entry.advantage,
                importance_weights_L=_weights(entry, None if index is None else weights[index]),
                learner_logprobs_L=None if index is None else logprobs[index],
                dropped=entry.dropped,
            )
        )
    return records


def _weights(entry: BatchEntry, given: Float32Array | None) -> Float32Array | None:
    """What the loss multiplied by; 0 for a rollout that was left out of the forward because its advantage is 0."""
    if given is None and entry.advantage == 0:
        return np.zeros(len(entry.scored.rollout.completion.token_ids_L), dtype=np.float32)
    return given


def eval_records(groups: Sequence[ScoredGroup], step: int) -> list[RecordedRollout]:
    """The held-out completions of one evaluation."""
    return [
        RecordedRollout(
            scored=group.scored_G[0], step=step, sampler=group.sampler, group_id=group.group_id, phase="eval"
        )
        for group in groups
    ]
