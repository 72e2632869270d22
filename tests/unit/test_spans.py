"""Spans in threads, tasks and generators: who is in whom, on which track, and what is kept when nobody asks."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import pickle
import random
import threading
import time
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weaver_rl.spans import JOIN_S, Span, SpanBuffer, Spans, buffering, drain, lasting, now, record, span

pytestmark = pytest.mark.unit


class HandClock:
    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def buffer(clock: HandClock) -> Iterator[SpanBuffer]:
    with buffering(SpanBuffer(max_spans=50, clock=clock)) as made:
        yield made


def by_name(spans: Sequence[Span]) -> dict[str, Span]:
    assert len({it.name for it in spans}) == len(spans)
    return {it.name: it for it in spans}


def check_nesting(spans: Sequence[Span]) -> None:
    """On every track two spans nest or are disjoint."""
    tracks: dict[str, list[Span]] = {}
    for it in spans:
        tracks.setdefault(it.track, []).append(it)
    for track, its in tracks.items():
        open_until: list[float] = []
        for it in sorted(its, key=lambda it: (it.begin_s, -it.end_s)):
            while open_until and open_until[-1] <= it.begin_s:
                open_until.pop()
            assert not open_until or it.end_s <= open_until[-1], f"{it} on {track}"
            open_until.append(it.end_s)


@pytest.mark.usefixtures("buffer")
def test_blocks_nest(clock: HandClock):
    with span("a/outer", version=3):
        clock.time += 1
        with span("a/inner"):
            clock.time += 2
        clock.time += 4
    drained = drain()
    inner, outer = drained.spans
    assert (outer.name, outer.begin_s, outer.end_s, outer.attributes) == ("a/outer", 100.0, 107.0, {"version": 3})
    assert (inner.name, inner.begin_s, inner.end_s, inner.parent_id) == ("a/inner", 101.0, 103.0, outer.span_id)
    assert outer.parent_id is None
    assert inner.track == outer.track == threading.current_thread().name
    assert drain().spans == ()


@pytest.mark.usefixtures("buffer")
def test_what_lasts_is_told_and_comes_again(clock: HandClock):
    with span("a/outer"):
        clock.time += 1
        first = drain()
        assert first.spans == ()
        assert [(it.name, it.end_s) for it in first.lasting] == [("a/outer", 101.0)]
        clock.time += 1
    (ended,) = drain().spans
    assert (ended.begin_s, ended.end_s, ended.span_id) == (100.0, 102.0, first.lasting[0].span_id)


@pytest.mark.usefixtures("buffer")
def test_a_block_that_fails_is_recorded_and_leaves_nothing_open():
    with pytest.raises(ZeroDivisionError), span("a/fails"):
        _ = 1 / 0
    with span("a/after"):
        pass
    spans = by_name(drain().spans)
    assert spans["a/after"].parent_id is None
    assert drain().lasting == ()


@pytest.mark.usefixtures("buffer")
def test_decorated_functions_and_coroutines():
    @span("a/called", kind="plain")
    def called(value: int) -> int:
        """Doc."""
        return value + 1

    @span("a/awaited")
    async def awaited(value: int) -> int:
        await asyncio.sleep(0)
        return called(value)

    assert called.__doc__ == "Doc."
    assert asyncio.run(awaited(1)) == 2
    spans = by_name(drain().spans)
    assert spans["a/called"].parent_id == spans["a/awaited"].span_id
    assert spans["a/called"].attributes == {"kind": "plain"}
    with pytest.raises(TypeError, match="inside it"):

        @span("a/generator")
        def generator() -> Iterator[int]:
            yield 1


@pytest.mark.usefixtures("buffer")
def test_threads_have_tracks_of_their_own_and_no_parents_elsewhere(clock: HandClock):
    def work() -> None:
        with span("a/thread"):
            clock.time += 1

    with span("a/outer"):
        thread = threading.Thread(target=work, name="other")
        thread.start()
        thread.join()
    spans = by_name(drain().spans)
    assert spans["a/thread"].track == "other"
    assert spans["a/thread"].parent_id is None


@pytest.mark.usefixtures("buffer")
def test_tasks_overlap_on_tracks_of_their_own(clock: HandClock):
    async def task(name: str, gate: asyncio.Event) -> None:
        with span(f"a/{name}"):
            clock.time += 1
            await gate.wait()
            with span(f"a/{name}/inner"):
                clock.time += 1

    async def main() -> None:
        gates = [asyncio.Event(), asyncio.Event()]
        with span("a/outer"):
            tasks = [asyncio.create_task(task(str(number), gate)) for number, gate in enumerate(gates)]
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        # Both outlive what they were begun in, and end in the order of their beginning.
        for gate, it in zip(gates, tasks, strict=True):
            clock.time += 1
            gate.set()
            await it

    asyncio.run(main())
    drained = drain().spans
    check_nesting(drained)
    spans = by_name(drained)
    assert len({spans[name].track for name in ("a/0", "a/1", "a/outer")}) == 3
    assert spans["a/0"].parent_id == spans["a/1"].parent_id == spans["a/outer"].span_id
    assert spans["a/0/inner"].parent_id == spans["a/0"].span_id
    assert spans["a/0/inner"].track == spans["a/0"].track


@pytest.mark.usefixtures("buffer")
def test_a_generator_may_outlast_what_it_was_begun_in(clock: HandClock):
    def numbers() -> Iterator[int]:
        with span("a/generator"):
            clock.time += 1
            yield 1
            with span("a/late"):
                clock.time += 1
            yield 2

    with span("a/outer"):
        clock.time += 1
        generator = numbers()
        next(generator)
        with span("a/meanwhile"):
            clock.time += 1
    clock.time += 1
    with span("a/next"):
        clock.time += 1
        assert next(generator) == 2
        clock.time += 1
    clock.time += 1
    generator.close()
    drained = drain()
    assert drained.lasting == ()
    check_nesting(drained.spans)
    assert by_name(drained.spans)["a/generator"].end_s == clock.time
    with span("a/after"):
        pass
    assert drain().spans[0].parent_id is None


@pytest.mark.usefixtures("buffer")
def test_a_generator_closed_in_another_context():
    def numbers() -> Iterator[int]:
        with span("a/generator"):
            yield 1

    generator = numbers()
    contextvars.copy_context().run(next, generator)
    generator.close()
    assert [it.name for it in drain().spans] == ["a/generator"]


@given(st.randoms(use_true_random=False), st.integers(1, 60))
def test_spans_nest_on_every_track_however_tasks_and_generators_go(chance: random.Random, num_turns: int):
    clock = HandClock()

    def numbers(name: str) -> Iterator[None]:
        with span(name):
            while True:
                yield
                with span(f"{name}/inner"):
                    clock.time += 1

    async def act(depth: int) -> None:
        generators: list[Iterator[None]] = []
        tasks: list[asyncio.Task[None]] = []
        for turn in range(chance.randint(1, 5)):
            with span(f"a/{depth}"):
                clock.time += 1
                match chance.randint(0, 3):
                    case 0 if depth < 3:
                        tasks.append(asyncio.create_task(act(depth + 1)))
                    case 1 if depth < 3:
                        await act(depth + 1)
                    case 2:
                        generators.append(numbers(f"g/{depth}/{turn}"))
                    case _:
                        await asyncio.sleep(0)
                for generator in generators:
                    if chance.random() < 0.5:
                        next(generator)
            if generators and chance.random() < 0.3:
                generators.pop(0).close()  # type: ignore[attr-defined]
            clock.time += 1
        await asyncio.gather(*tasks)

    async def main() -> None:
        await asyncio.gather(*(act(0) for _ in range(1 + num_turns // 20)))

    with buffering(SpanBuffer(clock=clock)):
        asyncio.run(main())
        drained = drain()
    assert drained.lasting == ()
    check_nesting(drained.spans)


def test_a_state_is_one_span_until_it_pauses_or_another_comes(buffer: SpanBuffer, clock: HandClock):
    def steps(name: str, number: int, pause: float) -> None:
        for _ in range(number):
            with lasting(name):
                clock.time += 0.01
            clock.time += pause

    steps("a/busy", 1000, JOIN_S / 2)
    clock.time += 1
    steps("a/busy", 2, JOIN_S / 2)
    steps("a/other", 2, JOIN_S / 2)
    found = [(it.name, round(it.end_s - it.begin_s, 2), it.attributes["parts"]) for it in drain().spans]
    assert found == [("a/busy", 10.5, 1000), ("a/busy", 0.02, 2), ("a/other", 0.02, 2)]


def test_a_state_that_is_asked_for_in_its_middle_is_told_in_two_parts(buffer: SpanBuffer, clock: HandClock):
    with lasting("a/busy"):
        clock.time += 1
        (first,) = drain().spans
        clock.time += 2
    (second,) = drain().spans
    assert (first.begin_s, first.end_s, second.begin_s, second.end_s) == (100.0, 101.0, 101.0, 103.0)
    assert drain().spans == ()


@pytest.mark.usefixtures("buffer")
def test_the_newest_are_kept_and_the_others_counted():
    for number in range(70):
        with span("a/b", number=number):
            pass
    drained = drain()
    assert [it.attributes["number"] for it in drained.spans] == list(range(20, 70))
    assert drained.num_dropped == 20
    assert drain().num_dropped == 0


def test_threads_that_come_and_go_leave_nothing(buffer: SpanBuffer):
    def work() -> None:
        with span("a/b"):
            pass

    for number in range(500):
        thread = threading.Thread(target=work, name=f"thread {number}")
        thread.start()
        thread.join()
    assert len(buffer._tracks) <= 201
    drain()


@pytest.mark.usefixtures("buffer")
def test_what_was_timed_elsewhere_overlaps_on_other_tracks():
    for begin in (1.0, 2.0, 3.0):
        record("a/queue", begin, begin + 1.5, track="queue", number=1)
    assert [it.track for it in drain().spans] == ["queue", "queue #2", "queue"]


def test_moved_to_another_clock_and_pickled():
    with buffering(SpanBuffer()) as made:
        with span("a/b"):
            pass
        with span("a/c"):
            drained = made.drain()
    moved = drained.moved(5.0)
    assert moved.spans[0].begin_s == drained.spans[0].begin_s + 5.0
    assert moved.lasting[0].end_s == moved.drained_at_s == drained.drained_at_s + 5.0
    assert moved.begun_s == drained.begun_s + 5.0
    again: Spans = pickle.loads(pickle.dumps(moved))
    assert again == moved


def test_an_abandoned_generator_may_be_collected_anywhere(buffer: SpanBuffer):
    def abandon() -> None:
        def generator() -> Iterator[None]:
            with span("a/abandoned"):
                yield

        begun = generator()
        next(begun)
        cycle: list[object] = [begun]
        cycle.append(cycle)

    def collecting_clock() -> float:
        gc.collect()  # as any allocation may, those under the lock of the buffer included
        return 100.0

    def work() -> None:
        abandon()
        buffer.clock = collecting_clock
        with span("a/next"):
            pass

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive(), "a span waits for its own thread"
    assert {it.name for it in drain().spans} == {"a/abandoned", "a/next"}


def test_the_clock_is_the_epochs():
    assert abs(now() - time.time()) < 5


def test_a_span_costs_microseconds():
    """Measured 3 µs; a hundred would still be nothing beside an engine step."""
    with buffering(SpanBuffer()):
        begin = time.perf_counter()
        for _ in range(2000):
            with span("a/b"):
                pass
        assert (time.perf_counter() - begin) / 2000 < 100e-6
