"""What a step does with its batch: correction, loss, check of learner against sampler, update. It samples nothing.

The controller and `replay` run this same function, so that a replayed step is the step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from weaver_rl.advantages import Grpo, MeanCentered, Reinforce, Rloo
from weaver_rl.batch import StepBatch, sequence_datum
from weaver_rl.config import RunConfig
from weaver_rl.off_policy import LearnInput, correct, gap_metrics, likely_gap_cause, require_small_gap
from weaver_rl.roles import LearnerGroup, PromptSource
from weaver_rl.summation import mean
from weaver_rl.types import Datum, ForwardBackwardOutput, OptimStepOutput


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """What one step of reinforcement learning did."""

    output: ForwardBackwardOutput
    update: OptimStepOutput
    metrics: dict[str, float]
    """Of the step's weights and of learner against sampler."""


def _ignore(_: LearnInput) -> None:
    pass


async def learn(
    batch: StepBatch,
    *,
    version: int,
    rl_step: int,
    learner: LearnerGroup,
    config: RunConfig,
    on_input: Callable[[LearnInput], None] = _ignore,
) -> Learned | None:
    """Trains on a batch at weights `version`; None when every group of it was dropped.

    Args:
        rl_step: steps of reinforcement learning before this one: where the learning rate stands.
        on_input: is given what the loss multiplied by and what the learner said, before the update.

    Raises:
        LogprobGapError: learner and sampler disagree too much; nothing was updated.
        LearnerLostError: a rank died.
    """
    learn_input = LearnInput.of(batch)
    if not learn_input.entries:
        return None
    temperature = config.rollout.sampling.temperature
    if config.correction.name != "none":
        before = await learner.forward(learn_input.data(), temperature)
        learn_input = correct(learn_input, before, config.correction)
    output = await learner.forward_backward(learn_input.data(), config.loss, temperature, learn_input.sum_weights)
    learn_input = learn_input.with_learner_logprobs(output.logprobs_per_datum)
    on_input(learn_input)
    gap = learn_input.gap(version)
    cause = likely_gap_cause(
        config.rollout.sampling,
        learner_dtype=config.learner.dtype,
        sampler_dtype=config.sampler.engine_args.get("dtype"),
    )
    require_small_gap(gap, config.logprob_gap, cause)
    update = await learner.optim_step(config.learner.adam_params_at(rl_step, config.num_steps))
    metrics = gap_metrics(gap) | learn_input.ratio_metrics()
    metrics |= learn_input.importance_metrics(config.loss, config.correction)
    return Learned(output=output, update=update, metrics=metrics)


def next_baseline(
    batch: StepBatch, estimator: Grpo | MeanCentered | Rloo | Reinforce, baseline: float | None
) -> float | None:
    """The running baseline after a batch; only `reinforce` has one."""
    rewards = batch.rewards()
    if not isinstance(estimator, Reinforce) or len(rewards) == 0:
        return baseline
    return estimator.next_baseline(baseline, mean(rewards))


def demonstration_data(config: RunConfig, step: int, prompts: PromptSource) -> list[Datum]:
    """The data of a step of the warm start, counted from 1."""
    assert config.warm_start is not None
    num = config.warm_start.prompts_per_step
    pairs = [prompts.demonstration((step - 1) * num + i) for i in range(num)]
    return [
        sequence_datum(f"{step:06d}-{i:04d}", prompt.token_ids_P, completion)
        for i, (prompt, completion) in enumerate(pairs)
    ]
