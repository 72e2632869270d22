"""`weaver-rl serve`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from weaver_rl.commands.arguments import AddressOption, OverridesArgument


def serve(
    config: Annotated[Path, typer.Argument(help="YAML file of the server.", show_default=False)],
    overrides: OverridesArgument = None,
    address: AddressOption = None,
) -> None:
    """Serve training and sampling to Weaver clients until it is stopped."""
    from weaver_rl.config_file import load_file
    from weaver_rl.local_clusters import show_token_of
    from weaver_rl.service.config import ServeConfig

    extra = [f"cluster.address={address}"] if address is not None else []
    loaded = load_file(ServeConfig, config, [*(overrides or []), *extra])
    show_token_of(loaded.cluster.address or os.environ.get("RAY_ADDRESS"))

    from actors.serve import serve as run

    run(loaded, Console())
