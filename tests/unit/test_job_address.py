"""Which job server a command means, and what is said of an address that can be none."""

from __future__ import annotations

import pytest

from weaver_rl.errors import ConfigError
from weaver_rl.job_address import job_server_address
from weaver_rl.local_clusters import LocalCluster

pytestmark = pytest.mark.unit


def cluster(name: str, port: int, *, ready: bool = True) -> LocalCluster:
    return LocalCluster(
        name=name,
        session=f"/tmp/{name}",
        address=f"10.0.0.5:{port}",
        dashboard=f"http://127.0.0.1:{port + 1}",
        token_file="",
        ready=ready,
    )


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("http://head:8265", "http://head:8265"),
        ("http://head:8265/", "http://head:8265"),
        ("https://ray.example.org/team", "https://ray.example.org/team"),
        ("head", "http://head:8265"),
        ("head:9000", "http://head:9000"),
    ],
)
def test_an_address_is_made_a_url(given: str, url: str):
    assert job_server_address(given, {}, ()) == url


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("ray://head:10001", "write http://head:8265"),
        ("head:6379", "6379 is Ray's own port; jobs go to the dashboard, http://head:8265"),
        ("head:10001", "Ray Client"),
        ("http://head:port", "the port is no number"),
        ("http://", "no host"),
        ("http://[::1", "Invalid IPv6 URL"),
        ("grpc://head:1", "jobs go to the dashboard by HTTP"),
    ],
)
def test_one_that_is_none_is_told_what_one_looks_like(given: str, words: str):
    with pytest.raises(ConfigError, match="--address") as error:
        job_server_address(given, {}, ())
    assert words in str(error.value)


def test_a_password_in_an_address_is_refused_and_not_shown():
    for given in (
        "http://anne:secret@h:8265",
        "http://anne:secret@h:port",
        "ray://anne:se/secret@h",
        "anne:secret@h:8265",
    ):
        with pytest.raises(ConfigError, match="RAY_JOB_HEADERS") as error:
            job_server_address(given, {}, ())
        assert "secret" not in str(error.value)


def test_the_option_comes_before_the_environment_and_that_before_the_local_cluster():
    here = [cluster("default", 7000)]
    both = {"RAY_API_SERVER_ADDRESS": "http://a:1", "RAY_DASHBOARD_ADDRESS": "http://b:1"}
    assert job_server_address("http://c:1", both, here) == "http://c:1"
    assert job_server_address(None, both, here) == "http://a:1"
    assert job_server_address(None, {"RAY_DASHBOARD_ADDRESS": "http://b:1"}, here) == "http://b:1"
    assert job_server_address(None, {"RAY_ADDRESS": "http://d:1"}, here) == "http://d:1"
    assert job_server_address(None, {}, here) == "http://127.0.0.1:7001"


def test_of_several_local_clusters_the_one_of_ray_address_is_meant():
    here = [cluster("one", 7000), cluster("two", 8000), cluster("half", 9000, ready=False)]
    assert job_server_address(None, {"RAY_ADDRESS": "10.0.0.5:8000"}, here) == "http://127.0.0.1:8001"
    for environment in ({}, {"RAY_ADDRESS": "10.0.0.9:6379"}):
        with pytest.raises(
            ConfigError, match=r"no job server is named: .*http://127.0.0.1:7001, http://127.0.0.1:8001"
        ):
            job_server_address(None, environment, here)
    with pytest.raises(ConfigError, match="weaver-rl cluster start"):
        job_server_address(None, {}, [])
