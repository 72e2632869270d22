"""A run's spans as a trace for Perfetto (ui.perfetto.dev) or chrome://tracing. It knows files, not the run.

Each actor is a process, each of its tracks a thread; a step's end is an instant event of all of them, and metrics of
the steps are counters. Spans go from file to file one by one, however long the run was.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from weaver_rl.errors import ConfigError
from weaver_rl.ledger import CONTROLLER, STEP, place_of_actor
from weaver_rl.metrics import read_metrics
from weaver_rl.output_file import output_file
from weaver_rl.run_folder import RunFolder
from weaver_rl.span_files import ActorSpans, RecordedSpan, find_span_files
from weaver_rl.step_range import EVERY_STEP, StepRange

COUNTERS = ("reward/mean", "tokens_per_s", "lag/mean", "groups/in_flight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What was written.

    Example:
        Exported(path=Path("runs/a/trace.json"), num_spans=1200, num_actors=4)
    """

    path: Path
    num_spans: int
    num_actors: int


def export_trace(folder: RunFolder, path: Path, *, steps: StepRange = EVERY_STEP) -> Exported:
    """Writes the trace, compressed if the name ends with `.gz`.

    Args:
        steps: spans that ended before the first of them began, or began after the end of the last, are left out.

    Raises:
        ConfigError: the run has no spans, or no such step.
    """
    actors = sorted(find_span_files(folder.spans), key=lambda it: place_of_actor(it.actor, it.role))
    if not actors:
        raise ConfigError(f"{folder.path} has no spans: give the folder of a run that was started with this version")
    begin_s, end_s = _between(folder, actors, steps)
    origin_s = _origin(actors, begin_s, end_s)
    num_spans = 0
    with _opened(path) as file:
        file.write('{"displayTimeUnit": "ms", "otherData": ')
        json.dump({"run": str(folder.path), "began_at_s": origin_s}, file)
        file.write(', "traceEvents": [')
        separator = "\n"
        for event in _events(folder, actors, begin_s, end_s, origin_s):
            file.write(separator + json.dumps(event))
            num_spans += event["ph"] == "X"
            separator = ",\n"
        file.write("\n]}\n")
    return Exported(path=path, num_spans=num_spans, num_actors=len(actors))


@contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    """Written aside: a trace that was not finished is no trace."""
    path = output_file(path)
    aside = path.with_name(f".{path.name}.writing")
    try:
        with gzip.open(aside, "wt") if path.name.endswith(".gz") else aside.open("w") as file:
            yield file
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _origin(actors: list[ActorSpans], begin_s: float, end_s: float) -> float:
    """Where the time of the trace begins: no span is before it, as Perfetto drops what is."""
    chosen = (recorded.span.begin_s for actor in actors for recorded in _during(actor, begin_s, end_s))
    return min(chosen, default=0.0)


def _during(actor: ActorSpans, begin_s: float, end_s: float) -> Iterator[RecordedSpan]:
    for recorded in actor.read():
        if recorded.span.end_s >= begin_s and recorded.span.begin_s <= end_s:
            yield recorded


def _between(folder: RunFolder, actors: list[ActorSpans], steps: StepRange) -> tuple[float, float]:
    if steps == EVERY_STEP:
        return float("-inf"), float("inf")
    chosen = [span for span in _steps(actors) if int(span.attributes["step"]) in steps]
    if not chosen:
        known = [int(span.attributes["step"]) for span in _steps(actors)]
        there = f"its spans are of steps {min(known)} to {max(known)}" if known else "its spans are of no step"
        raise ConfigError(f"--steps {steps} was given and {folder.path} has none of these: {there}")
    return min(span.begin_s for span in chosen), max(span.end_s for span in chosen)


def _steps(actors: list[ActorSpans]) -> Iterator[Any]:
    for actor in actors:
        if actor.role == CONTROLLER:
            yield from (recorded.span for recorded in actor.read() if recorded.span.name == STEP)


def _events(
    folder: RunFolder, actors: list[ActorSpans], begin_s: float, end_s: float, origin_s: float
) -> Iterator[dict[str, Any]]:
    counters = {line.step: line.values for line in read_metrics(folder.metrics_file)}
    for number, actor in enumerate(actors, start=1):
        yield _named("process_name", number, 0, name=actor.actor)
        yield _named("process_sort_index", number, 0, sort_index=number)
        tracks = _Tracks(number)
        for recorded in _during(actor, begin_s, end_s):
            span = recorded.span
            thread, new = tracks.of(recorded)
            yield from new
            yield _complete(recorded, number, thread, origin_s)
            if span.name == STEP:
                yield from _step_events(span.attributes, number, thread, (span.end_s - origin_s) * 1e6, counters)


class _Tracks:
    """The threads of one process of the trace: tracks, apart for every real process that played the actor."""

    def __init__(self, process: int) -> None:
        self._process = process
        self._threads: dict[tuple[int, str], int] = {}

    def of(self, recorded: RecordedSpan) -> tuple[int, list[dict[str, Any]]]:
        """Its thread, and what must be said of it first."""
        key = recorded.pid, recorded.span.track
        if key in self._threads:
            return self._threads[key], []
        thread = self._threads[key] = len(self._threads) + 1
        name = f"{recorded.span.track} (pid {recorded.pid})"
        return thread, [
            _named("thread_name", self._process, thread, name=name),
            _named("thread_sort_index", self._process, thread, sort_index=thread),
        ]


def _complete(recorded: RecordedSpan, process: int, thread: int, origin_s: float) -> dict[str, Any]:
    span = recorded.span
    # Rounded alike at both ends: what nests stays nested.
    begin, end = round((span.begin_s - origin_s) * 1e6), round((span.end_s - origin_s) * 1e6)
    arguments: dict[str, Any] = {**span.attributes, "id": span.span_id}
    if span.parent_id is not None:
        arguments["parent"] = span.parent_id
    return {
        "ph": "X",
        "name": span.name,
        "cat": span.name.partition("/")[0],
        "pid": process,
        "tid": thread,
        "ts": begin,
        "dur": end - begin,
        "args": arguments,
    }


def _step_events(
    step: Mapping[str, Any], process: int, thread: int, at: float, counters: Mapping[int, Mapping[str, float]]
) -> Iterator[dict[str, Any]]:
    place = {"pid": process, "tid": thread, "ts": round(at)}
    yield {"ph": "i", "name": f"step {step['step']}", "cat": "step", "s": "g", **place, "args": dict(step)}
    values = counters.get(int(step["step"]), {})
    for name in COUNTERS:
        if name in values:
            yield {"ph": "C", "name": name, "cat": "metrics", **place, "args": {"value": values[name]}}


def _named(what: str, process: int, thread: int, **arguments: str | int) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": process, "tid": thread, "ts": 0, "args": arguments}
