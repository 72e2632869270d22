"""The composition root: from a configuration to a finished run. Connects, prepares, places, wires, cleans up.

It decides nothing about training: that is the controller's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.console import Console

from actors.calls import first_error
from actors.cast import Cast
from actors.cluster import as_joined, cluster_gpus, connected, cpus_per_node, granted
from actors.preparation import prepare
from actors.ray_metrics import metered
from actors.signals import StopSignals
from actors.spawn import Actors, SamplerSpawner, spawn_learner
from weaver_rl.checkpoints import Checkpoints
from weaver_rl.config import RunConfig, dump_config
from weaver_rl.controller import Controller, RunSummary
from weaver_rl.errors import ConfigError, WeaverRLError
from weaver_rl.journal import Journal
from weaver_rl.ledger import LedgerRow
from weaver_rl.meter import Meter
from weaver_rl.metrics import MetricsWriter
from weaver_rl.metrics_sinks import MetricsSink
from weaver_rl.placement import plan_placement
from weaver_rl.prometheus import run_metrics
from weaver_rl.remote_run import mirrored
from weaver_rl.report import write_report
from weaver_rl.resume import check_resumable
from weaver_rl.run_folder import RunClaim, RunFolder, ending, write_atomically
from weaver_rl.run_meter import RunMeter
from weaver_rl.scale import follow_scale
from weaver_rl.stall_watch import StallWatch
from weaver_rl.terminal import LiveView, RunView, make_view, notes
from weaver_rl.tracking.sinks import require_tracking, tracked
from weaver_rl.waits import current_waits
from weaver_rl.weights.config import resolve_transport
from weaver_rl.weights.sync import WeightSync

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a finished run leaves."""

    summary: RunSummary
    wall_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Audience:
    """Who is told the metrics of the run, besides its folder."""

    trackers: tuple[MetricsSink, ...]
    meter: Meter


def train(config: RunConfig, *, resume: bool, overwrite: bool, console: Console) -> Outcome:
    """Runs a configuration to its end in this process and the actors that it spawns.

    Raises:
        UserError: something the user can mend; the run folder says the same.
        KeyboardInterrupt: the run was stopped by SIGINT, SIGTERM or SIGHUP; everything it started has ended.
    """
    started = time.monotonic()
    folder = RunFolder(config.folder.absolute())
    require_tracking(config.tracking)
    with (
        StopSignals() as stop,
        mirrored(
            config.place,
            folder,
            resume=resume,
            overwrite=overwrite,
            keep=config.checkpoint.keep,
            tell=partial(_say, console),
            check=partial(check_resumable, folder.config_json, config),
            in_peace=stop.deferred,
        ) as mirror,
        _claimed(folder, config, resume=resume, overwrite=overwrite) as (claim, changed),
        _reported(claim, stop),
    ):
        folder.scale_file.unlink(missing_ok=True)  # a wish of before a resume does not count
        write_atomically(folder.config_yaml, dump_config(config))
        write_atomically(folder.config_json, config.model_dump_json(indent=2) + "\n")
        with (
            make_view(console, title=f"weaver-rl · {config.name}") as view,
            notes(view),
            tracked(
                config.tracking,
                folder,
                name=config.name,
                run_config=config.model_dump(mode="json"),
                in_peace=stop.deferred,
            ) as trackers,
            connected(config.cluster, folder.logs, stop),
            metered(config.cluster, run_metrics(), {"run": config.name}) as meter,
        ):
            if mirror is not None:
                mirror.tell = view.note
            for key, (before, now) in changed.items():
                view.note(f"resuming with {key} = {now!r}, was {before!r}")
            audience = _Audience(trackers=trackers, meter=meter)
            summary = _train_connected(config, claim, view, audience, resume, stop)
    return Outcome(summary=summary, wall_seconds=time.monotonic() - started)


@contextlib.contextmanager
def _claimed(
    folder: RunFolder, config: RunConfig, *, resume: bool, overwrite: bool
) -> Iterator[tuple[RunClaim, dict[str, tuple[Any, Any]]]]:
    """The held folder, and the keys that changed since the run began."""
    changed = check_resumable(folder.config_json, config) if resume else {}
    with folder.claim(resume=resume, overwrite=overwrite) as claim:
        yield claim, changed


def _say(console: Console, note: str) -> None:
    console.print(note, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _reported(claim: RunClaim, stop: StopSignals) -> Iterator[None]:
    """However the block ends, the run folder says so and has a report of what there is."""
    try:
        yield
    except BaseException as error:  # boundary: cleans up, then raises again
        # A second failure here, of a full disk for example, must not hide the first.
        with stop.deferred(), contextlib.suppress(OSError, WeaverRLError):
            claim.end(*ending(error))
            _report(claim)
        raise
    with stop.deferred():
        claim.end("finished")
        _report(claim)


def _report(claim: RunClaim) -> None:
    try:
        write_report(claim.folder.path)
    except Exception as error:  # noqa: BLE001 boundary: a page about the run must not decide how the run ended
        log.warning("no report was written: %s: %s", type(error).__name__, error)


def _train_connected(
    config: RunConfig, claim: RunClaim, view: RunView, audience: _Audience, resume: bool, stop: StopSignals
) -> RunSummary:
    cluster = as_joined(config.cluster)
    placement = plan_placement(cluster, config.learner, config.sampler, cluster_gpus=cluster_gpus())
    on_gpu = placement.learner_gpus > 0 and placement.sampler_gpus > 0
    transport = resolve_transport(config.weights.transport, on_gpu=on_gpu, colocated=placement.colocated)
    if transport == "object_store" and config.sampler.tensor_parallel > 1:
        raise ConfigError(
            f"sampler.tensor_parallel is {config.sampler.tensor_parallel}, but weights travel by the object store "
            "here, which loads engines of one worker only. Use 1, or GPUs for learner and samplers (nccl)."
        )
    waits = current_waits()
    cast: Cast | None = None

    def facts() -> dict[str, Any]:
        return {**(cast.facts() if cast is not None else {}), "step": claim.status.last_step}

    with (
        StallWatch(waits, view, claim.folder, facts=facts) as watch,
        granted(placement, cluster, view.note) as reservation,
    ):
        actors = Actors()
        try:
            # Their imports take long; they run while the model is prepared here.
            spawn_learner(actors, config.learner, placement, reservation.group)
            spawner = SamplerSpawner(actors, config.sampler, placement, reservation, _sampler_threads(config))
            spawner.spawn_first()
            view.waiting("the model and the task")
            with waits.waiting("controller", "the model and the task to be prepared", root=True):
                prepared = prepare(config)
            cast = Cast(
                config=config,
                prepared=prepared,
                actors=actors,
                spawner=spawner,
                placement=placement,
                reservation=reservation,
                transport=transport,
                meter=audience.meter,
            )
            return asyncio.run(_run(config, claim, view, audience, cast, watch, resume, stop))
        except BaseExceptionGroup as errors:  # boundary: the first of several is the reason
            raise first_error(errors) from errors
        finally:
            with stop.deferred(), waits.waiting("controller", "actors to end", root=True):
                asyncio.run(actors.close())


async def _run(
    config: RunConfig,
    claim: RunClaim,
    view: RunView,
    audience: _Audience,
    cast: Cast,
    watch: StallWatch,
    resume: bool,
    stop: StopSignals,
) -> RunSummary:
    if left_out := cast.prepared.prompts.dropped_note():
        view.note(left_out)
    folder, waits = claim.folder, current_waits()
    watch.watch_this_loop()
    run_meter = RunMeter(audience.meter)

    def on_rows(rows: Sequence[LedgerRow]) -> None:
        run_meter.add_rows(rows)
        view.ledger(rows)

    async with stop.running():
        with (
            MetricsWriter(folder, sinks=(*audience.trackers, run_meter)) as metrics,
            Journal(folder.journal) as journal,
        ):
            cast.events.listen(journal, view)
            try:
                async with cast.collecting(folder, on_rows):
                    with waits.waiting("controller", "every actor to start", root=True):
                        view.waiting("the learner to load the policy")
                        crew = await cast.start()
                    controller = Controller(
                        config=config,
                        crew=crew,
                        sync=WeightSync(crew.learner, crew.samplers, cast.probe(), cast.probe_tolerance()),
                        folder=folder,
                        checkpoints=Checkpoints(folder.checkpoints, config.checkpoint.keep, warn=view.note),
                        metrics=metrics,
                        journal=journal,
                        view=view,
                        on_step=lambda step: claim.progress(step=step, weights_version=step),
                    )
                    return await _followed(controller.run(resume=resume), folder, cast, view, run_meter)
            finally:
                view.waiting("actors to end")
                with waits.waiting("controller", "samplers and reward workers to end", root=True):
                    await cast.close()
                view.waiting(None)


async def _followed(
    run: Coroutine[Any, Any, RunSummary], folder: RunFolder, cast: Cast, view: LiveView, run_meter: RunMeter
) -> RunSummary:
    """The run, while the number of samplers follows what `weaver-rl scale` asks for, and Prometheus sees them."""
    following = [
        asyncio.create_task(follow_scale(folder, cast.scale, view)),
        asyncio.create_task(run_meter.follow(cast.figures)),
    ]
    try:
        return await run
    finally:
        for task in following:
            task.cancel()
        await asyncio.gather(*following, return_exceptions=True)


def _sampler_threads(config: RunConfig) -> int | None:
    if config.sampler.num_threads is not None:
        return config.sampler.num_threads
    return max(1, cpus_per_node() // config.sampler.num_replicas)
