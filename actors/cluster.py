"""Ray itself: joining or starting a cluster, granting a placement, and leaving nothing behind. It spawns no actor."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import RayError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from actors.signals import StopSignals
from weaver_rl.custom_resources import in_words, nodes_with
from weaver_rl.errors import ConfigError, ResourcesError
from weaver_rl.placement import ClusterConfig, Placement, asked_and_available, check_fits, shortage
from weaver_rl.run_location import ADDRESS_PASSWORD_REFUSED, address_has_password
from weaver_rl.waits import current_waits

LOCAL = "local"
CONNECT_TIMEOUT_S = 10.0
ENDED_WITHIN_S = 10.0
PLACEMENT_POLL_S = 0.5
SIGNALS_SEEN_WITHIN_S = 1.0
SESSION_PREFIX = "weaver-rl-"
DRIVER_LOCK = "driver.lock"
"""In a session's directory; locked while its driver or its reaper lives."""


@contextlib.contextmanager
def connected(cluster: ClusterConfig, logs: Path, stop: StopSignals) -> Iterator[None]:
    """Joins the cluster of the configuration or of RAY_ADDRESS; without either, starts one on this machine and ends it.

    A started cluster leaves no process and no temporary directory; when the block fails its logs are kept in `logs`.

    Raises:
        ResourcesError: no cluster answers at that address.
    """
    address = _address(cluster)
    if address == LOCAL:
        with _local_cluster(logs, stop):
            yield
        return
    _require_listener(address)
    try:
        with stop.deferred():
            try:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            except SystemExit:
                raise KeyboardInterrupt("SIGTERM") from None
            finally:
                stop.install()
        stop.check()
        yield
    except (ConnectionError, ValueError, RuntimeError, RayError) as error:
        if ray.is_initialized():
            raise
        raise ResourcesError(_no_answer(address, _first_line(error))) from None
    finally:
        with stop.deferred():
            ray.shutdown()


def is_private(cluster: ClusterConfig) -> bool:
    """Whether `connected` starts a cluster that lives with this process."""
    return _address(cluster) == LOCAL


def as_joined(cluster: ClusterConfig) -> ClusterConfig:
    """The section as it holds here: a cluster that lives with this process makes no nodes."""
    return cluster.without_autoscaling() if is_private(cluster) else cluster


def _address(cluster: ClusterConfig) -> str:
    address = cluster.address or os.environ.get("RAY_ADDRESS") or LOCAL
    if address_has_password(address):  # an address of the configuration was looked at when that was read
        raise ConfigError(f"RAY_ADDRESS: {ADDRESS_PASSWORD_REFUSED}")
    return address


def _require_listener(address: str) -> None:
    """Ray itself tries for minutes before it says that nobody listens."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ResourcesError(_no_answer(address, str(error))) from None


def _no_answer(address: str, reason: str) -> str:
    return (
        f"no Ray cluster answers at {address} ({reason}). Start one with `ray start --head`, give another address, or "
        "leave it out to use this machine alone. If that cluster asks for a token, set RAY_AUTH_MODE=token."
    )


@contextlib.contextmanager
def _local_cluster(logs: Path, stop: StopSignals) -> Iterator[None]:
    _remove_abandoned_sessions()
    # Paths of sockets below it may have 107 characters at most, so it cannot be inside the run folder.
    session = Path(tempfile.mkdtemp(prefix=SESSION_PREFIX))
    lock = _lock_session(session)
    reaper = _start_reaper(session, lock)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray guards a cluster with a token; one of our own keeps it out of the home directory, where Ray would write it.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        _start_ray(session, stop)
        yield
    except BaseException:  # boundary: cleans up, then raises again
        with contextlib.suppress(OSError):
            shutil.copytree(
                session / "session_latest" / "logs", logs / "ray", dirs_exist_ok=True, ignore_dangling_symlinks=True
            )
        raise
    finally:
        with stop.deferred():
            ray.shutdown()
            _end_processes_of(session)
            shutil.rmtree(session, ignore_errors=True)
            os.close(lock)
            reaper.kill()
            reaper.communicate()


def _start_reaper(session: Path, lock: int) -> subprocess.Popen[bytes]:
    """A process that outlives a killed driver (this one): the pipe to it closes then."""
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("reaper.py")), str(session)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(lock,),  # it finds processes by the directory, which nobody may remove before it did
        start_new_session=True,  # Ctrl-C in the terminal and its end are not meant for it
    )


def _lock_session(session: Path) -> int:
    """Marks it as in use: the kernel lets the lock go with the processes that have it, however they die."""
    aside = session / f".{DRIVER_LOCK}"
    lock = os.open(aside, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
    fcntl.flock(lock, fcntl.LOCK_EX)
    aside.rename(session / DRIVER_LOCK)  # never there unlocked while it is in use
    return lock


def _remove_abandoned_sessions() -> None:
    """Of drivers of this user that were killed together with their reaper."""
    for session in Path(tempfile.gettempdir()).glob(f"{SESSION_PREFIX}*"):
        with contextlib.suppress(OSError):  # no lock in it, not ours to open, or in use (BlockingIOError)
            if session.is_symlink() or session.stat().st_uid != os.getuid():
                continue
            with (session / DRIVER_LOCK).open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(session, ignore_errors=True)


def _end_processes_of(session: Path) -> None:
    """Ends what an interrupted start left: Ray's processes name their session directory, and are our descendants."""
    left = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any(str(session) in argument for argument in process.cmdline()):
                process.kill()
                left.append(process)
    psutil.wait_procs(left, timeout=ENDED_WITHIN_S)


def _start_ray(session: Path, stop: StopSignals) -> None:
    # Cut in half, ray.init leaves processes that ray.shutdown does not know.
    with stop.deferred():
        try:
            ray.init(
                address=LOCAL,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=str(session),
            )
        except SystemExit:
            # While it starts, Ray answers SIGTERM by leaving the interpreter.
            raise KeyboardInterrupt("SIGTERM") from None
        except Exception as error:  # boundary: of a machine that is too busy Ray says so with a bare Exception
            raise ResourcesError(f"Ray could not be started on this machine: {_first_line(error)}") from error
        finally:
            stop.install()
    stop.check()


def cluster_gpus() -> float:
    """GPUs of the whole cluster."""
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return float(resources.get("GPU", 0.0))


def cpus_per_node() -> int:
    """CPUs of the smallest node that has any for actors."""
    return max(1, int(min((resources["CPU"] for resources in _live_nodes() if resources.get("CPU")), default=1)))


@contextlib.contextmanager
def granted(placement: Placement, cluster: ClusterConfig, tell: Callable[[str], None]) -> Iterator[Reservation]:
    """Reserves the bundles for the length of the block.

    Args:
        tell: told once when there is no room yet.

    Raises:
        ResourcesError: the cluster has too little and makes no nodes, or has no room within `start_timeout_s`.
    """
    timeout_s = cluster.start_timeout_s
    try:
        check_fits(placement, _available(), _live_nodes())
    except ResourcesError:
        if not cluster.autoscaling:
            raise
        tell(f"waiting up to {timeout_s:g} s for new nodes: {asked_and_available(placement, _available())}")
    group = placement_group([dict(bundle) for bundle in placement.bundles], strategy="PACK")
    reservation = Reservation(placement, group, timeout_s)
    try:
        if not _has_room(group, timeout_s):
            raise ResourcesError(f"after {timeout_s:g} s: " + shortage(placement, _available(), _live_nodes()))
        yield reservation
    finally:
        if ray.is_initialized():
            reservation.give_back()


def _has_room(group: PlacementGroup, timeout_s: float) -> bool:
    """Whether Ray places it within the time."""
    end = time.monotonic() + timeout_s
    ready = group.ready()
    what = f"the cluster to have room for {len(group.bundle_specs)} bundles"
    with current_waits().waiting("controller", what, timeout_s=timeout_s, root=True):
        # In slices: a signal is then acted upon at once.
        while (left := end - time.monotonic()) > 0:
            placed, _ = ray.wait([ready], timeout=min(left, SIGNALS_SEEN_WITHIN_S))
            if placed:
                return True
    return False


class Reservation:
    """The bundles of a run, and those of samplers that were added to it.

    Args:
        timeout_s: how long a bundle may take to be placed.
    """

    def __init__(self, placement: Placement, group: PlacementGroup, timeout_s: float) -> None:
        self.group = group
        self._placement = placement
        self._timeout_s = timeout_s
        self._more: dict[str, PlacementGroup] = {}

    async def placed_again(self, bundles: Iterable[int]) -> None:
        """Returns when these bundles are on live nodes: Ray moves those of a lost node to others if they have room.

        Raises:
            ResourcesError: there is none; says what is missing.
        """
        if not await _placed(self.group, bundles, self._timeout_s):
            raise ResourcesError(
                f"a node with actors of this run is gone, and for {self._timeout_s:g} s no other had room for them: "
                + shortage(self._placement, _available(), _live_nodes())
            )

    async def one_more(self, name: str, bundle: Mapping[str, float]) -> PlacementGroup:
        """A bundle of its own for a sampler; asked for again under the same name it is the same."""
        if name not in self._more:
            self._more[name] = placement_group([dict(bundle)], strategy="PACK")
        if not await _placed(self._more[name], (0,), self._timeout_s):
            remove_placement_group(self._more.pop(name))
            raise ResourcesError(_no_room(name, (bundle,)) + ". Add a node, or ask for fewer samplers")
        return self._more[name]

    def give_back(self, name: str | None = None) -> None:
        """The bundle of one added sampler, or all bundles."""
        groups = [*self._more.values(), self.group] if name is None else [self._more.pop(name, None)]
        for group in groups:
            if group is not None:
                remove_placement_group(group)


async def reserve(name: str, bundles: Sequence[Mapping[str, float]], timeout_s: float) -> PlacementGroup:
    """Bundles for actors that come and go on their own; give them back with `remove_placement_group`.

    Raises:
        ResourcesError: there is no room within `timeout_s`; says what is missing.
    """
    # Its own task: cancelled, the thread would still make the group, and nobody would give it back.
    making = asyncio.create_task(
        asyncio.to_thread(placement_group, [dict(bundle) for bundle in bundles], strategy="PACK")
    )
    try:
        group: PlacementGroup = await asyncio.shield(making)
        if not await _placed(group, range(len(bundles)), timeout_s):
            raise ResourcesError(await asyncio.to_thread(_no_room, name, bundles))
    except BaseException:  # boundary: cleans up, then raises again
        await asyncio.shield(_take_back(making))
        raise
    return group


async def _take_back(making: asyncio.Task[PlacementGroup]) -> None:
    await asyncio.wait([making])
    if making.exception() is None:
        await asyncio.to_thread(remove_placement_group, making.result())


def _no_room(name: str, bundles: Sequence[Mapping[str, float]]) -> str:
    kinds = sorted({kind for bundle in bundles for kind in bundle})
    wanted = " and ".join(", ".join(f"{kind} {amount:g}" for kind, amount in bundle.items()) for bundle in bundles)
    free = ", ".join(f"{kind} {_available().get(kind, 0.0):g}" for kind in kinds)
    return f"{name} needs {wanted}, each on one node; free in the cluster: {free}"


async def _placed(group: PlacementGroup, bundles: Iterable[int], timeout_s: float) -> bool:
    wanted = tuple(bundles)
    with current_waits().waiting("Ray", f"finds room for {len(group.bundle_specs)} bundles", timeout_s=timeout_s):
        # A node that died may be noticed only now: a bundle that was there a moment ago says nothing.
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            table: dict[str, Any] = await asyncio.to_thread(placement_group_table, group)
            nodes: dict[int, str] = table.get("bundles_to_node_id", {})
            if all(nodes.get(bundle) for bundle in wanted):
                return True
            await asyncio.sleep(PLACEMENT_POLL_S)
    return False


def who_has(resources: Iterable[str]) -> str:
    """Which live nodes have these resources, and how much is free in all, in words."""
    names = tuple(resources)
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    there = nodes_with(names, [(node["NodeManagerAddress"], node["Resources"]) for node in nodes if node["Alive"]])
    free = in_words({name: _available().get(name, 0.0) for name in names})
    return f"nodes that have it: {there}; free in the cluster: {free}"


def _live_nodes() -> list[Mapping[str, float]]:
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node["Resources"] for node in nodes if node["Alive"]]


def _available() -> Mapping[str, float]:
    free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    return free


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
