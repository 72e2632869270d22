"""Settings that are allowed and perhaps not meant: each warning with a configuration that has it, and one without."""

from __future__ import annotations

from pathlib import Path

import pytest
from check_parts import ROOT, a_run, lines

from weaver_rl.check.settings import check_settings

pytestmark = pytest.mark.unit

GSM8K = ROOT / "configs" / "gsm8k_8gpu.yaml"


def found(*overrides: str, config: Path | None = None):
    run = a_run(*overrides, **({"config": config} if config else {}))
    return lines(check_settings(run.config))


RUNS = [path for path in sorted((ROOT / "configs").glob("*.yaml")) if not path.stem.startswith("serve")]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_our_own_configurations_have_none(path: Path):
    assert list(found(config=path)) == ["settings"]


@pytest.mark.parametrize(
    ("overrides", "subject", "words"),
    [
        (["rollout.max_lag=1", "correction={name: none}"], "rollout.max_lag", "tokens of older weights"),
        (["rollout.sampling.top_p=0.9", "correction={name: none}"], "rollout.sampling", "top_p 0.9"),
        (["rollout.sampling.top_k=5", "correction={name: none}"], "rollout.sampling", "top_k 5"),
        (
            ["learner.dtype=float32", "sampler.engine_args.dtype=bfloat16", "correction={name: none}"],
            "precision",
            "sampler.engine_args.dtype bfloat16",
        ),
        (["sampler.num_replicas=6"], "rollout.prompts_per_step", "4 groups a step for 6 samplers"),
        (
            ["rollout.samples_per_prompt=40", "sampler.engine_args={}"],
            "max_num_seqs",
            "160 completions a step for each sampler",
        ),
        (["rewards=[{name: task, weight: 0}]"], "rewards", "every weight is 0"),
        (["checkpoint.every=0"], "checkpoint.every", "0 of 9 steps"),
        (["checkpoint.every=9"], "checkpoint.every", "9 of 9 steps"),
        (["eval.every=0"], "eval.every", "before the first and after the last"),
        (["cluster.address=head:6379"], "run_dir", "runs/tiny is under the working directory"),
    ],
)
def test_each_is_named_with_what_it_does(overrides: list[str], subject: str, words: str):
    line = found(*overrides)[subject]
    assert line.level == "warn"
    assert words in line.seen
    assert line.advice
    assert subject not in found()


@pytest.mark.parametrize(
    "overrides",
    [
        ["rollout.max_lag=1"],  # tiny corrects with tis
        ["rollout.sampling.top_p=0.9"],
        ["cluster.address=head:6379", "run_dir=/shared/tiny"],
        ["cluster.address=head:6379", "run_dir=s3://bucket/tiny"],
        ["eval.every=0", "num_steps=1"],
    ],
)
def test_what_is_corrected_or_meant_is_no_warning(overrides: list[str]):
    assert list(found(*overrides)) == ["settings"]


def test_learning_rates_are_judged_for_pretrained_models_alone():
    high = found("learner.learning_rate=1e-3", config=GSM8K)["learner.learning_rate"]
    assert "0.001 for a pretrained model" in high.seen
    assert list(found("learner.learning_rate=1e-2")) == ["settings"]
    warm = found("warm_start={num_steps: 1}", config=GSM8K)["warm_start.learning_rate"]
    assert "0.001" in warm.seen
