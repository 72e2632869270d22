"""One set-up in virtual time: the real controller, stream, fleets and weight sync, with simulated roles behind them.

What it stands on, and where that ends:

- completions are as long, and score as, the recorded ones; a policy that learns differently, because its tokens are
  older, is not foreseen
- an engine is the sum of its steps (`simulated_engine`), a learner's step a fixed part and one per token
- ranks: each doubling makes the part per token faster by 2 × an efficiency that is assumed
- more samplers load weights at the same time, and cost the driver nothing more
- on one CPU machine roles share its cores (`cores`); else each has its own
- nothing breaks; until everything flows, and where nothing is left to sample ahead, steps do not count
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from weaver_rl.checkpoints import Checkpoints
from weaver_rl.config import RunConfig
from weaver_rl.controller import Controller, Crew
from weaver_rl.plan.cores import SharedCores
from weaver_rl.plan.costs import Costs
from weaver_rl.plan.machine import Machine
from weaver_rl.plan.recording import Recording
from weaver_rl.plan.simulated_crew import (
    DriverTimeJournal,
    KeptMetrics,
    NoFleetEvents,
    SilentView,
    SimulatedPrompts,
    SimulatedRewardWorkers,
    save_nothing,
)
from weaver_rl.plan.simulated_engine import EngineLimits
from weaver_rl.plan.simulated_learner import NAME as LEARNER
from weaver_rl.plan.simulated_learner import SimulatedLearner
from weaver_rl.plan.simulated_samplers import SamplerWorld, SimulatedSamplers
from weaver_rl.plan.trace import Trace
from weaver_rl.plan.virtual_loop import VirtualLoop, run_virtually
from weaver_rl.plan.work import BusyTimes, Tempo
from weaver_rl.reward_fleet import RewardFleet
from weaver_rl.run_folder import RunFolder
from weaver_rl.sampler_fleet import SamplerFleet
from weaver_rl.waits import Waits, using
from weaver_rl.weights.sync import WeightSync

PROBE = (0,) * 8
WATCH_EVERY_S = 1e6
"""Nothing breaks in a simulation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SetUp:
    """What a plan varies.

    Example:
        SetUp(num_samplers=2, num_ranks=1, max_lag=1)
    """

    num_samplers: int
    num_ranks: int
    max_lag: int

    @property
    def lead_in(self) -> int:
        """Steps until everything flows."""
        return self.max_lag + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """How a set-up would go."""

    set_up: SetUp
    step_seconds: float
    """Of a step, with its part of evaluations and checkpoints."""
    tokens_per_s: float
    """Sampled tokens per second of wall time."""
    stage_seconds: Mapping[str, float]
    """Mean of each stage over all steps."""
    idle: Mapping[str, float]
    """Share of the wall time in which a role did nothing: `samplers`, `rewards`, `learner`."""
    lag_mean: float
    """Versions."""

    @property
    def steps_per_hour(self) -> float:
        return 3600 / self.step_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What all set-ups of a plan have in common."""

    config: RunConfig
    trace: Trace
    costs: Costs
    machine: Machine
    """Of the recorded run."""
    cores: float | None
    """That the planned run has for everything; None: each role has its own."""
    num_steps: int
    """Steps that count."""
    efficiency: float
    seed: int


def recorded_set_up(config: RunConfig) -> SetUp:
    """The set-up that a configuration describes."""
    return SetUp(
        num_samplers=config.sampler.num_replicas,
        num_ranks=config.learner.num_ranks,
        max_lag=config.rollout.max_lag,
    )


def simulate(world: World, set_up: SetUp) -> Prediction:
    """Runs a set-up through. The same arguments give the same answer."""
    with tempfile.TemporaryDirectory(prefix="weaver-rl-plan-") as directory:
        return run_virtually(_simulate(world, set_up, RunFolder(Path(directory))))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cast:
    """The simulated roles of one run and the real fleets in front of them; needs the loop that it will run on."""

    config: RunConfig
    tempo: Tempo
    busy: BusyTimes
    prompts: SimulatedPrompts
    samplers: SamplerFleet
    rewards: RewardFleet
    learner: SimulatedLearner
    actors: Mapping[str, tuple[str, ...]]
    """Names of the actors by role."""

    @property
    def crew(self) -> Crew:
        return Crew(prompts=self.prompts, samplers=self.samplers, rewards=self.rewards, learner=self.learner)

    @contextlib.asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        """Starts everybody, and ends them after the block."""
        self.samplers.start()
        await self.rewards.start()
        try:
            yield
        finally:
            await self.samplers.close()
            await self.rewards.close()


def cast_of(world: World, set_up: SetUp, run_dir: Path, now: Callable[[], float]) -> Cast:
    """Everybody who works on a set-up."""
    config = _config(world, set_up, run_dir)
    recording = Recording(
        world.trace,
        num_steps=world.num_steps,
        groups_per_step=config.rollout.prompts_per_step,
        samples_per_prompt=config.rollout.samples_per_prompt,
        seed=world.seed,
        lead_in=set_up.lead_in,
        lead_out=set_up.max_lag,
    )
    tempo = Tempo(recording, world.costs.paces)
    busy = BusyTimes(now)
    cores = SharedCores(world.cores, now)
    samplers = tuple(f"sampler {index}" for index in range(set_up.num_samplers))
    workers = tuple(f"reward worker {index}" for index in range(config.reward_workers.num_workers))
    reward_factory = SimulatedRewardWorkers(recording=recording, costs=world.costs.reward, cores=cores, busy=busy)
    return Cast(
        config=config,
        tempo=tempo,
        busy=busy,
        prompts=SimulatedPrompts(recording),
        samplers=SamplerFleet(
            SimulatedSamplers(_sampler_world(world, config, recording, tempo, busy, cores)),
            samplers,
            generate_timeout_s=config.rollout.timeout_s,
            watch_every_s=WATCH_EVERY_S,
            events=NoFleetEvents(),
        ),
        rewards=RewardFleet(
            reward_factory,
            workers,
            labels=[spec.component_name for spec in config.rewards],
            watch_every_s=WATCH_EVERY_S,
        ),
        learner=SimulatedLearner(
            costs=world.costs.learner,
            tempo=tempo,
            cores=cores,
            busy=busy,
            num_ranks=set_up.num_ranks,
            efficiency=world.efficiency,
            threads_per_rank=world.machine.learner_threads,
            corrects=config.correction.name != "none",
            checkpoint_s=world.costs.checkpoint,
        ),
        actors={"samplers": samplers, "rewards": workers, "learner": (LEARNER,)},
    )


async def _simulate(world: World, set_up: SetUp, folder: RunFolder) -> Prediction:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    cast = cast_of(world, set_up, folder.path, loop.time)
    metrics = KeptMetrics()
    marks = _Marks(loop, cast.busy)
    with using(Waits(loop.time)):
        async with cast.at_work():
            controller = Controller(
                config=cast.config,
                crew=cast.crew,
                sync=WeightSync(cast.learner, cast.samplers, PROBE, tolerance=1.0),
                folder=folder,
                checkpoints=Checkpoints(folder.checkpoints, 1),
                metrics=metrics,
                journal=DriverTimeJournal(lambda step: loop.spend(cast.tempo.at(step - 1).driver)),
                view=SilentView(),
                on_step=marks,
                save_rollouts=save_nothing,
                now=loop.time,
            )
            await controller.run()
    idle = marks.idle(cast.actors, set_up.lead_in, set_up.lead_in + world.num_steps)
    return _prediction(world, cast.config, metrics, set_up, idle)


def _config(world: World, set_up: SetUp, path: Path) -> RunConfig:
    config = world.config
    changes = {
        "run_dir": path,
        "warm_start": None,
        "num_steps": set_up.lead_in + world.num_steps + set_up.max_lag,
        "rollout": config.rollout.model_copy(update={"max_lag": set_up.max_lag}),
        "sampler": config.sampler.model_copy(update={"num_replicas": set_up.num_samplers}),
        "learner": config.learner.model_copy(update={"num_ranks": set_up.num_ranks}),
        # What is missing was missing when it was recorded, and did not stop that run.
        "reward_workers": config.reward_workers.model_copy(update={"max_missing_fraction": 1.0}),
    }
    return config.model_copy(update=changes)


def _sampler_world(
    world: World, config: RunConfig, recording: Recording, tempo: Tempo, busy: BusyTimes, cores: SharedCores
) -> SamplerWorld:
    num_cores = None if world.cores is None else int(world.cores)
    # No more than were seen at work: nobody measured what more of them would bring.
    num_threads = min(world.machine.sampler_threads, Machine.of(config, num_cores).sampler_threads)
    return SamplerWorld(
        recording=recording,
        tempo=tempo,
        costs=world.costs.engine.with_threads(num_threads / world.machine.sampler_threads),
        limits=EngineLimits.of(config.sampler, config.rollout.sampling.max_tokens),
        cores=cores,
        num_threads=num_threads,
        max_tokens=config.rollout.sampling.max_tokens,
        busy=busy,
    )


@dataclass(slots=True)
class _Marks:
    """Where every actor stood at the end of each step."""

    loop: VirtualLoop
    busy: BusyTimes
    at: list[tuple[float, dict[str, float]]] = field(default_factory=list)

    def __call__(self, step: int) -> None:
        self.at.append((self.loop.time(), self.busy.total()))

    def idle(self, roles: Mapping[str, tuple[str, ...]], first: int, last: int) -> dict[str, float]:
        """Share of each role's time between the ends of two steps."""
        (begin, before), (end, after) = self.at[first - 1], self.at[last - 1]
        wall = end - begin

        def share(actors: tuple[str, ...]) -> float:
            worked = sum(after.get(actor, 0.0) - before.get(actor, 0.0) for actor in actors)
            return min(1.0, max(0.0, 1 - worked / (wall * len(actors)))) if wall > 0 else 0.0

        return {role: share(actors) for role, actors in roles.items()}


def _prediction(
    world: World, config: RunConfig, metrics: KeptMetrics, set_up: SetUp, idle: Mapping[str, float]
) -> Prediction:
    lines = [line.values for line in metrics.lines if line.is_training]
    counted = lines[set_up.lead_in : set_up.lead_in + world.num_steps]
    stages: dict[str, float] = {}
    for name in dict.fromkeys(name for line in counted for name in line if name.startswith("seconds/")):
        stages[name.removeprefix("seconds/")] = sum(line.get(name, 0.0) for line in counted) / len(counted)
    plain = stages.pop("step") - stages.pop("eval", 0.0) - stages.pop("checkpoint", 0.0)
    evals = [line["seconds/eval"] for line in lines if "seconds/eval" in line]
    stages |= occasional(config, sum(evals) / len(evals) if evals else 0.0, world.costs.checkpoint)
    seconds = plain + stages["eval"] + stages["checkpoint"]
    num_tokens = sum(line["sampler/num_tokens"] for line in counted) / len(counted)
    lags = [line["lag/mean"] for line in counted if "lag/mean" in line]
    return Prediction(
        set_up=set_up,
        step_seconds=seconds,
        tokens_per_s=num_tokens / seconds,
        stage_seconds=stages,
        idle=idle,
        lag_mean=sum(lags) / len(lags) if lags else 0.0,
    )


def occasional(config: RunConfig, eval_s: float, checkpoint_s: float) -> dict[str, float]:
    """What evaluations and checkpoints add to each step on average."""
    return {
        "eval": eval_s / config.eval.every if config.eval.every else 0.0,
        "checkpoint": checkpoint_s / config.checkpoint.every if config.checkpoint.every else 0.0,
    }
