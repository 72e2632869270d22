"""Runs the rewards on three prompts of the task, in processes and under limits like the run's. It samples nothing."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from weaver_rl.check.finding import Finding, failed, passed, warned
from weaver_rl.check.given import NotCheckedError
from weaver_rl.check.subject import RunUnderCheck, sample_problems
from weaver_rl.errors import RewardError
from weaver_rl.rewards.config import RewardSpec
from weaver_rl.rewards.pool import RewardWorker
from weaver_rl.tasks.config import ReasoningGymTask
from weaver_rl.tasks.load import load_scorer
from weaver_rl.tasks.prompts import render
from weaver_rl.tasks.task import Problem
from weaver_rl.types import Completion, Prompt, RewardComponent, Rollout

NUM_PROMPTS = 3
SLOW_STEP_S = 30.0
"""Scoring a step's rollouts for longer than this is worth a line."""
NO_IDEA = "I do not know."
RAMBLING = "Let me think about that again. "

Kind = Literal["gold", "wrong", "empty", "long"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A completion of a known kind, and what each reward said of it."""

    kind: Kind
    rollout: Rollout
    components: tuple[RewardComponent, ...]


def check_rewards(run: RunUnderCheck, timeout_s: float) -> Iterator[Finding]:
    """One line for each reward; the one that decides is held to its maximum on the task's own answers."""
    rollouts = list(_rollouts(run))
    try:
        scored = asyncio.run(_score(run, [rollout for _, rollout in rollouts], timeout_s))
    except RewardError as error:
        yield failed("rewards", str(error), "mend the reward; `weaver-rl reward` tries it on recorded rollouts")
        return
    except TimeoutError:
        yield failed(
            "rewards",
            f"{len(rollouts)} completions were not scored within {timeout_s:g} s",
            "lower reward_workers.timeout_s, and mend the reward that waits",
        )
        return
    trials = [
        Trial(kind=kind, rollout=rollout, components=components)
        for (kind, rollout), components in zip(rollouts, scored, strict=True)
    ]
    for index, spec in enumerate(run.config.rewards):
        yield from _judge(run, spec, trials, index)
    if run.config.deciding_reward and not any(trial.kind == "gold" for trial in trials):
        yield warned(
            run.config.deciding_reward,
            "no prompt sampled has an answer, so nothing shows that a right completion gets the highest reward",
            "try the rewards on completions of your own: weaver-rl reward … --rollouts FILE.jsonl",
        )


def _rollouts(run: RunUnderCheck) -> Iterator[tuple[Kind, Rollout]]:
    problems = sample_problems(run.task.needed(), NUM_PROMPTS)
    tokenizer = _tokenizer(run)
    for index, problem in enumerate(problems):
        prompt = _prompt(run, problem, tokenizer)
        texts: dict[Kind, str] = {
            "empty": "",
            "wrong": _wrong(problem, problems, index, run),
            "long": RAMBLING * run.config.rollout.sampling.max_tokens,
        }
        if problem.answer is not None:
            texts["gold"] = _gold(problem.answer, run)
        for kind, text in sorted(texts.items()):
            yield kind, _rollout(f"{problem.problem_id}-{kind}", prompt, text, tokenizer, run)


def _tokenizer(run: RunUnderCheck) -> Any:
    try:
        return run.tokenizer.needed()
    except NotCheckedError:
        return None  # rewards of text work without; the tokenizer has a line of its own


def _prompt(run: RunUnderCheck, problem: Problem, tokenizer: Any) -> Prompt:
    if tokenizer is not None:
        no_limit = 1 << 40
        prompt = render(problem, tokenizer, run.config.task, no_limit)
        assert prompt is not None
        return prompt
    text = problem.prompt if isinstance(problem.prompt, str) else "\n".join(m["content"] for m in problem.prompt)
    return Prompt(
        prompt_id=problem.problem_id, text=text, token_ids_P=(), answer=problem.answer, columns=problem.columns
    )


def _gold(answer: str, run: RunUnderCheck) -> str:
    """The task's answer as a completion says it."""
    task = run.config.task
    text = task.answer_template.format(answer=answer)
    tag = task.answer_tag if isinstance(task, ReasoningGymTask) else None
    return f"<{tag}>{text}</{tag}>" if tag is not None and f"<{tag}>" not in text else text


def _wrong(problem: Problem, problems: Sequence[Problem], index: int, run: RunUnderCheck) -> str:
    """Another prompt's answer, which looks like an answer."""
    others = [other.answer for other in (*problems[index + 1 :], *problems[:index])]
    return next((_gold(other, run) for other in others if other is not None and other != problem.answer), NO_IDEA)


def _rollout(rollout_id: str, prompt: Prompt, text: str, tokenizer: Any, run: RunUnderCheck) -> Rollout:
    """The completion as a sampler would return it: cut at `max_tokens`, else with its end token."""
    most = run.config.rollout.sampling.max_tokens
    ids = [] if tokenizer is None else list(tokenizer(text, add_special_tokens=False)["input_ids"])
    is_cut = len(ids) >= most
    if is_cut:
        ids = ids[:most]
        text = str(tokenizer.decode(ids))
    elif tokenizer is not None and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    completion = Completion(
        token_ids_L=np.array(ids, np.int32),
        logprobs_L=np.full(len(ids), -1.0, np.float32),
        versions_L=np.zeros(len(ids), np.int32),
        stop_reason="length" if is_cut else "stop",
    )
    return Rollout(rollout_id=rollout_id, prompt=prompt, completion=completion, text=text)


async def _score(
    run: RunUnderCheck, rollouts: Sequence[Rollout], timeout_s: float
) -> tuple[tuple[RewardComponent, ...], ...]:
    config = run.config
    async with (
        asyncio.timeout(timeout_s),
        RewardWorker(
            specs=config.rewards,
            workers=config.reward_workers,
            base_dir=run.base_dir,
            task_scorer=load_scorer(config.task, run.base_dir, run.task.needed()),
            on_output=lambda printed: None,
        ) as worker,
    ):
        return await worker.score(rollouts)


def _judge(run: RunUnderCheck, spec: RewardSpec, trials: Sequence[Trial], index: int) -> Iterator[Finding]:
    name = spec.component_name
    components = [trial.components[index] for trial in trials]
    seconds = statistics.fmean(component.seconds for component in components)
    values = [component.value for component in components if component.value is not None]
    if not values:
        reason = components[0].missing
        yield failed(name, f"missing for all {len(components)} completions: {reason}", "mend the reward")
        return
    seen = "; ".join([*(_of_kind(kind, trials, index) for kind in get_args(Kind)), f"{_time(seconds)} each"])
    found = [
        *_missing(name, trials, index),
        *_all_alike(name, spec, values),
        *_gold_is_not_right(name, run, trials, index),
        *_slow(name, run, seconds),
    ]
    yield from found or [passed(name, seen)]


def _missing(name: str, trials: Sequence[Trial], index: int) -> Iterator[Finding]:
    missing = [(trial.kind, trial.components[index].missing) for trial in trials if trial.components[index].missing]
    if missing:
        kind, reason = missing[0]
        article = "an" if kind == "empty" else "a"
        yield warned(
            name,
            f"missing for {len(missing)} of {len(trials)} completions, {article} {kind} one for example: {reason}",
            "such rollouts are left out of training; return a number for every text",
        )


def _all_alike(name: str, spec: RewardSpec, values: Sequence[float]) -> Iterator[Finding]:
    if len(values) > 1 and len(set(values)) == 1 and spec.weight != 0:
        yield warned(
            name,
            f"{values[0]:.4g} for all {len(values)} completions: right, wrong, empty and long",
            "rewards that are all alike teach nothing: see what it looks at",
        )


def _gold_is_not_right(name: str, run: RunUnderCheck, trials: Sequence[Trial], index: int) -> Iterator[Finding]:
    """Of the reward that decides alone: what the task calls right must be right."""
    if name != run.config.deciding_reward:
        return
    success_at = run.config.eval.success_at
    for trial in trials:
        value = trial.components[index].value
        if trial.kind == "gold" and value is not None and value < success_at:
            yield warned(
                name,
                f"{value:.4g} for the task's own answer {trial.rollout.text[:60]!r}; eval.success_at is {success_at:g}",
                "the reward does not take what the task calls right: see the reward, task.answer_template, and "
                "task.answer_pattern",
            )
            return


def _slow(name: str, run: RunUnderCheck, seconds: float) -> Iterator[Finding]:
    rollouts = run.config.rollout.prompts_per_step * run.config.rollout.samples_per_prompt
    num_workers = run.config.reward_workers.num_workers
    step_s = seconds * rollouts / num_workers
    if step_s > SLOW_STEP_S:
        yield warned(
            name,
            f"{_time(seconds)} a call: {rollouts} rollouts a step take {num_workers} workers about {step_s:.0f} s",
            "raise reward_workers.num_workers, or make it async, so that calls wait together",
        )


def _of_kind(kind: Kind, trials: Sequence[Trial], index: int) -> str:
    components = [trial.components[index] for trial in trials if trial.kind == kind]
    shown = ["missing" if c.value is None else f"{c.value:.3g}" for c in components]
    return f"{kind} {' '.join(dict.fromkeys(shown)) or 'none'}"


def _time(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds >= 1 else f"{1e3 * seconds:.2g} ms"
