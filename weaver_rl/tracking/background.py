"""A tracking service beside the run: own thread, bounded memory, never in the way. It knows no service.

- `write`   produces a waiting step; waits for nothing.
- `_work`   sends what waits, in order, each step once; waits for the service, and tries again when that fails.
- `close`   produces the end of the run at the service; waits for `_work`, at most so long as it is told.

What arrived is kept in a file: a resumed run goes on with the same run of the service and sends first what
metrics.jsonl has and the service has not. A step that was sent is not sent again when the run goes back behind it:
services take steps in order only, and the run folder is where the truth is. A step that still waits is forgotten.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from weaver_rl.metrics import read_metrics
from weaver_rl.run_folder import RunState, write_atomically
from weaver_rl.tracking.tracker import TrackedRun, Tracker

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """How far a service is; what its file holds.

    Example:
        Sent(run_id="3f9a1c2e", last_step=120)
    """

    run_id: str | None = None
    """The run at the service."""
    last_step: int = -1
    """The last step that it is known to have."""


def read_sent(path: Path) -> Sent:
    """Nothing was sent where there is no file, or none that can be read."""
    try:
        raw = json.loads(path.read_text())
        return Sent(run_id=raw["run_id"], last_step=raw["last_step"])
    except (OSError, ValueError, TypeError, KeyError):
        return Sent()


class BackgroundTracker:
    """A `MetricsSink` that tells a service in a thread of its own. Warnings of the library tell what fails, once.

    Args:
        sent_file: how far the service is.
        metrics_file: metrics.jsonl of the run.
        max_waiting: steps kept in memory for a service that does not take them.
        first_pause_s: before the second try; it doubles up to a minute.
    """

    def __init__(
        self,
        tracker: Tracker,
        run: TrackedRun,
        *,
        sent_file: Path,
        metrics_file: Path,
        max_waiting: int,
        first_pause_s: float = FIRST_PAUSE_S,
    ) -> None:
        self._tracker = tracker
        self._run = run
        self._sent_file = sent_file
        self._metrics_file = metrics_file
        self._max_waiting = max_waiting
        self._first_pause_s = first_pause_s
        self._waiting: deque[tuple[int, Mapping[str, float]]] = deque()
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._ending: tuple[RunState, str | None] = ("interrupted", None)
        self._is_behind = False
        self._has_warned = False
        self._has_given_up = False
        self._is_over = False
        self._num_rewinds = 0
        self._sent = read_sent(sent_file)
        self._last_logged = self._sent.last_step
        """The last step that the tracker was told; it may be on its way."""
        self._thread = threading.Thread(target=self._work, name=f"tracking: {tracker.name}", daemon=True)
        self._thread.start()

    # -- the run's side ------------------------------------------------------------------------------------------------

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See `MetricsSink`. What finds no room is read from metrics.jsonl later, which has it already."""
        with self._changed:
            if len(self._waiting) >= self._max_waiting:
                self._is_behind = True
            if not self._is_behind:
                self._waiting.append((step, dict(values)))
            self._changed.notify()

    def rewound(self, step: int) -> None:
        """See `MetricsSink`. What was sent stays; what waits is no longer so."""
        with self._changed:
            self._num_rewinds += 1
            self._waiting = deque(entry for entry in self._waiting if entry[0] <= step)

    def close(self, state: RunState, reason: str | None, timeout_s: float) -> None:
        """Sends what waits and says how the run ended; what is not over after `timeout_s` is given up."""
        with self._changed:
            self._ending = state, reason
            self._closing.set()
            self._changed.notify()
        self._thread.join(timeout_s)
        if not self._is_over:
            _log.warning(
                "%s did not take everything within %g s of the end: it is known to have the steps up to %d; "
                "metrics.jsonl has all, and a resumed run sends the rest",
                self._tracker.name,
                timeout_s,
                self._sent.last_step,
            )
            self._has_given_up = True
            self._tracker.give_up()

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        if self._until_done(self._begin) and self._until_done(self._catch_up):
            while (send := self._next()) is not None:
                if not self._until_done(send):
                    return
            self._is_over = self._until_done(self._end)

    def _next(self) -> Callable[[], None] | None:
        """What is to be sent next; None when nothing more comes."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_behind or self._closing.is_set())
            if self._waiting:
                return self._send_first
            if self._is_behind:
                self._is_behind = False
                return self._catch_up
            return None

    def _send_first(self) -> None:
        """Looks it up with every try: the run may have gone back behind it."""
        with self._changed:
            if not self._waiting:
                return
            first = self._waiting[0]
        self._send(*first)
        with self._changed:
            if self._waiting and self._waiting[0] is first:
                self._waiting.popleft()

    def _catch_up(self) -> None:
        while True:
            num_rewinds = self._num_rewinds
            for line in read_metrics(self._metrics_file):
                if self._num_rewinds != num_rewinds:
                    break  # another file is in its place, and this one still open
                self._send(line.step, line.values)
            else:
                return

    def _begin(self) -> None:
        if self._sent.run_id is None and (new := self._tracker.new_id()) is not None:
            self._keep(replace(self._sent, run_id=new))  # before it exists there: a killed run finds it again
        run_id = self._tracker.begin(self._sent.run_id, self._run)
        self._keep(replace(self._sent, run_id=run_id))

    def _send(self, step: int, values: Mapping[str, float]) -> None:
        if step > self._last_logged:
            self._tracker.log(step, values)
            self._last_logged = step
            if not self._tracker.arrives_at_end:
                self._keep(replace(self._sent, last_step=step))

    def _end(self) -> None:
        self._tracker.end(*self._ending)
        self._keep(replace(self._sent, last_step=self._last_logged))

    def _keep(self, sent: Sent) -> None:
        self._sent = sent
        self._sent_file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._sent_file, json.dumps(asdict(sent)) + "\n")

    def _until_done(self, call: Callable[[], None]) -> bool:
        """Whether it was done: it is tried again and again, once the run ends no more."""
        pause_s = self._first_pause_s
        while True:
            is_last = self._closing.is_set()
            try:
                call()
            except Exception as error:  # noqa: BLE001 - boundary: whatever a service does, the run goes on
                if self._has_given_up:
                    return False
                self._warn(error)
            else:
                return True
            if is_last:
                return False
            self._closing.wait(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _warn(self, error: Exception) -> None:
        if not self._has_warned:
            self._has_warned = True
            text = str(error).strip().splitlines()
            _log.warning(
                "%s does not answer (%s: %s); it is tried again, the run goes on",
                self._tracker.name,
                type(error).__name__,
                text[0] if text else "",
            )
