"""Training requests over HTTP: what is decoded, what is refused and how that is named; the event loop stays free."""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import Any

import numpy as np
import pytest
from http_client import a_model, refusal
from http_fakes import FakeService
from http_serving import calling, face

from weaver_rl.service.calls import TrainingCall
from weaver_rl.service.http.decoding import Decoded, DecodeJob, Refusal, decode

pytestmark = pytest.mark.unit

MODEL_ID = "5c1f4a52-0000-4000-8000-000000000000"


def tensor(data: Any, dtype: str = "float32") -> dict[str, Any]:
    return {"data": data, "dtype": dtype}


def datum(*, tokens: Any = (5, 9, 6), **inputs: Any) -> dict[str, Any]:
    given = {"target_tokens": tensor([9, 6, 2], "int64"), "weights": tensor([0.0, 1.0, 0.5])} | inputs
    return {"model_input": {"chunks": [{"type": "encoded_text", "tokens": list(tokens)}]}, "loss_fn_inputs": given}


def request(*data: dict[str, Any], seq_id: Any = 1, backward: bool = True, **changes: Any) -> dict[str, Any]:
    asked = {"loss_fn": "cross_entropy", "data": list(data)} | changes
    key = "forward_backward_input" if backward else "forward_input"
    return {"payload": {"model_id": MODEL_ID, "seq_id": seq_id, "tensor_transport": "default", key: asked}}


def decoded(body: Any, *, backward: bool = True, content_type: str = "application/json") -> TrainingCall | Refusal:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    result = decode(
        DecodeJob(body=raw, content_type=content_type, model_id=MODEL_ID, backward=backward, limit_bytes=1 << 20)
    )
    return result.call if isinstance(result, Decoded) else result


def call_of(body: Any, **how: Any) -> TrainingCall:
    result = decoded(body, **how)
    assert isinstance(result, TrainingCall), result
    return result


def refused(body: Any, **how: Any) -> Refusal:
    result = decoded(body, **how)
    assert isinstance(result, Refusal), result
    return result


# -- what is decoded -------------------------------------------------------------------------------------------------


def test_a_request_becomes_arrays():
    body = request(
        datum(),
        datum(tokens=[1, 2, 3], weights=tensor([1.0, 1.0, 1.0], "float64")) | {"metadata": {"task": "x"}},
        seq_id=7,
        loss_fn_config={"temperature": 0.5, "entropy_coeff": 1e-4},
    )
    call = call_of(body)
    assert call.seq_id == 7
    assert call.datum_ids == (None, None)
    assert call.digest == hashlib.sha256(json.dumps(body).encode()).hexdigest()
    assert (call.request.name, call.request.temperature) == ("cross_entropy", 0.5)
    assert "loss_fn_config.entropy_coeff" in call.request.ignored
    first, second = call.request.data
    assert first.token_ids_N.dtype == np.int64
    np.testing.assert_array_equal(first.token_ids_N, [5, 9, 6])
    np.testing.assert_array_equal(first.loss_fn_inputs["target_tokens"], [9, 6, 2])
    assert second.loss_fn_inputs["weights"].dtype == np.float32


def test_pieces_of_a_model_input_are_joined():
    pieces = datum()
    pieces["model_input"]["chunks"] = [
        {"type": "encoded_text", "tokens": [5]},
        {"type": "encoded_text", "tokens": []},
        {"type": "encoded_text", "tokens": [9, 6]},
    ]
    np.testing.assert_array_equal(call_of(request(pieces)).request.data[0].token_ids_N, [5, 9, 6])


def test_ids_of_data_are_kept_in_order():
    call = call_of(request(datum() | {"datum_id": "b"}, datum() | {"datum_id": "a"}))
    assert call.datum_ids == ("b", "a")
    assert [each.datum_id for each in call.request.data] == ["b", "a"]


def test_what_is_unknown_is_let_through():
    body = request(datum(sampling_mask=[[1], [2, 3], []]) | {"future": 1})
    body["payload"] |= {"future": {"a": 1}, "metadata": {"b": 2}}
    body["future"] = 3
    assert call_of(body).request.ignored == ("loss_fn_inputs.sampling_mask",)


def test_a_forward_needs_targets_alone():
    body = request(datum(), backward=False, loss_fn="forward_logprob")
    assert call_of(body, backward=False).request.loss is None


# -- what is refused -------------------------------------------------------------------------------------------------


def without(name: str) -> dict[str, Any]:
    body = request(datum())
    del body["payload"][name]
    return body


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (request(), "payload.forward_backward_input.data: "),
        (without("seq_id"), "payload.seq_id: is missing"),
        (request(datum(), seq_id=0), "payload.seq_id: "),
        (request(datum(), seq_id="1"), "payload.seq_id: "),
        (request(datum(), seq_id=True), "payload.seq_id: "),
        (request(datum(), backward=False), "payload.forward_backward_input: is missing"),
        (request(datum(), loss_fn=5), "payload.forward_backward_input.loss_fn: "),
        (request(datum(), loss_fn="cross_entrpy"), "did you mean 'cross_entropy'"),
        (request(datum(tokens=[1, -1, 3])), r"data[0].model_input.chunks[0].tokens[1]: must be at least 0, seen -1"),
        (request(datum(tokens=[1, 2.5, 3])), "data[0].model_input.chunks[0].tokens: must be a list of integers"),
        (request(datum(tokens=[1, "2", 3])), "data[0].model_input.chunks[0].tokens: must be numbers"),
        (request(datum(tokens=[1, None, 3])), "data[0].model_input.chunks[0].tokens: must be numbers"),
        (request(datum(tokens=[True, False, True])), "data[0].model_input.chunks[0].tokens: must be a list of int"),
        (request(datum(tokens=[1, 2**63, 3])), "data[0].model_input.chunks[0].tokens: must be a list of integers"),
        (request(datum(tokens=[1, 2**64, 3])), "data[0].model_input.chunks[0].tokens: must be numbers of 64 bits"),
        (request(datum(tokens=[[1], [2], [3]])), "data[0].model_input.chunks[0].tokens: must be a list of integers"),
        (request(datum(), datum(weights=tensor([1.0, "x", 1.0]))), "data[1].loss_fn_inputs.weights: must be numbers"),
        (request(datum(weights=tensor([1.0, None, 1.0]))), "data[0].loss_fn_inputs.weights: must be numbers"),
        (request(datum(weights=tensor([[1.0], [1.0, 2.0]]))), "data[0].loss_fn_inputs.weights: must be numbers in"),
        (request(datum(weights=tensor([1, 1, 1], "bfloat16"))), "data[0].loss_fn_inputs.weights.dtype: seen 'bfloat1"),
        (request(datum(weights={"data": [1, 1, 1]})), "data[0].loss_fn_inputs.weights.dtype: seen None"),
        (request(datum(weights={"values": [1, 1, 1]})), "data[0].loss_fn_inputs.weights: a tensor is {data, dtype}"),
        (request(datum(weights=tensor([1.0, 1.0]) | {"shape": [3]})), "2 numbers do not have the shape [3]"),
        (request(datum(weights=tensor([1.0, 1.0, 1.0]) | {"shape": "3"})), "weights.shape: must be a list"),
        (request(datum(target_tokens=tensor([9, 6.5, 2], "int64"))), "target_tokens: dtype is int64, but data has num"),
        (request(datum(target_tokens=tensor([9, 2**40, 2], "int32"))), "dtype is int32, but data has an integer beyo"),
        (request(datum(weights=tensor([1.0, 1.0]))), "loss_fn_inputs.weights must be float32 of shape [3]"),
        (request(datum(weights={"$tensor": {}})), "data[0].loss_fn_inputs.weights: is $tensor, but the request has no"),
        (request({"model_input": {"chunks": []}, "loss_fn_inputs": {}}), "data[0].model_input.chunks: "),
        (request({"kind": "sample_ref", "dataset": "d"}), "data[0].kind: "),
        (request(datum() | {"datum_id": "a"}, datum()), "data[1].datum_id: all data of a request have one, or none"),
        (request(datum() | {"datum_id": "a"}, datum() | {"datum_id": "a"}), "data[1].datum_id: 'a' is that of data[0]"),
        (request(datum() | {"metadata": {"router_replay": {}}}), "data[0].metadata.router_replay: not served here"),
        ([], "body: "),
        ({"payload": []}, "payload: "),
        (b"{", "is no JSON"),
    ],
)
def test_a_mistake_is_named_with_its_place(body: Any, message: str):
    refusal_ = refused(body)
    assert message in refusal_.error.message
    assert len(refusal_.error.message) < 1200
    assert refusal_.error.status == 400
    assert not refusal_.error.retryable


def test_other_chunks_than_text_are_refused():
    image = datum()
    image["model_input"]["chunks"].append({"type": "image", "tokens": [1]})
    assert "data[0].model_input.chunks[1].type: " in refused(request(image)).error.message


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "1e400"])
def test_numbers_that_are_none_are_named_with_datum_and_field(word: str):
    raw = json.dumps(request(datum(), datum(weights=tensor([1.0, 77.0, 1.0])))).replace("77.0", word).encode()
    message = refused(raw).error.message
    assert "datum 1: loss_fn_inputs.weights must be finite" in message
    assert "at 1" in message


def test_a_body_of_another_model_is_refused_and_a_wrong_type_too():
    body = request(datum())
    body["payload"]["model_id"] = "another"
    assert "payload.model_id: is 'another', the address says" in refused(body).error.message
    del body["payload"]["model_id"]
    assert call_of(body)
    assert refused(body, content_type="text/plain").error.status == 415


@pytest.mark.parametrize(
    ("body", "seq_id"),
    [
        (request(seq_id=5), 5),
        (request(datum(), seq_id=5, loss_fn="none"), 5),
        (request(seq_id="5"), None),
        (request(seq_id=0), None),
        (request(seq_id=2**40), None),
        (b"{", None),
        ({"payload": 5}, None),
        (5, None),
    ],
)
def test_a_refusal_carries_the_seq_id_if_it_could_be_read(body: Any, seq_id: int | None):
    assert refused(body).seq_id == seq_id


# -- over HTTP -------------------------------------------------------------------------------------------------------


def for_model(body: dict[str, Any], model_id: str) -> dict[str, Any]:
    return {"payload": body["payload"] | {"model_id": model_id}}


async def _passes() -> None:
    service = FakeService()
    async with calling(face(service)) as client:
        model = await a_model(client)
        for path, backward in (("forward-passes", False), ("forward-backward-passes", True)):
            body = for_model(request(datum() | {"datum_id": "x"}, backward=backward), model)
            response = await client.post(f"/api/v1/models/{model}/{path}", json=body)
            assert response.status_code == 202, response.text
            operation = response.json()
            assert (operation["status"], operation["model_id"]) == ("done", model)
            (output,) = operation["response"]["result"]["loss_fn_outputs"]
            assert output["datum_id"] == "x"
            assert output["logprobs"]["shape"] == [3]
            assert output["logprobs"]["dtype"] == "float32"
            np.testing.assert_allclose(output["logprobs"]["data"], [-0.09, -0.06, -0.02], rtol=1e-6)
            assert operation["response"]["result"]["metrics"] == {"loss": 1.5, "tokens": 3.0}
        assert [name for name, _ in service.calls] == ["forward", "forward_backward"]
        assert service.num_receiving == 0
        assert service.most_receiving == 1


def test_passes_answer_in_the_nested_shape():
    asyncio.run(_passes())


async def _gaps() -> None:
    service = FakeService()
    async with calling(face(service)) as client:
        model = await a_model(client)
        steps, passes = f"/api/v1/models/{model}/optimizer-steps", f"/api/v1/models/{model}/forward-backward-passes"
        refusal(await client.post(passes, json=for_model(request(seq_id=1), model)), 400, "invalid_request")
        bad = {"payload": {"seq_id": 2, "adam_params": {"learning_rate": -1}}}
        message = refusal(await client.post(steps, json=bad), 400, "invalid_request")["message"]
        assert "payload.adam_params.learning_rate" in message
        wrong = {"payload": {"seq_id": 3, "model_id": "another"}}
        refusal(await client.post(steps, json=wrong), 400, "invalid_request")
        bad_name = {"seq_id": 4, "path": "../../etc/passwd"}
        refusal(await client.post(f"/api/v1/models/{model}/export-sampler", json=bad_name), 400, "invalid_request")
        assert service.skipped == [(model, seq_id) for seq_id in (1, 2, 3, 4)]
        refusal(
            await client.post(steps, content=b"{", headers={"Content-Type": "application/json"}), 400, "invalid_request"
        )
        assert service.calls == []


def test_refused_requests_leave_no_gap():
    asyncio.run(_gaps())


async def _anothers() -> None:
    service = FakeService()
    app = face(service, keys={"alice": "sk-alice", "bob": "sk-bob"})
    async with calling(app, "sk-alice") as alice, calling(app, "sk-bob") as bob:
        model = await a_model(alice)
        sent = 0

        async def counted() -> Any:
            nonlocal sent
            for _ in range(100):
                sent += 1
                yield b" " * 1000

        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        path = f"/api/v1/models/{model}/forward-backward-passes"
        refusal(await bob.post(path, content=counted(), headers=headers), 404, "not_found")
        assert service.most_receiving == 0
        bad = {"payload": {"seq_id": 2, "adam_params": {"learning_rate": -1}}}
        refusal(await bob.post(f"/api/v1/models/{model}/optimizer-steps", json=bad), 400, "invalid_request")
        good = {"payload": {"seq_id": 2}}
        refusal(await bob.post(f"/api/v1/models/{model}/optimizer-steps", json=good), 404, "not_found")
        assert service.skipped == []


def test_a_model_of_another_key_is_not_there_and_its_order_is_not_touched():
    asyncio.run(_anothers())


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("learning_rate", [-1e-9, True, "1", None, "1e400"]),
        ("beta1", [-0.1, 1, 1.5]),
        ("beta2", [-0.1, 1]),
        ("eps", [0, 0.0, -1e-8, 1e-400]),
        ("weight_decay", [-0.1]),
        ("grad_clip_norm", [-1, float("nan"), float("inf"), 10**400]),
    ],
)
def test_an_optimizer_step_that_cannot_be_names_its_field(field: str, bad: list[Any]):
    async def refused_all() -> None:
        service = FakeService()
        async with calling(face(service)) as client:
            model = await a_model(client)
            for value in bad:
                raw = json.dumps({"payload": {"seq_id": 1, "adam_params": {field: value}}}).replace('"1e400"', "1e400")
                response = await client.post(
                    f"/api/v1/models/{model}/optimizer-steps", content=raw, headers={"Content-Type": "application/json"}
                )
                message = refusal(response, 400, "invalid_request")["message"]
                assert field in message or "no JSON" in message, (value, message)
            assert service.calls == []

    asyncio.run(refused_all())


async def _optim() -> None:
    service = FakeService()
    async with calling(face(service)) as client:
        model = await a_model(client)
        raw = json.dumps({"payload": {"model_id": model, "seq_id": 9, "adam_params": {"learning_rate": 0}}}).encode()
        headers = {"Content-Type": "application/json"}
        response = await client.post(f"/api/v1/models/{model}/optimizer-steps", content=raw, headers=headers)
        assert response.json()["response"] == {"metrics": {"grad_norm": 0.5, "learning_rate": 0.0}, "num_steps": 1}
        ((_, (seq_id, digest, params)),) = service.calls
        assert (seq_id, digest) == (9, hashlib.sha256(raw).hexdigest())
        assert (params.learning_rate, params.beta1, params.beta2, params.eps) == (0.0, 0.9, 0.95, 1e-8)
        assert (params.weight_decay, params.grad_clip_norm) == (0.01, 1.0)


def test_an_optimizer_step_has_the_wires_defaults():
    asyncio.run(_optim())
