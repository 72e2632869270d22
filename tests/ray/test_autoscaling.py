"""A run on a cluster that grows and shrinks: Ray's real autoscaler, real nodes that are processes of this machine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from autoscaling_cluster import REWARD, AutoscalingCluster, autoscaling_cluster
from conftest import TINY, run
from fault_parts import Gate, going
from ray_nodes import TOKEN

from weaver_rl.exit_status import INTERRUPTED, INTERRUPTED_STATUS

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

IDLE_NODES_GO_WITHIN_S = 60.0


@pytest.fixture
def cluster() -> Iterator[AutoscalingCluster]:
    with autoscaling_cluster(max_workers=2) as cluster:
        yield cluster


def nodes_become(cluster: AutoscalingCluster, number: int) -> None:
    end = time.monotonic() + IDLE_NODES_GO_WITHIN_S
    while (seen := cluster.num_nodes()) != number:
        assert time.monotonic() < end, f"{seen} nodes, not {number}"
        time.sleep(0.1)


def test_nodes_come_for_a_run_and_its_samplers_and_go_after_them(cluster: AutoscalingCluster, tmp_path: Path):
    refused = run("train", str(TINY), f"run_dir={tmp_path / 'no'}", "--address", cluster.address, env=TOKEN)
    assert refused.status == 2, refused.output
    assert "CPU: asked 2, available 1" in refused.output
    assert cluster.num_nodes() == 1

    growing = f"cluster={{address: '{cluster.address}', autoscaling: true}}"
    given = ("learner.num_gpus=0", "sampler.num_gpus=0", f"reward_workers.resources={{{REWARD}: 1}}", growing)
    warned = run("check", str(TINY), *given, env=TOKEN)
    assert warned.status == 0, warned.output
    assert "no room now: CPU: asked 2, available 1" in warned.output

    gate = Gate(tmp_path / "gate")
    with going(tmp_path / "run", gate, *given, "num_steps=6", "rollout.max_lag=1", env=TOKEN) as it:
        it.trains()
        assert "for new nodes: CPU: asked 2, available 1" in it.output
        assert cluster.num_nodes() == 2
        for _ in range(2):
            before = it.now()
            assert run("scale", str(it.folder.path), "--samplers", "2").status == 0
            it.until("sampler 1 joined", lambda before=before: it.noted("sampler 1", "joined", before))
            assert cluster.num_nodes() == 3
            assert run("scale", str(it.folder.path), "--samplers", "1").status == 0
            it.until("sampler 1 left", lambda before=before: it.noted("sampler 1", "left", before))
            nodes_become(cluster, 2)
        ended = it.ends()
    assert ended.status == 0, ended.output
    assert it.audit().ok
    nodes_become(cluster, 1)


def test_a_run_that_no_autoscaler_can_place_ends_with_what_is_missing(cluster: AutoscalingCluster, tmp_path: Path):
    growing = f"cluster={{address: '{cluster.address}', autoscaling: true, start_timeout_s: 3}}"
    given = ("learner.num_gpus=0", "sampler.num_gpus=0", "learner.num_cpus=4")
    ended = run("train", str(TINY), f"run_dir={tmp_path / 'run'}", growing, *given, env=TOKEN)
    assert ended.status == 2, ended.output
    assert "after 3 s: the cluster cannot place this run (CPU: asked 5" in ended.output
    assert "One actor needs CPU 4 on one node; the closest node has CPU 1" in ended.output
    assert "Traceback" not in ended.output


def test_a_run_that_waits_for_nodes_can_be_stopped(cluster: AutoscalingCluster, tmp_path: Path):
    growing = f"cluster={{address: '{cluster.address}', autoscaling: true, start_timeout_s: 600}}"
    given = ("learner.num_gpus=0", "sampler.num_gpus=0", "learner.num_cpus=4")
    with going(tmp_path / "run", Gate(tmp_path / "gate"), growing, *given, env=TOKEN) as it:
        it.until("it says that it waits", lambda: "for new nodes" in it.output)
        it.process.terminate()
        ended = it.ends(timeout_s=30)
    assert ended.status == INTERRUPTED_STATUS, ended.output
    assert INTERRUPTED in ended.output
