"""Records of small arrays survive the way between processes, as one buffer."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest

from weaver_rl.packed_arrays import pack, unpack
from weaver_rl.types import Completion, Datum, ForwardBackwardOutput, ForwardOutput

pytestmark = pytest.mark.unit

COMPLETION = Completion(
    token_ids_L=np.array([3, 5], np.int32),
    logprobs_L=np.array([-0.1, -2.5], np.float32),
    versions_L=np.array([7, 8], np.int32),
    stop_reason="stop",
)
DATUM = Datum(
    datum_id="d",
    token_ids_N=np.array([1, 2, 3]),
    loss_fn_inputs={"target_tokens": np.array([2, 3, 4]), "weights": np.array([0, 1, 0.5], np.float32)},
)
LOGPROBS = (np.array([-1.5, np.nan], np.float32), np.zeros(0, np.float32))
FORWARD = ForwardOutput(logprobs_per_datum=LOGPROBS)
BACKWARD = ForwardBackwardOutput(
    loss=0.25, num_tokens=5, sum_weights=1.5, logprobs_per_datum=LOGPROBS, metrics={"num_microbatches": 1.0}
)


def sent(record: Any) -> tuple[Any, int]:
    """The record as another process gets it, and how many buffers went beside it."""
    buffers: list[pickle.PickleBuffer] = []
    message = pickle.dumps(record, protocol=5, buffer_callback=buffers.append)
    return pickle.loads(message, buffers=buffers), len(buffers)


def assert_same(seen: Any, expected: Any) -> None:
    assert type(seen) is type(expected)
    if isinstance(expected, np.ndarray):
        assert seen.dtype == expected.dtype
        np.testing.assert_array_equal(seen, expected)
    elif isinstance(expected, dict):
        assert seen.keys() == expected.keys()
        for name in expected:
            assert_same(seen[name], expected[name])
    elif isinstance(expected, tuple):
        assert len(seen) == len(expected)
        for one, other in zip(seen, expected, strict=True):
            assert_same(one, other)
    else:
        assert seen == expected


@pytest.mark.parametrize("record", [COMPLETION, DATUM, FORWARD, BACKWARD], ids=lambda record: type(record).__name__)
def test_a_record_arrives_whole_in_one_buffer(record: Any) -> None:
    seen, num_buffers = sent(record)
    assert type(seen) is type(record)
    for name in type(record).__slots__:
        assert_same(getattr(seen, name), getattr(record, name))
    assert num_buffers == 0


@pytest.mark.parametrize("value", [[1, 2], np.zeros((2, 2)), np.array(["a"]), None], ids=str)
def test_what_is_no_array_of_numbers_stays_as_it_is_for_the_edge_to_refuse(value: Any) -> None:
    assert pack(value) is value
    datum = Datum(datum_id="d", token_ids_N=value, loss_fn_inputs={"weights": value})
    assert_same(sent(datum)[0].token_ids_N, value)


def test_a_strided_array_keeps_its_values() -> None:
    assert_same(unpack(pack(np.arange(10)[::3])), np.array([0, 3, 6, 9]))
