"""Which steps somebody wants to look at, as it is written on a command line. It knows no run."""

from __future__ import annotations

from dataclasses import dataclass

from weaver_rl.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRange:
    """Steps from `first` to `last`, both in it; None: no bound.

    Example:
        StepRange.parse("400:450")
    """

    first: int | None = None
    last: int | None = None

    def __contains__(self, step: int) -> bool:
        return (self.first is None or step >= self.first) and (self.last is None or step <= self.last)

    def __str__(self) -> str:
        return f"{'' if self.first is None else self.first}:{'' if self.last is None else self.last}"

    def in_words(self) -> str:
        """`steps 400 to 450`, `steps from 400 on`, `steps up to 450`, `step 400`, or `all steps`."""
        if self.first is None:
            return "all steps" if self.last is None else f"steps up to {self.last}"
        if self.last is None:
            return f"steps from {self.first} on"
        return f"step {self.first}" if self.first == self.last else f"steps {self.first} to {self.last}"

    @staticmethod
    def parse(text: str) -> StepRange:
        """`A:B`, `A:`, `:B` or one step `A`. Raises UserError for anything else."""
        first, colon, last = text.partition(":")
        try:
            bounds = [int(part) if part.strip() else None for part in (first, last if colon else first)]
        except ValueError:
            bounds = []
        if not bounds or (bounds[0] is not None and bounds[1] is not None and bounds[0] > bounds[1]):
            raise UserError(f"--steps is {text!r}; write A:B with A not above B, A:, :B, or one step")
        return StepRange(first=bounds[0], last=bounds[1])


EVERY_STEP = StepRange()
