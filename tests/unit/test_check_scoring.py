"""Rewards on three prompts, in real worker processes: good ones pass, each kind of bad one is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from check_parts import ROOT, a_run, lines

from weaver_rl.check.scoring import check_rewards

pytestmark = pytest.mark.unit


def found(*overrides: str, timeout_s: float = 60, config: Path | None = None):
    run = a_run(*overrides, **({"config": config} if config else {}))
    return lines(check_rewards(run, timeout_s))


def mine(*names: str) -> str:
    rewards = ", ".join(
        f"{{name: '{Path(__file__).with_name('check_rewards.py')}:{name}', label: {name}}}" for name in names
    )
    return f"rewards=[{rewards}]"


def test_the_tasks_own_reward_gives_gold_its_maximum():
    seen = found()
    assert {finding.level for finding in seen.values()} == {"pass"}
    assert seen["task"].seen.startswith("gold 1; wrong 0; empty 0; long 0; ")
    assert seen["tiny_rewards.py:brevity"].level == "pass"


def test_each_kind_of_bad_reward_is_named():
    seen = found(
        mine("never_right", "constant", "not_for_empty", "breaks", "slow"),
        "rollout.prompts_per_step=1000",
        "sampler.num_replicas=1",
    )
    assert "0.25 for the task's own answer" in seen["never_right"].seen
    assert "eval.success_at is 1" in seen["never_right"].seen
    assert "0.5 for all 12 completions" in seen["constant"].seen
    assert "missing for 3 of 12 completions, an empty one for example: " in seen["not_for_empty"].seen
    assert "ZeroDivisionError" in seen["not_for_empty"].seen
    assert seen["breaks"].level == "fail"
    assert "missing for all 12 completions" in seen["breaks"].seen
    assert "no judge there" in seen["breaks"].seen
    assert "4000 rollouts a step take 2 workers about 1" in seen["slow"].seen
    assert {seen[name].level for name in ("never_right", "constant", "not_for_empty", "slow")} == {"warn"}


def test_one_that_cannot_be_imported_fails_with_the_reason():
    line = found("rewards=[{name: 'tiny_rewards.py:brevety'}]")["rewards"]
    assert line.level == "fail"
    assert "brevety" in line.seen


def test_one_that_hangs_is_ended_in_time():
    line = found(mine("stuck"), "reward_workers.timeout_s=30", timeout_s=4)["rewards"]
    assert line.level == "fail"
    assert "12 completions were not scored within 4 s" in line.seen


def test_a_tag_that_the_task_asks_for_is_around_its_answer():
    assert found("task.answer_tag=answer", "rollout.sampling.max_tokens=40")["task"].seen.startswith("gold 1; wrong 0")


def test_an_answer_longer_than_a_completion_may_be_is_not_right():
    line = found("task.answer_tag=answer", "rollout.sampling.max_tokens=3")["task"]
    assert line.level == "warn"
    assert "for the task's own answer '<an" in line.seen


def test_without_answers_nothing_is_said_to_be_right(tmp_path: Path):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"prompt": f"Say {i}."}) + "\n" for i in range(40)))
    seen = found(
        f"base_dir={tmp_path}",
        "task={name: jsonl, path: train.jsonl}",
        "warm_start=null",
        "rewards=[{name: length_penalty, args: {soft: 1, max: 5}}]",
    )
    assert "no prompt sampled has an answer" in seen["length_penalty"].seen


def test_rewards_of_text_are_tried_without_a_model(tmp_path: Path):
    rows = [{"prompt": f"{i} + {i} =", "answer": str(2 * i)} for i in range(40)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen = found(
        f"base_dir={tmp_path}",
        "task={name: jsonl, path: train.jsonl}",
        "model={name: ./nowhere}",
        "warm_start=null",
        "rewards=[{name: numeric}]",
    )
    assert seen["numeric"].seen.startswith("gold 1; wrong 0; empty 0; long 0")


def test_a_penalty_for_length_is_seen_to_vary():
    config = ROOT / "configs" / "smollm2_cpu.yaml"
    scratch = "model={name: scratch, hidden_size: 64, num_heads: 2, num_layers: 1}"
    seen = found(scratch, "task.system_prompt=null", config=config)
    assert {finding.level for finding in seen.values()} == {"pass"}, seen
    assert "long -1" in seen["length_penalty"].seen
