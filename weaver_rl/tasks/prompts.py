"""From problems to prompts: chat template, tokens, length. The only place where prompts become tokens.

It knows neither files nor samplers. A position is an integer; the prompt at a position is the same in every process,
so a run resumes from the integer alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from weaver_rl.errors import TaskError
from weaver_rl.tasks.config import TaskConfig, TaskSection
from weaver_rl.tasks.shuffle import permuted
from weaver_rl.tasks.task import Problem, Task
from weaver_rl.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUBSTITUTE_STRIDE = 2**40
"""Where an endless task's replacement for a prompt that was dropped comes from: index + k * stride."""
MAX_SUBSTITUTES = 100


def render(
    problem: Problem, tokenizer: PreTrainedTokenizerBase, config: TaskSection, max_prompt_tokens: int
) -> Prompt | None:
    """The prompt of a problem; None when it is too long and `on_too_long` is `drop`."""
    text, is_chat = apply_chat_template(problem, tokenizer, config)
    # The template writes the special tokens itself; adding them again would double the first one.
    token_ids = tokenizer(text, add_special_tokens=not is_chat)["input_ids"]
    if not token_ids:
        raise TaskError(f"{problem.where}: the prompt has no tokens")
    if len(token_ids) > max_prompt_tokens:
        if config.on_too_long == "drop":
            return None
        raise TaskError(
            f"{problem.where}: the prompt has {len(token_ids)} tokens, allowed {max_prompt_tokens} (the model's length "
            "less max_tokens of a completion); shorten it, raise max_model_len or set task.on_too_long: drop"
        )
    return Prompt(
        prompt_id=problem.problem_id,
        text=text,
        token_ids_P=tuple(token_ids),
        answer=problem.answer,
        columns=problem.columns,
    )


def apply_chat_template(problem: Problem, tokenizer: PreTrainedTokenizerBase, config: TaskSection) -> tuple[str, bool]:
    """The text the policy reads, and whether a chat template wrote it."""
    is_text = isinstance(problem.prompt, str)
    has_template = bool(tokenizer.chat_template)
    wanted = config.chat_template == "always" or not is_text or (config.chat_template == "auto" and has_template)
    if wanted and not has_template:
        need = "the prompt is messages" if not is_text else "task.chat_template is always"
        raise TaskError(f"{problem.where}: {need}, but the tokenizer has no chat template; use a chat model or text")
    if not is_text and config.chat_template == "never":
        raise TaskError(f"{problem.where}: the prompt is messages, which task.chat_template: never cannot render")
    if isinstance(problem.prompt, str):
        if not wanted:
            if config.system_prompt is not None:
                raise TaskError("task.system_prompt needs a chat template, and none is used; put it into the prompt")
            return problem.prompt, False
        messages = [{"role": "user", "content": problem.prompt}]
    else:
        messages = [dict(message) for message in problem.prompt]
    if config.system_prompt is not None:
        if messages[0]["role"] == "system":
            raise TaskError(f"{problem.where}: has a system message of its own, and task.system_prompt is set")
        messages.insert(0, {"role": "system", "content": config.system_prompt})
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # boundary: templates are programs of the model's author and raise anything
        raise TaskError(f"{problem.where}: the chat template refuses it: {type(error).__name__}: {error}") from error
    return str(text), True


def sample_texts(task: Task, config: TaskConfig, num: int = 1000) -> Iterator[str]:
    """Training prompts and their gold completions, before any template: what a tokenizer is trained on."""
    for index in range(num if task.num_problems is None else min(num, task.num_problems)):
        problem = task.problem(index)
        prompt = problem.prompt
        yield prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)
        # Apart, because prompt and completion are tokenised apart: no token ever spans the two.
        if problem.answer is not None:
            yield config.answer_template.format(answer=problem.answer)


def short_key(problem: Problem) -> int:
    """Eight bytes of the problem's key: small enough to keep for every row; a hit is checked against the whole key."""
    return int.from_bytes(problem.key[:8], "big")


class PromptStream:
    """The prompts of a run by position, and its evaluation prompts.

    Example:
        stream = PromptStream(task, tokenizer, config, max_prompt_tokens=112, seed=0)
        prompts = [stream.prompt(position) for position in range(16)]
        held_out = stream.eval_prompts(200)
    """

    def __init__(
        self,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        config: TaskConfig,
        max_prompt_tokens: int,
        seed: int,
        demonstrations: PromptStream | None = None,
    ) -> None:
        """`demonstrations`: where the warm start's gold completions come from; None: from this stream."""
        if max_prompt_tokens < 1:
            raise TaskError(f"max_prompt_tokens is {max_prompt_tokens}: max_tokens leaves the prompt no room; lower it")
        self._task = task
        self._tokenizer = tokenizer
        self._config = config
        self._max_prompt_tokens = max_prompt_tokens
        self._seed = seed
        self._demonstrations = self if demonstrations is None else demonstrations
        self._eval: dict[bytes, str] = {}
        self._num_met_too_long = 0
        """Of an endless task; a finite one knows its own from the start."""
        self._keys = np.array([], np.uint64)
        self._kept: np.ndarray[tuple[int], np.dtype[np.int64]] | None = None
        if task.num_problems is not None:
            self._kept = self._check_all(task.num_problems)
        else:
            self.prompt(0)
            self._num_met_too_long = 0  # it is met again by whoever asks for it

    @property
    def num_prompts(self) -> int | None:
        """Prompts of an epoch; None when they never end."""
        return None if self._kept is None else len(self._kept)

    @property
    def num_dropped(self) -> int:
        """Training prompts left out because they were too long, demonstrations included; an endless task's as met."""
        others = 0 if self._demonstrations is self else self._demonstrations.num_dropped
        return self._num_too_long() + others

    def dropped_note(self) -> str | None:
        """What to tell at the start about prompts that are too long; None when none of a finite task is left out."""
        parts = [self._dropped_here("prompts")]
        if self._demonstrations is not self:
            parts.append(self._demonstrations._dropped_here("demonstrations' prompts"))
        return "; ".join(part for part in parts if part) or None

    def prompt(self, index: int) -> Prompt:
        """The prompt at a position >= 0 of the training stream, which may be past the first epoch."""
        if self._kept is not None:
            epoch, offset = divmod(index, len(self._kept))
            row = int(self._kept[permuted(offset, len(self._kept), f"{self._seed}/{epoch}")])
            prompt = self._render(self._task.problem(row))
            assert prompt is not None
            return prompt
        for attempt in range(MAX_SUBSTITUTES):
            prompt = self._render(self._task.problem(index + attempt * SUBSTITUTE_STRIDE))
            if prompt is not None:
                return prompt
            self._num_met_too_long += 1
        raise TaskError(
            f"{MAX_SUBSTITUTES} problems in a row have more than {self._max_prompt_tokens} prompt tokens; "
            "make the task's problems shorter or raise max_model_len"
        )

    def eval_prompts(self, num: int) -> list[Prompt]:
        """`num` fixed prompts that `prompt` never gives: that is checked, whatever the task promises."""
        prompts: list[Prompt] = []
        num_asked = num
        while num_asked <= num * MAX_SUBSTITUTES:
            problems = self._task.eval_problems(num_asked)
            rendered = [render(p, self._tokenizer, self._config, self._max_prompt_tokens) for p in problems]
            prompts = [prompt for prompt in rendered if prompt is not None]
            if len(prompts) == num:
                break
            num_asked += num - len(prompts)
        else:
            raise TaskError(f"of {num_asked} evaluation problems only {len(prompts)} fit the model, asked for {num}")
        self._eval = {problem.key: problem.problem_id for problem in problems}
        self._demonstrations._eval = self._eval
        if self._kept is not None:
            eval_keys = np.array([short_key(problem) for problem in problems], np.uint64)
            for index in self._kept[np.isin(self._keys, eval_keys)]:
                self._refuse_eval(self._task.problem(int(index)))
        return prompts

    def demonstration(self, index: int) -> tuple[Prompt, tuple[int, ...]]:
        """The training prompt at a position and the tokens of its gold completion, end token included."""
        if self._demonstrations is not self:
            return self._demonstrations.demonstration(index)
        prompt = self.prompt(index)
        eos = self._tokenizer.eos_token_id
        if eos is None:
            raise TaskError("the tokenizer has no end token, so a completion would never end")
        ids = self._tokenizer(self.gold_completion(prompt), add_special_tokens=False)["input_ids"]
        return prompt, (*ids, eos)

    def gold_completion(self, prompt: Prompt) -> str:
        """What the warm start teaches for a prompt, by `answer_template`."""
        if prompt.answer is None:
            raise TaskError(f"prompt {prompt.prompt_id} has no answer, so there is nothing to warm-start on")
        return self._config.answer_template.format(answer=prompt.answer)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of a completion, special tokens left out."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def _check_all(self, num_problems: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Render every problem once: a row that does not fit is known before the first step."""
        kept, keys = [], []
        for index in range(num_problems):
            problem = self._task.problem(index)
            if self._render(problem) is not None:
                kept.append(index)
                keys.append(short_key(problem))
        if not kept:
            raise TaskError(f"all {num_problems} prompts have more than {self._max_prompt_tokens} tokens; none is left")
        self._keys = np.array(keys, np.uint64)
        return np.array(kept, np.int64)

    def _num_too_long(self) -> int:
        if self._task.num_problems is None or self._kept is None:
            return self._num_met_too_long
        return self._task.num_problems - len(self._kept)

    def _dropped_here(self, what: str) -> str | None:
        if self._task.num_problems is None or not (number := self._num_too_long()):
            return None
        have, are = ("has", "is") if number == 1 else ("have", "are")
        return (
            f"{number} of {self._task.num_problems} {what} {have} more than {self._max_prompt_tokens} tokens "
            f"and {are} left out"
        )

    def _render(self, problem: Problem) -> Prompt | None:
        self._refuse_eval(problem)
        return render(problem, self._tokenizer, self._config, self._max_prompt_tokens)

    def _refuse_eval(self, problem: Problem) -> None:
        if self._eval and (eval_id := self._eval.get(problem.key)) is not None:
            raise TaskError(f"{problem.where} reads the same as {eval_id}, an evaluation problem: never train on it")
