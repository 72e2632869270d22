"""All reward workers as one: gives each group to a free worker, replaces the lost. It scores nothing itself.

- `score`    produces the components of a group; waits for a free worker, then for its answer; unblocked by the answer
             or by the loss of the worker, after which another is asked.
- `_replace` produces a worker in place of a lost one; waits for its start.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from weaver_rl.errors import ActorFailedError, WeaverRLError
from weaver_rl.roles import RewardFactory, RewardReplica
from weaver_rl.types import RewardComponent, Rollout
from weaver_rl.waits import current_waits

MAX_FAILED_STARTS = 3
MAX_TRIES = 3
"""A group that so many workers were lost over gets no more: its rewards are missing, with the reason."""
PAUSE_BEFORE_RETRY_S = 1.0

Components = Sequence[tuple[RewardComponent, ...]]


class RewardFleet:
    """The reward workers of a run.

    Args:
        factory: starts one worker.
        names: the workers.
        labels: names of the components, in order: what is missing when no worker could say.
        watch_every_s: how often a worker that scores is asked whether it lives.
        on_lost: is told the name of a lost worker and the reason.
    """

    def __init__(
        self,
        factory: RewardFactory,
        names: Sequence[str],
        *,
        labels: Sequence[str],
        watch_every_s: float,
        on_lost: Callable[[str, str], None] = lambda name, reason: None,
    ) -> None:
        self._factory = factory
        self._names = tuple(names)
        self._labels = tuple(labels)
        self._watch_every_s = watch_every_s
        self._on_lost = on_lost
        self._free: asyncio.Queue[RewardReplica | Exception] = asyncio.Queue()
        self._alive: set[RewardReplica] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_hoped_for = len(names)

    async def start(self) -> None:
        """Starts every worker; raises what kept one from starting."""
        async with asyncio.TaskGroup() as tasks:
            for name in self._names:
                tasks.create_task(self._start(name))

    async def score(self, rollouts: Sequence[Rollout]) -> Components:
        """The components of each rollout, in order. Raises ActorFailedError when no worker is left."""
        group = rollouts[0].rollout_id.rpartition("-")[0]
        reason = ""
        num_tries = 0
        while num_tries < MAX_TRIES:
            with current_waits().waiting("reward workers", "are all busy or lost", on=self._names, about=(group,)):
                replica = await self._free.get()
            if isinstance(replica, Exception):
                self._free.put_nowait(replica)
                raise replica
            try:
                if num_tries:
                    # One that died idle, with its node perhaps, was not lost over this group: no try of it.
                    await replica.check()
                num_tries += 1
                scored = await self._watched(replica, rollouts)
            except ActorFailedError as error:
                reason = str(error)
                self._on_lost(replica.name, reason)
                self._spawn(self._replace(replica))
            except BaseException:  # boundary: cleans up, then raises again
                self._free.put_nowait(replica)
                raise
            else:
                self._free.put_nowait(replica)
                return scored
        missing = tuple(
            RewardComponent(name=label, value=None, missing=f"{MAX_TRIES} reward workers were lost: {reason}")
            for label in self._labels
        )
        return [missing for _ in rollouts]

    async def close(self) -> None:
        """Ends every worker and every task."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(replica.close() for replica in self._alive), return_exceptions=True)

    async def _watched(self, replica: RewardReplica, rollouts: Sequence[Rollout]) -> Components:
        scoring = asyncio.ensure_future(replica.score(rollouts))
        try:
            while True:
                done, _ = await asyncio.wait({scoring}, timeout=self._watch_every_s)
                if done:
                    return scoring.result()
                await replica.check()
        finally:
            scoring.cancel()
            await asyncio.gather(scoring, return_exceptions=True)

    async def _start(self, name: str) -> None:
        replica = await self._factory.start(name)
        self._alive.add(replica)
        self._free.put_nowait(replica)

    async def _replace(self, replica: RewardReplica) -> None:
        await replica.close(kill=True)
        self._alive.discard(replica)  # not before: if this is cut short, `close` ends it
        error: WeaverRLError | None = None
        for attempt in range(MAX_FAILED_STARTS):
            try:
                with current_waits().waiting(replica.name, "starts in place of one that was lost"):
                    await self._start(replica.name)
            except WeaverRLError as failed:
                error = failed
                await asyncio.sleep(PAUSE_BEFORE_RETRY_S * (attempt + 1))
            else:
                return
        self._num_hoped_for -= 1
        if error is not None and self._num_hoped_for == 0:
            self._free.put_nowait(error)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self._free.put_nowait(error)
