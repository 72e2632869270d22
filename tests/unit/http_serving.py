"""The HTTP face for tests: without a socket or on a loopback port in a thread, over a fake service or the real one."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path

import httpx
from fake_cluster import FakeLearners, FakeSamplers
from fastapi import FastAPI
from http_fakes import TINY, FakeService

from weaver_rl.models.config import PretrainedModel
from weaver_rl.service.config import HttpConfig, LimitsConfig, ServeConfig, ServedModel
from weaver_rl.service.http.app import create_app
from weaver_rl.service.http.auth import ApiKeys
from weaver_rl.service.http.server import HttpServer
from weaver_rl.service.operations import Operations
from weaver_rl.service.service import Service
from weaver_rl.service.state_files import StateFiles
from weaver_rl.service.store import Store


def serve_config(http: HttpConfig | None = None, limits: LimitsConfig | None = None) -> ServeConfig:
    """A configuration that names a model which is never loaded."""
    return ServeConfig(
        models=(ServedModel(name="tiny", model=PretrainedModel(name="tiny")),),
        http=http or HttpConfig(port=0, long_poll_s=0.2, submit_grace_s=0.0),
        limits=limits or LimitsConfig(),
    )


def face(
    service: FakeService,
    *,
    keys: Mapping[str, str] | None = None,
    http: HttpConfig | None = None,
    limits: LimitsConfig | None = None,
) -> FastAPI:
    return create_app(
        service, serve_config(http, limits), ApiKeys.of(keys or {}), download_secret=b"secret of the tests"
    )


@contextlib.asynccontextmanager
async def calling(app: FastAPI, key: str | None = None) -> AsyncIterator[httpx.AsyncClient]:
    """A client that reaches the application without a socket."""
    headers = {} if key is None else {"X-WEAVER-API-KEY": key}
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as client:
        yield client
    app.state.face.decoders.close()


@contextlib.contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The application on a loopback port, in a thread; gives the URL."""
    with in_thread(_serving(app)) as url:
        yield url


@contextlib.asynccontextmanager
async def _serving(app: FastAPI) -> AsyncIterator[str]:
    server = HttpServer(app, app.state.face.config.http)
    try:
        yield await server.start()
    finally:
        await server.stop(grace_s=1)


@contextlib.asynccontextmanager
async def served_service(
    state_dir: Path, keys: Mapping[str, str], http: HttpConfig, learners: FakeLearners, samplers: FakeSamplers
) -> AsyncIterator[str]:
    """The face over the real service, which has a database and files but no cluster; gives the URL."""
    config = serve_config(http, LimitsConfig(models=10_000)).model_copy(update={"state_dir": state_dir})
    with StateFiles(state_dir) as files:
        async with (
            Store.opened(files.database_url) as store,
            Operations(store, config.operations) as operations,
            Service(
                config=config,
                store=store,
                operations=operations,
                files=files,
                learners=learners,
                samplers=samplers,
                lineup={TINY.name: TINY},
            ) as service,
        ):
            server = HttpServer(create_app(service, config, ApiKeys.of(keys)), http)
            try:
                yield await server.start()
            finally:
                await server.stop(grace_s=1)


@contextlib.contextmanager
def in_thread(served: contextlib.AbstractAsyncContextManager[str]) -> Iterator[str]:
    """An asynchronous context in a thread with a loop of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="served", daemon=True)
    thread.start()
    try:
        yield asyncio.run_coroutine_threadsafe(served.__aenter__(), loop).result(timeout=30)
    finally:
        asyncio.run_coroutine_threadsafe(served.__aexit__(None, None, None), loop).result(timeout=30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=20)
        loop.close()
