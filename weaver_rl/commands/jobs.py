"""`weaver-rl submit | logs | stop | jobs`: runs as jobs of a Ray cluster."""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from weaver_rl.commands.arguments import ConfigArgument, OverridesArgument
from weaver_rl.errors import ConfigError
from weaver_rl.exit_status import INTERRUPTED_STATUS

if TYPE_CHECKING:
    from actors.job_client import JobLook, JobServer

JobArgument = Annotated[str, typer.Argument(help="Id of the job, as `submit` printed it.", show_default=False)]
ServerOption = Annotated[
    str | None,
    typer.Option(
        "--address",
        help="Dashboard of the cluster, http://HEAD:8265; without it RAY_API_SERVER_ADDRESS, else the cluster of "
        "`weaver-rl cluster start`.",
        show_default=False,
    ),
]
ReconnectOption = Annotated[float, typer.Option(min=0, help="Seconds the job server may be away while followed.")]

PADDING = 2
"""Columns of the terminal beside a cell of a table."""
LEAST_WHAT = 14
"""Columns of the terminal for what a job does, whatever the others take."""


def submit(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    address: ServerOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="As for `train`.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="As for `train`.")] = False,
    follow: Annotated[bool, typer.Option(help="Print the job's log until it ends.")] = True,
    working_dir: Annotated[
        Path | None,
        typer.Option(help="What is packed; else the directory with the configuration and the files that it names."),
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Pattern, as in .gitignore, of what is not packed.")] = None,
    env: Annotated[list[str] | None, typer.Option(help="NAME=VALUE for the job; NAME alone: as it is here.")] = None,
    job_id: Annotated[str | None, typer.Option(help="Name of the job; else one is made.", show_default=False)] = None,
    reconnect_s: ReconnectOption = 600.0,
) -> None:
    """Run a configuration as a job of a Ray cluster."""
    from weaver_rl.config import load_config

    loaded = load_config(config, overrides or [])
    if job_id is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", job_id):
        raise ConfigError(f"--job-id {job_id!r}: letters, digits, '.', '_' and '-' only, a letter or digit first")
    variables = _variables(env or [])
    server = _server(address)

    from actors.jobs import JobRequest
    from actors.jobs import submit as send

    console = _console()
    request = JobRequest(
        config_file=config,
        overrides=overrides or (),
        resume=resume,
        overwrite=overwrite,
        working_dir=working_dir,
        excludes=exclude or (),
        env=variables,
        job_id=job_id,
    )
    name = send(server, loaded, request, console)
    console.print(f"job {name} at {server.address}", markup=False)
    if follow:
        _follow(server, name, console, reconnect_s)
    else:
        console.print(_go_on(server, name), markup=False)


def logs(
    job: JobArgument,
    address: ServerOption = None,
    follow: Annotated[bool, typer.Option(help="Go on until the job ends.")] = True,
    tail: Annotated[int | None, typer.Option(min=0, help="Only the last lines of what is there.")] = None,
    reconnect_s: ReconnectOption = 600.0,
) -> None:
    """Print the log of a job; with --follow the exit status is the job's."""
    server = _server(address)
    server.look(job)
    console = _console()
    if follow:
        _follow(server, job, console, reconnect_s, tail)
        return
    lines = server.log(job).splitlines()
    for line in lines if tail is None else lines[max(0, len(lines) - tail) :]:
        console.print(line, markup=False)


def stop(
    job: JobArgument,
    address: ServerOption = None,
    wait_s: Annotated[float, typer.Option(min=0, help="Seconds to wait for its end.")] = 180.0,
) -> None:
    """End a job in good order: `--resume` can go on from its newest checkpoint."""
    server = _server(address)
    before = server.look(job)
    console = _console()
    if before.has_ended:
        console.print(f"{_ending(before)} already", markup=False)
        return

    from actors.jobs import how_it_stopped
    from actors.jobs import stop as end

    console.print(f"job {job} was asked to end; waiting at most {wait_s:g} s", markup=False)
    look = _interruptible(lambda: end(server, job, timeout_s=wait_s), console, f"{job} goes on ending")
    console.print(how_it_stopped(server, look), markup=False)
    raise typer.Exit(0 if look.has_ended else 1)


def jobs(address: ServerOption = None) -> None:
    """List the jobs of a cluster."""
    server = _server(address)
    looks = server.jobs()
    rows = [(look.job_id, look.state.lower(), _clock(look.started_at), _clock(look.ended_at)) for look in looks]
    columns = list(zip(("job", "state", "started", "ended"), *rows, strict=True))
    table = Table(*(Column(cells[0], no_wrap=True) for cells in columns), Column("what", overflow="fold"), box=None)
    for look, row in zip(looks, rows, strict=True):
        table.add_row(*row, look.entrypoint.removeprefix("exec "))
    console = Console(highlight=False, markup=False)
    # A table that has no room cuts off ids, which people copy.
    console.width = max(console.width, sum(max(map(len, cells)) + PADDING for cells in columns) + LEAST_WHAT)
    console.print(table)


def _server(address: str | None) -> JobServer:
    from weaver_rl.job_address import job_server_address
    from weaver_rl.local_clusters import local_clusters, show_token_of

    url = job_server_address(address, os.environ, local_clusters())
    show_token_of(url)

    from actors.job_client import JobServer

    return JobServer(url)


def _follow(server: JobServer, job: str, console: Console, reconnect_s: float, tail: int | None = None) -> None:
    from actors.jobs import ending, exit_status
    from actors.jobs import follow as read

    look = _interruptible(
        lambda: read(server, job, console, reconnect_s=reconnect_s, tail=tail), console, _go_on(server, job)
    )
    console.print(ending(look), markup=False)
    raise typer.Exit(exit_status(look))


def _interruptible(wait: Callable[[], JobLook], console: Console, goes_on: str) -> JobLook:
    """Ctrl-C ends the waiting, not the job."""
    try:
        return wait()
    except KeyboardInterrupt:
        console.print(goes_on, markup=False)
        raise typer.Exit(INTERRUPTED_STATUS) from None


def _go_on(server: JobServer, job: str) -> str:
    return (
        f"job {job} goes on: `weaver-rl logs {job} --address {server.address}` follows it, "
        f"`weaver-rl stop {job} --address {server.address}` ends it"
    )


def _ending(look: JobLook) -> str:
    from actors.jobs import ending

    return ending(look)


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True, emoji=False)


def _clock(at: float | None) -> str:
    return "–" if at is None else datetime.datetime.fromtimestamp(at).strftime("%d %b %H:%M:%S")


def _variables(given: list[str]) -> dict[str, str]:
    found = {}
    for item in given:
        name, assigned, value = item.partition("=")
        if not name.isidentifier():
            raise ConfigError(f"--env {item}: the form is NAME=VALUE, or NAME for the value that it has here")
        if not assigned and name not in os.environ:
            raise ConfigError(f"--env {name}: it has no value here; write --env {name}=VALUE")
        found[name] = value if assigned else os.environ[name]
    return found
