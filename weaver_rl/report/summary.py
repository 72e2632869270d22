"""What a report says in words: how each run ended, its figures, settings, environment. Text in, HTML out."""

from __future__ import annotations

import html
import json
import statistics
import time
from collections.abc import Callable, Sequence
from operator import itemgetter

from weaver_rl.report.run_data import RunData, flat

_KILLED = "The run ended without saying how: its process was killed or its machine went down. --resume continues it."


def header(runs: Sequence[RunData]) -> str:
    """Names and states; of a single run also what it is and why it ended."""
    if len(runs) > 1:
        chips = "".join(
            f'<span class="run c{number}">{html.escape(run.name)} {_state(run)}</span>'
            for number, run in enumerate(runs)
        )
        only = f'<p class="under">{runs[0].steps.in_words()} only</p>' if any(run.is_part for run in runs) else ""
        return f'<h1>{len(runs)} runs</h1>{only}<p class="runs">{chips}</p>' + "".join(map(_banner, runs))
    run = runs[0]
    return f'<h1>{html.escape(run.name)}</h1>{_state(run)}<p class="under">{html.escape(_about(run))}</p>{_banner(run)}'


def tiles(run: RunData) -> str:
    """The figures of one run that people ask for first."""
    reward = run.points("reward/mean")
    speed = [value for _, value in run.points("tokens_per_s", "train")]
    shown = _accuracy_tiles(run)
    if reward:
        last = f"step {reward[-1][0]:.0f}" if run.is_part else "last step"
        shown.append((f"{reward[-1][1]:.3f}", f"mean reward, {last}", f"from {reward[0][1]:.3f}"))
    if speed:
        shown.append((f"{statistics.median(speed):,.0f}", "tokens/s, median step", ""))
    if run.lines:
        shown.append((_wall_time(run), "wall time of these steps" if run.is_part else "wall time", ""))
        num_warm = len(run.of_phase("warm_start"))
        more = f"+ {num_warm:,} of warm start" if num_warm else ""
        shown.append((_num_training(run), "training steps shown" if run.is_part else "training steps", more))
    cells = (
        f'<div class="tile"><b>{value}</b><span>{what}</span>{f"<span>{more}</span>" if more else ""}</div>'
        for value, what, more in shown
    )
    return f'<div class="tiles">{"".join(cells)}</div>' if shown else ""


def _accuracy_tiles(run: RunData) -> list[tuple[str, str, str]]:
    """The last of the steps that are shown, and where training began, or the first of them."""
    accuracy = run.points("eval/accuracy")
    if not accuracy:
        return []
    (first, start), (last, end) = accuracy[0], accuracy[-1]
    since = "before training" if first == 0 else f"at step {first:.0f}"
    if warm := run.points("eval/accuracy", "warm_start"):
        since, (_, start) = "after warm start", warm[-1]
    until = "accuracy at the end" if run.state == "finished" else "last accuracy"
    if run.is_part:
        until = f"accuracy at step {last:.0f}"
    return [(f"{end:.3f}", until, ""), (f"{start:.3f}", f"accuracy {since}", "")]


def final_figures(runs: Sequence[RunData]) -> str:
    """The last figures of several runs side by side, or those of the steps that are shown."""
    rows = [(title, [read(run) for run in runs]) for title, read in _FIGURES]
    title = f"Figures of {runs[0].steps.in_words()}" if any(run.is_part for run in runs) else "Final figures"
    return _table(title, [run.name for run in runs], [row for row in rows if any(row[1])])


def differences(runs: Sequence[RunData]) -> str:
    """Settings in which the runs differ; where they are kept apart (name, folder) is none."""
    settings = [dict(flat(run.config)) for run in runs]
    keys = dict.fromkeys(key for each in settings for key in each)
    rows = []
    for key in keys:
        values = ["–" if key not in each else json.dumps(each[key], ensure_ascii=False) for each in settings]
        if key not in ("name", "run_dir") and len(set(values)) > 1:
            rows.append((key, values))
    if not rows:
        return '<h2>Differences in configuration</h2><p class="note">None but the name and the run folder.</p>'
    return _table("Differences in configuration", [run.name for run in runs], rows)


def environment(run: RunData) -> str:
    """Where and when it ran, on which software."""
    status = run.status
    rows: list[tuple[str, list[str]]] = [("run folder", [str(run.folder.path)])]
    if status is not None:
        rows += [("host", [status.host]), ("started", [_clock(status.started_at)])]
        rows += [("ended", [_clock(status.ended_at)])] if status.ended_at else []
        rows += [("resumed", [f"{status.num_resumes}×"]), ("weights", [f"v{status.weights_version}"])]
        rows += [(package, [version]) for package, version in status.software.items()]
    return _table("Environment", [run.name], rows)


def resolved_config(run: RunData) -> str:
    """The whole configuration as the run had it."""
    for path in (run.folder.config_yaml, run.folder.config_json):
        if path.exists():
            text = html.escape(path.read_text(errors="replace"))
            title = f"Resolved configuration of {html.escape(run.name)}"
            return f"<details open><summary>{title}</summary><pre>{text}</pre></details>"
    return f'<p class="note">{html.escape(run.name)}: no configuration is in the run folder.</p>'


def duration(seconds: float) -> str:
    """Hours, minutes, seconds, the two that matter."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} m" if hours else f"{minutes} m {rest:02d} s"


def _table(title: str, heads: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in heads)
    body = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th>{"".join(f"<td>{html.escape(v)}</td>" for v in values)}</tr>'
        for name, values in rows
    )
    return (
        f'<h2>{title}</h2><div class="scroll"><table><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody>'
        "</table></div>"
    )


def _state(run: RunData) -> str:
    return f'<span class="state {run.state}">{run.state}</span>'


def _about(run: RunData) -> str:
    model = run.config.get("model")
    about = [f"{run.steps.in_words()} only"] if run.is_part else []
    about += [f"model {model['name']}"] if isinstance(model, dict) and "name" in model else []
    for key in ("advantage", "correction"):
        section = run.config.get(key)
        if isinstance(section, dict) and section.get("name") not in (None, "none"):
            about.append(str(section["name"]))
    if run.status is not None:
        about.append("started " + _clock(run.status.started_at))
        about += [f"resumed {run.status.num_resumes}×"] if run.status.num_resumes else []
    return " · ".join(about)


def _banner(run: RunData) -> str:
    reason = _KILLED if run.state == "stopped" else run.status.reason if run.status else None
    if not reason:
        return ""
    return f'<p class="banner {run.state}">{html.escape(reason)}</p>'


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _wall_time(run: RunData) -> str:
    return duration(run.lines[-1].time_s - run.began_s) if run.lines else ""


def _num_training(run: RunData) -> str:
    return f"{sum(line.is_training for line in run.lines):,}"


def _last(name: str) -> Callable[[RunData], str]:
    def read(run: RunData) -> str:
        points = run.points(name)
        return f"{points[-1][1]:.3g}" if points else ""

    return read


def _over(name: str, what: Callable[[Sequence[float]], float], form: str) -> Callable[[RunData], str]:
    def read(run: RunData) -> str:
        values = [value for _, value in run.points(name, "train")]
        return format(what(values), form) if values else ""

    return read


def _accuracy(what: Callable[[Sequence[float]], float]) -> Callable[[RunData], str]:
    """Over all phases: a policy may be at its best before it is trained."""

    def read(run: RunData) -> str:
        values = [value for _, value in run.points("eval/accuracy")]
        return f"{what(values):.3f}" if values else ""

    return read


_FIGURES: tuple[tuple[str, Callable[[RunData], str]], ...] = (
    ("state", lambda run: run.state),
    ("training steps", _num_training),
    ("wall time", _wall_time),
    ("accuracy, first measured", _accuracy(itemgetter(0))),
    ("accuracy, last", _accuracy(itemgetter(-1))),
    ("accuracy, best", _accuracy(max)),
    ("mean reward, last step", _last("reward/mean")),
    ("completion length, last step", _last("rollout/length_mean")),
    ("sampled tokens", _over("sampler/num_tokens", sum, ",.0f")),
    ("tokens/s, median step", _over("tokens_per_s", statistics.median, ",.0f")),
    ("seconds a step, median", _over("seconds/step", statistics.median, ".2f")),
    ("lag, mean", _over("lag/mean", statistics.fmean, ".2f")),
    ("log-probability gap, largest mean", _over("logprob_gap/mean", max, ".2g")),
    ("effective sample size, lowest", _over("ratio/ess", min, ".3f")),
    ("gradient norm, median", _over("grad_norm", statistics.median, ".3g")),
)
