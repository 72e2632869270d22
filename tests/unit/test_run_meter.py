"""What a meter is told of a run: the newest step and nothing older, the ledger, samplers that come and go."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from recording_meter import RecordingMeter, series

from weaver_rl.fleet_log import FleetLog
from weaver_rl.ledger import LedgerRow
from weaver_rl.metrics import MetricsWriter
from weaver_rl.prometheus import run_metrics
from weaver_rl.run_folder import RunFolder
from weaver_rl.run_meter import FleetFigures, RunMeter

pytestmark = pytest.mark.unit


@pytest.fixture
def meter() -> RecordingMeter:
    return RecordingMeter(run_metrics(), "run")


def test_the_newest_step_is_shown(meter: RecordingMeter, tmp_path: Path):
    with MetricsWriter(RunFolder(tmp_path), sinks=[RunMeter(meter)]) as metrics:
        metrics.write(1, "train", {"loss": 0.5, "reward/task/mean": 1.0, "lag/0/fraction": 0.5, "lag/1/fraction": 0.5})
        metrics.write(2, "train", {"loss": 0.25, "reward/task/mean": 0.5, "lag/0/fraction": 1.0})
    assert meter.gauges == {
        series("weaver_rl_loss"): 0.25,
        series("weaver_rl_reward_component_mean", reward="task"): 0.5,
        series("weaver_rl_lag_fraction", lag="0"): 1.0,
        series("weaver_rl_step"): 2,
    }


def test_an_evaluation_stands_until_the_next(meter: RecordingMeter):
    run_meter = RunMeter(meter)
    run_meter.write(1, {"loss": 1.0, "eval/accuracy": 0.5})
    run_meter.write(2, {"grad_norm": 1.0})
    assert meter.gauges[series("weaver_rl_eval_accuracy")] == 0.5
    assert series("weaver_rl_loss") not in meter.gauges
    run_meter.rewound(1)
    assert meter.gauges == {series("weaver_rl_eval_accuracy"): 0.5, series("weaver_rl_step"): 1}


def test_an_evaluation_that_measured_nothing_takes_the_last_one_away(meter: RecordingMeter):
    run_meter = RunMeter(meter)
    run_meter.write(1, {"eval/accuracy": 0.5, "eval/missing_fraction": 0.0})
    run_meter.write(2, {"eval/missing_fraction": 1.0})
    assert meter.gauges == {series("weaver_rl_eval_missing_fraction"): 1.0, series("weaver_rl_step"): 2}


def test_what_was_measured_behind_a_rewind_disappears(meter: RecordingMeter):
    run_meter = RunMeter(meter)
    run_meter.write(0, {"eval/accuracy": 0.5})
    run_meter.write(1, {"loss": 1.0, "eval/num_prompts": 8, "eval/accuracy": 0.75})
    run_meter.rewound(0)
    assert meter.gauges == {series("weaver_rl_step"): 0}
    run_meter.write(1, {"loss": 1.0})
    run_meter.rewound(-1)
    assert meter.gauges == {series("weaver_rl_step"): 0}


def test_the_ledger_adds_up(meter: RecordingMeter):
    run_meter = RunMeter(meter)
    for step in (1, 2):
        seconds = {"generate": 1.5, "wait for learner": 0.5}
        run_meter.add_rows([LedgerRow(step=step, phase="train", actor="sampler 0", role="sampler", seconds=seconds)])
    of = {"actor": "sampler 0", "role": "sampler"}
    assert meter.counters == {
        series("weaver_rl_actor_seconds_total", state="generate", **of): 3.0,
        series("weaver_rl_actor_seconds_total", state="wait for learner", **of): 1.0,
    }


def test_samplers_are_shown_as_they_stand(meter: RecordingMeter):
    looked = asyncio.Event()

    def look() -> FleetFigures:
        looked.set()
        return FleetFigures(num_serving=2, num_starting=1, num_groups=7)

    async def follow() -> None:
        following = asyncio.create_task(RunMeter(meter).follow(look))
        await looked.wait()
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)

    asyncio.run(follow())
    assert sorted(meter.gauges.values()) == [1, 2, 7]


def test_losses_and_restarts_are_counted(meter: RecordingMeter):
    events = FleetLog(on_left=lambda name: None, meter=meter)
    events.sampler_joined("sampler 0")
    events.sampler_lost("sampler 0", "died", 1)
    events.group_reissued("7", "sampler 1", "died")
    events.sampler_lost("sampler 0", "no room", 0)
    events.sampler_lost("sampler 0", "no room", 0)
    events.sampler_joined("sampler 0")
    events.worker_lost("reward worker 0", "died")
    assert meter.counters == {
        series("weaver_rl_actor_losses_total", role="sampler"): 1,
        series("weaver_rl_actor_restarts_total", role="sampler"): 1,
        series("weaver_rl_groups_reissued_total"): 1,
        series("weaver_rl_actor_losses_total", role="reward"): 1,
        series("weaver_rl_actor_restarts_total", role="reward"): 1,
    }
