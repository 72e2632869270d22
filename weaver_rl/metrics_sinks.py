"""Where the metrics of a step go besides metrics.jsonl; TensorBoard is one such place. It knows no metric by name."""

from __future__ import annotations

import io
import itertools
import logging
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from weaver_rl.run_folder import append_whole

_log = logging.getLogger(__name__)
_file_numbers = itertools.count()


class MetricsSink(Protocol):
    """Is told every step after metrics.jsonl has it. It must neither raise nor wait: a run must not stop for it."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """A step, counted over all phases, and its metrics: finite, by names of METRICS.

        Step 0 has the evaluation of the policy that a run without a warm start begins with, and nothing else.
        """

    def rewound(self, step: int) -> None:
        """The run goes on from this step: those after it come again. -1: from its beginning, step 0 comes again too."""


class TensorBoardEvents:
    """An event file that TensorBoard reads. One that cannot be written is a warning, once; every step tries again.

    What could not be written is lost: metrics.jsonl has every step.

    Raises:
        OSError: the file cannot be begun.
    """

    def __init__(self, directory: Path) -> None:
        # TensorBoard knows a file by this name, and reads those of a folder in the order of their names.
        place = f"{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_file_numbers)}"
        self._path = directory / f"events.out.tfevents.{place}"
        self._has_warned = False
        self._append(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))

    def rewound(self, step: int) -> None:
        restart = SessionLog(status=SessionLog.START)
        # TensorBoard drops what it read before at or after the step of a START event.
        self._add(Event(wall_time=time.time(), step=step + 1, session_log=restart))

    def _add(self, event: Event) -> None:
        try:
            self._append(event)
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True
                _log.warning(
                    "TensorBoard's events in %s cannot be written (%s: %s); it is tried again at every step, the run "
                    "goes on",
                    self._path.parent,
                    type(error).__name__,
                    error,
                )

    def _append(self, event: Event) -> None:
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self._path.parent.mkdir(parents=True, exist_ok=True)
        append_whole(self._path, record.getvalue())
