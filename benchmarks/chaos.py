"""A run whose samplers, reward workers and learner ranks are killed at random, beside one that is left in peace."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.alternation import Ratio
from benchmarks.command_run import going, require_finished, train_steps
from benchmarks.kill_plan import TITLES, Kill, kill_plan
from benchmarks.quickstart import CONFIG, quickstart_config
from benchmarks.results import Aim, Row
from benchmarks.scale import Scale
from weaver_rl.audit import audit
from weaver_rl.audit_report import AuditReport

SEED = 1
MEAN_GAP_S = 20.0
CHECKPOINT_EVERY = 5
IN_PEACE_S = 300.0
DISTURBED_S = 420.0
LOOK_EVERY_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A run that finished."""

    report: AuditReport
    accuracy: float
    """Held out, at the end."""
    wall_s: float
    """Start-up and warm start included."""
    kills: Counter[str]
    num_groups: int
    """Groups that a run of its length trains."""

    @property
    def num_lost(self) -> int:
        """Groups that are neither trained nor dropped with a reason; below 0 where some are there twice."""
        return self.num_groups - self.report.num_trained - sum(self.report.dropped.values())


def measure(scale: Scale, folder: Path) -> list[Row]:
    """Rows: kills survived by kind, groups lost or repeated, steps redone, accuracy and wall time of both runs.

    Raises RuntimeError when a run failed, an audit is not clean or nothing was killed.
    """
    peace = _run(scale, folder / "in-peace", (), IN_PEACE_S)
    disturbed = _run(scale, folder / "disturbed", kill_plan(SEED, 8.0 if scale.quick else MEAN_GAP_S), DISTURBED_S)
    require_survived(disturbed)
    return rows_of(disturbed, peace)


def require_survived(disturbed: Ended) -> None:
    report = disturbed.report
    if not report.ok or disturbed.num_lost:
        raise RuntimeError(
            f"after {_counted(disturbed.kills)} killed: {disturbed.num_lost} of {disturbed.num_groups} groups lost; "
            "the audit says: " + ("; ".join(report.violations[:5]) or "clean")
        )
    if not disturbed.kills:
        raise RuntimeError("the run was over before anything was killed")


def rows_of(disturbed: Ended, peace: Ended) -> list[Row]:
    report, wrong = disturbed.report, len(disturbed.report.violations) + abs(disturbed.num_lost)
    case = (
        f"quickstart, {report.last_step - report.first_step + 1} steps, max_lag 1, checkpoint every {CHECKPOINT_EVERY}"
    )
    kills = [
        Row(benchmark="chaos", case=case, quantity=f"kills survived: {kind}", ours=disturbed.kills[kind])
        for kind in TITLES
    ]
    return [
        *kills,
        Row(
            benchmark="chaos",
            case=case,
            quantity="groups lost or repeated",
            ours=wrong,
            ratio=Ratio.of([wrong]),
            aim=Aim(kind="at most", value=0.0),
            note=f"audit clean: {report.num_trained} trained, {sum(report.dropped.values())} dropped with a reason; "
            f"{report.num_reissued} groups issued again",
        ),
        Row(
            benchmark="chaos",
            case=case,
            quantity="steps redone",
            ours=report.num_steps_redone,
            note=f"{report.num_rewinds} rewinds",
        ),
        _beside(case, "held-out accuracy at the end", disturbed.accuracy, peace.accuracy),
        _beside(case, "wall seconds, start and warm start included", disturbed.wall_s, peace.wall_s),
    ]


def _beside(case: str, quantity: str, ours: float, peace: float) -> Row:
    ratio = Ratio.of([ours / peace]) if peace else None
    return Row(
        benchmark="chaos",
        case=case,
        quantity=quantity,
        ours=ours,
        baseline=peace,
        baseline_name="undisturbed run",
        ratio=ratio,
    )


# -- one run -----------------------------------------------------------------------------------------------------------


def _run(scale: Scale, run_dir: Path, plan: Iterable[Kill], timeout_s: float) -> Ended:
    num_steps = 12 if scale.quick else 100
    overrides = [
        f"num_steps={num_steps}",
        "rollout.max_lag=1",
        # The quickstart's own 1e-3 overshoots as soon as the rewards come a step late: its accuracy then falls.
        "learner.learning_rate=3.0e-4",
        "correction={name: tis}",
        f"checkpoint.every={CHECKPOINT_EVERY}",
        "checkpoint.keep=2",
        "sampler.num_replicas=2",
        "sampler.num_cpus=0.5",
        f"sampler.num_threads={max(1, scale.num_threads // 2)}",
        f"learner.num_threads={max(1, scale.num_threads // 2)}",
        *(["warm_start.num_steps=5", "eval.every=0", "eval.num_prompts=16"] if scale.quick else []),
    ]
    started = time.monotonic()
    with going(CONFIG, run_dir, overrides) as process:
        kills = _kill(process, run_dir, plan, num_steps, started + timeout_s)
        try:
            require_finished(process, run_dir, max(0.0, started + timeout_s - time.monotonic()))
        except RuntimeError as error:
            raise RuntimeError(f"after {_counted(kills)} killed: {error}") from None
    wall_s = time.monotonic() - started
    steps = train_steps(run_dir)
    return Ended(
        report=audit(run_dir),
        accuracy=next(step["eval/accuracy"] for step in reversed(steps) if "eval/accuracy" in step),
        wall_s=wall_s,
        kills=kills,
        num_groups=num_steps * quickstart_config().rollout.prompts_per_step,
    )


def _kill(
    process: subprocess.Popen[bytes], run_dir: Path, plan: Iterable[Kill], num_steps: int, end: float
) -> Counter[str]:
    """Kills by plan from the first step of reinforcement learning until the last, or the end; returns what."""
    killed: Counter[str] = Counter()

    def goes_on(seconds: float) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        return process.poll() is None and time.monotonic() < end and len(train_steps(run_dir)) < num_steps

    for planned in plan:
        while not train_steps(run_dir) and goes_on(LOOK_EVERY_S):
            pass
        if not goes_on(planned.gap_s):
            break
        # One that was killed just now comes back under the same title.
        while not (found := _processes(process.pid, TITLES[planned.kind])) and goes_on(LOOK_EVERY_S):
            pass
        with contextlib.suppress(ProcessLookupError, IndexError):  # it ended by itself
            os.kill(planned.victim(found), signal.SIGKILL)
            killed[planned.kind] += 1
    return killed


def _processes(root: int, title: str) -> list[int]:
    """Process ids of the actors with a title among the descendants of a run."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(root).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE and " ".join(process.cmdline()).startswith(title):
                    found.append(process.pid)
    return sorted(found)


def _counted(kills: Counter[str]) -> str:
    return ", ".join(f"{number} {kind}" for kind, number in kills.items()) or "nothing"
