"""The served description is complete and true: what it allows and what it forbids, thrown at every endpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from fake_cluster import FakeLearners, FakeSamplers
from http_client import Client
from http_fakes import FakeService
from http_serving import calling, face, in_thread, served_service
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from weaver_rl.service.config import HttpConfig

pytestmark = pytest.mark.unit

KEYS = {"alice": "sk-alice"}
HEADERS = {"X-WEAVER-API-KEY": "sk-alice"}
MAX_EXAMPLES = 8
TIMEOUT_S = 20.0
NOT_SERVED = "not served"

DESCRIPTION = face(FakeService(), keys=KEYS).openapi()
OPERATIONS = [(method.upper(), path) for path, methods in DESCRIPTION["paths"].items() for method in methods]


def described(method: str, path: str) -> dict[str, Any]:
    found: dict[str, Any] = DESCRIPTION["paths"][path][method.lower()]
    return found


def can_be_wrong(method: str, path: str, *, in_path: bool) -> bool:
    """Whether there is a request that the description forbids; `in_path`: ids count."""
    parameters = described(method, path).get("parameters", ())
    places = ("query", "path") if in_path else ("query",)
    constrained = [each for each in parameters if each["in"] in places and each["schema"] != {"type": "string"}]
    return "requestBody" in described(method, path) or bool(constrained)


PROBES = [
    (method, path, mode)
    for method, path in OPERATIONS
    for mode in GenerationMode
    if mode is GenerationMode.POSITIVE or can_be_wrong(method, path, in_path=True)
]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The real service behind, with its database and files; learners and engines are fakes."""
    http = HttpConfig(port=0, long_poll_s=0.05, submit_grace_s=0.05, max_body_mb=1)
    state_dir = tmp_path_factory.mktemp("state")
    with in_thread(served_service(state_dir, KEYS, http, FakeLearners(), FakeSamplers())) as address:
        yield address


async def ids_of_what_is_there(url: str) -> dict[str, str]:
    async with httpx.AsyncClient(base_url=url, headers=HEADERS) as http:
        client = Client(http)
        await client.begin()
        operation = await client.ended(await client.post(f"/models/{client.model}/export-hf", {}))
        return {
            "session_id": client.session,
            "model_id": client.model,
            "sampling_session_id": await client.sampling_session(),
            "operation_id": operation["id"],
            "checkpoint_id": operation["response"]["checkpoint_id"],
            "artifact_id": operation["response"]["id"],
        }


@pytest.mark.parametrize(("method", "path", "mode"), PROBES, ids=lambda value: getattr(value, "value", value))
def test_no_request_is_too_strange(url: str, method: str, path: str, mode: GenerationMode):
    ids = asyncio.run(ids_of_what_is_there(url))
    operation = schemathesis.openapi.from_dict(DESCRIPTION)[path][method]
    known: dict[str, Any] | None = {name: value for name, value in ids.items() if f"{{{name}}}" in path} or None
    if mode is GenerationMode.NEGATIVE and not can_be_wrong(method, path, in_path=False):
        known = None
    checks = [status_code_conformance, content_type_conformance, response_schema_conformance]
    if NOT_SERVED not in described(method, path)["tags"]:
        checks += [not_a_server_error, negative_data_rejection]

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


async def _without_key() -> None:
    async with calling(face(FakeService(), keys=KEYS)) as client:
        for method, path in OPERATIONS:
            response = await client.request(method, path.replace("{", "").replace("}", ""))
            if described(method, path).get("security"):
                assert response.status_code == 401, (method, path)
            else:
                assert path in ("/health", "/api/v1/downloads/{artifact_id}/{name}"), (method, path)


def test_the_description_says_truly_where_a_key_is_needed():
    asyncio.run(_without_key())
    assert "security" not in face(FakeService()).openapi()["paths"]["/api/v1/models"]["get"]


CORE = """
POST /sessions
GET /sessions/{session_id}
POST /sessions/{session_id}/heartbeat
POST /sessions/{session_id}/metrics
GET /scheduling/options
POST /sessions/{session_id}/models
POST /models/{model_id}/terminate
GET /models/{model_id}
GET /models
GET /supported-models
GET /model-catalog
GET /training-runs
GET /training-runs/{model_id}
POST /models/{model_id}/forward-passes
POST /models/{model_id}/forward-backward-passes
POST /models/{model_id}/optimizer-steps
POST /models/{model_id}/export-sampler
POST /models/{model_id}/checkpoints
GET /models/{model_id}/checkpoints
POST /models/{model_id}/load
PATCH /models/{model_id}/checkpoints/ttl
POST /models/{model_id}/export-hf
GET /operations/{operation_id}
GET /operations/{operation_id}/tensor-pack
POST /sessions/{session_id}/sampling-sessions
DELETE /sampling-sessions/{sampling_session_id}
GET /sampling-sessions/{sampling_session_id}
POST /sampling-sessions/{sampling_session_id}/samples
POST /sampling-sessions/{sampling_session_id}/logprobs
POST /sampling-sessions/{sampling_session_id}/pause-generation
POST /sampling-sessions/{sampling_session_id}/continue-generation
POST /checkpoints/{checkpoint_id}/export
GET /checkpoints/{checkpoint_id}/artifacts
GET /artifacts/{artifact_id}/download
GET /organizations
GET /organizations/{organization_id}/projects
GET /scope/resolve
GET /loss-functions
"""


def test_every_endpoint_of_the_protocol_is_there():
    wanted = {tuple(line.split(" ")) for line in CORE.split("\n") if line}
    served_here = {(method, path.removeprefix("/api/v1")) for method, path in OPERATIONS}
    assert wanted - served_here == set()
