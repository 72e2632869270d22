"""The configuration of a run: composes the sections, reads YAML and overrides, explains what is wrong with them.

It imports nothing heavy: `weaver-rl show` answers without Ray, vLLM or torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import Field, Tag, ValidationError, model_validator
from pydantic_core import ErrorDetails

from weaver_rl.advantages import AdvantageConfig, CorrectionConfig, Grpo, LogprobGapLimit, NoCorrection, Reinforce
from weaver_rl.engines.config import SamplerConfig
from weaver_rl.errors import ConfigError
from weaver_rl.evaluation import EvalConfig
from weaver_rl.learner.config import LearnerConfig
from weaver_rl.losses.config import ImportanceSampling, LossConfig
from weaver_rl.models.config import ModelConfig
from weaver_rl.placement import ClusterConfig
from weaver_rl.rewards.config import RewardSpec, RewardWorkersConfig, check_labels
from weaver_rl.rollout import RolloutConfig
from weaver_rl.section import Section
from weaver_rl.tasks.config import TaskConfig
from weaver_rl.warm_start import WarmStartConfig
from weaver_rl.weights.config import WeightsConfig


class CheckpointConfig(Section):
    """Checkpoints to resume from."""

    every: int = Field(default=20, ge=0)
    """Steps between checkpoints, in either phase; 0: only after the warm start and the last step."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints kept."""


class RunConfig(Section):
    """A whole run, one file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the run and its folder."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Everything random in the run follows from it."""
    run_dir: Path | None = None
    """The run folder; null: runs/NAME under the working directory."""
    base_dir: Path | None = None
    """Where relative paths of tasks and rewards start; null: the directory of the configuration file."""
    model: ModelConfig
    """The policy that training starts from."""
    task: TaskConfig
    """Where prompts and their answers come from."""
    warm_start: WarmStartConfig | None = None
    """Supervised steps before the first rollout; null: none."""
    num_steps: int = Field(ge=0)
    """Steps of reinforcement learning."""
    rollout: RolloutConfig = RolloutConfig()
    """What one step samples, and how."""
    rewards: tuple[RewardSpec, ...] = Field(min_length=1)
    """Reward functions; a rollout's reward is their weighted sum."""
    reward_workers: RewardWorkersConfig = RewardWorkersConfig()
    """The processes that run the rewards, and how many rewards may go missing."""
    advantage: AdvantageConfig = Grpo()
    """How the rewards of a group become advantages."""
    correction: CorrectionConfig = NoCorrection()
    """What makes up for sampler and learner giving a token different probabilities."""
    loss: LossConfig = ImportanceSampling(name="importance_sampling")
    """What a step of reinforcement learning minimises."""
    logprob_gap: LogprobGapLimit = LogprobGapLimit()
    """How far sampler and learner may disagree before the run stops."""
    learner: LearnerConfig = LearnerConfig()
    """The processes that train, and their optimizer."""
    sampler: SamplerConfig = SamplerConfig()
    """The vLLM engines that sample."""
    weights: WeightsConfig = WeightsConfig()
    """How new weights get to the samplers, and how their arrival is checked."""
    cluster: ClusterConfig = ClusterConfig()
    """Which Ray cluster, and which actors share a GPU."""
    eval: EvalConfig = EvalConfig()
    """Evaluation on held-out prompts."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints to resume from."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.run_dir if self.run_dir is not None else Path("runs") / self.name

    @property
    def deciding_reward(self) -> str:
        """Label of the reward that decides whether a held-out completion was right."""
        return self.eval.reward if self.eval.reward is not None else self.rewards[0].component_name

    @model_validator(mode="after")
    def _check_across_sections(self) -> RunConfig:
        labels = [spec.component_name for spec in self.rewards]
        check_labels(self.rewards)
        if self.eval.reward is not None and self.eval.reward not in labels:
            raise ValueError(f"eval.reward is {self.eval.reward!r}, the rewards are {labels}")
        group = self.rollout.samples_per_prompt
        if group < 2 and not isinstance(self.advantage, Reinforce):
            raise ValueError(
                f"advantage.name {self.advantage.name} compares the rollouts of a group, rollout.samples_per_prompt is "
                f"{group}; 2 or more are needed, or advantage.name reinforce"
            )
        if self.num_steps and self.rollout.sampling.temperature == 0:
            raise ValueError("rollout.sampling.temperature is 0: greedy groups are all alike; use a value above 0")
        if self.num_steps and self.loss.name != "importance_sampling":
            raise ValueError(
                f"loss.name is {self.loss.name}: it ignores importance weights, so rewards would change nothing; "
                "use importance_sampling, or num_steps: 0 for a warm start alone"
            )
        max_len = self.sampler.engine_args.get("max_model_len")
        if isinstance(max_len, int) and max_len <= self.rollout.sampling.max_tokens:
            raise ValueError(
                f"sampler.engine_args.max_model_len is {max_len}, rollout.sampling.max_tokens "
                f"{self.rollout.sampling.max_tokens}: nothing is left for the prompt"
            )
        if self.weights.transport == "object_store" and self.sampler.tensor_parallel > 1:
            raise ValueError(
                f"weights.transport is object_store, sampler.tensor_parallel {self.sampler.tensor_parallel}: it loads "
                "engines of one worker only; use nccl"
            )
        return self


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file and applies `key.path=value` overrides (values in YAML).

    Raises:
        ConfigError: names each key, what was seen, what is allowed, and for an unknown key the nearest one.
    """
    data = read_yaml(path)
    for override in overrides:
        _apply_override(data, override)
    if data.get("base_dir") is None:
        data["base_dir"] = str(path.resolve().parent)
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{path}: " + explain(error, data)) from None


SectionType = TypeVar("SectionType", bound=Section)


def section(kind: type[SectionType], data: dict[str, Any], where: str) -> SectionType:
    """One section alone, its mistakes explained like those of a whole configuration."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{where}: " + explain(error, data)) from None


def pairs(arguments: Sequence[str]) -> dict[str, Any]:
    """`key=value` arguments as a mapping, nested by dots, values in YAML."""
    data: dict[str, Any] = {}
    for argument in arguments:
        _apply_override(data, argument)
    return data


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, or a ConfigError that says what is there instead."""
    try:
        data = _parse_yaml(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except _RepeatedKeyError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a mapping of keys is needed, seen {type(data).__name__}")
    return data


class _RepeatedKeyError(yaml.YAMLError):
    """A mapping that gives a key twice, of which YAML would silently drop the first."""


class _Loader(yaml.SafeLoader):
    """Reads what `yaml.safe_load` reads, but refuses a key given twice; `<<` may bring it a second time."""

    # Here, not in construct_mapping: there the keys of `<<` are already mixed with the mapping's own.
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            line = key.start_mark.line + 1
            if (first := lines.get((key.tag, key.value))) is not None:
                where = f"in line {line}" if first == line else f"in lines {first} and {line}"
                raise _RepeatedKeyError(f"key {key.value!r} is given twice, {where}; keep one")
            lines[key.tag, key.value] = line
        return node


def _parse_yaml(text: str) -> Any:
    return yaml.load(text, _Loader)


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML; `RunConfig` of it is equal."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _apply_override(data: dict[str, Any], override: str) -> None:
    dotted, separator, text = override.partition("=")
    if not separator or not dotted:
        raise ConfigError(f"override {override!r}: the form is key.path=value, for example learner.learning_rate=1e-4")
    try:
        value = _parse_yaml(text)
    except _RepeatedKeyError as error:
        raise ConfigError(f"override {override!r}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML: {error}") from None
    keys = dotted.split(".")
    node: Any = data
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        where = ".".join(keys[: depth + 1])
        if isinstance(node, list):
            if not key.isdecimal() or int(key) >= len(node):
                raise ConfigError(f"override {override!r}: {where} is no item of a list of {len(node)}")
            if last:
                node[int(key)] = value
            else:
                node = node[int(key)]
        elif isinstance(node, dict):
            if last:
                node[key] = value
            else:
                if node.get(key) is None:
                    node[key] = {}
                node = node[key]
        else:
            raise ConfigError(f"override {override!r}: {'.'.join(keys[:depth])} is {node!r}, it has no keys")


NEEDED = dict.fromkeys(("model_type", "model_attributes_type", "dict_type"), "a mapping of keys is needed")
NEEDED |= dict.fromkeys(("tuple_type", "list_type"), "a list is needed")
NEEDED |= {"too_short": "a list of at least {min_length} is needed", "path_type": "a path is needed"}
NEEDED |= dict.fromkeys(("int_type", "float_type"), "a number is needed")
"""In place of messages of pydantic that speak of Python's types and our classes."""


def explain(error: ValidationError, data: Any) -> str:
    """One line per mistake: key, what was seen, what is allowed."""
    lines = []
    items = error.errors(include_url=False)
    for item in items:
        if any(
            len(other["loc"]) > len(item["loc"]) and other["loc"][: len(item["loc"])] == item["loc"] for other in items
        ):
            continue  # what pydantic says of a list whose item is wrong only repeats that
        key = ".".join(str(part) for part in _keys(item, data)) or "the configuration"
        if item["type"] == "extra_forbidden":
            lines.append(f"{key}: {_unknown_key(item['loc'])}")
        elif item["type"] == "missing":
            lines.append(f"{key}: missing, must be given")
        elif item["type"] in ("union_tag_not_found", "union_tag_invalid"):
            lines.append(f"{key}.name: {_which_name(item)}")
        elif item["type"] == "value_error":
            lines.append(f"{key}: {item['msg'].removeprefix('Value error, ')}")
        else:
            lines.append(f"{key}: seen {item['input']!r}; {_needed(item)}")
    return "; ".join(lines) if len(lines) == 1 else "\n  " + "\n  ".join(lines)


def _needed(item: ErrorDetails) -> str:
    if item["type"] in NEEDED:
        return NEEDED[item["type"]].format(**item.get("ctx", {}))
    return item["msg"][0].lower() + item["msg"][1:]


def _which_name(item: ErrorDetails) -> str:
    """What stands in place of the name of one of several sections, and the names that may."""
    allowed = sorted(tag for tag, _ in _models_at(item["loc"]) if tag is not None)
    seen = item["input"].get("name") if isinstance(item["input"], dict) else item["input"]
    near = difflib.get_close_matches(str(seen), allowed, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{'missing' if seen is None else f'seen {seen!r}'}; allowed: {', '.join(allowed)}{hint}"


def _keys(item: ErrorDetails, data: Any) -> list[int | str]:
    """The part of a pydantic location that is really in the file (it also names the alternative of a union)."""
    keys: list[int | str] = []
    node = data
    for part in item["loc"]:
        inside = isinstance(node, list) and isinstance(part, int) and part < len(node)
        if (isinstance(node, dict) and part in node) or inside:
            node = node[part]
            keys.append(part)
    return [*keys, item["loc"][-1]] if item["type"] == "missing" else keys


def _unknown_key(location: tuple[int | str, ...]) -> str:
    """What is wrong with a key that a section does not have: the nearest that it has, else all of them."""
    *place, wrong = location
    allowed = sorted({name for _, model in _models_at(place) for name in model.model_fields})
    alternatives = dict(_models_at(place[:-1]))
    kind = place[-1] if place and place[-1] in alternatives else None
    if kind not in (None, "custom") and any(wrong in model.model_fields for model in alternatives.values()):
        return f"{kind!r} has no {wrong}; allowed: {', '.join(allowed)}"
    if close := difflib.get_close_matches(str(wrong), allowed, n=1):
        return f"unknown key; did you mean {close[0]!r}?"
    whose = "a custom class's own keys" if kind == "custom" else "keys of what `name` names"
    hint = f"; {whose} go under args" if "args" in allowed else ""
    return f"unknown key; allowed: {', '.join(allowed)}{hint}" if allowed else "unknown key"


def _models_at(location: Sequence[int | str]) -> list[tuple[str | None, type[Section]]]:
    """The sections that may stand at a location, each with its tag where it is one of several."""
    models: list[tuple[str | None, type[Section]]] = [(None, RunConfig)]
    for part in location:
        fields = [model.model_fields[part] for _, model in models if part in model.model_fields]
        inner = [found for field in fields for found in _models_in(field.annotation)]
        # An index says nothing about fields, and a tag (pydantic names it in the location) only narrows: stay here.
        models = inner or [(tag, model) for tag, model in models if tag == part] or models
    return models


def _models_in(annotation: Any, tag: str | None = None) -> list[tuple[str | None, type[Section]]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [(tag or _literal_name(annotation), annotation)]
    tags = [item.tag for item in getattr(annotation, "__metadata__", ()) if isinstance(item, Tag)]
    parts = getattr(annotation, "__args__", ())
    return [found for part in parts for found in _models_in(part, tags[0] if tags else tag)]


def _literal_name(model: type[Section]) -> str | None:
    field = model.model_fields.get("name")
    names = get_args(field.annotation) if field is not None and get_origin(field.annotation) is Literal else ()
    return str(names[0]) if len(names) == 1 else None
