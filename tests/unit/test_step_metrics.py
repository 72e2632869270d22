"""Figures of a step and of an evaluation, by hand, and their names in the table of metrics."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from fakes import make_completion, make_scored
from rich.console import Console

from weaver_rl.advantages import MeanCentered
from weaver_rl.batch import ScoredGroup, StepBatch, build_batch
from weaver_rl.controller import RunSummary
from weaver_rl.evaluation import evaluate
from weaver_rl.learner.config import LearnerConfig
from weaver_rl.metrics import find_metric
from weaver_rl.outcome import print_outcome
from weaver_rl.run_state import RunState
from weaver_rl.step_metrics import step_metrics
from weaver_rl.warm_start import WarmStartConfig

pytestmark = pytest.mark.unit


def make_batch(*rewards: list[float | None]) -> StepBatch:
    groups = []
    for number, rewards_G in enumerate(rewards):
        scored = []
        for index, reward in enumerate(rewards_G):
            completion = make_completion((5,) * (index + 1), version=7 - index)
            completion = replace(completion, stop_reason="length" if index == 1 else "stop")
            scored.append(make_scored(f"{number}-{index}", reward, completion=completion, index=index))
        groups.append(ScoredGroup(group_id=str(number), sampler="s", scored_G=tuple(scored)))
    return build_batch(groups, MeanCentered(), 0.0)


def test_figures_by_hand():
    found = step_metrics(make_batch([1.0, 0.0, None], [0.5, 0.5, 0.5], [None, None, 2.0]), version=7)
    assert found["rollout/count"] == 9
    assert found["rollout/length_mean"] == 2
    assert found["rollout/length_max"] == 3
    assert found["rollout/truncated_fraction"] == pytest.approx(1 / 3)
    assert found["rollout/logprob_mean"] == -1
    assert found["sampler/num_tokens"] == 18
    # Lag is of the trained tokens: the rollout without a reward and the dropped group take no part.
    assert found["lag/mean"] == pytest.approx((2 * 0 + 4 * 1 + 3 * 2) / 9)
    assert [found[f"lag/{lag}/fraction"] for lag in range(3)] == pytest.approx([2 / 9, 4 / 9, 3 / 9])
    assert found["lag/max"] == 2
    assert (found["groups/trained"], found["groups/dropped"]) == (2, 1)
    assert found["groups/zero_advantage_fraction"] == pytest.approx(1 / 3)
    assert found["reward/missing_fraction"] == pytest.approx(1 / 3)
    assert found["reward/mean"] == pytest.approx(4.5 / 6)
    assert (found["reward/min"], found["reward/max"]) == (0, 2)
    assert found["reward/std"] == pytest.approx(np.std([1, 0, 0.5, 0.5, 0.5, 2]))
    assert found["advantage/mean"] == 0
    assert found["advantage/std"] == pytest.approx(np.std([0.5, -0.5, 0, 0, 0]))
    assert found["reward/task/mean"] == pytest.approx(4.5 / 6)
    assert found["reward/task/missing_fraction"] == pytest.approx(1 / 3)


def test_every_figure_is_in_the_table_and_plain():
    for name, value in step_metrics(make_batch([1.0, 0.0]), version=7).items():
        assert find_metric(name) is not None, name
        assert type(value) is float


def test_the_lag_histogram_has_no_gaps():
    versions = np.array([7, 4, 4, 7], np.int32)  # the weights were loaded in flight
    completion = replace(make_completion((5,) * 4), versions_L=versions)
    scored = tuple(make_scored(f"0-{i}", reward, completion=completion) for i, reward in enumerate([1.0, 0.0]))
    batch = build_batch([ScoredGroup(group_id="0", sampler="s", scored_G=scored)], MeanCentered(), 0.0)
    found = {name: value for name, value in step_metrics(batch, version=7).items() if name.startswith("lag/")}
    histogram = {"lag/0/fraction": 0.5, "lag/1/fraction": 0, "lag/2/fraction": 0, "lag/3/fraction": 0.5}
    assert found == {"lag/mean": 1.5, "lag/max": 3} | histogram


def test_without_any_reward_there_is_no_mean_rather_than_0():
    found = step_metrics(make_batch([None, None]), version=7)
    assert found["reward/missing_fraction"] == 1
    assert not {"reward/mean", "reward/task/mean", "advantage/mean", "lag/mean", "lag/0/fraction"} & set(found)


# -- evaluation ------------------------------------------------------------------------------------------------------


def test_accuracy_is_over_scored_completions_by_the_deciding_reward():
    scored = [make_scored(str(i), value) for i, value in enumerate([1.0, 0.99, None, 1.5])]
    other = make_scored("x", 1.0, component="brevity")
    result = evaluate([*scored, other], "task", 1.0)
    assert result.accuracy == pytest.approx(2 / 3)
    assert (result.num_scored, result.num_missing) == (3, 1)


def test_an_evaluation_without_rewards_has_no_accuracy():
    assert evaluate([make_scored("a", None)], "task", 1.0).accuracy is None


# -- what is said at the end, and the warm start's schedule ----------------------------------------------------------


def test_outcome_tells_accuracy_speed_and_paths(tmp_path):
    console = Console(width=60, record=True, file=None, quiet=False)
    summary = RunSummary(state=RunState(), accuracy_before=0.4321, accuracy_after=None, tokens_per_s=12345.6)
    with console.capture() as captured:
        print_outcome(console, tmp_path, summary, 61.7)
    text = captured.get()
    assert "0.432 before reinforcement learning, not measured at the end" in text
    assert "wall time: 62 s; 12,346 sampled tokens/s" in text
    assert f"{tmp_path}/report.html" in text.replace("\n/", "/")


def test_the_warm_start_has_its_own_learning_rate_and_the_learner_s_optimizer():
    learner = LearnerConfig(learning_rate=7.0, adam={"beta2": 0.5}, grad_clip_norm=2.0)
    schedule = {"name": "linear", "warmup_steps": 2, "min_ratio": 0.5}
    warm = WarmStartConfig(num_steps=5, learning_rate=0.4, schedule=schedule)
    rates = [warm.adam_params_at(step, learner).learning_rate for step in range(5)]
    assert rates == pytest.approx([0.2, 0.4, 0.4, 0.3, 0.2])
    assert warm.adam_params_at(0, learner).beta2 == 0.5
    assert warm.adam_params_at(0, learner).grad_clip_norm == 2.0
