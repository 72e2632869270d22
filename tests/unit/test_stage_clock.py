"""Seconds by stage with a clock that is set by hand."""

from __future__ import annotations

import contextlib

import pytest

from weaver_rl.stage_clock import StageClock

pytestmark = pytest.mark.unit


class HandClock:
    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


def test_stages_and_other_add_up_to_the_step():
    now = HandClock()
    clock = StageClock(now)
    for stage, seconds in (("sample", 2.0), ("learn", 3.0), ("sample", 0.5)):
        now.time += 0.25
        with clock.stage(stage):
            now.time += seconds
    assert clock.seconds("sample") == 2.5
    assert clock.seconds("never") == 0.0
    assert clock.elapsed() == 6.25
    assert clock.metrics() == {
        "seconds/sample": 2.5,
        "seconds/learn": 3.0,
        "seconds/other": 0.75,
        "seconds/step": 6.25,
    }


def test_a_stage_that_fails_is_still_counted():
    now = HandClock()
    clock = StageClock(now)
    with contextlib.suppress(KeyError), clock.stage("learn"):
        now.time += 1.0
        raise KeyError
    assert clock.seconds("learn") == 1.0
