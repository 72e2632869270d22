"""Sampling over HTTP: what the service is asked and what the SDK reads."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from http_client import API, Client, prompt, refusal, with_client
from http_fake_results import sample_result

from weaver_rl.rollout import SamplingConfig
from weaver_rl.service.calls import SampleCall
from weaver_rl.service.config import LimitsConfig
from weaver_rl.service.http.render import render_result

pytestmark = pytest.mark.unit


def test_sampling_sessions():
    async def check(c: Client) -> None:
        path = (await c.post(f"/models/{c.model}/export-sampler", {"seq_id": 1, "path": "a"}))["response"]["model_path"]
        body = {"sampling_session_seq_id": 1, "base_model": "tiny:64", "model_path": path, "model_id": c.model}
        created = await c.post(f"/sessions/{c.session}/sampling-sessions", body)
        assert (created["base_model"], created["tokenizer_path"]) == ("tiny", "/models/tiny")
        assert created == await c.get(f"/sampling-sessions/{created['id']}")
        assert "sync_operation" not in created
        assert (await c.http.delete(f"{API}/sampling-sessions/{created['id']}")).status_code == 204
        refusal(await c.http.get(f"{API}/sampling-sessions/{created['id']}"), 404, "not_found")
        neither = {"sampling_session_seq_id": 2, "base_model": None, "model_path": None}
        refusal(
            await c.http.post(f"{API}/sessions/{c.session}/sampling-sessions", json=neither), 400, "invalid_request"
        )

    with_client(check)


def test_samples():
    async def check(c: Client) -> None:
        session = await c.sampling_session()
        body = {
            "prompt": {"chunks": [prompt(1, 2)["chunks"][0], prompt(3)["chunks"][0]]},
            "sampling_params": {
                "temperature": 0.5, "top_p": 0.9, "top_k": -1, "max_tokens": 7,
                "stop": ["\n"], "stop_token_ids": [2], "seed": 11,
            },
            "num_samples": 2,
            "prompt_logprobs": True,
            "topk_prompt_logprobs": 2,
            "return_old_logprob": True,
        }  # fmt: skip
        result = (await c.post(f"/sampling-sessions/{session}/samples", body))["response"]["result"]
        ((_, call),) = c.service.calls
        assert (call.token_ids, call.num_samples, call.seed) == ((1, 2, 3), 2, 11)
        assert (call.sampling.temperature, call.sampling.top_p, call.sampling.top_k) == (0.5, 0.9, 0)
        assert (call.max_tokens, call.stop, call.stop_token_ids) == (7, ("\n",), (2,))
        assert result["sequences"] == [
            {
                "tokens": [index, 11],
                "logprobs": [-0.5, -0.25],
                "old_logprobs": [-0.5, -0.25],
                "text": f"text {index}",
                "stop_reason": "stop",
                "weight_version": 4,
            }
            for index in range(2)
        ]
        assert result["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
        assert result["weight_version"] == 4
        assert result["prompt_logprobs"] == [None, -0.25, -0.5]
        assert result["topk_prompt_logprobs"] == [None, [[0, -0.25], [1, -1.25]], [[0, -0.25], [1, -1.25]]]

    with_client(check)


def test_samples_without_anything_special():
    async def check(c: Client) -> None:
        session = await c.sampling_session()
        body = {"prompt": prompt(1), "sampling_params": {"temperature": 1.0, "top_p": 1.0, "top_k": 0}}
        result = (await c.post(f"/sampling-sessions/{session}/samples", body))["response"]["result"]
        assert sorted(result) == ["sequences", "usage", "weight_version"]
        assert sorted(result["sequences"][0]) == ["logprobs", "stop_reason", "text", "tokens", "weight_version"]
        ((_, call),) = c.service.calls
        assert (call.max_tokens, call.seed, call.sampling.top_k, call.num_samples) == (None, None, 0, 1)
        await c.post(f"/sampling-sessions/{session}/samples", {"prompt": prompt(1), "sampling_params": {"top_k": 5}})
        assert c.service.calls[-1][1].sampling.top_k == 5

    with_client(check)


def test_a_sample_that_was_aborted_before_its_prompt_was_read_has_null_for_the_prompts_logprobs():
    call = SampleCall(
        token_ids=(1, 2),
        num_samples=1,
        sampling=SamplingConfig(),
        wants_prompt_logprobs=True,
        num_top_prompt_logprobs=2,
    )
    whole = sample_result(call)
    aborted = replace(whole, group=replace(whole.group, prompt_logprobs=None))
    rendered = render_result(aborted)
    assert isinstance(rendered, bytes)
    result = json.loads(rendered)["result"]
    assert (result["prompt_logprobs"], result["topk_prompt_logprobs"]) == (None, None)


@pytest.mark.parametrize(
    ("seeds", "used"),
    [({"seed": 0}, 0), ({"sampling_seed": 3}, 3), ({"seed": 3, "sampling_seed": 3}, 3), ({"seed": None}, None)],
)
def test_either_seed_counts(seeds: dict[str, Any], used: int | None):
    async def check(c: Client) -> None:
        session = await c.sampling_session()
        await c.post(f"/sampling-sessions/{session}/samples", {"prompt": prompt(1), "sampling_params": seeds})
        assert c.service.calls[-1][1].seed == used

    with_client(check)


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"sampling_params": {"seed": 1, "sampling_seed": 2}}, "invalid_request", "they mean the same"),
        ({"sampling_params": {"temperature": -1}}, "invalid_request", "sampling_params.temperature: "),
        ({"sampling_params": {"temperature": 2.5}}, "invalid_request", "sampling_params.temperature: "),
        ({"sampling_params": {"top_p": 0}}, "invalid_request", "sampling_params.top_p: "),
        ({"sampling_params": {"top_k": -2}}, "invalid_request", "sampling_params.top_k: "),
        ({"sampling_params": {"max_tokens": 0}}, "invalid_request", "sampling_params.max_tokens: "),
        ({"sampling_params": {"stop": [5]}}, "invalid_request", "sampling_params.stop[0]: "),
        ({"sampling_params": {"stop": [""]}}, "invalid_request", "sampling_params.stop[0]: "),
        ({"sampling_params": {"seed": -1}}, "invalid_request", "sampling_params.seed: "),
        ({"sampling_params": {"seed": 2**63}}, "invalid_request", "sampling_params.seed: "),
        ({"num_samples": 0}, "invalid_request", "num_samples: "),
        ({"num_samples": 17}, "invalid_request", "num_samples: 17, allowed are 1 to 16"),
        ({"topk_prompt_logprobs": 21}, "invalid_request", "topk_prompt_logprobs: "),
        ({"prompt": {"chunks": []}}, "invalid_request", "prompt.chunks: "),
        ({"prompt": {"chunks": [{"type": "image", "tokens": [1]}]}}, "invalid_request", "prompt.chunks[0].type: "),
        ({"prompt": prompt(-1)}, "invalid_request", "prompt.chunks[0].tokens[0]: "),
        ({"prompt": "text"}, "invalid_request", "prompt: "),
        ({"return_sampling_mask": True}, "unsupported", "return_sampling_mask: "),
        ({"return_moe_topk_indices": True}, "unsupported", "return_moe_topk_indices: "),
        ({"score_centering": {"head_size": 2, "transport": "inline"}}, "unsupported", "score_centering: "),
    ],
)
def test_what_cannot_be_sampled(changes: dict[str, Any], code: str, message: str):
    async def check(c: Client) -> None:
        session = await c.sampling_session()
        response = await c.http.post(f"{API}/sampling-sessions/{session}/samples", json={"prompt": prompt(1)} | changes)
        assert message in refusal(response, 400, code)["message"]
        assert c.service.calls == []

    with_client(check, limits=LimitsConfig(num_samples=16))


def test_logprobs():
    async def check(c: Client) -> None:
        session = await c.sampling_session()
        path = f"/sampling-sessions/{session}/logprobs"
        answer = await c.post(path, {"prompt": prompt(1, 2, 3)})
        assert answer["response"]["result"] == {"prompt_logprobs": [None, -0.25, -0.5], "weight_version": 4}
        await c.post(path, {"prompt": prompt(1, 2), "loss_fn_config": {"temperature": 0.5, "future": 1}})
        assert c.service.calls == [("logprobs", ((1, 2, 3), 1.0)), ("logprobs", ((1, 2), 0.5))]
        for bad, code in (
            ({"return_rollout_token_expert": True}, "unsupported"),
            ({"loss_fn_config": {"temperature": 0}}, "invalid_request"),
            ({"loss_fn_config": {"temperature": 0.009}}, "invalid_request"),
            ({"loss_fn_config": {"temperature": 2.1}}, "invalid_request"),
        ):
            response = await c.http.post(API + path, json={"prompt": prompt(1)} | bad)
            named = next(iter(bad)) + (".temperature: " if code == "invalid_request" else ": ")
            assert named in refusal(response, 400, code)["message"]
        for temperature in (0.01, 2):
            await c.post(path, {"prompt": prompt(1), "loss_fn_config": {"temperature": temperature}})

    with_client(check)


def test_pause_and_continue():
    async def check(c: Client) -> None:
        session = await c.sampling_session()
        for mode in ("abort", "retract", "in_place"):
            answer = await c.post(f"/sampling-sessions/{session}/pause-generation", {"mode": mode})
            assert answer == {"ok": True, "status": "paused", "mode": mode}
        assert await c.post(f"/sampling-sessions/{session}/continue-generation") == {"ok": True, "status": "running"}
        assert [call[0] for call in c.service.calls] == ["pause"] * 3 + ["continue"]
        response = await c.http.post(f"{API}/sampling-sessions/{session}/pause-generation", json={"mode": "stop"})
        assert "mode: " in refusal(response, 400, "invalid_request")["message"]

    with_client(check)
