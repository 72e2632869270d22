"""Adapters on two real gloo ranks are those of one rank; under bfloat16 compute they are float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_fixtures import (
    ATTENTION,
    EVERYTHING,
    FIGURES,
    HEAD,
    LOSS,
    PARAMS,
    adapter_weights,
    logprobs,
    plain_logprobs,
    plain_peft,
    train,
)
from learner_fixtures import cpu_config, gradients, make_data, make_llama, run_ranks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from weaver_rl.errors import BatchError, CheckpointError
from weaver_rl.learner.learner import Learner
from weaver_rl.learner.microbatches import shard_data, sum_weights, unshard
from weaver_rl.types import AdamParams

pytestmark = pytest.mark.unit
# A large eps: AdamW would make whole steps of gradients that are only rounding.
STEADY = AdamParams(learning_rate=1e-2, eps=1e-2, weight_decay=0.01, grad_clip_norm=0.5)


def arrays(learner: Learner) -> dict[str, np.ndarray]:
    """What the learner trains; tensors would go to another process as memory that ends with this one."""
    return {name: value.numpy() for name, value in adapter_weights(learner).items()}


def assert_same(seen: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Bit for bit."""
    assert seen.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(seen[name], value)


def program(learner: Learner, shards, rank: int, root: Path) -> dict[str, Any]:
    """The same operations on any number of ranks; what is compared goes back."""
    results: dict[str, Any] = {}
    data, mine = [datum for shard in shards for datum in shard.data], shards[rank].data
    total = sum_weights(data)
    results["base before"] = learner.forward(mine).logprobs_per_datum
    first, second = learner.with_adapter("first", EVERYTHING), learner.with_adapter("second", ATTENTION)
    results["begins"] = arrays(first)
    try:
        first.optim_step(STEADY)
    except BatchError as error:
        results["no gradients"] = str(error)
    outputs, steps = [], []
    for _ in range(2):
        outputs.append(first.forward_backward(mine, FIGURES, total, with_grad_norm=True))
        second.forward_backward(mine, LOSS, total)
        # Everything on one rank: the other one adds nothing.
        everything = data if rank == 0 else ()
        outputs.append(first.forward_backward(everything, LOSS, total, with_grad_norm=True))
        results["forward in between"] = first.forward(mine).logprobs_per_datum
        steps += [second.optim_step(STEADY), first.optim_step(STEADY)]
    results["norms"] = [output.metrics["grad_norm"] for output in outputs] + [step.grad_norm for step in steps]
    results["losses"] = [output.loss for output in outputs]
    results["figures"] = [outputs[0].metrics[name] for name in ("mean_probability", "mean_target")]
    results["first"], results["second"] = arrays(first), arrays(second)
    results["after"] = first.forward(mine).logprobs_per_datum
    results["base after"] = learner.forward(mine).logprobs_per_datum
    first.save_state(root / "state")
    first.save_hf(root / "hf")
    first.save_for_sampler(root / "peft")
    train(first, list(mine), num_steps=1, params=STEADY)
    results["gone on"] = arrays(first)
    first.load_state(root / "state")
    train(first, list(mine), num_steps=1, params=STEADY)
    results["resumed"] = arrays(first)
    return results


def two_rank_program(rank: int, world_size: int, port: int, root: Path) -> dict[str, Any]:
    learner = Learner(
        root / "tied", cpu_config(), rank=rank, world_size=world_size, master_addr="127.0.0.1", master_port=port
    )
    results = program(learner, shard_data(make_data(), world_size), rank, root / "two")
    # One rank cannot read what the other can: neither changes.
    adapter = learner.with_adapter("third", EVERYTHING)
    before = arrays(adapter)
    try:
        adapter.load_state(root / "two" / "state" if rank == 0 else root)
    except (BatchError, CheckpointError) as error:
        results["refused"] = f"{type(error).__name__}: {error}"
    results["unchanged"] = all((value == before[name]).all() for name, value in arrays(adapter).items())
    adapter.load_state(root / "one" / "state")
    results["loaded from one"] = arrays(adapter)
    learner.remove_adapter("first")
    learner.remove_adapter("second")
    learner.remove_adapter("third")
    learner.forward_backward(shard_data(make_data(), world_size)[rank].data, LOSS, 1.0)
    results["trainable again"] = {name: tuple(value.shape) for name, value in gradients(learner).items()}
    learner.close()
    return results


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("ranks")
    make_llama(root / "tied", tied=True)
    return root


@pytest.fixture(scope="module")
def one(root) -> dict[str, Any]:
    return program(Learner(root / "tied", cpu_config()), shard_data(make_data(), 1), 0, root / "one")


@pytest.fixture(scope="module")
def two(root, one) -> list[dict[str, Any]]:
    return run_ranks(two_rank_program, 2, root)


def joined(two: list[dict[str, Any]], name: str) -> np.ndarray:
    return np.concatenate(unshard(shard_data(make_data(), 2), [results[name] for results in two]))


def test_losses_norms_and_weights_are_those_of_one_rank(one, two):
    for results in two:
        assert results["losses"] == pytest.approx(one["losses"], rel=1e-4)
        assert results["norms"] == pytest.approx(one["norms"], rel=1e-4)
        assert results["figures"] == pytest.approx(one["figures"], rel=1e-5)
        assert_same(results["begins"], one["begins"])
        for name in ("first", "second"):
            assert results[name].keys() == one[name].keys()
            for parameter, value in one[name].items():
                np.testing.assert_allclose(results[name][parameter], value, rtol=1e-3, atol=1e-5)
    for name in ("forward in between", "after"):
        np.testing.assert_allclose(joined(two, name), np.concatenate(one[name]), rtol=1e-3, atol=1e-4)


def test_both_ranks_hold_the_same_adapter_bit_for_bit(two):
    for name in ("begins", "first", "second", "gone on", "resumed"):
        assert_same(two[1][name], two[0][name])


def test_the_base_does_not_change_by_a_bit(two):
    for results in two:
        for before, after in zip(results["base before"], results["base after"], strict=True):
            np.testing.assert_array_equal(after, before)
    assert np.abs(joined(two, "after") - joined(two, "base after")).max() > 0.05


def test_without_gradients_anywhere_no_rank_steps(two):
    assert all("no forward_backward" in results["no gradients"] for results in two)


def test_two_ranks_resume_bit_for_bit(two):
    for results in two:
        assert_same(results["resumed"], results["gone on"])


def test_states_go_from_one_rank_to_two_and_back(root, one, two):
    assert_same(two[0]["loaded from one"], one["first"])
    learner = Learner(root / "tied", cpu_config()).with_adapter("a", EVERYTHING)
    learner.load_state(root / "two" / "state")
    assert_same(arrays(learner), two[0]["first"])
    shards = shard_data(make_data(), 2)
    # As on two ranks, where each trained on its own data with its own Σ weights.
    for shard in shards:
        learner.forward_backward(shard.data, LOSS, sum_weights(shard.data))
    learner.optim_step(STEADY)
    for name, value in arrays(learner).items():
        np.testing.assert_allclose(value, two[0]["resumed"][name], rtol=1e-3, atol=1e-5)


def test_a_state_that_one_rank_cannot_read_changes_neither(two):
    assert two[0]["refused"].startswith("OtherRankError: another rank")
    assert two[1]["refused"].startswith("CheckpointError")
    assert "learner.json" in two[1]["refused"]
    assert all(results["unchanged"] for results in two)


def test_the_policy_may_be_trained_whole_after_its_last_adapter(root, two):
    expected = {name: tuple(tensor.shape) for name, tensor in load_file(root / "tied" / "model.safetensors").items()}
    assert [results["trainable again"] for results in two] == [expected, expected]


def test_files_of_two_ranks_load_in_plain_libraries(root, two):
    data = make_data()
    expected = joined(two, "after")
    for model in (
        AutoModelForCausalLM.from_pretrained(root / "two" / "hf"),
        plain_peft(root / "tied", root / "two" / "peft"),
    ):
        with torch.no_grad():
            np.testing.assert_allclose(plain_logprobs(model, data).numpy(), expected, rtol=1e-3, atol=1e-4)


@pytest.fixture
def mixed(root):
    """The path of a GPU, FSDP2 mixed precision on a mesh of one, on the CPU."""
    learner = Learner(root / "tied", cpu_config(dtype="bfloat16"))
    yield learner
    learner.close()


@pytest.mark.parametrize("config", [EVERYTHING, HEAD], ids=["everything", "head"])
def test_bfloat16_compute_trains_float32_adapters(root, mixed, config, tmp_path):
    data = make_data()
    exact = Learner(root / "tied", cpu_config()).with_adapter("a", config)
    learner = mixed.with_adapter("a", config)
    for _ in range(2):
        wanted = exact.forward_backward(data, LOSS, sum_weights(data), with_grad_norm=True)
        seen = learner.forward_backward(data, LOSS, sum_weights(data), with_grad_norm=True)
        assert seen.loss == pytest.approx(wanted.loss, abs=2e-2)
        assert seen.metrics["grad_norm"] == pytest.approx(wanted.metrics["grad_norm"], rel=5e-2)
        exact.optim_step(STEADY)
        learner.optim_step(STEADY)
    assert {value.dtype for value in adapter_weights(learner).values()} == {torch.float32}
    learner.save_for_sampler(tmp_path / "peft")
    assert {value.dtype for value in load_file(tmp_path / "peft" / "adapter_model.safetensors").values()} == {
        torch.float32
    }
    learner.save_hf(tmp_path / "hf")
    assert {value.dtype for value in load_file(tmp_path / "hf" / "model.safetensors").values()} == {torch.bfloat16}


def test_a_small_step_of_the_head_counts_under_bfloat16(root, mixed):
    """Added to half-precision weights, so small a change would be rounded away."""
    data = make_data()
    base = Learner(root / "tied", cpu_config())
    exact, learner = base.with_adapter("a", HEAD), mixed.with_adapter("a", HEAD)
    tiny = AdamParams(learning_rate=2e-6, grad_clip_norm=0.0)
    before = logprobs(learner, data)
    for one in (exact, learner):
        train(one, data, num_steps=3, params=tiny)
    expected = logprobs(exact, data) - logprobs(base, data)
    assert 1e-6 < np.abs(expected).max() < 1e-2
    seen = logprobs(learner, data) - before
    assert np.corrcoef(seen, expected)[0, 1] > 0.98
    assert np.abs(seen).max() == pytest.approx(np.abs(expected).max(), rel=0.1)


def test_activation_checkpointing_with_sharding_gives_the_same_gradients(root):
    data = make_data()
    seen = []
    for checkpointing in (False, True):
        learner = Learner(root / "tied", cpu_config(dtype="bfloat16", activation_checkpointing=checkpointing))
        try:
            adapter = learner.with_adapter("a", EVERYTHING)
            train(adapter, data, num_steps=1, params=PARAMS)
            adapter.forward_backward(data, LOSS, sum_weights(data))
            seen.append(gradients(adapter))
        finally:
            learner.close()
    for name, grad in seen[0].items():
        torch.testing.assert_close(seen[1][name], grad, rtol=1e-3, atol=1e-5)
