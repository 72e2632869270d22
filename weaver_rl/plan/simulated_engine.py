"""A vLLM engine as the sum of its steps: which sequences run in each and how long it takes. It samples nothing.

Continuous batching as vLLM's scheduler does it: running sequences go first, waiting prompts fill up what is left of
`max_num_seqs` and of the token budget of a step, in the order they came; a prompt's step yields its first token. A step
takes `per_step` + `per_token` × sequences that yield a token + `per_prompt_token` × prompt tokens computed. What a
sequence costs does not depend on how long it is already, which holds while attention is a small part of a step; KV
cache that runs out, and sequences that are put back for it, are not modelled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from weaver_rl.engines.config import DEFAULT_MAX_NUM_BATCHED_TOKENS, DEFAULT_MAX_NUM_SEQS, SamplerConfig
from weaver_rl.plan.least_squares import Float64Array

CACHE_BLOCK_TOKENS = 16
"""Whole blocks of a prompt are computed once for all completions of its group."""
LONGEST_LEAP = 64
"""Engine steps that are taken together, of the longest completion there can be: leaps are 1/64 of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCosts:
    """Seconds that an engine takes, and what it may run at once.

    Example:
        EngineCosts(per_wave=0.01, per_sequence=1e-4, per_step=0.004, per_token=2e-4, per_prompt_token=1e-5)
    """

    per_wave: float
    """From asking for some groups to the first step for them, and from the last step back: no work of the engine."""
    per_sequence: float
    """Taking in one completion to sample."""
    per_step: float
    per_token: float
    per_prompt_token: float

    def as_array(self) -> Float64Array:
        return np.array([getattr(self, item.name) for item in fields(self)])

    @staticmethod
    def of_array(values: Float64Array) -> EngineCosts:
        return EngineCosts(**{item.name: float(v) for item, v in zip(fields(EngineCosts), values, strict=True)})

    def with_threads(self, factor: float) -> EngineCosts:
        """With `factor` times the threads: what goes by tokens is that much faster, the rest is Python on one core."""
        return replace(self, per_token=self.per_token / factor, per_prompt_token=self.per_prompt_token / factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """What an engine may run in one step."""

    max_num_seqs: int = DEFAULT_MAX_NUM_SEQS
    max_batched_tokens: int = DEFAULT_MAX_NUM_BATCHED_TOKENS
    caches_prefixes: bool = True
    leap: int = 1
    """Steps taken together while nobody waits to be taken in."""

    @staticmethod
    def of(config: SamplerConfig, longest: int) -> EngineLimits:
        """Those of a run whose longest completion has so many tokens."""
        args = config.engine_args
        return EngineLimits(
            max_num_seqs=int(args.get("max_num_seqs") or DEFAULT_MAX_NUM_SEQS),
            max_batched_tokens=int(args.get("max_num_batched_tokens") or DEFAULT_MAX_NUM_BATCHED_TOKENS),
            caches_prefixes=bool(args.get("enable_prefix_caching", True)),
            leap=max(1, longest // LONGEST_LEAP),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Leap:
    """Some engine steps.

    `amounts`: how much of each of the costs they take, in the order of EngineCosts; the way to the engine is none.
    """

    amounts: Float64Array
    num_steps: int

    def seconds(self, costs: EngineCosts) -> float:
        return float(self.amounts @ costs.as_array())

    def mean_threads(self, costs: EngineCosts, num_threads: float) -> float:
        """Cores on which it computes on average: what does not go by tokens runs on one, whatever the threads."""
        seconds = self.seconds(costs)
        serial = float(self.amounts[:3] @ costs.as_array()[:3])
        return (serial + (seconds - serial) * num_threads) / seconds if seconds > 0 else num_threads


@dataclass(slots=True, eq=False)
class _Group:
    key: object
    num_left: int
    versions: list[list[tuple[int, int]]]
    """Per completion: (version, tokens sampled with it)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedGroup:
    """A group whose last completion has ended. `versions_G`: per completion, (version, number of tokens) in order."""

    key: object
    versions_G: tuple[tuple[tuple[int, int], ...], ...]


class SimulatedEngine:
    """The scheduler of one engine. `plan` says what the next steps take, `finish` makes them so."""

    def __init__(self, limits: EngineLimits, version: int = 0) -> None:
        self._limits = limits
        self._version = version
        self._waiting: deque[tuple[_Group, int, int, int]] = deque()
        self._groups: list[tuple[_Group, int]] = []
        self._left = np.zeros(0, np.int64)
        self._made = np.zeros(0, np.int64)
        self._planned: Leap | None = None
        self._intake = np.zeros(5)

    @property
    def is_busy(self) -> bool:
        return bool(self._waiting) or len(self._left) > 0

    def load(self, version: int) -> None:
        """New weights: what runs goes on with them."""
        for place in range(len(self._left)):
            self._mark(place)
        self._made[:] = 0
        self._version = version

    def _mark(self, place: int) -> None:
        group, index = self._groups[place]
        if number := int(self._made[place]):
            group.versions[index].append((self._version, number))

    def add(self, waves: Sequence[tuple[object, int, Sequence[int]]]) -> None:
        """Groups that came together: key, tokens of the prompt, lengths of the completions."""
        for key, prompt_tokens, lengths in waves:
            group = _Group(key, len(lengths), [[] for _ in lengths])
            cached = (prompt_tokens - 1) // CACHE_BLOCK_TOKENS * CACHE_BLOCK_TOKENS
            rest = prompt_tokens - (cached if self._limits.caches_prefixes else 0)
            for index, length in enumerate(lengths):
                self._waiting.append((group, index, rest if index else prompt_tokens, max(1, length)))
            self._intake[1] += len(lengths)

    def drop(self, keys: set[object]) -> None:
        """Forgets groups that nobody wants any more."""
        self._waiting = deque(item for item in self._waiting if item[0].key not in keys)
        keep = np.array([group.key not in keys for group, _ in self._groups], bool)
        self._groups = [item for item, kept in zip(self._groups, keep, strict=True) if kept]
        self._left, self._made = self._left[keep], self._made[keep]

    def plan(self) -> Leap:
        """What comes next; the prompts that fit in are taken in."""
        budget = self._limits.max_batched_tokens - len(self._left)
        taken: list[tuple[_Group, int, int]] = []
        prompt_tokens = 0
        while self._waiting and len(self._left) + len(taken) < self._limits.max_num_seqs:
            group, index, prompt, length = self._waiting[0]
            if taken and prompt > budget:
                break
            self._waiting.popleft()
            budget -= prompt
            prompt_tokens += prompt
            taken.append((group, index, length))
        if taken:
            self._groups += [(group, index) for group, index, _ in taken]
            self._left = np.concatenate([self._left, np.array([length for *_, length in taken], np.int64)])
            self._made = np.concatenate([self._made, np.zeros(len(taken), np.int64)])
        num_steps = 1
        if not taken and not self._waiting:
            num_steps = int(min(self._limits.leap, self._left.max(initial=1)))
        amounts, self._intake = self._intake, np.zeros(5)
        amounts[2:] = num_steps, np.minimum(self._left, num_steps).sum(), prompt_tokens
        self._planned = Leap(amounts=amounts, num_steps=num_steps)
        return self._planned

    def finish(self) -> list[FinishedGroup]:
        """The planned steps are done; returns the groups that ended with them."""
        assert self._planned is not None
        num_steps, self._planned = self._planned.num_steps, None
        made = np.minimum(self._left, num_steps)
        self._left, self._made = self._left - made, self._made + made
        ended = self._left == 0
        finished: list[FinishedGroup] = []
        if not ended.any():
            return finished
        for place in np.flatnonzero(ended).tolist():
            self._mark(place)
            group = self._groups[place][0]
            group.num_left -= 1
            if group.num_left == 0:
                finished.append(FinishedGroup(key=group.key, versions_G=tuple(map(tuple, group.versions))))
        self._groups = [item for item, out in zip(self._groups, ended.tolist(), strict=True) if not out]
        self._left, self._made = self._left[~ended], self._made[~ended]
        return finished
