"""All checks of a server, in the order of what they need. It runs none of them, and serves nothing."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from weaver_rl.check.capacity import check_cluster, cluster_there, room_for
from weaver_rl.check.checklist import Check, Entry
from weaver_rl.check.finding import Finding, failed, passed
from weaver_rl.check.given import Given, NotCheckedError
from weaver_rl.check.memory import adapter_parameters, learner_memory, sampler_memory
from weaver_rl.check.memory_check import check_cache, fits, gib, sampler_load
from weaver_rl.check.model_source import FoundModel, find_model
from weaver_rl.check.policy_shape import shape_of
from weaver_rl.check.resources import ClusterFacts
from weaver_rl.check.run_space import existing_parent, why_not_writable
from weaver_rl.check.versions import check_versions
from weaver_rl.errors import ConfigError, ModelError, ResourcesError
from weaver_rl.placement import Placement, plan_placement
from weaver_rl.service.config import ServeConfig, ServedModel
from weaver_rl.service.http.auth import ApiKeys
from weaver_rl.tasks.load import load_task
from weaver_rl.tasks.prompts import sample_texts

CHUNK_MB = 512
"""Weights are published in chunks of this size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerUnderCheck:
    """A server's configuration and what several checks need of it.

    Example:
        ServerUnderCheck.of(load_file(ServeConfig, path), cluster=this_machine)
    """

    config: ServeConfig
    models: dict[str, Given[FoundModel]]
    cluster: Given[ClusterFacts]
    gpu_memory_gb: float | None

    @staticmethod
    def of(
        config: ServeConfig, *, cluster: Callable[[], ClusterFacts], gpu_memory_gb: float | None = None
    ) -> ServerUnderCheck:
        base_dir = config.base_dir or Path.cwd()

        def texts(served: ServedModel) -> Iterable[str]:
            assert served.task is not None  # of a scratch model: checked by ServedModel
            return sample_texts(load_task(served.task, base_dir, config.seed), served.task)

        def found(served: ServedModel) -> FoundModel:
            return find_model(served.model, base_dir, partial(texts, served))

        return ServerUnderCheck(
            config=config,
            models={s.name: Given(f"model {s.name}", partial(found, s)) for s in config.models},
            cluster=Given("the cluster", cluster),
            gpu_memory_gb=gpu_memory_gb,
        )

    def max_length(self, served: ServedModel) -> int:
        """Tokens of a sequence at most."""
        longest = self.models[served.name].needed().max_length()
        return served.max_length if served.max_length is not None else longest


def serve_checklist(server: ServerUnderCheck, path: Path, *, with_cluster: bool = True) -> tuple[Check, ...]:
    """`path`: the configuration file, which was read already."""
    checks = (
        Check(title="configuration", run=partial(_configuration, server.config, path), timeout_s=10),
        Check(title="versions", run=check_versions, timeout_s=10),
        Check(title="models", run=partial(_models, server), timeout_s=180),
        Check(title="cluster", run=partial(_cluster, server), timeout_s=70),
        Check(title="memory", run=partial(_memory, server), timeout_s=60),
        Check(title="state", run=partial(_state, server.config), timeout_s=30),
    )
    return checks if with_cluster else tuple(check for check in checks if check.title != "cluster")


def _configuration(config: ServeConfig, path: Path) -> Iterator[Finding]:
    yield passed(str(path), f"loads: {len(config.models)} model(s), {', '.join(model.name for model in config.models)}")
    try:
        keys = ApiKeys.load(config.auth)
        keys.check_host(config.http.host)
    except ConfigError as error:
        yield failed("API keys", str(error), "see docs/service.md")
    else:
        seen = f"{len(keys.digest_by_owner)} key(s)" if keys else "none: only this machine may call"
        yield passed("API keys", f"{seen}; http.host is {config.http.host}")
    yield _port(config.http.host, config.http.port)


def _port(host: str, port: int) -> Finding:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return failed("http.port", f"{host}:{port}: {error.strerror}", "give another http.port or http.host")
    return passed("http.port", f"{host}:{port} is free" if port else "any free one")


def _models(server: ServerUnderCheck) -> Iterator[Finding]:
    for served in server.config.models:
        try:
            found = server.models[served.name].get()
            tokenizer = found.tokenizer()
            stops = found.stop_tokens(tokenizer)
        except (ModelError, NotCheckedError) as error:
            yield failed(served.name, str(error), "correct its model section, or put the model there")
            continue
        longest = found.max_length()
        if served.max_length is not None and served.max_length > longest:
            seen = f"max_length is {served.max_length}, the model was made for {longest} tokens"
            yield failed(served.name, seen, "lower max_length")
            continue
        names = ", ".join(repr(tokenizer.convert_ids_to_tokens(stop)) for stop in stops)
        yield passed(served.name, f"{found.where}; sequences of {server.max_length(served)} tokens; ends with {names}")


def _cluster(server: ServerUnderCheck) -> Iterator[Finding]:
    facts = server.cluster.get()
    yield from check_cluster(facts)
    advice = "change what the line names, or set preload: false where it may wait"
    try:
        placements = [_placement(server, served, facts) for served in server.config.models if served.preload]
    except ResourcesError as error:
        yield failed("placement", str(error), advice)
        return
    if not placements:
        return
    together = _together(placements)
    asked = ", ".join(f"{amount:g} {kind}s" for kind, amount in together.total().items())
    seen = f"learner and engine of {len(placements)} model(s) ask for {asked}"
    yield room_for(together, server.config.cluster, facts, seen, advice)


def _placement(server: ServerUnderCheck, served: ServedModel, facts: ClusterFacts) -> Placement:
    return plan_placement(
        cluster_there(server.config.cluster, facts),
        served.learner,
        served.sampler,
        cluster_gpus=facts.num_gpus,
        may_colocate=False,
    )


def _together(placements: list[Placement]) -> Placement:
    learners = [bundle for one in placements for bundle in one.only_learner().bundles]
    samplers = [bundle for one in placements for bundle in one.only_samplers().bundles]
    return Placement(
        bundles=(*learners, *samplers),
        learner_bundles=tuple(range(len(learners))),
        sampler_bundles=tuple(range(len(learners), len(learners) + len(samplers))),
        sampler_gpus=placements[0].sampler_gpus,
        learner_gpus=placements[0].learner_gpus,
    )


def _memory(server: ServerUnderCheck) -> Iterator[Entry]:
    facts = server.cluster.needed()
    on_cpu = 0
    for served in server.config.models:
        shape = shape_of(server.models[served.name].needed().config)
        given = (served.learner.num_gpus, served.sampler.num_gpus)
        on_gpu = server.gpu_memory_gb is not None or any(given) or (facts.num_gpus > 0 and given != (0, 0))
        gpu_bytes = int(server.gpu_memory_gb * 1e9) if server.gpu_memory_gb is not None else facts.gpu_memory_bytes
        cpu_bytes = min((node.memory_bytes for node in facts.nodes if node.memory_bytes), default=None)
        capacity = gpu_bytes if on_gpu else cpu_bytes
        max_length = server.max_length(served)
        adapter = adapter_parameters(shape, served.max_lora_rank)
        learner = learner_memory(
            shape,
            served.learner,
            on_gpu=on_gpu,
            longest=max_length,
            chunk_mb=CHUNK_MB,
            capacity_bytes=capacity,
            trained_parameters=None if served.training_modes == ("full_ft",) else adapter,
        )
        load = sampler_load(served.sampler, max_length, on_gpu=on_gpu)
        sampler = sampler_memory(shape, load, on_gpu=on_gpu, num_replicas=1, capacity_bytes=capacity)
        yield learner
        yield sampler
        yield passed(
            served.name,
            f"{shape.num_parameters:,} parameters; an adapter of rank {served.max_lora_rank} takes {gib(16 * adapter)} "
            f"of a learner, a model trained whole {gib(16 * shape.num_parameters)}",
        )
        yield from check_cache(shape, load, sampler)
        if not on_gpu:
            on_cpu += learner.count * learner.total_bytes + sampler.total_bytes
        elif gpu_bytes is not None:
            shares = all(amount is not None and amount < 1 for amount in given)
            engine = int(gpu_bytes * load.gpu_memory_utilization)
            seen = f"learner with one adapter {gib(learner.total_bytes)}, engine {gib(engine)}"
            needed = learner.total_bytes + engine if shares else max(learner.total_bytes, engine)
            advice = "lower gpu_memory_utilization or max_tokens_per_microbatch, or use more GPUs"
            yield fits(f"GPU of {served.name}", needed, gpu_bytes, seen, advice, tight=shares)
    there = sum(node.memory_bytes or 0 for node in facts.nodes)
    if on_cpu and there:
        yield fits("memory", on_cpu, there, "learners and engines, one adapter each", "serve fewer or smaller models")


def _state(config: ServeConfig) -> Iterator[Finding]:
    path = config.state_dir.absolute()
    if problem := why_not_writable(path):
        yield failed("state_dir", problem, "give another state_dir")
    else:
        yield passed("state_dir", f"{existing_parent(path)} can be written")
