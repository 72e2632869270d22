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

from weaver_rl.advantages import (
    Grpo,
    MeanCentered,
    Mis,
    Reinforce,
    Rloo,
    Tis,
    effective_sample_share,
    group_advantages,
    logprob_gap,
)

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


LEARNER = np.log(np.array([0.1, 0.4, 0.5, 0.9], np.float32))
SAMPLER = np.log(np.array([0.2, 0.4, 0.3, 0.01], np.float32))
RATIOS = [0.5, 1.0, 5 / 3, 90.0]


def test_mis_is_the_ratio_within_its_bounds_and_else_0():
    assert Mis(max_ratio=2.0)(LEARNER, SAMPLER) == pytest.approx([0.5, 1.0, 5 / 3, 0.0], rel=1e-6)
    assert Mis(min_ratio=0.75, max_ratio=100)(LEARNER, SAMPLER) == pytest.approx([0.0, 1.0, 5 / 3, 90.0], rel=1e-5)
    assert Mis(max_ratio=2.0)(LEARNER, SAMPLER).dtype == np.float32


def test_mis_with_both_bounds_at_1_keeps_what_is_on_policy():
    assert Mis(min_ratio=1.0, max_ratio=1.0)(LEARNER, SAMPLER).tolist() == [0.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("correction", "factor"),
    [
        (Tis(cap=100, level="sequence"), 75.0),
        (Tis(cap=3, level="sequence"), 3.0),
        (Mis(max_ratio=100, level="sequence"), 75.0),
        (Mis(max_ratio=74, level="sequence"), 0.0),
    ],
)
def test_a_sequence_has_one_factor_from_the_product_of_its_ratios(correction, factor):
    assert math.prod(RATIOS) == 75
    assert correction(LEARNER, SAMPLER) == pytest.approx([factor] * 4, rel=1e-5)


def test_mis_masks_a_whole_rollout_below_its_lower_bound():
    assert not Mis(min_ratio=0.5, max_ratio=4, level="sequence")(SAMPLER, LEARNER).any()
    assert Mis(max_ratio=4, level="sequence")(SAMPLER, LEARNER) == pytest.approx([1 / 75] * 4, rel=1e-5)


@st.composite
def policies(draw):
    """Log-probabilities (L,) of a rollout under learner and sampler, as far apart as float32 tokens can be."""
    size = draw(st.integers(0, 40))
    values = hnp.arrays(np.float32, size, elements=st.floats(-1e4, 0, width=32) | st.sampled_from([-1e4, 0.0]))
    return draw(values), draw(values)


levels = st.sampled_from(["token", "sequence"])
above_1 = st.floats(1, 1e6)
below_1 = st.floats(1e-6, 1)


def straightforward(learner: np.ndarray, sampler: np.ndarray, level: str) -> list[float]:
    """The ratios by the formula, infinite where float64 ends."""
    logs = [float(a) - float(b) for a, b in zip(learner, sampler, strict=True)]
    if level == "sequence":
        logs = [math.fsum(logs)] * len(logs)
    return [math.exp(log) if log < 700 else math.inf for log in logs]


@given(pair=policies(), cap=st.floats(0.125, 1e6), level=levels)
def test_tis_is_the_straightforward_formula_and_stays_finite(pair, cap, level):
    found = Tis(cap=cap, level=level)(*pair)
    assert found.dtype == np.float32
    assert ((found >= 0) & (found <= np.float32(cap))).all()
    assert found == pytest.approx([min(r, cap) for r in straightforward(*pair, level)], rel=1e-5, abs=1e-37)


@given(pair=policies(), low=st.none() | below_1, high=above_1, level=levels)
def test_mis_is_the_straightforward_formula_and_stays_finite(pair, low, high, level):
    found = Mis(min_ratio=low, max_ratio=high, level=level)(*pair)
    assert found.dtype == np.float32
    for factor, ratio in zip(found.tolist(), straightforward(*pair, level), strict=True):
        if any(bound is not None and ratio == pytest.approx(bound, rel=1e-12) for bound in (low, high)):
            continue  # on which side of a bound an equal ratio falls is a matter of rounding
        expected = ratio if (low or 0.0) <= ratio <= high else 0.0
        assert factor == pytest.approx(expected, rel=1e-5, abs=1e-37)


@given(pair=policies(), cap=above_1)
def test_where_mis_keeps_a_token_it_is_tis(pair, cap):
    truncated, masked = Tis(cap=cap)(*pair), Mis(max_ratio=cap)(*pair)
    kept = masked > 0
    assert masked[kept] == pytest.approx(truncated[kept], rel=1e-6)


@given(pair=policies(), level=levels)
def test_on_policy_every_factor_is_exactly_1(pair, level):
    learner, _ = pair
    for correction in (Tis(level=level), Mis(min_ratio=0.9, max_ratio=1.1, level=level)):
        assert correction(learner, learner.copy()).tolist() == [1.0] * len(learner)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_log_probability_that_is_no_number_is_not_masked_in_silence(level):
    learner, sampler = np.array([np.nan, -1.0], np.float32), np.array([-1.0, -1.0], np.float32)
    for correction in (Tis(level=level), Mis(level=level)):
        assert np.isnan(correction(learner, sampler)[0])


def test_figures_of_a_correction():
    factors = np.array([0.0, 0.1, 1.0, 0.3], np.float32)
    assert Tis(cap=0.3).metrics(factors) == {"correction/capped_fraction": 0.25}
    assert Mis().metrics(factors) == {"correction/masked_fraction": 0.25}


@given(pair=policies(), cap=st.floats(0.125, 1e6))
def test_every_ratio_above_the_cap_is_counted_as_capped(pair, cap):
    learner, sampler = pair
    if len(learner) == 0:
        return
    ratios = straightforward(learner, sampler, "token")
    found = Tis(cap=cap).metrics(Tis(cap=cap)(learner, sampler))["correction/capped_fraction"]
    surely, perhaps = (sum(r > cap * (1 + side) for r in ratios) / len(ratios) for side in (1e-6, -1e-6))
    assert surely <= found <= perhaps


def test_tis_of_a_huge_ratio_is_the_cap_without_overflow():
    with np.errstate(all="raise"):
        assert Tis(cap=3.0)(np.array([0.0], np.float32), np.array([-1e4], np.float32)) == pytest.approx([3.0])


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (Tis, {"cap": 0.0}),
        (Tis, {"cap": 1e7}),
        (Tis, {"level": "geometric"}),
        (Mis, {"max_ratio": 0.9}),
        (Mis, {"max_ratio": 1e7}),
        (Mis, {"min_ratio": 1.1}),
        (Mis, {"min_ratio": 0.0}),
    ],
)
def test_bounds_that_would_mask_or_overflow_what_is_on_policy_are_refused(kind, values):
    with pytest.raises(ValidationError, match=next(iter(values))):
        kind(**values)


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


@pytest.mark.parametrize(
    ("ratios", "share"), [([3.0, 3.0, 3.0], 1.0), ([1.0, 0.0, 0.0, 0.0], 0.25), ([1.0, 2.0, 3.0], 36 / (3 * 14))]
)
def test_effective_sample_share_by_hand(ratios, share):
    with np.errstate(divide="ignore"):
        logs = np.log(np.array(ratios))
    assert effective_sample_share(logs) == pytest.approx(share)
    assert effective_sample_share(logs + 5000.0) == pytest.approx(share)


def test_effective_sample_share_of_nan_is_not_a_good_one():
    assert math.isnan(effective_sample_share(np.array([0.0, np.nan])))


def test_gap_of_a_wild_token_is_still_a_number():
    gap = logprob_gap(np.array([0.0, -1.0], np.float32), np.array([-600.0, -1.0], np.float32))
    assert gap.max == 600
    assert gap.ess == pytest.approx(0.5)


def test_gap_of_nan_is_nan_and_so_never_below_a_limit():
    assert not logprob_gap(np.array([np.nan], np.float32), np.array([-1.0], np.float32)).mean <= 1e9
