"""Ray nodes that somebody else started, for tests that join them: `ray start` in processes of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil
from fault_parts import gone

TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64, "RAY_USAGE_STATS_ENABLED": "0"}
RAY = str(Path(sys.executable).with_name("ray"))
FREE_CPUS = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False)
print(ray.available_resources()["CPU"])
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_node(command: Sequence[str], env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """The `ray start --block` of a node that is up.

    Args:
        env: this environment, with `TOKEN`, without it.

    Raises:
        AssertionError: it ended; with what it wrote.
    """
    node = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | TOKEN if env is None else env,
        start_new_session=True,
    )
    lines = []
    try:
        assert node.stdout is not None
        for line in node.stdout:
            lines.append(line)
            if "Ray runtime started" in line:
                return node
        raise AssertionError("".join(lines))
    except BaseException:
        kill_node(node)
        raise


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
    """Kinds of a run's actors on a node."""
    kinds = ("Sampler", "LearnerRank", "RewardActor")
    titles = [" ".join(process.cmdline()) for process in processes_of(node) if not gone(process)]
    return {kind for kind in kinds if any(title.startswith(f"ray::{kind}") for title in titles)}


@contextlib.contextmanager
def ray_head(*arguments: str) -> Iterator[str]:
    """Address of a head with two CPUs that asks for `TOKEN`; it is gone, with all it left, after the block."""
    port = free_port()
    session = tempfile.mkdtemp(prefix="wrl-head-")
    own = [f"--port={port}", "--num-cpus=2", f"--temp-dir={session}", "--include-dashboard=false", "--block"]
    try:
        node = start_node([RAY, "start", "--head", *own, *arguments])
        try:
            yield f"127.0.0.1:{port}"
        finally:
            kill_node(node)
    finally:
        shutil.rmtree(session, ignore_errors=True)
