"""The served description is complete and true: what it allows and what it forbids, thrown at every endpoint."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from http_client import Client
from http_fakes import FakeService
from http_serving import calling, face, served
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ignored_auth,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from weaver_rl.service.config import HttpConfig

pytestmark = pytest.mark.unit

KEYS = {"alice": "sk-alice"}
HEADERS = {"X-WEAVER-API-KEY": "sk-alice"}
MAX_EXAMPLES = 12
TIMEOUT_S = 20.0
NOT_SERVED = "not served"

DESCRIPTION = face(FakeService(), keys=KEYS).openapi()
OPERATIONS = [
    (method.upper(), path) for path, methods in DESCRIPTION["paths"].items() for method in methods
]

@pytest.fixture(scope="module")
def served_face() -> Iterator[tuple[str, dict[str, str]]]:
    """Where the face is served, and ids of things that are there."""
    service = FakeService()
    app = face(service, keys=KEYS, http=HttpConfig(port=0, long_poll_s=0.05, submit_grace_s=0, max_body_mb=1))

    async def prepared(url: str) -> dict[str, str]:
        async with httpx.AsyncClient(base_url=url, headers=HEADERS) as http:
            client = Client(http, service)
            await client.begin()
            artifact = (await client.post(f"/models/{client.model}/export-hf", {}))["response"]
            return {
                "session_id": client.session,
                "model_id": client.model,
                "sampling_session_id": await client.sampling_session(),
                "operation_id": next(iter(service.operations)),
                "checkpoint_id": artifact["checkpoint_id"],
                "artifact_id": artifact["id"],
            }

    with served(app) as url:
        yield url, asyncio.run(prepared(url))


def _has_more_than_ids(described: dict[str, Any]) -> bool:
    """Whether a request can be wrong elsewhere than in its path."""
    return "requestBody" in described or any(each["in"] == "query" for each in described.get("parameters", ()))


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize(("method", "path"), OPERATIONS, ids=lambda value: value)
def test_no_request_is_too_strange(
    served_face: tuple[str, dict[str, str]], method: str, path: str, mode: GenerationMode
):
    url, ids = served_face
    operation = schemathesis.openapi.from_dict(DESCRIPTION)[path][method]
    described = DESCRIPTION["paths"][path][method.lower()]
    known: dict[str, Any] | None = {name: value for name, value in ids.items() if f"{{{name}}}" in path} or None
    if mode is GenerationMode.NEGATIVE and not _has_more_than_ids(described):
        known = None
    checks = [
        status_code_conformance,
        content_type_conformance,
        response_schema_conformance,
        negative_data_rejection,
    ]
    if NOT_SERVED not in described["tags"]:
        checks.append(not_a_server_error)
    else:
        checks.remove(negative_data_rejection)

    @settings(
        max_examples=MAX_EXAMPLES,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode, path_parameters=known, headers=HEADERS))
    def probe(case: Any) -> None:
        case.call_and_validate(base_url=url, headers=HEADERS, checks=checks, timeout=TIMEOUT_S)

    probe()
