"""Whether a cluster, or this machine alone, has what the run asks for. It reads facts and joins nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from weaver_rl.check.finding import Finding, failed, passed, warned
from weaver_rl.check.memory import GiB
from weaver_rl.check.resources import ClusterFacts, open_file_limit, temporary_disk
from weaver_rl.check.subject import RunUnderCheck
from weaver_rl.check.versions import installed
from weaver_rl.custom_resources import in_words, nodes_with
from weaver_rl.errors import ResourcesError
from weaver_rl.placement import (
    EPSILON,
    ClusterConfig,
    Placement,
    asked_and_available,
    check_fits,
    fits_node,
    plan_placement,
)
from weaver_rl.weights.config import resolve_transport

FULL_DISK_SHARE = 0.95
"""Ray puts nothing more on a disk that is fuller than this."""
OPEN_FILES = 8192
"""Each worker takes sockets and files by the dozen; Ray's own documents advise tens of thousands on a head node."""
MUST_EQUAL = ("ray", "python")
"""Ray joins no cluster of another version of either; of Python the first two numbers count."""
SHOULD_EQUAL = ("weaver-rl", "torch", "transformers", "vllm")


def placement_of(run: RunUnderCheck, facts: ClusterFacts) -> Placement:
    """The bundles of the run there. Raises ResourcesError for a configuration that no cluster can place."""
    config = run.config
    cluster = cluster_there(config.cluster, facts)
    return plan_placement(cluster, config.learner, config.sampler, cluster_gpus=facts.num_gpus)


def cluster_there(cluster: ClusterConfig, facts: ClusterFacts) -> ClusterConfig:
    """The section as it holds there: the cluster of one machine makes no nodes."""
    return cluster if facts.address else cluster.without_autoscaling()


def check_capacity(run: RunUnderCheck) -> Iterator[Finding]:
    """Nodes, placement, versions on them, and what this machine gives Ray."""
    facts = run.cluster.get()
    yield from check_cluster(facts)
    yield _placement(run, facts)
    yield from _reward_workers(run, facts)
    yield from _object_store(run, facts)


def check_cluster(facts: ClusterFacts) -> Iterator[Finding]:
    """What there is, whoever asks for it."""
    nodes = f"{len(facts.nodes)} node(s), " if facts.address else ""
    where = facts.address or "this machine, where a cluster is started"
    free = "free: not known by HTTP" if facts.available is None else f"free {_amounts(facts.available)}"
    yield passed("cluster", f"{where}: {nodes}{_amounts(facts.total)}, {free}")
    if facts.address is None:
        yield from _this_machine()
    else:
        yield from _versions(facts)
        yield from _nodes(facts)


def _amounts(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{resources.get(kind, 0.0):g} {kind}s" for kind in ("CPU", "GPU"))


def _placement(run: RunUnderCheck, facts: ClusterFacts) -> Finding:
    advice = "change what the line names; wait or stop other runs if the cluster is only busy"
    try:
        placement = placement_of(run, facts)
    except ResourcesError as error:
        return failed("placement", str(error), advice)
    kind = "colocated" if placement.colocated else "split"
    asked = ", ".join(f"{amount:g} {name}s" for name, amount in placement.total().items())
    seen = (
        f"{kind}: {run.config.learner.num_ranks} learner rank(s) and {run.config.sampler.num_replicas} sampler(s) ask "
        f"for {asked}"
    )
    return room_for(placement, run.config.cluster, facts, seen, advice)


def room_for(placement: Placement, cluster: ClusterConfig, facts: ClusterFacts, seen: str, advice: str) -> Finding:
    """Whether it fits: a warning where nodes may come for what does not, and where nobody knows what is free.

    Args:
        seen: what is asked for, in words.
        advice: for what does not fit.
    """
    available = facts.total if facts.available is None else facts.available
    try:
        check_fits(placement, available, [node.resources for node in facts.nodes])
    except ResourcesError as error:
        if not cluster_there(cluster, facts).autoscaling:
            return failed("placement", str(error), advice)
    else:
        if facts.available is not None:
            return passed("placement", seen)
        return warned(
            "placement",
            f"{seen}; free: not known by HTTP, so this holds where nothing else runs",
            "see on the head with `ray status` what is free",
        )
    return warned(
        "placement",
        f"no room now: {asked_and_available(placement, available)}",
        f"it waits {cluster.start_timeout_s:g} s (cluster.start_timeout_s) for new nodes: see that this is enough, and "
        "that the autoscaler has a kind of node for each actor",
    )


def _reward_workers(run: RunUnderCheck, facts: ClusterFacts) -> Iterator[Finding]:
    """Whether there are nodes with what each of them asks for."""
    config = run.config
    asked, wanted = config.reward_workers.resources, config.reward_workers.num_workers
    if not asked:
        return
    available = facts.total if facts.available is None else facts.available
    room = min(_times(asked, available), sum(_times(asked, node.resources) for node in facts.nodes))
    there = nodes_with(asked, [(node.name, node.resources) for node in facts.nodes])
    seen = f"{wanted} ask for {in_words(asked)} each, room for {room}; nodes that have it: {there}"
    if room >= wanted:
        yield passed("reward workers", seen)
    elif cluster_there(config.cluster, facts).autoscaling:
        timeout_s = config.reward_workers.start_timeout_s + config.cluster.start_timeout_s
        yield warned("reward workers", seen, f"see that the autoscaler makes such nodes: they wait {timeout_s:g} s")
    else:
        yield failed(
            "reward workers",
            seen,
            "start nodes with it (`ray start --resources`), or lower reward_workers.num_workers; without "
            "reward_workers.resources they go anywhere",
        )


def _times(bundle: Mapping[str, float], there: Mapping[str, float]) -> int:
    return min(int(there.get(kind, 0.0) / amount + EPSILON) for kind, amount in bundle.items())


def _this_machine() -> Iterator[Finding]:
    soft, hard = open_file_limit()
    if soft < OPEN_FILES:
        yield warned(
            "open files", f"limit {soft}", f"run `ulimit -n {min(hard, 65536) if hard > 0 else 65536}` before the run"
        )
    else:
        yield passed("open files", f"limit {soft:,}")
    directory, total, free = temporary_disk()
    seen = f"{free / 1e9:.0f} GB of {total / 1e9:.0f} GB free in {directory}, where Ray keeps its session"
    if free < total * (1 - FULL_DISK_SHARE):
        yield failed("temporary disk", seen, "Ray takes nothing more from 95 % on: free some, or set TMPDIR elsewhere")
    else:
        yield passed("temporary disk", seen)


def _versions(facts: ClusterFacts) -> Iterator[Finding]:
    ours = installed()
    for package in MUST_EQUAL:
        theirs = facts.versions.get(package)
        if theirs is None:
            continue
        mine = ours.get(package, "none")
        same = theirs == mine or (package == "python" and theirs.split(".")[:2] == mine.split(".")[:2])
        if same:
            yield passed(f"{package} there", theirs)
        else:
            yield failed(
                f"{package} there", f"{theirs}, here {mine}", "Ray joins no cluster of another version: use one image"
            )


def _nodes(facts: ClusterFacts) -> Iterator[Finding]:
    ours = installed()
    num_good = 0
    for node in facts.nodes:
        if node.problem is not None:
            yield warned(f"node {node.name}", f"could not be asked: {node.problem}", "see whether it is busy or ill")
            continue
        if not node.versions:
            continue
        other = [
            f"{package} {node.versions.get(package, 'none')} (here {ours.get(package, 'none')})"
            for package in SHOULD_EQUAL
            if node.versions.get(package) != ours.get(package)
        ]
        if other:
            lacks_us = "weaver-rl" not in node.versions
            yield (failed if lacks_us else warned)(
                f"node {node.name}", ", ".join(other), "install the same there: actors run with what the node has"
            )
        else:
            num_good += 1
            if node.sees_run_dir is False:
                yield passed(
                    f"node {node.name}",
                    "does not see the run folder: checkpoints of its learner ranks travel through Ray and the driver's "
                    "disk, which takes longer than a shared file system",
                )
    if num_good:
        yield passed("nodes", f"{num_good} of {len(facts.nodes)} have the same weaver-rl, torch, transformers and vllm")


def _object_store(run: RunUnderCheck, facts: ClusterFacts) -> Iterator[Finding]:
    try:
        placement = placement_of(run, facts)
    except ResourcesError:
        return  # has a line of its own
    on_gpu = placement.learner_gpus > 0 and placement.sampler_gpus > 0
    transport = resolve_transport(run.config.weights.transport, on_gpu=on_gpu, colocated=placement.colocated)
    if transport != "object_store":
        return
    # Where the learner is, the version before stays until the next has arrived: a sampler that is late still loads it.
    # A sampler fetches the whole version that it loads.
    learner, sampler = (placement.bundles[role[0]] for role in (placement.learner_bundles, placement.sampler_bundles))
    held = [
        (node.object_store_bytes, 2 if fits_node(learner, node.resources) else 1)
        for node in facts.nodes
        if node.object_store_bytes and (fits_node(learner, node.resources) or fits_node(sampler, node.resources))
    ]
    if not held:
        return
    room, versions = min(held, key=lambda of_node: of_node[0] / of_node[1])
    needed = versions * 4 * run.shape.needed().num_parameters
    take = "two versions of the weights take" if versions == 2 else "a version of the weights takes"
    seen = f"{room / GiB:.3g} GiB of shared memory on a node; {take} {needed / GiB:.3g} GiB"
    if needed > room:
        yield warned(
            "object store", seen, "Ray would write them to disk: enlarge /dev/shm (docker run --shm-size) or its share"
        )
    else:
        yield passed("object store", seen)
