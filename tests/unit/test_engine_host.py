"""The engines of a server with fake actors: whose weights a sample has, who ends which engine, and that nobody waits
for what cannot come."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

import pytest
from fake_engine_actors import (
    CONFIG,
    SAMPLING,
    FakeCluster,
    all_samplers,
    base,
    host_of,
    request,
    version_of,
    whole,
)

import actors.engine_host
from actors.engine_host import RaySamplers
from weaver_rl.errors import (
    ActorFailedError,
    CallFailedError,
    EngineError,
    EngineLostError,
    ModelError,
    ResourcesError,
)
from weaver_rl.plan.virtual_loop import run_virtually
from weaver_rl.types import GroupSample

pytestmark = pytest.mark.unit


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    return FakeCluster(monkeypatch)


def in_time(main: Coroutine[Any, Any, Any]) -> Any:
    return run_virtually(main)


def begin(samplers: RaySamplers, version: int, name: str, num: int = 1) -> asyncio.Task[GroupSample]:
    return asyncio.create_task(samplers.sample(whole(version), request(name, num), SAMPLING))


async def ended(*tasks: asyncio.Task[Any]) -> list[Any]:
    return await asyncio.gather(*tasks, return_exceptions=True)


def test_a_request_is_given_up_by_the_service_before_its_engine_is_lost(cluster: FakeCluster):
    """What waits in a paused engine for too long costs its own client that request, and nobody an engine."""

    async def main() -> None:
        samplers = all_samplers()
        await samplers.pause("m", "in_place")
        waiting = begin(samplers, 7, "a")
        await asyncio.sleep(CONFIG.operations.timeout_s + 30)
        assert not waiting.done()
        waiting.cancel()
        await ended(waiting)
        assert len(cluster.alive) == 1
        await samplers.close_all()

    in_time(main())


# -- whose weights a sample has ------------------------------------------------------------------------------------


@pytest.mark.parametrize("after_s", [0.5, 3.0, 6.5, 7.0, 7.2])  # room, start, load, its last moment, the sample
def test_a_model_that_is_closed_while_it_is_sampled_from_leaves_no_engine(cluster: FakeCluster, after_s: float):
    async def main() -> None:
        samplers = all_samplers()
        waiting = [begin(samplers, 7, "a"), begin(samplers, 7, "b"), begin(samplers, 8, "c")]
        await asyncio.sleep(after_s)
        await samplers.close("m")
        for result in await ended(*waiting):
            assert isinstance(result, ActorFailedError) or version_of(result) == 7
        assert (cluster.alive, cluster.rooms) == ([], set())

    in_time(main())


@pytest.mark.parametrize("how", ["closed", "lost"])
def test_an_engine_that_goes_just_after_its_load_never_lends_its_name_to_another(cluster: FakeCluster, how: str):
    """The load was answered; whoever waits for it has not gone on yet."""

    async def main() -> None:
        samplers = all_samplers()
        going: list[asyncio.Task[None]] = []

        def go() -> None:
            cluster.after_load = None
            host = host_of(samplers)
            assert host._engine is not None
            end = samplers.close("m") if how == "closed" else host._lose(host._engine, ActorFailedError("killed"))
            going.append(asyncio.create_task(end))

        cluster.after_load = go
        [first] = await ended(begin(samplers, 7, "a"))
        assert isinstance(first, EngineLostError)
        assert len(cluster.actors) == 1
        await ended(*going)
        assert (cluster.alive, cluster.rooms) == ([], set())
        assert version_of(await begin(samplers, 7, "again")) == 7

    in_time(main())


def test_who_holds_a_turn_of_a_lost_engine_starts_no_other(cluster: FakeCluster):
    async def main() -> None:
        samplers = all_samplers()
        await begin(samplers, 7, "a")
        host = host_of(samplers)
        async with host._admitted(whole(7)) as engine:
            await host._lose(engine, ActorFailedError("killed"))
            assert host._engine is None
            another = await host.engine()
            with pytest.raises(EngineLostError, match="lost before"):
                await host._watched_sample(engine, request("b"), SAMPLING)
            assert another is host._engine
        assert version_of(await begin(samplers, 7, "c")) == 7

    in_time(main())


def test_a_closed_host_refuses_for_good(cluster: FakeCluster):
    async def main() -> None:
        samplers = all_samplers()
        await begin(samplers, 7, "a")
        host = host_of(samplers)
        await samplers.close("m")
        for _ in range(2):
            with pytest.raises(EngineLostError, match="was closed"):
                await host.sample(whole(7), request("b"), SAMPLING)
        assert (len(cluster.actors), cluster.rooms) == (1, set())

    in_time(main())


# -- starts --------------------------------------------------------------------------------------------------------


def test_all_who_wait_share_one_start_and_its_failure(cluster: FakeCluster):
    async def main() -> None:
        cluster.reserve_s, cluster.reserve_error = 30.0, ResourcesError("no room")
        samplers = all_samplers()
        start = asyncio.get_running_loop().time()
        results = await asyncio.gather(
            *(samplers.sample(base(), request(f"{n}"), SAMPLING) for n in range(20)), return_exceptions=True
        )
        assert all(isinstance(result, ResourcesError) for result in results)
        assert asyncio.get_running_loop().time() - start == pytest.approx(30.0)
        cluster.reserve_error = None
        await samplers.sample(base(), request(), SAMPLING)
        assert cluster.num_reserved == 2

    in_time(main())


def test_who_gives_up_leaves_the_start_to_the_others(cluster: FakeCluster):
    async def main() -> None:
        samplers = all_samplers()
        first, second = (asyncio.create_task(samplers.sample(base(), request(n), SAMPLING)) for n in "ab")
        await asyncio.sleep(3.0)
        first.cancel()
        assert (await second).group_id == "b"
        assert len(cluster.actors) == 1

    in_time(main())


def test_closing_breaks_off_a_start(cluster: FakeCluster):
    async def main() -> None:
        cluster.start_s = 600.0
        samplers = all_samplers()
        waiting = begin(samplers, 7, "a")
        await asyncio.sleep(10.0)
        start = asyncio.get_running_loop().time()
        await samplers.close("m")
        assert asyncio.get_running_loop().time() - start < 2.0
        assert isinstance((await ended(waiting))[0], EngineLostError)
        assert (cluster.alive, cluster.rooms) == ([], set())

    in_time(main())


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (EngineError("the engine did not start within 5 s; it stands at:\n  File x"), "not start within 5 s"),
        (ModelError("no weights in /srv/models/secret/tiny/model.bin"), "no weights in …/model.bin"),
        (CallFailedError("engine failed while starting: RuntimeError: boom\nTraceback"), "RuntimeError: boom"),
    ],
)
def test_an_engine_that_does_not_start_is_the_servers_fault(
    cluster: FakeCluster, caplog: pytest.LogCaptureFixture, error: Exception, shown: str
):
    async def main() -> None:
        cluster.start_error = error
        [seen] = await ended(asyncio.create_task(all_samplers().sample(base(), request(), SAMPLING)))
        assert type(seen) is ActorFailedError
        assert str(seen).startswith("engine of weaver-rl/tiny did not start: ")
        assert str(seen).endswith(shown)
        assert "\n" not in str(seen)
        assert (cluster.alive, cluster.rooms) == ([], set())

    in_time(main())
    assert str(error) in caplog.text


# -- losses --------------------------------------------------------------------------------------------------------


def test_a_failed_call_leaves_the_engine_alone(cluster: FakeCluster):
    async def main() -> None:
        samplers = all_samplers()
        for error in (CallFailedError("KeyError"), EngineLostError("a step failed"), EngineError("refused")):
            cluster.sample_error = error
            with pytest.raises(type(error)):
                await samplers.sample(base(), request(), SAMPLING)
        assert len(cluster.alive) == len(cluster.actors) == 1

    in_time(main())


@pytest.mark.parametrize("beat", [{"is_closed": True}, {"num_failed_in_a_row": 3}], ids=str)
def test_an_engine_that_is_of_no_use_is_replaced(cluster: FakeCluster, beat: dict[str, Any]):
    async def main() -> None:
        samplers = all_samplers()
        await samplers.sample(base(), request("a"), SAMPLING)
        await asyncio.sleep(20.0)
        assert len(cluster.alive) == 1
        broken = cluster.actors[0]
        broken.beat = replace(broken.beat, num_failed_in_a_row=2)
        await asyncio.sleep(20.0)
        assert not broken.is_dead
        broken.beat = replace(broken.beat, **beat)
        await asyncio.sleep(20.0)
        assert broken.is_dead
        assert (await samplers.sample(base(), request("b"), SAMPLING)).sampler == "1"
        assert len(cluster.rooms) == 1

    in_time(main())


def test_there_is_always_room_beside_the_samples(cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(actors.engine_host, "MAX_REQUESTS", 5)

    async def main() -> None:
        samplers = all_samplers()
        await asyncio.gather(*(samplers.sample(base(), request(f"{n}"), SAMPLING) for n in range(20)))
        assert cluster.actors[0].most_in_flight == 5

    in_time(main())


def test_models_that_are_gone_keep_no_engine_that_nobody_waits_for(cluster: FakeCluster):
    async def main() -> None:
        samplers = all_samplers()
        await asyncio.gather(
            *(samplers.sample(whole(1, model), request(model), SAMPLING) for model in ("gone", "kept", "busy"))
        )
        cluster.sample_s = 50.0
        busy = asyncio.create_task(samplers.sample(whole(1, "busy"), request("more"), SAMPLING))
        await asyncio.sleep(0.1)
        await samplers.close_all_but(["kept"])
        assert sorted(samplers._whole) == ["busy", "kept"]
        assert (len(cluster.alive), len(cluster.rooms)) == (2, 2)
        await busy
        await samplers.close_all_but({"kept"})
        assert sorted(samplers._whole) == ["kept"]
        assert len(cluster.rooms) == 1

    in_time(main())


# -- pauses --------------------------------------------------------------------------------------------------------


def test_a_resume_during_the_start_of_a_paused_engine_is_not_lost(cluster: FakeCluster):
    async def main() -> None:
        samplers = all_samplers()
        await samplers.pause("m", "in_place")
        waiting = begin(samplers, 7, "a")
        await asyncio.sleep(6.2)  # the engine is up and is being paused
        assert cluster.actors[0].told == ["in_place"]
        await samplers.resume("m")
        assert version_of(await waiting) == 7
        assert cluster.actors[0].told == ["in_place", "resume"]

    in_time(main())


def test_a_model_can_be_paused_before_it_has_an_engine(cluster: FakeCluster):
    async def main() -> None:
        samplers = all_samplers()
        await samplers.resume("m")
        await samplers.pause("m", "abort")
        await samplers.pause("m", "retract")
        waiting = begin(samplers, 7, "a")
        await asyncio.sleep(60.0)
        assert cluster.actors[0].paused == "retract"
        assert not waiting.done()
        await samplers.resume("m")
        await waiting

    in_time(main())


@pytest.mark.parametrize("after_s", [0.5, 3.0, 6.5, 7.5])  # room, start, load, the sample
def test_an_abort_ends_also_what_has_not_come_to_the_engine(cluster: FakeCluster, after_s: float):
    async def main() -> None:
        cluster.sample_s = 100.0
        samplers = all_samplers()
        waiting = [begin(samplers, 7, "a", num=3), begin(samplers, 7, "b"), begin(samplers, 8, "c", num=2)]
        await asyncio.sleep(after_s)
        await samplers.pause("m", "abort")
        groups = await asyncio.wait_for(asyncio.gather(*waiting), 1.0)
        assert [group.group_id for group in groups] == ["a", "b", "c"]
        assert {c.stop_reason for group in groups for c in group.completions_G} == {"abort"}
        assert [len(c.token_ids_L) for c in groups[2].completions_G] == [0, 0]
        assert groups[2].texts_G == ("", "")
        cluster.sample_s = 1.0
        later = begin(samplers, 8, "d")
        await asyncio.sleep(60.0)
        assert not later.done()
        await samplers.resume("m")
        assert version_of(await later) == 8

    in_time(main())


def test_an_abort_ends_also_what_waits_for_room_or_is_on_its_way(cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(actors.engine_host, "MAX_REQUESTS", 2)

    async def main() -> None:
        samplers = all_samplers()
        await begin(samplers, 7, "first")
        cluster.on_the_way_s, cluster.sample_s = 2.0, 100.0
        waiting = [begin(samplers, 7, name) for name in "abcde"]
        await asyncio.sleep(0.1)
        await samplers.pause("m", "abort")
        assert all(task.done() for task in waiting)
        assert {task.result().completions_G[0].stop_reason for task in waiting} == {"abort"}

    in_time(main())


def test_a_pause_of_an_engine_that_dies_holds_for_the_next(cluster: FakeCluster):
    async def main() -> None:
        samplers = all_samplers()
        await begin(samplers, 7, "a")
        pausing = asyncio.create_task(samplers.pause("m", "in_place"))
        await asyncio.sleep(0.1)
        cluster.actors[0].die()
        await pausing
        waiting = begin(samplers, 7, "b")
        await asyncio.sleep(60.0)
        assert cluster.actors[1].paused == "in_place"
        await samplers.resume("m")
        assert version_of(await waiting) == 7

    in_time(main())
