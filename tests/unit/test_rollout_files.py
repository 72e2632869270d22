"""Rollouts on disk: what is written is read back bit for bit, whatever users' data hold."""

import itertools
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weaver_rl import rollout_files
from weaver_rl.errors import UserError, WeaverRLError
from weaver_rl.rollout_files import (
    RecordedRollout,
    read_rollouts,
    recorded_steps,
    rollouts_file,
    truncate_after,
    write_rollouts,
)
from weaver_rl.types import Completion, Prompt, RewardComponent, Rollout, ScoredRollout

pytestmark = pytest.mark.unit


def record(step=1, number=0, *, columns=None, text="7", length=3, missing=None, **extra) -> RecordedRollout:
    rng = np.random.default_rng(number)
    completion = Completion(
        token_ids_L=rng.integers(0, 50, length).astype(np.int32),
        logprobs_L=-rng.random(length).astype(np.float32),
        versions_L=np.full(length, 4, np.int32),
        stop_reason="stop",
    )
    prompt = Prompt(prompt_id="p-1", text="3 + 4 =", token_ids_P=(5, 9, 6), answer="7", columns=columns or {})
    rollout = Rollout(
        rollout_id=f"{step}-{number}", prompt=prompt, completion=completion, text=text, sample_index=number, seed=2**62
    )
    component = RewardComponent(name="task", value=None if missing else 0.1, missing=missing, seconds=0.25)
    scored = ScoredRollout(rollout=rollout, components=(component,), reward=None if missing else 0.1)
    return RecordedRollout(scored=scored, step=step, sampler="sampler-0", group_id="g", **extra)


def assert_same(seen: RecordedRollout, expected: RecordedRollout):
    for name in ("token_ids_L", "logprobs_L", "versions_L"):
        left = getattr(seen.scored.rollout.completion, name)
        right = getattr(expected.scored.rollout.completion, name)
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)
    for name in ("importance_weights_L", "learner_logprobs_L"):
        left, right = getattr(seen, name), getattr(expected, name)
        assert (left is None) == (right is None)
        if left is not None:
            assert left.dtype == np.float32
            np.testing.assert_array_equal(left, right)
    assert seen.scored.rollout.prompt == expected.scored.rollout.prompt
    assert seen.scored.components == expected.scored.components
    for name in ("step", "sampler", "group_id", "phase", "advantage", "dropped", "used_in_training"):
        assert getattr(seen, name) == getattr(expected, name)
    for name in ("rollout_id", "text", "sample_index", "seed"):
        assert getattr(seen.scored.rollout, name) == getattr(expected.scored.rollout, name)
    assert seen.scored.reward == expected.scored.reward


def test_rollouts_come_back_bit_for_bit(tmp_path):
    weights = np.array([0.1, np.float32(1 / 3), 0.0], np.float32)
    records = [
        record(number=0, advantage=1 / 3, importance_weights_L=weights, learner_logprobs_L=-weights),
        record(number=1, missing="timed out after 5 s", dropped="its reward is missing"),
        record(number=2, length=0, columns={"level": 3, "tags": ["a"], "nested": {"x": None}}),
    ]
    path = write_rollouts(tmp_path, 1, records)
    assert path == tmp_path / "rollouts" / "step_000001.parquet"
    for seen, expected in zip(read_rollouts(tmp_path), records, strict=True):
        assert_same(seen, expected)
    assert [item.used_in_training for item in read_rollouts(tmp_path)] == [True, False, False]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(width=32, allow_nan=False), max_size=4), st.floats(allow_nan=False, allow_infinity=False))
def test_any_float_survives(tmp_path_factory, weights, advantage):
    folder = tmp_path_factory.mktemp("run")
    weights_L = np.array(weights, np.float32)
    one = record(length=len(weights), advantage=advantage, importance_weights_L=weights_L)
    write_rollouts(folder, 1, [one])
    (seen,) = read_rollouts(folder)
    assert_same(seen, one)


def test_text_that_is_not_unicode_does_not_lose_the_step(tmp_path):
    write_rollouts(tmp_path, 1, [record(text="a\ud800b", missing="bad \udcff byte")])
    (seen,) = read_rollouts(tmp_path)
    assert seen.scored.rollout.text == "a?b"
    assert seen.scored.components[0].missing == "bad ? byte"


def test_columns_that_json_cannot_hold_are_written_as_their_repr(tmp_path):
    loop: list[object] = []
    loop.append(loop)
    columns = {"set": {1}, "nan": float("nan"), "array": np.arange(2), "loop": loop, "ok": [1, "x"], 5: "int key"}
    write_rollouts(tmp_path, 1, [record(columns=columns)])
    (seen,) = read_rollouts(tmp_path)
    assert seen.scored.rollout.prompt.columns == {
        "set": "{1}",
        "nan": "nan",
        "array": "array([0, 1])",
        "loop": "[[...]]",
        "ok": [1, "x"],
        "5": "int key",
    }


def test_other_tools_see_one_row_a_rollout_with_readable_columns(tmp_path):
    path = write_rollouts(tmp_path, 1, [record(number=number) for number in range(3)])
    table = pq.read_table(path)
    assert table.num_rows == 3
    row = table.to_pylist()[0]
    assert row["components"] == [{"name": "task", "value": 0.1, "missing": None, "seconds": 0.25}]
    assert row["importance_weights"] is None
    assert json.loads(row["columns_json"]) == {}


def test_a_step_without_rollouts_has_an_empty_file(tmp_path):
    write_rollouts(tmp_path, 4, [])
    assert recorded_steps(tmp_path) == [4]
    assert list(read_rollouts(tmp_path)) == []


def test_steps_are_read_in_order_and_can_be_chosen(tmp_path):
    for step in (10, 2, 1_000_000):
        write_rollouts(tmp_path, step, [record(step, 0), record(step, 1)])
    assert [item.step for item in read_rollouts(tmp_path)] == [2, 2, 10, 10, 1_000_000, 1_000_000]
    assert [item.scored.rollout.rollout_id for item in read_rollouts(tmp_path)][:2] == ["2-0", "2-1"]
    assert [item.step for item in read_rollouts(tmp_path, [10])] == [10, 10]


def test_reading_is_lazy_and_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(rollout_files, "ROWS_PER_CHUNK", 2)
    write_rollouts(tmp_path, 1, (record(1, number) for number in range(5)))
    rollouts_file(tmp_path, 2).write_bytes(b"damaged")
    stream = read_rollouts(tmp_path)
    assert [item.scored.rollout.sample_index for item in itertools.islice(stream, 5)] == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match=r"step_000002\.parquet"):
        next(stream)


def test_a_write_that_fails_leaves_the_earlier_file(tmp_path):
    write_rollouts(tmp_path, 1, [record()])
    with pytest.raises(WeaverRLError, match="another step"):
        write_rollouts(tmp_path, 1, [record(1, 0), record(2, 0)])
    assert len(list(read_rollouts(tmp_path))) == 1
    assert [path.name for path in (tmp_path / "rollouts").iterdir()] == ["step_000001.parquet"]


def test_truncate_after_removes_later_steps_and_leftovers(tmp_path):
    truncate_after(tmp_path, 0)
    for step in (1, 2, 3):
        write_rollouts(tmp_path, step, [record(step)])
    (tmp_path / "rollouts" / ".writing-step_000004.parquet").write_bytes(b"half")
    truncate_after(tmp_path, 1)
    assert [path.name for path in (tmp_path / "rollouts").iterdir()] == ["step_000001.parquet"]
