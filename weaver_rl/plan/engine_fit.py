"""The costs of an engine's steps from the times at which groups came back. It knows nothing of learner and rewards.

The recorded groups go through the simulated scheduler at the times at which they were dispatched. When a group ends,
so many steps, tokens and prompt tokens have passed since the engine was last idle, and so many seconds were measured:
least squares over all groups gives the cost of each. As the schedule depends on the costs, that is done a few times.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from weaver_rl.plan.least_squares import Float64Array, fit_nonnegative
from weaver_rl.plan.machine import EffectiveClock
from weaver_rl.plan.simulated_engine import EngineCosts, EngineLimits, SimulatedEngine
from weaver_rl.plan.trace import Trace, TracedGroup

NUM_ROUNDS = 5
MIN_CONTRAST = 0.15
"""Variation, from wave to wave, of the sequences in a step. Below it costs per step and per token look alike."""
SHARE_ON_CPU, SHARE_ON_GPU = 0.15, 0.7
"""The guess then: a CPU computes what it is given; a GPU reads all weights for one sequence as for a hundred."""
MIN_GAIN = 0.1
"""Share of the squared error that taking in waves and sequences must explain, to count as work of its own."""
SETTLED = 1e-3
"""Relative change of every cost below which another round would change nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFit:
    """The costs, and how far each step was from them."""

    costs: EngineCosts
    pace: Mapping[int, float]
    """Measured over modelled seconds of the groups that a step trained."""
    num_observed: int
    guessed_share: float | None
    """Share of an engine step that stays however few sequences run, where the trace could not tell; else None."""
    serial_share: float
    """Of an engine's seconds: what runs on one core, whatever the threads."""

    def mean_threads(self, num_threads: float) -> float:
        """Cores on which an engine of so many threads computes on average."""
        return self.serial_share + (1 - self.serial_share) * num_threads


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wave:
    """Groups that came to a sampler together."""

    at: float
    """In seconds of work."""
    groups: tuple[TracedGroup, ...]

    @property
    def longest(self) -> int:
        return max(max(group.lengths_G) for group in self.groups)


@dataclass(slots=True)
class _Observations:
    amounts: list[Float64Array] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    groups: list[TracedGroup] = field(default_factory=list)
    since_dispatch: list[float] = field(default_factory=list)
    modelled: list[float] = field(default_factory=list)


def fit_engine(trace: Trace, clock: EffectiveClock) -> EngineFit:
    """Fits the engines of a trace, all of them to one set of costs."""
    waves = _waves(trace, clock)
    limits = EngineLimits.of(trace.config.sampler, trace.config.rollout.sampling.max_tokens)
    costs = EngineCosts(per_wave=0.0, per_sequence=0.0, per_step=1e-3, per_token=1e-5, per_prompt_token=1e-6)
    num_running = [sum(g.num_tokens for g in w.groups) / w.longest for of in waves.values() for w in of]
    share = None
    if num_running and np.std(num_running) < MIN_CONTRAST * np.mean(num_running):
        share = SHARE_ON_CPU if trace.on_cpu else SHARE_ON_GPU
    for _ in range(NUM_ROUNDS):
        seen = _replay_all(waves, limits, costs, clock)
        if not seen.amounts:
            break
        before = costs.as_array()
        costs = EngineCosts.of_array(_coefficients(seen, share))
        if np.allclose(costs.as_array(), before, rtol=SETTLED, atol=1e-9):
            break
    seen = _replay_all(waves, limits, costs, clock)
    seconds = sum(seen.amounts, np.zeros(5)) * costs.as_array()
    return EngineFit(
        costs=costs,
        pace=_pace(seen),
        num_observed=len(seen.amounts),
        guessed_share=share,
        serial_share=float(seconds[:3].sum() / seconds.sum()) if seconds.sum() else 0.0,
    )


def _coefficients(seen: _Observations, share: float | None) -> Float64Array:
    amounts = np.array(seen.amounts)
    seconds = np.array(seen.seconds)
    # Relative errors count: a stretch in which the machine was slow is no better witness than any other.
    weights = 1 / np.maximum(seconds, 1e-6) ** 2
    few = _restricted(amounts, seconds, weights, share, with_intake=False)
    many = _restricted(amounts, seconds, weights, share, with_intake=True)

    def error(coefficients: Float64Array) -> float:
        return float((weights * (seconds - amounts @ coefficients) ** 2).sum())

    # Waves that are all alike have the same intake as they have steps: it is believed in only where it explains more.
    return many if error(many) < (1 - MIN_GAIN) * error(few) else few


def _restricted(
    amounts: Float64Array, seconds: Float64Array, weights: Float64Array, share: float | None, *, with_intake: bool
) -> Float64Array:
    """The costs that fit best; what belongs together by the guess, or is left out, takes no coefficient of its own."""
    num_running = amounts[:, 3].sum() / amounts[:, 2].sum()
    directions = np.eye(len(amounts[0]))
    if share is not None:
        directions[2] = [0.0, 0.0, share, (1 - share) / num_running, 0.0]
        directions = np.delete(directions, 3, axis=0)
    if not with_intake:
        directions = directions[2:]
    found: Float64Array = fit_nonnegative(amounts @ directions.T, seconds, weights) @ directions
    return found


def _waves(trace: Trace, clock: EffectiveClock) -> dict[str, list[_Wave]]:
    together: dict[tuple[str, int], list[TracedGroup]] = {}
    for group in trace.learned_from:
        if group.times is not None:
            together.setdefault((group.times.sampler, group.times.version), []).append(group)
    waves: dict[str, list[_Wave]] = {}
    for (sampler, _), groups in together.items():
        groups.sort(key=lambda group: group.group_id)
        at = max(group.times.dispatched for group in groups if group.times is not None)
        waves.setdefault(sampler, []).append(_Wave(at=clock(at), groups=tuple(groups)))
    for of_sampler in waves.values():
        of_sampler.sort(key=lambda wave: wave.at)
    return waves


def _replay_all(
    waves: Mapping[str, list[_Wave]], limits: EngineLimits, costs: EngineCosts, clock: EffectiveClock
) -> _Observations:
    seen = _Observations()
    for of_sampler in waves.values():
        _replay(of_sampler, limits, costs, clock, seen)
    return seen


def _replay(
    waves: list[_Wave], limits: EngineLimits, costs: EngineCosts, clock: EffectiveClock, seen: _Observations
) -> None:
    engine = SimulatedEngine(limits)
    coming = list(reversed(waves))
    dispatched: dict[object, float] = {}
    now = begun = 0.0
    amounts = np.zeros(5)

    def take(wave: _Wave) -> None:
        engine.add([(group, group.prompt_tokens, group.lengths_G) for group in wave.groups])
        dispatched.update(dict.fromkeys(wave.groups, wave.at))

    while coming or engine.is_busy:
        if not engine.is_busy:
            wave = coming.pop()
            begun, now = wave.at, wave.at + costs.per_wave
            amounts = np.array([1.0, 0.0, 0.0, 0.0, 0.0])
            take(wave)
        while coming and coming[-1].at + costs.per_wave <= now:
            take(coming.pop())
        leap = engine.plan()
        amounts = amounts + leap.amounts
        now += leap.seconds(costs)
        for ended in engine.finish():
            group = ended.key
            assert isinstance(group, TracedGroup)
            assert group.times is not None
            measured = clock(group.times.generated)
            seen.amounts.append(amounts)
            seen.seconds.append(measured - begun)
            seen.groups.append(group)
            seen.since_dispatch.append(measured - dispatched[group])
            seen.modelled.append(now - dispatched[group])


def _pace(seen: _Observations) -> dict[int, float]:
    measured: dict[int, float] = {}
    modelled: dict[int, float] = {}
    for group, seconds, model in zip(seen.groups, seen.since_dispatch, seen.modelled, strict=True):
        # The last group of a wave is what a step waits for.
        measured[group.step] = max(measured.get(group.step, 0.0), seconds)
        modelled[group.step] = max(modelled.get(group.step, 0.0), model)
    return {step: measured[step] / modelled[step] for step in measured if modelled[step] > 0}
