"""What an audit found, and how it is printed. It reads no journal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from rich.console import Console

MAX_PRINTED = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditReport:
    """What the audit of a run found. Figures are of the history that stands, after what rewinds undid.

    Example:
        report = audit(Path("runs/quickstart"))
        assert report.ok, report.violations
    """

    violations: tuple[str, ...]
    """Each in words for the user; at most MAX_VIOLATIONS and a last one that counts the rest."""
    state: Literal["running", "killed", "finished", "interrupted", "failed"]
    """`killed`: no process holds the run, and none said that it ended."""
    first_step: int
    """First step of reinforcement learning, counted over all phases."""
    last_step: int
    """Newest step that trained; `first_step - 1` if none did."""
    num_trained: int
    """Groups."""
    dropped: Mapping[str, int]
    """Groups that took their place in a batch and gave no data, by reason."""
    groups_by_lag: Mapping[int, int]
    """Trained groups by the lag of their oldest token, in versions."""
    num_in_flight: int
    """Groups admitted and not finished."""
    num_finished_untrained: int
    num_checkpoints: int
    num_rewinds: int
    num_steps_redone: int
    """Steps undone by rewinds, counted each time."""
    num_reissued: int
    """Times that a group went to another sampler because its own was lost."""
    num_steps_compared: int
    """Steps whose rollout file was compared with the journal."""

    @property
    def ok(self) -> bool:
        return not self.violations


def print_audit(console: Console, report: AuditReport) -> int:
    """Prints the report; returns the exit status: 0 clean, 1 violations."""
    for line in _lines(report):
        # Reasons come from users' rewards: neither markup nor lone surrogates of theirs may break the report.
        text = line.encode("utf-8", "replace").decode("utf-8")
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    return 0 if report.ok else 1


def _lines(report: AuditReport) -> Iterator[str]:
    num_dropped = sum(report.dropped.values())
    lags = ", ".join(f"{lag}: {count}" for lag, count in sorted(report.groups_by_lag.items())) or "none"
    yield f"run        {_STATES[report.state]}"
    yield f"steps      {_span(report)}; {report.num_steps_compared} compared with their rollout files"
    yield f"groups     {report.num_trained} trained, {num_dropped} dropped"
    for reason, count in Counter(report.dropped).most_common(MAX_PRINTED):
        yield f"           {count} dropped: {reason}"
    yield f"lag        groups by the lag of their oldest token: {lags}"
    yield f"pending    {report.num_in_flight} in flight, {report.num_finished_untrained} finished and not yet trained"
    yield (
        f"faults     {report.num_rewinds} rewinds ({report.num_steps_redone} steps redone), {report.num_reissued} "
        f"groups issued again; {report.num_checkpoints} checkpoints"
    )
    if report.ok:
        yield "audit      clean: every group exactly once, none skipped"
        return
    yield f"audit      {len(report.violations)} violations"
    for violation in report.violations[:MAX_PRINTED]:
        yield f"  {violation}"
    if len(report.violations) > MAX_PRINTED:
        yield f"  … and {len(report.violations) - MAX_PRINTED} more"


_STATES = {
    "running": "still running: what follows is true of what is in the journal so far",
    "killed": "not running, and no process said that it ended (killed?); continue it with --resume",
    "finished": "finished",
    "interrupted": "interrupted; continue it with --resume",
    "failed": "failed; continue it with --resume",
}


def _span(report: AuditReport) -> str:
    if report.last_step < report.first_step:
        return "none trained yet"
    return f"{report.first_step} to {report.last_step}"
