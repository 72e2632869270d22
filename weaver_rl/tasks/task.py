"""What a task is: a `Problem` and the methods a class needs to be a task. It knows no tokenizer and no file format."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from weaver_rl.types import Rollout

Message = Mapping[str, str]
"""One chat message: `role` and `content`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One problem as the task states it, before chat template and tokenizer.

    Example:
        Problem(problem_id="row-17", prompt="3 + 4 =", answer="7", columns={"source": "grade 1"})
    """

    problem_id: str
    """Unique within the task and the same in every run of it."""
    prompt: str | tuple[Message, ...]
    """Text, or the messages of a chat."""
    answer: str | None = None
    """The gold answer, when there is one."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Everything else the rewards may want (picklable)."""
    source: str = ""
    """Where it comes from, for error messages: `gsm8k.jsonl line 17`."""

    @property
    def where(self) -> str:
        return self.source or f"problem {self.problem_id}"

    @property
    def key(self) -> bytes:
        """Equal exactly for problems that read the same: what 'never trained on' is decided by."""
        text = self.prompt if isinstance(self.prompt, str) else json.dumps(self.prompt, sort_keys=True)
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


Scorer = Callable[[Rollout], float]


@runtime_checkable
class Task(Protocol):
    """Where problems come from. Every method gives the same result in every process and every run.

    Example:
        class Doubling:
            num_problems = None

            def problem(self, index: int) -> Problem:
                return Problem(problem_id=f"train-{index}", prompt=f"2 * {2 * index} =", answer=str(4 * index))

            def eval_problems(self, num: int) -> list[Problem]:
                return [Problem(problem_id=f"eval-{i}", prompt=f"2 * {2 * i + 1} =", answer=str(4 * i + 2))
                        for i in range(num)]

            def scorer(self) -> None:
                return None
    """

    @property
    def num_problems(self) -> int | None:
        """Training problems, addressed 0 ... n-1 and shuffled by the caller; None: endless, any index >= 0 is good."""

    def problem(self, index: int) -> Problem:
        """The training problem at `index`."""

    def eval_problems(self, num: int) -> list[Problem]:
        """The first `num` evaluation problems, none of which `problem` ever gives; asking for more only appends."""

    def scorer(self) -> Scorer | None:
        """The task's own judge, called in a reward worker; None if it has none."""


def is_held_out(key: bytes, eval_fraction: float) -> bool:
    """Whether a problem belongs to the evaluation side: a function of its text alone, so no draw can cross over."""
    return int.from_bytes(key[:8], "big") < eval_fraction * 2**64
