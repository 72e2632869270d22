"""The composition root: from a configuration to a finished run. Connects, prepares, places, spawns, wires, cleans up.

It decides nothing about training: that is the controller's.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from actors.calls import answer
from actors.cluster import cluster_gpus, connected, cpus_per_node, granted
from actors.learner import LearnerSpec, RayLearnerGroup
from actors.reward import RayRewardPool
from actors.sampler import SamplerSpec
from actors.sampler_pool import RaySamplerPool
from actors.signals import StopSignals
from actors.spawn import Actors, spawn_learner, spawn_reward_workers, spawn_samplers
from weaver_rl.checkpoints import Checkpoints
from weaver_rl.config import RunConfig, dump_config
from weaver_rl.controller import Controller, Crew, RunSummary
from weaver_rl.errors import ConfigError, ModelError, WeaverRLError
from weaver_rl.metrics import MetricsWriter
from weaver_rl.models.resolve import load_tokenizer, max_model_len, resolve_model, stop_token_ids
from weaver_rl.placement import Placement, plan_placement
from weaver_rl.report import write_report
from weaver_rl.resume import check_resumable
from weaver_rl.run_folder import RunClaim, RunFolder, ending, write_atomically
from weaver_rl.tasks.load import load_scorer, load_task
from weaver_rl.tasks.prompts import PromptStream, sample_texts
from weaver_rl.terminal import LiveView, make_view, notes
from weaver_rl.weights.config import Transport, resolve_transport
from weaver_rl.weights.probe import probe_token_ids
from weaver_rl.weights.sync import WeightSync

FLOAT32_PROBE_TOLERANCE = 1e-3
LOW_PRECISION_PROBE_TOLERANCE = 0.2
ANSWER_MARGIN_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a finished run leaves."""

    summary: RunSummary
    wall_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What is ready before any actor has started its work."""

    model_dir: Path
    prompts: PromptStream
    task_scorer: Any
    vocab_size: int
    max_len: int
    stop_tokens: tuple[int, ...]


def train(config: RunConfig, *, resume: bool, overwrite: bool, console: Console) -> Outcome:
    """Runs a configuration to its end in this process and the actors that it spawns.

    Raises:
        UserError: something the user can mend; the run folder says the same.
        KeyboardInterrupt: the run was stopped by SIGINT, SIGTERM or SIGHUP; everything it started has ended.
    """
    started = time.monotonic()
    folder = RunFolder(config.folder.absolute())
    changed = check_resumable(folder.config_json, config) if resume else {}
    with StopSignals() as stop, folder.claim(resume=resume, overwrite=overwrite) as claim, _reported(claim, stop):
        write_atomically(folder.config_yaml, dump_config(config))
        write_atomically(folder.config_json, config.model_dump_json(indent=2) + "\n")
        with (
            make_view(console, title=f"weaver-rl · {config.name}") as view,
            notes(view),
            connected(config.cluster, folder.logs, stop),
        ):
            for key, (before, now) in changed.items():
                view.note(f"resuming with {key} = {now!r}, was {before!r}")
            summary = _train_connected(config, claim, view, resume, stop)
    return Outcome(summary=summary, wall_seconds=time.monotonic() - started)


@contextlib.contextmanager
def _reported(claim: RunClaim, stop: StopSignals) -> Iterator[None]:
    """However the block ends, the run folder says so and has a report of what there is."""
    try:
        yield
    except BaseException as error:
        # A second failure here, of a full disk for example, must not hide the first.
        with stop.deferred(), contextlib.suppress(OSError, WeaverRLError):
            claim.end(*ending(error))
            write_report(claim.folder.path)
        raise
    with stop.deferred():
        claim.end("finished")
        write_report(claim.folder.path)


def _train_connected(config: RunConfig, claim: RunClaim, view: LiveView, resume: bool, stop: StopSignals) -> RunSummary:
    placement = plan_placement(config.cluster, config.learner, config.sampler, cluster_gpus=cluster_gpus())
    on_gpu = placement.learner_gpus > 0 and placement.sampler_gpus > 0
    transport = resolve_transport(config.weights.transport, on_gpu=on_gpu, colocated=placement.colocated)
    if transport == "object_store" and config.sampler.tensor_parallel > 1:
        raise ConfigError(
            f"sampler.tensor_parallel is {config.sampler.tensor_parallel}, but weights travel by the object store "
            "here, which loads engines of one worker only. Use 1, or GPUs for learner and samplers (nccl)."
        )
    with granted(placement, config.cluster.start_timeout_s) as group:
        actors = Actors()
        try:
            # Their imports take long; they run while the model is prepared here.
            spawn_learner(actors, config.learner, placement, group)
            spawn_samplers(actors, config.sampler, placement, group, _sampler_threads(config))
            view.waiting("the model and the task")
            prepared = _prepare(config)
            tolerance = _probe_tolerance(config, placement)
            return asyncio.run(_run(config, claim, view, actors, prepared, transport, tolerance, resume, stop))
        except BaseExceptionGroup as errors:
            raise _first(errors) from errors
        finally:
            with stop.deferred():
                asyncio.run(actors.close())


def _prepare(config: RunConfig) -> Prepared:
    assert config.base_dir is not None
    task = load_task(config.task, config.base_dir, config.seed)
    texts = partial(sample_texts, task, config.task)
    model_dir = resolve_model(config.model, config.folder.absolute(), texts, config.base_dir)
    tokenizer = load_tokenizer(model_dir)
    longest = max_model_len(model_dir)
    max_len = min(longest, int(config.sampler.engine_args.get("max_model_len", longest)))
    max_tokens = config.rollout.sampling.max_tokens
    if max_len <= max_tokens:
        raise ModelError(
            f"the model takes sequences of {max_len} tokens, rollout.sampling.max_tokens is {max_tokens}: nothing is "
            "left for the prompt; lower max_tokens"
        )
    longest_prompt = max_len - max_tokens
    demonstrations = None
    if config.warm_start is not None and config.warm_start.task is not None:
        teacher = load_task(config.warm_start.task, config.base_dir, config.seed)
        demonstrations = PromptStream(teacher, tokenizer, config.warm_start.task, longest_prompt, config.seed)
    prompts = PromptStream(task, tokenizer, config.task, longest_prompt, config.seed, demonstrations)
    prompts.eval_prompts(config.eval.num_prompts)  # says at the start what is wrong with them
    return Prepared(
        model_dir=model_dir,
        prompts=prompts,
        task_scorer=load_scorer(config.task, config.base_dir, task),
        vocab_size=len(tokenizer),
        max_len=max_len,
        stop_tokens=tuple(stop_token_ids(model_dir, tokenizer)),
    )


async def _run(
    config: RunConfig,
    claim: RunClaim,
    view: LiveView,
    actors: Actors,
    prepared: Prepared,
    transport: Transport,
    probe_tolerance: float,
    resume: bool,
    stop: StopSignals,
) -> RunSummary:
    assert config.base_dir is not None
    spawn_reward_workers(actors, config.reward_workers, config.rewards, config.base_dir, prepared.task_scorer)
    if left_out := prepared.prompts.dropped_note():
        view.note(left_out)
    folder = claim.folder
    async with stop.running(), asyncio.TaskGroup() as tasks:
        samplers_up = tasks.create_task(_start_samplers(config, actors, prepared, transport))
        rewards_up = tasks.create_task(_start_rewards(config, actors))
        view.waiting("the learner to load the policy")
        await _start_learner(config, actors, prepared, transport)
        await rewards_up
        if transport != "object_store":
            await samplers_up
            await _connect(config, actors)
        learner = RayLearnerGroup(actors.learner_ranks, config.learner.timeout_s)
        samplers = RaySamplerPool(
            actors.samplers,
            samplers_up,
            generate_timeout_s=config.rollout.timeout_s,
            load_timeout_s=config.weights.timeout_s,
        )
        crew = Crew(
            prompts=prepared.prompts,
            samplers=samplers,
            rewards=RayRewardPool(actors.reward_workers, _score_timeout_s(config)),
            learner=learner,
        )
        with MetricsWriter(folder) as metrics:
            controller = Controller(
                config=config,
                crew=crew,
                sync=WeightSync(learner, samplers, _probe(config, prepared), probe_tolerance),
                folder=folder,
                checkpoints=Checkpoints(folder.checkpoints, config.checkpoint.keep, warn=view.note),
                metrics=metrics,
                view=view,
                on_step=lambda step: claim.progress(step=step, weights_version=step),
            )
            return await controller.run(resume=resume)


async def _start_samplers(config: RunConfig, actors: Actors, prepared: Prepared, transport: Transport) -> None:
    async with asyncio.TaskGroup() as tasks:
        for index, (name, sampler) in enumerate(actors.samplers.items()):
            spec = SamplerSpec(
                name=name,
                model_dir=prepared.model_dir,
                engine_args={"max_model_len": prepared.max_len} | config.sampler.engine_args,
                seed=config.seed + index,
                stop_token_ids=prepared.stop_tokens,
                tensor_parallel=config.sampler.tensor_parallel,
                transport=transport,
                start_timeout_s=config.sampler.start_timeout_s,
            )
            tasks.create_task(
                answer(
                    sampler.start.remote(spec),
                    actor=name,
                    doing="starting its engine",
                    # The sampler itself gives up first, and says where its engine stands.
                    timeout_s=config.sampler.start_timeout_s + ANSWER_MARGIN_S,
                )
            )


async def _start_rewards(config: RunConfig, actors: Actors) -> None:
    async with asyncio.TaskGroup() as tasks:
        for index, worker in enumerate(actors.reward_workers):
            tasks.create_task(
                answer(
                    worker.start.remote(),
                    actor=f"reward worker {index}",
                    doing="loading the rewards",
                    timeout_s=config.reward_workers.start_timeout_s + config.cluster.start_timeout_s,
                )
            )


async def _start_learner(config: RunConfig, actors: Actors, prepared: Prepared, transport: Transport) -> None:
    timeout_s = config.learner.timeout_s
    ranks = actors.learner_ranks
    address, port = await answer(
        ranks[0].free_address.remote(), actor="learner rank 0", doing="starting", timeout_s=timeout_s
    )
    async with asyncio.TaskGroup() as tasks:
        for rank, actor in enumerate(ranks):
            spec = LearnerSpec(
                model_dir=prepared.model_dir,
                config=config.learner,
                rank=rank,
                seed=config.seed,
                master_addr=address,
                master_port=port,
                transport=transport,
                chunk_bytes=config.weights.chunk_mb << 20,
            )
            tasks.create_task(
                answer(
                    actor.start.remote(spec),
                    actor=f"learner rank {rank}",
                    doing="loading the policy",
                    timeout_s=timeout_s,
                )
            )


def _first(error: BaseException) -> BaseException:
    """What went wrong first: tasks that fail together come as a group, a person needs one reason."""
    return _first(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error


async def _connect(config: RunConfig, actors: Actors) -> None:
    """Joins learner ranks and samplers in one group for weights that go from GPU to GPU."""
    timeout_s = config.weights.timeout_s
    samplers = list(actors.samplers.values())
    address = await answer(
        actors.learner_ranks[0].free_address.remote(),
        actor="learner rank 0",
        doing="choosing a port",
        timeout_s=timeout_s,
    )
    async with asyncio.TaskGroup() as tasks:
        for rank, actor in enumerate(actors.learner_ranks):
            joined = actor.connect_samplers.remote(samplers, config.sampler.tensor_parallel, address)
            doing = "joining the samplers for weight transfer"
            tasks.create_task(answer(joined, actor=f"learner rank {rank}", doing=doing, timeout_s=timeout_s))


def _sampler_threads(config: RunConfig) -> int | None:
    if config.sampler.num_threads is not None:
        return config.sampler.num_threads
    return max(1, cpus_per_node() // config.sampler.num_replicas)


def _score_timeout_s(config: RunConfig) -> float:
    """Seconds that one rollout may take over all rewards, a process lost for each of them included."""
    workers = config.reward_workers
    per_reward = [spec.timeout_s or workers.timeout_s for spec in config.rewards]
    return sum(2 * timeout_s + workers.start_timeout_s for timeout_s in per_reward)


def _probe(config: RunConfig, prepared: Prepared) -> tuple[int, ...]:
    num_tokens = min(config.weights.probe_tokens, prepared.max_len - 1)
    return probe_token_ids(prepared.vocab_size, num_tokens, config.seed)


def _probe_tolerance(config: RunConfig, placement: Placement) -> float:
    if config.weights.probe_tolerance is not None:
        return config.weights.probe_tolerance
    # What `auto` and vLLM's default stand for: float32 on CPU, lower precision on GPUs.
    learner = config.learner.dtype if config.learner.dtype != "auto" else _default_dtype(placement.learner_gpus)
    sampler = config.sampler.engine_args.get("dtype", _default_dtype(placement.sampler_gpus))
    return FLOAT32_PROBE_TOLERANCE if learner == sampler == "float32" else LOW_PRECISION_PROBE_TOLERANCE


def _default_dtype(num_gpus: float) -> str:
    return "bfloat16" if num_gpus > 0 else "float32"
