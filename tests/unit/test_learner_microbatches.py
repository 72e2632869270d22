"""Packing and sharding keep every datum once, within budget, and give the order back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weaver_rl.learner.microbatches import build_microbatch, pack, scatter_logprobs, shard_data, sum_weights, unshard
from weaver_rl.types import Datum

pytestmark = pytest.mark.unit
lengths_of_data = st.lists(st.integers(1, 50), max_size=40)


def datum(index: int, length: int) -> Datum:
    weights = np.ones(length, np.float32)
    weights[: length // 2] = 0
    inputs = {"target_tokens": np.arange(length) + 100 * index, "weights": weights}
    return Datum(datum_id=str(index), token_ids_N=np.arange(length) + 100 * index, loss_fn_inputs=inputs)


@given(lengths_of_data, st.integers(1, 200))
def test_packing_keeps_everything_within_the_padded_budget(lengths, budget):
    packed = pack(lengths, budget)
    assert sorted(index for indices in packed for index in indices) == list(range(len(lengths)))
    for indices in packed:
        assert len(indices) == 1 or len(indices) * max(lengths[index] for index in indices) <= budget
    assert packed == pack(list(lengths), budget)


def test_packing_puts_like_lengths_together_and_long_ones_alone():
    assert pack([3, 50, 10, 3, 9], 20) == [(1,), (2, 4), (0, 3)]


@given(lengths_of_data, st.integers(1, 5))
def test_shards_are_balanced_and_their_order_is_recovered(lengths, num_ranks):
    data = [datum(index, length) for index, length in enumerate(lengths)]
    shards = shard_data(data, num_ranks)
    loads = [sum(len(one.token_ids_N) for one in shard.data) for shard in shards]
    assert len(shards) == num_ranks
    assert max(loads) - min(loads) <= max(lengths, default=0)
    assert unshard(shards, [[one.datum_id for one in shard.data] for shard in shards]) == tuple(
        one.datum_id for one in data
    )


def test_microbatch_gathers_wanted_positions_and_scatters_them_back():
    data = [datum(0, 4), datum(1, 2), datum(2, 3)]
    microbatch = build_microbatch(data, (0, 2), ("target_tokens", "weights"), "weighted")
    assert microbatch.token_ids_BW.tolist() == [[0, 1, 2, 3], [200, 201, 202, 0]]
    assert microbatch.flat_positions_P.tolist() == [2, 3, 5, 6]
    assert microbatch.inputs_P["target_tokens"].tolist() == [2, 3, 201, 202]
    values = microbatch.inputs_P["target_tokens"].astype(np.float32)
    first, second, third = scatter_logprobs(data, [microbatch], [values])
    np.testing.assert_array_equal(first, [np.nan, np.nan, 2, 3])
    np.testing.assert_array_equal(second, [np.nan, np.nan])
    np.testing.assert_array_equal(third, [np.nan, 201, 202])


def test_normaliser_sums_all_data_in_float64():
    big, small = datum(0, 1), datum(1, 1)
    big.loss_fn_inputs["weights"][0] = 2.0**24
    assert sum_weights([big, small, small]) == 2.0**24 + 2
