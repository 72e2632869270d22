"""What a meter is told of a server: requests by route, operations, tokens, and clients' own metrics, all bounded."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from fake_cluster import FakeLearners, FakeSamplers
from http_fakes import FakeService
from http_serving import calling, serve_config
from recording_meter import RecordingMeter, series
from test_service import ANNE, LINEUP, Clock, Server, config, serving

from weaver_rl.errors import ServiceError
from weaver_rl.service.http.app import create_app
from weaver_rl.service.http.auth import ApiKeys
from weaver_rl.service.metrics_table import SERVICE_METRICS
from weaver_rl.service.operations import Operations
from weaver_rl.service.records import SessionMetric
from weaver_rl.service.service import Service
from weaver_rl.service.service_meter import ServerFigures, SessionMetrics, follow
from weaver_rl.service.state_files import StateFiles
from weaver_rl.service.store import Store

pytestmark = pytest.mark.unit


@pytest.fixture
def meter() -> RecordingMeter:
    return RecordingMeter(SERVICE_METRICS, "server")


def test_requests_are_counted_by_route_whatever_the_path(meter: RecordingMeter):
    app = create_app(FakeService(), serve_config(), ApiKeys.of({"a": "sk-a"}), download_secret=b"secret", meter=meter)

    async def main() -> None:
        async with calling(app, "sk-a") as client:
            await client.get("/health")
            for number in range(5):
                await client.get(f"/api/v1/models/model-{number}")
                await client.get(f"/nowhere/{number}")
            await client.request("BREW", "/health")
        async with calling(app, "wrong") as client:
            await client.get("/api/v1/models")

    asyncio.run(main())
    name, model = "weaver_rl_service_requests_total", "/api/v1/models/{model_id}"
    counted = dict(meter.counters)
    assert counted.pop(series(name, endpoint="/health", method="GET", status="200")) == 1
    of_models = {key: value for key, value in counted.items() if ("endpoint", model) in key[1]}
    assert sum(of_models.values()) == 5
    assert len(of_models) == 1
    others = {key: value for key, value in counted.items() if key not in of_models}
    assert others.pop(series(name, endpoint="other", method="GET", status="404")) == 5
    assert others.pop(series(name, endpoint="other", method="GET", status="401")) == 1
    ((brewed, times),) = others.items()
    assert (("method", "other") in brewed[1], times) == (True, 1)
    seconds = meter.histograms[series("weaver_rl_service_request_seconds", endpoint=model, method="GET")]
    assert len(seconds) == 5
    assert all(0 <= value < 5 for value in seconds)


def test_operations_tokens_and_versions_are_counted(meter: RecordingMeter, tmp_path: Path):
    async def main() -> None:
        clock, settings = Clock(), config()
        learners, samplers = FakeLearners(), FakeSamplers()
        with StateFiles(tmp_path) as files:
            async with (
                Store.opened(files.database_url, clock=clock) as store,
                Operations(store, settings.operations, clock, meter) as operations,
                Service(
                    config=settings,
                    store=store,
                    operations=operations,
                    files=files,
                    learners=learners,
                    samplers=samplers,
                    lineup=LINEUP,
                    clock=clock,
                    meter=meter,
                ) as service,
            ):
                server = Server(service, store, learners, samplers)
                model = await server.model()
                await server.step(model)
                with pytest.raises(ServiceError):
                    await server.load(model, "weaver://nothing/weights/nowhere")
                await server.sample(await server.sampler(ANNE, None))
                learners.seconds = 0.05
                waiting = [asyncio.create_task(server.forward_backward(model)) for _ in range(3)]
                while operations.by_base_model() != {"tiny": 3}:
                    await asyncio.sleep(0)
                assert operations.by_kind() == {"forward_backward": 3}
                await asyncio.gather(*waiting)
                assert not operations.by_base_model()

    asyncio.run(main())
    base = {"base_model": "tiny"}
    assert meter.counters[series("weaver_rl_service_trained_tokens_total", **base)] == 4 * 3
    assert meter.counters[series("weaver_rl_service_sampled_tokens_total", **base)] == 3
    assert meter.counters[series("weaver_rl_service_weight_versions_total", **base)] == 1
    total = "weaver_rl_service_operations_total"
    assert meter.counters[series(total, kind="forward_backward", status="done")] == 4
    assert meter.counters[series(total, kind="sample", status="done")] == 1
    seconds = meter.histograms[series("weaver_rl_service_operation_seconds", kind="forward_backward")]
    assert len(seconds) == 4


def test_clients_metrics_have_as_many_names_as_fit(meter: RecordingMeter):
    shown = SessionMetrics(meter, max_names=2)
    first = SessionMetric(session_id="s", model_id=None, name="loss", value=0.5, step=1, occurred_at="now")
    shown.add([first, replace(first, name="kl", value=0.1), replace(first, name="third"), replace(first, value=0.25)])
    shown.add([replace(first, value=float("inf"))])
    name = "weaver_rl_service_session_metric"
    assert meter.gauges == {series(name, metric="loss"): 0.25, series(name, metric="kl"): 0.1}
    assert meter.counters == {series("weaver_rl_service_session_metrics_left_out_total"): 2}


def test_the_service_shows_what_clients_send(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[SessionMetric] = []
    monkeypatch.setattr(SessionMetrics, "add", lambda self, metrics: seen.extend(metrics))

    async def main() -> None:
        async with serving(tmp_path) as server:
            session_id = (await server.model()).session_id
            sent = SessionMetric(
                session_id=session_id, model_id=None, name="loss", value=0.5, step=1, occurred_at="2026-01-01T00:00:00Z"
            )
            await server.service.add_metrics(ANNE, session_id, [sent])
            assert seen == [sent]

    asyncio.run(main())


def test_what_is_gone_is_shown_as_none(meter: RecordingMeter, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("weaver_rl.service.service_meter.LOOK_EVERY_S", 0)
    looks = [
        ServerFigures(by_kind={"sample": 3}, by_base_model={"tiny": 1}, engines={"tiny": 1}, learners={"tiny": 1}),
        ServerFigures(),
    ]
    over = asyncio.Event()

    def look() -> ServerFigures:
        if not looks:
            over.set()
            return ServerFigures()
        return looks.pop(0)

    async def main() -> None:
        following = asyncio.create_task(follow(meter, look))
        await over.wait()
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)

    asyncio.run(main())
    assert meter.gauges == {
        series("weaver_rl_service_operations_in_flight", kind="sample"): 0,
        series("weaver_rl_service_queue_depth", base_model="tiny"): 0,
        series("weaver_rl_service_engines_up", base_model="tiny"): 0,
        series("weaver_rl_service_learners_up", base_model="tiny"): 0,
    }
