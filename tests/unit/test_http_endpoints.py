"""Sessions, models, operations: what each endpoint asks of the service, and that the SDK finds what it reads."""

from __future__ import annotations

import asyncio
import json
import uuid
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_cluster import FakeLearners, FakeSamplers
from http_client import API, Client, new_model, prompt, refusal, with_client
from http_fakes import FakeService
from http_serving import calling, face, served_service
from test_http_training import datum, for_model, request

from weaver_rl.errors import ServiceError
from weaver_rl.service.config import HttpConfig
from weaver_rl.service.http.answers import ORGANIZATION_ID, PROJECT_ID
from weaver_rl.service.http.render import operation_json
from weaver_rl.service.records import Operation

pytestmark = pytest.mark.unit


# -- sessions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy",
    [None, {"mode": "auto"}, {"mode": "fixed", "clusters": ["c1"]}, {"mode": "prefer", "clusters": ["b", "a"]}],
)
def test_a_session_says_its_scheduling_policy_as_it_came(policy: dict[str, Any] | None):
    async def check(c: Client) -> None:
        body = {
            "tags": ["weaver-sdk"],
            "user_metadata": {"a": {"b": [1, 2.5, None]}},
            "sdk_version": "1.19.2",
            "name": "run",
            "labels": {"team": "x"},
            "scheduling_policy": policy,
        }
        created = await c.post("/sessions", {name: value for name, value in body.items() if value is not None})
        uuid.UUID(created["id"])
        assert (created["organization_id"], created["project_id"]) == (ORGANIZATION_ID, PROJECT_ID)
        again = await c.get(f"/sessions/{created['id']}")
        for name in ("tags", "user_metadata", "sdk_version", "name", "labels", "scheduling_policy"):
            assert created[name] == again[name] == body[name]
        assert datetime.fromisoformat(created["created_at"]).utcoffset() is not None

    with_client(check)


def test_the_real_service_keeps_a_scheduling_policy_over_a_restart(tmp_path: Path):
    policy = {"mode": "fixed", "clusters": ["c1"]}

    async def check() -> None:
        def serving() -> AbstractAsyncContextManager[str]:
            return served_service(tmp_path, {}, HttpConfig(port=0), FakeLearners(), FakeSamplers())

        async with serving() as url, httpx.AsyncClient(base_url=url + API) as http:
            created = (await http.post("/sessions", json={"scheduling_policy": policy})).json()
            assert created["scheduling_policy"] == policy
        async with serving() as url, httpx.AsyncClient(base_url=url + API) as http:
            assert (await http.get(f"/sessions/{created['id']}")).json()["scheduling_policy"] == policy

    asyncio.run(check())


def test_heartbeat_and_metrics():
    async def check(c: Client) -> None:
        assert (await c.http.post(f"{API}/sessions/{c.session}/heartbeat")).status_code == 204
        assert c.service.calls == [("heartbeat", c.session)]
        point = {
            "model_id": c.model,
            "name": "reward",
            "value": 1.5,
            "step": 0,
            "occurred_at": "2026-03-01T10:00:00+00:00",
            "labels": {"split": "train", "n": 3},
        }
        body = {"metrics": [point, point | {"occurred_at": "2026-03-01T10:00:00", "value": 2}]}
        assert await c.post(f"/sessions/{c.session}/metrics", body) is None
        first, second = c.service.metrics
        assert (first.name, first.value, first.step, first.model_id) == ("reward", 1.5, 0, c.model)
        assert first.labels == {"split": "train", "n": "3"}
        assert first.occurred_at == second.occurred_at == "2026-03-01T10:00:00+00:00"
        for bad in ({"step": -1}, {"value": "x"}, {"occurred_at": "yesterday"}, {"name": ""}):
            response = await c.http.post(f"{API}/sessions/{c.session}/metrics", json={"metrics": [point | bad]})
            assert f"metrics[0].{next(iter(bad))}" in refusal(response, 400, "invalid_request")["message"]
        response = await c.http.post(f"{API}/sessions/{c.session}/metrics", json={"metrics": [point] * 1001})
        refusal(response, 400, "invalid_request")

    with_client(check)


def test_scope_is_one_organization_and_project():
    async def check(c: Client) -> None:
        (organization,) = await c.get("/organizations")
        assert organization == {
            "id": ORGANIZATION_ID, "name": "Default organization", "slug": "default", "role": "owner"
        }  # fmt: skip
        (project,) = await c.get(f"/organizations/{ORGANIZATION_ID}/projects")
        scope = await c.get("/scope/resolve?organization=default&project=Default%20project")
        assert scope == {"organization": organization, "project": project} == await c.get("/scope/resolve")
        refusal(await c.http.get(f"{API}/scope/resolve?organization=other"), 404, "not_found")
        refusal(await c.http.get(f"{API}/organizations/other/projects"), 404, "not_found")
        body = {"organization_id": ORGANIZATION_ID, "project_id": PROJECT_ID}
        assert (await c.post("/sessions", body))["id"]
        response = await c.http.post(f"{API}/sessions", json=body | {"project_id": "other"})
        refusal(response, 404, "not_found")
        assert await c.get("/scheduling/options") == {"can_select": False, "clusters": []}

    with_client(check)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/managed-datasets"),
        ("GET", "/managed-datasets/d/versions/v1"),
        ("POST", "/models/m/managed-dataset-sample-lengths"),
        ("GET", "/deployments"),
        ("GET", "/deployments/d"),
        ("DELETE", "/deployments/d"),
        ("POST", "/checkpoints/c/deployments"),
        ("GET", "/quota/balance"),
        ("GET", "/quota/requests"),
        ("POST", "/quota/requests"),
    ],
)
def test_what_is_not_served_says_so(method: str, path: str):
    async def check(c: Client) -> None:
        body = refusal(await c.http.request(method, API + path), 501, "not_implemented")
        assert body["message"].startswith("this server has no ")
        assert not body["retryable"]

    with_client(check)


# -- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "seen"),
    [
        ({}, {"training_mode": "lora", "rank": 32, "max_length": 128, "train_mlp": True}),
        ({"lora_config": {"rank": 4}}, {"rank": 4, "train_attn": True, "train_unembed": True}),
        ({"lora_config": {"train_mlp": False, "seed": 5}}, {"rank": 32, "train_mlp": False, "seed": 5}),
        ({"lora_config": {"rank": 8, "future": 1}, "future": 2}, {"rank": 8}),
        ({"lora_config": None, "training_mode": None}, {"training_mode": "lora", "rank": 32}),
        ({"training_mode": "full_ft"}, {"training_mode": "full_ft"}),
        ({"base_model": "tiny:64"}, {"max_length": 64}),
        ({"training_max_sequence_length": 32}, {"max_length": 32}),
        ({"base_model": "tiny:64", "training_max_sequence_length": 32}, {"max_length": 32}),
        ({"performance_tier": "normal", "user_metadata": {"a": 1}}, {}),
    ],
)
def test_a_model_as_it_was_asked_for(changes: dict[str, Any], seen: dict[str, Any]):
    async def check(c: Client) -> None:
        created = await c.post(f"/sessions/{c.session}/models", new_model(**changes))
        flat = created | (created["lora_config"] or {})
        assert {name: flat[name] for name in seen} == seen
        assert (created["base_model"], created["tokenizer_path"]) == ("tiny", "/models/tiny")
        assert created == await c.get(f"/models/{created['id']}")
        assert created["user_metadata"] == changes.get("user_metadata", {})
        for name in ("session_id", "status", "model_seq_id", "last_seq_id", "created_at", "updated_at"):
            assert created[name] is not None

    with_client(check)


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"performance_tier": "fast"}, 400, "performance_tier: "),
        ({"training_mode": "qlora"}, 400, "training_mode: "),
        ({"model_seq_id": 0}, 400, "model_seq_id: "),
        ({"model_seq_id": "1"}, 400, "model_seq_id: "),
        ({"lora_config": {"rank": 0}}, 400, "lora_config.rank: "),
        ({"lora_config": {"rank": True}}, 400, "lora_config.rank: "),
        ({"lora_config": {"train_mlp": 1}}, 400, "lora_config.train_mlp: "),
        ({"training_max_sequence_length": 1}, 400, "training_max_sequence_length: "),
        ({"base_model": "another"}, 404, "base_model 'another' is not served"),
        ({"base_model": "tiny:x"}, 404, "base_model 'tiny:x'"),
        ({"base_model": "tiny:٣"}, 404, "base_model 'tiny:٣'"),
        ({"base_model": "tiny:" + "9" * 200}, 404, "base_model"),
        ({"base_model": None}, 400, "base_model: "),
    ],
)
def test_a_model_that_cannot_be(changes: dict[str, Any], status: int, message: str):
    async def check(c: Client) -> None:
        response = await c.http.post(f"{API}/sessions/{c.session}/models", json=new_model(**changes))
        assert message in refusal(response, status, "not_found" if status == 404 else "invalid_request")["message"]

    with_client(check)


def test_listings_are_paged():
    async def check(c: Client) -> None:
        for number in range(2, 5):
            await c.post(f"/sessions/{c.session}/models", new_model(model_seq_id=number))
        for path in ("/models", "/training-runs"):
            page = await c.get(f"{path}?limit=2&offset=1")
            assert [item["model_seq_id"] for item in page["items"]] == [3, 2]
            assert page["pagination"] == {"total_count": 4, "limit": 2, "offset": 1}
            assert page["items"][0]["lora_config"]["rank"] == 32
            assert page["items"][0]["last_request_at"]
        assert (await c.get("/models"))["pagination"]["limit"] == 25

    with_client(check)


def test_a_training_run_has_its_checkpoints():
    async def check(c: Client) -> None:
        await c.post(f"/models/{c.model}/checkpoints", {"type": "weight", "name": "one", "ttl_seconds": 60})
        run = await c.get(f"/training-runs/{c.model}")
        (checkpoint,) = run["checkpoints"]
        assert checkpoint["path"] == f"weaver://{c.model}/checkpoints/one"
        assert (checkpoint["ttl_seconds"], run["owner_user_id"]) == (60, "local")
        datetime.fromisoformat(checkpoint["expires_at"])

    with_client(check)


def test_supported_models_and_catalog():
    async def check(c: Client) -> None:
        supported = await c.get("/supported-models?limit=100&offset=0")
        (item,) = supported["items"]
        assert (item["name"], item["status"]) == ("tiny", "healthy")
        assert item["config"]["resource"]["tokenizer"]["path"] == "/models/tiny"
        assert supported["pagination"]["total_count"] == 1
        assert (await c.get("/supported-models?offset=1"))["items"] == []
        (entry,) = (await c.get("/model-catalog"))["items"]
        assert entry["training_modes"] == ["lora", "full_ft"]
        assert len(entry["prices"]) == 8
        assert set(map(json.dumps, entry["prices"].values())) == {'{"unit": "million_tokens", "unit_price_micros": 0}'}

    with_client(check)


@pytest.mark.parametrize(
    ("body", "asked", "status"),
    [
        (None, (True, True), "terminated"),
        ({}, (True, True), "terminated"),
        ({"instance_types": ["trainer", "inference"]}, (True, True), "terminated"),
        ({"instance_types": ["inference"]}, (False, True), "active"),
        ({"instance_types": []}, (False, False), "active"),
    ],
)
def test_terminate(body: Any, asked: tuple[bool, bool], status: str):
    async def check(c: Client) -> None:
        assert (await c.post(f"/models/{c.model}/terminate", body))["status"] == status
        assert c.service.calls == [("terminate", asked)]

    with_client(check)


# -- operations ------------------------------------------------------------------------------------------------------


def test_an_operation_waits_and_ends_with_its_response():
    async def check(c: Client) -> None:
        c.service.hold = True
        submitted = await c.post(f"/models/{c.model}/optimizer-steps", {"payload": {"seq_id": 1}})
        assert submitted["status"] == "pending"
        assert submitted["pending_info"]["code"] == "queued"
        assert submitted["pending_info"]["wait_seconds"] >= 0
        assert "response" not in submitted
        assert (await c.get(f"/operations/{submitted['id']}"))["status"] == "pending"
        poll = asyncio.create_task(c.get(f"/operations/{submitted['id']}"))
        await asyncio.sleep(0.05)
        c.service.release()
        ended = await poll
        assert (ended["status"], ended["response"]["num_steps"]) == ("done", 1)
        assert ended == await c.get(f"/operations/{submitted['id']}")
        refusal(await c.http.get(f"{API}/operations/{uuid.uuid4()}"), 404, "not_found")

    with_client(check, http=HttpConfig(port=0, long_poll_s=0.2, submit_grace_s=0))


def test_a_submission_is_held_for_a_moment():
    async def check(c: Client) -> None:
        c.service.hold = True
        submission = asyncio.create_task(c.post(f"/models/{c.model}/optimizer-steps", {"payload": {"seq_id": 1}}))
        await asyncio.sleep(0.1)
        c.service.release()
        assert (await submission)["status"] == "done"

    with_client(check, http=HttpConfig(port=0, submit_grace_s=1))


def test_a_failed_operation_says_why():
    async def check(c: Client) -> None:
        c.service.fail_operations = ServiceError("learner_lost", "the learner died", retryable=True)
        failed = await c.post(f"/models/{c.model}/optimizer-steps", {"payload": {"seq_id": 1}})
        assert failed["status"] == "error"
        assert (failed["error_code"], failed["error_message"]) == ("learner_lost", "the learner died")
        assert failed["retryable"] is True
        assert failed["error_details"]["operation_id"] == failed["id"]
        assert "response" not in failed

    with_client(check)


def test_a_response_is_embedded_as_it_is():
    operation = Operation(
        id="o", owner="a", kind="sample", created_at=10.0, status="done", response=b'{"x": [1.10, null]}'
    )
    text = operation_json(operation, now=11.0)
    assert b'"response":{"x": [1.10, null]}' in text
    assert json.loads(text)["type"] == "sample"
    running = Operation(id="o", owner="a", kind="sample", created_at=10.0, status="running")
    assert json.loads(operation_json(running, now=12.5))["pending_info"]["wait_seconds"] == 2.5


def test_loss_functions_are_described():
    async def check(c: Client) -> None:
        items = (await c.get("/loss-functions"))["items"]
        names = {item["name"] for item in items}
        assert {"cross_entropy", "importance_sampling", "ppo_clip", "cispo", "forward_logprob", "surrogate"} <= names

    with_client(check)


def test_health_needs_nothing():
    async def check(c: Client) -> None:
        response = await c.http.get("/health")
        assert response.json() == {"status": "ok", "models": ["tiny"], "waits": []}

    with_client(check)


# -- other keys ------------------------------------------------------------------------------------------------------


async def _anothers() -> None:
    service = FakeService()
    app = face(service, keys={"alice": "sk-alice", "bob": "sk-bob"})
    async with calling(app, "sk-alice") as http, calling(app, "sk-bob") as bob:
        alice = Client(http, service)
        await alice.begin()
        session = await alice.sampling_session()
        artifact = (await alice.post(f"/models/{alice.model}/export-hf", {}))["response"]
        operation = next(iter(service.operations))
        checkpoint, path = artifact["checkpoint_id"], f"weaver://{alice.model}/checkpoints/made-0"
        bob_session = (await bob.post(f"{API}/sessions", json={})).json()["id"]
        bob_model = (await bob.post(f"{API}/sessions/{bob_session}/models", json=new_model())).json()["id"]
        pass_body = for_model(request(datum()), alice.model)
        num_calls = len(service.calls)
        for method, target, body in (
            ("GET", f"/sessions/{alice.session}", None),
            ("POST", f"/sessions/{alice.session}/heartbeat", None),
            ("POST", f"/sessions/{alice.session}/metrics", {"metrics": []}),
            ("POST", f"/sessions/{alice.session}/models", new_model()),
            ("POST", f"/sessions/{alice.session}/sampling-sessions", {"sampling_session_seq_id": 1}),
            ("GET", f"/models/{alice.model}", None),
            ("GET", f"/training-runs/{alice.model}", None),
            ("POST", f"/models/{alice.model}/terminate", None),
            ("POST", f"/models/{alice.model}/forward-passes", pass_body),
            ("POST", f"/models/{alice.model}/forward-backward-passes", pass_body),
            ("POST", f"/models/{alice.model}/optimizer-steps", {"payload": {"seq_id": 1}}),
            ("POST", f"/models/{alice.model}/export-sampler", {"seq_id": 1}),
            ("POST", f"/models/{alice.model}/checkpoints", {}),
            ("GET", f"/models/{alice.model}/checkpoints", None),
            ("PATCH", f"/models/{alice.model}/checkpoints/ttl", {"path": path, "ttl_seconds": 1}),
            ("POST", f"/models/{alice.model}/load", {"path": path}),
            ("POST", f"/models/{bob_model}/load", {"path": path}),
            ("POST", f"/models/{alice.model}/export-hf", {}),
            ("POST", f"/checkpoints/{checkpoint}/export", {}),
            ("GET", f"/checkpoints/{checkpoint}/artifacts", None),
            ("GET", f"/artifacts/{artifact['id']}/download", None),
            ("GET", f"/operations/{operation}", None),
            ("GET", f"/operations/{operation}/tensor-pack", None),
            ("POST", f"/sessions/{bob_session}/sampling-sessions", {"sampling_session_seq_id": 1, "model_path": path}),
            ("GET", f"/sampling-sessions/{session}", None),
            ("DELETE", f"/sampling-sessions/{session}", None),
            ("POST", f"/sampling-sessions/{session}/samples", {"prompt": prompt(1)}),
            ("POST", f"/sampling-sessions/{session}/logprobs", {"prompt": prompt(1)}),
            ("POST", f"/sampling-sessions/{session}/pause-generation", {"mode": "abort"}),
            ("POST", f"/sampling-sessions/{session}/continue-generation", None),
        ):
            response = await bob.request(method, API + target, json=body)
            assert response.status_code == 404, f"{method} {target}: {response.text}"
            refusal(response, 404, "not_found")
        assert len(service.calls) == num_calls
        assert (await bob.get(f"{API}/models")).json()["pagination"]["total_count"] == 1


def test_nothing_of_another_key_is_there():
    asyncio.run(_anothers())
