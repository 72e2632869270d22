"""A whole node of a Ray cluster is killed: its actors go to another node, or the run stops and says what is missing."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from fault_parts import LONG, Gate, going, gone
from test_cluster import RAY, TOKEN, _free_port

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


@dataclass
class Cluster:
    """Nodes of one CPU each, all on this machine."""

    port: int
    nodes: list[subprocess.Popen[str]] = field(default_factory=list)
    directories: list[str] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def add(self) -> subprocess.Popen[str]:
        """One more node; the first is the head."""
        where = ["--head", f"--port={self.port}", "--include-dashboard=false"]
        if self.nodes:
            where = [f"--address={self.address}"]
        else:
            self.directories.append(tempfile.mkdtemp(prefix="wrl-node-"))
            where.append(f"--temp-dir={self.directories[0]}")
        node = subprocess.Popen(
            [RAY, "start", *where, "--num-cpus=1", "--block"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | TOKEN,
            start_new_session=True,
        )
        self.nodes.append(node)
        assert node.stdout is not None
        lines = []
        for line in node.stdout:
            lines.append(line)
            if "Ray runtime started" in line:
                return node
        raise AssertionError("".join(lines))

    def close(self) -> None:
        for node in reversed(self.nodes):
            kill_node(node)
        for directory in self.directories:
            shutil.rmtree(directory, ignore_errors=True)


def processes_of(node: subprocess.Popen[str]) -> list[psutil.Process]:
    return [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]


def kill_node(node: subprocess.Popen[str]) -> None:
    """All its processes at once, as when a machine is switched off."""
    with contextlib.suppress(psutil.NoSuchProcess):
        processes = processes_of(node)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        node.wait()
        psutil.wait_procs(processes, timeout=10)


def actors_on(node: subprocess.Popen[str]) -> set[str]:
    """Kinds of this run's actors on a node."""
    kinds = ("Sampler", "LearnerRank", "RewardActor")
    titles = [" ".join(process.cmdline()) for process in processes_of(node) if not gone(process)]
    return {kind for kind in kinds if any(title.startswith(f"ray::{kind}") for title in titles)}


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster(_free_port())
    try:
        cluster.add()
        yield cluster
    finally:
        cluster.close()


def test_a_run_outlives_a_node_where_there_is_another_and_else_says_what_is_missing(
    cluster: Cluster, tmp_path: Path
) -> None:
    gate = Gate(tmp_path / "gate")
    second = cluster.add()
    arguments = [*LONG, "rollout.max_lag=1", "num_steps=10", f"cluster.address={cluster.address}"]
    with going(tmp_path / "run", gate, *arguments, "cluster.start_timeout_s=10", env=TOKEN) as it:
        it.trains(2)
        lost = actors_on(second)
        assert lost & {"Sampler", "LearnerRank"}
        kill_node(second)
        ended = it.ends()
    assert ended.status == 2, ended.output
    assert "a node with actors of this run is gone" in ended.output
    assert "asked 2, available" in ended.output
    assert "Traceback" not in ended.output
    assert it.audit().ok, it.audit().violations

    second = cluster.add()
    arguments.append("cluster.start_timeout_s=60")
    with going(tmp_path / "run", gate, *arguments, "--resume", env=TOKEN) as again:
        again.trains()
        cluster.add()
        assert actors_on(second) & {"Sampler", "LearnerRank"}
        kill_node(second)
        again.trains(2)
        ended = again.ends()
    assert ended.status == 0, ended.output
    assert again.audit().ok, again.audit().violations
    assert again.audit().state == "finished"
