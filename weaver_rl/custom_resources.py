"""Resources that nodes of a Ray cluster were started with by names of their own, as a configuration asks for them."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator


def _custom(resources: dict[str, float]) -> dict[str, float]:
    own = {"CPU": "num_cpus", "GPU": "num_gpus"}
    for name, amount in resources.items():
        if name.upper() in own:
            raise ValueError(f"{name} is no custom resource: give {own[name.upper()]}")
        if amount <= 0:
            raise ValueError(f"{name}: more than 0 is needed, seen {amount:g}")
    return resources


CustomResources = Annotated[dict[str, float], AfterValidator(_custom)]
"""Amounts by the names that nodes were started with (`ray start --resources`)."""
