"""Built-in rewards that judge an answer: 1.0 right, 0.0 wrong. They know nothing of processes, deadlines or weights.

A grader that has nothing to compare with raises, so that the reward is missing instead of 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from pydantic import Field, field_validator

from weaver_rl.section import Section
from weaver_rl.types import Rollout


def gold_answer(rollout: Rollout) -> str:
    """The prompt's answer; raises where the task gave none."""
    if rollout.prompt.answer is None:
        raise ValueError(f"prompt {rollout.prompt.prompt_id!r} has no answer to compare with")
    return rollout.prompt.answer


class TaskScorer(Section):
    """The task's own scorer, given to the worker when it starts."""

    scorer: Callable[[Rollout], float]
    """From a rollout to its reward."""

    def __call__(self, rollout: Rollout) -> float:
        return self.scorer(rollout)


class ExactMatch(Section):
    """1.0 if the completion is the answer, character for character."""

    strip: bool = True
    """Leave surrounding white space out of the comparison."""
    ignore_case: bool = False
    """Compare case-folded text."""

    def __call__(self, rollout: Rollout) -> float:
        return float(self._normal(rollout.text) == self._normal(gold_answer(rollout)))

    def _normal(self, text: str) -> str:
        text = text.strip() if self.strip else text
        return text.casefold() if self.ignore_case else text


_UNSIGNED = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
# A minus counts as a sign only where no operand stands before it: "5-3" ends in 3, not in -3.
_NUMBER = re.compile(
    rf"(?P<sign>(?<![0-9A-Za-z)\]])[-+])?(?P<top>{_UNSIGNED})(?P<power>[eE][-+]?[0-9]+)?(?:/(?P<bottom>{_UNSIGNED}))?"
)


def last_number(text: str) -> float | None:
    """The last number written in `text` (`-3`, `1,234.5`, `2e-3`, `3/4`), or None."""
    matches = list(_NUMBER.finditer(text.replace("\N{MINUS SIGN}", "-")))
    if not matches:
        return None
    match = matches[-1]
    value = float(match["top"].replace(",", "") + (match["power"] or ""))
    if match["bottom"] is not None:
        bottom = float(match["bottom"].replace(",", ""))
        value = value / bottom if bottom else math.nan
    return -value if match["sign"] == "-" else value


class Numeric(Section):
    """1.0 if the last number in the completion equals the last number in the answer.

    Example: text "so 17 + 25 = 42." and answer "#### 42" score 1.0.
    """

    tolerance: float = Field(default=1e-6, ge=0)
    """Allowed |difference|, relative to the answer where |answer| > 1 and absolute below."""

    def __call__(self, rollout: Rollout) -> float:
        gold = last_number(gold_answer(rollout))
        if gold is None or not math.isfinite(gold):
            raise ValueError(f"the answer of prompt {rollout.prompt.prompt_id!r} holds no number")
        seen = last_number(rollout.text)
        return float(seen is not None and abs(seen - gold) <= self.tolerance * max(1.0, abs(gold)))


class MathVerify(Section):
    """1.0 if `math-verify` finds the completion's final expression equal to the answer (LaTeX or plain)."""

    def model_post_init(self, _context: Any) -> None:
        """Imports sympy now: inside the first call it would count as the plugin's own memory and time."""
        import math_verify  # noqa: F401

    def __call__(self, rollout: Rollout) -> float:
        answer = gold_answer(rollout).strip()
        if rollout.text.strip() == answer:
            return 1.0
        gold = self._parse_gold(answer)
        if not gold:
            raise ValueError(
                f"the answer of prompt {rollout.prompt.prompt_id!r} is no expression math-verify can parse"
            )
        return float(self._equal(gold, rollout.text))

    @staticmethod
    def _parse_gold(answer: str) -> list[Any]:
        from math_verify import parse

        # Undelimited "(1, 2)" would be read as its last number, so the whole answer is tried as LaTeX first.
        delimited = answer if "$" in answer or "\\boxed" in answer else f"${answer}$"
        return list(parse(delimited, parsing_timeout=None) or parse(answer, parsing_timeout=None))

    @staticmethod
    def _equal(gold: list[Any], text: str) -> bool:
        # math-verify's own timeouts are signal alarms, which a loop in C ignores: the worker's deadline replaces them.
        from math_verify import parse, verify

        try:
            seen = parse(text, parsing_timeout=None, raise_on_error=True)
            return bool(verify(gold, seen, timeout_seconds=None, raise_on_error=True))
        except (MemoryError, RecursionError):
            raise
        except Exception:  # noqa: BLE001  boundary: text that sympy cannot compare with the answer is not the answer
            return False


class Regex(Section):
    """1.0 if the pattern is found in the completion.

    Example: `args: {pattern: "<answer>.+</answer>"}`
    """

    pattern: str
    """Python regular expression."""
    full: bool = False
    """The pattern must match the whole completion instead of a part."""
    ignore_case: bool = False
    """Match without regard to case."""
    dot_all: bool = True
    """`.` matches newlines too."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return pattern

    def __call__(self, rollout: Rollout) -> float:
        flags = (re.IGNORECASE if self.ignore_case else 0) | (re.DOTALL if self.dot_all else 0)
        match = re.fullmatch if self.full else re.search
        return float(match(self.pattern, rollout.text, flags) is not None)
