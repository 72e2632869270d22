"""Where the metrics of a step go besides metrics.jsonl; TensorBoard is one such place. It knows no metric by name."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

_log = logging.getLogger(__name__)


class MetricsSink(Protocol):
    """Is told every step after metrics.jsonl has it. It must neither raise nor wait: a run must not stop for it."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """A step, counted over all phases, and its metrics: finite, by names of METRICS.

        Step 0 has the evaluation of the policy that a run without a warm start begins with, and nothing else.
        """

    def rewound(self, step: int) -> None:
        """The run goes on from this step: those after it come again. -1: from its beginning, step 0 comes again too."""


class TensorBoardEvents:
    """Event files that TensorBoard reads. One that cannot be written is a warning, once; the next step begins another.

    What was waiting to be written is lost with it: metrics.jsonl has every step.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._has_warned = False
        self._events: EventFileWriter | None = self._open()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))

    def rewound(self, step: int) -> None:
        restart = SessionLog(status=SessionLog.START)
        # TensorBoard drops what it read before at or after the step of a START event.
        self._add(Event(wall_time=time.time(), step=step + 1, session_log=restart), flush=True)

    def close(self) -> None:
        if self._events is not None:
            with contextlib.suppress(Exception):  # boundary: the run has ended, nothing of it depends on this file
                self._events.close()

    def _open(self) -> EventFileWriter:
        return EventFileWriter(str(self._directory), flush_secs=5)

    def _add(self, event: Event, *, flush: bool = False) -> None:
        try:
            if self._events is None:
                self._events = self._open()
            self._events.add_event(event)
            if flush:
                self._events.flush()
        except Exception as error:  # noqa: BLE001 - boundary: whatever its writing thread died of, the run goes on
            self._events = None
            if not self._has_warned:
                self._has_warned = True
                _log.warning(
                    "TensorBoard's events in %s cannot be written (%s: %s); another file is tried at every step, the "
                    "run goes on",
                    self._directory,
                    type(error).__name__,
                    error,
                )
