"""Short words for calls of the HTTP face, and the shape of its refusals."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
from http_fakes import FakeService
from http_serving import calling, face

API = "/api/v1"


class Client:
    """A session and a model, with short words for calls."""

    def __init__(self, http: httpx.AsyncClient, service: FakeService | None = None) -> None:
        self.http = http
        self._service = service
        self.session = ""
        self.model = ""

    async def begin(self, **changes: Any) -> None:
        self.session = (await self.post("/sessions", {}))["id"]
        self.model = (await self.post(f"/sessions/{self.session}/models", new_model(**changes)))["id"]

    async def get(self, path: str) -> Any:
        response = await self.http.get(API + path)
        assert response.status_code == 200, response.text
        return response.json()

    async def post(self, path: str, body: Any = None) -> Any:
        response = await self.http.post(API + path, json=body)
        assert response.is_success, response.text
        return response.json() if response.content else None

    @property
    def service(self) -> FakeService:
        assert self._service is not None
        return self._service

    async def ended(self, operation: dict[str, Any]) -> dict[str, Any]:
        while operation["status"] not in ("done", "error"):
            operation = await self.get(f"/operations/{operation['id']}")
        assert operation["status"] == "done", operation
        return operation

    async def sampling_session(self, **changes: Any) -> str:
        body = {"sampling_session_seq_id": 1, "base_model": "tiny", "model_path": None} | changes
        session_id: str = (await self.post(f"/sessions/{self.session}/sampling-sessions", body))["id"]
        return session_id


def new_model(**changes: Any) -> dict[str, Any]:
    return {"model_seq_id": 1, "base_model": "tiny"} | changes


@asynccontextmanager
async def client(service: FakeService | None = None, **config: Any) -> AsyncIterator[Client]:
    used = service or FakeService()
    async with calling(face(used, **config)) as http:
        made = Client(http, used)
        await made.begin()
        yield made


def with_client(check: Callable[[Client], Awaitable[None]], service: FakeService | None = None, **config: Any) -> None:
    async def run() -> None:
        async with client(service, **config) as made:
            await check(made)

    asyncio.run(run())


async def a_model(client: httpx.AsyncClient) -> str:
    session = (await client.post("/api/v1/sessions", json={})).json()["id"]
    new = {"model_seq_id": 1, "base_model": "tiny"}
    model_id: str = (await client.post(f"/api/v1/sessions/{session}/models", json=new)).json()["id"]
    return model_id


def prompt(*tokens: int) -> dict[str, Any]:
    return {"chunks": [{"type": "encoded_text", "tokens": list(tokens)}]}


def refusal(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The body of a refusal, after checking that it has the SDK's shape."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert body["error"] == code
    assert isinstance(body["message"], str)
    assert body["message"]
    assert body["retryable"] in (True, False)
    assert body["request_id"] == response.headers["X-Request-ID"]
    return body
