"""The actors of one run behind the roles that the controller knows: starts them, starts them anew, ends them.

It decides nothing about training and holds no data.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from actors.calls import answer
from actors.cluster import Reservation, who_has
from actors.identity import this_process
from actors.learner import RayLearnerGroup
from actors.learner_start import start_learner
from actors.preparation import Prepared
from actors.rank_files import RankFiles
from actors.reward import RayRewardFactory
from actors.sampler import SamplerSpec
from actors.sampler_replica import RaySamplerFactory
from actors.span_collector import SpanCollector, SpanSource
from actors.spawn import Actors, SamplerSpawner, spawn_learner, spawn_reward_worker
from weaver_rl.config import RunConfig
from weaver_rl.controller import Crew
from weaver_rl.errors import ConfigError
from weaver_rl.fleet_log import FleetLog
from weaver_rl.ledger import LedgerRow
from weaver_rl.meter import NO_METER, Meter
from weaver_rl.placement import Placement
from weaver_rl.reward_fleet import RewardFleet
from weaver_rl.run_folder import RunFolder
from weaver_rl.run_meter import FleetFigures
from weaver_rl.sampler_fleet import SamplerFleet
from weaver_rl.user_code import collect_code
from weaver_rl.weights.config import Transport
from weaver_rl.weights.probe import probe_token_ids

FLOAT32_PROBE_TOLERANCE = 1e-3
LOW_PRECISION_PROBE_TOLERANCE = 0.2
WATCH_EVERY_S = 5.0


class Cast:
    """Who plays which role."""

    def __init__(
        self,
        *,
        config: RunConfig,
        prepared: Prepared,
        actors: Actors,
        spawner: SamplerSpawner,
        placement: Placement,
        reservation: Reservation,
        transport: Transport,
        meter: Meter = NO_METER,
    ) -> None:
        self.prepared = prepared
        self._meter = meter
        self.events = FleetLog(on_left=reservation.give_back, meter=self._meter)
        self._config = config
        self._actors = actors
        self._spawner = spawner
        self._placement = placement
        self._reservation = reservation
        self._transport = transport
        self._samplers: SamplerFleet | None = None
        self._rewards: RewardFleet | None = None
        self._reward_workers: RayRewardFactory | None = None
        self._collector: SpanCollector | None = None
        self._sampler_factory = RaySamplerFactory(
            actors.samplers,
            self._spawn_sampler,
            self.sampler_spec,
            load_timeout_s=config.weights.timeout_s,
            unresponsive_after_s=config.sampler.unresponsive_after_s,
        )

    async def start(self) -> Crew:
        """Starts everybody; returns when learner and reward workers are up. Samplers may take longer: `ready` tells."""
        config = self._config
        self._samplers = SamplerFleet(
            self._sampler_factory,
            self._placement.sampler_names,
            generate_timeout_s=config.rollout.timeout_s,
            watch_every_s=min(WATCH_EVERY_S, config.sampler.unresponsive_after_s),
            events=self.events,
        )
        self._reward_workers = self._reward_factory()
        self._rewards = RewardFleet(
            self._reward_workers,
            [f"reward worker {index}" for index in range(config.reward_workers.num_workers)],
            labels=[spec.component_name for spec in config.rewards],
            watch_every_s=min(WATCH_EVERY_S, config.reward_workers.unresponsive_after_s),
            on_lost=self.events.worker_lost,
        )
        self._samplers.start()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._rewards.start())
            tasks.create_task(self._start_learner())
        if self._transport != "object_store":
            await self._samplers.ready()
            await self._connect()
        return Crew(
            prompts=self.prepared.prompts,
            samplers=self._samplers,
            rewards=self._rewards,
            learner=RayLearnerGroup(
                self._actors.learner_ranks,
                config.learner.timeout_s,
                self._restart_learner,
                files=RankFiles(config.learner.timeout_s),
            ),
        )

    def scale(self, num_samplers: int) -> None:
        """Adds samplers or lets some leave."""
        if self._transport != "object_store":
            self.events.tell(
                f"samplers cannot come or go while weights travel by {self._transport}; use weights.transport "
                "object_store for that, or --resume with another sampler.num_replicas"
            )
        elif self._samplers is not None:
            self._samplers.scale(num_samplers)
            if num_samplers < len(self._placement.sampler_names):
                self.events.tell(
                    f"the room of the {len(self._placement.sampler_names)} samplers that the run began with stays "
                    "reserved until its end; that of added ones is given back"
                )

    def facts(self) -> Mapping[str, Any]:
        """For `weaver-rl status`: every sampler with its process and what it does, where the last step's time went."""
        members = self._samplers.members if self._samplers is not None else {}
        return {
            "samplers": [self._sampler_facts(name, doing) for name, doing in members.items()],
            "ledger": self._collector.shares() if self._collector is not None else {},
        }

    def figures(self) -> FleetFigures:
        """The samplers at this moment, for a meter."""
        if self._samplers is None:
            return FleetFigures(num_serving=0, num_starting=0, num_groups=0)
        num_serving = len(self._samplers.names)
        return FleetFigures(
            num_serving=num_serving,
            num_starting=len(self._samplers.members) - num_serving,
            num_groups=self._samplers.num_owed,
        )

    def _sampler_facts(self, name: str, doing: str) -> dict[str, Any]:
        replica = self._sampler_factory.replicas.get(name)
        return {"name": name, "doing": doing, "pid": replica.identity.pid if replica is not None else None}

    def collecting(self, folder: RunFolder, on_rows: Callable[[Sequence[LedgerRow]], None]) -> SpanCollector:
        """While inside, what every actor does is kept in the folder; `on_rows` is given the ledger's rows."""
        self._collector = SpanCollector(folder, self.span_sources, here=this_process().node_id, on_rows=on_rows)
        return self._collector

    def span_sources(self) -> list[SpanSource]:
        """Every actor that there is."""
        names = self._samplers.members if self._samplers is not None else self._actors.samplers
        actors = {name: ("sampler", actor) for name, actor in self._actors.samplers.items() if name in names}
        actors |= {f"learner rank {rank}": ("learner", actor) for rank, actor in enumerate(self._actors.learner_ranks)}
        if self._reward_workers is not None:
            actors |= {name: ("reward", worker.handle) for name, worker in self._reward_workers.replicas.items()}
        return [SpanSource(actor=name, role=role, handle=handle) for name, (role, handle) in actors.items()]

    async def close(self) -> None:
        """Ends samplers and reward workers, and every task that keeps them up."""
        fleets = [fleet for fleet in (self._samplers, self._rewards) if fleet is not None]
        await asyncio.gather(*(fleet.close() for fleet in fleets), return_exceptions=True)

    # -- samplers --------------------------------------------------------------------------------------------------

    def sampler_spec(self, name: str) -> SamplerSpec:
        """What a sampler starts with; its engine's seed is its own."""
        config = self._config
        return SamplerSpec(
            name=name,
            model_dir=self.prepared.model_dir,
            engine_args={"max_model_len": self.prepared.max_len} | config.sampler.engine_args,
            seed=config.seed + int(name.rpartition(" ")[2]),
            stop_token_ids=self.prepared.stop_tokens,
            tensor_parallel=config.sampler.tensor_parallel,
            transport=self._transport,
            start_timeout_s=config.sampler.start_timeout_s,
        )

    async def _spawn_sampler(self, name: str) -> Any:
        if self._transport != "object_store":
            raise ConfigError(
                f"{name} cannot join a running group of weights.transport {self._transport}; continue with --resume, "
                "or use weights.transport object_store, which lets samplers come and go"
            )
        return await self._spawner.spawn(name)

    # -- rewards ---------------------------------------------------------------------------------------------------

    def _reward_factory(self) -> RayRewardFactory:
        config = self._config
        task = None if self.prepared.task_scorer is None else config.task
        assert config.base_dir is not None
        code = collect_code([config.task.name, *(spec.name for spec in config.rewards)], config.base_dir)
        return RayRewardFactory(
            lambda: spawn_reward_worker(self._actors, config.reward_workers, config.rewards, code, task),
            resources=config.reward_workers.resources,
            who_has=who_has,
            start_timeout_s=config.reward_workers.start_timeout_s + config.cluster.start_timeout_s,
            timeout_s=_score_timeout_s(config),
            unresponsive_after_s=config.reward_workers.unresponsive_after_s,
        )

    # -- learner ---------------------------------------------------------------------------------------------------

    async def _start_learner(self) -> None:
        config = self._config
        await start_learner(
            self._actors.learner_ranks,
            config.learner,
            model_dir=self.prepared.model_dir,
            seed=config.seed,
            transport=self._transport,
            chunk_bytes=config.weights.chunk_mb << 20,
        )

    async def _restart_learner(self) -> Sequence[Any]:
        self._meter.add("weaver_rl_actor_losses_total", 1, role="learner")
        await self._actors.kill_learner()
        await self._reservation.placed_again(self._placement.learner_bundles)
        spawn_learner(self._actors, self._config.learner, self._placement, self._reservation.group)
        await self._start_learner()
        if self._transport != "object_store":
            await self._connect()
        self._meter.add("weaver_rl_actor_restarts_total", 1, role="learner")
        return self._actors.learner_ranks

    async def _connect(self) -> None:
        """Joins learner ranks and samplers in one group for weights that go from GPU to GPU."""
        timeout_s = self._config.weights.timeout_s
        samplers = list(self._actors.samplers.values())
        ranks = self._actors.learner_ranks
        doing = "choosing a port"
        address = await answer(ranks[0].free_address.remote(), actor="learner rank 0", doing=doing, timeout_s=timeout_s)
        async with asyncio.TaskGroup() as tasks:
            for rank, actor in enumerate(ranks):
                joined = actor.connect_samplers.remote(samplers, self._config.sampler.tensor_parallel, address)
                doing = "joining the samplers for weight transfer"
                tasks.create_task(answer(joined, actor=f"learner rank {rank}", doing=doing, timeout_s=timeout_s))

    # -- the probe -------------------------------------------------------------------------------------------------

    def probe(self) -> tuple[int, ...]:
        """The fixed sequence that learner and samplers score after every sync."""
        num_tokens = min(self._config.weights.probe_tokens, self.prepared.max_len - 1)
        return probe_token_ids(self.prepared.vocab_size, num_tokens, self._config.seed)

    def probe_tolerance(self) -> float:
        """Largest difference in nats that counts as agreement."""
        config, placement = self._config, self._placement
        if config.weights.probe_tolerance is not None:
            return config.weights.probe_tolerance
        # What `auto` and vLLM's default stand for: float32 on CPU, lower precision on GPUs.
        learner = config.learner.dtype if config.learner.dtype != "auto" else _default_dtype(placement.learner_gpus)
        sampler = config.sampler.engine_args.get("dtype", _default_dtype(placement.sampler_gpus))
        return FLOAT32_PROBE_TOLERANCE if learner == sampler == "float32" else LOW_PRECISION_PROBE_TOLERANCE


def _score_timeout_s(config: RunConfig) -> float:
    """Seconds that one rollout may take over all rewards, a process lost for each of them included."""
    workers = config.reward_workers
    per_reward = [spec.timeout_s or workers.timeout_s for spec in config.rewards]
    return sum(2 * timeout_s + workers.start_timeout_s for timeout_s in per_reward)


def _default_dtype(num_gpus: float) -> str:
    return "bfloat16" if num_gpus > 0 else "float32"
