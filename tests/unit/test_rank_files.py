"""Directories of ranks on other nodes: used where they are seen, brought through Ray where they are not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actors import rank_files
from actors.file_transfer import NodeDirectory
from actors.identity import Identity
from actors.learner import RayLearnerGroup
from actors.rank_files import FilesOfRank, RankFiles
from weaver_rl.errors import ActorFailedError, LearnerLostError
from weaver_rl.file_copy import DirectoryFacts, describe, pieces, read_chunk, write_files

pytestmark = pytest.mark.unit


class Method:
    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method

    async def remote(self, *arguments: Any) -> Any:
        return self._method(*arguments)


class Rank(FilesOfRank):
    """Writes and reads a file of its own number; `cache` is that of its node."""

    def __init__(self, number: int, node: str, cache: Path, sees_everything: bool) -> None:
        self.number = number
        self.node = node
        self.cache = cache
        self.sees_everything = sees_everything
        self.used: list[Path] = []

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name not in ("sees", "make_scratch", "fetch_files", "remove_files", "identity", "save_state", "load_state"):
            return found
        return Method(lambda *arguments: self.on_its_node(found, *arguments))

    def on_its_node(self, method: Callable[..., Any], *arguments: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(self.cache))
            patch.setattr(rank_files, "this_node", lambda: self.node)
            return method(*arguments)

    def sees(self, path: Path) -> bool:
        assert path.exists()
        return self.sees_everything

    def identity(self) -> Identity:
        return Identity(pid=1, node_id=self.node, started_at=None)

    def save_state(self, path: Path, *_: Any) -> None:
        self.used.append(path)
        (path / f"rank-{self.number}").write_text(str(self.number))

    def load_state(self, path: Path, *_: Any) -> None:
        self.used.append(path)
        assert sorted(file.name for file in path.iterdir()) == ["rank-0", "rank-1", "rank-2", "rank-3"]


class Four:
    """A learner of four ranks: here, on a node that sees this one's disk, and two on one that does not."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.num_copies = 0
        self.ranks = [
            Rank(0, "here", root / "here", True),
            Rank(1, "seeing", root / "seeing", True),
            Rank(2, "away", root / "away", False),
            Rank(3, "away", root / "away", False),
        ]
        self.group = RayLearnerGroup(self.ranks, 5.0, files=RankFiles(5.0))
        self.directory = root / "checkpoint"
        self.directory.mkdir()
        monkeypatch.setattr(rank_files, "this_node", lambda: "here")
        monkeypatch.setattr(rank_files, "describe_there", lambda place, wanted: describe(place.path, wanted))
        monkeypatch.setattr(rank_files, "fetch", self.fetch)

    def fetch(self, place: NodeDirectory, facts: DirectoryFacts, target: Path) -> None:
        self.num_copies += 1
        write_files(target, facts, (read_chunk(place.path, *piece) for piece in pieces(facts)))

    def left_over(self) -> list[Path]:
        return [path for path in self.root.rglob("*") if path.parent.name == "on_their_way"]


@pytest.fixture
def four(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Four:
    return Four(tmp_path, monkeypatch)


def test_a_checkpoint_of_ranks_far_and_near_is_whole_and_loads_again(four: Four):
    asyncio.run(four.group.save_state(four.directory))
    assert sorted(path.name for path in four.directory.iterdir()) == ["rank-0", "rank-1", "rank-2", "rank-3"]
    asyncio.run(four.group.load_state(four.directory))
    for rank in four.ranks[:2]:
        assert rank.used == [four.directory, four.directory]
    # The two on one node share a copy.
    assert four.ranks[2].used == four.ranks[3].used
    assert all(path.is_relative_to(four.root / "away") for path in four.ranks[2].used)
    assert four.num_copies == 2
    assert four.left_over() == []


def test_a_large_checkpoint_may_take_long_to_fetch(four: Four, monkeypatch: pytest.MonkeyPatch):
    """Though each other answer of a rank must come at once."""
    limits: dict[str, float] = {}

    async def answer(reference: Any, *, doing: str, timeout_s: float, **_: Any) -> Any:
        limits[doing] = timeout_s
        return await reference

    monkeypatch.setattr(rank_files, "answer", answer)
    monkeypatch.setattr(rank_files, "SLOWEST_BYTES_PER_S", 0.01)
    asyncio.run(four.group.save_state(four.directory))
    asyncio.run(four.group.load_state(four.directory))
    assert limits["fetching files"] == 5.0 + 4 / 0.01
    assert limits["looking for the run folder"] == 5.0


def test_a_node_that_goes_while_its_files_are_fetched_is_a_lost_learner(four: Four, monkeypatch: pytest.MonkeyPatch):
    def gone(*_: Any) -> None:
        raise ActorFailedError("node away did not give the files")

    monkeypatch.setattr(rank_files, "fetch", gone)
    with pytest.raises(LearnerLostError, match="node away did not give"):
        asyncio.run(four.group.save_state(four.directory))
    assert four.left_over() == []
    with pytest.raises(LearnerLostError):
        asyncio.run(four.group.load_state(four.directory))
