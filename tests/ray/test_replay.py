"""The command `replay` on runs of the real parts: equal bit for bit, different where a number was altered."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import TINY, run

from weaver_rl.metrics import read_metrics
from weaver_rl.models.resolve import SCRATCH_DIRECTORY
from weaver_rl.rollout_files import RecordedRollout, read_rollouts, write_rollouts
from weaver_rl.run_folder import RunFolder

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

FIRST_STEP, LAST_STEP = 4, 6

RUNS = {
    "synchronous": ["rollout.max_lag=0"],
    "two ranks, a step ahead": [
        "rollout.max_lag=1",
        "learner.num_ranks=2",
        "learner.num_cpus=0.5",
        "advantage={name: reinforce, baseline_decay: 0.9}",
    ],
}


@pytest.fixture(scope="module", params=list(RUNS))
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    ended = run("train", str(TINY), f"run_dir={folder}", "num_steps=3", "eval.every=0", *RUNS[request.param])
    assert ended.status == 0, ended.output
    # Groups of the second step are begun together with those of the first.
    assert recorded(folder, FIRST_STEP + 1, "lag/max") == (0 if request.param == "synchronous" else 1)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def recorded(folder: Path, step: int, name: str) -> float:
    return next(line.values[name] for line in read_metrics(RunFolder(folder).metrics_file) if line.step == step)


@pytest.mark.usefixtures("nothing_left_behind")
def test_a_step_equals_what_was_recorded_from_its_checkpoint(finished: Path) -> None:
    before = files_of(finished)
    ended = run("replay", str(finished), "--step", str(LAST_STEP))
    assert ended.status == 0, ended.output
    assert "from checkpoint step_000005" in ended.output
    for name in ("loss", "grad_norm"):
        value = recorded(finished, LAST_STEP, name)
        assert f"{name}: recorded {value!r}, replayed {value!r}, equal bit for bit" in ended.output
    assert files_of(finished) == before


def test_every_step_equals_what_was_recorded_from_the_beginning(finished: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    shutil.rmtree(RunFolder(copy).checkpoints)
    shutil.rmtree(copy / SCRATCH_DIRECTORY)
    before = files_of(copy)
    ended = run("replay", str(copy), "--step", str(LAST_STEP))
    assert ended.status == 0, ended.output
    assert f"{LAST_STEP} steps" in ended.output
    assert "from the beginning" in ended.output
    assert "equal bit for bit in every step" in ended.output
    assert files_of(copy) == before


@pytest.mark.parametrize("finished", ["synchronous"], indirect=True)
def test_one_altered_log_probability_is_found(finished: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    records = list(read_rollouts(copy, [FIRST_STEP]))
    index = next(i for i, record in enumerate(records) if record.phase == "train" and record.advantage)
    records[index] = _less_likely(records[index])
    write_rollouts(copy, FIRST_STEP, records)
    ended = run("replay", str(copy), "--step", "5")
    assert ended.status == 1, ended.output
    assert "from checkpoint step_000003" in ended.output
    assert f"result     different: 2 of 2 steps, step {FIRST_STEP} first" in ended.output


def _less_likely(record: RecordedRollout) -> RecordedRollout:
    """The sampler's log-probability of the first token lowered by 0.1 nat."""
    rollout = record.scored.rollout
    logprobs_L = rollout.completion.logprobs_L.copy()
    logprobs_L[0] -= 0.1
    rollout = replace(rollout, completion=replace(rollout.completion, logprobs_L=logprobs_L))
    return replace(record, scored=replace(record.scored, rollout=rollout))


@pytest.mark.parametrize("finished", ["synchronous"], indirect=True)
def test_a_step_of_the_warm_start_is_refused(finished: Path) -> None:
    ended = run("replay", str(finished), "--step", "2")
    assert ended.status == 2
    assert "belongs to the warm start" in ended.output
    assert f"{FIRST_STEP} to {LAST_STEP}" in ended.output
