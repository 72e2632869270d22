"""Checks a trace against the trace-event format, from its description and not from the code that writes it."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from numbers import Real
from pathlib import Path
from typing import Any

ALLOWED = {
    "X": {"ph", "name", "cat", "pid", "tid", "ts", "dur", "args"},
    "i": {"ph", "name", "cat", "pid", "tid", "ts", "s", "args"},
    "C": {"ph", "name", "cat", "pid", "tid", "ts", "args"},
    "M": {"ph", "name", "cat", "pid", "tid", "ts", "args"},
}
METADATA = {
    "process_name": ("name", str),
    "thread_name": ("name", str),
    "process_sort_index": ("sort_index", int),
    "thread_sort_index": ("sort_index", int),
}


def check_trace(path: Path) -> list[dict[str, Any]]:
    """The events of a trace in the JSON object format; AssertionError about the first that is not as it must be."""
    text = gzip.decompress(path.read_bytes()).decode() if path.name.endswith(".gz") else path.read_text()
    trace = json.loads(text)
    assert set(trace) <= {"traceEvents", "displayTimeUnit", "otherData"}, set(trace)
    assert trace.get("displayTimeUnit", "ms") in ("ms", "ns")
    events: list[dict[str, Any]] = trace["traceEvents"]
    for event in events:
        _check_event(event)
    named = Counter((event["name"], event["pid"], event["tid"]) for event in events if event["ph"] == "M")
    assert all(number == 1 for number in named.values()), named.most_common(1)
    for event in events:
        if event["ph"] == "X":
            assert ("process_name", event["pid"], 0) in named, event
            assert ("thread_name", event["pid"], event["tid"]) in named, event
    _check_nesting(events)
    return events


def _check_event(event: dict[str, Any]) -> None:
    kind = event["ph"]
    assert kind in ALLOWED, event
    assert set(event) <= ALLOWED[kind], event
    assert isinstance(event["name"], str), event
    assert type(event["pid"]) is int, event
    assert type(event["tid"]) is int, event
    assert isinstance(event["ts"], Real), event
    assert event["ts"] >= 0, event
    assert isinstance(event.get("args", {}), dict), event
    if kind == "X":
        assert isinstance(event["dur"], Real), event
        assert event["dur"] >= 0, event
    elif kind == "i":
        assert event["s"] in ("g", "p", "t"), event
    elif kind == "C":
        assert all(isinstance(value, Real) for value in event["args"].values()), event
    else:
        key, of_type = METADATA[event["name"]]
        assert isinstance(event["args"][key], of_type), event


def _check_nesting(events: list[dict[str, Any]]) -> None:
    """Complete events of one thread must nest: a viewer draws them as a stack."""
    threads: dict[tuple[int, int], list[tuple[float, float, str]]] = {}
    for event in events:
        if event["ph"] == "X":
            threads.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["dur"], event["name"]))
    for thread, spans in threads.items():
        ends: list[float] = []
        for begin, length, name in sorted(spans, key=lambda it: (it[0], -it[1])):
            while ends and ends[-1] <= begin:
                ends.pop()
            assert not ends or begin + length <= ends[-1], f"{name} at {begin} on {thread} does not nest"
            ends.append(begin + length)
