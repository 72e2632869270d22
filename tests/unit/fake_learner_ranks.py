"""Learners of a server without Ray: ranks that answer in this process, and hosts whose starts a test decides."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from actors import learner_host
from actors.learners import RayLearners
from actors.lineup import PreparedModel
from weaver_rl.service.calls import LineupModel
from weaver_rl.service.config import ServeConfig

BASE = "org/base"


class _Reference:
    """As Ray's: who stops waiting for it does not stop the call."""

    def __init__(self, task: asyncio.Task[Any]) -> None:
        self._task = task

    def __await__(self) -> Generator[Any, None, Any]:
        return asyncio.shield(self._task).__await__()


class FakeRank:
    """Handle of a rank. `log` has `name begins` when a call is sent, `name ends` when it is over.

    `hold` makes calls of that name wait for `let_go`; `errors` has what calls of a name raise.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.errors: dict[str, BaseException] = {}
        self.adapters: set[str] = set()
        self.answers: dict[str, Any] = {}
        self.is_killed = False
        self._held: dict[str, asyncio.Event] = {}

    def hold(self, name: str) -> None:
        self._held[name] = asyncio.Event()

    def let_go(self, name: str) -> None:
        self._held.pop(name).set()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return _Method(lambda *arguments: self._sent(name, arguments))

    def _sent(self, name: str, arguments: tuple[Any, ...]) -> _Reference:
        self.log.append(f"{name} begins")
        self.calls.append((name, arguments))
        return _Reference(asyncio.create_task(self._work(name, arguments)))

    async def _work(self, name: str, arguments: tuple[Any, ...]) -> Any:
        try:
            if (held := self._held.get(name)) is not None:
                await held.wait()
            if name in self.errors:
                raise self.errors[name]
            if name == "add_adapter":
                assert arguments[0] not in self.adapters
                self.adapters.add(arguments[0])
            if name == "remove_adapter":
                self.adapters.remove(arguments[0])
            return self.answers.get(name)
        finally:
            self.log.append(f"{name} ends")


class _Method:
    def __init__(self, call: Callable[..., Awaitable[Any]]) -> None:
        self.remote = call


class FakeCluster:
    """Stands in for all that a host starts. `starting` is what each start does; by default it is over at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ranks: list[FakeRank] = []
        self.num_starts = 0
        self.rooms: list[object] = []
        self.starting: Callable[[], Awaitable[None]] | None = None
        for name in ("reserve", "spawn_learner", "start_learner", "remove_placement_group"):
            monkeypatch.setattr(learner_host, name, getattr(self, f"_{name}"))
        monkeypatch.setattr("actors.spawn.end_actor", self._end_actor)

    async def _reserve(self, *_: Any) -> object:
        self.rooms.append(object())
        return self.rooms[-1]

    def _remove_placement_group(self, room: object) -> None:
        self.rooms.remove(room)

    def _spawn_learner(self, actors: Any, *_: Any) -> None:
        self.ranks.append(FakeRank())
        actors.learner_ranks.append(self.ranks[-1])

    async def _start_learner(self, *_: Any, **__: Any) -> None:
        self.num_starts += 1
        if self.starting is not None:
            await self.starting()

    async def _end_actor(self, actor: FakeRank, *, kill: bool) -> None:
        assert kill
        actor.is_killed = True

    def learners(self, **sections: Any) -> RayLearners:
        """Of a server with one base model."""
        model = {"name": BASE, "model": {"name": "some/directory"}, "max_lora_rank": 8}
        config = ServeConfig.model_validate({"models": [model]} | sections)
        served = config.models[0]
        lineup = LineupModel(
            name=BASE,
            training_modes=served.training_modes,
            max_length=64,
            tokenizer_path="somewhere",
            max_lora_rank=8,
            vocab_size=100,
        )
        prepared = PreparedModel(config=served, model_dir=Path("somewhere"), stop_tokens=(), lineup=lineup)
        return RayLearners(config, {BASE: prepared}, cluster_gpus=0.0)


async def until(condition: Callable[[], bool]) -> None:
    """Gives the loop turns until it is so."""
    async with asyncio.timeout(5.0):
        while not condition():
            await asyncio.sleep(0.001)
