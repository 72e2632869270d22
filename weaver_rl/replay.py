"""Trains recorded steps again from their stored rollouts and compares the outcome bit for bit. It samples nothing.

It knows no processes: it is given a learner as the run began with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console

from weaver_rl.batch import StepBatch, build_batch
from weaver_rl.learn_step import demonstration_data, learn, next_baseline
from weaver_rl.losses.config import CrossEntropy
from weaver_rl.metrics import MetricsLine
from weaver_rl.off_policy import LearnInput
from weaver_rl.records import train_records
from weaver_rl.replay_plan import ReplayPlan, grouped, train_rows
from weaver_rl.roles import LearnerGroup, PromptSource
from weaver_rl.rollout_files import RecordedRollout
from weaver_rl.step_metrics import step_metrics
from weaver_rl.types import Float32Array

_OF_THE_UPDATE = ("lag/", "logprob_gap/", "ratio/", "importance_weights/", "correction/")
"""Families of metrics that a replay must have again wherever the run had them."""


def _ignore(_: object) -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One number of a step, as it was recorded and as it came out again; None where there is none."""

    name: str
    recorded: float | None
    replayed: float | None

    @property
    def equal(self) -> bool:
        """Bit for bit."""
        if self.recorded is None or self.replayed is None:
            return self.recorded is self.replayed
        return float(self.recorded).hex() == float(self.replayed).hex()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReplay:
    """One step that was trained again."""

    step: int
    loss: Figure
    grad_norm: Figure
    others: tuple[Figure, ...] = ()
    """Every other recorded metric of the step's rollouts and update that came out different."""
    importance_weights_diff: float = 0.0
    """Largest difference of a token's importance weight from the stored one; inf when one side has none."""
    learner_logprobs_diff: float = 0.0
    """The same of the learner's log-probability (nat)."""

    @property
    def differences(self) -> tuple[Figure, ...]:
        return tuple(figure for figure in (self.loss, self.grad_norm, *self.others) if not figure.equal)

    @property
    def equal(self) -> bool:
        return not self.differences and self.importance_weights_diff == 0 == self.learner_logprobs_diff


async def replay_steps(
    plan: ReplayPlan,
    *,
    learner: LearnerGroup,
    prompts: PromptSource,
    on_step: Callable[[StepReplay], None] = _ignore,
) -> list[StepReplay]:
    """Trains every step of the plan again; `prompts` gives the demonstrations of the warm start.

    Raises:
        LearnerLostError: a rank died.
    """
    if plan.checkpoint is not None:
        await learner.load_state(plan.checkpoint)
    baseline = plan.baseline
    replays = []
    for step in plan.steps:
        if step <= plan.num_warm_steps:
            replayed = await _replay_warm_start_step(plan, step, learner, prompts)
        else:
            rows = train_rows(plan.run_dir, step)
            batch = build_batch(grouped(rows), plan.config.advantage, baseline or 0.0)
            baseline = next_baseline(batch, plan.config.advantage, baseline)
            replayed = await _replay_step(plan, step, learner, batch, rows)
        on_step(replayed)
        replays.append(replayed)
    return replays


async def _replay_warm_start_step(
    plan: ReplayPlan, step: int, learner: LearnerGroup, prompts: PromptSource
) -> StepReplay:
    config = plan.config
    assert config.warm_start is not None
    data = demonstration_data(config, step, prompts)
    output = await learner.forward_backward(data, CrossEntropy(name="cross_entropy"))
    update = await learner.optim_step(config.warm_start.adam_params_at(step - 1, config.learner))
    figures = {"loss": output.loss, "grad_norm": update.grad_norm, "learning_rate": update.learning_rate}
    return _compared(step, plan.recorded[step], figures)


async def _replay_step(
    plan: ReplayPlan, step: int, learner: LearnerGroup, batch: StepBatch, rows: Sequence[RecordedRollout]
) -> StepReplay:
    kept: list[LearnInput] = []
    # The run passed its limit when it recorded the step: what exceeds it now is a difference to report, no stop.
    no_limit = plan.config.logprob_gap.model_copy(update={"max_mean": math.inf})
    learned = await learn(
        batch,
        version=step - 1,
        rl_step=step - 1 - plan.num_warm_steps,
        learner=learner,
        config=plan.config.model_copy(update={"logprob_gap": no_limit}),
        on_input=kept.append,
    )
    figures = step_metrics(batch, step - 1)
    if learned is not None:
        figures |= learned.metrics
        figures |= {"loss": learned.output.loss, "loss/sum_weights": learned.output.sum_weights}
        figures |= {"grad_norm": learned.update.grad_norm, "learning_rate": learned.update.learning_rate}
    again = {
        record.scored.rollout.rollout_id: record for record in train_records(batch, step, kept[0] if kept else None)
    }
    pairs = [(row, again[row.scored.rollout.rollout_id]) for row in rows]
    return _compared(
        step,
        plan.recorded[step],
        figures,
        importance_weights_diff=_largest(_diff(a.importance_weights_L, b.importance_weights_L) for a, b in pairs),
        learner_logprobs_diff=_largest(_diff(a.learner_logprobs_L, b.learner_logprobs_L) for a, b in pairs),
    )


def _compared(step: int, recorded: MetricsLine, replayed: Mapping[str, float], **diffs: float) -> StepReplay:
    def figure(name: str) -> Figure:
        return Figure(name=name, recorded=recorded.values.get(name), replayed=replayed.get(name))

    names = dict.fromkeys([*replayed, *(name for name in recorded.values if name.startswith(_OF_THE_UPDATE))])
    others = tuple(figure(name) for name in names if name not in ("loss", "grad_norm") and not figure(name).equal)
    return StepReplay(step=step, loss=figure("loss"), grad_norm=figure("grad_norm"), others=others, **diffs)


def _diff(stored: Float32Array | None, again: Float32Array | None) -> float:
    if stored is None or again is None or stored.shape != again.shape:
        return 0.0 if stored is again else math.inf
    if np.array_equal(stored, again):
        return 0.0
    return float(np.max(np.abs(stored.astype(np.float64) - again), initial=0.0))


def _largest(diffs: Iterable[float]) -> float:
    # Not max(): that loses a NaN, which must count as a difference.
    return float(np.max([0.0, *diffs]))


# -- in words ----------------------------------------------------------------------------------------------------------


def print_replay(console: Console, plan: ReplayPlan, replays: Sequence[StepReplay]) -> int:
    """Prints the last step and how all of them compare; returns the exit status: 0 equal bit for bit, 1 different."""
    for line in _lines(plan, replays):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0 if all(replayed.equal for replayed in replays) else 1


def _lines(plan: ReplayPlan, replays: Sequence[StepReplay]) -> Iterator[str]:
    since = "the beginning" if plan.checkpoint is None else f"checkpoint {plan.checkpoint.name}"
    last = replays[-1]
    different = [replayed for replayed in replays if not replayed.equal]
    yield f"replayed   {_num_steps(len(replays))} of {plan.run_dir} from {since}"
    yield from _step_lines(last)
    if not different:
        yield "result     equal bit for bit" + (" in every step" if len(replays) > 1 else "")
        return
    if different[0] is not last:
        yield from _step_lines(different[0])
    yield f"result     different: {len(different)} of {_num_steps(len(replays))}, step {different[0].step} first"
    if any(figure.name == "learning_rate" for figure in different[0].differences):
        yield "           its learning rate is another: the run was resumed with other settings later"


def _step_lines(replayed: StepReplay) -> Iterator[str]:
    yield f"step {replayed.step}"
    for figure in (replayed.loss, replayed.grad_norm, *replayed.others):
        yield f"  {figure.name}: {_in_words(figure)}"
    yield f"  importance weights: largest difference from the stored ones {replayed.importance_weights_diff!r}"
    yield f"  learner's log-probabilities: largest difference from the stored ones {replayed.learner_logprobs_diff!r}"


def _in_words(figure: Figure) -> str:
    if figure.recorded is None and figure.replayed is None:
        return "none recorded, none replayed: every group was dropped"
    values = f"recorded {figure.recorded!r}, replayed {figure.replayed!r}"
    if figure.equal:
        return f"{values}, equal bit for bit"
    if figure.recorded is None or figure.replayed is None:
        return f"{values}, different"
    return f"{values}, different by {figure.replayed - figure.recorded:.3g}"


def _num_steps(number: int) -> str:
    return f"{number} step" + "s" * (number != 1)
