"""The unmodified SDK trains on a real server: real learner, real database, real files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from serve_parts import BASE, GREEDY, RunningServer, logprobs_of, loss_of, prompt_of, sequences_of, sum_datum, sums
from weaver import ServiceClient, WeaverAPIError
from weaver.operations import WeaverOperationError
from weaver.types import AdamParams, Datum, LoraConfig, ModelInput

pytest_plugins = ("serve_fixtures",)
pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

RATE = AdamParams(learning_rate=2e-3)


def step(training: Any, data: list[Datum], params: AdamParams = RATE) -> float:
    loss = loss_of(training.forward_backward(data, "cross_entropy"))
    training.optim_step(params)
    return loss


def test_supervised_training_lowers_the_loss_and_changes_what_is_sampled(client: ServiceClient):
    training = client.create_model(base_model=BASE, lora_config=LoraConfig(rank=16, seed=0))
    prompt = prompt_of(training.tokenizer.encode("3 + 4 ="))
    before = training.save_weights_and_get_sampling_client(name="before").sample(prompt=prompt, sampling_params=GREEDY)
    losses = [step(training, sums(training.tokenizer, 16, seed)) for seed in range(15)]
    after = training.save_weights_and_get_sampling_client(name="after").sample(prompt=prompt, sampling_params=GREEDY)
    assert losses[-1] < 0.6 * losses[0]
    assert sequences_of(before)[0]["tokens"] != sequences_of(after)[0]["tokens"]
    assert after["weight_version"] == 15
    assert before["weight_version"] == 0


def test_whole_models_train_beside_adapters_on_the_same_base(client: ServiceClient):
    adapter = client.create_model(base_model=BASE, lora_config=LoraConfig(rank=8, seed=1))
    data = sums(adapter.tokenizer, 8)
    untouched = logprobs_of(adapter.forward(data, "forward_logprob"))
    whole = client.create_model(base_model=BASE, training_mode="full_ft")
    losses = [step(whole, data) for _ in range(5)]
    whole.terminate()
    assert losses[-1] < losses[0]
    assert all(map(torch.equal, logprobs_of(adapter.forward(data, "forward_logprob")), untouched))


def test_two_adapters_at_once_equal_each_of_them_alone(client: ServiceClient):
    def make(rank: int, seed: int) -> Any:
        return client.create_model(
            base_model=BASE, lora_config=LoraConfig(rank=rank, seed=seed, train_unembed=seed > 1)
        )

    first, second = make(8, 1), make(4, 2)
    data = {seed: sums(first.tokenizer, 8, seed) for seed in range(4)}
    base = logprobs_of(first.forward(data[0], "forward_logprob"))
    assert all(map(torch.equal, logprobs_of(second.forward(data[0], "forward_logprob")), base)), "adapters begin at 0"
    for seed in range(3):
        step(first, data[seed])
        step(second, data[seed + 1])
    together = [logprobs_of(model.forward(data[0], "forward_logprob")) for model in (first, second)]
    for model, shift, seen in ((make(8, 1), 0, together[0]), (make(4, 2), 1, together[1])):
        for seed in range(3):
            step(model, data[seed + shift])
        alone = logprobs_of(model.forward(data[0], "forward_logprob"))
        assert all(map(torch.equal, alone, seen))
    assert not all(map(torch.equal, together[0], together[1]))


def test_gradients_add_up_until_the_step(client: ServiceClient):
    def train(*batches: list[Datum]) -> list[torch.Tensor]:
        model = client.create_model(base_model=BASE, lora_config=LoraConfig(rank=8, seed=3))
        for batch in batches:
            model.forward_backward(batch, "surrogate")
        model.optim_step(AdamParams(learning_rate=1e-2, grad_clip_norm=0.0))
        return logprobs_of(model.forward(data, "forward_logprob"))

    tokenizer = client.create_model(base_model=BASE).tokenizer
    data = sums(tokenizer, 8)
    for datum in data:
        weights = torch.as_tensor(datum.loss_fn_inputs["weights"])
        datum.loss_fn_inputs["surrogate_weights"] = -weights  # minimised: makes the answers likelier
    together, in_parts = train(data), train(data[:3], data[3:])
    assert max(float((a - b).abs().max()) for a, b in zip(together, in_parts, strict=True)) < 1e-4


def test_every_field_of_adam_counts_in_every_call(client: ServiceClient):
    def after(**changes: float) -> list[torch.Tensor]:
        model = client.create_model(base_model=BASE, lora_config=LoraConfig(rank=8, seed=4))
        for seed in range(2):
            step(model, sums(model.tokenizer, 4, seed), AdamParams(learning_rate=5e-3))
        step(model, sums(model.tokenizer, 4, 2), AdamParams(**({"learning_rate": 5e-3} | changes)))
        return logprobs_of(model.forward(sums(model.tokenizer, 4), "forward_logprob"))

    usual = after()
    for changes in (
        {"learning_rate": 1e-3},
        {"beta1": 0.1},
        {"beta2": 0.5},
        {"eps": 1.0},
        {"weight_decay": 10.0},
        {"grad_clip_norm": 1e-3},
    ):
        assert not all(map(torch.equal, after(**changes), usual)), changes
    assert all(map(torch.equal, after(), usual)), "the same calls give the same model"


def test_state_is_saved_and_loaded_exactly(client: ServiceClient):
    model = client.create_model(base_model=BASE, lora_config=LoraConfig(rank=8, seed=5))
    data = sums(model.tokenizer, 8)
    for _ in range(3):
        step(model, data)
    saved = model.save_state(name="here", checkpoint_type="weight_and_optimizer")
    loss = loss_of(model.forward_backward(data, "cross_entropy"))
    model.optim_step(RATE)
    after = logprobs_of(model.forward(data, "forward_logprob"))
    other = client.create_model(base_model=BASE, lora_config=LoraConfig(rank=8, seed=99))
    for target in (model, other):
        target.load_state_with_optimizer(saved)
        assert loss_of(target.forward_backward(data, "cross_entropy")) == pytest.approx(loss, abs=1e-4)
        target.optim_step(RATE)
        assert all(map(torch.equal, logprobs_of(target.forward(data, "forward_logprob")), after))
    model.load_state(saved)
    step(model, data)
    without_moments = logprobs_of(model.forward(data, "forward_logprob"))
    assert not all(map(torch.equal, without_moments, after))


def test_a_loss_of_the_clients_own(client: ServiceClient):
    model = client.create_model(base_model=BASE, lora_config=LoraConfig(rank=8, seed=6))
    twin = client.create_model(base_model=BASE, lora_config=LoraConfig(rank=8, seed=6))
    data = sums(model.tokenizer, 8)

    def mean_loss(data: list[Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        weights = [torch.as_tensor(datum.loss_fn_inputs["weights"]) for datum in data]
        total = sum(w.sum() for w in weights)
        loss = -sum((lp * w).sum() for lp, w in zip(logprobs, weights, strict=True)) / total
        return loss, {"total": float(total)}

    for _ in range(2):
        custom = model.forward_backward_custom(data, mean_loss)
        model.optim_step(RATE)
        assert float(custom["loss"]) == pytest.approx(step(twin, data), abs=1e-4)
    pairs = zip(
        logprobs_of(model.forward(data, "forward_logprob")),
        logprobs_of(twin.forward(data, "forward_logprob")),
        strict=True,
    )
    assert max(float((a - b).abs().max()) for a, b in pairs) < 1e-3


@pytest.mark.parametrize("loss_fn", ["importance_sampling", "truncated_importance_sampling", "ppo_clip", "cispo"])
def test_losses_on_ratios_push_what_was_better_than_its_group(client: ServiceClient, loss_fn: str):
    model = client.create_model(base_model=BASE, lora_config=LoraConfig(rank=8, seed=7))
    good, bad = sum_datum(model.tokenizer, 2, 3), sum_datum(model.tokenizer, 2, 3, answer=9)
    start = logprobs_of(model.forward([good, bad], "forward_logprob"))
    data = []
    for datum, logprobs, advantage in zip((good, bad), start, (1.0, -1.0), strict=True):
        mask = torch.as_tensor(datum.loss_fn_inputs["weights"])
        inputs = {
            "target_tokens": datum.loss_fn_inputs["target_tokens"],
            "logprobs": logprobs * mask,
            "advantages": advantage * mask,
            "loss_mask": mask,
        }
        data.append(Datum(model_input=datum.model_input, loss_fn_inputs=inputs))
    config = {"entropy_coeff": 1e-4, "enable_debug_dump": False}  # what the RL companion sends with every loss
    answer = model.forward_backward(data, loss_fn, loss_fn_config=config)
    assert answer["result"]["metrics"]["ratio_mean"] == pytest.approx(1.0, abs=1e-3)
    model.optim_step(RATE)
    end = logprobs_of(model.forward([good, bad], "forward_logprob"))
    mask = torch.as_tensor(good.loss_fn_inputs["weights"]).bool()
    differs = torch.as_tensor(good.loss_fn_inputs["target_tokens"]) != torch.as_tensor(
        bad.loss_fn_inputs["target_tokens"]
    )
    moved = [float((after - before)[mask & differs].sum()) for before, after in zip(start, end, strict=True)]
    assert moved[0] > 0 > moved[1]


def test_bad_data_is_refused_by_name_and_adds_no_gradient(server: RunningServer, client: ServiceClient):
    model = client.create_model(base_model=BASE, lora_config=LoraConfig(rank=8, seed=8))
    data = sums(model.tokenizer, 2)
    before = logprobs_of(model.forward(data, "forward_logprob"))

    def changed(**inputs: Any) -> list[Datum]:
        kept = {name: value for name, value in (data[1].loss_fn_inputs | inputs).items() if value is not None}
        return [data[0], Datum(model_input=data[1].model_input, loss_fn_inputs=kept)]

    num = len(data[1].model_input.to_ints())
    for bad, words in (
        (changed(weights=None), "weights"),
        (changed(weights=torch.ones(num + 1)), "weights"),
        (changed(target_tokens=torch.ones(num)), "target_tokens"),
        (changed(importance_weights=torch.ones(num), logprobs=torch.ones(num)), ""),
    ):
        loss_fn = "cross_entropy" if words else "importance_sampling"
        with pytest.raises(WeaverAPIError) as refused:
            model.forward_backward(bad, loss_fn)
        assert refused.value.status_code == 400
        assert words in refused.value.message
    with server.client(tensor_transport="http-binary") as packed:  # httpx refuses NaN in JSON itself
        twin = packed.create_model(base_model=BASE, lora_config=LoraConfig(rank=8, seed=8))
        with pytest.raises(WeaverAPIError, match=r"datum .*weights.*finite"):
            twin.forward_backward(changed(weights=torch.full((num,), math.nan)), "cross_entropy")
    too_high = Datum(
        model_input=ModelInput.from_ints([10**6]),
        loss_fn_inputs={"target_tokens": torch.tensor([1]), "weights": torch.tensor([1.0])},
    )
    with pytest.raises(WeaverOperationError, match="vocabulary"):
        model.forward_backward([too_high], "cross_entropy")
    with pytest.raises(WeaverOperationError, match="gradients"):
        model.optim_step(RATE)
    step(model, data)
    assert not all(map(torch.equal, logprobs_of(model.forward(data, "forward_logprob")), before))


@pytest.mark.parametrize("compression", ["raw", "zstd"])
def test_tensor_packs_train_the_same_as_json(server: RunningServer, compression: Any):
    results = []
    for options in ({}, {"tensor_transport": "http-binary", "tensor_compression": compression}):
        with server.client(**options) as service:
            model = service.create_model(base_model=BASE, lora_config=LoraConfig(rank=8, seed=9))
            data = sums(model.tokenizer, 8)
            step(model, data)
            results.append(logprobs_of(model.forward(data, "forward_logprob")))
    assert all(map(torch.equal, *results))


def test_exports_load_in_plain_peft_and_transformers(client: ServiceClient, tmp_path: Path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def by_hand(model: Any, datum: Datum) -> torch.Tensor:
        ids = torch.tensor([datum.model_input.to_ints()])
        with torch.no_grad():
            logprobs = model(ids).logits.float().log_softmax(-1)[0]
        targets = torch.as_tensor(datum.loss_fn_inputs["target_tokens"])
        return logprobs.gather(1, targets[:, None])[:, 0]

    model = client.create_model(base_model=BASE, lora_config=LoraConfig(rank=8, seed=10))
    data = sums(model.tokenizer, 2)
    for _ in range(3):
        step(model, data)
    expected = logprobs_of(model.forward(data, "forward_logprob"))
    adapter = client.download_weights(model.export_weights(), tmp_path / "adapter")
    merged = client.download_weights(model.export_weights(merge_adapter=True), tmp_path / "merged")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == BASE
    base = AutoModelForCausalLM.from_pretrained(model.tokenizer_path, dtype=torch.float32)
    with_adapter = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).train(False)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).train(False)
    assert adapter is not None
    assert merged is not None
    for loaded in (with_adapter, whole):
        for datum, seen in zip(data, expected, strict=True):
            assert float((by_hand(loaded, datum) - seen).abs().max()) < 1e-4


def test_models_of_another_key_are_not_there(server: RunningServer, client: ServiceClient):
    model = client.create_model(base_model=BASE)
    path = model.save_state(name="mine").path
    with server.client("ben") as ben:
        with pytest.raises(WeaverAPIError) as hidden:
            ben.get_model(model.model_id)
        assert hidden.value.status_code == 404
        with pytest.raises(WeaverAPIError) as hidden:
            ben.create_sampling_client(model_path=path, base_model=BASE)
        assert hidden.value.status_code == 404


def test_checkpoints_outlive_the_model_that_the_sdk_terminates(server: RunningServer):
    with server.client() as service:
        model = service.create_model(base_model=BASE, lora_config=LoraConfig(rank=8, seed=11))
        data = sums(model.tokenizer, 4)
        step(model, data)
        path = model.save_state(name="kept", checkpoint_type="weight_and_optimizer").path
        expected = logprobs_of(model.forward(data, "forward_logprob"))
    with server.client() as service:
        assert service.get_model(model.model_id)["status"] == "terminated"
        other = service.create_model(base_model=BASE, lora_config=LoraConfig(rank=8, seed=12))
        other.load_state_with_optimizer(path)
        assert all(map(torch.equal, logprobs_of(other.forward(data, "forward_logprob")), expected))
