"""Weights in Hugging Face directories: names and shapes from the headers, tensors one at a time. It knows no engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weaver_rl.errors import EngineError

if TYPE_CHECKING:
    import torch

Shapes = Mapping[str, tuple[int, ...]]


def tensor_shapes(*paths: Path) -> dict[str, tuple[int, ...]]:
    """Shape by name over some safetensors files; no tensor is read. Raises EngineError for files that cannot be."""
    shapes: dict[str, tuple[int, ...]] = {}
    with ExitStack() as stack:
        for path in paths:
            file = _open(path, stack)
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


def read_tensors(*paths: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of some safetensors files with its name. Raises EngineError for files that cannot be read."""
    with ExitStack() as stack:
        for path in paths:
            file = _open(path, stack)
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)


def weight_files(directory: Path) -> list[Path]:
    """The files of a model's weights. Raises EngineError where there are none."""
    paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        raise EngineError(f"{directory} holds no *.safetensors: a Hugging Face directory with weights is needed")
    return paths


def check_same_model(seen: Shapes, expected: Shapes, *, tied_head: bool, where: Path) -> None:
    """Raises EngineError unless both name the same weights with the same shapes.

    A head that is the embedding may be there or not, and so may be what is computed from the configuration.
    """
    optional = {name for name in {*seen, *expected} if "rotary_emb." in name}
    if tied_head:
        optional.add("lm_head.weight")
    missing = expected.keys() - seen.keys() - optional
    unknown = seen.keys() - expected.keys() - optional
    if missing or unknown:
        raise EngineError(
            f"{where} is not of this model: weights missing {_some(missing)}, weights the model does not have "
            f"{_some(unknown)}"
        )
    for name in sorted(seen.keys() & expected.keys()):
        if seen[name] != expected[name]:
            raise EngineError(f"{where}: weight {name} must have shape {expected[name]}, seen {seen[name]}")


def _open(path: Path, stack: ExitStack) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return stack.enter_context(safe_open(path, framework="pt"))
    except (OSError, SafetensorError) as error:
        raise EngineError(f"{path} cannot be read as safetensors: {error}") from error


def _some(names: set[str]) -> str:
    shown = sorted(names)[:3]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "none"
