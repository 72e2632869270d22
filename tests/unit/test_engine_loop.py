"""The engine's thread with a fake engine: what is batched, what fails alone, and that nobody waits for ever."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from fake_engine import SAMPLING, WAIT_S, FakeEngine, Rig, ids, request

from weaver_rl.engines.loop import EngineLoop
from weaver_rl.errors import EngineError, EngineLostError
from weaver_rl.spans import SpanBuffer, buffering

pytestmark = pytest.mark.unit


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.engine.gate.set()
    rig.loop.close(WAIT_S)
    assert not rig.loop._thread.is_alive()


def test_what_is_submitted_together_is_in_before_the_next_step(rig: Rig):
    assert ids(rig.submit("a", "b", "c")) == ["a", "b", "c"]
    assert rig.engine.steps == [("a", "b", "c")] * 2


def test_what_comes_during_a_step_joins_the_next(rig: Rig):
    first = rig.hold("a")
    second = rig.submit("b")
    rig.engine.gate.set()
    assert ids(first + second) == ["a", "b"]
    assert rig.engine.steps == [("a",), ("a", "b"), ("b",)]


def test_a_group_asked_for_again_takes_the_place_of_the_first(rig: Rig):
    """A learner that was lost sends the run back: what was in flight is asked for again, and the news of the end of the
    first may come later than the second."""
    first = rig.hold("a", "b")
    again = rig.submit("a")
    rig.loop.abort(first[:1])
    rig.engine.gate.set()
    with pytest.raises(EngineError, match="group a was aborted"):
        first[0].result(WAIT_S)
    assert ids([first[1], *again]) == ["b", "a"]


def test_an_aborted_group_is_dropped_and_others_go_on(rig: Rig):
    first = rig.hold("a", "b")
    rig.loop.abort(first[:1])
    rig.engine.gate.set()
    with pytest.raises(EngineError, match="group a was aborted"):
        first[0].result(WAIT_S)
    assert ids(first[1:]) == ["b"]
    rig.loop.abort(first)
    assert not rig.loop.is_busy


def test_a_bad_request_fails_alone(rig: Rig):
    good, bad, other = rig.loop.submit([request("a"), request("b", 9), request("c")], SAMPLING)
    with pytest.raises(EngineError, match="group b: the prompt is too long"):
        bad.result(WAIT_S)
    assert ids([good, other]) == ["a", "c"]


def test_a_failed_step_fails_what_was_in_flight_and_the_loop_survives(rig: Rig):
    rig.engine.fail_next_step = RuntimeError("out of memory")
    futures = rig.hold("a", "b")
    score = rig.loop.score((1, 2))
    rig.engine.gate.set()
    for future in futures:
        with pytest.raises(EngineError, match="sampler-0: the engine step failed: RuntimeError: out of memory"):
            future.result(WAIT_S)
    assert score.result(WAIT_S).shape == (3,)
    assert ids(rig.submit("a")) == ["a"]


def test_scores_are_answered_and_bad_ones_refused(rig: Rig):
    assert rig.loop.score((1, 2, 3)).result(WAIT_S).tolist() == [0, 0, 0]
    with pytest.raises(EngineError, match="two tokens"):
        rig.loop.score((1,)).result(WAIT_S)


def test_scores_that_nobody_waits_for_are_dropped(rig: Rig):
    rig.hold("a")
    unwanted, wanted = rig.loop.score((1, 2)), rig.loop.score((1, 2, 3))
    rig.loop.abort([unwanted])
    rig.engine.gate.set()
    with pytest.raises(EngineError, match="score-1 was aborted"):
        unwanted.result(WAIT_S)
    assert wanted.result(WAIT_S).shape == (3,)
    assert rig.engine.dropped_scores == ["score-1"]


def test_a_group_can_be_ended_by_its_name(rig: Rig):
    first = rig.hold("a", "b")
    ended = rig.loop.abort_group("a")
    rig.engine.gate.set()
    ended.result(WAIT_S)
    with pytest.raises(EngineError, match="group a was aborted"):
        first[0].result(WAIT_S)
    assert ids(first[1:]) == ["b"]
    rig.loop.abort_group("never asked for").result(WAIT_S)


def test_a_call_runs_between_two_steps(rig: Rig):
    futures = rig.hold("a")
    seen = rig.loop.call(lambda engine: len(engine.steps))
    assert not seen.done()
    rig.engine.gate.set()
    assert seen.result(WAIT_S) == 1
    assert ids(futures) == ["a"]


def test_a_failing_call_is_the_callers(rig: Rig):
    with pytest.raises(ZeroDivisionError):
        rig.loop.call(lambda engine: 1 / 0).result(WAIT_S)
    assert ids(rig.submit("a")) == ["a"]


def test_cold_forgets_the_cache_of_an_idle_engine_only(rig: Rig):
    ids(rig.submit("a"))
    assert rig.engine.resets == 0
    ids(rig.submit("b", cold=True))
    assert rig.engine.resets == 1
    first = rig.hold("c")
    second = rig.submit("d", cold=True)
    rig.engine.gate.set()
    ids(first + second)
    assert rig.engine.resets == 1


def test_a_cache_that_cannot_be_dropped_fails_the_groups_instead_of_leaving_them(rig: Rig):
    rig.engine.fail_reset = EngineError("the cache stayed")
    for future in rig.submit("a", "b", cold=True):
        with pytest.raises(EngineError, match="the cache stayed"):
            future.result(WAIT_S)
    assert rig.engine.steps == []


def test_a_caller_that_gave_up_does_not_end_the_loop(rig: Rig):
    futures = rig.hold("a", "b")
    call = rig.loop.call(lambda engine: None)
    for future in (*futures, call):
        future.cancel()
    rig.engine.gate.set()
    assert ids(rig.submit("c")) == ["c"]
    assert rig.loop._thread.is_alive()


def test_close_fails_what_is_in_flight_and_ends_the_thread(rig: Rig):
    futures = rig.hold("a")
    score = rig.loop.score((1, 2))
    closer = threading.Thread(target=rig.loop.close, args=(WAIT_S,))
    closer.start()
    rig.engine.gate.set()
    closer.join(WAIT_S)
    assert not rig.loop._thread.is_alive()
    assert rig.engine.closed.is_set()
    for future in (*futures, score):
        # The step that was running may still have finished it.
        assert future.done()
    with pytest.raises(EngineError, match="sampler-0 was closed"):
        futures[0].result(0)


def test_a_closed_engine_takes_nothing(rig: Rig):
    rig.loop.close(WAIT_S)
    rig.loop.close(WAIT_S)
    with pytest.raises(EngineError, match="closed"):
        rig.submit("a")
    with pytest.raises(EngineError, match="closed"):
        rig.loop.call(lambda engine: None)


def test_an_engine_that_cannot_be_built_fails_the_starter_and_whoever_came_early():
    may_build = threading.Event()

    def build() -> FakeEngine:
        may_build.wait(WAIT_S)
        raise ValueError("no such model")

    loop = EngineLoop(build)
    early = loop.submit([request("a")], SAMPLING)
    call = loop.call(lambda engine: None)
    may_build.set()
    with pytest.raises(ValueError, match="no such model"):
        loop.wait_started(WAIT_S)
    for future in (*early, call):
        with pytest.raises(EngineError, match="did not start: no such model"):
            future.result(WAIT_S)
    loop._thread.join(WAIT_S)
    with pytest.raises(EngineError, match="closed"):
        loop.submit([request("b")], SAMPLING)


def test_failed_steps_in_a_row_are_counted_until_a_good_one(rig: Rig):
    for num in (1, 2):
        rig.engine.fail_next_step = RuntimeError("device-side assert")
        with pytest.raises(EngineLostError):
            rig.submit("a")[0].result(WAIT_S)
        rig.loop.call(lambda engine: None).result(WAIT_S)
        assert rig.loop.num_failed_in_a_row == num
    assert ids(rig.submit("a")) == ["a"]
    assert rig.loop.num_failed_in_a_row == 0


def test_an_engine_that_cannot_be_cleared_after_a_failed_step_ends_and_says_so(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def broken() -> list[str]:
        raise RuntimeError("sticky")

    monkeypatch.setattr(rig.engine, "abort_all", broken)
    first = rig.hold("a")
    late = rig.submit("b")
    assert not rig.loop.is_closed
    rig.engine.fail_next_step = RuntimeError("device-side assert")
    rig.engine.gate.set()
    with pytest.raises(EngineLostError, match="the engine step failed: RuntimeError: device-side assert"):
        first[0].result(WAIT_S)
    with pytest.raises(EngineLostError, match="ended: RuntimeError: sticky"):
        late[0].result(WAIT_S)
    rig.loop._thread.join(WAIT_S)
    assert rig.loop.is_closed
    assert not rig.loop.is_busy
    assert "the thread of the engine ended" in caplog.text


def test_a_thread_that_dies_tells_everybody(rig: Rig):
    futures = rig.hold("a")
    rig.engine.fail_next_step = SystemExit(3)
    late = rig.submit("b")
    rig.engine.gate.set()
    for future in (*futures, *late):
        with pytest.raises(EngineError):
            future.result(WAIT_S)
    assert rig.engine.closed.wait(WAIT_S)


def test_a_held_engine_makes_no_step_until_it_is_released(rig: Rig):
    """Weights that come in several commands: between two of them they are of no version."""
    first = rig.hold("a")
    held = rig.loop.hold()
    rig.engine.gate.set()
    held.result(WAIT_S)
    num_steps = len(rig.engine.steps)
    more = rig.submit("b")
    assert rig.loop.call(lambda engine: len(engine.steps)).result(WAIT_S) == num_steps
    assert not rig.loop.is_busy
    rig.loop.release().result(WAIT_S)
    assert ids(first + more) == ["a", "b"]


def test_what_the_engine_does_is_told_also_while_a_step_lasts(rig: Rig):
    with buffering(SpanBuffer()) as buffer:
        futures = rig.hold("a")
        (meanwhile,) = buffer.drain().spans
        assert (meanwhile.name, meanwhile.track) == ("sampler/generate", "engine (states)")
        rig.engine.gate.set()
        assert ids(futures) == ["a"]
        rig.loop.score((1, 2)).result(WAIT_S)
        rig.loop.call(lambda engine: None).result(WAIT_S)
        assert {span.name for span in buffer.drain().spans} == {"sampler/generate", "sampler/prompt_logprobs"}
