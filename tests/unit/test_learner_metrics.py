"""What goes with the answer of `forward_backward`: figures of a loss are weighted means of the whole request."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from adapter_fixtures import FIGURES, LOSS, logprobs
from learner_fixtures import cpu_config, make_data, make_llama

from weaver_rl.learner.learner import Learner
from weaver_rl.learner.microbatches import sum_weights
from weaver_rl.types import Datum

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model"))


def of_all(data: list[Datum], name: str) -> np.ndarray:
    return np.concatenate([datum.loss_fn_inputs[name] for datum in data])


@pytest.mark.parametrize("positions", ["weighted", "all"])
@pytest.mark.parametrize("budget", [1, 45, 4096])
def test_figures_are_weighted_means_however_the_data_are_split(model_dir, budget, positions):
    data = make_data()
    learner = Learner(model_dir, cpu_config(max_tokens_per_microbatch=budget))
    # The normaliser of the loss is none of theirs.
    metrics = learner.forward_backward(data, FIGURES, 7.0, positions=positions, num_microbatches=9).metrics
    weights = of_all(data, "weights")
    assert metrics["mean_target"] == pytest.approx((weights * of_all(data, "target_tokens")).sum() / weights.sum())
    expected = (weights * np.exp(logprobs(learner, data))).sum() / weights.sum()
    assert metrics["mean_probability"] == pytest.approx(expected, rel=1e-5)
    assert metrics.keys() == {"num_microbatches", "padding_fraction", "mean_target", "mean_probability"}


def test_a_loss_without_figures_reports_none_and_is_the_same(model_dir):
    data = make_data()
    learner = Learner(model_dir, cpu_config())
    plain = learner.forward_backward(data, LOSS, sum_weights(data))
    assert plain.metrics.keys() == {"num_microbatches", "padding_fraction"}
    assert learner.forward_backward(data, FIGURES, sum_weights(data)).loss == plain.loss


def test_without_weights_a_mean_is_missing_and_not_zero(model_dir):
    data = make_data()
    data = [
        dataclasses.replace(
            datum,
            loss_fn_inputs=dict(datum.loss_fn_inputs) | {"weights": np.zeros(len(datum.token_ids_N), np.float32)},
        )
        for datum in data
    ]
    output = Learner(model_dir, cpu_config()).forward_backward(data, FIGURES, 1.0, positions="all")
    assert output.loss == 0.0
    assert output.metrics.keys() == {"num_microbatches", "padding_fraction"}
