"""Asks every actor of a run for its spans, keeps them in files and makes the idle ledger. It decides nothing.

- `run`     produces rounds of questions and what is written of the answers; waits for the clock; unblocked by that.
- `finish`  produces the last round; waits for its answers, a few seconds at most.

A question is a call like any other: a learner rank answers between two operations, a sampler and a reward worker
beside their work. An actor has one question at a time, so one that hangs costs nothing. Whatever goes wrong here costs
spans and never the run.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from ray.exceptions import RayActorError

from actors.span_source import NodeSpans
from weaver_rl.ledger import CONTROLLER, LedgerRow, shares
from weaver_rl.ledger_keeper import LedgerKeeper
from weaver_rl.run_folder import RunFolder
from weaver_rl.span_files import SpanFiles
from weaver_rl.spans import ANCHOR_S, Process, Spans, drain

EVERY_S = 2.0
FINISH_S = 3.0
CLOCK_KEPT_S = 600.0
"""How long the best estimate of a node's clock counts before a worse one may take its place: clocks drift."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanSource:
    """An actor that has spans.

    Example:
        SpanSource(actor="sampler 0", role="sampler", handle=handle)
    """

    actor: str
    role: str
    handle: Any
    """Of an actor with a method `drain_spans`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _ClockEstimate:
    """By how much the monotonic clock of a node is behind the driver's."""

    behind_s: float
    round_trip_s: float
    made_at: float


class NodeClocks:
    """What the clocks of other nodes are compared with the driver's. Times are of monotonic clocks."""

    def __init__(self, here: str) -> None:
        self._here = here
        self._best: dict[str, _ClockEstimate] = {}

    def behind_s(self, node_id: str, asked: float, told: float, answered: float) -> float:
        """How far the node's clock is behind: 0 on this node, where all read the same one.

        Args:
            asked: when the question left, by the driver's clock.
            told: when it was answered, by the node's clock.
            answered: when the answer came, by the driver's clock.
        """
        if node_id == self._here:
            return 0.0
        estimate = _ClockEstimate(
            behind_s=(asked + answered) / 2 - told, round_trip_s=answered - asked, made_at=answered
        )
        best = self._best.get(node_id)
        # Half the round trip is the largest error; an answer that waited for an operation says next to nothing.
        if best is None or estimate.round_trip_s <= best.round_trip_s or answered - best.made_at > CLOCK_KEPT_S:
            best = self._best[node_id] = estimate
        return best.behind_s


class SpanCollector:
    """Collects while it is inside.

    Args:
        sources: every actor that there is now.
        here: the driver's node.
        on_rows: is given the rows of the ledger, those of one or several steps, once they are written.
    """

    def __init__(
        self,
        folder: RunFolder,
        sources: Callable[[], Sequence[SpanSource]],
        *,
        here: str,
        on_rows: Callable[[Sequence[LedgerRow]], None] = lambda rows: None,
        every_s: float = EVERY_S,
    ) -> None:
        self._sources = sources
        self._every_s = every_s
        self._files = SpanFiles(folder.spans)
        self._keeper = LedgerKeeper(folder.ledger_file)
        self._on_rows = on_rows
        self._clocks = NodeClocks(here)
        self._asked: dict[Any, asyncio.Task[None]] = {}
        self._answers: list[tuple[SpanSource, Spans]] = []
        self._lost: set[Any] = set()
        self._processes: dict[Any, Process] = {}
        self._has_warned = False

    async def __aenter__(self) -> Self:
        self._stopping = asyncio.Event()
        self._running = asyncio.create_task(self.run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()  # not cancelled: a round in its middle writes to the end, and nobody beside it
        await self._running
        await self.finish()

    async def run(self) -> None:
        """A round every few seconds, until it is to stop."""
        while not self._stopping.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._every_s):
                    await self._stopping.wait()
            if not self._stopping.is_set():
                await self._round(self._every_s / 2)

    async def finish(self) -> None:
        """Asks once more, before the actors are ended, and writes all there is."""
        await self._round(FINISH_S, is_last=True)
        for task in self._asked.values():
            task.cancel()
        await asyncio.gather(*self._asked.values(), return_exceptions=True)

    def shares(self) -> Mapping[str, Mapping[str, float]]:
        """Of every actor, the states of its last step with their share of the time."""
        return shares(self._keeper.last_rows, lambda row: row.actor)

    async def _round(self, patience_s: float, *, is_last: bool = False) -> None:
        try:
            present = self._ask_all()
            if self._asked:
                await asyncio.wait(self._asked.values(), timeout=patience_s)
            answers, self._answers = self._answers, []
            rows = await asyncio.to_thread(self._write, answers, self._living(present), drain(), is_last)
            if rows:
                self._on_rows(rows)
        except Exception as error:  # noqa: BLE001 - boundary: spans are never worth a run
            self._warn(error)

    def _ask_all(self) -> list[SpanSource]:
        """Asks everybody who does not owe an answer to an earlier question; returns who there is."""
        present = list(self._sources())
        self._asked = {handle: task for handle, task in self._asked.items() if not task.done()}
        self._lost.clear()
        for source in present:
            if source.handle not in self._asked:
                self._asked[source.handle] = asyncio.create_task(self._ask(source))
        return present

    async def _ask(self, source: SpanSource) -> None:
        asked = time.monotonic()
        try:
            answer: NodeSpans = await source.handle.drain_spans.remote()
        except RayActorError:
            self._lost.add(source.handle)  # it died; the fleets see to that
            return
        except Exception as error:  # noqa: BLE001 - boundary: spans are never worth a run
            self._warn(error)
            return
        spans = answer.spans
        told = spans.drained_at_s - spans.anchor_s
        behind_s = self._clocks.behind_s(answer.node_id, asked, told, time.monotonic())
        self._processes[source.handle] = spans.process
        self._answers.append((source, spans.moved(behind_s + ANCHOR_S - spans.anchor_s)))

    def _living(self, present: Sequence[SpanSource]) -> set[tuple[str, Process | None]]:
        """Who is there, with the process if it has answered yet."""
        handles = {source.handle for source in present}
        self._processes = {handle: process for handle, process in self._processes.items() if handle in handles}
        return {(it.actor, self._processes.get(it.handle)) for it in present if it.handle not in self._lost}

    def _write(
        self,
        answers: Sequence[tuple[SpanSource, Spans]],
        living: set[tuple[str, Process | None]],
        own: Spans,
        is_last: bool,
    ) -> list[LedgerRow]:
        told = [(source.actor, source.role, spans) for source, spans in answers]
        told.append((CONTROLLER, CONTROLLER, own))
        for actor, role, spans in told:
            self._keeper.tell(actor, role, spans)
        try:
            return self._keeper.write(living | {(CONTROLLER, own.process)}, is_last=is_last)
        finally:
            # Whatever becomes of the rows, which the keeper keeps: nobody keeps the spans.
            for actor, role, spans in told:
                self._files.append(actor, role, spans)

    def _warn(self, error: Exception) -> None:
        if not self._has_warned:
            log.warning("spans and ledger are not complete: %s: %s", type(error).__name__, error)
        self._has_warned = True
