"""The child program that runs users' reward functions. It knows no deadline but for coroutines: its parent kills it.

Started by process.py as `python -m weaver_rl.rewards.worker CHANNEL_FD PARENT_PID`.
"""

from __future__ import annotations

import asyncio
import ctypes
import faulthandler
import inspect
import os
import pickle
import resource
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from weaver_rl.errors import RewardError
from weaver_rl.rewards.messages import Answer, FromWorker, JobDone, Ready, Refused, ScoreJob, StartWorker
from weaver_rl.rewards.plugin import LoadedReward, load_reward
from weaver_rl.rewards.values import describe_exception, to_reward
from weaver_rl.types import Rollout

PR_SET_PDEATHSIG = 1
HEARTBEAT_S = 0.05
CANCEL_GRACE_S = 0.2

Send = Callable[[FromWorker], None]


class Scorer:
    """Runs jobs with the loaded rewards; answers through `send` as soon as each score is known."""

    def __init__(self, rewards: tuple[LoadedReward, ...], memory_limit_mb: int, send: Send) -> None:
        self._rewards = rewards
        self._memory_limit_mb = memory_limit_mb
        self._send = send
        # One loop for the worker's life: clients that async rewards keep are bound to the loop they were made in.
        self._loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self._loop)

    def run(self, job: ScoreJob) -> None:
        """Scores the job's rollouts; ends with JobDone."""
        reward = self._rewards[job.component]
        unusable = None
        try:
            if reward.mode == "each":
                self._run_each(reward, job)
            elif reward.mode == "concurrent":
                unusable = self._loop.run_until_complete(self._run_concurrently(reward, job))
            else:
                self._run_batched(reward, job)
        except MemoryError:
            # What the plugin holds on to would starve this report as well, so the limit goes before anything else.
            lift_memory_limit()
            unusable = f"used more than {self._memory_limit_mb} MiB of memory beyond the worker's own (memory_limit_mb)"
        self._send(JobDone(unusable=unusable))

    def _answer(self, position: int, started: float, value: float | None, missing: str | None) -> None:
        seconds = time.monotonic() - started
        self._send(Answer(position=position, value=value, missing=missing, seconds=seconds))

    def _unpickle(self, job: ScoreJob, position: int) -> Rollout | None:
        """The rollout, or None after answering that it cannot be read."""
        try:
            return pickle.loads(job.rollouts[position])  # type: ignore[no-any-return]
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001  boundary: unpickling runs code of the task's columns
            reason = f"could not be unpickled in the reward worker: {describe_exception(error)}"
            self._answer(position, time.monotonic(), None, reason)
            return None

    def _settle(self, returned: Any) -> Any:
        return self._loop.run_until_complete(returned) if inspect.isawaitable(returned) else returned

    def _run_each(self, reward: LoadedReward, job: ScoreJob) -> None:
        for position in range(len(job.rollouts)):
            started = time.monotonic()
            if (rollout := self._unpickle(job, position)) is None:
                continue
            try:
                value, missing = to_reward(self._settle(reward.call(rollout)))
            except MemoryError:
                raise
            except BaseException as error:  # noqa: BLE001  boundary: a user's exception is this rollout's missing reward
                value, missing = None, f"raised {describe_exception(error)}"
            self._answer(position, started, value, missing)

    async def _run_concurrently(self, reward: LoadedReward, job: ScoreJob) -> str | None:
        """Returns why the worker cannot go on, if a coroutine does not let itself be cancelled."""
        heartbeat = asyncio.create_task(_seconds_blocked())
        tasks: dict[int, asyncio.Task[None]] = {}
        started = time.monotonic()
        for position in range(len(job.rollouts)):
            if (rollout := self._unpickle(job, position)) is not None:
                tasks[position] = asyncio.create_task(self._answer_one(reward, rollout, position))
        if not tasks:
            return None
        await asyncio.wait(tasks.values(), timeout=job.timeout_s)
        late = {position: task for position, task in tasks.items() if not task.done()}
        for task in (heartbeat, *late.values()):
            task.cancel()
        blocked_s = await heartbeat
        for position in late:
            # Where one coroutine kept the loop from the others, they may be innocent: unanswered, they are tried alone.
            if len(tasks) == 1 or blocked_s < 0.1 * job.timeout_s:
                self._answer(position, started, None, f"ran longer than {job.timeout_s:g} s and was cancelled")
        stubborn = (await asyncio.wait(late.values(), timeout=CANCEL_GRACE_S))[1] if late else set()
        for task in tasks.values():
            if task.done() and not task.cancelled() and (error := task.exception()):
                raise error
        return "a coroutine ignored its cancellation" if stubborn else None

    async def _answer_one(self, reward: LoadedReward, rollout: Rollout, position: int) -> None:
        started = time.monotonic()
        try:
            value, missing = to_reward(await reward.call(rollout))
        except MemoryError:
            raise
        except BaseException as error:  # boundary: cleans up, then raises again
            # Boundary: what a user's coroutine raises is this rollout's missing reward; our own cancellation passes.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            value, missing = None, f"raised {describe_exception(error)}"
        self._answer(position, started, value, missing)

    def _run_batched(self, reward: LoadedReward, job: ScoreJob) -> None:
        started = time.monotonic()
        read = {position: self._unpickle(job, position) for position in range(len(job.rollouts))}
        rollouts = {position: rollout for position, rollout in read.items() if rollout is not None}
        if not rollouts:
            return
        failure, returned = None, []
        try:
            returned = _as_list(self._settle(reward.call(list(rollouts.values()))))
        except MemoryError:
            raise
        except BaseException as error:  # noqa: BLE001  boundary: a user's exception is a missing reward
            failure = f"raised {describe_exception(error)}"
        if failure is None and len(returned) != len(rollouts):
            failure = f"returned {len(returned)} values, not one for each of the {len(rollouts)} rollouts"
        if failure is not None and len(job.rollouts) > 1:
            return
        mean_s = (time.monotonic() - started) / len(rollouts)
        for index, position in enumerate(rollouts):
            value, missing = (None, failure) if failure is not None else _to_reward_safely(returned[index])
            self._send(Answer(position=position, value=value, missing=missing, seconds=mean_s))


def _as_list(returned: Any) -> list[Any]:
    if isinstance(returned, str | bytes | dict):
        raise TypeError(f"a batched reward returns a list of numbers, seen {type(returned).__name__}")
    return list(returned)


def _to_reward_safely(returned: Any) -> tuple[float | None, str | None]:
    try:
        return to_reward(returned)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  boundary: a user's __float__ may raise
        return None, f"returned a value whose conversion raised {describe_exception(error)}"


async def _seconds_blocked() -> float:
    """Until cancelled, adds up by how much the event loop came late: time in which some coroutine did not yield."""
    blocked_s = 0.0
    try:
        while True:
            before = time.monotonic()
            await asyncio.sleep(HEARTBEAT_S)
            late_s = time.monotonic() - before - HEARTBEAT_S
            blocked_s += late_s if late_s > HEARTBEAT_S else 0.0
    except asyncio.CancelledError:
        return blocked_s


def confine(parent_pid: int) -> None:
    """Ties this process's life to its parent's, and keeps crashes from filling the disk."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.enable()


def limit_memory(memory_limit_mb: int) -> None:
    """Lets the address space grow by this much from now on. Only the soft limit: a report of its breach lifts it."""
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    wanted = in_use + memory_limit_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def lift_memory_limit() -> None:
    """Undoes `limit_memory`."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def load_all(start: StartWorker) -> tuple[LoadedReward, ...]:
    """Every plugin, or RewardError about the first that cannot be loaded."""
    try:
        scorer = pickle.loads(start.task_scorer) if start.task_scorer is not None else None
    except Exception as error:  # noqa: BLE001  boundary: unpickling imports and runs the task's code
        raise RewardError(f"the task's scorer cannot be unpickled in a worker: {describe_exception(error)}") from None
    return tuple(load_reward(spec, Path(start.base_dir), scorer) for spec in start.specs)


def _only_from_this_process(channel: Connection[Any, Any]) -> Send:
    """A plugin that forks and returns in the child would otherwise answer twice, on one shared channel."""
    own_pid = os.getpid()

    def send(message: FromWorker) -> None:
        if os.getpid() != own_pid:
            os._exit(0)
        channel.send(message)

    return send


def main() -> None:
    """Loads the plugins, says so, then serves jobs until the parent hangs up."""
    channel_fd, parent_pid = int(sys.argv[1]), int(sys.argv[2])
    confine(parent_pid)
    os.set_inheritable(channel_fd, False)
    channel: Connection[Any, Any] = Connection(channel_fd)
    start: StartWorker = channel.recv()
    try:
        rewards = load_all(start)
    except RewardError as error:
        channel.send(Refused(reason=str(error)))
        return
    scorer = Scorer(rewards, start.memory_limit_mb, _only_from_this_process(channel))
    limit_memory(start.memory_limit_mb)
    modes = tuple(reward.mode for reward in rewards)
    channel.send(Ready(modes=modes, sources=tuple(reward.source for reward in rewards)))
    while True:
        try:
            job: ScoreJob = channel.recv()
        except EOFError:
            return
        scorer.run(job)


if __name__ == "__main__":
    main()
