"""From scored groups to data: what is shifted, weighed, dropped, and in which order."""

from __future__ import annotations

import numpy as np
import pytest
from fakes import make_completion, make_scored
from hypothesis import given
from hypothesis import strategies as st

from weaver_rl.advantages import Grpo, MeanCentered, Reinforce
from weaver_rl.batch import ScoredGroup, build_batch, completion_part, require_fresh, sequence_datum
from weaver_rl.errors import WeightSyncError

pytestmark = pytest.mark.unit


def group(name: str, rewards: list[float | None]) -> ScoredGroup:
    scored = tuple(make_scored(f"{name}-{i:03d}", r, index=i) for i, r in enumerate(rewards))
    return ScoredGroup(group_id=name, sampler=f"sampler-of-{name}", scored_G=scored)


def test_sequence_datum_by_hand():
    datum = sequence_datum("d", (5, 6, 7), (8, 9), np.array([0.5, -2.0], np.float32))
    assert datum.token_ids_N.tolist() == [5, 6, 7, 8]
    inputs = {name: values.tolist() for name, values in datum.loss_fn_inputs.items()}
    assert inputs == {
        "target_tokens": [6, 7, 8, 9],
        "weights": [0.0, 0.0, 1.0, 1.0],
        "importance_weights": [0.0, 0.0, 0.5, -2.0],
    }
    assert datum.token_ids_N.dtype == np.int64
    assert datum.loss_fn_inputs["target_tokens"].dtype == np.int64
    assert datum.loss_fn_inputs["weights"].dtype == np.float32
    assert datum.loss_fn_inputs["importance_weights"].dtype == np.float32


def test_without_importance_weights_there_is_no_such_field():
    assert set(sequence_datum("d", (5,), (8,)).loss_fn_inputs) == {"target_tokens", "weights"}


tokens = st.lists(st.integers(0, 999), min_size=1, max_size=20).map(tuple)


@given(prompt=tokens, completion=tokens)
def test_every_position_predicts_the_next_token_and_only_the_completion_counts(prompt, completion):
    weights = np.arange(1, len(completion) + 1, dtype=np.float32)
    datum = sequence_datum("d", prompt, completion, weights)
    whole = prompt + completion
    targets = datum.loss_fn_inputs["target_tokens"]
    assert len(datum.token_ids_N) == len(whole) - 1
    assert all(targets[i] == whole[i + 1] for i in range(len(whole) - 1))
    counted = datum.loss_fn_inputs["weights"] == 1
    assert tuple(targets[counted].tolist()) == completion
    assert datum.loss_fn_inputs["weights"].sum() == len(completion)
    assert (datum.loss_fn_inputs["importance_weights"][counted] == weights).all()
    assert (datum.loss_fn_inputs["importance_weights"][~counted] == 0).all()
    assert tuple(completion_part(targets, len(prompt)).tolist()) == completion


def test_batch_keeps_the_order_of_groups_and_rollouts():
    batch = build_batch([group("b", [1.0, 0.0]), group("a", [0.0, 3.0])], MeanCentered(), 0.0)
    assert [e.datum_id for e in batch.entries] == ["b-000", "b-001", "a-000", "a-001"]
    assert [e.advantage for e in batch.entries] == [0.5, -0.5, -1.5, 1.5]
    assert [e.sampler for e in batch.entries] == ["sampler-of-b"] * 2 + ["sampler-of-a"] * 2
    assert (batch.num_groups, batch.num_groups_dropped, batch.num_groups_without_signal) == (2, 0, 0)


def test_missing_rewards_and_dropped_groups_give_no_datum_and_keep_their_reason():
    batch = build_batch([group("a", [1.0, None, 0.0]), group("b", [None, 5.0, None])], MeanCentered(), 0.0)
    assert [e.datum_id for e in batch.trained()] == ["a-000", "a-002"]
    assert [e.dropped for e in batch.entries] == [
        None,
        "reward missing",
        None,
        *["group dropped: 1 of 3 rollouts scored, 2 needed"] * 3,
    ]
    assert all((e.advantage is None) == (e.dropped is not None) for e in batch.entries)
    assert batch.num_groups_dropped == 1
    assert batch.rewards().tolist() == [1.0, 0.0, 5.0]


def test_reinforce_drops_a_group_only_when_nothing_was_scored():
    batch = build_batch([group("a", [None, 2.0]), group("b", [None, None])], Reinforce(), 0.5)
    assert [e.advantage for e in batch.trained()] == [1.5]
    assert batch.entries[2].dropped == "group dropped: 0 of 2 rollouts scored, 1 needed"


@pytest.mark.parametrize("reward", [0.0, 0.1, 1.0, 1 / 3])
def test_a_group_of_equal_rewards_has_no_signal(reward):
    batch = build_batch([group("a", [reward] * 3), group("b", [0.0, 1.0, 0.0])], Grpo(), 0.0)
    assert batch.num_groups_without_signal == 1


def test_completion_rejects_arrays_of_different_length():
    with pytest.raises(ValueError, match=r"seen \[1, 2\]"):
        make_completion((5, 6), logprobs=[-1.0])


def test_a_token_of_a_version_out_of_reach_is_refused_and_its_sampler_named():
    scored = make_scored("g-000", 1.0, completion=make_completion(version=3))
    group = ScoredGroup(group_id="g", sampler="sampler 1", scored_G=(scored,))
    require_fresh([group], version=3, max_lag=0)
    require_fresh([group], version=4, max_lag=1)
    for version, max_lag in ((4, 0), (2, 0), (5, 1)):
        with pytest.raises(WeightSyncError, match=r"sampler 1 .* v3 to v3"):
            require_fresh([group], version=version, max_lag=max_lag)
