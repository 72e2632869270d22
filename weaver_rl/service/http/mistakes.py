"""How a client's mistake is named: field, what was seen, what is allowed. It imports no web framework."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any

from weaver_rl.errors import ServiceError

MAX_SHOWN = 80
"""Characters of a client's value that a message repeats."""
MAX_LISTED = 10
"""Mistakes of one request that an answer names."""


def invalid_request(mistakes: Sequence[Any]) -> ServiceError:
    """What pydantic found, by field. An id of a form that no id has is of nothing: 404."""
    in_path = [mistake for mistake in mistakes if mistake["loc"][:1] == ("path",)]
    if in_path:
        first = in_path[0]
        return ServiceError(
            "not_found", f"there is no {field_name(first['loc'][1:])} {shown(first['input'])}", status=404
        )
    found = [
        {"field": field_name(mistake["loc"][1:]) or "body", "message": _message(mistake)}
        for mistake in mistakes[:MAX_LISTED]
    ]
    text = "; ".join(f"{each['field']}: {each['message']}" for each in found)
    more = f"; and {len(mistakes) - MAX_LISTED} more" if len(mistakes) > MAX_LISTED else ""
    return ServiceError("invalid_request", text + more, status=400, details={"errors": found})


def field_name(location: Sequence[int | str]) -> str:
    """("payload", "data", 3, "tokens") as `payload.data[3].tokens`."""
    name = ""
    for part in location:
        name += f"[{part}]" if isinstance(part, int) else f".{part}"
    return name.removeprefix(".")


def shown(value: object) -> str:
    """A client's value, cut to a length that fits a message."""
    # Not repr(): a request may hold megabytes of what must be shown in a line.
    text = reprlib.repr(value)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…"


def _message(mistake: Any) -> str:
    message = str(mistake["msg"]).removeprefix("Value error, ")
    if mistake["type"] == "missing":
        return "is missing"
    return f"{message}, seen {shown(mistake['input'])}"
