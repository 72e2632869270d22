"""What the controller costs per rollout: the real controller, fleet, journal and Ray actors, with fake engines.

Samplers are Ray actors that only sleep; learner, rewards and prompts are fakes in this process (fake_crew.py). So the
processor time of this process is that of controller, fleet, journal, rollout files and Ray's part in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from rich.console import Console

from actors.cluster import connected
from actors.identity import Identity
from actors.sampler_replica import RaySampler
from actors.signals import StopSignals
from actors.spawn import MAX_CALLS_IN_FLIGHT
from benchmarks.alternation import Ratio
from benchmarks.fake_crew import FakeLearner, FakePrompts, FakeRewards, Flight
from benchmarks.results import Aim, Row
from benchmarks.scale import Scale
from benchmarks.sleeping_sampler import Pace, SleepingSampler
from weaver_rl.checkpoints import Checkpoints
from weaver_rl.config import RunConfig
from weaver_rl.controller import Controller, Crew
from weaver_rl.fleet_log import FleetLog
from weaver_rl.journal import Journal
from weaver_rl.metrics import MetricsWriter
from weaver_rl.placement import ClusterConfig
from weaver_rl.run_folder import RunFolder
from weaver_rl.sampler_fleet import SamplerFleet
from weaver_rl.stall_watch import StallWatch
from weaver_rl.terminal import LogLines
from weaver_rl.waits import current_waits
from weaver_rl.weights.probe import probe_token_ids
from weaver_rl.weights.sync import WeightSync

TIMEOUT_S = 120.0
GROUPS_PER_STEP = 64
SAMPLES_PER_PROMPT = 8
MEAN_TOKENS = 64
STEPS_LEFT_OUT = 2
MAX_GROWTH = 1.15


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One run: so many samplers, so much in flight."""

    num_samplers: int
    max_lag: int
    mean_seconds: float
    """Of a completion; a group ends with its slowest of 8."""
    seconds: float
    """How long to measure."""
    groups_per_step: int = GROUPS_PER_STEP

    @property
    def admitted(self) -> int:
        """Rollouts between dispatch and training at most."""
        return (self.max_lag + 1) * self.groups_per_step * SAMPLES_PER_PROMPT


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """Where a run stood at the end of a step."""

    time_s: float
    cpu_s: float
    """Of this process and all its threads, so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one point cost."""

    point: Point
    rollouts_per_s: float
    cpu_s_per_rollout: float
    peak_in_flight: int
    """Rollouts dispatched and not come back."""
    steps: int


@dataclass(slots=True)
class Marks:
    """Notes each step of a run and says when it has gone on for long enough."""

    point: Point
    enough: asyncio.Event
    marks: list[Mark] = field(default_factory=list)

    def note(self, step: int) -> None:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        self.marks.append(Mark(time_s=time.monotonic(), cpu_s=usage.ru_utime + usage.ru_stime))
        kept = self.marks[STEPS_LEFT_OUT:]
        if len(kept) > 1 and kept[-1].time_s - kept[0].time_s >= self.point.seconds:
            self.enough.set()


def measure(scale: Scale, folder: Path) -> list[Row]:
    """Rows: rollouts/s and processor time per rollout at each point, and how that grows with rollouts in flight."""
    # Ray warns of many processes on few cores, over and over: that is the point here.
    with (
        StopSignals() as stop,
        (folder / "ray.log").open("w") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
        connected(ClusterConfig(address="local"), folder / "logs", stop),
    ):
        actors: list[Any] = []
        in_flight = [_measure_point(point, actors, folder) for point in in_flight_points(scale.quick)]
        wider = [_measure_point(point, actors, folder) for point in sampler_points(scale.quick)]
    return [row for cost in (*in_flight, *wider) for row in _rows(cost)] + [growth_row(in_flight)]


def in_flight_points(quick: bool) -> list[Point]:
    """Few samplers, ever more in flight: completions take longer in proportion, so that the rate stays the same."""
    if quick:
        return [Point(num_samplers=2, max_lag=k, mean_seconds=0.2, seconds=1, groups_per_step=4) for k in (0, 1)]
    return [Point(num_samplers=8, max_lag=k, mean_seconds=0.75 * (k + 1), seconds=15) for k in (1, 7, 31)]


def sampler_points(quick: bool) -> list[Point]:
    """More and more samplers with 16 groups each in flight, and two for each in a step."""
    if quick:
        return [Point(num_samplers=4, max_lag=1, mean_seconds=0.3, seconds=1, groups_per_step=4)]
    return [Point(num_samplers=n, max_lag=7, mean_seconds=1.5, seconds=15, groups_per_step=2 * n) for n in (8, 32, 128)]


def cost_of(point: Point, marks: Sequence[Mark], peak_groups: int) -> Cost:
    """The figures of the steps after the first few."""
    first, last = marks[STEPS_LEFT_OUT], marks[-1]
    steps = len(marks) - STEPS_LEFT_OUT - 1
    rollouts = steps * point.groups_per_step * SAMPLES_PER_PROMPT
    return Cost(
        point=point,
        rollouts_per_s=rollouts / (last.time_s - first.time_s),
        cpu_s_per_rollout=(last.cpu_s - first.cpu_s) / rollouts,
        peak_in_flight=peak_groups * SAMPLES_PER_PROMPT,
        steps=steps,
    )


def growth_row(costs: Sequence[Cost]) -> Row:
    """The cost with most in flight beside that with least."""
    least, most = (pick(costs, key=lambda cost: cost.peak_in_flight) for pick in (min, max))
    return Row(
        benchmark="scale",
        case=f"{most.peak_in_flight:,} rollouts in flight, {most.point.num_samplers} samplers",
        quantity="controller CPU ms per rollout",
        ours=1000 * most.cpu_s_per_rollout,
        baseline=1000 * least.cpu_s_per_rollout,
        baseline_name=f"{least.peak_in_flight:,} in flight",
        ratio=Ratio.of([most.cpu_s_per_rollout / least.cpu_s_per_rollout]),
        aim=Aim(kind="at most", value=MAX_GROWTH),
    )


def _rows(cost: Cost) -> list[Row]:
    point = cost.point
    case = (
        f"{point.num_samplers} samplers, {point.admitted:,} rollouts admitted, {point.groups_per_step} groups a step, "
        f"{point.mean_seconds:g} s each"
    )
    note = f"{cost.peak_in_flight:,} rollouts in flight at most; {cost.steps} steps"
    return [
        Row(benchmark="scale", case=case, quantity="rollouts/s", ours=cost.rollouts_per_s, note=note),
        Row(
            benchmark="scale",
            case=case,
            quantity="controller CPU ms per rollout",
            ours=1000 * cost.cpu_s_per_rollout,
        ),
    ]


# -- one run -----------------------------------------------------------------------------------------------------------


def _measure_point(point: Point, actors: list[Any], folder: Path) -> Cost:
    """Runs with the first samplers of `actors`, of which it makes more where they are too few."""
    remote = ray.remote(SleepingSampler).options(num_cpus=0, max_concurrency=MAX_CALLS_IN_FLIGHT)
    actors += [remote.remote() for _ in range(point.num_samplers - len(actors))]
    ray.get([actor.identity.remote() for actor in actors], timeout=3 * TIMEOUT_S)
    run_dir = folder / f"{point.num_samplers}-{point.max_lag}-{point.groups_per_step}"
    return asyncio.run(_run(point, actors[: point.num_samplers], run_dir))


async def _run(point: Point, actors: Sequence[Any], run_dir: Path) -> Cost:
    config = _config(point, run_dir)
    flight = Flight()
    marks = Marks(point, asyncio.Event())
    events = FleetLog(on_left=lambda name: None)
    samplers = _fleet(point, actors, events)
    learner = FakeLearner()
    with (
        RunFolder(run_dir).claim() as claim,
        (run_dir / "console.log").open("w") as log,
        LogLines(Console(file=log)) as view,
        StallWatch(current_waits(), view, claim.folder) as watch,
        MetricsWriter(claim.folder) as metrics,
        Journal(claim.folder.journal) as journal,
    ):
        watch.watch_this_loop()
        events.listen(journal, view)
        samplers.start()
        controller = Controller(
            config=config,
            crew=Crew(prompts=FakePrompts(flight), samplers=samplers, rewards=FakeRewards(flight), learner=learner),
            sync=WeightSync(learner, samplers, probe_token_ids(1000, 32), tolerance=1e-6),
            folder=claim.folder,
            checkpoints=Checkpoints(claim.folder.checkpoints, keep=1),
            metrics=metrics,
            journal=journal,
            view=view,
            on_step=marks.note,
        )
        try:
            await _until(marks.enough, controller.run(), TIMEOUT_S + 4 * point.mean_seconds + point.seconds)
        finally:
            await samplers.close()
        claim.end("finished", "measured long enough")
    return cost_of(point, marks.marks, flight.peak)


async def _until(enough: asyncio.Event, run: Any, timeout_s: float) -> None:
    """The run, until enough was measured; raises what ends it before."""
    running, measured = asyncio.create_task(run), asyncio.create_task(enough.wait())
    await asyncio.wait({running, measured}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    measured.cancel()
    if not running.done():
        running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    if not enough.is_set():
        raise RuntimeError(f"too few steps for a measurement within {timeout_s:g} s")


def _config(point: Point, run_dir: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "scale",
            "run_dir": run_dir,
            "model": {"name": "scratch"},
            "task": {"name": "reasoning_gym", "dataset": "chain_sum"},
            "num_steps": 1_000_000,
            "rollout": {
                "prompts_per_step": point.groups_per_step,
                "samples_per_prompt": SAMPLES_PER_PROMPT,
                "max_lag": point.max_lag,
                "sampling": {"max_tokens": 16 * MEAN_TOKENS},
            },
            "rewards": [{"name": "task"}],
            "eval": {"every": 0, "num_prompts": 1},
            "checkpoint": {"every": 0},
        }
    )


# -- the samplers ------------------------------------------------------------------------------------------------------


class _Lent(RaySampler):
    """Its actor outlives the run: the next point uses it again."""

    async def close(self, *, kill: bool = False) -> None:
        current_waits().forget(self.name)


@dataclass(slots=True)
class _Lender:
    """Gives actors that exist already, under the names of the fleet."""

    actors: dict[str, Any]
    pace: Pace

    async def start(self, name: str) -> RaySampler:
        await self.actors[name].start.remote(name, self.pace)
        identity: Identity = await self.actors[name].identity.remote()
        return _Lent(name, self.actors[name], identity, load_timeout_s=TIMEOUT_S, unresponsive_after_s=TIMEOUT_S)


def _fleet(point: Point, actors: Sequence[Any], events: FleetLog) -> SamplerFleet:
    named = {f"sampler {index}": actor for index, actor in enumerate(actors)}
    lender = _Lender(named, Pace(mean_seconds=point.mean_seconds, mean_tokens=MEAN_TOKENS))
    return SamplerFleet(lender, list(named), generate_timeout_s=600.0, watch_every_s=5.0, events=events)
