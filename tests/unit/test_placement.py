"""Bundles that a configuration comes to, and the words for a cluster that is too small."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from weaver_rl.engines.config import SamplerConfig
from weaver_rl.errors import ResourcesError
from weaver_rl.learner.config import LearnerConfig
from weaver_rl.placement import ClusterConfig, check_fits, plan_placement

pytestmark = pytest.mark.unit

COLOCATED = ClusterConfig(placement="colocated")


def plan(cluster: ClusterConfig = ClusterConfig(), *, gpus: float = 0, learner=None, sampler=None):  # noqa: B008
    return plan_placement(
        cluster, LearnerConfig(**(learner or {})), SamplerConfig(**(sampler or {})), cluster_gpus=gpus
    )


def test_split_on_cpus_gives_each_actor_its_bundle():
    placement = plan(learner={"num_ranks": 2, "num_cpus": 3}, sampler={"num_replicas": 3, "num_cpus": 0.5})
    assert placement.bundles == ({"CPU": 3},) * 2 + ({"CPU": 0.5},) * 3
    assert placement.learner_bundles == (0, 1)
    assert placement.sampler_bundles == (2, 3, 4)
    assert placement.total() == {"CPU": 7.5}
    assert (placement.learner_gpus, placement.sampler_gpus) == (0, 0)


def test_split_on_gpus_takes_one_per_rank_and_tensor_parallel_per_sampler():
    placement = plan(gpus=8, learner={"num_ranks": 4}, sampler={"num_replicas": 2, "tensor_parallel": 2})
    assert placement.total()["GPU"] == 8
    assert all(placement.bundles[index]["GPU"] == 1 for index in placement.learner_bundles)
    assert len(placement.sampler_bundles) == 2
    assert len(set(placement.sampler_bundles) | set(placement.learner_bundles)) == 6


def test_gpus_that_are_given_win_over_what_the_cluster_has():
    assert plan(gpus=8, learner={"num_gpus": 0}, sampler={"num_gpus": 0}).total() == {"CPU": 2}
    assert plan(gpus=0, learner={"num_gpus": 2}).total()["GPU"] == 2


def test_an_actor_that_asks_for_nothing_still_has_a_bundle():
    placement = plan(sampler={"num_cpus": 0})
    assert all(bundle and all(amount > 0 for amount in bundle.values()) for bundle in placement.bundles)


def test_colocated_shares_one_gpu():
    placement = plan(COLOCATED, gpus=1)
    assert placement.bundles == ({"CPU": 2, "GPU": 1},)
    assert placement.learner_bundles == placement.sampler_bundles == (0,)
    assert placement.learner_gpus + placement.sampler_gpus == 1


def test_colocated_without_gpus_is_refused():
    with pytest.raises(ResourcesError, match=r"no GPUs to share. Use split"):
        plan(COLOCATED)


@pytest.mark.parametrize(
    "changes",
    [{"sampler": {"num_replicas": 2}}, {"learner": {"num_ranks": 2}}, {"sampler": {"tensor_parallel": 2}}],
)
def test_colocated_is_one_to_one(changes):
    with pytest.raises(ResourcesError, match=r"seen sampler.num_replicas \d, learner.num_ranks \d"):
        plan(COLOCATED, gpus=8, **changes)


def test_a_cluster_that_has_enough_passes():
    check_fits(plan(), {"CPU": 2.0}, [{"CPU": 1.0}, {"CPU": 1.0}])


def test_sums_of_fractions_fit_exactly():
    placement = plan(learner={"num_ranks": 1, "num_cpus": 0.1}, sampler={"num_replicas": 2, "num_cpus": 0.1})
    assert placement.total()["CPU"] > 0.3
    check_fits(placement, {"CPU": 0.3}, [{"CPU": 0.3}])


def test_too_few_resources_print_asked_and_available():
    placement = plan(gpus=4, learner={"num_ranks": 4}, sampler={"num_replicas": 2})
    with pytest.raises(ResourcesError) as short:
        check_fits(placement, {"CPU": 64.0, "GPU": 4.0}, [{"CPU": 64.0, "GPU": 4.0}])
    assert "GPU: asked 6, available 4" in str(short.value)
    assert "4 learner rank(s), 2 sampler(s)" in str(short.value)
    assert "one node" not in str(short.value)


def test_a_resource_the_cluster_does_not_know_is_available_zero_times():
    with pytest.raises(ResourcesError, match="GPU: asked 2, available 0"):
        check_fits(plan(gpus=2), {"CPU": 4.0}, [{"CPU": 4.0}])


def test_a_single_gpu_is_shared_unless_the_run_says_otherwise():
    assert plan(gpus=1).total()["GPU"] == 1.0
    assert plan(gpus=1).colocated
    assert not plan(gpus=2).colocated
    assert not plan(gpus=1, sampler={"num_replicas": 2}).colocated
    assert not plan(gpus=1, learner={"num_gpus": 0.25}).colocated
    assert not plan(gpus=0).colocated


def test_custom_resources_are_part_of_each_bundle_of_the_role():
    kinds = {"learner": {"resources": {"learner": 1}}, "sampler": {"num_replicas": 2, "resources": {"sampler": 0.5}}}
    placement = plan(gpus=4, **kinds)
    assert placement.bundles[0] == {"CPU": 1, "GPU": 1, "learner": 1}
    assert placement.bundles[1:] == ({"CPU": 1, "GPU": 1, "sampler": 0.5},) * 2
    kinds["sampler"]["num_replicas"] = 1
    assert plan(COLOCATED, gpus=1, **kinds).bundles == ({"CPU": 2, "GPU": 1, "learner": 1, "sampler": 0.5},)
    with pytest.raises(ResourcesError, match="learner: asked 1, available 0"):
        check_fits(placement, {"CPU": 8.0, "GPU": 4.0, "sampler": 2.0}, [{"CPU": 8.0, "GPU": 4.0, "sampler": 2.0}])


@pytest.mark.parametrize(
    ("name", "amount", "said"),
    [
        ("GPU", 1, "give num_gpus"),
        ("cpu", 1, "num_cpus"),
        ("x", 0, "seen 0"),
        ("x", 1e-5, "0.0001 or more"),
        ("memory", 1e9, "for itself"),
        ("node:a", 1, "for itself"),
    ],
)
def test_a_custom_resource_is_none_of_rays_own_and_more_than_nothing(name: str, amount: float, said: str):
    for section in (LearnerConfig, SamplerConfig):
        with pytest.raises(ValidationError, match=said):
            section(resources={name: amount})


def test_where_nodes_may_come_gpus_are_not_told_from_those_that_are_there():
    growing = ClusterConfig(autoscaling=True)
    for given in ({}, {"learner": {"num_gpus": 1}}, {"sampler": {"num_gpus": 1}}):
        with pytest.raises(ResourcesError, match=r"Give learner.num_gpus and sampler.num_gpus"):
            plan(growing, gpus=0, **given)
    assert plan(growing, gpus=0, learner={"num_gpus": 1}, sampler={"num_gpus": 1}).total()["GPU"] == 2
    assert not plan(growing, gpus=1).colocated


def test_the_node_that_comes_closest_is_a_node_that_is_there():
    nodes = [{"CPU": 8.0}, {"CPU": 2.0, "GPU": 1.0}, {"CPU": 1.0, "GPU": 4.0}]
    with pytest.raises(ResourcesError, match=r"needs CPU 4, GPU 1 on one node; the closest node has CPU 2, GPU 1\."):
        check_fits(plan(gpus=8, learner={"num_cpus": 4}), {"CPU": 99.0, "GPU": 9.0}, nodes)


def test_an_address_with_a_password_is_refused():
    for address in ("anne:secret@head:6379", "ray://anne:secret@head:10001"):
        with pytest.raises(ValidationError, match="RAY_AUTH_TOKEN"):
            ClusterConfig(address=address)
    assert ClusterConfig(address="head:6379").address == "head:6379"


def test_an_actor_larger_than_every_node_is_named():
    placement = plan(learner={"num_cpus": 6})
    with pytest.raises(ResourcesError, match=r"One actor needs CPU 6 on one node; the closest node has CPU 4\."):
        check_fits(placement, {"CPU": 8.0}, [{"CPU": 4.0}, {"CPU": 4.0}])
