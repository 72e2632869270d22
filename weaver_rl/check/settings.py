"""Settings that are allowed and perhaps not meant, each with what it does. It reads the configuration alone."""

from __future__ import annotations

from collections.abc import Iterator

from weaver_rl.advantages import NoCorrection
from weaver_rl.check.finding import Finding, passed, warned
from weaver_rl.config import RunConfig
from weaver_rl.engines.config import DEFAULT_MAX_NUM_SEQS
from weaver_rl.models.config import ScratchModel
from weaver_rl.run_location import is_url

HIGH_LEARNING_RATE = 5e-5
"""For a pretrained policy trained whole by reward; the default is 1e-5."""
HIGH_WARM_START_RATE = 3e-4
"""For supervised training of a pretrained policy; its default of 1e-3 is meant for scratch models."""


def check_settings(config: RunConfig) -> Iterator[Finding]:
    """A warning for each; one pass where there is none."""
    found = [
        *_off_policy(config),
        *_precision(config),
        *_learning_rates(config),
        *_sizes(config),
        *_safety(config),
    ]
    yield from found
    if not found:
        yield passed("settings", "nothing that is usually a mistake")


def _off_policy(config: RunConfig) -> Iterator[Finding]:
    if not isinstance(config.correction, NoCorrection):
        return
    if config.rollout.max_lag > 0:
        yield warned(
            "rollout.max_lag",
            f"{config.rollout.max_lag}, and correction.name none: tokens of older weights are trained as if they were "
            "of the newest",
            "set correction: {name: tis}, or a smaller learner.learning_rate, and watch ratio/ess",
        )
    sampling = config.rollout.sampling
    if filters := sampling.filters():
        yield warned(
            "rollout.sampling",
            f"{', '.join(filters)}, and correction.name none: the sampler's probabilities are of the filtered "
            "distribution, the learner's of the whole one",
            "switch the filter off, or set correction: {name: tis}",
        )


def _precision(config: RunConfig) -> Iterator[Finding]:
    sampler, learner = config.sampler.engine_args.get("dtype"), config.learner.dtype
    if sampler is None or learner == "auto" or sampler in (learner, "auto"):
        return
    if isinstance(config.correction, NoCorrection):
        yield warned(
            "precision",
            f"learner.dtype is {learner}, sampler.engine_args.dtype {sampler}, and correction.name none: the two "
            "sides give tokens different probabilities",
            "use one precision, or set correction: {name: tis}",
        )


def _learning_rates(config: RunConfig) -> Iterator[Finding]:
    if isinstance(config.model, ScratchModel):
        return
    if config.num_steps and config.learner.learning_rate > HIGH_LEARNING_RATE:
        yield warned(
            "learner.learning_rate",
            f"{config.learner.learning_rate:g} for a pretrained model that is trained whole",
            "1e-6 to 1e-5 is usual; with more the policy forgets what it knew",
        )
    if config.warm_start is not None and config.warm_start.learning_rate > HIGH_WARM_START_RATE:
        yield warned(
            "warm_start.learning_rate",
            f"{config.warm_start.learning_rate:g} for a pretrained model",
            "1e-5 to 1e-4 is usual for one; 1e-3 is meant for scratch models",
        )


def _sizes(config: RunConfig) -> Iterator[Finding]:
    groups, replicas = config.rollout.prompts_per_step, config.sampler.num_replicas
    if groups < replicas:
        yield warned(
            "rollout.prompts_per_step",
            f"{groups} groups a step for {replicas} samplers: a group goes to one sampler, so {replicas - groups} have "
            "nothing to do in a step",
            f"use at least {replicas}, or fewer sampler.num_replicas",
        )
    sequences = -(-groups // replicas) * config.rollout.samples_per_prompt
    if sequences > DEFAULT_MAX_NUM_SEQS and "max_num_seqs" not in config.sampler.engine_args:
        yield warned(
            "max_num_seqs",
            f"{sequences} completions a step for each sampler, of which an engine runs {DEFAULT_MAX_NUM_SEQS} at once, "
            "vLLM's default here",
            f"set sampler.engine_args.max_num_seqs, {sequences} for example: more at once are faster while the cache "
            "holds them",
        )
    if config.num_steps and all(spec.weight == 0 for spec in config.rewards):
        yield warned(
            "rewards", "every weight is 0: all rollouts get the same reward", "give the one to learn from a weight"
        )


def _safety(config: RunConfig) -> Iterator[Finding]:
    num_steps = config.num_steps + (config.warm_start.num_steps if config.warm_start else 0)
    every = config.checkpoint.every
    if every == 0 or every >= num_steps > 1:
        yield warned(
            "checkpoint.every",
            f"{every} of {num_steps} steps: a run that breaks in between starts again from the beginning of its phase",
            "write a checkpoint every so many steps as you can afford to lose",
        )
    if config.eval.every == 0 and config.num_steps > 1:
        yield warned(
            "eval.every",
            "0: accuracy on held-out prompts is measured before the first and after the last step alone",
            "set it, to see where a run goes wrong",
        )
    folder = str(config.folder)
    if config.cluster.address is not None and not is_url(str(config.run_dir)) and not folder.startswith("/"):
        yield warned(
            "run_dir",
            f"{folder} is under the working directory of whichever machine runs the driver, and cluster.address is "
            f"{config.cluster.address}",
            "give an absolute path that outlives that machine, or a URL",
        )
