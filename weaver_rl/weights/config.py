"""The `weights` section: how new weights travel and how their arrival is checked."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from weaver_rl.section import Section

Transport = Literal["object_store", "nccl", "ipc"]


class WeightsConfig(Section):
    """Weight sync after every step."""

    transport: Literal["auto"] | Transport = "auto"
    """`object_store`: Ray's shared memory, for CPU engines. `nccl`, `ipc`: vLLM's weight-transfer API, between GPUs and
    on one GPU. `auto`: object_store without GPUs, ipc when colocated, else nccl."""
    chunk_mb: int = Field(default=512, ge=1)
    """Tensors are published in chunks of about this size (MiB), so that a copy of the whole policy is never needed."""
    probe_tolerance: float | None = Field(default=None, gt=0)
    """Largest |Δ| in nats between sampler and learner on the probe; null: 1e-3 in float32, 0.2 in lower precision."""
    probe_tokens: int = Field(default=64, ge=2)
    """Length of the probe; cut to the engine's limit."""
    timeout_s: float = Field(default=600.0, gt=0)
    """A sync that takes longer stops the run, naming the sampler."""


def resolve_transport(transport: Literal["auto"] | Transport, *, on_gpu: bool, colocated: bool) -> Transport:
    """The transport that `auto` stands for on these machines."""
    if transport != "auto":
        return transport
    if not on_gpu:
        return "object_store"
    return "ipc" if colocated else "nccl"
