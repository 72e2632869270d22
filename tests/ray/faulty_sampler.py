"""A sampler with a fault: ever slower answers, or one altered tensor. It is whole again in the process after.

What it does wrong is said by the environment: FAULTS is a directory, and a file there named `slow sampler 0` or
`wrong sampler 1` gives that sampler's first process the fault from the weights version written in the file on.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from actors.object_store import publish
from actors.sampler import Sampler, SamplerSpec
from weaver_rl.rollout import SamplingConfig
from weaver_rl.types import GroupSample, PublishedWeights, SampleRequest

ALTERED = "model.layers.1.mlp.down_proj.weight"
FACTOR = np.float32(1.2)
FIRST_PAUSE_S = 0.5


class FaultySampler(Sampler):
    """What is right in it is the real one."""

    async def start(self, spec: SamplerSpec) -> int:
        self._slow = _claimed(f"slow {spec.name}")
        self._wrong = _claimed(f"wrong {spec.name}")
        self._version = 0
        self._pause_s = FIRST_PAUSE_S
        return await super().start(spec)

    async def generate(
        self, requests: Sequence[SampleRequest], sampling: SamplingConfig
    ) -> AsyncIterator[list[GroupSample]]:
        async for groups in super().generate(requests, sampling):
            if self._slow is not None and self._version >= self._slow:
                await asyncio.sleep(self._pause_s)
                self._pause_s *= 2
            yield groups

    async def load_weights(self, weights: PublishedWeights) -> None:
        self._version = weights.version
        if self._wrong is not None and weights.version >= self._wrong:
            chunks = [dict(await reference) for reference in weights.handle]
            for chunk in chunks:
                if ALTERED in chunk:
                    chunk[ALTERED] = chunk[ALTERED] * FACTOR
            weights = replace(weights, handle=publish(weights.version, chunks).handle)
        await super().load_weights(weights)


def _claimed(fault: str) -> int | None:
    """The version from which on this process has the fault; None when it has none."""
    file = Path(os.environ["FAULTS"]) / fault
    with contextlib.suppress(FileNotFoundError):
        version = int(file.read_text())
        file.unlink()
        return version
    return None
