"""What an engine is given as files: adapters and whole weights of another model are told before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from weaver_rl.engines.adapter_files import check_adapter
from weaver_rl.engines.weight_files import check_same_model, read_tensors, tensor_shapes, weight_files
from weaver_rl.errors import EngineError

pytestmark = pytest.mark.unit

BASE = {
    "model.embed_tokens.weight": (10, 4),
    "model.layers.0.q_proj.weight": (6, 4),
    "model.norm.weight": (4,),
}
LAYER = "base_model.model.model.layers.0.q_proj"
HEAD = "base_model.model.lm_head"
Tensors = dict[str, torch.Tensor]


def low_rank(module: str, rank: int = 2, width_in: int = 4, width_out: int = 6) -> Tensors:
    return {
        f"{module}.lora_A.weight": torch.ones(rank, width_in),
        f"{module}.lora_B.weight": torch.ones(width_out, rank),
    }


def write_adapter(directory: Path, tensors: Tensors, **config: Any) -> Path:
    directory.mkdir(exist_ok=True)
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]} | config
    (directory / "adapter_config.json").write_text(json.dumps(content))
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


# -- adapters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tensors",
    [
        low_rank(LAYER),
        low_rank(LAYER) | low_rank(HEAD, width_out=10),
        low_rank(HEAD, width_out=10) | {f"{HEAD}.base_layer.weight": torch.ones(10, 4)},
        {
            "base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 10),
            "base_model.model.model.embed_tokens.lora_embedding_B": torch.ones(4, 2),
        },
    ],
    ids=["layer", "tied head", "copy of the base head", "embedding"],
)
def test_adapters_of_this_model_pass(tensors: Tensors, tmp_path: Path):
    check_adapter(write_adapter(tmp_path, tensors), max_rank=2, base=BASE)


@pytest.mark.parametrize(
    ("tensors", "config", "seen"),
    [
        ({}, {}, "holds no LoRA weights"),
        (low_rank(LAYER, rank=3), {"r": 3}, "has rank 3, the engine takes at most 2"),
        (low_rank(LAYER, rank=1), {}, r"says rank 2, the weights have \[1\]"),
        (low_rank(LAYER, width_in=3), {}, r"is for weights of shape \(6, 3\), the model has \(6, 4\)"),
        (low_rank(HEAD, width_out=9), {}, r"is for weights of shape \(9, 4\), the model has \(10, 4\)"),
        ({f"{LAYER}.lora_A.weight": torch.ones(2, 4)}, {}, "needs two matrices, lora_A and lora_B"),
        ({f"{LAYER}.weight": torch.ones(2, 4)}, {}, "is no LoRA weight"),
        ({name: tensor / 0 for name, tensor in low_rank(LAYER).items()}, {}, "values that are not finite"),
        (low_rank(LAYER), {"peft_type": "IA3"}, "peft_type LORA is needed"),
    ],
    ids=["empty", "rank", "other rank", "too small", "head", "half", "no LoRA", "not finite", "other kind"],
)
def test_anything_else_is_refused(tensors: Tensors, config: dict[str, Any], seen: str, tmp_path: Path):
    with pytest.raises(EngineError, match=seen):
        check_adapter(write_adapter(tmp_path, tensors, **config), max_rank=2, base=BASE)


@pytest.mark.parametrize(
    ("spoil", "seen"),
    [
        (lambda path: (path / "adapter_config.json").unlink(), "adapter_config.json cannot be read"),
        (lambda path: (path / "adapter_config.json").write_text("{"), "adapter_config.json cannot be read"),
        (lambda path: (path / "adapter_model.safetensors").unlink(), "adapter_model.safetensors cannot be read"),
        (lambda path: (path / "adapter_model.safetensors").write_bytes(b"no"), "safetensors cannot be read"),
    ],
    ids=["no config", "bad config", "no weights", "bad weights"],
)
def test_missing_and_broken_files_are_told(spoil: Callable[[Path], Any], seen: str, tmp_path: Path):
    spoil(write_adapter(tmp_path, low_rank(LAYER)))
    with pytest.raises(EngineError, match=seen):
        check_adapter(tmp_path, max_rank=2, base=BASE)


def test_a_directory_that_is_gone_is_told(tmp_path: Path):
    with pytest.raises(EngineError, match="cannot be read"):
        check_adapter(tmp_path / "gone", max_rank=2, base=BASE)


# -- whole weights -----------------------------------------------------------------------------------------------------


def write_weights(directory: Path, shapes: dict[str, tuple[int, ...]]) -> list[Path]:
    for index, (name, shape) in enumerate(shapes.items()):
        save_file({name: torch.full(shape, float(index))}, directory / f"model-{index}.safetensors")
    return weight_files(directory)


def test_weights_are_read_over_all_files(tmp_path: Path):
    files = write_weights(tmp_path, BASE)
    assert tensor_shapes(*files) == BASE
    means = {name: float(tensor.mean()) for name, tensor in read_tensors(*files)}
    assert means == dict(zip(BASE, (0, 1, 2), strict=True))


def test_a_directory_without_weights_is_told(tmp_path: Path):
    with pytest.raises(EngineError, match=r"holds no \*\.safetensors"):
        weight_files(tmp_path)


@pytest.mark.parametrize("extra", [{}, {"lm_head.weight": (10, 4)}, {"layers.0.rotary_emb.inv_freq": (2,)}])
def test_the_same_model_passes(extra: dict[str, tuple[int, ...]], tmp_path: Path):
    check_same_model(BASE | extra, BASE, tied_head=True, where=tmp_path)
    check_same_model(BASE, BASE | extra, tied_head=True, where=tmp_path)


@pytest.mark.parametrize(
    ("seen", "message"),
    [
        ({"model.norm.weight": (4,)}, r"missing model\.embed_tokens\.weight, model\.layers\.0\.q_proj\.weight"),
        (BASE | {"more": (1,)}, "does not have more"),
        (BASE | {"lm_head.weight": (10, 4)}, r"does not have lm_head\.weight"),
        (BASE | {"model.norm.weight": (5,)}, r"model\.norm\.weight must have shape \(4,\), seen \(5,\)"),
    ],
    ids=["missing", "unknown", "head of a model with two matrices", "shape"],
)
def test_another_model_is_refused(seen: dict[str, tuple[int, ...]], message: str, tmp_path: Path):
    with pytest.raises(EngineError, match=message):
        check_same_model(seen, BASE, tied_head=False, where=tmp_path)
