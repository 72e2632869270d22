"""The unmodified SDK samples from a real server: real engines, sessions whose weights never change, pauses."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch
from serve_parts import BASE, KEYS, RunningServer, logprobs_of, prompt_of, sequences_of, sums, until
from weaver import AsyncServiceClient, ServiceClient, WeaverAPIError
from weaver.types import AdamParams, Datum, LogprobsParams, LoraConfig, ModelInput, SamplingParams

pytest_plugins = ("serve_fixtures",)
pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

RATE = AdamParams(learning_rate=5e-3)
TOLERANCE = 1e-3
"""Nats between engine and learner in float32."""


def trained(client: ServiceClient, seed: int = 0, steps: int = 3, **options: Any) -> Any:
    if "training_mode" not in options:
        options["lora_config"] = LoraConfig(rank=8, seed=seed)
    model = client.create_model(base_model=BASE, **options)
    train(model, steps)
    return model


def train(model: Any, steps: int) -> None:
    for seed in range(steps):
        model.forward_backward(sums(model.tokenizer, 8, seed), "cross_entropy")
        model.optim_step(RATE)


def learner_logprobs(model: Any, prompt: list[int], completion: list[int], temperature: float = 1.0) -> torch.Tensor:
    tokens = prompt + completion
    datum = Datum(
        model_input=ModelInput.from_ints(tokens[:-1]), loss_fn_inputs={"target_tokens": torch.tensor(tokens[1:])}
    )
    answer = model.forward([datum], "forward_logprob", loss_fn_config={"temperature": temperature})
    return logprobs_of(answer)[0]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probabilities_are_those_of_the_trained_adapter(client: ServiceClient, temperature: float):
    model = trained(client)
    prompt = model.tokenizer.encode("12 + 7 =")
    sampling = model.save_weights_and_get_sampling_client()
    answer = sampling.sample(
        prompt=prompt_of(prompt),
        sampling_params=SamplingParams(temperature=temperature, max_tokens=12, seed=3),
        num_samples=4,
        include_prompt_logprobs=True,
        topk_prompt_logprobs=3,
    )
    assert len({tuple(sequence["tokens"]) for sequence in sequences_of(answer)}) > 1
    for sequence in sequences_of(answer):
        whole = learner_logprobs(model, prompt, sequence["tokens"], temperature)
        mine = torch.tensor(sequence["logprobs"])
        assert float((whole[len(prompt) - 1 :] - mine).abs().max()) < TOLERANCE
    at_one = learner_logprobs(model, prompt, sequences_of(answer)[0]["tokens"])
    first, *rest = answer["raw_result"]["prompt_logprobs"]
    assert first is None
    assert float((torch.tensor(rest) - at_one[: len(prompt) - 1]).abs().max()) < TOLERANCE
    top = answer["raw_result"]["topk_prompt_logprobs"]
    assert top[0] is None
    assert all(len(entry) == 3 for entry in top[1:])
    assert all(entry[0][1] >= entry[1][1] >= entry[2][1] for entry in top[1:])


def test_compute_logprobs_takes_a_temperature(client: ServiceClient):
    model = trained(client, seed=1)
    tokens = model.tokenizer.encode("4 + 4 = 8 and 5 + 5 =")
    sampling = model.save_weights_and_get_sampling_client()
    for temperature in (1.0, 2.0):
        first, *values = sampling.compute_logprobs(
            prompt=prompt_of(tokens), logprobs_params=LogprobsParams(loss_fn_config={"temperature": temperature})
        )
        assert first is None
        expected = learner_logprobs(model, tokens[:1], tokens[1:], temperature)
        assert float((torch.tensor(values) - expected).abs().max()) < TOLERANCE


def test_the_same_seed_draws_the_same_tokens(client: ServiceClient):
    sampling = client.create_sampling_client(base_model=BASE)
    prompt = prompt_of([5, 6, 7])

    def draw(seed: int | None) -> list[list[int]]:
        params = SamplingParams(max_tokens=16, seed=seed)
        return [
            s["tokens"] for s in sequences_of(sampling.sample(prompt=prompt, sampling_params=params, num_samples=3))
        ]

    with ThreadPoolExecutor(8) as pool:  # whatever else is in the batch
        drawn = list(pool.map(draw, [11, 11, 12, None, None, 11, 13, 11]))
    assert drawn[0] == drawn[1] == drawn[5] == drawn[7]
    assert len({str(tokens) for tokens in drawn}) == 5


def test_stop_strings_and_stop_tokens_end_a_completion_and_stay_in_its_tokens(client: ServiceClient):
    model = trained(client, seed=2, steps=12)
    sampling = model.save_weights_and_get_sampling_client()
    prompt = model.tokenizer.encode("3 + 4 =")
    free = sequences_of(
        sampling.sample(prompt=prompt_of(prompt), sampling_params=SamplingParams(temperature=0.0, max_tokens=10))
    )[0]
    assert len(free["tokens"]) > 1
    stop_token = free["tokens"][1]
    params = SamplingParams(temperature=0.0, max_tokens=10, stop=[stop_token])
    by_token = sequences_of(sampling.sample(prompt=prompt_of(prompt), sampling_params=params))[0]
    end = free["tokens"].index(stop_token) + 1
    assert by_token["tokens"] == free["tokens"][:end]
    assert by_token["stop_reason"] == "stop"
    assert len(by_token["logprobs"]) == len(by_token["tokens"])
    word = free["text"].strip()[:1]
    params = SamplingParams(temperature=0.0, max_tokens=10, stop=[word])
    by_text = sequences_of(sampling.sample(prompt=prompt_of(prompt), sampling_params=params))[0]
    assert word not in by_text["text"]
    assert word in model.tokenizer.decode(by_text["tokens"])
    assert by_text["stop_reason"] == "stop"


def test_a_session_answers_the_same_whatever_is_exported_later(client: ServiceClient):
    model = trained(client, seed=3)
    prompt = prompt_of(model.tokenizer.encode("1 + 1 ="))
    params = SamplingParams(temperature=1.0, max_tokens=12, seed=1)

    def answer(sampling: Any) -> tuple[Any, ...]:
        result = sampling.sample(prompt=prompt, sampling_params=params, num_samples=2)
        return tuple((tuple(s["tokens"]), tuple(s["logprobs"])) for s in sequences_of(result)), result["weight_version"]

    old = model.save_weights_and_get_sampling_client(name="policy")
    before = answer(old)
    for _ in range(3):
        train(model, 2)
        new = model.save_weights_and_get_sampling_client(name="policy")
    assert answer(old) == before
    assert answer(new)[0] != before[0]
    assert (before[1], answer(new)[1]) == (3, 9)


def test_a_session_ends_with_the_time_to_live_of_its_export(client: ServiceClient):
    model = trained(client, seed=4, steps=1)
    sampling = model.save_weights_and_get_sampling_client(name="brief", ttl_seconds=2)
    prompt = prompt_of([5, 6])
    sampling.sample(prompt=prompt, sampling_params=SamplingParams(max_tokens=1))

    statuses: list[int] = []

    def has_ended() -> bool:
        try:
            sampling.sample(prompt=prompt, sampling_params=SamplingParams(max_tokens=1))
        except WeaverAPIError as error:
            statuses.append(error.status_code)
        return bool(statuses)

    until(has_ended, 20, "the session ends")
    assert statuses[0] in (404, 410)
    assert "brief" not in [checkpoint.name for checkpoint in model.list_checkpoints()]


def test_three_adapters_and_the_base_in_one_batch(client: ServiceClient):
    models = [trained(client, seed=seed, steps=2 + seed) for seed in range(5, 8)]
    samplers = [model.save_weights_and_get_sampling_client() for model in models]
    samplers.append(client.create_sampling_client(base_model=BASE))
    prompt = prompt_of(models[0].tokenizer.encode("8 + 1 ="))
    params = SamplingParams(max_tokens=24, seed=5)

    def draw(index: int) -> list[int]:
        return sequences_of(samplers[index].sample(prompt=prompt, sampling_params=params))[0]["tokens"]

    alone = [draw(index) for index in range(4)]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(draw, [0, 1, 2, 3] * 8))
    assert together == alone * 8
    assert len({tuple(tokens) for tokens in alone}) == 4


def test_hundreds_of_callers_at_once_are_all_answered(server: RunningServer):
    async def main() -> list[int]:
        async with AsyncServiceClient(base_url=server.url, api_key=KEYS["ben"]) as service:
            sampling = await service.create_sampling_client(base_model=BASE)
            params = [SamplingParams(max_tokens=8, seed=seed) for seed in range(300)]
            answers = await asyncio.gather(
                *(sampling.sample(prompt=prompt_of([5, 6, 7, 8]), sampling_params=each) for each in params)
            )
            return [len(sequences_of(answer)) for answer in answers]

    assert asyncio.run(main()) == [1] * 300


def long_completions(sampling: Any, prompt: list[int]) -> Iterator[tuple[SamplingParams, list[int]]]:
    """Parameters whose completion lasts long enough for a pause to come in between, and its tokens."""
    for seed in range(50):
        params = SamplingParams(temperature=1.0, max_tokens=220, seed=seed)
        tokens = sequences_of(sampling.sample(prompt=prompt_of(prompt), sampling_params=params))[0]["tokens"]
        if len(tokens) == 220:
            yield params, tokens


def test_whole_models_have_an_engine_that_can_be_paused(client: ServiceClient):
    model = trained(client, steps=0, training_mode="full_ft")  # which seldom ends a completion early
    try:
        old = model.save_weights_and_get_sampling_client(name="first")
        prompt = model.tokenizer.encode("6 + 2 =")
        params, undisturbed = next(long_completions(old, prompt))

        running = [old.sample(prompt=prompt_of(prompt), sampling_params=params, wait=False) for _ in range(4)]
        with old.paused(mode="abort"):
            aborted = [handle.result()["result"]["sequences"][0] for handle in running]
            train(model, 2)
            path = model.save_weights_for_sampler(name="second")
            new = client.create_sampling_client(model_path=path, model_id=model.model_id, base_model=BASE)
        for sequence in aborted:
            assert sequence["stop_reason"] in ("abort", "stop")
            assert sequence["tokens"] == undisturbed[: len(sequence["tokens"])]
        assert any(sequence["stop_reason"] == "abort" for sequence in aborted)

        for mode in ("in_place", "retract"):
            handle = old.sample(prompt=prompt_of(prompt), sampling_params=params, wait=False)
            old.pause_generation(mode=mode)
            handle.refresh()
            assert not handle.done()
            old.continue_generation()
            assert handle.result()["result"]["sequences"][0]["tokens"] == undisturbed

        answer = sequences_of(new.sample(prompt=prompt_of(prompt), sampling_params=params))[0]
        expected = learner_logprobs(model, prompt, answer["tokens"])[len(prompt) - 1 :]
        assert float((torch.tensor(answer["logprobs"]) - expected).abs().max()) < TOLERANCE
        again = sequences_of(old.sample(prompt=prompt_of(prompt), sampling_params=params))[0]
        assert again["tokens"] == undisturbed, "the old session keeps the old weights"
    finally:
        model.terminate()


def waits(server: RunningServer) -> list[str]:
    """What the server waits for just now."""
    return list(httpx.get(f"{server.url}/health").json()["waits"])


def test_more_samples_than_an_engine_takes_at_a_time_wait_for_its_pause_to_end(
    server: RunningServer, client: ServiceClient
):
    """Paused before there is an engine; and what waits outside it ends with an abort as what is inside does."""
    model = trained(client, seed=10, steps=1, training_mode="full_ft")
    try:
        sampling = model.save_weights_and_get_sampling_client()
        sampling.pause_generation(mode="in_place")

        def submit(seed: int) -> Any:
            params = SamplingParams(max_tokens=2, seed=seed)
            return sampling.sample(prompt=prompt_of([5, 6]), sampling_params=params, wait=False)

        def reasons(handle: Any) -> set[str]:
            return {sequence["stop_reason"] for sequence in handle.result()["result"]["sequences"]}

        with ThreadPoolExecutor(16) as pool:
            handles = list(pool.map(submit, range(1100)))
            until(lambda: f"engine of {model.model_id}: sampling" in waits(server), 120, "the engine is given some")
            handles[0].refresh()
            assert not handles[0].done()
            sampling.continue_generation()
            assert set().union(*pool.map(reasons, handles)) <= {"stop", "length"}
            sampling.pause_generation(mode="retract")
            handles = list(pool.map(submit, range(1100)))
            sampling.pause_generation(mode="abort")
            assert set().union(*pool.map(reasons, handles)) == {"abort"}
            sampling.continue_generation()
            assert reasons(submit(1)) <= {"stop", "length"}
    finally:
        model.terminate()


def test_generation_control_is_refused_for_adapters(server: RunningServer, client: ServiceClient):
    sampling = trained(client, seed=9, steps=1).save_weights_and_get_sampling_client()
    with pytest.raises(ValueError, match="full fine-tuning"):
        sampling.pause_generation()
    with pytest.raises(WeaverAPIError, match="full_ft"):
        client.http.post(
            f"/api/v1/sampling-sessions/{sampling.sampling_session_id}/pause-generation", json={"mode": "abort"}
        )


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ([10**6], {}, "vocabulary"),
        ([5] * 300, {}, "at most"),
        ([5], {"temperature": -1.0}, "temperature"),
        ([5], {"top_p": 0.0}, "top_p"),
        ([5], {"max_tokens": 0}, "max_tokens"),
    ],
)
def test_requests_that_no_engine_takes_are_refused(
    client: ServiceClient, prompt: list[int], params: dict[str, Any], words: str
):
    sampling = client.create_sampling_client(base_model=BASE)
    with pytest.raises(WeaverAPIError, match=words) as refused:
        sampling.sample(prompt=prompt_of(prompt), sampling_params=SamplingParams(**params))
    assert refused.value.status_code == 400
    sampling.sample(prompt=prompt_of([5]), sampling_params=SamplingParams(max_tokens=1))
