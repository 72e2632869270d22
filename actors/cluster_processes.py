"""The processes of a Ray cluster on this machine, found by its session's directory, and their end.

It never ends a process that does not carry the mark of that session. It knows nothing of nodes or of Ray's own tools.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

SESSION_MARK = "WEAVER_RL_CLUSTER_SESSION"
"""In the environment of `ray start`, from which everything of the cluster inherits it."""
SHARED_MEMORY = "/dev/shm/"
LOOK_EVERY_S = 0.1
END_BY_THEMSELVES_S = 6.0
"""Once their node ends: a killed process could not remove what it holds outside of Ray."""
TERMINATE_WITHIN_S = 4.0
KILL_WITHIN_S = 10.0


def processes_of(session: str) -> list[psutil.Process]:
    """Live processes of this user that belong to the session, and their descendants."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        with contextlib.suppress(psutil.Error, OSError):
            if _is_live(process) and process.uids().real == os.getuid() and _carries(process, session):
                found[process.pid] = process
                for child in process.children(recursive=True):
                    if _is_live(child) and child.pid != os.getpid():
                        found.setdefault(child.pid, child)
    return list(found.values())


def end_session(session: str, first: Iterable[psutil.Process] = ()) -> list[psutil.Process]:
    """Ends every process of the session, asking before killing; then removes its shared memory.

    Args:
        first: those that end the others in good order.

    Returns:
        Processes that are still there (in the kernel's hands).
    """
    segments = _segments_of(processes_of(session))
    _send(signal.SIGTERM, first)
    left = _wait_for_end(session, segments, END_BY_THEMSELVES_S)
    _send(signal.SIGTERM, left)
    left = _wait_for_end(session, segments, TERMINATE_WITHIN_S)
    end = time.monotonic() + KILL_WITHIN_S
    # Again and again: one that was just being started is seen only now.
    while left and time.monotonic() < end:
        _send(signal.SIGKILL, left)
        left = _wait_for_end(session, segments, LOOK_EVERY_S)
    _remove_segments(segments)
    return left


def _send(number: signal.Signals, processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)


def _wait_for_end(session: str, segments: set[str], timeout_s: float) -> list[psutil.Process]:
    end = time.monotonic() + timeout_s
    while left := processes_of(session):
        segments |= _segments_of(left)
        if time.monotonic() >= end:
            break
        time.sleep(LOOK_EVERY_S)
    return left


def _is_live(process: psutil.Process) -> bool:
    return bool(process.status() != psutil.STATUS_ZOMBIE)


def _carries(process: psutil.Process, session: str) -> bool:
    """By its environment; where a title has overwritten that, by a file that it writes in the session's directory.

    Others write there too: a notebook that joined the cluster keeps its logs there, somebody may edit one.
    """
    with contextlib.suppress(psutil.Error, OSError):
        environment = process.environ()
        if "PATH" in environment:
            return bool(environment.get(SESSION_MARK) == session)
    with contextlib.suppress(psutil.Error, OSError):
        written = (file.path for file in process.open_files() if file.mode != "r")
        return process.terminal() is None and any(path.startswith(f"{session}/") for path in written)
    return False


def _segments_of(processes: Iterable[psutil.Process]) -> set[str]:
    """Files of shared memory that are mapped by these processes."""
    found = set()
    for process in processes:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines():
                path = line.partition(SHARED_MEMORY)[2]
                if path and not path.endswith(" (deleted)"):
                    found.add(SHARED_MEMORY + path)
    return found


def _remove_segments(segments: set[str]) -> None:
    """Of killed processes, which no living one of this user maps."""
    if not segments:
        return
    in_use = _segments_of(psutil.process_iter())
    for segment in segments - in_use:
        with contextlib.suppress(OSError):
            if os.stat(segment).st_uid == os.getuid():  # noqa: PTH116  a name in /dev/shm, no path of the user
                os.unlink(segment)  # noqa: PTH108
