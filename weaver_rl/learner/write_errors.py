"""What a write that fails is told as: one error, whoever was writing. It writes nothing itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from weaver_rl.errors import CheckpointError

WRITE_ERRORS = (OSError, SafetensorError, CheckpointException)
"""What a full disk comes as, by who was writing; the last is not even an Exception."""
MAX_REASON = 400
"""Characters; torch puts whole tracebacks into the errors of a sharded write, the reason last."""


@contextmanager
def writing(what: str, directory: Path) -> Iterator[None]:
    """Raises CheckpointError for a write inside the block that fails."""
    try:
        yield
    except WRITE_ERRORS as error:
        reason = " ".join(str(error).split())[-MAX_REASON:]
        raise CheckpointError(f"cannot write {what} to {directory}: {reason}") from error
