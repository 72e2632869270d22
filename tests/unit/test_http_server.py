"""The server on a socket: where it listens, how it stops, and that signals stay the caller's."""

from __future__ import annotations

import asyncio
import signal
import socket
import time

import httpx
import pytest
from http_client import API, Client
from http_fakes import FakeService
from http_serving import face

from weaver_rl.errors import ConfigError
from weaver_rl.service.config import HttpConfig
from weaver_rl.service.http.server import HttpServer

pytestmark = pytest.mark.unit


async def _serves() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    server = HttpServer(face(FakeService()), HttpConfig(port=0))
    url = await server.start()
    try:
        assert url == server.url
        assert url.startswith("http://127.0.0.1:")
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
        async with httpx.AsyncClient(base_url=url) as client:
            assert (await client.get("/health")).status_code == 200
        port = int(url.rpartition(":")[2])
        with pytest.raises(ConfigError, match=f"http.port {port} cannot be used"):
            await HttpServer(face(FakeService()), HttpConfig(port=port)).start()
        with pytest.raises(ConfigError, match="cannot be used"):
            await HttpServer(face(FakeService()), HttpConfig(host="no.such.host.invalid", port=0)).start()
    finally:
        await server.stop()
    await server.wait()
    await server.stop()
    with pytest.raises(httpx.ConnectError):
        httpx.get(url + "/health")


def test_it_serves_where_it_says_and_frees_the_port():
    asyncio.run(_serves())


async def _held_poll() -> None:
    service = FakeService(hold=True)
    config = HttpConfig(port=0, long_poll_s=30, submit_grace_s=0)
    server = HttpServer(face(service, http=config), config)
    url = await server.start()
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        client = Client(http, service)
        await client.begin()
        operation = await client.post(f"/models/{client.model}/optimizer-steps", {"payload": {"seq_id": 1}})
        poll = asyncio.create_task(http.get(f"{API}/operations/{operation['id']}"))
        await asyncio.sleep(0.2)
        assert not poll.done()
        start = time.monotonic()
        await server.stop(grace_s=10)
        assert time.monotonic() - start < 3
        response = await poll
        assert (response.status_code, response.json()["status"]) == (200, "pending")


def test_stopping_lets_go_of_held_polls():
    asyncio.run(_held_poll())


async def _slow_request() -> None:
    class Slow(FakeService):
        async def heartbeat(self, owner: str, session_id: str) -> None:
            await asyncio.sleep(60)

    server = HttpServer(face(Slow()), HttpConfig(port=0))
    url = await server.start()
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        request = asyncio.create_task(http.post(f"{API}/sessions/a/heartbeat"))
        await asyncio.sleep(0.1)
        start = time.monotonic()
        await server.stop(grace_s=1)
        assert time.monotonic() - start < 5
        await asyncio.gather(request, return_exceptions=True)


def test_stopping_does_not_wait_for_ever():
    asyncio.run(_slow_request())


async def _broken_off() -> None:
    service = FakeService()
    server = HttpServer(face(service), HttpConfig(port=0))
    url = await server.start()
    try:
        async with httpx.AsyncClient(base_url=url) as http:
            client = Client(http, service)
            await client.begin()
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
            head = f"POST {API}/models/{client.model}/forward-passes HTTP/1.1\r\nHost: localhost\r\n"
            connection.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{{".encode())
            end = time.monotonic() + 5
            while service.num_receiving == 0 and time.monotonic() < end:
                await asyncio.sleep(0.01)
            assert service.num_receiving == 1
        while service.num_receiving and time.monotonic() < end:
            await asyncio.sleep(0.01)
        assert (service.num_receiving, service.most_receiving) == (0, 1)
    finally:
        await server.stop(grace_s=1)


def test_a_connection_that_breaks_within_a_body_leaves_nothing_waiting():
    asyncio.run(_broken_off())
