"""The controller's memory through JSON and back."""

from __future__ import annotations

import json

import pytest

from weaver_rl.errors import CheckpointError
from weaver_rl.run_state import RunState

pytestmark = pytest.mark.unit

STATE = RunState(
    step=32,
    position=1952,
    prompts_dropped=3,
    baseline=0.1 + 0.2,
    accuracies={"30": 1 / 3},
    sampled_tokens=7,
    train_seconds=1.5,
)


def test_json_gives_back_an_equal_state():
    assert RunState.from_json(json.loads(json.dumps(STATE.to_json()))) == STATE


def test_an_accuracy_is_added_under_its_step_and_the_old_state_stays():
    later = STATE.with_accuracy(0.75)
    assert later.accuracies == {"30": 1 / 3, "32": 0.75}
    assert STATE.accuracies == {"30": 1 / 3}


def test_keys_of_another_version_are_refused_by_name():
    raw = STATE.to_json()
    del raw["position"]
    with pytest.raises(CheckpointError, match=r"this version needs .*'position'.*resume with the version that wrote"):
        RunState.from_json(raw)
    with pytest.raises(CheckpointError, match=r"has the keys .*'surprise'"):
        RunState.from_json(STATE.to_json() | {"surprise": 1})
