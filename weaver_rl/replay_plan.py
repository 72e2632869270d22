"""What a replay needs of a run folder: which steps, from which checkpoint, with which rollouts. It trains nothing.

The folder is only read, because it may belong to a live run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from weaver_rl.batch import ScoredGroup
from weaver_rl.checkpoints import find_damage, load_controller_state
from weaver_rl.config import RunConfig
from weaver_rl.errors import ConfigError, UserError
from weaver_rl.metrics import MetricsLine, read_metrics
from weaver_rl.rollout_files import RecordedRollout, read_rollouts, recorded_steps
from weaver_rl.run_folder import RunFolder
from weaver_rl.run_state import RunState

_CHECKPOINT = re.compile(r"step_(\d{6,})")


def _ignore(_: str) -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayPlan:
    """Which steps are trained again, and from where.

    Example:
        plan = plan_replay(Path("runs/quickstart"), step=320)
    """

    run_dir: Path
    config: RunConfig
    start: int
    """Steps that are done where the replay starts; 0 is the beginning of the run."""
    step: int
    """The last step to replay, counted over all phases."""
    checkpoint: Path | None
    """That of step `start`; None: the replay starts at the beginning."""
    baseline: float | None
    """Running baseline of `reinforce` at `start`."""
    recorded: Mapping[int, MetricsLine]
    """What the run recorded of each step from `start + 1` to `step`."""

    @property
    def num_warm_steps(self) -> int:
        return self.config.warm_start.num_steps if self.config.warm_start else 0

    @property
    def steps(self) -> range:
        return range(self.start + 1, self.step + 1)


def plan_replay(run_dir: Path, step: int, warn: Callable[[str], None] = _ignore) -> ReplayPlan:
    """Plans the replay of a step from the newest usable checkpoint before it; `warn` is told about damaged ones.

    Raises:
        UserError: the step was not trained, belongs to the warm start, or rollouts are missing; says what there is.
    """
    folder = RunFolder(run_dir)
    config = _read_config(folder)
    lines = {line.step: line for line in read_metrics(folder.metrics_file)}
    _require_trained(run_dir, lines, step)
    checkpoint = _newest_checkpoint(folder.checkpoints, step - 1, warn)
    start, baseline = 0, None
    if checkpoint is not None:
        state = RunState.from_json(load_controller_state(checkpoint))
        start, baseline = state.step, state.baseline
    plan = ReplayPlan(
        run_dir=run_dir,
        config=config,
        start=start,
        step=step,
        checkpoint=checkpoint,
        baseline=baseline,
        recorded={number: lines[number] for number in range(start + 1, step + 1) if number in lines},
    )
    _require_whole(plan)
    return plan


def groups_of_step(run_dir: Path, step: int) -> list[ScoredGroup]:
    """The groups that a step took, in the order in which it took them."""
    return grouped(train_rows(run_dir, step))


def train_rows(run_dir: Path, step: int) -> list[RecordedRollout]:
    """The rollouts that a step took, trained or dropped, as they are stored."""
    return [record for record in read_rollouts(run_dir, [step]) if record.phase == "train"]


def grouped(records: Iterable[RecordedRollout]) -> list[ScoredGroup]:
    """Groups in order of first appearance; the order within each is that of its samples."""
    by_group: dict[str, list[RecordedRollout]] = {}
    for record in records:
        by_group.setdefault(record.group_id, []).append(record)
    groups = []
    for group_id, members in by_group.items():
        members.sort(key=lambda record: record.scored.rollout.sample_index)
        scored_G = tuple(record.scored for record in members)
        groups.append(ScoredGroup(group_id=group_id, sampler=members[0].sampler, scored_G=scored_G))
    return groups


def _read_config(folder: RunFolder) -> RunConfig:
    try:
        return RunConfig.model_validate_json(folder.config_json.read_text())
    except FileNotFoundError:
        raise UserError(f"{folder.path} holds no run: {folder.config_json.name} is not there") from None
    except ValidationError as error:
        raise ConfigError(f"{folder.config_json}: written by another version of weaver-rl: {error}") from None


def _require_trained(run_dir: Path, lines: Mapping[int, MetricsLine], step: int) -> None:
    trained = [number for number, line in lines.items() if line.is_training]
    there_is = f"steps with rollouts that were trained: {_spans(trained)}"
    if step == 0 or step not in lines:
        raise UserError(f"{run_dir} has no trained step {step}; {there_is}")
    if lines[step].phase == "warm_start":
        raise UserError(f"step {step} of {run_dir} belongs to the warm start, which has no rollouts; {there_is}")


def _require_whole(plan: ReplayPlan) -> None:
    if unrecorded := sorted(set(plan.steps) - plan.recorded.keys()):
        file = RunFolder(plan.run_dir).metrics_file
        raise UserError(f"{file} has no line of step {unrecorded[0]}: the step cannot be compared, the file is damaged")
    needed = [number for number in plan.steps if number > plan.num_warm_steps]
    there = recorded_steps(plan.run_dir)
    if missing := sorted(set(needed) - set(there)):
        since = "the beginning" if plan.checkpoint is None else plan.checkpoint.name
        raise UserError(
            f"replaying step {plan.step} from {since} needs the rollouts of step {missing[0]}, which are not in "
            f"{RunFolder(plan.run_dir).rollouts} (a live run writes them one step later); there are {_spans(there)}"
        )


def _newest_checkpoint(folder: Path, at_most: int, warn: Callable[[str], None]) -> Path | None:
    # Not by `Checkpoints`: opening those cleans up, and the folder may belong to a live run.
    found = {int(name[1]): path for path in folder.glob("step_*") if (name := _CHECKPOINT.fullmatch(path.name))}
    for step in sorted((step for step in found if step <= at_most), reverse=True):
        damage = find_damage(found[step])
        if damage is None:
            return found[step]
        warn(f"checkpoint {found[step]} is damaged ({damage}); trying the one before it")
    return None


def _spans(steps: Iterable[int]) -> str:
    """1 to 3, 7, or none."""
    spans: list[list[int]] = []
    for step in sorted(steps):
        if spans and step == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], step]
        else:
            spans.append([step])
    return ", ".join(" to ".join(map(str, span)) for span in spans) or "none"
