"""Operations on a virtual clock: repetitions, failures, terminations, memory, and that nothing is lost."""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref
from dataclasses import replace

import pytest
from operations_bench import LONG_S, OWNER, WAIT_S, Bench, FakeStore, refused, virtually

from weaver_rl.errors import (
    ActorFailedError,
    BatchError,
    CallFailedError,
    CheckpointError,
    ConfigError,
    EngineError,
    EngineLostError,
    LearnerLostError,
    ResourcesError,
    ServiceError,
)
from weaver_rl.service.config import OperationsConfig
from weaver_rl.service.operation_failures import failure_of
from weaver_rl.service.operations import RETRY_S
from weaver_rl.service.records import Operation, OperationKind

pytestmark = pytest.mark.unit

# -- repetitions -----------------------------------------------------------------------------------------------------


def test_the_same_request_sent_twice_runs_once_whenever_it_comes():
    async def scenario() -> None:
        bench = Bench(store=FakeStore(commit_s=lambda: 1.0))
        first, second = await asyncio.gather(bench.submit(1, seconds=10), bench.submit(1, seconds=10))
        assert first.id == second.id
        await asyncio.sleep(1)
        third = await bench.submit(1)
        assert (third.id, third.status) == (first.id, "running")
        await bench.end(first)
        fourth = await bench.submit(1)
        assert (fourth.id, fourth.status, fourth.response) == (first.id, "done", b"1")
        assert bench.ran == ["1"]
        assert list(bench.store.rows) == [first.id]

    virtually(scenario)


@pytest.mark.parametrize("when", ["at the same moment", "while it runs", "when it is done"])
def test_another_request_with_the_same_number_is_refused_and_both_are_named(when: str):
    async def scenario() -> None:
        bench = Bench()
        first_digest, second_digest = "a" * 64, "b" * 64
        submitting = asyncio.ensure_future(bench.submit(1, digest=first_digest))
        await asyncio.sleep(0)
        if when != "at the same moment":
            await submitting
        if when == "when it is done":
            await bench.end(submitting.result())
        with pytest.raises(ServiceError, match=f"{first_digest}.*{second_digest}") as error:
            await bench.submit(1, digest=second_digest)
        assert refused(error) == ("seq_id_conflict", 409, False)
        with pytest.raises(ServiceError, match=r"forward_backward.*optim_step"):
            await bench.submit(1, digest=first_digest, kind="optim_step")
        assert (await bench.end(await submitting)).status == "done"
        assert bench.ran == ["1"]

    virtually(scenario)


def test_the_same_request_much_later_is_no_repetition():
    async def scenario() -> None:
        bench = Bench()
        first = await bench.submit(1, seconds=bench.config.repeat_within_s * 2)
        await asyncio.sleep(bench.config.repeat_within_s)
        assert (await bench.submit(1)).id == first.id
        await asyncio.sleep(1)
        with pytest.raises(ServiceError, match=r"901 s ago.*poll that operation.*a seq_id of its own") as error:
            await bench.submit(1)
        assert refused(error) == ("seq_id_conflict", 409, False)
        await bench.end(first)
        with pytest.raises(ServiceError, match="same request"):
            await bench.submit(1)

    virtually(scenario)


def test_a_place_that_only_the_store_knows_of_is_honoured():
    async def scenario() -> None:
        bench = Bench()
        known = replace(bench.operation(1), status="done", response=b"before", finished_at=0.0)
        bench.store.rows[known.id] = known
        assert await bench.submit(1) == known
        with pytest.raises(ServiceError, match="digest other"):
            await bench.submit(1, digest="other")
        assert bench.ran == []
        await bench.end(await bench.submit(2))
        assert bench.now() == 1.0

    virtually(scenario)


def test_a_number_without_a_digest_is_a_mistake_of_ours():
    async def scenario() -> None:
        bench = Bench()
        with pytest.raises(ValueError, match="no digest"):
            await bench.operations.submit(replace(bench.operation(1), digest=None), bench.run("1"))

    virtually(scenario)


# -- who submits -----------------------------------------------------------------------------------------------------


def test_a_request_whose_client_hung_up_runs_and_is_found_when_it_is_sent_again():
    async def scenario() -> None:
        bench = Bench(store=FakeStore(commit_s=lambda: 1.0))
        submitting = asyncio.ensure_future(bench.submit(1))
        await asyncio.sleep(0.5)
        submitting.cancel()
        await asyncio.sleep(0)
        again = await bench.submit(1)
        assert again.id == "op-1"
        assert (await bench.end(again)).status == "done"
        assert bench.ran == ["1"]

    virtually(scenario)


def test_what_the_store_does_not_take_is_refused_and_leaves_no_gap():
    async def scenario() -> None:
        bench = Bench()
        bench.store.broken = ServiceError("storage_unavailable", "no disk", status=503, retryable=True)
        for what in ({"seq_id": 1}, {"seq_id": None}, {"seq_id": None, "model_id": None}):
            with pytest.raises(ServiceError, match="no disk"):
                await bench.submit(**what)
        assert bench.operations.in_flight(OWNER) == 0
        bench.store.broken = None
        await bench.end(await bench.submit(2))
        assert bench.now() == 1.0
        assert bench.ran == ["2"]

    virtually(scenario)


def test_what_is_refused_while_a_gap_is_waited_for_stops_the_clock():
    async def scenario() -> None:
        bench = Bench(store=FakeStore(commit_s=lambda: 1.0))
        submitting = asyncio.ensure_future(bench.submit(3))
        await asyncio.sleep(0.5)
        bench.store.broken = ServiceError("storage_unavailable", "no disk", status=503, retryable=True)
        with pytest.raises(ServiceError, match="no disk"):
            await submitting
        bench.store.broken = None
        await asyncio.sleep(10 * WAIT_S)
        for seq_id in (1, 2, 4):
            await bench.end(await bench.submit(seq_id))
        assert bench.ran == ["1", "2", "4"]

    virtually(scenario)


def test_another_owners_model_and_operation_are_not_there():
    async def scenario() -> None:
        bench = Bench()
        first = await bench.submit(1)
        for missing in (
            bench.operations.submit(replace(bench.operation(2), owner="other"), bench.run("2")),
            bench.submit(1, model_id="no such model"),
            bench.operations.wait("other", first.id, 1.0),
            bench.operations.wait(OWNER, "no such operation", 1.0),
        ):
            with pytest.raises(ServiceError) as error:
                await missing
            assert refused(error) == ("not_found", 404, False)
        assert bench.now() == 0.0
        await bench.end(first)

    virtually(scenario)


def test_a_stranger_does_not_spoil_the_opening_of_a_queue():
    async def scenario() -> None:
        bench = Bench()
        stranger = bench.operations.submit(replace(bench.operation(1), owner="other"), bench.run("1"))
        strange, own = await asyncio.gather(stranger, bench.submit(1), return_exceptions=True)
        assert isinstance(strange, ServiceError)
        assert isinstance(own, Operation)
        await bench.end(own)

    virtually(scenario)


def test_operations_in_flight_are_counted_by_owner():
    async def scenario() -> None:
        bench = Bench()
        made = [await bench.submit(1), await bench.submit(2), await bench.submit(model_id=None, name="s")]
        assert bench.operations.in_flight(OWNER) == 3
        assert bench.operations.in_flight("other") == 0
        for operation in made:
            await bench.end(operation)
        assert bench.operations.in_flight(OWNER) == 0
        assert not bench.operations._in_flight

    virtually(scenario)


# -- waiting ---------------------------------------------------------------------------------------------------------


def test_many_wait_for_one_end_and_each_only_as_long_as_it_said():
    async def scenario() -> None:
        bench = Bench()
        operation = await bench.submit(1, seconds=10.0)
        long = [asyncio.ensure_future(bench.end(operation)) for _ in range(500)]
        short = await bench.operations.wait(OWNER, operation.id, 3.0)
        assert (bench.now(), short.status) == (3.0, "running")
        assert (await bench.operations.wait(OWNER, operation.id, 0.0)).status == "running"
        assert {end.status for end in await asyncio.gather(*long)} == {"done"}
        assert bench.now() == 10.0

    virtually(scenario)


def test_an_attachment_is_fetched_by_itself_while_it_is_kept():
    async def scenario() -> None:
        bench = Bench()
        operation = await bench.submit(1, attachment=b"pack")
        with pytest.raises(ServiceError, match="no binary part") as error:
            await bench.operations.attachment(OWNER, operation.id)
        assert refused(error) == ("not_found", 404, False)
        ended = await bench.end(operation)
        assert (ended.status, ended.response, ended.attachment) == ("done", b"1", b"pack")
        for _ in range(2):
            assert await bench.operations.attachment(OWNER, operation.id) == b"pack"
        assert (await bench.end(operation)).attachment is None
        plain = await bench.submit(2)
        await bench.end(plain)
        for owner, operation_id in ((OWNER, plain.id), ("another", operation.id), (OWNER, "op-none")):
            with pytest.raises(ServiceError) as error:
                await bench.operations.attachment(owner, operation_id)
            assert refused(error) == ("not_found", 404, False)

    virtually(scenario)


def test_an_attachment_that_the_store_does_not_take_is_answered_from_memory_and_goes_with_a_failure():
    async def scenario() -> None:
        bench = Bench()
        operation = await bench.submit(1, attachment=b"pack")
        bench.store.broken = ServiceError("storage_unavailable", "no disk", status=503, retryable=True)
        await bench.end(operation)
        assert bench.store.rows[operation.id].status == "pending"
        assert await bench.operations.attachment(OWNER, operation.id) == b"pack"
        bench.store.broken = None
        await asyncio.sleep(2 * RETRY_S)
        assert await bench.operations.attachment(OWNER, operation.id) == b"pack"
        assert bench.store.rows[operation.id].attachment == b"pack"
        large = await bench.submit(2, attachment=b"too much")
        bench.store.broken = ServiceError("invalid_request", "larger than the database can hold")
        ending = asyncio.ensure_future(bench.end(large))
        await asyncio.sleep(1.5)
        bench.store.broken = None
        ended = await ending
        assert (ended.error_code, ended.response, ended.attachment) == ("too_large", None, None)

    virtually(scenario)


# -- failures --------------------------------------------------------------------------------------------------------

TRAINING: tuple[OperationKind, ...] = ("forward_backward", "optim_step", "load")
OTHERS: tuple[OperationKind, ...] = ("forward", "export_sampler", "save", "export_hf", "sample", "logprobs")


@pytest.mark.parametrize(
    ("error", "code", "retryable", "retryable_in_training"),
    [
        (BatchError("datum 3: bad"), "invalid_request", False, False),
        (ConfigError("rank 900"), "invalid_request", False, False),
        (EngineError("too long"), "invalid_request", False, False),
        (CheckpointError("disk full"), "checkpoint_error", False, False),
        (ResourcesError("no GPU"), "no_capacity", True, True),
        (LearnerLostError("rank 0 died"), "learner_lost", False, False),
        (CallFailedError("rank 0 failed"), "backend_failed", False, False),
        (EngineLostError("engine died"), "backend_lost", True, False),
        (ActorFailedError("sampler 0 died"), "backend_lost", True, False),
        (TimeoutError("secret"), "timeout", True, False),
        (KeyError("secret"), "internal_error", False, False),
        (ServiceError("odd", "as it says", retryable=True, details={"a": 1}), "odd", True, True),
        (
            ServiceError("storage_unavailable", "no disk", status=503, retryable=True, details={"a": 1}),
            "storage_unavailable",
            True,
            False,
        ),
    ],
)
def test_every_error_has_a_code_and_is_honest_about_another_try(
    error: Exception, code: str, retryable: bool, retryable_in_training: bool
):
    for kind in TRAINING + OTHERS:
        failure = failure_of(error, kind, "op-1")
        assert failure.code == code
        assert failure.retryable == (retryable_in_training if kind in TRAINING else retryable)
        assert "secret" not in failure.message
        assert failure.message
    assert failure_of(KeyError("secret"), "load", "op-1").message.endswith("operation op-1")
    assert failure_of(BatchError("datum 3: bad"), "load", "op-1").message == "datum 3: bad"
    if isinstance(error, ServiceError):
        assert failure.details == {"a": 1}


def test_a_failure_is_told_and_the_queue_goes_on(caplog: pytest.LogCaptureFixture):
    async def scenario() -> None:
        bench = Bench()
        failing = [
            await bench.submit(1, error=ServiceError("bad", "no good", retryable=True, details={"datum": 3})),
            await bench.submit(2, error=ZeroDivisionError("secret")),
            await bench.submit(3, error=asyncio.CancelledError()),
            await bench.submit(None, error=BatchError("datum 1")),
        ]
        last = await bench.submit(4)
        ends = [await bench.end(operation) for operation in failing]
        assert [end.error_code for end in ends] == ["bad", "internal_error", "cancelled", "invalid_request"]
        assert ends[0] == bench.store.rows[ends[0].id]
        assert (ends[0].error_message, ends[0].retryable, ends[0].error_details) == ("no good", True, {"datum": 3})
        assert "secret" not in str(ends[1].error_message)
        assert (await bench.end(last)).status == "done"

    with caplog.at_level(logging.ERROR):
        virtually(scenario)
    assert "ZeroDivisionError: secret" in caplog.text
    assert "no good" not in caplog.text


def test_an_operation_that_takes_too_long_is_stopped_and_the_next_one_runs():
    async def scenario() -> None:
        bench = Bench(config=OperationsConfig(timeout_s=10.0))
        stuck = [await bench.submit(1, seconds=LONG_S), await bench.submit(model_id=None, seconds=LONG_S)]
        second = await bench.submit(2)
        training, sample = [await bench.end(operation) for operation in stuck]
        assert bench.now() == 10.0
        assert (training.error_code, training.retryable) == ("timeout", False)
        assert (sample.error_code, sample.retryable) == ("timeout", True)
        assert "10 s" in str(training.error_message)
        assert (await bench.end(second)).status == "done"

    virtually(scenario)


def test_an_operation_that_will_not_stop_holds_up_its_model_only_for_a_while():
    async def scenario() -> None:
        bench = Bench(config=OperationsConfig(timeout_s=10.0))
        release = asyncio.Event()

        async def stubborn() -> bytes:
            while not release.is_set():
                try:
                    await release.wait()
                except asyncio.CancelledError:
                    continue
            return b"late"

        first = await bench.operations.submit(bench.operation(1), stubborn)
        second = await bench.submit(2)
        assert (await bench.end(first)).error_code == "timeout"
        assert (await bench.end(second)).status == "done"
        release.set()
        await asyncio.sleep(0)
        assert (await bench.end(first)).error_code == "timeout"

    virtually(scenario)


def test_an_end_that_the_store_does_not_take_is_answered_from_memory_until_it_does():
    async def scenario() -> None:
        bench = Bench()
        operation = await bench.submit(1)
        second = await bench.submit(2)
        bench.store.broken = ServiceError("storage_unavailable", "no disk", status=503, retryable=True)
        ended = await bench.end(operation)
        assert (ended.status, ended.response) == ("done", b"1")
        await bench.end(second)
        assert bench.store.rows[operation.id].status == "pending"
        assert bench.operations.in_flight(OWNER) == 2
        assert (await bench.submit(1)).status == "done"
        bench.store.broken = None
        await asyncio.sleep(RETRY_S + 1)
        assert bench.store.rows[operation.id] == ended
        assert bench.operations.in_flight(OWNER) == 0

    virtually(scenario)


def test_a_response_that_no_database_can_hold_is_a_failure():
    async def scenario() -> None:
        bench = Bench()
        finish = bench.store.finish_operation

        async def refuse(ended: Operation) -> bool:
            if ended.response is not None:
                raise ServiceError("invalid_request", "string or blob too big")
            return await finish(ended)

        bench.store.finish_operation = refuse  # type: ignore[method-assign]
        ended = await bench.end(await bench.submit(1))
        assert (ended.status, ended.error_code, ended.response) == ("error", "too_large", None)

    virtually(scenario)


# -- ends ------------------------------------------------------------------------------------------------------------


def test_terminating_a_model_fails_what_waits_and_lets_end_what_runs():
    async def scenario() -> None:
        bench = Bench(store=FakeStore(commit_s=lambda: 0.5))
        running = await bench.submit(1, seconds=10.0)
        waiting = [await bench.submit(2), await bench.submit(None), await bench.submit(9)]
        submitting = asyncio.ensure_future(bench.submit(3))
        other = await bench.submit(1, model_id="n", seconds=100.0)
        await asyncio.sleep(0)
        bench.store.known_models["m"] = replace(bench.store.known_models["m"], status="terminated")
        cancelling = asyncio.ensure_future(bench.operations.cancel_model("m", "model_terminated", "it was terminated"))
        await asyncio.sleep(0)
        with pytest.raises(ServiceError, match="it was terminated") as error:
            await bench.submit(10)
        assert refused(error) == ("model_terminated", 409, False)
        await cancelling
        ends = [bench.store.rows[operation.id] for operation in (*waiting, await submitting)]
        assert {(end.status, end.error_code, end.error_message) for end in ends} == {
            ("error", "model_terminated", "it was terminated")
        }
        assert bench.store.rows[running.id].status == "done"
        assert bench.ran == ["1", "1"]
        with pytest.raises(ServiceError, match="was terminated") as error:
            await bench.submit(11)
        assert refused(error) == ("model_terminated", 409, False)
        assert not bench.operations._queues.keys() & {"m"}
        await bench.operations.cancel_model("m", "model_terminated", "again")
        assert (await bench.end(other)).status == "done"

    virtually(scenario)


def test_terminating_a_model_can_stop_what_runs():
    async def scenario() -> None:
        bench = Bench()
        running = await bench.submit(1, seconds=100.0)
        await asyncio.sleep(1)
        await bench.operations.cancel_model("m", "model_terminated", "gone", cancel_running=True)
        assert bench.now() == 1.0
        ended = bench.store.rows[running.id]
        assert (ended.status, ended.error_code, ended.retryable) == ("error", "model_terminated", False)
        await bench.end(await bench.submit(2))
        assert bench.ran == ["1", "2"]

    virtually(scenario)


def test_a_model_that_is_terminated_while_its_queue_opens_leaves_nothing_running():
    async def scenario() -> None:
        bench = Bench()
        submitting = asyncio.ensure_future(bench.submit(1, seconds=1.0))
        await asyncio.sleep(0)
        assert bench.operations._opening
        await bench.operations.cancel_model("m", "model_terminated", "gone")
        assert (await bench.end(await submitting)).error_code == "model_terminated"
        assert bench.ran == []

    virtually(scenario)


def test_closing_takes_nothing_more_waits_a_while_and_leaves_the_rest_for_the_next_start():
    async def scenario() -> None:
        bench = Bench()
        quick, endless = await bench.submit(1, seconds=2.0), await bench.submit(1, model_id="n", seconds=LONG_S)
        waiting = await bench.submit(2)
        poll = asyncio.ensure_future(bench.end(waiting))
        await asyncio.sleep(1)
        closing = asyncio.ensure_future(bench.operations.close(timeout_s=5.0))
        await asyncio.sleep(0)
        for what in ({"seq_id": 3}, {"model_id": None}):
            with pytest.raises(ServiceError) as error:
                await bench.submit(**what)
            assert refused(error) == ("server_stopping", 503, True)
        await closing
        assert bench.now() == 6.0
        assert (await poll).status == "pending"
        assert bench.store.rows[quick.id].status == "done"
        assert not bench.store.rows[waiting.id].ended
        assert not bench.store.rows[endless.id].ended
        assert bench.operations.in_flight(OWNER) == 0

    virtually(scenario)


def test_closing_does_not_leave_a_submission_hanging():
    async def scenario() -> None:
        bench = Bench(store=FakeStore(commit_s=lambda: LONG_S))
        submitting = asyncio.ensure_future(bench.submit(1))
        await asyncio.sleep(1)
        async with bench.operations:
            pass
        with pytest.raises(ServiceError) as error:
            await submitting
        assert refused(error) == ("server_stopping", 503, True)
        assert bench.now() < 60

    virtually(scenario)


# -- memory ----------------------------------------------------------------------------------------------------------


class Tensor:
    """Stands for the data of a request."""


@pytest.mark.parametrize("error", [None, BatchError("bad"), RuntimeError("odd")])
def test_a_request_is_let_go_when_it_was_run_without_the_garbage_collector(error: Exception | None):
    async def scenario() -> None:
        bench = Bench(store=FakeStore(commit_s=lambda: 10.0))
        tensor = Tensor()
        gone = weakref.ref(tensor)

        async def work(tensor: Tensor = tensor) -> bytes:
            await asyncio.sleep(1)
            if error is not None:
                raise error
            return b"{}"

        operation = await bench.operations.submit(bench.operation(1), work)
        del tensor, work
        waiting = asyncio.ensure_future(bench.end(operation))
        await asyncio.sleep(0.5)
        assert gone() is not None
        await asyncio.sleep(5)
        assert bench.operations.in_flight(OWNER) == 1
        if error is not None:
            error.__traceback__ = None  # what this test itself holds on to
        assert gone() is None
        await waiting
        assert not bench.operations._entries
        assert not bench.operations._by_place

    gc.collect()
    gc.disable()
    try:
        logging.disable(logging.ERROR)
        virtually(scenario)
    finally:
        logging.disable(logging.NOTSET)
        gc.enable()
