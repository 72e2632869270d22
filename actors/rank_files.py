"""Directories that learner ranks write and read, where a rank's node may not see the disk of the driver's.

A rank that sees the directory uses it; for others the files go through Ray, by a directory of their own node's cache.
It does not know what the files are.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from typing import Any

from actors.calls import answer, together
from actors.file_transfer import SLOWEST_BYTES_PER_S, NodeDirectory, describe_there, fetch, this_node
from actors.identity import Identity
from weaver_rl.file_copy import num_bytes_of
from weaver_rl.models.smollm2 import cache_dir
from weaver_rl.waits import current_waits

ABANDONED_AFTER_S = 86400.0
"""A copy on its way of a process that was killed."""


class RankFiles:
    """How the ranks of a learner get at a directory of this node.

    Args:
        timeout_s: how long one answer of a rank may take.
        name: what errors and waits call the learner.
    """

    def __init__(self, timeout_s: float, name: str = "learner") -> None:
        self._timeout_s = timeout_s
        self._name = name

    @contextlib.asynccontextmanager
    async def written(self, ranks: Sequence[Any], directory: Path) -> AsyncIterator[list[Path]]:
        """Where each rank writes what shall be in `directory` after the block."""
        nodes, first = await self._away(ranks, directory)
        made: list[NodeDirectory] = await self._ask(ranks, first.values(), "make_scratch", "making room for files")
        places = dict(zip(first, made, strict=True))
        try:
            yield [places[node].path if node in places else directory for node in nodes]
            for node, place in places.items():
                with current_waits().waiting(f"{self._name} rank {first[node]}", "giving its files"):
                    await asyncio.to_thread(_bring, place, directory)
        finally:
            await self._forget(ranks, {first[node]: place.path for node, place in places.items()})

    @contextlib.asynccontextmanager
    async def read(self, ranks: Sequence[Any], directory: Path) -> AsyncIterator[list[Path]]:
        """Where each rank finds what is in `directory`."""
        nodes, first = await self._away(ranks, directory)
        here = NodeDirectory(node_id=this_node(), path=directory)
        num_bytes = num_bytes_of(directory) if first else 0
        made: list[Path] = await self._ask(
            ranks, first.values(), "fetch_files", "fetching files", here, more_s=num_bytes / SLOWEST_BYTES_PER_S
        )
        copies = dict(zip(first, made, strict=True))
        try:
            yield [copies.get(node, directory) for node in nodes]
        finally:
            await self._forget(ranks, {first[node]: copy for node, copy in copies.items()})

    async def _away(self, ranks: Sequence[Any], directory: Path) -> tuple[list[str], dict[str, int]]:
        """The node of every rank, and the first rank of each node that does not see this node's directory."""
        identities: list[Identity] = await self._ask(ranks, range(len(ranks)), "identity", "saying where it is")
        nodes = [identity.node_id for identity in identities]
        first = {node: nodes.index(node) for node in nodes if node != this_node()}
        if not first:
            return nodes, {}
        beside = next(place for place in (directory, *directory.parents) if place.is_dir())
        token = beside / f".seen-{uuid.uuid4().hex}"
        token.touch()  # made just now: a directory that is only called the same does not have it
        try:
            seen: list[bool] = await self._ask(ranks, first.values(), "sees", "looking for the run folder", token)
        finally:
            token.unlink(missing_ok=True)
        return nodes, {node: rank for (node, rank), sees in zip(first.items(), seen, strict=True) if not sees}

    async def _forget(self, ranks: Sequence[Any], copies: dict[int, Path]) -> None:
        for rank, path in copies.items():
            with contextlib.suppress(Exception):  # boundary: a lost rank; its node removes them another day
                await self._ask(ranks, [rank], "remove_files", "removing its copy of files", path)

    async def _ask(
        self, ranks: Sequence[Any], which: Iterable[int], method: str, doing: str, *args: Any, more_s: float = 0.0
    ) -> list[Any]:
        return await together(
            answer(
                getattr(ranks[rank], method).remote(*args),
                actor=f"{self._name} rank {rank}",
                doing=doing,
                timeout_s=self._timeout_s + more_s,
            )
            for rank in which
        )


class FilesOfRank:
    """What a rank does for it on its own node; a base of the rank's actor."""

    def sees(self, path: Path) -> bool:
        """Whether a file of the driver's is there on this node too."""
        return path.exists()

    def make_scratch(self) -> NodeDirectory:
        """An empty directory for files that the driver will fetch."""
        return NodeDirectory(node_id=this_node(), path=Path(tempfile.mkdtemp(prefix="out-", dir=_parent())))

    def fetch_files(self, place: NodeDirectory) -> Path:
        """A copy of another node's directory."""
        copy = Path(tempfile.mkdtemp(prefix="in-", dir=_parent()))
        try:
            fetch(place, describe_there(place, _all), copy)
        except BaseException:  # boundary: cleans up, then raises again
            shutil.rmtree(copy, ignore_errors=True)
            raise
        return copy

    def remove_files(self, copy: Path) -> None:
        """Removes what `make_scratch` or `fetch_files` made."""
        shutil.rmtree(copy, ignore_errors=True)


def _bring(place: NodeDirectory, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    fetch(place, describe_there(place, _all), directory)


def _all(name: str) -> bool:
    return bool(name)


def _parent() -> Path:
    """Where copies on their way are, without those that nobody will ask for any more."""
    parent = cache_dir() / "on_their_way"
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.iterdir():
        with contextlib.suppress(OSError):
            if left.stat().st_mtime < time.time() - ABANDONED_AFTER_S:
                shutil.rmtree(left)
    return parent
