"""The composition root of `weaver-rl replay`: real learner ranks train recorded steps again. No samplers, no rewards.

It only reads the run folder, which may belong to a live run; what it writes is in a temporary directory.
"""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.status import Status

from actors.calls import first_error
from actors.cluster import as_joined, cluster_gpus, connected, granted
from actors.learner import RayLearnerGroup
from actors.learner_start import start_learner
from actors.preparation import Prepared, prepare
from actors.rank_files import RankFiles
from actors.signals import StopSignals
from actors.spawn import Actors, spawn_learner
from weaver_rl.config import RunConfig
from weaver_rl.models.config import PretrainedModel, ScratchModel
from weaver_rl.models.directories import MARKER
from weaver_rl.models.resolve import SCRATCH_DIRECTORY, resolve_model
from weaver_rl.placement import plan_placement
from weaver_rl.replay import StepReplay, print_replay, replay_steps
from weaver_rl.replay_plan import ReplayPlan, plan_replay
from weaver_rl.tasks.load import load_task
from weaver_rl.tasks.prompts import sample_texts


def replay(run_dir: Path, step: int, console: Console, address: str | None = None) -> int:
    """Trains a recorded step again and prints how it compares; returns the exit status: 0 equal bit for bit, 1 not.

    Args:
        address: Ray cluster to use instead of the run's; `local`: this machine.

    Raises:
        UserError: there is no such step, or something it needs is missing.
        KeyboardInterrupt: SIGINT, SIGTERM or SIGHUP; everything that was started has ended.
    """
    plan = plan_replay(run_dir.absolute(), step, partial(console.print, markup=False, highlight=False, soft_wrap=True))
    if address is not None:
        cluster = plan.config.cluster.model_copy(update={"address": address})
        plan = replace(plan, config=plan.config.model_copy(update={"cluster": cluster}))
    with StopSignals() as stop, tempfile.TemporaryDirectory(prefix="weaver-rl-replay-") as name:
        scratch = Path(name)
        with connected(plan.config.cluster, scratch, stop):
            replays = _replay_connected(plan, scratch, stop, console)
    return print_replay(console, plan, replays)


def _replay_connected(plan: ReplayPlan, scratch: Path, stop: StopSignals, console: Console) -> list[StepReplay]:
    config = plan.config
    cluster = as_joined(config.cluster)
    whole = plan_placement(cluster, config.learner, config.sampler, cluster_gpus=cluster_gpus())
    placement = whole.only_learner()
    with (
        granted(placement, cluster, console.print) as reservation,
        console.status("preparing the model") as status,
    ):
        actors = Actors()
        try:
            # Its imports take long; they run while the model is prepared here.
            spawn_learner(actors, config.learner, placement, reservation.group)
            model_dir = _initial_model(config, plan.run_dir, scratch)
            prepared = prepare(config.model_copy(update={"model": PretrainedModel(name=str(model_dir))}))
            return asyncio.run(_run(plan, actors, prepared, stop, status))
        except BaseExceptionGroup as errors:  # boundary: the first of several is the reason
            raise first_error(errors) from errors
        finally:
            with stop.deferred():
                asyncio.run(actors.close())


async def _run(
    plan: ReplayPlan, actors: Actors, prepared: Prepared, stop: StopSignals, status: Status
) -> list[StepReplay]:
    async with stop.running():
        status.update("starting the learner")
        await start_learner(
            actors.learner_ranks,
            plan.config.learner,
            model_dir=prepared.model_dir,
            seed=plan.config.seed,
            transport="object_store",
            chunk_bytes=plan.config.weights.chunk_mb << 20,
        )
        return await replay_steps(
            plan,
            learner=RayLearnerGroup(
                actors.learner_ranks,
                plan.config.learner.timeout_s,
                files=RankFiles(plan.config.learner.timeout_s),
            ),
            prompts=prepared.prompts,
            on_step=lambda replayed: status.update(f"replayed step {replayed.step} of {plan.step}"),
        )


def _initial_model(config: RunConfig, run_dir: Path, scratch: Path) -> Path:
    """The directory that the run started from; a scratch model that is gone from the run folder is made again."""
    assert config.base_dir is not None
    kept = run_dir / SCRATCH_DIRECTORY
    if isinstance(config.model, ScratchModel) and (kept / MARKER).is_file():
        return kept
    task = load_task(config.task, config.base_dir, config.seed)
    return resolve_model(config.model, scratch, partial(sample_texts, task, config.task), config.base_dir)
