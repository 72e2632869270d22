"""Well-behaved reward functions for the tests of loading and trying out. They know no test."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from weaver_rl.types import Rollout

NOT_A_FUNCTION = 3


def brevity(rollout: Rollout, limit: int = 100, *, scale: float = 1.0) -> float:
    return -scale * len(rollout.text) / limit


def needs_pattern(rollout: Rollout, pattern: str) -> float:
    return float(pattern in rollout.text)


def takes_any(rollout: Rollout, **options: Any) -> float:
    return float(len(options))


def takes_nothing() -> float:
    return 1.0


class Threshold:
    def __init__(self, at: int, unit: str = "chars") -> None:
        if at < 0:
            raise ValueError(f"at must not be negative, seen {at}")
        self.at = at

    def __call__(self, rollout: Rollout) -> float:
        return float(len(rollout.text) >= self.at)


class AsyncBatch:
    async def __call__(self, rollouts: list[Rollout]) -> list[float]:
        return [float(len(rollouts)) for _ in rollouts]


class NotCallable:
    pass


def hides_async(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return function(*args)

    return wrapper


@hides_async
async def decorated(rollout: Rollout) -> float:
    return 2.0
