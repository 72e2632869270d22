"""Least squares with coefficients that cannot be negative: times are sums of things that take time. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

Float64Array = npt.NDArray[np.float64]


def fit_nonnegative(
    features_NK: Sequence[Sequence[float]] | Float64Array,
    seconds_N: Sequence[float] | Float64Array,
    weights_N: Sequence[float] | Float64Array | None = None,
) -> Float64Array:
    """The coefficients (K,) ≥ 0 with the least weighted squared error.

    Of features that always move together any split fits equally well; a little ridge then shares it out in proportion
    to their sizes, so that the answer does not hang on rounding.
    """
    A = np.asarray(features_NK, np.float64)
    b = np.asarray(seconds_N, np.float64)
    root = np.sqrt(np.ones(len(b)) if weights_N is None else np.asarray(weights_N, np.float64))
    scale = np.sqrt((A**2).mean(axis=0))
    scale[scale == 0] = 1.0
    num = A.shape[1]
    ridge = 1e-3 * np.sqrt(len(b)) * float(root.mean())
    A = np.vstack([A / scale * root[:, None], ridge * np.eye(num)])
    b = np.concatenate([b * root, np.zeros(num)])
    found: Float64Array = nnls(A, b)[0] / scale
    return found
