"""Schedules and limits of the learner's configuration."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from weaver_rl.learner.config import LearnerConfig
from weaver_rl.types import AdamParams

pytestmark = pytest.mark.unit


def rates(num_steps: int, **schedule) -> list[float]:
    config = LearnerConfig(learning_rate=1.0, schedule=schedule)
    return [config.learning_rate_at(step, num_steps) for step in range(num_steps)]


def test_constant_with_warmup():
    assert rates(6, name="constant", warmup_steps=4) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


def test_linear_falls_from_the_peak_to_the_minimum():
    assert rates(7, name="linear", warmup_steps=2, min_ratio=0.2) == pytest.approx([0.5, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_cosine_passes_its_middle():
    assert rates(5, name="cosine", min_ratio=0.1) == pytest.approx([1.0, 0.868198, 0.55, 0.231802, 0.1], abs=1e-5)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_short_and_overrun_runs_stay_in_range(name):
    config = LearnerConfig(learning_rate=1.0, schedule={"name": name, "warmup_steps": 10})
    assert all(0 <= config.learning_rate_at(step, num_steps) <= 1 for num_steps in (1, 5, 11) for step in range(30))
    with pytest.raises(ValueError, match="step"):
        config.learning_rate_at(-1, 5)


def test_adam_params_carry_the_whole_update():
    config = LearnerConfig(learning_rate=1.0, weight_decay=0.1, grad_clip_norm=0.5, adam={"beta1": 0.8, "eps": 1e-6})
    assert config.adam_params_at(0, 10) == AdamParams(
        learning_rate=1.0, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.1, grad_clip_norm=0.5
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"learning_rate": 0.0},
        {"num_ranks": 0},
        {"schedule": {"name": "step"}},
        {"schedule": {"name": "constant", "min_ratio": 0.1}},
        {"adam": {"beta2": 1.0}},
        {"dtype": "float16"},
        {"max_tokens_per_microbatch": 0},
        {"learning_rte": 1.0},
    ],
)
def test_impossible_values_are_refused(wrong):
    with pytest.raises(ValidationError):
        LearnerConfig(**wrong)
