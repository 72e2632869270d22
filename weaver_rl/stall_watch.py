"""Tells of stalls while they last, on the terminal and in live.json. It knows waits, not what a run is made of.

A thread, not a task: it must also tell when the event loop itself is what everything waits for.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from weaver_rl.live_state import LiveState, LiveWait
from weaver_rl.loop_watch import LoopWatch
from weaver_rl.run_folder import RunFolder
from weaver_rl.terminal import LiveView
from weaver_rl.wait_chain import Chain
from weaver_rl.waits import Waits

LATE_S = 5.0
"""A loop, or this watch itself, that is later than this did nothing meanwhile."""
UNNAMED = "controller waits for something that it did not name"
WAITS_SHOWN = 40
END_S = 5.0


class StallWatch:
    """Looks at the waits every `every_s` seconds while inside.

    Args:
        told_after_s: a root that has got nothing of what it waits for in this time is told, and what changes then.
        facts: what the run says of itself (see `LiveState.facts`). Called from the watch's thread.
        clock: that of `waits`.

    Example:
        with StallWatch(waits, view, folder) as watch:
            watch.watch_this_loop()
    """

    def __init__(
        self,
        waits: Waits,
        view: LiveView,
        folder: RunFolder,
        *,
        told_after_s: float = 15.0,
        every_s: float = 2.0,
        late_s: float = LATE_S,
        facts: Callable[[], Mapping[str, Any]] = dict,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._waits = waits
        self._view = view
        self._file = folder.live_file
        self._every_s = every_s
        self._late_s = late_s
        self._facts = facts
        self._clock = clock
        self._stall = _Stall(told_after_s)
        self._blocked = _Stall(late_s)
        self._loop: LoopWatch | None = None
        self._looked_at = clock()
        self._write_failed = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stall-watch", daemon=True)

    def watch_this_loop(self) -> None:
        """From now on a stand-still of the running event loop is told too; called in the loop's own thread."""
        self._loop = LoopWatch(asyncio.get_running_loop(), self._clock)

    def look(self) -> None:
        """Looks once: tells what is due and writes live.json. The thread does this over and over."""
        now = self._clock()
        late_s = now - self._looked_at - self._every_s
        if late_s > self._late_s:
            self._view.note(f"this process did nothing for {late_s:.0f} s: it was stopped, or given no processor time")
            self._stall.excuse(late_s)
            if self._loop is not None:
                self._loop.excuse()
        # All are asked, waited for or not: "gone 12 s ago" counts from the first look that saw it.
        alarms = self._waits.alarms()
        stall, seen = self._see(now)
        due = stall.look(seen, now)
        if seen is not None and due:
            self._view.note(f"stalled {stall.seconds:.0f} s: {seen.line}")
        self._write(seen.line if seen is not None else None, stall.seconds, alarms, now)
        self._looked_at = self._clock()  # after a look that took long: a terminal that takes no text is nobody's stop

    def _see(self, now: float) -> tuple[_Stall, _Seen | None]:
        """A loop that stands still explains every wait there is; else the chain does."""
        blocked_s = self._loop.seconds_blocked() if self._loop is not None else 0.0
        if self._loop is not None and blocked_s > self._late_s:
            line = f"controller is busy in {self._loop.place()} for {blocked_s:.0f} s"
            return self._blocked, _Seen(line=line, progress=("blocked",), substance=("blocked",), since=now - blocked_s)
        self._blocked.look(None, now)
        chain = self._waits.chain()
        if chain is not None:
            return self._stall, _Seen.of(chain)
        if self._loop is None:
            return self._stall, None
        return self._stall, _Seen(line=UNNAMED, progress=("unnamed",), substance=("unnamed",), since=now)

    def _write(self, line: str | None, seconds: float, alarms: Mapping[str, str], now: float) -> None:
        waits = self._waits.current()
        shown = tuple(
            LiveWait(owner=wait.owner, what=wait.what, seconds=now - wait.since, timeout_s=wait.timeout_s)
            for wait in waits[:WAITS_SHOWN]
        )
        state = LiveState(
            time_s=time.time(),
            pid=os.getpid(),
            chain=line,
            waited_s=seconds,
            alarms=alarms,
            waits=shown,
            num_waits=len(waits),
            facts=self._asked_facts(),
        )
        try:
            state.write(self._file)
            self._write_failed = False
        except OSError as error:
            if not self._write_failed:
                self._view.note(
                    f"{self._file} cannot be written ({error.strerror}); `weaver-rl status` shows older news"
                )
            self._write_failed = True

    def _asked_facts(self) -> Mapping[str, Any]:
        try:
            return dict(self._facts())
        except Exception as error:  # noqa: BLE001 - boundary: what the run says of itself must not end the watching
            return {"facts": f"not known ({type(error).__name__}: {error})"}

    def _watch(self) -> None:
        while not self._end.wait(self._every_s):
            self.look()

    def __enter__(self) -> Self:
        self._looked_at = self._clock()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join(END_S)  # longer only when the terminal takes no more text; a daemon, it ends with the process


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """What is waited for at one look."""

    line: str
    progress: tuple[object, ...]
    """Changes when something arrives."""
    substance: tuple[str, ...]
    """The line but for seconds."""
    since: float

    @staticmethod
    def of(chain: Chain) -> _Seen:
        return _Seen(line=chain.line, progress=chain.progress, substance=chain.substance, since=chain.links[0].since)


class _Stall:
    """How long nothing has arrived, and when to tell it: once, when the reason is a new one, then ever more rarely."""

    def __init__(self, told_after_s: float) -> None:
        self._told_after_s = told_after_s
        self._begin(None, 0.0)

    def _begin(self, seen: _Seen | None, since: float) -> None:
        self._seen = seen
        self._since = since
        self._told: set[tuple[str, ...]] = set()
        self._told_at = float("-inf")
        self._pause_s = self._told_after_s
        self.seconds = 0.0

    def excuse(self, seconds: float) -> None:
        """In this time nothing could arrive."""
        self._since += seconds

    def look(self, seen: _Seen | None, now: float) -> bool:
        """Whether what is seen is to be told."""
        if seen is None:
            self._begin(None, now)
            return False
        before = self._seen
        if before is None or before.progress != seen.progress:
            # The same wait with less to wait for is one that goes on; another one has its own beginning.
            goes_on = before is not None and before.since == seen.since
            self._begin(seen, now if goes_on else seen.since)
        self.seconds = now - self._since
        if self.seconds < self._told_after_s:
            return False
        quiet_s = now - self._told_at
        if quiet_s < (self._pause_s if seen.substance in self._told else self._told_after_s):
            return False
        if self._told:
            self._pause_s *= 2
        self._told.add(seen.substance)
        self._told_at = now
        return True
