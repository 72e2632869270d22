"""What fails in the middle, out of memory say: it costs that model its gradients at most, and the others nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_fixtures import ATTENTION, EVERYTHING, LOSS, PARAMS, assert_same_tensors, logprobs, train
from learner_fixtures import cpu_config, gradients, make_data, make_llama
from peft.tuners.lora import LoraLayer

from weaver_rl.errors import BatchError
from weaver_rl.learner import adapters as adapters_module
from weaver_rl.learner import learner as learner_module
from weaver_rl.learner.learner import Learner
from weaver_rl.learner.microbatches import sum_weights
from weaver_rl.losses.config import CrossEntropy

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Path:
    return make_llama(tmp_path_factory.mktemp("untied"))


def breaks_while_adding(monkeypatch, where: str) -> None:
    """Out of memory, when PEFT has put half of the new layers in place, or when half of them have their values."""
    target = (LoraLayer, "update_layer") if where == "injecting" else (adapters_module, "_seed_of")
    original, calls = getattr(*target), []

    def breaks(*args, **kwargs):
        calls.append(args)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("out of memory")
        return original(*args, **kwargs)

    monkeypatch.setattr(*target, breaks)


@pytest.mark.parametrize("first", ["base", "other"])
@pytest.mark.parametrize("where", ["injecting", "initialising"])
def test_an_adapter_that_cannot_be_made_leaves_no_trace(untied, where, first, monkeypatch):
    data = make_data()
    base = Learner(untied, cpu_config())
    other = base.with_adapter("other", ATTENTION)
    train(other, data)
    other.forward_backward(data, LOSS, sum_weights(data))
    before, accumulated, expected = logprobs(base, data), gradients(other), logprobs(other, data)
    parameters = [name for name, _ in base._policy.named_parameters()]
    with monkeypatch.context() as patch:
        breaks_while_adding(patch, where)
        with pytest.raises(torch.OutOfMemoryError):
            base.with_adapter("new", EVERYTHING)
    assert sorted(name for name, _ in base._policy.named_parameters() if ".adapter" in name) == sorted(
        name for name in parameters if ".adapter" in name
    )
    # Whichever is used first, nothing else has run before it.
    for learner in (base, other) if first == "base" else (other, base):
        np.testing.assert_array_equal(logprobs(learner, data), before if learner is base else expected)
    assert_same_tensors(gradients(other), accumulated)
    new = base.with_adapter("new", EVERYTHING)
    np.testing.assert_array_equal(logprobs(new, data), before)
    other.optim_step(PARAMS)
    train(new, data)


@pytest.mark.parametrize("where", ["injecting", "initialising"])
def test_the_policy_can_be_trained_after_its_only_adapter_could_not_be_made(untied, where, monkeypatch):
    data = make_data()
    base, fresh = Learner(untied, cpu_config()), Learner(untied, cpu_config())
    with monkeypatch.context() as patch:
        breaks_while_adding(patch, where)
        with pytest.raises(torch.OutOfMemoryError):
            base.with_adapter("a", EVERYTHING)
    for learner in (base, fresh):
        learner.forward_backward(data, LOSS, sum_weights(data))
    assert_same_tensors(gradients(base), gradients(fresh))


def test_an_adapter_without_an_optimizer_is_none(untied, monkeypatch):
    base = Learner(untied, cpu_config())
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            base.with_adapter("a", EVERYTHING)
    base.with_adapter("a", EVERYTHING)


class BreaksLater(CrossEntropy):
    """Fails in its second micro-batch."""

    def token_losses(self, logprobs, inputs):
        losses = super().token_losses(logprobs, inputs)
        if BREAKS.pop():
            raise ERRORS[-1]
        return losses


BREAKS: list[bool] = []
ERRORS: list[Exception] = []


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), BatchError("datum 'd1': too bad")])
def test_a_failure_in_the_middle_drops_that_models_gradients_only_and_says_so(untied, error):
    data = make_data()
    total = sum_weights(data)
    base = Learner(untied, cpu_config(max_tokens_per_microbatch=45))
    failing, other = base.with_adapter("failing", EVERYTHING), base.with_adapter("other", EVERYTHING)
    for learner in (failing, other):
        learner.forward_backward(data, LOSS, total)
    kept = gradients(other)
    BREAKS[:], ERRORS[:] = [True, False], [error]
    with pytest.raises(type(error), match=str(error)) as caught:
        failing.forward_backward(data, BreaksLater(name="cross_entropy"), total)
    assert "all gradients that this model had accumulated are dropped" in "\n".join(
        [str(caught.value), *getattr(caught.value, "__notes__", [])]
    )
    assert not gradients(failing)
    assert_same_tensors(gradients(other), kept)
    with pytest.raises(BatchError, match="no forward_backward"):
        failing.optim_step(PARAMS)


@pytest.mark.parametrize("part", ["_totals", "global_norm", "_to_data"])
def test_gradients_of_a_failed_answer_are_not_kept(untied, part, monkeypatch):
    """The client is told that it failed, and sends the batch again: it must not count twice."""
    data = make_data()
    learner = Learner(untied, cpu_config()).with_adapter("a", EVERYTHING)

    def breaks(*_, **__):
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Learner if part == "_totals" else learner_module, part, breaks)
        with pytest.raises(torch.OutOfMemoryError) as caught:
            learner.forward_backward(data, LOSS, sum_weights(data), with_grad_norm=True)
    assert "are dropped" in "\n".join(caught.value.__notes__)
    assert not gradients(learner)


def test_a_loss_that_is_not_finite_says_once_that_gradients_are_dropped(untied):
    data = make_data()
    learner = Learner(untied, cpu_config()).with_adapter("a", EVERYTHING)
    with pytest.raises(BatchError, match=r"the loss is inf: .*set a clip.*; all gradients .* are dropped$") as caught:
        learner.forward_backward(data, InfiniteLoss(name="cross_entropy"), sum_weights(data))
    assert str(caught.value).count("dropped") == 1
    assert not gradients(learner)


class InfiniteLoss(CrossEntropy):
    def token_losses(self, logprobs, inputs):
        return super().token_losses(logprobs, inputs) + float("inf")
