"""A real Ray cluster of several nodes on this machine, for trying things: start, look, stop.

Every node is a `ray start --block` with a directory, resources and ports of its own. It ends what it started and
nothing else: `ray stop` would end every Ray of this user.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import ray
import requests
from ray.exceptions import AuthenticationError, RayError

from actors.cluster_processes import SESSION_MARK, end_session, processes_of
from actors.signals import StopSignals
from weaver_rl.errors import ConfigError, ResourcesError
from weaver_rl.local_clusters import TOKEN, TOKEN_MODE, TOKEN_PATH, ClusterFiles, ClusterNode, LocalCluster
from weaver_rl.process_state import ALARMING, GONE, ZOMBIE, process_state, start_time

SESSION_PREFIX = "weaver-rl-"
START_WITHIN_S = 90.0
LOOK_EVERY_S = 0.1
STARTED = "Ray runtime started"
OBJECT_STORE_SHARE = 0.3
MIN_OBJECT_STORE_MB = 80
FOREIGN = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_DASHBOARD_ADDRESS", TOKEN)
"""Variables of the user's that speak of another cluster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterShape:
    """What a cluster shall be like.

    Example:
        ClusterShape(num_nodes=3, cpus_per_node=1)
    """

    num_nodes: int = 1
    cpus_per_node: int | None = None
    """None: the machine's, shared out."""
    port: int | None = None
    """Of the head; None: a free one."""
    dashboard_port: int | None = None
    object_store_mb: int | None = None
    """Of each node; None: three tenths of the memory, shared out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterLook:
    """How a cluster stands.

    Example:
        ClusterLook(nodes=(look,), problem="")
    """

    nodes: tuple[NodeLook, ...]
    problem: str
    """Why Ray could not be asked though the head lives; empty when it answered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeLook:
    """How one node stands."""

    node: ClusterNode
    state: str
    """Of its `ray start` process: running, gone, …"""
    total: dict[str, float]
    free: dict[str, float]
    """Both empty where Ray does not count the node as alive."""

    @property
    def serves(self) -> bool:
        """Ray notices the end of a node only after a while."""
        return bool(self.total) and self.state not in ALARMING


def start_cluster(files: ClusterFiles, shape: ClusterShape) -> LocalCluster:
    """Starts a cluster and returns when every node has joined; when that fails or is interrupted nothing is left.

    Raises:
        ConfigError: one of that name runs, or a port is taken.
        ResourcesError: Ray did not start; says what it printed.
    """
    with StopSignals() as stop, files.locked():
        before = files.read()
        if before is not None:
            _refuse_live(before)
            _end(before)
        host = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        port, dashboard_port = _port(shape.port, "--port"), _port(shape.dashboard_port, "--dashboard-port")
        cluster = LocalCluster(
            name=files.name,
            session=tempfile.mkdtemp(prefix=SESSION_PREFIX),
            address=f"{host}:{port}",
            dashboard=f"http://127.0.0.1:{dashboard_port}",
            token_file=str(files.token),
        )
        try:
            files.write_token(secrets.token_hex(32))
            # Before the first process: a later `stop` finds what there is even if this one is killed.
            files.write(cluster)
            cluster = _start_nodes(files, cluster, shape, stop)
            _wait_for_dashboard(cluster)
            cluster = replace(cluster, ready=True)
            files.write(cluster)
            stop.check()
        except BaseException:  # boundary: cleans up, then raises again
            with stop.deferred():
                _end(files.read() or cluster)
                files.remove()
            raise
    return cluster


def stop_cluster(files: ClusterFiles) -> bool:
    """Ends every process of the cluster and removes its files; returns whether there was one.

    Raises:
        ResourcesError: a process does not end.
    """
    with StopSignals() as stop, files.locked():
        cluster = files.read()
        if cluster is None:
            return False
        with stop.deferred():
            _end(cluster)
            files.remove()
    return True


def is_live(cluster: LocalCluster) -> bool:
    """Whether any process of it is there."""
    return bool(_live_nodes(cluster) or processes_of(cluster.session))


def look_at(cluster: LocalCluster) -> ClusterLook:
    """Every node with its resources; connects to the cluster if its head lives."""
    states = {node.name: process_state(node.pid, node.started_at) for node in cluster.nodes}
    total: dict[str, dict[str, float]] = {}
    free: dict[str, dict[str, float]] = {}
    problem = ""
    if cluster.nodes and states[cluster.nodes[0].name] not in ALARMING:
        try:
            total, free = _resources(cluster)
        except ResourcesError as error:
            problem = str(error)
    nodes = tuple(
        NodeLook(node=node, state=states[node.name], total=total.get(node.name, {}), free=free.get(node.name, {}))
        for node in cluster.nodes
    )
    return ClusterLook(nodes=nodes, problem=problem)


def _resources(cluster: LocalCluster) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    from ray._private.state import available_resources_per_node  # there is no public one by node

    try:
        host, _, port = cluster.address.rpartition(":")
        socket.create_connection((host, int(port)), timeout=5.0).close()
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    except AuthenticationError as error:
        reason = " ".join(error.message.split())
        raise ResourcesError(f"{cluster.address} refused the token in {cluster.token_file} ({reason})") from None
    except (OSError, RuntimeError, ValueError, RayError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ResourcesError(f"{cluster.address} does not answer ({reason})") from None
    try:
        nodes: list[dict[str, Any]] = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        free: dict[str, dict[str, float]] = available_resources_per_node()  # type: ignore[no-untyped-call]
        return (
            {node["NodeName"]: node["Resources"] for node in nodes},
            {node["NodeName"]: free.get(node["NodeID"], {}) for node in nodes},
        )
    finally:
        ray.shutdown()


def _start_nodes(files: ClusterFiles, cluster: LocalCluster, shape: ClusterShape, stop: StopSignals) -> LocalCluster:
    cpus = shape.cpus_per_node or max(1, (os.cpu_count() or 1) // shape.num_nodes)
    store = shape.object_store_mb or _object_store_mb(shape.num_nodes)
    for index in range(shape.num_nodes):
        # A process that is not yet written down would be nobody's.
        with stop.deferred():
            node = _start_node(cluster, index, cpus, store)
            cluster = replace(cluster, nodes=(*cluster.nodes, node))
            files.write(cluster)
        stop.check()
        if index == 0:
            _wait_for_node(node, stop)
    for node in cluster.nodes[1:]:
        _wait_for_node(node, stop)
    return cluster


def _start_node(cluster: LocalCluster, index: int, cpus: int, store_mb: int) -> ClusterNode:
    name = f"{cluster.name}-{index}"
    # Short: paths of sockets below it may have 107 characters at most.
    directory = Path(cluster.session) / str(index)
    directory.mkdir()
    log = Path(cluster.session) / f"{index}.log"
    arguments = [
        *_place(cluster, index),
        f"--node-name={name}",
        f"--temp-dir={directory}",
        f"--num-cpus={cpus}",
        f"--object-store-memory={store_mb * 2**20}",
        f"--dashboard-agent-listen-port={_free_port()}",
        # Any free one: the usual range is the same for every node, and these share a machine.
        "--min-worker-port=0",
        "--max-worker-port=0",
        "--block",
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(cluster),
            cwd=directory,
            start_new_session=True,  # Ctrl-C in this terminal and its end are not meant for it
        )
    started_at = start_time(process.pid)
    return ClusterNode(name=name, pid=process.pid, started_at=started_at or 0.0, num_cpus=cpus, log=str(log))


def _place(cluster: LocalCluster, index: int) -> Sequence[str]:
    host, _, port = cluster.address.rpartition(":")
    if index > 0:
        # GPUs belong to the head: every node would count all of the machine's as its own.
        return (f"--address={cluster.address}", f"--node-ip-address={host}", "--num-gpus=0")
    dashboard = cluster.dashboard.rpartition(":")[2]
    return (
        "--head",
        f"--port={port}",
        f"--node-ip-address={host}",
        f"--dashboard-port={dashboard}",
        "--dashboard-host=127.0.0.1",
        f"--ray-client-server-port={_free_port()}",
    )


def _environment(cluster: LocalCluster) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in FOREIGN}
    # Jobs are started by name: `weaver-rl` must be that of this environment though nobody activated it.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return kept | {
        "PATH": path,
        TOKEN_MODE: "token",
        TOKEN_PATH: cluster.token_file,
        SESSION_MARK: cluster.session,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }


def _wait_for_node(node: ClusterNode, stop: StopSignals) -> None:
    end = time.monotonic() + START_WITHIN_S
    while STARTED not in Path(node.log).read_text(errors="replace"):
        stop.check()
        state = process_state(node.pid, node.started_at)
        late = time.monotonic() > end
        if state in ALARMING or late:
            why = f"did not start within {START_WITHIN_S:g} s" if late else f"ended at its start ({state})"
            raise ResourcesError(f"node {node.name} {why}; it printed:\n{_tail(Path(node.log))}")
        time.sleep(LOOK_EVERY_S)


def _wait_for_dashboard(cluster: LocalCluster) -> None:
    """Jobs can be submitted only when it answers."""
    end = time.monotonic() + START_WITHIN_S
    headers = {"Authorization": f"Bearer {Path(cluster.token_file).read_text()}"}
    reason = "no answer"
    while time.monotonic() < end:
        try:
            answer = requests.get(f"{cluster.dashboard}/api/version", headers=headers, timeout=5.0)
            if answer.ok:
                return
            reason = f"status {answer.status_code}"
        except requests.RequestException as error:
            reason = type(error).__name__
        time.sleep(LOOK_EVERY_S)
    raise ResourcesError(
        f"the dashboard of cluster {cluster.name!r} does not answer at {cluster.dashboard} ({reason}); it printed:\n"
        + _tail(Path(cluster.nodes[0].log))
    )


def _refuse_live(cluster: LocalCluster) -> None:
    if is_live(cluster):
        option = "" if cluster.name == "default" else f" --name {cluster.name}"
        raise ConfigError(
            f"cluster {cluster.name!r} is there already ({len(_live_nodes(cluster))} of {len(cluster.nodes)} nodes "
            f"live, RAY_ADDRESS={cluster.address}). Use it, end it with `weaver-rl cluster stop{option}`, or start "
            "another with --name"
        )


def _live_nodes(cluster: LocalCluster) -> list[psutil.Process]:
    """The `ray start` processes that are really those."""
    found = []
    for node in cluster.nodes:
        if process_state(node.pid, node.started_at) not in (GONE, ZOMBIE):  # in a container nobody may reap it
            found.append(psutil.Process(node.pid))
    return found


def _end(cluster: LocalCluster) -> None:
    marked = {process.pid for process in processes_of(cluster.session)}
    # By number, start time and session: all three, or it is not ours to end.
    heads = [process for process in _live_nodes(cluster) if process.pid in marked]
    left = end_session(cluster.session, heads)
    if left:
        raise ResourcesError(
            f"processes of cluster {cluster.name!r} do not end: {', '.join(str(process.pid) for process in left)}. "
            "Run `weaver-rl cluster stop` again"
        )
    session = Path(cluster.session)
    if session.name.startswith(SESSION_PREFIX):
        shutil.rmtree(session, ignore_errors=True)


def _port(wanted: int | None, option: str) -> int:
    if wanted is None:
        return _free_port()
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", wanted))
        except OSError as error:
            raise ConfigError(
                f"{option} {wanted} cannot be had ({error.strerror}); give another, or leave it out for a free one"
            ) from None
    return wanted


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _object_store_mb(num_nodes: int) -> int:
    memory = min(psutil.virtual_memory().available, psutil.disk_usage("/dev/shm").free)
    return max(MIN_OBJECT_STORE_MB, int(memory * OBJECT_STORE_SHARE / num_nodes / 2**20))


def _tail(log: Path, num_lines: int = 15) -> str:
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-num_lines:])
    except OSError as error:
        return f"({log}: {error.strerror})"
