"""deploy/ray: what Ray's own launcher says of the files before it starts anything, and whether a run finds room."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from autoscaler_nodes import nodes_made

from weaver_rl.config import load_config
from weaver_rl.placement import check_fits, plan_placement

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "deploy" / "ray").glob("*.yaml"))
PREPARE = """
import json, sys, yaml
from ray.autoscaler._private.util import prepare_config, validate_config
for path in sys.argv[1:]:
    config = prepare_config(yaml.safe_load(open(path)))
    validate_config(config)
    print(json.dumps(config))
"""
"""What `ray up` does before it asks the cloud; in a process of its own, because it imports Ray."""


def ray_file(*names: str) -> Path:
    package = importlib.util.find_spec("ray")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).parent.joinpath(*names)


@pytest.fixture(scope="module")
def prepared() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", PREPARE, *map(str, FILES)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return {path.stem: json.loads(line) for path, line in zip(FILES, lines, strict=True)}


def test_hosts_and_one_cloud_are_there():
    assert {path.stem for path in FILES} == {"aws", "on-premises"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_what_the_schema_of_ray_allows(path: Path):
    schema = json.loads(ray_file("autoscaler", "ray-schema.json").read_text())
    jsonschema.validate(yaml.safe_load(path.read_text()), schema)
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        jsonschema.validate(yaml.safe_load(path.read_text()) | {"max_worker": 3}, schema)


def test_the_launcher_fills_in_the_rest(prepared: dict[str, Any]):
    local = prepared["on-premises"]
    (kind,) = local["available_node_types"].values()
    assert kind["min_workers"] == kind["max_workers"] == len(local["provider"]["worker_ips"])
    assert local["head_node_type"] in local["available_node_types"]
    assert prepared["aws"]["available_node_types"].keys() == {"head", "learners", "samplers", "rewards"}


def test_the_configuration_that_the_sizes_are_for_fits(prepared: dict[str, Any]):
    kinds = prepared["aws"]["available_node_types"]
    roles = ("learner", "sampler")
    given = [f"{role}.{key}" for role in roles for key in ("num_gpus=1", f"resources={{{role}: 1}}")]
    given += ["reward_workers.resources={reward: 1}"]
    config = load_config(ROOT / "configs" / "gsm8k_8gpu.yaml", [*given, "cluster.autoscaling=true"])
    placement = plan_placement(config.cluster, config.learner, config.sampler, cluster_gpus=0.0)
    made = nodes_made(prepared["aws"], placement.bundles)
    assert made == {"learners": 1, "samplers": 4}
    nodes = [kinds[name]["resources"] for name in made for _ in range(made[name])]
    free = {kind: float(sum(node.get(kind, 0) for node in nodes)) for kind in ("CPU", "GPU", "learner", "sampler")}
    check_fits(placement, free, nodes)
    assert kinds["samplers"]["max_workers"] > config.sampler.num_replicas
    workers = config.reward_workers
    assert nodes_made(prepared["aws"], [workers.resources] * workers.num_workers) == {"rewards": 2}
    kinds_of_workers = ("learners", "samplers", "rewards")
    assert prepared["aws"]["max_workers"] >= sum(kinds[name]["max_workers"] for name in kinds_of_workers)


def test_weights_of_that_size_fit_the_shared_memory_of_the_machines(prepared: dict[str, Any]):
    # README's 7.6 billion parameters in float32; g6e.2xlarge has 64 GiB of memory, of which the system keeps a part.
    version, gib = 4 * 7_615_616_512, 2**30
    (shared,) = re.findall(r"--shm-size=(\d+)g", " ".join(prepared["aws"]["docker"]["run_options"]))
    (share,) = re.findall(
        r"MEMORY_PROPORTION=([\d.]+) ray start", " ".join(prepared["aws"]["worker_start_ray_commands"])
    )
    instances = {
        name: kind["node_config"]["InstanceType"] for name, kind in prepared["aws"]["available_node_types"].items()
    }
    assert (instances["learners"], instances["samplers"]) == ("g6e.12xlarge", "g6e.2xlarge")
    assert min(0.95 * int(shared) * gib, float(share) * 384 * gib) > 2 * version
    assert min(0.95 * int(shared) * gib, float(share) * 61 * gib) > version
    assert '"RAY_DEFAULT_OBJECT_STORE_MEMORY_PROPORTION"' in ray_file("_private", "ray_constants.py").read_text()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_commands_use_options_that_this_ray_has(path: Path):
    config = yaml.safe_load(path.read_text())
    scripts = ray_file("scripts", "scripts.py").read_text()
    commands = " ".join(config["head_start_ray_commands"] + config["worker_start_ray_commands"])
    options = set(re.findall(r"(--[\w-]+)[ =]", commands + " "))
    assert {"--head", "--port", "--address"} <= options
    assert all(f'"{option}"' in scripts for option in options)
    # The head must be the port that the others look for.
    assert "--port=6379" in commands
    assert "$RAY_HEAD_IP:6379" in commands


def test_hosts_that_anybody_can_reach_ask_for_a_token():
    text = (ROOT / "deploy" / "ray" / "on-premises.yaml").read_text()
    starts = re.findall(r"ulimit[^;]*;(.*?)ray start", text, flags=re.DOTALL)
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=" in start for start in starts)
    # Without one, the dashboard listens for the head itself and for ssh tunnels to it.
    assert "--dashboard-host=127.0.0.1" in (ROOT / "deploy" / "ray" / "aws.yaml").read_text()
