"""Steps trained again from stored rollouts: equal where nothing changed, different where anything did."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import (
    FakeLearner,
    FakePrompts,
    FakeRewards,
    FakeSamplers,
    FakeView,
    make_completion,
    make_config,
    make_scored,
)
from rich.console import Console

from weaver_rl.advantages import MeanCentered
from weaver_rl.batch import ScoredGroup, StepBatch, build_batch
from weaver_rl.checkpoints import Checkpoints
from weaver_rl.config import RunConfig
from weaver_rl.controller import Controller, Crew
from weaver_rl.errors import UserError
from weaver_rl.journal import FILE_NAME, Journal
from weaver_rl.metrics import MetricsWriter, read_metrics
from weaver_rl.off_policy import LearnInput
from weaver_rl.records import train_records
from weaver_rl.replay import Figure, StepReplay, print_replay, replay_steps
from weaver_rl.replay_plan import ReplayPlan, groups_of_step, plan_replay
from weaver_rl.rollout_files import RecordedRollout, read_rollouts, rollouts_file, write_rollouts
from weaver_rl.run_folder import RunFolder
from weaver_rl.weights.probe import probe_token_ids
from weaver_rl.weights.sync import WeightSync

pytestmark = pytest.mark.unit

LAST_STEP = 6


def fake_run(path: Path, config: RunConfig, rewards: FakeRewards | None = None) -> Path:
    """Runs the real controller with fakes to its end."""
    folder = RunFolder(path)
    for directory in (path, folder.rollouts, folder.checkpoints):
        directory.mkdir(exist_ok=True)
    folder.config_json.write_text(config.model_dump_json())
    learner, samplers = FakeLearner(), FakeSamplers()

    async def go() -> None:
        with MetricsWriter(folder) as metrics, Journal(path / FILE_NAME) as journal:
            await Controller(
                config=config,
                crew=Crew(prompts=FakePrompts(), samplers=samplers, rewards=rewards or FakeRewards(), learner=learner),
                sync=WeightSync(learner, samplers, probe_token_ids(12, 16), tolerance=1e-3),
                folder=folder,
                checkpoints=Checkpoints(folder.checkpoints, config.checkpoint.keep),
                metrics=metrics,
                journal=journal,
                view=FakeView(),
            ).run()

    asyncio.run(go())
    return path


def async_config(**changes: Any) -> RunConfig:
    rollout = {"prompts_per_step": 3, "samples_per_prompt": 4, "max_lag": 1, "sampling": {"max_tokens": 5}}
    learner = {"learning_rate": 0.01, "schedule": {"name": "cosine"}}
    return make_config(**{"rollout": rollout, "correction": {"name": "tis"}, "learner": learner} | changes)


CONFIGS: dict[str, Callable[[], RunConfig]] = {
    "synchronous": make_config,
    "asynchronous": async_config,
    "baseline": lambda: make_config(advantage={"name": "reinforce", "baseline_decay": 0.9}),
    "no warm start": lambda: make_config(warm_start=None, num_steps=LAST_STEP),
    "checkpoints far apart": lambda: make_config(checkpoint={"every": 3, "keep": 1}),
}


@pytest.fixture(scope="module", params=list(CONFIGS))
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_run(tmp_path_factory.mktemp("recorded") / "run", CONFIGS[request.param]())


@pytest.fixture(scope="module")
def asynchronous(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_run(tmp_path_factory.mktemp("asynchronous") / "run", async_config())


@pytest.fixture
def copied(asynchronous: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(asynchronous, tmp_path / "copy"))


def replayed(run: Path, step: int) -> tuple[ReplayPlan, list[StepReplay]]:
    plan = plan_replay(run, step)
    return plan, asyncio.run(replay_steps(plan, learner=FakeLearner(), prompts=FakePrompts()))


def printed(plan: ReplayPlan, replays: list[StepReplay]) -> tuple[int, str]:
    out = io.StringIO()
    status = print_replay(Console(file=out, width=80), plan, replays)
    return status, out.getvalue()


def files_of(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def change_rollout(run: Path, step: int, change: Callable[[RecordedRollout], RecordedRollout]) -> None:
    """Changes the first rollout of a step that was trained with an advantage."""
    records = list(read_rollouts(run, [step]))
    index = next(i for i, r in enumerate(records) if r.phase == "train" and r.advantage)
    records[index] = change(records[index])
    write_rollouts(run, step, records)


def with_reward(record: RecordedRollout, reward: float) -> RecordedRollout:
    return replace(record, scored=replace(record.scored, reward=reward))


def with_completion(record: RecordedRollout, **changes: Any) -> RecordedRollout:
    rollout = record.scored.rollout
    changed = replace(rollout, completion=replace(rollout.completion, **changes))
    return replace(record, scored=replace(record.scored, rollout=changed))


def test_every_step_replays_bit_for_bit_from_its_checkpoint_and_from_the_beginning(recorded: Path, tmp_path: Path):
    first = next(line.step for line in read_metrics(RunFolder(recorded).metrics_file) if line.is_training)
    without = Path(shutil.copytree(recorded, tmp_path / "without"))
    shutil.rmtree(RunFolder(without).checkpoints)
    for step in range(first, LAST_STEP + 1):
        for run in (recorded, without):
            plan, replays = replayed(run, step)
            assert [r.step for r in replays] == list(range(plan.start + 1, step + 1))
            assert all(r.equal for r in replays), printed(plan, replays)[1]
            assert replays[-1].loss.recorded is not None
            assert replays[-1].grad_norm.recorded is not None
        assert plan.start == 0


def test_a_replay_starts_at_the_newest_checkpoint_before_the_step(asynchronous: Path):
    assert read_lines(asynchronous)[5]["lag/max"] == 1
    plan, replays = replayed(asynchronous, 5)
    assert plan.checkpoint == RunFolder(asynchronous).checkpoints / "step_000004"
    assert [r.step for r in replays] == [5]


def test_nothing_is_written_into_the_run_folder(copied: Path):
    for name in (".writing-step_000099", "step_000005.old"):
        (RunFolder(copied).checkpoints / name).mkdir()
    before = sorted(copied.rglob("*")), files_of(copied)
    plan, replays = replayed(copied, LAST_STEP)
    printed(plan, replays)
    assert plan.start == 5
    assert (sorted(copied.rglob("*")), files_of(copied)) == before


def test_a_damaged_checkpoint_is_passed_over(copied: Path):
    (RunFolder(copied).checkpoints / "step_000004" / "learner.json").write_text("{}")
    told: list[str] = []
    plan = plan_replay(copied, 5, told.append)
    assert plan.start == 3
    assert "step_000004" in told[0]
    told_steps: list[StepReplay] = []
    work = replay_steps(plan, learner=FakeLearner(), prompts=FakePrompts(), on_step=told_steps.append)
    assert asyncio.run(work) == told_steps
    assert all(r.equal for r in told_steps)


def test_the_rebuilt_batch_is_the_one_that_was_trained(tmp_path: Path):
    def group(name: str, sampler: str, rewards: list[float | None]) -> ScoredGroup:
        scored = tuple(
            make_scored(
                f"{name}-{i:03d}",
                reward,
                index=i,
                completion=make_completion((5, 6 + i), logprobs=(-0.1 * i, -1 / 3), version=3 + i % 2),
            )
            for i, reward in enumerate(rewards)
        )
        return ScoredGroup(group_id=name, sampler=sampler, scored_G=scored)

    groups = [
        group("00000009", "sampler 1", [1.0, 0.1, 0.2]),
        group("00000007", "sampler 0", [None, None, 0.3]),
        group("00000008", "sampler 0", [0.5, None, 1 / 3]),
    ]
    batch = build_batch(groups, MeanCentered(), 0.0)
    learn_input = LearnInput.of(batch)
    answers = [np.full(4, -1 / 3, np.float32) for _ in learn_input.entries]
    write_rollouts(tmp_path, 5, train_records(batch, 5, learn_input.with_learner_logprobs(answers)))
    assert comparable(build_batch(groups_of_step(tmp_path, 5), MeanCentered(), 0.0)) == comparable(batch)


def comparable(batch: StepBatch) -> list[Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, (tuple, list)):
            return [plain(inner) for inner in value]
        return (value.dtype, value.tolist()) if isinstance(value, np.ndarray) else value

    return plain(dataclasses.asdict(batch))


def test_samples_are_put_in_order_and_evaluations_left_out(copied: Path):
    groups = groups_of_step(copied, 4)
    records = list(read_rollouts(copied, [4]))
    assert any(record.phase == "eval" for record in records)
    order = {group_id: i for i, group_id in enumerate(dict.fromkeys(r.group_id for r in records))}
    records.sort(key=lambda r: (order[r.group_id], -r.scored.rollout.sample_index))
    write_rollouts(copied, 4, records)
    assert [repr(group) for group in groups_of_step(copied, 4)] == [repr(group) for group in groups]


def test_an_altered_reward_is_a_difference_of_that_step_and_of_those_after_it(copied: Path):
    shutil.rmtree(RunFolder(copied).checkpoints)
    change_rollout(copied, 4, lambda record: with_reward(record, record.scored.reward + 0.5))
    plan, replays = replayed(copied, LAST_STEP)
    assert [r.step for r in replays if r.equal] == [1, 2, 3]
    status, text = printed(plan, replays)
    assert status == 1
    assert "different: 3 of 6 steps, step 4 first" in text
    loss = read_lines(copied)[LAST_STEP]["loss"]
    assert f"loss: recorded {loss!r}, replayed {replays[-1].loss.replayed!r}" in text


def test_an_altered_log_probability_of_the_sampler_is_a_difference(copied: Path):
    def change(record: RecordedRollout) -> RecordedRollout:
        logprobs_L = record.scored.rollout.completion.logprobs_L.copy()
        logprobs_L[0] += 3.0
        return with_completion(record, logprobs_L=logprobs_L)

    change_rollout(copied, LAST_STEP, change)
    _, replays = replayed(copied, LAST_STEP)
    assert not replays[-1].equal
    assert replays[-1].importance_weights_diff > 0.01
    assert replays[-1].learner_logprobs_diff == 0.0
    assert not replays[-1].grad_norm.equal


@pytest.mark.parametrize("name", ["learner_logprobs_L", "importance_weights_L"])
def test_an_altered_stored_outcome_is_a_difference_though_the_loss_is_equal(copied: Path, name: str):
    def change(record: RecordedRollout) -> RecordedRollout:
        values_L = getattr(record, name).copy()
        values_L[-1] += 0.25
        return replace(record, **{name: values_L})

    change_rollout(copied, LAST_STEP, change)
    plan, replays = replayed(copied, LAST_STEP)
    diffs = (replays[-1].importance_weights_diff, replays[-1].learner_logprobs_diff)
    assert diffs == ((0.25, 0.0) if name == "importance_weights_L" else (0.0, 0.25))
    assert replays[-1].loss.equal
    assert printed(plan, replays)[0] == 1


def test_a_stored_outcome_that_is_gone_or_no_number_is_a_difference(copied: Path):
    change_rollout(copied, 4, lambda record: replace(record, learner_logprobs_L=None))
    change_rollout(copied, 5, lambda record: replace(record, learner_logprobs_L=record.learner_logprobs_L * np.nan))
    shutil.rmtree(RunFolder(copied).checkpoints)
    _, replays = replayed(copied, LAST_STEP)
    assert replays[3].learner_logprobs_diff == np.inf
    assert np.isnan(replays[4].learner_logprobs_diff)
    assert [r.step for r in replays if not r.equal] == [4, 5]


def change_metrics(run: Path, step: int, before: str, after: str) -> None:
    metrics = RunFolder(run).metrics_file
    lines = metrics.read_text().splitlines(keepends=True)
    assert before in lines[step - 1]
    lines[step - 1] = lines[step - 1].replace(before, after)
    metrics.write_text("".join(lines))


def test_a_difference_before_the_step_that_was_asked_for_counts_and_is_shown(copied: Path):
    shutil.rmtree(RunFolder(copied).checkpoints)
    loss = read_lines(copied)[4]["loss"]
    change_metrics(copied, 4, f'"loss": {loss!r}', '"loss": 7.5')
    plan, replays = replayed(copied, LAST_STEP)
    assert replays[-1].equal
    status, text = printed(plan, replays)
    assert status == 1
    assert f"step 4\n  loss: recorded 7.5, replayed {loss!r}, different by" in text


def test_a_recorded_figure_of_the_update_that_does_not_come_again_is_a_difference(copied: Path):
    change_metrics(copied, LAST_STEP, '"loss":', '"correction/masked_fraction": 0.5, "loss":')
    _, replays = replayed(copied, LAST_STEP)
    assert replays[-1].differences == (Figure(name="correction/masked_fraction", recorded=0.5, replayed=None),)


@pytest.mark.parametrize("name", ["loss", "grad_norm", "reward/mean", "ratio/ess"])
def test_an_altered_recorded_metric_is_a_difference(copied: Path, name: str):
    before = read_lines(copied)[LAST_STEP][name]
    after = float(np.nextafter(before, 9))
    change_metrics(copied, LAST_STEP, f'"{name}": {before!r}', f'"{name}": {after!r}')
    plan, replays = replayed(copied, LAST_STEP)
    status, text = printed(plan, replays)
    assert status == 1
    assert f"{name}: recorded {after!r}, replayed {before!r}, different by" in text


def test_a_learner_that_moves_otherwise_is_a_difference(asynchronous: Path):
    plan = plan_replay(asynchronous, 5)
    settings = plan.config.learner.model_copy(update={"learning_rate": 0.02})
    plan = replace(plan, config=plan.config.model_copy(update={"learner": settings}))
    replays = asyncio.run(replay_steps(plan, learner=FakeLearner(), prompts=FakePrompts()))
    assert replays[-1].loss.equal
    status, text = printed(plan, replays)
    assert status == 1
    assert "its learning rate is another" in text


def test_a_gap_that_would_stop_a_run_is_reported_as_a_difference(copied: Path):
    def change(record: RecordedRollout) -> RecordedRollout:
        return with_completion(record, logprobs_L=record.scored.rollout.completion.logprobs_L - 9)

    change_rollout(copied, 3, change)
    _, replays = replayed(copied, 3)
    assert "logprob_gap/mean" in [figure.name for figure in replays[-1].differences]


def test_a_step_in_which_every_group_was_dropped_is_equal_too(tmp_path: Path):
    config = make_config(warm_start=None, num_steps=2, reward_workers={"max_missing_fraction": 1.0})
    rewards = FakeRewards(missing=lambda rollout: rollout.rollout_id < "00000003")
    plan, replays = replayed(fake_run(tmp_path / "run", config, rewards), 1)
    assert replays[-1].loss == Figure(name="loss", recorded=None, replayed=None)
    status, text = printed(plan, replays)
    assert status == 0
    assert "every group was dropped" in text


@pytest.mark.parametrize(
    ("step", "words"),
    [(2, "belongs to the warm start"), (99, "no trained step 99"), (0, "no trained step 0"), (-1, "no trained step")],
)
def test_a_step_without_rollouts_is_refused_with_what_there_is(asynchronous: Path, step: int, words: str):
    with pytest.raises(UserError, match=words) as caught:
        plan_replay(asynchronous, step)
    assert "3 to 6" in str(caught.value)


def test_the_evaluation_before_training_is_no_step_to_replay(tmp_path: Path):
    run = fake_run(tmp_path / "run", make_config(warm_start=None, num_steps=2))
    assert min(read_lines(run)) == 0
    with pytest.raises(UserError, match=r"no trained step 0; steps with rollouts that were trained: 1 to 2"):
        plan_replay(run, 0)


def test_missing_rollouts_are_named_before_anything_is_trained(copied: Path):
    rollouts_file(copied, 5).unlink()
    shutil.rmtree(RunFolder(copied).checkpoints)
    with pytest.raises(UserError, match=r"from the beginning needs the rollouts of step 5.*there are 2 to 4, 6"):
        plan_replay(copied, 6)
    assert plan_replay(copied, 4).steps == range(1, 5)


def test_a_line_missing_from_the_metrics_is_named(copied: Path):
    shutil.rmtree(RunFolder(copied).checkpoints)
    metrics = RunFolder(copied).metrics_file
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[:3] + lines[4:]))
    with pytest.raises(UserError, match="no line of step 4"):
        plan_replay(copied, 6)


def test_a_folder_without_a_run_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="holds no run"):
        plan_replay(tmp_path, 1)


def test_equal_means_every_bit():
    assert Figure(name="loss", recorded=0.1, replayed=0.1).equal
    assert not Figure(name="loss", recorded=0.0, replayed=-0.0).equal
    assert not Figure(name="loss", recorded=0.1, replayed=float(np.nextafter(0.1, 1))).equal
    assert not Figure(name="loss", recorded=None, replayed=0.0).equal
    assert not StepReplay(
        step=1,
        loss=Figure(name="loss", recorded=1.0, replayed=1.0),
        grad_norm=Figure(name="grad_norm", recorded=1.0, replayed=1.0),
        learner_logprobs_diff=float("nan"),
    ).equal


def read_lines(run: Path) -> dict[int, Any]:
    return {line.step: line.values for line in read_metrics(RunFolder(run).metrics_file)}
