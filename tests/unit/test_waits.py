"""Waits and the causal chain: what is named, what is not, and what a wait costs."""

import asyncio
import contextlib
import gc
import itertools
import sys
import threading
import weakref

import pytest

from actors.calls import answer
from weaver_rl.errors import ActorFailedError
from weaver_rl.wait_chain import Fact
from weaver_rl.waits import WaitHandle, Waits, current_waits, using

pytestmark = pytest.mark.unit


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def waits(clock):
    return Waits(clock)


@contextlib.contextmanager
def lasting(*handles: WaitHandle):
    with contextlib.ExitStack() as stack:
        for handle in handles:
            stack.enter_context(handle)
        yield


def test_nothing_waits_at_first_and_after_the_end_however_it_ends(waits):
    assert waits.chain() is None
    with waits.waiting("learner", "3 groups", root=True):
        assert waits.chain().line == "learner waits for 3 groups"
    with pytest.raises(ZeroDivisionError), waits.waiting("learner", "3 groups", root=True):
        raise ZeroDivisionError
    assert waits.chain() is None
    assert waits.current() == ()


def test_the_chain_of_the_issue(waits, clock):
    groups = {"00000015", "00000016", "00000017"}
    learner = waits.waiting("learner", "3 groups", root=True, on=groups)
    worker = waits.waiting("reward worker 2", "scores group 00000017", timeout_s=60, about=["00000017"])
    waits.describe("reward worker 2", lambda: Fact(text="pid 4711 gone 12 s ago", alarming=True))
    with lasting(learner, worker):
        clock.now += 41
        assert waits.chain().line == (
            "learner waits for 3 groups ← reward worker 2 scores group 00000017 (41 s of 60 s) ← pid 4711 gone 12 s ago"
        )
        waits.forget("reward worker 2")
        assert waits.chain().ending is None


def test_a_root_with_a_deadline_shows_its_age(waits, clock):
    with waits.waiting("controller", "the checkpoint of step 7", timeout_s=600, root=True):
        clock.now += 16
        assert waits.chain().line == "controller waits for the checkpoint of step 7 (16 s of 600 s)"


def test_of_roots_the_oldest_and_of_what_it_waits_for_the_oldest(waits, clock):
    younger = waits.waiting("controller", "something", root=True)
    first = waits.waiting("sampler 1", "generating", about=["a", "b"])
    second = waits.waiting("sampler 0", "generating", about=["c"])
    with waits.waiting("learner", "groups", root=True, on={"b", "c"}):
        clock.now += 5
        with lasting(younger, first, second):
            assert [link.owner for link in waits.chain().links] == ["learner", "sampler 1"]


def test_live_collections_and_callables_are_read_when_the_chain_is_asked_for(waits):
    missing, owed = {"a"}, ["b"]
    with lasting(
        waits.waiting("learner", "groups", root=True, on=missing),
        waits.waiting("sampler 0", "generating", about=lambda: owed),
    ):
        assert len(waits.chain().links) == 1
        owed.append("a")
        assert len(waits.chain().links) == 2
        missing.remove("a")
        missing.add("c")
        assert len(waits.chain().links) == 1


def test_a_handle_may_change_what_it_says_while_it_lasts(waits):
    with waits.waiting("learner", "3 groups", root=True, on=["x"]) as wait:
        before = waits.chain()
        wait.what, wait.on = "2 groups", ["y"]
        after = waits.chain()
    assert after.line == "learner waits for 2 groups ← no one is at work on y"
    assert before.progress != after.progress


def test_one_name_may_be_given_as_a_string(waits):
    with lasting(
        waits.waiting("controller", "weights v3", root=True, on="sampler 1"),
        waits.waiting("sampler 1", "loading weights v3"),
    ):
        assert [link.owner for link in waits.chain().links] == ["controller", "sampler 1"]


def test_what_waits_for_itself_ends(waits):
    with lasting(
        waits.waiting("learner", "a", root=True, on=["sampler"]),
        waits.waiting("sampler", "waits for the reward", on=["reward"]),
        waits.waiting("reward", "waits for the sampler", on=["sampler", "reward", "learner"]),
    ):
        assert [link.owner for link in waits.chain().links] == ["learner", "sampler", "reward"]


def test_an_alarm_is_named_before_what_is_older_and_fine(waits):
    waits.describe("sampler 0", lambda: "pid 1 running")
    waits.describe("sampler 1", lambda: Fact(text="pid 2 stopped (SIGSTOP) for 9 s", alarming=True))
    free = [f"reward worker {index}" for index in range(2)]
    with lasting(
        waits.waiting("learner", "2 groups", root=True, on=["a", "b", "c"]),
        waits.waiting("sampler 0", "generating", about=["a"]),
        waits.waiting("group c", "waits for a free reward worker", on=free, about=["c"]),
        waits.waiting("sampler 1", "generating", about=["b"]),
    ):
        assert waits.chain().line.endswith("sampler 1 generating (0 s) ← pid 2 stopped (SIGSTOP) for 9 s")
        waits.forget("sampler 1")
        assert waits.chain().line.endswith("sampler 0 generating (0 s) ← pid 1 running")
        waits.describe("reward worker 1", lambda: Fact(text="pid 3 gone 1 s ago", alarming=True))
        assert waits.chain().line.endswith(
            "group c waits for a free reward worker (0 s) ← reward worker 1: pid 3 gone 1 s ago"
        )


def test_a_group_that_no_one_holds_is_named(waits):
    with waits.waiting("learner", "5 groups", root=True, on=[f"0000000{index}" for index in range(5)]):
        assert waits.chain().ending == "no one is at work on 00000000, 00000001, 00000002 and 2 more"
    waits.describe("sampler 0", lambda: "idle")
    with waits.waiting("learner", "samplers", root=True, on=["sampler 0"]):
        assert waits.chain().ending == "sampler 0: idle"


def test_facts_that_cannot_be_had_do_not_end_the_watching(waits):
    waits.describe("controller", lambda: 1 / 0)
    with waits.waiting("controller", "it", root=True):
        assert waits.chain().ending == "its state is unknown (ZeroDivisionError: division by zero)"
    assert waits.alarms() == {}


def test_every_owner_in_alarm_is_told_though_nobody_waits_for_it(waits):
    waits.describe("sampler 0", lambda: "pid 1 running")
    waits.describe("sampler 1", lambda: Fact(text="gone", alarming=True))
    waits.describe("sampler 2", lambda: None)
    assert waits.alarms() == {"sampler 1": "gone"}


def test_substance_is_all_but_the_seconds(waits, clock):
    state = ["pid 4711 gone 1 s ago"]
    waits.describe("learner rank 0", lambda: state[0])
    with lasting(
        waits.waiting("controller", "the learner", root=True), waits.waiting("learner rank 0", "forward", timeout_s=60)
    ):
        before = waits.chain()
        clock.now += 7
        state[0] = "pid 4711 gone 8 s ago"
        after = waits.chain()
        assert before.line != after.line
        assert before.substance == after.substance
        state[0] = "pid 4712 gone 8 s ago"
        assert waits.chain().substance != after.substance


def test_a_root_without_names_waits_for_what_is_begun_inside_by_its_tasks_too(waits):
    async def call(name: str, until: asyncio.Event):
        with current_waits().waiting(name, "forward_backward", timeout_s=60):
            await until.wait()

    async def run():
        until = asyncio.Event()
        with using(waits):
            elsewhere = asyncio.create_task(call("sampler 0", until))
            await asyncio.sleep(0)
            with waits.waiting("controller", "the learner", root=True):
                inside = asyncio.create_task(call("learner rank 0", until))
                await asyncio.sleep(0)
                chain = waits.chain()
            after = waits.chain()
        until.set()
        await asyncio.gather(elsewhere, inside)
        return chain, after

    chain, after = asyncio.run(run())
    assert chain.line == "controller waits for the learner ← learner rank 0 forward_backward (0 s of 60 s)"
    assert after is None


def test_calls_one_after_the_other_inside_a_root_are_each_what_it_waits_for(waits):
    with waits.waiting("controller", "the learner", root=True):
        with waits.waiting("learner rank 0", "forward_backward"):
            pass
        with waits.waiting("learner rank 0", "optim_step"):
            assert waits.chain().line == "controller waits for the learner ← learner rank 0 optim_step (0 s)"


def test_what_others_begin_inside_a_wait_is_not_what_they_wait_for(waits):
    with (
        waits.waiting("learner", "a", root=True, on=["a"]),
        waits.waiting("sampler 0", "generating", about=["a"]),
        waits.waiting("reward worker 0", "scoring", about=["b"]),
    ):
        assert [link.owner for link in waits.chain().links] == ["learner", "sampler 0"]


def test_a_generator_closed_in_another_context_ends_its_wait(waits):
    async def groups():
        with waits.waiting("sampler 0", "generating"):
            yield 1
            yield 2

    async def run():
        stream = groups()
        await asyncio.create_task(anext(stream))
        assert len(waits.current()) == 1
        await asyncio.create_task(stream.aclose())

    asyncio.run(run())
    assert waits.current() == ()


def test_tasks_that_each_start_the_next_inside_a_wait_keep_no_earlier_wait(waits):
    handles: list[weakref.ref] = []

    class Kept(WaitHandle):
        __slots__ = ("__weakref__",)

    async def step(left: int, done: asyncio.Event):
        handle = Kept(waits, "sampler", "a step", None, (), (), False)
        handles.append(weakref.ref(handle))
        with handle:
            task = asyncio.create_task(step(left - 1, done)) if left else None
            await asyncio.sleep(0)
        del handle
        if task is None:
            gc.collect()
            kept.append(sum(reference() is not None for reference in handles))
            done.set()

    async def run():
        done = asyncio.Event()
        await asyncio.gather(step(50, done), done.wait())

    kept: list[int] = []
    asyncio.run(run())
    assert len(handles) == 51
    assert kept[0] <= 3


def test_the_current_waits_are_those_of_the_process_unless_others_are_in_use(waits):
    everyones = current_waits()
    assert everyones is current_waits()
    with using(waits) as inside:
        assert inside is waits is current_waits()
    assert current_waits() is everyones


@pytest.mark.parametrize("ends_by", ["answer", "deadline", "cancellation"])
def test_a_remote_call_is_a_wait_while_it_lasts_however_it_ends(waits, ends_by):
    async def run():
        reference = asyncio.get_running_loop().create_future()
        timeout_s = 0.001 if ends_by == "deadline" else 60
        with using(waits):
            call = answer(reference, actor="reward worker 2", doing="scoring", timeout_s=timeout_s, about=["00000017"])
            task = asyncio.create_task(call)
        await asyncio.sleep(0)
        found = waits.current()
        if ends_by == "answer":
            reference.set_result(3)
            assert await task == 3
        else:
            if ends_by == "cancellation":
                task.cancel()
            with pytest.raises((ActorFailedError, asyncio.CancelledError)):
                await task
        return found

    (found,) = asyncio.run(run())
    assert (found.owner, found.what, found.about) == ("reward worker 2", "scoring", {"00000017"})
    assert waits.current() == ()


def test_another_thread_may_look_while_waits_come_and_go():
    waits, owed, end, errors, looks = Waits(), set(), threading.Event(), [], [0]

    def watch():
        try:
            while not end.is_set():
                waits.chain()
                waits.current()
                looks[0] += 1
        except Exception as error:  # noqa: BLE001 - boundary: the test must hear of it
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with (
            lasting(*(waits.waiting("sampler 1", "generating") for _ in range(200))),
            waits.waiting("learner", "groups", root=True, on=owed),
        ):
            for number in itertools.takewhile(lambda _: looks[0] < 300 and not errors, itertools.count()):
                owed.add(str(number))
                with waits.waiting("sampler 0", "generating", about=owed):
                    owed.discard(str(number - 7))
    finally:
        end.set()
        watcher.join()
        sys.setswitchinterval(interval)
    assert errors == []


def test_waits_that_begin_while_somebody_looks_do_not_disturb(waits):
    def names():
        begun.append(waits.waiting("reward worker 0", "scoring").__enter__())
        return ["a"]

    begun: list[WaitHandle] = []
    with waits.waiting("learner", "groups", root=True, on=names):
        assert len(waits.current()) == 1
        assert waits.chain().links[0].owner == "learner"
    assert len(begun) == 2


def test_a_wait_costs_the_same_however_many_last():
    """Counted in what is read, not in seconds: begin and end read none of the names and none of the other waits."""
    waits, reads = Waits(), []

    def names():
        reads.append(1)
        return ["a"]

    others = [waits.waiting("sampler", "generating", about=names, on=names) for _ in range(1000)]
    with lasting(*others):
        assert reads == []
        assert len(waits.current()) == 1000
    assert len(reads) == 2000
