"""The one tree of errors. Each says what was seen and what to write instead; each survives pickling (Ray carries it).

Errors of a user's making (`UserError`) are printed without a traceback. Everything else is a defect of ours.
A rollout that went wrong is a value with a status, never one of these.
"""

from __future__ import annotations


class WeaverRLError(Exception):
    """Base of every error this package raises on purpose."""


class UserError(WeaverRLError):
    """Something the user can mend: printed as one message, no traceback, exit code 2."""


class ConfigError(UserError, ValueError):
    """A configuration that cannot be used; names the key, what was seen and what is allowed."""


class TaskError(UserError, ValueError):
    """A task's data that cannot be used; names the file and row."""


class ModelError(UserError, ValueError):
    """A model or tokenizer that cannot be loaded or does not fit its task."""


class RewardError(UserError, ValueError):
    """A reward plugin that cannot be loaded or called at all (one bad rollout is no error, it is a missing reward)."""


class MissingRewardsError(UserError, RuntimeError):
    """More rewards were missing in a step than the configuration allows; carries the reasons."""


class BatchError(UserError, ValueError):
    """Data that a learner operation refuses: names the datum and the field. Nothing was accumulated."""


class OtherRankError(BatchError):
    """This rank's data were good, another's were not: the error of that one names the datum."""


class ResourcesError(UserError, RuntimeError):
    """The cluster cannot give what the configuration asks for; prints asked and available."""


class JobServerLostError(UserError, ConnectionError):
    """A cluster's job server does not answer, or not like one that is well; it may later."""


class UnknownJobError(UserError, LookupError):
    """A job that the job server does not know."""


class WeightSyncError(WeaverRLError, RuntimeError):
    """A sampler whose weights disagree with the learner's after a second try; names the sampler."""


class LogprobGapError(WeaverRLError, RuntimeError):
    """Sampler and learner disagree about log-probabilities by more than the limit; names the likely cause."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be written or read."""


class FilesError(UserError, RuntimeError):
    """Files that cannot be brought to another node or to a remote run folder; says which and why."""


class JournalError(UserError, RuntimeError):
    """The journal of a run that cannot be written, read or found; names the file and the reason."""


class ActorFailedError(WeaverRLError, RuntimeError):
    """An actor died or missed its deadline; names the actor, what it was doing and for how long."""


class CallFailedError(ActorFailedError):
    """A call of an actor ended with an error that is none of ours; the actor lives. Carries the reason."""


class LearnerLostError(ActorFailedError):
    """A learner rank died or missed its deadline: the whole group must be started anew."""


class EngineError(WeaverRLError, RuntimeError):
    """The inference engine refused a request; names it."""


class EngineLostError(EngineError, ActorFailedError):
    """The inference engine stopped or a step of it failed: what was in flight must be sampled elsewhere."""


class ServiceError(UserError, RuntimeError):
    """What a client of the service is told: a code for programs, a message for people, and whether to try again.

    Args:
        code: short snake_case word, the same for the same cause.
        status: HTTP status where the refusal is an answer to a request.
        retryable: the very same request may succeed later.
        details: more for programs, JSON values only.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        status: int = 400,
        retryable: bool = False,
        details: dict[str, object] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.status = status
        self.retryable = retryable
        self.details = details or {}

    def __reduce__(self) -> tuple[object, ...]:
        return _service_error, (self.code, self.message, self.status, self.retryable, self.details)


def _service_error(code: str, message: str, status: int, retryable: bool, details: dict[str, object]) -> ServiceError:
    return ServiceError(code, message, status=status, retryable=retryable, details=details)
