"""The page itself: one HTML file that asks nobody for anything. It puts together what the other files of this package
make.

The page runs its own script and no other: the policy in its head names that script by its hash, so a script that comes
with a rollout does nothing, even if it were ever put into the page as markup.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import string
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from weaver_rl.errors import ConfigError, UserError
from weaver_rl.metrics import METRICS, MetricsLine
from weaver_rl.output_file import output_file
from weaver_rl.report import resources, summary
from weaver_rl.report.curves import bucketed
from weaver_rl.report.figures import Figure, training_figures, warm_start_figures
from weaver_rl.report.idle_ledger import ledger_data
from weaver_rl.report.rollout_data import ROLLOUTS_PER_CHUNK, RolloutData, rollout_data
from weaver_rl.report.run_data import RunData, read_run
from weaver_rl.run_folder import write_atomically
from weaver_rl.step_range import EVERY_STEP, StepRange

DEFAULT_ROLLOUTS = 400
"""Rollouts in a page, over all its runs."""
ROLLOUTS_AT_THE_END = 200
"""Rollouts in the page that a run writes when it ends: it must not keep anybody waiting."""
MAX_RUNS = 8
"""Runs in a page: as many as there are colours to tell them apart by."""
STYLES = ("colors.css", "layout.css", "charts.css", "rollouts.css")
SCRIPTS = ("chart.js", "curves.js", "ledger.js", "tokens.js", "rollouts.js", "page.js")


def write_report(run_dir: Path) -> Path:
    """Writes report.html into the run folder, whatever state the run is in, and returns its path."""
    return write_page([run_dir], read_run(run_dir).folder.report, max_rollouts=ROLLOUTS_AT_THE_END)


def write_page(
    run_dirs: Sequence[Path], path: Path, *, steps: StepRange = EVERY_STEP, max_rollouts: int = DEFAULT_ROLLOUTS
) -> Path:
    """Writes a page about one run, or about several side by side.

    Raises:
        ConfigError: a folder holds no run, there are too many, they have none of the steps, or `path` is no file.
    """
    if len(run_dirs) > MAX_RUNS:
        raise ConfigError(f"{len(run_dirs)} runs were given; a page shows at most {MAX_RUNS}")
    runs = [read_run(run_dir, steps) for run_dir in run_dirs]
    if steps != EVERY_STEP and not any(run.lines for run in runs):
        raise ConfigError("--steps names no step that was finished; leave it out for a page about all of them")
    target = output_file(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, _page(runs, max_rollouts).encode("utf-8", "replace"))
    return path


def _page(runs: Sequence[RunData], max_rollouts: int) -> str:
    rollouts = rollout_data(runs, max_rollouts)
    ledgers, ledger_errors = _ledgers(runs)
    css = "\n".join(map(resources.text, STYLES))
    js = '"use strict";\n' + "\n".join(map(resources.text, SCRIPTS))
    return string.Template(resources.text("page.html")).substitute(
        title=html.escape(runs[0].name if len(runs) == 1 else f"{len(runs)} runs"),
        style_hash=_hash(css),
        script_hash=_hash(js),
        css=css,
        js=js,
        header=summary.header(runs),
        tiles=summary.tiles(runs[0]) if len(runs) == 1 else summary.final_figures(runs),
        empty="" if any(run.lines for run in runs) else _NO_STEPS,
        ledger_note=_ledger_notes(runs, ledgers, ledger_errors),
        rollout_notes="".join(f'<p class="note">{html.escape(note)}</p>' for note in rollouts.notes),
        configuration=_configuration(runs),
        data=_blocks(runs, ledgers, rollouts),
    )


_NO_STEPS = '<p class="empty">No step was finished, so there are no curves.</p>'


def _ledgers(runs: Sequence[RunData]) -> tuple[list[Any], list[str]]:
    """The ledger of each run, None where there is none, and what could not be read: a damaged one costs no report."""
    ledgers: list[Any] = []
    errors = []
    for run in runs:
        try:
            ledgers.append(ledger_data(run))
        except UserError as error:
            ledgers.append(None)
            errors.append(str(error))
    return ledgers, errors


def _ledger_notes(runs: Sequence[RunData], ledgers: Sequence[Any], errors: Sequence[str]) -> str:
    names = [run.name for run, ledger in zip(runs, ledgers, strict=True) if not ledger]
    notes = list(errors)
    if names and not errors:
        who = ", ".join(names) if len(runs) > 1 else "This run"
        notes.append(f"{who} kept no idle ledger: it was made before there was one, or made no step.")
    return "".join(f'<p class="note">{html.escape(note)}</p>' for note in notes)


def _configuration(runs: Sequence[RunData]) -> str:
    differences = summary.differences(runs) if len(runs) > 1 else ""
    return differences + "".join(map(summary.environment, runs)) + "".join(map(summary.resolved_config, runs))


def _blocks(runs: Sequence[RunData], ledgers: Sequence[Any], rollouts: RolloutData) -> str:
    """The data, in elements that no browser runs."""
    training = [_training(run) for run in runs]
    warm = [run.of_phase("warm_start") for run in runs]
    data = {
        "runs": [{"name": run.name, "color": number} for number, run in enumerate(runs)],
        "phases": [
            _phase("Training", training, training_figures),
            _phase("Warm start", warm, warm_start_figures),
        ],
        "metrics": {metric.name: [metric.meaning, metric.unit] for metric in METRICS},
        "ledgers": ledgers,
        "rollouts": rollouts.index,
        "chunkSize": ROLLOUTS_PER_CHUNK,
    }
    head = f'<script type="application/json" id="data">{embedded(json.dumps(data, separators=(",", ":")))}</script>'
    chunks = (
        f'<script type="application/json" id="chunk-{number}">{embedded(chunk)}</script>'
        for number, chunk in enumerate(rollouts.chunks)
    )
    return "\n".join([head, *chunks])


def _training(run: RunData) -> list[MetricsLine]:
    """The lines of training, after what the last of the warm start measured on held-out prompts: where it began."""
    evaluated = [line for line in run.of_phase("warm_start") if "eval/accuracy" in line.values][-1:]
    start = [
        replace(line, values={name: value for name, value in line.values.items() if name.startswith("eval/")})
        for line in evaluated
    ]
    return start + run.of_phase("train")


def _phase(
    title: str, lines_per_run: Sequence[Sequence[MetricsLine]], figures: Callable[[Any], Sequence[Figure]]
) -> dict[str, Any]:
    names = {name for lines in lines_per_run for line in lines for name in line.values}
    return {
        "title": title,
        "curves": [bucketed(lines).to_json() for lines in lines_per_run],
        "figures": [
            {
                "title": figure.title,
                "subtitle": figure.subtitle,
                "unit": figure.unit,
                "kind": figure.kind,
                "low": figure.low,
                "high": figure.high,
                "log": figure.log,
                "lines": [{"label": x.label, "names": x.names, "color": x.color} for x in figure.lines],
            }
            for figure in figures(names)
        ],
    }


def embedded(json_text: str) -> str:
    """JSON as it may stand in a script element: no text in it can end the element or begin a comment."""
    return json_text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _hash(text: str) -> str:
    """As a content security policy names a script or style by its text."""
    return "sha256-" + base64.b64encode(hashlib.sha256(f"\n{text}\n".encode()).digest()).decode()
