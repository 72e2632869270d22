"""How a server stops: what runs ends first and is recorded, while all that it needs is still there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_learner_ranks import until
from rich.console import Console

from actors import serve
from weaver_rl.meter import NoMeter
from weaver_rl.service.config import ServeConfig
from weaver_rl.service.operations import Operations
from weaver_rl.service.records import Operation
from weaver_rl.service.store import Store

pytestmark = pytest.mark.unit


class Parts:
    """The parts of a server that are not tested here: each notes when it ends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ended: list[str] = []
        self.operations: Operations | None = None
        for name in ("HttpServer", "Service", "_hosts"):
            monkeypatch.setattr(serve, name, getattr(self, f"_{name.strip('_')}"))
        monkeypatch.setattr(serve, "create_app", lambda *_, **__: None)

    def _HttpServer(self, *_: Any) -> Any:
        async def start() -> str:
            return "somewhere"

        async def stop() -> None:
            self.ended.append("http server")

        return SimpleNamespace(start=start, stop=stop, wait=lambda: asyncio.sleep(600))

    @contextlib.asynccontextmanager
    async def _Service(self, *, operations: Operations, **_: Any) -> AsyncIterator[None]:
        self.operations = operations
        try:
            yield
        finally:
            self.ended.append("service")

    @contextlib.asynccontextmanager
    async def _hosts(self, *_: Any) -> AsyncIterator[tuple[Any, Any]]:
        async def preload(_: str) -> None: ...

        try:
            yield SimpleNamespace(preload=preload, num_up=dict), SimpleNamespace(preload=preload, num_up=dict)
        finally:
            self.ended.append("hosts")


class NoSignals:
    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        yield


def test_an_operation_that_runs_ends_before_what_it_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    parts = Parts(monkeypatch)
    config = ServeConfig.model_validate({"models": [{"name": "a", "model": {"name": "some/directory"}}]})
    url = f"sqlite:///{tmp_path / 'weaver.sqlite'}"
    operation = Operation(id="save", owner="anne", kind="save", created_at=1.0)

    async def run() -> None:
        files: Any = SimpleNamespace(database_url=url)
        stop: Any = NoSignals()
        serving = asyncio.create_task(
            serve._serve(
                config,
                SimpleNamespace(),  # type: ignore[arg-type]
                files,
                {},
                Console(quiet=True),
                stop,
                NoMeter(),
            )
        )
        await until(lambda: parts.operations is not None)

        async def save() -> bytes:
            await asyncio.sleep(0.3)
            parts.ended.append("operation")
            return b"saved"

        assert parts.operations is not None
        await parts.operations.submit(operation, save)
        serving.cancel()
        await asyncio.wait([serving])
        async with Store.opened(url) as store:
            ended = await store.operation("anne", "save")
        assert ended is not None
        assert ended.status == "done"

    asyncio.run(run())
    assert parts.ended == ["http server", "operation", "service", "hosts"]
