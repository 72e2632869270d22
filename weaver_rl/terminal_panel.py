"""How the progress of a run looks, as a panel and as one line. It knows neither the run nor the screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from weaver_rl.ledger import LedgerRow, in_words, shares
from weaver_rl.metrics import STAGES

_HISTORY = 120
_SPARKS = "▁▂▃▄▅▆▇█"
_STYLES = {
    "sample": "blue",
    "score": "yellow",
    "learn": "magenta",
    "sync": "cyan",
    "wait": "bright_black",
    "eval": "green",
    "checkpoint": "red",
    "other": "white",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What has been told so far. Frozen: the thread that refreshes the panel reads it while the run replaces it."""

    phase: str = "starting"
    total_steps: int = 0
    offset: int = 0
    started_at: float = 0.0
    last_at: float = 0.0
    first_step: int | None = None
    """First step seen of the phase: after a resume not its first."""
    step: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    rewards: tuple[float, ...] = ()
    losses: tuple[float, ...] = ()
    accuracies: tuple[tuple[int, float], ...] = ()
    spent: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """The states of each role's actors in the last steps, with their shares of the time."""
    waiting: str | None = None
    waiting_since: float = 0.0

    @property
    def done(self) -> int:
        return max(0, self.step - self.offset)

    @property
    def is_last(self) -> bool:
        return self.done >= self.total_steps

    @property
    def eta_s(self) -> float | None:
        """Seconds to the end of the phase at its pace so far; None before there is one."""
        if self.first_step is None or self.total_steps == 0:
            return None
        pace_s = (self.last_at - self.started_at) / (self.step - self.first_step + 1)
        return pace_s * max(0, self.total_steps - self.done)

    def begin(self, name: str, total_steps: int, offset: int, now: float) -> Progress:
        return Progress(
            phase=name,
            total_steps=total_steps,
            offset=offset,
            step=offset,
            started_at=now,
            last_at=now,
            accuracies=self.accuracies,
            spent=self.spent,
        )

    def after_step(self, step: int, metrics: Mapping[str, float], now: float) -> Progress:
        return replace(
            self,
            step=step,
            first_step=step if self.first_step is None else self.first_step,
            last_at=now,
            metrics=dict(metrics),
            rewards=_extended(self.rewards, metrics.get("reward/mean")),
            losses=_extended(self.losses, metrics.get("loss")),
            waiting=None,
        )

    def after_evaluation(self, accuracy: float, step: int) -> Progress:
        return replace(self, accuracies=(*self.accuracies, (step, accuracy))[-_HISTORY:])

    def after_ledger(self, rows: Sequence[LedgerRow]) -> Progress:
        return replace(self, spent=shares(rows, lambda row: row.role))

    def while_waiting(self, reason: str | None, now: float) -> Progress:
        return self if reason == self.waiting else replace(self, waiting=reason, waiting_since=now)


def step_line(progress: Progress) -> str:
    """One step as one readable line; what was not measured is left out."""
    metrics = progress.metrics
    parts = [f"{progress.phase} {progress.done}/{progress.total_steps}"]
    parts += [
        f"{label} {metrics[name]:{form}}"
        for label, name, form in (
            ("reward", "reward/mean", ".3f"),
            ("accuracy", "eval/accuracy", ".3f"),
            ("loss", "loss", ".4f"),
            ("lag", "lag/mean", ".1f"),
        )
        if name in metrics
    ]
    if "tokens_per_s" in metrics:
        parts.append(f"{metrics['tokens_per_s']:,.0f} tokens/s")
    if shares := stage_shares(metrics):
        spent = " ".join(f"{stage} {share:.0%}" for stage, share in shares if share >= 0.005)
        parts.append(f"{_step_seconds(metrics):.2f} s: {spent}")
    if progress.eta_s is not None and not progress.is_last:
        parts.append(f"eta {duration(progress.eta_s)}")
    return " | ".join(parts)


def draw_panel(progress: Progress, title: str, now: float, width: int) -> RenderableType:
    """The whole panel for a console of `width` columns."""
    inner = max(20, width - 4)
    rows: list[RenderableType] = [_progress_row(progress, now), Text()]
    rows.append(_figures(progress, inner))
    if shares := stage_shares(progress.metrics):
        rows += [Text(), _stage_bar(shares, inner), _stage_legend(shares, progress.metrics, inner)]
    if progress.spent:
        rows += [Text(), _spent(progress.spent)]
    if progress.waiting is not None:
        waited = duration(now - progress.waiting_since)
        rows += [
            Text(),
            Text(f"waiting {waited}: {progress.waiting}", style="yellow", overflow="ellipsis", no_wrap=True),
        ]
    return Panel(Group(*rows), title=Text(title, style="bold"), title_align="left", border_style="bright_black")


def stage_shares(metrics: Mapping[str, float]) -> list[tuple[str, float]]:
    """Each stage's share of the step's time, in the order of STAGES, and `other` for the rest."""
    total = _step_seconds(metrics)
    if total <= 0:
        return []
    seconds = {stage: metrics[f"seconds/{stage}"] for stage in STAGES if metrics.get(f"seconds/{stage}", 0.0) > 0}
    seconds["other"] = max(0.0, total - sum(seconds.values()))
    return [(stage, value / total) for stage, value in seconds.items() if value > 0]


def sparkline(values: tuple[float, ...], width: int) -> str:
    """The values as at most `width` bars, each the mean of its share; a flat line when they are all equal."""
    if not values or width <= 0:
        return ""
    bars = min(width, len(values))
    edges = [index * len(values) // bars for index in range(bars + 1)]
    shown = [sum(values[start:end]) / (end - start) for start, end in pairwise(edges)]
    low, span = min(shown), max(shown) - min(shown)
    if span == 0:
        return _SPARKS[3] * bars
    return "".join(_SPARKS[round((value - low) / span * (len(_SPARKS) - 1))] for value in shown)


def _progress_row(progress: Progress, now: float) -> RenderableType:
    if progress.total_steps == 0:
        return Text(f"{progress.phase}  {duration(now - progress.started_at)}", style="bold")
    row = Table.grid(expand=True, padding=(0, 2, 0, 0))
    row.add_column(no_wrap=True)
    row.add_column(ratio=1)
    row.add_column(no_wrap=True, justify="right")
    eta = "" if progress.eta_s is None or progress.is_last else f" · eta {duration(progress.eta_s)}"
    bar = ProgressBar(
        total=progress.total_steps, completed=progress.done, complete_style="cyan", finished_style="green"
    )
    count = f"{progress.done}/{progress.total_steps} · {duration(now - progress.started_at)}{eta}"
    row.add_row(Text(progress.phase, style="bold"), bar, Text(count))
    return row


def _figures(progress: Progress, inner: int) -> RenderableType:
    metrics = progress.metrics
    sparks = max(0, inner // 2 - 26)
    grid = Table.grid(expand=True, padding=(0, 2, 0, 0))
    for _ in range(2):
        grid.add_column(style="bright_black", no_wrap=True, width=10)
        grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    grid.add_row(
        "reward",
        _figure(metrics.get("reward/mean"), "8.3f", sparkline(progress.rewards, sparks), "green"),
        "accuracy",
        _accuracy(progress, sparks),
    )
    lag = f"max {metrics['lag/max']:.0f}" if "lag/max" in metrics and sparks > 8 else ""
    grid.add_row(
        "loss",
        _figure(metrics.get("loss"), "8.4f", sparkline(progress.losses, sparks), "magenta"),
        "tokens/s",
        _figure(metrics.get("tokens_per_s"), "8,.0f"),
    )
    grid.add_row(
        "lag",
        _figure(metrics.get("lag/mean"), "8.1f", lag),
        "logp gap",
        _figure(metrics.get("logprob_gap/mean"), "8.4f"),
    )
    return grid


def _figure(value: float | None, form: str, trail: str = "", style: str = "") -> Text:
    if value is None:
        return Text(f"{'–':>8}", style="bright_black")
    return Text.assemble((f"{value:{form}}", "bold"), "  ", (trail, style))


def _accuracy(progress: Progress, sparks: int) -> Text:
    if not progress.accuracies:
        return Text(f"{'–':>8}", style="bright_black")
    step, last = progress.accuracies[-1]
    if len(progress.accuracies) == 1:
        return _figure(last, "8.3f", f"at step {step}" if sparks > 8 else "")
    trail = f"from {progress.accuracies[0][1]:.3f}" if sparks > 8 else ""
    return _figure(last, "8.3f", trail, "green")


def _stage_bar(shares: list[tuple[str, float]], width: int) -> Text:
    bar = Text(no_wrap=True)
    edges, reached = [0], 0.0
    for _, share in shares:
        reached += share
        edges.append(min(width, round(reached * width)))
    for (stage, _), start, end in zip(shares, edges[:-1], edges[1:], strict=True):
        bar.append("█" * (end - start), style=_STYLES[stage])
    return bar


def _stage_legend(shares: list[tuple[str, float]], metrics: Mapping[str, float], width: int) -> RenderableType:
    """The stages by name; wrapped by hand, since rich would break lines within an entry."""
    entries = [Text(f"step {_step_seconds(metrics):.2f} s", style="bold")]
    for stage, share in shares:
        if share >= 0.005:
            entries.append(Text.assemble(("■ ", _STYLES[stage]), f"{stage} {share:.0%}"))
    lines = [entries[0]]
    for entry in entries[1:]:
        if len(lines[-1]) + 2 + len(entry) <= width:
            lines[-1] = Text.assemble(lines[-1], "  ", entry)
        else:
            lines.append(entry)
    return Group(*lines)


def _spent(by_role: Mapping[str, Mapping[str, float]]) -> RenderableType:
    grid = Table.grid(expand=True, padding=(0, 2, 0, 0))
    grid.add_column(style="bright_black", no_wrap=True, width=10)
    grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    for role, states in by_role.items():
        grid.add_row(role, Text(in_words(states)))
    return grid


def _step_seconds(metrics: Mapping[str, float]) -> float:
    return max(metrics.get("seconds/step", 0.0), sum(metrics.get(f"seconds/{stage}", 0.0) for stage in STAGES))


def _extended(values: tuple[float, ...], value: float | None) -> tuple[float, ...]:
    return values if value is None else (*values, value)[-_HISTORY:]


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
