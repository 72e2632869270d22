"""What may change between a run and its resume."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes import make_config

from weaver_rl.config import RunConfig
from weaver_rl.errors import ConfigError
from weaver_rl.resume import changed_keys, check_resumable

pytestmark = pytest.mark.unit


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(make_config().model_dump_json())
    return path


def changed(**values: object) -> RunConfig:
    return RunConfig.model_validate(make_config().model_dump() | values)


def test_the_same_configuration_resumes(stored: Path):
    assert check_resumable(stored, make_config()) == {}


def test_more_steps_and_another_learning_rate_are_noted(stored: Path):
    now = changed(num_steps=99, learner={"learning_rate": 0.5})
    assert check_resumable(stored, now)["num_steps"] == (make_config().num_steps, 99)
    assert check_resumable(stored, now)["learner.learning_rate"][1] == 0.5


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("seed", {"seed": 77}),
        ("task.dataset", {"task": {"name": "reasoning_gym", "dataset": "gcd"}}),
        ("warm_start.num_steps", {"warm_start": {"num_steps": 9, "prompts_per_step": 3}}),
        ("rollout.samples_per_prompt", {"rollout": {"samples_per_prompt": 7, "prompts_per_step": 3}}),
    ],
)
def test_another_start_or_other_data_is_refused(stored: Path, key: str, values: dict[str, object]):
    with pytest.raises(ConfigError, match=f"cannot resume.*{key} was .*, is "):
        check_resumable(stored, changed(**values))


def test_a_key_that_is_new_shows_both_values():
    assert changed_keys(make_config(), changed(eval={"every": 123}))["eval.every"][1] == 123


def test_nothing_stored_is_nothing_to_compare(tmp_path: Path):
    assert check_resumable(tmp_path / "config.json", make_config()) == {}
