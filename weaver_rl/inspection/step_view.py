"""A recorded step in the terminal: figures, groups, what was left out, where the time went. It computes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console, Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from weaver_rl.inspection.step_figures import GroupSummary, StepFigures
from weaver_rl.inspection.terminal_text import clipped, plain
from weaver_rl.ledger import LedgerRow
from weaver_rl.metrics import METRICS, MetricsLine, find_metric

MAX_GROUPS_PRINTED = 40
"""Groups of a step in the terminal; `--json` has all."""
MAX_REWARDS_PRINTED = 16


def print_step(console: Console, figures: StepFigures) -> None:
    """Prints everything that is known of a step."""
    console.print(Group(*_parts(figures)), highlight=False)


def _parts(figures: StepFigures) -> Iterator[RenderableType]:
    phase = figures.line.phase if figures.line is not None else "no metrics"
    num_rollouts = sum(len(group.rewards) for group in figures.groups)
    about = f"{phase} · {len(figures.groups)} groups, {num_rollouts} rollouts"
    yield Text.assemble((f"step {figures.step}", "bold"), f"  {about}, {figures.num_held_out} held out")
    if figures.line is not None:
        yield _rule("figures")
        yield _metrics(figures.line)
    if figures.groups:
        yield _rule("groups")
        yield from _groups(figures.groups)
        yield _rule("left out")
        yield from _left_out(figures)
    yield _rule("where the time went")
    yield _ledger(figures.ledger)


def _rule(title: str) -> Rule:
    return Rule(Text(title, "bold"), align="left", style="dim")


def _metrics(line: MetricsLine) -> Table:
    """A row for each family of metrics, in the order of METRICS."""
    families: dict[str, Text] = {}
    for name in sorted(line.values, key=_place):
        family, _, rest = name.partition("/")
        text = families.setdefault(family, Text())
        metric = find_metric(name)
        unit = f" {metric.unit}" if metric is not None and metric.unit not in ("1", "reward", "versions") else ""
        text.append(f"{plain(rest, one_line=True)} " if rest else "", "dim")
        text.append(f"{line.values[name]:.5g}").append(f"{unit}   ", "dim")
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    for family, text in families.items():
        table.add_row(Text(plain(family, one_line=True)), text)
    return table


def _place(name: str) -> tuple[int, str]:
    metric = find_metric(name)
    return (METRICS.index(metric) if metric is not None else len(METRICS)), name


def _groups(groups: Sequence[GroupSummary]) -> Iterator[RenderableType]:
    table = _table("group", "sampler", "oldest", "prompt", "mean", "rewards")
    for group in groups[:MAX_GROUPS_PRINTED]:
        scored = [reward for reward in group.rewards if reward is not None]
        version = "–" if group.oldest_version is None else f"v{group.oldest_version}"
        table.add_row(
            Text(plain(group.group_id, one_line=True)),
            Text(plain(group.sampler, one_line=True)),
            version,
            Text(clipped(group.prompt, 32)),
            f"{sum(scored) / len(scored):.3g}" if scored else "–",
            _rewards(group),
        )
    yield table
    if len(groups) > MAX_GROUPS_PRINTED:
        yield Text(f"… and {len(groups) - MAX_GROUPS_PRINTED} more groups; --json has all", "dim")


def _rewards(group: GroupSummary) -> Text:
    """In the order of the samples; blue where the advantage is above 0, red where below."""
    text = Text()
    pairs = list(zip(group.rewards, group.advantages, strict=True))
    for reward, advantage in pairs[:MAX_REWARDS_PRINTED]:
        style = "dim" if not advantage else "blue" if advantage > 0 else "red"
        text.append("missing " if reward is None else f"{reward:.3g} ", style)
    if len(pairs) > MAX_REWARDS_PRINTED:
        text.append(f"… {len(pairs)} in all", "dim")
    return text


def _left_out(figures: StepFigures) -> Iterator[RenderableType]:
    if not figures.dropped and not figures.missing:
        yield Text("nothing: every rollout has its rewards and was trained on", "dim")
    for reason, count in figures.dropped.items():
        yield Text(f"{count} × not trained on: {plain(reason)}", "yellow")
    for kind, count in figures.missing.items():
        yield Text(f"{count} × reward missing: {plain(kind)}", "yellow")


def _ledger(rows: Sequence[LedgerRow] | None) -> RenderableType:
    if rows is None:
        return Text("the run kept no idle ledger", "dim")
    if not rows:
        return Text("the idle ledger has nothing of this step", "dim")
    table = _table("actor", "seconds", "largest first; the shares add up to 100 %")
    for row in rows:
        whole = sum(row.seconds.values()) or 1.0
        text = Text()
        for state, spent in sorted(row.seconds.items(), key=lambda item: -item[1]):
            if spent >= 0.0005 * whole:
                text.append(f"{state} ", "dim").append(f"{spent / whole:.1%}   ", "dim" * state.startswith("wait"))
        table.add_row(Text(plain(row.actor, one_line=True)), f"{whole:.3g}", text)
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for column in columns:
        left = column in ("group", "sampler", "prompt", "rewards", "actor") or column.startswith("largest")
        table.add_column(column, justify="left" if left else "right")
    return table
