"""What a report is made of: a run folder, read. It knows files, not processes, and draws nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weaver_rl.errors import ConfigError
from weaver_rl.metrics import MetricsLine, Phase, read_metrics
from weaver_rl.run_folder import RunFolder, RunStatus
from weaver_rl.step_range import EVERY_STEP, StepRange

Point = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """One run as its folder has it."""

    folder: RunFolder
    status: RunStatus | None
    state: str
    """The status's state, or `stopped` for a run that says `running` and has no process."""
    config: dict[str, Any]
    """The resolved configuration as JSON, empty where there is none: a report is made of older runs as well."""
    lines: tuple[MetricsLine, ...]
    steps: StepRange = EVERY_STEP
    """Which steps the report is about; `lines` has no others."""
    is_part: bool = False
    """Whether the run has other steps, too."""
    began_s: float = 0.0
    """When the first of `lines` began, in seconds since the start of the run."""

    @property
    def name(self) -> str:
        return str(self.config.get("name") or self.folder.path.resolve().name)

    def of_phase(self, phase: Phase) -> list[MetricsLine]:
        return [line for line in self.lines if line.phase == phase]

    def points(self, name: str, phase: Phase | None = None) -> list[Point]:
        chosen = (line for line in self.lines if name in line.values and phase in (None, line.phase))
        return [(line.step, line.values[name]) for line in chosen]


def read_run(run_dir: Path, steps: StepRange = EVERY_STEP) -> RunData:
    """Reads a run, whatever state it is in.

    Raises:
        ConfigError: there is no run.
        UserError: a file of it is damaged; names it.
    """
    folder = RunFolder(run_dir)
    if not folder.holds_run():
        raise ConfigError(f"{run_dir} holds no run: neither {folder.status_file.name} nor {folder.metrics_file.name}")
    status = folder.read_status()
    state = "stopped" if status is None else status.state
    if state == "running" and not folder.is_claimed():
        state = "stopped"
    every = list(read_metrics(folder.metrics_file))
    lines = tuple(line for line in every if line.step in steps)
    return RunData(
        folder=folder,
        status=status,
        state=state,
        config=_read_config(folder),
        lines=lines,
        steps=steps,
        is_part=len(lines) < len(every),
        began_s=max((line.time_s for line in every if lines and line.step < lines[0].step), default=0.0),
    )


def _read_config(folder: RunFolder) -> dict[str, Any]:
    try:
        config = json.loads(folder.config_json.read_text())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a configuration with their dotted keys; lists of sections are numbered, other lists are leaves."""
    if isinstance(config, dict) and config:
        for key, value in config.items():
            yield from flat(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(config, list) and any(isinstance(item, dict) for item in config):
        for index, item in enumerate(config):
            yield from flat(item, f"{prefix}.{index}")
    else:
        yield prefix, config
