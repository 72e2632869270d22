"""What the controller costs per rollout: the real controller, fleet, journal and Ray actors, with fake engines.

Samplers are Ray actors that only sleep; learner, rewards and prompts are fakes in this process. Its processor time is
that of controller, fleet, journal, rollout files and Ray's part in it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from actors.cluster import connected
from actors.signals import StopSignals
from actors.spawn import MAX_CALLS_IN_FLIGHT
from benchmarks.alternation import Ratio
from benchmarks.fleet_run import SAMPLES_PER_PROMPT, STEPS_LEFT_OUT, Mark, Point, run_fleet
from benchmarks.results import Aim, Row
from benchmarks.scale import Scale
from benchmarks.sleeping_sampler import SleepingSampler
from weaver_rl.placement import ClusterConfig

START_TIMEOUT_S = 300.0
MAX_GROWTH = 1.15


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one point cost."""

    point: Point
    rollouts_per_s: float
    cpu_s_per_rollout: float
    peak_in_flight: int
    """Rollouts dispatched and not come back."""
    steps: int


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


def _measure_point(point: Point, actors: list[Any], folder: Path) -> Cost:
    """Runs with the first samplers of `actors`, of which it makes more where they are too few."""
    remote = ray.remote(SleepingSampler).options(num_cpus=0, max_concurrency=MAX_CALLS_IN_FLIGHT)
    actors += [remote.remote() for _ in range(point.num_samplers - len(actors))]
    ray.get([actor.identity.remote() for actor in actors], timeout=START_TIMEOUT_S)
    run_dir = folder / f"{point.num_samplers}-{point.max_lag}-{point.groups_per_step}"
    return cost_of(point, *asyncio.run(run_fleet(point, actors[: point.num_samplers], run_dir)))
