"""Packs data into micro-batches and shards, pure numpy. It knows lengths and positions, neither torch nor losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from weaver_rl.errors import BatchError
from weaver_rl.types import Datum, Float32Array, Int64Array

T = TypeVar("T")
Positions = Literal["weighted", "all"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One rank's part of a batch.

    Example:
        Shard(indices=(0, 3), data=(batch[0], batch[3]))
    """

    indices: tuple[int, ...]
    """Where each datum stood in the whole batch, ascending."""
    data: tuple[Datum, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """One forward: B right-padded sequences of width W and the P positions whose log-probability is wanted.

    Padding comes after everything real, so causal attention needs no mask to keep it out.
    """

    indices: tuple[int, ...]
    """Which data of the batch the rows are."""
    token_ids_BW: Int64Array
    flat_positions_P: Int64Array
    """row * W + column of each wanted position, datum after datum."""
    columns_per_row: tuple[Int64Array, ...]
    """Wanted columns of each row."""
    inputs_P: Mapping[str, npt.NDArray[Any]]
    """`loss_fn_inputs` at the wanted positions."""

    @property
    def num_tokens(self) -> int:
        """Padded tokens."""
        return int(self.token_ids_BW.size)


def shard_data(data: Sequence[Datum], num_ranks: int) -> tuple[Shard, ...]:
    """Split data over ranks so that the longest rank is short: longest datum first, to the rank with fewest tokens."""
    if num_ranks < 1:
        raise ValueError(f"num_ranks must be >= 1, seen {num_ranks}")
    loads = [0] * num_ranks
    members: list[list[int]] = [[] for _ in range(num_ranks)]
    for index in _longest_first([len(datum.token_ids_N) for datum in data]):
        rank = min(range(num_ranks), key=lambda candidate: (loads[candidate], candidate))
        loads[rank] += len(data[index].token_ids_N)
        members[rank].append(index)
    return tuple(
        Shard(indices=tuple(sorted(member)), data=tuple(data[index] for index in sorted(member))) for member in members
    )


def unshard(shards: Sequence[Shard], values_per_rank: Sequence[Sequence[T]]) -> tuple[T, ...]:
    """Put one value per datum, returned by each rank, back into the order of the whole batch."""
    placed = {
        index: value
        for shard, values in zip(shards, values_per_rank, strict=True)
        for index, value in zip(shard.indices, values, strict=True)
    }
    return tuple(placed[index] for index in range(len(placed)))


def pack(lengths: Sequence[int], max_tokens: int) -> list[tuple[int, ...]]:
    """Indices of each micro-batch: like lengths together, at most `max_tokens` padded; a longer one stands alone."""
    packed: list[tuple[int, ...]] = []
    current: list[int] = []
    for index in _longest_first(lengths):
        if current and (len(current) + 1) * lengths[current[0]] > max_tokens:
            packed.append(tuple(current))
            current = []
        current.append(index)
    if current:
        packed.append(tuple(current))
    return packed


def build_microbatch(
    data: Sequence[Datum], indices: tuple[int, ...], input_names: Sequence[str], positions: Positions
) -> MicroBatch:
    """Pad the data at `indices` to one width and gather their inputs at the wanted positions."""
    rows = [data[index] for index in indices]
    width = max(len(datum.token_ids_N) for datum in rows)
    token_ids_BW = np.zeros((len(rows), width), dtype=np.int64)
    for row, datum in enumerate(rows):
        token_ids_BW[row, : len(datum.token_ids_N)] = datum.token_ids_N
    columns_per_row = tuple(_wanted_columns(datum, positions) for datum in rows)
    return MicroBatch(
        indices=indices,
        token_ids_BW=token_ids_BW,
        flat_positions_P=np.concatenate([row * width + columns for row, columns in enumerate(columns_per_row)]),
        columns_per_row=columns_per_row,
        inputs_P={
            name: np.concatenate(
                [datum.loss_fn_inputs[name][columns] for datum, columns in zip(rows, columns_per_row, strict=True)]
            )
            for name in input_names
        },
    )


def dummy_microbatch(dtypes: Mapping[str, npt.DTypeLike]) -> MicroBatch:
    """One token, no wanted position: contributes nothing, but joins the collectives that the other ranks wait in."""
    return MicroBatch(
        indices=(),
        token_ids_BW=np.zeros((1, 1), dtype=np.int64),
        flat_positions_P=np.zeros(0, dtype=np.int64),
        columns_per_row=(),
        inputs_P={name: np.zeros(0, dtype=dtype) for name, dtype in dtypes.items()},
    )


def scatter_logprobs(
    data: Sequence[Datum], microbatches: Sequence[MicroBatch], logprobs: Sequence[Float32Array]
) -> tuple[Float32Array, ...]:
    """Per datum (N,), NaN where no log-probability was wanted: not computed is not 0."""
    per_datum = tuple(np.full(len(datum.token_ids_N), np.nan, dtype=np.float32) for datum in data)
    for microbatch, values_P in zip(microbatches, logprobs, strict=True):
        start = 0
        for index, columns in zip(microbatch.indices, microbatch.columns_per_row, strict=True):
            per_datum[index][columns] = values_P[start : start + len(columns)]
            start += len(columns)
    return per_datum


def sum_weights(data: Sequence[Datum]) -> float:
    """Σ weights over all data, in float64: the normaliser of a request. BatchError for a datum without weights."""
    without = next((datum.datum_id for datum in data if "weights" not in datum.loss_fn_inputs), None)
    if without is not None:
        raise BatchError(f"datum {without!r}: loss_fn_inputs['weights'] is missing")
    return float(sum(float(np.sum(datum.loss_fn_inputs["weights"], dtype=np.float64)) for datum in data))


def _wanted_columns(datum: Datum, positions: Positions) -> Int64Array:
    if positions == "all":
        return np.arange(len(datum.token_ids_N), dtype=np.int64)
    return np.flatnonzero(datum.loss_fn_inputs["weights"]).astype(np.int64)


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
