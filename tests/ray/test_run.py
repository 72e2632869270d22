"""Whole runs of the command on real Ray, real vLLM and the real learner: what they leave, resume, interrupt."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY, TINY, run, run_until
from ledger_parts import check_ledger, check_trace
from object_store import BUCKET, s3_server
from safetensors.numpy import load_file

from weaver_rl.metrics import MetricsLine, deterministic_part, read_metrics
from weaver_rl.rollout_files import RecordedRollout, read_rollouts
from weaver_rl.run_folder import RunFolder
from weaver_rl.run_location import staging_folder
from weaver_rl.span_files import find_span_files

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

LAST_STEP = 9
ACTORS = ("controller", "learner rank 0", "sampler 0", "reward worker 0", "reward worker 1")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """One uninterrupted run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    ended = run("train", str(TINY), f"run_dir={folder}")
    assert ended.status == 0, ended.output
    return RunFolder(folder)


def test_a_run_leaves_everything(finished: RunFolder) -> None:
    status = finished.read_status()
    assert status is not None
    assert status.state == "finished"
    assert status.last_step == LAST_STEP
    lines = list(read_metrics(finished.metrics_file))
    assert [line.step for line in lines] == list(range(1, LAST_STEP + 1))
    assert [line.phase for line in lines] == ["warm_start"] * 3 + ["train"] * 6
    last = lines[-1].values
    assert {"eval/accuracy", "reward/mean", "tokens_per_s", "seconds/sample", "logprob_gap/max"} <= set(last)
    assert max(line.values.get("logprob_gap/max", 0.0) for line in lines) < 1e-4
    assert max(line.values.get("sync/probe_max_abs", 0.0) for line in lines) < 1e-4
    assert any(finished.tensorboard.glob("events*"))
    report = finished.report.read_text()
    assert "reward/mean" in report
    assert "http://" not in report.replace("http://www.w3.org", "")


def test_rollouts_hold_what_was_sampled_and_trained(finished: RunFolder) -> None:
    records = [record for record in read_rollouts(finished.path) if record.phase == "train"]
    assert len(records) == 6 * 16
    for record in records:
        completion = record.scored.rollout.completion
        assert set(completion.versions_L.tolist()) == {record.step - 1}
        assert [component.name for component in record.scored.components] == ["task", "tiny_rewards.py:brevity"]
        assert record.importance_weights_L is not None
        assert record.learner_logprobs_L is not None
        assert record.advantage is not None
        np.testing.assert_allclose(record.learner_logprobs_L, completion.logprobs_L, atol=1e-4)
        np.testing.assert_allclose(record.importance_weights_L, record.advantage, rtol=1e-3, atol=1e-6)
    seeds = [record.scored.rollout.seed for record in records]
    assert len(set(seeds)) == len(seeds)


def test_the_ledger_adds_up_for_every_step_and_actor(finished: RunFolder) -> None:
    rows = check_ledger(finished, *ACTORS)
    for step in range(1, LAST_STEP + 1):
        assert rows[step, "learner rank 0"].seconds["learn"] > 0
        assert rows[step, "learner rank 0"].seconds.get("wait for controller", 0.0) >= 0
    for step in range(4, LAST_STEP + 1):
        sampler, learner = rows[step, "sampler 0"].seconds, rows[step, "learner rank 0"].seconds
        assert sampler["generate"] > 0
        assert sampler["wait for learner"] > 0
        assert learner["wait for samplers"] > 0
        assert min(whose["sync"] for whose in (sampler, learner)) > 0
        assert min(whose["probe"] for whose in (sampler, learner)) > 0
        assert sum(rows[step, f"reward worker {number}"].seconds.get("score", 0.0) for number in range(2)) > 0
    assert rows[6, "learner rank 0"].seconds["checkpoint"] > 0


def test_every_actor_has_spans_and_they_make_a_trace(finished: RunFolder, tmp_path: Path) -> None:
    names = {
        actor.actor: {recorded.span.name for recorded in actor.read()} for actor in find_span_files(finished.spans)
    }
    assert names.keys() == set(ACTORS)
    assert {"controller/step", "controller/sample", "controller/write_rollouts"} <= names["controller"]
    assert {"learner/start", "learner/forward_backward", "learner/optim_step", "learner/save"} <= names[ACTORS[1]]
    assert {"sampler/start", "sampler/generate", "sampler/load_weights", "sampler/prompt_logprobs"} <= names[ACTORS[2]]
    assert all({"reward/start", "reward/score", "reward/queue"} <= names[actor] for actor in ACTORS[3:])
    path = tmp_path / "trace.json.gz"
    ended = run("trace", str(finished.path), "--out", str(path))
    assert ended.status == 0, ended.output
    events = check_trace(path)
    assert {event["args"]["name"] for event in events if event["name"] == "process_name"} == set(ACTORS)


def test_the_policy_loads_in_transformers_and_plain_vllm_alike(finished: RunFolder) -> None:
    script = REPOSITORY / "tests" / "ray" / "compare_policy.py"
    done = subprocess.run(
        [sys.executable, str(script), str(finished.policy)], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert float(done.stdout.strip().splitlines()[-1]) < 1e-4


@pytest.mark.usefixtures("nothing_left_behind")
def test_interrupted_twice_and_resumed_equals_uninterrupted(finished: RunFolder, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    for number, after, more in ((signal.SIGINT, 6, ()), (signal.SIGTERM, 8, ("--resume",))):
        stopped = run_until(
            "train",
            str(TINY),
            f"run_dir={folder.path}",
            *more,
            seen=lambda line, after=after: (
                folder.metrics_file.exists() and len(folder.metrics_file.read_text().splitlines()) >= after
            ),
            number=number,
        )
        assert stopped.status == 130, stopped.output
        assert "Traceback" not in stopped.output
        status = folder.read_status()
        assert status is not None
        assert status.state == "interrupted"
        assert number.name in (status.reason or "")
    resumed = run("train", str(TINY), f"run_dir={folder.path}", "--resume")
    assert resumed.status == 0, resumed.output
    check_ledger(folder, *ACTORS)
    assert _comparable(folder) == _comparable(finished)
    assert _weights(folder).keys() == _weights(finished).keys()
    for name, tensor in _weights(finished).items():
        np.testing.assert_array_equal(_weights(folder)[name], tensor, err_msg=name)
    for ours, theirs in zip(read_rollouts(folder.path), read_rollouts(finished.path), strict=True):
        assert _identity(ours) == _identity(theirs)


@pytest.mark.usefixtures("nothing_left_behind")
def test_two_ranks_two_samplers_and_a_treacherous_reward(finished: RunFolder, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    ended = run(
        "train",
        str(TINY),
        f"run_dir={folder.path}",
        "learner.num_ranks=2",
        "learner.num_cpus=0.5",
        "sampler.num_replicas=2",
        "sampler.num_cpus=0.5",
        "num_steps=1",
        "rewards=[{name: task}, {name: 'tiny_rewards.py:treacherous', timeout_s: 0.5, weight: 0.0}]",
        "eval.num_prompts=2",
        "reward_workers.max_missing_fraction=0.0",
    )
    assert ended.status == 0, ended.output
    records = [record for record in read_rollouts(folder.path) if record.phase == "train"]
    assert {record.sampler for record in records} == {"sampler 0", "sampler 1"}
    for record in records:
        task, treacherous = record.scored.components
        assert task.value is not None
        assert (treacherous.value is None) == (record.scored.rollout.sample_index < 3)
    reasons = {r.scored.rollout.sample_index: r.scored.components[1].missing or "" for r in records}
    assert "exit" in reasons[0]
    assert "longer than" in reasons[1]
    assert "nan" in reasons[2].lower()
    # The warm start saw the same data: two ranks compute what one computes.
    for ours, theirs in zip(_lines(folder)[:3], _lines(finished)[:3], strict=True):
        assert ours.values["loss"] == pytest.approx(theirs.values["loss"], rel=1e-5)
        assert ours.values["grad_norm"] == pytest.approx(theirs.values["grad_norm"], rel=1e-4)


@pytest.mark.usefixtures("nothing_left_behind")
def test_resources_that_are_not_there_are_an_error_at_once(tmp_path: Path) -> None:
    ended = run("train", str(TINY), f"run_dir={tmp_path / 'run'}", "learner.num_ranks=1000", timeout_s=60)
    assert ended.status == 2
    assert "asked 1001" in ended.output
    assert "available" in ended.output
    assert "Traceback" not in ended.output
    assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "failed"


def _lines(folder: RunFolder) -> list[MetricsLine]:
    return list(read_metrics(folder.metrics_file))


def _comparable(folder: RunFolder) -> list[tuple[int, str, dict[str, float]]]:
    return [(line.step, line.phase, deterministic_part(line.values)) for line in _lines(folder)]


def _weights(folder: RunFolder) -> dict[str, np.ndarray]:
    return {name: tensor for file in folder.policy.glob("*.safetensors") for name, tensor in load_file(file).items()}


def _identity(record: RecordedRollout) -> tuple[object, ...]:
    rollout = record.scored.rollout
    weights = None if record.importance_weights_L is None else record.importance_weights_L.tolist()
    return (
        rollout.rollout_id,
        rollout.text,
        rollout.completion.token_ids_L.tolist(),
        rollout.completion.logprobs_L.tolist(),
        record.scored.reward,
        weights,
    )


@pytest.mark.usefixtures("nothing_left_behind")
def test_a_run_in_an_object_store_goes_on_on_another_machine_and_equals_one_that_stayed(
    finished: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"s3://{BUCKET}/team/tiny"
    with s3_server(monkeypatch) as store:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "first"))
        staging = RunFolder(staging_folder(url))
        stopped = run_until(
            "train",
            str(TINY),
            f"run_dir={url}",
            seen=lambda line: staging.metrics_file.exists() and staging.metrics_file.read_text().count("\n") >= 7,
            number=signal.SIGTERM,
        )
        assert stopped.status == 130, stopped.output
        assert not staging.path.exists()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "second"))
        again = run("train", str(TINY), f"run_dir={url}")
        assert again.status == 2
        assert f"error: run_dir: {url} already holds a run" in again.output
        resumed = run("train", str(TINY), f"run_dir={url}", "--resume")
        assert resumed.status == 0, resumed.output
        assert f"policy: {url}/policy" in resumed.output
        assert list((tmp_path / "second" / "weaver-rl" / "runs").iterdir()) == []
        assert run("audit", url).status == 0
        assert "finished" in run("status", url).output
        store.invalidate_cache()
        store.get(f"{BUCKET}/team/tiny/", f"{tmp_path}/run/", recursive=True)
    folder = RunFolder(tmp_path / "run")
    assert _comparable(folder) == _comparable(finished)
    for name, tensor in _weights(finished).items():
        np.testing.assert_array_equal(_weights(folder)[name], tensor, err_msg=name)
    for ours, theirs in zip(read_rollouts(folder.path), read_rollouts(finished.path), strict=True):
        assert _identity(ours) == _identity(theirs)
