"""A model's files on the node of an actor that loads them: found there, or fetched once from the driver's node.

It knows directories and nodes, no engine and no learner.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.calls import answer
from actors.file_transfer import SLOWEST_BYTES_PER_S, NodeDirectory, describe_there, fetch, this_node
from weaver_rl.file_copy import has_files, num_bytes_of
from weaver_rl.models.directories import MARKER, make_once
from weaver_rl.models.smollm2 import cache_dir

UNUSED_DAYS = 30
"""A copy that no run asked for this long goes when another one is made."""
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack")
"""Suffixes of weights in forms that neither learner nor sampler loads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """A model directory that the driver resolved.

    Example:
        ModelFiles(place=NodeDirectory(node_id="8c1f…", path=Path("/data/model")), num_bytes=538_090_408)
    """

    place: NodeDirectory
    num_bytes: int


async def model_on(actor: Any, directory: Path, *, name: str, start_timeout_s: float) -> Path:
    """Where the node of an actor has the files of a directory of this node; fetched there if it does not have them.

    Args:
        actor: has a method `fetch_model`, which is `model_here`.
        name: what errors and waits call the actor.
        start_timeout_s: how long it may take until it answers at all.
    """
    num_bytes = num_bytes_of(directory)
    files = ModelFiles(place=NodeDirectory(node_id=this_node(), path=directory.absolute()), num_bytes=num_bytes)
    found: Path = await answer(
        actor.fetch_model.remote(files),
        actor=name,
        doing="fetching the model",
        timeout_s=start_timeout_s + num_bytes / SLOWEST_BYTES_PER_S,
    )
    return found


def model_here(files: ModelFiles) -> Path:
    """The directory to load on the node that this is called on. Blocks, for minutes where a large model is fetched.

    Several processes of a node may call at once: one of them fetches, the others wait for it.

    Raises:
        FilesError: there is no room for a copy, or the files changed while they were copied.
        ActorFailedError: the driver's node does not answer.
    """
    if files.place.node_id == this_node():
        return files.place.path
    facts = describe_there(files.place, _is_loaded)
    for candidate in _candidates(files.place.path):
        if has_files(candidate, facts) and _weights(candidate) <= {file.name for file in facts.files}:
            return candidate
    copies = cache_dir() / "models"
    copy = copies / facts.fingerprint
    if copy.is_dir() and not has_files(copy, facts):
        (copy / MARKER).unlink(missing_ok=True)  # somebody changed it: `make_once` makes it again

    def fetch_into(aside: Path) -> None:
        # Only one process makes copies of this model now: what others began they did not live to finish.
        _remove(left for left in copies.glob(f".{facts.fingerprint}-*") if left != aside)
        _remove(old for old in copies.iterdir() if _is_unused(old))
        fetch(files.place, facts, aside)

    directory = make_once(copy, {"copy_of": facts.fingerprint}, fetch_into)
    os.utime(directory)
    return directory


def _is_loaded(name: str) -> bool:
    """Whether a file of a model directory is for learner or sampler."""
    hidden = any(part.startswith(".") for part in name.split("/"))
    return not hidden and name != MARKER and not name.endswith(OTHER_WEIGHTS)


def _candidates(directory: Path) -> Iterator[Path]:
    """Where this node may have the same files already: at the same path, or in its own cache of the hub."""
    yield directory
    repository, snapshots, revision = directory.parts[-3:] if len(directory.parts) > 3 else ("", "", "")
    if snapshots == "snapshots":
        from huggingface_hub.constants import HF_HUB_CACHE

        yield Path(HF_HUB_CACHE) / repository / snapshots / revision


def _weights(directory: Path) -> set[str]:
    """Files that an engine would load whether they are part of the model or not."""
    return {path.relative_to(directory).as_posix() for path in directory.glob("*.safetensors")}


def _is_unused(copy: Path) -> bool:
    try:
        return not copy.name.startswith(".") and copy.stat().st_mtime < time.time() - UNUSED_DAYS * 86400
    except FileNotFoundError:
        return False  # another process, which fetches another model, removed it just now


def _remove(directories: Iterator[Path]) -> None:
    for directory in list(directories):
        with contextlib.suppress(OSError):
            shutil.rmtree(directory)
