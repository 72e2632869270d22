"""A reward worker's process, its handle for the fleet, and how one is made. It knows neither sampling nor learning.

It scores with the driver's code: on a node that lacks the users' files they come with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from actors.calls import answer
from actors.ending import end_actor
from actors.identity import ActorFacts, Identity, this_process
from actors.span_source import NodeSpans, drain_this_process
from weaver_rl.custom_resources import in_words
from weaver_rl.errors import ActorFailedError
from weaver_rl.models.directories import make_once
from weaver_rl.models.smollm2 import cache_dir
from weaver_rl.rewards.config import RewardSpec, RewardWorkersConfig
from weaver_rl.rewards.pool import RewardWorker
from weaver_rl.spans import span
from weaver_rl.tasks.config import TaskConfig
from weaver_rl.tasks.load import TaskScorer
from weaver_rl.types import RewardComponent, Rollout
from weaver_rl.user_code import UserCode, find_code, write_code
from weaver_rl.waits import current_waits


class RewardActor:
    """One reward worker. User code runs in a child process of this one, which is killed when it must be.

    Args:
        code: the files of the rewards and the task.
        task: whose own scorer the reward `task` calls; None: it has none.
    """

    def __init__(
        self, specs: Sequence[RewardSpec], workers: RewardWorkersConfig, code: UserCode, task: TaskConfig | None
    ) -> None:
        self._specs = specs
        self._workers = workers
        self._code = code
        self._task = task
        self._worker: RewardWorker | None = None

    @span("reward/start")
    async def start(self) -> None:
        base_dir = await asyncio.to_thread(code_here, self._code)
        # Made here and not where the task is loaded: it is bound to the files of the node that it is used on.
        scorer = None if self._task is None else TaskScorer(self._task, base_dir)
        self._worker = RewardWorker(specs=self._specs, workers=self._workers, base_dir=base_dir, task_scorer=scorer)
        await self._worker.start()

    async def score(self, rollouts: Sequence[Rollout]) -> tuple[tuple[RewardComponent, ...], ...]:
        assert self._worker is not None
        return await self._worker.score(rollouts)

    async def drain_spans(self) -> NodeSpans:
        """What it did since it was last asked."""
        return drain_this_process()

    async def identity(self) -> Identity:
        """Which process this is; also the answer to whether it lives."""
        return this_process()

    async def close(self) -> None:
        if self._worker is not None:
            await self._worker.close()


def code_here(code: UserCode) -> Path:
    """The directory of this node where the names of rewards and task start; written to its cache if there is none."""
    found = find_code(code, Path.cwd())
    if found is not None:
        return found
    root = cache_dir() / "code" / code.fingerprint
    make_once(root, {"code": code.fingerprint}, lambda aside: _written(code, aside))
    return root / code.base


def _written(code: UserCode, root: Path) -> None:
    write_code(code, root)


class RayRewardWorker:
    """A started reward worker.

    Args:
        timeout_s: how long one rollout may take at most over all its rewards, replacements of the process included.
        unresponsive_after_s: how long it may not answer.
    """

    def __init__(
        self, name: str, actor: Any, identity: Identity, *, timeout_s: float, unresponsive_after_s: float
    ) -> None:
        self.name = name
        self.handle = self._actor = actor
        self._timeout_s = timeout_s
        self._unresponsive_after_s = unresponsive_after_s
        current_waits().describe(name, ActorFacts(identity, here=this_process().node_id))

    async def score(self, rollouts: Sequence[Rollout]) -> tuple[tuple[RewardComponent, ...], ...]:
        group = rollouts[0].rollout_id.rpartition("-")[0]
        scored: tuple[tuple[RewardComponent, ...], ...] = await answer(
            self._actor.score.remote(rollouts),
            actor=self.name,
            doing=f"scoring group {group}",
            timeout_s=self._timeout_s * len(rollouts),
            about=(group,),
        )
        return scored

    async def check(self) -> None:
        await answer(
            self._actor.identity.remote(),
            actor=self.name,
            doing="answering whether it lives",
            timeout_s=self._unresponsive_after_s,
        )

    async def close(self, *, kill: bool = False) -> None:
        current_waits().forget(self.name)
        await end_actor(self._actor, kill=kill)


class RayRewardFactory:
    """Makes reward workers.

    Args:
        spawn: makes an actor.
        resources: custom resources that it asks for.
        who_has: says which nodes have those.
        start_timeout_s: how long it may take to be placed and to load the rewards.
    """

    def __init__(
        self,
        spawn: Callable[[], Any],
        *,
        resources: Mapping[str, float],
        who_has: Callable[[Mapping[str, float]], str],
        start_timeout_s: float,
        timeout_s: float,
        unresponsive_after_s: float,
    ) -> None:
        self._spawn = spawn
        self._resources = resources
        self._who_has = who_has
        self._start_timeout_s = start_timeout_s
        self._timeout_s = timeout_s
        self._unresponsive_after_s = unresponsive_after_s
        self.replicas: dict[str, RayRewardWorker] = {}

    async def start(self, name: str) -> RayRewardWorker:
        actor = self._spawn()
        try:
            await self._loaded(actor, name)
            identity = await answer(
                actor.identity.remote(), actor=name, doing="saying which process it is", timeout_s=self._timeout_s
            )
        except BaseException:  # boundary: cleans up, then raises again
            await asyncio.shield(end_actor(actor, kill=True))
            raise
        self.replicas[name] = RayRewardWorker(
            name, actor, identity, timeout_s=self._timeout_s, unresponsive_after_s=self._unresponsive_after_s
        )
        return self.replicas[name]

    async def _loaded(self, actor: Any, name: str) -> None:
        try:
            await answer(actor.start.remote(), actor=name, doing="loading the rewards", timeout_s=self._start_timeout_s)
        except ActorFailedError as error:
            if error.__cause__ is not None or not self._resources:  # it was there, and says what went wrong
                raise
            # An actor that no node can hold only waits, in Ray's eyes.
            there = await asyncio.to_thread(self._who_has, self._resources)
            asked = f"It asks for {in_words(self._resources)} (reward_workers.resources)"
            raise ActorFailedError(f"{error}. {asked}; {there}") from None
