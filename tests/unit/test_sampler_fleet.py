"""The samplers as one: who is given what, what happens to the groups of a lost one, and when the fleet gives up."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest
from fake_fleet import FakeSampler, FakeSamplers, FleetLog, LosableLearner

from weaver_rl.errors import ActorFailedError, ConfigError, EngineError, ResourcesError
from weaver_rl.plan.virtual_loop import run_virtually
from weaver_rl.rollout import SamplingConfig
from weaver_rl.sampler_fleet import MAX_FAILED_STARTS, MAX_ISSUES, SamplerFleet
from weaver_rl.types import GroupSample, PublishedWeights, SampleRequest
from weaver_rl.weights.probe import probe_token_ids
from weaver_rl.weights.sync import WeightSync

pytestmark = pytest.mark.unit

SAMPLING = SamplingConfig(max_tokens=5)
TIMEOUT_S = 100.0


def requests(num: int, first: int = 0) -> list[SampleRequest]:
    return [
        SampleRequest(group_id=f"{position:08d}", token_ids_P=(1, 2), seeds_G=(position,))
        for position in range(first, first + num)
    ]


def taking(seconds: float, start: float = 0.0) -> Callable[..., float]:
    return lambda *what: seconds if what[0] == "generate" else start if what[0] == "start" else 0.0


@contextlib.asynccontextmanager
async def fleet(factory: FakeSamplers, num: int = 2, log: FleetLog | None = None) -> AsyncIterator[SamplerFleet]:
    names = [f"sampler {index}" for index in range(num)]
    samplers = SamplerFleet(factory, names, generate_timeout_s=TIMEOUT_S, watch_every_s=5.0, events=log or FleetLog())
    samplers.start()
    try:
        yield samplers
    finally:
        await samplers.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert all(sampler.closed and not sampler.num_streams for sampler in factory.made)


async def collect(samplers: SamplerFleet, asked: Sequence[SampleRequest]) -> list[GroupSample]:
    found = [sample async for sample in samplers.generate(asked, SAMPLING)]
    assert Counter(sample.group_id for sample in found) == Counter(request.group_id for request in asked)
    return found


def story(work: Callable[[], Any]) -> None:
    run_virtually(work())


def test_idle_samplers_take_turns_and_later_groups_go_where_least_is_owed():
    async def work() -> None:
        factory = FakeSamplers(seconds=lambda *what: 50.0 if what[:2] == ("generate", "00000000") else 1.0)
        async with fleet(factory) as samplers:
            await samplers.ready()
            first = asyncio.create_task(collect(samplers, requests(4)))
            await asyncio.sleep(0)
            assert [name for name, _ in factory.asked] == []
            await asyncio.sleep(10)
            assert factory.asked == [
                *(("sampler 0", f"{i:08d}") for i in (0, 2)),
                *(("sampler 1", f"{i:08d}") for i in (1, 3)),
            ]
            await collect(samplers, requests(1, first=4))  # sampler 0 still has one
            assert factory.asked[-1] == ("sampler 1", "00000004")
            await first

    story(work)


@pytest.mark.parametrize("how", ["die", "hang"])
def test_what_a_lost_sampler_owed_goes_to_others_and_a_new_one_joins(how: str):
    async def work() -> None:
        factory, log = FakeSamplers(seconds=taking(20.0)), FleetLog()
        async with fleet(factory, log=log) as samplers:
            await samplers.ready()
            sampling = asyncio.create_task(collect(samplers, requests(4)))
            await asyncio.sleep(10)
            factory.made[0].die() if how == "die" else factory.made[0].hang()
            found = await sampling
            assert {sample.sampler for sample in found} == {"sampler 1"}
            assert log.reissued == [("00000000", "sampler 0"), ("00000002", "sampler 0")]
            await asyncio.sleep(1)
            assert samplers.names == ("sampler 0", "sampler 1")
            assert log.joined == ["sampler 0", "sampler 1", "sampler 0"]

    story(work)


def test_groups_wait_for_a_replacement_when_every_sampler_is_lost():
    async def work() -> None:
        factory, log = FakeSamplers(seconds=taking(20.0, start=30.0)), FleetLog()
        async with fleet(factory, log=log) as samplers:
            await samplers.ready()
            sampling = asyncio.create_task(collect(samplers, requests(4)))
            await asyncio.sleep(10)
            for sampler in factory.made[:2]:
                sampler.die()
            assert len(await sampling) == 4

    story(work)


def test_a_sampler_past_its_deadline_is_replaced():
    async def work() -> None:
        factory, log = (
            FakeSamplers(seconds=lambda *what: 1000.0 if what[-1] == 0 and what[0] == "generate" else 1.0),
            FleetLog(),
        )
        async with fleet(factory, num=1, log=log) as samplers:
            await collect(samplers, requests(2))
            assert "did not finish 2 groups in 100 s (rollout.timeout_s)" in log.lost[0][1]

    story(work)


def test_a_late_answer_of_a_lost_sampler_is_ignored():
    async def work() -> None:
        factory, log = FakeSamplers(seconds=lambda *what: 10.0 if what[0] == "generate" else 0.0), FleetLog()
        closing = asyncio.Event()

        async def close_slowly(*, kill: bool = False) -> None:
            await closing.wait()
            await FakeSampler.close(factory.made[0], kill=kill)

        async with fleet(factory, log=log) as samplers:
            await samplers.ready()
            factory.made[0].close = close_slowly  # it goes on generating for a while after it was given up
            sampling = asyncio.create_task(collect(samplers, requests(2)))
            await asyncio.sleep(5)
            samplers.replace("sampler 0", "it lies")
            found = await sampling
            assert {sample.sampler for sample in found} == {"sampler 1"}
            closing.set()

    story(work)


def test_what_a_distrusted_sampler_delivered_and_nobody_took_is_sampled_again():
    async def work() -> None:
        factory, log = FakeSamplers(seconds=taking(10.0)), FleetLog()
        async with fleet(factory, log=log) as samplers:
            await samplers.ready()
            groups = samplers.generate(requests(4), SAMPLING)
            found = [await anext(groups)]
            await asyncio.sleep(1)  # the others have arrived
            distrusted = found[0].sampler
            samplers.replace(distrusted, "it lies")
            found += [sample async for sample in groups]
            assert [sample.sampler for sample in found].count(distrusted) == 1
            assert [name for _, name in log.reissued] == [distrusted]

    story(work)


def test_a_sampler_that_loads_again_begins_its_groups_anew_and_is_asked_for_them_once():
    async def work() -> None:
        factory, log = FakeSamplers(seconds=taking(10.0)), FleetLog()
        async with fleet(factory, log=log) as samplers:
            await samplers.ready()
            await samplers.load_weights(PublishedWeights(version=0, handle=9.0, num_bytes=8))
            sampling = asyncio.create_task(collect(samplers, requests(4)))
            await asyncio.sleep(5)
            right = PublishedWeights(version=1, handle=0.5, num_bytes=8)
            await samplers.load_weights(right)
            await samplers.load_weights(right, only="sampler 0")
            await asyncio.sleep(1)
            assert factory.made[0].num_streams == 1
            found = {sample.group_id: sample for sample in await sampling}
            for group_id, sampler in log.reissued:
                assert sampler == "sampler 0"
                assert set(found[group_id].completions_G[0].versions_L.tolist()) == {1}
            assert len(log.reissued) == 2
            assert log.lost == []

    story(work)


def test_a_group_that_too_many_samplers_are_lost_over_stops_the_run_and_is_named():
    async def work() -> None:
        factory, log = FakeSamplers(seconds=taking(1e6)), FleetLog()
        async with fleet(factory, log=log) as samplers:
            with pytest.raises(ActorFailedError, match=f"group 00000000 was given to {MAX_ISSUES} samplers"):
                await collect(samplers, requests(1))
            assert len(log.lost) == MAX_ISSUES

    story(work)


def test_a_request_that_the_engine_refuses_reaches_who_asked_and_loses_nobody():
    class Refusing(FakeSamplers):
        async def start(self, name: str) -> FakeSampler:
            sampler = await super().start(name)

            async def refuse(asked: Any, sampling: Any) -> AsyncIterator[Any]:
                raise EngineError("prompt too long")
                yield

            sampler.generate = refuse
            return sampler

    async def work() -> None:
        log = FleetLog()
        async with fleet(Refusing(), log=log) as samplers:
            await samplers.ready()
            with pytest.raises(EngineError, match="prompt too long"):
                await collect(samplers, requests(2))
            assert log.lost == []

    story(work)


def failing(name: str, call: str, error: type[Exception], times: int) -> list[Any]:
    return [(name, call, lambda: error("no start"))] * times


@pytest.mark.parametrize(
    ("error", "times"), [(ActorFailedError, MAX_FAILED_STARTS), (ResourcesError, 1), (ConfigError, 1)]
)
def test_a_fleet_that_cannot_begin_says_why(error: type[Exception], times: int):
    async def work() -> None:
        async with fleet(FakeSamplers(failing_starts=failing("sampler 1", "start", error, times))) as samplers:
            with pytest.raises(error, match="no start"):
                await samplers.ready()
            with pytest.raises(error, match="no start"):
                await collect(samplers, requests(1))

    story(work)


def test_a_start_that_fails_now_and_then_is_tried_again():
    async def work() -> None:
        starts = failing("sampler 1", "start", ActorFailedError, MAX_FAILED_STARTS - 1)
        async with fleet(FakeSamplers(failing_starts=starts)) as samplers:
            await samplers.ready()
            assert samplers.names == ("sampler 0", "sampler 1")

    story(work)


@pytest.mark.parametrize("num_lost", [1, 2])
def test_lack_of_room_is_waited_out_while_another_serves_or_starts(num_lost: int):
    async def work() -> None:
        starts = failing("sampler 0", "restart", ResourcesError, 7)
        factory = FakeSamplers(seconds=taking(5.0, start=3.0), failing_starts=starts)
        async with fleet(factory) as samplers:
            await samplers.ready()
            for sampler in factory.made[:num_lost]:
                sampler.die()
            await asyncio.sleep(10)
            await collect(samplers, requests(4))
            await asyncio.sleep(200)
            assert samplers.names == ("sampler 0", "sampler 1")

    story(work)


def test_lack_of_room_for_all_ends_it():
    async def work() -> None:
        starts = [
            *failing("sampler 0", "restart", ResourcesError, 50),
            *failing("sampler 1", "restart", ResourcesError, 50),
        ]
        factory = FakeSamplers(seconds=taking(5.0), failing_starts=starts)
        async with fleet(factory) as samplers:
            await samplers.ready()
            for sampler in factory.made[:2]:
                sampler.die()
            with pytest.raises(ResourcesError, match="no start"):
                await collect(samplers, requests(4))

    story(work)


def test_joiners_are_brought_up_before_they_serve_and_leavers_finish_first():
    async def work() -> None:
        factory, log = FakeSamplers(seconds=taking(30.0)), FleetLog()
        brought: list[str] = []

        async def bring_up(sampler: Any, join: Callable[[], None]) -> None:
            await asyncio.sleep(5)
            assert sampler.name not in samplers.names
            brought.append(sampler.name)
            join()

        async with fleet(factory, log=log) as samplers:
            samplers.bring_up_with(bring_up)
            await samplers.ready()
            samplers.scale(3)
            await asyncio.sleep(1)
            assert samplers.members["sampler 2"] == "getting weights"
            await asyncio.sleep(5)
            assert samplers.names == ("sampler 0", "sampler 1", "sampler 2")
            assert brought == ["sampler 0", "sampler 1", "sampler 2"]
            sampling = asyncio.create_task(collect(samplers, requests(6)))
            await asyncio.sleep(1)
            samplers.scale(1)
            await asyncio.sleep(1)
            assert samplers.names == ("sampler 0",)
            assert samplers.members["sampler 1"] == "leaving, owes 2 groups"
            more = asyncio.create_task(collect(samplers, requests(2, first=6)))
            assert Counter(sample.sampler for sample in await sampling) == {f"sampler {i}": 2 for i in range(3)}
            assert {sample.sampler for sample in await more} == {"sampler 0"}
            assert sorted(log.left) == ["sampler 1", "sampler 2"]
            assert log.reissued == []

    story(work)


def test_one_that_is_not_wanted_any_more_does_not_go_on_starting():
    async def work() -> None:
        factory, log = FakeSamplers(seconds=taking(1.0, start=50.0)), FleetLog()
        async with fleet(factory, log=log) as samplers:
            await samplers.ready()
            samplers.scale(4)
            await asyncio.sleep(10)
            samplers.scale(3)
            await asyncio.sleep(1)
            assert log.left == ["sampler 3"]
            await asyncio.sleep(50)
            assert [sampler.name for sampler in factory.made] == ["sampler 0", "sampler 1", "sampler 2"]
            assert samplers.names == ("sampler 0", "sampler 1", "sampler 2")

    story(work)


def test_a_leaver_that_takes_too_long_hands_over():
    async def work() -> None:
        factory, log = FakeSamplers(seconds=lambda *what: 90.0 if what[0] == "generate" else 0.0), FleetLog()
        async with fleet(factory, log=log) as samplers:
            await samplers.ready()
            sampling = asyncio.create_task(collect(samplers, requests(2)))
            await asyncio.sleep(1)
            factory.made[1].hung = True
            factory.made[1]._upset.set()
            samplers.scale(1)
            assert {sample.sampler for sample in await sampling} == {"sampler 0"}
            await asyncio.sleep(1)
            assert log.left == ["sampler 1"]

    story(work)


def test_a_leaver_whose_groups_nobody_wants_any_more_leaves_at_once():
    async def work() -> None:
        factory, log = FakeSamplers(seconds=taking(90.0)), FleetLog()
        async with fleet(factory, log=log) as samplers:
            await samplers.ready()
            sampling = asyncio.create_task(collect(samplers, requests(2)))
            await asyncio.sleep(1)
            samplers.scale(1)
            await asyncio.sleep(1)
            sampling.cancel()
            await asyncio.sleep(1)
            assert log.left == ["sampler 1"]

    story(work)


def test_one_that_leaves_before_it_ever_started_is_not_waited_for():
    async def work() -> None:
        starts = failing("sampler 1", "start", ActorFailedError, 1)
        async with fleet(FakeSamplers(seconds=taking(1.0, start=10.0), failing_starts=starts)) as samplers:
            await asyncio.sleep(5)
            samplers.scale(1)
            await samplers.ready()
            assert samplers.names == ("sampler 0",)

    story(work)


def test_without_any_that_stays_who_waits_is_told():
    async def work() -> None:
        starts = failing("sampler 0", "restart", ActorFailedError, MAX_FAILED_STARTS)
        factory = FakeSamplers(seconds=taking(60.0), failing_starts=starts)
        async with fleet(factory) as samplers:
            await samplers.ready()
            sampling = asyncio.create_task(collect(samplers, requests(4)))
            await asyncio.sleep(1)
            samplers.scale(1)
            await asyncio.sleep(1)
            factory.made[0].die()
            with pytest.raises(ActorFailedError, match="no start"):
                await sampling

    story(work)


@pytest.mark.parametrize("how", ["dies", "leaves"])
def test_a_sampler_that_is_gone_between_load_and_probe_is_reported_as_unproven(how: str):
    async def work() -> None:
        factory, log = FakeSamplers(seconds=taking(50.0)), FleetLog()
        async with fleet(factory, log=log) as samplers:
            learner = LosableLearner(seconds=lambda *what: 3.0)
            sync = WeightSync(learner, samplers, probe_token_ids(12, 8), tolerance=1e-4)
            assert (await sync(0)).unproven == ()
            sampling = asyncio.create_task(collect(samplers, requests(2)))
            await asyncio.sleep(1)
            factory.wrong["sampler 1", 1] = 1
            syncing = asyncio.create_task(sync(1))
            await asyncio.sleep(4)  # loaded; the learner computes the probe
            factory.made[1].die() if how == "dies" else samplers.scale(1)
            assert (await syncing).unproven == ("sampler 1",)
            found = await sampling
            assert [name for _, name in log.reissued] == ["sampler 1"]
            assert all(sample.sampler == "sampler 0" or sample.completions_G[0].versions_L[0] == 1 for sample in found)

    story(work)
