"""Which processes belong to a cluster of `weaver-rl cluster start`: those that carry its mark, and no others."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from actors.cluster_processes import SESSION_MARK, processes_of

pytestmark = pytest.mark.unit

WRITES = "import sys; log = open(sys.argv[1], 'a'); print('open', flush=True); sys.stdin.read()"
Start = Callable[[dict[str, str]], subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a process without a terminal that writes a log in the session's directory."""
    started: list[subprocess.Popen[str]] = []

    def begin(environment: dict[str, str]) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", WRITES, str(tmp_path / "driver.log")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        return process

    yield begin
    for process in started:
        process.communicate()


def belong(session: Path) -> set[int]:
    return {process.pid for process in processes_of(str(session))}


def test_one_that_carries_the_mark_belongs(start: Start, tmp_path: Path):
    marked = start(os.environ | {SESSION_MARK: str(tmp_path)})
    other = start(os.environ | {SESSION_MARK: str(tmp_path / "other")})
    assert belong(tmp_path) == {marked.pid}
    assert other.poll() is None


def test_a_notebook_that_only_joined_and_logs_there_does_not(start: Start, tmp_path: Path):
    notebook = start(dict(os.environ))
    assert belong(tmp_path) == set()
    assert notebook.poll() is None


def test_one_whose_environment_is_overwritten_is_known_by_its_log(start: Start, tmp_path: Path):
    agent = start({})
    assert belong(tmp_path) == {agent.pid}
