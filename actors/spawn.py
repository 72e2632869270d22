"""Makes the actors of a run and ends them; the only `ray.remote` of actors. It knows places, not what they say."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.cluster import Reservation
from actors.ending import end_actor
from actors.learner import LearnerRank
from actors.reward import RewardActor
from actors.sampler import CONCURRENCY_GROUPS, Sampler
from weaver_rl.engines.config import SamplerConfig
from weaver_rl.learner.config import LearnerConfig
from weaver_rl.placement import Placement
from weaver_rl.rewards.config import RewardSpec, RewardWorkersConfig
from weaver_rl.tasks.config import TaskConfig
from weaver_rl.user_code import UserCode

MAX_CALLS_IN_FLIGHT = 1000


@dataclass(slots=True)
class Actors:
    """Handles of every actor of a run."""

    samplers: dict[str, Any] = field(default_factory=dict)
    learner_ranks: list[Any] = field(default_factory=list)
    reward_workers: list[Any] = field(default_factory=list)

    async def close(self) -> None:
        """Ends every actor: asks first, so that engines and children end cleanly, then kills what is left."""
        asked = [end_actor(actor) for actor in (*self.samplers.values(), *self.reward_workers)]
        await asyncio.gather(*asked, return_exceptions=True)
        await self.kill_learner()

    async def kill_learner(self) -> None:
        """Ends every learner rank at once."""
        ranks = list(self.learner_ranks)
        self.learner_ranks.clear()
        for rank in ranks:
            with contextlib.suppress(Exception):  # boundary: one that is dead cannot be ended again
                await end_actor(rank, kill=True)


class SamplerSpawner:
    """Makes sampler actors: the first in the bundles of the run's placement, more of them in bundles of their own.

    Args:
        num_threads: OpenMP threads of a CPU engine.
        reservation: finds room for a bundle, or raises ResourcesError.
    """

    def __init__(
        self,
        actors: Actors,
        config: SamplerConfig,
        placement: Placement,
        reservation: Reservation,
        num_threads: int | None,
    ) -> None:
        self._actors = actors
        self._config = config
        self._placement = placement
        self._reservation = reservation
        self._num_threads = num_threads

    def spawn_first(self) -> None:
        """All of them; their room is granted already."""
        for name, bundle in zip(self._placement.sampler_names, self._placement.sampler_bundles, strict=True):
            self._make(name, self._reservation.group, bundle)

    async def spawn(self, name: str) -> Any:
        """One in place of a lost one, or one more. Raises ResourcesError when there is no room for it."""
        names = self._placement.sampler_names
        if name in names:
            bundle = self._placement.sampler_bundles[names.index(name)]
            await self._reservation.placed_again((bundle,))
            return self._make(name, self._reservation.group, bundle)
        group = await self._reservation.one_more(name, self._placement.bundles[self._placement.sampler_bundles[0]])
        return self._make(name, group, 0)

    def _make(self, name: str, group: PlacementGroup, bundle: int) -> Any:
        self._actors.samplers[name] = spawn_sampler(self._config, self._placement, group, bundle, self._num_threads)
        return self._actors.samplers[name]


def spawn_sampler(
    config: SamplerConfig, placement: Placement, group: PlacementGroup, bundle: int, num_threads: int | None
) -> Any:
    """One sampler in a bundle of the group."""
    made: Any = ray.remote(concurrency_groups=CONCURRENCY_GROUPS)  # type: ignore[call-overload]  # Ray's types lack it
    remote = made(Sampler).options(
        num_cpus=config.num_cpus,
        num_gpus=placement.sampler_gpus,
        max_concurrency=MAX_CALLS_IN_FLIGHT,
        scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
    )
    return remote.remote(num_threads)


def spawn_learner(actors: Actors, config: LearnerConfig, placement: Placement, group: PlacementGroup) -> None:
    """One actor per rank."""
    for bundle in placement.learner_bundles:
        remote = ray.remote(LearnerRank).options(
            num_cpus=config.num_cpus,
            num_gpus=placement.learner_gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
        )
        actors.learner_ranks.append(remote.remote())


def spawn_reward_worker(
    actors: Actors,
    config: RewardWorkersConfig,
    specs: Sequence[RewardSpec],
    code: UserCode,
    task: TaskConfig | None,
) -> Any:
    """One reward worker, on any node that has its custom resources. It reserves no CPU: it mostly waits."""
    remote = ray.remote(RewardActor).options(num_cpus=0, resources=dict(config.resources), scheduling_strategy="SPREAD")
    worker = remote.remote(tuple(specs), config, code, task)
    actors.reward_workers.append(worker)
    return worker
