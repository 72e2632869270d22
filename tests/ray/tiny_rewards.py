"""Rewards of the tiny run: one that works, and one that fails in every way on chosen rollouts."""

import os
import time

from weaver_rl.types import Rollout


def brevity(rollout: Rollout) -> float:
    """Shorter is better; it has a different value for nearly every rollout, so there is always something to learn."""
    return -len(rollout.text) - 0.01 * rollout.sample_index


def treacherous(rollout: Rollout) -> float:
    """Kills its process, never ends or returns nonsense for the first, second and third sample of each group."""
    if rollout.sample_index == 0:
        os._exit(7)
    if rollout.sample_index == 1:
        while True:
            time.monotonic()
    return float("nan") if rollout.sample_index == 2 else float(len(rollout.text))
