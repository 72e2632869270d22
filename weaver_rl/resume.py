"""What may change between a run and its resume. Pure; it reads no checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from weaver_rl.config import RunConfig
from weaver_rl.errors import ConfigError

FIXED = ("seed", "model", "task", "warm_start", "rollout.samples_per_prompt", "rollout.prompts_per_step")
"""Keys that say which data a step sees and which weights it starts from: with others the run would be another one."""


def changed_keys(earlier: RunConfig, now: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Every leaf key that differs, with both values."""
    before, after = _leaves(earlier.model_dump(mode="json")), _leaves(now.model_dump(mode="json"))
    keys = sorted(before.keys() | after.keys())
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def check_resumable(config_json: Path, now: RunConfig) -> dict[str, tuple[Any, Any]]:
    """The keys that changed since the run began.

    Raises:
        ConfigError: one of them belongs to `FIXED`; names it and both values.
    """
    try:
        earlier = RunConfig.model_validate_json(config_json.read_text())
    except FileNotFoundError:
        return {}
    except ValidationError as error:
        raise ConfigError(f"{config_json}: written by another version of weaver-rl, cannot compare: {error}") from None
    changed = changed_keys(earlier, now)
    refused = {k: v for k, v in changed.items() if any(k == fixed or k.startswith(fixed + ".") for fixed in FIXED)}
    if refused:
        listed = "; ".join(f"{key} was {before!r}, is {after!r}" for key, (before, after) in refused.items())
        raise ConfigError(
            f"cannot resume with another start or other data: {listed}. Put the old value back, or start a new run in "
            "another run_dir"
        )
    return changed


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {k: v for name, inner in value.items() for k, v in _leaves(inner, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): value}
