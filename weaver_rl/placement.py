"""What a run asks of a cluster: the `cluster` section and the bundles it comes to. Pure; Ray is asked elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import Field, field_validator

from weaver_rl.engines.config import SamplerConfig
from weaver_rl.errors import ResourcesError
from weaver_rl.learner.config import LearnerConfig
from weaver_rl.run_location import ADDRESS_PASSWORD_REFUSED, address_has_password
from weaver_rl.section import Section

EPSILON = 1e-6


class ClusterConfig(Section):
    """Where the actors of a run go."""

    address: str | None = None
    """Address of a running Ray cluster; null: `RAY_ADDRESS` if set, else a cluster of this machine for this run."""
    placement: Literal["auto", "split", "colocated"] = "auto"
    """`split`: samplers and learner ranks on GPUs of their own. `colocated`: one of each share one GPU. `auto`:
    colocated where the cluster has a single GPU, no more can come, and the run has one of each; else split."""
    autoscaling: bool = False
    """The cluster makes nodes when they are asked for (KubeRay, Ray's cluster launcher): a run that has no room now
    waits `start_timeout_s` for them. Else it is refused at once."""
    start_timeout_s: float = Field(default=30.0, gt=0)
    """Resources that are not granted by then are an error that prints asked and available. With `autoscaling` give it
    more than a new node takes, image and all."""

    @field_validator("address")
    @classmethod
    def _no_password(cls, address: str | None) -> str | None:
        if address is not None and address_has_password(address):
            raise ValueError(ADDRESS_PASSWORD_REFUSED)
        return address

    def without_autoscaling(self) -> ClusterConfig:
        """For a cluster that makes no nodes, whatever the file says that is for others too."""
        return self.model_copy(update={"autoscaling": False})


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Resource bundles, each on one node: one per learner rank, then one per sampler; a single one when colocated."""

    bundles: tuple[dict[str, float], ...]
    learner_bundles: tuple[int, ...]
    """Bundle of each learner rank."""
    sampler_bundles: tuple[int, ...]
    """Bundle of each sampler."""
    sampler_gpus: float
    """GPUs of one sampler, all its tensor-parallel workers together."""
    learner_gpus: float
    """GPUs of one learner rank."""
    colocated: bool = False
    """Learner and sampler share their GPU."""

    @property
    def sampler_names(self) -> tuple[str, ...]:
        """The samplers that the run begins with, in the order of their bundles: `sampler 0`, `sampler 1`, …"""
        return tuple(f"sampler {index}" for index in range(len(self.sampler_bundles)))

    def only_learner(self) -> Placement:
        """The learner ranks alone."""
        bundles = tuple(self.bundles[index] for index in self.learner_bundles)
        return replace(self, bundles=bundles, learner_bundles=tuple(range(len(bundles))), sampler_bundles=())

    def only_samplers(self) -> Placement:
        """The samplers alone."""
        bundles = tuple(self.bundles[index] for index in self.sampler_bundles)
        return replace(self, bundles=bundles, sampler_bundles=tuple(range(len(bundles))), learner_bundles=())

    def total(self) -> dict[str, float]:
        """Everything asked for, by resource."""
        kinds = sorted({kind for bundle in self.bundles for kind in bundle})
        return {kind: sum(bundle.get(kind, 0.0) for bundle in self.bundles) for kind in kinds}


def plan_placement(
    cluster: ClusterConfig,
    learner: LearnerConfig,
    sampler: SamplerConfig,
    *,
    cluster_gpus: float,
    may_colocate: bool = True,
) -> Placement:
    """Lays the actors out over bundles.

    Args:
        may_colocate: `auto` may mean colocated.

    Raises:
        ResourcesError: colocated without GPUs, with more than one of each, or with GPUs per actor given; GPUs per actor
            not given and none there yet to go by.
    """
    on_gpu = cluster_gpus > 0
    if cluster.autoscaling and not on_gpu and None in (learner.num_gpus, sampler.num_gpus):
        raise ResourcesError(
            "the cluster has no GPU now, and cluster.autoscaling may bring some: what is there does not tell whether "
            "actors are to have GPUs. Give learner.num_gpus and sampler.num_gpus (0: none)."
        )
    learner_gpus = (1.0 if on_gpu else 0.0) if learner.num_gpus is None else learner.num_gpus
    sampler_gpus = (float(sampler.tensor_parallel) if on_gpu else 0.0) if sampler.num_gpus is None else sampler.num_gpus
    one_each = (sampler.num_replicas, learner.num_ranks, sampler.tensor_parallel) == (1, 1, 1)
    one_gpu = 0 < cluster_gpus < 2 and not cluster.autoscaling and learner.num_gpus is None and sampler.num_gpus is None
    if cluster.placement == "colocated" or (cluster.placement == "auto" and may_colocate and one_each and one_gpu):
        return _colocated(learner, sampler, learner_gpus)
    learner_bundle = _bundle(learner.num_cpus, learner_gpus, learner.resources)
    sampler_bundle = _bundle(sampler.num_cpus, sampler_gpus, sampler.resources)
    ranks, replicas = learner.num_ranks, sampler.num_replicas
    return Placement(
        bundles=(*(dict(learner_bundle) for _ in range(ranks)), *(dict(sampler_bundle) for _ in range(replicas))),
        learner_bundles=tuple(range(ranks)),
        sampler_bundles=tuple(range(ranks, ranks + replicas)),
        sampler_gpus=sampler_gpus,
        learner_gpus=learner_gpus,
    )


def _colocated(learner: LearnerConfig, sampler: SamplerConfig, learner_gpus: float) -> Placement:
    if learner_gpus == 0:
        raise ResourcesError(
            "cluster.placement is colocated, but there are no GPUs to share. Use split, or join a cluster with GPUs."
        )
    if (sampler.num_replicas, learner.num_ranks, sampler.tensor_parallel) != (1, 1, 1):
        raise ResourcesError(
            f"colocated is one sampler and one learner rank on one GPU; seen sampler.num_replicas "
            f"{sampler.num_replicas}, learner.num_ranks {learner.num_ranks}, sampler.tensor_parallel "
            f"{sampler.tensor_parallel}. Make all of them 1, or use split."
        )
    if learner.num_gpus is not None or sampler.num_gpus is not None:
        raise ResourcesError(
            f"colocated gives each half of one GPU; seen learner.num_gpus {learner.num_gpus}, sampler.num_gpus "
            f"{sampler.num_gpus}. Leave both out, or use split."
        )
    both = dict(Counter(learner.resources) + Counter(sampler.resources))
    return Placement(
        bundles=(_bundle(learner.num_cpus + sampler.num_cpus, 1.0, both),),
        learner_bundles=(0,),
        sampler_bundles=(0,),
        sampler_gpus=0.5,
        learner_gpus=0.5,
        colocated=True,
    )


def _bundle(num_cpus: float, num_gpus: float, custom: Mapping[str, float]) -> dict[str, float]:
    bundle = {"CPU": num_cpus, "GPU": num_gpus, **custom}
    # Ray refuses an empty bundle; a sliver of CPU stands for "anywhere".
    return {kind: amount for kind, amount in bundle.items() if amount > 0} or {"CPU": 0.001}


def check_fits(placement: Placement, available: Mapping[str, float], nodes: list[Mapping[str, float]]) -> None:
    """Raises ResourcesError when the cluster as a whole, or every single node for one bundle, has too little.

    Args:
        available: free resources of the whole cluster.
        nodes: total resources of each live node.
    """
    asked = placement.total()
    short = {k: v for k, v in asked.items() if v > available.get(k, 0.0) + EPSILON}
    if short or _unplaceable(placement, nodes):
        raise ResourcesError(shortage(placement, available, nodes))


def shortage(placement: Placement, available: Mapping[str, float], nodes: list[Mapping[str, float]]) -> str:
    """Asked against available, in words, and the actor that no node could hold if there is one."""
    unplaceable = _unplaceable(placement, nodes)
    return (
        f"the cluster cannot place this run ({asked_and_available(placement, available)}). Lower learner.num_ranks, "
        "learner.num_cpus, sampler.num_replicas or sampler.num_cpus, share a GPU with cluster.placement colocated, or "
        "add nodes (where an autoscaler does: cluster.autoscaling)."
        + (_bundle_note(unplaceable[0], nodes) if unplaceable else "")
    )


def asked_and_available(placement: Placement, available: Mapping[str, float]) -> str:
    """Each resource, and for how many actors."""
    rows = ", ".join(
        f"{kind}: asked {amount:g}, available {available.get(kind, 0.0):g}"
        for kind, amount in placement.total().items()
    )
    return f"{rows}; {len(placement.learner_bundles)} learner rank(s), {len(placement.sampler_bundles)} sampler(s)"


def _unplaceable(placement: Placement, nodes: list[Mapping[str, float]]) -> list[dict[str, float]]:
    return [bundle for bundle in placement.bundles if not any(fits_node(bundle, node) for node in nodes)]


def fits_node(bundle: Mapping[str, float], node: Mapping[str, float]) -> bool:
    return all(node.get(kind, 0.0) + EPSILON >= amount for kind, amount in bundle.items())


def _bundle_note(bundle: Mapping[str, float], nodes: list[Mapping[str, float]]) -> str:
    """Beside the node that comes closest: the most of the kinds, then the most of what it has too little of."""

    def closeness(node: Mapping[str, float]) -> tuple[int, float]:
        shares = [min(1.0, node.get(kind, 0.0) / amount) for kind, amount in bundle.items()]
        return sum(share == 1.0 for share in shares), sum(shares)

    closest = max(nodes, key=closeness, default={})
    wanted = ", ".join(f"{kind} {amount:g}" for kind, amount in bundle.items())
    has = ", ".join(f"{kind} {closest.get(kind, 0.0):g}" for kind in bundle)
    return f" One actor needs {wanted} on one node; the closest node has {has}."
