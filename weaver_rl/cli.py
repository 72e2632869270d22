"""The command line: arguments in, exit status out. What a command does lives elsewhere and is imported inside it.

Exit status: 0 done, 1 a failure that is ours or a machine's, 2 something to mend in the input, 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from weaver_rl import __version__
from weaver_rl.errors import UserError, WeaverRLError

app = typer.Typer(
    name="weaver-rl",
    help="Reinforcement learning for language models on Ray, vLLM and PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigArgument = Annotated[Path, typer.Argument(help="YAML file of the run.", show_default=False)]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(help="key.path=value …, for example learner.learning_rate=1e-4")
]


@app.command()
def train(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint of the run folder.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Remove the run that is in the run folder.")] = False,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to join; without it RAY_ADDRESS, else this machine.")
    ] = None,
) -> None:
    """Run a configuration to its end."""
    from weaver_rl.config import load_config

    extra = [f"cluster.address={address}"] if address is not None else []
    loaded = load_config(config, [*(overrides or []), *extra])

    from actors.launch import train as launch
    from weaver_rl.outcome import print_outcome

    console = Console()
    outcome = launch(loaded, resume=resume, overwrite=overwrite, console=console)
    print_outcome(console, loaded.folder, outcome.summary, outcome.wall_seconds)


@app.command()
def show(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Print the resolved configuration: every key with the value it would run with."""
    from weaver_rl.config import dump_config, load_config

    sys.stdout.write(dump_config(load_config(config, overrides or [])))


def version(value: bool) -> None:
    if value:
        sys.stdout.write(f"weaver-rl {__version__}\n")
        raise typer.Exit


@app.callback()
def options(
    _: Annotated[bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Options of every command."""


def main() -> None:
    """Entry point: errors of a user's making become one message and an exit status, never a traceback."""
    sys.exit(guarded(lambda: app(standalone_mode=True)))


def guarded(run: Callable[[], None]) -> int:
    """Runs a command; returns its exit status."""
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        run()
    except KeyboardInterrupt:
        errors.print("interrupted; nothing was left running")
        return 130
    except UserError as error:
        errors.print(f"error: {error}", markup=False)
        return 2
    except WeaverRLError as error:
        errors.print(f"error: {type(error).__name__}: {error}", markup=False)
        return 1
    return 0
