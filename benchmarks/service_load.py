"""Callers that each ask again as soon as they were answered, and what they measured. It knows nobody who answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import numpy as np

Ask = Callable[[int, int], Awaitable[tuple[int, ...]]]
"""Given the numbers of caller and request, sends the request; returns the tokens of its completion."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """So many at a time, so many in all."""

    num_callers: int
    num_requests: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What callers ask for: request i is one completion of prompt i, its seed i."""

    prompts: tuple[tuple[int, ...], ...]
    max_tokens: int
    levels: tuple[Level, ...]
    """One after the other; each begins with request 0."""

    @staticmethod
    def of(levels: tuple[Level, ...], *, vocab_size: int, prompt_tokens: int, max_tokens: int) -> Load:
        """Prompts of one length, and shorter than a block of the engine's prefix cache: nobody finds one in it."""
        num_prompts = max(level.num_requests for level in levels)
        token_ids = np.random.default_rng(0).integers(0, vocab_size, size=(num_prompts, prompt_tokens))
        return Load(prompts=tuple(map(tuple, token_ids.tolist())), max_tokens=max_tokens, levels=levels)


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One level, once."""

    level: Level
    seconds: float
    latencies_s: tuple[float, ...]
    """Of each request, from sending it to having its tokens."""
    digest: int
    """Of all tokens: who answered with the same completions has the same."""
    cpu_s: dict[str, float]
    """Processor seconds of each process that took part."""
    num_polls: int = 0
    """Requests besides the one that submits."""

    @property
    def requests_per_s(self) -> float:
        return self.level.num_requests / self.seconds

    def latency_ms(self, percent: float) -> float:
        return 1000 * float(np.percentile(self.latencies_s, percent))

    def cpu_ms(self, *parts: str) -> float:
        """A request's share of the time of those processes that took part."""
        return 1000 * sum(self.cpu_s.get(part, 0.0) for part in parts) / self.level.num_requests


async def closed_loop(
    level: Level, ask: Ask, cpu_s: Callable[[], dict[str, float]], num_polls: Callable[[], int] = lambda: 0
) -> Served:
    """Asks for all requests of a level; the counters are read before and after."""
    numbers = iter(range(level.num_requests))
    completions: dict[int, tuple[int, ...]] = {}
    latencies_s: dict[int, float] = {}

    async def call(caller: int) -> None:
        for number in numbers:
            started = time.perf_counter()
            completions[number] = await ask(caller, number)
            latencies_s[number] = time.perf_counter() - started

    cpu_before, polls_before = cpu_s(), num_polls()
    started = time.perf_counter()
    await asyncio.gather(*(call(caller) for caller in range(level.num_callers)))
    seconds = time.perf_counter() - started
    return Served(
        level=level,
        seconds=seconds,
        latencies_s=tuple(latencies_s.values()),
        digest=hash(tuple(completions[number] for number in range(level.num_requests))) & 0xFFFFFFFF,
        cpu_s={part: after - cpu_before[part] for part, after in cpu_s().items()},
        num_polls=num_polls() - polls_before,
    )
