"""A reward worker's process, and all of them as one for the controller. It knows neither sampling nor learning."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from actors.calls import answer
from weaver_rl.rewards.config import RewardSpec, RewardWorkersConfig
from weaver_rl.rewards.pool import RewardWorker
from weaver_rl.types import RewardComponent, Rollout


class RewardActor:
    """One reward worker. User code runs in a child process of this one, which is killed when it must be."""

    def __init__(
        self,
        specs: Sequence[RewardSpec],
        workers: RewardWorkersConfig,
        base_dir: Path,
        task_scorer: Callable[[Rollout], float] | None,
    ) -> None:
        self._worker = RewardWorker(specs=specs, workers=workers, base_dir=base_dir, task_scorer=task_scorer)

    async def start(self) -> None:
        await self._worker.start()

    async def score(self, rollouts: Sequence[Rollout]) -> tuple[tuple[RewardComponent, ...], ...]:
        return await self._worker.score(rollouts)

    async def close(self) -> None:
        await self._worker.close()


class RayRewardPool:
    """All reward workers: gives each group to a worker that is free.

    Args:
        workers: handles of `RewardActor`, all started.
        timeout_s: how long one rollout may take at most over all its rewards, replacements of the process included.
    """

    def __init__(self, workers: Sequence[Any], timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._free: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        for index, worker in enumerate(workers):
            self._free.put_nowait((index, worker))

    async def score(self, rollouts: Sequence[Rollout]) -> Sequence[tuple[RewardComponent, ...]]:
        index, worker = await self._free.get()
        try:
            scored: tuple[tuple[RewardComponent, ...], ...] = await answer(
                worker.score.remote(rollouts),
                actor=f"reward worker {index}",
                doing=f"scoring {len(rollouts)} rollouts",
                timeout_s=self._timeout_s * len(rollouts),
            )
        finally:
            self._free.put_nowait((index, worker))
        return scored
