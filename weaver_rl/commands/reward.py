"""`weaver-rl reward`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from weaver_rl.types import Rollout


def reward(
    name: Annotated[str, typer.Argument(help="FILE.py:FUNCTION, package.module:FUNCTION or a built-in.")],
    rollouts: Annotated[Path, typer.Option(help="Run folder, or JSONL with prompt, completion, optional answer.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="key=value … for the function (YAML values).")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Rollouts to try at most.")] = 256,
    timeout_s: Annotated[float, typer.Option(help="Seconds one rollout may take.")] = 10.0,
    memory_limit_mb: Annotated[int, typer.Option(help="MiB the function may add to its process.")] = 1024,
) -> None:
    """Try a reward on recorded rollouts, without any training."""
    from weaver_rl.config_file import pairs, section
    from weaver_rl.rewards.config import RewardSpec, RewardWorkersConfig
    from weaver_rl.rewards.tryout import load_rollouts, try_reward

    spec = section(RewardSpec, {"name": name, "args": pairs(arguments or [])}, "reward")
    workers = section(RewardWorkersConfig, {"timeout_s": timeout_s, "memory_limit_mb": memory_limit_mb}, "options")
    found = load_rollouts(rollouts, limit)
    scorer = _task_scorer(rollouts) if name == "task" else None
    status = try_reward(spec, found, Console(), workers=workers, base_dir=Path.cwd(), task_scorer=scorer)
    raise typer.Exit(status)


def _task_scorer(run: Path) -> Callable[[Rollout], float] | None:
    """The scorer of the task that a run folder was trained on; None for rollouts of any other kind."""
    from weaver_rl.config import RunConfig
    from weaver_rl.run_folder import RunFolder
    from weaver_rl.tasks.load import load_scorer, load_task

    config_json = RunFolder(run).config_json
    if not config_json.is_file():
        return None
    config = RunConfig.model_validate_json(config_json.read_text())
    base_dir = config.base_dir or Path.cwd()
    return load_scorer(config.task, base_dir, load_task(config.task, base_dir, config.seed))
