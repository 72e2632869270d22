"""Two real gloo ranks compute what one rank computes, and neither waits for the other in vain."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_fixtures import cpu_config, gradients, make_data, make_llama, run_ranks, weights

from weaver_rl.errors import BatchError
from weaver_rl.learner.learner import Learner
from weaver_rl.learner.microbatches import shard_data, sum_weights, unshard
from weaver_rl.losses.config import CrossEntropy, ImportanceSampling
from weaver_rl.types import AdamParams

pytestmark = pytest.mark.unit
LOSS = ImportanceSampling(name="importance_sampling", clip_ratio=1.0)
PARAMS = AdamParams(learning_rate=1e-2, weight_decay=0.01)
BUDGETS = {"1": 1, "3": 45, "all": 4096}


def two_rank_program(rank: int, world_size: int, port: int, root: Path) -> dict[str, Any]:
    """Everything that needs two ranks, in one pair of processes; all results go back to be judged by the tests."""
    results: dict[str, Any] = {}
    data = make_data()
    shards = shard_data(data, world_size)
    mine = shards[rank].data
    learner = Learner(
        root / "tied", cpu_config(), rank=rank, world_size=world_size, master_addr="127.0.0.1", master_port=port
    )
    for name, budget in BUDGETS.items():
        learner._config = cpu_config(max_tokens_per_microbatch=budget)
        output = learner.forward_backward(mine, LOSS, sum_weights(data))
        results[f"output {name}"] = output
        results[f"grads {name}"] = {key: value.numpy() for key, value in gradients(learner).items()}
        learner.zero_grad()

    # A rank with no data, and one with bad data, must not leave the other waiting.
    everything = tuple(data) if rank == 0 else ()
    results["lopsided"] = learner.forward_backward(everything, LOSS, sum_weights(data)).loss
    learner.zero_grad()
    bad = dataclasses.replace(mine[0], token_ids_N=mine[0].token_ids_N + 1000) if rank == 1 else mine[0]
    try:
        learner.forward_backward((bad,), LOSS, 1.0)
    except BatchError as error:
        results["refused"] = str(error)
    results["nothing accumulated"] = not gradients(learner)

    # forward between forward_backward and optim_step: gathered weights must not be served after the step.
    learner.forward_backward(mine, LOSS, sum_weights(data))
    results["before"] = learner.forward(mine).logprobs_per_datum
    results["step"] = learner.optim_step(PARAMS)
    results["after"] = learner.forward(mine).logprobs_per_datum
    learner.save_state(root / "state2")
    learner.save_hf(root / "hf2")
    results["weights"] = {key: value.numpy() for key, value in weights(learner).items()}
    learner.forward_backward(mine, LOSS, sum_weights(data))
    learner.optim_step(PARAMS)
    results["weights after 2"] = {key: value.numpy() for key, value in weights(learner).items()}
    learner.load_state(root / "state1")
    results["loaded from 1"] = {key: value.numpy() for key, value in weights(learner).items()}
    learner.load_state(root / "state2")
    learner.forward_backward(mine, LOSS, sum_weights(data))
    learner.optim_step(PARAMS)
    results["weights resumed"] = {key: value.numpy() for key, value in weights(learner).items()}
    learner.close()
    return results


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> tuple[Path, Learner]:
    root = tmp_path_factory.mktemp("ranks")
    make_llama(root / "tied", tied=True)
    learner = Learner(root / "tied", cpu_config(), seed=0)
    data = make_data(seed=5)
    learner.forward_backward(data, LOSS, sum_weights(data))
    learner.optim_step(PARAMS)
    learner.save_state(root / "state1")
    return root, learner


@pytest.fixture(scope="module")
def two(one) -> list[dict[str, Any]]:
    return run_ranks(two_rank_program, 2, one[0])


@pytest.fixture
def fresh(one) -> Learner:
    return Learner(one[0] / "tied", cpu_config())


@pytest.mark.parametrize("split", list(BUDGETS))
def test_loss_and_gradient_are_the_same_on_two_ranks(fresh, two, split):
    data = make_data()
    expected = fresh.forward_backward(data, LOSS, sum_weights(data))
    expected_grads = gradients(fresh)
    for results in two:
        output = results[f"output {split}"]
        assert output.loss == pytest.approx(expected.loss, rel=1e-5)
        assert output.num_tokens == expected.num_tokens
        assert results[f"grads {split}"].keys() == expected_grads.keys()
        for name, grad in expected_grads.items():
            torch.testing.assert_close(torch.from_numpy(results[f"grads {split}"][name]), grad, rtol=2e-4, atol=1e-6)
    logprobs = unshard(shard_data(data, 2), [results[f"output {split}"].logprobs_per_datum for results in two])
    for seen, wanted in zip(logprobs, expected.logprobs_per_datum, strict=True):
        np.testing.assert_allclose(seen, wanted, rtol=1e-4, atol=1e-5)


def test_every_rank_runs_as_many_microbatches(two):
    counts = [results["output 1"].metrics["num_microbatches"] for results in two]
    assert counts[0] == counts[1] >= 4


def test_a_rank_without_data_takes_part(fresh, two):
    data = make_data()
    expected = fresh.forward_backward(data, LOSS, sum_weights(data)).loss
    assert [results["lopsided"] for results in two] == [pytest.approx(expected, rel=1e-5)] * 2


def test_bad_data_on_one_rank_is_refused_on_both(two):
    assert "another rank" in two[0]["refused"]
    assert "token_ids_N" in two[1]["refused"]
    assert all(results["nothing accumulated"] for results in two)


def test_step_and_log_probabilities_around_it_are_those_of_one_rank(fresh, two):
    data = make_data()
    fresh.forward_backward(data, LOSS, sum_weights(data))
    before = fresh.forward(data).logprobs_per_datum
    step = fresh.optim_step(PARAMS)
    after = fresh.forward(data).logprobs_per_datum
    for name, expected in (("before", before), ("after", after)):
        seen = unshard(shard_data(data, 2), [results[name] for results in two])
        for one_seen, one_expected in zip(seen, expected, strict=True):
            np.testing.assert_allclose(one_seen, one_expected, rtol=1e-3, atol=1e-4)
    assert [results["step"].grad_norm for results in two] == [pytest.approx(step.grad_norm, rel=1e-5)] * 2


def test_only_rank_0_has_content_and_it_is_whole(fresh, two):
    assert two[1]["weights"] == {}
    assert {name: value.shape for name, value in two[0]["weights"].items()} == {
        name: tuple(value.shape) for name, value in weights(fresh).items()
    }


def test_state_of_two_ranks_continues_on_one_and_back(one, fresh, two):
    root, learner = one
    fresh.load_state(root / "state2")
    for name, value in weights(fresh).items():
        np.testing.assert_array_equal(value.numpy(), two[0]["weights"][name])
    data = make_data()
    fresh.forward_backward(data, LOSS, sum_weights(data))
    fresh.optim_step(PARAMS)
    for name, value in weights(fresh).items():
        np.testing.assert_allclose(value.numpy(), two[0]["weights after 2"][name], rtol=1e-3, atol=1e-4)
    for name, value in weights(learner).items():
        np.testing.assert_array_equal(two[0]["loaded from 1"][name], value.numpy())


def test_two_ranks_resume_bit_for_bit(two):
    for name, value in two[0]["weights after 2"].items():
        np.testing.assert_array_equal(two[0]["weights resumed"][name], value)


def test_hf_directory_of_two_ranks_loads(one, two):
    again = Learner(one[0] / "hf2", cpu_config())
    for name, value in weights(again).items():
        np.testing.assert_array_equal(value.numpy(), two[0]["weights"][name])


def test_bfloat16_compute_keeps_float32_masters(one):
    """The path of a GPU, FSDP2 mixed precision on a mesh of one, on the CPU."""
    data = make_data()
    exact = Learner(one[0] / "tied", cpu_config())
    mixed = Learner(one[0] / "tied", cpu_config(dtype="bfloat16"))
    try:
        loss = CrossEntropy(name="cross_entropy")
        expected = exact.forward_backward(data, loss, sum_weights(data)).loss
        assert mixed.forward_backward(data, loss, sum_weights(data)).loss == pytest.approx(expected, rel=2e-2)
        assert exact.optim_step(PARAMS).grad_norm == pytest.approx(mixed.optim_step(PARAMS).grad_norm, rel=5e-2)
        assert {parameter.dtype for parameter in mixed._policy.parameters()} == {torch.float32}
        chunk = next(mixed.state_chunks(1 << 30))
        assert {tensor.dtype for tensor in chunk.values()} == {torch.bfloat16}
    finally:
        mixed.close()
