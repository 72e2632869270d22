"""Which tracking services a run tells its metrics to. It imports none of them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from weaver_rl.run_location import has_password
from weaver_rl.section import Section


class WandbConfig(Section):
    """Weights & Biases."""

    project: str = Field(min_length=1)
    """The project that the run belongs to."""
    mode: Literal["online", "offline"] = "online"
    """offline: records into files, nothing is sent; `wandb sync` sends them later."""
    entity: str | None = None
    """User or team; null: the default of the API key."""
    group: str | None = None
    """What W&B groups runs by."""
    tags: tuple[str, ...] = ()
    """Tags of the run."""
    dir: Path | None = None
    """Where W&B keeps its files; null: tracking in the run folder."""


class MlflowConfig(Section):
    """MLflow."""

    experiment: str = Field(min_length=1)
    """The experiment that the run belongs to; made if there is none."""
    tracking_uri: str | None = None
    """A server (http://…) or a database (sqlite:///…), without a password; null: what MLFLOW_TRACKING_URI says."""
    tags: dict[str, str] = Field(default_factory=dict)
    """Tags of the run."""

    @field_validator("tracking_uri")
    @classmethod
    def _no_password(cls, uri: str | None) -> str | None:
        if uri is not None and has_password(uri):
            raise ValueError(
                "the URI has a password in it, which config.json, the report and MLflow would show; leave it null and "
                "set MLFLOW_TRACKING_URI, or for a server MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        return uri


class TrackingConfig(Section):
    """Services that get every step's metrics under the names of metrics.jsonl, the configuration and the end."""

    wandb: WandbConfig | None = None
    """Weights & Biases; needs weaver-rl[wandb]."""
    mlflow: MlflowConfig | None = None
    """MLflow; needs weaver-rl[mlflow]."""
    max_waiting_steps: int = Field(default=1000, ge=1)
    """Steps kept in memory for a service that does not take them just now; more are read from metrics.jsonl later."""
    end_timeout_s: float = Field(default=30.0, ge=0)
    """How long the end of the run waits for what was not sent yet."""
