"""Whether tokenizer and chat template do what the policy needs, and whether prompts fit. It knows no sampler."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean
from typing import Any

from weaver_rl.check.finding import Finding, failed, passed, warned
from weaver_rl.check.subject import NUM_SAMPLE_PROMPTS, RunUnderCheck, sample_problems
from weaver_rl.errors import ModelError
from weaver_rl.tasks.config import TaskConfig
from weaver_rl.tasks.prompts import apply_chat_template
from weaver_rl.tasks.task import Problem

NEEDS_ANSWER = ("exact_match", "numeric", "math_verify")
"""Built-in rewards that compare with the prompt's answer."""


def check_prompts(run: RunUnderCheck) -> Iterator[Finding]:
    """Tokenizer, stop tokens, template, round trip, lengths, answers."""
    tokenizer = run.tokenizer.get()
    yield _vocabulary(run, tokenizer)
    yield _stop_tokens(run, tokenizer)
    problems = sample_problems(run.task.needed(), NUM_SAMPLE_PROMPTS)
    texts_and_chat = [apply_chat_template(problem, tokenizer, run.config.task) for problem in problems]
    token_ids = [list(tokenizer(text, add_special_tokens=not is_chat)["input_ids"]) for text, is_chat in texts_and_chat]
    yield from _template(tokenizer, run.config.task, problems[0], texts_and_chat[0][1], token_ids[0])
    yield _round_trip(tokenizer, [text for text, _ in texts_and_chat])
    yield _lengths(run, [len(ids) for ids in token_ids], problems)
    yield from _answers(run, problems)


def _vocabulary(run: RunUnderCheck, tokenizer: Any) -> Finding:
    size, rows = len(tokenizer), int(run.model.needed().config.get_text_config().vocab_size)
    seen = f"{type(tokenizer).__name__} with {size:,} tokens; the model has {rows:,}"
    if size > rows:
        return failed(
            "tokenizer", seen, "use the tokenizer that belongs to the model: the rest would crash the learner"
        )
    return passed("tokenizer", seen)


def _stop_tokens(run: RunUnderCheck, tokenizer: Any) -> Finding:
    try:
        ids = run.model.needed().stop_tokens(tokenizer)
    except ModelError as error:
        return failed("stop tokens", str(error), "set eos_token_id in generation_config.json")
    outside = [token for token in ids if token >= len(tokenizer)]
    seen = ", ".join(f"{tokenizer.convert_ids_to_tokens(token)!r} ({token})" for token in ids if token not in outside)
    if outside:
        return failed(
            "stop tokens", f"{outside} are beyond the tokenizer's {len(tokenizer)}", "correct generation_config.json"
        )
    return passed("stop tokens", seen)


def _template(
    tokenizer: Any, task: TaskConfig, problem: Problem, is_chat: bool, token_ids: list[int]
) -> Iterator[Finding]:
    bos = tokenizer.bos_token_id
    if bos is not None and token_ids[:2] == [bos, bos]:
        yield warned(
            "chat template" if is_chat else "prompt",
            f"every prompt begins with {tokenizer.bos_token!r} twice",
            "take it out of the template or of task.prompt_template: the policy has never seen that",
        )
    if not is_chat:
        has_one = bool(tokenizer.chat_template)
        seen = "not used (task.chat_template: never)" if has_one else "the tokenizer has none; prompts are plain text"
        yield passed("chat template", seen)
        return
    asked = problem.prompt
    messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else [dict(message) for message in asked]
    closed = tokenizer.apply_chat_template(messages, add_generation_prompt=False, tokenize=False)
    opened = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    if closed == opened:
        yield warned(
            "chat template",
            "it ignores add_generation_prompt: nothing says that it is the policy's turn",
            "use a template that opens the assistant's turn, or a model that was trained without",
        )
        return
    yield passed("chat template", f"renders; opens the policy's turn with {opened[len(closed) :]!r}")


def _round_trip(tokenizer: Any, texts: list[str]) -> Finding:
    for text in texts:
        again = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])
        if again != text:
            at = next(
                (i for i, (a, b) in enumerate(zip(text, again, strict=False)) if a != b), min(len(text), len(again))
            )
            return warned(
                "round trip",
                f"a prompt reads differently after encoding and decoding, from {text[at : at + 20]!r} to "
                f"{again[at : at + 20]!r}",
                "rewards that compare characters may be wrong: look at what the tokenizer normalises",
            )
    return passed("round trip", f"{len(texts)} prompts are the same after encoding and decoding")


def _lengths(run: RunUnderCheck, lengths: list[int], problems: list[Problem]) -> Finding:
    max_tokens = run.config.rollout.sampling.max_tokens
    room = run.max_length() - max_tokens
    seen = (
        f"{len(lengths)} prompts sampled: mean {fmean(lengths):.0f}, longest {max(lengths)} tokens; room {room} "
        f"(sequences of {run.max_length()} less max_tokens {max_tokens})"
    )
    over = [problem for problem, length in zip(problems, lengths, strict=True) if length > room]
    if not over:
        return passed("prompt lengths", seen)
    share = len(over) / len(lengths)
    seen += f"; {share:.0%} are too long, {over[0].where} first"
    if room < 1 or share == 1:
        return failed("prompt lengths", seen, "raise sampler.engine_args.max_model_len, or lower max_tokens")
    if run.config.task.on_too_long == "error":
        return failed("prompt lengths", seen, "set task.on_too_long: drop, raise max_model_len, or lower max_tokens")
    return warned("prompt lengths", seen, "they are dropped (task.on_too_long): see that none is missed")


def _answers(run: RunUnderCheck, problems: list[Problem]) -> Iterator[Finding]:
    without = [problem for problem in problems if problem.answer is None]
    needing = [spec.name for spec in run.config.rewards if spec.name in NEEDS_ANSWER]
    if without and needing:
        share = len(without) / len(problems)
        level = failed if share > run.config.reward_workers.max_missing_fraction else warned
        yield level(
            "answers",
            f"{share:.0%} of the prompts sampled have none, {without[0].where} first; {needing[0]} compares with it",
            "correct task.answer_column or task.answer_pattern: such rewards are missing, and too many stop the run",
        )
