"""The ranks of one learner and the little they say to each other. It knows torch.distributed, no model and no data."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


class Ranks:
    """This rank among `world_size`; a world of one without sharding needs no process group at all."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        *,
        device: torch.device,
        needs_group: bool,
        master_addr: str,
        master_port: int | None,
        timeout_s: float,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0..{world_size - 1}, seen {rank}")
        self.rank = rank
        self.world_size = world_size
        self.in_group = needs_group or world_size > 1
        if not self.in_group:
            return
        # gloo beside NCCL: counts, flags and checkpoint plans are exchanged from the CPU without a GPU sync.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        timeout = timedelta(seconds=timeout_s)
        if world_size == 1:
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
            return
        if master_port is None:
            raise ValueError(f"master_port is needed to join a group of {world_size} ranks")
        dist.init_process_group(
            backend,
            init_method=f"tcp://{master_addr}:{master_port}",
            rank=rank,
            world_size=world_size,
            timeout=timeout,
        )

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over all ranks, in float64."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Sequence[float]) -> list[float]:
        """Element-wise maximum over all ranks, in float64."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def sum_tensors(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Each summed over all ranks, in one collective; of one dtype, on one device. Those given are left alone."""
        if self.world_size == 1:
            return list(tensors)
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        parts = torch.split(flat, [tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]

    def agree(self, refusal: Exception | None, other: Exception) -> None:
        """Raise this rank's refusal, or `other` if only another rank refuses: a rank that raised alone would leave
        the others hanging in their next collective."""
        refused = self.max([float(refusal is not None)])[0]
        if refusal is not None:
            raise refusal
        if refused:
            raise other

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.sum([0.0])

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if not self.in_group:
            return value
        holder = [value]
        dist.broadcast_object_list(holder, src=0, device=torch.device("cpu"))
        return holder[0]

    def close(self) -> None:
        """Leave the group; the second call does nothing."""
        if self.in_group and dist.is_initialized():
            dist.destroy_process_group()
        self.in_group = False

    def _reduce(self, values: Sequence[float], operation: Any) -> list[float]:
        if not self.in_group:
            return [float(value) for value in values]
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op=operation)
        return [float(value) for value in tensor]
