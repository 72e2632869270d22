"""Sums must not depend on where the numbers lie in memory, nor on their order."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weaver_rl.summation import mean, std, total

pytestmark = pytest.mark.unit

FLOATS = st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=40)


def shifted(values: np.ndarray, offset: int) -> np.ndarray:
    """The same numbers, `offset` elements further on in memory."""
    room = np.zeros(len(values) + offset, values.dtype)
    room[offset:] = values
    return room[offset:]


@given(FLOATS, st.integers(1, 7), st.randoms())
def test_neither_alignment_nor_order_changes_a_bit(numbers, offset, random):
    values = np.array(numbers, dtype=np.float64)
    shuffled = np.array(random.sample(numbers, len(numbers)), dtype=np.float64)
    for figure in (total, mean, std):
        assert figure(values) == figure(shifted(values, offset)) == figure(shuffled)


@given(FLOATS)
def test_they_agree_with_numpy(numbers):
    values = np.array(numbers, dtype=np.float64)
    assert mean(values) == pytest.approx(values.mean(), rel=1e-9, abs=1e-6)
    assert std(values, ddof=1) == pytest.approx(values.std(ddof=1), rel=1e-6, abs=1e-6)


def test_numpy_would_round_on_the_way():
    assert total(np.array([1e16, 1.0, -1e16])) == 1.0
    assert total([0.1] * 10) == 1.0
    assert math.isclose(std(np.array([1.0, 3.0])), 1.0)
