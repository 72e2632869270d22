"""A local cluster where Ray itself is not needed: a port that is taken, a token that is refused."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.exceptions import AuthenticationError

from actors.cluster import connected
from actors.local_cluster import ClusterShape, look_at, start_cluster
from actors.signals import StopSignals
from weaver_rl.errors import ConfigError, ResourcesError
from weaver_rl.local_clusters import ClusterNode, LocalCluster, cluster_files
from weaver_rl.placement import ClusterConfig
from weaver_rl.process_state import start_time

pytestmark = pytest.mark.unit


@pytest.fixture
def port() -> Iterator[int]:
    """Somebody listens at it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


@pytest.fixture
def _refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise AuthenticationError("Unauthenticated: the token\nis another")

    monkeypatch.setattr(ray, "init", refuse)


@pytest.mark.parametrize("which", ["port", "dashboard_port"])
def test_a_port_that_is_refused_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, port: int, which: str):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with pytest.raises(ConfigError, match=f"{port} cannot be had"):
        start_cluster(cluster_files("default"), ClusterShape(**{which: port}))
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.usefixtures("_refuses")
def test_a_token_that_is_refused_is_one_line_beside_the_processes(port: int):
    own = ClusterNode(
        name="default-0", pid=os.getpid(), started_at=start_time(os.getpid()) or 0.0, num_cpus=1, log="/nowhere"
    )
    cluster = LocalCluster(
        name="default",
        session="/nowhere",
        address=f"127.0.0.1:{port}",
        dashboard="http://127.0.0.1:1",
        token_file="/nowhere/token",
        nodes=(own,),
    )
    looked = look_at(cluster)
    expected = f"127.0.0.1:{port} refused the token in /nowhere/token (Unauthenticated: the token is another)"
    assert looked.problem == expected
    assert [look.serves for look in looked.nodes] == [False]


@pytest.mark.usefixtures("_refuses")
def test_a_run_whose_token_is_refused_ends_in_one_line(port: int, tmp_path: Path):
    with (
        StopSignals() as stop,
        pytest.raises(ResourcesError, match=r"no Ray cluster answers at 127\.0\.0\.1:\d+ \(Unauthenticated: the token"),
        connected(ClusterConfig(address=f"127.0.0.1:{port}"), tmp_path, stop),
    ):
        pass
