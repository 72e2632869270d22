"""The exported trace: valid by the format's own rules, only of the steps asked for, and a user's mistakes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from trace_checker import check_trace
from typer.testing import CliRunner

from weaver_rl.cli import app
from weaver_rl.errors import ConfigError, UserError
from weaver_rl.ledger import STEP
from weaver_rl.run_folder import RunFolder
from weaver_rl.span_files import SpanFiles
from weaver_rl.spans import Span, SpanBuffer, Spans, buffering, lasting, record, span

pytestmark = pytest.mark.unit

EPOCH = 1_767_225_600.0


class HandClock:
    time = EPOCH

    def __call__(self) -> float:
        self.time += 1e-4 / 3
        return self.time


async def _work(number: int) -> None:
    with span("sampler/fetch_weights", version=number):
        await asyncio.sleep(0)
        with span("sampler/inner"):
            await asyncio.sleep(0)


async def _overlapping() -> None:
    await asyncio.gather(*(_work(number) for number in range(4)))


def three_steps(folder: RunFolder) -> None:
    clock = HandClock()
    files = SpanFiles(folder.spans)
    for step in (1, 2, 3):
        with buffering(SpanBuffer(clock=clock)) as buffer:
            for _ in range(3):
                with lasting("sampler/generate"):
                    clock.time += 0.01
            asyncio.run(_overlapping())
            files.append("sampler 10", "sampler", buffer.drain())
            files.append("sampler 9", "sampler", buffer.drain())
        with buffering(SpanBuffer(clock=clock)) as buffer:
            begin = clock.time
            with span("controller/learn"):
                clock.time += 1
            record(STEP, begin, clock.time, track="steps", step=step, phase="train")
            files.append("controller", "controller", buffer.drain())
            files.append("learner rank 0", "learner", _one("learner/optim_step", begin, clock.time))
    folder.metrics_file.write_text(
        "".join(
            json.dumps({"step": step, "phase": "train", "time_s": step, "reward/mean": 0.5}) + "\n"
            for step in (1, 2, 3)
        )
    )


def _one(name: str, begin: float, end: float) -> Spans:
    return Spans(
        spans=(Span(name=name, begin_s=begin, end_s=end, track="MainThread", span_id=1),),
        pid=5,
        anchor_s=0.0,
        begun_s=EPOCH,
        drained_at_s=end,
    )


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path)
    three_steps(made)
    return made


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_a_trace_is_valid(folder: RunFolder, name: str):
    ended = CliRunner().invoke(app, ["trace", str(folder.path), "--out", str(folder.path / name)])
    assert ended.exit_code == 0, ended.output
    events = check_trace(folder.path / name)
    processes = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert processes == ["controller", "learner rank 0", "sampler 10"]
    spans = [event for event in events if event["ph"] == "X"]
    assert f"{len(spans)} spans of 3 actors" in ended.output
    assert len(spans) == 3 * (1 + 8 + 2 + 1)
    assert [event["name"] for event in events if event["ph"] == "i"] == ["step 1", "step 2", "step 3"]
    assert [event["args"] for event in events if event["ph"] == "C"] == [{"value": 0.5}] * 3
    (inner, *_) = [event for event in spans if event["name"] == "sampler/inner"]
    assert inner["args"]["parent"] in {event["args"]["id"] for event in spans if event["pid"] == inner["pid"]}
    assert min(event["ts"] for event in spans) == 0
    assert max(event["ts"] + event["dur"] for event in spans) < 4e6


def test_the_checker_sees_spans_that_do_not_nest(folder: RunFolder):
    CliRunner().invoke(app, ["trace", str(folder.path)])
    trace = json.loads(folder.trace.read_text())
    for event in trace["traceEvents"]:
        event["tid"] = 1 if event["ph"] == "X" else event["tid"]
    folder.trace.write_text(json.dumps(trace))
    with pytest.raises(AssertionError, match="does not nest"):
        check_trace(folder.trace)


@pytest.mark.parametrize(("steps", "seen"), [("2:2", [2]), ("2", [2]), ("2:", [2, 3]), (":2", [1, 2])])
def test_only_some_steps(folder: RunFolder, steps: str, seen: list[int]):
    # It begins in step 1 and ends in step 2.
    SpanFiles(folder.spans).append("reward 0", "reward", _one("reward/score", EPOCH + 0.5, EPOCH + 1.5))
    ended = CliRunner().invoke(app, ["trace", str(folder.path), "--steps", steps])
    assert ended.exit_code == 0, ended.output
    events = check_trace(folder.trace)
    assert [event["args"]["step"] for event in events if event["name"] == STEP] == seen
    assert sum(event["name"] == "learner/optim_step" for event in events) == len(seen)
    spans = [event for event in events if event["ph"] == "X"]
    assert min(event["ts"] for event in spans) == 0
    assert [event["dur"] for event in spans if event["name"] == "reward/score"] == [1_000_000]


@pytest.mark.parametrize(
    ("steps", "message"),
    [("7:9", "steps 1 to 3"), ("a:b", "write A:B"), ("3:1", "write A:B with A not above B")],
)
def test_steps_that_are_not_there(folder: RunFolder, steps: str, message: str):
    ended = CliRunner().invoke(app, ["trace", str(folder.path), "--steps", steps])
    assert isinstance(ended.exception, UserError)
    assert message in str(ended.exception)


def test_a_run_without_spans(tmp_path: Path):
    ended = CliRunner().invoke(app, ["trace", str(tmp_path)])
    assert isinstance(ended.exception, ConfigError)
    assert "has no spans" in str(ended.exception)
