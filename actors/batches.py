"""Batches on their way to learner ranks. It knows their size, not what is in them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from weaver_rl.errors import CallFailedError
from weaver_rl.types import Datum

LARGE_BYTES = 1 << 20
"""Below it a thread costs more than it saves."""


async def handed_over(data: Sequence[Datum]) -> Any:
    """What to call an actor with: the data, or of large data a reference, which the actor gets as the data.

    A call with large data pickles and copies them where it is made: in the event loop that is a second or more in
    which nobody is answered.

    Raises:
        CallFailedError: the object store does not take them; no actor has heard of them.
    """
    if num_bytes(data) < LARGE_BYTES:
        return data
    try:
        return await asyncio.to_thread(ray.put, data)
    except RayError as error:
        raise CallFailedError(f"a batch of {num_bytes(data) >> 20} MiB could not be handed to the learner") from error


def num_bytes(data: Sequence[Datum]) -> int:
    """Bytes of its arrays."""
    return sum(
        datum.token_ids_N.nbytes + sum(values.nbytes for values in datum.loss_fn_inputs.values()) for datum in data
    )
