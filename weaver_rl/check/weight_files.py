"""Whether the weights of a model directory are whole: headers are read, tensors are not. It knows no model."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

from weaver_rl.errors import ModelError

INDEX = "model.safetensors.index.json"
LFS_POINTER = b"version https://git-lfs"
MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""


def weight_bytes(directory: Path) -> int:
    """Bytes of all weight files, each of them whole.

    Raises:
        ModelError: names the first file that is missing, cut off or no weights at all.
    """
    files = dict(_expected(directory))
    for name, tensors in files.items():
        path = directory / name
        if not path.is_file():
            raise ModelError(f"{path} is not there, and {INDEX} names it: copy or download the directory again")
        if missing := sorted(tensors - _check_file(path)):
            raise ModelError(
                f"{path} lacks {len(missing)} tensor(s) that {INDEX} places there, {missing[0]} first: copy it again"
            )
    return sum((directory / name).stat().st_size for name in files)


def _expected(directory: Path) -> Iterator[tuple[str, set[str]]]:
    """Each weight file with the tensors that must be in it; without an index every file there is."""
    index = directory / INDEX
    if not index.is_file():
        yield from ((path.name, set()) for path in sorted(directory.glob("*.safetensors")))
        return
    try:
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        pairs = list(weight_map.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is not an index of weights ({error!r}): copy or download it again") from error
    for name in sorted(set(weight_map.values())):
        yield name, {tensor for tensor, file in pairs if file == name}


def _check_file(path: Path) -> set[str]:
    """Names of the tensors in a safetensors file that ends where its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(LFS_POINTER))
        if start == LFS_POINTER:
            raise ModelError(f"{path} is a Git LFS pointer of {size} bytes, not weights: run `git lfs pull` there")
        file.seek(0)
        try:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            if header_bytes > min(size, MAX_HEADER_BYTES):
                raise ValueError(f"its header would take {header_bytes} bytes")
            header = json.loads(file.read(header_bytes))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            names = set(header) - {"__metadata__"}
        except (struct.error, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise ModelError(f"{path} is no safetensors file ({error}): copy or download it again") from error
    expected = 8 + header_bytes + max(ends, default=0)
    if size != expected:
        raise ModelError(f"{path} has {size:,} bytes, its header says {expected:,}: copy or download it again")
    return names
