"""What a Ray dashboard says of its cluster: totals, what is free, and a token that it asks for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from check_parts import a_run, lines
from fake_dashboard import GIB, FakeDashboard, answering

from actors.cluster_check import ask_cluster
from weaver_rl.check.capacity import check_capacity
from weaver_rl.check.resources import ClusterFacts
from weaver_rl.errors import ConfigError, ResourcesError

pytestmark = pytest.mark.unit

GROUP = "0" * 34 + "01000000"
TWO_NODES = {
    "a" * 56: {"CPU": (1.5, 4.0), "GPU": (0.0, 2.0), "my_kind": (0.0, 1.0), "object_store_memory": (0.0, 8.0 * GIB)},
    "b" * 56: {"CPU": (0.0, 4.0), "memory": (0.0, 16.0 * GIB), "object_store_memory": (2.0 * GIB, 4.0 * GIB)},
}


@pytest.fixture(autouse=True)
def _no_headers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RAY_JOB_HEADERS", raising=False)


def facts(nodes: Mapping[str, Any], usage: Mapping[str, Any] | None = None) -> ClusterFacts:
    with answering(FakeDashboard(nodes, usage)) as dashboard:
        return ask_cluster(dashboard.address, run_dir="/runs/x")


def test_what_is_used_is_not_free():
    found = facts(TWO_NODES)
    assert found.available is not None
    assert {kind: found.available[kind] for kind in ("CPU", "GPU", "my_kind")} == {"CPU": 6.5, "GPU": 2, "my_kind": 1}
    assert found.available["object_store_memory"] == 10 * GIB
    assert found.total["CPU"] == 8
    line = lines(check_capacity(a_run(facts=found)))["cluster"].seen
    assert "2 node(s), 8 CPUs, 2 GPUs, free 6.5 CPUs, 2 GPUs" in line


def test_names_are_those_that_nodes_were_started_with():
    """Ray's dashboard writes my_kind as myKind."""
    found = facts(TWO_NODES)
    assert found.nodes[0].resources["my_kind"] == 1
    assert [node.object_store_bytes for node in found.nodes] == [8 * GIB, 4 * GIB]
    placed = lines(check_capacity(a_run("sampler.resources={my_kind: 1}", facts=found)))["placement"]
    assert placed.level == "pass"


def test_all_of_a_placement_group_is_taken():
    """Ray counts only what runs in it as used."""
    used = {"CPU": (3.0, 4.0), f"CPU_group_{GROUP}": (1.0, 3.0), f"CPU_group_0_{GROUP}": (1.0, 3.0)}
    found = facts({"a" * 56: used})
    assert found.available == {"CPU": 1.0}
    assert lines(check_capacity(a_run(facts=found)))["placement"].level == "fail"


@pytest.mark.parametrize(
    "usage", [{}, {"a" * 56: "4.0/4.0 CPU"}, *(dict.fromkeys(TWO_NODES, words) for words in ("CPU: 1/4", 4.0))]
)
def test_where_ray_does_not_say_what_is_used_nothing_is_passed(usage: dict[str, Any]):
    found = facts(TWO_NODES, usage)
    assert found.available is None
    seen = lines(check_capacity(a_run(facts=found)))
    assert "8 CPUs, 2 GPUs, free: not known by HTTP" in seen["cluster"].seen
    assert seen["placement"].level == "warn"
    assert "free: not known by HTTP" in seen["placement"].seen
    too_much = lines(check_capacity(a_run("sampler.num_replicas=20", facts=found)))
    assert too_much["placement"].level == "fail"


def test_a_dashboard_that_wants_a_token_says_how_to_give_it(monkeypatch: pytest.MonkeyPatch):
    with answering(FakeDashboard(TWO_NODES, token="secret")) as dashboard:
        with pytest.raises(ResourcesError, match=r"asks for a token \(HTTP Error 401.*RAY_AUTH_TOKEN_PATH"):
            ask_cluster(dashboard.address, run_dir="/runs/x")
        monkeypatch.setenv("RAY_JOB_HEADERS", '{"Authorization": "Bearer wrong"}')
        with pytest.raises(ResourcesError, match=r"asks for a token \(HTTP Error 403"):
            ask_cluster(dashboard.address, run_dir="/runs/x")
        monkeypatch.setenv("RAY_JOB_HEADERS", '{"Authorization": "Bearer secret"}')
        assert ask_cluster(dashboard.address, run_dir="/runs/x").total["CPU"] == 8
        monkeypatch.setenv("RAY_JOB_HEADERS", "Bearer secret")
        with pytest.raises(ConfigError, match="RAY_JOB_HEADERS is no JSON"):
            ask_cluster(dashboard.address, run_dir="/runs/x")


def test_a_token_that_cannot_be_read_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from ray.exceptions import AuthenticationError

    def unreadable(_: dict[str, str]) -> dict[str, str]:
        raise AuthenticationError("RAY_AUTH_TOKEN_PATH is set but file cannot be opened")

    monkeypatch.setattr(
        "ray._private.authentication.http_token_authentication.get_auth_headers_if_auth_enabled", unreadable
    )
    with pytest.raises(ResourcesError, match=r"asks for a token \(RAY_AUTH_TOKEN_PATH is set but"):
        ask_cluster("http://127.0.0.1:1", run_dir="/runs/x")
