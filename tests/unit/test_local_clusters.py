"""What is written down of local clusters, and whose token is shown to whom."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from weaver_rl.cli import app
from weaver_rl.errors import ConfigError
from weaver_rl.local_clusters import ClusterNode, LocalCluster, cluster_files, local_clusters, show_token_of

pytestmark = pytest.mark.unit

SERVER = Path(__file__).resolve().parents[2] / "configs" / "serve_quickstart.yaml"


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> LocalCluster:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    files = cluster_files("default")
    started_at = psutil.Process().create_time()
    node = ClusterNode(name="default-0", pid=os.getpid(), started_at=started_at, num_cpus=2, log="/tmp/x/0.log")
    cluster = LocalCluster(
        name="default",
        session="/tmp/x",
        address="10.0.0.5:41001",
        dashboard="http://127.0.0.1:41002",
        token_file=str(files.token),
        nodes=(node,),
        ready=True,
    )
    with files.locked():
        files.write_token("secret")
        files.write(cluster)
    return cluster


def test_what_is_written_is_read(written: LocalCluster):
    assert cluster_files("default").read() == written
    assert local_clusters() == [written]
    assert cluster_files("other").read() is None


def test_the_token_is_its_owners_only(written: LocalCluster):
    token = cluster_files("default").token
    token.chmod(0o644)
    cluster_files("default").write_token("other")
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert stat.S_IMODE(token.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("address", ["10.0.0.5:41001", "http://127.0.0.1:41002", "localhost:41002"])
def test_the_clusters_own_address_is_shown_its_token(written: LocalCluster, address: str):
    environment: dict[str, str] = {}
    show_token_of(address, environment)
    assert environment == {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": written.token_file}


@pytest.mark.parametrize("address", [None, "", "10.0.0.5:41003", "http://10.0.0.6:41001", "auto", "http://[::1"])
def test_nobody_else_is(written: LocalCluster, address: str | None):
    environment: dict[str, str] = {}
    show_token_of(address, environment)
    assert environment == {}


@pytest.mark.parametrize("foreign", [{"RAY_AUTH_TOKEN": "mine"}, {"RAY_AUTH_TOKEN_PATH": "/home/me/token"}])
def test_a_token_for_another_cluster_is_not_shown_to_it(written: LocalCluster, foreign: dict[str, str]):
    environment = dict(foreign)
    show_token_of(written.address, environment)
    assert environment == {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": written.token_file}
    environment = dict(foreign)
    show_token_of("10.0.0.6:41001", environment)
    assert environment == foreign


def test_where_its_head_is_gone_a_token_of_the_users_is_for_who_is_there_now(written: LocalCluster):
    files = cluster_files("default")
    dead = replace(written.nodes[0], started_at=1767225600.25)
    with files.locked():
        files.write(replace(written, nodes=(dead,)))
    environment = {"RAY_AUTH_TOKEN": "mine"}
    show_token_of(written.dashboard, environment)
    assert environment == {"RAY_AUTH_TOKEN": "mine"}


def test_a_server_shows_it_too(written: LocalCluster, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/home/me/token")
    shown: list[str | None] = []
    monkeypatch.setattr("actors.serve.serve", lambda *_: shown.append(os.environ.get("RAY_AUTH_TOKEN_PATH")))
    ended = CliRunner().invoke(app, ["serve", str(SERVER), "--address", written.address])
    assert (ended.exit_code, shown) == (0, [written.token_file]), ended.output


def test_two_commands_do_not_start_or_stop_one_cluster_at_once(written: LocalCluster):
    with (
        cluster_files("default").locked(),
        pytest.raises(ConfigError, match="started or stopped by another"),
        cluster_files("default").locked(),
    ):
        pass


def test_a_relative_state_directory_counts_for_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Nodes run in directories of their own, where they would not find the token."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", "state")
    assert cluster_files("default").directory.is_relative_to(tmp_path / ".local" / "state" / "weaver-rl")


def test_a_state_that_is_none_says_which_file(written: LocalCluster):
    cluster_files("default").state.write_text("{}")
    with pytest.raises(ConfigError, match=r"cluster\.json is not the state of a cluster"):
        cluster_files("default").read()
    assert local_clusters() == []


def test_a_home_on_several_machines_has_clusters_of_each(written: LocalCluster, monkeypatch: pytest.MonkeyPatch):
    assert written in local_clusters()
    monkeypatch.setattr("socket.gethostname", lambda: "another")
    assert local_clusters() == []
    assert cluster_files(written.name).read() is None
