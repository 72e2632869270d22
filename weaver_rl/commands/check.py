"""`weaver-rl check`."""

from __future__ import annotations

import contextlib
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from weaver_rl.commands.arguments import OverridesArgument

if TYPE_CHECKING:
    from weaver_rl.check.checklist import Check
    from weaver_rl.check.resources import ClusterFacts


def check(
    config: Annotated[Path, typer.Argument(help="YAML file of a run or a server.", show_default=False)],
    overrides: OverridesArgument = None,
    address: Annotated[
        str | None,
        typer.Option(help="Cluster to look at, HOST:PORT or http://HEAD:8265; else RAY_ADDRESS, else this machine."),
    ] = None,
    no_cluster: Annotated[
        bool, typer.Option("--no-cluster", help="Leave out whether the cluster has the resources.")
    ] = False,
    gpu_memory_gb: Annotated[
        float | None,
        typer.Option(min=1, max=100_000, help="GB of each GPU, in place of what is found.", show_default=False),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Look at everything that a run, or a server, needs before it is started; exit status 1 when a line fails."""
    from weaver_rl.check.checklist import go_through
    from weaver_rl.check.printout import as_json, has_failed, print_group, summary
    from weaver_rl.errors import ConfigError

    # Its file now, for below stdout is where stderr is: what tasks and rewards print is no part of the answer.
    console = Console(file=sys.stdout, highlight=False)
    unreadable = False
    try:
        checks = _checks(config, overrides or [], address, with_cluster=not no_cluster, gpu_memory_gb=gpu_memory_gb)
    except ConfigError as error:
        unreadable = True
        checks = (_unreadable(config, error),)
    checked = []
    with contextlib.redirect_stdout(sys.stderr):
        for done in go_through(checks):
            checked.append(done)
            if not json:
                print_group(console, *done)
    if json:
        sys.stdout.write(as_json(checked) + "\n")
    else:
        console.print(summary(checked), soft_wrap=True)
    raise typer.Exit(2 if unreadable else int(has_failed(checked)))


def _checks(
    path: Path, overrides: list[str], address: str | None, *, with_cluster: bool, gpu_memory_gb: float | None
) -> tuple[Check, ...]:
    from weaver_rl.check.run_checklist import run_checklist
    from weaver_rl.check.subject import RunUnderCheck
    from weaver_rl.config import load_config
    from weaver_rl.config_file import load_file, read_yaml
    from weaver_rl.dashboard_access import is_dashboard

    extra = [f"cluster.address={address}"] if address is not None else []
    if "models" in read_yaml(path):
        from weaver_rl.check.serve_checklist import ServerUnderCheck, serve_checklist
        from weaver_rl.service.config import ServeConfig

        serving = load_file(ServeConfig, path, [*overrides, *extra])
        asked = _cluster_address(serving.cluster.address)
        ask = partial(_facts, asked, str(serving.state_dir), with_cluster=with_cluster)
        server = ServerUnderCheck.of(serving, cluster=ask, gpu_memory_gb=gpu_memory_gb)
        return serve_checklist(server, path, with_cluster=with_cluster)
    loaded = load_config(path, [*overrides, *extra])
    asked = _cluster_address(loaded.cluster.address)
    ask = partial(_facts, asked, str(loaded.run_dir or loaded.folder), with_cluster=with_cluster)
    on_head = asked is not None and is_dashboard(asked)
    run = RunUnderCheck.of(loaded, cluster=ask, gpu_memory_gb=gpu_memory_gb, on_head=on_head)
    return run_checklist(run, path, with_cluster=with_cluster)


def _cluster_address(configured: str | None) -> str | None:
    """Of the cluster that is looked at, None: this machine. Before anything imports Ray: it shows the token."""
    from weaver_rl.local_clusters import show_token_of

    address = configured or os.environ.get("RAY_ADDRESS")
    show_token_of(address)
    return address if address != "local" else None


def _facts(address: str | None, folder: str, *, with_cluster: bool) -> ClusterFacts:
    from weaver_rl.check.resources import this_machine

    if not with_cluster or not address:
        return this_machine()
    from actors.cluster_check import ask_cluster

    return ask_cluster(address, run_dir=folder)


def _unreadable(path: Path, error: Exception) -> Check:
    from weaver_rl.check.checklist import Check
    from weaver_rl.check.finding import failed

    line = failed(str(path), str(error), "correct the file; nothing else can be checked before it loads")
    return Check(title="configuration", run=lambda: (line,), timeout_s=10)
