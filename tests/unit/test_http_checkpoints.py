"""Checkpoints, exports and names over HTTP: what the service is asked, what the SDK reads, and no way out."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from http_client import API, Client, refusal, with_client
from pydantic import ValidationError

from weaver_rl.errors import ServiceError
from weaver_rl.service.http.wire import LoadBody
from weaver_rl.service.weaver_paths import parse_checkpoint_path

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("body", "kind", "ttl_seconds"),
    [
        ({"type": "weight", "name": "step-100"}, "weight", None),
        ({"type": "weight_and_optimizer"}, "weight_and_optimizer", None),
        ({"type": "weight", "ttl_seconds": 60}, "weight", 60),
        ({"type": "sampling"}, "sampling", 3600),
        ({"type": "sampling", "ttl_seconds": None}, "sampling", None),
        ({}, "weight", None),
    ],
)
def test_saving(body: dict[str, Any], kind: str, ttl_seconds: int | None):
    async def check(c: Client) -> None:
        operation = await c.post(f"/models/{c.model}/checkpoints", body)
        saved = operation["response"]
        assert c.service.calls == [("save", (kind, body.get("name"), ttl_seconds))]
        uuid.UUID(saved["id"])
        assert saved["path"] == f"weaver://{c.model}/checkpoints/{saved['name']}"
        assert (saved["type"], saved["status"], saved["ttl_seconds"]) == (kind, "completed", ttl_seconds)
        assert (saved["train_mlp"], saved["train_attn"], saved["train_unembed"]) == (True, True, True)
        (listed,) = (await c.get(f"/models/{c.model}/checkpoints"))["items"]
        assert {name: saved[name] for name in listed} == listed

    with_client(check)


def test_export_for_samplers_loading_and_time_to_live():
    async def check(c: Client) -> None:
        body = {"seq_id": 1, "path": "step_000001", "ttl_seconds": 3600}
        exported = (await c.post(f"/models/{c.model}/export-sampler", body))["response"]
        path = f"weaver://{c.model}/checkpoints/step_000001"
        assert exported["model_path"] == exported["path"] == path
        assert "sampling_session_id" not in exported
        assert (await c.post(f"/models/{c.model}/export-sampler", {"seq_id": 2}))["response"]["ttl_seconds"] is None
        loaded = (await c.post(f"/models/{c.model}/load", {"path": path, "include_optimizer": True}))["response"]
        assert loaded == {"path": path, "num_steps": 3, "include_optimizer": True}
        assert c.service.calls[-1] == ("load", (path, True))
        for ttl_seconds in (5, None):
            response = await c.http.patch(
                f"{API}/models/{c.model}/checkpoints/ttl", json={"path": path, "ttl_seconds": ttl_seconds}
            )
            assert response.json()["ttl_seconds"] == ttl_seconds
        response = await c.http.patch(f"{API}/models/{c.model}/checkpoints/ttl", json={"path": path})
        assert "ttl_seconds: is missing" in refusal(response, 400, "invalid_request")["message"]

    with_client(check)


def test_paths_as_older_clients_write_them():
    async def check(c: Client) -> None:
        name = "n" * 128
        await c.post(f"/models/{c.model}/export-sampler", {"seq_id": 1, "path": name})
        older = f"weaver://{c.model}/{name}"
        await c.post(f"/models/{c.model}/load", {"path": older})
        assert c.service.calls[-1] == ("load", (older, False))
        await c.sampling_session(model_path=older)
        response = await c.http.patch(f"{API}/models/{c.model}/checkpoints/ttl", json={"path": older, "ttl_seconds": 5})
        assert response.json()["path"] == f"weaver://{c.model}/checkpoints/{name}"

    with_client(check)


@pytest.mark.parametrize(
    "path",
    [
        "weaver://m/checkpoints/a",
        "weaver://m/a",
        "weaver://m/checkpoints",
        f"weaver://{'m' * 64}/a",
        f"weaver://{'m' * 65}/a",
        f"weaver://m/{'a' * 128}",
        f"weaver://m/{'a' * 129}",
        "weaver://m/checkpoints/",
        "weaver://m/",
        "weaver://m/a/b",
        "weaver://m/a\n",
        "xweaver://m/a",
        "weaver://m_/a",
        "weaver:///a",
    ],
)
def test_the_edge_takes_the_paths_that_the_service_takes_and_no_other(path: str):
    def takes(check: Callable[[], object]) -> bool:
        try:
            check()
        except (ServiceError, ValidationError):
            return False
        return True

    by_edge = takes(lambda: LoadBody.model_validate({"path": path}))
    assert by_edge == takes(lambda: parse_checkpoint_path(path))


TRAVERSALS = [
    "../x",
    "..",
    ".",
    "a/b",
    "/etc/passwd",
    "a\\b",
    "a\0b",
    "",
    " a",
    ".hidden",
    "a" * 200,
    "é",
    "a%2fb",
    "-a",
]


@pytest.mark.parametrize("name", TRAVERSALS)
def test_no_name_leads_out_of_its_place(name: str):
    async def check(c: Client) -> None:
        paths = [f"weaver://{c.model}/checkpoints/{name}", f"weaver://{name}/checkpoints/a", name, f"file://{name}"]
        for path, bodies in {
            f"/models/{c.model}/export-sampler": [{"seq_id": 1, "path": name}],
            f"/models/{c.model}/checkpoints": [{"name": name}],
            f"/models/{c.model}/load": [{"path": each} for each in paths],
            f"/sessions/{c.session}/sampling-sessions": [
                {"sampling_session_seq_id": 1, "model_path": each} for each in paths
            ],
        }.items():
            for body in bodies:
                refusal(await c.http.post(API + path, json=body), 400, "invalid_request")
        assert c.service.calls == []

    with_client(check)


@pytest.mark.parametrize("ttl_seconds", [0, -1, 1.5, True, "60", 2**62, 10**400])
def test_times_to_live_are_bounded(ttl_seconds: Any):
    async def check(c: Client) -> None:
        raw = json.dumps({"type": "weight", "ttl_seconds": ttl_seconds})
        response = await c.http.post(
            f"{API}/models/{c.model}/checkpoints", content=raw, headers={"Content-Type": "application/json"}
        )
        assert "ttl_seconds: " in refusal(response, 400, "invalid_request")["message"]

    with_client(check)


def test_exports():
    async def check(c: Client) -> None:
        body = {"format": "huggingface", "merge_adapter": False, "ttl_seconds": None}
        artifact = (await c.post(f"/models/{c.model}/export-hf", body))["response"]
        assert (artifact["kind"], artifact["status"]) == ("hf_adapter", "completed")
        assert artifact["uri"].endswith("/artifacts/hf_adapter")
        assert artifact["manifest"] == {"format_version": 1, "files": []}
        assert c.service.calls[-1] == ("export_hf", (False, None))
        await c.post(f"/models/{c.model}/export-hf", {})
        assert c.service.calls[-1] == ("export_hf", (False, 604800))
        checkpoint = artifact["checkpoint_id"]
        again = await c.post(f"/checkpoints/{checkpoint}/export", body)
        assert again == artifact
        forced = await c.post(f"/checkpoints/{checkpoint}/export", body | {"force": True, "merge_adapter": True})
        assert forced["response"]["kind"] == "hf_model"
        assert len((await c.get(f"/checkpoints/{checkpoint}/artifacts"))["items"]) == 2
        response = await c.http.post(f"{API}/models/{c.model}/export-hf", json={"format": "gguf"})
        assert "format: " in refusal(response, 400, "invalid_request")["message"]

    with_client(check)
