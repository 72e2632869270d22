"""Arguments that several commands take. It knows no command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigArgument = Annotated[Path, typer.Argument(help="YAML file of the run.", show_default=False)]
RunArgument = Annotated[Path, typer.Argument(help="Run folder.", show_default=False)]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(help="key.path=value …, for example learner.learning_rate=1e-4")
]
AddressOption = Annotated[
    str | None, typer.Option(help="Ray cluster to join; without it RAY_ADDRESS, else this machine.")
]
