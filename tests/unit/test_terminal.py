"""The live view: what it shows at 80 and 120 columns, what the log lines leave out, and a terminal given back."""

import io
import logging

import pytest
from rich.console import Console

from weaver_rl.ledger import LedgerRow
from weaver_rl.terminal import LivePanel, LogLines, make_view, notes
from weaver_rl.terminal_panel import Progress, sparkline, stage_shares

pytestmark = pytest.mark.unit

METRICS = {
    "reward/mean": 0.755,
    "loss": -0.0126,
    "tokens_per_s": 1834.2,
    "lag/mean": 0.0,
    "lag/max": 0,
    "logprob_gap/mean": 0.0002,
    "seconds/sample": 0.88,
    "seconds/score": 0.04,
    "seconds/learn": 0.4,
    "seconds/sync": 0.06,
    "seconds/wait": 0.02,
    "seconds/step": 2.0,
}


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def panel_text(view: LivePanel, width: int) -> str:
    console = Console(record=True, force_terminal=True, width=width, file=io.StringIO())
    view._console = console
    console.print(view)
    return console.export_text()


def lines_view():
    clock, stream = Clock(), io.StringIO()
    return LogLines(Console(file=stream, width=80), clock), clock, stream


@pytest.mark.parametrize("width", [80, 120])
def test_the_panel_shows_everything_and_fits(width):
    clock = Clock()
    view = LivePanel(Console(file=io.StringIO(), force_terminal=True, width=width), "weaver-rl", clock)
    view.phase("train", 60, offset=300)
    view.evaluation(0.41, 300)
    for step in range(301, 325):
        clock.now += 2
        view.step(step, METRICS)
    view.evaluation(0.83, 320)
    view.ledger(
        [
            LedgerRow(step=324, phase="train", actor="sampler 0", role="sampler", seconds={"generate": 2.0}),
            LedgerRow(
                step=324, phase="train", actor="sampler 1", role="sampler", seconds={"generate": 1.0, "sync": 1.0}
            ),
            LedgerRow(step=324, phase="train", actor="learner rank 0", role="learner", seconds={"learn": 2.0}),
        ]
    )
    view.waiting("sampler-0 to load weights v24")
    clock.now += 3
    text = panel_text(view, width)
    assert "sampler     generate 75%  sync 25%" in text
    assert "learner     learn 100%" in text
    for word in ("train", "24/60 · 0:51 · eta 1:12", "0.755", "-0.0126", "1,834", "0.830", "from 0.410", "max 0"):
        assert word in text
    for word in (
        "sample 44%",
        "score 2%",
        "learn 20%",
        "sync 3%",
        "wait 1%",
        "other 30%",
    ):
        assert word in text
    assert "waiting 0:03: sampler-0 to load weights v24" in text
    assert "…" not in text
    assert {len(line) for line in text.splitlines()} == {width}


def test_the_panel_works_before_anything_is_known_and_on_narrow_screens():
    for width in (20, 40, 80):
        view = LivePanel(Console(file=io.StringIO(), force_terminal=True, width=width), "weaver-rl", Clock())
        assert "starting" in panel_text(view, width)
        view.phase("train", 3)
        view.step(1, METRICS)
        assert "1/3" in panel_text(view, width)


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, ZeroDivisionError])
def test_the_terminal_is_given_back(error):
    stream = io.StringIO()
    view = make_view(Console(file=stream, force_terminal=True, width=80))
    assert isinstance(view, LivePanel)

    def use():
        with view:
            view.note("[not markup]")
            if error:
                raise error

    if error:
        with pytest.raises(error):
            use()
    else:
        use()
    hide, show = "\x1b[?25l", "\x1b[?25h"
    assert hide in stream.getvalue()
    assert stream.getvalue().rindex(show) > stream.getvalue().rindex(hide)
    assert "[not markup]" in stream.getvalue()


def test_warnings_of_the_library_are_notes_of_the_view_while_it_is_there(caplog):
    log, library = logging.getLogger("weaver_rl.tasks.files"), logging.getLogger("weaver_rl")
    view, _, stream = lines_view()
    before = (library.handlers[:], library.propagate)

    def warn_and_fail():
        with notes(view):
            log.warning("%d rows [dropped]", 3)
            log.info("quiet")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        warn_and_fail()
    assert [line.split(" ", 1)[1] for line in stream.getvalue().splitlines()] == ["3 rows [dropped]"]
    assert not caplog.records
    assert (library.handlers, library.propagate) == before
    log.warning("afterwards")
    assert [record.message for record in caplog.records] == ["afterwards"]
    assert "afterwards" not in stream.getvalue()


def test_without_a_terminal_there_are_plain_lines():
    stream = io.StringIO()
    view = make_view(Console(file=stream))
    assert isinstance(view, LogLines)
    with view:
        view.phase("train", 2)
        view.step(1, METRICS)
    assert "\x1b" not in stream.getvalue()
    assert (
        "train 1/2 | reward 0.755 | loss -0.0126 | lag 0.0 | 1,834 tokens/s | 2.00 s: sample 44%" in stream.getvalue()
    )


def test_lines_come_at_most_once_a_second_but_the_first_the_last_and_evaluations_always():
    view, clock, stream = lines_view()
    with view:
        view.phase("train", 40)
        for step in range(1, 41):
            view.step(step, METRICS)
            if step == 7:
                view.evaluation(0.5, 7)
            clock.now += 0.125
    shown = [line.split(" ", 1)[1] for line in stream.getvalue().splitlines()]
    steps = [line.split("|")[0].strip() for line in shown]
    assert steps == [
        "train: 40 steps", "train 1/40", "train step 7", "train 9/40", "train 17/40", "train 25/40", "train 33/40",
        "train 40/40",
    ]  # fmt: skip
    assert "eval accuracy 0.500" in shown[2]


def test_lines_leave_waits_to_the_stall_watch_and_show_its_notes():
    view, _, stream = lines_view()
    with view:
        view.waiting("rank 1 to start")
        view.note("stalled 16 s: learner waits for 3 groups ← sampler 1 generating (16 s of 600 s)")
    assert [line.split(" ", 1)[1] for line in stream.getvalue().splitlines()] == [
        "stalled 16 s: learner waits for 3 groups ← sampler 1 generating (16 s of 600 s)"
    ]


def test_the_eta_is_measured_from_the_first_step_seen_in_the_phase():
    progress = Progress().begin("train", 10, 300, now=0.0)
    assert progress.eta_s is None
    progress = progress.after_step(306, {}, now=2.0).after_step(307, {}, now=4.0)
    assert progress.eta_s == 6.0


def test_shares_add_up_to_one_whatever_was_measured():
    assert sum(share for _, share in stage_shares(METRICS)) == pytest.approx(1.0)
    over = {"seconds/sample": 2.0, "seconds/learn": 1.0, "seconds/step": 1.0}
    assert sum(share for _, share in stage_shares(over)) == pytest.approx(1.0)
    assert stage_shares({}) == []


def test_sparklines():
    assert sparkline((), 5) == ""
    assert sparkline((1.0, 1.0), 5) == "▄▄"
    assert sparkline((0.0, 0.5, 1.0), 3) == "▁▅█"
    assert sparkline((0.0, 0.0, 0.0, 1.0, 1.0, 1.0), 3) == "▁▅█"
