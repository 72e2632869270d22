"""What a LoRA directory must hold before an engine may see it. It knows files and shapes, no vLLM and no requests.

vLLM looks at an adapter only inside an engine step, where a fault ends every request; and it fills one that is too
small for the model up with zeros. So all of it is looked at here first.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from weaver_rl.engines.weight_files import Shapes, read_tensors
from weaver_rl.errors import EngineError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(embedding_)?(?P<side>[AB])(\.weight)?")
_BASE_COPY = re.compile(r".+\.(embed_tokens|lm_head)\.base_layer\.weight")
"""Copies of base weights that PEFT may add for embedding and head; they are not loaded."""


def check_adapter(directory: Path, *, max_rank: int, base: Shapes) -> None:
    """Raises EngineError unless the directory is a LoRA adapter of the model that the engine can load.

    Args:
        max_rank: largest rank allowed.
        base: shapes of the model's weights, by their Hugging Face names.
    """
    config = _read_config(directory / CONFIG)
    sides: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in read_tensors(directory / WEIGHTS):
        if _BASE_COPY.fullmatch(name):
            continue
        found = _NAME.fullmatch(name)
        if found is None:
            raise EngineError(f"{directory / WEIGHTS}: {name} is no LoRA weight; lora_A and lora_B are allowed")
        if not bool(tensor.isfinite().all()):
            raise EngineError(f"{directory / WEIGHTS}: {name} holds values that are not finite")
        sides.setdefault(found["module"], {})[found["side"]] = tuple(tensor.shape)
    if not sides:
        raise EngineError(f"{directory / WEIGHTS} holds no LoRA weights")
    for module, shapes in sides.items():
        _check_module(directory / WEIGHTS, module, shapes, max_rank, _base_shape(module, base))
    _check_rank(directory, config, {shapes["A"][0] for shapes in sides.values()})


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise EngineError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise EngineError(f"{path} is no configuration of a LoRA adapter: peft_type LORA is needed")
    return config


def _check_module(
    path: Path, module: str, shapes: dict[str, tuple[int, ...]], max_rank: int, base: tuple[int, ...] | None
) -> None:
    if shapes.keys() != {"A", "B"} or any(len(shape) != 2 for shape in shapes.values()):
        raise EngineError(f"{path}: {module} needs two matrices, lora_A and lora_B; seen {shapes}")
    (rank, width_in), (width_out, rank_b) = shapes["A"], shapes["B"]
    if rank != rank_b:
        raise EngineError(f"{path}: {module} has rank {rank} in lora_A and {rank_b} in lora_B")
    if rank > max_rank:
        raise EngineError(f"{path}: {module} has rank {rank}, the engine takes at most {max_rank}")
    if base is not None and (width_out, width_in) != base:
        raise EngineError(f"{path}: {module} is for weights of shape {(width_out, width_in)}, the model has {base}")


def _check_rank(directory: Path, config: dict[str, Any], ranks: set[int]) -> None:
    # The scale of the adapter is computed from the rank of the configuration.
    if not config.get("rank_pattern") and ranks != {config.get("r")}:
        raise EngineError(f"{directory / CONFIG} says rank {config.get('r')}, the weights have {sorted(ranks)}")


def _base_shape(module: str, base: Shapes) -> tuple[int, ...] | None:
    """Shape (out, in) of what the module multiplies with; None where the model's files do not name it."""
    if module.endswith("embed_tokens"):
        return _turned(base.get(f"{module}.weight"))
    if module == "lm_head" and "lm_head.weight" not in base:
        return next((shape for name, shape in base.items() if name.endswith("embed_tokens.weight")), None)
    return base.get(f"{module}.weight")


def _turned(shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
    return shape and shape[::-1]
