"""How much memory the first call of something takes, in the process that asks. Linux only; it knows no model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """One call."""

    peak_mib: float
    """High-water mark of resident memory during the call, everything loaded before it included."""
    growth_mib: float
    """The same less what was resident before the call."""
    seconds: float
    result: float


def build_peak(build: Callable[..., Callable[[], float]], *arguments: Any) -> Callable[[], Peak]:
    """Builds the call; its peak starts at what is resident once it is built."""
    call = build(*arguments)

    def measured() -> Peak:
        # Loading may have needed more for a moment; 5 makes the kernel start the mark again from now.
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_mib("VmRSS")
        started = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - started
        peak = _status_mib("VmHWM")
        return Peak(peak_mib=peak, growth_mib=peak - before, seconds=seconds, result=result)

    return measured


def _status_mib(name: str) -> float:
    # `ru_maxrss` would do, but a child inherits its parent's.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {name}: this system does not tell how much memory is resident")
