"""Request bodies: bounded one by one and all together, given up when they stall, answered whatever their size."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from typing import Any

import pytest
from http_client import a_model, refusal
from http_fakes import FakeService
from http_serving import calling, face, served
from test_http_training import datum, for_model, request

from weaver_rl.service.config import HttpConfig
from weaver_rl.service.http import bodies

pytestmark = pytest.mark.unit

KEYS = {"alice": "sk-alice", "bob": "sk-bob"}


async def _too_large() -> None:
    async with calling(face(FakeService(), http=HttpConfig(port=0, max_body_mb=5))) as client:
        model = await a_model(client)

        async def endless(num_mib: int) -> Any:
            for _ in range(num_mib):
                yield b" " * (1 << 20)

        json_type = {"Content-Type": "application/json"}
        for size_mib, path in ((5, "/api/v1/sessions"), (6, f"/api/v1/models/{model}/forward-passes")):
            whole = b" " * (size_mib << 20)
            refusal(await client.post(path, content=whole, headers=json_type), 413, "request_too_large")
            streamed = await client.post(path, content=endless(size_mib), headers=json_type)
            refusal(streamed, 413, "request_too_large")
        fits = await client.post("/api/v1/sessions", content=b" " * (3 << 20) + b"{}", headers=json_type)
        assert fits.status_code == 201


def test_bodies_are_bounded_by_what_they_say_and_by_what_they_are():
    asyncio.run(_too_large())


async def _together() -> None:
    service = FakeService()
    app = face(service, http=HttpConfig(port=0, max_body_mb=2, max_bodies_mb=3, submit_grace_s=0))
    async with calling(app) as client:
        model = await a_model(client)
        passes = f"/api/v1/models/{model}/forward-backward-passes"
        go_on = asyncio.Event()

        async def slow(num_mib: int) -> Any:
            for _ in range(num_mib):
                yield b" " * (1 << 20)
            await go_on.wait()
            yield json.dumps(for_model(request(datum()), model)).encode()

        json_type = {"Content-Type": "application/json"}
        whole = str((1 << 20) + len(json.dumps(for_model(request(datum()), model))))
        # One says beforehand how much will come, the other does not.
        arriving = [
            asyncio.create_task(client.post(passes, content=slow(1), headers=json_type | length))
            for length in ({"Content-Length": whole}, {})
        ]
        await asyncio.sleep(0.2)
        for content in (b" " * (1 << 20), slow(1)):
            refused = refusal(await client.post(passes, content=content, headers=json_type), 429, "rate_limited")
            assert (refused["retryable"], refused["retry_after"]) == (True, 2.0)
        assert (await client.get(f"/api/v1/models/{model}")).status_code == 200
        assert (await client.post("/api/v1/sessions", json={})).status_code == 201
        too_large = await client.post(passes, content=b" " * (3 << 20), headers=json_type)
        refusal(too_large, 413, "request_too_large")
        go_on.set()
        assert [answer.status_code for answer in await asyncio.gather(*arriving)] == [202, 202]
        for _ in range(3):
            assert (await client.post(passes, content=slow(1), headers=json_type)).status_code == 202


def test_all_bodies_together_are_bounded():
    asyncio.run(_together())
    with pytest.raises(ValueError, match="max_bodies_mb is 1023 and max_body_mb 1024"):
        HttpConfig(max_bodies_mb=1023)


async def _stalled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "IDLE_S", 0.1)
    service = FakeService()
    async with calling(face(service)) as client:
        model = await a_model(client)

        async def stalls() -> Any:
            yield b"{"
            await asyncio.sleep(30)
            yield b"}"

        response = await asyncio.wait_for(client.post(f"/api/v1/models/{model}/forward-passes", content=stalls()), 10)
        assert refusal(response, 408, "request_timeout")["retryable"] is True
        assert (service.most_receiving, service.num_receiving) == (1, 0)


def test_a_body_that_stalls_is_given_up(monkeypatch: pytest.MonkeyPatch):
    asyncio.run(_stalled(monkeypatch))


def test_a_refused_request_with_a_large_body_gets_its_answer_not_a_reset():
    """A client that writes all before it reads, as plain ones do, must not find the connection closed meanwhile."""
    size = 20 << 20
    with served(face(FakeService(), keys=KEYS, http=HttpConfig(port=0, max_body_mb=8))) as url:
        port = int(url.rpartition(":")[2])
        for key, path, status in (
            ("sk-eve", "/api/v1/models/none/forward-passes", 401),
            ("sk-alice", "/api/v1/models/none/forward-passes", 404),
            ("sk-alice", "/api/v1/nothing", 404),
            ("sk-alice", "/api/v1/sessions", 413),
        ):
            with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
                head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nX-WEAVER-API-KEY: {key}\r\n"
                connection.sendall(f"{head}Content-Length: {size}\r\n\r\n".encode())
                for _ in range(20):
                    connection.sendall(bytes(size // 20))
                    time.sleep(0.002)
                assert connection.recv(100).startswith(f"HTTP/1.1 {status}".encode())


def test_a_body_that_says_that_it_is_too_large_is_not_waited_for():
    with served(face(FakeService())) as url:
        port = int(url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            head = "POST /api/v1/sessions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {10**12}\r\n\r\n".encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_a_client_that_asks_before_it_sends_is_not_told_to_send():
    with served(face(FakeService(), keys=KEYS)) as url:
        port = int(url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            head = "POST /api/v1/sessions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000000\r\n"
            connection.sendall(f"{head}Expect: 100-continue\r\n\r\n".encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 401")
