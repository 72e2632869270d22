"""The reward workers as one: lost ones are replaced, a group that kills them is given up."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from fake_fleet import FakeRewardWorkers
from fakes import make_completion

from weaver_rl.errors import ActorFailedError, RewardError
from weaver_rl.plan.virtual_loop import run_virtually
from weaver_rl.reward_fleet import MAX_FAILED_STARTS, MAX_TRIES, PAUSE_BEFORE_RETRY_S, RewardFleet
from weaver_rl.types import Prompt, Rollout

pytestmark = pytest.mark.unit


def group(number: int) -> list[Rollout]:
    prompt = Prompt(prompt_id="p", text="p", token_ids_P=(1, 2))
    return [
        Rollout(rollout_id=f"{number:08d}-{i:03d}", prompt=prompt, completion=make_completion(), text=f"{number} {i}")
        for i in range(2)
    ]


@contextlib.asynccontextmanager
async def fleet(factory: FakeRewardWorkers, num: int = 2) -> AsyncIterator[RewardFleet]:
    names = [f"reward worker {index}" for index in range(num)]
    rewards = RewardFleet(factory, names, labels=["task", "length"], watch_every_s=5.0)
    await rewards.start()
    try:
        yield rewards
    finally:
        await rewards.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert all(worker.closed for worker in factory.made)


def test_a_lost_worker_that_is_still_being_ended_is_ended_when_the_fleet_closes():
    async def story() -> None:
        factory = FakeRewardWorkers(upsets={0: "die"})
        async with fleet(factory) as rewards:
            factory.made[0].killed_in_s = 5.0
            await rewards.score(group(1))
            assert not factory.made[0].closed

    run_virtually(story())


@pytest.mark.parametrize("how", ["die", "hang"])
def test_a_lost_worker_is_replaced_and_another_scores_its_group(how: str):
    async def story() -> None:
        factory = FakeRewardWorkers(upsets={0: how})
        async with fleet(factory, num=1) as rewards:
            scored = await rewards.score(group(1))
            assert [[c.value is None for c in components] for components in scored] == [[False], [False]]
            assert [worker.name for worker in factory.made] == ["reward worker 0"] * 2
            assert factory.made[0].closed

    run_virtually(story())


def test_a_group_that_every_worker_is_lost_over_is_missing_with_the_reason():
    async def story() -> None:
        factory = FakeRewardWorkers(upsets=dict.fromkeys(range(MAX_TRIES), "die"))
        async with fleet(factory) as rewards:
            scored = await rewards.score(group(1))
            assert [[(c.name, c.value) for c in parts] for parts in scored] == [[("task", None), ("length", None)]] * 2
            assert scored[0][0].missing == "3 reward workers were lost: reward worker 0 died"
            assert (await rewards.score(group(2)))[0][0].value is not None

    run_virtually(story())


def test_more_groups_than_workers_wait_for_a_free_one():
    async def story() -> None:
        factory = FakeRewardWorkers(seconds=lambda *what: 2.0 if what[0] == "reward" else 0.0)
        async with fleet(factory) as rewards:
            await asyncio.gather(*(rewards.score(group(number)) for number in range(10)))
            assert asyncio.get_running_loop().time() == 10.0

    run_virtually(story())


def test_a_cancelled_score_gives_its_worker_back():
    async def story() -> None:
        factory = FakeRewardWorkers(seconds=lambda *what: 2.0)
        async with fleet(factory, num=1) as rewards:
            scoring = asyncio.create_task(rewards.score(group(1)))
            waiting = asyncio.create_task(rewards.score(group(2)))
            await asyncio.sleep(1.0)
            scoring.cancel()
            await asyncio.gather(scoring, return_exceptions=True)
            assert (await waiting)[0][0].value is not None
            waiting = asyncio.create_task(rewards.score(group(3)))
            await asyncio.sleep(0)
            waiting.cancel()
            assert (await rewards.score(group(4)))[0][0].value is not None

    run_virtually(story())


def test_a_replacement_is_tried_again_and_with_none_left_everyone_is_told():
    async def story() -> None:
        failure = ActorFailedError("no start")
        factory = FakeRewardWorkers(upsets={0: "die"}, failing_starts=[failure] * (MAX_FAILED_STARTS - 1))
        async with fleet(factory, num=1) as rewards:
            assert (await rewards.score(group(1)))[0][0].value is not None
            assert asyncio.get_running_loop().time() >= PAUSE_BEFORE_RETRY_S * 3
            factory.upsets[2] = "die"
            factory.failing_starts = [failure] * MAX_FAILED_STARTS
            for number in (2, 3):
                with pytest.raises(ActorFailedError, match="no start"):
                    await rewards.score(group(number))

    run_virtually(story())


def test_rewards_that_cannot_be_loaded_any_more_end_one_worker_after_the_other():
    async def story() -> None:
        factory = FakeRewardWorkers(upsets={0: "die"}, failing_starts=[RewardError("gone")] * MAX_FAILED_STARTS)
        async with fleet(factory) as rewards:
            await rewards.score(group(1))
            assert (await rewards.score(group(2)))[0][0].value is not None
            await asyncio.sleep(60)
            assert factory.failing_starts == []
            factory.failing_starts = [RewardError("gone")] * MAX_FAILED_STARTS
            factory.upsets[len(factory.asked)] = "die"
            with pytest.raises(RewardError, match="gone"):
                await rewards.score(group(3))

    run_virtually(story())
