"""Rows of the ledger while actors tell late, come, go and hang, and while a run goes back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from weaver_rl import ledger_keeper
from weaver_rl.ledger import CONTROLLER, REWOUND, STEP, LedgerRow, read_ledger
from weaver_rl.ledger_keeper import LedgerKeeper, truncate_ledger
from weaver_rl.spans import Process, Span, Spans

pytestmark = pytest.mark.unit

EPOCH = 1_767_225_600.0
PIDS = {CONTROLLER: 1, "sampler 0": 2, "learner rank 0": 3}


class Run:
    """Actors that tell a keeper what they did."""

    def __init__(self, folder: Path) -> None:
        self.time = 0.0
        self.path = folder / "ledger.jsonl"
        self.keeper = LedgerKeeper(self.path, late_s=30, clock=lambda: EPOCH + self.time)

    def tell(
        self,
        actor: str,
        until: float,
        *spans: tuple[str, float, float] | tuple[str, float, float, int],
        lasting: Sequence[tuple[str, float]] = (),
        pid: int | None = None,
        anchor: float = 0.0,
        begun: float = 0.0,
    ) -> None:
        self.keeper.tell(
            actor,
            actor.split()[0],
            Spans(
                spans=tuple(a_span(*span) for span in spans),
                lasting=tuple(a_span(name, begin, until) for name, begin in lasting),
                pid=pid or PIDS[actor],
                anchor_s=anchor,
                begun_s=EPOCH + begun,
                drained_at_s=EPOCH + until,
            ),
        )

    def write(self, *actors: str, waited_for: Sequence[str] = (), is_last: bool = False) -> list[LedgerRow]:
        living: set[tuple[str, Process | None]] = {(actor, (PIDS[actor], 0.0)) for actor in (CONTROLLER, *actors)}
        return self.keeper.write(living | {(actor, None) for actor in waited_for}, is_last=is_last)

    def rows(self) -> list[tuple[int, str, dict[str, float]]]:
        return [
            (row.step, row.actor, {state: round(value, 3) for state, value in row.seconds.items()})
            for row in read_ledger(self.path)
        ]


def a_span(name: str, begin: float, end: float, step: int | None = None) -> Span:
    attributes = {} if step is None else {"step": step, "phase": "train"}
    return Span(name=name, begin_s=EPOCH + begin, end_s=EPOCH + end, track="any", span_id=1, attributes=attributes)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_a_step_waits_for_everybody_and_steps_come_in_order(run: Run):
    run.tell("sampler 0", 9, ("sampler/generate", 1, 4))
    run.tell("learner rank 0", 5, lasting=[("learner/forward_backward", 4)])
    run.tell(CONTROLLER, 12, ("controller/sample", 0, 4), ("controller/learn", 4, 10), (STEP, 0, 10, 1))
    assert run.write("sampler 0", "learner rank 0") == []
    run.tell("sampler 0", 11)
    assert run.write("sampler 0", "learner rank 0") == []
    run.tell("learner rank 0", 12, ("learner/forward_backward", 4, 9))
    rows = run.write("sampler 0", "learner rank 0")
    assert [row.actor for row in rows] == [CONTROLLER, "learner rank 0", "sampler 0"]
    assert run.rows() == [
        (1, CONTROLLER, {"wait for samplers": 4.0, "wait for learner": 6.0}),
        (1, "learner rank 0", {"wait for samplers": 4.0, "learn": 5.0, "wait for controller": 1.0}),
        (1, "sampler 0", {"wait for controller": 1.0, "generate": 3.0, "wait for learner": 6.0}),
    ]
    assert run.keeper.last_rows == tuple(rows)
    run.tell(CONTROLLER, 20, (STEP, 10, 15, 2), (STEP, 15, 18, 3))
    run.tell("sampler 0", 20)
    run.tell("learner rank 0", 20)
    assert [row.step for row in run.write("sampler 0", "learner rank 0")] == [2, 2, 2, 3, 3, 3]
    assert all(not told.ended for told in run.keeper._told.values())


def test_what_lasts_over_the_end_of_a_step_counts_in_both(run: Run):
    run.tell("sampler 0", 12, lasting=[("sampler/start", 5)])
    run.tell(CONTROLLER, 12, (STEP, 0, 10, 1))
    run.write("sampler 0")
    run.tell("sampler 0", 22, ("sampler/start", 5, 13))
    run.tell(CONTROLLER, 22, (STEP, 10, 20, 2))
    run.write("sampler 0")
    assert [row for row in run.rows() if row[1] == "sampler 0"] == [
        (1, "sampler 0", {"wait for controller": 5.0, "start": 5.0}),
        (2, "sampler 0", {"start": 3.0, "wait for controller": 7.0}),
    ]


def test_one_that_has_never_told_anything_is_waited_for(run: Run):
    run.tell(CONTROLLER, 12, (STEP, 0, 10, 1))
    assert run.write(waited_for=["sampler 0"]) == []
    run.tell("sampler 0", 13, begun=6)
    run.write("sampler 0")
    assert run.rows()[1] == (1, "sampler 0", {"wait for controller": 4.0})


def test_one_that_finds_no_place_holds_up_the_ledger_only_once(run: Run):
    run.tell(CONTROLLER, 12, (STEP, 0, 10, 1))
    assert run.write(waited_for=["sampler 0"]) == []
    run.time = 41
    run.tell(CONTROLLER, 41, (STEP, 10, 40, 2))
    assert [row.step for row in run.write(waited_for=["sampler 0"])] == [1, 2]
    run.time = 42
    run.tell(CONTROLLER, 42, (STEP, 40, 41.5, 3))
    assert run.write(waited_for=["sampler 0", "sampler 1"]) == []
    assert [row.step for row in run.write(waited_for=["sampler 0"])] == [3]


def test_one_that_hangs_is_waited_for_only_so_long(run: Run):
    run.tell("learner rank 0", 4, ("learner/optim_step", 0, 4))
    run.tell(CONTROLLER, 12, (STEP, 0, 10, 1))
    run.time = 39
    assert run.write("learner rank 0") == []
    run.time = 41
    run.write("learner rank 0")
    assert run.rows()[1] == (1, "learner rank 0", {"learn": 4.0, "unknown": 6.0})


def test_one_that_died_is_not_waited_for_and_its_successor_begins_later(run: Run):
    run.tell("sampler 0", 4, ("sampler/generate", 0, 4))
    run.tell(CONTROLLER, 12, (STEP, 0, 10, 1))
    run.tell("sampler 0", 12, ("sampler/start", 7, 9), pid=22, begun=7)
    run.keeper.write({(CONTROLLER, (1, 0.0)), ("sampler 0", (22, 0.0))})
    assert run.rows()[1] == (1, "sampler 0", {"generate": 4.0, "start": 2.0, "wait for controller": 1.0})
    run.tell(CONTROLLER, 22, (STEP, 10, 20, 2))
    run.write()
    assert run.rows()[2:] == [(2, CONTROLLER, {"other": 10.0}), (2, "sampler 0", {"wait for controller": 2.0})]


def test_a_successor_on_another_node_may_have_the_same_number(run: Run):
    run.tell("sampler 0", 4, ("sampler/generate", 0, 4))
    run.tell(CONTROLLER, 12, (STEP, 0, 10, 1))
    run.tell("sampler 0", 12, ("sampler/start", 7, 9), begun=7, anchor=5.0)
    run.keeper.write({(CONTROLLER, (1, 0.0)), ("sampler 0", (PIDS["sampler 0"], 5.0))})
    assert run.rows()[1] == (1, "sampler 0", {"generate": 4.0, "start": 2.0, "wait for controller": 1.0})


def test_a_run_that_goes_back_forgets_the_steps_after(run: Run):
    run.tell(CONTROLLER, 30, *((STEP, 10 * number, 10 * number + 10, number + 1) for number in range(3)))
    run.write()
    run.tell(CONTROLLER, 50, (STEP, 30, 40, 4), (REWOUND, 45, 45, 1), (STEP, 45, 50, 2))
    run.write()
    assert [(step, seconds) for step, _, seconds in run.rows()] == [(1, {"other": 10.0}), (2, {"other": 5.0})]


def test_a_resumed_run_goes_on_after_a_line_cut_short(run: Run, tmp_path: Path):
    run.tell(CONTROLLER, 20, (STEP, 0, 10, 1), (STEP, 10, 20, 2))
    run.write()
    run.path.write_text(run.path.read_text()[:-9])
    again = Run(tmp_path)
    again.tell(CONTROLLER, 50, (REWOUND, 30, 30, 1), (STEP, 40, 50, 2), pid=10)
    again.keeper.write({(CONTROLLER, (10, 0.0))})
    assert [(step, seconds) for step, _, seconds in again.rows()] == [(1, {"other": 10.0}), (2, {"other": 10.0})]


def test_a_damaged_line_of_long_ago_does_not_keep_a_run_from_going_back(run: Run):
    run.path.write_text("no row\n")
    run.tell(CONTROLLER, 30, *((STEP, 10 * number, 10 * number + 10, number + 1) for number in range(3)))
    run.write()
    run.tell(CONTROLLER, 50, (REWOUND, 45, 45, 1), (STEP, 45, 50, 2))
    run.write()
    head, *rows = run.path.read_text().splitlines()
    assert head == "no row"
    assert [json.loads(row)["step"] for row in rows] == [1, 2]


@pytest.mark.parametrize(("step", "kept"), [(0, 0), (1, 2), (2, 4), (9, 4)])
def test_a_ledger_is_cut_after_a_step(tmp_path: Path, step: int, kept: int):
    path = tmp_path / "ledger.jsonl"
    rows = [
        LedgerRow(step=number, phase="train", actor=actor, role="sampler", seconds={"generate": 1.0}).to_json()
        for number in (1, 2)
        for actor in ("sampler 0", "sampler 1")
    ]
    path.write_text("".join(rows) + rows[0][:-9])
    truncate_ledger(path, step)
    assert path.read_text() == "".join(rows[:kept])
    truncate_ledger(path, step)
    assert path.read_text() == "".join(rows[:kept])


def three_steps_without_a_ledger(run: Run) -> None:
    run.path.mkdir()
    for number in range(1, 4):
        run.tell("sampler 0", 20 * number, ("sampler/generate", 20 * number - 19, 20 * number - 12))
        run.tell(CONTROLLER, 20 * number, (STEP, 20 * number - 20, 20 * number - 10, number))
        with pytest.raises(IsADirectoryError):
            run.write("sampler 0")
    assert not run.keeper._windows
    assert all(not told.ended for told in run.keeper._told.values())
    assert run.keeper.last_rows == ()


def test_a_ledger_that_could_not_be_written_is_made_up_for(run: Run):
    three_steps_without_a_ledger(run)
    run.path.rmdir()
    written = run.write("sampler 0")
    assert [row.step for row in written] == [1, 1, 2, 2, 3, 3]
    assert list(read_ledger(run.path)) == written
    assert run.keeper.last_rows == tuple(written[-2:])
    assert run.write("sampler 0") == []
    run.tell("sampler 0", 90)
    run.tell(CONTROLLER, 90, (STEP, 60, 80, 4))
    assert {row.step for row in run.write("sampler 0")} == {4}


@pytest.mark.parametrize(("limit", "kept"), [(4, [2, 2, 3, 3]), (3, [3, 3]), (1, [])])
def test_of_a_ledger_that_can_never_be_written_few_whole_steps_are_kept(
    run: Run, monkeypatch: pytest.MonkeyPatch, limit: int, kept: list[int]
):
    monkeypatch.setattr(ledger_keeper, "MAX_UNWRITTEN_ROWS", limit)
    three_steps_without_a_ledger(run)
    run.path.rmdir()
    assert [row.step for row in run.write("sampler 0")] == kept


def test_a_run_that_goes_back_forgets_rows_that_could_not_be_written(run: Run):
    three_steps_without_a_ledger(run)
    run.path.rmdir()
    run.tell(CONTROLLER, 70, (REWOUND, 65, 65, 1), (STEP, 65, 70, 2))
    run.tell("sampler 0", 70)
    assert [row.step for row in run.write("sampler 0")] == [1, 1, 2, 2]


def test_at_the_end_everything_is_written(run: Run):
    run.tell("learner rank 0", 4)
    run.tell(CONTROLLER, 12, (STEP, 0, 10, 1))
    assert len(run.write("learner rank 0", is_last=True)) == 2
