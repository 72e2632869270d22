"""Splits the policy's weights over ranks with FSDP2 and moves values in and out of the shards. It knows no files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from weaver_rl.errors import ModelError
from weaver_rl.learner.policy import Policy, empty_model, load_model
from weaver_rl.learner.process_group import Ranks
from weaver_rl.losses.chunked_head import LogitTransform


def build_policy(
    model_dir: Path,
    ranks: Ranks,
    *,
    device: torch.device,
    compute_dtype: torch.dtype,
    chunk_tokens: int,
    activation_checkpointing: bool,
) -> Policy:
    """The policy, ready to train; sharded when there is a process group. Only rank 0 reads the weights from disk."""
    model, transform = _load_on_rank_0(model_dir, ranks)
    if not ranks.in_group:
        policy = Policy(model.to(device), chunk_tokens=chunk_tokens, transform=transform)
        return _with_checkpointing(policy, activation_checkpointing)
    empty = empty_model(model_dir)
    policy = Policy(empty, chunk_tokens=chunk_tokens, transform=transform)
    _with_checkpointing(policy, activation_checkpointing)
    _shard(policy, ranks, device, compute_dtype)
    policy.to_empty(device=device)
    if model is not None:
        # How names in the hub's files differ from names in the model is known only to the one that read the files.
        empty._weight_conversions = getattr(model, "_weight_conversions", None)
    _fill_from_rank_0(policy, model, device)
    return policy


def reshard(policy: nn.Module) -> None:
    """Give back the gathered weights. A root left gathered after a forward would serve stale weights after a step."""
    if isinstance(policy, FSDPModule):
        policy.reshard()


def full_tensor(parameter: torch.Tensor) -> torch.Tensor:
    """The whole parameter; a collective when it is sharded."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def local_rows(parameter: torch.Tensor, rank: int, world_size: int) -> slice:
    """Which rows (first axis) of the whole parameter this rank holds."""
    if not isinstance(parameter, DTensor):
        return slice(None)
    per_rank = -(-parameter.shape[0] // world_size)
    start = min(rank * per_rank, parameter.shape[0])
    return slice(start, min(start + per_rank, parameter.shape[0]))


@torch.no_grad()
def fill_tensors(
    named: Iterable[tuple[str, torch.Tensor]], ranks: Ranks, read: Callable[[str, slice], torch.Tensor]
) -> None:
    """Set every tensor to what `read(name, rows)` returns for the rows this rank holds."""
    for name, tensor in named:
        rows = read(name, local_rows(tensor, ranks.rank, ranks.world_size))
        (tensor.to_local() if isinstance(tensor, DTensor) else tensor).copy_(rows)


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Buffers that belong to the weights."""
    saved = module.state_dict(keep_vars=True).keys()
    return ((name, buffer) for name, buffer in module.named_buffers() if name in saved)


def _load_on_rank_0(model_dir: Path, ranks: Ranks) -> tuple[Any, LogitTransform]:
    model: Any = None
    outcome: LogitTransform | ModelError | None = None
    if ranks.rank == 0:
        try:
            model, outcome = load_model(model_dir)
        except ModelError as error:
            outcome = error
    # Shared whatever happened: a rank 0 that raised alone would leave the others waiting in the broadcast.
    outcome = ranks.share(outcome)
    if isinstance(outcome, ModelError):
        raise outcome
    return model, cast(LogitTransform, outcome)


def _with_checkpointing(policy: Policy, activation_checkpointing: bool) -> Policy:
    if activation_checkpointing:
        policy.checkpoint_activations()
    return policy


def _shard(policy: Policy, ranks: Ranks, device: torch.device, compute_dtype: torch.dtype) -> None:
    mesh = init_device_mesh(device.type, (ranks.world_size,))
    precision = MixedPrecisionPolicy(
        param_dtype=None if compute_dtype == torch.float32 else compute_dtype, reduce_dtype=torch.float32
    )
    for layer in policy.layers():
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(policy, mesh=mesh, mp_policy=precision)
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            # The loss is divided by the whole request's Σw already, so gradients are summed, never averaged.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


@torch.no_grad()
def _fill_from_rank_0(policy: Policy, model: Any, device: torch.device) -> None:
    """Send rank 0's weights to all, one parameter at a time, and each rank keeps its rows."""
    sources = dict(model.named_parameters()) if model is not None else {}
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for name, parameter in policy.model.named_parameters():
        full = _broadcast(sources.get(name), parameter, device)
        parameter.to_local().copy_(full[local_rows(parameter, rank, world_size)])
    buffers = dict(model.named_buffers()) if model is not None else {}
    for name, buffer in policy.model.named_buffers():
        buffer.copy_(_broadcast(buffers.get(name), buffer, device))


def _broadcast(source: torch.Tensor | None, like: torch.Tensor, device: torch.device) -> torch.Tensor:
    if source is None:
        full = torch.empty(like.shape, dtype=like.dtype, device=device)
    else:
        full = source.detach().to(device).contiguous()
    dist.broadcast(full, src=0)
    return full
