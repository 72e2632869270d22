"""Whether a request is one sent twice: clients send again what they had no answer to, with the same `seq_id`.

It knows no queue and no store.
"""

from __future__ import annotations

from weaver_rl.errors import ServiceError
from weaver_rl.service.records import Operation


def require_same(first: Operation, second: Operation, repeat_within_s: float) -> None:
    """Returns if `second` is the request of `first` sent again: same place, kind and digest, soon enough.

    Raises:
        ServiceError: 409 `seq_id_conflict`; names both.
    """
    place = f"seq_id {first.seq_id} of model {first.model_id}"
    details: dict[str, object] = {
        "operation_id": first.id,
        "first_digest": first.digest,
        "second_digest": second.digest,
    }
    if first.kind != second.kind or first.digest != second.digest:
        raise ServiceError(
            "seq_id_conflict",
            f"{place} belongs to operation {first.id} ({first.kind}, digest {first.digest}); this request is another "
            f"one ({second.kind}, digest {second.digest}). Every request of a model needs a seq_id of its own: is a "
            "second client at work on it?",
            status=409,
            details=details,
        )
    age_s = second.created_at - first.created_at
    if age_s > repeat_within_s:
        raise ServiceError(
            "seq_id_conflict",
            f"{place} belongs to operation {first.id}, the same request {age_s:.0f} s ago. One sent twice comes within "
            f"{repeat_within_s:g} s: poll that operation for its answer, or send this one with a seq_id of its own",
            status=409,
            details=details,
        )


def too_late(operation: Operation, next_seq_id: int) -> ServiceError:
    """What to say of a number whose place was given away, and of which nothing is kept."""
    return ServiceError(
        "seq_id_too_late",
        f"seq_id {operation.seq_id} of model {operation.model_id} was waited for and then passed, or its answer is no "
        f"longer kept; send it again with seq_id {next_seq_id} or higher",
        status=409,
        details={"next_seq_id": next_seq_id},
    )
