"""A run at Weights & Biases. It knows no thread and no retry; what it is told it tells on."""

from __future__ import annotations

import contextlib
import logging
import netrc
import os
import secrets
import string
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from weaver_rl.errors import UserError
from weaver_rl.run_folder import RunState
from weaver_rl.tracking.config import WandbConfig
from weaver_rl.tracking.tracker import TrackedRun

_log = logging.getLogger(__name__)

_EXIT_CODES: Mapping[RunState, int] = {"finished": 0, "failed": 1, "interrupted": 130}
_START_TIMEOUT_S = 60.0
SERVICE_PROCESS = "wandb-core"
GIVE_UP_WITHIN_S = 5.0


class WandbRun:
    """A `Tracker`. Offline, every process of a run leaves a directory of its own with the same run id."""

    name = "Weights & Biases"

    def __init__(self, config: WandbConfig) -> None:
        self._config = config
        self.arrives_at_end = config.mode == "online"
        self._run: Any = None
        self._has_given_up = False
        self._starting = threading.Lock()
        """Held while W&B's own process starts, which can be ended once it is there."""
        self._beginning = threading.Lock()

    def new_id(self) -> str:
        return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))

    def begin(self, run_id: str | None, run: TrackedRun) -> str:
        config = self._config
        if config.mode == "offline":
            # Read when the package is imported: without it errors of W&B's own go out, offline or not.
            os.environ["WANDB_ERROR_REPORTING"] = "false"
        os.environ.setdefault("WANDB_SILENT", "true")  # it would write into the panel
        import wandb

        directory = config.dir or run.directory
        directory.mkdir(parents=True, exist_ok=True)
        with self._beginning:
            if self._run is None:  # else it has begun, and what it returned was not kept
                with self._starting:
                    if self._has_given_up:
                        raise RuntimeError("nobody waits for W&B any longer")
                    _set_up(wandb)
                try:
                    self._run = self._init(wandb, run_id, run, directory)
                except Exception:  # boundary: cleans up, then raises again
                    _tear_down(wandb)  # its process would hold the run's id, and every later try be refused
                    raise
            return str(self._run.id)

    def _init(self, wandb: Any, run_id: str | None, run: TrackedRun, directory: Path) -> Any:
        config = self._config
        return wandb.init(
            id=run_id,
            resume="allow",
            reinit="create_new",
            project=config.project,
            entity=config.entity,
            name=run.name,
            group=config.group,
            tags=config.tags or None,
            dir=str(directory),
            mode=config.mode,
            config=dict(run.config),
            allow_val_change=True,
            # The terminal is the run's, machine figures are Prometheus's, code is the user's.
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_git=True,
                disable_code=True,
                x_disable_stats=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
                init_timeout=_START_TIMEOUT_S,
            ),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if step >= self._run.starting_step:  # W&B has those before it
            self._run.log(dict(values), step=step)

    def end(self, state: RunState, reason: str | None) -> None:
        self._run.summary.update({"state": state, "reason": reason or ""})
        self._run.finish(exit_code=_EXIT_CODES.get(state, 1))

    def give_up(self) -> None:
        """W&B's own process would be waited for when this one ends: for minutes, where the network is gone."""
        with self._starting:
            self._has_given_up = True
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                if child.name() == SERVICE_PROCESS:
                    child.kill()
        # A beginning fails now that it has nobody to talk to; after the teardown it would start another process.
        if (wandb := sys.modules.get("wandb")) is not None and self._beginning.acquire(timeout=GIVE_UP_WITHIN_S):
            try:
                _tear_down(wandb)
            finally:
                self._beginning.release()


def _set_up(wandb: Any) -> None:
    """Starts W&B's own process.

    The hooks that come with it are taken away: each try would put its own around those of the one before, and an error
    that ends the run be printed once for each. `end` says how the run ended.
    """
    hooks = sys.exit, sys.excepthook
    try:
        wandb.setup()
    finally:
        sys.exit, sys.excepthook = hooks


def _tear_down(wandb: Any) -> None:
    try:
        wandb.teardown()
    # It exits with the status of its process. What it does not do now fails when this process ends, with a traceback.
    except (Exception, SystemExit) as error:  # noqa: BLE001 - boundary: the service's own end
        _log.info("W&B was ended with its process killed: %s", error)


def require_wandb_key(config: WandbConfig) -> None:
    """Raises a UserError when W&B would ask for an API key, which nobody could type."""
    if config.mode == "offline" or os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        known = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        known = None
    if known is None:
        raise UserError(
            f"tracking.wandb.mode is online, and there is no API key for {host}: set WANDB_API_KEY, run `wandb login`, "
            "or use mode: offline"
        )
