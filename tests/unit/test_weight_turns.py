"""Turns of weights on one engine: never two at a time, nobody starves, a failed load fails only who asked for it."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weaver_rl.errors import EngineLostError
from weaver_rl.plan.virtual_loop import run_virtually
from weaver_rl.service.weight_turns import WeightTurns

pytestmark = pytest.mark.unit


class Engine:
    """A fake engine: notices when somebody uses it under other weights than it holds."""

    def __init__(self, load_s: float = 0.5) -> None:
        self.held: str | None = None
        self.loads: list[str] = []
        self.users = 0
        self.broken: set[str] = set()
        self.load_s = load_s

    async def load(self, key: str) -> None:
        assert self.users == 0, "weights were changed under a request"
        self.held = None
        await asyncio.sleep(self.load_s)
        if key in self.broken:
            raise OSError(f"no weights {key}")
        self.held = key
        self.loads.append(key)

    async def use(self, turns: WeightTurns[str, None], key: str, seconds: float) -> float:
        async with turns.using(key):
            self.users += 1
            try:
                for _ in range(3):
                    assert self.held == key
                    await asyncio.sleep(seconds / 3)
            finally:
                self.users -= 1
        return asyncio.get_running_loop().time()


def virtually(main: Coroutine[Any, Any, Any]) -> Any:
    return run_virtually(main)


def test_requests_with_the_same_weights_run_side_by_side():
    async def main() -> float:
        engine = Engine(load_s=0.0)
        turns = WeightTurns("engine", engine.load)
        start = asyncio.get_running_loop().time()
        ends = await asyncio.gather(*(engine.use(turns, "a", 3.0) for _ in range(20)))
        assert engine.loads == ["a"]
        return max(ends) - start

    assert virtually(main()) == pytest.approx(3.0)


def test_a_stream_of_one_kind_does_not_starve_another():
    async def main() -> float:
        engine = Engine()
        turns = WeightTurns("engine", engine.load, turn_s=1.0)

        async def stream() -> None:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(200):
                    tasks.create_task(engine.use(turns, "a", 1.0))
                    await asyncio.sleep(0.25)

        streaming = asyncio.create_task(stream())
        await asyncio.sleep(2.0)
        start = asyncio.get_running_loop().time()
        end = await engine.use(turns, "b", 0.3)
        streaming.cancel()
        await asyncio.gather(streaming, return_exceptions=True)
        return end - start

    assert virtually(main()) < 4.0


def test_a_load_that_fails_fails_who_asked_and_nobody_else():
    async def main() -> None:
        engine = Engine()
        engine.broken = {"b"}
        turns = WeightTurns("engine", engine.load)
        results = await asyncio.gather(
            *(engine.use(turns, key, 1.0) for key in ("a", "b", "b", "c")), return_exceptions=True
        )
        assert [isinstance(result, OSError) for result in results] == [False, True, True, False]
        engine.broken = set()
        await engine.use(turns, "b", 0.1)

    virtually(main())


def test_an_engine_that_was_lost_is_given_its_weights_again():
    async def main() -> None:
        engine = Engine()
        turns = WeightTurns("engine", engine.load)
        await engine.use(turns, "a", 0.1)
        engine.held = None
        turns.forget()
        await engine.use(turns, "a", 0.1)
        assert engine.loads == ["a", "a"]

    virtually(main())


def test_weights_that_an_engine_was_loading_when_it_was_lost_are_in_no_engine():
    """The answer of the load has come; the loss is noticed before who waits for it goes on."""

    async def main() -> None:
        engine, used = Engine(), []

        async def load(key: str) -> str:
            await engine.load(key)
            if len(engine.loads) == 1:
                turns.forget()
            return f"engine {len(engine.loads)}"

        turns = WeightTurns("engine", load)

        async def use(key: str) -> None:
            async with turns.using(key) as which:
                used.append(which)

        with pytest.raises(EngineLostError, match="lost while weights were loaded"):
            await use("a")
        await use("a")
        await use("a")
        assert (engine.loads, used) == (["a", "a"], ["engine 2", "engine 2"])

    virtually(main())


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), num_keys=st.integers(1, 4), num_requests=st.integers(1, 40))
def test_every_request_ends_under_its_own_weights(seed: int, num_keys: int, num_requests: int):
    chance = random.Random(seed)

    async def main() -> None:
        engine = Engine()
        turns = WeightTurns("engine", engine.load, turn_s=chance.choice([0.0, 1.0]))
        running: list[asyncio.Task[float]] = []
        for _ in range(num_requests):
            task = asyncio.create_task(engine.use(turns, f"w{chance.randrange(num_keys)}", chance.random()))
            running.append(task)
            await asyncio.sleep(chance.choice([0.0, 0.1, 0.6]))
            if chance.random() < 0.2:
                chance.choice(running).cancel()
        for task in running:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        assert engine.users == 0
        await engine.use(turns, "after", 0.1)

    virtually(main())
