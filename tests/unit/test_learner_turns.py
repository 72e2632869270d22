"""Turns at learner ranks: an operation that nobody waits for keeps its turn; large batches leave the loop free."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import numpy as np
import pytest
from fake_learner_ranks import FakeRank, until

from actors import batches
from actors.learner import RayLearnerGroup
from weaver_rl.errors import ActorFailedError, BatchError, CallFailedError, LearnerLostError
from weaver_rl.learner.adapter_config import AdapterConfig
from weaver_rl.losses.config import CrossEntropy
from weaver_rl.types import AdamParams, Datum, ForwardOutput

pytestmark = pytest.mark.unit

LOSS = CrossEntropy(name="cross_entropy")
ADAM = AdamParams(learning_rate=0.1)


def make_data(num_tokens: int = 4) -> list[Datum]:
    tokens = np.zeros(num_tokens, dtype=np.int64)
    inputs = {"target_tokens": tokens, "weights": np.ones(num_tokens, dtype=np.float32)}
    return [Datum(datum_id="d0", token_ids_N=tokens, loss_fn_inputs=inputs)]


async def cancelled(task: asyncio.Task[object]) -> None:
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


def test_a_cancelled_operation_keeps_its_turn_until_it_has_ended() -> None:
    async def run() -> None:
        rank = FakeRank()
        group = RayLearnerGroup([rank], 60.0)
        rank.hold("save_hf")
        saving = asyncio.create_task(group.save_hf(Path("a")))
        await until(lambda: rank.log == ["save_hf begins"])
        await cancelled(saving)
        rank.answers["optim_step"] = "stepped"
        stepping = asyncio.create_task(group.with_adapter("a").optim_step(ADAM))
        await asyncio.sleep(0.05)
        assert rank.log == ["save_hf begins"]
        rank.let_go("save_hf")
        assert await stepping == "stepped"
        assert rank.log == ["save_hf begins", "save_hf ends", "optim_step begins", "optim_step ends"]

    asyncio.run(run())


def test_an_operation_that_is_cancelled_before_its_turn_is_never_sent() -> None:
    async def run() -> None:
        rank = FakeRank()
        group = RayLearnerGroup([rank], 60.0)
        rank.hold("save_hf")
        saving = asyncio.create_task(group.save_hf(Path("a")))
        await until(lambda: rank.log == ["save_hf begins"])
        adding = asyncio.create_task(group.add_adapter("a", AdapterConfig(rank=1)))
        await asyncio.sleep(0.01)
        await cancelled(adding)
        rank.let_go("save_hf")
        await saving
        await group.save_for_sampler(Path("a"))
        assert [name for name, _ in rank.calls] == ["save_hf", "save_for_sampler"]

    asyncio.run(run())


@pytest.mark.parametrize("error", [ActorFailedError("rank 0 died"), CallFailedError("full"), BatchError("datum 'd0'")])
def test_what_a_cancelled_operation_found_out_is_told_to_the_next(error: Exception) -> None:
    async def run() -> None:
        rank = FakeRank()
        group = RayLearnerGroup([rank], 60.0, outlives_failed_calls=True)
        rank.hold("save_hf")
        rank.errors["save_hf"] = error
        saving = asyncio.create_task(group.save_hf(Path("a")))
        await until(lambda: rank.log == ["save_hf begins"])
        await cancelled(saving)
        rank.let_go("save_hf")
        if type(error) is ActorFailedError:
            with pytest.raises(LearnerLostError, match="rank 0 died"):
                await group.with_adapter("a").optim_step(ADAM)
            assert [name for name, _ in rank.calls] == ["save_hf"]
        else:
            await group.with_adapter("a").optim_step(ADAM)

    asyncio.run(run())


def test_a_restart_waits_for_no_turn_of_the_ranks_before_it() -> None:
    async def run() -> None:
        old, new = FakeRank(), FakeRank()

        async def start_anew() -> list[FakeRank]:
            return [new]

        group = RayLearnerGroup([old], 60.0, start_anew)
        old.hold("save_hf")
        saving = asyncio.create_task(group.save_hf(Path("a")))
        await until(lambda: old.log == ["save_hf begins"])
        waiting = asyncio.create_task(group.optim_step(ADAM))
        await asyncio.sleep(0.01)
        await cancelled(saving)
        await group.restart()
        await group.save_hf(Path("b"))
        assert new.log == ["save_hf begins", "save_hf ends"]
        old.let_go("save_hf")
        await until(lambda: "optim_step ends" in old.log)
        await asyncio.wait([waiting])
        assert [name for name, _ in new.calls] == ["save_hf"]

    asyncio.run(run())


def test_a_large_batch_is_handed_over_in_a_thread_and_in_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    puts: list[tuple[object, str]] = []

    def put(data: object) -> str:
        puts.append((data, threading.current_thread().name))
        return "reference"

    monkeypatch.setattr(batches.ray, "put", put)
    small, large = make_data(), make_data(batches.LARGE_BYTES // 20 + 1)

    async def run() -> None:
        rank = FakeRank()
        rank.answers["forward"] = ForwardOutput(logprobs_per_datum=(np.zeros(4, dtype=np.float32),))
        group = RayLearnerGroup([rank], 60.0)
        await group.forward(small)
        assert not puts
        rank.hold("save_hf")
        saving = asyncio.create_task(group.save_hf(Path("a")))
        await until(lambda: "save_hf begins" in rank.log)
        waiting = asyncio.create_task(group.forward(large))
        await asyncio.sleep(0.05)
        assert not puts  # or batches that wait would all be in memory twice
        rank.let_go("save_hf")
        await asyncio.gather(saving, waiting)
        assert [arguments[0] for name, arguments in rank.calls if name == "forward"] == [tuple(small), "reference"]

    asyncio.run(run())
    assert [list(data) for data, _ in puts] == [large]
    assert puts[0][1] != threading.main_thread().name


def test_a_batch_that_the_object_store_refuses_costs_nobody_the_learner(monkeypatch: pytest.MonkeyPatch) -> None:
    def put(_: object) -> str:
        raise batches.RayError("object store full")

    monkeypatch.setattr(batches.ray, "put", put)

    async def run() -> None:
        rank = FakeRank()
        group = RayLearnerGroup([rank], 60.0)
        with pytest.raises(CallFailedError, match="1 MiB could not be handed"):
            await group.forward(make_data(batches.LARGE_BYTES // 20 + 1))
        assert not rank.calls

    asyncio.run(run())
