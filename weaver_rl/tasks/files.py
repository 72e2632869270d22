"""Problems from a JSONL or Parquet file. It knows no tokenizer; bad rows are found, and named, when it is built."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from weaver_rl.errors import TaskError
from weaver_rl.tasks.config import JsonlTask, ParquetTask
from weaver_rl.tasks.rows import Rows, open_rows
from weaver_rl.tasks.shuffle import permuted
from weaver_rl.tasks.task import Message, Problem, Scorer, is_held_out

log = logging.getLogger(__name__)

ROLES = ("system", "developer", "user", "assistant", "tool")


class FileRowsTask:
    """A `Task` over the rows of one file, split into training and evaluation by the prompt's text (or by two files)."""

    def __init__(self, config: JsonlTask | ParquetTask, base_dir: Path) -> None:
        self.config = config
        self._rows = open_rows(config.name, base_dir / config.path)
        self._pattern = re.compile(config.answer_pattern) if config.answer_pattern else None
        if config.eval_path is None:
            self._eval_rows, self._eval_prefix = self._rows, "row"
            self._train_index, self._eval_index = self._split()
        else:
            self._eval_rows, self._eval_prefix = open_rows(config.name, base_dir / config.eval_path), "eval-row"
            self._train_index, self._eval_index = self._two_files()

    @property
    def num_problems(self) -> int | None:
        return len(self._train_index)

    def problem(self, index: int) -> Problem:
        return self._problem(self._rows, int(self._train_index[index]), "row")

    def eval_problems(self, num: int) -> list[Problem]:
        available = len(self._eval_index)
        if num > available:
            held = self.config.eval_path or f"{self.config.path} with task.eval_fraction {self.config.eval_fraction}"
            raise TaskError(
                f"eval asks for {num} problems, seen {available} different ones in {held} "
                f"({len(self._eval_rows)} rows); ask for fewer, give task.eval_path or raise task.eval_fraction"
            )
        # A fixed shuffle: files are often sorted, and the first rows would not stand for the rest.
        chosen = (self._eval_index[permuted(k, available, "eval")] for k in range(num))
        return [self._problem(self._eval_rows, int(row), self._eval_prefix) for row in chosen]

    def scorer(self) -> Scorer | None:
        return None

    def _split(self) -> tuple[np.ndarray[Any, np.dtype[np.int64]], np.ndarray[Any, np.dtype[np.int64]]]:
        """One pass over the file: which rows are trained on, and the first row of each held-out prompt."""
        train, held_out, seen = [], [], set()
        for row in range(len(self._rows)):
            key = self._problem(self._rows, row, "row").key
            if not is_held_out(key, self.config.eval_fraction):
                train.append(row)
            elif key not in seen:
                seen.add(key)
                held_out.append(row)
        if not train:
            raise TaskError(
                f"{self._rows.path}: all {len(self._rows)} rows fall into the evaluation share "
                f"task.eval_fraction {self.config.eval_fraction}; lower it or give task.eval_path"
            )
        return np.array(train, np.int64), np.array(held_out, np.int64)

    def _two_files(self) -> tuple[np.ndarray[Any, np.dtype[np.int64]], np.ndarray[Any, np.dtype[np.int64]]]:
        held_out, seen = [], set()
        for row in range(len(self._eval_rows)):
            key = self._problem(self._eval_rows, row, "eval-row").key
            if key not in seen:
                seen.add(key)
                held_out.append(row)
        train = [r for r in range(len(self._rows)) if self._problem(self._rows, r, "row").key not in seen]
        num_shared = len(self._rows) - len(train)
        if not train:
            raise TaskError(f"{self._rows.path}: every row also stands in {self._eval_rows.path}; nothing to train on")
        if num_shared:
            log.warning(
                "%d of %d rows of %s also stand in %s and are left out of training",
                num_shared, len(self._rows), self._rows.path, self._eval_rows.path,
            )  # fmt: skip
        return np.array(train, np.int64), np.array(held_out, np.int64)

    def _problem(self, rows: Rows, row: int, prefix: str) -> Problem:
        columns, where = rows[row], rows.where(row)
        return Problem(
            problem_id=f"{prefix}-{row + 1}",
            prompt=read_prompt(columns, self.config.prompt_template, where),
            answer=self._answer(columns, where),
            columns={k: v for k, v in columns.items() if k not in ("prompt", "messages")},
            source=where,
        )

    def _answer(self, columns: Mapping[str, Any], where: str) -> str | None:
        answer = columns.get(self.config.answer_column)
        if answer is None:
            return None
        if isinstance(answer, bool) or not isinstance(answer, str | int | float):
            raise TaskError(
                f"{where}: {self.config.answer_column} must be text or a number, seen {type(answer).__name__}"
            )
        if self._pattern is None:
            return str(answer)
        found = self._pattern.search(str(answer))
        if found is None or found.group(1) is None:
            raise TaskError(f"{where}: task.answer_pattern {self._pattern.pattern!r} is not in the answer {answer!r}")
        return str(found.group(1))


def read_prompt(columns: Mapping[str, Any], template: str | None, where: str) -> str | tuple[Message, ...]:
    """The row's prompt: from the template when there is one, else its `messages`, else its `prompt`."""
    if template is not None:
        try:
            prompt: Any = template.format(**columns)
        except (KeyError, IndexError, AttributeError, ValueError, TypeError) as error:
            raise TaskError(
                f"{where}: task.prompt_template {template!r} does not fit ({type(error).__name__}: {error}); "
                f"columns of the row: {', '.join(columns)}"
            ) from error
    elif columns.get("messages") is not None:
        if columns.get("prompt") is not None:
            raise TaskError(f"{where}: has both prompt and messages, expected one of them")
        return read_messages(columns["messages"], where)
    elif "prompt" in columns:
        prompt = columns["prompt"]
    else:
        raise TaskError(
            f"{where}: has neither prompt nor messages (columns: {', '.join(columns)}); add one or set prompt_template"
        )
    if not isinstance(prompt, str) or not prompt:
        raise TaskError(f"{where}: prompt must be text that is not empty, seen {prompt!r}")
    return prompt


def read_messages(messages: Any, where: str) -> tuple[Message, ...]:
    if not isinstance(messages, list) or not messages:
        raise TaskError(f"{where}: messages must be a list that is not empty, seen {messages!r}")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise TaskError(f"{where}: message {number} must be {{role, content}} with text content, seen {message!r}")
        if message.get("role") not in ROLES:
            raise TaskError(f"{where}: message {number} has role {message.get('role')!r}, allowed: {', '.join(ROLES)}")
    return tuple({k: v for k, v in message.items() if v is not None} for message in messages)
