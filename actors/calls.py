"""Waiting for another process: with a deadline, and with an error that names who was asked for what."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

from ray.exceptions import RayError, RayTaskError

from weaver_rl.errors import ActorFailedError, CallFailedError, LearnerLostError, OtherRankError, WeaverRLError
from weaver_rl.waits import Names, current_waits

T = TypeVar("T")

SETTLE_S = 5.0
"""How long the others may take to say what they know once one call has failed."""
GIVE_UP_MARGIN_S = 60.0
"""How long an operation that a server's client lost may go on in its actor before that is taken for stuck."""
MAX_SHOWN = 300

_PATH = re.compile(r"(?<![\w.:/<])~?(?:/[\w.+@=-]+)+/([\w.+@=-]+)")


async def answer(reference: Any, *, actor: str, doing: str, timeout_s: float, about: Names = ()) -> Any:
    """The result of a remote call; meanwhile a wait of `current_waits`.

    Args:
        about: names of what the actor is at work on (group ids), for who waits for those.

    Raises:
        ActorFailedError: the actor died or did not answer within `timeout_s`.
        WeaverRLError: what the call itself raised, as it was raised there.
    """
    started = time.monotonic()
    try:
        with current_waits().waiting(actor, doing, timeout_s=timeout_s, about=about):
            # Not `wait_for`: that of Python 3.11 may swallow a cancellation that comes with the answer.
            async with asyncio.timeout(timeout_s):
                return await reference
    except TimeoutError:
        raise ActorFailedError(f"{actor} did not answer within {timeout_s:g} s while it was {doing}") from None
    except RayError as error:
        raise explained(error, actor, doing, time.monotonic() - started) from error


async def together(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results, in order; or one plain error, that of the call that knows the cause.

    Who waits for a rank that died or refused fails with it, and often answers first: so the others are heard too.
    """
    tasks = [asyncio.create_task(call) for call in calls]
    if not tasks:
        return []  # asyncio.wait refuses to wait for nobody
    try:
        _, running = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        if running:
            await asyncio.wait(running, timeout=SETTLE_S)
        failed = [error for task in tasks if task.done() and (error := task.exception()) is not None]
        if failed:
            raise min(failed, key=_distance_from_cause)
        return [task.result() for task in tasks]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def shared(task: asyncio.Task[T], ended: str) -> T:
    """The result of a task that several wait for: one that is cancelled leaves it to the others.

    Raises:
        LearnerLostError: the task itself was cancelled, with `ended` as the reason; or what it raises.
    """
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        waiting = asyncio.current_task()
        if task.cancelled() and waiting is not None and not waiting.cancelling():
            raise LearnerLostError(ended) from None
        raise


def _distance_from_cause(error: BaseException) -> int:
    if isinstance(error.__cause__, RayError) and not isinstance(error.__cause__, RayTaskError):
        return 0
    if isinstance(error, OtherRankError):
        return 3
    return 2 if isinstance(error, ActorFailedError) else 1


def explained(error: Exception, actor: str, doing: str, seconds: float) -> Exception:
    """The error to show for a failed remote call: our own errors as they are, anything else with who and what."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, WeaverRLError):
        return cause
    if not isinstance(error, RayTaskError):  # died, was killed for memory, lost its placement: each has its own class
        return ActorFailedError(f"{actor} died after {seconds:.1f} s of {doing}: {_first_line(error)}")
    what = f"{type(cause).__name__}: {cause}" if cause is not None else str(error)
    notes = "".join(f" ({note})" for note in getattr(cause, "__notes__", ()))
    return CallFailedError(f"{actor} failed while {doing}: {what}{notes}")


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


def without_paths(error: Exception) -> str:
    """Its first line, for clients of a server: where files are on it is none of their business."""
    first = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return _PATH.sub(r"…/\1", first.removesuffix("; it stands at:"))[:MAX_SHOWN]


def first_error(error: BaseException) -> BaseException:
    """What went wrong first: tasks that fail together come as a group, a person needs one reason."""
    return first_error(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error
