"""The public SDK, unmodified, against the HTTP face: what it sends is understood and what it reads is there."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import weaver
from fastapi import FastAPI
from http_fakes import FakeService
from http_serving import face, served
from test_http_downloads import CONTENT, artifact_files
from weaver.operations import WeaverOperationError
from weaver.types import (
    AdamParams,
    Datum,
    LogprobsParams,
    LoraConfig,
    ModelInput,
    SamplingParams,
)

from weaver_rl.errors import ServiceError
from weaver_rl.service.calls import TrainingCall
from weaver_rl.service.config import HttpConfig

pytestmark = pytest.mark.unit

KEYS = {"alice": "sk-alice", "bob": "sk-bob"}


@pytest.fixture(autouse=True)
def _quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEAVER_OPERATION_POLL_INTERVAL", "0.05")
    for name in ("WEAVER_BASE_URL", "WEAVER_API_KEY", "WEAVER_TENSOR_TRANSPORT", "WEAVER_TENSOR_COMPRESSION"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def service(tmp_path: Path) -> FakeService:
    return FakeService(files_dir=artifact_files(tmp_path / "artifact"))


@pytest.fixture
def app(service: FakeService) -> FastAPI:
    return face(service, keys=KEYS, http=HttpConfig(port=0, long_poll_s=2, submit_grace_s=0))


@pytest.fixture
def url(app: FastAPI) -> Iterator[str]:
    with served(app) as address:
        yield address


def connected(url: str, key: str = "sk-alice", **how: Any) -> weaver.ServiceClient:
    return weaver.ServiceClient(base_url=url, api_key=key, heartbeat_interval=0.05, **how)


def datum(**more: Any) -> Datum:
    inputs = {"target_tokens": torch.tensor([9, 6, 2]), "weights": torch.tensor([0.0, 1.0, 0.5])}
    return Datum(model_input=ModelInput.from_ints([5, 9, 6]), loss_fn_inputs=inputs, **more)


def logprobs_of(answer: Any) -> list[list[float]]:
    return [output["logprobs"]["data"] for output in answer["result"]["loss_fn_outputs"]]


EXPECTED = pytest.approx([-0.09, -0.06, -0.02], rel=1e-5)


# -- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "transport",
    [{}, {"tensor_transport": "http-binary", "tensor_compression": "raw"}, {"tensor_transport": "http-binary"}],
    ids=["inline", "raw", "zstd"],
)
def test_training_in_every_transport(url: str, service: FakeService, transport: dict[str, Any]):
    with connected(url, **transport) as client:
        model = client.create_model(base_model="tiny:64", lora_config=LoraConfig(rank=4, seed=1))
        assert (model.base_model, model.tokenizer_path) == ("tiny", "/models/tiny")
        answer = model.forward_backward([datum(datum_id="b"), datum()], "cross_entropy")
        assert logprobs_of(answer) == [EXPECTED, EXPECTED]
        assert answer["result"]["loss_fn_outputs"][0]["datum_id"] == "b"
        assert answer["result"]["metrics"]["loss"] == 1.5
        assert logprobs_of(model.forward([datum()], "forward_logprob")) == [EXPECTED]
        assert model.optim_step(AdamParams(learning_rate=1e-3))["metrics"]["learning_rate"] == 1e-3
        step = model.forward_backward_custom([datum()], lambda _data, logprobs: (-logprobs[0].sum(), {"a": 1.0}))
        assert step["loss"].item() == pytest.approx(0.17)
    calls = [(kind, call) for kind, call in service.calls if kind != "heartbeat"]
    assert [kind for kind, _ in calls] == [
        "forward_backward", "forward", "optim_step", "forward", "forward_backward", "terminate"
    ]  # fmt: skip
    passes = [call for _, call in calls if isinstance(call, TrainingCall)]
    assert [call.seq_id for call in passes] == [1, 2, 4, 5]
    assert passes[-1].request.name == "surrogate"
    assert passes[-1].request.data[0].loss_fn_inputs["surrogate_weights"].tolist() == [-1.0] * 3
    assert any(kind == "heartbeat" for kind, _ in service.calls)
    assert service.models_by_id[model.model_id].status == "terminated"


def test_operations_that_take_a_while_and_that_fail(url: str, service: FakeService):
    with connected(url) as client:
        model = client.create_model(base_model="tiny", training_mode="full_ft")
        service.hold = True
        handles = [model.optim_step(AdamParams(), wait=False) for _ in range(3)]
        assert [handle.status for handle in handles] == ["pending"] * 3
        assert handles[0].pending_info is not None
        service.release()
        assert [handle.result()["num_steps"] for handle in handles] == [1, 1, 1]
        assert handles[0].refresh()["status"] == "done"
        service.hold = False
        service.fail_operations = ServiceError("learner_lost", "the learner died; load a checkpoint", retryable=False)
        with pytest.raises(WeaverOperationError, match="the learner died; load a checkpoint") as caught:
            model.optim_step(AdamParams())
        assert (caught.value.code, caught.value.retryable) == ("learner_lost", False)


def test_refusals_are_the_sdks_errors(url: str, service: FakeService):
    with connected(url) as client:
        with pytest.raises(weaver.WeaverAPIError) as caught:
            client.create_model(base_model="tiny", performance_tier="flash")
        assert (caught.value.status_code, caught.value.code) == (400, "invalid_request")
        assert "performance_tier" in caught.value.message
        assert caught.value.request_id
        model = client.create_model(base_model="tiny")
        with pytest.raises(weaver.WeaverAPIError, match="did you mean 'cross_entropy'"):
            model.forward_backward([datum()], "cross_entrop")
        with pytest.raises(weaver.WeaverAPIError, match="is missing"):
            model.forward_backward([Datum(model_input=ModelInput.from_ints([1]))], "cross_entropy")
        assert service.skipped == [(model.model_id, 1), (model.model_id, 2)]
        with pytest.raises(weaver.WeaverAPIError) as caught:
            client.list_deployments()
        assert caught.value.status_code == 501
        with pytest.raises(weaver.WeaverAPIError) as caught:
            client.get_quota_balance()
        assert caught.value.code == "not_implemented"
        with connected(url, key="sk-bob") as other, pytest.raises(weaver.WeaverAPIError) as caught:
            other.get_model(model.model_id)
        assert (caught.value.status_code, caught.value.code) == (404, "not_found")
    with pytest.raises(weaver.WeaverAPIError) as caught, connected(url, key="sk-eve"):
        pass
    assert (caught.value.status_code, caught.value.retryable) == (401, False)


def test_a_body_that_is_too_large_is_refused_in_words(service: FakeService):
    app = face(service, http=HttpConfig(port=0, max_body_mb=1))
    numbers = torch.ones(200_000, dtype=torch.int64)
    inputs = {"target_tokens": numbers, "weights": numbers.float()}
    many = [Datum(model_input=ModelInput.from_ints(numbers.tolist()), loss_fn_inputs=inputs)]
    with served(app) as url:
        for transport in ({}, {"tensor_transport": "http-binary", "tensor_compression": "raw"}):
            with weaver.ServiceClient(base_url=url, heartbeat_interval=0.05, **transport) as client:
                model = client.create_model(base_model="tiny")
                with pytest.raises(weaver.WeaverAPIError) as caught:
                    model.forward_backward(many, "cross_entropy")
                assert (caught.value.status_code, caught.value.code) == (413, "request_too_large")


# -- listings --------------------------------------------------------------------------------------------------------


def test_listings(url: str):
    policy = {"mode": "prefer", "clusters": ["a"]}
    with connected(url, organization="default", project="default", scheduling_policy=policy, name="run") as client:
        assert client.list_supported_models() == ["tiny"]
        (detailed,) = client.list_supported_models(detailed=True)
        assert [mode.mode for mode in detailed.training_modes] == ["lora", "full_ft"]
        assert [item["name"] for item in client.list_organizations()] == ["Default organization"]
        assert len(client.list_projects()) == 1
        assert client.get_scheduling_options()["can_select"] is False
        model = client.create_model(base_model="tiny")
        model.log_metrics({"reward": 0.5}, step=3, labels={"n": 1})
        assert client.list_models()["pagination"]["total_count"] == 1
        assert client.list_training_runs()["items"][0]["id"] == model.model_id
        assert client.get_training_run(model.model_id)["checkpoints"] == []
        assert client.get_supported_model_config("tiny") is not None
        assert client.terminate_model(model.model_id, ["inference"])["status"] == "active"
        session = client.session_id
    again = connected(url, session_id=session)
    again.connect()
    assert again.session_id == session
    again.close()


# -- sampling --------------------------------------------------------------------------------------------------------


def test_sampling(url: str, service: FakeService):
    with connected(url) as client:
        model = client.create_model(base_model="tiny")
        sampler = model.save_weights_and_get_sampling_client(name="step_000001")
        assert sampler.tokenizer_path == "/models/tiny"
        params = SamplingParams(max_tokens=4, temperature=0.0, stop=["\n", 2], seed=9)
        answer = sampler.sample(
            prompt=ModelInput.from_ints([1, 2, 3]),
            sampling_params=params,
            num_samples=2,
            include_prompt_logprobs=True,
            topk_prompt_logprobs=1,
            return_old_logprob=True,
        )
        assert [sequence["tokens"] for sequence in answer["sequences"]] == [[0, 9], [1, 9]]
        for sequence in answer["sequences"]:
            assert sequence["logprobs"] == sequence["old_logprobs"] == [-0.5, -0.25]
            assert (sequence["stop_reason"], sequence["weight_version"]) == ("stop", 4)
        assert (answer["weight_version"], answer["usage"]["total_tokens"]) == (4, 7)
        assert answer["raw_result"]["prompt_logprobs"] == [None, -0.25, -0.5]
        assert answer["raw_result"]["topk_prompt_logprobs"] == [None, [[0, -0.25]], [[0, -0.25]]]
        sample_calls = [call for kind, call in service.calls if kind == "sample"]
        assert (sample_calls[0].stop, sample_calls[0].stop_token_ids) == (("\n",), (2,))
        with pytest.raises(weaver.WeaverAPIError) as caught:
            sampler.sample(prompt=ModelInput.from_ints([1]), return_sampling_mask=True)
        assert caught.value.code == "unsupported"
        teacher = client.create_sampling_client(base_model="tiny")
        assert teacher.compute_logprobs(prompt=ModelInput.from_ints([1, 2, 3])) == [None, -0.25, -0.5]
        cold = LogprobsParams(loss_fn_config={"temperature": 0.5})
        assert teacher.compute_logprobs(prompt=ModelInput.from_ints([1, 2]), logprobs_params=cold) == [None, -0.25]
        assert [call for kind, call in service.calls if kind == "logprobs"][-1] == ((1, 2), 0.5)


def test_pausing(url: str, service: FakeService):
    with connected(url) as client:
        model = client.create_model(base_model="tiny", training_mode="full_ft")
        sampler = model.save_weights_and_get_sampling_client()
        with sampler.paused() as answer:
            assert answer == {"ok": True, "status": "paused", "mode": "abort"}
        assert [kind for kind, _ in service.calls if kind in ("pause", "continue")] == ["pause", "continue"]


# -- checkpoints -----------------------------------------------------------------------------------------------------


def test_checkpoints(url: str, service: FakeService):
    with connected(url) as client:
        model = client.create_model(base_model="tiny")
        saved = model.save_state(name="step-100", checkpoint_type="weight_and_optimizer", ttl_seconds=60)
        assert saved.path == f"weaver://{model.model_id}/checkpoints/step-100"
        assert (saved.checkpoint_type, saved.status, saved.ttl_seconds) == ("weight_and_optimizer", "completed", 60)
        assert model.list_checkpoints() == [saved]
        assert model.load_state_with_optimizer(saved)["num_steps"] == 3
        assert model.load_state(saved.path)["include_optimizer"] is False
        assert model.set_checkpoint_ttl(saved, None)["expires_at"] is None
        assert model.save_state(checkpoint_type="sampling").ttl_seconds == 3600
        with pytest.raises(weaver.WeaverAPIError, match="there is no checkpoint"):
            model.load_state(saved.path + "-other")
        with pytest.raises(weaver.WeaverAPIError, match="name: "):
            model.save_state(name="../../etc/passwd")


def test_export_and_download(url: str, app: FastAPI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = tmp_path / "artifact"
    with connected(url) as client:
        model = client.create_model(base_model="tiny")
        artifact = model.export_weights()
        assert (artifact.kind, artifact.status, artifact.size_bytes) == ("hf_adapter", "completed", len(CONTENT) + 4)
        assert model.export_weights(checkpoint=artifact.checkpoint_id).id == artifact.id
        (source / "sub" / "ein name & mehr?.txt").rename(source / "sub" / "name.txt")
        again = model.export_weights(checkpoint=artifact.checkpoint_id, force=True, merge_adapter=True)
        assert again.kind == "hf_model"
        target = tmp_path / "target"
        client.download_weights(again, target)
        for file in source.rglob("*"):
            if file.is_file():
                assert (target / file.relative_to(source)).read_bytes() == file.read_bytes()

        resumed = tmp_path / "resumed"
        resumed.mkdir()
        part = resumed / "adapter_model.safetensors.part"
        part.write_bytes(b"\xff" + CONTENT[1:1000])
        # Only the rest was sent: the first byte is as wrong as it was.
        with pytest.raises(RuntimeError, match="sha256 mismatch"):
            client.download_weights(again.uri, resumed, max_concurrency=1)
        part.write_bytes(CONTENT[:1000])
        client.download_weights(again.id, resumed)
        assert (resumed / "adapter_model.safetensors").read_bytes() == CONTENT

        links = app.state.face.links
        checked, refused = type(links).check, []

        def once_expired(self: Any, *link: Any) -> None:
            if not refused:
                refused.append(link)
                raise ServiceError("link_expired", "expired", status=403)
            checked(self, *link)

        monkeypatch.setattr(type(links), "check", once_expired)
        client.download_weights(again, tmp_path / "refreshed", max_concurrency=1)
        assert len(refused) == 1
        assert (tmp_path / "refreshed" / "adapter_model.safetensors").read_bytes() == CONTENT


# -- asynchronous ----------------------------------------------------------------------------------------------------


async def _asynchronous(url: str, service: FakeService, tmp_path: Path, transport: dict[str, Any]) -> None:
    client = weaver.AsyncServiceClient(base_url=url, api_key="sk-alice", **transport)
    async with client:
        model = await client.create_model(base_model="tiny")
        answers = await asyncio.gather(*(model.forward_backward([datum()], "cross_entropy") for _ in range(5)))
        assert [logprobs_of(answer) for answer in answers] == [[EXPECTED]] * 5
        assert (await model.optim_step(AdamParams()))["num_steps"] == 1
        step = await model.forward_backward_custom([datum()], lambda _data, logprobs: (-logprobs[0].sum(), {}))
        assert step["loss"].item() == pytest.approx(0.17)
        sampler = await model.save_weights_and_get_sampling_client(name="initial")
        samples = await asyncio.gather(
            *(sampler.sample(prompt=ModelInput.from_ints([1, 2]), num_samples=1) for _ in range(20))
        )
        assert all(answer["sequences"][0]["tokens"] == [0, 0] for answer in samples)
        assert await sampler.compute_logprobs(prompt=ModelInput.from_ints([1, 2])) == [None, -0.25]
        saved = await model.save_state(name="a")
        assert (await model.load_state(saved))["num_steps"] == 3
        (tmp_path / "artifact" / "sub" / "ein name & mehr?.txt").unlink()
        artifact = await model.export_weights()
        await client.download_weights(artifact, tmp_path / "target")
        assert (tmp_path / "target" / "adapter_model.safetensors").read_bytes() == CONTENT
        assert await client.list_supported_models() == ["tiny"]
        with pytest.raises(weaver.WeaverAPIError, match="did you mean"):
            await model.forward_backward([datum()], "cross_entrop")
        seen = sorted(call.seq_id for kind, call in service.calls if kind == "forward_backward")
        assert seen == [1, 2, 3, 4, 5, 8]
    assert service.models_by_id[model.model_id].status == "terminated"


@pytest.mark.parametrize("transport", [{}, {"tensor_transport": "http-binary"}], ids=["inline", "zstd"])
def test_the_asynchronous_client(url: str, service: FakeService, tmp_path: Path, transport: dict[str, Any]):
    asyncio.run(_asynchronous(url, service, tmp_path, transport))
