"""Resources that nodes of a Ray cluster were started with by names of their own, as a configuration asks for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated

from pydantic import AfterValidator

LEAST = 1e-4
"""What Ray counts resources in."""
_SECTION_KEYS = {"cpu": "num_cpus", "gpu": "num_gpus"}
_OF_RAY = ("memory", "object_store_memory", "bundle")


def _custom(resources: dict[str, float]) -> dict[str, float]:
    for name, amount in resources.items():
        if name.lower() in _SECTION_KEYS:
            key = _SECTION_KEYS[name.lower()]
            raise ValueError(f"{name} is no custom resource: give {key}, where the section has that")
        if not name or name.lower() in _OF_RAY or ":" in name:
            raise ValueError(f"{name!r} is a name that Ray keeps for itself; give one that nodes were started with")
        if amount < LEAST:
            raise ValueError(f"{name}: {LEAST:g} or more is needed, seen {amount:g}")
    return resources


CustomResources = Annotated[dict[str, float], AfterValidator(_custom)]
"""Amounts by the names that nodes were started with (`ray start --resources`)."""


def in_words(resources: Mapping[str, float]) -> str:
    """`reward 1, disk 2`."""
    return ", ".join(f"{name} {amount:g}" for name, amount in resources.items())


def nodes_with(resources: Iterable[str], nodes: Iterable[tuple[str, Mapping[str, float]]]) -> str:
    """Which of the nodes (name, all that it has) have any of these, and how much, in words."""
    names = tuple(resources)
    there = [(node, {name: has[name] for name in names if has.get(name)}) for node, has in nodes]
    return ", ".join(f"{node} ({in_words(has)})" for node, has in there if has) or "none"
