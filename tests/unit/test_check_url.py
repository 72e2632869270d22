"""What `weaver-rl check` says of a run folder at a URL, and what it leaves there."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import fsspec
import pytest
from check_parts import a_run, lines

from weaver_rl.check.finding import Finding
from weaver_rl.check.run_space import check_run_space
from weaver_rl.lease import NAME, LeaseRecord
from weaver_rl.remote_folder import RemoteFolder

pytestmark = pytest.mark.unit
URL = "memory://runs/checked"


@pytest.fixture(autouse=True)
def store() -> Iterator[None]:
    yield
    files = fsspec.filesystem("memory")
    if files.exists("/runs/checked"):
        files.rm("/runs/checked", recursive=True)


def run_dir(url: str) -> Finding:
    return lines(check_run_space(a_run(f"run_dir={url}")))["run_dir"]


@pytest.mark.parametrize(("silent_s", "level"), [(3.0, "fail"), (1000.0, "warn")])
def test_a_url_in_use_by_a_live_run_is_a_failure_that_says_by_whom(silent_s: float, level: str):
    holder = LeaseRecord(
        holder="h", staging="s", host="node-7", machine="another", pid=4711, renewed_at=time.time() - silent_s
    )
    remote = RemoteFolder(URL)
    remote.write(NAME, json.dumps(asdict(holder)).encode())
    remote.write("run.json", b"{}")
    found = run_dir(URL)
    assert found.level == level
    is_named = f"{URL} is in use by a live run (process 4711 on node-7, which said so 3 s ago)" in found.seen
    assert is_named == (level == "fail")


def test_directories_that_were_made_for_the_check_are_removed(tmp_path: Path):
    assert run_dir(f"file://{tmp_path}/a/b").level == "pass"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty").mkdir()
    assert run_dir(f"file://{tmp_path}/empty").level == "pass"
    assert run_dir(f"file://{tmp_path}/empty/new").level == "pass"
    assert list(tmp_path.rglob("*")) == [tmp_path / "empty"]


def test_a_directory_that_was_tried_can_still_be_written(tmp_path: Path):
    remote = RemoteFolder(f"file://{tmp_path}/a/b")
    remote.try_write(".probe")
    remote.write("x", b"1")
    assert (tmp_path / "a" / "b" / "x").read_bytes() == b"1"
