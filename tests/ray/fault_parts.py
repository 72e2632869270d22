"""A run of the command that goes on while a test disturbs it: its processes, its journal, and how far it may go.

It waits for what the run writes down, never for a time.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil
from conftest import COMMAND, REPOSITORY, TINY, Ended

from weaver_rl.audit import AuditReport, audit
from weaver_rl.errors import JournalError
from weaver_rl.journal import JournalEvent, read_events
from weaver_rl.live_state import LiveState, read_live_state
from weaver_rl.rollout_files import RecordedRollout, read_rollouts
from weaver_rl.run_folder import RunFolder

T = TypeVar("T")

FIRST_STEP = 2
"""Of reinforcement learning, after one step of warm start."""
DEADLINE_S = 240.0
"""Several times an engine's start on a machine that is busy with other things."""
LOOK_EVERY_S = 0.05
ENDED_WITHIN_S = 30.0
"""After a run nothing of it may live longer."""

BASE = (
    "warm_start={num_steps: 1, prompts_per_step: 16, learning_rate: 3.0e-3}",
    "eval.every=0",
    "eval.num_prompts=2",
    "checkpoint={every: 1, keep: 100}",
)
LONG = ("model.max_position_embeddings=512", "rollout.sampling.max_tokens=300")
"""Completions of seconds: while the gate is open a sampler is at work most of the time."""
HALF_CPUS = ("sampler.num_cpus=0.5", "learner.num_cpus=0.5")
FAULTY = (sys.executable, str(Path(__file__).with_name("faulty_run.py")))
"""`weaver-rl` with samplers that have faults of their own; see faulty_sampler.py."""


class Gate:
    """While it is closed, nothing is scored and so no step is trained; it is closed at first."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.close()

    @property
    def rewards(self) -> str:
        """The rewards of a run that stops at the gate."""
        gated = f"{{name: 'fault_rewards.py:Gated', args: {{gate: '{self._path}'}}, timeout_s: 300, weight: 0.1}}"
        return f"rewards=[{{name: task}}, {gated}]"

    def close(self) -> None:
        self._path.touch()

    def open(self) -> None:
        self._path.unlink(missing_ok=True)


@dataclass
class GoingRun:
    """A `weaver-rl train` that was started."""

    folder: RunFolder
    gate: Gate
    process: subprocess.Popen[str]
    log: Path
    seen: set[psutil.Process] = field(default_factory=set)
    """Every process of the run that was met."""

    # -- what it says ----------------------------------------------------------------------------------------------

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def events(self, kind: str = "", after: int = 0) -> list[JournalEvent]:
        """Of the journal, later than number `after`."""
        try:
            return [event for event in read_events(self.folder.journal, after) if kind in ("", event.kind)]
        except JournalError:
            return []

    def noted(self, subject: str, what: str, after: int = 0) -> list[JournalEvent]:
        return [e for e in self.events("noted", after) if (e.detail["subject"], e.detail["what"]) == (subject, what)]

    def now(self) -> int:
        """Number of the newest event."""
        return max((event.seq for event in self.events()), default=0)

    def live(self) -> LiveState | None:
        live = read_live_state(self.folder.live_file)
        return live if live is not None and live.pid == self.process.pid else None

    def samplers(self) -> dict[str, dict[str, Any]]:
        live = self.live()
        return {facts["name"]: facts for facts in live.facts.get("samplers", ())} if live is not None else {}

    def step(self) -> int:
        """The newest step that trained, of the history that stands."""
        newest = 0
        for event in self.events():
            if event.kind == "trained":
                newest = event.step or 0
            elif event.kind == "rewound":
                newest = min(newest, event.step or 0)
        return newest

    def audit(self) -> AuditReport:
        return audit(self.folder.path)

    def trained(self) -> list[RecordedRollout]:
        return [record for record in read_rollouts(self.folder.path) if record.phase == "train"]

    # -- waiting ---------------------------------------------------------------------------------------------------

    def until(self, what: str, found: Callable[[], T], timeout_s: float = DEADLINE_S) -> T:
        """What `found` returns once it is true; fails when the run ends before."""
        end = time.monotonic() + timeout_s
        while not (result := found()):
            ended = self.process.poll() is not None
            if ended or time.monotonic() > end:
                if result := found():
                    break
                why = f"ended with {self.process.returncode}" if ended else f"went on for {timeout_s:g} s"
                raise AssertionError(f"the run {why} without: {what}\n{self.live()}\n{self.output[-6000:]}")
            time.sleep(LOOK_EVERY_S)
        return result

    def trains(self, num_steps: int = 1) -> None:
        """Lets the run go on for at least so many steps, then closes the gate."""
        step = self.step() + num_steps
        self.gate.open()
        self.until(f"step {step} trained", lambda: self.step() >= step)
        self.gate.close()

    def serves(self, *names: str) -> None:
        """Waits until these samplers serve."""
        self.until(
            f"{names} serving",
            lambda: all(self.samplers().get(name, {}).get("doing", "").startswith("serving") for name in names),
        )

    def ends(self, timeout_s: float = DEADLINE_S) -> Ended:
        """Opens the gate and waits for the end, then for that of every process that was met."""
        self.processes()
        self.gate.open()
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end within {timeout_s:g} s\n{self.live()}\n{self.output[-6000:]}") from None
        self.leaves_no_process()
        return Ended(self.process.returncode, self.output)

    # -- its processes ---------------------------------------------------------------------------------------------

    def processes(self) -> list[psutil.Process]:
        """All of them, the driver first."""
        found = [driver := psutil.Process(self.process.pid), *driver.children(recursive=True)]
        self.seen.update(found)
        return found

    def leaves_no_process(self) -> None:
        """Waits for the end of every process that was met."""
        end = time.monotonic() + ENDED_WITHIN_S
        while (alive := [process for process in self.seen if not gone(process)]) and time.monotonic() < end:
            time.sleep(LOOK_EVERY_S)
        assert not alive, alive

    def actors(self, kind: str) -> list[psutil.Process]:
        """Processes of the actors of a class, by Ray's title of them, the oldest first."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if process.cmdline() and process.cmdline()[0].startswith(f"ray::{kind}") and not gone(process):
                    found.append(process)
        return sorted(found, key=lambda process: process.create_time())

    def sampler(self, name: str) -> psutil.Process:
        """Its process, once the folder tells of one that lives: what it tells may be seconds old."""

        def living() -> psutil.Process | None:
            pid = self.samplers().get(name, {}).get("pid")
            try:
                return psutil.Process(pid) if pid else None
            except psutil.NoSuchProcess:
                return None

        found: psutil.Process = self.until(f"the process of {name}", living)
        return found

    def stop_at_work(self, *names: str) -> list[psutil.Process]:
        """Stops samplers (SIGSTOP) while at least one owes groups; lets the run go on until that is so."""
        processes = [self.sampler(name) for name in names]
        for _ in range(10):
            before = self.now()
            self.gate.open()
            self.until("groups dispatched", lambda before=before: self.events("dispatched", before))
            for process in processes:
                process.suspend()
            self.gate.close()
            stopped_at = time.time()
            self.until("a look after the stop", lambda at=stopped_at: (s := self.live()) and s.time_s > at + 1)
            if any("owes 0" not in self.samplers()[name]["doing"] for name in names):
                return processes
            for process in processes:
                process.resume()
        raise AssertionError(f"{names} never had work when they were stopped\n{self.output[-3000:]}")


@contextlib.contextmanager
def going(
    folder: Path,
    gate: Gate,
    *arguments: str,
    program: Sequence[str] = tuple(COMMAND),
    env: Mapping[str, str] | None = None,
) -> Iterator[GoingRun]:
    """Starts `weaver-rl train tests/ray/tiny.yaml` in `folder`; whatever of it is left after the block is killed."""
    log = folder.with_suffix(f".{time.monotonic_ns()}.log")
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with log.open("w") as output:
        process = subprocess.Popen(
            [*program, "train", str(TINY), f"run_dir={folder}", gate.rewards, *BASE, *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=REPOSITORY,
            env=environment | {"COLUMNS": "200"} | dict(env or {}),
            start_new_session=True,
        )
    it = GoingRun(RunFolder(folder), gate, process, log)
    try:
        yield it
    finally:
        if process.poll() is None:
            it.processes()
        for left in it.seen:
            with contextlib.suppress(psutil.Error):
                left.kill()
        process.wait()


def kill(*processes: psutil.Process) -> None:
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)


def gone(process: psutil.Process) -> bool:
    """Whether it has ended; a zombie has."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    return True
