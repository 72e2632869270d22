"""The body of `weaver-rl audit`: proves from the journal that every prompt was trained exactly once, or says where not.

It replays the journal, undoes what rewinds undid, and compares what stands with the rollout files. It knows no
configuration and starts nothing. A run that goes on, or was killed, can be audited as well: what is in flight then is
no violation.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from weaver_rl.audit_history import History
from weaver_rl.audit_report import AuditReport
from weaver_rl.journal import FILE_NAME, read_events
from weaver_rl.rollout_files import recorded_steps, rollouts_file
from weaver_rl.run_folder import RunFolder

_MAX_TRIES = 3
_STEPS_NOT_YET_WRITTEN = 2
"""Of a run that has not finished: the rollouts of a step are written while the next one is sampled."""


def audit(run_dir: Path) -> AuditReport:
    """Audits one run. JournalError if there is no journal or it cannot be read."""
    journal = run_dir / FILE_NAME
    for last_try in range(_MAX_TRIES - 1, -1, -1):
        history = History()
        seq = 0
        for event in read_events(journal):
            seq = event.seq
            history.add(event)
        history.end()
        num_compared = _compare_rollouts(run_dir, history)
        # A live run that went back in the meantime has removed rollouts that this reading of the journal expects.
        if not last_try or not any(event.kind == "rewound" for event in read_events(journal, after=seq)):
            break
    return history.report(num_compared, is_claimed=RunFolder(run_dir).is_claimed())


def _compare_rollouts(run_dir: Path, history: History) -> int:
    """Compares each step with its rollout file; returns how many were."""
    recorded = set(recorded_steps(run_dir))
    is_finished, latest = history.ended == "finished", history.latest
    num_compared = 0
    for step, batch in history.steps.items():
        path = rollouts_file(run_dir, step)
        if step in recorded:
            # The newest batch of a run that was cut short need not be whole in the journal.
            if is_finished or step != latest or batch.is_whole:
                num_compared += 1
                _compare_step(path, step, history)
        elif is_finished or step <= latest - _STEPS_NOT_YET_WRITTEN:
            history.wrong(f"step {step} has no rollout file ({path.name})")
    for step in sorted(recorded - history.steps.keys()):
        # Later ones of a run that goes on, or was stopped by that step, are the evidence of a step not trained.
        if (is_finished or step <= latest) and _recorded_groups(rollouts_file(run_dir, step), step, history):
            history.wrong(f"{rollouts_file(run_dir, step).name} has groups of a step that the journal did not train")
    return num_compared


def _compare_step(path: Path, step: int, history: History) -> None:
    found = _recorded_groups(path, step, history)
    groups, batch = history.groups, history.steps[step]
    if found is None or groups is None:
        return
    size = max((num_rollouts for num_rollouts, _ in found.values()), default=0)
    expected = {groups.name(index): index for index in batch.indices}
    for name in sorted(found.keys() - expected.keys()):
        history.wrong(f"{path.name} has group {name}, which the journal did not consume at step {step}")
    for name, index in expected.items():
        num_rollouts, is_used = found.get(name, (0, False))
        if name not in found:
            history.wrong(f"{path.name} lacks group {name}, which the journal consumed at step {step}")
        elif num_rollouts != size:
            history.wrong(f"{path.name} has {num_rollouts} rollouts of group {name} and {size} of others")
        elif is_used == (index in batch.dropped):
            seen, said = ("trained", "dropped") if is_used else ("not used in training", "trained")
            history.wrong(f"{path.name} has group {name} as {seen}, the journal as {said}")


def _recorded_groups(path: Path, step: int, history: History) -> dict[str, tuple[int, bool]] | None:
    """Rollouts of each group in a file and whether any was used in training; None if it cannot be read."""
    try:
        with pq.ParquetFile(path) as file:
            table = file.read(columns=["step", "group_id", "phase", "used_in_training"])
    except (pa.ArrowException, OSError) as error:
        history.wrong(f"{path.name} cannot be read: {error}")
        return None
    table = table.filter(pc.equal(table["phase"], "train"))
    if wrong := set(table["step"].unique().to_pylist()) - {step}:
        history.wrong(f"{path.name} has rollouts of step {min(wrong)}")
    rows = table.group_by("group_id").aggregate([("used_in_training", "count"), ("used_in_training", "any")])
    columns = (rows[name].to_pylist() for name in ("group_id", "used_in_training_count", "used_in_training_any"))
    return {name: (num_rollouts, is_used) for name, num_rollouts, is_used in zip(*columns, strict=True)}
