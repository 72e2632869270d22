"""`weaver-rl cluster start | status | stop`."""

from __future__ import annotations

import shlex
import time
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from weaver_rl.errors import ConfigError
from weaver_rl.local_clusters import LocalCluster, cluster_files, local_clusters, show_token_of

cluster = typer.Typer(no_args_is_help=True, help="A Ray cluster of several nodes on this machine, for trying things.")

NameOption = Annotated[str, typer.Option("--name", help="Which, where you want several.")]


@cluster.command()
def start(
    nodes: Annotated[int, typer.Option(min=1, max=64, help="How many nodes; the first is the head.")] = 1,
    cpus_per_node: Annotated[int | None, typer.Option(min=1, help="CPUs that each node offers.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Of the head, for RAY_ADDRESS.")] = None,
    dashboard_port: Annotated[int | None, typer.Option(min=1, max=65535, help="Where jobs are submitted.")] = None,
    object_store_mb: Annotated[int | None, typer.Option(min=80, help="Object store of each node.")] = None,
    name: NameOption = "default",
) -> None:
    """Start a cluster; it goes on until `weaver-rl cluster stop`."""
    files = cluster_files(_checked(name))

    from actors.local_cluster import ClusterShape, start_cluster

    began = time.monotonic()
    shape = ClusterShape(
        num_nodes=nodes,
        cpus_per_node=cpus_per_node,
        port=port,
        dashboard_port=dashboard_port,
        object_store_mb=object_store_mb,
    )
    started = start_cluster(files, shape)
    cpus = started.nodes[0].num_cpus
    console = Console(highlight=False, soft_wrap=True)
    seconds = time.monotonic() - began
    console.print(f"cluster {name!r}: {nodes} node(s) of {cpus} CPU(s), ready after {seconds:.0f} s", markup=False)
    _print_addresses(console, started)


@cluster.command()
def status(name: NameOption = "default") -> None:
    """Show nodes, resources and processes; exit status 1 when a node is gone or there is no cluster."""
    console = Console(highlight=False, soft_wrap=True)
    found = cluster_files(_checked(name)).read()
    if found is None:
        console.print(_no_cluster(name), markup=False)
        raise typer.Exit(1)
    show_token_of(found.address)

    from actors.cluster_processes import processes_of
    from actors.local_cluster import look_at

    table = Table("node", "pid", "process", "CPUs used", "of", "object store MB", box=None)
    looked = look_at(found)
    for look in looked.nodes:
        total, free = look.total, look.free
        cpus = total.get("CPU", 0.0)
        row = (f"{cpus - free.get('CPU', 0.0):g}", f"{cpus:g}", f"{total.get('object_store_memory', 0) / 2**20:.0f}")
        table.add_row(look.node.name, str(look.node.pid), look.state, *(row if look.serves else ("–", "–", "–")))
    console.print(table)
    alive = sum(look.serves for look in looked.nodes)
    console.print(f"{alive} of {len(looked.nodes)} nodes serve; {len(processes_of(found.session))} processes")
    if looked.problem:
        console.print(looked.problem, markup=False)
    if not found.ready:
        console.print("it was never ready: whoever started it was killed; `weaver-rl cluster stop` removes it")
    _print_addresses(console, found)
    raise typer.Exit(0 if found.ready and alive == len(looked.nodes) else 1)


@cluster.command()
def stop(name: NameOption = "default") -> None:
    """End a cluster that was started here, and nothing else."""
    files = cluster_files(_checked(name))

    from actors.local_cluster import stop_cluster

    ended = stop_cluster(files)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"cluster {name!r} has ended; nothing of it is left" if ended else _no_cluster(name), markup=False)


def _print_addresses(console: Console, found: LocalCluster) -> None:
    exports = " ".join(f"{key}={shlex.quote(value)}" for key, value in found.exports().items())
    console.print(f"  weaver-rl submit CONFIG run_dir=/absolute/path --address {found.dashboard}", markup=False)
    console.print(f"  weaver-rl train CONFIG --address {found.address}", markup=False)
    console.print(f"  for other programs: export {exports}", markup=False)


def _no_cluster(name: str) -> str:
    others = [found.name for found in local_clusters() if found.name != name]
    hint = f"; there is {', '.join(others)}" if others else ""
    return f"no cluster {name!r} was started on this machine by this user{hint}"


def _checked(name: str) -> str:
    if not name or not name.replace("-", "").replace("_", "").isalnum() or not name.isascii():
        raise ConfigError(f"--name {name!r}: letters, digits, - and _ only")
    return name
