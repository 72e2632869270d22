"""`weaver-rl train` as a process of its own, and what its run folder says afterwards. It judges nothing."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

END_S = 60.0


@contextlib.contextmanager
def going(config: Path, run_dir: Path, overrides: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Starts a run on a cluster of its own. After the block it has ended, and everything that it started too."""
    main = "from weaver_rl.cli import main; main()"
    command = [sys.executable, "-c", main, "train", str(config), f"run_dir={run_dir}", "cluster.address=local"]
    environment = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "RAY_ADDRESS")}
    with log_of(run_dir).open("wb") as log:
        process = subprocess.Popen(
            [*command, *overrides], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            started = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_S)
            for left in started:
                with contextlib.suppress(psutil.Error):
                    left.kill()
            process.wait()


def train(config: Path, run_dir: Path, overrides: Sequence[str], timeout_s: float) -> None:
    """Runs it to its end. Raises RuntimeError with its last words when that is not `finished` in time."""
    with going(config, run_dir, overrides) as process:
        require_finished(process, run_dir, timeout_s)


def require_finished(process: subprocess.Popen[bytes], run_dir: Path, timeout_s: float) -> None:
    try:
        status = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"weaver-rl train was not done within {timeout_s:g} s:\n{last_words(run_dir)}") from None
    if status != 0:
        raise RuntimeError(f"weaver-rl train ended with status {status}:\n{last_words(run_dir)}")


def log_of(run_dir: Path) -> Path:
    return run_dir.with_name(f"{run_dir.name}.log")


def last_words(run_dir: Path) -> str:
    return log_of(run_dir).read_text(errors="replace")[-3000:]


def train_steps(run_dir: Path) -> list[dict[str, Any]]:
    """Metrics of the steps of reinforcement learning so far; none before the first."""
    with contextlib.suppress(FileNotFoundError):
        # The last line may be half written.
        lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
        steps = [json.loads(line) for line in lines if line.endswith("\n")]
        return [step for step in steps if step["phase"] == "train" and step["step"] > 0]
    return []
