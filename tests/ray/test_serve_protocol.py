"""The protocol's sharp edges (what an SDK, a proxy or a network does to a server), on the wire of a real one.

Numbered as in the list of what bites that the wire protocol's description begins with.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from serve_parts import BASE, KEYS, RunningServer

pytest_plugins = ("serve_fixtures",)
pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

DATUM = {
    "model_input": {"chunks": [{"type": "encoded_text", "tokens": [5, 6]}, {"type": "encoded_text", "tokens": [7]}]},
    "loss_fn_inputs": {
        "target_tokens": {"data": [6, 7, -100], "dtype": "int64"},
        "weights": {"data": [1.0, 1.0, 0.0], "dtype": "float32"},
    },
}
ADAM = {
    "learning_rate": 1e-3,
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-8,
    "weight_decay": 0.01,
    "grad_clip_norm": 1.0,
}


class Wire:
    """One client on the wire, with a model of its own."""

    def __init__(self, url: str) -> None:
        headers = {"X-WEAVER-API-KEY": KEYS["anne"]}
        self.http = httpx.Client(base_url=f"{url}/api/v1", headers=headers, timeout=60)
        self.session = self.post("/sessions", {"tags": ["test"], "user_metadata": {}, "sdk_version": "1.19.2"})["id"]
        body = {"model_seq_id": 1, "base_model": BASE, "lora_config": {"rank": 8, "seed": 0}}
        self.created = self.post(f"/sessions/{self.session}/models", body)
        self.model = self.created["id"]

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = self.http.post(path, json=body)
        assert answer.is_success, answer.text
        return dict(answer.json())

    def ended(self, operation: dict[str, Any]) -> dict[str, Any]:
        while operation["status"] not in ("done", "error"):
            assert operation["status"] in ("pending", "running")
            operation = self.http.get(f"/operations/{operation['id']}").json()
        return operation

    def done(self, operation: dict[str, Any]) -> dict[str, Any]:
        operation = self.ended(operation)
        assert operation["status"] == "done", operation
        return dict(operation["response"])

    def pass_body(self, seq_id: int, kind: str = "forward_backward", num: int = 1) -> dict[str, Any]:
        passed = {"loss_fn": "cross_entropy", "data": [DATUM] * num}
        return {
            "payload": {
                "model_id": self.model,
                "seq_id": seq_id,
                "tensor_transport": "default",
                f"{kind}_input": passed,
            }
        }

    def forward_backward(self, seq_id: int, num: int = 1) -> dict[str, Any]:
        return self.post(f"/models/{self.model}/forward-backward-passes", self.pass_body(seq_id, num=num))

    def optim_step(self, seq_id: int) -> dict[str, Any]:
        body = {"payload": {"model_id": self.model, "seq_id": seq_id, "adam_params": ADAM}}
        return self.post(f"/models/{self.model}/optimizer-steps", body)


@pytest.fixture
def wire(server: RunningServer) -> Iterator[Wire]:
    wire = Wire(server.url)
    yield wire
    wire.http.post(f"/models/{wire.model}/terminate")
    wire.http.close()


def test_1_only_done_and_error_end_an_operation(wire: Wire):
    assert wire.ended(wire.forward_backward(1))["status"] == "done"
    assert wire.ended(wire.optim_step(2))["status"] == "done"
    failed = wire.ended(wire.optim_step(3))
    assert failed["status"] == "error"
    assert failed["error_code"] == "invalid_request"
    assert "gradients" in failed["error_message"]
    assert failed["retryable"] is False


def test_3_a_request_sent_twice_is_run_once(wire: Wire):
    path, body = f"/models/{wire.model}/forward-backward-passes", wire.pass_body(1, num=64)
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda _: wire.post(path, body), range(3)))
    assert len({answer["id"] for answer in answers}) == 1
    first = wire.done(answers[0])
    assert wire.done(wire.post(path, body)) == first, "also after its end"
    once = first["result"]["metrics"]["grad_norm"]
    other = wire.http.post(path, json=wire.pass_body(1, num=2))
    assert other.status_code == 409, "another request under a number that is taken is no repetition"
    assert other.json()["error"] == "seq_id_conflict"
    twice = wire.done(wire.forward_backward(2, num=64))["result"]["metrics"]["grad_norm"]
    assert twice == pytest.approx(2 * once, rel=1e-3)


def test_4_and_5_answers_are_nested_under_result(wire: Wire):
    response = wire.done(wire.forward_backward(1, num=2))
    outputs = response["result"]["loss_fn_outputs"]
    assert [len(output["logprobs"]["data"]) for output in outputs] == [3, 3]
    assert outputs[0]["logprobs"]["dtype"] == "float32"
    assert outputs[0]["logprobs"]["data"][2] == 0.0, "the target was -100"
    assert response["result"]["metrics"]["tokens"] == 6
    body = {"sampling_session_seq_id": 1, "base_model": BASE, "model_path": None}
    sampler = wire.post(f"/sessions/{wire.session}/sampling-sessions", body)["id"]
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]}
    scored = wire.done(wire.post(f"/sampling-sessions/{sampler}/logprobs", {"prompt": prompt}))
    assert scored["result"]["prompt_logprobs"][0] is None
    assert len(scored["result"]["prompt_logprobs"]) == 3
    params = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_tokens": 4}
    asked = {"prompt": prompt, "sampling_params": params, "num_samples": 2, "prompt_logprobs": False}
    sampled = wire.done(wire.post(f"/sampling-sessions/{sampler}/samples", asked | {"topk_prompt_logprobs": 0}))
    for sequence in sampled["result"]["sequences"]:
        assert len(sequence["tokens"]) == len(sequence["logprobs"]) > 0
        assert isinstance(sequence["text"], str)
        assert sequence["stop_reason"] in ("stop", "length")


def test_6_metrics_of_a_step_are_at_the_top(wire: Wire):
    wire.forward_backward(1)
    assert wire.done(wire.optim_step(2))["metrics"]["grad_norm"] > 0


def test_8_the_tokenizer_is_one_that_the_client_can_open(wire: Wire):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(wire.created["tokenizer_path"], trust_remote_code=False)
    assert tokenizer.decode(tokenizer.encode("1 + 2 =")) == "1 + 2 ="


def test_9_ids_are_canonical_uuids(wire: Wire):
    wire.done(wire.forward_backward(1))
    saved = wire.done(wire.post(f"/models/{wire.model}/checkpoints", {"type": "weight", "name": "a"}))
    for value in (wire.session, wire.model, saved["id"]):
        assert str(uuid.UUID(value)) == value
    assert saved["path"] == f"weaver://{wire.model}/checkpoints/a"
    listed = wire.http.get(f"/models/{wire.model}/checkpoints").json()["items"]
    assert [item["id"] for item in listed] == [saved["id"]]


def test_10_a_terminated_model_takes_nothing_more_and_its_checkpoints_stay(wire: Wire):
    wire.done(wire.forward_backward(1))
    wire.done(wire.post(f"/models/{wire.model}/checkpoints", {"type": "weight", "name": "kept"}))
    assert wire.http.post(f"/models/{wire.model}/terminate").is_success
    refused = wire.http.post(f"/models/{wire.model}/forward-backward-passes", json=wire.pass_body(2))
    assert refused.status_code == 409
    assert refused.json()["error"] == "model_terminated"
    assert [item["name"] for item in wire.http.get(f"/models/{wire.model}/checkpoints").json()["items"]] == ["kept"]


def test_11_operations_run_by_seq_id_whatever_came_first(wire: Wire):
    step = wire.optim_step(2)
    assert step["status"] == "pending", "its forward_backward has not come"
    time.sleep(0.3)
    assert wire.http.get(f"/models/{wire.model}").json()["last_seq_id"] in (0, None)
    backward = wire.forward_backward(1)
    assert wire.done(step)["metrics"]["grad_norm"] > 0
    wire.done(backward)
    saved = wire.post(f"/models/{wire.model}/checkpoints", {"type": "weight", "name": "b"})
    assert saved["status"] in ("pending", "running", "done")
    wire.done(saved)


def test_11_a_number_that_never_comes_is_waited_for_and_then_passed(wire: Wire):
    wire.done(wire.forward_backward(1))
    started = time.monotonic()
    step = wire.optim_step(3)
    assert wire.done(step)["metrics"]["grad_norm"] > 0
    assert 3 < time.monotonic() - started < 30, "the wait for a gap is bounded"
    late = wire.http.post(f"/models/{wire.model}/forward-backward-passes", json=wire.pass_body(2))
    assert late.status_code == 409
    assert late.json()["error"] == "seq_id_too_late"


def test_11_a_refused_request_leaves_no_gap(wire: Wire):
    wire.done(wire.forward_backward(1))
    body = wire.pass_body(2)
    body["payload"]["forward_backward_input"]["loss_fn"] = "no_such_loss"
    refused = wire.http.post(f"/models/{wire.model}/forward-backward-passes", json=body)
    assert refused.status_code == 400
    assert "cross_entropy" in refused.json()["message"]
    started = time.monotonic()
    wire.done(wire.optim_step(3))
    assert time.monotonic() - started < 3


def test_11_a_body_that_is_still_arriving_is_waited_for(wire: Wire):
    """The step came first because the data are large: it must not run without them."""
    content = httpx.Request("POST", "http://x", json=wire.pass_body(1)).read()
    may_end = threading.Event()

    def slowly() -> Iterator[bytes]:
        yield content[:50]
        assert may_end.wait(60)
        yield content[50:]

    headers = {"Content-Type": "application/json", "Content-Length": str(len(content))}
    path = f"/models/{wire.model}/forward-backward-passes"
    with ThreadPoolExecutor(1) as pool:
        arriving = pool.submit(lambda: wire.http.post(path, content=slowly(), headers=headers))
        time.sleep(0.5)
        step = wire.optim_step(2)
        time.sleep(7)  # longer than a missing number is waited for
        assert wire.http.get(f"/operations/{step['id']}").json()["status"] == "pending"
        may_end.set()
        wire.done(arriving.result().json())
    assert wire.done(step)["metrics"]["grad_norm"] > 0


def test_an_answer_comes_at_once_and_polls_are_held(wire: Wire):
    started = time.monotonic()
    operation = wire.forward_backward(1, num=3000)
    assert time.monotonic() - started < 5
    polls = 0
    while operation["status"] not in ("done", "error"):
        operation = wire.http.get(f"/operations/{operation['id']}").json()
        polls += 1
    assert operation["status"] == "done"
    assert polls <= 3, "a poll is held until there is something to say"
