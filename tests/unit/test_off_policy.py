"""Importance weights, their correction per token, and the gap that stops a run."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from fakes import make_completion, make_scored
from learner_fixtures import cpu_config, gradients, make_llama, weights

from weaver_rl.advantages import LogprobGap, LogprobGapLimit, MeanCentered, Mis, NoCorrection, Tis
from weaver_rl.batch import ScoredGroup, build_batch
from weaver_rl.errors import LogprobGapError
from weaver_rl.learner.learner import Learner
from weaver_rl.losses.config import CrossEntropy, ImportanceSampling
from weaver_rl.metrics import find_metric
from weaver_rl.off_policy import LearnInput, correct, gap_metrics, likely_gap_cause, require_small_gap
from weaver_rl.rollout import SamplingConfig
from weaver_rl.types import AdamParams, ForwardOutput

pytestmark = pytest.mark.unit


LOSS = ImportanceSampling(name="importance_sampling", clip_ratio=1.6)


def make_input(versions: tuple[int, int] = (0, 0)) -> LearnInput:
    """Two rollouts after prompts of three and one tokens, advantages +1 and -1."""
    first = make_completion((7, 8), logprobs=[-1.0, -2.0], version=versions[0])
    second = make_completion((9,), logprobs=[-0.5], version=versions[1])
    scored = (
        make_scored("g-000", 2.0, prompt_tokens=(1, 2, 3), completion=first),
        make_scored("g-001", 0.0, prompt_tokens=(1,), completion=second),
    )
    return LearnInput.of(build_batch([ScoredGroup(group_id="g", sampler="s", scored_G=scored)], MeanCentered(), 0.0))


def forward(*rows: list[float]) -> ForwardOutput:
    return ForwardOutput(logprobs_per_datum=tuple(np.array(row, np.float32) for row in rows))


def test_every_token_weighs_its_advantage():
    data = make_input().data()
    assert [d.datum_id for d in data] == ["g-000", "g-001"]
    assert data[0].loss_fn_inputs["importance_weights"].tolist() == [0.0, 0.0, 1.0, 1.0]
    assert data[1].loss_fn_inputs["importance_weights"].tolist() == [-1.0]


def test_correction_multiplies_token_by_token_and_ignores_the_prompt():
    # Prompt positions (the 99s) would blow up if they were taken for completion tokens.
    learner = forward([99.0, 99.0, -1.0 + np.log(0.5), -2.0 + np.log(8.0)], [-0.5 + np.log(1.5)])
    corrected = correct(make_input(), learner, Tis(cap=2.0))
    assert corrected.importance_weights[0] == pytest.approx([0.5, 2.0], rel=1e-5)
    assert corrected.importance_weights[1] == pytest.approx([-1.5], rel=1e-5)
    assert corrected.data()[0].loss_fn_inputs["importance_weights"] == pytest.approx([0.0, 0.0, 0.5, 2.0], rel=1e-5)
    metrics = corrected.importance_metrics(LOSS, Tis(cap=2.0))
    assert metrics["correction/mean"] == pytest.approx(4.0 / 3, rel=1e-5)
    assert metrics["correction/capped_fraction"] == pytest.approx(1 / 3)
    assert metrics["importance_weights/clipped_fraction"] == pytest.approx(1 / 3)
    assert metrics["importance_weights/abs_mean"] == pytest.approx(4.0 / 3, rel=1e-5)


# Ratios 1/2 and 8 in the first rollout (product 4), 3/2 in the second.
OFF_POLICY = ([99.0, 99.0, -1.0 + math.log(0.5), -2.0 + math.log(8.0)], [-0.5 + math.log(1.5)])


@pytest.mark.parametrize(
    ("correction", "factors", "figures"),
    [
        (Tis(cap=2.0), [0.5, 2.0, 1.5], {"correction/mean": 4 / 3, "correction/capped_fraction": 1 / 3}),
        (
            Tis(cap=3.0, level="sequence"),
            [3.0, 3.0, 1.5],
            {"correction/mean": 2.5, "correction/capped_fraction": 2 / 3},
        ),
        (Mis(max_ratio=2.0), [0.5, 0.0, 1.5], {"correction/mean": 2 / 3, "correction/masked_fraction": 1 / 3}),
        (
            Mis(min_ratio=0.9, max_ratio=9.0),
            [0.0, 8.0, 1.5],
            {"correction/mean": 9.5 / 3, "correction/masked_fraction": 1 / 3},
        ),
        (
            Mis(max_ratio=3.0, level="sequence"),
            [0.0, 0.0, 1.5],
            {"correction/mean": 0.5, "correction/masked_fraction": 2 / 3},
        ),
        (
            Mis(min_ratio=2 / 3, max_ratio=5.0, level="sequence"),
            [4.0, 4.0, 1.5],
            {"correction/mean": 9.5 / 3, "correction/masked_fraction": 0.0},
        ),
    ],
)
def test_each_correction_sees_one_rollout_at_a_time(correction, factors, figures):
    corrected = correct(make_input(), forward(*OFF_POLICY), correction)
    assert np.concatenate(corrected.importance_weights) == pytest.approx([*factors[:2], -factors[2]], rel=1e-5)
    found = corrected.importance_metrics(LOSS, correction)
    assert {name: value for name, value in found.items() if name.startswith("correction/")} == pytest.approx(figures)
    assert all(find_metric(name) for name in found)


def test_masked_tokens_stay_in_the_normaliser():
    corrected = correct(make_input(), forward(*OFF_POLICY), Mis(max_ratio=1.0, level="sequence"))
    assert not np.concatenate(corrected.importance_weights).any()
    assert corrected.sum_weights == make_input().sum_weights == 3
    assert [datum.loss_fn_inputs["weights"].sum() for datum in corrected.data()] == [2, 1]


def test_a_batch_in_which_everything_is_masked_trains_nothing(tmp_path: Path):
    learner = Learner(make_llama(tmp_path), cpu_config())
    before = learner.forward(make_input().data())
    masked = correct(make_input(), before, Mis(min_ratio=1.0, max_ratio=1.0))
    learned = learner.forward_backward(masked.data(), LOSS, masked.sum_weights)
    assert (learned.loss, learned.sum_weights) == (0.0, 3.0)
    assert not any(gradient.any() for gradient in gradients(learner).values())
    old = weights(learner)
    assert learner.optim_step(AdamParams(learning_rate=0.1)).grad_norm == 0.0
    assert all((old[name] == value).all() for name, value in weights(learner).items())
    measured = masked.with_learner_logprobs(learned.logprobs_per_datum)
    figures = gap_metrics(measured.gap(0)) | measured.ratio_metrics() | measured.importance_metrics(LOSS, Mis())
    assert all(math.isfinite(value) for value in figures.values())
    assert figures["correction/masked_fraction"] == 1.0


def test_no_correction_changes_nothing():
    before = make_input()
    assert correct(before, forward([0.0] * 4, [0.0]), NoCorrection()) is before


def test_figures_of_uncorrected_weights():
    metrics = make_input().importance_metrics(CrossEntropy(name="cross_entropy"), NoCorrection())
    assert metrics["importance_weights/mean"] == pytest.approx(1 / 3)
    assert metrics["importance_weights/clipped_fraction"] == 0.0
    assert "correction/mean" not in metrics


def measured(versions: tuple[int, int], *rows: list[float]) -> LearnInput:
    return make_input(versions).with_learner_logprobs(forward(*rows).logprobs_per_datum)


def test_gap_is_over_completion_tokens_only():
    gap = measured((0, 0), [99.0, 99.0, -1.0, -2.25], [-0.5]).gap(0)
    assert gap is not None
    assert gap.max == pytest.approx(0.25)
    assert gap.mean == pytest.approx(0.25 / 3)
    assert set(gap_metrics(gap)) == {f"logprob_gap/{name}" for name in ("mean", "max", "kl", "ess")}


def test_gap_leaves_out_what_older_weights_sampled():
    both = measured((6, 7), [99.0, 99.0, -9.0, -9.0], [-0.75])
    gap = both.gap(7)
    assert gap is not None
    assert (gap.mean, gap.max) == (0.25, 0.25)
    assert both.gap(8) is None
    assert gap_metrics(None) == {}


def test_gap_leaves_out_single_tokens_of_a_rollout_whose_weights_changed_in_flight():
    completion = make_completion((7, 8), logprobs=[-1.0, -2.0])
    completion.versions_L[:] = [6, 7]
    scored = tuple(make_scored(f"g-{i}", reward, completion=completion) for i, reward in enumerate([2.0, 0.0]))
    batch = build_batch([ScoredGroup(group_id="g", sampler="s", scored_G=scored)], MeanCentered(), 0.0)
    row = [99.0, 99.0, -5.0, -2.5]
    gap = LearnInput.of(batch).with_learner_logprobs(forward(row, row).logprobs_per_datum).gap(7)
    assert gap is not None
    assert (gap.mean, gap.max) == (0.5, 0.5)


def test_ratio_figures_are_over_tokens_of_every_version():
    figures = measured((3, 7), *OFF_POLICY).ratio_metrics()
    assert figures == pytest.approx(
        {"ratio/ess": 10**2 / (3 * (0.25 + 64 + 2.25)), "ratio/ess_sequence": 5.5**2 / (2 * (16 + 2.25))}
    )
    assert all(find_metric(name) for name in figures)


# -- the limit -------------------------------------------------------------------------------------------------------


def gap_of(mean: float) -> LogprobGap:
    return LogprobGap(mean=mean, max=2 * mean, kl=0.1, ess=0.5)


def cause(learner_dtype: str = "float32", sampler_dtype: str | None = "float32", **sampling) -> str:
    return likely_gap_cause(SamplingConfig(**sampling), learner_dtype=learner_dtype, sampler_dtype=sampler_dtype)


def test_a_gap_at_the_limit_passes_and_one_that_is_no_number_does_not():
    require_small_gap(gap_of(0.05), LogprobGapLimit(), "")
    with pytest.raises(LogprobGapError):
        require_small_gap(gap_of(float("nan")), LogprobGapLimit(), "")


def test_older_tokens_alone_stop_nothing():
    require_small_gap(None, LogprobGapLimit(), "")


def test_message_has_both_figures_the_cause_and_says_that_nothing_was_trained():
    with pytest.raises(LogprobGapError) as refused:
        require_small_gap(gap_of(0.2), LogprobGapLimit(max_mean=0.125), "Likely cause: the moon.")
    text = str(refused.value)
    assert "mean |Δ log-probability| 0.2 nats" in text
    assert "logprob_gap.max_mean allows 0.125" in text
    assert text.endswith("Likely cause: the moon. The step was not trained.")


@pytest.mark.parametrize(("name", "value"), [("top_p", 0.9), ("top_k", 40), ("min_p", 0.1)])
def test_filters_are_named_first(name: str, value: float):
    text = cause("bfloat16", **{name: value})
    assert f"rollout.sampling has {name} {value:g};" in text
    assert "correction.name tis or mis" in text
    assert "precision" not in text


@pytest.mark.parametrize(
    ("learner", "sampler"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("bfloat16", None), ("auto", "bfloat16")]
)
def test_precision_is_named_when_either_side_may_be_lower(learner: str, sampler: str | None):
    assert f"learner.dtype is {learner}, sampler.engine_args.dtype {sampler or 'unset'}" in cause(learner, sampler)


def test_otherwise_stale_caches_and_model_code():
    assert "cached under older weights" in cause()
    assert "precision" not in cause()
