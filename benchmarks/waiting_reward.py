"""A reward that waits, as for a judge elsewhere, and then finds every other rollout right. It judges nothing."""

from __future__ import annotations

import asyncio

from weaver_rl.types import Rollout


async def judge(rollout: Rollout, seconds: float) -> float:
    """Those of a group wait side by side; no group is without signal, so the learner always has all of them."""
    await asyncio.sleep(seconds)
    return float(rollout.sample_index % 2)
