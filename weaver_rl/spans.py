"""Spans: what a process did, from when to when. It knows neither Ray nor files, and not who asks for them.

Times are seconds since the epoch, read from a monotonic clock that was set against the wall clock once per process.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from contextvars import ContextVar, Token
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self, TypeVar

Attribute = str | int | float | bool
Function = TypeVar("Function", bound=Callable[..., Any])

Process = tuple[int, float]
"""Its number and `Spans.anchor_s`: an actor that is made anew on another node may have the same number there."""

MAX_SPANS = 10_000
"""A process keeps the newest so many that nobody has asked for."""
MAX_TRACKS = 200
JOIN_S = 0.001
"""Parts of a lasting state that are no further apart are one."""

ANCHOR_S = time.time() - time.monotonic()
"""What is added to the monotonic clock of this process."""


def now() -> float:
    """Seconds since the epoch; never goes back."""
    return ANCHOR_S + time.monotonic()


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One thing that a process did.

    Example:
        Span(name="learner/forward", begin_s=1767225600.0, end_s=1767225601.5, track="MainThread", span_id=7)
    """

    name: str
    begin_s: float
    end_s: float
    """Of one that still lasts: the moment it was asked for."""
    track: str
    """Thread, with a number where a thread does several things at a time. On one track spans nest or are disjoint."""
    span_id: int
    """Unique in the process."""
    parent_id: int | None = None
    """The span inside which it was begun, by the same task or by one whose task it is."""
    attributes: Mapping[str, Attribute] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spans:
    """What a process did since it was last asked.

    Example:
        Spans(spans=(span,), pid=4711, anchor_s=1767220000.0, begun_s=1767225000.0, drained_at_s=1767225602.0)
    """

    spans: tuple[Span, ...]
    """Those that ended, in the order of their ends."""
    lasting: tuple[Span, ...] = ()
    """Those that had not ended at `drained_at_s`; they come again."""
    pid: int
    anchor_s: float
    """Epoch minus monotonic clock, as the process sees them: tells the clocks of two processes of a node apart."""
    begun_s: float
    """When the process began to record."""
    drained_at_s: float
    num_dropped: int = 0
    """Spans that were lost because nobody asked for too long."""

    @property
    def process(self) -> Process:
        """Tells the process from every other one."""
        return self.pid, self.anchor_s

    def moved(self, seconds: float) -> Spans:
        """The same on a clock that is so much ahead."""
        if seconds == 0.0:
            return self
        return replace(
            self,
            spans=tuple(_moved(span, seconds) for span in self.spans),
            lasting=tuple(_moved(span, seconds) for span in self.lasting),
            begun_s=self.begun_s + seconds,
            drained_at_s=self.drained_at_s + seconds,
        )


def _moved(span: Span, seconds: float) -> Span:
    return replace(span, begin_s=span.begin_s + seconds, end_s=span.end_s + seconds)


class _Track:
    """One line of a trace: what lasts on it is a stack, what ended on it ended before `free_since`."""

    __slots__ = ("free_since", "name", "stack")

    def __init__(self, name: str) -> None:
        self.name = name
        self.stack: list[span] = []
        self.free_since = float("-inf")


@dataclass(slots=True)
class _State:
    """What a thread is in over and over, joined so far."""

    name: str
    thread: str
    begin: float
    end: float
    num_parts: int
    is_in: bool


class SpanBuffer:
    """The spans of a process that nobody has asked for yet. Any thread may use it."""

    def __init__(self, max_spans: int = MAX_SPANS, clock: Callable[[], float] = now) -> None:
        self.clock = clock
        # The garbage collector may close an abandoned generator, and end its span, in a thread that is in here.
        self.lock = threading.RLock()
        self._max_spans = max_spans
        self._begun_s = clock()
        self._ended: deque[Span | tuple[Any, ...]] = deque()
        self._num_dropped = 0
        self._num_made = 0
        self._tracks: dict[str, list[_Track]] = {}
        self._states: dict[int, _State] = {}

    def drain(self) -> Spans:
        """Everything since the last call; what still lasts is told now and comes again."""
        with self.lock:
            at = self.clock()
            self._flush_states(at)
            ended, self._ended = self._ended, deque()
            dropped, self._num_dropped = self._num_dropped, 0
            lasting = [
                (it.name, it.begin_s, at, track.name, it.span_id, it.parent_id, it.attributes)
                for tracks in self._tracks.values()
                for track in tracks
                for it in track.stack
            ]
            self._forget_idle_tracks()
        return Spans(
            spans=tuple(_span(values) for values in ended),
            lasting=tuple(_span(values) for values in lasting),
            pid=os.getpid(),
            anchor_s=ANCHOR_S,
            begun_s=self._begun_s,
            drained_at_s=at,
            num_dropped=dropped,
        )

    def record(self, name: str, begin_s: float, end_s: float, *, track: str, **attributes: Attribute) -> None:
        """A span that was timed elsewhere; it is no part of another."""
        with self.lock:
            line = self._free_track(track, begin_s)
            line.free_since = max(line.free_since, end_s)
            self._add((name, begin_s, end_s, line.name, self._next_id(), None, attributes))

    # -- for `span` and `lasting`, which hold the lock -----------------------------------------------------------------

    def begin(self, it: span, parent: span | None, thread: str) -> None:
        """Puts it on the track of its parent where it will end before that, else on one that is free."""
        it.span_id = self._next_id()
        line = parent.line if parent is not None and parent.doer == it.doer else None
        if line is None or line.stack[-1] is not parent:
            line = self._free_track(thread, it.begin_s)
        line.stack.append(it)
        it.line = line

    def end(self, it: span, end_s: float) -> None:
        line = it.line
        if line is None:
            return
        if line.stack[-1] is it:
            line.stack.pop()
        else:
            self._outlived(line, it)
        line.free_since = end_s
        it.line = None
        self._add((it.name, it.begin_s, end_s, line.name, it.span_id, it.parent_id, it.attributes))

    def enter_state(self, name: str, begin: float) -> None:
        thread = threading.get_ident()
        state = self._states.get(thread)
        if state is not None and state.name == name and begin - state.end <= JOIN_S:
            state.num_parts += 1
            state.is_in = True
            return
        if state is not None:
            self._flush_state(state)
        self._states[thread] = _State(name, threading.current_thread().name, begin, begin, 1, True)

    def leave_state(self, name: str, end: float) -> None:
        state = self._states.get(threading.get_ident())
        if state is not None and state.name == name:
            state.end, state.is_in = end, False

    def _outlived(self, line: _Track, it: span) -> None:
        """A generator may last longer than what it was begun in: it goes on on another track, which nests again."""
        place = line.stack.index(it)
        above = line.stack[place + 1 :]
        del line.stack[place:]
        other = self._free_track(line.name.partition(" #")[0], above[0].begin_s)
        other.stack.extend(above)
        for moved in above:
            moved.line = other

    def _free_track(self, thread: str, begin: float) -> _Track:
        tracks = self._tracks.get(thread)
        if tracks is None:
            if len(self._tracks) >= MAX_TRACKS:
                self._forget_idle_tracks()
            tracks = self._tracks[thread] = []
        for track in tracks:
            if not track.stack and track.free_since <= begin:
                return track
        track = _Track(thread if not tracks else f"{thread} #{len(tracks) + 1}")
        tracks.append(track)
        return track

    def _forget_idle_tracks(self) -> None:
        """Threads come and go under new names; those of which nothing is left are made anew when they are needed."""
        if len(self._tracks) >= MAX_TRACKS:
            self._tracks = {
                name: tracks for name, tracks in self._tracks.items() if any(track.stack for track in tracks)
            }

    def _flush_states(self, at: float) -> None:
        for thread, state in list(self._states.items()):
            if not state.is_in:
                self._flush_state(state)
                del self._states[thread]
                continue
            state.end = at
            self._flush_state(state)
            state.begin, state.num_parts = at, 0

    def _flush_state(self, state: _State) -> None:
        if state.end <= state.begin:
            return
        line = self._free_track(f"{state.thread} (states)", state.begin)
        line.free_since = state.end
        attributes = {"parts": state.num_parts}
        self._add((state.name, state.begin, state.end, line.name, self._next_id(), None, attributes))

    def _next_id(self) -> int:
        self._num_made += 1
        return self._num_made

    def _add(self, values: tuple[Any, ...]) -> None:
        if len(self._ended) >= self._max_spans:
            self._ended.popleft()
            self._num_dropped += 1
        self._ended.append(values)


def _span(values: Any) -> Span:
    name, begin_s, end_s, track, span_id, parent_id, attributes = values
    return Span(
        name=name,
        begin_s=begin_s,
        end_s=end_s,
        track=track,
        span_id=span_id,
        parent_id=parent_id,
        attributes=dict(attributes),
    )


class span:  # noqa: N801 - used like a function, as contextlib's are
    """Records a block, or every call of a function or coroutine function that it decorates. Costs microseconds.

    Args:
        name: who/what, `learner/forward`. The attributes are for who reads a trace: few and small.

    Example:
        with span("learner/forward", version=3):
            ...
    """

    __slots__ = (
        "_buffer",
        "_parent",
        "_token",
        "attributes",
        "begin_s",
        "doer",
        "line",
        "name",
        "parent_id",
        "span_id",
    )

    def __init__(self, name: str, /, **attributes: Attribute) -> None:
        self.name = name
        self.attributes = attributes
        self.line: _Track | None = None
        self.span_id = 0
        self.parent_id: int | None = None
        self.begin_s = 0.0
        self.doer: object = None
        self._token: Token[span | None] | None = None

    def __enter__(self) -> Self:
        self._buffer = buffer = _BUFFER
        parent = _INNERMOST.get()
        if parent is not None and parent.line is not None:
            self.parent_id = parent.span_id
        loop = asyncio._get_running_loop()
        task = asyncio.current_task(loop) if loop is not None else None
        self.doer = threading.get_ident() if task is None else task
        self._token = _INNERMOST.set(self)
        thread = threading.current_thread().name
        with buffer.lock:
            self.begin_s = buffer.clock()
            buffer.begin(self, parent, thread)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        buffer, token = self._buffer, self._token
        with buffer.lock:
            buffer.end(self, buffer.clock())
        # A task that outlives this span keeps it in its context: it must not keep what was around it as well.
        self._token = self.doer = None
        if token is not None:
            with suppress(ValueError):  # a generator may be closed in another context than it was begun in
                _INNERMOST.reset(token)

    def __call__(self, function: Function) -> Function:
        name, attributes = self.name, self.attributes
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(f"{function.__qualname__} is a generator function: write `with span(...)` inside it")

        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def awaited(*args: Any, **kwargs: Any) -> Any:
                with span(name, **attributes):
                    return await function(*args, **kwargs)

            return awaited  # type: ignore[return-value]

        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            with span(name, **attributes):
                return function(*args, **kwargs)

        return called  # type: ignore[return-value]


class lasting:  # noqa: N801 - used like a function
    """A block that comes over and over, an engine step say: parts that follow each other at once are told as one span.

    A thread is in one such state at a time.

    Example:
        while has_work():
            with lasting("sampler/generate"):
                engine.step()
    """

    __slots__ = ("_buffer", "name")

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        self._buffer = buffer = _BUFFER
        with buffer.lock:
            buffer.enter_state(self.name, buffer.clock())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        buffer = self._buffer
        with buffer.lock:
            buffer.leave_state(self.name, buffer.clock())


_BUFFER = SpanBuffer()
_INNERMOST: ContextVar[span | None] = ContextVar("innermost_span", default=None)


def record(name: str, begin_s: float, end_s: float, *, track: str, **attributes: Attribute) -> None:
    """A span that was timed elsewhere, on a track of its own."""
    _BUFFER.record(name, begin_s, end_s, track=track, **attributes)


def drain() -> Spans:
    """What this process did since the last call."""
    return _BUFFER.drain()


class buffering:  # noqa: N801 - used like a function
    """Makes `buffer` that of the process inside the block. For tests: threads of the process share it."""

    def __init__(self, buffer: SpanBuffer) -> None:
        self._buffer = buffer

    def __enter__(self) -> SpanBuffer:
        global _BUFFER
        self._before, _BUFFER = _BUFFER, self._buffer
        return self._buffer

    def __exit__(self, *_exception: object) -> None:
        global _BUFFER
        _BUFFER = self._before
