"""What the work of each role costs, fitted to a trace. It simulates only what it needs to tell work from waiting.

Every time is brought to what the work would take alone before anything is fitted: on one CPU machine the seconds in
which another role computed too count as less (`cores`). What the fit leaves over goes into a pace for every recorded
step, so that slow stretches of the recorded machine come back in the simulation, and all roles have them together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from weaver_rl.plan.engine_fit import EngineFit, fit_engine
from weaver_rl.plan.least_squares import Float64Array, fit_nonnegative
from weaver_rl.plan.machine import Machine
from weaver_rl.plan.occupancy import Occupancy
from weaver_rl.plan.simulated_engine import EngineCosts
from weaver_rl.plan.trace import Trace, TracedGroup, TracedStep

QUIETEST = 0.1
"""With samplers at work during a sync its seconds are mostly waits for engine steps: this quantile is without."""
MIN_FOR_TWO = 4
"""Steps without which two coefficients are not asked for."""
PACE_LIMITS = (0.05, 20.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerCosts:
    """Seconds of one step of the learner, at the recorded number of ranks.

    Example:
        LearnerCosts(fixed=0.02, per_token=8e-5, num_ranks=1)
    """

    fixed: float
    """Whatever the batch: the update, a call to every rank."""
    per_token: float
    """Forward and backward of one input token, all ranks together."""
    num_ranks: int

    def seconds(self, num_tokens: float, num_ranks: int, efficiency: float) -> float:
        """With other ranks: each doubling makes the part per token faster by 2 × `efficiency`."""
        doublings: float = math.log2(num_ranks / self.num_ranks)
        return self.fixed + self.per_token * num_tokens / float((2 * efficiency) ** doublings)


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardCosts:
    """Seconds of one call of a reward worker, which scores a group.

    What the functions themselves take may be computing or waiting, nobody knows; the rest (packing, sending, the
    driver) is computing.
    """

    per_call: float
    """Seconds of computing for a call with one rollout or more."""
    per_rollout: float
    """Seconds of computing for each of its rollouts."""
    side_by_side: bool
    """The rollouts of a group are scored at the same time: a call takes as long as its slowest."""
    measured: Mapping[str, float]
    """Seconds of computing, by group id, where they are known."""

    def functions(self, rollouts: Sequence[float]) -> float:
        """What the functions take of a call, given what they take for each rollout."""
        return max(rollouts) if self.side_by_side else sum(rollouts)

    def computing(self, group: TracedGroup, num_rollouts: int) -> float:
        """The rest of a call for some rollouts of a group."""
        if num_rollouts == len(group.lengths_G) and group.group_id in self.measured:
            return self.measured[group.group_id]
        return self.per_call + self.per_rollout * num_rollouts


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How one recorded step went, beside what its work should have cost."""

    sampler: float
    """Factor of the engines' seconds."""
    learner: float
    """Factor of the learner's seconds."""
    sync: float
    """Seconds of the weight sync, alone."""
    driver: float
    """Seconds of the step in which the driver itself was busy: what is outside every stage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Everything that the simulated roles are made of."""

    engine: EngineCosts
    learner: LearnerCosts
    reward: RewardCosts
    paces: Mapping[int, Pace]
    """By recorded step."""
    checkpoint: float
    """Seconds."""
    notes: tuple[str, ...] = ()
    """What could not be told from the trace, in words."""


def fit_costs(trace: Trace, machine: Machine) -> Costs:
    """Costs of all roles of a recorded run."""
    occupancy = Occupancy(trace, machine, machine.sampler_threads)
    engine = fit_engine(trace, occupancy.sampler_clock())
    # Once more, now that it is known on how many cores an engine computes on average.
    occupancy = Occupancy(trace, machine, engine.mean_threads(machine.sampler_threads))
    engine = fit_engine(trace, occupancy.sampler_clock())
    reward = _reward_costs(trace, occupancy)
    learned = {
        step.step: (step.values["learner/num_tokens"], occupancy.learner_alone(interval))
        for step in trace.steps
        if (interval := step.learning()) is not None and "learner/num_tokens" in step.values
    }
    syncs = _syncs(trace)
    learner, notes = _learner_costs(trace, learned)
    paces = {
        step.step: Pace(
            sampler=_within(engine.pace.get(step.step, 1.0)),
            learner=_within(_learner_pace(learned.get(step.step), learner)),
            sync=sync,
            driver=step.seconds["other"] + step.seconds.get("wait", 0.0),
        )
        for step, sync in zip(trace.steps, syncs, strict=True)
    }
    return Costs(
        engine=engine.costs,
        learner=learner,
        reward=reward,
        paces=paces,
        checkpoint=trace.mean_seconds("checkpoint") or 0.0,
        notes=(*notes, *_engine_notes(engine)),
    )


def _within(factor: float) -> float:
    return min(max(factor, PACE_LIMITS[0]), PACE_LIMITS[1])


# -- learner -------------------------------------------------------------------------------------------------------


def _learner_costs(trace: Trace, learning: Mapping[int, tuple[float, float]]) -> tuple[LearnerCosts, tuple[str, ...]]:
    observed = list(learning.values())
    tokens = np.array([number for number, _ in observed])
    seconds = np.array([value for _, value in observed])
    fixed, per_token = fit_line(tokens, seconds)
    notes: tuple[str, ...] = ()
    if fixed == 0.0:
        notes = (
            "the learner's seconds do not show a part that is there whatever the batch: all of them are taken to be in "
            "proportion to the tokens, and so shared out among the ranks",
        )
    costs = LearnerCosts(fixed=float(fixed), per_token=float(per_token), num_ranks=trace.config.learner.num_ranks)
    return costs, notes


def fit_line(amounts_N: Float64Array, seconds_N: Float64Array) -> tuple[float, float]:
    """Seconds at 0 and per unit; the first is 0 unless it is there beyond doubt (two standard errors).

    Relative errors count: a stretch in which the machine was slow is no better witness than any other.
    """
    if len(amounts_N) == 0 or seconds_N.max() <= 0:
        return 0.0, 0.0
    weights = 1 / np.maximum(seconds_N, 1e-6) ** 2
    proportional = float((weights * amounts_N * seconds_N).sum() / (weights * amounts_N**2).sum())
    features = np.stack([np.ones(len(amounts_N)), amounts_N], axis=1)
    fixed, per_unit = (float(value) for value in fit_nonnegative(features, seconds_N, weights))
    if len(amounts_N) < MIN_FOR_TWO or fixed <= 0 or np.ptp(amounts_N) == 0:
        return 0.0, proportional
    root = np.sqrt(weights)
    left = root * (seconds_N - features @ np.array([fixed, per_unit]))
    variance = float((left**2).sum()) / (len(amounts_N) - 2)
    spread = np.linalg.pinv((features * weights[:, None]).T @ features) * variance
    return (fixed, per_unit) if fixed > 2 * math.sqrt(spread[0, 0]) else (0.0, proportional)


def _learner_pace(observed: tuple[float, float] | None, costs: LearnerCosts) -> float:
    if observed is None:
        return 1.0
    tokens, seconds = observed
    modelled = costs.fixed + costs.per_token * tokens
    return seconds / modelled if modelled > 0 else 1.0


# -- rewards -------------------------------------------------------------------------------------------------------


def _reward_costs(trace: Trace, occupancy: Occupancy) -> RewardCosts:
    measured = {call.group.group_id: occupancy.call_alone(call) for call in occupancy.calls}
    mean = sum(measured.values()) / len(measured) if measured else 0.0
    group_size = trace.config.rollout.samples_per_prompt
    # One call with all of them against one with one: nobody measured it; half of it is there whatever is in it.
    return RewardCosts(
        per_call=mean / 2,
        per_rollout=mean / 2 / group_size,
        side_by_side=bool(occupancy.calls) and occupancy.calls[0].side_by_side,
        measured=measured,
    )


# -- the rest ------------------------------------------------------------------------------------------------------


def _syncs(trace: Trace) -> list[float]:
    seconds = [step.seconds.get("sync", 0.0) for step in trace.steps]
    if trace.config.rollout.max_lag == 0:
        return seconds
    quiet = float(np.quantile(seconds, QUIETEST))
    return [min(value, quiet) for value in seconds]


def _engine_notes(fit: EngineFit) -> tuple[str, ...]:
    if fit.num_observed == 0:
        return ("no group of the trace has times of its own: the engines are taken to cost nothing",)
    if fit.guessed_share is not None:
        return (
            f"the engines' batches were all alike: that {fit.guessed_share:.0%} of the seconds of an engine step stay "
            "however few sequences run in it is a GUESS, which other numbers of samplers hang on; completions of very "
            "different lengths, or prompts_per_step changed now and then, would tell",
        )
    return ()


def step_seconds(steps: Sequence[TracedStep]) -> float:
    """Mean of a step without its evaluation and the checkpoint before it."""
    return sum(step.plain_seconds for step in steps) / len(steps)
