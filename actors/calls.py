"""Waiting for another process: with a deadline, and with an error that names who was asked for what."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from ray.exceptions import RayActorError, RayTaskError

from weaver_rl.errors import ActorFailedError, WeaverRLError


async def answer(reference: Any, *, actor: str, doing: str, timeout_s: float) -> Any:
    """The result of a remote call.

    Raises:
        ActorFailedError: the actor died or did not answer within `timeout_s`.
        WeaverRLError: what the call itself raised, as it was raised there.
    """
    started = time.monotonic()
    try:
        return await asyncio.wait_for(_future(reference), timeout_s)
    except TimeoutError:
        raise ActorFailedError(f"{actor} did not answer within {timeout_s:g} s while it was {doing}") from None
    except (RayActorError, RayTaskError) as error:
        raise explained(error, actor, doing, time.monotonic() - started) from error


def explained(error: Exception, actor: str, doing: str, seconds: float) -> Exception:
    """The error to show for a failed remote call: our own errors as they are, anything else with who and what."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, WeaverRLError):
        return cause
    if isinstance(error, RayActorError):
        return ActorFailedError(f"{actor} died after {seconds:.1f} s of {doing}: {_first_line(error)}")
    what = f"{type(cause).__name__}: {cause}" if cause is not None else str(error)
    return ActorFailedError(f"{actor} failed while {doing}: {what}")


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


async def _future(reference: Any) -> Any:
    return await reference
