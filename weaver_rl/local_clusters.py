"""What is written down of the Ray clusters that `weaver-rl cluster start` made on this machine. It knows no process.

STATE/weaver-rl/clusters/MACHINE/NAME/cluster.json    addresses, and the processes that were started
STATE/weaver-rl/clusters/MACHINE/NAME/token           what a client must show, readable by its owner only
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator, MutableMapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from weaver_rl.errors import ConfigError
from weaver_rl.process_state import GONE, ZOMBIE, process_state

TOKEN_MODE = "RAY_AUTH_MODE"
TOKEN = "RAY_AUTH_TOKEN"
TOKEN_PATH = "RAY_AUTH_TOKEN_PATH"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterNode:
    """One node of a local cluster: a `ray start` process and its descendants."""

    name: str
    """Of the node within Ray: CLUSTER-INDEX; 0 is the head."""
    pid: int
    started_at: float
    """Seconds since the epoch: a process that has got the number since is not this one."""
    num_cpus: int
    log: str
    """What `ray start` prints."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalCluster:
    """A cluster that was started.

    Example:
        LocalCluster(name="default", session="/tmp/weaver-rl-k3j9x0aa", address="10.0.0.5:41001",
                     dashboard="http://127.0.0.1:41002", token_file="/home/me/.local/state/…/token", nodes=())
    """

    name: str
    session: str
    """Directory under which everything of the cluster lies, and by which its processes are recognised."""
    address: str
    """For RAY_ADDRESS and `train --address`."""
    dashboard: str
    """For `submit --address`."""
    token_file: str
    nodes: tuple[ClusterNode, ...] = ()
    """Those started so far, the head first."""
    ready: bool = False
    """False while it is being started, and for ever when whoever started it was killed meanwhile."""

    def is_alive(self) -> bool:
        """Whether its head's process lives."""
        return bool(self.nodes) and process_state(self.nodes[0].pid, self.nodes[0].started_at) not in (GONE, ZOMBIE)

    def exports(self) -> dict[str, str]:
        """What a client of this cluster needs in its environment."""
        return {"RAY_ADDRESS": self.address, TOKEN_MODE: "token", TOKEN_PATH: self.token_file}


@dataclass(frozen=True, slots=True)
class ClusterFiles:
    """Where one cluster's files lie. Making one touches no disk."""

    directory: Path

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def state(self) -> Path:
        return self.directory / "cluster.json"

    @property
    def token(self) -> Path:
        return self.directory / "token"

    def read(self) -> LocalCluster | None:
        """The cluster that is written down; None when there is none."""
        try:
            raw: dict[str, Any] = json.loads(self.state.read_text())
            nodes = tuple(ClusterNode(**node) for node in raw.pop("nodes"))
            return LocalCluster(**raw, nodes=nodes)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"{self.state} is not the state of a cluster ({error}); remove the file") from error

    def write(self, cluster: LocalCluster) -> None:
        aside = self.state.with_suffix(".writing")
        aside.write_text(json.dumps(asdict(cluster), indent=2) + "\n")
        aside.replace(self.state)

    def write_token(self, token: str) -> None:
        descriptor = os.open(self.token, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            os.fchmod(descriptor, 0o600)  # it may have been there with another mode
            file.write(token)

    def remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """For who starts or stops the cluster; another one waits no time.

        Raises:
            ConfigError: somebody else starts or stops it just now.
        """
        # Beside the directory: whoever stops a cluster removes that.
        self.directory.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (self.directory.parent / f".{self.name}.lock").open("ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"cluster {self.name!r} is being started or stopped by another command; try again when that ended"
                ) from None
            self.directory.mkdir(exist_ok=True, mode=0o700)
            try:
                yield
            finally:
                if not self.state.exists():
                    self.remove()


def cluster_files(name: str) -> ClusterFiles:
    """Where a cluster of this user would be written down."""
    return ClusterFiles(_clusters_of_this_machine() / name)


def local_clusters() -> list[LocalCluster]:
    """Every cluster of this user that is written down, by name. Whether its processes live is not asked."""
    try:
        places = sorted(_clusters_of_this_machine().glob("*/cluster.json"))
    except ConfigError:
        return []  # a user without a home can have started none
    found = []
    for place in places:
        with contextlib.suppress(ConfigError, OSError):
            cluster = ClusterFiles(place.parent).read()
            if cluster is not None:
                found.append(cluster)
    return found


def show_token_of(address: str | None, environment: MutableMapping[str, str] | None = None) -> None:
    """Lets this process show the token of the local cluster at that address, whatever token the user has for another.

    Ray reads its environment when it is imported: this must come before.
    """
    env = os.environ if environment is None else environment
    if not address:
        return
    has_own = bool(env.get(TOKEN) or env.get(TOKEN_PATH))
    for cluster in local_clusters():
        if has_own and not cluster.is_alive():  # at its address there may be another by now
            continue
        if _same_place(address, cluster.address) or _same_place(address, cluster.dashboard):
            env.pop(TOKEN, None)  # Ray would take it before the path
            env.update({TOKEN_MODE: "token", TOKEN_PATH: cluster.token_file})
            return


def _clusters_of_this_machine() -> Path:
    # A home directory may be on several machines, and a process number means something on one of them only.
    return _state_home() / "weaver-rl" / "clusters" / socket.gethostname()


def _same_place(one: str, other: str) -> bool:
    def place(address: str) -> tuple[str, int | None]:
        try:
            parts = urlsplit(address if "://" in address else f"//{address}")
            port = parts.port
        except ValueError:
            return address, None
        host = parts.hostname or ""
        return ("127.0.0.1" if host in ("localhost", "::1") else host), port

    return place(one) == place(other)


def _state_home() -> Path:
    given = Path(os.environ.get("XDG_STATE_HOME", ""))
    if given.is_absolute():  # the standard has a relative one ignored, and nodes run in directories of their own
        return given
    try:
        return Path.home() / ".local" / "state"
    except RuntimeError as error:
        raise ConfigError(f"{error}; set HOME or XDG_STATE_HOME to a directory of yours") from None
