"""The order of a model's operations, on a virtual clock: by seq_id, with gaps, whatever comes when."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from operations_bench import OWNER, WAIT_S, Bench, FakeStore, refused, virtually

from weaver_rl.errors import (
    BatchError,
    ServiceError,
)
from weaver_rl.service.model_queue import MAX_REFUSED
from weaver_rl.service.records import Operation

pytestmark = pytest.mark.unit


def test_operations_of_a_model_run_by_number_one_at_a_time():
    async def scenario() -> None:
        bench = Bench()
        overlap = []

        def watched(name: str) -> Callable[[], Awaitable[bytes]]:
            async def work() -> bytes:
                bench.at_work += 1
                overlap.append(bench.at_work)
                bench.ran.append(name)
                await asyncio.sleep(1)
                bench.at_work -= 1
                return b"{}"

            return work

        made = [
            await bench.operations.submit(bench.operation(seq_id), watched(str(seq_id))) for seq_id in (3, 1, 4, 2, 5)
        ]
        ends = [await bench.end(operation) for operation in made]
        assert bench.ran == ["1", "2", "3", "4", "5"]
        assert set(overlap) == {1}
        assert [end.status for end in ends] == ["done"] * 5
        assert bench.now() == 5.0

    virtually(scenario)


def test_submitting_answers_at_once_and_the_response_is_stored():
    async def scenario() -> None:
        bench = Bench(store=FakeStore(commit_s=lambda: 0.1))
        submitted = await bench.submit(1, seconds=100.0)
        assert bench.now() == pytest.approx(0.1)
        assert not submitted.ended
        assert bench.store.rows[submitted.id].status == "pending"
        running = await bench.operations.wait(OWNER, submitted.id, 1.0)
        assert running.status == "running"
        ended = await bench.end(submitted)
        assert ended == replace(running, status="done", response=b"1", finished_at=pytest.approx(100.1))
        assert bench.store.rows[submitted.id] == ended
        assert await bench.operations.wait(OWNER, submitted.id, 0.0) == ended

    virtually(scenario)


def test_models_do_not_wait_for_each_other_and_samples_for_nobody():
    async def scenario() -> None:
        bench = Bench()
        first = await bench.submit(1, seconds=50.0)
        others = [await bench.submit(1, model_id="n", name="n"), await bench.submit(model_id=None, name="sample")]
        for other in others:
            await bench.end(other)
        assert bench.now() == 1.0
        assert (await bench.end(first)).status == "done"

    virtually(scenario)


@pytest.mark.parametrize(
    ("arrivals", "order"),
    [
        ((1, "save", 2), ["1", "save", "2"]),
        ((1, 3, "save", 2, 4), ["1", "2", "3", "save", "4"]),
        ((4, "save", 1, "load", 2, 3, 5), ["1", "2", "3", "4", "save", "load", "5"]),
        (("save", 1), ["save", "1"]),
        ((1, "a", "b", 2, "c"), ["1", "a", "b", "2", "c"]),
    ],
)
def test_what_has_no_number_runs_after_everything_that_had_come_before(arrivals: tuple[Any, ...], order: list[str]):
    async def scenario() -> None:
        bench = Bench()
        made = [
            await (bench.submit(what) if isinstance(what, int) else bench.submit(None, name=what)) for what in arrivals
        ]
        for operation in made:
            await bench.end(operation)
        assert bench.ran == order

    virtually(scenario)


# -- gaps ------------------------------------------------------------------------------------------------------------


def test_a_missing_number_is_waited_for_once_however_large_the_jump():
    async def scenario() -> None:
        bench = Bench()
        late = await bench.submit(1_000_000_000)
        await bench.end(late)
        assert bench.now() == WAIT_S + 1
        await bench.end(await bench.submit(1_000_000_001))
        assert bench.now() == WAIT_S + 2

    virtually(scenario)


def test_a_missing_number_that_comes_in_time_runs_first_and_at_once():
    async def scenario() -> None:
        bench = Bench()
        second = await bench.submit(2)
        await asyncio.sleep(WAIT_S - 1)
        first = await bench.submit(1)
        await bench.end(first)
        await bench.end(second)
        assert bench.ran == ["1", "2"]
        assert bench.now() == WAIT_S - 1 + 2

    virtually(scenario)


def test_a_number_that_comes_after_its_place_was_passed_is_refused():
    async def scenario() -> None:
        bench = Bench()
        await bench.end(await bench.submit(2))
        with pytest.raises(ServiceError, match=r"seq_id 1 of model m .* 3 or higher") as error:
            await bench.submit(1)
        assert refused(error) == ("seq_id_too_late", 409, False)
        assert error.value.details == {"next_seq_id": 3}
        assert bench.ran == ["2"]
        assert bench.operations.in_flight(OWNER) == 0

    virtually(scenario)


def test_the_clock_of_a_gap_stands_while_a_request_arrives():
    async def scenario() -> None:
        bench = Bench()
        second = await bench.submit(2)
        await asyncio.sleep(2)
        with bench.operations.receiving(OWNER, "m"):
            await asyncio.sleep(100)
            assert bench.ran == []
            with bench.operations.receiving(OWNER, "m"):
                await asyncio.sleep(1)
            await asyncio.sleep(100)
        await asyncio.sleep(WAIT_S - 2 - 0.1)
        assert bench.ran == []
        await bench.end(second)
        assert bench.now() == pytest.approx(203 + WAIT_S - 2 + 1)

    virtually(scenario)


def test_who_owns_another_model_does_not_stop_the_clock():
    async def scenario() -> None:
        bench = Bench()
        second = await bench.submit(2)
        with bench.operations.receiving("somebody else", "m"), bench.operations.receiving(OWNER, "n"):
            await bench.end(second)
        assert bench.now() == WAIT_S + 1

    virtually(scenario)


def test_a_request_may_be_arriving_before_the_model_has_a_queue():
    async def scenario() -> None:
        bench = Bench()
        with bench.operations.receiving(OWNER, "m"):
            second = await bench.submit(2)
            await asyncio.sleep(10 * WAIT_S)
            first = await bench.submit(1)
        await bench.end(second)
        await bench.end(first)
        assert bench.ran == ["1", "2"]

    virtually(scenario)


def test_the_clock_of_a_gap_starts_when_earlier_operations_have_ended():
    async def scenario() -> None:
        bench = Bench()
        await bench.submit(1, seconds=100.0)
        third = await bench.submit(3)
        await bench.end(third)
        assert bench.now() == 100 + WAIT_S + 1
        assert bench.ran == ["1", "3"]

    virtually(scenario)


def test_every_gap_is_waited_for_anew():
    async def scenario() -> None:
        bench = Bench()
        sixth = await bench.submit(6)
        await asyncio.sleep(WAIT_S - 0.5)
        await bench.end(await bench.submit(1))
        await bench.end(sixth)
        assert bench.now() == WAIT_S - 0.5 + 1 + WAIT_S + 1

    virtually(scenario)


def test_a_number_refused_at_the_edge_leaves_no_gap():
    async def scenario() -> None:
        bench = Bench()
        await bench.operations.skip(OWNER, "m", 1)
        await bench.end(await bench.submit(2))
        fifth = await bench.submit(5)
        await bench.operations.skip(OWNER, "m", 4)
        await bench.operations.skip(OWNER, "m", 3)
        await bench.end(fifth)
        assert bench.now() == 2.0

    virtually(scenario)


def test_a_refused_number_may_still_come_and_a_placed_one_cannot_be_refused():
    async def scenario() -> None:
        bench = Bench()
        await bench.operations.skip(OWNER, "m", 2)
        second = await bench.submit(2)
        await bench.operations.skip(OWNER, "m", 2)
        await bench.operations.skip("somebody else", "m", 1)
        await bench.operations.skip(OWNER, "no such model", 1)
        third = await bench.submit(3)
        first = await bench.submit(1)
        for operation in (first, second, third):
            assert (await bench.end(operation)).status == "done"
        assert bench.ran == ["1", "2", "3"]

    virtually(scenario)


def test_refused_numbers_do_not_pile_up():
    async def scenario() -> None:
        bench = Bench()
        for seq_id in range(2, MAX_REFUSED + 100):
            await bench.operations.skip(OWNER, "m", seq_id)
        assert len(bench.operations._queues["m"]._refused) == MAX_REFUSED
        await bench.end(await bench.submit(1))

    virtually(scenario)


def test_after_a_restart_the_queue_goes_on_behind_the_last_number():
    async def scenario() -> None:
        bench = Bench(last_seq_id=7)
        with pytest.raises(ServiceError) as error:
            await bench.submit(7)
        assert refused(error) == ("seq_id_too_late", 409, False)
        await bench.end(await bench.submit(8))
        assert bench.now() == 1.0
        other = await bench.submit(9, model_id="n")
        await bench.end(other)
        assert bench.now() == 1.0 + WAIT_S + 1

    virtually(scenario)


# -- everything at once ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sent:
    """One request of the history: when, which number (None: no number), how it ends."""

    at_s: float
    seq_id: int | None
    model_id: str | None
    seconds: float
    fails: bool
    num_sends: int
    again_s: float
    refused: bool
    """By the edge: `skip` instead of `submit`."""


sent = st.builds(
    Sent,
    at_s=st.floats(0, 30),
    seq_id=st.one_of(st.none(), st.integers(1, 12)),
    model_id=st.sampled_from(["m", "m", "n", None]),
    seconds=st.sampled_from([0.0, 0.1, 1.0, 7.0]),
    fails=st.booleans(),
    num_sends=st.integers(1, 3),
    again_s=st.sampled_from([0.0, 0.3, 4.0, 20.0]),
    refused=st.sampled_from([False, False, False, True]),
)


class History:
    """Plays requests and keeps what happened, to be held against the rules."""

    def __init__(self, requests: list[Sent], terminate_at_s: float | None, seed: int) -> None:
        chance = random.Random(seed)
        self.bench = Bench(store=FakeStore(commit_s=lambda: chance.choice([0.0, 0.01, 0.5])))
        self.requests = requests
        self.terminate_at_s = terminate_at_s
        self.runs: list[tuple[str | None, int | None, str]] = []
        self.at_work: set[str | None] = set()
        self.accepted: dict[str, Operation] = {}
        self.answers: dict[int, set[str]] = {}
        self.arrived_at: dict[str, float] = {}
        self.refusals: list[ServiceError] = []
        self.refused_ids: set[str] = set()

    async def play(self) -> None:
        await asyncio.gather(
            *(self._client(index, request) for index, request in enumerate(self.requests)), self._end()
        )
        for operation in self.accepted.values():
            assert (await self.bench.end(operation)).ended
        assert self.bench.operations.in_flight(OWNER) == 0
        await self.bench.operations.close()

    async def _end(self) -> None:
        if self.terminate_at_s is not None:
            await asyncio.sleep(self.terminate_at_s)
            models = self.bench.store.known_models
            models["m"] = replace(models["m"], status="terminated")
            await self.bench.operations.cancel_model("m", "model_terminated", "gone")
            assert "m" not in self.at_work

    async def _client(self, index: int, request: Sent) -> None:
        await asyncio.sleep(request.at_s)
        if request.refused and request.seq_id is not None and request.model_id is not None:
            await self.bench.operations.skip(OWNER, request.model_id, request.seq_id)
            return
        num_sends = 1 if request.seq_id is None or request.model_id is None else request.num_sends
        await asyncio.gather(*(self._send(index, request, number * request.again_s) for number in range(num_sends)))

    async def _send(self, index: int, request: Sent, after_s: float) -> None:
        seq_id = request.seq_id if request.model_id is not None else None
        await asyncio.sleep(after_s)
        operation = self.bench.operation(seq_id, model_id=request.model_id, digest=f"request {index}")
        try:
            with self.bench.operations.receiving(OWNER, request.model_id or "-"):
                await asyncio.sleep(0.2)
                arrived_at = self.bench.now()
                answer = await self.bench.operations.submit(operation, self._run(operation, request))
        except ServiceError as error:
            self.refusals.append(error)
            self.refused_ids.add(operation.id)
            return
        self.accepted[answer.id] = answer
        self.arrived_at.setdefault(answer.id, arrived_at)
        self.answers.setdefault(index, set()).add(answer.id)

    def _run(self, operation: Operation, request: Sent) -> Callable[[], Awaitable[bytes]]:
        async def work() -> bytes:
            if operation.model_id is not None:
                assert operation.model_id not in self.at_work, "two at a time"
                self.at_work.add(operation.model_id)
            self.runs.append((operation.model_id, operation.seq_id, operation.id))
            try:
                await asyncio.sleep(request.seconds)
            finally:
                self.at_work.discard(operation.model_id)
            if request.fails:
                raise BatchError("as planned")
            return operation.id.encode()

        return work

    def _check_unnumbered(self, ran: list[str]) -> None:
        """None ran before something that had come before it."""
        rows = self.bench.store.rows
        for place, id_ in enumerate(ran):
            if rows[id_].seq_id is None:
                later = [other for other in ran[place:] if self.arrived_at[other] < self.arrived_at[id_]]
                assert not later, "overtook what had come before"

    def check(self) -> None:
        ids = [operation_id for _, _, operation_id in self.runs]
        assert len(ids) == len(set(ids)), "run twice"
        for model_id in ("m", "n"):
            numbers = [seq_id for model, seq_id, _ in self.runs if model == model_id and seq_id is not None]
            assert numbers == sorted(set(numbers)), "out of order, or a number twice"
            self._check_unnumbered([id_ for model, _, id_ in self.runs if model == model_id])
        allowed = {"seq_id_too_late", "seq_id_conflict"} | (
            {"model_terminated"} if self.terminate_at_s is not None else set()
        )
        assert {error.code for error in self.refusals} <= allowed
        rows = self.bench.store.rows
        assert not self.refused_ids & set(rows)
        assert set(self.accepted) == set(rows), "stored is what was accepted"
        for row in rows.values():
            assert row.ended
            assert (row.id in ids) == (row.error_code != "model_terminated")
            assert row.status != "done" or row.response == row.id.encode()
        for answers in self.answers.values():
            assert len(answers) == 1, "one request, one operation"


@settings(max_examples=300, deadline=None)
@given(
    requests=st.lists(sent, max_size=14),
    terminate_at_s=st.one_of(st.none(), st.floats(0, 40)),
    seed=st.integers(0, 99),
)
def test_whatever_comes_runs_in_order_once_and_ends(requests: list[Sent], terminate_at_s: float | None, seed: int):
    history: list[History] = []

    async def scenario() -> None:
        history.append(History(requests, terminate_at_s, seed))
        await history[0].play()

    logging.disable(logging.ERROR)
    try:
        virtually(scenario)
    finally:
        logging.disable(logging.NOTSET)
    history[0].check()
    for error in history[0].refusals:
        event(error.code)
    event(f"terminated: {terminate_at_s is not None}")
