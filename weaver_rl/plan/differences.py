"""Whether a trace can speak for a configuration: what changes lengths or times must be as it was recorded. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from weaver_rl.config import RunConfig
from weaver_rl.errors import UserError

DECISIVE = {
    "model": "the seconds of sampler and learner are those of the recorded model",
    "task": "lengths of prompts and completions come from the recorded task",
    "rollout.sampling": "lengths are those of the recorded sampling",
    "rewards": "what rewards take is what the recorded ones took",
    "correction.name": "a correction takes a forward of its own",
    "learner.dtype": "it changes the learner's seconds",
    "learner.num_threads": "it changes the learner's seconds",
    "learner.activation_checkpointing": "it changes the learner's seconds",
    "learner.num_gpus": "it changes the learner's seconds",
    "sampler.tensor_parallel": "it changes the seconds of an engine step",
    "sampler.num_threads": "it changes the seconds of an engine step",
    "sampler.num_gpus": "it changes the seconds of an engine step",
    "sampler.engine_args": "they change the seconds of an engine step",
    "weights.transport": "it changes the seconds of a weight sync",
}
"""Keys, and why a trace with another value says nothing. Everything else is simulated or takes no time."""

SIMULATED_ENGINE_ARGS = ("max_num_seqs", "max_num_batched_tokens", "enable_prefix_caching")


def require_comparable(config: RunConfig, recorded: RunConfig) -> None:
    """Raises UserError naming every difference that matters, and why."""
    found = [
        f"  {key}: recorded {before}, planned {now} ({why})"
        for key, why in DECISIVE.items()
        for before, now in _leaves(_value(recorded, key), _value(config, key))
    ]
    if found:
        raise UserError(
            "the trace is of another kind of run; these differences matter:\n"
            + "\n".join(found)
            + "\nRecord a few steps with this configuration, or plan with that of the trace (its config.yaml)"
        )


def _value(config: RunConfig, key: str) -> Any:
    value: Any = config.model_dump(mode="json")
    for part in key.split("."):
        value = value[part]
    if key == "sampler.engine_args":
        return {name: setting for name, setting in value.items() if name not in SIMULATED_ENGINE_ARGS}
    return value


def _leaves(before: Any, now: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """The values that differ, in words, each with where it stands."""
    if before == now:
        return
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in dict.fromkeys([*before, *now]):
            yield from _leaves(before.get(name), now.get(name), f"{place}{name}=")
    else:
        yield f"{place}{before!r}", f"{place}{now!r}"
