"""A LoRA adapter as the directory that PEFT and vLLM load. It knows names and files, no model and no optimizer."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file

PREFIX = "base_model.model."
"""What PEFT puts before the name of a module of the base model."""


def save_adapter(directory: Path, tensors: Mapping[str, torch.Tensor], config: LoraConfig) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`; `tensors` by their names in the file."""
    directory.mkdir(parents=True, exist_ok=True)
    # A file shares no memory with the adapter, which the next optimizer step changes in place.
    contents = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contents, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    written = copy.copy(config)
    written.inference_mode = True
    # A set comes in another order in every process.
    written.target_modules = sorted(config.target_modules or ())
    written.save_pretrained(str(directory))
