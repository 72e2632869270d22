"""Whether a cluster, or this machine alone, has what the run asks for. It reads facts and joins nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from weaver_rl.check.finding import Finding, failed, passed, warned
from weaver_rl.check.memory import GiB
from weaver_rl.check.resources import ClusterFacts, open_file_limit, temporary_disk
from weaver_rl.check.subject import RunUnderCheck
from weaver_rl.check.versions import installed
from weaver_rl.errors import ResourcesError
from weaver_rl.placement import ClusterConfig, Placement, asked_and_available, check_fits, plan_placement
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
    return plan_placement(config.cluster, config.learner, config.sampler, cluster_gpus=facts.num_gpus)


def check_capacity(run: RunUnderCheck) -> Iterator[Finding]:
    """Nodes, placement, versions on them, and what this machine gives Ray."""
    facts = run.cluster.get()
    yield from check_cluster(facts)
    yield _placement(run, facts)
    yield from _object_store(run, facts)


def check_cluster(facts: ClusterFacts) -> Iterator[Finding]:
    """What there is, whoever asks for it."""
    totals = {kind: sum(node.resources.get(kind, 0.0) for node in facts.nodes) for kind in ("CPU", "GPU")}
    nodes = f"{len(facts.nodes)} node(s), " if facts.address else ""
    where = facts.address or "this machine, where a cluster is started"
    yield passed("cluster", f"{where}: {nodes}{_amounts(totals)}, free {_amounts(facts.available)}")
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
    try:
        check_fits(placement, facts.available, [node.resources for node in facts.nodes])
    except ResourcesError as error:
        return no_room(run.config.cluster, placement, facts, str(error), advice)
    kind = "colocated" if placement.colocated else "split"
    asked = ", ".join(f"{amount:g} {name}s" for name, amount in placement.total().items())
    return passed(
        "placement",
        f"{kind}: {run.config.learner.num_ranks} learner rank(s) and {run.config.sampler.num_replicas} sampler(s) ask "
        f"for {asked}",
    )


def no_room(cluster: ClusterConfig, placement: Placement, facts: ClusterFacts, seen: str, advice: str) -> Finding:
    """The line for what does not fit now: a warning where nodes may come."""
    if not cluster.autoscaling:
        return failed("placement", seen, advice)
    return warned(
        "placement",
        f"no room now: {asked_and_available(placement, facts.available)}",
        f"it waits {cluster.start_timeout_s:g} s (cluster.start_timeout_s) for new nodes: see that this is enough, and "
        "that the autoscaler has a kind of node for each actor",
    )


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
    room = min((node.object_store_bytes for node in facts.nodes if node.object_store_bytes), default=None)
    if transport != "object_store" or room is None:
        return
    # The version before stays until the next has arrived: a sampler that is late still loads it.
    needed = 2 * 4 * run.shape.needed().num_parameters
    seen = f"{room / GiB:.3g} GiB of shared memory on a node; two versions of the weights take {needed / GiB:.3g} GiB"
    if needed > room:
        yield warned(
            "object store", seen, "Ray would write them to disk: enlarge /dev/shm (docker run --shm-size) or its share"
        )
    else:
        yield passed("object store", seen)
