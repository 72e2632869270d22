"""Stalls are named within 30 s, told ever more rarely, and seen even when the event loop is what stands still."""

import asyncio
import contextlib
import contextvars
import itertools
import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.fakes import FakeView
from weaver_rl import stall_watch
from weaver_rl.live_state import read_live_state
from weaver_rl.loop_watch import LoopWatch, describe_stack
from weaver_rl.run_folder import RunFolder
from weaver_rl.stall_watch import StallWatch
from weaver_rl.wait_chain import Fact
from weaver_rl.waits import Waits

pytestmark = pytest.mark.unit

EVERY_S = 2.0


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class FakeLoop:
    """Runs what it is given at once, until it is stuck."""

    def __init__(self):
        self.stuck = False
        self.closed = False
        self.owed: list[Callable[[], None]] = []

    def call_soon_threadsafe(self, callback: Callable[[], None]) -> None:
        if self.closed:
            raise RuntimeError("Event loop is closed")
        self.owed.append(callback)
        if not self.stuck:
            self.turn()

    def turn(self) -> None:
        while self.owed:
            self.owed.pop()()


class Stage:
    """A watch on a virtual clock: `run` lets time pass and looks as the thread would."""

    def __init__(self, path: Path, **options):
        self.clock = Clock()
        self.waits = Waits(self.clock)
        self.view = FakeView()
        self.folder = RunFolder(path)
        self.loop = FakeLoop()
        self.watch = StallWatch(self.waits, self.view, self.folder, every_s=EVERY_S, clock=self.clock, **options)

    def watch_loop(self) -> None:
        self.watch._loop = LoopWatch(self.loop, self.clock)

    def run(self, seconds: float) -> None:
        for _ in range(int(seconds / EVERY_S)):
            self.clock.now += EVERY_S
            self.watch.look()

    @property
    def live(self):
        return read_live_state(self.folder.live_file)


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path)


def gone(pid: int, seconds: int = 12) -> Callable[[], Fact]:
    return lambda: Fact(text=f"pid {pid} gone {seconds} s ago", alarming=True)


def stopped(pid: int) -> Callable[[], Fact]:
    return lambda: Fact(text=f"pid {pid} stopped (SIGSTOP) for 20 s", alarming=True)


GROUPS = {"00000016", "00000017"}

# Name of the stall; root (owner, what, on); other waits (owner, what, timeout_s, on, about); facts; what must be named.
STALLS = {
    "forward_backward": (
        ("controller", "the learner's gradients", ()), [("learner rank 0", "forward_backward", 600, (), ())], {},
        "controller waits for the learner's gradients ← learner rank 0 forward_backward (16 s of 600 s)",
    ),
    "optim_step": (
        ("controller", "the learner's update", ()),
        [("learner rank 0", "optim_step", 600, (), ()), ("learner rank 1", "optim_step", 600, (), ())],
        {"learner rank 0": lambda: "pid 70 running", "learner rank 1": gone(71)},
        "← learner rank 1 optim_step (16 s of 600 s) ← pid 71 gone 12 s ago",
    ),
    "publish": (
        ("controller", "samplers to use weights v3", ()), [("learner rank 0", "publish_weights", 600, (), ())],
        {"learner rank 0": stopped(70)},
        "← learner rank 0 publish_weights (16 s of 600 s) ← pid 70 stopped (SIGSTOP) for 20 s",
    ),
    "save_state": (
        ("controller", "the checkpoint of step 7", ()), [("learner rank 1", "save_state", 600, (), ())],
        {"learner rank 1": lambda: "pid 71 waiting for disk"},
        "the checkpoint of step 7 ← learner rank 1 save_state (16 s of 600 s) ← pid 71 waiting for disk",
    ),
    "load_state": (
        ("controller", "the state of checkpoint 6", ()), [("learner rank 0", "load_state", 600, (), ())], {},
        "the state of checkpoint 6 ← learner rank 0 load_state",
    ),
    "sampler generating": (
        ("learner", "2 groups", GROUPS),
        [("sampler 0", "generating", 600, (), {"00000015"}), ("sampler 1", "generating", 600, (), GROUPS)],
        {"sampler 0": lambda: "pid 80 running", "sampler 1": stopped(81)},
        "learner waits for 2 groups ← sampler 1 generating (16 s of 600 s) ← pid 81 stopped (SIGSTOP)",
    ),
    "one sampler of many gone": (
        ("learner", "2 groups", GROUPS),
        [("sampler 0", "generating", 600, (), {"00000016"}), ("sampler 1", "generating", 600, (), {"00000017"})],
        {"sampler 0": lambda: "pid 80 running", "sampler 1": gone(81)},
        "← sampler 1 generating (16 s of 600 s) ← pid 81 gone 12 s ago",
    ),
    "loading weights": (
        ("controller", "samplers to use weights v3", ()),
        [("sampler 0", "loading weights v3", 300, (), ()), ("sampler 1", "loading weights v3", 300, (), ())],
        {"sampler 1": stopped(81)},
        "samplers to use weights v3 ← sampler 1 loading weights v3 (16 s of 300 s) ← pid 81 stopped (SIGSTOP)",
    ),
    "the probe": (
        ("controller", "samplers to use weights v3", ()), [("sampler 1", "answering the probe", 300, (), ())], {},
        "samplers to use weights v3 ← sampler 1 answering the probe (16 s of 300 s)",
    ),
    "starting its engine": (
        ("controller", "samplers", {"sampler 0"}), [("sampler 0", "starting its engine", 610, (), ())], {},
        "controller waits for samplers ← sampler 0 starting its engine (16 s of 610 s)",
    ),
    "every sampler gone": (
        ("learner", "2 groups", GROUPS),
        [
            ("sampler pool", "has no sampler left", None, {"sampler 2", "sampler 3"}, GROUPS),
            ("sampler 2", "starting its engine", 610, (), ()), ("sampler 3", "starting its engine", 610, (), ()),
        ],
        {"sampler 2": lambda: "pid 82 running", "sampler 3": lambda: "pid 83 running"},
        "2 groups ← sampler pool has no sampler left (16 s) ← sampler 2 starting its engine (16 s of 610 s) ← pid 82",
    ),
    "scoring": (
        ("learner", "2 groups", GROUPS),
        [("reward worker 2", "scores group 00000017", 60, (), {"00000017"})], {"reward worker 2": gone(4711)},
        "2 groups ← reward worker 2 scores group 00000017 (16 s of 60 s) ← pid 4711 gone 12 s ago",
    ),
    "no free reward worker": (
        ("learner", "2 groups", GROUPS),
        [
            ("reward worker 0", "scores group 00000003", 60, (), {"00000003"}),
            ("group 00000017", "waits for a free reward worker", None, {"reward worker 0"}, {"00000017"}),
        ],
        {},
        "← group 00000017 waits for a free reward worker (16 s) ← reward worker 0 scores group 00000003 (16 s of 60 s)",
    ),
    "reward worker starting": (
        ("controller", "reward workers", ()), [("reward worker 1", "loading the rewards", 120, (), ())], {},
        "reward workers ← reward worker 1 loading the rewards (16 s of 120 s)",
    ),
    "every reward worker gone": (
        ("learner", "2 groups", GROUPS),
        [("group 00000017", "waits for a free reward worker", None, {"reward worker 0"}, {"00000017"})],
        {"reward worker 0": gone(90)},
        "← group 00000017 waits for a free reward worker (16 s) ← reward worker 0: pid 90 gone 12 s ago",
    ),
    "a group that was lost": (
        ("learner", "2 groups", GROUPS), [("sampler 0", "generating", 600, (), {"00000099"})], {},
        "learner waits for 2 groups ← no one is at work on 00000016, 00000017",
    ),
    "rollouts being written": (
        ("controller", "the rollouts of step 6 to be on disk", {"rollouts of step 6"}),
        [("rollouts of step 6", "are written", 600, (), ())], {},
        "the rollouts of step 6 to be on disk ← rollouts of step 6 are written (16 s of 600 s)",
    ),
    "the journal": (
        ("controller", "the journal", {"journal"}), [("journal", "writes 12 events", 60, (), ())], {},
        "controller waits for the journal ← journal writes 12 events (16 s of 60 s)",
    ),
    "sealing a checkpoint": (
        ("controller", "the checkpoint of step 7", ()), [("checkpoint of step 7", "is sealed", 600, (), ())], {},
        "the checkpoint of step 7 ← checkpoint of step 7 is sealed (16 s of 600 s)",
    ),
    "the object store": (
        ("controller", "samplers to use weights v3", ()),
        [("weights v3", "are put into the object store", 300, (), ())], {},
        "samplers to use weights v3 ← weights v3 are put into the object store (16 s of 300 s)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("stall", STALLS.values(), ids=STALLS)
def test_every_stall_is_named_within_30_seconds(stage, stall):
    (owner, what, on), others, facts, named = stall
    for name, fact in facts.items():
        stage.waits.describe(name, fact)
    stage.run(10)  # the run goes well until here
    with contextlib.ExitStack() as lasting:
        lasting.enter_context(stage.waits.waiting(owner, what, root=True, on=on))
        for other, doing, timeout_s, its_on, about in others:
            wait = stage.waits.waiting(other, doing, timeout_s=timeout_s, on=its_on, about=about)
            lasting.callback(wait.__exit__, None, None, None)
            contextvars.copy_context().run(wait.__enter__)  # beside the others, as in a task of its own
        stage.run(30)
    assert stage.view.notes
    assert stage.view.notes[0].startswith(f"stalled 16 s: {owner} waits for {what}")
    assert named in stage.view.notes[0]
    told_last = stage.view.notes[-1].partition(": ")[2]
    assert told_last.partition(" (")[0] == stage.live.chain.partition(" (")[0]


def test_a_blocked_loop_is_named_with_its_place_before_any_wait(stage):
    stage.watch_loop()
    with stage.waits.waiting("learner", "groups", root=True):
        stage.run(4)
        stage.loop.stuck = True
        stage.run(30)
        assert len(stage.view.notes) == 3
        assert stage.view.notes[0].startswith("stalled 6 s: controller is busy in ")
        assert stage.view.notes[0].endswith(" for 6 s")
        assert stage.live.chain.startswith("controller is busy in ")
        stage.loop.stuck = False
        stage.loop.turn()
        stage.run(2)
        assert stage.live.chain == "learner waits for groups"
        stage.loop.stuck = True
        stage.view.notes.clear()
        stage.run(8)
        assert stage.view.notes[0].startswith("stalled 6 s: controller is busy in ")


def test_the_place_is_our_innermost_function_and_what_that_has_called():
    def render():
        return sorted([1], key=lambda _: frames.append(sys._getframe()) or 0)

    frames = []
    render()
    frame = frames[0]
    assert describe_stack(frame, ("/nowhere/",)).startswith("tests/unit/test_stall_watch.py:")
    assert describe_stack(frame, ("/nowhere/",)).endswith(" <lambda>")
    assert describe_stack(frame, (__file__,)) == describe_stack(frame, ("/nowhere/",))
    caller = frame.f_back.f_back.f_back.f_code.co_filename  # who called the test
    assert caller != __file__
    shown = describe_stack(frame, (caller,))
    assert shown.endswith(f" (in {describe_stack(frame, (__file__,))})")


def test_what_arrives_ends_a_stall_and_short_waits_are_not_told(stage):
    groups = {"a", "b", "c"}
    with stage.waits.waiting("learner", "groups", root=True, on=groups):
        for _ in range(3):
            stage.run(14)
            groups.pop()
    for _ in range(5):
        with stage.waits.waiting("learner", "groups", root=True):
            stage.run(12)
    assert stage.view.notes == []
    assert stage.live.waited_s == 12


def test_a_stall_is_told_again_when_its_reason_changes_and_else_ever_more_rarely(stage):
    with stage.waits.waiting("learner", "groups", root=True, on=["a"]):
        with stage.waits.waiting("sampler 0", "generating", about=["a"]):
            stage.run(34)
            assert len(stage.view.notes) == 2
            stage.waits.describe("sampler 0", gone(80))
            stage.run(16)
            assert len(stage.view.notes) == 3
            assert stage.view.notes[2].endswith("pid 80 gone 12 s ago")
        stage.waits.forget("sampler 0")
        stage.run(1200)
    seconds = [int(note.split()[1]) for note in stage.view.notes]
    assert seconds[:3] == [16, 32, 48]
    assert len(seconds) < 9
    pauses = [after - before for before, after in itertools.pairwise(seconds[3:])]
    assert pauses == sorted(pauses)


def test_reasons_that_come_and_go_by_turns_are_not_told_for_ever(stage):
    with stage.waits.waiting("learner", "groups", root=True, on=["a"]):
        for _ in range(40):
            for doing in ("starting its engine", "generating"):
                with stage.waits.waiting("sampler 0", doing, about=["a"]):
                    stage.run(16)
    assert len(stage.view.notes) < 14


def test_a_process_that_stood_still_says_so_and_blames_no_one(stage):
    stage.watch_loop()
    with stage.waits.waiting("learner", "groups", root=True):
        stage.run(4)
        stage.loop.stuck = True
        stage.run(2)
        stage.clock.now += 60
        stage.watch.look()
        stage.loop.stuck = False
        stage.loop.turn()
        stage.run(6)
        assert stage.view.notes == ["this process did nothing for 58 s: it was stopped, or given no processor time"]
        stage.run(4)
        assert stage.view.notes[1].startswith("stalled 16 s: learner waits for groups")


def test_a_look_that_took_long_is_not_a_process_that_stood_still(tmp_path):
    stage = Stage(tmp_path, facts=lambda: {"slow": setattr(stage.clock, "now", stage.clock.now + 30)})
    stage.run(8)
    assert stage.view.notes == []


def test_a_controller_that_waits_for_what_it_did_not_name_is_told(stage):
    stage.run(40)
    assert stage.view.notes == []  # no loop to watch: nothing has begun
    stage.watch_loop()
    stage.run(30)
    assert stage.view.notes == ["stalled 16 s: controller waits for something that it did not name"]


def test_a_closed_loop_owes_nothing(stage):
    stage.watch_loop()
    stage.run(4)
    stage.loop.closed = True
    stage.run(8)
    assert not any("busy" in note for note in stage.view.notes)


def test_live_json_has_the_waits_the_alarms_and_what_the_run_says(tmp_path):
    stage = Stage(tmp_path, facts=lambda: {"step": 7, "samplers": [{"name": "sampler 0", "node": Path("n")}]})
    stage.waits.describe("sampler 0", gone(80))
    with contextlib.ExitStack() as lasting:
        for index in range(100):
            lasting.enter_context(stage.waits.waiting(f"sampler {index}", "generating", timeout_s=60))
        stage.run(4)
    live = stage.live
    assert (live.num_waits, len(live.waits)) == (100, stall_watch.WAITS_SHOWN)
    assert (live.waits[0].owner, live.waits[0].seconds, live.waits[0].timeout_s) == ("sampler 0", 4.0, 60)
    assert live.alarms == {"sampler 0": "pid 80 gone 12 s ago"}
    assert live.facts == {"step": 7, "samplers": [{"name": "sampler 0", "node": "n"}]}
    assert live.chain is None
    assert [path.name for path in tmp_path.iterdir()] == ["live.json"]


def test_facts_that_fail_and_a_folder_that_is_gone_do_not_end_the_watching(tmp_path):
    stage = Stage(tmp_path / "gone", facts=lambda: 1 / 0)
    with stage.waits.waiting("learner", "groups", root=True):
        stage.run(20)
    assert len(stage.view.notes) == 2
    assert "live.json cannot be written (No such file or directory)" in stage.view.notes[0]
    assert stage.view.notes[1].startswith("stalled 16 s")
    (tmp_path / "gone").mkdir()
    stage.run(2)
    assert stage.live.facts == {"facts": "not known (ZeroDivisionError: division by zero)"}


class SignallingView(FakeView):
    """Tells when a note came."""

    def __init__(self):
        super().__init__()
        self.noted = threading.Event()

    def note(self, text: str) -> None:
        super().note(text)
        self.noted.set()


def test_the_thread_tells_of_a_loop_that_is_blocked_while_it_is_blocked_and_ends(tmp_path):
    view = SignallingView()

    def render_for_ever():
        return view.noted.wait(20)

    async def run():
        waits = Waits()
        with StallWatch(waits, view, RunFolder(tmp_path), every_s=0.02, late_s=0.5) as watch:
            watch.watch_this_loop()
            await asyncio.sleep(0)
            assert render_for_ever()
        return watch

    watch = asyncio.run(run())
    assert "controller is busy in " in view.notes[0]
    assert not watch._thread.is_alive()
    assert json.loads((tmp_path / "live.json").read_text())["pid"]


def test_the_watch_ends_at_once_however_rarely_it_looks(tmp_path):
    with StallWatch(Waits(), FakeView(), RunFolder(tmp_path), every_s=3600) as watch:
        assert watch._thread.is_alive()
    assert not watch._thread.is_alive()
    assert watch._thread.daemon
