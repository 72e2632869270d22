"""The real packages of tracking services, offline: what they recorded is what metrics.jsonl says."""

from __future__ import annotations

import http.server
import os
import random
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from weaver_rl.metrics import MetricsWriter, read_metrics
from weaver_rl.run_folder import RunFolder
from weaver_rl.tracking import wandb_run
from weaver_rl.tracking.background import read_sent
from weaver_rl.tracking.config import MlflowConfig, TrackingConfig, WandbConfig
from weaver_rl.tracking.mlflow_run import MlflowRun
from weaver_rl.tracking.sinks import tracked
from weaver_rl.tracking.tracker import TrackedRun

pytestmark = pytest.mark.unit

CONFIG = {"seed": 0, "model": {"name": "scratch", "layers": [1, 2]}, "note": None}


def values_at(step: int) -> dict[str, float]:
    return {"loss": 1 / 3 + step, "reward/task/mean": 0.1 * step, "reward/a b/c.py:f/mean": 1.0, "rollout/count": 64}


def train(folder: RunFolder, config: TrackingConfig, first: int, last: int, note: str | None = None) -> None:
    """One process of a run: from a step to another."""
    resolved: dict[str, Any] = CONFIG | {"note": note}
    with (
        tracked(config, folder, name="a-run", run_config=resolved) as sinks,
        MetricsWriter(folder, sinks=sinks) as metrics,
    ):
        metrics.truncate_after(first - 1)
        for step in range(first, last + 1):
            metrics.write(step, "train", values_at(step))


def expected(folder: RunFolder) -> dict[str, list[tuple[int, float]]]:
    """Each metric with its values by step, as metrics.jsonl has them."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in read_metrics(folder.metrics_file):
        for name, value in line.values.items():
            found.setdefault(name, []).append((line.step, value))
    return found


# -- Weights & Biases --------------------------------------------------------------------------------------------------


def wandb_parts(folder: RunFolder) -> list[Any]:
    from wandb_files import read_wandb

    return [
        read_wandb(path) for path in sorted(folder.tracking.rglob("*.wandb"), key=lambda path: path.stat().st_mtime)
    ]


def test_wandb_offline_records_what_metrics_jsonl_has(tmp_path: Path):
    pytest.importorskip("wandb")
    folder = RunFolder(tmp_path)
    config = TrackingConfig(wandb=WandbConfig(project="p", mode="offline", group="g", tags=("x",)))
    train(folder, config, 1, 3)
    train(folder, config, 3, 5)  # resumed: step 3 was told already
    first, second = wandb_parts(folder)
    assert first.run.run_id == second.run.run_id != ""
    assert (first.run.project, first.run.run_group, list(first.run.tags)) == ("p", "g", ["x"])
    assert {key: first.config[key] for key in CONFIG} == CONFIG
    recorded: dict[str, list[tuple[int, float]]] = {}
    for line in (*first.history, *second.history):
        for name, value in line.items():
            if not name.startswith("_"):
                recorded.setdefault(name, []).append((line["_step"], value))
    assert recorded == expected(folder)
    assert second.summary["state"] == "finished"
    assert [part.exit_code for part in (first, second)] == [0, 0]


CHILD = """
import sys
from pathlib import Path
from test_tracking_services import *
train(RunFolder(Path(sys.argv[1])), TrackingConfig(wandb=WandbConfig(project="p", mode="offline")), 1, 2)
train(
    RunFolder(Path(sys.argv[2])),
    TrackingConfig(mlflow=MlflowConfig(experiment="e", tracking_uri=f"sqlite:///{sys.argv[2]}/mlflow.db")), 1, 2)
"""


def test_offline_nobody_is_called(tmp_path: Path):
    """Whatever goes out by HTTP would go through the proxy; nobody comes to it."""
    pytest.importorskip("wandb")
    pytest.importorskip("mlflow")
    pytest.importorskip("alembic")
    callers: list[bytes] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def listen() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            callers.append(connection.recv(200))
            connection.close()

    threading.Thread(target=listen, daemon=True).start()
    proxy = f"http://127.0.0.1:{listener.getsockname()[1]}"
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), proxy)
    outside = {name: value for name, value in os.environ.items() if name.lower() != "no_proxy"}
    environment = outside | proxies | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for name in ("MLFLOW_DISABLE_TELEMETRY", "CI", "GITHUB_ACTIONS", "PYTEST_CURRENT_TEST"):
        environment.pop(name, None)  # with these MLflow would be silent by itself
    for name in ("wandb", "mlflow"):
        (tmp_path / name).mkdir()
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "wandb"), str(tmp_path / "mlflow")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    listener.close()
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout == ""
    assert len(wandb_parts(RunFolder(tmp_path / "wandb"))) == 1
    assert callers == []


UNREACHED = """
import logging
import sys
from pathlib import Path
from test_tracking_services import *
logging.basicConfig(format="%(message)s")
tracking = TrackingConfig(
    wandb=WandbConfig(project="p"), mlflow=MlflowConfig(experiment="e", tracking_uri=sys.argv[2]), end_timeout_s=1)
train(RunFolder(Path(sys.argv[1])), tracking, 1, 3)
"""


def test_a_server_that_nobody_reaches_keeps_no_run_from_ending(tmp_path: Path):
    pytest.importorskip("wandb")
    pytest.importorskip("mlflow")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
    known = {"WANDB_BASE_URL": address, "WANDB_API_KEY": "0" * 40, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", UNREACHED, str(tmp_path), address],
        env=os.environ | known,
        stderr=subprocess.PIPE,
        text=True,
        timeout=55,  # W&B and MLflow themselves would wait for longer
    )
    assert done.returncode == 0, done.stderr
    assert len(list(read_metrics(RunFolder(tmp_path).metrics_file))) == 3
    left = (
        "did not take everything within 1 s of the end: it is known to have the steps up to -1; metrics.jsonl has all,"
    )
    assert sorted(line.partition(left)[0] for line in done.stderr.splitlines()) == ["MLflow ", "Weights & Biases "]


ONLINE = """
import logging
import sys
from pathlib import Path
from test_tracking_services import *
logging.basicConfig(format="%(message)s")
first, last, end_timeout_s = (int(text) for text in sys.argv[2:])
tracking = TrackingConfig(wandb=WandbConfig(project="p"), end_timeout_s=end_timeout_s)
train(RunFolder(Path(sys.argv[1])), tracking, first, last)
"""


def test_wandb_gets_from_a_resumed_run_what_an_outage_kept_from_it_and_nothing_twice(tmp_path: Path):
    pytest.importorskip("wandb")
    from wandb_server import wandb_server

    folder = RunFolder(tmp_path)
    sent_file = folder.tracking / "wandb.json"
    with wandb_server() as server:
        # Without the name of the process that W&B has here for other tests: theirs is not the child's to end.
        known = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        known |= {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40, "WANDB_ERROR_REPORTING": "false"}
        known["PYTHONPATH"] = os.pathsep.join(sys.path)

        def online(first: int, last: int, end_timeout_s: int) -> str:
            done = subprocess.run(
                [sys.executable, "-c", ONLINE, str(tmp_path), str(first), str(last), str(end_timeout_s)],
                env=known,
                stderr=subprocess.PIPE,
                text=True,
                timeout=55,
            )
            assert done.returncode == 0, done.stderr
            return done.stderr

        server.takes_history = False
        assert "is known to have the steps up to -1; metrics.jsonl has all" in online(1, 3, 5)
        assert server.lines == {}
        server.takes_history = True
        assert online(4, 5, 30) == ""
        sent = read_sent(sent_file)
        assert sent.last_step == 5
        sent_file.write_text(f'{{"run_id": "{sent.run_id}", "last_step": 2}}')  # as a process leaves it that was killed
        assert online(6, 6, 30) == ""
    found: dict[str, list[tuple[int, float]]] = {}
    for _, line in sorted(server.lines.items()):
        for name in line.keys() - {"_step", "_runtime", "_timestamp"}:
            found.setdefault(name, []).append((line["_step"], line[name]))
    assert found == expected(folder)


def test_that_wandbs_process_was_killed_is_not_how_this_one_ends():
    class Killed:
        def teardown(self) -> None:
            sys.exit(247)

    wandb_run._tear_down(Killed())


TRIED_AGAIN = """
import sys
from pathlib import Path
from test_tracking_services import *
from wandb_server import wandb_server
from weaver_rl.tracking import wandb_run
wandb_run._START_TIMEOUT_S = 3.0
hooks = sys.exit, sys.excepthook
with wandb_server() as server:
    os.environ["WANDB_BASE_URL"] = server.url
    server.is_up = False
    run = wandb_run.WandbRun(WandbConfig(project="p"))
    for _ in range(2):
        with pytest.raises(Exception, match="503"):
            run.begin("abcdefgh", TrackedRun(name="a", directory=Path(sys.argv[1])))
    assert hooks == (sys.exit, sys.excepthook)
    server.is_up = True
    begun = run.begin("abcdefgh", TrackedRun(name="a", directory=Path(sys.argv[1])))
    assert run.begin(begun, TrackedRun(name="a", directory=Path(sys.argv[1]))) == begun  # what it returned was not kept
    run.log(1, {"loss": 0.5})
    run.end("finished", None)
    assert [line["loss"] for line in server.lines.values() if "loss" in line] == [0.5]
    run.give_up()
"""


def test_wandb_that_was_away_when_a_run_began_gets_it_later(tmp_path: Path):
    pytest.importorskip("wandb")
    known = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    known |= {"WANDB_API_KEY": "0" * 40, "WANDB_ERROR_REPORTING": "false", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", TRIED_AGAIN, str(tmp_path)], env=known, stderr=subprocess.PIPE, text=True, timeout=55
    )
    assert done.returncode == 0, done.stderr


# -- MLflow ------------------------------------------------------------------------------------------------------------


def test_mlflow_has_what_metrics_jsonl_has(tmp_path: Path):
    pytest.importorskip("mlflow")
    pytest.importorskip("alembic")
    from mlflow import MlflowClient

    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    config = TrackingConfig(mlflow=MlflowConfig(experiment="e", tracking_uri=uri, tags={"team": "x"}))
    train(folder, config, 1, 3)
    train(folder, config, 3, 5, note="other")

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("e")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    recorded = {
        name: [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }
    assert recorded == expected(folder)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "a-run"
    assert run.data.params["model.layers"] == "[1, 2]"
    assert (run.data.params["note"], run.data.tags["resumed.note"], run.data.tags["team"]) == ("null", "other", "x")


def test_a_run_whose_beginning_is_tried_again_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("mlflow")
    pytest.importorskip("alembic")
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    tracker = MlflowRun(MlflowConfig(experiment="e", tracking_uri=uri))
    run = TrackedRun(name="a", config=CONFIG, directory=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", lambda *args, **kwargs: 1 / 0)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                tracker.begin(None, run)
    run_id = tracker.begin(None, run)
    client = MlflowClient(tracking_uri=uri)
    (found,) = client.search_runs([client.get_run(run_id).info.experiment_id])
    assert (found.info.run_id, found.data.params["seed"]) == (run_id, "0")


class Unwilling(http.server.BaseHTTPRequestHandler):
    """Answers every question with 503."""

    def do_GET(self) -> None:
        self.send_response(503)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


def test_mlflow_that_tries_again_draws_nothing_from_the_generator_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Unwilling) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        run = MlflowRun(MlflowConfig(experiment="e", tracking_uri=f"http://127.0.0.1:{server.server_port}"))
        before = random.getstate()
        with pytest.raises(Exception, match="503"):
            run.begin(None, TrackedRun(name="a", directory=tmp_path))
        assert random.getstate() == before
        server.shutdown()
