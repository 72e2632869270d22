"""One reward worker for asyncio: scores rollouts, replaces its process, and finds who is to blame. It knows no Ray.

The rule of blame: a rollout goes missing for a process's death or memory only if the process had judged nothing before
(else something an earlier rollout left behind may be the cause, and the rollout is tried again in a new process), and
a failure of many rollouts at once is nobody's until each has been tried alone.
"""

from __future__ import annotations

import asyncio
import pickle
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from weaver_rl.errors import RewardError
from weaver_rl.rewards.config import RewardSpec, RewardWorkersConfig, check_labels
from weaver_rl.rewards.messages import Answer, CallMode, JobDone, Ready, Refused, ScoreJob, StartWorker
from weaver_rl.rewards.process import OnOutput, OverdueError, WorkerDiedError, WorkerProcess
from weaver_rl.rewards.values import describe_exception
from weaver_rl.spans import now, record, span
from weaver_rl.types import RewardComponent, Rollout

# The worker ends overdue coroutines itself; only a loop that no longer turns needs the parent.
CANCEL_MARGIN_S = 1.0
CLOSE_S = 15.0


@dataclass(slots=True)
class _Attempt:
    """What became of one job: answers by position in the job, and what ended it early."""

    answers: dict[int, Answer] = field(default_factory=dict)
    failure: str | None = None
    proves_guilt: bool = True
    """The failure is the doing of the rollout at work, if there was only one at work."""
    seconds: float = 0.0
    """Time since the last answer."""


class RewardWorker:
    """Scores rollouts with a run's rewards, in one child process at a time.

    Example:
        async with RewardWorker(specs=specs, workers=RewardWorkersConfig(), base_dir=Path(".")) as worker:
            components_per_rollout = await worker.score(rollouts)
    """

    def __init__(
        self,
        *,
        specs: Sequence[RewardSpec],
        workers: RewardWorkersConfig,
        base_dir: Path,
        task_scorer: Callable[[Rollout], float] | None = None,
        on_output: OnOutput | None = None,
    ) -> None:
        self._specs = tuple(check_labels(specs))
        self._workers = workers
        self._start = StartWorker(
            specs=self._specs,
            base_dir=str(base_dir.absolute()),
            task_scorer=_pickled_scorer(task_scorer),
            memory_limit_mb=workers.memory_limit_mb,
        )
        self._on_output = on_output
        self._process: WorkerProcess | None = None
        self._modes: tuple[CallMode, ...] | None = None
        self._sources: tuple[str, ...] | None = None
        self._num_answers = 0
        self._num_started = 0
        self._closed = False
        # One thread for all that blocks: it starts every process and outlives it (see process.py).
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reward-worker")

    @property
    def num_replaced(self) -> int:
        """How many processes were lost and started again."""
        return max(0, self._num_started - 1)

    @property
    def pid(self) -> int | None:
        """Process id of the present child."""
        return self._process.pid if self._process is not None else None

    async def start(self) -> None:
        """Starts the process and loads the plugins; raises RewardError if that cannot be done."""
        self._refuse_if_closed()
        await asyncio.get_running_loop().run_in_executor(self._thread, self._ensure_running)

    async def score(self, rollouts: Sequence[Rollout]) -> tuple[tuple[RewardComponent, ...], ...]:
        """One tuple of components per rollout, in spec order. Raises RewardError only if no process starts."""
        self._refuse_if_closed()
        abandoned = threading.Event()
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, self._score, tuple(rollouts), abandoned, now())
        except asyncio.CancelledError:
            abandoned.set()
            self._kill_now()
            raise

    async def close(self) -> None:
        """Kills the process group, waits for its end and frees every descriptor. Idempotent."""
        await asyncio.to_thread(self.kill)

    def kill(self) -> None:
        """`close` for code that cannot await."""
        if self._closed:
            return
        self._closed = True
        self._kill_now()
        self._thread.submit(self._drop_process).result(timeout=CLOSE_S)
        self._thread.shutdown(wait=False)

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:  # boundary: cleans up, then raises again
            self.kill()
            raise
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self.close()

    # What follows runs in the worker's thread, but for _kill_now.

    def _score(
        self, rollouts: tuple[Rollout, ...], abandoned: threading.Event, asked_s: float
    ) -> tuple[tuple[RewardComponent, ...], ...]:
        record("reward/queue", asked_s, now(), track="queue", rollouts=len(rollouts))
        pickled = [_pickled(rollout) for rollout in rollouts]
        columns = [self._score_component(index, pickled, abandoned) for index in range(len(self._specs))]
        return tuple(tuple(column[row] for column in columns) for row in range(len(rollouts)))

    def _score_component(
        self, component: int, pickled: Sequence[bytes | str], abandoned: threading.Event
    ) -> list[RewardComponent]:
        name = self._specs[component].component_name
        with span("reward/score", reward=name, rollouts=len(pickled)):
            return self._answers(component, name, pickled, abandoned)

    def _answers(
        self, component: int, name: str, pickled: Sequence[bytes | str], abandoned: threading.Event
    ) -> list[RewardComponent]:
        done = {
            i: RewardComponent(name=name, value=None, missing=it) for i, it in enumerate(pickled) if isinstance(it, str)
        }
        together = True
        while pending := [index for index in range(len(pickled)) if index not in done]:
            job = pending if together else pending[:1]
            payloads = tuple(payload for payload in (pickled[index] for index in job) if isinstance(payload, bytes))
            attempt = self._attempt(component, payloads, abandoned)
            for position, answer in attempt.answers.items():
                done[job[position]] = RewardComponent(
                    name=name, value=answer.value, missing=answer.missing, seconds=answer.seconds
                )
            unanswered = [index for index in job if index not in done]
            if not unanswered:
                continue
            if len(job) > 1 and self._mode(component) != "each":
                together = False
            elif attempt.proves_guilt:
                reason = attempt.failure or "the reward worker gave no answer"
                done[unanswered[0]] = RewardComponent(name=name, value=None, missing=reason, seconds=attempt.seconds)
        return [done[index] for index in range(len(pickled))]

    def _attempt(self, component: int, payloads: tuple[bytes, ...], abandoned: threading.Event) -> _Attempt:
        """Sends one job and collects its answers until it is over, the process is lost or the deadline passes."""
        _stop_if(abandoned)
        process = self._ensure_running()
        _stop_if(abandoned)
        timeout_s = self._specs[component].timeout_s or self._workers.timeout_s
        allowance_s = {
            "each": timeout_s,
            "concurrent": timeout_s + CANCEL_MARGIN_S,
            "batched": timeout_s * len(payloads),
        }[self._mode(component)]
        attempt = _Attempt()
        since = time.monotonic()
        try:
            process.send(ScoreJob(component=component, rollouts=payloads, timeout_s=timeout_s))
            since = time.monotonic()
            while isinstance(message := process.receive(since + allowance_s), Answer):
                attempt.answers[message.position] = message
                self._num_answers += 1
                process.forget_output()
                since = time.monotonic()
            attempt.failure = (
                message.unusable if isinstance(message, JobDone) else "the reward worker spoke out of turn"
            )
            attempt.proves_guilt = attempt.failure is None or self._num_answers == 0
        except WorkerDiedError as error:
            attempt.failure, attempt.proves_guilt = str(error), self._num_answers == 0
        except OverdueError:
            attempt.failure = f"ran longer than {timeout_s:g} s and was killed"
        attempt.seconds = time.monotonic() - since
        if attempt.failure is not None:
            self._drop_process()
            # A process that died because the work was called off proves nothing about its rollout.
            _stop_if(abandoned)
            self._refuse_if_closed()
        return attempt

    def _mode(self, component: int) -> CallMode:
        assert self._modes is not None
        return self._modes[component]

    def _ensure_running(self) -> WorkerProcess:
        if self._process is not None:
            return self._process
        self._refuse_if_closed()
        process = WorkerProcess(self._on_output)
        self._process, self._num_answers = process, 0
        self._num_started += 1
        try:
            # Asked again now that _kill_now can see the process: whoever closes in between kills it.
            self._refuse_if_closed()
            process.send(self._start)
            self._accept(process.receive(time.monotonic() + self._workers.start_timeout_s))
        except WorkerDiedError as error:
            self._drop_process()
            raise RewardError(f"the rewards cannot be loaded: {error}") from None
        except OverdueError:
            self._drop_process()
            raise RewardError(
                f"the rewards did not finish loading in {self._workers.start_timeout_s:g} s "
                "(reward_workers.start_timeout_s)"
            ) from None
        except RewardError:
            self._drop_process()
            raise
        return process

    def _accept(self, message: object) -> None:
        if isinstance(message, Refused):
            raise RewardError(message.reason)
        if not isinstance(message, Ready):
            raise RewardError("the reward worker spoke out of turn")
        if self._sources is not None:
            for spec, before, now in zip(self._specs, self._sources, message.sources, strict=True):
                if before != now:
                    raise RewardError(
                        f"the source of reward {spec.name!r} changed during the run, and a worker had to be replaced: "
                        "two versions would score one run; put the old source back and resume"
                    )
        self._modes, self._sources = message.modes, message.sources

    def _drop_process(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.close()

    def _kill_now(self) -> None:
        if (process := self._process) is not None:
            process.kill()

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise RewardError("this reward worker is closed")


def _stop_if(abandoned: threading.Event) -> None:
    if abandoned.is_set():
        raise RewardError("the scoring was cancelled")


def _pickled(rollout: Rollout) -> bytes | str:
    """The rollout as bytes, or why it cannot be sent."""
    try:
        return pickle.dumps(rollout, protocol=5)
    except Exception as error:  # noqa: BLE001  boundary: pickling runs code of the task's columns
        return f"the rollout could not be pickled: {describe_exception(error)}"


def _pickled_scorer(scorer: Callable[[Rollout], float] | None) -> bytes | None:
    try:
        return None if scorer is None else pickle.dumps(scorer, protocol=5)
    except Exception as error:  # noqa: BLE001  boundary: pickling runs the task's code
        raise RewardError(f"the task's scorer cannot be sent to reward workers: {describe_exception(error)}") from None
