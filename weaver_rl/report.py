"""The report of a run as one self-contained HTML file, and its curves as SVG. It knows files, not processes."""

from __future__ import annotations

import html
import importlib.resources
import json
import math
import statistics
import string
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weaver_rl import report_charts as charts
from weaver_rl.errors import ConfigError
from weaver_rl.metrics import STAGES, MetricsLine, Phase, read_metrics
from weaver_rl.report_charts import Series, short_number
from weaver_rl.report_rollouts import rollouts_section
from weaver_rl.run_folder import RunFolder, RunStatus, write_atomically

_MAX_COMPONENTS = 5
_MAX_LAYERS = 8  # colours of the page


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """What a report is made of."""

    folder: RunFolder
    status: RunStatus | None
    state: str
    """The status's state, or `stopped` for a run that says `running` and has no process."""
    config: dict[str, Any]
    lines: tuple[MetricsLine, ...]

    @property
    def name(self) -> str:
        return str(self.config.get("name") or self.folder.path.resolve().name)

    def points(self, name: str, phase: Phase | None = None) -> list[charts.Point]:
        chosen = (line for line in self.lines if name in line.values and phase in (None, line.phase))
        return [(line.step, line.values[name]) for line in chosen]


def write_report(run_dir: Path) -> Path:
    """Writes report.html into the run folder, whatever state the run is in, and returns its path."""
    run = _read(run_dir)
    page = string.Template(_resource("report_page.html")).substitute(
        title=html.escape(run.name),
        css=_resource("report_page.css"),
        js=_resource("report_page.js"),
        header=_header(run),
        tiles=_tiles(run),
        charts=_charts(run),
        samples=rollouts_section(run_dir),
        config=_config(run),
    )
    write_atomically(run.folder.report, page.encode("utf-8", "replace"))
    return run.folder.report


def write_curve_svg(run_dir: Path, path: Path) -> None:
    """Writes the mean reward and the held-out accuracy over the steps of training as one SVG that stands alone."""
    run = _read(run_dir)
    warm_steps = max((line.step for line in run.lines if line.phase == "warm_start"), default=0)
    panels = [
        ("Mean reward", run.points("reward/mean"), 0, None),
        ("Held-out accuracy", run.points("eval/accuracy"), 2, (0.0, 1.0)),
    ]
    head, gap = 34, 20
    body = []
    for index, (title, points, color, y_range) in enumerate(panels):
        left = index * (charts.WIDTH + gap)
        body.append(f'<text class="title" x="{left + 14}" y="24">{title}</text>')
        if not points:
            body.append(f'<text x="{left + 52}" y="{head + 60}">not measured</text>')
            continue
        series = [Series(label=title, points=[(step - warm_steps, value) for step, value in points], color=color)]
        frame, ticks = charts.fit_frame(series, y_range=y_range, origin=(left, head))
        body.append(charts.axes(frame, ticks) + charts.lines(frame, series))
        body.append(f'<text x="{frame.right}" y="{frame.bottom + 36}" text-anchor="end">training step</text>')
    width, height = 2 * charts.WIDTH + gap, head + charts.HEIGHT + 20
    style = _resource("report_page.css").replace("svg text {", "text {")
    write_atomically(
        path,
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f"<style>{style}\n.title {{ font-size: 15px; font-weight: 640; fill: var(--ink); }}</style>"
        f'<rect width="100%" height="100%" rx="12" fill="var(--card)"/>{"".join(body)}</svg>\n',
    )


def _read(run_dir: Path) -> RunData:
    folder = RunFolder(run_dir)
    if not folder.holds_run():
        raise ConfigError(f"{run_dir} holds no run: neither {folder.status_file.name} nor {folder.metrics_file.name}")
    status = folder.read_status()
    state = "stopped" if status is None else status.state
    if state == "running" and not folder.is_claimed():
        state = "stopped"
    return RunData(
        folder=folder,
        status=status,
        state=state,
        config=_read_config(folder),
        lines=tuple(read_metrics(folder.metrics_file)),
    )


def _read_config(folder: RunFolder) -> dict[str, Any]:
    try:
        config = json.loads(folder.config_json.read_text())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _resource(name: str) -> str:
    return importlib.resources.files("weaver_rl").joinpath(name).read_text(encoding="utf-8")


def _header(run: RunData) -> str:
    status = run.status
    model = run.config.get("model")
    about = [f"model {model['name']}"] if isinstance(model, dict) and "name" in model else []
    if status is not None:
        about.append("started " + time.strftime("%Y-%m-%d %H:%M", time.localtime(status.started_at)))
        about += [f"resumed {status.num_resumes}×"] if status.num_resumes else []
    software = " · ".join(f"{package} {version}" for package, version in (status.software if status else {}).items())
    reason = status.reason if status else None
    if run.state == "stopped":
        reason = (
            "The run ended without saying how: its process was killed or its machine went down. --resume continues it."
        )
    banner = f'<p class="banner {run.state}">{html.escape(reason)}</p>' if reason else ""
    return (
        f'<h1>{html.escape(run.name)}</h1><span class="state {run.state}">{run.state}</span>'
        f'<p class="under">{html.escape(" · ".join(about))}</p><p class="versions">{html.escape(software)}</p>{banner}'
    )


def _tiles(run: RunData) -> str:
    accuracy = run.points("eval/accuracy")
    warm = run.points("eval/accuracy", "warm_start")
    reward = run.points("reward/mean")
    speed = [value for _, value in run.points("tokens_per_s", "train")]
    tiles = []
    if accuracy:
        start, word = (warm[-1][1], "after warm start") if warm else (accuracy[0][1], f"at step {accuracy[0][0]:.0f}")
        tiles.append(
            (f"{accuracy[-1][1]:.3f}", "accuracy at the end" if run.state == "finished" else "last accuracy", "")
        )
        tiles.append((f"{start:.3f}", f"accuracy {word}", ""))
    if reward:
        tiles.append((f"{reward[-1][1]:.3f}", "mean reward, last step", f"from {reward[0][1]:.3f}"))
    if speed:
        tiles.append((f"{statistics.median(speed):,.0f}", "tokens/s, median step", ""))
    if run.lines:
        tiles.append((_duration(run.lines[-1].time_s), "wall time", ""))
        warm_steps = sum(line.phase == "warm_start" for line in run.lines)
        more = f"+ {warm_steps} of warm start" if warm_steps else ""
        tiles.append((str(len(run.lines) - warm_steps), "training steps", more))
    cells = (
        f'<div class="tile"><b>{value}</b><span>{what}</span>{f"<span>{more}</span>" if more else ""}</div>'
        for value, what, more in tiles
    )
    return f'<div class="tiles">{"".join(cells)}</div>' if tiles else ""


def _charts(run: RunData) -> str:
    if not run.lines:
        return '<p class="empty">No step was finished, so there are no curves.</p>'
    gap = _lines(run, "train", {"mean": "logprob_gap/mean", "max": "logprob_gap/max"})
    length = _lines(run, "train", {"mean": "rollout/length_mean", "max": "rollout/length_max"})
    speed = {"tokens/s": "tokens_per_s"}
    ess = _lines(run, "train", {"of tokens": "ratio/ess", "of rollouts": "ratio/ess_sequence"})
    training = [
        _line_figure("Reward", "mean of the step", _reward_series(run)),
        _line_figure(
            "Held-out accuracy", "greedy", _lines(run, None, {"accuracy": "eval/accuracy"}, 2), y_range=(0, 1)
        ),
        _line_figure("Loss", "", _lines(run, "train", {"loss": "loss"}, 4)),
        _line_figure("Log-probability gap", "|learner − sampler|, log scale", gap, unit="nat", log=True),
        _line_figure("Completion length", "tokens", length, from_zero=True),
        _line_figure("Throughput", "tokens per second", _lines(run, "train", speed, 2), from_zero=True),
        _line_figure(
            "Gradient norm", "before clipping", _lines(run, "train", {"norm": "grad_norm"}, 3), from_zero=True
        ),
        _lag_figure([line for line in run.lines if line.phase == "train"]),
        _line_figure("Effective sample size", "share, ratio learner / sampler", ess, y_range=(0, 1)),
        _time_figure([line for line in run.lines if line.phase == "train"]),
    ]
    warm_start = [
        _line_figure("Loss", "", _lines(run, "warm_start", {"loss": "loss"}, 4)),
        _line_figure("Throughput", "tokens per second", _lines(run, "warm_start", speed, 2), from_zero=True),
    ]
    return _section("Training", training) + _section("Warm start", warm_start)


def _section(title: str, figures: Sequence[str]) -> str:
    drawn = "".join(figures)
    return f'<h2>{title}</h2><div class="charts">{drawn}</div>' if drawn else ""


def _lines(run: RunData, phase: Phase | None, names: Mapping[str, str], color: int = 0) -> list[Series]:
    """One series per label in `names`, in colours from `color` on."""
    return [
        Series(label=label, points=run.points(name, phase), color=color + index)
        for index, (label, name) in enumerate(names.items())
    ]


def _reward_series(run: RunData) -> list[Series]:
    """The mean reward and, when there are several, its components."""
    names = {name for line in run.lines for name in line.values if name.startswith("reward/") and name.count("/") >= 2}
    components = sorted(name for name in names if name.endswith("/mean"))
    series = [Series(label="reward", points=run.points("reward/mean"), color=0)]
    if len(components) > 1:
        series += [
            Series(label=name.removeprefix("reward/").removesuffix("/mean"), points=run.points(name), color=color)
            for color, name in enumerate(components[:_MAX_COMPONENTS], start=1)
        ]
    return series


def _line_figure(
    title: str,
    subtitle: str,
    series: Sequence[Series],
    *,
    unit: str = "",
    y_range: tuple[float, float] | None = None,
    from_zero: bool = False,
    log: bool = False,
) -> str:
    drawn = [one for one in series if one.points]
    if not drawn:
        return ""
    legend = [(one.label, short_number(one.points[-1][1]), one.color) for one in drawn]
    chart = charts.line_chart(drawn, unit=unit, y_range=y_range, from_zero=from_zero, log=log)
    return _figure(title, subtitle, legend, chart)


def _lag_figure(lines: Sequence[MetricsLine]) -> str:
    """Share of each step's trained tokens by lag, stacked; nothing for a run in which every token was of lag 0."""
    steps = [line for line in lines if "lag/max" in line.values]
    largest = int(max((line.values["lag/max"] for line in steps), default=0))
    if not largest:
        return ""
    layers = []
    bins = [range(lag, lag + 1) for lag in range(min(largest, _MAX_LAYERS - 2) + 1)]
    if largest >= _MAX_LAYERS - 1:
        bins.append(range(_MAX_LAYERS - 1, largest + 1))
    for color, lags in enumerate(bins):
        shares = [math.fsum(line.values.get(f"lag/{lag}/fraction", 0.0) for lag in lags) for line in steps]
        label = str(lags[0]) if len(lags) == 1 else f"{lags[0]} or more"
        points = [(float(line.step), share) for line, share in zip(steps, shares, strict=True)]
        layers.append(Series(label=label, points=points, color=color))
    legend = [(layer.label, f"{statistics.fmean(y for _, y in layer.points):.1%}", layer.color) for layer in layers]
    return _figure("Lag", "share of the trained tokens, in versions", legend, charts.stacked_chart(layers))


def _time_figure(lines: Sequence[MetricsLine]) -> str:
    """Seconds of each step by stage, stacked; the legend has the share of all steps."""
    timed = [line for line in lines if "seconds/step" in line.values]
    names = [stage for stage in STAGES if any(line.values.get(f"seconds/{stage}", 0) > 0 for line in timed)]
    if not timed or not names:
        return ""
    layers = [
        Series(
            label=stage,
            points=[(line.step, line.values.get(f"seconds/{stage}", 0.0)) for line in timed],
            color=STAGES.index(stage),
        )
        for stage in names
    ]
    spent = [sum(layer.points[index][1] for layer in layers) for index in range(len(timed))]
    rest = [max(0.0, line.values["seconds/step"] - known) for line, known in zip(timed, spent, strict=True)]
    steps = [float(line.step) for line in timed]
    layers.append(Series(label="other", points=list(zip(steps, rest, strict=True)), color=7))
    total = sum(spent) + sum(rest) or 1.0
    legend = [(layer.label, f"{sum(y for _, y in layer.points) / total:.1%}", layer.color) for layer in layers]
    chart = charts.stacked_chart(layers, unit="s")
    return _figure("Where the time goes", "seconds per step", legend, chart)


def _figure(title: str, subtitle: str, legend: Sequence[tuple[str, str, int]], chart: charts.Chart) -> str:
    entries = "".join(
        f'<span class="c{color}">{html.escape(label)}<em>{value}</em></span>' for label, value, color in legend
    )
    return (
        f"<figure data-chart><figcaption><b>{title}</b><i>{subtitle}</i>"
        f'<div class="legend">{entries}</div></figcaption>{chart.svg}'
        f'<script type="application/json">{chart.hover}</script></figure>'
    )


def _config(run: RunData) -> str:
    for path in (run.folder.config_yaml, run.folder.config_json):
        if path.exists():
            text = html.escape(path.read_text(errors="replace"))
            return f"<details><summary>Resolved configuration</summary><pre>{text}</pre></details>"
    return ""


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} m" if hours else f"{minutes} m {rest:02d} s"
