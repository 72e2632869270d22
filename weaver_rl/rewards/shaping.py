"""Built-in rewards that shape behaviour without judging the answer. They know nothing of processes or weights."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from weaver_rl.section import Section
from weaver_rl.types import Rollout


class LengthPenalty(Section):
    """−min(1, max(0, (length − soft) / (max − soft))): 0 up to `soft`, falling in a line to −1 at `max` and beyond.

    Example: `args: {soft: 200, max: 256}` gives 200 tokens 0.0, 228 tokens −0.5, 256 tokens −1.0.
    """

    soft: int = Field(ge=0)
    """Length from which the penalty begins, in `unit`."""
    max: int = Field(ge=1)
    """Length at which it reaches −1, in `unit`."""
    unit: Literal["tokens", "chars"] = "tokens"
    """Tokens of the completion (an end token included) or characters of its text."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.soft >= self.max:
            raise ValueError(f"soft must be below max, seen soft={self.soft} and max={self.max}")
        return self

    def __call__(self, rollout: Rollout) -> float:
        length = len(rollout.text) if self.unit == "chars" else len(rollout.completion.token_ids_L)
        if self.unit == "tokens" and length == 0 and rollout.text:
            raise ValueError("the rollout carries no tokens: use unit chars")
        return -min(1.0, max(0.0, (length - self.soft) / (self.max - self.soft)))
