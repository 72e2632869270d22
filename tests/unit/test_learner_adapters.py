"""Adapters on one frozen policy: gradients, updates and isolation, against plain PEFT and bit for bit."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_fixtures import (
    ATTENTION,
    EVERYTHING,
    HEAD,
    LOSS,
    PARAMS,
    adapter_weights,
    assert_same_tensors,
    logprobs,
    peft_parameters,
    plain_logprobs,
    plain_peft,
    train,
)
from learner_fixtures import cpu_config, gradients, make_data, make_llama, weights

from weaver_rl.errors import BatchError, ConfigError
from weaver_rl.learner.adapter_config import AdapterConfig
from weaver_rl.learner.learner import Learner
from weaver_rl.learner.microbatches import sum_weights
from weaver_rl.losses.config import CrossEntropy
from weaver_rl.types import AdamParams

pytestmark = pytest.mark.unit
CONFIGS = {"everything": EVERYTHING, "attention": ATTENTION, "head": HEAD}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def model_dir(request, tmp_path_factory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model"), tied=request.param)


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Path:
    return make_llama(tmp_path_factory.mktemp("untied"))


def plain_loss(model, data, temperature: float = 1.0) -> torch.Tensor:
    token_weights, factors = (
        torch.from_numpy(np.concatenate([datum.loss_fn_inputs[name] for datum in data]))
        for name in ("weights", "importance_weights")
    )
    terms = token_weights * factors.clamp(-1.0, 1.0) * plain_logprobs(model, data, temperature)
    return -terms.sum() / token_weights.sum()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", list(CONFIGS))
def test_loss_and_gradient_equal_plain_peft(model_dir, kind, checkpointing, tmp_path):
    data = make_data()
    config = cpu_config(activation_checkpointing=checkpointing, max_tokens_per_microbatch=45)
    learner = Learner(model_dir, config).with_adapter("a", CONFIGS[kind])
    # B is zero at the beginning, and so is every gradient of A.
    train(learner, data)
    learner.save_for_sampler(tmp_path)
    model = plain_peft(model_dir, tmp_path)
    expected = plain_loss(model, data, 0.7)
    expected.backward()
    output = learner.forward_backward(data, LOSS, sum_weights(data), 0.7)
    assert output.loss == pytest.approx(expected.item(), rel=1e-5)
    seen = gradients(learner)
    assert seen.keys() == peft_parameters(model).keys()
    for name, parameter in peft_parameters(model).items():
        assert parameter.grad.abs().max() > 1e-3, name
        torch.testing.assert_close(seen[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_a_new_adapter_changes_nothing_and_the_base_never_changes(model_dir):
    data = make_data()
    base = Learner(model_dir, cpu_config())
    before, weights_before = logprobs(base, data), weights(base)
    learners = [base.with_adapter(name, config) for name, config in CONFIGS.items()]
    for learner in learners:
        np.testing.assert_array_equal(logprobs(learner, data), before)
        train(learner, data)
        assert np.abs(logprobs(learner, data) - before).max() > 0.1
        np.testing.assert_array_equal(logprobs(base, data), before)
    assert_same_tensors(weights(base), weights_before)
    assert not gradients(base)


def test_adapters_that_take_turns_are_bit_for_bit_those_trained_alone(model_dir):
    """Different sizes, parts and seeds; each begins when others are under way and accumulates across their steps."""
    first, second = make_data(), make_data(5, seed=1)

    def alone(name: str) -> Learner:
        learner = Learner(model_dir, cpu_config(), seed=9).with_adapter(name, CONFIGS[name])
        for _ in range(2):
            learner.forward_backward(first, LOSS, sum_weights(first))
            learner.forward_backward(second, LOSS, sum_weights(second))
            learner.optim_step(PARAMS)
        return learner

    base = Learner(model_dir, cpu_config())
    together: dict[str, Learner] = {}
    for name, config in CONFIGS.items():
        together[name] = base.with_adapter(name, config)
        together[name].forward_backward(first, LOSS, sum_weights(first))
    for name in reversed(CONFIGS):
        together[name].forward_backward(second, LOSS, sum_weights(second))
        base.forward(first)
    for name in CONFIGS:
        together[name].optim_step(PARAMS)
    for data in (first, second):
        for name in reversed(CONFIGS):
            together[name].forward_backward(data, LOSS, sum_weights(data))
    for name in CONFIGS:
        together[name].optim_step(PARAMS)
    for name in CONFIGS:
        expected = alone(name)
        assert_same_tensors(adapter_weights(together[name]), adapter_weights(expected))
        np.testing.assert_array_equal(logprobs(together[name], first), logprobs(expected, first))


def test_gradients_accumulate_over_calls_and_the_norm_is_of_all_of_them(untied):
    data = make_data()
    total = sum_weights(data)
    base = Learner(untied, cpu_config())
    whole, parts = base.with_adapter("whole", EVERYTHING), base.with_adapter("parts", EVERYTHING)
    expected = whole.forward_backward(data, LOSS, total, with_grad_norm=True).metrics["grad_norm"]
    assert parts.forward_backward(data[:3], LOSS, total, with_grad_norm=True).metrics["grad_norm"] != expected
    output = parts.forward_backward(data[3:], LOSS, total, with_grad_norm=True)
    assert output.metrics["grad_norm"] == pytest.approx(expected, rel=1e-5)
    for name, grad in gradients(whole).items():
        torch.testing.assert_close(gradients(parts)[name], grad, rtol=1e-4, atol=1e-6)
    assert parts.optim_step(PARAMS).grad_norm == pytest.approx(expected, rel=1e-5)
    assert not gradients(parts)
    assert gradients(whole)


def test_the_norm_is_reported_only_when_asked_for_and_of_whole_policies_too(untied):
    data = make_data()
    learner = Learner(untied, cpu_config())
    assert "grad_norm" not in learner.forward_backward(data, LOSS, sum_weights(data)).metrics
    output = learner.forward_backward(data, LOSS, sum_weights(data), with_grad_norm=True)
    expected = math.sqrt(sum(float(grad.double().square().sum()) for grad in gradients(learner).values()))
    assert output.metrics["grad_norm"] == pytest.approx(expected, rel=1e-5)
    assert learner.optim_step(PARAMS).grad_norm == pytest.approx(expected, rel=1e-5)


def test_every_field_of_an_update_is_that_of_its_call(untied, tmp_path):
    data = make_data()
    learner = Learner(untied, cpu_config()).with_adapter("a", EVERYTHING)
    train(learner, data, num_steps=1)
    learner.save_state(tmp_path / "state", with_optimizer=False)
    learner.load_state(tmp_path / "state")
    model = plain_peft(untied, tmp_path / "state" / "weights")
    parameters = peft_parameters(model)
    optimizer = torch.optim.AdamW(parameters.values())
    steps = [
        AdamParams(learning_rate=1e-2, beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.1, grad_clip_norm=0.05),
        AdamParams(learning_rate=3e-3, beta1=0.5, beta2=0.99, eps=1e-4, weight_decay=0.0, grad_clip_norm=0.0),
        AdamParams(learning_rate=1e-3, eps=1e-2, grad_clip_norm=1e6),
    ]
    for params in steps:
        learner.forward_backward(data, LOSS, sum_weights(data))
        step = learner.optim_step(params)
        plain_loss(model, data).backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), params.grad_clip_norm or math.inf)
        for group in optimizer.param_groups:
            group.update(lr=params.learning_rate, betas=(params.beta1, params.beta2))
            group.update(eps=params.eps, weight_decay=params.weight_decay)
        optimizer.step()
        optimizer.zero_grad()
        assert (step.grad_norm, step.learning_rate) == (pytest.approx(norm.item(), rel=1e-4), params.learning_rate)
        for name, value in adapter_weights(learner).items():
            torch.testing.assert_close(value, parameters[name].detach(), rtol=1e-4, atol=1e-6)


def test_the_policy_is_frozen_while_it_has_adapters_and_free_after_the_last(untied):
    data = make_data()
    total = sum_weights(data)
    base = Learner(untied, cpu_config())
    base.forward_backward(data, LOSS, total)
    accumulated = gradients(base)
    base.with_adapter("a", EVERYTHING)
    base.with_adapter("b", HEAD)
    for operation in (
        lambda: base.forward_backward(data, LOSS, total),
        lambda: base.optim_step(PARAMS),
        lambda: base.load_state(untied),
    ):
        with pytest.raises(ConfigError, match=r"frozen base of adapters \(a, b\)"):
            operation()
    assert_same_tensors(gradients(base), accumulated)
    base.remove_adapter("a")
    with pytest.raises(ConfigError, match=r"frozen base of adapters \(b\)"):
        base.optim_step(PARAMS)
    base.remove_adapter("b")
    base.forward_backward(data, LOSS, total)
    fresh = Learner(untied, cpu_config())
    for _ in range(2):
        fresh.forward_backward(data, LOSS, total)
    assert_same_tensors(gradients(base), gradients(fresh))


def test_a_removed_adapter_is_gone_and_its_name_is_free(untied, tmp_path):
    data = make_data()
    base = Learner(untied, cpu_config())
    removed, other = base.with_adapter("a", EVERYTHING), base.with_adapter("b", ATTENTION)
    train(removed, data)
    train(other, data)
    expected = logprobs(other, data)
    base.remove_adapter("a")
    for operation in (
        lambda: removed.forward(data),
        lambda: removed.forward_backward(data, LOSS, sum_weights(data)),
        lambda: removed.optim_step(PARAMS),
        lambda: removed.save_state(tmp_path / "state"),
        lambda: removed.save_for_sampler(tmp_path / "peft"),
        lambda: removed.save_hf(tmp_path / "hf"),
    ):
        with pytest.raises(ConfigError, match="'a' was removed"):
            operation()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"no adapter 'a'; there are: b"):
        base.remove_adapter("a")
    assert not [name for name, _ in base._policy.named_parameters() if ".adapter0." in name]
    np.testing.assert_array_equal(logprobs(other, data), expected)
    again = base.with_adapter("a", EVERYTHING)
    np.testing.assert_array_equal(logprobs(again, data), logprobs(base, data))
    with pytest.raises(ConfigError, match="an adapter 'a' already"):
        base.with_adapter("a", ATTENTION)


def test_refused_data_and_steps_leave_an_adapter_as_it_was(untied):
    data = make_data()
    learner = Learner(untied, cpu_config()).with_adapter("a", EVERYTHING)
    with pytest.raises(BatchError, match="no forward_backward"):
        learner.optim_step(PARAMS)
    train(learner, data)
    learner.forward_backward(data, LOSS, sum_weights(data))
    before, accumulated = adapter_weights(learner), gradients(learner)
    bad = dataclasses.replace(data[1], token_ids_N=data[1].token_ids_N + 1000)
    with pytest.raises(BatchError, match="datum 'd1': token_ids_N"):
        learner.forward_backward([data[0], bad], LOSS, 1.0)
    with pytest.raises(ConfigError, match="beta1"):
        learner.optim_step(AdamParams(learning_rate=1e-3, beta1=1.0))
    assert_same_tensors(gradients(learner), accumulated)
    for _, parameter in learner._trained.named_parameters():
        parameter.grad.fill_(math.nan)
    with pytest.raises(BatchError, match="gradient norm is nan"):
        learner.optim_step(PARAMS)
    assert_same_tensors(adapter_weights(learner), before)
    assert not gradients(learner)


def test_a_head_alone_leaves_a_tied_embedding_as_it_is(tmp_path):
    data = make_data()
    base = Learner(make_llama(tmp_path, tied=True), cpu_config())
    learner = base.with_adapter("a", HEAD)
    embeddings = []
    handle = base._policy.model.get_input_embeddings().register_forward_hook(lambda _, __, out: embeddings.append(out))
    logprobs(learner, data)
    train(learner, data)
    logprobs(learner, data)
    handle.remove()
    assert torch.equal(embeddings[0], embeddings[-1])


def test_more_sizes_than_the_layer_has_are_fine(untied):
    data = make_data()
    learner = Learner(untied, cpu_config()).with_adapter("a", AdapterConfig(rank=100))
    before = learner.forward_backward(data, CrossEntropy(name="cross_entropy"), sum_weights(data)).loss
    learner.optim_step(AdamParams(learning_rate=1e-3))
    assert learner.forward_backward(data, CrossEntropy(name="cross_entropy"), sum_weights(data)).loss < before
