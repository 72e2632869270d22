"""The command `plan` on a run of the real parts: its own set-up is met, and it says so."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from conftest import COMMAND, REPOSITORY, TINY, run

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

OVERRIDES = [
    "num_steps=18",
    "rollout.prompts_per_step=8",
    "rollout.max_lag=1",
    "rollout.sampling.max_tokens=32",
    "eval.every=6",
    "checkpoint.every=0",
]


@pytest.mark.usefixtures("nothing_left_behind")
def test_recorded_run_is_met_within_15_percent(tmp_path: Path):
    folder = tmp_path / "run"
    ended = run("train", str(TINY), f"run_dir={folder}", *OVERRIDES)
    assert ended.status == 0, ended.output

    options = ["--trace", str(folder), "--samplers", "1", "--ranks", "1", "--max-lag", "0,1", "--json"]
    command = [*COMMAND, "plan", str(TINY), *OVERRIDES, *options]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert (plan["trace"]["first_step"], plan["trace"]["last_step"]) == (6, 20)
    assert abs(plan["error"]) <= 0.15, plan["measured"] | {"predicted": plan["predicted"]}
    assert abs(plan["tokens_error"]) <= 0.15
    assert plan["is_trusted"]
    # A step ahead nobody waits for anybody as long as before.
    now, ahead = plan["tried"]
    assert ahead["idle"]["samplers"] < now["idle"]["samplers"]

    other = run("plan", str(TINY), *OVERRIDES[:3], "--trace", str(folder))
    assert other.status == 2
    assert "rollout.sampling: recorded max_tokens=32, planned max_tokens=6" in other.output
