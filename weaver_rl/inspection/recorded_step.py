"""One recorded step of a run folder, with the running baseline it began with. It explains nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from weaver_rl.advantages import Reinforce
from weaver_rl.batch import StepBatch, build_batch
from weaver_rl.config import RunConfig
from weaver_rl.errors import ConfigError, UserError
from weaver_rl.learn_step import next_baseline
from weaver_rl.metrics import MetricsLine, read_metrics
from weaver_rl.replay_plan import grouped, plan_replay, train_rows
from weaver_rl.rollout_files import RecordedRollout, read_rollouts, recorded_steps, rollouts_file
from weaver_rl.run_folder import RunFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedStep:
    """A step as its run folder has it.

    Example:
        RecordedStep.read(Path("runs/quickstart"), 450).batch()
    """

    run_dir: Path
    config: RunConfig
    step: int
    line: MetricsLine | None
    """Its line of metrics; None where there is none."""
    rows: tuple[RecordedRollout, ...]
    """The rollouts that it took for training, in the order in which it took them."""
    held_out: tuple[RecordedRollout, ...]
    baseline: float | None
    """Running baseline of `reinforce` before the step; None for every other estimator, and where it is not known."""
    baseline_unknown: str | None = None
    """Why a baseline that the estimator needs is not known."""

    @staticmethod
    def read(run_dir: Path, step: int) -> RecordedStep:
        """Reads a step.

        Raises:
            UserError: there is no such step, or a file is damaged; says what there is.
        """
        config = read_config(run_dir)
        line = next((line for line in read_metrics(RunFolder(run_dir).metrics_file) if line.step == step), None)
        there = recorded_steps(run_dir)
        if line is None and step not in there:
            raise UserError(f"{run_dir} has no step {step}; there are {_range(run_dir, there)}")
        records = list(read_rollouts(run_dir, [step])) if step in there else []
        baseline, unknown = _baseline_before(run_dir, config, step)
        return RecordedStep(
            run_dir=run_dir,
            config=config,
            step=step,
            line=line,
            rows=tuple(record for record in records if record.phase == "train"),
            held_out=tuple(record for record in records if record.phase == "eval"),
            baseline=baseline,
            baseline_unknown=unknown,
        )

    @property
    def num_groups(self) -> int:
        return len({record.group_id for record in self.rows})

    def batch(self) -> StepBatch:
        """The batch of the step, made again from the stored rewards."""
        return build_batch(grouped(self.rows), self.config.advantage, self.baseline or 0.0)


def read_config(run_dir: Path) -> RunConfig:
    """The configuration that the run was resolved to."""
    folder = RunFolder(run_dir)
    try:
        return RunConfig.model_validate_json(folder.config_json.read_text())
    except FileNotFoundError:
        raise UserError(f"{run_dir} holds no run: {folder.config_json.name} is not there") from None
    except ValidationError as error:
        raise ConfigError(f"{folder.config_json}: written by another version of weaver-rl: {error}") from None


def step_of_rollout(run_dir: Path, rollout_id: str) -> int:
    """The step whose file has the rollout.

    Raises:
        UserError: no file has it; says what ids look like.
    """
    steps = recorded_steps(run_dir)
    guess = _guess(run_dir, rollout_id)
    example = ""
    for step in sorted(steps, key=lambda step: abs(step - guess)):
        path = rollouts_file(run_dir, step)
        try:
            ids = pq.read_table(path, columns=["rollout_id"])["rollout_id"].to_pylist()
        except (pa.ArrowInvalid, OSError, KeyError) as error:
            raise UserError(f"{path} is no file of rollouts: {error}") from error
        if rollout_id in ids:
            return step
        example = example or next(iter(ids), "")
    known = f"an id looks like {example}" if example else "none was recorded"
    raise UserError(f"{run_dir} has no rollout {rollout_id!r} in the files of {len(steps)} steps; {known}")


def _guess(run_dir: Path, rollout_id: str) -> int:
    """About where a rollout was trained, from its place in the stream of prompts: where the search begins."""
    config = read_config(run_dir)
    warm = config.warm_start.num_steps if config.warm_start else 0
    head, _, rest = rollout_id.partition("-")
    if head == "eval":
        head, _, _ = rest.partition("-")
        return int(head) if head.isdecimal() else 0
    return warm + int(head) // config.rollout.prompts_per_step + 1 if head.isdecimal() else 0


def _baseline_before(run_dir: Path, config: RunConfig, step: int) -> tuple[float | None, str | None]:
    """The running baseline, from the newest checkpoint before the step and the rewards recorded since."""
    if not isinstance(config.advantage, Reinforce) or config.advantage.baseline_decay is None:
        return None, None
    try:
        plan = plan_replay(run_dir, step)
        baseline = plan.baseline
        for earlier in range(max(plan.start, plan.num_warm_steps) + 1, step):
            batch = build_batch(grouped(train_rows(run_dir, earlier)), config.advantage, baseline or 0.0)
            baseline = next_baseline(batch, config.advantage, baseline)
    except UserError as error:
        return None, str(error)
    return baseline, None


def _range(run_dir: Path, recorded: Iterable[int]) -> str:
    steps = sorted({*recorded, *(line.step for line in read_metrics(RunFolder(run_dir).metrics_file))})
    return f"steps {steps[0]} to {steps[-1]}" if steps else "no steps"
