"""What a plan is made of: the engine's schedule, shared cores, the fit, and virtual time in which a driver is busy."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from weaver_rl.plan.cores import SharedCores
from weaver_rl.plan.costs import fit_line
from weaver_rl.plan.least_squares import fit_nonnegative
from weaver_rl.plan.machine import EffectiveClock, Neighbour, seconds_alone
from weaver_rl.plan.simulated_engine import EngineCosts, EngineLimits, SimulatedEngine
from weaver_rl.plan.virtual_loop import VirtualLoop, run_virtually

pytestmark = pytest.mark.unit

COSTS = EngineCosts(per_wave=0.0, per_sequence=0.0, per_step=1.0, per_token=0.1, per_prompt_token=0.01)


def run_to_end(engine: SimulatedEngine) -> list[tuple[float, object]]:
    """When each group ended."""
    now, ended = 0.0, []
    while engine.is_busy:
        now += engine.plan().seconds(COSTS)
        ended += [(round(now, 6), group.key) for group in engine.finish()]
    return ended


def test_one_group_takes_its_longest_completion():
    engine = SimulatedEngine(EngineLimits())
    engine.add([("a", 10, [3, 1])])
    # Three steps; two, one and one sequences; ten prompt tokens for each of the two.
    assert run_to_end(engine) == [(3 * 1.0 + 4 * 0.1 + 20 * 0.01, "a")]


def test_whole_blocks_of_a_prompt_are_computed_once():
    with_cache, without = (SimulatedEngine(EngineLimits(caches_prefixes=caches)) for caches in (True, False))
    for engine in (with_cache, without):
        engine.add([("a", 40, [1, 1, 1])])
    assert with_cache.plan().amounts[4] == 40 + 2 * 8
    assert without.plan().amounts[4] == 120


def test_sequences_wait_for_a_place():
    engine = SimulatedEngine(EngineLimits(max_num_seqs=2))
    engine.add([("a", 1, [2, 2]), ("b", 1, [1])])
    assert [key for _, key in run_to_end(engine)] == ["a", "b"]


def test_prompts_wait_for_a_budget():
    engine = SimulatedEngine(EngineLimits(max_batched_tokens=15, caches_prefixes=False))
    engine.add([("a", 10, [5]), ("b", 10, [1])])
    assert engine.plan().amounts[4] == 10
    engine.finish()
    assert engine.plan().amounts[4] == 10


def test_leaps_cost_what_their_steps_do():
    one, many = (SimulatedEngine(EngineLimits(leap=leap)) for leap in (1, 7))
    for engine in (one, many):
        engine.add([("a", 4, [20, 3]), ("b", 4, [11, 11])])
    # A group ends with the leap in which it ends; the last one exactly.
    assert run_to_end(many)[-1] == run_to_end(one)[-1]


def test_tokens_have_the_version_of_their_step():
    engine = SimulatedEngine(EngineLimits(), version=4)
    engine.add([("a", 1, [3, 1])])
    engine.plan()
    engine.finish()
    engine.load(5)
    engine.plan()
    engine.finish()
    engine.load(6)
    engine.plan()
    [ended] = engine.finish()
    assert ended.versions_G == (((4, 1), (5, 1), (6, 1)), ((4, 1),))


def test_dropped_groups_are_gone():
    engine = SimulatedEngine(EngineLimits(max_num_seqs=1))
    engine.add([("a", 1, [9]), ("b", 1, [9]), ("c", 1, [1])])
    engine.plan()
    engine.finish()
    engine.drop({"a", "b"})
    assert [key for _, key in run_to_end(engine)] == ["c"]


# -- cores ---------------------------------------------------------------------------------------------------------


def finished_at(cores: float | None, *work: tuple[float, float, float]) -> list[float]:
    """When each of some works ends: (begins at, seconds alone, threads)."""

    async def run() -> list[float]:
        loop = asyncio.get_running_loop()
        shared = SharedCores(cores, loop.time)

        async def one(begin: float, seconds: float, num_threads: float) -> float:
            await asyncio.sleep(begin)
            await shared.work(seconds, num_threads)
            return loop.time()

        return await asyncio.gather(*(one(*each) for each in work))

    return [pytest.approx(at) for at in run_virtually(run())]


def test_cores_are_shared_out():
    assert finished_at(2, (0, 3, 2)) == [3]
    assert finished_at(2, (0, 3, 1), (0, 4, 1)) == [3, 4]
    # Both at half speed until the shorter is done, then the other alone.
    assert finished_at(2, (0, 1, 2), (0, 3, 2)) == [2, 4]
    # One second alone, then two at half speed, in which the first does its last second.
    assert finished_at(2, (0, 2, 2), (1, 1, 2)) == [3, 3]
    assert finished_at(None, (0, 1, 9), (0, 3, 9)) == [1, 3]


def test_work_that_is_given_up_frees_its_cores():
    async def run() -> float:
        loop = asyncio.get_running_loop()
        shared = SharedCores(1, loop.time)
        given_up = asyncio.create_task(shared.work(100, 1))
        staying = asyncio.create_task(shared.work(2, 1))
        await asyncio.sleep(2)
        given_up.cancel()
        await staying
        return loop.time()

    assert run_virtually(run()) == pytest.approx(3)


def test_seconds_alone_undo_the_sharing():
    neighbour = Neighbour(intervals=[(1, 3), (10, 11)], num_threads=2)
    assert seconds_alone((0, 4), [neighbour], 2, cores=2) == pytest.approx(1 + 2 / 2 + 1)
    assert seconds_alone((0, 4), [neighbour], 2, cores=4) == pytest.approx(4)
    assert seconds_alone((0, 4), [neighbour], 2, cores=None) == pytest.approx(4)


def test_effective_clock_goes_slower_beside_others_and_while_weights_load():
    clock = EffectiveClock([Neighbour(intervals=[(2, 4)], num_threads=2)], [(6, 8)], num_threads=2, cores=2)
    assert clock(2) - clock(0) == pytest.approx(2)
    assert clock(4) - clock(2) == pytest.approx(1)
    assert clock(8) - clock(6) == pytest.approx(1)
    assert clock(9) - clock(0) == pytest.approx(2 + 1 + 2 + 1 + 1)


def test_a_busy_driver_sees_timers_late():
    async def run() -> list[float]:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        seen: list[float] = []
        loop.call_later(1, lambda: seen.append(loop.time()))
        loop.call_later(5, lambda: seen.append(loop.time()))
        loop.spend(3)
        await asyncio.sleep(4)
        return seen

    assert run_virtually(run()) == [3, 5]


# -- fits ----------------------------------------------------------------------------------------------------------


def test_fit_finds_what_is_there_and_nothing_below_zero():
    generator = np.random.default_rng(0)
    features = generator.uniform(0, 10, size=(60, 3))
    found = fit_nonnegative(features, features @ np.array([0.5, 0.0, 2.0]))
    assert found == pytest.approx([0.5, 0.0, 2.0], abs=0.02)
    assert (fit_nonnegative(features, features @ np.array([0.5, -1.0, 2.0])) >= 0).all()


def test_a_fixed_part_is_believed_only_beyond_doubt():
    generator = np.random.default_rng(0)
    tokens = generator.uniform(1000, 3000, size=30)
    clear = 0.5 + 1e-3 * tokens
    assert fit_line(tokens, clear) == pytest.approx((0.5, 1e-3), rel=0.02)
    noisy = 1e-3 * tokens * generator.uniform(0.4, 2.5, size=30)
    assert fit_line(tokens, noisy)[0] == 0
    assert fit_line(np.full(30, 2000.0), np.full(30, 1.0)) == pytest.approx((0.0, 5e-4))
