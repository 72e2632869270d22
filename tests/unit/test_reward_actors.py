"""How reward workers are made, and what is said of one that Ray can place nowhere. No Ray runs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors import cluster, reward, spawn
from actors.reward import RayRewardFactory
from weaver_rl.custom_resources import nodes_with
from weaver_rl.errors import ActorFailedError, RewardError
from weaver_rl.rewards.config import RewardWorkersConfig
from weaver_rl.user_code import collect_code

pytestmark = pytest.mark.unit


class FakeRay:
    """Writes down what an actor is made with."""

    def __init__(self) -> None:
        self.options_given: dict[str, Any] = {}

    def remote(self, _actor: type) -> FakeRay:
        return self

    def options(self, **options: Any) -> Any:
        self.options_given = options
        return SimpleNamespace(remote=lambda *_arguments: object())


@pytest.mark.parametrize("resources", [{}, {"reward": 1.0}])
def test_a_worker_asks_for_its_custom_resources_and_no_cpu(
    resources: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ray = FakeRay()
    monkeypatch.setattr(spawn, "ray", ray)
    actors = spawn.Actors()
    config = RewardWorkersConfig(resources=resources)
    spawn.spawn_reward_worker(actors, config, (), collect_code(["task"], tmp_path), None)
    assert ray.options_given == {"num_cpus": 0, "resources": resources, "scheduling_strategy": "SPREAD"}
    assert len(actors.reward_workers) == 1


async def never() -> None:
    await asyncio.Event().wait()


async def refuses() -> None:
    raise RewardError("the reward cannot be loaded")


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Starts a worker; the error it ends with, and it must be ended by then."""
    killed: list[Any] = []

    async def end_actor(actor: Any, *, kill: bool) -> None:
        assert kill
        killed.append(actor)

    monkeypatch.setattr(reward, "end_actor", end_actor)

    def started(answers: Callable[[], Awaitable[None]], resources: dict[str, float]) -> str:
        actor = SimpleNamespace(start=SimpleNamespace(remote=answers))
        factory = RayRewardFactory(
            lambda: actor,
            resources=resources,
            who_has=lambda asked: f"nodes that have {', '.join(asked)}: none",
            start_timeout_s=0.05,
            timeout_s=1.0,
            unresponsive_after_s=1.0,
        )
        with pytest.raises((ActorFailedError, RewardError)) as raised:
            asyncio.run(factory.start("reward worker 0"))
        assert killed == [actor]
        return str(raised.value)

    return started


def test_one_that_no_node_can_hold_is_an_error_that_names_the_resource_and_who_has_it(start: Callable[..., str]):
    assert start(never, {"reward": 1.0}) == (
        "reward worker 0 did not answer within 0.05 s while it was loading the rewards. It asks for reward 1 "
        "(reward_workers.resources); nodes that have reward: none"
    )


def test_what_has_other_reasons_is_said_as_it_was(start: Callable[..., str]):
    late = "reward worker 0 did not answer within 0.05 s while it was loading the rewards"
    assert start(never, {}) == late


def test_rewards_that_cannot_be_loaded_are_said_as_they_were(start: Callable[..., str]):
    assert start(refuses, {"reward": 1.0}) == "the reward cannot be loaded"


def test_who_has_a_resource_is_told_of_live_nodes(monkeypatch: pytest.MonkeyPatch):
    nodes = [
        {"NodeManagerAddress": "10.0.0.1", "Alive": True, "Resources": {"CPU": 8.0}},
        {"NodeManagerAddress": "10.0.0.2", "Alive": True, "Resources": {"CPU": 8.0, "reward": 4.0}},
        {"NodeManagerAddress": "10.0.0.3", "Alive": False, "Resources": {"reward": 4.0}},
    ]
    ray = SimpleNamespace(nodes=lambda: nodes, available_resources=lambda: {"CPU": 16.0, "reward": 0.5})
    monkeypatch.setattr(cluster, "ray", ray)
    assert cluster.who_has(["reward"]) == ("nodes that have it: 10.0.0.2 (reward 4); free in the cluster: reward 0.5")
    assert cluster.who_has(["judge"]) == "nodes that have it: none; free in the cluster: judge 0"


def test_nodes_are_named_with_each_resource_that_they_have():
    nodes = [("a", {"x": 1.0, "y": 2.0}), ("b", {"y": 3.0}), ("c", {"CPU": 1.0})]
    assert nodes_with(["x", "y"], nodes) == "a (x 1, y 2), b (y 3)"
