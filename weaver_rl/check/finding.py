"""What one look came to. It knows no check and no terminal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["pass", "warn", "fail"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of a check.

    Example:
        Finding(level="fail", subject="data/train.jsonl", seen="not there", advice="correct task.path")
    """

    level: Level
    """`fail`: the run would not start, or not come to its end. `warn`: it runs, and perhaps not as was meant."""
    subject: str
    """What was looked at: a key, a file, a reward."""
    seen: str
    """What was found, with its figures."""
    advice: str = ""
    """What to do about it; empty for a pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPart:
    """Memory of one kind in one process."""

    name: str
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleMemory:
    """What the processes of one role hold, each of them.

    Example:
        RoleMemory(role="learner", count=4, where="GPU", parts=(MemoryPart(name="weights", num_bytes=2**30),),
                   capacity_bytes=80 * 2**30)
    """

    role: str
    count: int
    """Processes like this."""
    where: Literal["GPU", "CPU"]
    parts: tuple[MemoryPart, ...]
    capacity_bytes: int | None
    """Memory of its GPU, or of the machine; None: not known."""

    @property
    def total_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)


def passed(subject: str, seen: str) -> Finding:
    return Finding(level="pass", subject=subject, seen=seen)


def warned(subject: str, seen: str, advice: str) -> Finding:
    return Finding(level="warn", subject=subject, seen=seen, advice=advice)


def failed(subject: str, seen: str, advice: str) -> Finding:
    return Finding(level="fail", subject=subject, seen=seen, advice=advice)
