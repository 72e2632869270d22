"""The probe of a weight sync: its tokens, its comparison, and what the sync does with the answer."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from fakes import Calls, FakeLearner, FakeSamplers
from hypothesis import given
from hypothesis import strategies as st

from weaver_rl.errors import WeightSyncError
from weaver_rl.weights.config import WeightsConfig, resolve_transport
from weaver_rl.weights.probe import ProbeAnswers, compare, is_stale, probe_datum, probe_token_ids
from weaver_rl.weights.sync import WeightSync

pytestmark = pytest.mark.unit


@given(vocab=st.integers(2, 200_000), num=st.integers(2, 256), seed=st.integers(0, 2**31 - 1))
def test_probe_tokens_are_in_range_and_the_same_each_time(vocab, num, seed):
    tokens = probe_token_ids(vocab, num, seed)
    assert len(tokens) == num
    assert all(0 <= token < vocab for token in tokens)
    assert tokens == probe_token_ids(vocab, num, seed)


def test_probe_touches_many_rows_and_depends_on_the_seed():
    assert len(set(probe_token_ids(50_000, 64))) > 60
    assert probe_token_ids(512, 16, 0) != probe_token_ids(512, 16, 1)


def test_probe_tokens_do_not_change_between_releases():
    assert probe_token_ids(100, 6, 7) == (83, 98, 95, 56, 12, 94)


def test_probe_datum_asks_for_every_token_after_the_first():
    datum = probe_datum((4, 5, 6))
    assert datum.token_ids_N.tolist() == [4, 5]
    assert datum.loss_fn_inputs["target_tokens"].tolist() == [5, 6]
    assert datum.loss_fn_inputs["weights"].tolist() == [1, 1]


def against(sampler: list[float], learner: list[float], tolerance: float = 0.1):
    return compare("sampler-3", 7, np.array(sampler, np.float32), np.array(learner, np.float32), tolerance)


def test_compare_takes_the_worst_token():
    result = against([-1.0, -2.0, -3.0], [-1.0, -2.5, -3.0])
    assert (result.sampler, result.version, result.max_abs) == ("sampler-3", 7, 0.5)
    assert not result.passed
    assert against([-1.0], [-1.05]).passed
    assert against([-1.0], [-1.5], tolerance=0.5).passed


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_no_number_never_passes(bad: float):
    for result in (against([bad, -1.0], [-1.0, -1.0]), against([-1.0, -1.0], [-1.0, bad]), against([bad], [bad])):
        assert result.max_abs == float("inf")
        assert not result.passed


def test_answers_of_different_length_are_a_defect():
    with pytest.raises(ValueError, match="sampler-3: probe shapes"):
        against([-1.0, -1.0], [-1.0])


# -- sync ------------------------------------------------------------------------------------------------------------


def synced(version: int, **samplers):
    calls: Calls = []
    pool = FakeSamplers(calls=calls, **samplers)
    sync = WeightSync(FakeLearner(calls=calls), pool, probe_token_ids(12, 8), tolerance=1e-3)
    return calls, asyncio.run(sync(version))


def test_sync_publishes_loads_and_probes_once():
    calls, report = synced(3)
    assert [call[0] for call in calls] == ["publish_weights", "load_weights", "forward", "score"]
    assert (report.version, report.num_bytes, report.probe_max_abs, report.resynced) == (3, 8, 0.0, ())


def test_only_the_sampler_that_disagrees_is_sent_them_again():
    calls, report = synced(3, loads_ignored={("sampler-0", 3): 1})
    assert report.resynced == ("sampler-0",)
    assert report.probe_max_abs == 0.0
    assert [call for call in calls if call[0] == "load_weights"] == [
        ("load_weights", 3, None),
        ("load_weights", 3, "sampler-0"),
    ]


def test_a_sampler_that_disagrees_twice_is_named_with_both_figures():
    with pytest.raises(
        WeightSyncError, match=r"sampler-1 does not use weights v3.* nats from the learner's, 0\.001 all"
    ):
        synced(3, loads_ignored={("sampler-1", 3): 2})


@pytest.mark.parametrize(
    ("on_gpu", "colocated", "expected"),
    [(False, False, "object_store"), (True, False, "nccl"), (True, True, "ipc")],
)
def test_auto_transport(on_gpu: bool, colocated: bool, expected: str):
    assert resolve_transport(WeightsConfig().transport, on_gpu=on_gpu, colocated=colocated) == expected
    assert resolve_transport("nccl", on_gpu=on_gpu, colocated=colocated) == "nccl"


def test_a_sampler_that_stands_still_while_the_learner_moves_is_stale():
    before = ProbeAnswers(learner=np.float32([-1.0, -2.0]), by_sampler={"sampler 0": np.float32([-1.0, -2.0])})
    moved = np.float32([-1.0, -2.0000005])
    stuck = ProbeAnswers(learner=moved, by_sampler={"sampler 0": np.float32([-1.0, -2.0])})
    assert is_stale("sampler 0", before, stuck)
    assert not is_stale("sampler 0", before, ProbeAnswers(learner=moved, by_sampler={"sampler 0": moved}))
    assert not is_stale("sampler 0", before, before)
    assert not is_stale("sampler 0", None, stuck)
    assert not is_stale("sampler 1", before, stuck)
    result = compare("sampler 0", 2, stuck.by_sampler["sampler 0"], moved, tolerance=1.0, stale=True)
    assert not result.passed


def test_a_sampler_that_ignores_tiny_updates_is_replaced_at_the_second_sync():
    """The update is far below the tolerance: only standing still gives the sampler away."""
    calls: Calls = []
    learner = FakeLearner(calls=calls)
    samplers = FakeSamplers(calls=calls, loads_ignored={("sampler-1", 1): 2})
    sync = WeightSync(learner, samplers, probe_token_ids(12, 16), tolerance=0.5)
    asyncio.run(sync(0))
    learner.theta += 1e-4
    assert asyncio.run(sync(1)).replaced == ("sampler-1",)
    assert ("replace", "sampler-1") in calls
