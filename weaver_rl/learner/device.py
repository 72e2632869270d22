"""Where a rank computes, and in which dtype. It knows the configuration and what torch sees, no model."""

from __future__ import annotations

import torch

from weaver_rl.learner.config import LearnerConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pick_device(config: LearnerConfig, rank: int) -> torch.device:
    """One GPU for each rank of a node, unless none is wanted or there is none."""
    if config.num_gpus == 0 or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def pick_dtype(config: LearnerConfig, device: torch.device) -> torch.dtype:
    """What matrices are multiplied in there."""
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[config.dtype]
