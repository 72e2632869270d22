"""Real parts that several test modules share: one cluster, two engines, three learner ranks.

A pytest plugin, so that an engine starts once however many modules use it. Tests import nothing from here.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from sampler_parts import KINDS, START_TIMEOUT_S, ReplicaFleet, make_model, sampler_spec

from actors.learner import LearnerRank
from actors.sampler import CONCURRENCY_GROUPS, Sampler
from weaver_rl.sampler_fleet import SamplerFleet


@pytest.hookimpl
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on the shared cluster come after those that start their own; tests that kill a shared actor come last."""

    def rank(item: pytest.Item) -> int:
        names = getattr(item, "fixturenames", ())
        return 2 if any(name.startswith("doomed") for name in names) else int("cluster" in names)

    items.sort(key=rank)


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    # Paths of sockets below it may have 107 characters at most, so it cannot be pytest's.
    with tempfile.TemporaryDirectory(prefix="weaver-rl-", ignore_cleanup_errors=True) as session:
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=session,
        )
        yield
        ray.shutdown()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: make_model(tmp_path_factory.mktemp(kind), tied=kind == "tied") for kind in KINDS}


@pytest.fixture(scope="session")
def rank_actors(cluster: None) -> dict[str, list[Any]]:
    remote = ray.remote(LearnerRank).options(num_cpus=0)
    return {"tied": [remote.remote()], "untied": [remote.remote(), remote.remote()]}


@pytest.fixture(scope="session")
def samplers(cluster: None, models: dict[str, Path]) -> Iterator[dict[str, Any]]:
    """Both engines, started; the seeds of the engines differ as a run's do."""
    remote: Any = ray.remote(concurrency_groups=CONCURRENCY_GROUPS)(Sampler).options(num_cpus=0, max_concurrency=100)
    actors = {kind: remote.remote(1) for kind in KINDS}
    started = [actors[kind].start.remote(sampler_spec(kind, models[kind], seed)) for seed, kind in enumerate(KINDS)]
    ray.get(started, timeout=START_TIMEOUT_S)
    yield actors
    ray.wait([actor.close.remote() for actor in actors.values()], num_returns=2, timeout=30)


@pytest.fixture
def replicas(samplers: dict[str, Any]) -> SamplerFleet:
    return ReplicaFleet(samplers)


@pytest.fixture(scope="session")
def doomed_samplers(samplers: dict[str, Any]) -> dict[str, Any]:
    """The samplers, for a test that kills one."""
    return samplers


@pytest.fixture(scope="session")
def doomed_ranks(rank_actors: dict[str, list[Any]]) -> list[Any]:
    """The two ranks of a learner, for a test that kills one."""
    return rank_actors["untied"]
