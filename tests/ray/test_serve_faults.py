"""What a server survives: kill -9 of itself, of its learner and of its engine; and that it leaves nothing behind."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from ray_nodes import free_port
from serve_parts import (
    BASE,
    COMMAND,
    CONFIG,
    GREEDY,
    REPOSITORY,
    RunningServer,
    logprobs_of,
    loss_of,
    prompt_of,
    sequences_of,
    sums,
    until,
)
from weaver import WeaverAPIError
from weaver.operations import OperationHandle, WeaverOperationError
from weaver.types import AdamParams, LoraConfig, SamplingParams

pytest_plugins = ("serve_fixtures",)
pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

RATE = AdamParams(learning_rate=2e-3)
GONE_WITHIN_S = 30.0


@pytest.fixture
def own(tmp_path: Path, nothing_left_behind: None) -> Iterator[RunningServer]:
    server = RunningServer(tmp_path / "state")
    yield server
    server.stop()


def test_a_killed_server_is_started_again_and_lies_to_nobody(tmp_path: Path, nothing_left_behind: None):
    state = tmp_path / "state"
    port = f"http.port={free_port()}"
    server = RunningServer(state, port)
    try:
        service = server.client()
        service.connect()
        model = service.create_model(base_model=BASE, lora_config=LoraConfig(rank=8, seed=1))
        data = sums(model.tokenizer, 8)
        loss_of(model.forward_backward(data, "cross_entropy"))
        model.optim_step(RATE)
        saved = model.save_state(name="here", checkpoint_type="weight_and_optimizer")
        done = model.forward(data, "forward_logprob", wait=False)
        expected = logprobs_of(done.result())
        sampling = model.save_weights_and_get_sampling_client(name="policy", ttl_seconds=None)
        prompt = prompt_of(model.tokenizer.encode("2 + 2 ="))
        text = sequences_of(sampling.sample(prompt=prompt, sampling_params=GREEDY))[0]["tokens"]
        loss_of(model.forward_backward(data, "cross_entropy"))
        model.optim_step(RATE)
        after = logprobs_of(model.forward(data, "forward_logprob"))

        children = psutil.Process(server.process.pid).children(recursive=True)
        big = sums(model.tokenizer, 2000)
        cut = model.forward(big, "forward_logprob", wait=False)
        assert not cut.done()
        server.kill()
        _, alive = psutil.wait_procs(children, timeout=GONE_WITHIN_S)
        assert not alive, [process.cmdline() for process in alive if process.is_running()]

        server = RunningServer(state, port)
        # The very same client objects go on: results, sessions and checkpoints are there.
        assert all(
            map(
                torch.equal,
                logprobs_of(OperationHandle.from_payload(service.http, {"id": done.operation_id}).result()),
                expected,
            )
        )
        with pytest.raises(WeaverOperationError, match="restarted") as told:
            cut.result()
        assert told.value.code == "server_restarted"
        assert sequences_of(sampling.sample(prompt=prompt, sampling_params=GREEDY))[0]["tokens"] == text
        with pytest.raises(WeaverOperationError, match=saved.path) as lost:
            model.forward(data, "forward_logprob")
        assert lost.value.code == "model_state_lost"
        assert not lost.value.retryable
        model.load_state_with_optimizer(saved)
        assert all(map(torch.equal, logprobs_of(model.forward(data, "forward_logprob")), expected))
        model.forward_backward(data, "cross_entropy")
        model.optim_step(RATE)
        assert all(map(torch.equal, logprobs_of(model.forward(data, "forward_logprob")), after)), "the step equals it"
        service.close()
    finally:
        server.stop()


def test_a_learner_and_an_engine_that_are_killed_are_replaced(own: RunningServer):
    with own.client() as service:
        model = service.create_model(base_model=BASE, lora_config=LoraConfig(rank=8, seed=2))
        fresh = service.create_model(base_model=BASE, lora_config=LoraConfig(rank=8, seed=3))
        data = sums(model.tokenizer, 8)
        model.forward_backward(data, "cross_entropy")
        model.optim_step(RATE)
        saved = model.save_state(name="here", checkpoint_type="weight_and_optimizer")
        trained = logprobs_of(model.forward(data, "forward_logprob"))
        untrained = logprobs_of(fresh.forward(data, "forward_logprob"))
        sampling = model.save_weights_and_get_sampling_client()
        prompt = prompt_of(model.tokenizer.encode("5 + 1 ="))
        tokens = sequences_of(sampling.sample(prompt=prompt, sampling_params=GREEDY))[0]["tokens"]

        own.actor("LearnerRank").kill()
        with pytest.raises(WeaverOperationError, match="died") as lost:
            model.forward(data, "forward_logprob")
        assert lost.value.code == "learner_lost"
        assert not lost.value.retryable
        with pytest.raises(WeaverOperationError, match="Load a checkpoint"):
            model.forward_backward(data, "cross_entropy")
        assert all(map(torch.equal, logprobs_of(fresh.forward(data, "forward_logprob")), untrained))
        model.load_state_with_optimizer(saved)
        assert all(map(torch.equal, logprobs_of(model.forward(data, "forward_logprob")), trained))

        def draw(_: int) -> list[int] | WeaverOperationError:
            params = SamplingParams(max_tokens=200, temperature=1.0)
            try:
                return list(sequences_of(sampling.sample(prompt=prompt, sampling_params=params))[0]["tokens"])
            except WeaverOperationError as error:
                return error

        with ThreadPoolExecutor(8) as pool:
            drawing = [pool.submit(draw, index) for index in range(64)]
            until(lambda: any(future.done() for future in drawing), 60, "the first answer")
            own.actor("Sampler").kill()
            results = [future.result() for future in drawing]
        failed = [result for result in results if isinstance(result, WeaverOperationError)]
        assert failed, "the engine was killed too late to be noticed"
        assert all(error.retryable and error.code == "backend_lost" for error in failed)
        assert sequences_of(sampling.sample(prompt=prompt, sampling_params=GREEDY))[0]["tokens"] == tokens


def test_without_a_key_nothing_is_told(server: RunningServer):
    assert httpx.get(f"{server.url}/health").status_code == 200
    for headers in ({}, {"X-WEAVER-API-KEY": "sk-wrong"}):
        refused = httpx.get(f"{server.url}/api/v1/models", headers=headers)
        assert refused.status_code == 401
        assert set(refused.json()) >= {"error", "message", "retryable"}
    with server.client() as service, pytest.raises(WeaverAPIError) as missing:
        service.get_model("00000000-0000-0000-0000-000000000000")
    assert missing.value.status_code == 404


def test_a_second_server_on_the_same_state_is_refused(server: RunningServer):
    done = subprocess.run(
        [COMMAND, "serve", str(CONFIG), f"state_dir={server.state_dir}", "http.port=0"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "in use" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_keys_only_this_machine_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WEAVER_RL_API_KEYS", raising=False)
    done = subprocess.run(
        [COMMAND, "serve", str(CONFIG), f"state_dir={tmp_path / 'state'}", "http.host=0.0.0.0"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "no API key is configured" in " ".join(done.stderr.split())
