"""What is kept of each rollout: trained, dropped, held out."""

from __future__ import annotations

import numpy as np
import pytest
from fakes import make_completion, make_scored

from weaver_rl.advantages import MeanCentered
from weaver_rl.batch import ScoredGroup, build_batch
from weaver_rl.off_policy import LearnInput
from weaver_rl.records import eval_records, train_records

pytestmark = pytest.mark.unit


def make_group(name: str, rewards: list[float | None]) -> ScoredGroup:
    completions = [make_completion((5, 6 + i)) for i in range(len(rewards))]
    scored = tuple(
        make_scored(f"{name}-{i:03d}", reward, index=i, completion=completion)
        for i, (reward, completion) in enumerate(zip(rewards, completions, strict=True))
    )
    return ScoredGroup(group_id=name, sampler="sampler-1", scored_G=scored)


def test_weights_and_logprobs_go_to_their_own_rollout_across_dropped_ones():
    batch = build_batch([make_group("000007-0000", [None, 1.0, 0.0])], MeanCentered(), 0.0)
    learn_input = LearnInput.of(batch).with_learner_logprobs(
        [np.array([9, 9, -1.0, -2.0], np.float32), np.array([9, 9, -3.0, -4.0], np.float32)]
    )
    missing, best, worst = train_records(batch, 7, learn_input)
    assert (missing.dropped, missing.importance_weights_L, missing.learner_logprobs_L) == ("reward missing", None, None)
    assert best.importance_weights_L.tolist() == [0.5, 0.5]
    assert best.learner_logprobs_L.tolist() == [-1.0, -2.0]
    assert worst.importance_weights_L.tolist() == [-0.5, -0.5]
    assert worst.learner_logprobs_L.tolist() == [-3.0, -4.0]
    assert {r.group_id for r in (missing, best, worst)} == {"000007-0000"}
    assert [r.used_in_training for r in (missing, best, worst)] == [False, True, True]
    assert {(r.step, r.sampler, r.phase) for r in (missing, best, worst)} == {(7, "sampler-1", "train")}


def test_a_step_that_trained_nothing_is_still_recorded():
    batch = build_batch([make_group("g", [None, 1.0])], MeanCentered(), 0.0)
    records = train_records(batch, 3, None)
    assert len(records) == 2
    assert not any(r.used_in_training for r in records)
    assert all(r.dropped for r in records)


def test_held_out_completions_are_marked():
    records = eval_records([make_group("eval-000004-0000", [1.0])], 4)
    assert [(r.phase, r.step, r.group_id, r.used_in_training) for r in records] == [
        ("eval", 4, "eval-000004-0000", False)
    ]
