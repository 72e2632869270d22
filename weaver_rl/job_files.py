"""The files and directories that a run's configuration names. It reads none of them."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from weaver_rl.config import RunConfig
from weaver_rl.models.config import ScratchModel
from weaver_rl.tasks.config import TaskConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedFile:
    """One file or directory that exists on this machine and that a configuration names.

    Example:
        NamedFile(key="rewards.1.name", written="../mine.py", path=Path("/home/me/mine.py"), relative=True,
                  also_from_working_dir=True, overrides=...)
    """

    key: str
    written: str
    """How the configuration names it."""
    path: Path
    relative: bool
    also_from_working_dir: bool
    """It is looked for from the working directory too, not only from `base_dir`."""
    overrides: Callable[[str], list[str]]
    """The `key=value` that name it anew."""


def named_files(config: RunConfig, base_dir: Path) -> list[NamedFile]:
    """Every one that is there; what is not there may be on the cluster, or is an error that the run will name."""
    return [*_rewards(config, base_dir), *_tasks(config, base_dir), *_model(config, base_dir)]


def _rewards(config: RunConfig, base_dir: Path) -> Iterator[NamedFile]:
    for index, spec in enumerate(config.rewards):
        place, _, function = spec.name.rpartition(":")
        key = f"rewards.{index}"

        def anew(written: str, key: str = key, function: str = function, label: str = spec.component_name) -> list[str]:
            # It goes on being recorded under the name that the user gave it.
            return [override(f"{key}.name", f"{written}:{function}"), override(f"{key}.label", label)]

        if place.endswith(".py"):
            yield from _found(f"{key}.name", place, (base_dir, Path.cwd()), anew, absolute=True)


def modules_of_working_dir(config: RunConfig, base_dir: Path) -> list[str]:
    """Top-level modules of rewards that are found from where the command is run, and not beside the configuration."""
    found = []
    for spec in config.rewards:
        top = spec.name.rpartition(":")[0].partition(".")[0]
        if not top or spec.name.rpartition(":")[0].endswith(".py") or importlib.util.find_spec(top) is not None:
            continue
        here, beside = (any((start / name).exists() for name in (top, f"{top}.py")) for start in (Path.cwd(), base_dir))
        if here and not beside:
            found.append(top)
    return found


def _tasks(config: RunConfig, base_dir: Path) -> Iterator[NamedFile]:
    tasks: list[tuple[str, TaskConfig]] = [("task", config.task)]
    if config.warm_start is not None and config.warm_start.task is not None:
        tasks.append(("warm_start.task", config.warm_start.task))
    for key, task in tasks:
        place, _, name = task.name.rpartition(":")
        if place.endswith(".py"):

            def anew(written: str, key: str = key, name: str = name) -> list[str]:
                return [override(f"{key}.name", f"{written}:{name}")]

            yield from _found(f"{key}.name", place, (base_dir,), anew, absolute=True)
        for field in ("path", "eval_path"):
            value = getattr(task, field, None)
            if isinstance(value, str):
                yield from _found(f"{key}.{field}", value, (base_dir,), _renamed(f"{key}.{field}"))


def _model(config: RunConfig, base_dir: Path) -> Iterator[NamedFile]:
    if not isinstance(config.model, ScratchModel) and (base_dir / config.model.name).is_dir():
        yield from _found("model.name", config.model.name, (base_dir,), _renamed("model.name"))


def _found(
    key: str,
    written: str,
    starts: tuple[Path, ...],
    overrides: Callable[[str], list[str]],
    *,
    absolute: bool = False,
) -> Iterator[NamedFile]:
    """Nothing where it is not there, or is absolute and so the cluster's own."""
    relative = not Path(written).is_absolute()
    # Not resolved: a link in the working directory is packed as the file it leads to, under its own name.
    path = next((Path(os.path.normpath(start / written)) for start in starts if (start / written).exists()), None)
    if path is not None and (relative or absolute):
        yield NamedFile(
            key=key,
            written=written,
            path=path,
            relative=relative,
            also_from_working_dir=len(starts) > 1,
            overrides=overrides,
        )


def _renamed(key: str) -> Callable[[str], list[str]]:
    return lambda written: [override(key, written)]


def override(key: str, value: str) -> str:
    """`key=value`, quoted where YAML would not take it for this text."""
    try:
        plain = yaml.safe_load(value) == value
    except yaml.YAMLError:
        plain = False
    return f"{key}={value if plain else json.dumps(value)}"
