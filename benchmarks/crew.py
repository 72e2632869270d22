"""The real actors of a run on a local Ray cluster, without a controller. It measures nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actors.calls import answer
from actors.cluster import connected, granted
from actors.learner import LearnerSpec, RayLearnerGroup
from actors.sampler import SamplerSpec
from actors.sampler_pool import RaySamplerPool
from actors.signals import StopSignals
from actors.spawn import Actors, spawn_learner, spawn_samplers
from weaver_rl.config import RunConfig
from weaver_rl.placement import ClusterConfig, Placement, plan_placement

TIMEOUT_S = 300.0


@dataclass(slots=True)
class Crew:
    """Spawns the sampler and the learner as `actors.launch` does; `wait` runs their coroutines from plain code."""

    config: RunConfig
    num_threads: int
    _placement: Placement
    _group: Any
    _runner: asyncio.Runner
    _actors: Actors = field(default_factory=Actors)

    def wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self._runner.run(work)

    def sampler(self, model_dir: Path, engine_args: dict[str, Any], stop_token_ids: tuple[int, ...]) -> RaySamplerPool:
        """A pool of one sampler, started."""
        spawn_samplers(self._actors, self.config.sampler, self._placement, self._group, self.num_threads)
        return RaySamplerPool(
            self._actors.samplers,
            self._started(model_dir, engine_args, stop_token_ids),
            generate_timeout_s=TIMEOUT_S,
            load_timeout_s=TIMEOUT_S,
        )

    def _started(
        self, model_dir: Path, engine_args: dict[str, Any], stop_token_ids: tuple[int, ...]
    ) -> asyncio.Future[None]:
        name = "sampler 0"
        spec = SamplerSpec(
            name=name,
            model_dir=model_dir,
            engine_args=engine_args,
            seed=self.config.seed,
            stop_token_ids=stop_token_ids,
            tensor_parallel=1,
            transport="object_store",
            start_timeout_s=TIMEOUT_S,
        )
        reference = self._actors.samplers[name].start.remote(spec)
        self.wait(answer(reference, actor=name, doing="starting its engine", timeout_s=TIMEOUT_S))
        started: asyncio.Future[None] = self._runner.get_loop().create_future()
        started.set_result(None)
        return started

    def learner(self, model_dir: Path) -> RayLearnerGroup:
        """A group of one rank, started."""
        learner = self.config.learner.model_copy(update={"num_threads": self.num_threads})
        spawn_learner(self._actors, learner, self._placement, self._group)
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
        self.wait(self._actors.close())


@contextlib.contextmanager
def local_crew(config: RunConfig, folder: Path, num_threads: int) -> Iterator[Crew]:
    """A cluster of this machine alone for the length of the block; it leaves no process behind."""
    placement = plan_placement(config.cluster, config.learner, config.sampler, cluster_gpus=0.0)
    with (
        StopSignals() as stop,
        connected(ClusterConfig(address="local"), folder / "logs", stop),
        granted(placement, config.cluster.start_timeout_s) as group,
        asyncio.Runner() as runner,
    ):
        crew = Crew(config, num_threads, placement, group, runner)
        try:
            yield crew
        finally:
            crew.close()
