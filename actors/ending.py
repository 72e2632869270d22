"""Ending an actor in bounded time, whatever state it is in."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import ray

CLOSE_TIMEOUT_S = 15.0


async def end_actor(actor: Any, *, kill: bool = False) -> None:
    """Asks it to close, so that its engine and children end cleanly, then kills it; with `kill` at once."""
    if not kill:
        # A dead or stuck actor does not answer.
        await asyncio.to_thread(ray.wait, [actor.close.remote()], timeout=CLOSE_TIMEOUT_S)
    with contextlib.suppress(ValueError, ray.exceptions.RayError):
        await asyncio.to_thread(ray.kill, actor, no_restart=True)
