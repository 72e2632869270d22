"""One rank of the learner: losses, splits, updates, state and weights, against plain transformers and torch."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from learner_fixtures import VOCAB, cpu_config, gradients, make_data, make_llama, weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from weaver_rl.errors import BatchError, CheckpointError, ConfigError
from weaver_rl.learner.export import save_hf_directory
from weaver_rl.learner.learner import Learner
from weaver_rl.learner.microbatches import sum_weights
from weaver_rl.losses import cross_entropy_loss, importance_sampling_loss
from weaver_rl.losses.config import CrossEntropy, ImportanceSampling
from weaver_rl.types import AdamParams, Datum

pytestmark = pytest.mark.unit
LOSS = ImportanceSampling(name="importance_sampling", clip_ratio=1.0)
CROSS_ENTROPY = CrossEntropy(name="cross_entropy")


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def model_dir(request, tmp_path_factory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model"), tied=request.param)


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Path:
    return make_llama(tmp_path_factory.mktemp("untied"))


def reference_logits(model, data: list[Datum]) -> torch.Tensor:
    """Every datum alone through plain transformers, without padding."""
    return torch.cat([model(torch.from_numpy(datum.token_ids_N)[None]).logits[0] for datum in data])


def inputs_of(data: list[Datum], name: str) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([datum.loss_fn_inputs[name] for datum in data]))


def replaced(datum: Datum, **inputs) -> Datum:
    return dataclasses.replace(datum, loss_fn_inputs=dict(datum.loss_fn_inputs) | inputs)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_loss_and_gradient_equal_plain_transformers(model_dir, checkpointing, temperature):
    data = make_data()
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    expected = importance_sampling_loss(
        reference_logits(model, data) / temperature,
        inputs_of(data, "target_tokens"),
        inputs_of(data, "weights"),
        inputs_of(data, "importance_weights"),
        1.0,
    )
    expected.backward()
    learner = Learner(model_dir, cpu_config(activation_checkpointing=checkpointing))
    output = learner.forward_backward(data, LOSS, sum_weights(data), temperature)
    assert output.loss == pytest.approx(expected.item(), rel=1e-5)
    seen = gradients(learner)
    assert seen.keys() == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(seen[name], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("budget", [1, 45])
def test_splitting_into_microbatches_changes_nothing(untied, budget):
    data = make_data()
    whole = Learner(untied, cpu_config())
    split = Learner(untied, cpu_config(max_tokens_per_microbatch=budget))
    expected = whole.forward_backward(data, LOSS, sum_weights(data))
    seen = split.forward_backward(data, LOSS, sum_weights(data))
    assert expected.metrics["num_microbatches"] == 1
    assert seen.metrics["num_microbatches"] >= 3
    assert seen.loss == pytest.approx(expected.loss, rel=1e-5)
    for name, grad in gradients(whole).items():
        torch.testing.assert_close(gradients(split)[name], grad, rtol=1e-4, atol=1e-6)


def test_gradients_of_several_requests_accumulate(untied):
    data = make_data()
    whole, parts = Learner(untied, cpu_config()), Learner(untied, cpu_config())
    total = sum_weights(data)
    whole.forward_backward(data, LOSS, total)
    parts.forward_backward(data[:3], LOSS, total)
    parts.forward_backward(data[3:], LOSS, total)
    for name, grad in gradients(whole).items():
        torch.testing.assert_close(gradients(parts)[name], grad, rtol=1e-4, atol=1e-6)


def test_more_microbatches_than_needed_change_nothing(untied):
    data = make_data()
    plain, padded = Learner(untied, cpu_config()), Learner(untied, cpu_config())
    expected = plain.forward_backward(data, LOSS, sum_weights(data)).loss
    output = padded.forward_backward(data, LOSS, sum_weights(data), num_microbatches=4)
    assert (output.metrics["num_microbatches"], output.loss) == (4, expected)
    for name, grad in gradients(plain).items():
        torch.testing.assert_close(gradients(padded)[name], grad, rtol=0, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_forward_gives_log_probabilities_of_every_target_in_order(untied, temperature):
    data = make_data()
    model = AutoModelForCausalLM.from_pretrained(untied)
    with torch.no_grad():
        logprobs = (reference_logits(model, data) / temperature).log_softmax(-1)
    expected = logprobs.gather(1, inputs_of(data, "target_tokens")[:, None])[:, 0].numpy()
    learner = Learner(untied, cpu_config(max_tokens_per_microbatch=40))
    outputs = learner.forward(data, temperature).logprobs_per_datum
    assert [len(values) for values in outputs] == [len(datum.token_ids_N) for datum in data]
    np.testing.assert_allclose(np.concatenate(outputs), expected, rtol=1e-4, atol=1e-5)
    assert not gradients(learner)


def test_positions_of_weight_zero_are_nan_unless_asked_for(untied):
    data = make_data()
    learner = Learner(untied, cpu_config())
    everywhere = learner.forward(data).logprobs_per_datum
    weighted = learner.forward_backward(data, LOSS, sum_weights(data)).logprobs_per_datum
    asked = learner.forward_backward(data, LOSS, sum_weights(data), positions="all").logprobs_per_datum
    for datum, full, part, again in zip(data, everywhere, weighted, asked, strict=True):
        zero = datum.loss_fn_inputs["weights"] == 0
        assert np.isnan(part[zero]).all()
        np.testing.assert_allclose(part[~zero], full[~zero], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(again, full, rtol=1e-5, atol=1e-6)


def test_same_inputs_are_bit_identical(untied):
    data = make_data()
    results = []
    for _ in range(2):
        learner = Learner(untied, cpu_config(max_tokens_per_microbatch=45), seed=3)
        for _ in range(2):
            learner.forward_backward(data, LOSS, sum_weights(data))
            learner.optim_step(AdamParams(learning_rate=1e-2))
        results.append(weights(learner))
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_optim_step_is_adamw_with_every_parameter_of_the_call(untied):
    data = make_data()
    learner = Learner(untied, cpu_config())
    model = AutoModelForCausalLM.from_pretrained(untied)
    optimizer = torch.optim.AdamW(model.parameters())
    steps = [
        AdamParams(learning_rate=1e-2, beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.1, grad_clip_norm=0.05),
        AdamParams(learning_rate=3e-3, beta1=0.5, beta2=0.99, eps=1e-6, weight_decay=0.0, grad_clip_norm=0.0),
        AdamParams(learning_rate=1e-3, grad_clip_norm=1e6),
    ]
    for params in steps:
        output = learner.forward_backward(data, CROSS_ENTROPY, sum_weights(data))
        step = learner.optim_step(params)
        logits = reference_logits(model, data)
        loss = cross_entropy_loss(logits, inputs_of(data, "target_tokens"), inputs_of(data, "weights"))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), params.grad_clip_norm or math.inf)
        for group in optimizer.param_groups:
            group.update(lr=params.learning_rate, betas=(params.beta1, params.beta2))
            group.update(eps=params.eps, weight_decay=params.weight_decay)
        optimizer.step()
        optimizer.zero_grad()
        assert output.loss == pytest.approx(loss.item(), rel=1e-4)
        assert step.grad_norm == pytest.approx(norm.item(), rel=1e-3)
        assert step.learning_rate == params.learning_rate
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(weights(learner)[name], parameter.detach(), rtol=1e-3, atol=1e-4)
    assert not gradients(learner)


def test_a_non_finite_gradient_is_an_error_and_no_step(untied):
    learner = Learner(untied, cpu_config())
    before = weights(learner)
    data = make_data()
    loss = ImportanceSampling(name="importance_sampling")

    def weighted(weight: float) -> list[Datum]:
        return [replaced(d, importance_weights=np.full(len(d.token_ids_N), weight, np.float32)) for d in data]

    with pytest.raises(BatchError, match=r"loss is inf.*dropped"):
        learner.forward_backward(weighted(3e38), loss, 1e-3)
    assert not gradients(learner)
    learner.forward_backward(weighted(1e30), loss, 1.0)
    with pytest.raises(BatchError, match=r"gradient norm is .*not applied"):
        learner.optim_step(AdamParams(learning_rate=1.0))
    assert not gradients(learner)
    assert all(torch.equal(value, before[name]) for name, value in weights(learner).items())
    learner.forward_backward(data, LOSS, sum_weights(data))
    assert math.isfinite(learner.optim_step(AdamParams(learning_rate=1e-3)).grad_norm)


def test_optim_step_without_gradients_or_with_bad_parameters_is_refused(untied):
    learner = Learner(untied, cpu_config())
    with pytest.raises(BatchError, match="no forward_backward"):
        learner.optim_step(AdamParams(learning_rate=1e-3))
    for change in ({"learning_rate": math.nan}, {"beta1": 1.0}, {"eps": 0.0}, {"grad_clip_norm": -1.0}):
        with pytest.raises(ConfigError, match=next(iter(change))):
            learner.optim_step(AdamParams(**({"learning_rate": 1e-3} | change)))


BAD = {
    "target_tokens.*missing": lambda d: dataclasses.replace(d, loss_fn_inputs={}),
    "importance_weights.*missing": lambda d: dataclasses.replace(
        d, loss_fn_inputs={k: v for k, v in d.loss_fn_inputs.items() if k != "importance_weights"}
    ),
    r"weights.*float32 of shape .*seen float64": lambda d: replaced(d, weights=np.ones(len(d.token_ids_N))),
    r"weights.*seen float32 of shape \(1,\)": lambda d: replaced(d, weights=np.ones(1, np.float32)),
    "weights.*finite, seen nan": lambda d: replaced(d, weights=np.full(len(d.token_ids_N), np.nan, np.float32)),
    "importance_weights.*finite, seen inf": lambda d: replaced(
        d, importance_weights=np.full(len(d.token_ids_N), np.inf, np.float32)
    ),
    "weights.*seen list": lambda d: replaced(d, weights=[1.0] * len(d.token_ids_N)),
    f"target_tokens holds token id {VOCAB}": lambda d: replaced(
        d, target_tokens=np.full(len(d.token_ids_N), VOCAB, np.int64)
    ),
    "target_tokens holds token id -100": lambda d: replaced(
        d, target_tokens=np.full(len(d.token_ids_N), -100, np.int64)
    ),
    "token_ids_N holds token id 500": lambda d: dataclasses.replace(d, token_ids_N=d.token_ids_N * 0 + 500),
    "token_ids_N must be a 1-D int64": lambda d: dataclasses.replace(d, token_ids_N=d.token_ids_N.astype(np.int32)),
    "token_ids_N is empty": lambda d: dataclasses.replace(d, token_ids_N=np.zeros(0, np.int64)),
    "token_ids_N has 65 tokens.*at most 64": lambda d: dataclasses.replace(d, token_ids_N=np.zeros(65, np.int64)),
}


def test_bad_data_are_refused_by_datum_and_field_and_accumulate_nothing(untied):
    learner = Learner(untied, cpu_config(max_tokens_per_microbatch=1))
    data = make_data()
    for expected, spoil in BAD.items():
        with pytest.raises(BatchError, match=f"datum 'd6': .*{expected}"):
            learner.forward_backward([*data[:-1], spoil(data[-1])], LOSS, 1.0)
        assert not gradients(learner), expected


def test_bad_requests_are_refused(untied):
    learner = Learner(untied, cpu_config())
    data = make_data()
    zero = [replaced(d, weights=np.zeros(len(d.token_ids_N), np.float32)) for d in data]
    with pytest.raises(BatchError, match="all weights are zero"):
        learner.forward_backward(zero, LOSS, sum_weights(zero))
    with pytest.raises(BatchError, match="no data"):
        learner.forward_backward([], LOSS, 1.0)
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(BatchError, match="temperature"):
            learner.forward(data, temperature)
    assert not gradients(learner)


def test_resume_is_bit_exact(model_dir, tmp_path):
    data = make_data()
    params = AdamParams(learning_rate=1e-2)
    learner = Learner(model_dir, cpu_config(), seed=1)
    learner.forward_backward(data, LOSS, sum_weights(data))
    learner.optim_step(params)
    learner.save_state(tmp_path / "state")
    generator = torch.get_rng_state()
    expected = []
    for _ in range(2):
        expected.append(learner.forward_backward(data, LOSS, sum_weights(data)).loss)
        learner.optim_step(params)

    resumed = Learner(model_dir, cpu_config(), seed=99)
    resumed.forward_backward(data, LOSS, sum_weights(data))
    resumed.load_state(tmp_path / "state")
    assert not gradients(resumed)
    assert torch.equal(torch.get_rng_state(), generator)
    for loss in expected:
        assert resumed.forward_backward(data, LOSS, sum_weights(data)).loss == loss
        resumed.optim_step(params)
    assert all(torch.equal(value, weights(learner)[name]) for name, value in weights(resumed).items())


def test_state_without_optimizer_starts_adamw_anew(untied, tmp_path):
    data = make_data()
    params = AdamParams(learning_rate=1e-2)
    learner = Learner(untied, cpu_config())
    learner.forward_backward(data, LOSS, sum_weights(data))
    learner.optim_step(params)
    learner.save_state(tmp_path / "state", with_optimizer=False)
    assert not (tmp_path / "state" / "optimizer").exists()
    fresh = Learner(tmp_path / "state" / "weights", cpu_config())
    learner.load_state(tmp_path / "state")
    for one in (fresh, learner):
        one.forward_backward(data, LOSS, sum_weights(data))
        one.optim_step(params)
    assert all(torch.equal(value, weights(learner)[name]) for name, value in weights(fresh).items())


def test_unusable_states_are_refused_and_change_nothing(untied, tmp_path):
    learner = Learner(untied, cpu_config())
    before = weights(learner)
    with pytest.raises(CheckpointError, match="no readable learner state"):
        learner.load_state(tmp_path)
    learner.forward_backward(make_data(), LOSS, 1.0)
    learner.optim_step(AdamParams(learning_rate=1e-2))
    learner.save_state(tmp_path / "state")
    learner = Learner(untied, cpu_config())
    shutil.rmtree(tmp_path / "state" / "optimizer")
    with pytest.raises(CheckpointError, match="state"):
        learner.load_state(tmp_path / "state")
    (tmp_path / "state" / "weights" / "model.safetensors").write_bytes(b"half a fi")
    with pytest.raises(CheckpointError, match="state"):
        learner.load_state(tmp_path / "state")
    assert all(torch.equal(value, before[name]) for name, value in weights(learner).items())


def test_chunks_hold_every_weight_once_within_the_limit(model_dir):
    learner = Learner(model_dir, cpu_config())
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    chunks = list(learner.state_chunks(30_000))
    seen = {name: tensor for chunk in chunks for name, tensor in chunk.items()}
    assert sum(map(len, chunks)) == len(seen)
    assert len(chunks) > 3
    assert all(len(chunk) == 1 or sum(t.numel() * 4 for t in chunk.values()) <= 30_000 for chunk in chunks)
    expected = dict(model.named_parameters())
    assert seen.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in seen.items())
    assert {t.dtype for t in next(learner.state_chunks(1 << 30, dtype="bfloat16")).values()} == {torch.bfloat16}


def test_hf_directory_is_what_transformers_loads(model_dir, tmp_path):
    (model_dir / "tokenizer.json").write_text('{"a": 1}')
    learner = Learner(model_dir, cpu_config())
    data = make_data()
    learner.forward_backward(data, LOSS, sum_weights(data))
    learner.optim_step(AdamParams(learning_rate=1e-2))
    learner.save_hf(tmp_path / "hf")
    assert (tmp_path / "hf" / "tokenizer.json").read_text() == '{"a": 1}'
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "float32"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        logprobs = reference_logits(model, data).log_softmax(-1)
    expected = logprobs.gather(1, inputs_of(data, "target_tokens")[:, None])[:, 0].numpy()
    seen = np.concatenate(learner.forward(data).logprobs_per_datum)
    np.testing.assert_allclose(seen, expected, rtol=1e-4, atol=1e-5)


def test_large_models_are_written_in_shards_with_an_index(model_dir, tmp_path):
    learner = Learner(model_dir, cpu_config())
    save_hf_directory(
        learner._policy.model, tmp_path, model_dir=model_dir, rank=0, dtype=torch.float32, max_shard_bytes=100_000
    )
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert not list(tmp_path.glob("part-*"))
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], weights(learner)[name])
    again = Learner(tmp_path, cpu_config())
    assert all(torch.equal(value, weights(learner)[name]) for name, value in weights(again).items())
