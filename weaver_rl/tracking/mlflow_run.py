"""A run at MLflow. It knows no thread and no retry; what it is told it tells on."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

from weaver_rl.run_folder import RunState
from weaver_rl.tracking.config import MlflowConfig
from weaver_rl.tracking.tracker import TrackedRun

_STATUSES: Mapping[RunState, str] = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
MAX_PARAMS_PER_CALL = 100
MAX_PARAM_LENGTH = 500
"""The least that any version of the server takes; longer values are cut, the run folder has them whole."""


class MlflowRun:
    """A `Tracker`."""

    name = "MLflow"
    arrives_at_end = False

    def __init__(self, config: MlflowConfig) -> None:
        self._config = config
        self._client: Any = None
        self._run_id: str | None = None

    def new_id(self) -> None:
        """The server chooses."""

    def begin(self, run_id: str | None, run: TrackedRun) -> str:
        # Read when the package is imported: it would tell its makers of every run, and the user of every table.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        # Jitter comes from the generator of the process, from which a task may be drawing its prompts.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # every try of a server that is gone
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=self._config.tracking_uri)
        run_id = run_id or self._run_id  # made by an earlier try, which failed after that
        if run_id is None:
            tags = {**self._config.tags, "mlflow.source.name": "weaver-rl"}
            run_id = self._client.create_run(self._experiment_id(), run_name=run.name, tags=tags).info.run_id
        else:
            self._client.update_run(run_id, status="RUNNING")
        self._run_id = str(run_id)
        self._tell_config(dict(_params(run.config)))
        return self._run_id

    def _experiment_id(self) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(self._config.experiment)
        if found is None:
            try:
                return str(self._client.create_experiment(self._config.experiment))
            except MlflowException:  # another run made it meanwhile
                found = self._client.get_experiment_by_name(self._config.experiment)
                if found is None:
                    raise
        return str(found.experiment_id)

    def _tell_config(self, params: Mapping[str, str]) -> None:
        """MLflow never changes a parameter: one that differs since a resume becomes a tag."""
        from mlflow.entities import Param, RunTag

        known = self._client.get_run(self._run_id).data.params
        new = [Param(key, value) for key, value in params.items() if key not in known]
        changed = [RunTag(f"resumed.{key}", value) for key, value in params.items() if known.get(key, value) != value]
        for start in range(0, len(new), MAX_PARAMS_PER_CALL):
            self._client.log_batch(self._run_id, params=new[start : start + MAX_PARAMS_PER_CALL])
        if changed:
            self._client.log_batch(self._run_id, tags=changed)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(_allowed(name), float(value), now, step) for name, value in values.items()]
        self._client.log_batch(self._run_id, metrics=metrics, synchronous=True)

    def end(self, state: RunState, reason: str | None) -> None:
        self._client.set_tag(self._run_id, "reason", reason or "")
        self._client.set_terminated(self._run_id, _STATUSES.get(state, "FAILED"))

    def give_up(self) -> None:
        """Nothing: the thread that waits for the server ends with the process."""


def _params(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in config.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            yield from _params(value, f"{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            yield _allowed(key), text if len(text) <= MAX_PARAM_LENGTH else f"{text[: MAX_PARAM_LENGTH - 1]}…"


def _allowed(name: str) -> str:
    """A reward's label may be any text; MLflow takes letters, digits and a few signs."""
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)
