"""`weaver-rl plan` on recorded runs whose truth is known: it finds the costs, and foresees what other set-ups do."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
from plan_runs import ENGINE, LEARNER, planned_config, record, world
from rich.console import Console
from typer.testing import CliRunner

from weaver_rl.cli import app
from weaver_rl.errors import UserError
from weaver_rl.plan.costs import LearnerCosts, fit_costs
from weaver_rl.plan.machine import Machine
from weaver_rl.plan.simulated_crew import KeptMetrics
from weaver_rl.plan.simulation import SetUp, World, _prediction, simulate
from weaver_rl.plan.sweep import MOST_SAMPLERS, Plan, Question, make_plan
from weaver_rl.plan.table import print_plan, to_json
from weaver_rl.plan.trace import read_trace
from weaver_rl.run_folder import RunFolder

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module", autouse=True)
def no_fsync():
    """What must survive a loss of power is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda file: None)
        yield


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A synchronous run in which sampling takes most of the time."""
    found = world(planned_config(tmp_path_factory.mktemp("plan") / "run"))
    record(found)
    return found


def planned(truth: World, *, steps: int = 12, **question) -> Plan:
    asked = {"samplers": (1,), "ranks": (1,), "max_lags": (0,)} | question
    return make_plan(truth.config, read_trace(truth.config.folder), Question(num_steps=steps, **asked))


def true_seconds(truth: World, set_up: SetUp) -> float:
    return simulate(truth, set_up).step_seconds


def at(plan: Plan, num_samplers: int, num_ranks: int = 1, max_lag: int = 0):
    set_up = SetUp(num_samplers=num_samplers, num_ranks=num_ranks, max_lag=max_lag)
    return next(found for found in plan.tried if found.set_up == set_up)


def test_costs_are_found_again(truth: World):
    costs = fit_costs(read_trace(truth.config.folder), Machine.of(truth.config, None))
    assert costs.engine.per_step == pytest.approx(ENGINE.per_step, rel=0.05)
    assert costs.engine.per_token == pytest.approx(ENGINE.per_token, rel=0.1)
    assert costs.learner.fixed == pytest.approx(LEARNER.fixed, rel=0.05)
    assert costs.learner.per_token == pytest.approx(LEARNER.per_token, rel=0.05)
    calls = costs.reward.measured.values()
    assert sum(calls) / len(calls) == pytest.approx(5e-3, rel=0.1)
    assert all(pace.sampler == pytest.approx(1, abs=0.1) for pace in costs.paces.values())


@pytest.mark.parametrize("max_lag", [0, 1, 2])
@pytest.mark.parametrize("cores", [None, 2])
def test_recorded_set_up_is_met(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_lag: int, cores: int | None):
    monkeypatch.setattr("os.cpu_count", lambda: cores or 64)
    rollout = {"prompts_per_step": 8, "samples_per_prompt": 4, "max_lag": max_lag, "sampling": {"max_tokens": 96}}
    found = world(planned_config(tmp_path / "run", rollout=rollout), cores=cores)
    record(found)
    plan = planned(found, max_lags=(max_lag,))
    assert abs(plan.error) < 0.08
    assert abs(plan.tokens_error) < 0.1
    assert plan.predicted.lag_mean == pytest.approx(plan.measured.lag_mean, abs=0.2)
    assert plan.is_trusted


def test_other_set_ups_are_foreseen(truth: World):
    plan = planned(truth, samplers=(2,), max_lags=(0, 1))
    for found in plan.tried:
        assert found.step_seconds == pytest.approx(true_seconds(truth, found.set_up), rel=0.08), found.set_up


def test_rows_of_ranks_are_foreseen(truth: World):
    plan = planned(truth, ranks=(1, 2, 4))
    one, two, four = (at(plan, 1, ranks).stage_seconds["learn"] for ranks in (1, 2, 4))
    assert one - LEARNER.fixed == pytest.approx(1.8 * (two - LEARNER.fixed), rel=0.1)
    assert two - LEARNER.fixed == pytest.approx(1.8 * (four - LEARNER.fixed), rel=0.1)


def test_a_second_sampler_halves_sampling_where_tokens_cost(tmp_path: Path):
    per_token = dataclasses.replace(ENGINE, per_wave=0.0, per_step=1e-5, per_token=1e-3)
    cheap = LearnerCosts(fixed=1e-3, per_token=1e-7, num_ranks=1)
    found = world(planned_config(tmp_path / "run"), engine=per_token, learner=cheap)
    record(found)
    plan = planned(found, samplers=(1, 2))
    # Not quite: a longest completion is not shared out, and groups are not all alike.
    assert 0.5 < at(plan, 2).stage_seconds["sample"] / at(plan, 1).stage_seconds["sample"] < 0.68


def test_a_second_sampler_is_no_use_where_steps_cost(tmp_path: Path):
    per_step = dataclasses.replace(ENGINE, per_step=1e-2, per_token=1e-7)
    found = world(planned_config(tmp_path / "run"), engine=per_step)
    record(found)
    plan = planned(found, samplers=(1, 2))
    assert at(plan, 2).step_seconds == pytest.approx(at(plan, 1).step_seconds, rel=0.05)
    assert plan.best is not None
    assert plan.best.set_up.num_samplers == 1


@pytest.mark.parametrize(
    ("per_token", "learner", "best"),
    [
        (2e-3, LearnerCosts(fixed=1e-3, per_token=1e-6, num_ranks=1), SetUp(num_samplers=3, num_ranks=1, max_lag=0)),
        (1e-6, LearnerCosts(fixed=1e-3, per_token=5e-3, num_ranks=1), SetUp(num_samplers=1, num_ranks=3, max_lag=0)),
    ],
)
def test_best_split_of_four(tmp_path: Path, per_token: float, learner: LearnerCosts, best: SetUp):
    engine = dataclasses.replace(ENGINE, per_wave=0.0, per_step=1e-5, per_token=per_token)
    found = world(planned_config(tmp_path / "run"), engine=engine, learner=learner)
    record(found)
    plan = planned(found, samplers=(1, 2, 3), ranks=(1, 2, 3), gpus=4, steps=8)
    assert plan.best is not None
    assert plan.best.set_up == best
    assert all(plan.actors(p.set_up) <= 4 for p in plan.tried)


def test_lag_hides_the_shorter_side(truth: World):
    plan = planned(truth, max_lags=(0, 1))
    now, ahead = at(plan, 1), at(plan, 1, max_lag=1)
    assert ahead.step_seconds < now.step_seconds
    assert ahead.idle["samplers"] < now.idle["samplers"]
    assert now.lag_mean == 0 < ahead.lag_mean <= 1


def test_the_evaluation_before_training_is_no_step_of_a_simulation(truth: World):
    metrics = KeptMetrics()
    metrics.write(0, "train", {"eval/accuracy": 0.5})
    for step in (1, 2, 3, 4):
        metrics.write(step, "train", {"seconds/step": 1.0, "sampler/num_tokens": 10.0**step})
    set_up = SetUp(num_samplers=1, num_ranks=1, max_lag=0)  # of which one step leads in
    found = _prediction(dataclasses.replace(truth, num_steps=2), truth.config, metrics, set_up, {})
    assert found.tokens_per_s * found.step_seconds == pytest.approx((10**2 + 10**3) / 2)


def test_same_seed_same_plan(truth: World):
    first, second, other = (to_json(planned(truth, seed=seed)) for seed in (3, 3, 4))
    assert first == second
    assert first["predicted"] != other["predicted"]


# -- what it refuses -----------------------------------------------------------------------------------------------


def test_a_run_that_goes_on_will_do(tmp_path: Path):
    found = world(planned_config(tmp_path / "run"))
    record(found, stop_after=12)
    plan = planned(found)
    assert len(plan.trace.steps) == 10
    assert plan.is_trusted


def test_a_run_of_few_steps_says_how_many_are_needed(tmp_path: Path):
    found = world(planned_config(tmp_path / "run"))
    record(found, stop_after=4)
    with pytest.raises(UserError, match=r"has 4 steps of reinforcement learning \(running\); a plan needs 7"):
        read_trace(found.config.folder)


def test_no_run_folder(tmp_path: Path):
    with pytest.raises(UserError, match=r"is not the folder of a run: it has no config\.json"):
        read_trace(tmp_path)


def test_missing_rollouts_are_named(tmp_path: Path):
    found = world(planned_config(tmp_path / "run"))
    folder = RunFolder(record(found))
    (folder.rollouts / "step_000009.parquet").unlink()
    with pytest.raises(UserError, match=r"step_000009\.parquet is missing; a plan needs the rollouts"):
        read_trace(folder.path)


def test_differences_that_matter_are_named(truth: World):
    changes = {
        "model": {"name": "scratch", "hidden_size": 512},
        "sampler": {"engine_args": {"dtype": "bfloat16", "max_num_seqs": 7}},
        "num_steps": 99,
        "rollout": truth.config.rollout.model_dump() | {"max_lag": 2},
    }
    other = planned_config(Path("elsewhere"), **changes)
    with pytest.raises(UserError) as caught:
        make_plan(other, read_trace(truth.config.folder), Question())
    message = str(caught.value)
    assert "model: recorded hidden_size=256, planned hidden_size=512" in message
    assert "sampler.engine_args: recorded dtype=None, planned dtype='bfloat16'" in message
    assert all(harmless not in message for harmless in ("num_steps", "max_lag", "run_dir", "max_num_seqs"))


def test_cpus_of_a_gpu_run_are_refused(truth: World):
    with pytest.raises(UserError, match="--cpus was given, and the trace is of a run on GPUs"):
        planned(truth, cpus=4)


def test_too_few_gpus(truth: World):
    with pytest.raises(UserError, match="nothing fits: 2 GPUs"):
        planned(truth, samplers=(2,), gpus=2)


def test_many_gpus_are_no_simulation_without_end(truth: World, monkeypatch: pytest.MonkeyPatch):
    tried = []

    def note(world: World, set_up: SetUp):
        tried.append(set_up.num_samplers)
        return simulate(world, dataclasses.replace(set_up, num_samplers=1))

    monkeypatch.setattr("weaver_rl.plan.sweep.simulate", note)
    planned(truth, samplers=(), gpus=20_000, steps=8)
    assert max(tried) == MOST_SAMPLERS


# -- what it says --------------------------------------------------------------------------------------------------


def printed(plan: Plan) -> str:
    out = io.StringIO()
    print_plan(Console(file=out, width=100), plan)
    return " ".join(out.getvalue().split())


def test_measured_and_predicted_stand_side_by_side(truth: World):
    plan = planned(truth, samplers=(1, 2))
    text = printed(plan)
    measured, predicted = plan.measured.step_seconds, plan.predicted.step_seconds
    assert f"measured {measured:.2f} s a step, predicted {predicted:.2f}:" in text
    assert "WARNING" not in text
    assert "assumed: - completions are as long" in text


def test_a_prediction_that_is_off_is_said_loudly(truth: World):
    plan = planned(truth)
    wrong = dataclasses.replace(plan.measured, step_seconds=plan.measured.step_seconds * 1.3)
    text = printed(dataclasses.replace(plan, measured=wrong))
    assert "WARNING: the prediction for the recorded set-up is off by more than 15%" in text


def test_command(truth: World, tmp_path: Path):
    config = tmp_path / "config.yaml"
    config.write_text(truth.config.model_dump_json())  # JSON is YAML
    arguments = ["plan", str(config), "--trace", str(truth.config.folder), "--samplers", "1,2", "--ranks", "1"]
    ended = CliRunner().invoke(app, [*arguments, "--max-lag", "0", "--steps", "8", "--json"])
    assert ended.exit_code == 0, ended.output
    found = json.loads(ended.stdout)
    assert [row["set_up"]["num_samplers"] for row in found["tried"]] == [1, 2]
    assert found["is_trusted"]


def test_command_refuses_what_are_no_numbers(truth: World, tmp_path: Path):
    config = tmp_path / "config.yaml"
    config.write_text(truth.config.model_dump_json())
    arguments = ["plan", str(config), "--trace", str(truth.config.folder)]
    for samplers, words in (("1,two", "from 1 on"), ("100000", "from 1 on, at most 1024")):
        ended = CliRunner().invoke(app, [*arguments, "--samplers", samplers])
        assert isinstance(ended.exception, UserError)
        assert f"--samplers is '{samplers}'; write numbers {words}" in str(ended.exception)
    assert CliRunner().invoke(app, [*arguments, "--seed", "-1"]).exit_code == 2
