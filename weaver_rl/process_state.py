"""What the operating system says of a process: running, stopped, gone. It does not know what the process is for."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil

from weaver_rl.wait_chain import Fact

SAME_START_S = 2.0
"""How far two readings of one process's start may differ: they come from a boot time in whole seconds that is adjusted
with the clock."""

RUNNING = "running"
DISK = "waiting for disk"
STOPPED = "stopped (SIGSTOP)"
TRACED = "stopped by a debugger"
ZOMBIE = "zombie"
GONE = "gone"
ALARMING = frozenset({STOPPED, TRACED, ZOMBIE, GONE})

_STATES = {
    psutil.STATUS_STOPPED: STOPPED,
    psutil.STATUS_TRACING_STOP: TRACED,
    psutil.STATUS_ZOMBIE: ZOMBIE,
    psutil.STATUS_DEAD: GONE,
    psutil.STATUS_DISK_SLEEP: DISK,
}


def process_state(pid: int, started_at: float | None = None) -> str:
    """The state of a process of this machine.

    Args:
        started_at: when it was started, in seconds since the epoch, as `start_time` gave it: a process that has got
            the same number since is not taken for it.
    """
    try:
        process = psutil.Process(pid)
        if started_at is not None and abs(process.create_time() - started_at) > SAME_START_S:
            return GONE
        return _STATES.get(process.status(), RUNNING)
    except psutil.NoSuchProcess:
        return GONE


def start_time(pid: int) -> float | None:
    """When a process of this machine was started, in seconds since the epoch; None when there is no such process."""
    try:
        return float(psutil.Process(pid).create_time())
    except psutil.NoSuchProcess:
        return None


class ProcessFacts:
    """For `Waits.describe`: the state of one process, and for how long it is known to be in it.

    Example:
        waits.describe("reward worker 2", ProcessFacts(4711))   # "pid 4711 gone 12 s ago"
    """

    def __init__(self, pid: int, started_at: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._pid = pid
        # 0.0, long before any process: one that is gone already must not become whoever gets its number next.
        self._started_at = (start_time(pid) or 0.0) if started_at is None else started_at
        self._clock = clock
        self._state = RUNNING
        self._seen_at = clock()

    def __call__(self) -> Fact:
        """Seconds count from the first call that saw the state, so ask now and then."""
        state = process_state(self._pid, self._started_at)
        if state != self._state:
            self._state, self._seen_at = state, self._clock()
        if state not in ALARMING:
            return Fact(text=f"pid {self._pid} {state}")
        seconds = f"{self._clock() - self._seen_at:.0f} s"
        since = f"{seconds} ago" if state == GONE else f"for {seconds}"
        return Fact(text=f"pid {self._pid} {state} {since}", alarming=True)
