"""Results of `http-binary` requests: packed as they came, fetched apart, and to the unmodified SDK what JSON gives."""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import weaver
import zstandard
from fake_cluster import FakeLearners, FakeSamplers
from http_client import API, Client, refusal, with_client
from http_fakes import FakeService
from http_serving import face, in_thread, served, served_service
from pydantic_core import from_json
from test_http_tensor_packs import CONTENT_TYPE, raw_body, request, zstd_body
from weaver.types import Datum, ModelInput

from weaver_rl.errors import ServiceError
from weaver_rl.service.config import HttpConfig
from weaver_rl.service.http.render import pass_render
from weaver_rl.service.results import Rendered, TrainingResult

pytestmark = pytest.mark.unit

CODECS = ["raw", "zstd"]
HTTP = HttpConfig(port=0, long_poll_s=2, submit_grace_s=0)


@pytest.fixture(autouse=True)
def _quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEAVER_OPERATION_POLL_INTERVAL", "0.05")
    for name in ("WEAVER_BASE_URL", "WEAVER_API_KEY", "WEAVER_TENSOR_TRANSPORT", "WEAVER_TENSOR_COMPRESSION"):
        monkeypatch.delenv(name, raising=False)


def connected(url: str, codec: str | None) -> weaver.ServiceClient:
    how = {} if codec is None else {"tensor_transport": "http-binary", "tensor_compression": codec}
    return weaver.ServiceClient(base_url=url, api_key="sk-alice", heartbeat_interval=0.05, **how)


def data(*lengths: int) -> list[Datum]:
    numbers = torch.Generator().manual_seed(7)
    made = []
    for length in lengths:
        targets = torch.randint(0, 1000, (length,), generator=numbers)
        inputs = {"target_tokens": targets, "weights": torch.ones(length)}
        made.append(Datum(model_input=ModelInput.from_ints([1] * length), loss_fn_inputs=inputs))
    return made


# -- what is packed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS)
def test_a_pack_holds_the_tensors_bit_for_bit(codec: Any):
    odd = np.array([[-0.0, np.inf], [np.nan, 1e-45]], np.float32)
    tensors = (odd.T[0], np.empty(0, np.float32), np.arange(9, dtype=">f4")[::2], odd)
    result = TrainingResult(
        datum_ids=("a", None, None, "d"), logprobs_per_datum=tensors, metrics={"loss": 0.5}, ignored=()
    )
    rendered = pass_render(codec)(result)
    assert isinstance(rendered, Rendered)
    answer = from_json(rendered.response)
    described = answer["tensor_pack"]
    assert described == {
        "size_bytes": len(rendered.attachment),
        "sha256": hashlib.sha256(rendered.attachment).hexdigest(),
        "codec": codec,
        "decoded_size_bytes": sum(tensor.nbytes for tensor in tensors),
    }
    pack = rendered.attachment if codec == "raw" else zstandard.ZstdDecompressor().decompress(rendered.attachment)
    outputs = answer["result"]["loss_fn_outputs"]
    assert [output.get("datum_id") for output in outputs] == ["a", None, None, "d"]
    for output, tensor in zip(outputs, tensors, strict=True):
        reference = output["logprobs"]["$tensor"]
        assert (reference["format"], reference["codec"], reference["dtype"]) == ("raw-tensor", "raw", "float32")
        assert reference["shape"] == list(tensor.shape)
        start = reference["offset"]
        assert pack[start : start + reference["size_bytes"]] == tensor.astype("<f4").tobytes()
    inline = pass_render(None)(result)
    assert isinstance(inline, bytes)
    assert from_json(inline)["result"]["metrics"] == answer["result"]["metrics"]


# -- over HTTP -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("path", ["forward-passes", "forward-backward-passes"])
def test_the_pack_of_an_operation_is_served_as_it_was_described(codec: str, path: str):
    async def check(c: Client) -> None:
        asked = request(c.model)
        asked["payload"]["forward_input"] = asked["payload"]["forward_backward_input"]
        body = raw_body(asked=asked) if codec == "raw" else zstd_body(asked=asked)
        c.service.hold = True
        response = await c.http.post(
            f"{API}/models/{c.model}/{path}", content=body, headers={"Content-Type": CONTENT_TYPE}
        )
        pack_path = f"{API}/operations/{response.json()['id']}/tensor-pack"
        assert "it is pending" in refusal(await c.http.get(pack_path), 404, "not_found")["message"]
        c.service.release()
        described = (await c.get(f"/operations/{response.json()['id']}"))["response"]["tensor_pack"]
        for _ in range(2):
            got = await c.http.get(pack_path)
            assert got.status_code == 200
            assert got.headers["Content-Length"] == str(described["size_bytes"]) == str(len(got.content))
            assert got.headers["X-Weaver-Tensor-Codec"] == described["codec"] == codec
            assert got.headers["X-Weaver-Tensor-Decoded-Size"] == str(described["decoded_size_bytes"]) == "12"
            assert got.headers["Content-Type"] == "application/octet-stream"
            assert "Content-Encoding" not in got.headers
            assert "Transfer-Encoding" not in got.headers
            assert hashlib.sha256(got.content).hexdigest() == described["sha256"]

    with_client(check)


def test_an_operation_without_a_pack_says_why():
    async def check(c: Client) -> None:
        step = {"payload": {"seq_id": 1}}
        operation = await c.post(f"/models/{c.model}/optimizer-steps", step)
        response = await c.http.get(f"{API}/operations/{operation['id']}/tensor-pack")
        assert "its result is inline" in refusal(response, 404, "not_found")["message"]
        c.service.fail_operations = ServiceError("learner_lost", "it died")
        failed = await c.post(f"/models/{c.model}/optimizer-steps", step)
        response = await c.http.get(f"{API}/operations/{failed['id']}/tensor-pack")
        assert "it is error" in refusal(response, 404, "not_found")["message"]
        refusal(await c.http.get(f"{API}/operations/{uuid.uuid4()}/tensor-pack"), 404, "not_found")

    with_client(check)


# -- the SDK ---------------------------------------------------------------------------------------------------------


def outputs_of(answer: dict[str, Any]) -> list[Any]:
    assert "tensor_pack" not in answer
    outputs: list[Any] = answer["result"]["loss_fn_outputs"]
    return outputs


def test_the_sdk_reads_the_same_from_packs_and_from_json():
    asked = data(3, 1, 20_000)
    answers = {}
    with served(face(FakeService(), keys={"alice": "sk-alice"}, http=HTTP)) as url:
        for codec in (None, *CODECS):
            with connected(url, codec) as client:
                model = client.create_model(base_model="tiny")
                handle = model.forward_backward(asked, "cross_entropy", wait=False)
                first, second = handle.result(), handle.result()
                assert handle.refresh()["response"] == first == second
                answers[codec] = outputs_of(first)
                forward = model.forward(asked[:2], "forward_logprob")
                assert outputs_of(forward) == answers[codec][:2]
    assert [output["logprobs"]["shape"] for output in answers[None]] == [[3], [1], [20_000]]
    assert len(set(answers[None][2]["logprobs"]["data"])) > 900
    # Floats are equal only when they are the same to the last bit: there is no NaN and no zero among them.
    assert answers["raw"] == answers["zstd"] == answers[None]


async def _asynchronous(url: str) -> None:
    how = {"tensor_transport": "http-binary", "tensor_compression": "zstd"}
    async with weaver.AsyncServiceClient(base_url=url, api_key="sk-alice", **how) as client:
        model = await client.create_model(base_model="tiny")
        answers = await asyncio.gather(*(model.forward_backward(data(5), "cross_entropy") for _ in range(4)))
    expected = (-data(5)[0].loss_fn_inputs["target_tokens"].numpy() / 100).astype(np.float32).tolist()
    for answer in answers:
        (output,) = outputs_of(answer)
        assert output["logprobs"] == {"data": expected, "dtype": "float32", "shape": [5]}


def test_the_asynchronous_sdk_reads_packs():
    with served(face(FakeService(), keys={"alice": "sk-alice"}, http=HTTP)) as url:
        asyncio.run(_asynchronous(url))


@pytest.mark.parametrize("codec", CODECS)
def test_packs_of_the_real_service_outlive_a_restart(codec: str, tmp_path: Path):
    learners = FakeLearners()

    def serving() -> Any:
        return in_thread(served_service(tmp_path, {"alice": "sk-alice"}, HTTP, learners, FakeSamplers()))

    with serving() as url:
        with connected(url, None) as inline, connected(url, codec) as packed:
            answers = []
            for client in (inline, packed):
                model = client.create_model(base_model="tiny")
                handle = model.forward_backward(data(4, 2), "cross_entropy", wait=False)
                answers.append(outputs_of(handle.result()))
                assert outputs_of(handle.refresh()["response"]) == answers[-1]
        assert answers[0] == answers[1]
        assert answers[0][0]["logprobs"]["data"] == [-1.0] * 4
        operation_id = handle.operation_id
    with serving() as url, httpx.Client(base_url=url, headers={"X-WEAVER-API-KEY": "sk-alice"}) as http:
        described = http.get(f"{API}/operations/{operation_id}").json()["response"]["tensor_pack"]
        got = http.get(f"{API}/operations/{operation_id}/tensor-pack")
        assert got.headers["X-Weaver-Tensor-Codec"] == codec
        assert hashlib.sha256(got.content).hexdigest() == described["sha256"]
        decoded = got.content if codec == "raw" else zstandard.ZstdDecompressor().decompress(got.content)
        assert decoded == np.full(6, -1.0, "<f4").tobytes()
