"""Run as a program beside a driver that started a Ray of its own: when the driver is killed, it ends what is left.

Most of Ray's processes end with the driver by themselves, but its agents try for a minute to report that. It knows a
session's directory and nothing else of a run.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

END_BY_THEMSELVES_S = 5.0
LOOK_EVERY_S = 0.2


def main(session: Path) -> None:
    """Waits for the end of standard input, which the driver holds open; a driver that ends well kills this before."""
    sys.stdin.buffer.read()
    deadline = time.monotonic() + END_BY_THEMSELVES_S
    while (left := list(_processes_of(session))) and time.monotonic() < deadline:
        time.sleep(LOOK_EVERY_S)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=END_BY_THEMSELVES_S)
    shutil.rmtree(session, ignore_errors=True)


def _processes_of(session: Path) -> Iterator[psutil.Process]:
    """Those that name the directory in their arguments (Ray overwrites these later) or log into it."""
    this = psutil.Process()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):  # it ends while it is looked at, or is another user's
            if process == this or process.status() == psutil.STATUS_ZOMBIE:
                continue
            named = any(str(session) in argument for argument in process.cmdline())
            if named or any(file.path.startswith(f"{session}/") for file in process.open_files()):
                yield process


if __name__ == "__main__":
    main(Path(sys.argv[1]))
