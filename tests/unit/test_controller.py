"""The loop with named fakes: order of calls, resume, weight sync that fails, and ends that leave nothing behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import Calls, FakeLearner, FakeLongPrompts, FakePrompts, FakeRewards, FakeSamplers, FakeView, make_config

from weaver_rl.checkpoints import Checkpoints
from weaver_rl.config import RunConfig
from weaver_rl.controller import Controller, Crew, RunSummary
from weaver_rl.errors import CheckpointError, LearnerLostError, LogprobGapError, MissingRewardsError, WeightSyncError
from weaver_rl.journal import Journal
from weaver_rl.ledger import CONTROLLER, REWOUND
from weaver_rl.ledger_keeper import LedgerKeeper
from weaver_rl.metrics import METRICS, MetricsWriter, deterministic_part, find_metric, read_metrics
from weaver_rl.rollout_files import read_rollouts, recorded_steps, write_rollouts
from weaver_rl.run_folder import RunFolder
from weaver_rl.spans import SpanBuffer, buffering, drain
from weaver_rl.types import AdamParams, OptimStepOutput, Rollout
from weaver_rl.weights.probe import probe_token_ids
from weaver_rl.weights.sync import WeightSync

pytestmark = pytest.mark.unit

PROBE = probe_token_ids(12, 16)
STEP_4 = ("00000009", "00000010", "00000011")
"""Groups of the second step of reinforcement learning: two warm-start steps took six prompts, step 3 three."""


def group_of(rollout: Rollout) -> str:
    return rollout.rollout_id.rpartition("-")[0]


class Run:
    """A controller with its fakes on a folder; `calls` is what they were asked, in order, over all of them."""

    def __init__(self, path: Path, config: RunConfig | None = None, **samplers: Any) -> None:
        self.config = config or make_config()
        self.calls: Calls = []
        self.folder = RunFolder(path)
        for directory in (path, self.folder.rollouts, self.folder.checkpoints):
            directory.mkdir(exist_ok=True)
        self.learner = FakeLearner(calls=self.calls)
        self.samplers = FakeSamplers(calls=self.calls, **samplers)
        self.rewards = FakeRewards(calls=self.calls)
        self.make_prompts: Callable[[], FakePrompts] = FakePrompts
        self.view = FakeView()
        self.tasks_left: list[asyncio.Task[Any]] = []

    async def _go(self, resume: bool) -> RunSummary:
        with MetricsWriter(self.folder) as metrics, Journal(self.folder.journal) as journal:
            controller = Controller(
                config=self.config,
                crew=Crew(
                    prompts=self.make_prompts(), samplers=self.samplers, rewards=self.rewards, learner=self.learner
                ),
                sync=WeightSync(self.learner, self.samplers, PROBE, tolerance=1e-3),
                folder=self.folder,
                checkpoints=Checkpoints(self.folder.checkpoints, self.config.checkpoint.keep),
                metrics=metrics,
                journal=journal,
                view=self.view,
            )
            try:
                return await controller.run(resume=resume)
            finally:
                me = asyncio.current_task()
                self.tasks_left = [task for task in asyncio.all_tasks() if task is not me]

    def go(self, *, resume: bool = False) -> RunSummary:
        self.summary = asyncio.run(self._go(resume))
        return self.summary

    def metrics(self) -> list[tuple[int, str, dict[str, float]]]:
        lines = read_metrics(self.folder.metrics_file)
        return [(line.step, line.phase, deterministic_part(line.values)) for line in lines]

    def rollouts(self) -> list[str]:
        return [repr(record) for record in read_rollouts(self.folder.path)]

    def names(self) -> list[str]:
        return [call[0] for call in self.calls]

    def learning(self) -> list[tuple[Any, ...]]:
        """What trained the policy; probes and publications, which a resume repeats, left out."""
        return [call for call in self.calls if call[0] in ("forward_backward", "optim_step")]


def first(error: BaseException) -> BaseException:
    return first(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("whole"))
    run.go()
    return run


def test_a_whole_run_leaves_everything(whole: Run):
    metrics = whole.metrics()
    assert [(step, phase) for step, phase, _ in metrics] == [
        (1, "warm_start"),
        (2, "warm_start"),
        *((step, "train") for step in (3, 4, 5, 6)),
    ]
    assert [step for step, _, values in metrics if "eval/accuracy" in values] == [2, 4, 6]
    assert whole.view.phases == [("warm_start", 2, 0), ("train", 4, 2)]
    assert whole.view.steps == [1, 2, 3, 4, 5, 6]
    assert [step for _, step in whole.view.evaluations] == [2, 4, 6]
    assert recorded_steps(whole.folder.path) == [2, 3, 4, 5, 6]
    assert Checkpoints(whole.folder.checkpoints, 20).steps() == [1, 2, 3, 4, 5, 6]
    assert (whole.folder.policy / "theta.json").read_text() == str(whole.learner.theta)
    assert whole.names()[-1] == "save_hf"
    assert whole.tasks_left == []


def test_summary_has_both_accuracies_and_the_position(whole: Run):
    summary = whole.summary
    by_step = {step: accuracy for accuracy, step in whole.view.evaluations}
    assert (summary.accuracy_before, summary.accuracy_after) == (by_step[2], by_step[6])
    assert summary.state.step == 6
    assert summary.state.position == 2 * 3 + 4 * 3
    trained = [r for r in read_rollouts(whole.folder.path) if r.phase == "train"]
    assert summary.state.sampled_tokens == sum(len(r.scored.rollout.completion.token_ids_L) for r in trained)
    assert summary.tokens_per_s > 0


def test_every_step_samples_with_the_version_before_it(whole: Run):
    for record in read_rollouts(whole.folder.path):
        expected = record.step - 1 if record.phase == "train" else record.step
        assert set(record.scored.rollout.completion.versions_L.tolist()) == {expected}
    assert all(values["lag/max"] == 0 for _, phase, values in whole.metrics() if phase == "train")


def test_order_of_one_training_step(whole: Run):
    names = whole.names()
    start = names.index("optim_step", names.index("generate"))  # the update of step 3
    third = [name for name in names[start:] if name != "reward"]
    assert third[:8] == [
        "optim_step",
        "publish_weights",
        "load_weights",
        "forward",
        "score",
        "save_state",
        "generate",
        "forward_backward",
    ]
    loaded = None
    for call in whole.calls:
        if call[0] == "load_weights":
            loaded = call[1]
        if call[0] == "generate":
            group_id = call[1][0]
            is_eval = group_id.startswith("eval")
            assert loaded == (int(group_id.split("-")[1]) if is_eval else 2 + (int(group_id) - 6) // 3)


def test_prompts_are_taken_once_and_in_order(whole: Run):
    groups = {r.group_id: r.scored.rollout.prompt.prompt_id for r in read_rollouts(whole.folder.path)}
    trained = [prompt for group, prompt in groups.items() if not group.startswith("eval")]
    assert trained == [f"train-{index}" for index in range(6, 18)]


def test_seeds_are_all_different_within_a_run(whole: Run):
    seeds = [r.scored.rollout.seed for r in read_rollouts(whole.folder.path) if r.phase == "train"]
    assert len(seeds) == len(set(seeds)) == 4 * 3 * 4


def test_recorded_importance_weights_are_the_advantage_on_every_token(whole: Run):
    records = [r for r in read_rollouts(whole.folder.path) if r.phase == "train"]
    assert all(r.used_in_training for r in records)
    for record in records:
        assert record.importance_weights_L is not None
        completion = record.scored.rollout.completion
        assert record.importance_weights_L == pytest.approx([record.advantage] * len(completion.token_ids_L))
        # Without an advantage there is nothing to learn from it: it is left out of the forward.
        assert (record.learner_logprobs_L is None) == (record.advantage == 0)
        if record.learner_logprobs_L is not None:
            assert record.learner_logprobs_L == pytest.approx(completion.logprobs_L)


def test_seconds_of_a_step_add_up(whole: Run):
    for line in read_metrics(whole.folder.metrics_file):
        stages = [v for k, v in line.values.items() if k.startswith("seconds/") and k != "seconds/step"]
        assert sum(stages) == pytest.approx(line.values["seconds/step"], rel=1e-6)


def test_every_metric_of_the_table_is_written(tmp_path: Path):
    lines = []
    for correction in ({"name": "tis"}, {"name": "mis", "min_ratio": 0.7}):
        (tmp_path / correction["name"]).mkdir()
        config = make_config(correction=correction, logprob_gap={"max_mean": 1.0})
        # Half a nat too high from version 3 on: a ratio of 0.61, which mis masks everywhere.
        run = Run(tmp_path / correction["name"], config, lie_from_version=3)
        run.go()
        lines += read_metrics(run.folder.metrics_file)
    masked = {line.step: line.values["correction/masked_fraction"] for line in lines[-4:]}
    assert masked == {3: 0.0, 4: 1.0, 5: 1.0, 6: 1.0}
    assert [line.values["loss"] for line in lines[-3:]] == [0.0, 0.0, 0.0]
    written = {metric.name for line in lines for name in line.values if (metric := find_metric(name))}
    assert written == {metric.name for metric in METRICS}
    assert all(line.values["learner/num_microbatches"] == 1 for line in lines)


def test_dropped_prompts_are_counted_over_the_run_and_its_resume(tmp_path: Path):
    run = Run(tmp_path)
    run.make_prompts = FakeLongPrompts
    run.learner.fail_at_step = 4
    with pytest.raises(BaseException):  # noqa: B017, PT011
        run.go()
    after = Run(tmp_path)
    after.make_prompts = FakeLongPrompts
    after.go(resume=True)
    counts = {step: values.get("data/prompts_dropped") for step, _, values in after.metrics()}
    assert counts == {1: None, 2: None, 3: 3, 4: 4, 5: 5, 6: 6}


@pytest.mark.parametrize("arrival", ["reversed", "rotated"])
def test_arrival_order_changes_nothing(tmp_path: Path, whole: Run, arrival: str):
    orders = {"reversed": lambda s: s[::-1], "rotated": lambda s: s[1:] + s[:1]}
    run = Run(tmp_path, arrival=orders[arrival])
    run.rewards.delay = lambda group_id: {"0": 7, "1": 0, "2": 3}.get(group_id[-1], 1)
    run.go()
    assert run.metrics() == whole.metrics()
    assert run.rollouts() == whole.rollouts()
    assert run.learning() == whole.learning()


def test_without_a_warm_start_version_0_is_synced_and_evaluated_first(tmp_path: Path):
    run = Run(tmp_path, make_config(warm_start=None, num_steps=1))
    summary = run.go()
    assert run.names()[:5] == ["publish_weights", "load_weights", "forward", "score", "generate"]
    assert run.calls[0][1] == 0
    assert recorded_steps(tmp_path) == [0, 1]
    assert summary.accuracy_before is not None
    assert summary.accuracy_after is not None
    before, trained = run.metrics()
    assert before[:2] == (0, "train")
    assert before[2].keys() == {name for name in trained[2] if name.startswith("eval/")}
    assert before[2]["eval/accuracy"] == summary.accuracy_before


@pytest.mark.parametrize("interrupted_at", [1, 3])
def test_a_resume_keeps_the_evaluation_before_training(tmp_path: Path, interrupted_at: int):
    config = make_config(warm_start=None)
    for name in ("whole", "resumed"):
        (tmp_path / name).mkdir()
    whole = Run(tmp_path / "whole", config)
    whole.go()
    before = Run(tmp_path / "resumed", config)
    before.learner.fail_at_step = interrupted_at
    with pytest.raises(BaseException):  # noqa: B017, PT011
        before.go()
    after = Run(tmp_path / "resumed", config)
    after.go(resume=True)
    assert after.metrics() == whole.metrics()
    assert [step for step, _, _ in after.metrics()] == [0, 1, 2, 3, 4]


def test_a_learner_lost_before_the_first_checkpoint_is_evaluated_again_and_recorded_once(tmp_path: Path):
    config = make_config(warm_start=None, checkpoint={"every": 0})
    for name in ("whole", "lost"):
        (tmp_path / name).mkdir()
    whole = Run(tmp_path / "whole", config)
    whole.go()
    run = Run(tmp_path / "lost", config)
    optim_step, lost = run.learner.optim_step, [LearnerLostError("rank 0 died")]

    async def lose_once(params: AdamParams) -> OptimStepOutput:
        if lost and run.learner.steps == 1:
            raise lost.pop()
        return await optim_step(params)

    run.learner.optim_step = lose_once
    run.go()
    assert run.names().count("restart") == 1
    assert run.metrics() == whole.metrics()
    assert [step for step, _, _ in run.metrics()] == [0, 1, 2, 3, 4]


def test_a_warm_start_alone_is_a_run(tmp_path: Path):
    run = Run(tmp_path, make_config(num_steps=0))
    summary = run.go()
    assert summary.accuracy_before == summary.accuracy_after is not None
    assert run.names()[-1] == "save_hf"


# -- disagreement of the log-probabilities ---------------------------------------------------------------------------


def test_a_lying_sampler_stops_the_run_before_its_update(tmp_path: Path):
    run = Run(tmp_path, lie_from_version=4)
    with pytest.raises(LogprobGapError, match=r"mean .* 0\.5 nats"):
        run.go()
    assert run.names().count("optim_step") == 4  # steps 1 to 4; step 5 was sampled with version 4
    assert [step for step, _, _ in run.metrics()] == [1, 2, 3, 4]
    assert run.names()[-1] == "forward_backward"
    assert run.tasks_left == []
    evidence = [record for record in read_rollouts(tmp_path) if record.step == 5 and record.phase == "train"]
    assert evidence
    for record in evidence:
        if record.learner_logprobs_L is not None:
            sampler_logprobs_L = record.scored.rollout.completion.logprobs_L
            assert abs(record.learner_logprobs_L - sampler_logprobs_L) == pytest.approx(0.5, abs=1e-5)
    assert any(record.learner_logprobs_L is not None for record in evidence)


def test_gap_below_the_limit_is_measured(whole: Run):
    for _, phase, values in whole.metrics():
        if phase == "train":
            assert values["logprob_gap/max"] == 0
            assert values["logprob_gap/ess"] == 1


def test_correction_asks_the_learner_before_the_update(tmp_path: Path):
    config = make_config(correction={"name": "tis", "cap": 2.0}, logprob_gap={"max_mean": 1.0})
    run = Run(tmp_path, config, lie_from_version=2)
    run.go()
    forwards = [call[1] for call in run.calls if call[0] == "forward" and call[1] != ("probe",)]
    assert len(forwards) == 4
    trained = [r for r in read_rollouts(tmp_path) if r.phase == "train"]
    for record in trained:
        assert record.importance_weights_L == pytest.approx(record.advantage * 2.718281828**-0.5, rel=1e-5)
    assert all(v["correction/mean"] == pytest.approx(2.718281828**-0.5) for _, p, v in run.metrics() if p == "train")


# -- rewards that are missing ----------------------------------------------------------------------------------------


def test_missing_rewards_over_the_limit_stop_the_run_with_reasons(tmp_path: Path):
    run = Run(tmp_path)
    run.rewards.missing = lambda rollout: group_of(rollout) in STEP_4 and rollout.sample_index > 1
    with pytest.raises(MissingRewardsError, match=r"6 of 12 .* 25\.0%[\s\S]*6 × task raised ZeroDivisionError"):
        run.go()
    assert [step for step, _, _ in run.metrics()] == [1, 2, 3]
    assert run.names().count("optim_step") == 3
    evidence = [record for record in read_rollouts(tmp_path) if record.step == 4]
    assert sum(record.scored.reward is None for record in evidence) == 6


def test_missing_rewards_below_the_limit_are_left_out_and_counted(tmp_path: Path):
    run = Run(tmp_path)
    run.rewards.missing = lambda rollout: group_of(rollout) == STEP_4[1] and rollout.sample_index != 2
    run.go()
    values = {step: v for step, _, v in run.metrics()}[4]
    assert values["groups/dropped"] == 1
    assert values["groups/trained"] == 2
    assert values["reward/missing_fraction"] == 0.25
    dropped = [r for r in read_rollouts(tmp_path, [4]) if r.dropped]
    assert {r.dropped for r in dropped} == {"group dropped: 1 of 4 rollouts scored, 2 needed"}
    assert len(dropped) == 4
    trained = next(call for call in run.calls if call[0] == "forward_backward" and call[2][0][:8] in STEP_4)
    assert len(trained[2]) == 8


def test_a_step_without_any_group_updates_nothing(tmp_path: Path):
    run = Run(tmp_path, make_config(reward_workers={"max_missing_fraction": 1.0}))
    run.rewards.missing = lambda rollout: group_of(rollout) in STEP_4
    run.go()
    assert run.names().count("optim_step") == 5
    assert [step for step, _, _ in run.metrics()] == [1, 2, 3, 4, 5, 6]
    assert any("every group was dropped" in note for note in run.view.notes)


def test_an_evaluation_without_any_reward_is_not_an_accuracy_of_0(tmp_path: Path):
    run = Run(tmp_path)
    run.rewards.missing = lambda rollout: rollout.rollout_id.startswith("eval-000004")
    summary = run.go()
    values = {step: v for step, _, v in run.metrics()}[4]
    assert "eval/accuracy" not in values
    assert values["eval/missing_fraction"] == 1
    assert set(summary.state.accuracies) == {"2", "6"}
    assert any("accuracy was not measured" in note for note in run.view.notes)


# -- resume ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interrupted_at", "every"),
    [(1, 1), *((at, every) for at in (2, 3, 4, 5) for every in (1, 3))],  # 1 is within the warm start
)
def test_resume_equals_the_uninterrupted_run(tmp_path: Path, whole: Run, interrupted_at: int, every: int):
    config = make_config(checkpoint={"every": every, "keep": 20})
    before = Run(tmp_path, config)
    before.learner.fail_at_step = interrupted_at
    with pytest.raises(BaseException) as stopped:  # noqa: PT011 - KeyboardInterrupt, alone or in a group
        before.go()
    assert isinstance(first(stopped.value), KeyboardInterrupt)

    after = Run(tmp_path, config)
    summary = after.go(resume=True)
    assert after.metrics() == whole.metrics()
    assert after.rollouts() == whole.rollouts()
    assert after.learner.theta == whole.learner.theta
    assert summary.state.accuracies == whole.summary.state.accuracies
    assert after.learning() == whole.learning()[-len(after.learning()) :]
    # A group that was sampled but not trained is sampled again, from the same prompts.
    assert any("resumed: continues from" in note for note in after.view.notes)


def test_resume_of_a_finished_run_only_writes_the_policy_again(tmp_path: Path):
    Run(tmp_path).go()
    again = Run(tmp_path)
    before = again.metrics()
    again.go(resume=True)
    assert again.names() == ["load_state", "save_hf"]
    assert again.metrics() == before


def test_a_resume_forgets_everything_after_its_checkpoint(tmp_path: Path):
    Run(tmp_path).go()
    checkpoints = Checkpoints(RunFolder(tmp_path).checkpoints, 20)
    for step in (5, 6):
        (tmp_path / "checkpoints" / f"step_{step:06d}" / "learner.json").write_text("damaged")
    again = Run(tmp_path)
    again.learner.fail_at_step = 4
    with pytest.raises(BaseException):  # noqa: B017, PT011
        again.go(resume=True)
    assert checkpoints.steps() == [1, 2, 3, 4]
    assert recorded_steps(tmp_path) == [2, 3, 4, 5]  # 5 is what the interrupted step had sampled anew; 6 is forgotten
    assert [step for step, _, _ in again.metrics()] == [1, 2, 3, 4]


def test_a_checkpoint_comes_after_the_rollouts_of_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = Run(tmp_path)
    save_state, on_disk = run.learner.save_state, []

    def slow_write(path: Path, step: int, records: Any) -> Path:
        threading.Event().wait(0.05)
        return write_rollouts(path, step, records)

    async def look(directory: Path) -> None:
        on_disk.append(recorded_steps(tmp_path)[-1:])
        await save_state(directory)

    monkeypatch.setattr("weaver_rl.controller.write_rollouts", slow_write)
    run.learner.save_state = look
    run.go()
    assert on_disk == [[], [2], [3], [4], [5], [6]]  # the warm start samples nothing before its last step


def test_the_learner_computes_at_the_sampling_temperature_and_the_probe_at_1(tmp_path: Path):
    rollout = {"prompts_per_step": 3, "samples_per_prompt": 4, "sampling": {"max_tokens": 5, "temperature": 0.5}}
    run = Run(tmp_path, make_config(rollout=rollout, correction={"name": "tis"}))
    run.go()
    forwards = {(call[1] == ("probe",), call[-1]) for call in run.calls if call[0] == "forward"}
    assert forwards == {(True, 1.0), (False, 0.5)}
    learned = {(call[1], call[-1]) for call in run.calls if call[0] == "forward_backward"}
    assert learned == {("cross_entropy", 1.0), ("importance_sampling", 0.5)}
    assert {call[-1] for call in run.calls if call[0] == "generate"} == {0.5, 0.0}


def test_resume_syncs_before_it_samples(tmp_path: Path):
    before = Run(tmp_path)
    before.learner.fail_at_step = 4
    with pytest.raises(BaseException):  # noqa: B017, PT011
        before.go()
    after = Run(tmp_path)
    after.go(resume=True)
    assert after.names()[:6] == ["load_state", "publish_weights", "load_weights", "forward", "score", "generate"]


def test_resume_without_a_checkpoint_says_what_to_do(tmp_path: Path):
    before = Run(tmp_path)
    before.learner.fail_at_step = 0
    with pytest.raises(BaseException):  # noqa: B017, PT011
        before.go()
    with pytest.raises(CheckpointError, match=r"no usable checkpoint .*--overwrite"):
        Run(tmp_path).go(resume=True)


def test_reinforce_carries_its_baseline_over_a_resume(tmp_path: Path):
    config = make_config(advantage={"name": "reinforce", "baseline_decay": 0.5})
    (tmp_path / "a").mkdir()
    whole = Run(tmp_path / "a", config)
    expected = whole.go()
    assert expected.state.baseline is not None
    (tmp_path / "b").mkdir()
    before = Run(tmp_path / "b", config)
    before.learner.fail_at_step = 4
    with pytest.raises(BaseException):  # noqa: B017, PT011
        before.go()
    after = Run(tmp_path / "b", config)
    assert after.go(resume=True).state.baseline == expected.state.baseline
    assert after.metrics() == whole.metrics()


def test_the_first_baseline_is_not_subtracted_from_its_own_step(tmp_path: Path):
    run = Run(tmp_path, make_config(advantage={"name": "reinforce", "baseline_decay": 0.5}))
    run.go()
    records = [r for r in read_rollouts(tmp_path) if r.phase == "train"]
    assert all(r.advantage == r.scored.reward for r in records if r.step == 3)
    means = {step: values["reward/mean"] for step, phase, values in run.metrics() if phase == "train"}
    assert all(r.advantage == pytest.approx(r.scored.reward - means[3]) for r in records if r.step == 4)


# -- weight sync -----------------------------------------------------------------------------------------------------


def test_a_sampler_that_misses_one_load_is_resynced_noted_and_counted(tmp_path: Path, whole: Run):
    run = Run(tmp_path, loads_ignored={("sampler-1", 4): 1})
    run.go()
    assert [values.get("sync/resyncs", 0) for _, _, values in run.metrics()] == [0, 0, 0, 1, 0, 0]
    assert [note for note in run.view.notes if "sampler-1" in note and "v4" in note]
    assert [call for call in run.calls if call[0] == "load_weights" and call[2]] == [("load_weights", 4, "sampler-1")]
    assert run.rollouts() == whole.rollouts()


def test_a_sampler_that_never_agreed_fails_the_run_by_name(tmp_path: Path):
    run = Run(tmp_path, loads_ignored={("sampler-1", 2): 2})
    with pytest.raises(WeightSyncError, match=r"^sampler-1 does not use weights v2: .*after two loads"):
        run.go()
    assert "generate" not in run.names()


def test_a_sampler_that_stops_agreeing_is_replaced_and_nothing_of_it_is_trained(tmp_path: Path, whole: Run):
    run = Run(tmp_path, loads_ignored={("sampler-1", 4): 2})
    run.go()
    assert ("replace", "sampler-1") in run.calls
    assert any("sampler-1 did not take weights v4; replaced" in note for note in run.view.notes)
    assert run.rollouts() == whole.rollouts()
    assert run.learner.theta == whole.learner.theta


# -- ends ------------------------------------------------------------------------------------------------------------


def test_cancellation_leaves_no_task_and_closes_the_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = Run(tmp_path, make_config(checkpoint={"every": 3}), block_generate_at=3)
    may_write = threading.Event()

    def slow_write(path: Path, step: int, records: Any) -> Path:
        assert step < 3 or may_write.wait(20)
        return write_rollouts(path, step, records)

    monkeypatch.setattr("weaver_rl.controller.write_rollouts", slow_write)

    async def cancel_in_the_middle() -> None:
        task = asyncio.create_task(run._go(False))
        await asyncio.wait_for(run.samplers.blocked.wait(), 20)
        task.cancel()
        for _ in range(10):
            await asyncio.sleep(0)
        assert not task.done()  # it waits for the rollouts of step 3, which are being written
        may_write.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(cancel_in_the_middle())
    started = run.names().count("generate")
    assert run.samplers.num_streams_closed == started
    assert len(list(read_rollouts(tmp_path, [3]))) == 12


def test_a_failing_reward_pool_ends_the_run_and_its_siblings(tmp_path: Path):
    run = Run(tmp_path)

    async def score(rollouts: Any) -> Any:
        raise RuntimeError("the pool is gone")

    run.rewards.score = score
    with pytest.raises(RuntimeError, match="the pool is gone"):
        run.go()
    assert run.tasks_left == []


def test_a_run_tells_its_steps_its_stages_and_that_it_went_back(tmp_path: Path):
    with buffering(SpanBuffer()):
        run = Run(tmp_path)
        run.go()
        told = drain()
        run.go(resume=True)
        (again,) = [span for span in drain().spans if span.name == REWOUND]
    assert again.attributes["step"] == 6
    keeper = LedgerKeeper(run.folder.ledger_file)
    keeper.tell(CONTROLLER, CONTROLLER, told)
    rows = keeper.write([], is_last=True)
    lines = list(read_metrics(run.folder.metrics_file))
    assert [(row.step, row.phase) for row in rows] == [(line.step, line.phase) for line in lines]
    for row, line in zip(rows, lines, strict=True):
        assert sum(row.seconds.values()) == pytest.approx(line.values["seconds/step"], abs=1e-3)
        for state, stage in (("learner", "learn"), ("samplers", "sample"), ("sync", "sync"), ("checkpoint",) * 2):
            waited = row.seconds.get(f"wait for {state}", 0.0)
            assert waited == pytest.approx(line.values.get(f"seconds/{stage}", 0.0), abs=1e-3)
    assert rows[0].seconds["wait for learner"] > 0
    assert {"controller/prompts", "controller/write_rollouts"} <= {span.name for span in told.spans}
