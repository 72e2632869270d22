"""One operation at work: runs it once, with a deadline, and says how it ended. It knows neither queue nor store."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace

from weaver_rl.service.operation_failures import CHANGES_MODEL, Failure, failure_of, is_expected
from weaver_rl.service.records import Operation
from weaver_rl.service.results import Rendered

Run = Callable[[], Awaitable[bytes | Rendered]]
"""What an operation does; its answer is the response."""

GIVE_UP_S = 5.0
"""How long an operation that was told to stop may take for it; its model goes on without it then."""

_log = logging.getLogger(__name__)


class OperationWork:
    """What one operation does. It holds the request only until it was run.

    Args:
        clock: seconds since the epoch.
    """

    def __init__(self, operation: Operation, run: Run, *, timeout_s: float, clock: Callable[[], float]) -> None:
        self._operation = operation
        self._run: Run | None = run
        self._timeout_s = timeout_s
        self._clock = clock
        self._task: asyncio.Task[bytes | Rendered] | None = None
        self._verdict: Failure | None = None

    def call_off(self, verdict: Failure, *, cancel: bool = False) -> None:
        """If it has not begun it will not, and fails with `verdict`; if it has, it goes on unless `cancel`."""
        if self._task is None:
            self._verdict = verdict
        elif cancel:
            self._verdict = verdict
            self._task.cancel()

    async def ended(self) -> Operation:
        """Runs it, unless it was called off; the operation as it ended. When this is cancelled, so is the work."""
        run, self._run = self._run, None
        if self._verdict is not None or run is None:
            return self._failed(self._verdict or Failure(code="internal_error", message="it was run before"))
        task = self._task = asyncio.create_task(_awaited(run))
        del run
        try:
            await asyncio.wait([task], timeout=self._timeout_s)
            if not task.done():
                self._verdict = self._too_long()
                await self._stop(task)
        finally:
            task.cancel()
            # An error in it holds what the operation was at work on.
            self._task = None
        return self._outcome(task)

    async def _stop(self, task: asyncio.Task[bytes | Rendered]) -> None:
        task.cancel()
        _, still_at_work = await asyncio.wait([task], timeout=GIVE_UP_S)
        if still_at_work:
            _log.error("operation %s (%s) does not stop; its model goes on", self._operation.id, self._operation.kind)

    def _outcome(self, task: asyncio.Task[bytes | Rendered]) -> Operation:
        operation, verdict = self._operation, self._verdict
        if task.done() and not task.cancelled():
            error = task.exception()
            if error is None:
                return _done(operation, task.result(), self._clock())
            verdict = verdict or failure_of(error, operation.kind, operation.id)
            if not is_expected(verdict):
                _log.error("operation %s (%s) failed", operation.id, operation.kind, exc_info=error)
        return self._failed(verdict or Failure(code="cancelled", message=f"{operation.kind} was cancelled"))

    def _failed(self, failure: Failure) -> Operation:
        return failed(self._operation, failure, self._clock())

    def _too_long(self) -> Failure:
        kind = self._operation.kind
        message = f"{kind} took longer than {self._timeout_s:g} s (operations.timeout_s) and was stopped"
        if kind not in CHANGES_MODEL:
            return Failure(code="timeout", message=message, retryable=True)
        return Failure(code="timeout", message=f"{message}; it may have had its effect: load a checkpoint to be sure")


def _done(operation: Operation, answer: bytes | Rendered, finished_at: float) -> Operation:
    response, attachment = (answer.response, answer.attachment) if isinstance(answer, Rendered) else (answer, None)
    return replace(operation, status="done", response=response, attachment=attachment, finished_at=finished_at)


def failed(operation: Operation, failure: Failure, finished_at: float) -> Operation:
    """The operation ended with that failure."""
    return replace(
        operation,
        status="error",
        response=None,
        attachment=None,
        error_code=failure.code,
        error_message=failure.message,
        error_details=failure.details,
        retryable=failure.retryable,
        finished_at=finished_at,
    )


async def _awaited(run: Run) -> bytes | Rendered:
    return await run()
