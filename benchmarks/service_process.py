"""`weaver-rl serve` as a process of its own: where it listens and what its processes use. It sends no request."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

CONFIG = Path(__file__).parents[1] / "configs" / "serve_quickstart.yaml"
START_TIMEOUT_S = 300.0
END_S = 60.0

ACTORS = {"learner": "ray::LearnerRank", "sampler": "ray::Sampler"}
"""How Ray titles their processes; a method that runs follows after a dot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A server that is up, with learner and engine of its base model."""

    url: str
    processes: dict[str, Any]
    """`psutil.Process` of "server", "learner" and "sampler"."""

    def cpu_s(self) -> dict[str, float]:
        """Processor seconds so far."""
        return {part: sum(process.cpu_times()[:2]) for part, process in self.processes.items()}

    def resident_mib(self) -> dict[str, float]:
        """Memory that would be free if the process ended (USS): what it shares with others does not count."""
        return {part: process.memory_full_info().uss / 2**20 for part, process in self.processes.items()}


@contextlib.contextmanager
def serving(state_dir: Path, overrides: Sequence[str] = ()) -> Iterator[Server]:
    """The quickstart's server, on a cluster of its own, without keys. After the block it has ended, and all it started.

    Raises:
        RuntimeError: with its last words; it did not start, or without its learner or engine.
    """
    main = "from weaver_rl.cli import main; main()"
    command = [sys.executable, "-c", main, "serve", str(CONFIG), f"state_dir={state_dir}", "http.port=0"]
    unwanted = ("OMP_NUM_THREADS", "RAY_ADDRESS", "WEAVER_RL_API_KEYS")
    environment = {name: value for name, value in os.environ.items() if name not in unwanted}
    log = state_dir.with_name(f"{state_dir.name}.log")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "cluster.address=local", *overrides],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # it is ended below, in order, not by a terminal's Ctrl-C
        )
    try:
        yield _ready(process, log)
    finally:
        _end(process)


def _ready(process: subprocess.Popen[bytes], log: Path) -> Server:
    deadline = time.monotonic() + START_TIMEOUT_S
    while "ready" not in (lines := log.read_text(errors="replace").splitlines()):
        if process.poll() is not None:
            raise RuntimeError(f"weaver-rl serve ended with status {process.returncode}:\n{_last_words(log)}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"weaver-rl serve was not ready within {START_TIMEOUT_S:g} s:\n{_last_words(log)}")
        time.sleep(0.1)
    if any(line.startswith("warning:") for line in lines):
        raise RuntimeError(f"weaver-rl serve is not whole:\n{_last_words(log)}")
    server = psutil.Process(process.pid)
    processes: dict[str, Any] = {"server": server}
    for child in server.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            title = " ".join(child.cmdline())
            processes |= {part: child for part, actor in ACTORS.items() if title.startswith(actor)}
    if missing := ACTORS.keys() - processes.keys():
        raise RuntimeError(f"weaver-rl serve runs without {', '.join(sorted(missing))}:\n{_last_words(log)}")
    return Server(url=next(line.rpartition(" at ")[2] for line in lines if " at http" in line), processes=processes)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_S)
    for left in started:
        with contextlib.suppress(psutil.Error):
            left.kill()
    process.kill()
    process.wait()


def _last_words(log: Path) -> str:
    return log.read_text(errors="replace")[-3000:]
