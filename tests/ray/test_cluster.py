"""Joining a Ray cluster that somebody else started, and leaving it as it was."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY, run
from ray_nodes import FREE_CPUS, TOKEN, free_port

from weaver_rl.run_folder import RunFolder

pytest_plugins = ("head_fixtures",)
pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


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
        "train", str(TINY), f"run_dir={tmp_path / 'run'}", "--address", f"127.0.0.1:{free_port()}", timeout_s=120
    )
    assert ended.status == 2, ended.output
    assert "no Ray cluster answers" in ended.output
    assert "Traceback" not in ended.output
