"""What a run needs before any actor has started its work: the model's files, the task, and the limits of both.

It starts no process.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from weaver_rl.config import RunConfig
from weaver_rl.errors import ModelError
from weaver_rl.models.resolve import load_tokenizer, max_model_len, resolve_model, stop_token_ids
from weaver_rl.tasks.load import load_scorer, load_task
from weaver_rl.tasks.prompts import PromptStream, sample_texts


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What is ready before any actor has started its work."""

    model_dir: Path
    prompts: PromptStream
    task_scorer: Any
    vocab_size: int
    max_len: int
    stop_tokens: tuple[int, ...]


def prepare(config: RunConfig) -> Prepared:
    """Raises UserError for a model or a task that cannot be used."""
    assert config.base_dir is not None
    task = load_task(config.task, config.base_dir, config.seed)
    texts = partial(sample_texts, task, config.task)
    model_dir = resolve_model(config.model, config.folder.absolute(), texts, config.base_dir)
    tokenizer = load_tokenizer(model_dir)
    longest = max_model_len(model_dir)
    max_len = min(longest, int(config.sampler.engine_args.get("max_model_len", longest)))
    max_tokens = config.rollout.sampling.max_tokens
    if max_len <= max_tokens:
        raise ModelError(
            f"the model takes sequences of {max_len} tokens, rollout.sampling.max_tokens is {max_tokens}: nothing is "
            "left for the prompt; lower max_tokens"
        )
    longest_prompt = max_len - max_tokens
    demonstrations = None
    if config.warm_start is not None and config.warm_start.task is not None:
        teacher = load_task(config.warm_start.task, config.base_dir, config.seed)
        demonstrations = PromptStream(teacher, tokenizer, config.warm_start.task, longest_prompt, config.seed)
    prompts = PromptStream(task, tokenizer, config.task, longest_prompt, config.seed, demonstrations)
    prompts.eval_prompts(config.eval.num_prompts)  # says at the start what is wrong with them
    return Prepared(
        model_dir=model_dir,
        prompts=prompts,
        task_scorer=load_scorer(config.task, config.base_dir, task),
        vocab_size=len(tokenizer),
        max_len=max_len,
        stop_tokens=tuple(stop_token_ids(model_dir, tokenizer)),
    )
