"""Who computed when in a recorded run, and so what each role's seconds would have been alone. It fits no costs."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from weaver_rl.plan.machine import EffectiveClock, Interval, Machine, Neighbour, seconds_alone
from weaver_rl.plan.trace import Trace, TracedGroup


class Occupancy:
    """The cores of a recorded run.

    Args:
        sampler_threads: that a sampler computes with, on average.
    """

    def __init__(self, trace: Trace, machine: Machine, sampler_threads: float) -> None:
        self.calls = _calls(trace)
        self._trace = trace
        self._cores = machine.cores
        self._sampler_threads = sampler_threads
        self._samplers = [
            Neighbour(intervals=busy_intervals(groups), num_threads=sampler_threads)
            for groups in _by_sampler(trace).values()
        ]
        self._workers = [
            Neighbour(intervals=[call.computing for call in self.calls if call.worker == worker], num_threads=1.0)
            for worker in range(trace.config.reward_workers.num_workers)
        ]
        learning = [interval for step in trace.steps if (interval := step.learning()) is not None]
        self._learner = Neighbour(
            intervals=learning, num_threads=machine.learner_threads * trace.config.learner.num_ranks
        )

    def sampler_clock(self) -> EffectiveClock:
        """Seconds of a sampler's work."""
        loading = [
            (end, end + step.seconds.get("sync", 0.0))
            for step in self._trace.steps
            if (end := step.learned_at) is not None
        ]
        num_threads = self._sampler_threads * self._trace.config.sampler.num_replicas
        return EffectiveClock([self._learner, *self._workers], loading, num_threads, self._cores)

    def learner_alone(self, interval: Interval) -> float:
        """Seconds of the learner's work in an interval in which it worked."""
        return seconds_alone(interval, [*self._samplers, *self._workers], self._learner.num_threads, self._cores)

    def call_alone(self, call: Call) -> float:
        """Seconds of computing in a reward worker's call."""
        others = (worker for index, worker in enumerate(self._workers) if index != call.worker)
        return seconds_alone(call.computing, [*self._samplers, self._learner, *others], 1.0, self._cores)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One group in a reward worker."""

    group: TracedGroup
    worker: int
    begin: float
    end: float
    side_by_side: bool = False

    @property
    def computing(self) -> tuple[float, float]:
        """What is left of it after the functions' own seconds."""
        functions = max if self.side_by_side else sum
        return self.begin + min(self.end - self.begin, functions(self.group.reward_seconds_G)), self.end


def _calls(trace: Trace) -> list[Call]:
    """Every group from the moment a worker was free for it; who comes first is served first."""
    timed = [(group, group.times) for group in trace.learned_from if group.times is not None]
    timed.sort(key=lambda item: item[1].generated)
    free = [(-math.inf, worker) for worker in range(trace.config.reward_workers.num_workers)]
    calls = []
    for group, times in timed:
        free_at, worker = heapq.heappop(free)
        begin = min(times.scored, max(times.generated, free_at))
        heapq.heappush(free, (times.scored, worker))
        calls.append(Call(group=group, worker=worker, begin=begin, end=times.scored))
    # Seconds that do not fit into their call one after the other went by side by side.
    num_side_by_side = sum(sum(call.group.reward_seconds_G) > call.end - call.begin for call in calls)
    return [replace(call, side_by_side=num_side_by_side > len(calls) / 2) for call in calls]


def _by_sampler(trace: Trace) -> dict[str, list[TracedGroup]]:
    found: dict[str, list[TracedGroup]] = {}
    for group in trace.learned_from:
        if group.times is not None:
            found.setdefault(group.times.sampler, []).append(group)
    return found


def busy_intervals(groups: Sequence[TracedGroup]) -> list[Interval]:
    """When a sampler had any of these groups to sample, in order and apart."""
    spans = sorted((g.times.dispatched, g.times.generated) for g in groups if g.times is not None)
    merged: list[Interval] = []
    for begin, end in spans:
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged
