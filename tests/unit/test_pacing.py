"""The ledger: whatever is admitted and finished in whatever order, every group is trained before it is too old."""

from __future__ import annotations

import random
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weaver_rl.pacing import Ledger

pytestmark = pytest.mark.unit


def finish_until_a_step_can_begin(ledger: Ledger, running: list[int], step: int, order: random.Random) -> list[int]:
    """Finishes groups in a random order, a few more than needed."""
    for _ in range(order.randrange(len(running) + 1)):
        ledger.finish(running.pop(order.randrange(len(running))))
    while (chosen := ledger.choose(step)) is None:
        assert running, "every group is finished and the step still waits: a deadlock"
        ledger.finish(running.pop(order.randrange(len(running))))
    return list(chosen)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    groups_per_step=st.integers(1, 5),
    max_lag=st.integers(0, 4),
    num_steps=st.integers(1, 12),
    seed=st.integers(0, 2**32),
)
def test_every_group_is_trained_in_time_and_nothing_waits_for_ever(
    groups_per_step: int, max_lag: int, num_steps: int, seed: int
):
    order = random.Random(seed)
    ledger = Ledger(groups_per_step=groups_per_step, max_lag=max_lag)
    admitted_at: dict[int, int] = {}
    running: list[int] = []
    trained: list[int] = []
    num_groups = num_steps * groups_per_step
    for step in range(1, num_steps + 1):
        room = ledger.room()
        assert len(admitted_at) - len(trained) + room == (max_lag + 1) * groups_per_step
        for position in range(len(admitted_at), min(num_groups, len(admitted_at) + room)):
            ledger.admit(position, step - 1)
            admitted_at[position] = step - 1
            running.append(position)
        chosen = finish_until_a_step_can_begin(ledger, running, step, order)
        assert len(chosen) == groups_per_step
        assert chosen == sorted(chosen)
        assert not set(chosen) & {*running, *trained}
        assert all(step - 1 - admitted_at[position] <= max_lag for position in chosen)
        ledger.take(chosen)
        trained += chosen
        if (finished := set(admitted_at) - {*running, *trained}) and order.random() < 0.3:
            position = order.choice(sorted(finished))  # distrusted: it comes again
            ledger.unfinish(position)
            running.append(position)
    assert sorted(trained) == list(range(num_groups))
    assert ledger.room() == (max_lag + 1) * groups_per_step


def test_the_most_urgent_come_first_and_a_step_waits_for_what_is_due():
    ledger = Ledger(groups_per_step=1, max_lag=1)
    ledger.admit(0, version=0)  # due at step 2
    ledger.admit(1, version=0)
    assert ledger.choose(1) is None
    ledger.finish(1)
    assert ledger.choose(1) == [1]
    ledger.take([1])
    ledger.admit(2, version=1)  # due at step 3
    ledger.finish(2)
    assert ledger.choose(2) is None  # 0 is due now
    ledger.finish(0)
    assert ledger.choose(2) == [0]


def test_a_position_is_admitted_once():
    ledger = Ledger(groups_per_step=2, max_lag=0)
    ledger.admit(5, 0)
    with pytest.raises(ValueError, match="position 5 is admitted already"):
        ledger.admit(5, 1)


@pytest.mark.parametrize("call", ["room", "finish", "choose"])
def test_no_call_costs_more_with_more_groups_in_flight(call: str):
    def lines(groups_per_step: int) -> int:
        ledger = Ledger(groups_per_step=groups_per_step, max_lag=2)
        for version in range(3):
            for index in range(groups_per_step):
                ledger.admit(version * groups_per_step + index, version)
        count = 0

        def trace(frame: object, what: str, argument: object) -> object:
            nonlocal count
            count += what == "line"
            return trace

        sys.settrace(trace)
        try:
            {"room": ledger.room, "finish": lambda: ledger.finish(0), "choose": lambda: ledger.choose(1)}[call]()
        finally:
            sys.settrace(None)
        return count

    assert lines(1000) == lines(10)
