"""LoRA on CPU engines: takes the place of vLLM's kernels there. It knows rows and places, no requests and no files.

In vLLM 0.32 a row without an adapter has place -1, by which those kernels take the last one: the bare model then
answers with somebody's adapter. They also copy the weights of an adapter once for every row.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

Groups = list[tuple[int, slice | torch.Tensor]]
"""Places of adapters with the rows that are theirs; rows without an adapter are in none."""


class GroupedLora(PunicaWrapperCPU):
    """Two matrix products for each adapter of a batch, over its rows."""

    def update_metadata(
        self, mapping: Any, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        self._token_groups = _groups(self.token_lora_indices)
        self._logit_groups = _groups(self.sampler_indices)

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **kwargs: Any,
    ) -> None:
        """y (rows, out) += scale · x (rows, in) Aᵀ Bᵀ for every slice of the outputs."""
        y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        start = 0
        for a, b, size in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            for place, rows in self._token_groups:
                y[rows, start : start + size] += (x[rows] @ a[place, 0].T * scale) @ b[place, 0].T
            start += size

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        **kwargs: Any,
    ) -> None:
        """y (rows, padded vocabulary) += scale · x (rows, hidden) Aᵀ Bᵀ."""
        vocab_size = lora_b_stacked.shape[-2]
        for place, rows in self._logit_groups:
            y[rows, :vocab_size] += (x[rows] @ lora_a_stacked[place, 0].T * scale) @ lora_b_stacked[place, 0].T

    def add_lora_embedding(
        self, y: torch.Tensor, x: torch.Tensor, lora_b_stacked: torch.Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        """y (rows, hidden) += x (rows, rank) Bᵀ."""
        for place, rows in self._token_groups:
            y[rows] += x[rows] @ lora_b_stacked[place, 0].T


def _groups(places: torch.Tensor) -> Groups:
    found: Groups = []
    for place in torch.unique(places).tolist():
        if place < 0:
            continue
        rows = (places == place).nonzero().flatten()
        first, last = int(rows[0]), int(rows[-1])
        together = last - first + 1 == len(rows)
        found.append((place, slice(first, last + 1) if together else rows))
    return found
