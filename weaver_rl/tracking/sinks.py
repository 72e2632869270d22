"""The tracking services of a run: chosen by its configuration, told its metrics and how it ended."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any
from urllib.parse import urlsplit

from weaver_rl.errors import UserError
from weaver_rl.metrics_sinks import MetricsSink
from weaver_rl.run_folder import RunFolder, ending
from weaver_rl.tracking.background import BackgroundTracker
from weaver_rl.tracking.config import MlflowConfig, TrackingConfig
from weaver_rl.tracking.mlflow_run import MlflowRun
from weaver_rl.tracking.tracker import TrackedRun, Tracker
from weaver_rl.tracking.wandb_run import WandbRun, require_wandb_key


def require_tracking(config: TrackingConfig) -> None:
    """Raises a UserError when a service could not be told anything: before a run spends time on it."""
    if config.wandb is not None:
        _require_packages("wandb", "wandb")
        require_wandb_key(config.wandb)
    if config.mlflow is not None:
        _require_packages("mlflow", "mlflow", *(["sqlalchemy", "alembic"] if _is_database(config.mlflow) else []))


def _require_packages(extra: str, *packages: str) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(
            f"tracking.{extra} needs {' and '.join(missing)}, not installed here: "
            f'pip install "weaver-rl[{extra}]", or leave tracking.{extra} out'
        )


def _is_database(config: MlflowConfig) -> bool:
    uri = config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    return urlsplit(uri).scheme.partition("+")[0] in (
        "sqlite",
        "postgresql",
        "mysql",
        "mssql",
    )


@contextlib.contextmanager
def tracked(
    config: TrackingConfig,
    folder: RunFolder,
    *,
    name: str,
    run_config: Mapping[str, Any],
    in_peace: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
) -> Iterator[tuple[MetricsSink, ...]]:
    """A sink for each service, for the length of the block; its end is the run's, and is waited for.

    Args:
        name: of the run, for people.
        run_config: the resolved configuration as JSON has it.
        in_peace: keeps signals from cutting that wait short: a run that has finished would be called interrupted.
    """
    trackers: list[tuple[str, Tracker]] = []
    if config.wandb is not None:
        trackers.append(("wandb", WandbRun(config.wandb)))
    if config.mlflow is not None:
        trackers.append(("mlflow", MlflowRun(config.mlflow)))
    run = TrackedRun(name=name, config=run_config, directory=folder.tracking)
    sinks = [
        BackgroundTracker(
            tracker,
            run,
            sent_file=folder.tracking / f"{kind}.json",
            metrics_file=folder.metrics_file,
            max_waiting=config.max_waiting_steps,
        )
        for kind, tracker in trackers
    ]
    try:
        yield tuple(sinks)
    except BaseException as error:  # boundary: cleans up, then raises again
        with in_peace():
            _close(sinks, error, config.end_timeout_s)
        raise
    with in_peace():
        _close(sinks, None, config.end_timeout_s)


def _close(sinks: list[BackgroundTracker], error: BaseException | None, timeout_s: float) -> None:
    """All at a time: one that does not answer costs the others nothing."""
    closing = [threading.Thread(target=sink.close, args=(*ending(error), timeout_s)) for sink in sinks]
    for thread in closing:
        thread.start()
    for thread in closing:
        thread.join()
