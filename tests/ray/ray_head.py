"""A Ray head that somebody else started, for tests that join it: `ray start` in processes of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

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


@contextlib.contextmanager
def ray_head(*arguments: str) -> Iterator[str]:
    """Address of a head with two CPUs that asks for `TOKEN`; it is gone, with all it left, after the block."""
    port = free_port()
    session = tempfile.mkdtemp(prefix="wrl-head-")
    own = [f"--port={port}", "--num-cpus=2", f"--temp-dir={session}", "--include-dashboard=false", "--block"]
    process = subprocess.Popen(
        [RAY, "start", "--head", *own, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | TOKEN,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if "Ray runtime started" in line:
                break
        yield f"127.0.0.1:{port}"
    finally:
        ours = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for started in ours:
            with contextlib.suppress(psutil.NoSuchProcess):
                started.kill()
        psutil.wait_procs(ours, timeout=10)
        shutil.rmtree(session, ignore_errors=True)
