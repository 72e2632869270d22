"""Room in the cluster for actors that come and go, with a fake cluster: it is given back whatever happens, and the
event loop of a server never stands still for it."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest

import actors.cluster
import actors.ending
from actors.cluster import reserve
from weaver_rl.errors import ResourcesError

pytestmark = pytest.mark.unit


class Cluster:
    """Makes groups slowly, and never finds room for one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.groups: list[Any] = []
        self.making = threading.Event()
        for name in ("placement_group", "placement_group_table", "remove_placement_group", "_available"):
            monkeypatch.setattr(actors.cluster, name, self._off_the_loop(getattr(self, f"_{name.strip('_')}")))

    def _off_the_loop(self, function: Any) -> Any:
        def called(*args: Any, **options: Any) -> Any:
            assert threading.current_thread() is not threading.main_thread()
            return function(*args, **options)

        return called

    def _placement_group(self, bundles: Any, strategy: str) -> Any:
        self.making.set()
        time.sleep(0.2)
        self.groups.append(Group())
        return self.groups[-1]

    def _placement_group_table(self, group: Any) -> dict[str, Any]:
        return {}

    def _remove_placement_group(self, group: Any) -> None:
        self.groups.remove(group)

    def _available(self) -> dict[str, float]:
        return {"CPU": 0.5}


class Group:
    bundle_specs = ({"CPU": 1.0},)


@pytest.mark.parametrize("after_s", [0.0, 0.5])  # the group is being made; it is made and waits for room
def test_who_gives_up_leaves_no_group_behind(monkeypatch: pytest.MonkeyPatch, after_s: float):
    cluster = Cluster(monkeypatch)

    async def main() -> None:
        reserving = asyncio.create_task(reserve("engine", [{"CPU": 1.0}], 60.0))
        assert await asyncio.to_thread(cluster.making.wait, 10.0)
        await asyncio.sleep(after_s)
        reserving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reserving

    asyncio.run(main())
    assert cluster.groups == []


def test_a_group_without_room_is_given_back(monkeypatch: pytest.MonkeyPatch):
    cluster = Cluster(monkeypatch)
    with pytest.raises(ResourcesError, match=r"engine needs CPU 1, each on one node; free in the cluster: CPU 0.5"):
        asyncio.run(reserve("engine", [{"CPU": 1.0}], 0.1))
    assert cluster.groups == []


def test_actors_are_killed_off_the_event_loop(monkeypatch: pytest.MonkeyPatch):
    killed: list[bool] = []

    def kill(actor: Any, *, no_restart: bool) -> None:
        killed.append(threading.current_thread() is not threading.main_thread())

    monkeypatch.setattr(actors.ending.ray, "kill", kill)
    asyncio.run(actors.ending.end_actor("actor", kill=True))
    assert killed == [True]
