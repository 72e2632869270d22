"""Names of checkpoints on the wire: `weaver://…`. They never become paths of files.

weaver://{model_id}/checkpoints/{name}
weaver://{model_id}/{name}                  what older clients write for the same
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from weaver_rl.errors import ServiceError

NAME = "[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
MODEL_ID = "[A-Za-z0-9][A-Za-z0-9-]{0,63}"
CHECKPOINT = f"weaver://{MODEL_ID}/(?:checkpoints/)?{NAME}"
"""Regular expressions that mean the same in Python, in Rust and in JSON Schema."""

_PARTS = re.compile(f"weaver://(?P<model_id>{MODEL_ID})/(?:checkpoints/)?(?P<name>{NAME})")
_ALLOWED_NAME = "a letter or digit, then letters, digits, '.', '_' and '-'; 128 characters at most"
_SHOWN_CHARS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointPath:
    """Example: CheckpointPath(model_id="3f0c…", name="step_000010")"""

    model_id: str
    name: str


def check_name(name: str) -> str:
    """A name that a client may give to a checkpoint. Raises ServiceError 400 for another."""
    if re.fullmatch(NAME, name) is None:
        raise _refusal(f"checkpoint name {_shown(name)} cannot be used; allowed is {_ALLOWED_NAME}")
    return name


def parse_checkpoint_path(path: str) -> CheckpointPath:
    """Raises ServiceError 400 for anything that is not the name of a checkpoint."""
    found = _PARTS.fullmatch(path)
    if found is None:
        raise _refusal(
            f"{_shown(path)} is not the path of a checkpoint; write weaver://<model id>/checkpoints/<name>, where a "
            f"name is {_ALLOWED_NAME}"
        )
    return CheckpointPath(model_id=found["model_id"], name=found["name"])


def _shown(text: str) -> str:
    cut = text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}…"
    return ascii(cut)


def _refusal(message: str) -> ServiceError:
    return ServiceError("invalid_request", message, status=400)
