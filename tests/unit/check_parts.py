"""Runs to check, made of the smallest configuration there is."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from weaver_rl.check.finding import Finding
from weaver_rl.check.resources import ClusterFacts, NodeFacts
from weaver_rl.check.subject import RunUnderCheck
from weaver_rl.config import load_config

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "ray" / "tiny.yaml"
GIB = 1 << 30


def node(name: str = "n0", *, cpus: float = 8, gpus: float = 0, **more) -> NodeFacts:
    resources = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
    return NodeFacts(name=name, resources=resources, **{"memory_bytes": 64 * GIB} | more)


def cluster(
    *nodes: NodeFacts, address: str | None = None, free: dict[str, float] | None = None, **more
) -> ClusterFacts:
    nodes = nodes or (node(),)
    totals = {kind: sum(n.resources.get(kind, 0) for n in nodes) for kind in ("CPU", "GPU")}
    return ClusterFacts(address=address, nodes=nodes, available=totals if free is None else free, **more)


def a_run(*overrides: str, facts: ClusterFacts | None = None, config: Path = TINY, **more) -> RunUnderCheck:
    return RunUnderCheck.of(load_config(config, overrides), cluster=lambda: facts or cluster(), **more)


def lines(found: Iterable[object]) -> dict[str, Finding]:
    """The last finding about each subject."""
    return {finding.subject: finding for finding in found if isinstance(finding, Finding)}
