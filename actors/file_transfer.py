"""Files from one node of the cluster to another, in pieces, by tasks on the node that has them.

It knows no models and no checkpoints, and starts no actor: there is nothing to end afterwards.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from weaver_rl.errors import ActorFailedError, WeaverRLError
from weaver_rl.file_copy import Chunk, DirectoryFacts, describe, pieces, read_chunk, write_files

CHUNK_TIMEOUT_S = 300.0
"""For one piece; the first of a node waits for a worker process there."""
SLOWEST_BYTES_PER_S = 10e6
"""A copy that is slower than this is taken for stuck."""
CHUNKS_AHEAD = 3
"""Pieces that are on their way while one is written: what a copy needs of memory and of the object store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeDirectory:
    """A directory of one node of the cluster.

    Example:
        NodeDirectory(node_id="8c1f…", path=Path("/data/runs/quickstart/initial_model"))
    """

    node_id: str
    path: Path


def this_node() -> str:
    """Id of the node that this is called on."""
    return str(ray.get_runtime_context().get_node_id())


def describe_there(place: NodeDirectory, wanted: Callable[[str], bool]) -> DirectoryFacts:
    """What is in a directory of another node. Blocks.

    Raises:
        FilesError: the directory cannot be read there.
        ActorFailedError: that node does not answer.
    """
    facts: DirectoryFacts = _value(_on(place, describe, wanted), place)
    return facts


def fetch(place: NodeDirectory, facts: DirectoryFacts, target: Path) -> None:
    """Copies these files of another node into `target`, which is there. Blocks.

    Raises:
        FilesError: there is no room, or the files changed meanwhile.
        ActorFailedError: that node does not answer.
    """
    write_files(target, facts, _chunks(place, facts))


def _chunks(place: NodeDirectory, facts: DirectoryFacts) -> Iterator[Chunk]:
    coming: deque[Any] = deque()
    for name, offset in pieces(facts):
        coming.append(_on(place, read_chunk, name, offset))
        if len(coming) > CHUNKS_AHEAD:
            yield _value(coming.popleft(), place)
    while coming:
        yield _value(coming.popleft(), place)


def _on(place: NodeDirectory, function: Callable[..., Any], *arguments: Any) -> Any:
    """Reference to what the function returns for the directory, on the node that has it."""
    remote: Any = ray.remote(function)
    there = NodeAffinitySchedulingStrategy(place.node_id, soft=False)
    return remote.options(num_cpus=0, scheduling_strategy=there).remote(place.path, *arguments)


def _value(reference: Any, place: NodeDirectory) -> Any:
    try:
        return ray.get(reference, timeout=CHUNK_TIMEOUT_S)
    except RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, WeaverRLError):
            raise cause from None
        what = f"{type(cause).__name__}: {cause}" if isinstance(error, RayTaskError) else type(error).__name__
        raise ActorFailedError(f"node {place.node_id[:8]} did not give the files in {place.path}: {what}") from error
