"""One AdamW update from gradients that are summed over ranks already. It knows neither policies nor data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from weaver_rl.types import AdamParams


def global_norm(gradients: Iterable[torch.Tensor]) -> float:
    """Their L2 norm as of one vector; a collective when they are sharded."""
    norm = get_total_norm(gradients)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def adamw_step(
    optimizer: torch.optim.AdamW, gradients: Mapping[nn.Parameter, torch.Tensor], params: AdamParams, *, norm: float
) -> None:
    """Clip by `norm`, that of the gradients, and step with every field of `params`; gradients are cleared."""
    for parameter, gradient in gradients.items():
        parameter.grad = gradient
    if params.grad_clip_norm > 0:
        clip_grads_with_norm_(gradients, params.grad_clip_norm, torch.tensor(norm))
    for group in optimizer.param_groups:
        group["lr"], group["betas"] = params.learning_rate, (params.beta1, params.beta2)
        group["eps"], group["weight_decay"] = params.eps, params.weight_decay
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
