"""The command that exports what a run's actors did."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from weaver_rl.commands.arguments import RunArgument


def trace(
    run: RunArgument,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The file to write, compressed if its name ends with .gz; without it trace.json in the run folder, "
            "or here for a URL."
        ),
    ] = None,
    steps: Annotated[str, typer.Option(help="Steps it is about: A:B, A:, :B or one.", metavar="A:B")] = ":",
) -> None:
    """Export what every actor of a run did as a trace for ui.perfetto.dev or chrome://tracing."""
    from weaver_rl.chrome_trace import export_trace
    from weaver_rl.remote_run import run_to_read
    from weaver_rl.run_folder import RunFolder
    from weaver_rl.run_location import is_url
    from weaver_rl.step_range import StepRange

    wanted = StepRange.parse(steps)
    with run_to_read(run) as path:
        folder = RunFolder(path)
        out = out or (Path(folder.trace.name) if is_url(run) else folder.trace)
        exported = export_trace(folder, out, steps=wanted)
    sys.stdout.write(
        f"{exported.num_spans} spans of {exported.num_actors} actors: {exported.path}\n"
        "open it at https://ui.perfetto.dev (it stays on your machine) or in chrome://tracing\n"
    )
