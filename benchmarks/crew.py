"""The real actors of a run on a local Ray cluster, without a controller. It measures nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actors.calls import answer
from actors.cluster import Reservation, connected, granted
from actors.learner import LearnerSpec, RayLearnerGroup
from actors.sampler import SamplerSpec
from actors.sampler_replica import RaySamplerFactory
from actors.signals import StopSignals
from actors.spawn import Actors, SamplerSpawner, spawn_learner
from weaver_rl.config import RunConfig
from weaver_rl.fleet_log import FleetLog
from weaver_rl.placement import ClusterConfig, Placement, plan_placement
from weaver_rl.sampler_fleet import SamplerFleet

TIMEOUT_S = 300.0


@dataclass(slots=True)
class Crew:
    """Spawns the sampler and the learner as `actors.launch` does; `wait` runs their coroutines from plain code."""

    config: RunConfig
    num_threads: int
    _placement: Placement
    _reservation: Reservation
    _runner: asyncio.Runner
    _actors: Actors = field(default_factory=Actors)
    _fleet: SamplerFleet | None = None

    def wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self._runner.run(work)

    def sampler(self, model_dir: Path, engine_args: dict[str, Any], stop_token_ids: tuple[int, ...]) -> SamplerFleet:
        """A fleet of one sampler, started."""
        spawner = SamplerSpawner(
            self._actors, self.config.sampler, self._placement, self._reservation, self.num_threads
        )
        spawner.spawn_first()

        def spec(name: str) -> SamplerSpec:
            return SamplerSpec(
                name=name,
                model_dir=model_dir,
                engine_args=engine_args,
                seed=self.config.seed,
                stop_token_ids=stop_token_ids,
                tensor_parallel=1,
                transport="object_store",
                start_timeout_s=TIMEOUT_S,
            )

        factory = RaySamplerFactory(
            self._actors.samplers, spawner.spawn, spec, load_timeout_s=TIMEOUT_S, unresponsive_after_s=TIMEOUT_S
        )
        self._fleet = SamplerFleet(
            factory,
            spawner.names(),
            generate_timeout_s=TIMEOUT_S,
            watch_every_s=TIMEOUT_S,
            events=FleetLog(on_left=self._reservation.give_back),
        )
        self.wait(_started(self._fleet))
        return self._fleet

    def learner(self, model_dir: Path) -> RayLearnerGroup:
        """A group of one rank, started."""
        learner = self.config.learner.model_copy(update={"num_threads": self.num_threads})
        spawn_learner(self._actors, learner, self._placement, self._reservation.group)
        spec = LearnerSpec(
            model_dir=model_dir,
            config=learner,
            rank=0,
            seed=self.config.seed,
            master_addr="127.0.0.1",
            master_port=None,
            transport="object_store",
            chunk_bytes=self.config.weights.chunk_mb << 20,
        )
        rank = self._actors.learner_ranks[0]
        self.wait(
            answer(rank.start.remote(spec), actor="learner rank 0", doing="loading the policy", timeout_s=TIMEOUT_S)
        )
        return RayLearnerGroup(self._actors.learner_ranks, TIMEOUT_S)

    def close(self) -> None:
        if self._fleet is not None:
            self.wait(self._fleet.close())
        self.wait(self._actors.close())


async def _started(fleet: SamplerFleet) -> None:
    fleet.start()
    await fleet.ready()


@contextlib.contextmanager
def local_crew(config: RunConfig, folder: Path, num_threads: int) -> Iterator[Crew]:
    """A cluster of this machine alone for the length of the block; it leaves no process behind."""
    placement = plan_placement(config.cluster, config.learner, config.sampler, cluster_gpus=0.0)
    with (
        StopSignals() as stop,
        connected(ClusterConfig(address="local"), folder / "logs", stop),
        granted(placement, config.cluster.start_timeout_s) as reservation,
        asyncio.Runner() as runner,
    ):
        crew = Crew(config, num_threads, placement, reservation, runner)
        try:
            yield crew
        finally:
            crew.close()
