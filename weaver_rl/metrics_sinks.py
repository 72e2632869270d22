"""Where the metrics of a step go besides metrics.jsonl; TensorBoard is one such place. It knows no metric by name."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter


class MetricsSink(Protocol):
    """Is told every step after metrics.jsonl has it. It must neither raise nor wait: a run must not stop for it."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """A step, counted over all phases, and its metrics: finite, by names of METRICS."""

    def rewound(self, step: int) -> None:
        """The run goes on from this step: those after it come again."""


class TensorBoardEvents:
    """Event files that TensorBoard reads."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._events = EventFileWriter(str(directory), flush_secs=5)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._events.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))

    def rewound(self, step: int) -> None:
        restart = SessionLog(status=SessionLog.START)
        # TensorBoard drops what it read before at or after the step of a START event.
        self._events.add_event(Event(wall_time=time.time(), step=step + 1, session_log=restart))
        self._events.flush()

    def close(self) -> None:
        self._events.close()
