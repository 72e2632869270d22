"""Whether an event loop still turns, seen from another thread, and where in the code it stands if not."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[1]
OWN = tuple(str(ROOT / package) + "/" for package in ("weaver_rl", "actors"))


class LoopWatch:
    """Asks a loop for a sign of life at every `seconds_blocked`. Made in the thread of the loop, asked in any."""

    def __init__(self, loop: asyncio.AbstractEventLoop, clock: Callable[[], float]) -> None:
        self._loop = loop
        self._thread_id = threading.get_ident()
        self._clock = clock
        self._asked_at: float | None = None

    def seconds_blocked(self) -> float:
        """For how long the loop has owed its answer to an earlier question."""
        asked_at = self._asked_at
        if asked_at is not None:
            return self._clock() - asked_at
        self._asked_at = self._clock()
        try:
            self._loop.call_soon_threadsafe(self._answer)
        except RuntimeError:  # the loop is closed, it owes nothing any more
            self._asked_at = None
        return 0.0

    def excuse(self) -> None:
        """The whole process stood still: what the loop owes is asked anew."""
        self._asked_at = None

    def place(self) -> str:
        """Where the loop's thread stands: file, line and function of ours, and what that has called."""
        frame = sys._current_frames().get(self._thread_id)
        return "code that is not Python's" if frame is None else describe_stack(frame, OWN)

    def _answer(self) -> None:
        self._asked_at = None


def describe_stack(innermost: FrameType, own: tuple[str, ...]) -> str:
    """`weaver_rl/tasks/prompts.py:120 render`, and `in json/decoder.py:355 raw_decode` where it stands deeper."""
    frame: FrameType | None = innermost
    while frame is not None and not frame.f_code.co_filename.startswith(own):
        frame = frame.f_back
    if frame is None or frame is innermost:
        return _named(innermost)
    return f"{_named(frame)} (in {_named(innermost)})"


def _named(frame: FrameType) -> str:
    path = Path(frame.f_code.co_filename)
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path(*path.parts[-2:])
    return f"{shown}:{frame.f_lineno} {frame.f_code.co_name}"
