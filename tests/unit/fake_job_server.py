"""A fake of Ray's job server: HTTP and websocket on a real port, with a job whose log and misfortunes a test writes."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import WSCloseCode, web

JOB = "tiny-1"


@dataclass
class FakeJob:
    """One job and how the connections to it behave.

    Args:
        log: all that it will ever print.
        cuts: for each connection that follows the log, in characters, where it breaks without a word; those after the
            last go on to the end.
    """

    log: str = ""
    cuts: list[int] = field(default_factory=list)
    state: str = "RUNNING"
    exit_code: int | None = None
    end_state: str = "SUCCEEDED"
    end_code: int | None = 0
    errors: list[int] = field(default_factory=list)
    """Statuses that the next questions about the job are answered with."""
    silent: bool = False
    """Connections that follow the log never tell anything and stay open; it ends when its whole log is asked for."""
    pauses_at: int | None = None
    """Characters after which connections that follow the log to its end wait until its whole log is asked for."""
    log_is_lost: bool = False
    """Who asks for its whole log is answered with an error."""
    chunk: int = 7
    upload_pause_s: float = 0.0
    """Before each 64 KiB of a package are taken."""
    num_whole_logs: int = 0
    submitted: list[dict[str, Any]] = field(default_factory=list)
    packages: dict[str, bytes] = field(default_factory=dict)
    num_connections: int = 0
    stops_when_asked: bool = True
    headers: list[dict[str, str]] = field(default_factory=list)
    token: str | None = None

    def details(self) -> dict[str, Any]:
        return {
            "type": "SUBMISSION",
            "job_id": None,
            "submission_id": JOB,
            "status": self.state,
            "entrypoint": "exec weaver-rl train tiny.yaml",
            "message": "",
            "start_time": 1_767_225_600_000,
            "driver_exit_code": self.exit_code,
        }

    def end(self) -> None:
        self.state, self.exit_code = self.end_state, self.end_code


class FakeJobServer:
    """A context manager; within it the server answers at `address`, unless it is `closed`."""

    def __init__(self, job: FakeJob) -> None:
        self.job = job
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._runner: web.AppRunner | None = None
        self._port = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> FakeJobServer:
        self._thread.start()
        self.open()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def open(self) -> None:
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()

    async def _open(self) -> None:
        app = web.Application(middlewares=[self._record])
        app.add_routes(
            [
                web.get("/api/version", self._version),
                web.get("/api/packages/{protocol}/{name}", self._package),
                web.put("/api/packages/{protocol}/{name}", self._upload),
                web.post("/api/jobs/", self._submit),
                web.get("/api/jobs/", self._list),
                web.get("/api/jobs/{job}", self._look),
                web.post("/api/jobs/{job}/stop", self._stop),
                web.get("/api/jobs/{job}/logs", self._log),
                web.get("/api/jobs/{job}/logs/tail", self._tail),
            ]
        )
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        listening = socket.socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)  # what it has not taken is not sent either
        listening.bind(("127.0.0.1", self._port))
        site = web.SockSite(self._runner, listening)
        await site.start()
        self._port = self._runner.addresses[0][1]

    async def _close(self) -> None:
        if self._runner is not None:
            runner, self._runner = self._runner, None
            await runner.cleanup()

    @web.middleware
    async def _record(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.job.headers.append(dict(request.headers))
        if self.job.token is not None and request.headers.get("Authorization") != f"Bearer {self.job.token}":
            return web.Response(status=401, text="Unauthorized: Missing authentication token")
        return await handler(request)

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": "s"})

    async def _package(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if request.match_info["name"] in self.job.packages else 404)

    async def _upload(self, request: web.Request) -> web.Response:
        package = bytearray()
        while block := await request.content.read(2**16):
            await asyncio.sleep(self.job.upload_pause_s)
            package += block
        self.job.packages[request.match_info["name"]] = bytes(package)
        return web.Response()

    async def _submit(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.job.submitted.append(body)
        return web.json_response({"job_id": body["submission_id"], "submission_id": body["submission_id"]})

    async def _list(self, _: web.Request) -> web.Response:
        return web.json_response([self.job.details()])

    async def _look(self, request: web.Request) -> web.Response:
        if self.job.errors:
            return web.Response(status=self.job.errors.pop(0), text="Traceback:\nValueError: the agent is away")
        if request.match_info["job"] != JOB:
            return web.Response(status=404, text="does not exist")
        return web.json_response(self.job.details())

    async def _stop(self, _: web.Request) -> web.Response:
        if self.job.stops_when_asked:
            self.job.state = "STOPPED"
        return web.json_response({"stopped": True})

    async def _log(self, _: web.Request) -> web.Response:
        self.job.num_whole_logs += 1
        if self.job.log_is_lost:
            return web.Response(status=500, text="Traceback:\nValueError: the agent is away")
        if self.job.silent:
            self.job.end()
        return web.json_response({"logs": self.job.log})

    async def _tail(self, request: web.Request) -> web.StreamResponse:
        self.job.num_connections += 1
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        if self.job.silent:
            await socket.receive()
            return socket
        text = self.job.log
        cut = self.job.cuts.pop(0) if self.job.cuts else None
        for start in range(0, len(text) if cut is None else cut, self.job.chunk):
            if cut is None and self.job.pauses_at is not None and start >= self.job.pauses_at:
                await self._whole_log_asked_for()
                self.job.pauses_at = None
            await socket.send_str(text[start : min(start + self.job.chunk, len(text) if cut is None else cut)])
        if cut is None:
            self.job.end()
            await socket.close(code=WSCloseCode.OK)
        elif request.transport is not None:
            request.transport.abort()
        return socket

    async def _whole_log_asked_for(self) -> None:
        num_before = self.job.num_whole_logs
        while self.job.num_whole_logs == num_before:
            await asyncio.sleep(0.01)


@contextlib.contextmanager
def serving(job: FakeJob) -> Iterator[FakeJobServer]:
    with FakeJobServer(job) as server:
        yield server
