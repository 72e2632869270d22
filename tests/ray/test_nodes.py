"""A whole node of a Ray cluster is killed: its actors go to another node, or the run stops and says what is missing."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from fault_parts import LONG, Gate, going
from ray_nodes import RAY, TOKEN, actors_on, free_port, kill_node, start_node

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
        node = start_node([RAY, "start", *where, "--num-cpus=1", "--block"])
        self.nodes.append(node)
        return node

    def close(self) -> None:
        for node in reversed(self.nodes):
            kill_node(node)
        for directory in self.directories:
            shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster(free_port())
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
