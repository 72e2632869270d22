"""Turns what a reward function returned or raised into a finite number or a reason. It knows nothing of processes.

A reason reads "kind: detail"; reasons are counted by what stands before the first colon.
"""

from __future__ import annotations

import math
import numbers
import traceback
from decimal import Decimal
from typing import Any

import numpy as np

MAX_REWARD = float(np.finfo(np.float32).max)
MAX_DETAIL_CHARS = 300


def to_reward(returned: Any) -> tuple[float | None, str | None]:
    """(value, None) or (None, reason). Numbers, bools, and numpy or torch scalars are values."""
    if returned is None:
        return None, "returned None, not a number"
    if not isinstance(returned, numbers.Real | Decimal | np.generic) and getattr(returned, "shape", None) == ():
        returned = returned.item()
    if isinstance(returned, np.bool_):
        returned = bool(returned)
    if not isinstance(returned, numbers.Real | Decimal):
        return None, f"returned {_article(type(returned).__name__)}, not a number: {_short(returned)}"
    try:
        value = float(returned)
    except OverflowError:
        return None, "returned an integer too large for a float"
    if math.isnan(value):
        return None, "returned NaN"
    if math.isinf(value):
        return None, f"returned {'inf' if value > 0 else '-inf'}"
    if abs(value) > MAX_REWARD:
        return None, f"returned a number beyond float32: {value}"
    return value, None


def describe_exception(error: BaseException) -> str:
    """Type, message and the line it came from, in one line."""
    try:
        message = str(error)
    except Exception:  # noqa: BLE001  boundary: a user's __str__ may itself raise
        message = "(its message cannot be printed)"
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {one_line(message)}{where}"


def one_line(text: str) -> str:
    """`text` without line breaks, its beginning if it is long."""
    flat = " ".join(text.split())
    return flat if len(flat) <= MAX_DETAIL_CHARS else flat[:MAX_DETAIL_CHARS] + "…"


def _article(noun: str) -> str:
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def _short(returned: Any) -> str:
    try:
        return one_line(repr(returned))[:80]
    except Exception:  # noqa: BLE001  boundary: a user's __repr__ may itself raise
        return "(cannot be printed)"
