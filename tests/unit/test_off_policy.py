"""Importance weights, their correction per token, and the gap that stops a run."""

from __future__ import annotations

import numpy as np
import pytest
from fakes import make_completion, make_config, make_scored

from weaver_rl.advantages import LogprobGap, MeanCentered, NoCorrection, Tis
from weaver_rl.batch import ScoredGroup, build_batch
from weaver_rl.errors import LogprobGapError
from weaver_rl.losses.config import CrossEntropy, ImportanceSampling
from weaver_rl.off_policy import LearnInput, correct, gap_metrics, require_small_gap
from weaver_rl.types import ForwardOutput

pytestmark = pytest.mark.unit


def make_input() -> LearnInput:
    """Two rollouts after prompts of three and one tokens, advantages +1 and -1."""
    first = make_completion((7, 8), logprobs=[-1.0, -2.0])
    second = make_completion((9,), logprobs=[-0.5])
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
    loss = ImportanceSampling(name="importance_sampling", clip_ratio=1.6)
    metrics = corrected.importance_metrics(loss, Tis(cap=2.0))
    assert metrics["correction/mean"] == pytest.approx(4.0 / 3, rel=1e-5)
    assert metrics["correction/capped_fraction"] == pytest.approx(1 / 3)
    assert metrics["importance_weights/clipped_fraction"] == pytest.approx(1 / 3)
    assert metrics["importance_weights/abs_mean"] == pytest.approx(4.0 / 3, rel=1e-5)


def test_no_correction_changes_nothing():
    before = make_input()
    assert correct(before, forward([0.0] * 4, [0.0]), NoCorrection()) is before


def test_figures_of_uncorrected_weights():
    metrics = make_input().importance_metrics(CrossEntropy(name="cross_entropy"), NoCorrection())
    assert metrics["importance_weights/mean"] == pytest.approx(1 / 3)
    assert metrics["importance_weights/clipped_fraction"] == 0.0
    assert "correction/mean" not in metrics


def test_gap_is_over_completion_tokens_only():
    gap = make_input().with_learner_logprobs(forward([99.0, 99.0, -1.0, -2.25], [-0.5]).logprobs_per_datum).gap()
    assert gap.max == pytest.approx(0.25)
    assert gap.mean == pytest.approx(0.25 / 3)
    assert set(gap_metrics(gap)) == {f"logprob_gap/{name}" for name in ("mean", "max", "kl", "ess")}


# -- the limit -------------------------------------------------------------------------------------------------------


def gap_of(mean: float) -> LogprobGap:
    return LogprobGap(mean=mean, max=2 * mean, kl=0.1, ess=0.5)


def refusal(**changes) -> str:
    with pytest.raises(LogprobGapError) as refused:
        require_small_gap(gap_of(0.2), make_config(**changes))
    return str(refused.value)


def test_a_gap_at_the_limit_passes_and_one_that_is_no_number_does_not():
    require_small_gap(gap_of(0.05), make_config())
    with pytest.raises(LogprobGapError):
        require_small_gap(gap_of(float("nan")), make_config())


def test_message_has_both_figures_and_says_that_nothing_was_trained():
    text = refusal(logprob_gap={"max_mean": 0.125})
    assert "mean |Δ log-probability| 0.2 nats" in text
    assert "logprob_gap.max_mean allows 0.125" in text
    assert text.endswith("The step was not trained.")


@pytest.mark.parametrize(("name", "value"), [("top_p", 0.9), ("top_k", 40), ("min_p", 0.1)])
def test_filters_are_named_first(name: str, value: float):
    text = refusal(rollout={"sampling": {name: value}}, learner={"dtype": "bfloat16"})
    assert f"rollout.sampling has {name} {value:g};" in text
    assert "correction.name tis" in text
    assert "precision" not in text


@pytest.mark.parametrize(
    ("learner", "sampler"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("bfloat16", None), ("auto", "bfloat16")]
)
def test_precision_is_named_when_either_side_may_be_lower(learner: str, sampler: str | None):
    engine_args = {} if sampler is None else {"dtype": sampler}
    text = refusal(learner={"dtype": learner}, sampler={"engine_args": engine_args})
    assert f"learner.dtype is {learner}, sampler.engine_args.dtype {sampler or 'unset'}" in text


def test_otherwise_stale_caches_and_model_code():
    text = refusal(learner={"dtype": "float32"}, sampler={"engine_args": {"dtype": "float32"}})
    assert "cached under older weights" in text
    assert "precision" not in text
