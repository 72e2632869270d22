"""Makes the actors of a run and ends them; the only `ray.remote`. It knows where they go, not what they say."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.learner import LearnerRank
from actors.reward import RewardActor
from actors.sampler import Sampler
from weaver_rl.engines.config import SamplerConfig
from weaver_rl.learner.config import LearnerConfig
from weaver_rl.placement import Placement
from weaver_rl.rewards.config import RewardSpec, RewardWorkersConfig
from weaver_rl.types import Rollout

CLOSE_TIMEOUT_S = 15.0
MAX_CALLS_IN_FLIGHT = 1000


@dataclass(slots=True)
class Actors:
    """Handles of every actor of a run."""

    samplers: dict[str, Any] = field(default_factory=dict)
    learner_ranks: list[Any] = field(default_factory=list)
    reward_workers: list[Any] = field(default_factory=list)

    async def close(self) -> None:
        """Ends every actor: asks first, so that engines and children end cleanly, then kills what is left."""
        everyone = [*self.samplers.values(), *self.reward_workers, *self.learner_ranks]
        asked = [actor.close.remote() for actor in (*self.samplers.values(), *self.reward_workers)]
        if asked:
            # A dead or stuck actor does not answer; it is killed below like the others.
            await asyncio.to_thread(ray.wait, asked, num_returns=len(asked), timeout=CLOSE_TIMEOUT_S)
        for actor in everyone:
            with contextlib.suppress(ValueError, ray.exceptions.RayError):
                ray.kill(actor, no_restart=True)


def spawn_samplers(
    actors: Actors, config: SamplerConfig, placement: Placement, group: PlacementGroup, num_threads: int | None
) -> None:
    """One actor per replica, named `sampler 0`, `sampler 1`, …"""
    for index, bundle in enumerate(placement.sampler_bundles):
        remote = ray.remote(Sampler).options(
            num_cpus=config.num_cpus,
            num_gpus=placement.sampler_gpus,
            max_concurrency=MAX_CALLS_IN_FLIGHT,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
        )
        actors.samplers[f"sampler {index}"] = remote.remote(num_threads)


def spawn_learner(actors: Actors, config: LearnerConfig, placement: Placement, group: PlacementGroup) -> None:
    """One actor per rank."""
    for bundle in placement.learner_bundles:
        remote = ray.remote(LearnerRank).options(
            num_cpus=config.num_cpus,
            num_gpus=placement.learner_gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
        )
        actors.learner_ranks.append(remote.remote())


def spawn_reward_workers(
    actors: Actors,
    config: RewardWorkersConfig,
    specs: Sequence[RewardSpec],
    base_dir: Path,
    task_scorer: Callable[[Rollout], float] | None,
) -> None:
    """The pool of reward workers, spread over the nodes; they reserve no CPU, scoring is short."""
    remote = ray.remote(RewardActor).options(num_cpus=0, scheduling_strategy="SPREAD")
    for _ in range(config.num_workers):
        actors.reward_workers.append(remote.remote(tuple(specs), config, base_dir, task_scorer))
