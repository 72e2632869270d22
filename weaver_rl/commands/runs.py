"""Commands that run a configuration, and those that look after a run."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
from rich.console import Console

from weaver_rl.commands.arguments import (
    AddressOption,
    ConfigArgument,
    OverridesArgument,
    RunArgument,
)


def train(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint of the run folder.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Remove the run that is in the run folder.")] = False,
    address: AddressOption = None,
) -> None:
    """Run a configuration to its end."""
    from weaver_rl.config import load_config
    from weaver_rl.local_clusters import show_token_of

    extra = [f"cluster.address={address}"] if address is not None else []
    loaded = load_config(config, [*(overrides or []), *extra])
    show_token_of(loaded.cluster.address or os.environ.get("RAY_ADDRESS"))

    from actors.launch import train as launch
    from weaver_rl.outcome import print_outcome

    console = Console()
    outcome = launch(loaded, resume=resume, overwrite=overwrite, console=console)
    print_outcome(console, loaded.place, outcome.summary, outcome.wall_seconds)


def show(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Print the resolved configuration: every key with the value it would run with."""
    from weaver_rl.config import dump_config, load_config

    sys.stdout.write(dump_config(load_config(config, overrides or [])))


def status(run: RunArgument) -> None:
    """Show how a run stands: its step, what it waits for and why, its samplers."""
    from weaver_rl.remote_run import run_to_read
    from weaver_rl.status import print_status

    with run_to_read(run, small=True) as folder:
        raise typer.Exit(print_status(Console(), folder))


def audit(run: RunArgument) -> None:
    """Prove from a run's journal that every prompt was trained exactly once; exit status 1 if not."""
    from weaver_rl.audit import audit as check
    from weaver_rl.audit_report import print_audit
    from weaver_rl.remote_run import run_to_read

    with run_to_read(run) as folder:
        raise typer.Exit(print_audit(Console(), check(folder)))


def replay(
    run: RunArgument,
    step: Annotated[int, typer.Option(min=1, help="The step to compute again.", show_default=False)],
) -> None:
    """Compute a recorded step again from its stored rollouts; exit status 1 if loss or gradient differ by a bit."""
    from actors.replay import replay as again
    from weaver_rl.remote_run import run_to_read

    with run_to_read(run, checkpoints=True) as folder:
        raise typer.Exit(again(folder, step, Console()))


def scale(
    run: RunArgument,
    samplers: Annotated[int, typer.Option(min=1, help="How many it shall have.", show_default=False)],
) -> None:
    """Add samplers to a running run, or let some leave."""
    from weaver_rl.remote_run import run_to_read
    from weaver_rl.run_folder import RunFolder
    from weaver_rl.scale import ask_for_samplers

    with run_to_read(run, live=True) as folder:
        ask_for_samplers(RunFolder(folder), samplers)
    sys.stdout.write(f"asked for {samplers} samplers; `weaver-rl status {run}` shows them come and go\n")
