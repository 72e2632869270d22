"""A Ray cluster whose real autoscaler (v2, as KubeRay's) makes nodes and takes them away: processes of this machine.

The nodes are those of Ray's own fake provider; it stands for a cloud's or Kubernetes' API. The rest is real.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ray_nodes import RAY, TOKEN, free_port, kill_node, processes_of, start_node

HEAD_ID = "f" * 51 + "00000"
"""The provider counts its nodes from here."""
IDLE_MINUTES = 0.05
REWARD = "reward"
"""Custom resource of the head. A node with any actor on it is not idle: reward workers must not be on those that go."""


@dataclass(frozen=True)
class AutoscalingCluster:
    """Its head has one CPU and room for `REWARD`; the autoscaler makes nodes of one CPU each."""

    address: str
    head: subprocess.Popen[str]

    def num_nodes(self) -> int:
        """Nodes whose processes live."""
        return sum(process.name() == "raylet" for process in processes_of(self.head) if process.is_running())


@contextlib.contextmanager
def autoscaling_cluster(max_workers: int) -> Iterator[AutoscalingCluster]:
    """It is gone, with all it made, after the block.

    Args:
        max_workers: how many nodes may come.
    """
    port = free_port()
    directory = Path(tempfile.mkdtemp(prefix="wrl-auto-"))
    config = directory / "autoscaler.json"
    config.write_text(json.dumps(_config(f"127.0.0.1:{port}", max_workers)))
    fake = {"RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    fake |= {"RAY_CLOUD_INSTANCE_ID": HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID}
    own = [f"--port={port}", "--num-cpus=1", f"--resources={json.dumps({REWARD: 100})}", f"--temp-dir={directory}"]
    own += ["--include-dashboard=false", "--block"]
    try:
        head = start_node([RAY, "start", "--head", *own, f"--autoscaling-config={config}"], os.environ | TOKEN | fake)
        try:
            yield AutoscalingCluster(f"127.0.0.1:{port}", head)
        finally:
            kill_node(head)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _config(gcs_address: str, max_workers: int) -> dict[str, object]:
    # `external` and the module: the wheel of Ray lacks the file that its own name for the provider reads.
    module = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    node = {"resources": {"CPU": 1}, "node_config": {}}
    return {
        "cluster_name": "autoscaled",
        "max_workers": max_workers,
        "provider": {
            "type": "external",
            "module": module,
            "gcs_address": gcs_address,
            "head_node_id": HEAD_ID,
            "launch_multiple": True,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 1, REWARD: 100}, "node_config": {}, "max_workers": 0},
            "worker": node | {"min_workers": 0, "max_workers": max_workers},
        },
        "idle_timeout_minutes": IDLE_MINUTES,
        "upscaling_speed": 1.0,
        "auth": {"ssh_user": "nobody"},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "cluster_synced_files": [],
        "rsync_exclude": [],
        "rsync_filter": [],
        **{
            f"{which}_commands": []
            for which in (
                "initialization",
                "setup",
                "head_setup",
                "worker_setup",
                "head_start_ray",
                "worker_start_ray",
            )
        },
    }
