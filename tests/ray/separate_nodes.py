"""A Ray cluster of several nodes on this machine, each with a file system of its own where that is permitted.

A separate node has its own mount namespace with an empty /tmp, home and caches: what another node writes there is not
there for it. Only the paths that it is given to see are the same for it and for the test.
"""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from conftest import REPOSITORY
from fault_parts import gone
from ray_nodes import RAY, TOKEN, actors_on, kill_node, processes_of, start_node

PRIVATE = Path("/tmp")
# Else Ray takes a quarter of a minute to believe that a node is dead.
HEALTH = {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "3"}
ENVIRONMENT = TOKEN | HEALTH


@functools.cache
def can_separate() -> bool:
    """Whether this user may make mount namespaces here."""
    tools = all(shutil.which(tool) for tool in ("unshare", "nsenter", "mount"))
    attempt = ["unshare", "-m", "--propagation", "private", "mount", "-t", "tmpfs", "tmpfs", str(PRIVATE)]
    return tools and subprocess.run(attempt, capture_output=True, check=False).returncode == 0


@dataclass
class Node:
    """A `ray start --block` and everything below it."""

    name: str
    process: subprocess.Popen[str]
    is_separate: bool

    def actors(self) -> set[str]:
        """Kinds of a run's actors on this node."""
        return actors_on(self.process)

    def processes(self, kind: str) -> list[psutil.Process]:
        """Those of the actors of a class on this node."""
        titles = {process: " ".join(process.cmdline()) for process in processes_of(self.process) if not gone(process)}
        return [process for process, title in titles.items() if title.startswith(f"ray::{kind}")]

    def command(self, *command: str) -> list[str]:
        """A command that sees the files that the node sees."""
        return ["nsenter", "-m", "-t", str(self.process.pid), "--", *command] if self.is_separate else list(command)

    def sees(self, path: Path) -> bool:
        """Whether the path is there for it."""
        return subprocess.run(self.command("test", "-e", str(path)), check=False).returncode == 0

    def files(self, pattern: str) -> list[str]:
        """Paths below the node's cache that match, relative to it."""
        found = subprocess.run(
            self.command("sh", "-c", f"cd {PRIVATE}/home/.cache/weaver-rl 2>/dev/null && ls -d {pattern} 2>/dev/null"),
            capture_output=True,
            text=True,
            check=False,
        )
        return found.stdout.split()

    def kill(self) -> None:
        """All its processes at once, as when a machine is switched off."""
        kill_node(self.process)


@dataclass
class SeparateNodes:
    """Head and workers; `close` ends them all.

    Args:
        dashboard: with the server that takes jobs.
    """

    port: int
    dashboard_port: int | None = None
    nodes: list[Node] = field(default_factory=list)
    directories: list[str] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def add(self, name: str, *, num_cpus: int, sees: Sequence[Path] = ()) -> Node:
        """One more node; the first is the head."""
        number = len(self.nodes)
        where = [f"--address={self.address}"] if self.nodes else self._head()
        first_port = 20000 + 1000 * number
        ports = [f"--min-worker-port={first_port}", f"--max-worker-port={first_port + 900}"]
        command = [RAY, "start", *where, *ports, f"--num-cpus={num_cpus}", "--num-gpus=0", "--block"]
        process = start_node(separated(command, sees) if can_separate() else command, environment())
        node = Node(name, process, can_separate())
        self.nodes.append(node)
        return node

    def close(self) -> None:
        for node in reversed(self.nodes):
            node.kill()
        for directory in self.directories:
            shutil.rmtree(directory, ignore_errors=True)

    def _head(self) -> list[str]:
        where = ["--head", f"--port={self.port}"]
        if self.dashboard_port is None:
            where.append("--include-dashboard=false")
        else:
            where += ["--include-dashboard=true", f"--dashboard-port={self.dashboard_port}"]
        if not can_separate():
            self.directories.append(tempfile.mkdtemp(prefix="wrl-nodes-"))
            where.append(f"--temp-dir={self.directories[0]}")
        return where


def separated(command: Sequence[str], sees: Sequence[Path]) -> list[str]:
    """The command in a mount namespace with an empty /tmp, but for the paths that it sees."""
    kept = [path for path in (*sees, REPOSITORY, Path(sys.prefix)) if path.is_relative_to(PRIVATE)]
    lines = ["set -e", "mount -t tmpfs tmpfs /mnt"]
    for index, path in enumerate(kept):
        lines += [f"mkdir /mnt/{index}", f"mount --bind {shlex.quote(str(path))} /mnt/{index}"]
    lines.append(f"mount -t tmpfs -o size=2g tmpfs {PRIVATE}")
    for index, path in enumerate(kept):
        lines += [f"mkdir -p {shlex.quote(str(path))}", f"mount --bind /mnt/{index} {shlex.quote(str(path))}"]
    lines += [f"mkdir -p {PRIVATE}/home", f"exec {shlex.join(command)}"]
    return ["unshare", "-m", "--propagation", "private", "sh", "-c", "\n".join(lines)]


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Of every process of the cluster, and of those that talk to it."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "TMPDIR")}
    if can_separate():
        home = str(PRIVATE / "home")
        kept |= {"HOME": home, "XDG_CACHE_HOME": f"{home}/.cache", "HF_HOME": f"{home}/.cache/huggingface"}
    # Jobs find `weaver-rl` as a user's shell would.
    kept["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    return kept | ENVIRONMENT | {"COLUMNS": "200"} | dict(more or {})
