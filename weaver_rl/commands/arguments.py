"""Arguments that several commands take. It knows no command."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from weaver_rl.errors import FilesError, UserError

OPENED = ExitStack()
"""What arguments opened, for the command to use; the command line closes it when the command has ended."""
COPIES: set[Path] = set()
"""Folders among them that end with the command: what it writes must go elsewhere."""


def run_parser(*, small: bool = False, checkpoints: bool = False, live: bool = False) -> Callable[[str], Path]:
    """Turns what stands for a run into a folder to read: a path as it is, a URL by downloading the run for the command.

    Args:
        small: without rollouts and everything else in folders.
        checkpoints: with them.
        live: only a run of this machine will do.
    """

    def parse(run: str) -> Path:
        from weaver_rl.remote_run import run_to_read
        from weaver_rl.run_location import is_url

        try:
            opened = run_to_read(str(run), small=small, checkpoints=checkpoints, live=live)
            path = OPENED.enter_context(opened)
        except UserError as error:
            raise FilesError(str(error)) from error  # click would show a ValueError without its message
        if is_url(str(run)):
            COPIES.add(path)
        return path

    return parse


ConfigArgument = Annotated[Path, typer.Argument(help="YAML file of the run.", show_default=False)]
RUN_HELP = "Run folder, or its URL."
RunArgument = Annotated[Path, typer.Argument(help=RUN_HELP, show_default=False, metavar="RUN", parser=run_parser())]
RunsArgument = Annotated[
    list[Path],
    typer.Argument(
        help="Run folders or their URLs, the first one first.", show_default=False, metavar="RUN", parser=run_parser()
    ),
]
SmallRunArgument = Annotated[
    Path, typer.Argument(help=RUN_HELP, show_default=False, metavar="RUN", parser=run_parser(small=True))
]
"""For commands that read no rollouts."""
WholeRunArgument = Annotated[
    Path, typer.Argument(help=RUN_HELP, show_default=False, metavar="RUN", parser=run_parser(checkpoints=True))
]
"""For commands that read checkpoints."""
LiveRunArgument = Annotated[
    Path, typer.Argument(help=RUN_HELP, show_default=False, metavar="RUN", parser=run_parser(live=True))
]
"""For commands that write into the folder of a live run."""
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(help="key.path=value …, for example learner.learning_rate=1e-4")
]
AddressOption = Annotated[
    str | None, typer.Option(help="Ray cluster to join; without it RAY_ADDRESS, else this machine.")
]
