"""The HTTP face over a fake service: in this process without a socket, or on a loopback port in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator, Mapping

import httpx
from fastapi import FastAPI
from http_fakes import FakeService

from weaver_rl.models.config import PretrainedModel
from weaver_rl.service.config import HttpConfig, LimitsConfig, ServeConfig, ServedModel
from weaver_rl.service.http.app import create_app
from weaver_rl.service.http.auth import ApiKeys
from weaver_rl.service.http.server import HttpServer


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
    """The application on a loopback port, in a thread with a loop of its own; gives the URL."""
    config = app.state.face.config.http
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="served", daemon=True)
    thread.start()
    server = HttpServer(app, config)
    try:
        yield asyncio.run_coroutine_threadsafe(server.start(), loop).result(timeout=20)
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(grace_s=1), loop).result(timeout=20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=20)
        loop.close()
