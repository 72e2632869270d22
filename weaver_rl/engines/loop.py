"""The thread that owns an engine: alternates between commands and engine steps. It knows nothing of vLLM or Ray.

Loop: produces finished groups; waits for commands when the engine is idle, held or paused; unblocked by any of them.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, get_args

from weaver_rl.errors import EngineError, EngineLostError
from weaver_rl.rollout import SamplingConfig
from weaver_rl.spans import lasting
from weaver_rl.types import Adapter, Float32Array, GroupSample, SampleRequest

log = logging.getLogger(__name__)

T = TypeVar("T")

PauseMode = Literal["abort", "retract", "in_place"]


class Engine(Protocol):
    """What the loop needs of an engine."""

    name: str

    def add(self, request: SampleRequest, sampling: SamplingConfig) -> None: ...
    def add_score(self, token_ids: Sequence[int], temperature: float, adapter: Adapter | None) -> str: ...
    def take_score(self, score_id: str) -> Float32Array | None: ...
    def drop_score(self, score_id: str) -> None: ...
    def has_work(self) -> bool: ...
    def step(self) -> list[GroupSample]: ...
    def cut_short(self) -> list[GroupSample]: ...
    def abort(self, group_ids: Sequence[str]) -> None: ...
    def abort_all(self) -> list[str]: ...
    def reset_cache(self) -> None: ...
    def close(self) -> None: ...


@dataclass(slots=True)
class _Command:
    run: Callable[[], Any]
    result: Future[Any]
    waiting: Sequence[Future[Any]] = ()
    """What the command will answer later; fails with it when it cannot be run."""

    def fail(self, error: BaseException) -> None:
        for future in (self.result, *self.waiting):
            if not future.done():
                future.set_exception(error)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """A group in flight."""

    request: SampleRequest
    sampling: SamplingConfig
    future: Future[GroupSample]


def _promise() -> Future[Any]:
    """A future that a caller cannot cancel: an answer that nobody waits for any more must not end the thread."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    return future


class EngineLoop:
    """Runs one engine in its own thread; every method may be called from any thread.

    Args:
        build: makes the engine, inside the thread (vLLM must be used by the thread that built it).
    """

    def __init__(self, build: Callable[[], Engine]) -> None:
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._groups: dict[str, _Asked] = {}
        self._scores: dict[str, Future[Float32Array]] = {}
        self._closed = False
        self._num_steps = 0
        self._num_failed_in_a_row = 0
        self._is_held = False
        self._is_paused = False
        # Whatever is sent before `_closed` is in the queue when the thread empties it for the last time.
        self._sending = threading.Lock()
        self._started: Future[None] = Future()
        self._thread = threading.Thread(target=self._main, args=(build,), name="engine", daemon=True)
        self._thread.start()

    def wait_started(self, timeout_s: float) -> None:
        """Returns once the engine is built; raises what building it raised, EngineError after `timeout_s`."""
        try:
            self._started.result(timeout=timeout_s)
        except TimeoutError:
            if self._started.done():
                raise
            frame = sys._current_frames().get(self._thread.ident or 0)
            where = "".join(traceback.format_stack(frame)[-4:]) if frame is not None else "its thread has ended"
            raise EngineError(f"the engine did not start within {timeout_s:g} s; it stands at:\n{where}") from None

    def submit(
        self, requests: Sequence[SampleRequest], sampling: SamplingConfig, *, cold: bool = False
    ) -> list[Future[GroupSample]]:
        """Queues groups so that all of them are in before the next engine step: the batch that the engine forms,
        and so every rounding in it, is then the same each time. `cold`: an idle engine forgets cached prefixes first.
        """
        futures: list[Future[GroupSample]] = [_promise() for _ in requests]

        def add() -> None:
            if cold and not self._engine.has_work():
                self._engine.reset_cache()
            for request, future in zip(requests, futures, strict=True):
                if request.group_id in self._groups:
                    # Whoever asked before has gone, and the news of that is still on its way.
                    self._drop([request.group_id])
                self._add(_Asked(request=request, sampling=sampling, future=future))

        self._send(add, futures)
        return futures

    def _add(self, asked: _Asked) -> None:
        try:
            self._engine.add(asked.request, asked.sampling)
        except Exception as error:  # noqa: BLE001 - boundary: one bad request must not end the others
            asked.future.set_exception(error)
        else:
            self._groups[asked.request.group_id] = asked

    def score(
        self, token_ids: Sequence[int], temperature: float = 1.0, adapter: Adapter | None = None
    ) -> Future[Float32Array]:
        """Log-probabilities (N,) of a fixed sequence, of logits divided by the temperature; NaN for the first token."""
        future: Future[Float32Array] = _promise()

        def add() -> None:
            self._scores[self._engine.add_score(token_ids, temperature, adapter)] = future

        self._send(add, [future])
        return future

    def call(self, function: Callable[[Any], T]) -> Future[T]:
        """Runs `function(engine)` between two engine steps."""
        return self._send(lambda: function(self._engine))

    def abort(self, futures: Sequence[Future[Any]]) -> None:
        """Drops what nobody wants any more, given what `submit` or `score` returned for it; the futures fail."""
        unwanted = set(futures)

        # By future, not by name: the same group may have been asked for again since.
        def drop() -> None:
            self._drop([name for name, asked in self._groups.items() if asked.future in unwanted])
            for score_id in [score_id for score_id, future in self._scores.items() if future in unwanted]:
                self._engine.drop_score(score_id)
                self._scores.pop(score_id).set_exception(EngineError(f"{score_id} was aborted"))

        with contextlib.suppress(EngineError):  # closed: nothing is in flight
            self._send(drop)

    def abort_group(self, group_id: str) -> Future[None]:
        """Drops the group of that name, if it is in flight; its future fails."""
        return self._send(lambda: self._drop([group_id] if group_id in self._groups else []))

    def _drop(self, group_ids: Sequence[str]) -> None:
        self._engine.abort(group_ids)
        for group_id in group_ids:
            self._groups.pop(group_id).future.set_exception(EngineError(f"group {group_id} was aborted"))

    def pause(self, mode: PauseMode) -> Future[None]:
        """No engine step from now on until `resume`; calls are still taken, and what is asked for meanwhile waits.

        Args:
            mode: what becomes of the groups in flight, those that wait since an earlier pause included. `abort`: they
                end now with what they have so far; `retract`: they begin anew after `resume`, with the same seeds;
                `in_place`: they go on after `resume`. Scores always go on.
        """
        if mode not in get_args(PauseMode):
            raise EngineError(f"pause mode {mode!r} seen, {', '.join(get_args(PauseMode))} allowed")
        return self._send(lambda: self._pause(mode))

    def resume(self) -> Future[None]:
        """Goes on after `pause`; nothing happens without one."""
        return self._send(self._resume)

    def _pause(self, mode: PauseMode) -> None:
        self._is_paused = True
        if mode == "abort":
            for sample in self._engine.cut_short():
                self._groups.pop(sample.group_id).future.set_result(sample)
        elif mode == "retract":
            retracted = list(self._groups.values())
            self._engine.abort(list(self._groups))
            self._groups.clear()
            for asked in retracted:
                self._add(asked)

    def _resume(self) -> None:
        self._is_paused = False

    def hold(self) -> Future[None]:
        """No engine step from now on: the engine is about to be given new weights in several commands."""
        return self._send(lambda: self._hold(True))

    def release(self) -> Future[None]:
        """Goes on after `hold`."""
        return self._send(lambda: self._hold(False))

    def _hold(self, is_held: bool) -> None:
        self._is_held = is_held

    @property
    def num_steps(self) -> int:
        """Engine steps so far; stands still while the engine has work only if it hangs."""
        return self._num_steps

    @property
    def num_failed_in_a_row(self) -> int:
        """Engine steps that failed since the last good one: an engine on which every step fails needs another."""
        return self._num_failed_in_a_row

    @property
    def is_closed(self) -> bool:
        """Nothing is taken any more: it was closed, or its thread ended."""
        return self._closed

    @property
    def is_busy(self) -> bool:
        """Whether groups or scores are in flight and nothing keeps the engine from stepping."""
        return bool(self._groups or self._scores) and not self._is_held and not self._is_paused

    def close(self, timeout_s: float = 30.0) -> None:
        """Ends the thread and the engine; what is in flight fails with EngineError."""
        self._refuse_more()
        self._thread.join(timeout=timeout_s)

    def _send(self, run: Callable[[], T], waiting: Sequence[Future[Any]] = ()) -> Future[T]:
        result: Future[T] = _promise()
        with self._sending:
            if self._closed:
                raise EngineLostError("the engine is closed")
            self._commands.put(_Command(run, result, waiting))
        return result

    def _refuse_more(self) -> None:
        with self._sending:
            if not self._closed:
                self._closed = True
                self._commands.put(_Command(lambda: None, _promise()))

    def _main(self, build: Callable[[], Engine]) -> None:
        try:
            self._engine = build()
        except BaseException as error:  # noqa: BLE001 - boundary: the starter gets it
            self._started.set_exception(error)
            self._fail_all(EngineLostError(f"the engine did not start: {error}"))
            return
        self._started.set_result(None)
        end = "was closed"
        try:
            while not self._closed:
                self._run_commands()
                if self._may_step() and not self._closed:
                    with lasting("sampler/generate" if self._groups else "sampler/prompt_logprobs"):
                        self._step()
        except BaseException as error:  # boundary: who waits is told, and `is_closed` says it to whoever asks
            log.exception("%s: the thread of the engine ended", self._engine.name)
            end = f"ended: {type(error).__name__}: {error}"
        finally:
            self._fail_all(EngineLostError(f"{self._engine.name} {end}"))
            self._engine.close()

    def _fail_all(self, error: EngineError) -> None:
        """The thread ends: nothing is taken any more, and whoever waits is told."""
        self._refuse_more()
        self._fail_in_flight(error)
        while not self._commands.empty():
            self._commands.get().fail(error)

    def _run_commands(self) -> None:
        block = not self._may_step()
        while True:
            try:
                command = self._commands.get(block=block)
            except queue.Empty:
                return
            block = False
            try:
                command.result.set_result(command.run())
            except BaseException as error:  # noqa: BLE001 - boundary: the caller gets it
                command.fail(error)

    def _may_step(self) -> bool:
        return self._engine.has_work() and not self._is_held and not self._is_paused

    def _step(self) -> None:
        try:
            finished = self._engine.step()
        except Exception as error:  # noqa: BLE001 - boundary: a failed step fails what was in it, and is reported
            self._num_failed_in_a_row += 1
            self._fail_in_flight(
                EngineLostError(f"{self._engine.name}: the engine step failed: {type(error).__name__}: {error}")
            )
            # What raises here ends the thread: the engine still holds groups that nobody knows any more.
            self._engine.abort_all()
            return
        finally:
            self._num_steps += 1
        self._num_failed_in_a_row = 0
        for sample in finished:
            self._groups.pop(sample.group_id).future.set_result(sample)
        for score_id in list(self._scores):
            logprobs = self._engine.take_score(score_id)
            if logprobs is not None:
                self._scores.pop(score_id).set_result(logprobs)

    def _fail_in_flight(self, error: EngineError) -> None:
        waiting: list[Future[Any]] = [asked.future for asked in self._groups.values()]
        waiting.extend(self._scores.values())
        self._groups.clear()
        self._scores.clear()
        for future in waiting:
            future.set_exception(error)
