"""Many set-ups against one trace: which are tried, how well the recorded one is met, the best. It prints nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from weaver_rl.config import RunConfig
from weaver_rl.errors import UserError, WeaverRLError
from weaver_rl.plan.costs import fit_costs, step_seconds
from weaver_rl.plan.differences import require_comparable
from weaver_rl.plan.machine import Machine
from weaver_rl.plan.simulation import Prediction, SetUp, World, occasional, recorded_set_up, simulate
from weaver_rl.plan.trace import Trace

SAMPLERS = (1, 2, 4, 8)
RANKS = (1, 2, 4)
TOLERANCE = 0.15
"""Relative error of the recorded set-up's step time above which a plan is not to be trusted."""
EFFICIENCY = 0.9
"""Assumed of learner ranks: each doubling makes the part per token 1.8 times as fast."""
AS_GOOD = 0.02
"""Throughput by which a set-up must be ahead for more actors to be worth it."""
MAX_ROLLOUTS = 40_000
"""Rollouts that one simulation may take; bigger steps are simulated fewer times."""
MIN_STEPS = 8
MOST_SAMPLERS = 1024
"""A simulation takes longer the more there are; of so many it takes seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a plan is asked for.

    Example:
        Question(samplers=(1, 2, 4), ranks=(1, 2), max_lags=(0, 1), gpus=8)
    """

    samplers: tuple[int, ...] = ()
    """Numbers of samplers to try; empty: those that suggest themselves."""
    ranks: tuple[int, ...] = ()
    max_lags: tuple[int, ...] = ()
    gpus: int | None = None
    """In all, for samplers and ranks; None: no limit."""
    cpus: int | None = None
    """Cores of the one machine of the plan; None: those of the recorded one."""
    num_steps: int = 30
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What the trace says of its own set-up."""

    step_seconds: float
    """Of a step, with its part of evaluations and checkpoints."""
    tokens_per_s: float
    stage_seconds: Mapping[str, float]
    lag_mean: float
    idle: Mapping[str, float]
    """By the ledger, as a prediction has it; empty where the run kept none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """A set-up that its run would not survive."""

    set_up: SetUp
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that was found."""

    trace: Trace
    measured: Measured
    predicted: Prediction
    """Of the recorded set-up, where it was recorded."""
    tried: tuple[Prediction, ...]
    failed: tuple[Failed, ...]
    assumptions: tuple[str, ...]
    gpus_per_sampler: int
    question: Question

    @property
    def error(self) -> float:
        """Relative error of the step time; positive: predicted too slow."""
        return self.predicted.step_seconds / self.measured.step_seconds - 1

    @property
    def tokens_error(self) -> float:
        return self.predicted.tokens_per_s / self.measured.tokens_per_s - 1

    @property
    def is_trusted(self) -> bool:
        return max(abs(self.error), abs(self.tokens_error)) <= TOLERANCE

    def actors(self, set_up: SetUp) -> int:
        """What a set-up takes: learner ranks, and samplers by their GPUs."""
        return set_up.num_ranks + set_up.num_samplers * self.gpus_per_sampler

    @property
    def best(self) -> Prediction | None:
        """The fastest; of those about as fast the one with the fewest actors, then the lowest lag."""
        if not self.tried:
            return None
        fastest = max(found.tokens_per_s for found in self.tried)
        good = [found for found in self.tried if found.tokens_per_s >= (1 - AS_GOOD) * fastest]
        return min(good, key=lambda p: (self.actors(p.set_up), p.set_up.max_lag, -p.tokens_per_s))

    def worth_it(self) -> list[Prediction]:
        """Those that no set-up with as few actors is as fast as, from few to many."""
        found: list[Prediction] = []
        for prediction in sorted(self.tried, key=lambda p: (self.actors(p.set_up), -p.tokens_per_s)):
            if not found or prediction.tokens_per_s > (1 + AS_GOOD) * found[-1].tokens_per_s:
                found.append(prediction)
        return found


def make_plan(
    config: RunConfig, trace: Trace, question: Question, progress: Callable[[int, int], None] = lambda done, all_: None
) -> Plan:
    """Simulates the recorded set-up and those of the question.

    Args:
        progress: is told how many simulations are done, and of how many.

    Raises:
        UserError: the trace cannot speak for the configuration, or nothing fits into the question.
    """
    require_comparable(config, trace.config)
    if trace.on_cpu and question.gpus is not None:
        raise UserError("--gpus was given, and the trace is of a run on CPUs: its seconds say nothing about GPUs")
    if not trace.on_cpu and question.cpus is not None:
        raise UserError("--cpus was given, and the trace is of a run on GPUs: its seconds say nothing about CPUs")
    # A machine of which nothing is known is taken to be the one that was asked about.
    recorded_cores = (trace.cores or question.cpus) if trace.on_cpu else None
    machine = Machine.of(trace.config, recorded_cores)
    costs = fit_costs(trace, machine)
    own = World(
        config=trace.config,
        trace=trace,
        costs=costs,
        machine=machine,
        cores=recorded_cores,
        num_steps=_num_steps(trace.config, len(trace.steps)),
        efficiency=EFFICIENCY,
        seed=question.seed,
    )
    planned = replace(
        own,
        config=config,
        cores=(question.cpus or recorded_cores) if trace.on_cpu else None,
        num_steps=_num_steps(config, min(question.num_steps, len(trace.steps))),
    )
    set_ups = list(_set_ups(config, trace, question))
    if not set_ups:
        raise UserError(
            f"nothing fits: {question.gpus} GPUs, a sampler takes {config.sampler.tensor_parallel}, a learner rank 1; "
            "give more --gpus, or smaller --samplers and --ranks"
        )
    progress(0, len(set_ups) + 1)
    predicted = simulate(own, recorded_set_up(trace.config))
    tried: list[Prediction] = []
    failed: list[Failed] = []
    for index, set_up in enumerate(set_ups):
        progress(index + 1, len(set_ups) + 1)
        try:
            tried.append(simulate(planned, set_up))
        except WeaverRLError as error:
            failed.append(Failed(set_up=set_up, reason=str(error)))
    progress(len(set_ups) + 1, len(set_ups) + 1)
    return Plan(
        trace=trace,
        measured=measured_of(trace),
        predicted=predicted,
        tried=tuple(tried),
        failed=tuple(failed),
        assumptions=_assumptions(trace, own, planned, costs.notes),
        gpus_per_sampler=config.sampler.tensor_parallel,
        question=question,
    )


def measured_of(trace: Trace) -> Measured:
    """Means over the steps of a trace, as a prediction has them."""
    stages: dict[str, float] = {}
    for name in dict.fromkeys(name for step in trace.steps for name in step.seconds):
        stages[name] = sum(step.seconds.get(name, 0.0) for step in trace.steps) / len(trace.steps)
    del stages["step"]
    stages |= occasional(trace.config, trace.mean_seconds("eval") or 0.0, trace.mean_seconds("checkpoint") or 0.0)
    seconds = step_seconds(trace.steps) + stages["eval"] + stages["checkpoint"]
    lags = [step.values["lag/mean"] for step in trace.steps if "lag/mean" in step.values]
    num_tokens = sum(step.values["sampler/num_tokens"] for step in trace.steps) / len(trace.steps)
    return Measured(
        step_seconds=seconds,
        tokens_per_s=num_tokens / seconds,
        stage_seconds=stages,
        lag_mean=sum(lags) / len(lags) if lags else 0.0,
        idle=trace.idle,
    )


def _num_steps(config: RunConfig, asked: int) -> int:
    per_step = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    return max(1, min(asked, max(MIN_STEPS, MAX_ROLLOUTS // per_step)))


def _set_ups(config: RunConfig, trace: Trace, question: Question) -> Iterator[SetUp]:
    own = recorded_set_up(config)
    ranks = question.ranks or tuple(sorted({own.num_ranks, *RANKS}))
    lags = question.max_lags or tuple(sorted({own.max_lag, 0, 1}))
    each = config.sampler.tensor_parallel
    samplers = question.samplers or tuple(sorted({own.num_samplers, *SAMPLERS}))
    if question.gpus is not None and not question.samplers:
        # What is left beside the ranks, too: a total is there to be used.
        left = (min((question.gpus - number) // each, MOST_SAMPLERS) for number in ranks)
        samplers = tuple(sorted({*samplers, *left}))
    most = (question.cpus or trace.cores) if trace.on_cpu else None
    if most is not None:
        # More actors than cores only take from each other.
        samplers = question.samplers or tuple(n for n in samplers if n <= most)
        ranks = question.ranks or tuple(n for n in ranks if n <= most)
    for lag, num_ranks, num_samplers in itertools.product(sorted(lags), sorted(ranks), sorted(samplers)):
        fits = question.gpus is None or num_ranks + num_samplers * each <= question.gpus
        if num_samplers >= 1 and num_ranks >= 1 and fits:
            yield SetUp(num_samplers=num_samplers, num_ranks=num_ranks, max_lag=lag)


def _assumptions(trace: Trace, own: World, planned: World, notes: Sequence[str]) -> tuple[str, ...]:
    steps = f"steps {trace.steps[0].step} to {trace.steps[-1].step}"
    lines = [
        f"completions are as long, and score as, those of {steps}, however old the weights that sample them",
        f"each doubling of the learner's ranks makes its part per token {2 * EFFICIENCY:.1f} times as fast",
        "samplers load weights side by side, and more of them cost the driver nothing more",
        "KV cache never runs short; nothing breaks",
    ]
    if not trace.on_cpu:
        lines.append("every sampler and every rank has GPUs of its own")
    elif planned.cores is None:
        lines.append(
            "the run was on another machine than this, and how many cores that had nobody wrote down: no role takes "
            "any from another; --cpus says how many"
        )
    else:
        lines.append(
            f"all roles share {planned.cores:g} cores; a sampler of the trace computes with "
            f"{own.machine.sampler_threads:g} threads and a rank with {own.machine.learner_threads:g}; what goes by "
            "tokens uses all of them all the time, the rest of an engine step one; none ever gets more"
        )
    return (*lines, *notes)
