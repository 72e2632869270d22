"""Tracking services beside a run: each step once and in order, through failures, resumes and slow services."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from actors.signals import StopSignals
from weaver_rl.config import load_config
from weaver_rl.errors import ConfigError, UserError
from weaver_rl.metrics import MetricsWriter, read_metrics
from weaver_rl.run_folder import RunFolder, RunState
from weaver_rl.tracking.background import BackgroundTracker, read_sent
from weaver_rl.tracking.config import MlflowConfig, TrackingConfig, WandbConfig
from weaver_rl.tracking.sinks import require_tracking, tracked
from weaver_rl.tracking.tracker import TrackedRun

pytestmark = pytest.mark.unit


class FakeService:
    """A service and its one run; what a process of the run would use is a `FakeTracker`."""

    def __init__(self) -> None:
        self.begun: list[str | None] = []
        self.steps: list[tuple[int, float]] = []
        self.ended: list[tuple[RunState, str | None]] = []
        self.num_failures = 0
        self.is_down = False
        self.given_up = False
        self.asked = threading.Event()
        self.taken = threading.Event()
        self.open = threading.Event()
        self.open.set()


class FakeTracker:
    name = "the service"

    def __init__(self, service: FakeService, *, arrives_at_end: bool = False) -> None:
        self._service = service
        self.arrives_at_end = arrives_at_end
        self._on_their_way: list[tuple[int, float]] = []

    def new_id(self) -> str:
        return f"run-{len(self._service.begun)}"

    def begin(self, run_id: str | None, run: TrackedRun) -> str:
        self._service.begun.append(run_id)
        assert run_id is not None
        return run_id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._service.asked.set()
        self._service.open.wait(10)
        if self._service.num_failures:
            self._service.num_failures -= 1
            raise ConnectionError("no route to host")
        if self._service.is_down and not self.arrives_at_end:
            raise ConnectionError("no route to host")
        (self._on_their_way if self.arrives_at_end else self._service.steps).append((step, values["loss"]))
        self._service.taken.set()

    def end(self, state: RunState, reason: str | None) -> None:
        if self._service.is_down:
            raise ConnectionError("no route to host")
        self._service.steps += self._on_their_way
        self._service.ended.append((state, reason))

    def give_up(self) -> None:
        self._service.given_up = True


class Bench:
    """A run folder and processes of the run, one after the other."""

    def __init__(self, path: Path) -> None:
        self.folder = RunFolder(path)
        self.service = FakeService()

    def sink(self, max_waiting: int = 100, *, arrives_at_end: bool = False) -> BackgroundTracker:
        return BackgroundTracker(
            FakeTracker(self.service, arrives_at_end=arrives_at_end),
            TrackedRun(name="a", directory=self.folder.tracking),
            sent_file=self.folder.tracking / "service.json",
            metrics_file=self.folder.metrics_file,
            max_waiting=max_waiting,
            first_pause_s=0.001,
        )

    def steps_of_file(self) -> list[tuple[int, float]]:
        return [(line.step, line.values["loss"]) for line in read_metrics(self.folder.metrics_file)]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_every_step_and_the_end_are_told(bench: Bench):
    sink = bench.sink()
    with MetricsWriter(bench.folder, sinks=[sink]) as metrics:
        for step in range(1, 6):
            metrics.write(step, "train", {"loss": 1 / step})
    sink.close("finished", None, 10)
    assert bench.service.steps == bench.steps_of_file()
    assert bench.service.ended == [("finished", None)]


def test_a_resumed_run_goes_on_with_the_same_run_and_no_step_comes_twice(bench: Bench):
    for first, last in ((1, 4), (3, 6)):
        sink = bench.sink()
        with MetricsWriter(bench.folder, sinks=[sink]) as metrics:
            metrics.truncate_after(first - 1)
            for step in range(first, last + 1):
                metrics.write(step, "train", {"loss": float(step)})
        sink.close("interrupted", "stopped by SIGINT", 10)
    assert bench.service.begun == ["run-0", "run-0"]
    assert bench.service.steps == [(step, float(step)) for step in range(1, 7)]


def test_a_run_that_goes_back_tells_a_step_as_it_was_the_first_time(bench: Bench):
    sink = bench.sink()
    with MetricsWriter(bench.folder, sinks=[sink]) as metrics:
        metrics.write(1, "train", {"loss": 1.0})
        metrics.write(2, "train", {"loss": 2.0})
        metrics.truncate_after(1)
        metrics.write(2, "train", {"loss": 20.0})
        metrics.write(3, "train", {"loss": 3.0})
    sink.close("finished", None, 10)
    assert [step for step, _ in bench.service.steps] == [1, 2, 3]


def test_steps_that_wait_are_forgotten_when_the_run_goes_back_behind_them(bench: Bench):
    sink = bench.sink()
    with MetricsWriter(bench.folder, sinks=[sink]) as metrics:
        metrics.write(1, "train", {"loss": 1.0})
        assert bench.service.taken.wait(10)
        bench.service.is_down = True
        metrics.write(2, "train", {"loss": 2.0})
        metrics.write(3, "train", {"loss": 3.0})
        metrics.truncate_after(1)
        metrics.write(2, "train", {"loss": 20.0})
        bench.service.is_down = False
    sink.close("finished", None, 10)
    assert bench.service.steps == [(1, 1.0), (2, 20.0)]


def test_a_file_that_is_being_read_is_read_anew_when_the_run_goes_back(bench: Bench):
    with MetricsWriter(bench.folder) as metrics:
        for step in (1, 2, 3):
            metrics.write(step, "train", {"loss": float(step)})
    bench.service.open.clear()
    sink = bench.sink()
    with MetricsWriter(bench.folder, sinks=[sink]) as metrics:
        assert bench.service.asked.wait(10)
        metrics.truncate_after(1)
        metrics.write(2, "train", {"loss": 20.0})
        bench.service.open.set()
    sink.close("finished", None, 10)
    assert bench.service.steps == [(1, 1.0), (2, 20.0)]


def test_steps_on_their_way_have_not_arrived_until_the_end_says_so(bench: Bench, caplog: pytest.LogCaptureFixture):
    for last, is_down in ((2, True), (3, False), (4, False)):
        bench.service.is_down = is_down
        sink = bench.sink(arrives_at_end=True)
        with MetricsWriter(bench.folder, sinks=[sink]) as metrics:
            for step in range(last if last > 2 else 1, last + 1):
                metrics.write(step, "train", {"loss": float(step)})
        sink.close("finished", None, 10)
        assert read_sent(bench.folder.tracking / "service.json").last_step == (-1 if is_down else last)
    assert "it is known to have the steps up to -1; metrics.jsonl has all, and a resumed run sends" in caplog.text
    assert bench.service.steps == bench.steps_of_file()


def test_what_a_killed_process_did_not_send_is_sent_by_the_next(bench: Bench):
    with MetricsWriter(bench.folder) as metrics:
        for step in (1, 2, 3):
            metrics.write(step, "train", {"loss": float(step)})
    bench.sink().close("finished", None, 10)
    assert bench.service.steps == bench.steps_of_file()


def test_a_service_that_fails_is_tried_again_and_told_of_once(bench: Bench, caplog: pytest.LogCaptureFixture):
    bench.service.num_failures = 3
    sink = bench.sink()
    with MetricsWriter(bench.folder, sinks=[sink]) as metrics:
        for step in (1, 2):
            metrics.write(step, "train", {"loss": float(step)})
        assert bench.service.taken.wait(10)
    sink.close("finished", None, 10)
    assert bench.service.steps == [(1, 1.0), (2, 2.0)]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [
        "the service does not answer (ConnectionError: no route to host); it is tried again, the run goes on"
    ]


def test_a_slow_service_costs_neither_memory_nor_steps(bench: Bench):
    sink = bench.sink(max_waiting=2)
    with MetricsWriter(bench.folder, sinks=[sink]) as metrics:
        metrics.write(1, "train", {"loss": 1.0})
        assert bench.service.taken.wait(10)  # what was in the file at its start is behind it
        bench.service.open.clear()
        for step in range(2, 30):
            metrics.write(step, "train", {"loss": float(step)})
        assert len(sink._waiting) <= 2
        bench.service.open.set()
        metrics.write(30, "train", {"loss": 30.0})
    sink.close("finished", None, 10)
    assert bench.service.steps == bench.steps_of_file()


def test_the_end_of_a_run_waits_no_longer_than_it_may(bench: Bench, caplog: pytest.LogCaptureFixture):
    bench.service.open.clear()
    sink = bench.sink()
    with MetricsWriter(bench.folder, sinks=[sink]) as metrics:
        metrics.write(1, "train", {"loss": 1.0})
    sink.close("finished", None, 0.05)
    bench.service.open.set()
    assert "the service did not take everything within 0.05 s of the end" in caplog.text
    assert bench.service.given_up


def test_a_file_of_what_was_sent_that_cannot_be_read_is_no_file(tmp_path: Path):
    (tmp_path / "sent.json").write_text("{")
    assert read_sent(tmp_path / "sent.json").run_id is None


def test_the_sinks_of_a_run_are_told_how_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    service = FakeService()
    monkeypatch.setattr("weaver_rl.tracking.sinks.WandbRun", lambda config: FakeTracker(service))
    config = TrackingConfig(wandb=WandbConfig(project="p"))
    with tracked(config, RunFolder(tmp_path), name="a", run_config={}) as sinks:
        assert len(sinks) == 1
    for error in (RuntimeError("boom"), KeyboardInterrupt("SIGTERM")):
        with pytest.raises(type(error)), tracked(config, RunFolder(tmp_path), name="a", run_config={}):
            raise error
    assert service.ended == [
        ("finished", None),
        ("failed", "RuntimeError: boom"),
        ("interrupted", "stopped by SIGTERM"),
    ]


def test_a_signal_does_not_make_a_finished_run_an_interrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    service = FakeService()
    monkeypatch.setattr("weaver_rl.tracking.sinks.WandbRun", lambda config: FakeTracker(service))
    config = TrackingConfig(wandb=WandbConfig(project="p"))

    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        service.open.set()

    with (
        StopSignals() as stop,
        tracked(config, RunFolder(tmp_path), name="a", run_config={}, in_peace=stop.deferred) as sinks,
    ):
        service.open.clear()
        sinks[0].write(1, {"loss": 1.0})
        timer = threading.Timer(0.1, interrupt)
        timer.start()
    timer.join()
    assert service.ended == [("finished", None)]


# -- before anything is spent ------------------------------------------------------------------------------------------


def test_without_tracking_nothing_is_needed_and_nobody_is_told(tmp_path: Path):
    require_tracking(TrackingConfig())
    with tracked(TrackingConfig(), RunFolder(tmp_path), name="a", run_config={}) as sinks:
        assert sinks == ()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("config", "package", "extra"),
    [
        (TrackingConfig(wandb=WandbConfig(project="p", mode="offline")), "wandb", "wandb"),
        (TrackingConfig(mlflow=MlflowConfig(experiment="e")), "mlflow", "mlflow"),
        (TrackingConfig(mlflow=MlflowConfig(experiment="e", tracking_uri="sqlite:///a.db")), "alembic", "mlflow"),
        (TrackingConfig(mlflow=MlflowConfig(experiment="e")), "alembic", "mlflow"),
    ],
)
def test_a_package_that_is_missing_is_named(
    config: TrackingConfig, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
):
    find = importlib.util.find_spec
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://bob:s3cret@db/mlflow")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(UserError, match=rf'tracking.{extra} needs {package}.*pip install "weaver-rl\[{extra}\]"'):
        require_tracking(config)


def test_a_missing_api_key_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    config = TrackingConfig(wandb=WandbConfig(project="p"))
    with pytest.raises(UserError, match=r"no API key for api.wandb.ai: set WANDB_API_KEY, .* or use mode: offline"):
        require_tracking(config)
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password 0123\n")
    require_tracking(config)


@pytest.mark.parametrize(
    "uri", ["postgresql://bob:s3cret@db/mlflow", "mysql+pymysql://bob:s3cret@db:3306/m", "https://bob:s3cret@host"]
)
def test_a_password_is_not_taken_in_a_tracking_uri(uri: str):
    quickstart = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
    with pytest.raises(ConfigError, match=r"tracking\.mlflow\.tracking_uri.*password.*MLFLOW_TRACKING_URI") as caught:
        load_config(quickstart, ["tracking.mlflow.experiment=e", f"tracking.mlflow.tracking_uri={uri}"])
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    "uri", ["http://host:5000", "sqlite:////data/m.db", "postgresql://bob@db:5432/m", "databricks"]
)
def test_a_tracking_uri_without_a_password_is_taken(uri: str):
    assert MlflowConfig(experiment="e", tracking_uri=uri).tracking_uri == uri


def test_a_run_that_replaces_another_is_another_at_the_service(tmp_path: Path):
    folder = RunFolder(tmp_path)
    with folder.claim():
        folder.tracking.mkdir()
        (folder.tracking / "wandb.json").write_text('{"run_id": "a", "last_step": 3}')
    with folder.claim(resume=True):
        assert read_sent(folder.tracking / "wandb.json").run_id == "a"
    with folder.claim(overwrite=True):
        assert not folder.tracking.exists()


def test_the_command_says_what_is_missing_before_anything_is_started(tmp_path: Path):
    outside = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("weaver-rl")),
            "train",
            str(Path(__file__).parents[1] / "ray" / "tiny.yaml"),
            f"run_dir={tmp_path / 'run'}",
            "tracking.wandb.project=p",
        ],
        env=outside | {"NETRC": str(tmp_path / "netrc"), "COLUMNS": "300"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert "there is no API key for api.wandb.ai" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
