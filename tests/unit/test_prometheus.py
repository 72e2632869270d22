"""Names in Prometheus: by rule from those of metrics.jsonl, each once, and none that nothing tells."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from weaver_rl.metrics import METRICS, find_metric
from weaver_rl.prometheus import LIVE, Exported, place_of, run_metrics
from weaver_rl.service.metrics_table import SERVICE_METRICS

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
TOLD = re.compile(r"weaver_rl_[a-z_]+")


@pytest.mark.parametrize(
    ("name", "exported", "labels"),
    [
        ("reward/mean", "weaver_rl_reward_mean", {}),
        ("reward/task/mean", "weaver_rl_reward_component_mean", {"reward": "task"}),
        ("reward/a/b.py:f/seconds", "weaver_rl_reward_component_seconds", {"reward": "a/b.py:f"}),
        ("reward/mean/mean", "weaver_rl_reward_component_mean", {"reward": "mean"}),
        ("lag/12/fraction", "weaver_rl_lag_fraction", {"lag": "12"}),
        ("seconds/sample", "weaver_rl_stage_seconds", {"stage": "sample"}),
        ("seconds/step", "weaver_rl_step_seconds", {}),
        ("tokens_per_s", "weaver_rl_tokens_per_second", {}),
        ("learner/tokens_per_s", "weaver_rl_learner_tokens_per_second", {}),
        ("learner/num_tokens", "weaver_rl_learner_tokens", {}),
        ("rollout/length_mean", "weaver_rl_rollout_length_mean_tokens", {}),
        ("rollout/count", "weaver_rl_rollouts", {}),
        ("sync/num_bytes", "weaver_rl_sync_bytes", {}),
        ("logprob_gap/max", "weaver_rl_logprob_gap_max_nats", {}),
        ("data/prompts_dropped", "weaver_rl_data_prompts_dropped", {}),
        ("learner/num_microbatches", "weaver_rl_learner_microbatches", {}),
    ],
)
def test_a_metric_has_its_name_by_rule(name: str, exported: str, labels: dict[str, str]):
    assert place_of(name) == (exported, labels)


@pytest.mark.parametrize("table", [run_metrics(), SERVICE_METRICS], ids=["run", "service"])
def test_a_table_is_what_prometheus_takes(table: tuple[Exported, ...]):
    names = [row.name for row in table]
    assert len(names) == len(set(names))
    for row in table:
        assert re.fullmatch(r"weaver_rl_[a-z][a-z_]*[a-z]", row.name)
        assert (row.kind == "counter") == row.name.endswith("_total")
        assert not re.search(r"_(count|sum|bucket)$", row.name), "these belong to histograms"
        assert bool(row.buckets) == (row.kind == "histogram")
        assert len(row.labels) == len(set(row.labels))
        assert "le" not in row.labels
        if row.unit == "s":
            assert re.search(r"_seconds(_total)?$", row.name)
        assert not row.known or row.kind == "counter"
        common = {row.labels[0]}
        assert all({*labels} | common == {*row.labels} and {*labels} != {*row.labels} for labels in row.known)


def test_every_metric_of_a_step_is_exported():
    assert {name for row in run_metrics() for name in row.sources} == {metric.name for metric in METRICS}
    for row in run_metrics():
        assert {place_of(name.replace("<lag>", "0"))[0] for name in row.sources} <= {row.name}
        assert all(
            (metric := find_metric(name.replace("<lag>", "0"))) and metric.unit == row.unit for name in row.sources
        )


def told() -> set[str]:
    """Every name of Prometheus that the code says when it tells a meter something."""
    found = set()
    for path in [*(ROOT / "weaver_rl").rglob("*.py"), *(ROOT / "actors").glob("*.py")]:
        for call in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(call, ast.Call)
                and isinstance(call.func, ast.Attribute)
                and call.func.attr in ("set", "add", "observe")
                and call.args
                and isinstance(call.args[0], ast.Constant)
                and isinstance(call.args[0].value, str)
                and TOLD.fullmatch(call.args[0].value)
            ):
                found.add(call.args[0].value)
    return found


def test_what_is_told_to_a_meter_is_in_a_table_and_everything_there_is_told():
    assert told() == {row.name for row in (*LIVE, *SERVICE_METRICS)}
