"""1-D arrays as plain bytes, for records of many small arrays that travel between processes. It knows no record.

Pickled as an array, each becomes a buffer of its own, and Ray handles every buffer apart: a step's completions are
thousands of arrays of a few numbers, which cost more to send than to sample.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Packed = tuple[str, bytes]


def pack(array: Any) -> Any:
    """dtype and bytes of a 1-D array of numbers; whatever else there is, unchanged."""
    if type(array) is np.ndarray and array.ndim == 1 and array.dtype.kind in "biuf":
        return array.dtype.str, array.tobytes()
    return array


def unpack(value: Any) -> Any:
    """What `pack` was given; an array comes back read-only, as Ray's own do."""
    if type(value) is tuple:
        return _array(value)
    return value


def _array(packed: Packed) -> npt.NDArray[Any]:
    dtype, content = packed
    return np.frombuffer(content, dtype=dtype)
