"""Weights through Ray's object store: the learner puts chunks, samplers on its machine read them without a copy."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import ray

from weaver_rl.types import PublishedWeights

if TYPE_CHECKING:
    import torch

Chunk = dict[str, npt.NDArray[Any]]


def publish(version: int, chunks: Iterable[Chunk]) -> PublishedWeights:
    """Puts each chunk of a policy. The objects live as long as somebody holds the result."""
    references = []
    num_bytes = 0
    for chunk in chunks:
        num_bytes += sum(array.nbytes for array in chunk.values())
        references.append(ray.put(chunk))
    return PublishedWeights(version=version, handle=tuple(references), num_bytes=num_bytes)


def tensors(chunk: Chunk) -> Iterator[tuple[str, torch.Tensor]]:
    """The chunk's arrays as tensors over the same, read-only memory: the engine copies out of it."""
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        for name, array in chunk.items():
            yield name, torch.from_numpy(np.asarray(array))
