"""A paused engine loop with a fake engine: what becomes of the groups in flight, and of those that come meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fake_engine import WAIT_S, Rig, ids

from weaver_rl.engines.loop import PauseMode
from weaver_rl.errors import EngineError

pytestmark = pytest.mark.unit


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig(steps_per_group=3)
    yield rig
    rig.engine.gate.set()
    rig.loop.close(WAIT_S)
    assert not rig.loop._thread.is_alive()


def pause_after_one_step(rig: Rig, mode: PauseMode, *group_ids: str) -> list[Any]:
    futures = rig.hold(*group_ids)
    paused = rig.loop.pause(mode)
    rig.engine.gate.set()
    paused.result(WAIT_S)
    assert len(rig.engine.steps) == 1
    return futures


def steps_of(rig: Rig) -> int:
    """After everything that was sent before."""
    return rig.loop.call(lambda engine: len(engine.steps)).result(WAIT_S)


def test_abort_ends_everything_in_flight_with_what_it_has(rig: Rig):
    a, b = pause_after_one_step(rig, "abort", "a", "b")
    assert ids([a, b]) == ["a", "b"]
    assert [len(future.result().completions_G[0].token_ids_L) for future in (a, b)] == [1, 1]
    assert not rig.loop.is_busy
    rig.loop.resume().result(WAIT_S)
    assert ids(rig.submit("a")) == ["a"]


def test_in_place_goes_on_where_it_stood(rig: Rig):
    futures = pause_after_one_step(rig, "in_place", "a")
    assert steps_of(rig) == 1
    rig.loop.resume().result(WAIT_S)
    assert ids(futures) == ["a"]
    assert steps_of(rig) == 3


def test_retract_begins_anew(rig: Rig):
    futures = pause_after_one_step(rig, "retract", "a", "b")
    assert steps_of(rig) == 1
    assert not any(future.done() for future in futures)
    rig.loop.resume().result(WAIT_S)
    assert ids(futures) == ["a", "b"]
    assert rig.engine.steps == [("a", "b")] * 4, "the step before the pause counts for nothing"


@pytest.mark.parametrize("mode", ["abort", "retract", "in_place"])
def test_what_comes_while_paused_waits(rig: Rig, mode: PauseMode):
    rig.loop.pause(mode).result(WAIT_S)
    [group], score = rig.submit("a"), rig.loop.score((1, 2))
    assert steps_of(rig) == 0
    assert not group.done()
    assert not score.done()
    assert not rig.loop.is_busy
    rig.loop.resume().result(WAIT_S)
    assert ids([group]) == ["a"]
    assert score.result(WAIT_S).shape == (3,)


def test_a_bad_request_is_refused_while_paused(rig: Rig):
    rig.loop.pause("in_place").result(WAIT_S)
    with pytest.raises(EngineError, match="two tokens"):
        rig.loop.score((1,)).result(WAIT_S)


def test_abort_while_paused_ends_what_waited(rig: Rig):
    futures = pause_after_one_step(rig, "in_place", "a")
    futures += rig.submit("b")
    rig.loop.pause("abort").result(WAIT_S)
    assert ids(futures) == ["a", "b"]
    assert [len(future.result().completions_G[0].token_ids_L) for future in futures] == [1, 0]
    assert steps_of(rig) == 1


def test_pausing_twice_and_resuming_twice_are_fine(rig: Rig):
    rig.loop.resume().result(WAIT_S)
    futures = pause_after_one_step(rig, "in_place", "a")
    rig.loop.pause("in_place").result(WAIT_S)
    rig.loop.pause("retract").result(WAIT_S)
    rig.loop.resume().result(WAIT_S)
    rig.loop.resume().result(WAIT_S)
    assert ids(futures) == ["a"]
    assert len(rig.engine.steps) == 4


def test_a_group_retracted_can_still_be_ended(rig: Rig):
    a, b = pause_after_one_step(rig, "retract", "a", "b")
    rig.loop.abort([a])
    with pytest.raises(EngineError, match="group a was aborted"):
        a.result(WAIT_S)
    rig.loop.resume().result(WAIT_S)
    assert ids([b]) == ["b"]


def test_calls_and_weights_work_while_paused(rig: Rig):
    """Weights that come in several commands hold the loop: to release it is not to resume it."""
    pause_after_one_step(rig, "in_place", "a")
    rig.loop.hold().result(WAIT_S)
    assert rig.loop.call(lambda engine: engine.name).result(WAIT_S) == "sampler-0"
    rig.loop.release().result(WAIT_S)
    assert steps_of(rig) == 1


def test_closing_while_paused_tells_whoever_waits(rig: Rig):
    futures = pause_after_one_step(rig, "in_place", "a")
    rig.loop.close(WAIT_S)
    with pytest.raises(EngineError, match="sampler-0 was closed"):
        futures[0].result(0)


def test_an_unknown_mode_is_refused(rig: Rig):
    unknown: Any = "wait"
    with pytest.raises(EngineError, match="'wait' seen, abort, retract, in_place allowed"):
        rig.loop.pause(unknown)
