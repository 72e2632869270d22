"""How the dashboard of a Ray cluster is asked: by HTTP, with headers that the user may give. It asks nobody."""

from __future__ import annotations

import json
import os
from typing import Any

from weaver_rl.errors import ConfigError

HEADERS = "RAY_JOB_HEADERS"


def is_dashboard(address: str) -> bool:
    """Whether it is a dashboard's, and not Ray's own HOST:PORT."""
    return address.startswith(("http://", "https://"))


def given_headers() -> dict[str, Any] | None:
    """What Ray's own command line takes too."""
    text = os.environ.get(HEADERS)
    if not text:
        return None
    try:
        headers = json.loads(text)
    except ValueError as error:
        raise ConfigError(f'{HEADERS} is no JSON ({error}); write {{"Name": "value"}}') from None
    if not isinstance(headers, dict):
        raise ConfigError(f'{HEADERS}: a JSON object is needed, {{"Name": "value"}}; seen {text}')
    return headers


def asks_for_token(address: str, reason: str) -> str:
    """What to do where an answer is refused."""
    return (
        f"{address} asks for a token ({reason}). Set RAY_AUTH_MODE=token with RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to "
        f'that of the cluster, or the header of a proxy in {HEADERS}=\'{{"Authorization": "Bearer …"}}\''
    )
