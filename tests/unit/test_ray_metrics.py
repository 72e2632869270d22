"""Figures handed to Ray: with the labels of the table, never an error to who tells them, and gone at the end."""

from __future__ import annotations

import math
from typing import Any

import pytest

from actors import ray_metrics
from actors.ray_metrics import CounterFromZero, RayMeter, metered
from weaver_rl.meter import NoMeter
from weaver_rl.placement import ClusterConfig
from weaver_rl.prometheus import Exported

pytestmark = pytest.mark.unit

TABLE = (
    Exported(name="weaver_rl_a", kind="gauge", labels=("run", "x"), meaning="a"),
    Exported(name="weaver_rl_b_total", kind="counter", labels=("run",), meaning="b"),
    Exported(name="weaver_rl_c_seconds", kind="histogram", labels=("run",), meaning="c", buckets=(1.0, 2.0)),
)


EVENTS = Exported(
    name="weaver_rl_d_total",
    kind="counter",
    labels=("run", "role"),
    meaning="d",
    known=({"role": "sampler"}, {"role": "learner"}),
)


class FakeMetric:
    """What Ray's metrics are told, in order, over all of them."""

    told: list[tuple[Any, ...]] = []  # noqa: RUF012
    error: Exception | None = None

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...], boundaries: list[float] | None = None):
        self.name, self.tag_keys = name, tag_keys
        self.told.append(("made", name, tag_keys, boundaries))

    def record(self, value: float, tags: dict[str, str]) -> None:
        if FakeMetric.error is not None:
            raise FakeMetric.error
        assert set(tags) == set(self.tag_keys)
        self.told.append((self.name, value, tags))

    set = inc = observe = record

    def begin(self, tags: dict[str, str]) -> None:
        self.record(0.0, tags)


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    FakeMetric.told, FakeMetric.error = [], None
    for kind in ("Gauge", "CounterFromZero", "Histogram"):
        monkeypatch.setattr(ray_metrics, kind, FakeMetric)
    return FakeMetric.told


def test_what_is_told_is_handed_over_with_all_labels(told: list[tuple[Any, ...]]):
    meter = RayMeter(TABLE, {"run": "r"})
    meter.set("weaver_rl_a", 1, x="y")
    meter.add("weaver_rl_b_total", 2)
    meter.add("weaver_rl_b_total", 0)  # Ray refuses it
    meter.observe("weaver_rl_c_seconds", 1.5)
    assert told == [
        ("made", "weaver_rl_a", ("run", "x"), None),
        ("weaver_rl_a", 1.0, {"run": "r", "x": "y"}),
        ("made", "weaver_rl_b_total", ("run",), None),
        ("weaver_rl_b_total", 2.0, {"run": "r"}),
        ("made", "weaver_rl_c_seconds", ("run",), [1.0, 2.0]),
        ("weaver_rl_c_seconds", 1.5, {"run": "r"}),
    ]


def test_counters_whose_labels_are_known_are_there_before_anything_is_counted(told: list[tuple[Any, ...]]):
    meter = RayMeter((*TABLE, EVENTS), {"run": "r"})
    meter.add("weaver_rl_d_total", 1, role="learner")
    assert told == [
        ("made", "weaver_rl_d_total", ("run", "role"), None),
        ("weaver_rl_d_total", 0.0, {"run": "r", "role": "sampler"}),
        ("weaver_rl_d_total", 0.0, {"run": "r", "role": "learner"}),
        ("weaver_rl_d_total", 1.0, {"run": "r", "role": "learner"}),
    ]


def test_a_counter_of_rays_begins_at_0():
    counter = CounterFromZero("weaver_rl_d_total", "d", ("run",))
    counter._metric = RayRecords()
    counter.begin({"run": "r"})
    counter.inc(1.0, {"run": "r"})
    assert counter._metric.records == [(0.0, {"run": "r"}), (1.0, {"run": "r"})]


class RayRecords:
    """In the place of what Ray's counters hand their figures to."""

    def __init__(self) -> None:
        self.records: list[tuple[float, dict[str, str]]] = []

    def record(self, value: float, tags: dict[str, str]) -> None:
        self.records.append((value, tags))


def test_gauges_go_with_the_process(told: list[tuple[Any, ...]]):
    with metered(ClusterConfig(address="somewhere:6379"), TABLE, {"run": "r"}) as meter:
        meter.set("weaver_rl_a", 1, x="y")
        meter.set("weaver_rl_a", 2, x="z")
    ended = {tags["x"] for name, value, tags in told[-2:] if math.isnan(value)}
    assert ended == {"y", "z"}


def test_a_figure_that_cannot_be_shown_is_a_warning_once(caplog: pytest.LogCaptureFixture):
    meter = RayMeter(TABLE, {"run": "r"})
    FakeMetric.error = RuntimeError("no connection")
    meter.set("weaver_rl_a", 1, x="y")
    meter.add("weaver_rl_unknown", 1)
    meter.close()
    assert [record.getMessage() for record in caplog.records] == [
        "metrics for Prometheus are incomplete: RuntimeError: no connection"
    ]


def test_nothing_is_told_in_a_cluster_of_ones_own(told: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with metered(ClusterConfig(), TABLE, {"run": "r"}) as meter:
        assert isinstance(meter, NoMeter)
        meter.set("weaver_rl_a", 1, x="y")
    assert not told
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    with metered(ClusterConfig(), TABLE, {"run": "r"}) as meter:
        assert isinstance(meter, RayMeter)
