"""deploy/slurm/weaver-rl.sbatch with real Ray: a head and a second node on this machine, joined, asked and ended."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "unit"))

from slurm_job import STUBS, SlurmJob

pytestmark = pytest.mark.ray

ASK = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False)
alive = [node for node in ray.nodes() if node["Alive"]]
held = ray.get([ray.remote(num_cpus=2)(lambda: ray.get_runtime_context().get_node_id()).remote() for _ in range(4)])
print("nodes", len(alive), "cpus", int(ray.cluster_resources()["CPU"]), "ran on", len(set(held)) >= 1)
"""


def test_two_nodes_join_with_a_token_run_something_and_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "run.yaml").write_text("name: quick\n")
    (tmp_path / "ask.py").write_text(ASK)
    monkeypatch.setitem(
        STUBS, "weaver-rl", f'[ "$1" = show ] || exec {sys.executable} {tmp_path / "ask.py"} "${{@: -1}}"'
    )
    monkeypatch.setattr("slurm_job.PATIENCE_S", 120.0)
    job = SlurmJob(tmp_path, nodes=2, real_ray=True, number=1101, WEAVER_RL_JOIN_S="90")
    try:
        status = job.ended()
        logs = "".join(path.read_text() for path in tmp_path.glob("ray-*.log"))
        assert status == 0, job.said() + logs[-3000:]
        assert "2 node(s) joined" in job.said()
        assert "nodes 2 cpus 4 ran on True" in job.said()
        assert not Path("/tmp/slurm-weaver-rl-1101").exists()
    finally:
        job.close()
