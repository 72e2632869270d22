"""Estimators against formulas written a second time, and properties over random groups."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import ValidationError

from weaver_rl.advantages import Grpo, MeanCentered, Reinforce, Rloo, Tis, group_advantages, logprob_gap

pytestmark = pytest.mark.unit

REWARDS = [1.0, 0.0, 0.5, 0.25]
CENTERED = [Grpo(), MeanCentered(), Rloo()]
groups = st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=16)
logprobs = hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-20, 0, width=32))


def test_grpo_divides_by_the_sample_deviation_plus_eps():
    mean, deviation = 1.75 / 4, statistics.stdev(REWARDS)
    expected = [(r - mean) / (deviation + 0.1) for r in REWARDS]
    assert group_advantages(REWARDS, Grpo(eps=0.1)) == pytest.approx(expected, rel=1e-12)


def test_grpo_of_a_pair_by_hand():
    # mean 1/2, deviation with one degree of freedom sqrt(1/2)
    assert group_advantages([1.0, 0.0], Grpo()) == pytest.approx([math.sqrt(0.5), -math.sqrt(0.5)], rel=1e-5)


def test_mean_centered_by_hand():
    assert group_advantages(REWARDS, MeanCentered()) == pytest.approx([0.5625, -0.4375, 0.0625, -0.1875])


def test_rloo_is_the_reward_minus_the_mean_of_the_others():
    others = [(sum(REWARDS) - r) / 3 for r in REWARDS]
    assert group_advantages(REWARDS, Rloo()) == pytest.approx([r - o for r, o in zip(REWARDS, others, strict=True)])


def test_reinforce_is_the_raw_reward_less_the_baseline():
    assert group_advantages(REWARDS, Reinforce()) == REWARDS
    assert group_advantages(REWARDS, Reinforce(), baseline=0.25) == [0.75, -0.25, 0.25, 0.0]


def test_running_baseline_starts_at_the_first_mean_and_then_decays():
    estimator = Reinforce(baseline_decay=0.75)
    first = estimator.next_baseline(None, 2.0)
    assert first == 2.0
    assert estimator.next_baseline(first, 6.0) == pytest.approx(3.0)
    assert Reinforce().next_baseline(None, 2.0) is None


@pytest.mark.parametrize("estimator", CENTERED, ids=lambda e: e.name)
@given(rewards=groups)
def test_advantages_of_a_group_sum_to_zero(estimator, rewards):
    found = group_advantages(rewards, estimator)
    assert found is not None
    assert sum(found) == pytest.approx(0.0, abs=1e-9 * max(1.0, max(abs(a) for a in found)) * len(found))


@pytest.mark.parametrize("estimator", CENTERED, ids=lambda e: e.name)
@given(rewards=st.lists(st.integers(-50, 50), min_size=2, max_size=16), shift=st.integers(-1000, 1000))
def test_a_constant_added_to_every_reward_changes_nothing(estimator, rewards, shift):
    plain = group_advantages([float(r) for r in rewards], estimator)
    shifted = group_advantages([float(r + shift) for r in rewards], estimator)
    assert shifted == pytest.approx(plain, abs=1e-9)


@pytest.mark.parametrize("estimator", CENTERED, ids=lambda e: e.name)
@given(reward=st.floats(-1e9, 1e9), size=st.integers(2, 64))
def test_equal_rewards_are_exactly_no_signal(estimator, reward, size):
    assert group_advantages([reward] * size, estimator) == [0.0] * size


@given(rewards=groups, scale=st.floats(0.5, 1e4))
def test_grpo_forgets_the_scale_of_the_reward(rewards, scale):
    if statistics.stdev(rewards) < 0.1:
        return
    scaled = group_advantages([r * scale for r in rewards], Grpo())
    assert scaled == pytest.approx(group_advantages(rewards, Grpo()), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("estimator", [*CENTERED, Reinforce()], ids=lambda e: e.name)
@given(rewards=st.lists(st.none() | st.floats(-100, 100), max_size=12))
def test_missing_rewards_take_no_part(estimator, rewards):
    present = [r for r in rewards if r is not None]
    found = group_advantages(rewards, estimator)
    if len(present) < (1 if isinstance(estimator, Reinforce) else 2):
        assert found is None
        return
    assert found is not None
    assert [a is None for a in found] == [r is None for r in rewards]
    assert [a for a in found if a is not None] == group_advantages(present, estimator)


@pytest.mark.parametrize("rewards", [[], [None, None], [1.0], [1.0, None]])
def test_a_group_with_fewer_than_two_scores_is_dropped(rewards):
    assert all(group_advantages(rewards, estimator) is None for estimator in CENTERED)


def test_reinforce_needs_one_score():
    assert group_advantages([None, 2.0], Reinforce()) == [None, 2.0]
    assert group_advantages([None, None], Reinforce()) is None


# -- behaviour correction --------------------------------------------------------------------------------------------


def test_tis_is_the_ratio_up_to_its_cap():
    learner, sampler = np.log(np.array([0.1, 0.4, 0.5, 0.9], np.float32)), np.log(np.array([0.2, 0.4, 0.3, 0.01]))
    found = Tis(cap=2.0)(learner, sampler.astype(np.float32))
    assert found.dtype == np.float32
    assert found == pytest.approx([0.5, 1.0, 5 / 3, 2.0], rel=1e-6)


@given(learner=logprobs, cap=st.floats(0.125, 16, width=32))
def test_tis_stays_in_its_range(learner, cap):
    found = Tis(cap=cap)(learner, learner[::-1].copy())
    assert (found > 0).all()
    assert (found <= cap * (1 + 1e-6)).all()


def test_tis_of_a_huge_ratio_is_the_cap_without_overflow():
    with np.errstate(all="raise"):
        assert Tis(cap=3.0)(np.array([0.0], np.float32), np.array([-1e4], np.float32)) == pytest.approx([3.0])


def test_cap_must_be_positive():
    with pytest.raises(ValidationError):
        Tis(cap=0.0)


# -- the gap ---------------------------------------------------------------------------------------------------------


def test_gap_by_hand():
    sampler = np.log(np.array([0.5, 0.5], np.float32))
    learner = np.log(np.array([0.25, 0.75], np.float32))
    gap = logprob_gap(learner, sampler)
    assert gap.mean == pytest.approx((math.log(2) + math.log(1.5)) / 2, rel=1e-6)
    assert gap.max == pytest.approx(math.log(2), rel=1e-6)
    # ratios 1/2 and 3/2: k3 is (r - 1 - ln r), ESS is (Σr)² / (n Σr²)
    assert gap.kl == pytest.approx((0.5 - 1 + math.log(2) + 1.5 - 1 - math.log(1.5)) / 2, rel=1e-6)
    assert gap.ess == pytest.approx(4 / (2 * 2.5), rel=1e-6)


@given(learner=logprobs)
def test_gap_of_identical_logprobs_is_nothing(learner):
    gap = logprob_gap(learner, learner.copy())
    assert (gap.mean, gap.max, gap.kl, gap.ess) == (0.0, 0.0, 0.0, 1.0)


@given(data=st.data(), learner=logprobs)
def test_gap_stays_in_its_ranges(data, learner):
    size = len(learner)
    sampler = data.draw(hnp.arrays(np.float32, size, elements=st.floats(-20, 0, width=32)))
    gap = logprob_gap(learner, sampler)
    assert 0 <= gap.mean <= gap.max + 1e-12
    assert gap.kl >= 0
    assert 0 < gap.ess <= 1
    assert gap.ess >= 1 / size - 1e-9


def test_gap_of_a_wild_token_is_still_a_number():
    gap = logprob_gap(np.array([0.0, -1.0], np.float32), np.array([-600.0, -1.0], np.float32))
    assert gap.max == 600
    assert gap.ess == pytest.approx(0.5)


def test_gap_of_nan_is_nan_and_so_never_below_a_limit():
    assert not logprob_gap(np.array([np.nan], np.float32), np.array([-1.0], np.float32)).mean <= 1e9
