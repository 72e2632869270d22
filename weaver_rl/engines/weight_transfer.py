"""The learner's end of vLLM's weight-transfer API, for weights that go from GPU to GPU. It knows no Ray.

The engine's end is `VllmEngine.call_workers`. Needs CUDA on both sides; on CPU weights go through the object store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
)

if TYPE_CHECKING:
    import torch

Chunks = Callable[[], Iterator[dict[str, "torch.Tensor"]]]


class ChunkSource(WeightSource):
    """The learner's weights as vLLM wants to read them; every rank iterates, rank 0 has the tensors."""

    def __init__(self, chunks: Chunks) -> None:
        self._chunks = chunks
        self._metadata: list[ParamMeta] | None = None

    def metadata(self) -> list[ParamMeta]:
        """Names, dtypes and shapes; the first call gathers the weights once, on every rank."""
        if self._metadata is None:
            self._metadata = [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self]
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for chunk in self._chunks():
            yield from chunk.items()

    @property
    def num_bytes(self) -> int:
        """Bytes of one transfer."""
        return sum(meta.dtype.itemsize * _product(meta.shape) for meta in self.metadata())


def open_transfer(
    transport: Literal["nccl", "ipc"],
    *,
    client: VLLMWeightSyncClient,
    source: ChunkSource,
    rank: int,
    master_addr: str,
    master_port: int,
    num_workers: int,
) -> TrainerWeightTransferEngine[Any]:
    """Joins learner and samplers; `send_weights()` of the result then sends one version.

    Args:
        client: reaches the samplers; rank 0's drives them.
        num_workers: vLLM workers over all samplers.
    """
    if transport == "nccl":
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

        nccl = NCCLTrainerInitInfo(
            master_address=master_addr, master_port=master_port, world_size=1 + num_workers, rank=rank
        )
        return NCCLTrainerWeightTransferEngine.trainer_init(nccl, client=client, source=source)
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo, IPCTrainerWeightTransferEngine

    return IPCTrainerWeightTransferEngine.trainer_init(
        IPCTrainerInitInfo(rank=rank, packed=True), client=client, source=source
    )


def _product(shape: tuple[int, ...]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result
