"""Makes ledger.jsonl while a run goes on: a step's rows once every actor has told of it. It asks no actor.

Produces rows in the order of the steps; waits for what actors tell; unblocked by that, by the end of an actor, or by
`late_s`: then the time that one did not tell of is `unknown`.
"""

from __future__ import annotations

import json
import math
import mmap
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

from weaver_rl.ledger import (
    AWAITED,
    BUSY,
    CONTROLLER,
    REWOUND,
    STEP,
    ActorLife,
    LedgerRow,
    StepWindow,
    ledger_rows,
    place_of_actor,
)
from weaver_rl.run_folder import append_whole
from weaver_rl.spans import Process, Span, Spans, now

LATE_S = 300.0
MAX_UNWRITTEN_ROWS = 10_000
"""That are kept for a disk that may have room again; a run may go on for days without one."""


@dataclass(slots=True)
class _Told:
    """What one process of an actor has told that may still be needed."""

    actor: str
    role: str
    begun_s: float
    until_s: float
    has_ended: bool = False
    ended: list[Span] = field(default_factory=list)
    lasting: tuple[Span, ...] = ()

    def life(self) -> ActorLife:
        return ActorLife(
            actor=self.actor,
            role=self.role,
            begun_s=self.begun_s,
            known_until_s=self.until_s,
            has_ended=self.has_ended,
            spans=(*self.ended, *self.lasting),
        )


class LedgerKeeper:
    """Keeps the ledger of a run.

    Args:
        late_s: how long after its end a step waits for what actors have to tell.
        clock: that of the spans.
    """

    def __init__(
        self,
        path: Path,
        *,
        late_s: float = LATE_S,
        clock: Callable[[], float] = now,
    ) -> None:
        self._path = path
        self._late_s = late_s
        self._clock = clock
        self._told: dict[tuple[str, Process], _Told] = {}
        self._windows: deque[StepWindow] = deque()
        self._silent_since: dict[str, float] = {}
        self._unwritten: list[LedgerRow] = []
        self.last_rows: tuple[LedgerRow, ...] = ()
        """Those of the newest step that is written."""

    def tell(self, actor: str, role: str, drained: Spans) -> None:
        """What an actor did, by the driver's clock."""
        key = actor, drained.process
        if key not in self._told:
            self._ended_before(actor, drained.begun_s)
            self._told[key] = _Told(actor, role, drained.begun_s, drained.drained_at_s)
        told = self._told[key]
        told.until_s, told.has_ended = max(told.until_s, drained.drained_at_s), False
        told.ended += [span for span in drained.spans if span.name in BUSY or span.name in AWAITED]
        told.lasting = tuple(span for span in drained.lasting if span.name in BUSY or span.name in AWAITED)
        if actor == CONTROLLER:
            for span in drained.spans:
                if span.name == STEP:
                    self._windows.append(_window(span))
                elif span.name == REWOUND:
                    self._rewind(int(span.attributes["step"]))

    def write(self, living: Collection[tuple[str, Process | None]], *, is_last: bool = False) -> list[LedgerRow]:
        """Writes the rows of every step that is complete, and returns them. What cannot be written comes next time.

        Args:
            living: every actor that there is, with its process if it has told of itself.
            is_last: nothing more will be told: all steps are written.

        Raises:
            OSError: they cannot be written; of many the newest are kept.
        """
        for key, told in self._told.items():
            told.has_ended = told.has_ended or key not in living
        is_waited_for = self._is_waited_for({actor for actor, process in living if process is None})
        while self._windows and (is_last or self._is_complete(self._windows[0], is_waited_for)):
            window = self._windows.popleft()
            self._unwritten += ledger_rows(window, [told.life() for told in sorted(self._told.values(), key=_place)])
            self._forget(window.end_s)
        return self._append()

    def _append(self) -> list[LedgerRow]:
        """Writes what was not written."""
        if not self._unwritten:
            return []
        try:
            append_whole(self._path, "".join(row.to_json() for row in self._unwritten))
        except OSError:
            self._unwritten = _newest(self._unwritten)
            raise
        written, self._unwritten = self._unwritten, []
        self.last_rows = tuple(row for row in written if row.step == written[-1].step)
        return written

    def _is_waited_for(self, silent: Collection[str]) -> bool:
        """Whether one that has never told anything may soon; one that finds no place, for days perhaps, does not."""
        at = self._clock()
        self._silent_since = {actor: self._silent_since.get(actor, at) for actor in silent}
        return any(at - since <= self._late_s for since in self._silent_since.values())

    def _is_complete(self, window: StepWindow, is_waited_for: bool) -> bool:
        if self._clock() - window.end_s > self._late_s:
            return True
        return not is_waited_for and all(
            told.has_ended or told.until_s >= window.end_s or told.begun_s >= window.end_s
            for told in self._told.values()
        )

    def _rewind(self, step: int) -> None:
        self._windows = deque(window for window in self._windows if window.step <= step)
        self._unwritten = [row for row in self._unwritten if row.step <= step]
        truncate_ledger(self._path, step)

    def _ended_before(self, actor: str, begun_s: float) -> None:
        for told in self._told.values():
            if told.actor == actor:
                told.has_ended, told.until_s = True, min(told.until_s, begun_s)

    def _forget(self, before_s: float) -> None:
        for key, told in list(self._told.items()):
            told.ended = [span for span in told.ended if span.end_s > before_s]
            if told.has_ended and told.until_s <= before_s:
                del self._told[key]


def _newest(rows: list[LedgerRow]) -> list[LedgerRow]:
    """As many as are kept; a step that lost rows loses all."""
    too_old = [row.step for row in rows[:-MAX_UNWRITTEN_ROWS]]
    return [row for row in rows if not too_old or row.step > too_old[-1]]


def _place(told: _Told) -> tuple[tuple[int, int, str], float]:
    return place_of_actor(told.actor, told.role), told.begun_s


def truncate_ledger(path: Path, step: int) -> None:
    """Forgets the rows of every step after `step`, and a line that a kill cut short.

    It looks from the end, in place: that of a long run with many actors is large.
    """
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("r+b") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            end = content.rfind(b"\n") + 1
            while end > 0:
                begin = content.rfind(b"\n", 0, end - 1) + 1
                if _step_of(content[begin:end]) <= step:
                    break
                end = begin
        file.truncate(end)


def _step_of(line: bytes) -> float:
    """A line that is no row comes after all steps."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf


def _window(span: Span) -> StepWindow:
    return StepWindow(
        step=int(span.attributes["step"]),
        phase=str(span.attributes["phase"]),
        begin_s=span.begin_s,
        end_s=span.end_s,
    )
