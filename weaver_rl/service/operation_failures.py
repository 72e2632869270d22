"""How an operation that failed is told to its client: one table from errors to codes. It logs nothing.

What `retryable` means. An operation that ended is never run again: the same request with the same `seq_id` gets the
same failure. A client that tries again makes a new call (the SDK draws the next `seq_id` for it). `retryable` says that
such a call may succeed and does no harm: the cause can pass, and the failed one changed nothing of the model. So what
may have run in part is not retryable for the kinds that change the model, though the cause may pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from weaver_rl.errors import (
    ActorFailedError,
    BatchError,
    CallFailedError,
    CheckpointError,
    ConfigError,
    EngineError,
    EngineLostError,
    LearnerLostError,
    ResourcesError,
    ServiceError,
)
from weaver_rl.service.records import OperationKind

CHANGES_MODEL: frozenset[OperationKind] = frozenset(("forward_backward", "optim_step", "load"))
"""Done twice, these are not the same as done once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why an operation has no response."""

    code: str
    message: str
    retryable: bool = False
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rule:
    code: str
    may_pass: bool = False
    """Another try may succeed."""
    may_be_half_done: bool = False
    """It may have had its effect, or have it still."""
    message: str | None = None
    """None: that of the error, which is made for people."""


# The first that fits: an error comes before those that it is a kind of.
_RULES: tuple[tuple[type[BaseException], _Rule], ...] = (
    (BatchError, _Rule(code="invalid_request")),
    (ConfigError, _Rule(code="invalid_request")),
    (CheckpointError, _Rule(code="checkpoint_error")),
    (ResourcesError, _Rule(code="no_capacity", may_pass=True)),
    (LearnerLostError, _Rule(code="learner_lost")),
    (CallFailedError, _Rule(code="backend_failed")),
    (EngineLostError, _Rule(code="backend_lost", may_pass=True, may_be_half_done=True)),
    (ActorFailedError, _Rule(code="backend_lost", may_pass=True, may_be_half_done=True)),
    (EngineError, _Rule(code="invalid_request")),
    (
        TimeoutError,
        _Rule(code="timeout", may_pass=True, may_be_half_done=True, message="it took too long and was given up"),
    ),
)

_MAY_BE_HALF_DONE = ("storage_unavailable",)
"""Codes of what may fail after the effect: the learner did it, and the database does not take that."""


def failure_of(error: BaseException, kind: OperationKind, operation_id: str) -> Failure:
    """What the client is told of `error`. Nothing of an error that was not made for people reaches it."""
    if isinstance(error, ServiceError):
        if error.code in _MAY_BE_HALF_DONE and kind in CHANGES_MODEL:
            message = f"the server's database failed during {kind}, which may have had its effect"
            return Failure(code=error.code, message=f"{message}: load a checkpoint to be sure", details=error.details)
        return Failure(code=error.code, message=error.message, retryable=error.retryable, details=error.details)
    for kind_of_error, rule in _RULES:
        if isinstance(error, kind_of_error):
            return Failure(
                code=rule.code,
                message=rule.message or str(error),
                retryable=rule.may_pass and not (rule.may_be_half_done and kind in CHANGES_MODEL),
            )
    return Failure(
        code="internal_error", message=f"{kind} failed inside the server; its log has operation {operation_id}"
    )


def is_expected(failure: Failure) -> bool:
    """Whether its message says all there is, so that the log needs no traceback."""
    return failure.code not in ("internal_error", "backend_failed", "backend_lost", "learner_lost", "timeout")
