"""The collector with actors that are no Ray actors: rounds, clocks, deaths, hangs, and that nothing harms the run."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from ray.exceptions import RayActorError, RayTaskError

from actors.span_collector import NodeClocks, SpanCollector, SpanSource
from actors.span_source import NodeSpans
from weaver_rl.ledger import STEP, LedgerRow, read_ledger
from weaver_rl.run_folder import RunFolder
from weaver_rl.span_files import find_span_files
from weaver_rl.spans import ANCHOR_S, Span, SpanBuffer, Spans, buffering, now, record

pytestmark = pytest.mark.unit


class FakeActor:
    """Answers with what `answer` gives."""

    def __init__(self, answer: Callable[[], Awaitable[NodeSpans]]) -> None:
        self.num_asked = 0
        self._answer = answer

    @property
    def drain_spans(self) -> FakeActor:
        return self

    async def remote(self) -> NodeSpans:
        self.num_asked += 1
        return await self._answer()


def busy(name: str, *, pid: int, clock_behind_s: float = 0.0, node: str = "here") -> FakeActor:
    """An actor that has been busy since for ever, by a clock that is behind."""

    async def answer() -> NodeSpans:
        at = now() - clock_behind_s
        spans = Spans(
            spans=(Span(name=name, begin_s=at - 100, end_s=at, track="main", span_id=1),),
            pid=pid,
            anchor_s=ANCHOR_S if node == "here" else ANCHOR_S + 5,
            begun_s=at - 100,
            drained_at_s=at,
        )
        return NodeSpans(node_id=node, spans=spans)

    return FakeActor(answer)


async def hang() -> NodeSpans:
    await asyncio.Event().wait()
    raise AssertionError


async def die() -> NodeSpans:
    raise RayActorError


async def fail() -> NodeSpans:
    raise RayTaskError("drain_spans", "ValueError: no spans here", ValueError()).as_instanceof_cause()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    with buffering(SpanBuffer()):
        yield RunFolder(tmp_path)


def collect(folder: RunFolder, sources: list[SpanSource], rows: list[LedgerRow], num_rounds: int = 1) -> SpanCollector:
    async def main() -> SpanCollector:
        collector = SpanCollector(folder, lambda: sources, here="here", on_rows=rows.extend, every_s=0.05)
        async with collector:
            record(STEP, now() - 2, now(), track="steps", step=1, phase="train")
            await asyncio.sleep(0.1 * num_rounds)
        return collector

    return asyncio.run(main())


def test_spans_are_kept_and_the_ledger_made(folder: RunFolder):
    rows: list[LedgerRow] = []
    sources = [
        SpanSource(actor="sampler 0", role="sampler", handle=busy("sampler/generate", pid=10)),
        SpanSource(actor="learner rank 0", role="learner", handle=busy("learner/publish", pid=11)),
    ]
    collector = collect(folder, sources, rows)
    assert [actor.actor for actor in find_span_files(folder.spans)] == ["controller", "learner rank 0", "sampler 0"]
    assert list(read_ledger(folder.ledger_file)) == [
        LedgerRow(
            step=row.step,
            phase=row.phase,
            actor=row.actor,
            role=row.role,
            seconds={state: pytest.approx(value, abs=1e-6) for state, value in row.seconds.items()},
        )
        for row in rows
    ]
    assert [(row.actor, set(row.seconds)) for row in rows] == [
        ("controller", {"other"}),
        ("learner rank 0", {"sync"}),
        ("sampler 0", {"generate"}),
    ]
    assert collector.shares() == {
        "controller": {"other": 1.0},
        "learner rank 0": {"sync": 1.0},
        "sampler 0": {"generate": 1.0},
    }


def test_one_that_hangs_and_one_that_died_cost_only_their_own(folder: RunFolder):
    rows: list[LedgerRow] = []
    hanging, dead = FakeActor(hang), FakeActor(die)
    sources = [
        SpanSource(actor="sampler 0", role="sampler", handle=busy("sampler/generate", pid=10)),
        SpanSource(actor="sampler 1", role="sampler", handle=hanging),
        SpanSource(actor="sampler 2", role="sampler", handle=dead),
    ]
    asyncio.run(_finished_fast(folder, sources, rows))
    assert hanging.num_asked == 1
    assert dead.num_asked > 1
    assert {row.actor for row in rows} == {"controller", "sampler 0"}


async def _finished_fast(folder: RunFolder, sources: list[SpanSource], rows: list[LedgerRow]) -> None:
    async with (
        asyncio.timeout(10),
        SpanCollector(folder, lambda: sources, here="here", on_rows=rows.extend, every_s=0.05),
    ):
        record(STEP, now() - 2, now(), track="steps", step=1, phase="train")
        await asyncio.sleep(0.3)


def test_the_clock_of_another_node_is_brought_to_the_drivers(folder: RunFolder):
    rows: list[LedgerRow] = []
    far = busy("sampler/generate", pid=10, clock_behind_s=3600, node="there")
    collect(folder, [SpanSource(actor="sampler 0", role="sampler", handle=far)], rows)
    (found,) = [actor for actor in find_span_files(folder.spans) if actor.role == "sampler"]
    last = [recorded.span for recorded in found.read()][-1]
    assert abs(last.end_s - now()) < 2
    assert set(rows[1].seconds) == {"generate"}


def test_the_shortest_round_trip_counts_until_it_is_old():
    clocks = NodeClocks("here")
    assert clocks.behind_s("here", 10.0, 3.0, 12.0) == 0.0
    assert clocks.behind_s("there", 10.0, 4.0, 14.0) == 8.0
    assert clocks.behind_s("there", 20.0, 12.5, 21.0) == 8.0
    assert clocks.behind_s("there", 20.0, 12.0, 20.2) == pytest.approx(8.1)
    assert clocks.behind_s("there", 30.0, 26.0, 40.0) == pytest.approx(8.1)
    assert clocks.behind_s("there", 700.0, 692.0, 704.0) == 10.0


def test_a_ledger_that_cannot_be_written_costs_no_spans(folder: RunFolder):
    folder.ledger_file.mkdir()
    rows: list[LedgerRow] = []
    collect(folder, [SpanSource(actor="sampler 0", role="sampler", handle=busy("sampler/generate", pid=10))], rows)
    assert not rows
    assert [actor.actor for actor in find_span_files(folder.spans)] == ["controller", "sampler 0"]


def test_what_goes_wrong_is_told_once_and_stops_nothing(folder: RunFolder, caplog: pytest.LogCaptureFixture):
    folder.spans.write_text("in the way")
    source = SpanSource(actor="sampler 0", role="sampler", handle=busy("sampler/generate", pid=10))
    with caplog.at_level(logging.WARNING):
        collect(folder, [source], [], num_rounds=4)
    assert [record.getMessage() for record in caplog.records if "not complete" in record.getMessage()] != []
    assert len(caplog.records) == 1


def test_an_actor_that_answers_with_an_error_is_not_taken_for_dead(folder: RunFolder, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        collect(folder, [SpanSource(actor="sampler 0", role="sampler", handle=FakeActor(fail))], [])
    assert "no spans here" in caplog.text
