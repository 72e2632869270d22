"""The application on a socket: bound, served in the caller's event loop, stopped. Signals are the caller's."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

from weaver_rl.errors import ConfigError
from weaver_rl.service.config import HttpConfig
from weaver_rl.service.http.routing import Face

KEEP_ALIVE_S = 65.0
"""Longer than clients keep unused connections (5 s): the one that closes must be the one that would use it next."""


class HttpServer:
    """Serves an application of `create_app`.

    Example:
        server = HttpServer(create_app(service, config, keys), config.http)
        print(await server.start())  # http://127.0.0.1:8000
        await server.stop()
    """

    def __init__(self, app: FastAPI, config: HttpConfig) -> None:
        self._app = app
        self._config = config
        self._server: _Uvicorn | None = None
        self._serving: asyncio.Task[None] | None = None
        self._url = ""

    @property
    def url(self) -> str:
        """Where it listens; empty before `start`."""
        return self._url

    async def start(self) -> str:
        """Begins to serve and says where.

        Raises:
            ConfigError: the address cannot be bound.
        """
        listener = _bound(self._config.host, self._config.port)
        host, port = listener.getsockname()[:2]
        self._url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self._server = _Uvicorn(
            uvicorn.Config(
                self._app,
                lifespan="on",
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=int(KEEP_ALIVE_S),
            )
        )
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]), name="http server")
        while not self._server.started:
            if self._serving.done():
                self._serving.result()
                raise RuntimeError("the HTTP server ended before it had started")
            await asyncio.sleep(0.01)
        return self._url

    async def wait(self) -> None:
        """Until it was stopped, or failed."""
        assert self._serving is not None, "the server was not started"
        await asyncio.shield(self._serving)

    async def stop(self, grace_s: float = 5.0) -> None:
        """Takes no more connections, lets go of held polls at once, and gives other requests `grace_s` to end."""
        if self._server is None or self._serving is None:
            return
        face: Face = self._app.state.face
        face.stopping.set()
        self._server.config.timeout_graceful_shutdown = math.ceil(grace_s)
        self._server.should_exit = True
        await self._serving


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """None: the caller decides what a signal means."""
        yield


def _bound(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"http.host {host!r} and http.port {port} cannot be used: {error.strerror or error}; "
            "choose others, port 0 for any that is free"
        ) from error
    listener.setblocking(False)
    return listener
