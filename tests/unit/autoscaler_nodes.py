"""Which nodes Ray's own autoscaler (v2) would make for a run: asked in a process of its own, because it imports Ray."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

ASK = """
import json, sys
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import GangResourceRequest

asked = json.load(sys.stdin)
config = asked["config"]
if "spec" in config:
    config = _derive_autoscaling_config_from_ray_cr(config)
config = AutoscalingConfig(config)
group = GangResourceRequest()
requests = [ResourceRequestUtil.make(bundle) for bundle in asked["bundles"]]
group.requests.extend(requests)
group.bundle_selectors.add().resource_requests.extend(requests)
reply = ResourceDemandScheduler().schedule(SchedulingRequest(
    disable_launch_config_check=True,
    node_type_configs=config.get_node_type_configs(),
    max_num_nodes=config.get_max_num_nodes(),
    gang_resource_requests=[group],
))
if reply.infeasible_gang_resource_requests:
    sys.exit("no nodes can hold it")
print("MADE", json.dumps({one.instance_type: one.count for one in reply.to_launch}))
"""


def nodes_made(config: Mapping[str, Any], bundles: Sequence[Mapping[str, float]]) -> dict[str, int]:
    """How many nodes of each kind it makes for one placement group on a cluster that has a head only.

    Args:
        config: a RayCluster, or a configuration of the cluster launcher that was prepared.
        bundles: of the group.

    Raises:
        AssertionError: its kinds of nodes cannot hold the group; with what it said.
    """
    if "spec" in config:
        config = {**config, "metadata": {**config["metadata"], "namespace": "default"}}
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        input=json.dumps({"config": config, "bundles": bundles}),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("MADE "))
    found: dict[str, int] = json.loads(line.removeprefix("MADE "))
    return found
