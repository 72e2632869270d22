"""A sampler actor whose engine only sleeps as long as generating takes. It loads no model and computes nothing.

A plain class with the methods of `actors.sampler.Sampler` that the fleet calls; `ray.remote` is applied where it is
spawned.
"""

from __future__ import annotations

import asyncio
import bisect
import heapq
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import numpy as np

from actors.identity import Identity, this_process
from actors.sampler import Heartbeat
from weaver_rl.rollout import SamplingConfig
from weaver_rl.types import Completion, Float32Array, GroupSample, Int32Array, PublishedWeights, SampleRequest

SIGMA = 0.4
"""Spread of the logarithm of a completion's seconds: the slowest of 8 takes about 1.7 times the mean."""
LOGPROB = -1.0
"""Of every token, said by fake samplers and fake learner alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How long a completion takes and how long it is.

    Example:
        Pace(mean_seconds=1.5, mean_tokens=64)
    """

    mean_seconds: float
    mean_tokens: int
    """Tokens are in proportion to seconds."""

    def seconds(self, seed: int) -> float:
        """Log-normal, a function of the completion's seed."""
        return self.mean_seconds * float(np.random.default_rng(seed).lognormal(-(SIGMA**2) / 2, SIGMA))


def fake_probe(version: int, num_tokens: int) -> Float32Array:
    """What both sides say to the probe at a version: it moves with the version."""
    return np.full(num_tokens, LOGPROB - 1e-3 * (version % 1000), np.float32)


def stamps(
    loaded_at: Sequence[float], versions: Sequence[int], begun: float, seconds: float, num_tokens: int
) -> Int32Array:
    """Version of each token of a completion whose tokens came at a constant pace.

    Args:
        loaded_at: when each of `versions` was loaded; the first before `begun`.
    """
    first = bisect.bisect_right(loaded_at, begun) - 1
    loaded_after = (np.array(loaded_at[first + 1 :]) - begun) / seconds * num_tokens
    which = np.searchsorted(loaded_after, np.arange(1, num_tokens + 1), side="right")
    return np.array(versions[first:], np.int32)[which]


class SleepingSampler:
    """Answers made-up tokens, each stamped with the version that it held at that token's time."""

    def __init__(self) -> None:
        self.start("", Pace(mean_seconds=1.0, mean_tokens=1))

    def start(self, name: str, pace: Pace) -> None:
        """Begins anew, as another sampler."""
        self._name, self._pace = name, pace
        self._loaded_at, self._versions = [float("-inf")], [-1]
        self._num_groups = 0

    async def generate(
        self, requests: Sequence[SampleRequest], sampling: SamplingConfig
    ) -> AsyncIterator[list[GroupSample]]:
        """Yields groups when their last completion ends; those that end together go together, as a sampler's do."""
        begun = time.monotonic()
        seconds = [[self._pace.seconds(seed) for seed in request.seeds_G] for request in requests]
        ends = [(begun + max(seconds_G), index) for index, seconds_G in enumerate(seconds)]
        heapq.heapify(ends)
        self._num_groups += len(requests)
        try:
            while ends:
                await asyncio.sleep(ends[0][0] - time.monotonic())
                done = []
                while ends and ends[0][0] <= time.monotonic():
                    _, index = heapq.heappop(ends)
                    done.append(self._group(requests[index], seconds[index], begun))
                yield done
        finally:
            self._num_groups -= len(requests)

    async def load_weights(self, weights: PublishedWeights) -> None:
        self._loaded_at.append(time.monotonic())
        self._versions.append(weights.version)

    async def score(self, token_ids: Sequence[int]) -> Float32Array:
        return fake_probe(self._versions[-1], len(token_ids) - 1)

    async def heartbeat(self) -> Heartbeat:
        return Heartbeat(num_steps=time.monotonic_ns(), is_busy=self._num_groups > 0)

    def identity(self) -> Identity:
        return this_process()

    async def close(self) -> None:
        """Nothing to end."""

    def _group(self, request: SampleRequest, seconds_G: Sequence[float], begun: float) -> GroupSample:
        completions = tuple(self._completion(seconds, begun) for seconds in seconds_G)
        return GroupSample(group_id=request.group_id, completions_G=completions, sampler=self._name)

    def _completion(self, seconds: float, begun: float) -> Completion:
        num_tokens = max(1, round(self._pace.mean_tokens * seconds / self._pace.mean_seconds))
        return Completion(
            token_ids_L=np.full(num_tokens, 3, np.int32),
            logprobs_L=np.full(num_tokens, LOGPROB, np.float32),
            versions_L=stamps(self._loaded_at, self._versions, begun, seconds, num_tokens),
            stop_reason="stop",
        )
