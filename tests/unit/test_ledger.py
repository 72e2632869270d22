"""The idle ledger: that it adds up whatever is told in whatever order, and what an idle actor is said to wait for."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weaver_rl.errors import UserError
from weaver_rl.ledger import AWAITED, BUSY, STATES, ActorLife, LedgerRow, StepWindow, _topmost, ledger_rows, read_ledger
from weaver_rl.spans import Span

pytestmark = pytest.mark.unit

EPOCH = 1_767_225_600.0
WINDOW = StepWindow(step=7, phase="train", begin_s=EPOCH, end_s=EPOCH + 10)


def a_span(name: str, begin: float, end: float) -> Span:
    return Span(name=name, begin_s=EPOCH + begin, end_s=EPOCH + end, track="any", span_id=1)


def a_life(
    actor: str, *spans: tuple[str, float, float], begun: float = -5, known: float = 15, ended: bool = False
) -> ActorLife:
    return ActorLife(
        actor=actor,
        role=actor.split()[0],
        begun_s=EPOCH + begun,
        known_until_s=EPOCH + known,
        has_ended=ended,
        spans=tuple(a_span(*span) for span in spans),
    )


def seconds_of(lives: Sequence[ActorLife]) -> dict[str, dict[str, float]]:
    rows = ledger_rows(WINDOW, lives)
    return {row.actor: {state: round(value, 3) for state, value in row.seconds.items()} for row in rows}


def test_what_one_state_follows_in_is_one_piece():
    spans = [(0.0, 2.0, "reward/score"), (1.0, 3.0, "reward/score"), (3.0, 4.0, "reward/score")]
    expected = [(0.0, 4.0, "reward/score")]
    assert _topmost(spans, 0.0, 9.0, len) == expected, "a piece for each of many actors is looked at for each of them"


def test_a_synchronous_step():
    lives = [
        a_life(
            "controller",
            ("controller/prompts", 0, 0.5),
            ("controller/sample", 0.5, 4),
            ("controller/score", 4, 5),
            ("controller/learn", 5, 8),
            ("controller/sync", 8, 9.5),
        ),
        a_life("sampler 0", ("sampler/generate", 0.5, 3), ("sampler/load_weights", 8.5, 9)),
        a_life("sampler 1", ("sampler/generate", 0.5, 4), ("sampler/load_weights", 8.5, 9)),
        a_life("reward worker 0", ("reward/score", 3.5, 5)),
        a_life(
            "learner rank 0",
            ("learner/forward_backward", 5.5, 7),
            ("learner/optim_step", 7, 7.5),
            ("learner/publish", 8, 8.5),
            ("learner/forward", 9, 9.25),
        ),
    ]
    assert seconds_of(lives) == {
        "controller": {
            "wait for prompts": 0.5,
            "wait for samplers": 3.5,
            "wait for rewards": 1.0,
            "wait for learner": 3.0,
            "wait for sync": 1.5,
            "other": 0.5,
        },
        "sampler 0": {
            "wait for prompts": 0.5,
            "generate": 2.5,
            "wait for samplers": 1.0,
            "wait for rewards": 1.0,
            "wait for learner": 3.0,
            "wait for sync": 1.0,
            "sync": 0.5,
            "wait for controller": 0.5,
        },
        "sampler 1": {
            "wait for prompts": 0.5,
            "generate": 3.5,
            "wait for rewards": 1.0,
            "wait for learner": 3.0,
            "wait for sync": 1.0,
            "sync": 0.5,
            "wait for controller": 0.5,
        },
        "reward worker 0": {
            "wait for prompts": 0.5,
            "wait for samplers": 3.0,
            "score": 1.5,
            "wait for learner": 3.0,
            "wait for sync": 1.5,
            "wait for controller": 0.5,
        },
        "learner rank 0": {
            "wait for prompts": 0.5,
            "wait for samplers": 3.5,
            "wait for rewards": 1.0,
            "wait for controller": 1.5,
            "learn": 2.0,
            "sync": 0.5,
            "wait for sync": 0.75,
            "probe": 0.25,
        },
    }


def test_an_inner_stage_says_more_than_the_one_around_it():
    lives = [
        a_life("controller", ("controller/sync", 0, 10), ("controller/samplers_ready", 1, 7)),
        a_life("sampler 0", ("sampler/start", 0, 7)),
        a_life("learner rank 0"),
    ]
    assert seconds_of(lives)["learner rank 0"] == {"wait for sync": 4.0, "wait for start": 6.0}


def test_while_samplers_work_ahead_rewards_wait_for_them_and_not_for_the_learner():
    lives = [
        a_life("controller", ("controller/learn", 0, 10)),
        a_life("sampler 0", ("sampler/generate", 0, 6)),
        a_life("reward worker 0"),
        a_life("learner rank 0", ("learner/forward_backward", 0, 10)),
    ]
    seconds = seconds_of(lives)
    assert seconds["reward worker 0"] == {"wait for samplers": 6.0, "wait for learner": 4.0}
    assert seconds["sampler 0"] == {"generate": 6.0, "wait for learner": 4.0}


def test_what_counts_when_an_actor_does_two_things_at_a_time():
    busy = (("sampler/generate", 0, 8), ("sampler/load_weights", 2, 3), ("sampler/fetch_weights", 1, 9))
    assert seconds_of([a_life("sampler 0", *busy)])["sampler 0"] == {
        "generate": 7.0,
        "sync": 2.0,
        "wait for controller": 1.0,
    }


def test_who_came_and_went_within_the_step_has_the_time_it_was_there_for():
    first = a_life("sampler 0", ("sampler/generate", 0, 2), known=3, ended=True)
    second = a_life("sampler 0", ("sampler/start", 6, 9), begun=6)
    assert seconds_of([first, second]) == {"sampler 0": {"generate": 2.0, "start": 3.0, "wait for controller": 2.0}}
    assert seconds_of([a_life("sampler 0", known=-1, ended=True), a_life("sampler 1", begun=10)]) == {}


def test_time_that_was_never_told_of_is_unknown():
    assert seconds_of([a_life("learner rank 0", ("learner/optim_step", 0, 4), known=4)]) == {
        "learner rank 0": {"learn": 4.0, "unknown": 6.0}
    }


names = {
    "controller": sorted(AWAITED),
    **{role: sorted(name for name in BUSY if name.startswith(role)) for role in ("sampler", "reward", "learner")},
}
moments = st.floats(-3, 13, allow_nan=False)


@st.composite
def some_lives(draw: st.DrawFn) -> list[ActorLife]:
    lives = []
    for actor in ("controller", "sampler 0", "sampler 1", "reward worker 0", "learner rank 0", "learner rank 1"):
        ends = draw(st.lists(st.tuples(st.sampled_from(names[actor.split()[0]]), moments, moments), max_size=8))
        known = draw(st.sampled_from([15.0, 15.0, 6.0]))
        spans = [(name, *sorted((first, second))) for name, first, second in ends]
        lives.append(
            a_life(actor, *spans, begun=draw(st.sampled_from([-5, 3])), known=known, ended=draw(st.booleans()))
        )
    return lives


@given(some_lives(), st.randoms(use_true_random=False))
def test_seconds_add_up_and_order_does_not_matter(lives: list[ActorLife], chance: random.Random):
    rows = ledger_rows(WINDOW, lives)
    assert [row.actor for row in rows] == [life.actor for life in lives]
    for row, life in zip(rows, lives, strict=True):
        end = min(WINDOW.end_s, life.known_until_s) if life.has_ended else WINDOW.end_s
        assert sum(row.seconds.values()) == pytest.approx(end - max(WINDOW.begin_s, life.begun_s), abs=1e-6)
        assert all(value > 0 for value in row.seconds.values())
        assert row.seconds.keys() <= STATES.keys()
    shuffled = [
        ActorLife(
            actor=life.actor,
            role=life.role,
            begun_s=life.begun_s,
            known_until_s=life.known_until_s,
            has_ended=life.has_ended,
            spans=tuple(chance.sample(life.spans, len(life.spans))),
        )
        for life in lives
    ]
    by_actor = {row.actor: dict(row.seconds) for row in rows}
    again = {row.actor: row.seconds for row in ledger_rows(WINDOW, chance.sample(shuffled, len(shuffled)))}
    assert {actor: pytest.approx(dict(seconds), abs=1e-6) for actor, seconds in again.items()} == by_actor


def test_rows_are_read_as_they_were_written(tmp_path: Path):
    path = tmp_path / "ledger.jsonl"
    assert list(read_ledger(path)) == []
    row = LedgerRow(step=7, phase="train", actor="sampler 0", role="sampler", seconds={"generate": 1.25})
    path.write_text(row.to_json() + row.to_json() + '{"step": 8')
    assert list(read_ledger(path)) == [row, row]
    for damaged in (b'{"step": 8}\n', b"[1]\n", b"garbage \xff\n"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="line 1 is no row of a ledger"):
            list(read_ledger(path))


def test_every_state_is_in_the_documentation():
    text = (Path(__file__).resolve().parents[2] / "docs" / "ledger.md").read_text()
    assert [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")] == list(STATES)
    for state, meaning in STATES.items():
        assert f"| `{state}` | {meaning} |" in text
