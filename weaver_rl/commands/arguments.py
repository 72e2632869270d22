"""Arguments that several commands take. It knows no command.

A run is a path or a URL: each command opens it with `run_to_read` for as long as it reads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigArgument = Annotated[Path, typer.Argument(help="YAML file of the run.", show_default=False)]
RUN_HELP = "Run folder, or its URL."
RunArgument = Annotated[str, typer.Argument(help=RUN_HELP, show_default=False, metavar="RUN")]
RunsArgument = Annotated[
    list[str],
    typer.Argument(help="Run folders or their URLs, the first one first.", show_default=False, metavar="RUN"),
]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(help="key.path=value …, for example learner.learning_rate=1e-4")
]
AddressOption = Annotated[
    str | None, typer.Option(help="Ray cluster to join; without it RAY_ADDRESS, else this machine.")
]
