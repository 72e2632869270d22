"""The `rewards` and `reward_workers` sections, and the table of built-ins. It loads no plugin."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Sequence
from typing import Any

from pydantic import Field, field_validator

from weaver_rl.custom_resources import CustomResources
from weaver_rl.errors import ConfigError
from weaver_rl.section import Section

BUILTINS = {
    "task": "weaver_rl.rewards.graders:TaskScorer",
    "exact_match": "weaver_rl.rewards.graders:ExactMatch",
    "numeric": "weaver_rl.rewards.graders:Numeric",
    "math_verify": "weaver_rl.rewards.graders:MathVerify",
    "regex": "weaver_rl.rewards.graders:Regex",
    "length_penalty": "weaver_rl.rewards.shaping:LengthPenalty",
}


class RewardSpec(Section):
    """One reward function and what it counts.

    Example:
        RewardSpec(name="my_rewards.py:brevity", weight=0.1, args={"limit": 200})
    """

    name: str = Field(min_length=1)
    """A built-in (`task`, `exact_match`, `numeric`, `math_verify`, `regex`, `length_penalty`), `file.py:function` or
    `package.module:function`; a class in the place of the function is built with `args`, then called."""
    weight: float = 1.0
    """Factor of this reward in the sum. 0 records it without counting it."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the function, or of the class's constructor."""
    label: str | None = Field(default=None, min_length=1)
    """The name it is recorded under, unique in the run and without control characters; null is `name`."""
    timeout_s: float | None = Field(default=None, gt=0)
    """Seconds one rollout may take, null: `reward_workers.timeout_s`. A batched function gets this per rollout."""

    @field_validator("name")
    @classmethod
    def _name_can_be_resolved(cls, name: str) -> str:
        if problem := problem_with_name(name):
            raise ConfigError(problem)
        return name

    @field_validator("name", "label")
    @classmethod
    def _fits_in_a_line(cls, text: str | None) -> str | None:
        if text is not None and any(unicodedata.category(sign) == "Cc" for sign in text):
            raise ConfigError(f"{text!r} has a line break, a tab or another control character; metrics are named by it")
        return text

    @property
    def component_name(self) -> str:
        """The label, or the name where there is none: what `RewardComponent.name` says."""
        return self.label or self.name


class RewardWorkersConfig(Section):
    """The processes that run reward functions, and how many rewards may go missing."""

    num_workers: int = Field(default=2, ge=1)
    """Worker processes in the run."""
    resources: CustomResources = Field(default_factory=dict)
    """Custom resources of Ray for each worker, as `learner.resources`: `{reward: 1}`. Without, they reserve nothing and
    spread over all nodes, the head and those with GPUs too, which no autoscaler gives back while one is there."""
    timeout_s: float = Field(default=10.0, gt=0)
    """Seconds one reward function may take for one rollout before its process is killed."""
    memory_limit_mb: int = Field(default=1024, ge=16)
    """MiB of address space a plugin may add to what its worker uses once all plugins are loaded."""
    max_missing_fraction: float = Field(default=0.1, ge=0, le=1)
    """Share of a step's rollouts whose reward may be missing; above it the run stops."""
    start_timeout_s: float = Field(default=60.0, gt=0)
    """Seconds a worker process has to start and import its plugins."""
    unresponsive_after_s: float = Field(default=60.0, gt=0)
    """Seconds a worker may not answer while it scores; then it is replaced and another scores its group."""


def problem_with_name(name: str) -> str | None:
    """What is wrong with the form of a reward's name, or None; whether the file or module exists is asked at load."""
    place, colon, function = name.rpartition(":")
    if not colon:
        if name in BUILTINS:
            return None
        if name.endswith(".py"):
            return f"reward {name!r} names a file but no function in it: write {name}:FUNCTION"
        near = difflib.get_close_matches(name, BUILTINS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        return (
            f"no built-in reward is called {name!r}{hint}; "
            f"allowed: {', '.join(BUILTINS)}, file.py:function or package.module:function"
        )
    if not function.isidentifier():
        return f"reward {name!r}: expected the name of a function or class after ':', seen {function!r}"
    if not place or (not place.endswith(".py") and not all(part.isidentifier() for part in place.split("."))):
        return f"reward {name!r}: expected file.py or package.module before ':', seen {place!r}"
    return None


def check_labels(specs: Sequence[RewardSpec]) -> Sequence[RewardSpec]:
    """Returns `specs` if each is recorded under its own name; for the validator of the section that lists them."""
    seen: dict[str, int] = {}
    for index, spec in enumerate(specs):
        if spec.component_name in seen:
            raise ConfigError(
                f"rewards {seen[spec.component_name]} and {index} are both recorded as {spec.component_name!r}: "
                "give one of them its own label"
            )
        seen[spec.component_name] = index
    return specs
