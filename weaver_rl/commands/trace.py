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
    steps: Annotated[
        str | None, typer.Option(help="Only these steps: A:B, A: or :B.", metavar="A:B", show_default=False)
    ] = None,
) -> None:
    """Export what every actor of a run did as a trace for ui.perfetto.dev or chrome://tracing."""
    from weaver_rl.chrome_trace import export_trace
    from weaver_rl.remote_run import run_to_read
    from weaver_rl.run_folder import RunFolder
    from weaver_rl.run_location import is_url

    first, last = _range(steps)
    with run_to_read(run) as path:
        folder = RunFolder(path)
        out = out or (Path(folder.trace.name) if is_url(run) else folder.trace)
        exported = export_trace(folder, out, first_step=first, last_step=last)
    sys.stdout.write(
        f"{exported.num_spans} spans of {exported.num_actors} actors: {exported.path}\n"
        "open it at https://ui.perfetto.dev (it stays on your machine) or in chrome://tracing\n"
    )


def _range(steps: str | None) -> tuple[int | None, int | None]:
    from weaver_rl.errors import ConfigError

    if steps is None:
        return None, None
    first, separator, last = steps.partition(":")
    try:
        if separator:
            return int(first) if first else None, int(last) if last else None
        return int(steps), int(steps)
    except ValueError:
        raise ConfigError(f"--steps {steps} was given; write A:B with the numbers of two steps, A: or :B") from None
