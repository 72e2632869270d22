"""Joining a Ray cluster that somebody else started, and leaving it as it was."""

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
import pytest
from conftest import TINY, run

from weaver_rl.run_folder import RunFolder

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64, "RAY_USAGE_STATS_ENABLED": "0"}
RAY = str(Path(sys.executable).with_name("ray"))


FREE_CPUS = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False)
print(ray.available_resources()["CPU"])
"""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def head() -> Iterator[str]:
    """Address of a Ray head of our own, with two CPUs, in processes of its own."""
    port = _free_port()
    session = tempfile.mkdtemp(prefix="wrl-head-")
    arguments = [f"--port={port}", "--num-cpus=2", f"--temp-dir={session}", "--include-dashboard=false", "--block"]
    process = subprocess.Popen(
        [RAY, "start", "--head", *arguments],
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


def test_a_run_joins_a_cluster_and_leaves_it_running(head: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    ended = run("train", str(TINY), f"run_dir={folder.path}", "num_steps=1", "--address", head, env=TOKEN)
    assert ended.status == 0, ended.output
    status = folder.read_status()
    assert status is not None
    assert status.state == "finished"
    seen = subprocess.run(
        [sys.executable, "-c", FREE_CPUS, head],
        env=os.environ | TOKEN,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert seen.stdout.split()[-1] == "2.0", seen


def test_an_address_where_nothing_answers_is_an_error(tmp_path: Path) -> None:
    ended = run(
        "train", str(TINY), f"run_dir={tmp_path / 'run'}", "--address", f"127.0.0.1:{_free_port()}", timeout_s=120
    )
    assert ended.status == 2, ended.output
    assert "no Ray cluster answers" in ended.output
    assert "Traceback" not in ended.output
