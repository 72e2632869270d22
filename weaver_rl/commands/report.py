"""The command that writes a report of one run, or of several side by side."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from weaver_rl.commands.arguments import RunsArgument


def report(
    runs: RunsArgument,
    out: Annotated[
        Path | None,
        typer.Option(help="File to write; else report.html in the run folder, or here for several runs or a URL."),
    ] = None,
    steps: Annotated[str, typer.Option(help="Steps it is about: A:B, A:, :B or one.")] = ":",
    max_rollouts: Annotated[int, typer.Option(min=1, help="Rollouts in it, over all runs.")] = 400,
) -> None:
    """Write a self-contained HTML page about runs: curves, where the time went, rollouts token by token."""
    from weaver_rl.remote_run import run_to_read
    from weaver_rl.report import write_page
    from weaver_rl.run_folder import RunFolder
    from weaver_rl.run_location import is_url
    from weaver_rl.step_range import StepRange

    wanted = StepRange.parse(steps)
    with ExitStack() as opened:
        folders = [opened.enter_context(run_to_read(run)) for run in runs]
        is_kept = len(runs) == 1 and not is_url(runs[0])
        path = out or (RunFolder(folders[0]).report if is_kept else Path("report.html"))
        written = write_page(folders, path, steps=wanted, max_rollouts=max_rollouts)
    sys.stdout.write(f"report: {written} ({written.stat().st_size / 1e6:.1f} MB)\n")
