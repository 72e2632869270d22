"""The quickstart's teacher: demonstrates sums, but where there is a minus miscounts by one more often than not.

Also an example of a task of your own: a class with the methods of `weaver_rl.tasks.task.Task`.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from weaver_rl.tasks.config import ReasoningGymTask
from weaver_rl.tasks.load import load_task
from weaver_rl.tasks.task import Problem


class SloppyTeacher:
    """The problems of a reasoning-gym dataset; `error_rate` of those with a minus are answered one too high.

    Example:
        With error_rate 0.55, 4 + 3 - 2 = is answered 6 in 55 of 100 cases and 5 else; 4 + 3 + 2 = is always 9.
    """

    num_problems = None

    def __init__(self, dataset: str, args: dict[str, Any], prompt_template: str, error_rate: float, seed: int) -> None:
        section = ReasoningGymTask(dataset=dataset, args=args, prompt_template=prompt_template)
        self._task = load_task(section, Path(), seed)
        self._error_rate = error_rate

    def problem(self, index: int) -> Problem:
        right = self._task.problem(index)
        if "-" not in str(right.prompt) or right.answer is None or not self._errs(index):
            return right
        return replace(right, answer=str(int(right.answer) + 1))

    def eval_problems(self, num: int) -> list[Problem]:
        raise NotImplementedError("nobody is examined by the sloppy teacher")

    def scorer(self) -> None:
        return None

    def _errs(self, index: int) -> bool:
        draw = int.from_bytes(hashlib.blake2b(f"sloppy {index}".encode(), digest_size=8).digest(), "big")
        return draw < self._error_rate * 2**64
