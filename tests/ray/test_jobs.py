"""Runs as jobs of a real local cluster of two nodes, and the cluster itself: nothing of either is left behind."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from conftest import TINY, Ended, run, shared_memory, started_by_runs, temporary_directories
from fault_parts import BASE
from job_parts import Cable, going
from ray_nodes import FREE_CPUS, TOKEN

from actors.cluster_processes import processes_of
from weaver_rl.local_clusters import LocalCluster, local_clusters
from weaver_rl.process_state import GONE, ZOMBIE, process_state
from weaver_rl.rollout_files import read_rollouts
from weaver_rl.run_folder import RunFolder

pytest_plugins = ("head_fixtures",)
pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

Traces = tuple[set[int], set[str], set[str]]


def traces() -> Traces:
    return started_by_runs(), temporary_directories(), shared_memory()


@dataclass(frozen=True)
class Started:
    """A cluster that `weaver-rl cluster start` made."""

    env: dict[str, str]
    cluster: LocalCluster
    before: Traces

    def command(self, *arguments: str) -> Ended:
        return run(*arguments, env=self.env)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    """Two nodes of one CPU each."""
    env = {"XDG_STATE_HOME": str(tmp_path_factory.mktemp("state"))}
    before = traces()
    ended = run("cluster", "start", "--nodes", "2", "--cpus-per-node", "1", "--object-store-mb", "200", env=env)
    try:
        assert ended.status == 0, ended.output
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_STATE_HOME", env["XDG_STATE_HOME"])
            (cluster,) = local_clusters()
        assert f"--address {cluster.dashboard}" in ended.output
        yield Started(env, cluster, before)
    finally:
        run("cluster", "stop", env=env)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's directory: the tiny run, with its reward beside it."""
    directory = tmp_path_factory.mktemp("work")
    for name in ("tiny.yaml", "tiny_rewards.py"):
        (directory / name).write_bytes((TINY.parent / name).read_bytes())
    return directory


def test_a_run_is_a_job_whose_every_line_comes_once_though_the_connection_is_cut(started: Started, work: Path):
    cable = Cable(int(started.cluster.dashboard.rpartition(":")[2]))
    folder = RunFolder(work / "run")
    arguments = ["submit", str(work / "tiny.yaml"), *BASE, "num_steps=3", f"run_dir={folder.path}"]
    exports = {name: value for name, value in started.cluster.exports().items() if name != "RAY_ADDRESS"}
    with going(*arguments, "--address", f"http://127.0.0.1:{cable.port}", env=exports) as it:
        job = it.until(lambda line: line.startswith("job ")).split()[1]
        it.until(lambda line: "warm_start: 1 steps" in line)
        cable.cut()
        it.until(lambda line: line.startswith("-- connection lost"))
        cable.mend()
        assert it.ends() == 0, "\n".join(it.lines)
    cable.cut()
    printed = it.lines
    begin = next(index for index, line in enumerate(printed) if line.startswith(f"job {job} at"))
    told = [line for line in printed[begin + 1 : -1] if not line.startswith("-- ")]
    assert told == started.command("logs", job, "--no-follow").output.splitlines()
    assert any("connected again" in line for line in printed)
    assert sum("train 3/3" in line for line in told) == 1
    assert printed[-1] == f"job {job} succeeded"
    status = folder.read_status()
    assert status is not None
    assert status.state == "finished"
    scored = [component.name for record in read_rollouts(folder.path) for component in record.scored.components]
    assert "tiny_rewards.py:brevity" in scored


def test_a_run_that_fails_says_why_and_its_status_is_the_commands(started: Started, work: Path, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    ended = started.command("submit", str(work / "tiny.yaml"), f"run_dir={tmp_path / 'run'}", "--job-id", "fails")
    assert ended.status == 1, ended.output
    assert "run.json is not the status of a run" in ended.output
    assert "job fails failed with exit status 2" in ended.output
    assert "Traceback" not in ended.output
    again = started.command("submit", str(work / "tiny.yaml"), f"run_dir={tmp_path / 'run'}", "--job-id", "fails")
    assert again.status == 2, again.output
    assert "there is such a job (FAILED)" in again.output


def test_a_job_that_is_stopped_ends_in_good_order_and_leaves_no_process(started: Started, work: Path):
    folder = RunFolder(work / "long")
    arguments = ["submit", str(work / "tiny.yaml"), *BASE, "num_steps=100000", f"run_dir={folder.path}"]
    with going(*arguments, "--job-id", "long", env=started.env) as it:
        it.until(lambda line: re.search(r"train [2-9]/1", line) is not None)
        it.process.send_signal(signal.SIGINT)
        assert it.ends() == 130
    assert it.lines[-1].startswith("job long goes on: `weaver-rl logs long --address")
    listed = started.command("jobs").output
    assert [line.split()[1] for line in listed.splitlines() if line.split()[0] == "long"] == ["running"]
    stopped = started.command("stop", "long")
    assert stopped.status == 0, stopped.output
    assert "job long has ended in good order" in stopped.output
    status = folder.read_status()
    assert status is not None
    assert status.state == "interrupted"
    assert status.last_step > 2
    titles = [" ".join(process.cmdline()) for process in processes_of(started.cluster.session)]
    assert not [title for title in titles if "weaver-rl train" in title or "rewards.worker" in title]
    assert not [title for title in titles if title.startswith(("ray::Sampler", "ray::LearnerRank", "ray::RewardActor"))]


def test_the_cluster_ends_whole_though_a_node_died_and_a_foreign_one_goes_on(started: Started, head: str):
    status = started.command("cluster", "status")
    assert status.status == 0, status.output
    assert "2 of 2 nodes serve" in status.output
    second = started.command("cluster", "start")
    assert second.status == 2, second.output
    assert "is there already (2 of 2 nodes live" in second.output

    foreign = traces()[0] - started.before[0] - {process.pid for process in processes_of(started.cluster.session)}
    lost = psutil.Process(started.cluster.nodes[1].pid)
    for process in (lost, *lost.children(recursive=True)):
        process.kill()
    psutil.wait_procs([lost], timeout=10)
    status = started.command("cluster", "status")
    assert status.status == 1, status.output
    assert "gone" in status.output

    stopped = started.command("cluster", "stop")
    assert stopped.status == 0, stopped.output
    assert not processes_of(started.cluster.session)
    left = traces()
    assert left[0] - started.before[0] == foreign
    assert left[1] <= started.before[1]
    assert not Path(started.cluster.session).exists()
    assert left[2] <= started.before[2]
    assert {process_state(node.pid, node.started_at) for node in started.cluster.nodes} <= {GONE, ZOMBIE}
    seen = subprocess.run(
        [sys.executable, "-c", FREE_CPUS, head], env=os.environ | TOKEN, capture_output=True, text=True, timeout=60
    )
    assert seen.stdout.split()[-1] == "2.0", seen

    again = started.command("cluster", "stop")
    assert (again.status, "no cluster 'default'" in again.output) == (0, True)
    assert started.command("cluster", "status").status == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_start_that_is_interrupted_leaves_nothing(tmp_path: Path, number: signal.Signals):
    before = traces()
    state = tmp_path / "weaver-rl" / "clusters" / socket.gethostname() / "default"
    with going("cluster", "start", "--nodes", "3", env={"XDG_STATE_HOME": str(tmp_path)}) as it:
        while not (state / "cluster.json").exists() or '"pid"' not in (state / "cluster.json").read_text():
            assert it.process.poll() is None
        it.process.send_signal(number)
        assert it.ends() == 130, it.lines
    left = traces()
    assert left[0] <= before[0]
    assert left[1] <= before[1]
    assert not state.exists()
