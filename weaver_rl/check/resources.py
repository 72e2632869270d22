"""What a cluster, or this machine alone, has to give: records, and what can be read here. It knows no Ray."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

GPU_QUERY_TIMEOUT_S = 20.0
OBJECT_STORE_SHARE = 0.3
"""Of a machine's memory, unless told otherwise: Ray's default, which /dev/shm bounds as well."""
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """One node.

    Example:
        NodeFacts(name="10.0.0.7", resources={"CPU": 16, "GPU": 8}, memory_bytes=2**39, gpu_memory_bytes=2**36)
    """

    name: str
    resources: Mapping[str, float]
    """All that Ray may give out there, by kind."""
    memory_bytes: int | None = None
    gpu_memory_bytes: int | None = None
    """Of the smallest GPU."""
    object_store_bytes: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    """Packages there; empty when the node was not asked."""
    sees_run_dir: bool | None = None
    """Whether the folder in which the run folder lies is there; None: not asked."""
    problem: str | None = None
    """Why it could not be asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterFacts:
    """All nodes and what is free of them.

    Example:
        ClusterFacts(address="10.0.0.7:6379", nodes=(node,), available={"CPU": 12.0}, versions={"ray": "2.60.0"})
    """

    address: str | None
    """None: this machine, where a cluster would be started for the run."""
    nodes: tuple[NodeFacts, ...]
    available: Mapping[str, float] | None
    """Free in the whole cluster now, by kind; None: not known."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of the cluster itself: ray and python."""

    @property
    def total(self) -> Mapping[str, float]:
        """Of all nodes, by kind."""
        kinds = {kind for node in self.nodes for kind in node.resources}
        return {kind: sum(node.resources.get(kind, 0.0) for node in self.nodes) for kind in kinds}

    @property
    def num_gpus(self) -> float:
        return sum(node.resources.get("GPU", 0.0) for node in self.nodes)

    @property
    def gpu_memory_bytes(self) -> int | None:
        """Of the smallest GPU that is known."""
        return min((node.gpu_memory_bytes for node in self.nodes if node.gpu_memory_bytes), default=None)


def this_machine() -> ClusterFacts:
    """The cluster that a run without an address would start."""
    memory = memory_bytes()
    gpus = gpu_memories()
    resources = {"CPU": float(num_cpus())} | ({"GPU": float(len(gpus))} if gpus else {})
    node = NodeFacts(
        name="this machine",
        resources=resources,
        memory_bytes=memory,
        gpu_memory_bytes=min(gpus, default=None),
        object_store_bytes=int(min(memory * OBJECT_STORE_SHARE, shared_memory_bytes())),
    )
    return ClusterFacts(address=None, nodes=(node,), available=resources)


def num_cpus() -> int:
    """CPUs that Ray would find here: the container's quota where there is one."""
    cpus = os.cpu_count() or 1
    try:
        quota, period = (CGROUP / "cpu.max").read_text().split()
        return cpus if quota == "max" else max(1, min(cpus, -(-int(quota) // int(period))))
    except (OSError, ValueError):
        return cpus


def memory_bytes() -> int:
    """Memory of this machine, or of the container."""
    total = int(psutil.virtual_memory().total)
    try:
        return min(total, int((CGROUP / "memory.max").read_text()))
    except (OSError, ValueError):
        return total


def shared_memory_bytes() -> int:
    try:
        return shutil.disk_usage("/dev/shm").total
    except OSError:
        return 0


def gpu_memories() -> list[int]:
    """Memory of each NVIDIA GPU of this machine, bytes."""
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=GPU_QUERY_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [int(line) << 20 for line in done.stdout.split() if line.isdigit()]


def open_file_limit() -> tuple[int, int]:
    """Soft and hard."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)


def temporary_disk() -> tuple[Path, int, int]:
    """Where Ray keeps its session, and bytes in all and free there."""
    directory = Path(tempfile.gettempdir())
    usage = shutil.disk_usage(directory)
    return directory, usage.total, usage.free
