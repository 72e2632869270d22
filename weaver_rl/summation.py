"""Means and spreads that are the same bit for bit wherever the numbers lie in memory and in whatever order.

numpy's sums depend on the alignment of the array, which differs from run to run; `math.fsum` rounds once, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt


def total(values: npt.NDArray[Any] | Iterable[float]) -> float:
    """The sum, correctly rounded in float64."""
    return math.fsum(values.tolist() if isinstance(values, np.ndarray) else values)


def mean(values: npt.NDArray[Any]) -> float:
    """The arithmetic mean of at least one value."""
    return total(values) / len(values)


def std(values: npt.NDArray[Any], ddof: int = 0) -> float:
    """The standard deviation with `len(values) - ddof` in the denominator."""
    centre = mean(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values.tolist()) / (len(values) - ddof))
