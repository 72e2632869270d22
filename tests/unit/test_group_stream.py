"""The stream of groups: what a backlog carries, what comes again, and what a step has to wait for."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from fake_fleet import FakeRewardWorkers, FakeSamplers, FleetLog
from fakes import FakePrompts, make_config

from weaver_rl.batch import ScoredGroup
from weaver_rl.group_stream import Backlog, GroupStream
from weaver_rl.plan.virtual_loop import run_virtually
from weaver_rl.reward_fleet import RewardFleet
from weaver_rl.sampler_fleet import SamplerFleet
from weaver_rl.stage_clock import StageClock
from weaver_rl.types import PublishedWeights

pytestmark = pytest.mark.unit


class Events:
    """What a stream tells the journal."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    def dispatched(self, group_id: str, **_: Any) -> None:
        self.told.append(("dispatched", group_id))

    def generated(self, group_id: str, **_: Any) -> None:
        self.told.append(("generated", group_id))

    def reissued(self, group_id: str, **_: Any) -> None:
        self.told.append(("reissued", group_id))

    def scored(self, group_id: str, **_: Any) -> None:
        self.told.append(("scored", group_id))

    def groups(self, what: str) -> list[int]:
        return [int(group_id) for told, group_id in self.told if told == what]


class Stage:
    """A stream over fleets of fakes: generation takes `generate_s`, by group where it says so, a reward `reward_s`."""

    def __init__(self) -> None:
        self.generate_s: dict[int, float] = {}
        self.reward_s = 0.0
        self.events = Events()
        self.factory = FakeSamplers(seconds=self._seconds)
        self.now = asyncio.get_running_loop().time
        self.samplers = SamplerFleet(
            self.factory, ["sampler 0", "sampler 1"], generate_timeout_s=1e6, watch_every_s=1e6, events=FleetLog()
        )
        workers = FakeRewardWorkers(seconds=lambda *what: self.reward_s if what[0] == "reward" else 0.0)
        self.rewards = RewardFleet(workers, ["reward worker 0"], labels=["task"], watch_every_s=1e6)

    def _seconds(self, *what: Any) -> float:
        return self.generate_s.get(int(what[1]), 1.0) if what[0] == "generate" else 0.0

    def stream(self, max_lag: int = 1, last_position: int = 100) -> GroupStream:
        config = make_config(
            rollout={
                "prompts_per_step": 2,
                "samples_per_prompt": 2,
                "max_lag": max_lag,
                "sampling": {"max_tokens": 5},
            }
        )
        return GroupStream(
            prompts=FakePrompts(),
            samplers=self.samplers,
            rewards=self.rewards,
            config=config.rollout,
            specs=config.rewards,
            seed=0,
            last_position=last_position,
            events=self.events,
            now=self.now,
        )

    async def load(self, version: int) -> None:
        await self.samplers.load_weights(PublishedWeights(version=version, handle=0.1 * version, num_bytes=8))

    async def take(self, stream: GroupStream, step: int) -> list[int]:
        return [group.position for group in await stream.take(step, StageClock(self.now))]


@contextlib.asynccontextmanager
async def staged() -> AsyncIterator[Stage]:
    stage = Stage()
    stage.samplers.start()
    await stage.rewards.start()
    await stage.samplers.ready()
    await stage.load(0)
    try:
        yield stage
    finally:
        await stage.samplers.close()
        await stage.rewards.close()


def test_it_admits_as_far_as_the_lag_allows_and_no_further_than_the_run():
    async def story() -> None:
        async with staged() as stage:
            stream = stage.stream(max_lag=1, last_position=7)
            assert [stream.admit(0), stream.admit(0)] == [4, 0]
            assert await stage.take(stream, 1) == [0, 1]
            assert [stream.admit(1), stream.admit(1)] == [2, 0]
            assert await stage.take(stream, 2) == [2, 3]
            assert stream.admit(2) == 1
            await stream.stop()

    run_virtually(story())


def test_a_step_does_not_wait_for_a_long_group_before_its_deadline():
    async def story() -> None:
        async with staged() as stage:
            stage.generate_s = {0: 50.0}
            stream = stage.stream(max_lag=1)
            stream.admit(0)
            assert await stage.take(stream, 1) == [1, 2]
            assert stage.now() < 5
            stream.admit(1)
            assert await stage.take(stream, 2) == [0, 3]
            assert stage.now() >= 50
            await stream.stop()

    run_virtually(story())


def test_a_backlog_is_what_is_admitted_and_not_trained_and_a_restored_stream_goes_on_from_it():
    async def story() -> None:
        async with staged() as stage:
            stage.generate_s = {1: 50.0, 3: 1e5}
            stream = stage.stream(max_lag=2)
            stream.admit(0)
            await asyncio.sleep(2)
            assert await stage.take(stream, 1) == [0, 2]
            await asyncio.sleep(60)
            backlog = stream.backlog()
            assert (backlog.position, backlog.in_flight) == (6, (3,))
            assert [group.position for group in backlog.finished] == [1, 4, 5]
            await stream.stop()
            stage.events.told.clear()
            stage.generate_s = {}
            other = stage.stream(max_lag=2)
            await other.restore(backlog, version=1)
            assert other.backlog() == backlog
            assert other.metrics() == {"groups/in_flight": 0, "groups/finished": 3}
            other.admit(1)
            assert stage.events.groups("dispatched") == [3, 6, 7]
            assert other.metrics() == {"groups/in_flight": 3, "groups/finished": 3}
            steps = [await stage.take(other, 2)]
            other.admit(2)
            steps.append(await stage.take(other, 3))
            assert sorted(position for step in steps for position in step) in ([1, 3, 4, 5], [1, 4, 5, 6])
            assert all(group.position not in (1, 4, 5) for group in other.backlog().finished)
            await other.stop()

    run_virtually(story())


def scored(group: ScoredGroup, position: int, version: int) -> ScoredGroup:
    """The same, elsewhere and of another version."""
    rollouts = tuple(
        replace(
            item,
            rollout=replace(
                item.rollout,
                completion=replace(
                    item.rollout.completion, versions_L=item.rollout.completion.versions_L * 0 + version
                ),
            ),
        )
        for item in group.scored_G
    )
    return ScoredGroup(group_id=f"{position:08d}", sampler=group.sampler, scored_G=rollouts, position=position)


def test_finished_groups_that_a_lower_lag_leaves_no_time_for_are_sampled_again():
    async def story() -> None:
        async with staged() as stage:
            stream = stage.stream(max_lag=3)
            stream.admit(0)
            (group, _) = await stream.take(1, StageClock(stage.now))
            await stream.stop()
            finished = (
                *(scored(group, position, 2) for position in (10, 11)),
                *(scored(group, p, 3) for p in (4, 5, 6)),
            )
            backlog = Backlog(position=12, in_flight=(8,), finished=finished)
            lower = stage.stream(max_lag=1)
            await lower.restore(backlog, version=3)
            left = lower.backlog()
            # v2 can be trained at step 4 alone, which takes two; v3 at 4 and 5, where two places are left.
            assert [g.position for g in left.finished] == [4, 5, 10, 11]
            assert left.in_flight == (6, 8)
            assert lower.admit(3) == 0
            assert await stage.take(lower, 4) == [10, 11]
            assert lower.admit(4) == 2
            assert await stage.take(lower, 5) == [4, 5]
            await lower.stop()
            synchronous = stage.stream(max_lag=0)
            await synchronous.restore(backlog, version=3)
            assert [g.position for g in synchronous.backlog().finished] == [4, 5]
            assert synchronous.backlog().in_flight == (6, 8, 10, 11)

    run_virtually(story())


def test_distrusted_groups_are_sampled_again_and_nothing_else():
    async def story() -> None:
        async with staged() as stage:
            stage.generate_s = {2: 3.0, 3: 3.0, 4: 5.0, 5: 1e5}
            stage.reward_s = 1.5
            stream = stage.stream(max_lag=2)
            stream.admit(0)  # 0, 2, 4 go to sampler 0
            await asyncio.sleep(2.0)
            await stage.load(1)
            await asyncio.sleep(3.2)
            assert stream.distrust("sampler 0", version=1) == 2  # 2 is finished, 4 is being scored; 0 is of v0
            assert stream.distrust("sampler 0", version=9) == 0
            assert [g.position for g in stream.backlog().finished] == [0, 1]
            await asyncio.sleep(20)
            assert sorted(stage.events.groups("reissued")) == [2, 4]
            assert sorted(stage.events.groups("generated")) == [0, 1, 2, 2, 3, 4, 4]
            assert sorted(g.position for g in stream.backlog().finished) == [0, 1, 2, 3, 4]
            assert len(stage.events.groups("dispatched")) == 6
            await stream.stop()

    run_virtually(story())


def test_what_ends_a_group_ends_the_wait_for_it():
    async def story() -> None:
        async with staged() as stage:

            async def score(rollouts: Any) -> Any:
                raise RuntimeError("the pool is gone")

            stage.rewards.score = score
            stream = stage.stream()
            stream.admit(0)
            with pytest.raises(RuntimeError, match="the pool is gone"):
                await stage.take(stream, 1)
            await stream.stop()

    run_virtually(story())


def test_the_time_of_a_step_is_that_of_the_samplers_until_they_are_done_and_then_that_of_the_rewards():
    async def story() -> None:
        async with staged() as stage:
            stage.generate_s = {0: 6.0, 1: 6.0}
            stage.reward_s = 2.0
            stream, clock = stage.stream(max_lag=0), StageClock(stage.now)
            stream.admit(0)
            await stream.take(1, clock)
            assert clock.seconds("sample") == 6.0
            assert clock.seconds("score") == 4.0  # one worker, two groups
            assert stream.sampling_seconds() == 6.0

    run_virtually(story())
