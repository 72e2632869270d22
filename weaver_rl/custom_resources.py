"""Resources that nodes of a Ray cluster were started with by names of their own, as a configuration asks for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated

from pydantic import AfterValidator


def _custom(resources: dict[str, float]) -> dict[str, float]:
    own = {"CPU": "num_cpus", "GPU": "num_gpus"}
    for name, amount in resources.items():
        if name.upper() in own:
            raise ValueError(f"{name} is no custom resource: give {own[name.upper()]}, where the section has that")
        if amount <= 0:
            raise ValueError(f"{name}: more than 0 is needed, seen {amount:g}")
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
