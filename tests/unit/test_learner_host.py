"""The learners of a server with fake ranks: opened, closed, started once for all and ended, with calls cancelled."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from fake_learner_ranks import BASE, FakeCluster, FakeRank, until

from actors.learners import RayLearners
from actors.lineup import _directory_name
from weaver_rl.errors import (
    ActorFailedError,
    CallFailedError,
    ConfigError,
    LearnerLostError,
    ModelError,
    ResourcesError,
)
from weaver_rl.service.records import LoraParams
from weaver_rl.types import AdamParams
from weaver_rl.waits import current_waits

pytestmark = pytest.mark.unit

ADAM = AdamParams(learning_rate=0.1)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    return FakeCluster(monkeypatch)


def opening(learners: RayLearners, model_id: str = "m", rank: int = 4) -> asyncio.Task[Any]:
    return asyncio.create_task(learners.open(model_id, BASE, "lora", LoraParams(rank=rank)))


async def upset(task: asyncio.Task[Any]) -> BaseException | None:
    """What it failed with; None if it was cancelled."""
    await asyncio.wait([task])
    return None if task.cancelled() else task.exception()


async def shared_rank(cluster: FakeCluster, learners: RayLearners) -> FakeRank:
    await learners.preload(BASE)
    return cluster.ranks[-1]


# -- opened and closed ------------------------------------------------------------------------------------------------


def test_a_model_whose_opening_was_given_up_is_freed_and_can_be_opened_again(cluster: FakeCluster) -> None:
    async def run() -> None:
        learners = cluster.learners()
        rank = await shared_rank(cluster, learners)
        rank.hold("add_adapter")
        given_up = opening(learners)
        await until(lambda: rank.log == ["add_adapter begins"])
        given_up.cancel()
        assert await upset(given_up) is None
        rank.let_go("add_adapter")
        await until(lambda: "remove_adapter ends" in rank.log)
        assert not rank.adapters
        assert learners.get("m") is None
        model = await opening(learners)
        assert learners.get("m") is model
        assert rank.adapters == {"m"}
        await learners.close("m")
        assert not rank.adapters

    asyncio.run(run())


def test_who_comes_while_a_given_up_model_is_opened_or_freed_gets_one_that_stays(cluster: FakeCluster) -> None:
    async def run() -> None:
        learners = cluster.learners()
        rank = await shared_rank(cluster, learners)
        rank.hold("add_adapter")
        given_up = opening(learners)
        await until(lambda: rank.log == ["add_adapter begins"])
        given_up.cancel()
        await upset(given_up)
        joined = opening(learners)
        await asyncio.sleep(0)
        rank.let_go("add_adapter")
        assert await joined is learners.get("m")
        assert [name for name, _ in rank.calls] == ["add_adapter"]
        await learners.close("m")

        rank.hold("add_adapter")
        rank.hold("remove_adapter")
        given_up = opening(learners)
        await until(lambda: rank.log[-1] == "add_adapter begins")
        given_up.cancel()
        rank.let_go("add_adapter")
        await until(lambda: rank.log[-1] == "remove_adapter begins")
        late = opening(learners)
        await asyncio.sleep(0.02)
        assert not late.done()
        rank.let_go("remove_adapter")
        assert await late is learners.get("m")
        assert rank.adapters == {"m"}

    asyncio.run(run())


def test_closing_does_not_wait_for_an_opening_that_nobody_waits_for(cluster: FakeCluster) -> None:
    async def run() -> None:
        learners = cluster.learners()
        rank = await shared_rank(cluster, learners)
        rank.hold("add_adapter")
        given_up = opening(learners)
        await until(lambda: rank.log == ["add_adapter begins"])
        given_up.cancel()
        await upset(given_up)
        await asyncio.wait_for(learners.close("m"), 1.0)
        rank.let_go("add_adapter")
        await until(lambda: rank.log[-1] == "remove_adapter ends")
        assert not rank.adapters

    asyncio.run(run())


@pytest.mark.parametrize("error", [CallFailedError("out of memory"), LearnerLostError("died"), ConfigError("none")])
def test_closing_never_fails_and_goes_on_when_it_is_cancelled(cluster: FakeCluster, error: Exception) -> None:
    async def run() -> None:
        learners = cluster.learners()
        rank = await shared_rank(cluster, learners)
        await opening(learners)
        other = await opening(learners, "other")
        rank.errors["remove_adapter"] = error
        await learners.close("m")
        assert learners.get("m") is None
        del rank.errors["remove_adapter"]
        if isinstance(error, LearnerLostError):
            return
        rank.hold("optim_step")
        stepping = asyncio.create_task(other.optim_step(ADAM))
        await until(lambda: rank.log[-1] == "optim_step begins")
        closing = asyncio.create_task(learners.close("other"))
        await asyncio.sleep(0.01)
        closing.cancel()
        await upset(closing)
        rank.let_go("optim_step")
        await stepping
        await until(lambda: rank.adapters == {"m"})

    asyncio.run(run())


def test_a_model_that_is_about_to_be_closed_is_given_to_nobody(cluster: FakeCluster) -> None:
    async def run() -> None:
        learners = cluster.learners()
        first = await learners.open("m", BASE, "full_ft", None)
        closing = asyncio.create_task(learners.close("m"))
        await asyncio.sleep(0)
        second = await learners.open("m", BASE, "full_ft", None)
        await closing
        assert second is not first
        assert learners.get("m") is second
        assert [rank.is_killed for rank in cluster.ranks] == [True, False]

    asyncio.run(run())


def test_a_lost_learner_is_ended_and_forgotten_before_anybody_hears_of_it(cluster: FakeCluster) -> None:
    async def run() -> None:
        learners = cluster.learners()
        rank = await shared_rank(cluster, learners)
        model = await opening(learners)
        current_waits().describe(f"learner of {BASE} rank 0", lambda: None)
        rank.errors["optim_step"] = ActorFailedError("rank 0 died")
        with pytest.raises(LearnerLostError, match="rank 0 died"):
            await model.optim_step(ADAM)
        assert learners.get("m") is None
        assert rank.is_killed
        assert not cluster.rooms
        assert f"learner of {BASE} rank 0" not in current_waits()._facts
        await opening(learners)
        assert cluster.num_starts == 2
        await learners.close_all()

    asyncio.run(run())


def test_a_request_of_the_client_is_refused_as_such(cluster: FakeCluster) -> None:
    async def run() -> None:
        learners = cluster.learners()
        rank = await shared_rank(cluster, learners)
        with pytest.raises(ConfigError, match=r"rank is 9; .* allows 1\.\.8"):
            await opening(learners, rank=9)
        rank.errors["add_adapter"] = ConfigError("the model has no mlp")
        with pytest.raises(ConfigError, match="no mlp"):
            await opening(learners)

    asyncio.run(run())


def test_an_operation_is_given_up_by_the_service_before_its_learner_is_lost(cluster: FakeCluster) -> None:
    async def deadline(**sections: Any) -> float:
        learners = cluster.learners(**sections)
        await learners.preload(BASE)
        return learners._shared[BASE]._group._timeout_s

    assert asyncio.run(deadline()) > 3600.0
    assert asyncio.run(deadline(operations={"timeout_s": 1.0})) == 600.0


# -- starts and ends --------------------------------------------------------------------------------------------------


def failing(*errors: BaseException | None) -> Callable[[], Awaitable[None]]:
    left = list(errors)

    async def start() -> None:
        await asyncio.sleep(0.01)
        if left and (error := left.pop(0)) is not None:
            raise ExceptionGroup("ranks", [error])

    return start


def test_a_start_that_fails_is_tried_once_for_all_who_wait(cluster: FakeCluster) -> None:
    async def run() -> None:
        cluster.starting = failing(ResourcesError("no room"))
        learners = cluster.learners()
        tasks = [opening(learners, f"m{number}") for number in range(5)]
        assert {str(await upset(task)) for task in tasks} == {"no room"}
        assert cluster.num_starts == 1
        assert not cluster.rooms
        await opening(learners)
        assert cluster.num_starts == 2

    asyncio.run(run())


def test_one_who_is_cancelled_does_not_take_the_start_from_the_others(cluster: FakeCluster) -> None:
    async def run() -> None:
        cluster.starting = failing()
        learners = cluster.learners()
        first, second = asyncio.create_task(learners.preload(BASE)), opening(learners)
        await until(lambda: cluster.num_starts == 1)
        first.cancel()
        await second
        assert cluster.num_starts == 1

    asyncio.run(run())


@pytest.mark.parametrize(
    ("error", "kind"),
    [(ConfigError, ActorFailedError), (ModelError, ActorFailedError), (CallFailedError, LearnerLostError)],
)
def test_a_server_that_is_configured_wrongly_does_not_blame_the_client(
    cluster: FakeCluster, error: type[Exception], kind: type[Exception]
) -> None:
    async def run() -> None:
        cluster.starting = failing(error("/srv/secret/model is no model: see '/srv/secret/config.json'\n  more"))
        with pytest.raises(kind) as caught:
            await opening(cluster.learners())
        assert type(caught.value) is kind
        assert str(caught.value).endswith("…/model is no model: see '…/config.json'")

    asyncio.run(run())


def test_a_port_that_was_taken_meanwhile_is_tried_again_once(cluster: FakeCluster) -> None:
    taken = CallFailedError("learner rank 0 failed: DistNetworkError: code: -98, name: EADDRINUSE")

    async def run() -> None:
        cluster.starting = failing(taken)
        await opening(cluster.learners())
        assert cluster.num_starts == 2
        assert [rank.is_killed for rank in cluster.ranks] == [True, False]
        cluster.starting = failing(taken, taken)
        with pytest.raises(LearnerLostError, match="EADDRINUSE"):
            await opening(cluster.learners())

    asyncio.run(run())


@pytest.mark.parametrize("mode", ["lora", "full_ft"])
def test_a_start_in_progress_is_ended_at_once(cluster: FakeCluster, mode: Any) -> None:
    async def start() -> None:
        await asyncio.sleep(600)

    async def run() -> None:
        cluster.starting = start
        learners = cluster.learners()
        waiting = asyncio.create_task(learners.open("m", BASE, mode, LoraParams(rank=4)))
        await until(lambda: cluster.num_starts == 1)
        started = time.monotonic()
        await learners.close_all()
        assert isinstance(await upset(waiting), LearnerLostError)
        assert time.monotonic() - started < 5.0
        assert all(rank.is_killed for rank in cluster.ranks)
        assert not cluster.rooms
        with pytest.raises(LearnerLostError, match="was ended"):
            await learners.preload(BASE)

    asyncio.run(run())


def test_a_learner_that_does_not_end_keeps_nobody(cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*_: Any, **__: Any) -> None:
        await asyncio.sleep(600)

    monkeypatch.setattr("actors.learners.CLOSE_TIMEOUT_S", 0.05)

    async def run() -> None:
        learners = cluster.learners()
        await shared_rank(cluster, learners)
        monkeypatch.setattr("actors.spawn.end_actor", never)
        await asyncio.wait_for(learners.close_all(), 2.0)

    asyncio.run(run())


def test_a_whole_models_learner_ends_with_it_also_if_it_was_given_up_while_it_started(cluster: FakeCluster) -> None:
    async def run() -> None:
        learners = cluster.learners()
        await learners.open("m", BASE, "full_ft", None)
        with pytest.raises(ResourcesError, match="trains 1 model"):
            await learners.open("n", BASE, "full_ft", None)
        await learners.close("m")
        assert cluster.ranks[0].is_killed
        cluster.starting = failing()
        given_up = asyncio.create_task(learners.open("n", BASE, "full_ft", None))
        await until(lambda: cluster.num_starts == 2)
        given_up.cancel()
        await until(lambda: cluster.ranks[1].is_killed and not cluster.rooms)
        await learners.open("o", BASE, "full_ft", None)

    asyncio.run(run())


def test_scratch_models_of_different_names_have_different_directories() -> None:
    names = ["a/b", "a--b", "a:b", "a_b", "a/b:c", "a:b/c", "ab"]
    assert len({_directory_name(name) for name in names}) == len(names)
    assert not any("/" in _directory_name(name) for name in names)
