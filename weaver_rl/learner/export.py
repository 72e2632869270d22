"""The policy's weights under Hugging Face names, streamed in pieces. It knows names and files, no optimizer.

What an adapter changes is merged on the way, one weight at a time, and the policy itself stays as it is.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers.core_model_loading import WeightConverter, revert_weight_conversion

from weaver_rl.learner.policy import own_parameters
from weaver_rl.learner.sharding import full_tensor, persistent_buffers

Changes = Mapping[str, Callable[[], torch.Tensor]]
"""What to add to a weight (float32, of its shape), by the weight's name."""
MAX_SHARD_BYTES = 4 << 30
NO_CHANGES: Changes = {}
_COPIED_SUFFIXES = {".json", ".jinja", ".model", ".txt", ".tiktoken"}


def iterate_chunks(
    model: Any, *, rank: int, max_bytes: int, dtype: torch.dtype, hub_names: bool, changes: Changes = NO_CHANGES
) -> Iterator[dict[str, torch.Tensor]]:
    """Every weight once, tied ones under their first name, in chunks of at most `max_bytes` or one weight.

    Every rank must exhaust it, since gathering is a collective; only rank 0's chunks hold anything. Tensors may share
    memory with the policy: copy before the next optimizer step. `hub_names`: as the model's files on the hub name
    and lay out the weights; otherwise as the module does (they differ for some mixture-of-experts models only).
    Weights that are tied but changed differently come under both names: see `unties`.
    """
    whole_blocks = hub_names and _has_conversions(model)
    chunk: dict[str, torch.Tensor] = {}
    num_bytes, block = 0, ""
    for name, tensor in _full_tensors(model, dtype, changes):
        next_block = _block_of(name) if whole_blocks else name
        tensor_bytes = tensor.numel() * tensor.element_size()
        if chunk and num_bytes + tensor_bytes > max_bytes and next_block != block:
            yield _finished(model, chunk, rank, hub_names)
            chunk, num_bytes = {}, 0
        block = next_block
        chunk[name] = tensor if rank == 0 else tensor.new_empty(0)
        num_bytes += tensor_bytes
    yield _finished(model, chunk, rank, hub_names)


def save_hf_directory(
    model: Any,
    directory: Path,
    *,
    model_dir: Path,
    rank: int,
    dtype: torch.dtype,
    hub_names: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    changes: Changes = NO_CHANGES,
) -> None:
    """Write weights, config and tokenizer files as a Hugging Face directory; rank 0 writes, every rank takes part."""
    if rank == 0:
        directory.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, int] = {}
    total_bytes = 0
    chunks = iterate_chunks(
        model, rank=rank, max_bytes=max_shard_bytes, dtype=dtype, hub_names=hub_names, changes=changes
    )
    for number, chunk in enumerate(chunks, start=1):
        if rank == 0:
            tensors = {name: tensor.cpu().contiguous() for name, tensor in chunk.items()}
            save_file(tensors, directory / _part_name(number), metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, number)
            total_bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if rank == 0:
        _name_shards(directory, weight_map, total_bytes)
        _copy_companions(model_dir, directory, dtype, untied=unties(model, changes))


def unties(model: Any, changes: Changes) -> bool:
    """Whether weights that are one in the model are two once the changes are made."""
    versions: dict[int, set[str | None]] = {}
    for name, parameter in own_parameters(model, tied_twice=True):
        versions.setdefault(id(parameter), set()).add(name if name in changes else None)
    return any(len(names) > 1 for names in versions.values())


def _full_tensors(model: Any, dtype: torch.dtype, changes: Changes) -> Iterator[tuple[str, torch.Tensor]]:
    seen = set()
    for name, parameter in own_parameters(model, tied_twice=True):
        version = (id(parameter), name if name in changes else None)
        if version in seen:
            continue
        seen.add(version)
        full = full_tensor(parameter.detach())
        if name in changes:
            # Never in place: without sharding it is the live weight.
            full = full + changes[name]().detach()
        yield name, full.to(dtype)
    for name, buffer in persistent_buffers(model):
        yield name, buffer.detach()


def _finished(model: Any, chunk: dict[str, torch.Tensor], rank: int, hub_names: bool) -> dict[str, torch.Tensor]:
    if rank != 0:
        return {}
    return dict(revert_weight_conversion(model, chunk)) if hub_names else chunk


def _has_conversions(model: Any) -> bool:
    conversions = getattr(model, "_weight_conversions", None) or []
    return any(isinstance(conversion, WeightConverter) for conversion in conversions)


def _block_of(name: str) -> str:
    """The layer a weight belongs to: `model.layers.3.mlp.up_proj.weight` is of `model.layers.3`."""
    match = re.match(r".*?\.\d+(?=\.)", name)
    return match.group() if match else name


def _part_name(number: int) -> str:
    return f"part-{number:05d}.safetensors"


def _name_shards(directory: Path, weight_map: dict[str, int], total_bytes: int) -> None:
    num_shards = max(weight_map.values())
    if num_shards == 1:
        (directory / _part_name(1)).rename(directory / "model.safetensors")
        return
    names = {number: f"model-{number:05d}-of-{num_shards:05d}.safetensors" for number in range(1, num_shards + 1)}
    for number, name in names.items():
        (directory / _part_name(number)).rename(directory / name)
    index = {
        "metadata": {"total_size": total_bytes},
        "weight_map": {name: names[number] for name, number in weight_map.items()},
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _copy_companions(model_dir: Path, directory: Path, dtype: torch.dtype, *, untied: bool) -> None:
    """Tokenizer, generation config and the like, as they are; config.json with the dtype and tying really written."""
    for path in sorted(model_dir.iterdir()):
        if path.is_file() and path.suffix in _COPIED_SUFFIXES and not path.name.endswith(".index.json"):
            shutil.copyfile(path, directory / path.name)
    config = json.loads((directory / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    if untied:
        for section in (config, config.get("text_config")):
            if isinstance(section, dict):
                section["tie_word_embeddings"] = False
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
