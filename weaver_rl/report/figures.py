"""Which charts a report has: title, unit, and the metrics in each. It knows no values and draws nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from weaver_rl.metrics import STAGES

MAX_COMPONENTS = 6
"""Components of the reward drawn beside it."""
MAX_LAGS = 8
"""Layers of the chart of lags; the last has all larger ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FigureLine:
    """One line, or one layer of a stack: the sum of its metrics."""

    label: str
    names: tuple[str, ...]
    color: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One chart over the steps of a phase.

    Example:
        Figure(title="Loss", lines=(FigureLine(label="loss", names=("loss",), color=4),))
    """

    title: str
    lines: tuple[FigureLine, ...]
    subtitle: str = ""
    unit: str = ""
    kind: Literal["lines", "stack"] = "lines"
    low: float | None = None
    """Lower end of the y axis; None: what the values need."""
    high: float | None = None
    log: bool = False


def training_figures(names: Iterable[str]) -> list[Figure]:
    """The charts of reinforcement learning that the metrics in `names` allow."""
    there = set(names)
    figures = [
        Figure(title="Reward", subtitle="mean of the step", lines=_reward_lines(there)),
        Figure(title="Held-out accuracy", subtitle="greedy", lines=_lines(2, accuracy="eval/accuracy"), low=0, high=1),
        Figure(
            title="Completion length",
            subtitle="tokens",
            lines=_lines(0, mean="rollout/length_mean", longest="rollout/length_max"),
            low=0,
        ),
        Figure(title="Lag", subtitle="share of the trained tokens, in versions", lines=_lag_lines(there), kind="stack"),
        Figure(
            title="Log-probability gap",
            subtitle="|learner − sampler| at lag 0",
            lines=_lines(0, mean="logprob_gap/mean", largest="logprob_gap/max"),
            unit="nat",
            log=True,
        ),
        Figure(
            title="Effective sample size",
            subtitle="share, ratio learner / sampler",
            lines=_lines(0, tokens="ratio/ess", rollouts="ratio/ess_sequence"),
            low=0,
            high=1,
        ),
        Figure(
            title="Clipped weights",
            subtitle="share of the trained tokens",
            lines=(
                FigureLine(label="clipped by the loss", names=("importance_weights/clipped_fraction",), color=5),
                FigureLine(label="capped", names=("correction/capped_fraction",), color=0),
                FigureLine(label="masked", names=("correction/masked_fraction",), color=1),
            ),
            low=0,
        ),
        Figure(title="Loss", lines=_lines(4, loss="loss")),
        Figure(title="Gradient norm", subtitle="before clipping", lines=_lines(3, norm="grad_norm"), low=0),
        Figure(title="Throughput", subtitle="sampled tokens per second", lines=_lines(2, tokens="tokens_per_s"), low=0),
        Figure(title="Time of a step", subtitle="seconds by stage", lines=_stage_lines(there), kind="stack", unit="s"),
    ]
    return _with_data(figures, there)


def warm_start_figures(names: Iterable[str]) -> list[Figure]:
    """The charts of the warm start."""
    figures = [
        Figure(title="Loss", lines=_lines(4, loss="loss")),
        Figure(title="Throughput", subtitle="input tokens per second", lines=_lines(2, tokens="tokens_per_s"), low=0),
    ]
    return _with_data(figures, set(names))


def _with_data(figures: Iterable[Figure], there: set[str]) -> list[Figure]:
    return [figure for figure in figures if any(there.intersection(line.names) for line in figure.lines)]


def _lines(color: int, **names: str) -> tuple[FigureLine, ...]:
    """A line per label, in colours from `color` on."""
    return tuple(
        FigureLine(label=label, names=(name,), color=color + index) for index, (label, name) in enumerate(names.items())
    )


def _reward_lines(there: set[str]) -> tuple[FigureLine, ...]:
    """The mean reward and, when there are several, its components."""
    components = sorted(n for n in there if n.startswith("reward/") and n.endswith("/mean") and n.count("/") >= 2)
    lines = _lines(0, reward="reward/mean")
    if len(components) < 2:
        return lines
    return lines + tuple(
        FigureLine(label=name.removeprefix("reward/").removesuffix("/mean"), names=(name,), color=color)
        for color, name in enumerate(components[:MAX_COMPONENTS], start=1)
    )


def _lag_lines(there: set[str]) -> tuple[FigureLine, ...]:
    """Share of the tokens by lag; nothing for runs in which every token was of lag 0."""
    lags = sorted(int(n.split("/")[1]) for n in there if n.startswith("lag/") and n.endswith("/fraction"))
    if not lags or lags[-1] == 0:
        return ()
    rest = [lag for lag in lags if lag >= MAX_LAGS - 1]
    lines = [
        FigureLine(label=str(lag), names=(f"lag/{lag}/fraction",), color=lag) for lag in lags if lag < MAX_LAGS - 1
    ]
    if rest:
        label = str(rest[0]) if len(rest) == 1 else f"{MAX_LAGS - 1} or more"
        lines.append(FigureLine(label=label, names=tuple(f"lag/{lag}/fraction" for lag in rest), color=MAX_LAGS - 1))
    return tuple(lines)


def _stage_lines(there: set[str]) -> tuple[FigureLine, ...]:
    lines = [
        FigureLine(label=stage, names=(f"seconds/{stage}",), color=color)
        for color, stage in enumerate(STAGES)
        if f"seconds/{stage}" in there
    ]
    if "seconds/other" in there:
        lines.append(FigureLine(label="other", names=("seconds/other",), color=len(STAGES)))
    return tuple(lines)
