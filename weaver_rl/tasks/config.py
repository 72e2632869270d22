"""The `task:` section. It knows no tokenizer and reads no file; importing it is cheap."""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator

from weaver_rl.section import Section

NAMED_TASKS = ("reasoning_gym", "jsonl", "parquet")


class TaskSection(Section):
    """Keys that every task has."""

    chat_template: Literal["auto", "always", "never"] = "auto"
    """`auto`: the tokenizer's chat template when it has one; `messages` always need one."""
    system_prompt: str | None = None
    """A first message with role `system`; needs a chat template."""
    on_too_long: Literal["error", "drop"] = "error"
    """A prompt with more tokens than the model leaves room for: stop and name it, or drop and count it."""
    answer_template: str = "{answer}"
    """What the warm start teaches as the completion; `{answer}` is the gold answer."""

    @field_validator("answer_template")
    @classmethod
    def _has_answer(cls, template: str) -> str:
        try:
            template.format(answer="7")
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"{template!r} may only use {{answer}}, and doubled braces otherwise") from error
        if "{answer" not in template:
            raise ValueError(f"{template!r} must contain {{answer}}")
        return template


class ReasoningGymTask(TaskSection):
    """Endless, procedurally generated problems of one `reasoning-gym` dataset, judged by its own scorer."""

    name: Literal["reasoning_gym"] = "reasoning_gym"
    dataset: str
    """Any dataset name of reasoning-gym, for example `chain_sum`."""
    args: dict[str, Any] = Field(default_factory=dict)
    """The dataset's own settings, verbatim; not `seed` and `size`, which the run decides."""
    prompt_template: str = "{question}"
    """Built with str.format from the entry's `question`, `answer` and `metadata`: `{metadata[expression]} =`."""
    answer_tag: str | None = Field(default=None, pattern=r"^[A-Za-z_]+$")
    """Judge what stands in the last <TAG>...</TAG> of the completion; without it the whole completion, stripped."""
    eval_fraction: float = Field(default=0.2, ge=0, lt=1)
    """Share of all possible problems that is kept for evaluation and never trained on."""


class FileTask(TaskSection):
    """Keys that the tasks read from a file have."""

    path: str
    """File of prompts; relative to the configuration file."""
    eval_path: str | None = None
    """File of evaluation prompts; rows of `path` with the same prompt are left out of training."""
    eval_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of the prompts of `path` kept for evaluation when there is no `eval_path`; chosen by the prompt's text."""
    prompt_template: str | None = None
    """Built with str.format from the row's columns, in place of a `prompt` or `messages` column."""
    answer_column: str = "answer"
    """Column of the gold answer; a row without it has none."""
    answer_pattern: str | None = None
    """Regular expression whose group 1 is the answer within that column, for example `####\\s*(.+)`."""

    @field_validator("answer_pattern")
    @classmethod
    def _one_group(cls, pattern: str | None) -> str | None:
        if pattern is None:
            return None
        try:
            num_groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        if num_groups != 1:
            raise ValueError(f"{pattern!r} has {num_groups} groups, needs exactly 1: the answer")
        return pattern


class JsonlTask(FileTask):
    """One JSON object a line: `prompt` or chat `messages`, optional `answer`; other columns go to the rewards."""

    name: Literal["jsonl"] = "jsonl"


class ParquetTask(FileTask):
    """One row a problem, columns as for `jsonl`."""

    name: Literal["parquet"] = "parquet"


class CustomTask(TaskSection):
    """A user's class with the methods of `weaver_rl.tasks.task.Task`."""

    name: str
    """`package.module:Class` or `file.py:Class`; a file is relative to the configuration file."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the class."""


def _check_name(value: Any) -> Any:
    """One clear sentence for a wrong name, before each of the four sections complains about the other keys."""
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
    if name is None:
        raise ValueError(f"task needs a name: one of {', '.join(NAMED_TASKS)}, package.module:Class or file.py:Class")
    if name not in NAMED_TASKS and ":" not in str(name):
        near = difflib.get_close_matches(str(name), NAMED_TASKS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"task name {name!r} is unknown, allowed: {', '.join(NAMED_TASKS)}, package.module:Class or "
            f"file.py:Class{hint}"
        )
    return value


def _kind(value: Any) -> str:
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
    return str(name) if name in NAMED_TASKS else "custom"


TaskConfig = Annotated[
    Annotated[ReasoningGymTask, Tag("reasoning_gym")]
    | Annotated[JsonlTask, Tag("jsonl")]
    | Annotated[ParquetTask, Tag("parquet")]
    | Annotated[CustomTask, Tag("custom")],
    Discriminator(_kind),
    BeforeValidator(_check_name),
]
"""Any task section, told apart by `name`."""
