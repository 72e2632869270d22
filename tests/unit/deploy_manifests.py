"""Reads what `deploy/` has for Kubernetes, and holds it against the schemas. Strict: an unknown field is an error."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from referencing import Registry, Resource

ROOT = Path(__file__).resolve().parents[2]
KUBERAY = ROOT / "deploy" / "kuberay"
KUBERNETES = "v1.37.0-local-strict"
"""Kubernetes' schemas of that version, of the package kubernetes-validate."""
RAY_KINDS = ("RayCluster", "RayJob")


def documents(*names: str) -> list[dict[str, Any]]:
    """The objects of the manifests (all of them without names), in order."""
    files = [KUBERAY / name for name in names] or sorted(KUBERAY.glob("*.yaml"))
    return [item for file in files for item in yaml.safe_load_all(file.read_text()) if item]


def one(kind: str, *names: str) -> dict[str, Any]:
    """The only object of that kind."""
    (found,) = (item for item in documents(*names) if item["kind"] == kind)
    return found


def mistakes(item: dict[str, Any]) -> list[str]:
    """What a Kubernetes API server, or KubeRay's types, would refuse or drop: place and reason."""
    validator = _validator(item["kind"], item["apiVersion"])
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(item)]


@cache
def _validator(kind: str, api_version: str) -> jsonschema.protocols.Validator:
    definitions = _kubernetes("_definitions.json")
    registry: Registry[Any] = Resource.from_contents(definitions) @ Registry()
    if kind in RAY_KINDS:
        ours = json.loads((Path(__file__).parent / "schemas" / "kuberay-v1.json").read_text())
        registry = Resource.from_contents(ours) @ registry
        schema: Any = {"$ref": f"{ours['$id']}#/$defs/{kind}"}
    else:
        group = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", api_version)
        schema = _kubernetes(f"{kind.lower()}-{group}.json")
        registry = Resource.from_contents(schema) @ registry
    return jsonschema.Draft202012Validator(schema, registry=registry)


def _kubernetes(name: str) -> Any:
    # Only its data are wanted; importing it would ask for packages that nothing else here needs.
    package = importlib.util.find_spec("kubernetes_validate")
    assert package is not None, "pip install kubernetes-validate"
    assert package.origin is not None
    return json.loads((Path(package.origin).parent / "kubernetes-json-schema" / KUBERNETES / name).read_text())


def cluster_spec(item: dict[str, Any]) -> dict[str, Any]:
    """The cluster of a RayCluster, or the one that a RayJob makes."""
    spec: dict[str, Any] = item["spec"] if item["kind"] == "RayCluster" else item["spec"]["rayClusterSpec"]
    return spec


def ray_clusters() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every Ray cluster, by the name of its object."""
    for item in documents():
        if item["kind"] in RAY_KINDS:
            yield item["metadata"]["name"], cluster_spec(item)


def pod_specs() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod that the manifests make, with where it stands."""
    for item in documents():
        name = f"{item['kind']} {item['metadata']['name']}" if "metadata" in item else item["kind"]
        if item["kind"] in RAY_KINDS:
            spec = cluster_spec(item)
            yield f"{name}, head", spec["headGroupSpec"]["template"]["spec"]
            for group in spec["workerGroupSpecs"]:
                yield f"{name}, {group['groupName']}", group["template"]["spec"]
        if item["kind"] == "RayJob":
            yield f"{name}, submitter", item["spec"]["submitterPodTemplate"]["spec"]
        if item["kind"] == "Deployment":
            yield name, item["spec"]["template"]["spec"]


def node_resources(group: dict[str, Any]) -> dict[str, float]:
    """What Ray finds on a node of that group: the first container's limits, or rayStartParams."""
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    params = group.get("rayStartParams", {})
    found = {
        "CPU": float(params.get("num-cpus", quantity(limits["cpu"]))),
        "GPU": float(params.get("num-gpus", limits.get("nvidia.com/gpu", 0))),
        **json.loads(params.get("resources", '"{}"')[1:-1].replace("\\", "")),
    }
    return {kind: amount for kind, amount in found.items() if amount}


def object_store_bytes(group: dict[str, Any]) -> int:
    """What Ray gives its object store on such a node: as told, else 30 % of the memory and 95 % of /dev/shm at most."""
    pod = group["template"]["spec"]
    (shared,) = (v["emptyDir"]["sizeLimit"] for v in pod["volumes"] if v.get("emptyDir", {}).get("medium") == "Memory")
    most = int(0.95 * quantity(shared))
    told = group.get("rayStartParams", {}).get("object-store-memory")
    if told is not None:
        assert int(told) <= most  # else Ray does not start
        return int(told)
    return min(most, int(0.3 * quantity(pod["containers"][0]["resources"]["limits"]["memory"])))


def quantity(text: str) -> float:
    """Kubernetes' way to write an amount."""
    number, unit = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(text)).groups()  # type: ignore[union-attr]
    return float(number) * {"": 1, "m": 1e-3, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}[unit]


def config_files(name: str, *manifests: str) -> dict[str, str]:
    """The files of a ConfigMap."""
    (found,) = (
        item["data"]
        for item in documents(*manifests)
        if item["kind"] == "ConfigMap" and item["metadata"]["name"] == name
    )
    return dict(found)
