"""One run of the real controller with a fleet of sleeping samplers, for as long as it takes to measure it.

Learner, rewards and prompts are fakes in this process (fake_crew.py). It prints no figures.
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

from rich.console import Console

from actors.identity import Identity
from actors.sampler_replica import RaySampler
from benchmarks.fake_crew import FakeLearner, FakePrompts, FakeRewards, Flight
from benchmarks.sleeping_sampler import Pace
from weaver_rl.checkpoints import Checkpoints
from weaver_rl.config import RunConfig
from weaver_rl.controller import Controller, Crew
from weaver_rl.fleet_log import FleetLog
from weaver_rl.journal import Journal
from weaver_rl.metrics import MetricsWriter
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


async def run_fleet(point: Point, actors: Sequence[Any], run_dir: Path) -> tuple[list[Mark], int]:
    """A mark per step, and how many groups were in flight at most. `actors`: sleeping samplers, which outlive it."""
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
    return marks.marks, flight.peak


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
